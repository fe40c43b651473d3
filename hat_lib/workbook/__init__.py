"""Notebooks, batches of them, and their environment."""
