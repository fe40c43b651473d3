"""Kernels for a GPU, ready for the day there is one."""
