"""Perplexity, agreement, lm-evaluation-harness, routing patterns."""
