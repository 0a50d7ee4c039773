"""Shared fixtures: a tiny random subject, prompts for it, and a clamp on it."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import settings

from holdfast.batch import Batch
from holdfast.edits import FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_subject

pytest_plugins = ("tests.proves",)

# Two shared cores: wall-clock deadlines per example would fail for the wrong reason.
settings.register_profile("holdfast", deadline=None)
settings.load_profile("holdfast")

SITE = Site(2)
IDS = (1, 5, 9, 30)


# Operations on tiny tensors gain nothing from two threads, and wait long for one that is not
# scheduled (docs/log.md).
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Modules and collected tests stay to the end: no later collection of garbage looks for any
    among them. It would take half a second, and work that runs out of memory collects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def subject() -> Subject:
    return tiny_subject()


@pytest.fixture(scope="session")
def batch(subject: Subject) -> Batch:
    """Eight ragged prompts."""
    return tiny_batch(subject, 8)


@pytest.fixture(scope="session")
def features() -> FeatureSet:
    return FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=IDS),), source="test")


@pytest.fixture(scope="session")
def grouped_features() -> FeatureSet:
    """Different features, and different numbers of them, for the two groups of prompts."""
    return FeatureSet(
        entries=(
            SiteFeatures(site=str(SITE), group="g0", ids=(1, 5, 9, 30)),
            SiteFeatures(site=str(SITE), group="g1", ids=(2, 60)),
        ),
        source="test",
    )


@pytest.fixture(scope="session")
def bank(subject: Subject, features: FeatureSet) -> FeatureBank:
    return FeatureBank.of(subject.sae(SITE), features)


@pytest.fixture(scope="session")
def clamp(bank: FeatureBank) -> FeatureEdit:
    return FeatureEdit(bank, "set_where_active", -2.0)
