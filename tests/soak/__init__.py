"""What takes too long for `make test`: randomly drawn models, kills, leaks. `make soak` runs them in large numbers,
`test_soak.py` a few."""
