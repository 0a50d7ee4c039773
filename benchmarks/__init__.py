"""Benchmarks: each checks a claim about speed or search quality, and fails if it does not hold.

Run with `python -m benchmarks` from the repository's root; docs/benchmarks.md explains each.
"""
