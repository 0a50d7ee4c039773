"""What is known of a trial before it runs: shapes, lengths, how often things are done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from holdfast.attacks.residual import packed
from holdfast.batching import Sizes
from holdfast.errors import StudyError
from holdfast.forecast.architecture import Architecture
from holdfast.forecast.passes import Passes
from holdfast.forecast.prompts import Prompts
from holdfast.positions import Where
from holdfast.recovery import RecoverySpec
from holdfast.saes.sources import Shape
from holdfast.sites import Site
from holdfast.trial import Trial

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
BITS = {None: 0, "8bit": 8, "4bit": 4}

ACTIVE = 64
"""Features of an SAE that are taken to be on at a token; of a TopK it is known."""


@dataclass(frozen=True)
class Scene:
    """A trial, the shapes of its subject, and the prompts it will have.

    dtype, quantization: of the weights; eager: whether attention keeps its scores; saes: site → the
    shape of its SAE; sizes: how many rows go at once; beside: rows of other trials in the batch
    that it is searched in, which share its memory and none of its operations.
    """

    trial: Trial
    model: Architecture
    dtype: str
    quantization: str | None
    eager: bool
    saes: Mapping[Site, Shape]
    prompts: Prompts
    sizes: Sizes
    beside: int = 0

    @property
    def size(self) -> int:
        """Bytes of a number in the model's precision."""
        return SIZES[self.dtype]

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight of a block."""
        return BITS[self.quantization] / 8 or self.size

    @cached_property
    def passes(self) -> Passes:
        return Passes(
            self.model, self.weight_bytes, self.size, max(1, self.sizes.passes),
            max(1, self.sizes.generation),
        )  # fmt: skip

    @cached_property
    def features(self) -> Mapping[Site, int]:
        """Clamped site → features there, at most."""
        found = self.trial.discovery.expected(tuple(self.saes))
        clamped = self.trial.intervention.clamped(found)
        return {site: max(len(e.ids) for e in clamped.at(site)) for site in clamped.sites}

    @property
    def search(self) -> RecoverySpec:
        """What a search is bound to. Only of trials that search."""
        assert self.trial.recovery is not None
        return self.trial.recovery

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The perturbed sites, in forward order."""
        named = {Site.parse(site) for site in self.search.perturb.sites}
        sites = tuple(sorted(named or set(self.features)))
        for site in (*sites, *self.features):
            if site.depth > self.model.n_blocks:
                raise StudyError(f"a model of {self.model.n_blocks} blocks has no site {site}")
        return sites

    @property
    def held(self) -> Mapping[Site, int]:
        """Clamped site → features that a constraint holds at a slot, at most."""
        if not self.search.constraint.sees_all:
            return self.features
        return {
            site: min(k + (self.saes[site].k or ACTIVE), self.model.d_model)
            for site, k in self.features.items()
        }

    @property
    def last_held(self) -> Site:
        """The last site that a perturbation moves features at, or is added at."""
        return max(*self.sites, *self.features)

    @cached_property
    def read_at(self) -> Site | None:
        """The site that is read at every token, None where logits are read at the prompt's end."""
        return self.trial.behavior.read_at(tuple(self.saes))

    @property
    def read_depth(self) -> int | None:
        """Where a pass that is read there ends, None at the last block."""
        return None if self.read_at is None else self.read_at.depth

    @property
    def n_logits(self) -> int:
        """Logits of a lane that a step computes: of the answers in play, or all of them where an
        objective compares with every one, or all along an answer."""
        if self.read_at is not None:
            return 0
        if self.trial.behavior.answer_tokens:
            return self.trial.behavior.n_read * self.model.vocabulary
        if self.trial.recovery is not None and self.trial.recovery.objective.reads_all:
            return self.model.vocabulary
        return self.prompts.answers

    @property
    def whole(self) -> Mapping[Site, int]:
        """Clamped site → features that a clamp runs at every token: all of a TopK's, for its k-th
        value, and all where the reconstruction is needed; none elsewhere."""
        everything = self.trial.intervention.runs_whole
        return {
            site: self.saes[site].n_features if everything or self.saes[site].k is not None else 0
            for site in self.features
            if self._has_sae(site)
        }

    def _has_sae(self, site: Site) -> bool:
        if site not in self.saes:
            raise StudyError(
                f"no SAE at {site}: the study has SAEs at {', '.join(map(str, self.saes))}; add "
                "one for that site under [[subject.saes]], or leave it out of features and circuit"
            )
        return True

    # ------------------------------------------------------------------ tokens

    @property
    def tokens(self) -> int:
        """Columns of a search pass: the prompt, and a forced answer but for its last token."""
        return self.prompts.width + self.trial.behavior.n_read - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest text of the trial, its answer included. A turn of a conversation is
        taken to be as long as a prompt."""
        turns = max(self.trial.attack.turns, default=1)
        return turns * (self.prompts.width + self.trial.behavior.answer_tokens)

    @property
    def positions(self) -> int:
        """Perturbed positions of a site, at most."""
        return self._span(self.search.perturb.positions)[0] + self.search.perturb.answer

    @property
    def columns(self) -> int:
        """Columns that a step runs: from the first perturbed or read one on, all where a clamp
        decides on a whole prompt, which any of its tokens can move."""
        if self.read_at is not None or self.trial.intervention.decides_on_prompt:
            return self.tokens
        back = self._span(self.search.perturb.positions)[1]
        return min(max(back, 1) + self.trial.behavior.n_read - 1, self.tokens)

    @property
    def begun(self) -> int:
        """Tokens of a prompt before the first perturbed one, which are run once for all answers."""
        if self.trial.intervention.decides_on_prompt or 2 * self.rows > self.sizes.generation:
            return 0
        return self.prompts.width - self._span(self.search.perturb.positions)[1]

    def _span(self, where: Where) -> tuple[int, int]:
        """How many positions a policy names, and how far from the prompt's end they begin."""
        width, template = self.prompts.width, self.prompts.template
        if not isinstance(where, str):
            return len(where), max(width - min(where, default=0), 1)
        answer = self.trial.behavior.n_read - 1
        return {
            "all": (width + answer, width),
            "prompt": (width, width),
            "template": (template, template),
            "last_prompt": (1, 1),
            "generated": (answer, 0),
        }[where]

    # ------------------------------------------------------------------ how often

    @property
    def rows(self) -> int:
        """Prompts that are searched: all that are tried, which is the most there can be."""
        return self.prompts.n["test"]

    @property
    def searched(self) -> int:
        """Rows of the batch that the trial is searched in."""
        return self.rows + self.beside

    @property
    def rounds(self) -> int:
        """Rounds of the bisection of a norm, which halve the interval around it at least."""
        return math.ceil(math.log2(1 / self.search.tolerance))


def among(scene: Scene, stack: Sequence[Trial]) -> Scene:
    """The scene in the batch that its trial is searched in, of a stack's trials.

    All of a stack have as many prompts, and are taken to be searched on all of them, as rows of
    as few batches as hold them.
    """
    if not scene.trial.searches:
        return scene
    place = [trial.id for trial in stack].index(scene.trial.id)
    batch = next(batch for batch in packed([scene.rows] * len(stack)) if place in batch)
    return replace(scene, beside=scene.rows * (len(batch) - 1))
