"""One point of the residual stream, four spellings."""

from __future__ import annotations

import pytest

from holdfast.errors import StudyError
from holdfast.sites import Site


@pytest.mark.parametrize(
    "text",
    [
        "blocks.12.hook_resid_post",
        "blocks.13.hook_resid_pre",
        "model.layers.12",
        "layers.12",
        "12-gemmascope-res-16k",
        "resid_post.12",
        "resid_pre.13",
    ],
)
def test_all_spellings_are_one_site(text: str) -> None:
    assert Site.parse(text) == Site(13)
    assert str(Site.parse(text)) == "blocks.12.hook_resid_post"


def test_every_printed_spelling_reads_back() -> None:
    for depth in range(4):
        for text in Site(depth).spellings():
            assert Site.parse(text) == Site(depth)


def test_order_is_forward_order() -> None:
    assert sorted([Site(3), Site(0), Site(2)]) == [Site(0), Site(2), Site(3)]


@pytest.mark.parametrize("text", ["blocks.1.hook_mlp_out", "12", "", "blocks.x.hook_resid_post"])
def test_other_places_are_refused(text: str) -> None:
    with pytest.raises(StudyError, match=r"expected blocks\.12\.hook_resid_post"):
        Site.parse(text)
