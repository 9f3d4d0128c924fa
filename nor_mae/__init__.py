"""The `nor-mae` command. The code runs from its checkout, so that no module called `util` or `data` is installed."""
