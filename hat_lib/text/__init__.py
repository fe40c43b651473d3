"""Corpora to token blocks, text sampled from the base, token classes."""
