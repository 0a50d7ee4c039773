"""Checks of the intervention: does it act where it says, and under the cache as without it?

They are made with features that fire on these prompts. Which tokens an intervention acts on does
not depend on its features, and finding the audit's own takes longer than every check together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.discovery import with_scale
from holdfast.edits import Edit, FeatureEdit, Placed
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.finding import Finding
from holdfast.interventions import InterventionKind
from holdfast.perturbed import in_prompt, sites_of
from holdfast.preflight.model import N_NEW, PARITY, cached_difference, few
from holdfast.preflight.scene import Scene, listed
from holdfast.recovery import RecoverySpec
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.trial import Trial

N_STAND_INS = 8
"""Features the intervention is tried on."""

OUTLYING = 10.0
"""A residual this many times longer than the median one holds no features: an attention sink."""


@dataclass(frozen=True)
class Stage:
    """An intervention on a scene, its edits made for the features that fire most there."""

    scene: Scene
    edits: tuple[Edit, ...]


def set_stage(scene: Scene, intervention: InterventionKind) -> Stage:
    """Raises HoldfastError where the intervention cannot be made at all, and PositionError where it
    names positions that neither a prompt nor what is made of it has."""
    entries = []
    for site in sorted(scene.subject.saes):
        fired = scene.fired(site)
        ids = tuple(fired.topk(min(N_STAND_INS, len(fired))).indices.tolist())
        entries.append(SiteFeatures(site=str(site), ids=ids))
    stand_ins = FeatureSet(entries=tuple(entries), source="stand-in")
    first = intervention.candidates()[0]
    features = with_scale(scene.subject, scene.batch, first.clamped(stand_ins))
    fitted = first.fitted(scene.subject, features, (scene.batch,))
    edits = fitted.edits(scene.subject, features)
    for edit in edits:
        if isinstance(edit, Placed):
            for batch in scene.splits.values():
                edit.check_inside(batch, scene.behavior.answer_tokens)
    return Stage(scene, edits)


@dataclass
class Probe:
    """Stands where an edit stands and notes the tokens it would change.

    seen: (example id, absolute position) of each.
    """

    edit: Edit
    site: Site
    seen: set[tuple[str, int]] = field(default_factory=set)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return self.edit.selects(site, frame)

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        for row, column in self.selects(site, frame).nonzero().tolist():
            self.seen.add((frame.ids[row], int(frame.positions[row, column])))
        return x

    def check_fired(self, site: Site, n_fired: int) -> None:
        """Nothing: what it saw is compared with what it should have."""


def fires(stage: Stage) -> Iterator[Finding]:
    """While text is generated, each edit must act exactly on the positions its policy names."""
    subject, batch = stage.scene.subject, stage.scene.batch
    clamps = [edit for edit in stage.edits if isinstance(edit, FeatureEdit)]
    probes = [Probe(edit, site) for edit in clamps for site in edit.sites]
    if not probes:
        return  # edits of another kind know their positions alone
    # The last token made has not been through the model.
    n_new = subject.generate(batch, probes, max_new_tokens=N_NEW).shape[1] - 1
    for probe in probes:
        edit = probe.edit
        assert isinstance(edit, FeatureEdit)
        expected = _expected(stage.scene, batch, edit, n_new)
        missing, extra = sorted(expected - probe.seen), sorted(probe.seen - expected)
        bos = "" if edit.include_bos else ", BOS left out"
        yield Finding(
            check=f"positions of the clamp ({edit.mode}) at {probe.site}",
            passed=not missing and not extra,
            expected=f"it acts at positions {edit.where!r}{bos}: {len(expected)} tokens of prompts "
            "and continuations",
            measured=f"{len(probe.seen)} tokens"
            + (f", {len(missing)} missing ({listed(missing)})" if missing else "")
            + (f", {len(extra)} too many ({listed(extra)})" if extra else ""),
            remedy="the rule counts columns of a batch or a cache instead of positions in the "
            "prompt, or takes another token for BOS; report it",
        )


def _expected(scene: Scene, batch: Batch, edit: FeatureEdit, n_new: int) -> set[tuple[str, int]]:
    """Where the policy says the edit acts, worked out prompt by prompt from the token lists."""
    out: set[tuple[str, int]] = set()
    bos = scene.subject.tokenizer.bos_token_id
    by_id = {example.id: example for example in scene.examples["fit"]}
    for row, example in enumerate(batch.ids):
        ids = scene.subject.encode(by_id[example])
        n, last = len(ids), len(ids) + n_new
        named = {
            "all": range(last),
            "prompt": range(n),
            "generated": range(n, last),
            "last_prompt": range(n - 1, n),
            "template": range(int(batch.template[row]), n),
        }
        where = (
            named[edit.where]
            if isinstance(edit.where, str)
            else [position for position in edit.where if position < last]
        )
        keep = edit.include_bos or ids[0] != bos
        out |= {(example, position) for position in where if keep or position != 0}
    return out


def cached(stage: Stage) -> Iterator[Finding]:
    """Generation with the intervention on, under the cache and without it."""
    subject, batch = stage.scene.subject, stage.scene.batch
    rows, limit = few(batch), PARITY[subject.model.dtype]
    worst = cached_difference(subject, rows, stage.edits)
    # Where the cache does not work at all, that is said once and not blamed on the intervention.
    bare = cached_difference(subject, rows, ()) if worst > limit else 0.0
    yield Finding(
        check="cache under the intervention",
        passed=worst <= max(limit, 2 * bare),
        expected="with the clamp on, residuals of generated tokens under the cache equal those of "
        f"a full pass to {limit:g} relative",
        measured=f"{worst:.1e}" + (f", without the clamp {bare:.1e}" if bare else ""),
        remedy="the cache keeps keys of an unedited prompt, or the clamp acts elsewhere there than "
        "in a full pass; report it",
    )


def sinks(stage: Stage) -> Iterator[Finding]:
    """Attention sinks, mostly the first token: what features do there is noise of a large norm."""
    frame = stage.scene.batch.frame()
    there = frame.positions >= 0
    bos = ((frame.positions == 0) & frame.bos[:, None])[there]
    for edit in stage.edits:
        for site in set(edit.sites) & stage.scene.residuals.keys():
            length = stage.scene.residuals[site].norm[there]
            mask = edit.selects(site, frame)[there]
            ratio = length / length[~bos].median()
            outlying = mask & (ratio > OUTLYING)
            yield Finding(
                check=f"attention sinks under the clamp at {site}",
                passed=not outlying.any(),
                level="caution",
                expected=f"it acts on residuals at most {OUTLYING:g} times as long as the median",
                measured=f"{int(outlying.sum())} of {int(mask.sum())} tokens are longer, up to "
                f"{float(ratio[mask].max()) if mask.any() else 0.0:.1f} times",
                remedy="SAEs are not trained on such tokens and what their features do there is "
                "noise: leave include_bos out, or list positions without them",
            )


def named(scene: Scene, trial: Trial) -> Iterator[Finding]:
    """Every site has an SAE, and every prompt the positions to perturb. Raises HoldfastError."""
    subject = scene.subject
    clamped = tuple(trial.discovery.sites) or tuple(subject.saes)
    for site in clamped:
        subject.sae(site)
    if trial.recovery is None:
        return
    perturb = trial.recovery.perturb
    sites = sites_of(perturb, clamped, subject.name, subject.n_blocks)
    n = in_prompt(perturb, scene.splits["test"].frame()).sum(1)
    yield Finding(
        check="what is perturbed",
        passed=True,
        expected="sites and positions that the model and every prompt have",
        measured=f"{listed(sites)}; {int(n.min())} to {int(n.max())} tokens of a prompt",
    )


def constraint(recovery: RecoverySpec, subject: Subject) -> Iterator[Finding]:
    """What the trial's constraint can promise on its SAEs."""
    kind = recovery.constraint
    if not kind.exact:
        return
    for site, sae in sorted(subject.saes.items()):
        guarantee = sae.guarantee
        yield Finding(
            check=f"{kind.kind} at {site}",
            passed=guarantee == "exact",
            level="fault" if guarantee == "none" else "caution",
            expected="features that stay as they are while affine functions of the residual do",
            measured={
                "exact": "they do",
                "margin": "a TopK SAE: held features can still be overtaken by others",
                "none": "the SAE normalizes each token, so its features depend on the residual's "
                "norm as well, which nothing holds",
            }[guarantee],
            remedy={
                "exact": "",
                "margin": "overtaking is measured, and such prompts do not count as recovered: "
                "read `n_overtaken` in the record",
                "none": "use unconstrained or gradient_projection and read their drift, or an SAE "
                "without per-token normalization",
            }[guarantee],
        )


CHECKS = (fires, cached, sinks)
