"""From result rows or a trace to a Figure."""
