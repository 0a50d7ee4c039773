"""What is made of residuals as passes go: the same as of all of them at once, and no more held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from holdfast.batch import Batch, Example, Frame
from holdfast.batching import Batching, Sizes
from holdfast.bounded import Components
from holdfast.controls.random_features import firing_rates
from holdfast.direction import difference_in_means
from holdfast.discovery.attribution import Attribution
from holdfast.discovery.factorization import largest
from holdfast.edits import Capture, CaptureAt
from holdfast.errors import PositionError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.positions import selected
from holdfast.reconstruction import explained
from holdfast.running import Moments, Running, by_row, joined
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import WORDS
from tests.unit.test_forecast import Live

SITE = Site(2)
FEATURES = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=(1, 5, 9)),), source="test")


def many(subject: Subject, n: int) -> Batch:
    """n prompts, ragged."""
    return subject.batch(
        [
            Example(f"p{i}", " ".join(WORDS[(i + j) % 40] for j in range(50 + i % 10)), "w1",
                    ("w2",), ("w3",), f"p{i}")
            for i in range(n)
        ]
    )  # fmt: skip


def by_pieces(subject: Subject, rows: int) -> Subject:
    return replace(subject, batching=Batching(Sizes(rows, rows, rows, rows)))


def whole(subject: Subject) -> SAE:
    return subject.sae(SITE).full()


def all_tokens(subject: Subject, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals [t d] of all tokens but BOS, their rows [t], and codes [t n_features]: of a
    capture of everything."""
    read = Capture(SITE)
    subject.outputs(batch, (read,))
    ((frame, x),) = read.seen
    mask = selected("all", False, frame)
    return x[mask], mask.nonzero()[:, 0], whole(subject).encode(x[mask])


Made = Callable[[Subject, Batch], Tensor]


def rates(subject: Subject, batch: Batch) -> Tensor:
    return firing_rates(subject, batch, FEATURES)[str(SITE), "*"]


def share(subject: Subject, batch: Batch) -> Tensor:
    return torch.tensor(explained(subject, batch, (SITE,))[str(SITE)])


def spread(subject: Subject, batch: Batch) -> Tensor:
    found = Components.of(subject, batch, (SITE,), 5)
    return found.basis[SITE] @ found.basis[SITE].T


def firing(subject: Subject, batch: Batch) -> Tensor:
    return Attribution().firing_rate(subject, batch, whole(subject)).double()


def tops(subject: Subject, batch: Batch) -> Tensor:
    return largest(subject, batch, FEATURES)


def means(subject: Subject, batch: Batch) -> Tensor:
    n = len(batch) // 2
    first, second = (batch.rows(torch.arange(*ends)) for ends in ((0, n), (n, 2 * n)))
    return difference_in_means(subject, first, second, (SITE,))[SITE][0]


def expected(made: Made, subject: Subject, batch: Batch) -> Tensor:
    """The same of all residuals together."""
    x, rows, z = all_tokens(subject, batch)
    fired = z > 0
    centered = x.double() - x.double().mean(0)
    if made is rates:
        return fired.double().mean(0)
    if made is share:
        error = (x - whole(subject).decode(z, x)).double().square().sum()
        return 1 - error / centered.square().sum()
    if made is spread:
        directions = torch.linalg.svd(centered, full_matrices=False).Vh[:5]
        return directions.T @ directions
    if made is firing:
        return (
            torch.stack([fired[rows == row].any(0) for row in range(len(batch))]).double().mean(0)
        )
    if made is tops:
        own = z[:, [1, 5, 9]]
        return torch.stack([own[rows == row].amax(0) for row in range(len(batch))])
    ends = torch.stack([x[rows == row][-1] for row in range(len(batch))]).double()
    n = len(batch) // 2
    return ends[:n].mean(0) - ends[n:].mean(0)


EVERY = [rates, share, spread, firing, tops, means]


@pytest.mark.parametrize("made", EVERY)
@pytest.mark.parametrize("rows", [100, 3])
def test_pieces_say_what_all_residuals_say(subject: Subject, made: Made, rows: int) -> None:
    batch = many(subject, 8)
    found = made(by_pieces(subject, rows), batch)
    reference = expected(made, by_pieces(subject, 100), batch)
    torch.testing.assert_close(found, reference.to(found.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("made", EVERY)
def test_what_is_held_does_not_grow_with_the_rows(subject: Subject, made: Made) -> None:
    """But by what is kept of every prompt, which is small."""
    own, peaks = by_pieces(subject, 4), []
    sae = whole(subject)
    for n in (8, 40):
        batch = many(own, n)
        known = [*own.model.parameters(), *own.model.buffers(), *vars(sae).values()]
        with Live(*known, *vars(batch).values()) as live:
            made(own, batch)
        peaks.append(live.peak)
    all_tokens_of_all = 40 * 59 * 32 * 4
    assert peaks[1] - peaks[0] < 0.25 * all_tokens_of_all


def test_a_piece_that_is_done_again_counts_once(subject: Subject) -> None:
    batch, failed = many(subject, 8), []

    def counted(before: int, frame: Frame, x: Tensor) -> int:
        return before + len(x)

    def names(frame: Frame, x: Tensor) -> Tensor:
        if len(x) > 2:
            failed.append(len(x))
            raise MemoryError
        return torch.tensor([int(name[1:]) for name in frame.ids])

    count, read = Running(SITE, 0, counted), by_row(SITE, names)
    by_pieces(subject, 8).outputs(batch, (count, read))
    assert failed == [8, 4]
    assert count.state == 8
    assert joined(read, "cpu").tolist() == list(range(8))


def test_moments_of_parts_are_those_of_the_whole() -> None:
    """Also far from zero, where a difference of sums would have no digit left."""
    x = torch.randn(101, 7, dtype=torch.float64) + 1e9
    centered = x - x.mean(0)
    for full, told in ((False, centered.square().sum()), (True, centered.T @ centered)):
        made = Moments.none(full)
        for part in x.split([1, 0, 40, 60]):
            made = made.with_more(part)
        assert made.n == 101
        torch.testing.assert_close(made.spread, told, rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(made.mean, x.mean(0))


def test_positions_that_are_read_are_those_of_a_whole_capture(subject: Subject) -> None:
    batch = many(subject, 8)
    positions = torch.stack([batch.prompt_length - 1, batch.prompt_length // 2], 1)
    positions[3, 1] = -1
    read, everything = CaptureAt(SITE, batch.ids, positions), Capture(SITE)
    by_pieces(subject, 3).outputs(batch, (read, everything))
    ends = torch.cat([x[:, -1] for _, x in everything.seen])
    assert torch.equal(read.read[:, 0], ends)
    assert torch.equal(read.read, everything.at(batch.ids, positions))
    assert bool((read.read[3, 1] == 0).all()) and bool((read.read[2, 1] != 0).any())
    kept = sum(t.nbytes for seen in read.seen for t in seen)
    assert kept < 8 * (2 * 32 * 4 + 100), "no other token's"
    beyond = CaptureAt(SITE, batch.ids, positions + 50)
    subject.outputs(batch, (beyond,))
    with pytest.raises(PositionError, match="nothing was read"):
        _ = beyond.read
