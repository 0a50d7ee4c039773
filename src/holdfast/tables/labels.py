"""What people's labels amount to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from holdfast.audit_sheet import PEOPLE
from holdfast.terminal import console
from holdfast.wording import coefficient, percent, share

if TYPE_CHECKING:
    from holdfast.judges.agreement import PairAgreement
    from holdfast.manual_audit import ManualAudit
    from holdfast.measure import Measurement


def labels_table(found: ManualAudit) -> None:
    """What people's labels amount to: agreement, and rates as they would have counted them."""
    out = console()
    out.print(
        f"{found.audit}, {found.constraint}: {found.n} replies, {found.n_unlabelled} without a "
        f"label, {found.n_unsettled} on which annotators differ and nobody settled"
    )
    table = Table(title="agreement", title_justify="left", box=SIMPLE_HEAD)
    for name in ("condition", "first", "second", "replies", "equal", "kappa [95%]"):
        table.add_column(name)
    between = [("all", pair) for pair in (found.between.pairs if found.between else ())]
    people = [
        (condition, pair)
        for condition, judged in found.with_judges.items()
        for pair in judged.pairs
        if pair.first == PEOPLE
    ]
    for condition, pair in between + people:
        equal = percent(pair.share_equal)
        kappa = _bounded(pair.kappa, pair.low, pair.high) if pair.kappa is not None else pair.reason
        table.add_row(condition, pair.first, pair.second, str(pair.n), equal, kappa)
    out.print(table)
    for condition, pair in between + people:
        if len(pair.labels) > 1:
            out.print(_confusion(f"{condition}: {pair.first} by {pair.second}", pair))
    table = Table(title="rates", title_justify="left", box=SIMPLE_HEAD)
    for name in ("condition", "counted", "judge", "as it counts", "as people do", "corrected",
                 "by errors in all conditions"):  # fmt: skip
        table.add_column(name)
    for rate in found.rates:
        counted = "behavior" if rate.shows else "its opposite"
        shares = map(_share, (rate.automatic, rate.people, rate.corrected, rate.pooled))
        table.add_row(rate.condition, counted, rate.judge, *shares)
    out.print(table)
    unscored = [m for r in found.rates for m in (r.people, r.corrected, r.pooled)]
    for reason in dict.fromkeys(m.reason for m in unscored if m.estimate is None):
        out.print(f"–: {reason}", style="dim")


def _share(m: Measurement) -> str:
    return share(m.low, m.estimate, m.high)


def _bounded(value: float, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{coefficient(low)}, {coefficient(high)}]"
    return f"{coefficient(value)}{ends}"


def _confusion(title: str, pair: PairAgreement) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("", *pair.labels):
        table.add_column(name)
    for label, counts in zip(pair.labels, pair.confusion, strict=True):
        table.add_row(label, *map(str, counts))
    return table
