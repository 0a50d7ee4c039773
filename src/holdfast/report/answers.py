"""Answers that are begun for the model, or drawn many times, the clamp on: nothing is searched."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from holdfast.grid import describe
from holdfast.report.data import Attempt, ReportData
from holdfast.report.section import Section
from holdfast.summary import headline

TITLE = "The answer's side: begun for the model, and drawn"


def section(data: ReportData) -> Section | None:
    """None where nothing was begun or drawn."""
    if not data.answers:
        return None
    names = dict.fromkeys(each.row["audit"] for each in data.answers)
    audits = [
        {
            "name": name,
            "white_box": [
                {"label": ", ".join([row["constraint"], *describe(row["point"])]), "row": row}
                for row in headline([r for r in data.summary["trials"] if r["audit"] == name])
            ],
            "tables": _tables([each for each in data.answers if each.row["audit"] == name]),
        }
        for name in names
    ]
    return Section("answers", TITLE, {"audits": audits})


def _tables(made: list[Attempt]) -> list[dict[str, Any]]:
    """One for neighbors whose answers were made alike: their rows have the same columns."""
    tables = []
    for columns, own in groupby(made, key=lambda each: each.row["table"]["columns"]):
        each = list(own)
        tables.append(
            {
                "columns": columns,
                "made": [
                    {
                        "label": ", ".join([one.row["label"], *describe(one.row["point"])]),
                        "row": one.row,
                        "labels": _labels(one),
                    }
                    for one in each
                ],
            }
        )
    return tables


def _labels(made: Attempt) -> list[dict[str, str]]:
    """What the judge said under each condition, but for those that every audit has."""
    found = made.record["result"]["labels"]
    return [
        {"name": name, "said": ", ".join(f"{n} {w.replace('_', ' ')}" for w, n in said.items())}
        for name, said in found.items()
        if said
    ]
