"""Write the stored results into docs/benchmarks.md, between two markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import HERE, NAMES, RESULTS, Bound, shown

PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def write_docs() -> Path:
    """Put what results/*.json say into the page; the rest of the page stays as it is."""
    text = PAGE.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE.name} has no {BEGIN} … {END}"
    PAGE.write_text(f"{before}{BEGIN}\n\n{results()}\n{END}{after}")
    return PAGE


def results() -> str:
    """Every stored result as markdown, in the order of `NAMES`."""
    stored = [RESULTS / f"{name}.json" for name in NAMES]
    sections = [section(json.loads(path.read_text())) for path in stored if path.is_file()]
    return "\n".join(sections) or "No results are stored; `python -m benchmarks` makes them.\n"


def section(data: dict[str, Any]) -> str:
    bounds = [
        Bound(
            what=bound["what"],
            value=float("nan") if bound["value"] is None else bound["value"],
            limit=bound["limit"],
            at_least=bound["at_least"],
            unit=bound["unit"],
        )
        for bound in data["bounds"]
    ]
    lines = [f"### {data['benchmark']}", "", data["claim"], ""]
    lines += [f"* **{'holds' if bound.held else 'missed'}**: {bound}" for bound in bounds]
    lines += ["", _row(data["columns"]), _row([":--"] * len(data["columns"]))]
    lines += [_row([shown(cell) for cell in row]) for row in data["rows"]]
    lines += ["", f"Settings: {_pairs(data['settings'])}.", ""]
    lines += [f"Measured with {_pairs(data['environment'])}.", ""]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in values.items())
