"""Weights in the layout that a decode step reads fastest."""
