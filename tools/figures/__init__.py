"""One module per picture: a function from a `Subject` (models and images) to a figure, and its computations."""
