"""How far judges, automatic or human, agree: kappa of two, alpha of several, confusion matrices."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from holdfast.config import Config

Labels = Sequence[str | None]
"""One label a reply in a fixed order; None where a judge did not say."""


class PairAgreement(Config):
    """Two judges on the replies that both labelled.

    share_equal: of these; kappa: Cohen's (1960); None for `reason`; confusion: counts [first's
    label, second's label], both in the order of `labels`.
    """

    first: str
    second: str
    n: int
    share_equal: float | None
    kappa: float | None
    reason: str = ""
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]


class Agreement(Config):
    """Several judges on the same replies.

    n: replies that two or more judges labelled; alpha: Krippendorff's for nominal labels; None for
    `reason`.
    """

    judges: tuple[str, ...]
    n: int
    alpha: float | None
    reason: str = ""
    pairs: tuple[PairAgreement, ...]


def agreement(labels_by_judge: Mapping[str, Labels]) -> Agreement:
    """Every pair of judges, and all of them together; labels in the same order of replies."""
    lengths = {judge: len(labels) for judge, labels in labels_by_judge.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected labels of the same replies from every judge, got {lengths}")
    units = list(zip(*labels_by_judge.values(), strict=True))
    n = sum(sum(label is not None for label in unit) > 1 for unit in units)
    alpha = krippendorff_alpha(units)
    return Agreement(
        judges=tuple(labels_by_judge),
        n=n,
        alpha=alpha,
        reason="" if alpha is not None else _why_none(n),
        pairs=tuple(
            pair_agreement(a, b, labels_by_judge[a], labels_by_judge[b])
            for a, b in itertools.combinations(labels_by_judge, 2)
        ),
    )


def pair_agreement(first: str, second: str, a: Labels, b: Labels) -> PairAgreement:
    """Two judges' labels of the same replies."""
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    labels = tuple(sorted({label for pair in both for label in pair}))
    kappa: float | None = None
    confusion: tuple[tuple[int, ...], ...] = ((len(both),),) if both else ()
    if len(labels) > 1:  # with one label in use chance agrees as well as anybody: 0 / 0
        from sklearn.metrics import cohen_kappa_score, confusion_matrix

        x, y = zip(*both, strict=True)
        confusion = tuple(map(tuple, confusion_matrix(x, y, labels=labels).tolist()))
        kappa = float(cohen_kappa_score(x, y, labels=labels))
    return PairAgreement(
        first=first,
        second=second,
        n=len(both),
        share_equal=sum(x == y for x, y in both) / len(both) if both else None,
        kappa=kappa,
        reason="" if kappa is not None else _why_none(len(both)),
        labels=labels,
        confusion=confusion,
    )


def krippendorff_alpha(units: Sequence[Sequence[str | None]]) -> float | None:
    """Krippendorff's alpha for nominal labels (2011, "Computing Krippendorff's alpha-reliability").

    units: for each reply the labels it was given; None is missing, and a reply with fewer than two
    labels says nothing. None where every label is the same, or nothing was labelled twice.
    """
    # o[a, b]: pairs of labels within replies, a reply of m labels weighing m in all.
    o: defaultdict[tuple[str, str], float] = defaultdict(float)
    for unit in units:
        given = [label for label in unit if label is not None]
        for pair in itertools.permutations(given, 2):
            o[pair] += 1 / (len(given) - 1)
    totals: defaultdict[str, float] = defaultdict(float)
    for (a, _), weight in o.items():
        totals[a] += weight
    if len(totals) < 2:
        return None
    n = sum(totals.values())
    observed = sum(weight for (a, b), weight in o.items() if a != b)
    expected = n * n - sum(total**2 for total in totals.values())
    return 1 - (n - 1) * observed / expected


def _why_none(n: int) -> str:
    return "every label is the same" if n else "nothing was labelled by two"
