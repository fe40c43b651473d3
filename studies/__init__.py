"""What fills data/results: one module per file of results."""
