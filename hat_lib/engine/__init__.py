"""Decoding at the speed of memory: one compiled step for a few tokens; it knows arrays but nothing of the method."""
