"""What stands beside the verdicts and is no part of them: attempts, answers, soft suffixes."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from holdfast.grid import describe
from holdfast.summary import beside
from holdfast.wording import NOTHING, norm, percent, percent_range, power, share


def attempts_table(summary: dict[str, Any], out: Console) -> None:
    """Attempts in the prompt under the searches, in a table of their own: they have no verdict."""
    if not summary["attempts"]:
        return
    table = _titled("the same prompts asked in other words, clamp on")
    for name in ("audit", "attempt", "template"):
        table.add_column(name, no_wrap=True)
    for name in ("back, clamp on", "no clamp", "turned anyway", "search, same prompts"):
        table.add_column(name, justify="right")
    for row in summary["attempts"]:
        searched = _searched(row, summary)
        label = ", ".join([row["attack"], *describe(row["point"])])
        asked = f"{row['n_asked']}/{row['n_valid']}"
        of = f"any of {len(row['templates'])}"
        turned = percent(row["turned_rate"])
        table.add_row(row["audit"], label, of, _back(row), asked, turned, searched)
        for each in row["templates"]:
            rate = each["recovery_rate"]
            bounds = {"ci_low": rate["low"], "ci_high": rate["high"]}
            asked = f"{each['n_asked']}/{each['n'] - each['n_excluded']}"
            turned = f"{each['n_turned']}/{each['n_opposed']}" if each["n_opposed"] else NOTHING
            table.add_row("", "", escape(each["name"]), _back(each | bounds), asked, turned, "")
    out.print(table)
    out.print(
        "back: of the prompts on which the words work without the clamp. turned anyway: prompts on "
        "which the model does the opposite by itself, and does not in these words, without any "
        "clamp; where many are turned, it need not be the clamp that fails.\n",
        style="dim",
    )


def answers_table(summary: dict[str, Any], out: Console) -> None:
    """Answers begun for the model, or drawn, under the searches: they have no verdict."""
    if not summary.get("answers"):  # summaries of earlier versions have none
        return
    table = _titled("answers begun for the model, or drawn, clamp on")
    for name in ("audit", "attack", "how"):
        table.add_column(name)
    for name in ("share [95%]", "of", "search, same prompts"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["answers"]:
        searched = _searched(row, summary)
        label = ", ".join([row["label"], *describe(row["point"])])
        table.add_row(row["audit"], label, "any of these", _back(row), "", searched)
        for each in row["table"]["rows"]:
            for key, title in row["table"]["columns"].items():
                cell = each["cells"][key]
                how = f"{each['name']}: {title}"
                table.add_row("", "", escape(how), _cell(cell), str(cell["n"]), "")
    out.print(table)
    out.print(
        "Nothing is searched. What is given to the model counts only if what it adds, read alone, "
        "shows the behavior too; of many drawn answers one may show anything, so that beside them "
        "stands how often something comes that should not be there.\n",
        style="dim",
    )


def suffixes_table(summary: dict[str, Any], out: Console) -> None:
    """Soft suffixes under the searches, in a table of their own: they have no verdict."""
    if not summary["suffixes"]:
        return
    table = _titled("a soft suffix in the same prompts, clamp on there too")
    for name in ("audit", "suffix"):
        table.add_column(name, min_width=12)
    for name in ("back", "placeholder alone", "norm", "drift", "from the prompt as it was",
                 "search, same prompts"):  # fmt: skip
        table.add_column(name, justify="right")
    for row in summary["suffixes"]:
        searched = _searched(row, summary)
        own = row["label"].removeprefix(f"{row['attack']}, ")
        label = ", ".join([own, *describe(row["point"])])
        drifts = (row["drift_relative_mean"], row["drift_original_relative_mean"])
        table.add_row(
            row["audit"], label, _back(row | {"n_asked": row["n_searched"]}),
            f"{row['n_placeholder']}/{row['n_valid']}", norm(row["norm_relative_median"]),
            *map(power, drifts), searched,
        )  # fmt: skip
    out.print(table)
    out.print(
        "back: of the prompts that the placeholder alone does not bring back. norm: of what was "
        "added, relative to the placeholder's. drift: of the clamped features, relative, the mean; "
        "from the same prompt with the placeholder, and from the prompt as it was.\n",
        style="dim",
    )


def _cell(cell: dict[str, Any]) -> str:
    """A measured share with its interval, if there is one; another figure as it is."""
    if not cell["unit"].startswith("share"):
        return power(cell["estimate"])
    return share(cell["low"], cell["estimate"], cell["high"])


def _titled(what: str) -> Table:
    return Table(title=f"{what} (no part of a verdict)", title_justify="left", box=SIMPLE_HEAD)


def _searched(row: dict[str, Any], summary: dict[str, Any]) -> str:
    """What the searches on the prompts of a row brought back."""
    found = beside(row, summary["trials"])
    return ", ".join(f"{each['n_recovered']}/{each['n_valid']}" for each in found)


def _back(row: dict[str, Any]) -> str:
    """Recovered of those a template works on without the clamp; no rate where it works on none."""
    if not row["n_asked"]:
        return NOTHING
    return f"{row['n_recovered']}/{row['n_asked']} {percent_range(row['ci_low'], row['ci_high'])}"
