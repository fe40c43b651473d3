"""From a requested capacity or exit rate to thresholds, by measuring held-out text."""
