"""Executes one step on a device. Knows tensors; never allocates blocks."""
