"""What fills data/results: one module a file of results."""
