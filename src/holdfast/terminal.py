"""What the command line shows: progress and tables, with rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from holdfast.audit_sheet import PEOPLE
from holdfast.finding import Finding, tally
from holdfast.grid import describe
from holdfast.summary import beside, headline

if TYPE_CHECKING:
    from holdfast.compare import Comparison
    from holdfast.judges.agreement import PairAgreement
    from holdfast.kinds import Description
    from holdfast.manual_audit import ManualAudit
    from holdfast.measure import Measurement
    from holdfast.planning import Plan
    from holdfast.published.beside import PublishedComparison
    from holdfast.run import Watcher
    from holdfast.trial import Trial

_LEVEL = {"error": "bold red", "fault": "bold red", "caution": "yellow"}
_STYLE = {"held": "green", "breached": "bold red", "forcible": "yellow", "undecided": "dim"}


def console() -> Console:
    # In a log there is no terminal to ask for its width; 80 columns would fold every table.
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=132)


@contextmanager
def progress(plan: Plan, despite_faults: bool = False) -> Iterator[Watcher]:
    """What preflight found, then a bar over the study's trials that names the one stored last.

    Faults end a run with a message that says all of them; they are listed here where they do not.
    """
    from holdfast.run import Watcher

    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task("loading", total=len(plan.trials))

        def stored(n_stored: int, n_all: int, trial: Trial | None) -> None:
            name = "loading" if trial is None else f"{trial.audit}: {trial.label}"
            if trial is not None and trial.control.kind != "none":
                name += f", {trial.control.kind}"
            bar.update(task, description=name, completed=n_stored)

        def checked(findings: Sequence[Finding], seconds: float) -> None:
            bar.console.print(f"preflight: {tally(findings)} in {seconds:.1f} s", style="dim")
            for finding in findings:
                if not finding.passed and (despite_faults or not finding.stops):
                    said = f"  {finding.level}: {finding.sentence}"
                    bar.console.print(
                        said, style=_LEVEL[finding.level], markup=False, soft_wrap=True
                    )

        def noted(sentence: str) -> None:
            bar.console.print(f"batch size: {sentence}", style="dim", markup=False)

        yield Watcher(stored, checked, noted)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Something that takes a while and has no steps to count."""
    with console().status(what):
        yield


def results_table(summary: dict[str, Any]) -> None:
    """One row an audit and grid point, the right answer's norm beside the wrong target's."""
    out = console()
    wide = out.width >= 120  # room for intervals
    table = Table(
        title=f"{summary['study']}: does the clamp hold?", title_justify="left", box=SIMPLE_HEAD
    )
    for name in ("audit", "constraint", "verdict"):
        # A point of a grid can have a long name: it is what gives way.
        table.add_column(name, no_wrap=name != "constraint", overflow="fold")
    for name in ("recovered", "right answer", "wrong target", "drift, max"):
        table.add_column(name, justify="right", no_wrap=wide)
    rows = summary["trials"]
    by_point = {(r["audit"], _at(r), r["control"]): r for r in rows}
    previous = ""
    for row in rows:
        if row["control"] != "none":
            continue
        if previous not in ("", row["audit"]):
            table.add_section()
        wrong = by_point.get((row["audit"], _at(row), "wrong_target"))
        style = _STYLE[row["verdict"]]
        table.add_row(
            row["audit"] if row["audit"] != previous else "",
            _at(row),
            f"[{style}]{row['verdict']}[/]",
            _recovered(row, wide),
            _norm(row, wide),
            _norm(wrong, wide) if wrong else "not tried",
            f"{row['preactivation_drift_max']:.1e}",
        )
        previous = row["audit"]
    out.print(table)
    _attempts_table(summary, out)
    _answers_table(summary, out)
    _suffixes_table(summary, out)
    for audit, own in groupby(headline(rows), key=itemgetter("audit")):
        said = list(own)
        out.print(_verdict_line(audit, said), markup=False)
        for row in said:
            if row["judges"]:
                out.print(f"  by judge: {_by_judge(row['judges'])}", markup=False)
    out.print(
        "\nright answer, wrong target: median smallest norm that reaches the goal, relative to the "
        "residual; a goal never reached counts as infinite, so that half of the prompts may not "
        "reach it. drift: how far a clamped feature's "
        "pre-activation moved, relative to encoder norm x residual norm; 1e-8 is rounding.",
        style="dim",
    )


def _attempts_table(summary: dict[str, Any], out: Console) -> None:
    """Attempts in the prompt under the searches, in a table of their own: they have no verdict."""
    if not summary["attempts"]:
        return
    table = Table(
        title="the same prompts asked in other words, clamp on (no part of a verdict)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("audit", "attempt", "template"):
        table.add_column(name, no_wrap=True)
    for name in ("back, clamp on", "no clamp", "turned anyway", "search, same prompts"):
        table.add_column(name, justify="right")
    for row in summary["attempts"]:
        searched = (f"{r['n_recovered']}/{r['n_valid']}" for r in beside(row, summary["trials"]))
        label = ", ".join([row["attack"], *describe(row["point"])])
        asked = f"{row['n_asked']}/{row['n_valid']}"
        of = f"any of {len(row['templates'])}"
        turned = "" if row["turned_rate"] is None else f"{row['turned_rate']:.0%}"
        table.add_row(row["audit"], label, of, _back(row), asked, turned, ", ".join(searched))
        for each in row["templates"]:
            rate = each["recovery_rate"]
            bounds = {"ci_low": rate["low"], "ci_high": rate["high"]}
            asked = f"{each['n_asked']}/{each['n'] - each['n_excluded']}"
            turned = (
                f"{each['n_turned']}/{each['n_opposed']}" if each["n_opposed"] else "no prompts"
            )
            table.add_row("", "", escape(each["name"]), _back(each | bounds), asked, turned, "")
    out.print(table)
    out.print(
        "back: of the prompts on which the words work without the clamp. turned anyway: prompts on "
        "which the model does the opposite by itself, and does not in these words, without any "
        "clamp; where many are turned, it need not be the clamp that fails.\n",
        style="dim",
    )


def _answers_table(summary: dict[str, Any], out: Console) -> None:
    """Answers begun for the model, or drawn, under the searches: they have no verdict."""
    if not summary.get("answers"):  # summaries of earlier versions have none
        return
    table = Table(
        title="answers begun for the model, or drawn, clamp on (no part of a verdict)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("audit", "attack", "how"):
        table.add_column(name)
    for name in ("share [95%]", "of", "search, same prompts"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["answers"]:
        searched = (f"{r['n_recovered']}/{r['n_valid']}" for r in beside(row, summary["trials"]))
        label = ", ".join([row["label"], *describe(row["point"])])
        table.add_row(row["audit"], label, "any of these", _back(row), "", ", ".join(searched))
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


def _cell(cell: dict[str, Any]) -> str:
    """A measured share with its interval, if there is one; another figure as it is."""
    if cell["estimate"] is None:
        return "unscored"
    if not cell["unit"].startswith("share"):
        return f"{cell['estimate']:.3g}"
    low, high = cell["low"] or 0.0, 1.0 if cell["high"] is None else cell["high"]
    return f"{cell['estimate']:.0%} [{low:.0%}, {high:.0%}]"


def _suffixes_table(summary: dict[str, Any], out: Console) -> None:
    """Soft suffixes under the searches, in a table of their own: they have no verdict."""
    if not summary["suffixes"]:
        return
    table = Table(
        title="a soft suffix in the same prompts, clamp on there too (no part of a verdict)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("audit", "suffix"):
        table.add_column(name, min_width=12)
    for name in ("back", "placeholder alone", "norm", "drift", "from the prompt as it was",
                 "search, same prompts"):  # fmt: skip
        table.add_column(name, justify="right")
    for row in summary["suffixes"]:
        searched = (f"{r['n_recovered']}/{r['n_valid']}" for r in beside(row, summary["trials"]))
        own = row["label"].removeprefix(f"{row['attack']}, ")
        label = ", ".join([own, *describe(row["point"])])
        drifts = (row["drift_relative_mean"], row["drift_original_relative_mean"])
        shown = ("unscored" if drift is None else f"{drift:.3g}" for drift in drifts)
        table.add_row(
            row["audit"], label, _back(row | {"n_asked": row["n_searched"]}),
            f"{row['n_placeholder']}/{row['n_valid']}", f"{row['norm_relative_median']:.3f}",
            *shown, ", ".join(searched),
        )  # fmt: skip
    out.print(table)
    out.print(
        "back: of the prompts that the placeholder alone does not bring back. norm: of what was "
        "added, relative to the placeholder's. drift: of the clamped features, relative, the mean; "
        "from the same prompt with the placeholder, and from the prompt as it was.\n",
        style="dim",
    )


def _back(row: dict[str, Any]) -> str:
    """Recovered of those a template works on without the clamp; no rate where it works on none."""
    if not row["n_asked"]:
        return "unscored"
    low, high = row["ci_low"] or 0.0, 1.0 if row["ci_high"] is None else row["ci_high"]
    return f"{row['n_recovered']}/{row['n_asked']} [{low:.0%}, {high:.0%}]"


def _by_judge(judges: dict[str, Any]) -> str:
    """Recovered under each judge, of the prompts that are valid by it too."""
    said = []
    for name, found in judges.items():
        rate, n = found["recovery_rate"], found["n"]
        share = "none valid" if rate is None else f"{round(rate * n)}/{n}"
        said.append(f"{name.replace('_', ' ')} {share}")
    return ", ".join(said)


def _verdict_line(audit: str, rows: Sequence[dict[str, Any]]) -> str:
    """The verdict and why; of a sweep, how many points came to which."""
    if len(rows) == 1:
        return f"{audit}: {rows[0]['verdict']}. {rows[0]['sentence'].capitalize()}."
    counts = Counter(row["verdict"] for row in rows)
    found = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    return f"{audit}: {len(rows)} points under {rows[0]['constraint']}: {found}. Curves: report."


def _at(row: dict[str, Any]) -> str:
    """The row's constraint, with its other coordinates on the grid."""
    return ", ".join([row["constraint"], *describe(row["point"])])


def _recovered(row: dict[str, Any], wide: bool) -> str:
    count = f"{row['n_recovered']}/{row['n_valid']}"
    if not wide or row["recovery_rate"] is None:
        return count
    low, high = row["ci_low"] or 0.0, 1.0 if row["ci_high"] is None else row["ci_high"]
    return f"{count} [{low:.0%}, {high:.0%}]"


def _norm(row: dict[str, Any], wide: bool) -> str:
    if row["norm_relative_median"] is None:
        return "not by half"
    if not wide:
        return f"{row['norm_relative_median']:.3f}"

    def bound(value: float | None) -> str:
        return "∞" if value is None else f"{value:.3f}"

    low, high = bound(row["norm_relative_low"]), bound(row["norm_relative_high"])
    return f"{row['norm_relative_median']:.3f} [{low}, {high}]"


def findings_table(findings: Sequence[Finding]) -> None:
    """What was expected, what was measured, what to do; under a heading for each place."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "check", "expected", "measured", "what to do"):
        table.add_column(name, overflow="fold")
    for where in dict.fromkeys(finding.where for finding in findings):
        if where:
            table.add_section()
            table.add_row("", f"[bold]{escape(where)}[/]")
        for finding in findings:
            if finding.where == where:
                style = _LEVEL[finding.level]
                mark = "[green]ok[/]" if finding.passed else f"[{style}]{finding.level}[/]"
                remedy = "" if finding.passed else finding.remedy
                said = (finding.check, finding.expected, finding.measured, remedy)
                table.add_row(mark, *map(escape, said))
    console().print(table)
    console().print(tally(findings))


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
        equal = "–" if pair.share_equal is None else f"{pair.share_equal:.0%}"
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
    return "–" if m.estimate is None else _bounded(m.estimate, m.low, m.high)


def _bounded(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _confusion(title: str, pair: PairAgreement) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("", *pair.labels):
        table.add_column(name)
    for label, counts in zip(pair.labels, pair.confusion, strict=True):
        table.add_row(label, *map(str, counts))
    return table


def comparison_table(comparison: Comparison | PublishedComparison) -> None:
    """What is unlike first, then a row a point."""
    from holdfast.report.compared import page_of

    page, out = page_of(comparison), console()
    for line in page.head:
        out.print(line, markup=False, soft_wrap=True)
    table = Table(title=page.title, title_justify="left", box=SIMPLE_HEAD)
    for name in page.columns:
        table.add_column(name, overflow="fold", min_width=26 if "trial" in name else None)
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


def kinds_table(descriptions: Sequence[Description]) -> None:
    table = Table()
    for name in ("family", "kind", "what it is", "fields"):
        table.add_column(name, overflow="fold")
    for d in descriptions:
        table.add_row(d.family, d.kind, d.summary, "\n".join(d.fields))
    console().print(table)


def note(lines: Sequence[str]) -> None:
    for line in lines:
        console().print(line, style="dim", markup=False, soft_wrap=True)


def say_where(path: Path) -> None:
    console().print(f"report: {path}", soft_wrap=True)
