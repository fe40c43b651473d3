"""From a requested capacity or exit rate to thresholds, by measuring on held-out text."""
