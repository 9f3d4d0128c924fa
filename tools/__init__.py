"""Things done to finished or future runs; each file is a command."""
