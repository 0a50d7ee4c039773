"""Sparse non-negative codes against scikit-learn, SciPy and every choice of rows."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.linear_model import orthogonal_mp
from torch import Tensor

from holdfast.pursuit import pursue


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator)


def left(targets: Tensor, fit: Tensor) -> Tensor:
    return (targets.double() - fit).norm(dim=1)


def test_where_no_sign_matters_it_is_scikit_learns() -> None:
    """Non-negative mixtures of nearly orthogonal rows: the plain pursuit takes no row backwards."""
    dictionary = rows(40, 400)
    dictionary = dictionary / dictionary.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(1)
    weights = torch.zeros(6, 40)
    for row in weights:
        row[torch.randperm(40, generator=generator)[:4]] = 1 + torch.rand(4, generator=generator)
    targets = weights @ dictionary
    for k in (1, 2, 4):
        both = dictionary.T.double().numpy(), targets.T.double().numpy()
        theirs = orthogonal_mp(*both, n_nonzero_coefs=k).T
        assert (theirs >= 0).all(), "or the comparison says nothing"
        code = pursue(targets, dictionary, k)
        ours = torch.zeros(6, 40).double()
        for row, (atoms, own) in enumerate(zip(code.atoms, code.weights, strict=True)):
            ours[row, atoms[atoms >= 0]] = own[atoms >= 0]
        torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-5, rtol=1e-5)


def test_with_rows_enough_it_is_non_negative_least_squares() -> None:
    dictionary, targets = rows(12, 5), rows(8, 5, seed=1)
    code = pursue(targets, dictionary, 12)
    best = [nnls(dictionary.T.double().numpy(), t.double().numpy())[1] for t in targets]
    np.testing.assert_allclose(left(targets, code.fit).numpy(), best, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_it_never_beats_every_choice_of_rows_and_the_first_is_the_best(k: int) -> None:
    dictionary, targets = rows(9, 4), rows(6, 4, seed=2)
    code = pursue(targets, dictionary, k)
    found = left(targets, code.fit)
    for target, own in zip(targets.double().numpy(), found.tolist(), strict=True):
        every = [
            nnls(dictionary[list(chosen)].T.double().numpy(), target)[1]
            for chosen in combinations(range(9), k)
        ]
        assert own >= min(every) - 1e-9
        if k == 1:
            assert own == pytest.approx(min(every), abs=1e-6)


def test_a_code_is_what_it_says_and_bounded() -> None:
    dictionary, targets = 3 * rows(200, 32), rows(20, 32, seed=3)
    last = targets.norm(dim=1).double() + 1
    for k in (1, 3, 8, 20):
        code = pursue(targets, dictionary, k)
        taken = code.atoms >= 0
        assert (code.weights[taken] > 0).all() and (code.weights[~taken] == 0).all()
        assert taken.sum(1).max() <= k
        for atoms in code.atoms:
            own = atoms[atoms >= 0]
            assert len(own.unique()) == len(own)
        made = torch.einsum(
            "mk,mkd->md", code.weights, dictionary[code.atoms.clamp(min=0)].double()
        )
        torch.testing.assert_close(made, code.fit, atol=1e-6, rtol=1e-6)
        rest = targets.double() - code.fit
        assert (code.fit * rest).sum(1).abs().max() < 1e-6, "orthogonal"
        assert (code.fit.norm(dim=1) <= targets.norm(dim=1) * (1 + 1e-6)).all()
        assert (rest.norm(dim=1) < last).all(), "more rows, a better fit"
        last = rest.norm(dim=1)


def test_what_no_row_points_along_has_no_code() -> None:
    dictionary = torch.eye(4)
    targets = torch.tensor([[-1.0, -2.0, -3.0, -1.0], [0.0, 0.0, 0.0, 0.0], [2.0, -1.0, 0.0, 0.0]])
    code = pursue(targets, torch.cat([dictionary, torch.zeros(1, 4)]), 3)
    assert (code.atoms[:2] == -1).all() and (code.fit[:2] == 0).all()
    assert code.atoms[2].tolist() == [0, -1, -1]
    torch.testing.assert_close(code.fit[2], torch.tensor([2.0, 0, 0, 0]).double())


def test_chunks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary, targets = rows(50, 16), rows(7, 16, seed=4)
    whole = pursue(targets, dictionary, 6)
    monkeypatch.setattr("holdfast.chunks.ENTRIES", 2 * 6 * 16)  # two targets, some rows
    again = pursue(targets, dictionary, 6)
    alone = torch.cat([pursue(target[None], dictionary, 6).fit for target in targets])
    assert torch.equal(again.atoms, whole.atoms)
    torch.testing.assert_close(again.fit, whole.fit)
    torch.testing.assert_close(alone, whole.fit)


def test_a_row_that_is_there_twice_is_used_once() -> None:
    dictionary = torch.cat([rows(6, 8), rows(6, 8)])
    targets = rows(5, 8, seed=5)
    torch.testing.assert_close(
        pursue(targets, dictionary, 10).fit,
        pursue(targets, rows(6, 8), 6).fit,
        atol=1e-5,
        rtol=1e-5,
    )
