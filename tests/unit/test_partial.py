"""Only what is needed is computed: blocks above the site, features that are clamped, new tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.attacks.residual import pose
from holdfast.batch import Batch, Example
from holdfast.batching import Batching
from holdfast.constraints import CONSTRAINTS
from holdfast.controls import Case
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.executor import Runtime, load_lab
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.planning import plan
from holdfast.readouts.probes import Probes
from holdfast.recovery import Budget, RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.saes.layout import Layout
from holdfast.saes.sae import Weights
from holdfast.sites import Site
from holdfast.study import parse
from holdfast.subject import Subject
from holdfast.testing import WORDS, random_sae, tiny_batch, tiny_model, tiny_subject, tiny_tokenizer
from holdfast.trial import run_trial
from tests.unit.test_forecast import Live

SITE, LATER = Site(1), Site(2)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject(sites=(SITE, LATER))


def features_of(*sites: Site) -> FeatureSet:
    entries = tuple(SiteFeatures(site=str(site), ids=(1, 5, 9)) for site in sites)
    return FeatureSet(entries=entries, source="test")


def clamp_at(subject: Subject, site: Site, where: Any = "all") -> FeatureEdit:
    bank = FeatureBank.of(subject.sae(site), features_of(site))
    return FeatureEdit(bank, "set", 3.0, where=where)


# --- Generation -----------------------------------------------------------------------------------


@contextmanager
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """[rows, tokens] of every residual that a bank encodes."""
    shapes: list[tuple[int, ...]] = []
    encode = FeatureBank.activations

    def noting(self: FeatureBank, x: Tensor, frame: Any) -> Tensor:
        shapes.append(tuple(x.shape[:2]))
        return encode(self, x, frame)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureBank, "activations", noting)
        yield shapes


@pytest.mark.parametrize(
    ("where", "later"), [("all", True), ("generated", True), ("prompt", False),
                         ("last_prompt", False)],
)  # fmt: skip
def test_generation_encodes_each_token_once_and_those_it_leaves_alone_never(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, where: str, later: bool
) -> None:
    batch = tiny_batch(subject, 6)
    n, width = batch.tokens.shape
    subject = replace(subject, tokenizer=Endless(subject.tokenizer))  # type: ignore[arg-type]
    with encoded(monkeypatch) as shapes:
        made = subject.generate(batch, (clamp_at(subject, SITE, where),), 5)
    assert made.shape[1] == 5
    first = [] if where == "generated" else [(n, width)]
    # The last token is read from the pass over the one before it.
    assert shapes == first + [(n, 1)] * 4 * later


class Endless:
    """A tokenizer without an end, so that every row is as long."""

    eos_token_id = None

    def __init__(self, own: Any):
        self.pad_token_id = own.pad_token_id


def test_generation_hooks_the_edited_blocks_and_no_other(subject: Subject) -> None:
    batch = tiny_batch(subject, 3)
    blocks = subject.model.model.layers
    seen = []

    def look(module: Any, args: Any) -> None:
        seen.append([(len(b._forward_hooks), len(b._forward_pre_hooks)) for b in blocks])

    with subject.model.lm_head.register_forward_pre_hook(look):
        positions = batch.positions[:, -1:]
        push = Perturbation(batch.ids, positions, {LATER: torch.randn(3, 1, 32)})
        subject.generate(batch, (clamp_at(subject, LATER), push), 3)
        subject.generate(batch, (), 3)
    hooked, free = [(0, 0), (1, 0), (0, 0)], [(0, 0)] * 3
    assert seen[0] == hooked and seen[-1] == free
    assert all(now in (hooked, free) for now in seen)
    assert [b._forward_hooks for b in blocks] == [{}, {}, {}], "and they are gone afterwards"


# --- Search ---------------------------------------------------------------------------------------


@contextmanager
def no_whole_pass(subject: Subject) -> Iterator[None]:
    def refuse(module: Any, args: Any) -> None:
        raise AssertionError("the whole model was run")

    with subject.model.register_forward_pre_hook(refuse):
        yield


KINDS = (
    "unconstrained", "gradient_projection", "encoder_null", "one_sided", "feature_floor",
    "feature_hold", "decoder_null", "undo_null", "random_subspace", "active_null",
    "jacobian_null", "jacobian_probes",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_under_any_constraint_goes_through_replay(subject: Subject, kind: str) -> None:
    """From the first step to the smallest norm: not one pass of the whole model."""
    batch = tiny_batch(subject, 4)
    case = case_of(subject, batch, LATER)
    constraint = CONSTRAINTS.parse({"kind": kind})
    spec = RecoverySpec(
        constraint=constraint, steps=4, refine_steps=2, doublings=1, budget=Budget(relative=0.5)
    )
    problem = pose(spec, case)
    assert problem.replay.extent == "suffix"
    with no_whole_pass(subject):
        recover(problem, spec, seed=0)


@pytest.mark.parametrize("kind", ["feature_hold", "gradient_projection", "encoder_null"])
@pytest.mark.parametrize("read", ["token", "forced answer", "probe"])
def test_whatever_is_read_is_read_from_replay(subject: Subject, kind: str, read: str) -> None:
    """A token (ioi, mcq), an answer that is forced (refusal), a probe on pooled residuals (tpp)."""
    batch = tiny_batch(subject, 4)
    if read == "forced answer":
        batch = batch.forcing([[5, 6], [7], [8, 9], [10, 11]])
    if read == "probe":
        probes = Probes(LATER, ("a", "b"), torch.randn(2, 32), torch.zeros(2))
        batch = subject.batch(
            [Example(f"p{i}", " ".join(WORDS[i : i + 5 + i]), "a", ("none",), ("b",), f"p{i}")
             for i in range(4)], probes,
        )  # fmt: skip
    case = case_of(subject, batch, LATER)
    spec = RecoverySpec(
        constraint=CONSTRAINTS.parse({"kind": kind}), steps=4, refine_steps=2, doublings=1,
        budget=Budget(relative=0.5),
    )  # fmt: skip
    problem = pose(spec, case)
    with no_whole_pass(subject):
        recover(problem, spec, seed=0)


def case_of(subject: Subject, batch: Batch, site: Site) -> Case:
    return Case(
        subject=subject, features=features_of(site), edits=(clamp_at(subject, site),), batch=batch,
        clean_margin=torch.ones(len(batch)), rows=torch.arange(len(batch)), dropped={},
    )  # fmt: skip


def test_no_weight_has_a_gradient() -> None:
    model: Any = tiny_model().train().requires_grad_(True)  # type: ignore[attr-defined]
    subject: Any = Subject.of("tiny", model, tiny_tokenizer(), {SITE: random_sae(SITE)})  # type: ignore[arg-type]
    assert not model.training
    batch = tiny_batch(subject, 4)
    replay = Replay.record(subject, batch, SITE, batch.positions[:, -1:])
    delta = torch.zeros(4, 1, 32, requires_grad=True)
    replay.logits(delta).sum().backward()
    assert delta.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


# --- Memory ---------------------------------------------------------------------------------------


def test_recording_holds_no_more_than_passes_over_its_pieces_and_what_it_keeps() -> None:
    """Twice the rows: twice of what is kept, and not of what is held on the way."""
    subject = replace(tiny_subject(), batching=Batching(4))
    site = Site(2)
    on_the_way = []
    for n in (16, 32):
        examples = [
            Example(f"p{i}", " ".join(WORDS[(i + j) % 40] for j in range(60 - i % 3)), "w1",
                    ("w2",), ("w3",), f"p{i}") for i in range(n)
        ]  # fmt: skip
        batch = subject.batch(examples)
        positions = batch.positions[:, -1:]
        known = [t for t in vars(batch).values() if isinstance(t, Tensor)]
        with Live(known, positions, list(subject.model.parameters())) as live:
            replay = Replay.record(subject, batch, site, positions)
        kept = sum(t.nbytes for pair in replay.prefix if pair for t in pair)
        assert len(replay) == n and kept > 0
        on_the_way.append(live.peak - kept)
    assert on_the_way[1] < 1.4 * on_the_way[0]


# --- What a record says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "said"),
    [("", "suffix"),
     (", condition = { share = 0.02 }",
      "whole sequence: a clamp's condition on the whole prompt")],
    ids=["each token by itself", "on the whole prompt"],
)  # fmt: skip
def test_a_record_says_how_much_of_the_sequence_was_replayed(
    monkeypatch: pytest.MonkeyPatch, condition: str, said: str
) -> None:
    """The same search, whole; verified by full passes from the embedding. And what the clamp, its
    statistics and the constraint need of the SAE's file is read once."""
    reads: list[Any] = []
    read = Layout.read

    def noting(self: Layout, ids: Any = None) -> Weights:
        reads.append(ids)
        return read(self, ids)

    monkeypatch.setattr(Layout, "read", noting)
    study = parse(
        'schema = 1\nname = "one"\nseed = 0\n'
        '[subject]\nmodel = "organism-second-route"\n'
        "[[subject.saes]]\nsite = 'blocks.1.hook_resid_post'\n"
        "source = { kind = 'folder', path = 'organism:saes/1' }\n"
        "[data]\nfit = 20\ntune = 1\ntest = 12\n"
        "[recovery]\nconstraint = { kind = 'encoder_null' }\nbudget = { relative = 0.5 }\n"
        "stop = { clean_margin = 0.3 }\nsteps = 30\nrefine_steps = 5\n"
        "[[audits]]\nname = 'only'\nbehavior = { kind = 'ioi', templates = 'all' }\n"
        "discovery = { kind = 'given', file = 'organism-second-route:features.json' }\n"
        "intervention = { kind = 'clamp', mode = 'set_where_active', value = -5.0"
        f"{condition} }}\n"
    )
    planned = plan(study)
    trial = planned.trials[0]
    result = run_trial(trial, load_lab(planned, [trial], Runtime(workers=1))).result
    assert result["checks"]["replay"] == said
    assert result["outcome"]["counts"]["recovered"] > 0
    assert len(reads) == 1 and reads[0] is not None, "one slice, read once"
    assert result["checks"]["replay_error"] < 1e-3, "what was replayed is what a full pass gives"
