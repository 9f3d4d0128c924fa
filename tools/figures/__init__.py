"""One module per figure: its computations, and a function that draws it for a `Subject` (models and images)."""
