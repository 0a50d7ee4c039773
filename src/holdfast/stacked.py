"""Which trials of a study are searched together: those whose rows can stand in one batch.

What a trial finds depends in its last digits on the rows beside its own. So who is searched with
whom is planned before a run begins, kept in its folder, and followed by a run that goes on there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.attacks.residual import packed
from holdfast.canonical import digest
from holdfast.trial import Trial, setting_key


@dataclass(frozen=True)
class Together:
    """A stack: trials that are run together, in order.

    ballast: ids of those that are stored already, and searched only because the others were to be
    searched beside them.
    """

    trials: tuple[Trial, ...]
    ballast: frozenset[str] = frozenset()

    @property
    def ids(self) -> list[str]:
        return [trial.id for trial in self.trials]

    @property
    def wanted(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.id not in self.ballast)


@dataclass(frozen=True)
class StackPlan:
    """The stacks of a run, those that are done among them. kept: ids of each; todo: what of them is
    to be run; new: trials that no earlier plan had."""

    kept: tuple[tuple[str, ...], ...]
    todo: tuple[Together, ...]
    new: tuple[Trial, ...]

    @classmethod
    def of(
        cls, trials: Sequence[Trial], stored: Collection[str], earlier: Mapping[str, Any] | None
    ) -> StackPlan:
        """trials: all of the study; stored: ids of those that are finished; earlier: the plan in
        the run's folder, None where there is none.

        A stack that was planned is searched with the members it was planned with, until all are
        stored. One with a member that has left the study cannot be: what is left of it is planned
        anew. So are trials that no plan has, among themselves.
        """
        known = {trial.id: trial for trial in trials}
        missing = {trial.id for trial in trials if trial.id not in stored}
        kept = [
            ids for ids in _stacks_of(earlier)
            if missing.isdisjoint(ids) or known.keys() >= set(ids)
        ]  # fmt: skip
        planned = {each for ids in kept for each in ids}
        new = [trial for trial in trials if trial.id in missing - planned]
        todo = [
            Together(tuple(known[each] for each in ids), frozenset(set(ids) - missing))
            for ids in kept
            if not missing.isdisjoint(ids)
        ]
        todo += [Together(stack) for stack in stacked(new)]
        kept += [tuple(trial.id for trial in stack) for stack in stacked(new)]
        order = {trial.id: index for index, trial in enumerate(trials)}
        todo.sort(key=lambda stack: order[stack.wanted[0].id])
        return cls(tuple(kept), tuple(todo), tuple(new))

    def as_json(self) -> list[list[str]]:
        return [list(ids) for ids in self.kept]


def _stacks_of(earlier: Mapping[str, Any] | None) -> list[tuple[str, ...]]:
    """Ids of each stack of a plan; none where it cannot be read, or names a trial twice: it was not
    written by this program, and trials are planned anew."""
    found = (earlier or {}).get("stacks", [])
    if not isinstance(found, list) or not all(isinstance(ids, list) for ids in found):
        return []
    every = [each for ids in found for each in ids]
    if not all(isinstance(each, str) for each in every) or len(set(every)) < len(every):
        return []
    return [tuple(ids) for ids in found if ids]


def stacked(trials: Sequence[Trial]) -> list[tuple[Trial, ...]]:
    """Trials that are best run together, in the order of the first of each.

    Searches of one setting that differ in constraint, target, budget, goal or their own seed can be
    rows of one batch, but for controls with prompts or edits of their own. So can those of settings
    that differ in the study's seed, and so in their prompts, where the clamped features do not go
    by these; as many of such settings are run together as fill a batch with all prompts that they
    may have, and the rest by other workers. Who is searched beside whom does not depend on where a
    study runs, but on which of its trials it is to run: `StackPlan`.
    """
    order = {trial.id: index for index, trial in enumerate(trials)}
    groups: dict[str, dict[str, list[Trial]]] = {}
    for trial in trials:
        settings = groups.setdefault(_stack_key(trial), {})
        settings.setdefault(setting_key(trial, trial.subject), []).append(trial)
    found = []
    for settings in groups.values():
        parts = list(settings.values())
        for places in packed([len(part) * part[0].data.test for part in parts]):
            own = [trial for place in places for trial in parts[place]]
            found.append(tuple(sorted(own, key=lambda trial: order[trial.id])))
    return sorted(found, key=lambda stack: order[stack[0].id])


def _stack_key(trial: Trial) -> str:
    """What trials of one stack have in common."""
    spec = trial.recovery
    if spec is None:
        return trial.id
    parts = trial.canonical()
    alike = ("subject", "data", "behavior", "discovery", "intervention", "attack")
    return digest(
        [
            *(parts[name] for name in alike),
            trial.seed if trial.discovery.by_prompts else None,
            None if trial.control.alongside else [parts["control"], parts["twin"]],
            parts["recovery"]["perturb"],
            parts["recovery"].get("objective"),
            spec.order,
            list(spec.pace),
        ]
    )
