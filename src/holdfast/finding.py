"""A finding of a check: what was expected, what was measured, what to do."""

from __future__ import annotations

from holdfast.config import Config


class Finding(Config):
    """One check and its outcome."""

    check: str
    passed: bool
    expected: str
    measured: str
    remedy: str = ""
