"""Put the page together: one file, no requests, everything escaped."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from holdfast import wording
from holdfast.atomic import write_atomic
from holdfast.planning import Plan
from holdfast.report import (
    answers,
    attempts,
    clamped,
    drift,
    error_term,
    forcing,
    funnel,
    generality,
    heads,
    judges,
    known_answer,
    limits,
    norms,
    opening,
    path,
    posthoc,
    preflight,
    prompts,
    provenance,
    side_effects,
    soft_suffix,
    steps,
    strata,
    sweeps,
    unlearning,
    verdicts,
)
from holdfast.report.data import ReportData, Texts, gather
from holdfast.report.picture import draw
from holdfast.store import PICTURE, RunFolder

SECTIONS = (
    verdicts, preflight, funnel, norms, forcing, path, heads, generality, sweeps, error_term,
    strata, drift, posthoc, steps, judges, known_answer, attempts, answers, soft_suffix,
    side_effects, unlearning,
    clamped, prompts, limits, provenance,
)  # fmt: skip
FILTERS = (
    "coefficient", "cost", "duration", "logits", "logits_range", "norm", "norm_range", "p_value",
    "percent", "percent_range", "plain", "points", "power", "power_range", "too_few",
)  # fmt: skip
"""How templates write numbers: of `wording`, by name."""


def write_report(store: RunFolder, plan: Plan, path: Path, texts: Texts | None = None) -> Path:
    """Write the page of a run to `path`, and its picture into the run's folder.

    From records only: trials that are not finished are left out, and the page says so. texts: what
    `retelling.revealed` generated anew; the page then says that it holds them.
    """
    data = gather(store, plan, texts)
    picture = draw(data)
    write_atomic(store.path / PICTURE, picture.encode())
    write_atomic(Path(path), render(data, picture).encode())
    return Path(path)


def render(data: ReportData, picture: str) -> str:
    """The page as text. picture: an SVG, taken over as it is."""
    from plotly.offline import get_plotlyjs

    env = environment()
    sections = [made for module in SECTIONS if (made := module.section(data))]
    bodies = [
        (part, Markup(env.get_template(part.template).render(part.context))) for part in sections
    ]
    return env.get_template("page.html.j2").render(
        data=data,
        goal=_goal(data),
        n_faults=preflight.n_faults(data),
        sections=bodies,
        opening=opening.rows(data),
        said=opening.said(data),
        figures=[drawn for part in sections for drawn in part.figures],
        picture=Markup(picture),
        css=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )


@cache
def environment() -> Environment:
    """Templates with every value escaped, and the words they share. One for every page, so that a
    template is compiled once."""
    env = Environment(
        loader=PackageLoader("holdfast.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in FILTERS:
        env.filters[name] = getattr(wording, name)
    env.globals["marks"] = verdicts.MARKS
    return env


def _goal(data: ReportData) -> str:
    """The share of the clean margin at which a search has succeeded."""
    shares = {arm.recovery.stop.clean_margin for arm in data.arms}
    return " or ".join(f"{share:.0%}" for share in sorted(shares)) or "a set share"


def _asset(name: str) -> str:
    return (files("holdfast.report") / "templates" / name).read_text()
