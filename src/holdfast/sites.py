"""Where in the residual stream: one canonical point, four spellings.

`resid_post l` and `resid_pre l+1` are the same tensor, so a site is a depth: the number of blocks
that have run. Depth 0 is the embedding, depth l+1 the output of block l.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from holdfast.errors import StudyError

_SPELLINGS = (
    # SAELens / TransformerLens
    (re.compile(r"blocks\.(?P<layer>\d+)\.hook_resid_(?P<stream>pre|post)"), None),
    # Hugging Face module: its output
    (re.compile(r"(?:model\.)?layers\.(?P<layer>\d+)"), "post"),
    # Neuronpedia source id
    (re.compile(r"(?P<layer>\d+)-(?:[a-z0-9_]+-)*res(?:[-_][a-z0-9_-]+)?"), "post"),
    # interp-engine
    (re.compile(r"resid_(?P<stream>pre|post)\.(?P<layer>\d+)"), None),
)


@dataclass(frozen=True, order=True)
class Site:
    """A point of the residual stream, ordered by depth.

    depth: number of blocks that ran before it; 0 is the embedding.
    """

    depth: int

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise StudyError(f"a site's depth is 0 or more, got {self.depth}")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read any of the four spellings. Raises StudyError naming them."""
        for pattern, implied in _SPELLINGS:
            match = pattern.fullmatch(text.strip())
            if match:
                stream = implied or match["stream"]
                return cls(int(match["layer"]) + (stream == "post"))
        raise StudyError(
            f"cannot read the site {text!r}: expected blocks.12.hook_resid_post (or _pre), "
            "model.layers.12, 12-gemmascope-res-16k or resid_post.12; only the residual stream "
            "is supported"
        )

    @property
    def layer(self) -> int:
        """The block whose output this is; -1 for the embedding."""
        return self.depth - 1

    def __str__(self) -> str:
        if self.depth == 0:
            return "blocks.0.hook_resid_pre"
        return f"blocks.{self.layer}.hook_resid_post"

    def spellings(self) -> tuple[str, ...]:
        """Every name this point goes by, the canonical one first."""
        if self.depth == 0:
            return (str(self), "resid_pre.0")
        return (
            str(self),
            f"blocks.{self.depth}.hook_resid_pre",
            f"model.layers.{self.layer}",
            f"resid_post.{self.layer}",
        )
