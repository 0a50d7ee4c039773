"""What every trial of an audit shares: splits, features, the clamp, and which prompts it flips.

clean → suppressed → valid, with features and strengths fitted on other prompts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from holdfast.batch import Batch, Example
from holdfast.behaviors import BehaviorKind, Split
from holdfast.behaviors.observation import Observation
from holdfast.canonical import digest
from holdfast.capability import Texts, capability
from holdfast.config import LATER, Config
from holdfast.discovery import DiscoveryKind, with_scale
from holdfast.edits import Edit
from holdfast.features import FeatureSet
from holdfast.interventions import InterventionKind
from holdfast.manifest import origin_of
from holdfast.measure import Measurement
from holdfast.readouts import Readout
from holdfast.reconstruction import explained
from holdfast.splits import check_disjoint
from holdfast.strength import choose_strength
from holdfast.subject import Subject
from holdfast.triggers import OWN, triggers


class Data(Config):
    """How many prompts each split may hold at most. Features are fitted on `fit`, strengths chosen
    on `tune`, and `test` is audited; no prompt is in two of them. texts: on which it is measured
    what the intervention's SAEs cost by themselves."""

    fit: int = Field(200, ge=1)
    tune: int = Field(100, ge=1)
    test: int = Field(200, ge=1)
    texts: Annotated[Texts | None, LATER] = None


@dataclass(frozen=True)
class Setting:
    """An intervention on a subject, and what it does to n test prompts.

    fit, fit_neighbors: the prompts features were found on. test: those that are audited, as the
    search reads them. clean_margin, suppressed_margin [n], in logits; suppressed_answer [n], as the
    readout numbers it; observed, changed: what the behavior saw without and with the intervention,
    where that is more than the sign of the margin; neighbors: name → (batch, whether it shows the
    behavior without, and with the intervention); examples: the test prompts before they were
    tokenized; opposed: prompts on which the model by itself does what the intervention makes it do,
    if there are any; spliced [n] bool: the behavior is there with the intervention's SAEs in place
    and no feature changed, None where that changes nothing; explained: site → share of the clean
    residual's variance that its SAE explains, measured where the intervention passes less than all
    of the error on; capability: how well other texts are predicted with these SAEs and without,
    where the study names texts.
    """

    subject: Subject
    features: FeatureSet
    intervention: InterventionKind
    edits: tuple[Edit, ...]
    sizes: dict[str, int]
    test: Batch
    clean_margin: Tensor
    suppressed_margin: Tensor
    suppressed_answer: Tensor
    neighbors: dict[str, tuple[Batch, Tensor, Tensor]]
    behavior: BehaviorKind | None = None
    observed: Observation | None = None
    changed: Observation | None = None
    examples: tuple[Example, ...] = ()
    opposed: tuple[Example, ...] = ()
    fit: Batch | None = None
    fit_neighbors: dict[str, Batch] = field(default_factory=dict)
    spliced: Tensor | None = None
    explained: dict[str, float] = field(default_factory=dict)
    capability: tuple[Measurement, ...] = ()

    def under(self, features: FeatureSet) -> Setting:
        """The same prompts under the same intervention, of the same strength and with thresholds
        that were learnt for its own features, on other features.

        features: without their statistics, which are measured here on the fit split.
        """
        subject, behavior = self.subject, self.behavior
        if self.fit is not None:
            features = with_scale(subject, self.fit, features)
        intervention = self.intervention.onto(features)
        edits = intervention.edits(subject, features)
        read = subject.read(self.test, edits)
        changed, neighbors = None, {}
        if behavior is not None:
            if self.observed is not None:
                references = self.observed.replies or None
                changed = behavior.observe(subject, self.test, edits, references)
                changed = behavior.read_again(subject, changed, references)
            for name, (batch, clean, _) in self.neighbors.items():
                neighbors[name] = (batch, clean, behavior.observe(subject, batch, edits).shows)
        return replace(
            self,
            features=features,
            intervention=intervention,
            edits=edits,
            suppressed_margin=self.test.margin(read),
            suppressed_answer=self.test.given(_last(read)),
            changed=changed,
            neighbors=neighbors,
        )

    @cached_property
    def shown(self) -> Tensor:
        """[n] bool: the behavior is there without the intervention."""
        return self.clean_margin > 0 if self.observed is None else self.observed.shows

    @cached_property
    def clean(self) -> Tensor:
        """[n] bool: the same, of prompts that the behavior takes as clean."""
        if self.behavior is None:
            return self.shown
        return self.behavior.counted(self.test.clusters, self.shown)

    @cached_property
    def suppressed(self) -> Tensor:
        """[n] bool: the behavior is there without the intervention, and its opposite with it."""
        if self.changed is None:
            return self.clean & (self.suppressed_margin <= 0)
        return self.clean & self.changed.opposite

    @property
    def valid(self) -> Tensor:
        """Rows of `test` to audit."""
        return self.suppressed.nonzero().flatten()

    @cached_property
    def scores(self) -> tuple[Measurement, ...]:
        """What the intervention did in the behavior's own measures, taken once for all trials."""
        return () if self.behavior is None else self.behavior.scores(self)

    @cached_property
    def triggers(self) -> tuple[Measurement, ...]:
        """How often a conditional intervention acts on the test prompts and on neighbors'."""
        batches = {name: batch for name, (batch, _, _) in self.neighbors.items()}
        return triggers(self.subject, self.edits, {OWN: self.test} | batches)

    def manifest(self, row: int) -> dict[str, Any]:
        """Where a test prompt came from, and which of the two conditions it meets."""
        met = {"clean": bool(self.clean[row]), "valid": bool(self.suppressed[row])}
        example = self.examples[row]
        return asdict(origin_of(example, self.subject.encode(example))) | met


def readout_of(subject: Subject, behavior: BehaviorKind, data: Data, seed: int) -> Readout:
    """The behavior's readout on a subject, fitted once whatever reads from it."""
    key = digest([behavior.fitted_by, data.fit, data.tune, seed])
    if key not in subject.fitted:
        sizes: dict[Split, int] = {"fit": data.fit, "tune": data.tune}
        subject.fitted[key] = behavior.fitted(subject, sizes, seed)
    return subject.fitted[key]


def prepare(
    subject: Subject,
    behavior: BehaviorKind,
    discovery: DiscoveryKind,
    intervention: InterventionKind,
    data: Data,
    seed: int,
) -> Setting:
    """Fit features and strength on their own splits, apply the intervention to the test split.

    Raises SplitError if two splits share a prompt or a cluster.
    """
    tokenizer = subject.tokenizer
    readout = readout_of(subject, behavior, data, seed)
    candidates = behavior.examples(tokenizer, "test", data.test, seed)
    splits = {
        "fit": subject.batch(behavior.examples(tokenizer, "fit", data.fit, seed), readout),
        "tune": subject.batch(behavior.examples(tokenizer, "tune", data.tune, seed), readout),
        "test": subject.batch(candidates, readout),
    }
    check_disjoint(splits)
    fit_neighbors = {
        name: subject.batch(examples, readout)
        for name, examples in behavior.neighbors(tokenizer, "fit", data.fit, seed).items()
    }
    features = intervention.clamped(discovery.find(subject, splits["fit"], fit_neighbors))
    features = with_scale(subject, splits["fit"], features)
    intervention = intervention.fitted(subject, features, tuple(fit_neighbors.values()))
    tune_neighbors = {
        name: subject.batch(examples, readout)
        for name, examples in behavior.neighbors(tokenizer, "tune", data.tune, seed).items()
    }
    chosen = choose_strength(
        subject, behavior, intervention, features, splits["tune"], tune_neighbors
    )
    edits = chosen.edits(subject, features)

    observed = behavior.read_again(subject, behavior.observe(subject, splits["test"]))
    references = observed.replies or None
    changed = behavior.observe(subject, splits["test"], edits, references)
    changed = behavior.read_again(subject, changed, references)
    bare = chosen.bare_edits(subject, features)
    spliced = behavior.observe(subject, splits["test"], bare, references).shows if bare else None
    test = behavior.aim(subject, splits["test"], observed)
    clean, suppressed = (subject.read(test, e) for e in ((), edits))
    neighbors = {}
    for name, examples in behavior.neighbors(tokenizer, "test", data.test, seed).items():
        batch = subject.batch(examples, readout)
        shown = [behavior.observe(subject, batch, e).shows for e in ((), edits)]
        neighbors[name] = (batch, shown[0], shown[1])
    return Setting(
        subject=subject,
        features=features,
        intervention=chosen,
        edits=edits,
        sizes={name: len(batch) for name, batch in splits.items()},
        test=test,
        clean_margin=test.margin(clean),
        suppressed_margin=test.margin(suppressed),
        suppressed_answer=splits["test"].given(_last(suppressed)),
        neighbors=neighbors,
        behavior=behavior,
        observed=observed if observed.labels else None,
        changed=changed if changed.labels else None,
        examples=tuple(candidates),
        opposed=tuple(behavior.opposed(tokenizer, "test", data.test, seed)),
        fit=splits["fit"],
        fit_neighbors=fit_neighbors,
        spliced=spliced,
        explained=explained(subject, splits["test"], features.sites) if bare else {},
        capability=()
        if data.texts is None
        else capability(subject, data.texts, bare, features, seed),
    )


def _last(scores: Tensor) -> Tensor:
    """[n answers] of scores [n answers], or of the first token read of [n t answers]."""
    return scores if scores.ndim == 2 else scores[:, 0]
