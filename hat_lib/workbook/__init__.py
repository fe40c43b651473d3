"""Notebooks, batches of notebooks, and the screen."""
