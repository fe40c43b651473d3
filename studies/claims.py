"""The claims: the table of expected performance in the README of *Hierarchical Adaptive Transformer: Two-Dimensional
Adaptive Computation* (2024), for a frozen base."""

PROMISED = {0.9: (1.1, 0.01), 0.7: (1.3, 0.03), 0.55: (1.6, 0.08), 0.4: (1.8, 0.12)}
"""capacity -> speedup and increase in perplexity"""
