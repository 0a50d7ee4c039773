"""The command line as a record keeps it: what repeats a run, and no folder of somebody's machine.

Every argument is kept. Of a path that names folders of the machine (absolute, at home, or out of
the working folder) only the last part is; a path inside the working folder stays as it was given.
It says what was asked for and decides nothing: no identity depends on it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

_OPTION = re.compile(r"--[\w-]+=")
_QUOTED = re.compile(r"""(['"])(.*?)\1""")
_MACHINES = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|file:")
_SEPARATORS = re.compile(r"[/\\]+")


def told(arguments: Sequence[str]) -> str:
    """What follows `holdfast` on a command line, as it may be shown to others."""
    return shlex.join(["holdfast", *map(_without_folders, arguments)])


def _without_folders(argument: str) -> str:
    option = _OPTION.match(argument)
    name = option[0] if option else ""
    value = argument.removeprefix(name)
    key, equals, text = value.partition("=")
    if _names_folders(key):
        return name + _last(value)
    # path=value of --set: the value is TOML, in which paths are quoted, or text without quotes.
    if equals and _QUOTED.search(text):
        return f"{name}{key}={_QUOTED.sub(_in_quotes, text)}"
    return f"{name}{key}={_last(text)}" if equals and _names_folders(text) else argument


def _in_quotes(found: re.Match[str]) -> str:
    quote, text = found.groups()
    return f"{quote}{_last(text)}{quote}" if _names_folders(text) else found[0]


def _names_folders(text: str) -> bool:
    return _MACHINES.match(text) is not None or ".." in _SEPARATORS.split(text)


def _last(path: str) -> str:
    parts = [part for part in _SEPARATORS.split(path) if part]
    return parts[-1] if parts and not parts[-1].startswith("~") else "~"
