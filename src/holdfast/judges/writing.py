"""Writing systems: letters of a script that neither the prompt nor its clean answer is written in.

A clamp that breaks a multilingual model often makes it go on in another script. That can be told
from the letters alone; which of two languages of one script a text is in cannot.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

SAME = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HANGUL": "CJK"}
"""Scripts that ordinary texts mix with each other."""


@lru_cache(maxsize=65536)
def script_of(character: str) -> str:
    """The script of a letter by its Unicode name, "" of anything else."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").replace("FULLWIDTH ", "").replace("HALFWIDTH ", "")
    first = name.split(" ")[0].split("-")[0]
    return SAME.get(first, first)


def foreign_share(reply: str, *own: str) -> float:
    """Share of a reply's letters in scripts that none of the texts `own` has; NaN without letters.

    Where `own` has no letter there is nothing to be foreign to: NaN.
    """
    known = {script_of(c) for text in own for c in text} - {""}
    letters = [script_of(c) for c in reply if script_of(c)]
    if not letters or not known:
        return float("nan")
    return sum(script not in known for script in letters) / len(letters)
