"""Studies whose datasets are not at hand, where only the study's own numbers count: a forecast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_UNREAD = ContextVar("unread", default=False)


@contextmanager
def unread(really: bool = True) -> Iterator[None]:
    """Inside, a study is parsed without its datasets being downloaded, hashed or looked into.

    What comes of it can be forecast and not run: its trials do not know what they would read.
    """
    token = _UNREAD.set(really)
    try:
        yield
    finally:
        _UNREAD.reset(token)


def left_unread() -> bool:
    return _UNREAD.get()
