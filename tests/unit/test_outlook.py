"""Forecasts of a run look at models before its trials begin, and never beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.canonical import digest
from holdfast.executor import Done, Runtime
from holdfast.forecast.architecture import Architecture
from holdfast.forecast.outlook import Outlook
from holdfast.trial import Lab
from tests.unit.test_error_term import SITE, make_trial, tiny_subject


def test_no_model_is_put_together_while_trials_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers does it under the config's dtype, which torch then has for every thread: a
    search beside it would get its tensors in that dtype."""
    trials = [make_trial(alpha, "clamp_then_perturbation") for alpha in (1.0, 0.5)]
    lab = Lab({digest(trials[0].subject.model_dump(mode="json")): tiny_subject(sites=(SITE,))})
    outlook = Outlook.before(lab, Runtime(), trials)
    assert torch.get_default_dtype() == torch.float32

    def beside(*args: Any) -> None:
        raise AssertionError("a model was put together after the trials had begun")

    monkeypatch.setattr(Architecture, "of", beside)
    monkeypatch.setattr("holdfast.forecast.outlook.probe", beside)
    result: Any = None
    for trial in trials:
        said = outlook.of(Done(trial, result, "now", 1.0, 1, (trial,), (trial.subject,)))
        assert said["flops_if_found"] > 0, said
