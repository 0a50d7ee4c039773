"""The command line: thin. Every option is a field of the study or of the runtime.

Imports stay inside the commands, so that `holdfast --help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast import audit_commands
from holdfast.errors import HoldfastError
from holdfast.options import (
    BatchSize,
    DespiteFaults,
    Device,
    Limit,
    Out,
    Reveal,
    Sets,
    StudyArgument,
    Workers,
)
from holdfast.organism import commands as organism_commands

if TYPE_CHECKING:
    from holdfast.compare import Comparison
    from holdfast.published.beside import PublishedComparison
    from holdfast.run import RunReport
    from holdfast.study import Study

app = typer.Typer(
    name="holdfast",
    help="Does a clamp on SAE features hold, or is the behavior still there?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(organism_commands.app, name="organism")
app.add_typer(audit_commands.app, name="audit")


@app.command()
def run(
    study: StudyArgument,
    out: Out = None,
    set_: Sets = None,
    limit: Limit = None,
    device: Device = "cpu",
    batch_size: BatchSize = "auto",  # type: ignore[assignment]
    workers: Workers = 0,
    despite_faults: DespiteFaults = False,
) -> None:
    """Run a study, or go on with one that was interrupted."""
    from holdfast.study import load, read_text

    loaded, text = load(study, set_ or (), limit), read_text(study)
    _run(loaded, text, out, device, batch_size, workers, despite_faults)


@app.command(name="plan")
def plan_(
    study: StudyArgument,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="h100, 4xa100-80gb, …; this device if left out")
    ] = None,
    set_: Sets = None,
    limit: Limit = None,
    device: Device = "cpu",
    batch_size: BatchSize = "auto",  # type: ignore[assignment]
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens",
            min=2,
            help="of the longest prompt, instead of reading them; 64 where one is not at hand",
        ),
    ] = None,
    sae_width: Annotated[
        int | None, typer.Option("--sae-width", min=1, help="features, of SAEs not at hand")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="every trial, as JSON")] = False,
) -> None:
    """Say what a study would cost: operations, memory, time, batch size. Loads no weights."""
    import json

    from holdfast.datasets.unread import unread
    from holdfast.errors import StudyError
    from holdfast.forecast import PROMPT_TOKENS, Forecast, forecast_study, on_device, on_gpu
    from holdfast.forecast.show import as_json, rests_on, table_of
    from holdfast.study import load
    from holdfast.terminal import console, note

    where = on_device(device) if gpu is None else on_gpu(gpu)

    def forecast_with(width: int | None) -> tuple[Study, list[Forecast]]:
        with unread(width is not None):  # which says all that a forecast reads of them
            loaded = load(study, set_ or (), limit)
            return loaded, forecast_study(loaded, where, batch_size, width, sae_width)

    try:
        loaded, forecasts = forecast_with(prompt_tokens)
    except StudyError as error:
        if prompt_tokens is not None:
            raise
        loaded, forecasts = forecast_with(PROMPT_TOKENS)  # what else is wrong is said by this
        note(
            [
                f"Not all datasets could be read, so every prompt is taken to have {PROMPT_TOKENS} "
                f"tokens; --prompt-tokens says otherwise. {error}"
            ],
            stderr=True,
        )
    if json_:
        print(json.dumps(as_json(forecasts), indent=1))
        return
    console().print(table_of(forecasts, f"{loaded.name}: what it would cost"))
    note(rests_on(forecasts))


@app.command()
def demo(
    out: Out = None,
    device: Device = "cpu",
    batch_size: BatchSize = "auto",  # type: ignore[assignment]
    workers: Workers = 0,
    despite_faults: DespiteFaults = False,
) -> None:
    """Audit the shipped organism: the whole method in a few minutes."""
    from holdfast.study import bundled, parse

    text = bundled("demo")
    _run(parse(text), text, out, device, batch_size, workers, despite_faults)


@app.command()
def check(
    study: StudyArgument, set_: Sets = None, limit: Limit = None, device: Device = "cpu"
) -> None:
    """Look for mistakes before a run: model, SAEs, sites, splits, padding, cache."""
    from holdfast.executor import Runtime, load_lab, threads_for
    from holdfast.planning import plan
    from holdfast.preflight import preflight
    from holdfast.study import load
    from holdfast.tables.findings import findings_table
    from holdfast.terminal import working

    planned, runtime = plan(load(study, set_ or (), limit)), Runtime(device)
    with working("checking"):
        lab = load_lab(planned, planned.trials, runtime)
        with threads_for(lab, runtime):
            made = preflight(planned, lab)
    findings = list(dict.fromkeys(finding for found in made.values() for finding in found))
    findings_table(findings)
    if any(finding.stops for finding in findings):
        raise typer.Exit(1)


@app.command()
def export(
    study: StudyArgument,
    audit: Annotated[
        str | None, typer.Option("--audit", help="whose clamp; not needed if there is one audit")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="[<audit>.clamp.safetensors]")] = None,
    set_: Sets = None,
    device: Device = "cpu",
    batch_size: BatchSize = "auto",  # type: ignore[assignment]
) -> None:
    """Write an audit's clamp to a file that runs on a plain transformers model."""
    from holdfast.executor import Runtime
    from holdfast.export import export_clamp
    from holdfast.planning import plan
    from holdfast.study import load
    from holdfast.terminal import console, working

    planned = plan(load(study, set_ or ()))
    with working("finding the features and the strength"):
        exported = export_clamp(planned, audit, out, Runtime(device, batch_size))
    for sentence in exported.sentences():
        console().print(sentence, markup=False, soft_wrap=True)


@app.command()
def direction(
    study: StudyArgument,
    out: Annotated[Path, typer.Option("--out", help="a folder that does not exist yet")],
    audit: Annotated[
        str | None, typer.Option("--audit", help="whose fit split; not needed if there is one")
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option("--site", help="where; after every block if left out")
    ] = None,
    measured_at: Annotated[
        str | None, typer.Option("--measured-at", help="write this site's direction for all")
    ] = None,
    set_: Sets = None,
    device: Device = "cpu",
    batch_size: BatchSize = "auto",  # type: ignore[assignment]
) -> None:
    """Write an audit's difference in means as files that are clamped in an SAE's place."""
    from holdfast.direction import write_direction
    from holdfast.executor import Runtime
    from holdfast.planning import plan
    from holdfast.sites import Site
    from holdfast.study import load
    from holdfast.terminal import console, working

    planned, sites = plan(load(study, set_ or ())), [Site.parse(each) for each in site or ()]
    with working("measuring the direction"):
        at = None if measured_at is None else Site.parse(measured_at)
        made = write_direction(planned, audit, out, Runtime(device, batch_size), sites, at)
    for place, length in made.lengths.items():
        console().print(
            f"{place}: {made.n_with} prompts less {made.n_without} others, {length:.3g} of the "
            f"residual's norm: {made.folders[place]}", markup=False, soft_wrap=True,
        )  # fmt: skip
    console().print(f"\nin a study:\n\n{made.toml()}", markup=False, soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="a run's folder")],
    out: Annotated[Path | None, typer.Option("--out", help="[FOLDER/report.html]")] = None,
    reveal: Reveal = False,
    set_: Sets = None,
    limit: Limit = None,
    device: Device = "cpu",
) -> None:
    """Print a run's table and write its report again, from its records alone.

    With --reveal, judged replies are generated anew and the page shows them, outside of the run's
    folder (--out); --set and --limit are then those of the run.
    """
    from holdfast.executor import Runtime
    from holdfast.report import write_report
    from holdfast.run import open_run
    from holdfast.summary import summarize
    from holdfast.tables.results import results_table
    from holdfast.terminal import say_where, working

    store, plan, complete = open_run(folder)
    page, texts = out or folder / "report.html", None
    if reveal:
        from holdfast.retelling import revealed

        with working("generating the replies again"):
            texts = revealed(store, page, set_ or (), limit, Runtime(device))
    results_table(summarize(plan, store, complete))
    say_where(write_report(store, plan, page, texts))


@app.command()
def compare(
    run: Annotated[Path | None, typer.Argument(help="a run's folder")] = None,
    other: Annotated[
        str | None,
        typer.Argument(
            help="another run's folder, or published:NAME; left out, all published figures about "
            "the run's behaviors"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="FILE.html or FILE.json")] = None,
    list_: Annotated[bool, typer.Option("--list", help="say which figures are shipped")] = False,
) -> None:
    """Put a run beside another run or published figures, point by point."""
    from holdfast.compare import compare as compare_runs
    from holdfast.compare import read_side
    from holdfast.published import PREFIX
    from holdfast.published.beside import beside_named
    from holdfast.report.compared import write_comparisons
    from holdfast.tables.comparison import comparison_table, published_list
    from holdfast.terminal import note

    if list_:
        published_list()
        return
    if run is None:
        raise HoldfastError("compare takes a run's folder; --list says what can stand beside it")
    side = read_side(run)
    made: list[Comparison | PublishedComparison]
    if other is None or other.startswith(PREFIX):
        made = [*beside_named(side, other)]
    else:
        made = [compare_runs(side, read_side(Path(other)))]
    for comparison in made:
        comparison_table(comparison)
    if out is not None:
        note([f"comparison: {write_comparisons(made, out)}"])


@app.command(name="list")
def list_(
    family: Annotated[
        str | None, typer.Argument(help="constraints, behaviors, …; all if left out")
    ] = None,
) -> None:
    """List the kinds a study can name, built-in ones and plug-ins."""
    from holdfast.kinds import FAMILIES_OF_KINDS, describe
    from holdfast.tables.kinds import kinds_table

    kinds_table(describe(family) if family else [r for f in FAMILIES_OF_KINDS for r in describe(f)])


def _run(
    study: Study,
    text: str,
    out: Path | None,
    device: str,
    batch_size: int,
    workers: int,
    despite_faults: bool,
) -> None:
    from holdfast.command_line import told
    from holdfast.executor import Runtime
    from holdfast.made_from import page_made_with
    from holdfast.planning import plan
    from holdfast.run import default_folder, open_run, run_study
    from holdfast.tables.results import results_table
    from holdfast.terminal import note, progress, say_where

    planned = plan(study)
    folder = out or default_folder(planned)
    runtime = Runtime(device, batch_size, workers, told(sys.argv[1:]), despite_faults)
    with progress(planned, despite_faults) as watcher:
        done: RunReport = run_study(planned, folder, runtime, text, watcher)
    results_table(done.summary)
    if done.summary["trials"]:
        page = folder / "report.html"
        if not page_made_with(done.summary, page):
            from holdfast.report import write_report

            write_report(*open_run(folder)[:2], page)
        say_where(page)
    note(done.skipped)
    if done.failures:
        raise HoldfastError("\n".join(done.failures))


def main() -> None:
    """Run the command line; a user's mistake is a message and exit code 2, without a traceback."""
    try:
        app()
    except HoldfastError as error:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(
            f"holdfast: {error}", style="red", markup=False, highlight=False
        )
        sys.exit(2)
