"""Notebooks, batches of notebooks, and their environment."""
