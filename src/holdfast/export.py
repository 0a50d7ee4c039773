"""The clamp of a study's audit as a file of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from holdfast.canonical import digest
from holdfast.clamp_file import SavedClamp, load_clamp, save_clamp
from holdfast.config import nearest
from holdfast.edits import FeatureEdit
from holdfast.errors import StudyError, UnknownNameError
from holdfast.executor import Runtime, load_lab, threads_for
from holdfast.features import EVERY_GROUP
from holdfast.planning import Plan
from holdfast.setting import Setting
from holdfast.trial import Trial


@dataclass(frozen=True)
class Exported:
    """A clamp that was written, and what it does to the audit's test prompts."""

    clamp: SavedClamp
    setting: Setting

    def sentences(self) -> tuple[str, ...]:
        """What was written, for people."""
        tried, clean = len(self.setting.test), int(self.setting.clean.sum())
        return (
            *(_sentence(edit) for edit in self.clamp.edits),
            f"suppressed: {len(self.setting.valid)} of {clean} test prompts that show the behavior "
            f"({tried} tried)",
            f"clamp: {self.clamp.path} ({self.clamp.path.stat().st_size / 1000:.0f} kB)",
        )


def _sentence(edit: FeatureEdit) -> str:
    bank, gate = edit.bank, edit.gate
    n_features = len({i for ids in bank.ids for i in ids})
    groups = len(bank.index.keys() - {EVERY_GROUP})
    value = "a value each" if isinstance(edit.value, Tensor) else f"{edit.value:g}"
    return (
        f"{edit.mode} {value}: {n_features} features at {bank.site}"
        f"{f' in {groups} groups of prompts' if groups else ''}, positions {edit.where} "
        f"{'with' if edit.include_bos else 'without'} BOS"
        f"{f', {gate.words}' if gate else ''}"
    )


def export_clamp(plan: Plan, audit: str | None, out: Path | None, runtime: Runtime) -> Exported:
    """Write the clamp of an audit, prepared as a run prepares it.

    Its features are found on the fit split, its strength is chosen on the tune split. audit: may be
    left out if there is one; out: <audit>.clamp.safetensors if left out.

    Raises StudyError if the audit is not known or its clamp varies over the grid, EditError if it
    cannot be saved by itself, StoreError if the file exists and is another clamp.
    """
    trial = _trial_of(plan, audit)
    path = out or Path(f"{trial.audit}.clamp.safetensors")
    lab = load_lab(plan, [trial], runtime)
    with threads_for(lab, runtime):
        setting = lab.setting(trial, trial.subject)
    origin = {
        "study": plan.study.name,
        "study_hash": plan.hash,
        "audit": trial.audit,
        "seed": trial.seed,
        "features_from": setting.features.source,
        "intervention": setting.intervention.model_dump(mode="json"),
    }
    save_clamp(path, setting.edits, setting.subject, trial.subject, origin)
    return Exported(load_clamp(path), setting)


def _trial_of(plan: Plan, audit: str | None) -> Trial:
    """The first trial of the audit. Raises StudyError if others would have another clamp."""
    names = list(dict.fromkeys(trial.audit for trial in plan.trials))
    if audit is None and len(names) > 1:
        raise StudyError(f"the study has {len(names)} audits; name one of {', '.join(names)}")
    name = names[0] if audit is None else audit
    trials = [t for t in plan.trials if t.audit == name and t.control.kind == "none"]
    if not trials:
        raise UnknownNameError(f"no audit {name!r}: {nearest(name, names)}")
    parts = ("seed", "data", "behavior", "discovery", "intervention")
    clamps = {digest([trial.canonical()[part] for part in parts]) for trial in trials}
    if len(clamps) > 1:
        varied = [path for path in plan.study.grid if path.split(".")[0] in parts]
        raise StudyError(
            f"audit {name!r} has {len(clamps)} clamps: the grid varies {', '.join(varied)}; choose "
            "one with --set 'grid={}' and another --set for what is not as the audit has it"
        )
    return trials[0]
