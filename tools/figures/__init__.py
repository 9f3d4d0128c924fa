"""One picture a file: a function from a `Subject` (models, and images for them) to a figure, and the maths it shows."""
