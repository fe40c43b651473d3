"""Controls at equal compute."""
