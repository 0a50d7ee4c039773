"""Rows at once: whatever is too large is halved and done again, and no number depends on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast import capacity
from holdfast.batch import Batch
from holdfast.batching import (
    MOST,
    WORK,
    Batching,
    Beginning,
    Sizes,
    Work,
    is_out_of_memory,
    kept_sizes,
)
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.constraints.jacobian_null import JacobianNull
from holdfast.discovery import with_scale
from holdfast.discovery.attribution import Attribution
from holdfast.edits import Capture, FeatureEdit, Perturbation
from holdfast.errors import OutOfMemoryError, SubjectError
from holdfast.executor import Runtime
from holdfast.features import FeatureSet
from holdfast.forecast import sizing
from holdfast.forecast.memory import FREE, Memory
from holdfast.forecast.sizing import beginning
from holdfast.planning import plan
from holdfast.recovery import Budget, RecoverySpec, recover
from holdfast.run import Watcher, run_study
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.store import BATCH_PLAN
from holdfast.study import parse
from holdfast.subject import Subject
from holdfast.testing import tiny_problem
from holdfast.verify import verify

SITE = Site(2)


def no_memory() -> Exception:
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_memory_here() -> Exception:
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")


def refusing(
    limit: int, seen: list[int], error: Callable[[], Exception] = no_memory
) -> Callable[[Tensor], Any]:
    """Work on rows [n] that has no memory for more than `limit`; notes the sizes it was given."""

    def work(rows: Tensor) -> list[int]:
        seen.append(len(rows))
        if len(rows) > limit:
            raise error()
        return rows.tolist()

    return work


@contextmanager
def crowded(subject: Subject, limit: int, block: int) -> Iterator[list[int]]:
    """A subject in which block number `block` has no memory for more than `limit` rows, so that a
    pass ends in its middle; the sizes that were refused."""
    refused: list[int] = []

    def check(module: Any, args: tuple[Any, ...]) -> None:
        if len(args[0]) > limit:
            refused.append(len(args[0]))
            raise no_memory()

    blocks = subject.family.blocks_of(subject.model)
    handle = blocks[block].register_forward_pre_hook(check)
    try:
        yield refused
    finally:
        handle.remove()


# ---------------------------------------------------------------------- the mechanism


@pytest.mark.parametrize("error", [no_memory, no_memory_here, MemoryError])
def test_what_does_not_fit_is_halved_and_the_rest_is_kept(
    error: Callable[[], Exception],
) -> None:
    batching, seen = Batching(8), list[int]()
    found = batching.over("steps", torch.arange(20), refusing(3, seen, error))
    assert [*chain(*found)] == list(range(20))
    assert seen == [8, 4, *[2] * 10]
    assert batching.sizes == replace(Sizes.every(8), steps=2)
    seen.clear()  # remembered for what follows
    batching.over("steps", torch.arange(5), refusing(3, seen, error))
    assert seen == [2, 2, 1]
    assert batching.plan()["work"]["steps"] == {
        "rows": 2, "begun_with": 8, "halvings": 2, "bytes_per_row": None
    }  # fmt: skip
    assert "8 rows" in batching.halvings()[0] and len(batching.halvings()) == 1


def test_half_of_a_small_piece_is_half_of_what_there_was() -> None:
    batching, seen = Batching(512), list[int]()
    batching.over("passes", torch.arange(10), refusing(5, seen))
    assert seen == [10, 5, 5] and batching.sizes.passes == 5


def test_a_piece_that_had_run_is_not_done_again() -> None:
    """Not only the results: each row is computed once, but for the piece that failed."""
    batching, done = Batching(4), list[int]()

    def work(rows: Tensor) -> None:
        if 9 in rows and len(rows) > 1:
            raise no_memory()
        done.extend(rows.tolist())

    batching.over("passes", torch.arange(12), work)
    assert done == list(range(12))


def test_a_single_row_that_does_not_fit_says_what_to_do() -> None:
    with pytest.raises(OutOfMemoryError, match=r"single row.*lane of a search.*2\.00 GiB.*dtype"):
        Batching().over("steps", torch.arange(4), refusing(0, []))


def test_other_errors_are_not_tried_again() -> None:
    seen: list[int] = []
    with pytest.raises(RuntimeError, match="shapes"):
        Batching().over(
            "steps", torch.arange(4), refusing(0, seen, lambda: RuntimeError("shapes differ"))
        )
    assert seen == [4]


def test_torch_itself_says_it_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(SubjectError("out of memory of another kind"))


def test_trials_side_by_side_halve_once() -> None:
    batching = Batching(64)

    def one(_: int) -> int:
        return len([*chain(*batching.over("steps", torch.arange(64), refusing(32, [])))])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(16))) == [64] * 16
    assert batching.sizes.steps == 32 and batching.plan()["work"]["steps"]["halvings"] == 1


def test_what_a_piece_held_is_let_go_of_before_it_is_done_again() -> None:
    """An error's traceback holds every tensor of the frames it came through."""
    import weakref

    held: list[weakref.ref[Tensor]] = []

    def work(rows: Tensor) -> None:
        assert all(ref() is None for ref in held)
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        if len(rows) > 1:
            raise no_memory()

    Batching(8).over("passes", torch.arange(8), work)
    assert len(held) == 3 + 8


def held_by(outer: Work, inner: Work, room: int) -> Callable[[Batching, Tensor], list[int]]:
    """Work on rows within which rows are split again: what both hold may be at most `room`."""

    def nested(batching: Batching, rows: Tensor) -> list[int]:
        def piece(own: Tensor) -> list[int]:
            def within(some: Tensor) -> list[int]:
                if len(own) + len(some) > room:
                    raise no_memory()
                return some.tolist()

            return [*chain(*batching.over(inner, own, within))]

        return [*chain(*batching.over(outer, rows, piece))]

    return nested


@pytest.mark.parametrize(("outer", "inner"), [("steps", "steps"), ("passes", "discovery")])
@pytest.mark.parametrize("room", [2, 9])
def test_a_piece_that_leaves_no_room_within_it_is_halved(
    outer: Work, inner: Work, room: int
) -> None:
    """Splitting again within a piece cannot help where the piece itself holds the memory; if nobody
    halved that, the run would end with rows that fit."""
    batching, work = Batching(16), held_by(outer, inner, room)
    assert work(batching, torch.arange(20)) == list(range(20))
    sizes = batching.sizes
    assert sizes.of(outer) + min(sizes.of(inner), sizes.of(outer)) <= room
    assert {name for name, own in batching.plan()["work"].items() if own["halvings"]} <= {
        outer, inner,
    }  # fmt: skip
    with pytest.raises(OutOfMemoryError, match="single row"):  # not even one beside one
        held_by(outer, inner, 1)(Batching(16), torch.arange(20))


# ---------------------------------------------------------------------- a subject


def under(subject: Subject, size: int) -> Subject:
    return replace(subject, batching=Batching(size))


SIZES = pytest.mark.parametrize(
    ("size", "limit"), [(1, 99), (3, 99), (512, 1), (512, 3)],
    ids=["1", "3", "auto, 1 fits", "auto, 3 fit"],
)  # fmt: skip


@SIZES
def test_passes_and_what_is_read_in_them(
    subject: Subject, batch: Batch, clamp: FeatureEdit, features: FeatureSet, size: int, limit: int
) -> None:
    """The pass ends behind the site that is read: what was noted there must not stay."""
    captures = [Capture(SITE) for _ in range(2)]
    expected = subject.outputs(batch, (clamp, captures[0]))
    measured = with_scale(subject, batch, features)
    other = under(subject, size)
    with crowded(other, limit, block=2) as refused:
        found = other.outputs(batch, (clamp, captures[1]))
        again = with_scale(other, batch, features)
    assert bool(refused) == (limit < min(size, len(batch)))
    torch.testing.assert_close(found, expected)
    assert [i for frame, _ in captures[1].seen for i in frame.ids] == list(batch.ids)
    everywhere = batch.prompt_length[:, None] - 1
    reads = [capture.at(batch.ids, everywhere) for capture in captures]
    torch.testing.assert_close(reads[0], reads[1])
    for one, two in zip(measured.entries, again.entries, strict=True):
        assert one.mean == pytest.approx(two.mean, rel=1e-5)
        assert one.median_active == pytest.approx(two.median_active, rel=1e-5)


@SIZES
def test_generation(
    subject: Subject, batch: Batch, clamp: FeatureEdit, size: int, limit: int
) -> None:
    expected = subject.generate(batch, (clamp,), 5)
    other = under(subject, size)
    with crowded(other, limit, block=1):
        assert torch.equal(other.generate(batch, (clamp,), 5), expected)


@SIZES
def test_attribution(subject: Subject, batch: Batch, size: int, limit: int) -> None:
    sae = subject.sae(SITE).full()
    expected = Attribution().scores(subject, batch, sae)
    other = under(subject, size)
    with crowded(other, limit, block=2):
        torch.testing.assert_close(Attribution().scores(other, batch, sae), expected)


@SIZES
@pytest.mark.parametrize("constraint", [EncoderNull(), JacobianNull()])
def test_a_search_and_its_verification(
    subject: Subject, batch: Batch, bank: FeatureBank, constraint: Any, size: int, limit: int
) -> None:
    spec = RecoverySpec(constraint=constraint, steps=8, refine_steps=4, doublings=1,
                        tolerance=0.1, budget=Budget(relative=1.0))  # fmt: skip

    def searched(own: Subject, limit: int) -> tuple[Any, Any]:
        problem = tiny_problem(own, batch, bank, goal=2.0, budget=1.0)
        with crowded(own, limit, block=2):
            found = recover(problem, spec, seed=0)
            push = Perturbation(batch.ids, batch.prompt_length[:, None] - 1, {SITE: found.delta})
            checks = verify(own, batch, (), push, {SITE: bank}, {SITE: {"*": 1.0}}, True)
        return found, checks

    (one, first), (two, second) = searched(subject, 99), searched(under(subject, size), limit)
    assert one.outcomes == two.outcomes
    torch.testing.assert_close(one.delta, two.delta, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        one.smallest_norm, two.smallest_norm, rtol=0.02, atol=0, equal_nan=True
    )
    for a, b in zip(one.trace, two.trace, strict=True):  # noted once, however often it was tried
        assert (a["n_searching"], a["n_reached"]) == (b["n_searching"], b["n_reached"])
        assert a["margin_mean"] == pytest.approx(b["margin_mean"], rel=1e-3, abs=1e-4)
        # A record's hash tells 0 from 0.0.
        assert all(isinstance(b[name], float) for name in ("margin_mean", "violation_max"))
    for field in fields(first):
        if field.name not in ("preactivation_drift", "rounding_floor"):
            a, b = getattr(first, field.name), getattr(second, field.name)
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, equal_nan=True)


# ---------------------------------------------------------------------- what a run begins with

HELD = Memory(weights=1e9, saes=0.0, whole=2e9, code=5e8, replay=1e9, row=1e8,
              answer=3e8, lane=2e8)  # fmt: skip


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def say(n: float) -> None:
        monkeypatch.setattr(sizing, "free_bytes", lambda device: n)

    return say


def test_sizes_are_what_is_free_by_what_a_row_takes(free: Callable[[float], None]) -> None:
    free(10e9 / FREE)
    first = beginning([HELD], Runtime(), 1)
    assert first.sizes == Sizes(passes=90, generation=33, steps=45, discovery=16)
    assert "11.1 GB" in first.why and first.bytes_per_row == HELD.per_row
    free(1e15)
    assert beginning([HELD], Runtime(), 1).sizes == MOST
    free(1.0)  # not even one is said to fit: it is tried
    assert beginning([HELD], Runtime(), 1).sizes == Sizes.every(1)
    assert beginning([], Runtime(), 1).sizes == MOST


def test_the_trial_that_takes_the_most_decides_and_workers_share(
    free: Callable[[float], None],
) -> None:
    free(10e9 / FREE)
    heavy = replace(HELD, row=1e9)
    assert beginning([HELD, heavy], Runtime(), 1).sizes.passes == 9
    # Four times what one takes, and weights thrice more.
    free((4 * 10e9 + 3 * HELD.weights) / FREE)
    assert beginning([HELD], Runtime(), 4).sizes == Sizes(90, 33, 45, 16)


def test_a_number_is_taken_as_it_is(free: Callable[[float], None]) -> None:
    free(1.0)
    kept = Batching(2).plan() | {"device": sizing.named("cpu")}
    first = beginning([HELD], Runtime(batch_size=40), 1, kept)
    assert first.sizes == Sizes.every(40) and first.asked == 40 and first.why == "asked for"


def test_what_is_kept_is_followed_on_the_same_device(free: Callable[[float], None]) -> None:
    free(10e9 / FREE)
    batching = Batching()
    batching.begin(beginning([HELD], Runtime(), 1))
    batching.over("steps", torch.arange(45), refusing(11, []))
    kept = json.loads(json.dumps(batching.plan()))
    assert kept_sizes(kept) == replace(batching.sizes, steps=11)
    again = beginning([HELD], Runtime(), 1, kept)
    assert again.sizes == batching.sizes and "earlier trials" in again.why and not again.note

    elsewhere = beginning([HELD], Runtime(), 1, kept | {"device": "1 x H100, 85 GB"})
    assert elsewhere.sizes.steps == 45 and "1 x H100" in elsewhere.note
    for broken in ({}, {"work": 3}, kept | {"work": {}}):
        assert beginning([HELD], Runtime(), 1, broken).sizes.steps == 45
        assert "cannot be read" in beginning([HELD], Runtime(), 1, broken).note


def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sizing.free_bytes("cpu")
    assert 0 < whole <= capacity.machine_bytes()
    monkeypatch.setattr(capacity, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert sizing.free_bytes("cpu") > 1e8
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 2500000\ninactive_file 400000\n")
    assert sizing.free_bytes("cpu") == 2_400_000 and sizing.named("cpu") == "cpu, 5 MB"


# ---------------------------------------------------------------------- a run

STUDY = """
schema = 1
name = "one"
seed = 0
[subject]
model = "organism-second-route"
[[subject.saes]]
site = 'blocks.1.hook_resid_post'
source = { kind = 'folder', path = 'organism:saes/1' }
[data]
fit = 8
tune = 1
test = 12
[recovery]
constraint = { kind = 'encoder_null' }
budget = { relative = 0.5 }
stop = { clean_margin = 0.3 }
steps = 4
refine_steps = 2
doublings = 1
tolerance = 0.3
[[audits]]
name = 'only'
behavior = { kind = 'ioi', templates = 'all' }
discovery = { kind = 'given', file = 'organism-second-route:features.json' }
intervention = { kind = 'clamp', mode = 'set_where_active', value = -5.0 }
"""


def test_a_run_that_met_an_error_goes_on_and_a_resumed_one_does_not_meet_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast import ascent

    real, refused = ascent._ascend, list[int]()

    def crowded(problem: Any, feasible: Any, climb: Any, *rest: Any) -> Any:
        if len(climb) > 3:
            refused.append(len(climb))
            raise no_memory()
        return real(problem, feasible, climb, *rest)

    plain = run_study(plan(parse(STUDY)), tmp_path / "plain", Runtime(workers=1))
    monkeypatch.setattr(ascent, "_ascend", crowded)
    said: list[str] = []
    watcher = Watcher(sized=said.append)
    runtime = Runtime(workers=1)
    report = run_study(plan(parse(STUDY)), tmp_path / "run", runtime, watcher=watcher)
    assert refused and len(said) == 1 and "nothing was lost" in said[0]
    (one,), (two,) = plain.summary["trials"], report.summary["trials"]
    assert one["id"] == two["id"] and one["n_recovered"] == two["n_recovered"] > 0

    store = tmp_path / "run"
    (record,) = (json.loads(f.read_text()) for f in store.glob("trials/*/record.json"))
    found = record["run"]["batch_plan"]
    kept = json.loads((store / BATCH_PLAN).read_text())
    assert found["stack"] == [record["id"]] and [found.pop("stack")] == kept["stacks"]
    assert found.items() <= kept.items()
    assert found["batch_size"] == "auto" and found["free_bytes"] > 0 and found["device"]
    steps = found["work"]["steps"]
    assert 1 <= steps["rows"] <= 3 and steps["begun_with"] == 512 and steps["halvings"] >= 1
    assert steps["bytes_per_row"] > 0
    assert record["run"]["forecast"]["rows_at_once"]["steps"] == 512

    refused.clear()  # another point of the same study, in the same folder
    more = parse(STUDY + "[grid]\n'recovery.steps' = [4, 5]\n")
    again = run_study(plan(more), store, runtime, watcher=watcher)
    assert (again.n_reused, again.n_run) == (1, 1) and not refused and len(said) == 1
    records = [json.loads(f.read_text()) for f in store.glob("trials/*/record.json")]
    (new,) = (r for r in records if r["id"] != record["id"])
    assert new["run"]["batch_plan"]["work"]["steps"]["begun_with"] == steps["rows"]
    assert "earlier trials" in new["run"]["batch_plan"]["why"]


def test_what_cannot_be_split_says_what_to_do_and_keeps_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise no_memory()

    monkeypatch.setattr("holdfast.attacks.residual.pose_together", full)
    with pytest.raises(OutOfMemoryError, match=r"2\.00 GiB.*same command.*--limit"):
        run_study(plan(parse(STUDY)), tmp_path / "run", Runtime(workers=1))
    assert (tmp_path / "run" / BATCH_PLAN).is_file()
    monkeypatch.undo()
    assert run_study(plan(parse(STUDY)), tmp_path / "run", Runtime(workers=1)).n_run == 1


LITTLE = """
import resource, torch
from holdfast.testing import tiny_model, tiny_tokenizer, random_sae, tiny_batch
from holdfast.sites import Site
from holdfast.subject import Subject
torch.set_num_threads(1)
subject = Subject.of("tiny", tiny_model(d_model=512), tiny_tokenizer(), {})
batch = tiny_batch(subject, 1000)
few = subject.outputs(batch.rows(range(50)))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, -1))
subject.batching.__init__(1000)
out = subject.outputs(batch)
assert torch.allclose(out[:50], few, atol=1e-4), (out[:50] - few).abs().max()
print(len(out), *subject.batching.halvings())
"""


def test_a_machine_that_has_no_more(tmp_path: Path) -> None:
    """The real allocator, in a process that may not grow by more than 60 MB."""
    done = subprocess.run([sys.executable, "-c", LITTLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("1000 out of memory with 1000 rows at once (passes)")


def test_every_kind_of_work_is_said_and_has_a_size() -> None:
    assert {field.name for field in fields(Sizes)} == set(WORK) == set(HELD.per_row)
    assert Beginning().sizes == MOST
