"""The kinds that a study can name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from holdfast.terminal import console

if TYPE_CHECKING:
    from holdfast.kinds import Description


def kinds_table(descriptions: Sequence[Description]) -> None:
    table = Table()
    for name in ("family", "kind", "what it is", "fields"):
        table.add_column(name, overflow="fold")
    for d in descriptions:
        table.add_row(d.family, d.kind, d.summary, "\n".join(d.fields))
    console().print(table)
