"""From a table of results or a trace to a Figure."""
