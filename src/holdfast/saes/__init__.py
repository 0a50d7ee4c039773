"""Sparse autoencoders: the record, its slices, and the layouts they are loaded from."""
