"""Checks of the model: hooks, precision, padding, cache, replay, routing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.edits import CaptureAt, Edit, EveryToken
from holdfast.errors import NonFiniteError
from holdfast.finding import Finding
from holdfast.hooks import AttachedEdits
from holdfast.preflight.scene import Scene, listed, spread_rows
from holdfast.replay import Replay
from holdfast.sites import Site
from holdfast.subject import Subject

PARITY = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative difference between two ways of computing the same that counts as rounding.
A mistake in positions, masks or caches makes one of order 1."""

N_ALONE = 4
"""Prompts that are also run alone, of all lengths."""

N_CONTINUED = 8
"""Prompts that are generated from, of all lengths."""

N_NEW = 3
"""Tokens generated for the check of the cache."""


@dataclass
class Witness(EveryToken):
    """Counts the tokens whose residual it sees at a site, and keeps the largest value."""

    site: Site
    n_tokens: int = 0
    largest: float = 0.0

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        there = x[self.selects(site, frame)]
        self.n_tokens += len(there)
        self.largest = max(self.largest, float(there.abs().amax().nan_to_num(torch.inf)))
        return x

    def check_fired(self, site: Site, n_fired: int) -> None:
        """Nothing: how often it was called is what is asked."""


@dataclass(frozen=True)
class Nudge:
    """Pushes the last prompt token's residual by a quarter of its norm in a random direction.

    A direction of its own, since the next norm would take a mere factor out again; far enough to be
    seen in any precision.
    """

    site: Site

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return frame.positions == frame.prompt_length[:, None] - 1

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(x.shape[-1], generator=generator).to(x.device)
        push = 0.25 * x.float().norm(dim=-1, keepdim=True) * direction / direction.norm()
        return torch.where(self.selects(site, frame)[..., None], x + push.to(x.dtype), x)

    def check_fired(self, site: Site, n_fired: int) -> None:
        """Nothing: what it did to the logits is what is asked."""


def stream(scene: Scene) -> Iterator[Finding]:
    """The residual stream can be read at every block and written at every SAE, and is finite.

    Nothing that comes after can be trusted where this fails.
    """
    subject, batch = scene.subject, scene.batch
    witnesses = [Witness(Site(depth)) for depth in range(subject.n_blocks + 1)]
    broken = ""
    try:
        subject.outputs(batch, witnesses)
    except NonFiniteError as error:
        broken = str(error).removeprefix(subject.name).strip()  # which may be a path
    dtype = subject.model.dtype
    limit, name = torch.finfo(dtype).max / 2, str(dtype).removeprefix("torch.")
    over = next((w for w in witnesses if w.largest >= limit), None)
    largest = over or max(witnesses, key=lambda witness: witness.largest)
    yield Finding(
        check=f"range of {name}",
        passed=not broken and over is None,
        expected=f"finite logits, and residuals below {limit:.3g}, half of what {name} can hold",
        measured=f"{largest.largest:.3g} at {largest.site}{', first of all' if over else ''}"
        + (f"; the model {broken}" if broken else ""),
        remedy='use dtype = "bfloat16" or "float32"' if dtype == torch.float16
        else "NaN in weights, or an attention implementation that fails on padding: compare "
        'attention = "eager"',
    )  # fmt: skip
    if broken:
        return
    n_tokens = int((batch.positions >= 0).sum())
    unseen = [w for w in witnesses if w.n_tokens != n_tokens]
    deaf = [] if unseen else [site for site in sorted(subject.saes) if not _heard(scene, site)]
    measured = f"{n_tokens} tokens at {len(witnesses)} sites"
    if unseen:
        measured = listed([f"{w.n_tokens} of {n_tokens} tokens at {w.site}" for w in unseen])
    elif deaf:
        measured = f"logits do not change with the residual at {listed(deaf)}"
    yield Finding(
        check="residual stream",
        passed=not unseen and not deaf,
        expected="every block's residual is seen whole, and what is written there reaches logits",
        measured=measured,
        remedy="hooks do not see what the model computes: `blocks` of its family in "
        "holdfast.families names other modules, or a compiled or fused model passes them by",
    )


def _heard(scene: Scene, site: Site) -> bool:
    """Whether a change of the residual at a site changes every prompt's logits."""
    nudged = scene.subject.outputs(scene.batch, (Nudge(site),))[:, -1]
    return bool((nudged != scene.logits).any(-1).all())


def padding(scene: Scene) -> Iterator[Finding]:
    """Prompts in a padded batch against the same prompts alone."""
    subject, batch = scene.subject, scene.batch
    rows = spread_rows(len(batch), N_ALONE)
    single = torch.cat([subject.outputs(batch.rows([int(i)]))[:, -1] for i in rows])
    worst = _difference(single, scene.logits[rows.to(scene.logits.device)])
    limit = PARITY[subject.model.dtype]
    yield Finding(
        check="padding",
        passed=worst <= limit,
        expected=f"logits in a padded batch equal those of single prompts to {limit:g} relative",
        measured=f"{worst:.1e}",
        remedy="the model mishandles padding on the left (position_ids or attention_mask ignored, "
        'or an attention kernel that fails on padded rows): try attention = "eager", else use '
        "prompts of one length",
    )


def cache(scene: Scene) -> Iterator[Finding]:
    """Generation under a cache against one full pass over what it generated, and replay, which
    reads from the same cache."""
    limit = PARITY[scene.subject.model.dtype]
    worst = cached_difference(scene.subject, few(scene.batch), ())
    yield Finding(
        check="cache",
        passed=worst <= limit,
        expected="residuals of generated tokens under the cache equal those of a full pass to "
        f"{limit:g} relative",
        measured=f"{worst:.1e}",
        remedy="this model's cache does not work as transformers' do: the search replays from it, "
        "so nothing it finds would be true; try another transformers version, and report it",
    )
    if worst <= limit:
        yield from _replay(scene)


def few(batch: Batch) -> Batch:
    """Prompts of all lengths to generate from."""
    return batch.rows(spread_rows(len(batch), N_CONTINUED))


def cached_difference(subject: Subject, batch: Batch, edits: Sequence[Edit]) -> float:
    """Largest relative difference of a last residual between generation and a full pass with it.

    The residuals and not the tokens chosen: these hide whatever is smaller than a margin.
    """
    last, n = Site(subject.n_blocks), batch.positions[:, -1:]
    under = CaptureAt(last, batch.ids, n + torch.arange(N_NEW, device=n.device))
    # The last token made has not been through the model.
    made = subject.generate(batch, (*edits, under), max_new_tokens=N_NEW)[:, :-1]
    under = under.columns(made.shape[1] + 1)
    whole = CaptureAt(last, batch.ids, under.positions)
    extended = batch
    for tokens in made.T:
        extended = extended.extended(tokens)
    with torch.no_grad(), AttachedEdits(
        subject.family.blocks_of(subject.model), (*edits, whole)
    ) as attached:  # fmt: skip

        def forward(rows: Tensor) -> None:
            own = extended.rows(rows)
            # Edits see the prompt's own length: what follows it was generated.
            attached.frame = own.frame_of(batch.rows(rows))
            subject.model(
                input_ids=own.tokens,
                attention_mask=own.mask,
                position_ids=own.positions.clamp(min=0),
                use_cache=False,
                logits_to_keep=1,
            )

        everyone = torch.arange(len(batch), device=n.device)
        subject.batching.over("passes", everyone, forward, attached.mark)
    one, other = under.read, whole.read
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())


def _replay(scene: Scene) -> Iterator[Finding]:
    """Replay from every site with an SAE, without edits."""
    subject, batch = scene.subject, scene.batch
    limit = PARITY[subject.model.dtype]
    for site in sorted(subject.saes):
        positions = batch.prompt_length[:, None] - 1
        with torch.no_grad():
            recorded = Replay.record(subject, batch, site, positions)
            zero = torch.zeros(len(batch), 1, subject.d_model, device=recorded.base.device)
            again = recorded.logits(zero)
        worst = _difference(again, scene.logits)
        yield Finding(
            check=f"replay from {site}",
            passed=worst <= limit,
            expected=f"recomputing only what a perturbation can change equals the full pass to "
            f"{limit:g} relative",
            measured=f"{worst:.1e}",
            remedy="the search would see other logits than the model's: `final_norm` or the logit "
            "soft-cap of its family in holdfast.families, or a cache of a new kind; report it",
        )


def routing(scene: Scene) -> Iterator[Finding]:
    if scene.subject.family.moe:
        yield Finding(
            check="mixture of experts",
            passed=False,
            level="caution",
            expected="a gradient that sees everything a perturbation can do",
            measured="tokens are routed to some experts, and gradients see only those chosen",
            remedy="a search that fails may have missed a way over other experts: read `held` with "
            "that in mind",
        )


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of logits [b vocab], relative to the largest logit; NaN counts as one."""
    worst = (one.to(other.device) - other).abs().max() / other.abs().max()
    return float(worst.nan_to_num(torch.inf))
