"""How held features answer to a perturbation: values, products with the Jacobian, and solves.

Φ(δ) collects `(p_i(δ) − p_i(0)) / (‖a_i‖·‖h‖)` over the monitored slots and held features, so that
every entry is dimensionless, and J = ∂Φ/∂δ. A slot is monitored if a perturbation can reach it:
held sites from the lowest perturbed one on, at every token from the first perturbed one on, because
later tokens read earlier ones through attention.

Where nothing is added at a slot and its clamps read held features only, Φ has the pre-activations
before the clamp. The clamp then does what it did in the reference, so that those after it are held
too, and a clamp that makes steps (where active) or takes almost everything away (set) makes no step
and no almost singular J here. What counts as held is always measured after the clamp.

Corrections are `Jᵀ(JJᵀ + μI)⁻¹r`. Few constraints: J itself, row by row. Many: conjugate gradients
on products with J and Jᵀ, which stop as soon as the residual is small enough to be useful.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from holdfast.edits import FeatureEdit
from holdfast.problem import TINY, Problem
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subspace import into_ball

DAMPING = 1e-10
"""μ as a share of the mean diagonal of JJᵀ: vectors with less than 1e-5 of the usual effect count
as having none."""

RANK_TOLERANCE = 1e-6
"""Singular values of J below this share of the largest are rounding."""

CHUNK = 4096
"""Tokens of one batched backward pass, over lanes and cotangents."""

FEW = 128
"""Constraints up to which J itself is computed."""

DENSE_LIMIT = 2**24
"""Most numbers a row may keep of J and JJᵀ where there are more constraints than that."""

REFRESH = 4
"""Steps for which a J that has been computed is kept, unless it stops to be useful."""

WIDEST = 128
"""Most features at one position whose same-position block of JJᵀ is measured."""

RIDGE = 1e-4
"""Added to a preconditioner's blocks, relative to their diagonal."""

N_DRAWS = 4
"""Random vectors that estimate the diagonal of JJᵀ."""

MAX_ITERATIONS = 60
"""Most steps of conjugate gradients."""

TANGENT = 0.02
"""Share of what moves features that may be left in a direction; the restoration takes it away."""

ROUNDS = 10
"""Most corrections of one restoration."""

ROUNDING = 5.0
"""Multiple of the tolerance at which a violation that stops falling is taken for rounding."""


@dataclass(frozen=True)
class FeatureMap:
    """Φ: perturbations [n q d_model] → [n s K], K features over all monitored sites, s columns.

    banks: the monitored sites in forward order; columns: their encoder columns [g d k] as unit
    vectors; slices: which of the g each row uses [n]; reference: residuals [n s d] before and after
    the edits; early [n s 1]: where the former are monitored; weight [n s K]: 1/‖h‖ after the edits,
    0 where a column is not monitored or a group has fewer features.
    """

    replay: Replay
    banks: tuple[FeatureBank, ...]
    columns: tuple[Tensor, ...]
    slices: tuple[Tensor, ...]
    reference: tuple[tuple[Tensor, Tensor], ...]
    early: tuple[Tensor, ...]
    weight: Tensor

    @classmethod
    def of(cls, problem: Problem) -> FeatureMap:
        """The map of everything a perturbation of this problem can move."""
        replay = replace(problem.replay, hold={})
        sites = problem.moved
        banks = tuple(problem.held[site] for site in sites)
        slices = tuple(bank.slices(replay.frame) for bank in banks)
        reference = _references(problem, replay)
        perturbed = perturbed_columns(replay)
        reached = perturbed.cumsum(1) > 0  # these columns and all later ones
        early, weights = [], []
        for bank, rows, (_, x) in zip(banks, slices, reference, strict=True):
            own = perturbed if bank.site in problem.sites else torch.zeros_like(perturbed)
            early.append((reached & ~own & _reads_held_only(replay, bank))[..., None])
            here = perturbed if bank.site == problem.sites[0] else reached
            valid = here[..., None] & bank.valid[rows][:, None]
            length = x.norm(dim=-1, keepdim=True).clamp_min(TINY)
            weights.append(torch.where(valid, 1 / length, 0.0))
        columns = tuple(
            bank.W_enc / bank.W_enc.norm(dim=1, keepdim=True).clamp_min(TINY) for bank in banks
        )
        return cls(replay, banks, columns, slices, reference, tuple(early), torch.cat(weights, 2))

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def monitored(self) -> Tensor:
        """[n s K] bool: entries that are constraints."""
        return self.weight > 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, q, d_model): the shape of a perturbation."""
        n, p = self.replay.columns.shape
        return n, p * len(self.replay.sites), self.replay.base.shape[-1]

    @property
    def unknowns(self) -> Tensor:
        """[n] coordinates of a perturbation: slots that exist, times d_model."""
        slots = (self.replay.columns >= 0).sum(1) * len(self.replay.sites)
        return slots * self.shape[2]

    def rows(self, rows: Tensor) -> FeatureMap:
        return replace(
            self,
            replay=self.replay.rows(rows),
            slices=tuple(own[rows] for own in self.slices),
            reference=tuple((x[rows], y[rows]) for x, y in self.reference),
            early=tuple(own[rows] for own in self.early),
            weight=self.weight[rows],
        )

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Φ(δ) [n s K], differentiable twice, and what is to be held [n s K]: the same after the
        edits everywhere."""
        states = suffix_states(self.replay, delta, [bank.site for bank in self.banks])
        monitored, held = [], []
        for index, ((x, y), (x_ref, y_ref)) in enumerate(zip(states, self.reference, strict=True)):
            late = y - y_ref
            monitored.append(self._along(index, torch.where(self.early[index], x - x_ref, late)))
            held.append(self._along(index, late.detach()))
        return torch.cat(monitored, 2) * self.weight, torch.cat(held, 2) * self.weight

    def _along(self, index: int, change: Tensor) -> Tensor:
        """[n s k] the components of a change [n s d] along the encoder columns of a site."""
        W = self.columns[index]
        return change @ W[0] if len(W) == 1 else torch.bmm(change, W[self.slices[index]])

    def at(self, delta: Tensor) -> Linearized:
        return Linearized(self, delta)


def suffix_states(
    replay: Replay, delta: Tensor, sites: Sequence[Site]
) -> list[tuple[Tensor, Tensor]]:
    """Residuals [n s d_model] of some sites before and after their edits, differentiable twice.

    The fused attention kernels have no derivative of their backward pass, from which products with
    J are made, so attention is computed from its formula here.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return list(replay.suffix(delta, sites).values())


def _reads_held_only(replay: Replay, bank: FeatureBank) -> bool:
    """Whether what the edits at a site do depends on nothing but the bank's pre-activations."""
    if bank.guarantee != "exact":
        return False
    for edit in (*replay.before, *replay.after):
        if bank.site not in edit.sites:
            continue
        if not isinstance(edit, FeatureEdit) or edit.gate is not None or edit.error_scale != 1.0:
            return False
        for row, other in zip(
            edit.bank.slices(replay.frame).tolist(), bank.slices(replay.frame).tolist(), strict=True
        ):
            if not set(edit.bank.ids[row]) <= set(bank.ids[other]):
                return False
    return True


class Linearized:
    """Φ and products with its Jacobian at one iterate of n lanes.

    delta [n q d]; value [n s K]; held [n]: the largest entry of what is to be held. Everything is
    made from one recorded forward pass; J·u is the derivative of Jᵀ·y, which is linear in y.
    """

    def __init__(self, features: FeatureMap, delta: Tensor):
        self.features, self.delta = features, delta.detach()
        self._leaf = delta.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            self._output, held = features(self._leaf)
        self.value = self._output.detach()
        self.held = held.abs().amax((1, 2))
        self._pulled: tuple[Tensor, Tensor] | None = None

    def pull(self, y: Tensor) -> Tensor:
        """Jᵀ·y [n q d] of cotangents [n s K]."""
        return _gradient(self._output, self._leaf, y)

    def pull_many(self, ys: Tensor) -> Tensor:
        """[c n q d] from [c n s K]: many cotangents, in chunks."""
        size = max(1, CHUNK // (ys.shape[1] * ys.shape[2]))
        return torch.cat(
            [_gradient(self._output, self._leaf, part, batched=True) for part in ys.split(size)]
        )

    def push(self, u: Tensor) -> Tensor:
        """J·u [n s K] of directions [n q d]."""
        if self._pulled is None:
            y = torch.zeros_like(self._output, requires_grad=True)
            (pulled,) = torch.autograd.grad(self._output, self._leaf, y, create_graph=True)
            self._pulled = y, pulled
        y, pulled = self._pulled
        return _gradient(pulled, y, u)


def _gradient(output: Tensor, leaf: Tensor, weight: Tensor, batched: bool = False) -> Tensor:
    (gradient,) = torch.autograd.grad(
        output, leaf, weight, retain_graph=True, is_grads_batched=batched
    )
    return gradient


def perturbed_columns(replay: Replay) -> Tensor:
    """[n s] bool: suffix columns that are perturbed."""
    steps = torch.arange(replay.base.shape[1], device=replay.columns.device)
    return (replay.columns[:, :, None] == steps).any(1)


@torch.no_grad()
def _references(problem: Problem, replay: Replay) -> tuple[tuple[Tensor, Tensor], ...]:
    """`suffix_states` of the monitored sites without a perturbation, by which Φ(0) = 0 exactly."""
    n, q, d = problem.shape
    parts = []
    for rows in torch.arange(n, device=replay.base.device).split(replay.subject.batch_size):
        zero = torch.zeros(len(rows), q, d, device=replay.base.device)
        parts.append(suffix_states(replay.rows(rows), zero, problem.moved))
    return tuple(
        (torch.cat([x for x, _ in own]), torch.cat([y for _, y in own]))
        for own in zip(*parts, strict=True)
    )


# ------------------------------------------------------------------------------ solving


class Solver(Protocol):
    """Corrections and tangent directions for n lanes; immutable, so a call returns the next one."""

    def rows(self, rows: Tensor) -> Solver: ...

    def put(self, rows: Tensor, own: Solver) -> Solver:
        """With what it knows of some rows replaced by what `own` knows of them."""
        ...

    def correction(self, here: Linearized, goal: Tensor, stale: Tensor) -> tuple[Tensor, Solver]:
        """`Jᵀ(JJᵀ + μI)⁻¹Φ` [n q d], up to a linear residual of `goal` [n] in every entry.

        stale [n] bool: lanes whose last correction helped little.
        """
        ...

    def tangent(
        self, features: FeatureMap, delta: Tensor, direction: Tensor
    ) -> tuple[Tensor, Solver]:
        """What of a direction [n q d] moves no feature at iterates `delta`, to first order."""
        ...


def solver_at(here: Linearized, dense: bool) -> Solver:
    """A solver that is ready at one iterate."""
    if dense:
        return Dense.of(here)
    return MatrixFree(Blocks.of(here), torch.zeros_like(here.value))


def dense_is_cheaper(features: FeatureMap) -> bool:
    """Few constraints; or nearly as many as unknowns, where conjugate gradients converge badly."""
    most = int(features.monitored.sum((1, 2)).max())
    unknowns = int(features.unknowns.min())
    fits = most * (unknowns + 2 * most) <= DENSE_LIMIT
    return most <= FEW or (most > unknowns // 2 and fits)


@dataclass(frozen=True)
class Dense:
    """J itself and a factor of JJᵀ + μI, taken at an earlier iterate: corrections still converge.

    J [n r N] float32 over the r entries `used` of a flat [s·K]; factor [n r r] float64, lower;
    age: tangent directions since all of J was last taken.
    """

    J: Tensor
    used: Tensor
    factor: Tensor
    age: int = 0

    @classmethod
    def of(cls, here: Linearized, used: Tensor | None = None) -> Dense:
        monitored = here.features.monitored.flatten(1)
        if used is None:
            used = monitored.any(0).nonzero().flatten()
        J = jacobian(here, used)
        G = (J.double() @ J.double().mT) + torch.diag_embed((~monitored[:, used]).double())
        G = G + torch.diag_embed(_damping(J).double()[:, None].expand(G.shape[:2]))
        return cls(J, used, torch.linalg.cholesky(G))

    def rows(self, rows: Tensor) -> Dense:
        return replace(self, J=self.J[rows], factor=self.factor[rows])

    def put(self, rows: Tensor, own: Solver) -> Dense:
        assert isinstance(own, Dense)
        J, factor = self.J.clone(), self.factor.clone()
        J[rows], factor[rows] = own.J, own.factor
        return replace(self, J=J, factor=factor)

    def correction(self, here: Linearized, goal: Tensor, stale: Tensor) -> tuple[Tensor, Dense]:
        now = self
        if stale.any():
            rows = stale.nonzero().flatten()
            if 2 * len(rows) > len(stale):
                fresh = Dense.of(here, self.used).rows(rows)
            else:
                fresh = Dense.of(here.features.rows(rows).at(here.delta[rows]), self.used)
            now = self.put(rows, fresh)
        step = now._across(here.value.flatten(1)[:, self.used])
        return step.view(here.delta.shape), now

    def tangent(
        self, features: FeatureMap, delta: Tensor, direction: Tensor
    ) -> tuple[Tensor, Dense]:
        now = self
        if self.age >= REFRESH:
            now = replace(Dense.of(features.at(delta), self.used), age=0)
        moved = (now.J @ direction.flatten(1)[..., None]).squeeze(-1)
        return direction - now._across(moved).view(delta.shape), replace(now, age=now.age + 1)

    def _across(self, b: Tensor) -> Tensor:
        """Jᵀ(JJᵀ + μI)⁻¹b [n N] of b [n r]."""
        y = torch.cholesky_solve(b.double()[..., None], self.factor).float()
        return (y.mT @ self.J).squeeze(1)


def jacobian(here: Linearized, used: Tensor) -> Tensor:
    """J [n r N] at the r entries `used` of a flat [s·K], row by row; N = q·d_model."""
    n, s, K = here.value.shape
    rows = []
    size = max(1, CHUNK // (n * s))
    for part in used.split(size):
        y = torch.zeros(len(part), s * K, device=part.device)
        y[torch.arange(len(part), device=part.device), part] = 1.0
        rows.append(here.pull_many(y.view(-1, 1, s, K).expand(-1, n, -1, -1)).flatten(2))
    return torch.cat(rows).transpose(0, 1).contiguous()


def _damping(J: Tensor) -> Tensor:
    """μ [n]."""
    n_rows = (J != 0).any(2).sum(1).clamp_min(1)
    return (DAMPING * J.square().sum((1, 2)) / n_rows).clamp_min(TINY)


@dataclass(frozen=True)
class MatrixFree:
    """Conjugate gradients on products with J and Jᵀ at the iterate itself.

    multiplier [n s K]: of the last tangent direction, where the next solve starts.
    """

    blocks: Blocks
    multiplier: Tensor

    def rows(self, rows: Tensor) -> MatrixFree:
        return MatrixFree(self.blocks.rows(rows), self.multiplier[rows])

    def put(self, rows: Tensor, own: Solver) -> MatrixFree:
        return self  # a restoration changes nothing here

    def correction(
        self, here: Linearized, goal: Tensor, stale: Tensor
    ) -> tuple[Tensor, MatrixFree]:
        y = conjugate_gradients(here, self.blocks, here.value, torch.zeros_like(here.value), goal)
        return here.pull(y), self

    def tangent(
        self, features: FeatureMap, delta: Tensor, direction: Tensor
    ) -> tuple[Tensor, MatrixFree]:
        here = features.at(delta)
        moved = here.push(direction)
        goal = TANGENT * moved.abs().amax((1, 2))
        y = conjugate_gradients(here, self.blocks, moved, self.multiplier, goal)
        return direction - here.pull(y), replace(self, multiplier=y)


def conjugate_gradients(
    here: Linearized, blocks: Blocks, b: Tensor, start: Tensor, goal: Tensor
) -> Tensor:
    """y [n s K] with `(JJᵀ + μI)y ≈ b`, until every entry of the residual is below goal [n].

    Each lane stops by itself and is then left as it is, so a batch changes nothing.
    """

    def product(y: Tensor) -> Tensor:
        return here.push(here.pull(y)) + blocks.damping[:, None, None] * y

    def dot(x: Tensor, z: Tensor) -> Tensor:
        return (x * z).sum((1, 2), keepdim=True)

    y = start
    r = b - product(y) if bool(start.any()) else b.clone()
    z = blocks.solve(r)
    p, rz = z, dot(r, z)
    for _ in range(MAX_ITERATIONS):
        going = (r.abs().amax((1, 2)) > goal)[:, None, None]
        if not going.any():
            break
        q = product(p)
        curvature = dot(p, q)
        going = going & (curvature > 0)
        length = torch.where(going, rz / curvature.clamp_min(TINY), 0.0)
        y, r = y + length * p, r - length * q
        z = blocks.solve(r)
        following = dot(r, z)
        p = torch.where(going, z + following / rz.clamp_min(TINY) * p, p)
        rz = torch.where(going, following, rz)
    return y


@dataclass(frozen=True)
class Blocks:
    """A preconditioner: blocks of JJᵀ of the features at one position, nothing between positions.

    factors: lower Cholesky factors [n s k k], one for each group of features; damping [n]: μ.

    At perturbed columns the blocks are measured. Cotangents of one feature at all positions at once
    with random signs come back as the wanted slot's part plus terms of random sign from other
    positions (probing), so K backward passes are enough. Elsewhere, and where there are too many
    features, the Gram matrix of the encoder columns at one site stands in, scaled to the measured
    diagonal of JJᵀ.
    """

    factors: tuple[Tensor, ...]
    damping: Tensor

    @classmethod
    def of(cls, here: Linearized) -> Blocks:
        features = here.features
        sizes = [W.shape[2] for W in features.columns]
        diagonal = _diagonal(here)
        grams = [
            _gram(W[rows], w, own)
            for W, rows, w, own in zip(
                features.columns, features.slices, features.weight.split(sizes, 2),
                diagonal.split(sizes, 2), strict=True,
            )
        ]  # fmt: skip
        if sum(sizes) <= WIDEST:
            whole = torch.zeros(*diagonal.shape, diagonal.shape[2], device=diagonal.device)
            for gram, own in zip(grams, _slices(sizes), strict=True):
                whole[:, :, own, own] = gram
            there = perturbed_columns(features.replay)[..., None, None]
            grams = [torch.where(there, _probed(here), whole)]
            sizes = [sum(sizes)]
        factors = []
        for gram, valid in zip(grams, features.monitored.split(sizes, 2), strict=True):
            on = valid.float()
            gram = gram * on[..., None] * on[..., None, :]
            size = torch.diagonal(gram, dim1=-2, dim2=-1)
            mean = size.sum(-1, keepdim=True) / on.sum(-1, keepdim=True).clamp_min(1)
            extra = torch.where(valid, RIDGE * mean.clamp_min(TINY), 1.0)
            factors.append(torch.linalg.cholesky(gram + torch.diag_embed(extra)))
        count = features.monitored.sum((1, 2)).clamp_min(1)
        damping = DAMPING * diagonal.sum((1, 2)) / count
        return cls(tuple(factors), damping)

    def rows(self, rows: Tensor) -> Blocks:
        return Blocks(tuple(factor[rows] for factor in self.factors), self.damping[rows])

    def solve(self, r: Tensor) -> Tensor:
        """[n s K] from [n s K]."""
        parts = r.split([factor.shape[-1] for factor in self.factors], 2)
        return torch.cat(
            [
                torch.cholesky_solve(part[..., None], factor).squeeze(-1)
                for part, factor in zip(parts, self.factors, strict=True)
            ],
            2,
        )


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _gram(W: Tensor, weight: Tensor, diagonal: Tensor) -> Tensor:
    """[n s k k] AᵀA of unit columns [n d k], scaled to the mean of a diagonal [n s k]."""
    on = (weight > 0).float()
    mean = diagonal.sum(2, keepdim=True) / on.sum(2, keepdim=True).clamp_min(1)
    return (W.mT @ W)[:, None] * mean[..., None]


def _diagonal(here: Linearized) -> Tensor:
    """The diagonal of JJᵀ [n s K], estimated: (Ju)² for random u has it for its mean."""
    total = torch.zeros_like(here.value)
    for draw in range(N_DRAWS):
        total += here.push(_signs(here.features, draw)).square()
    return total / N_DRAWS


def _signs(features: FeatureMap, seed: int) -> Tensor:
    """[n q d] of ±1 by site, position and coordinate, whatever else is in the batch."""
    replay = features.replay
    d = features.shape[2]
    m, p = len(replay.sites), replay.columns.shape[1]
    positions = replay.frame.positions.gather(1, replay.columns.clamp(min=0))
    table = _coin(seed, int(positions.max()) + 1, m, d).to(positions.device)
    return table[positions.clamp(min=0)].transpose(1, 2).reshape(-1, m * p, d)


def _coin(seed: int, *shape: int) -> Tensor:
    """±1; a longer first axis begins with what a shorter one is."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(0, 2, shape, generator=generator) - 1.0


def _probed(here: Linearized) -> Tensor:
    """[n s K K] blocks of JJᵀ at perturbed columns, from slots at the same place; 0 elsewhere."""
    replay, value = here.features.replay, here.value
    n, s, K = value.shape
    m, p, d = len(replay.sites), replay.columns.shape[1], here.delta.shape[2]
    positions = replay.frame.positions.clamp(min=0)
    sign = _coin(0, int(positions.max()) + 1).to(value.device)[positions]  # [n s]
    own = sign.gather(1, replay.columns.clamp(min=0))  # [n p]
    rows = []
    for part in torch.arange(K, device=value.device).split(max(1, CHUNK // (n * s))):
        y = torch.zeros(len(part), n, s, K, device=value.device)
        y[torch.arange(len(part)), :, :, part] = sign
        back = here.pull_many(y * here.features.monitored).view(len(part), n, m, p, d)
        rows.append(back * own[:, None, :, None])
    J = torch.cat(rows).permute(1, 3, 0, 2, 4).reshape(n, p, K, m * d)
    blocks = torch.zeros(n, s + 1, K, K, device=value.device)
    at = torch.where(replay.columns >= 0, replay.columns, s)
    blocks[torch.arange(n, device=at.device)[:, None], at] = J @ J.mT
    return blocks[:, :s]


# ------------------------------------------------------------------------------ on the curved set


def free_dimensions(features: FeatureMap) -> Tensor:
    """[n] dimensions that the constraints leave, at the reference: unknowns less the rank of J.

    The rank is computed where J is small or could have no free direction; elsewhere it is taken for
    the number of constraints, so that the dimension is at least what is said.
    """
    constraints, unknowns = features.monitored.sum((1, 2)), features.unknowns
    free = (unknowns - constraints).clamp_min(0)
    unsure = (constraints <= FEW) | (constraints >= unknowns)
    device = constraints.device
    size = max(1, 2 * DENSE_LIMIT // int(constraints.max() * unknowns.max()))
    size = min(size, features.replay.subject.batch_size)
    for rows in unsure.nonzero().flatten().split(size) if unsure.any() else ():
        part = features.rows(rows)
        here = part.at(torch.zeros(part.shape, device=device))
        used = part.monitored.flatten(1).any(0).nonzero().flatten()
        J = jacobian(here, used).double()
        G = J @ J.mT if J.shape[1] <= J.shape[2] else J.mT @ J
        squares = torch.linalg.eigvalsh(G)
        rank = (squares > RANK_TOLERANCE**2 * squares[:, -1:]).sum(1)
        free[rows] = unknowns[rows] - rank
    return free


def restore(
    features: FeatureMap, solver: Solver, delta: Tensor, radius: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Solver]:
    """Iterates [n q d] put back where Φ = 0, inside balls of radius [n]; which ones got there [n].

    Gauss-Newton, δ ← δ − Jᵀ(JJᵀ + μI)⁻¹Φ(δ), and scaled into the ball before every evaluation, so
    that what is accepted fulfils both. With J at the iterate the violation falls quadratically.
    """
    n, device = len(delta), delta.device
    out, kept = delta.clone(), torch.zeros(n, dtype=torch.bool, device=device)
    smallest = torch.full((n,), torch.inf, device=device)
    strikes = torch.zeros(n, dtype=torch.long, device=device)
    live = torch.ones(n, dtype=torch.bool, device=device)
    for round_ in range(ROUNDS + 1):
        out[live] = into_ball(out[live], radius[live])
        here = features.at(out)
        size = here.held
        strikes += ~(size <= 0.5 * smallest)
        good = (size <= tolerance) | ((strikes >= 2) & (size <= ROUNDING * tolerance))
        kept |= live & good
        live &= ~good & torch.isfinite(size) & (strikes < 3)
        if not live.any() or round_ == ROUNDS:
            break
        if 2 * int(live.sum()) <= n:
            rows = live.nonzero().flatten()
            # Go on with the few that are left.
            point, ok, own = restore(
                features.rows(rows), solver.rows(rows), out[rows], radius[rows], tolerance
            )
            out[rows], kept[rows] = point, ok
            return out, kept, solver.put(rows, own)
        # The next violation is about the square of this one, however well the linear map is solved.
        largest = here.value.abs().amax((1, 2))
        goal = torch.minimum(largest.square().clamp_min(tolerance / 3), 0.1 * largest)
        goal = torch.where(live, goal, torch.inf)
        step, solver = solver.correction(here, goal, live & (size > 0.2 * smallest))
        out = torch.where(live[:, None, None], out - step, out)
        smallest = torch.minimum(smallest, size)
    return out, kept, solver
