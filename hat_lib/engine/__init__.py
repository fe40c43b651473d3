"""Decoding at the speed of memory: one compiled step for a few tokens; it knows arrays and nothing of the method."""
