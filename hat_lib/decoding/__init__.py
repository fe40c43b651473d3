"""The way of a token through generate (`generate`, top to bottom); drafts, target speedups, speed on this machine."""
