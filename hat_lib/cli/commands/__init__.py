"""The commands of `hat`."""
