"""Generation at a capacity or a target speedup, self-speculative decoding, speed on this machine."""
