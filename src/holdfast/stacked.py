"""Which trials of a study are searched together: those whose rows can stand in one batch."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.canonical import digest
from holdfast.trial import Trial, setting_key


def stacked(trials: Sequence[Trial]) -> list[tuple[Trial, ...]]:
    """Trials that are best run together, in the order of the first of each.

    Searches of one setting that differ in constraint, target, budget or goal can be rows of one
    batch, but for constraints with passes of their own, which share a batch with their like alone,
    and controls with prompts or edits of their own. Who is searched beside whom does not depend on
    where a study runs.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(_stack_key(trial), []).append(trial)
    return [tuple(group) for group in groups.values()]


def _stack_key(trial: Trial) -> str:
    """What trials of one stack have in common."""
    spec = trial.recovery
    if spec is None:
        return trial.id
    parts = trial.canonical()
    n_sites = len(spec.perturb.sites) or len(trial.subject.saes)
    alike = spec.constraint.repeats(n_sites) == (0, 0)
    return digest(
        [
            setting_key(trial, trial.subject),
            parts["attack"],
            None if trial.control.alongside else [parts["control"], parts["twin"]],
            None if alike else parts["recovery"]["constraint"],
            parts["recovery"]["perturb"],
            parts["recovery"]["objective"],
            spec.order,
            list(spec.pace),
        ]
    )
