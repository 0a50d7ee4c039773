"""Preflight: mistakes that make every later number wrong, looked for before any claim.

Every audit is checked on its own prompts, in the order in which a mistake would enter: prompts,
model, SAEs, intervention. Each check is a function that yields findings; nothing is searched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from holdfast.canonical import digest
from holdfast.errors import HoldfastError, PreflightError
from holdfast.finding import Finding
from holdfast.planning import Plan
from holdfast.preflight import intervention, model, prompts, saes
from holdfast.preflight.scene import Scene, set_scene
from holdfast.subject import Subject
from holdfast.trial import Lab, SubjectIdentity, Trial

Make = Callable[[], Iterator[Finding]]

MODEL = (
    prompts.splits, prompts.chat, prompts.behavior,
    model.padding, model.cache, model.routing,
)  # fmt: skip
"""Checks of a scene whose prompts can be tokenized and whose residuals can be read."""


def preflight(
    plan: Plan, lab: Lab, trials: Sequence[Trial] | None = None
) -> dict[str, list[Finding]]:
    """Findings by trial id; those of an ignorant twin are among its trial's.

    What several trials share is checked once: the prompts, the subject and its SAEs by what the
    prompts are drawn from, the intervention on top of that. A check that cannot be made at all is
    an error of its own.
    """
    chosen = plan.trials if trials is None else trials
    out: dict[str, list[Finding]] = {trial.id: [] for trial in chosen}
    for group in _by_scene(chosen).values():
        first, identity = group[0]
        subject = lab.subject(identity)
        scene, shared = check_scene(first, subject, ignorant=identity == first.twin)
        made: dict[str, list[Finding]] = {}
        for trial, _ in group:
            key = _key(trial, "intervention")
            if scene is not None and key not in made:
                made[key] = check_intervention(trial, scene)
            promised = []
            if scene is not None:
                promised += _made("what is perturbed", partial(intervention.named, scene, trial))
            if trial.recovery is not None:
                make = partial(intervention.constraint, trial.recovery, subject)
                promised += _made("the constraint", make)
            where = f"{trial.audit} on {identity.name}"
            out[trial.id] += [
                finding.model_copy(update={"where": where})
                for finding in (*shared, *made.get(key, ()), *promised)
            ]
    return out


def _by_scene(trials: Sequence[Trial]) -> dict[str, list[tuple[Trial, SubjectIdentity]]]:
    """Trials, and twins of trials, whose prompts, subject and SAEs are the same."""
    groups = defaultdict(list)
    for trial in trials:
        for identity in (trial.subject, trial.twin):
            if identity is not None:
                drawn = _key(trial, "seed", "data", "behavior")
                who = [identity.model_dump(mode="json"), identity == trial.twin]
                groups[digest([drawn, *who])].append((trial, identity))
    return groups


def _key(trial: Trial, *names: str) -> str:
    parts = trial.canonical()
    return digest([parts[name] for name in names])


def check_scene(
    trial: Trial, subject: Subject, ignorant: bool = False
) -> tuple[Scene | None, list[Finding]]:
    """Every finding about prompts, model and SAEs, in order.

    The scene is None where its residuals cannot be read: then nothing further is worth checking.
    """
    found: list[Finding] = []
    try:
        scene = set_scene(subject, trial.behavior, trial.data, trial.seed, ignorant)
        found += prompts.beginning(scene)
        _ = scene.splits
    except HoldfastError as error:
        # A doubled BOS is found by the check above and refused by the subject.
        known = any(finding.stops for finding in found)
        return None, found if known else [*found, _impossible("the prompts", error)]
    stream = _made("the residual stream", partial(model.stream, scene))
    found += stream
    if any(finding.stops for finding in stream):
        return None, found
    for make in MODEL:
        found += _made(make.__name__, partial(make, scene))
    for site in sorted(subject.saes):
        found += _made(f"the SAE at {site}", partial(saes.every, scene, site))
    return scene, found


def check_intervention(trial: Trial, scene: Scene) -> list[Finding]:
    """Every finding about what the intervention does on a scene."""
    try:
        stage = intervention.set_stage(scene, trial.intervention)
    except HoldfastError as error:
        return [_impossible("the intervention", error)]
    return [
        finding
        for make in intervention.CHECKS
        for finding in _made(f"the intervention ({make.__name__})", partial(make, stage))
    ]


def _made(what: str, make: Make) -> list[Finding]:
    """What a check finds, and why it cannot be made where that is so."""
    found = []
    try:
        for finding in make():
            found.append(finding)
    except HoldfastError as error:
        found.append(_impossible(what, error))
    return found


def _impossible(what: str, error: HoldfastError) -> Finding:
    return Finding(
        check=what,
        passed=False,
        level="error",
        expected="what the study names can be used",
        measured=str(error),
    )


def require(findings: Sequence[Finding], despite_faults: bool = False) -> None:
    """Raise PreflightError naming every error, and every fault unless told to pass over these."""
    stops = [f for f in dict.fromkeys(findings) if f.stops]
    if despite_faults:
        stops = [finding for finding in stops if finding.level == "error"]
    if not stops:
        return
    n = "a mistake" if len(stops) == 1 else f"{len(stops)} mistakes"
    errors = any(finding.level == "error" for finding in stops)
    raise PreflightError(
        f"preflight found {n}, and nothing was searched"
        + (":" if errors else ": the results would be wrong")
        + "\n"
        + "\n".join(f"  {finding.sentence}" for finding in stops)
        + ("" if errors else "\nMend this, or run with --despite-faults; the report then shows it.")
    )
