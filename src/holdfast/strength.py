"""Choose an intervention's strength on the tune split: flips first, but not at any price."""

from __future__ import annotations

from holdfast.batch import Batch
from holdfast.behaviors import BehaviorKind
from holdfast.features import FeatureSet
from holdfast.interventions import InterventionKind
from holdfast.subject import Subject

MIN_NEIGHBOR_ACCURACY = 0.95
"""Share of a neighbor's right answers that must survive (the published configuration picker of the
multiple-choice setting uses .99 on larger sets, METHODS J.2)."""


def choose_strength(
    subject: Subject,
    behavior: BehaviorKind,
    intervention: InterventionKind,
    features: FeatureSet,
    tune: Batch,
    neighbors: dict[str, Batch],
) -> InterventionKind:
    """The candidate that flips most tune prompts while every neighbor keeps its accuracy.

    Ties go to the candidate named first. If none spares the neighbors, the one that spares them
    most is taken: its side effects are in the record.
    """
    candidates = intervention.candidates()
    if len(candidates) == 1:
        return candidates[0]
    clean = behavior.observe(subject, tune)
    before = {n: behavior.observe(subject, b).shows for n, b in neighbors.items()}
    best, best_score = candidates[0], (-1.0, -1.0)
    for candidate in candidates:
        edits = candidate.edits(subject, features)
        after = behavior.observe(subject, tune, edits, clean.replies or None)
        flipped = clean.shows & after.opposite
        kept = [
            float(behavior.observe(subject, b, edits).shows[before[n]].float().mean())
            for n, b in neighbors.items()
            if before[n].any()  # one that is never right has nothing to lose
        ]
        spared = min(kept, default=1.0)
        score = (min(spared, MIN_NEIGHBOR_ACCURACY), float(flipped.float().mean()))
        if score > best_score:
            best, best_score = candidate, score
    return best
