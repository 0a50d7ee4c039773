"""The replies of a finished trial, generated anew: records keep hashes, never texts.

Clamp and prompts come from the study, the perturbation from the run's folder. A reply counts as the
one that was judged only if its sha256 is the stored one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from holdfast.config import nearest
from holdfast.edits import Perturbation, in_order
from holdfast.errors import StoreError, StudyError, UnknownNameError
from holdfast.executor import Runtime, load_lab, threads_for
from holdfast.planning import Plan, plan
from holdfast.reply import Reply, printable
from holdfast.sites import Site
from holdfast.store import RunFolder
from holdfast.stored_study import STUDY_TEXT
from holdfast.study import parse
from holdfast.summary import headline
from holdfast.trial import Trial

CONDITIONS = ("clean", "suppressed", "recovered")


@dataclass(frozen=True)
class Retold:
    """A trial's replies by condition: clean and suppressed of every prompt tried, recovered of
    those audited. changed: condition → replies left out because they came out with another hash."""

    trial: Trial
    replies: Mapping[str, tuple[Reply, ...]]
    changed: Mapping[str, int]

    @property
    def n_changed(self) -> int:
        return sum(self.changed.values())


def plan_again(store: RunFolder, sets: Sequence[str] = (), limit: int | None = None) -> Plan:
    """The plan of a run, from the study file that it keeps and the overrides it was run with.

    Raises StudyError if that is another study than the one that was run.
    """
    file = store.path / STUDY_TEXT
    if not file.is_file():
        raise StudyError(f"{file} is not there: texts are generated anew from a run's study file")
    made = plan(parse(file.read_text(encoding="utf-8"), sets, limit))
    if made.hash != store.study_hash:
        commands = sorted({record["run"].get("command", "") for record in store.records()} - {""})
        told = f"; it was run as: {'; '.join(commands)}" if commands else ""
        raise StudyError(
            f"{file}, read with the --set and --limit given, is not the study that was run: give "
            f"those of the run, and leave data and judges where they were{told}"
        )
    return made


def choose(made: Plan, store: RunFolder, of: str | None) -> Trial:
    """A finished trial whose replies were judged. of: its id, or the name of an audit, of which the
    one that a reader should read first is taken; may be left out if one audit judges replies.

    Raises UnknownNameError.
    """
    judged, names = _judged(made, store), judged_audits(made, store)
    if not judged:
        raise UnknownNameError(
            f"{store.path}: no finished audit here judges replies; a sheet is of what judges said "
            "of generated answers, as in audits of the behavior refusal"
        )
    if of is None and len(names) > 1:
        raise UnknownNameError(
            f"{store.path}: several audits judge replies; name one with --of: {', '.join(names)}"
        )
    of = names[0] if of is None else of
    if of in judged:
        return judged[of]
    if of not in names:
        raise UnknownNameError(
            f"{store.path}: no audit or trial {of!r} judges replies: "
            f"{nearest(of, [*names, *judged])}"
        )
    rows = [
        {"id": t.id, "audit": t.audit, "control": "none", "constraint": t.label}
        for t in judged.values()
        if t.audit == of
    ]
    return judged[headline(rows)[0]["id"]]


def judged_audits(made: Plan, store: RunFolder) -> list[str]:
    """The audits with a finished trial whose replies were judged."""
    return list(dict.fromkeys(trial.audit for trial in _judged(made, store).values()))


def _judged(made: Plan, store: RunFolder) -> dict[str, Trial]:
    own = [trial for trial in made.trials if trial.is_audit and store.has(trial.id)]
    return {t.id: t for t in own if store.load(t.id)["result"].get("labels")}


def retell(store: RunFolder, made: Plan, trial: Trial, runtime: Runtime) -> Retold:
    """Generate the replies of a finished trial again, in all three conditions.

    Raises StudyError if the prompts that were searched are not those of the saved perturbation.
    """
    lab = load_lab(made, [trial], runtime)
    with threads_for(lab, runtime):
        setting = lab.setting(trial, trial.subject)
        case = trial.control.case(setting, lambda: lab.twin_setting(trial))
        saved = store.tensors(trial.id)
        if len(saved["positions"]) != len(case.batch):
            raise StudyError(
                f"trial {trial.id}: its perturbation is of {len(saved['positions'])} prompts, and "
                f"{len(case.batch)} are valid here now: the model answers differently on this "
                "machine; use the device and the versions of the record"
            )
        device = case.subject.device
        push = Perturbation(
            case.batch.ids,
            saved.pop("positions").to(device),
            {Site.parse(site): delta.to(device) for site, delta in saved.items()},
        )
        assert trial.recovery is not None, "only an audit's own search is told again"
        clamp_first = trial.recovery.order == "clamp_then_perturbation"
        edits = in_order(case.edits, push, clamp_first)
        assert setting.observed is not None and setting.changed is not None
        with torch.no_grad():
            back = trial.behavior.observe(
                case.subject, case.batch, edits, setting.observed.replies
            ).replies
    rows = {row["id"]: row for row in store.examples(trial.id)}
    told = dict(
        zip(CONDITIONS, (setting.observed.replies, setting.changed.replies, back), strict=True)
    )
    same = {
        condition: tuple(r for r in replies if r.sha256 == rows[r.id][f"{condition}_sha256"])
        for condition, replies in told.items()
    }
    return Retold(trial, same, {c: len(told[c]) - len(same[c]) for c in CONDITIONS})


def revealed(
    store: RunFolder,
    out: Path,
    sets: Sequence[str] = (),
    limit: int | None = None,
    runtime: Runtime | None = None,
) -> dict[str, dict[str, dict[str, str]]]:
    """Trial id → example id → `prompt` or condition → text as it may be printed, for the trial of
    each audit that a reader should read first; only replies that have the stored hash.

    Raises StoreError if `out`, where they are to be shown, is in the run's folder.
    """
    keep_out(store, out)
    made = plan_again(store, sets, limit)
    texts: dict[str, dict[str, dict[str, str]]] = {}
    for audit in judged_audits(made, store):
        told = retell(store, made, choose(made, store, audit), runtime or Runtime())
        found = texts.setdefault(told.trial.id, {})
        for condition, replies in told.replies.items():
            for reply in replies:
                prompt = {} if reply.prompt is None else {"prompt": printable(reply.prompt)}
                found.setdefault(reply.id, prompt)[condition] = printable(reply.text)
    return texts


def keep_out(store: RunFolder, out: Path) -> None:
    """Raise StoreError if a file that shows texts would lie in the run's folder."""
    if out.resolve().is_relative_to(store.path.resolve()):
        raise StoreError(
            f"{out} is in the run's folder, which holds no texts: name a place outside with --out"
        )
