"""A minimal set: of another discovery's features, those whose loss is felt (METHODS L.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from holdfast.batch import Batch
from holdfast.discovery import Discovery, DiscoveryKind
from holdfast.edits import FeatureEdit
from holdfast.errors import FeatureError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject

Effect = Callable[[tuple[int, ...]], float]
"""What leaving out a set of candidates, by their places, does: the larger the more is lost."""


class Minimal(DiscoveryKind):
    """The features of another discovery that cannot be restored without being missed.

    All of them are set to 0 on the fit split, BOS left out, and the fall of the mean margin is
    taken. Then, from the one with the lowest score up, features are restored, whole blocks first:
    those whose return gives back less than `threshold` of that fall leave the set. It ends when
    none of the rest can go. Of two features that do the same, one stays.

    A return is compared with the set as it is by then, as in L.2, so what leaves adds up: many weak
    features, each of which is not missed, can take most of the fall along. L.2 asks for the set's
    effect to be measured again, which an audit does: its clamp is this set, on other prompts.

    of: the discovery whose features these are, one set for all prompts.
    """

    kind: Literal["minimal"] = "minimal"
    of: Discovery
    threshold: float = Field(0.02, gt=0, lt=1)

    def find(self, subject: Subject, fit: Batch, neighbors: dict[str, Batch]) -> FeatureSet:
        found = self.of.find(subject, fit, neighbors)
        slots = slots_of(found, self.kind)
        clean = float(fit.margin(subject.read(fit)).mean())

        def effect(places: tuple[int, ...]) -> float:
            if not places:
                return 0.0
            left = chosen(found, [slots[place][:2] for place in places], self.kind)
            edits = [
                FeatureEdit(FeatureBank.of(subject.sae(site), left), "set_where_active", 0.0)
                for site in left.sites
            ]
            return clean - float(fit.margin(subject.read(fit, edits)).mean())

        order = sorted(range(len(slots)), key=lambda place: slots[place][2])
        whole = effect(tuple(sorted(order)))
        if whole <= 0:
            raise FeatureError(
                f"setting all {len(slots)} candidates of {self.of.kind!r} to 0 does not lower the "
                f"mean margin of the fit prompts (it changes by {-whole:+.3g}), so none is missed; "
                "use other candidates"
            )
        kept = minimal(order, effect, self.threshold * whole)
        return chosen(found, [slots[place][:2] for place in kept], self.kind)

    @property
    def reads_whole(self) -> bool:
        return self.of.reads_whole

    def passes(self, sites: Sequence[Site]) -> int:
        candidates = sum(len(entry.ids) for entry in self.of.expected(sites).entries)
        # Blocks of n/2, n/4, … 1 are 2n together, and the single ones are gone over once more.
        return self.of.passes(sites) + 3 * candidates

    def expected(self, sites: Sequence[Site]) -> FeatureSet:
        return self.of.expected(sites)


def minimal(order: Sequence[int], effect: Effect, least: float) -> list[int]:
    """The places that stay, ascending, when all whose return is not felt are restored in turn.

    order: which to try first; least: the smallest fall of `effect` that is felt, from what the set
    does by then. A block leaves only if all of it together is not felt, so blocks are never bolder
    than single features whose effects add up.
    """
    kept = list(order)
    now = effect(tuple(sorted(kept)))
    size = max(1, len(kept) // 2)
    while True:
        gone = False
        for block in [kept[i : i + size] for i in range(0, len(kept), size)]:
            rest = [place for place in kept if place not in block]
            if not rest:
                continue
            without = effect(tuple(sorted(rest)))
            if now - without < least:
                kept, now, gone = rest, without, True
        if size > 1:
            size //= 2
        elif not gone:
            return sorted(kept)


def slots_of(found: FeatureSet, kind: str) -> list[tuple[str, int, float]]:
    """(site, feature, score) of every candidate. Raises FeatureError for sets by group."""
    if any(len(found.at(site)) > 1 for site in found.sites):
        raise FeatureError(
            f"{kind!r} compares features over all fit prompts, and these are fitted by group; "
            "leave `group` out of the discovery it takes them from"
        )
    return [
        (entry.site, feature, score)
        for entry in found.entries
        for feature, score in zip(entry.ids, entry.scores or (0.0,) * len(entry.ids), strict=True)
    ]


def chosen(
    found: FeatureSet,
    picked: Sequence[tuple[str, int]],
    source: str,
    scores: Sequence[float] | None = None,
) -> FeatureSet:
    """Some of a set's features, in its order, with their scores or others."""
    own = dict(zip(picked, scores, strict=True)) if scores is not None else None
    entries = []
    for entry in found.entries:
        places = [i for i, feature in enumerate(entry.ids) if (entry.site, feature) in set(picked)]
        if not places:
            continue
        kept = tuple(entry.ids[i] for i in places)
        if own is not None:
            said = tuple(own[entry.site, feature] for feature in kept)
        else:
            said = tuple(entry.scores[i] for i in places) if entry.scores else ()
        entries.append(SiteFeatures(site=entry.site, group=entry.group, ids=kept, scores=said))
    return FeatureSet(entries=tuple(entries), source=source)
