"""The shipped model organism: an invented world, its corpus, the training, the pinned weights."""
