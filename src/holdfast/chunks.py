"""What is too large to be made whole is made a chunk at a time."""

from __future__ import annotations

ENTRIES = 2**24
"""Most numbers of a chunk: 64 MB in float32."""


def per_chunk(numbers: int) -> int:
    """How many things of so many numbers each make a chunk; at least one."""
    return max(1, ENTRIES // max(1, numbers))
