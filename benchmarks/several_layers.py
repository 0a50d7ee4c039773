"""A step of jacobian_null costs at most 15 unconstrained steps, with vectors at one of three held
layers or at all of them, and it recovers at least 98 % of what ten times the steps recover.

At 20 features x 48 tokens x 3 layers (2,880 constraints) on a randomly initialized Llama, steps of
the search are timed in turn, so that whatever slows the machine down slows them all: with vectors
at the lowest of the three layers, where only the Jacobian can hold the others, and at all three,
where feature_hold can, whose step may not cost more than the published probes'. Then, on the
shipped organism, jacobian_null is searched as it is and with ten times the steps: it has to recover
at least 98 % of what either does, and no feature may move by more than 1e-5, wherever a vector can
reach it, nor a norm exceed its budget by more than 1e-4. So for ioi prompts with vectors at all
layers and at the lowest, and for prompts that the organism is made to refuse, with vectors at the
last token alone and the features of ten tokens of the answer to hold behind it: 184 constraints on
384 numbers, the singular values of J over five decades.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Bound, Cell, Options, Result, progress, timings
from benchmarks.random_llama import Size as ReplaySize
from benchmarks.random_llama import random_batch
from benchmarks.search_quality import some
from holdfast.ascent import Climb, ascend
from holdfast.attacks.residual import pose
from holdfast.batching import Batching
from holdfast.constraints import CONSTRAINTS, ConstraintKind
from holdfast.controls import Case
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.executor import Runtime, load_lab
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.harder import BACK
from holdfast.planning import plan
from holdfast.problem import Problem
from holdfast.recovery import Recovery, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.statistics import wilson
from holdfast.study import parse
from holdfast.subject import Subject
from holdfast.testing import random_sae, tiny_tokenizer
from holdfast.trial import Trial
from holdfast.verify import Checks, verify

COST = 15.0
SHARE = 0.98
DRIFT = 1e-5
OVER = 1e-4
FREE = "unconstrained"
LOWEST = "blocks.0.hook_resid_post"
KINDS = ("feature_hold", "jacobian_null", "jacobian_probes")

SUBJECT = """
schema = 1
name = "layers"
seed = 0
[subject]
model = "organism"
[[subject.saes]]
site = "blocks.0.hook_resid_post"
source = { kind = "folder", path = "organism:saes/0" }
[[subject.saes]]
site = "blocks.1.hook_resid_post"
source = { kind = "folder", path = "organism:saes/1" }
[[subject.saes]]
site = "blocks.2.hook_resid_post"
source = { kind = "folder", path = "organism:saes/2" }
[data]
fit = 200
tune = 40
test = 40
[recovery]
constraint = { kind = "unconstrained" }
perturb = { positions = "last_prompt" }
stop = { clean_margin = 0.5 }
steps = 30
refine_steps = 15
doublings = 1
tolerance = 0.02
"""

IOI = """
budget = { relative = 0.5 }
[[audits]]
name = "ioi"
behavior = { kind = "ioi", templates = "all" }
discovery = { kind = "attribution", n_features = 8, group = "name" }
intervention = { kind = "clamp", mode = "set_where_active", value = [-2.0, -5.0, -10.0], positions = "all", include_bos = false }
"""  # noqa: E501

REFUSAL = """
budget = { relative = 1.0 }
[[audits]]
name = "refusal"
behavior = { kind = "refusal", direction = "comply" }
discovery = { kind = "attribution", n_features = 8 }
intervention = { kind = "clamp", mode = "multiply", value = [2.0, 4.0, 8.0], positions = "prompt" }
"""


@dataclass(frozen=True)
class Size:
    """The random subject; the constraints are features x tokens x 3."""

    n_layers: int = 6
    d_model: int = 512
    features: int = 20
    tokens: int = 48
    steps: int = 5
    repeats: int = 3
    prompts: int = 4
    answers: int = 20
    longer: int = 10


QUICK = Size(n_layers=5, d_model=64, features=3, tokens=8, steps=2, repeats=1, prompts=2, answers=2,
             longer=2)  # fmt: skip


def run(options: Options) -> Result:
    size = QUICK if options.quick else Size()
    rows, bounds = costs(size)
    ioi, refusal = options.limit or size.prompts, options.limit or size.answers
    found, held = recoveries(size, IOI, ioi, ("", LOWEST), (FREE, *KINDS))
    harder = recoveries(size, REFUSAL, refusal, ("",), (FREE, "jacobian_null"))
    if options.quick:  # small sizes have other ratios
        bounds = []
    return Result(
        columns=(
            "constraint", "vectors at", "step, ms", "over unconstrained", "recovered", "of",
            "smallest norm", "largest drift",
        ),
        rows=(*rows, *found, *harder[0]),
        bounds=(*bounds, *held, *harder[1]),
        settings={
            "layers": size.n_layers, "d_model": size.d_model, "steps_timed": size.steps,
            "constraints": size.features * size.tokens * 3, "repeats": size.repeats,
        },
    )  # fmt: skip


def costs(size: Size) -> tuple[list[tuple[Cell, ...]], list[Bound]]:
    """Rows and bounds of what a step costs."""
    rows: list[tuple[Cell, ...]] = []
    bounds = []
    for n_sites, where in ((1, "lowest of 3"), (3, "all 3")):
        problem = posed(size, n_sites)
        kinds = [name for name in (FREE, *KINDS) if n_sites == 3 or name != "feature_hold"]
        calls = {name: climbing(problem, CONSTRAINTS.parse({"kind": name}), size) for name in kinds}
        took = timings(calls, size.repeats)
        step = {name: took[name].median / size.steps for name in kinds}
        rows += [
            (name, where, 1e3 * step[name], step[name] / step[FREE], None, None, None, None)
            for name in kinds
        ]
        ratio = step["jacobian_null"] / step[FREE]
        what = f"a step of jacobian_null, vectors at {where}"
        bounds.append(Bound(what, ratio, COST, False, "plain steps"))
        if n_sites == 3:
            ratio = step["feature_hold"] / step["jacobian_probes"]
            bounds.append(Bound("feature_hold's step over the probes'", ratio, 1.0, False, "times"))
        progress.print(f"several_layers: steps timed, vectors at {where}")
    return rows, bounds


def posed(size: Size, n_sites: int) -> Problem:
    """One prompt, three clamped layers, vectors at all tokens from the first replayed one on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = size.tokens + 12
    drawn = ReplaySize(
        n_layers=size.n_layers, d_model=size.d_model, n_heads=8, d_mlp=3 * size.d_model,
        tokens=width, prompts=1,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=drawn.vocabulary, hidden_size=size.d_model, intermediate_size=drawn.d_mlp,
        num_hidden_layers=size.n_layers, num_attention_heads=drawn.n_heads,
        max_position_embeddings=2 * width, initializer_range=0.06, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    sites = (Site(2), Site(3), Site(4))
    saes = {site: random_sae(site, size.d_model, 4 * size.d_model, site.depth) for site in sites}
    tokenizer: Any = tiny_tokenizer()
    subject = Subject.of("random", model, tokenizer, saes, batching=Batching(8))
    batch = random_batch(drawn)
    ids = tuple(range(size.features))
    features = FeatureSet(
        entries=tuple(SiteFeatures(site=str(site), ids=ids) for site in sites), source="first"
    )
    banks = {site: FeatureBank.of(subject.sae(site), features) for site in sites}
    clamps = tuple(FeatureEdit(bank, "set_where_active", 1.5) for bank in banks.values())
    positions = torch.arange(12, width)[None]
    replay = Replay.record(
        subject, batch, sites[:n_sites], positions, before=clamps, watch=sites
    )  # fmt: skip
    reference = replay.residual().norm(dim=(1, 2))
    goal = torch.full((1,), torch.inf)
    return Problem(replay, batch, goal, banks, reference, 0.25 * reference)


def climbing(problem: Problem, kind: ConstraintKind, size: Size) -> Callable[[], object]:
    """Some steps of a search, and what has to be made once for it."""
    problem = kind.acting(problem)
    climb = Climb(
        torch.zeros(1, dtype=torch.long), torch.zeros(problem.shape), problem.goal,
        problem.radius, torch.full((1,), 0.1),
    )  # fmt: skip
    sets = kind.feasible(problem)
    return partial(ascend, problem, sets, climb, size.steps, kind.stepper)


def recoveries(
    size: Size, audit: str, limit: int, places: tuple[str, ...], kinds: tuple[str, ...]
) -> tuple[list[tuple[Cell, ...]], list[Bound]]:
    """Rows and bounds of what is recovered in an audit, and how exactly features are held.

    places: sites of the vectors, "" for all clamped ones.
    """
    planned = plan(parse(SUBJECT + audit))
    trial = next(trial for trial in planned.trials if trial.control.kind == "none")
    lab = load_lab(planned, [trial], Runtime(batch_size=64))
    case = some(trial.control.case(lab.setting(trial, trial.subject), lambda: None), limit)
    rows: list[tuple[Cell, ...]] = []
    bounds = []
    for place in places:
        sites = (place,) if place else ()
        where = f"{'lowest of' if sites else 'all'} 3, {trial.audit}"
        perturb = trial.recovery.perturb.model_copy(update={"sites": sites})
        problem = pose(trial.recovery.model_copy(update={"perturb": perturb}), case)
        for name in kinds:
            if sites and name == "feature_hold":
                continue
            found, checks, seconds = searched(problem, trial, case, name)
            back = found.margin > 0
            norm = (found.smallest_norm / problem.reference_norm).nan_to_num(torch.inf).median()
            rows.append((
                f"{name}, {seconds:.0f} s", where, None, None, int(back.sum()), len(problem),
                float(norm), float(checks.preactivation_drift.max()),
            ))  # fmt: skip
            progress.print(f"several_layers: {name}, vectors at {where}, {seconds:.0f} s")
            if name != "jacobian_null":
                continue
            either = back | (longer_margin(problem, trial, name, size.longer) > 0)
            share = float(back.sum() / either.sum()) if either.any() else 1.0
            interval = wilson(int((back & either).sum()), int(either.sum()))
            drift = torch.maximum(checks.preactivation_drift, checks.preactivation_drift_elsewhere)
            over = float((found.norm / problem.radius).max()) - 1
            bounds += [
                Bound(
                    f"recovered of {interval.n}, vectors at {where} "
                    f"[{interval.low:.2f}, {interval.high:.2f}]",
                    share,
                    SHARE,
                    True,
                ),
                Bound(f"largest drift, vectors at {where}", float(drift.max()), DRIFT, False),
                Bound(f"over the budget, vectors at {where}", over, OVER, False),
            ]
    return rows, bounds


def searched(
    problem: Problem, trial: Trial, case: Case, name: str
) -> tuple[Recovery, Checks, float]:
    """A whole search, what full passes say of it, and its seconds."""
    constraint = CONSTRAINTS.parse({"kind": name})
    spec = trial.recovery.model_copy(update={"constraint": constraint})
    start = time.perf_counter()
    found = recover(problem, spec, 0)
    seconds = time.perf_counter() - start
    positions = case.batch.prompt_length[:, None] - 1
    push = Perturbation(case.batch.ids, positions, problem.replay.parts(found.delta))
    scale = {site: case.features.median_active(site) for site in problem.held}
    checks = verify(case.subject, case.batch, case.edits, push, problem.held, scale, True)
    return found, checks, seconds


def longer_margin(problem: Problem, trial: Trial, name: str, longer: int) -> Tensor:
    """[n] the best margin of one climb with `longer` times the steps of the first attempt."""
    kind, rows = CONSTRAINTS.parse({"kind": name}), torch.arange(len(problem))
    rate = torch.full_like(problem.radius, trial.recovery.lr)
    goal = BACK * problem.goal
    climb = Climb(rows, torch.zeros(problem.shape), goal, problem.radius, rate)
    steps = longer * trial.recovery.steps
    acting = kind.acting(problem)
    return ascend(acting, kind.feasible(acting), climb, steps, kind.stepper).margin
