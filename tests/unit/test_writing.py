"""Which letters are of another writing: counted by their script, whatever else a text holds."""

from __future__ import annotations

import math

import pytest

from holdfast.judges.writing import foreign_share, script_of


@pytest.mark.parametrize(
    ("letter", "script"),
    [("a", "LATIN"), ("é", "LATIN"), ("ａ", "LATIN"), ("ж", "CYRILLIC"), ("ω", "GREEK"),
     ("ק", "HEBREW"), ("字", "CJK"), ("の", "CJK"), ("ㅎ", "CJK"), ("1", ""), ("!", ""), (" ", "")],
)  # fmt: skip
def test_scripts(letter: str, script: str) -> None:
    assert script_of(letter) == script


def test_shares_by_hand() -> None:
    asked, answered = "How is it made?", "With flour, 200 g."
    assert foreign_share("Just like that — 3 eggs!", asked, answered) == 0
    assert foreign_share("ab жж", asked, answered) == 0.5
    assert foreign_share("字字字の", asked, answered) == 1
    # What the prompt or the clean answer is written in is at home.
    assert foreign_share("字 and ж", asked, "字") == pytest.approx(1 / 5)
    assert foreign_share("字の", "字") == 0, "Japanese mixes its scripts"


@pytest.mark.parametrize(("reply", "own"), [("", "abc"), ("12 !?", "abc"), ("abc", "12")])
def test_without_letters_there_is_nothing_to_say(reply: str, own: str) -> None:
    assert math.isnan(foreign_share(reply, own))
