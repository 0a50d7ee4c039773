"""Whether edits fire in passes over some rows after the other: asked of all of them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.edits import Deciding, Edit, Placed
from holdfast.sites import Site


@dataclass(frozen=True)
class Counted:
    """An edit as it is, but that it may leave alone every token of some passes: what it touched is
    added up, and `check` asks the edit whether that is enough."""

    edit: Edit
    fired: Counter[Site] = field(default_factory=Counter, repr=False, compare=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.edit.sites

    @property
    def decides_on(self) -> str:
        return self.edit.decides_on if isinstance(self.edit, Deciding) else ""

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return self.edit.selects(site, frame)

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        return self.edit.apply(site, x, frame)

    def check_inside(self, batch: Batch, n_generated: int = 0) -> None:
        if isinstance(self.edit, Placed):
            self.edit.check_inside(batch, n_generated)

    def check_fired(self, site: Site, n_fired: int) -> None:
        self.fired[site] += n_fired

    def check(self) -> None:
        """Raise EditError if acting on so many tokens of all passes is not what was asked."""
        for site in self.sites:
            self.edit.check_fired(site, self.fired[site])


def counted(edits: Sequence[Edit]) -> tuple[Counted, ...]:
    return tuple(Counted(edit) for edit in edits)
