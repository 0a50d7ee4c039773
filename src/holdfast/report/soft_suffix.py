"""Soft suffixes: the prompt's side searched, monitored or not, beside the audit's own search."""

from __future__ import annotations

from holdfast.grid import describe
from holdfast.report.data import ReportData
from holdfast.report.section import Section
from holdfast.summary import headline

TITLE = "Soft suffix: the prompt's side, with and without a monitor"


def section(data: ReportData) -> Section | None:
    """None where no suffix was searched."""
    if not data.suffixes:
        return None
    taken = {p.main.row["id"]: p.main.measured("lane_steps") or {} for p in data.points}
    names = dict.fromkeys(each.row["audit"] for each in data.suffixes)
    audits = [
        {
            "name": name,
            "white_box": [
                {
                    "label": ", ".join([row["constraint"], *describe(row["point"])]),
                    "row": row,
                    "passes": taken.get(row["id"], {}).get("estimate"),
                }
                for row in headline([r for r in data.summary["trials"] if r["audit"] == name])
            ],
            "suffixes": [
                {
                    "label": ", ".join([each.row["label"], *describe(each.row["point"])]),
                    "row": each.row,
                    # All of its steps, and the iterate after the last one is looked at too.
                    "passes": each.trial.attack.own_search.steps + 1,
                }
                for each in data.suffixes
                if each.row["audit"] == name
            ],
        }
        for name in names
    ]
    return Section("soft_suffix", TITLE, {"audits": audits})
