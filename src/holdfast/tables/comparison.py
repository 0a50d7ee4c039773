"""A comparison, and the published figures there are to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from holdfast.terminal import console

if TYPE_CHECKING:
    from holdfast.compare import Comparison
    from holdfast.published.beside import PublishedComparison

WIDE = 168
"""Columns of a terminal in which no cell of a comparison has to be cut."""


def comparison_table(comparison: Comparison | PublishedComparison) -> None:
    """What is unlike first, then a row a point."""
    from holdfast.report.compared import page_of

    page, out = page_of(comparison), console(WIDE)
    for line in page.head:
        out.print(line, markup=False, soft_wrap=True)
    table = Table(title=page.title, title_justify="left", box=SIMPLE_HEAD)
    for name in page.columns:
        # Where there is no room for it a least width would push other columns off the edge.
        wide = "trial" in name and out.width >= WIDE
        table.add_column(name, overflow="fold", min_width=26 if wide else None)
    for row in page.rows:
        table.add_row(*map(escape, row))
    out.print(table)
    for line in page.foot:
        out.print(line, style="dim", markup=False, soft_wrap=True)


def published_list() -> None:
    """The sets of published figures: name, behavior, figures, subject, source."""
    from holdfast.published import PREFIX, published_names, read_published

    table = Table(box=SIMPLE_HEAD)
    for name in ("name", "behavior", "figures", "of", "source"):
        table.add_column(name, overflow="fold")
    for name in published_names():
        found = read_published(name)
        cells = (PREFIX + name, found.behavior, str(len(found.points)), found.subject, found.source)
        table.add_row(*map(escape, cells))
    console().print(table)
