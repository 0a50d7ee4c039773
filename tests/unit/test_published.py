"""Published figures: each has a point of a bundled study to stand beside, or says why it has none.

The studies are planned without their files: no model, data set or network.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from holdfast.compare import Finished, Side, side_of
from holdfast.loading import SubjectSpec
from holdfast.planning import sketch
from holdfast.published import PublishedPoint, published_names, read_published
from holdfast.published.beside import UNSAID, about_it, at_point, unlike
from holdfast.published.measures import MEASURES
from holdfast.study import Study, bundled
from holdfast.trial import SAEIdentity, SubjectIdentity

STUDIES = {
    "refusal": "gemma-2-2b-it-refusal",
    "budget": "gemma-2-2b-it-refusal",
    "k_sweep": "gemma-2-2b-it-refusal",
    "refusal-features": "gemma-2-2b-it-refusal",
    "tpp": "gemma-2-2b-tpp",
    "wmdp": "gemma-2-2b-it-wmdp",
    "ioi": "gpt2-small-ioi",
}
KNOWN = {"revision": "0" * 40, "sha256": "0" * 64}
"""Of a data set with both nothing is looked up or read."""


def known(value: Any) -> Any:
    """A study's tables with every data set as if it had been read before."""
    if isinstance(value, list):
        return [known(item) for item in value]
    if not isinstance(value, dict):
        return value
    made = {key: known(item) for key, item in value.items()}
    if made.get("kind") == "hub":
        return made | KNOWN
    if made.get("kind") == "preset":
        from holdfast.datasets.preset import PRESETS

        published = PRESETS[made["name"]]
        part = published.parts[made.get("only") or ""]
        return made | {"source": published.hub(part) | KNOWN}
    return made


def named(spec: SubjectSpec) -> SubjectIdentity:
    saes = tuple(SAEIdentity(site=sae.site, sha256="0" * 64) for sae in spec.saes)
    return SubjectIdentity(
        name=spec.model, weights_sha256="0" * 64, dtype=spec.dtype, attention="eager", saes=saes
    )


@lru_cache(maxsize=8)
def planned(name: str) -> Side:
    """A run of the study that has found nothing yet."""
    study = Study.model_validate(known(tomllib.loads(bundled(name))))
    plan = sketch(study, named)
    return side_of(name, [Finished(t, plan.points.get(t.id, {}), {}, ()) for t in plan.trials])


def every_point() -> Iterator[tuple[str, PublishedPoint]]:
    for name in published_names():
        for point in read_published(name).points:
            yield name, point


def test_every_set_has_a_study() -> None:
    assert set(STUDIES) == set(published_names())


@pytest.mark.parametrize("name", published_names())
def test_every_figure_stands_beside_a_point_of_a_study_or_says_why_not(name: str) -> None:
    published = read_published(name)
    own = about_it(planned(STUDIES[name]), published)
    for point in published.points:
        told = f"{point.label}, {point.measure}, {point.where}"
        if point.reason:
            continue
        assert point.measure in MEASURES, f"{told}: no measure, and no reason"
        found = at_point(own, point.where)
        assert found, f"{told}: no such point"
        differs = {s for each in found for s in unlike(each, point.where)}
        said = {name.replace("_", " ") for name in UNSAID}
        assert {s.partition(":")[0] for s in differs} <= said, f"{told}: {differs}"


def test_few_figures_have_a_reason_to_stand_alone() -> None:
    """Those whose features nobody else has, and those that measure nothing."""
    alone: dict[str, int] = {}
    for name, point in every_point():
        alone[name] = alone.get(name, 0) + bool(point.reason)
    assert {name: n for name, n in alone.items() if n} == {
        "k_sweep": 12, "refusal": 1, "refusal-features": 12,
    }  # fmt: skip


def test_a_figure_of_other_prompts_or_another_attack_is_not_beside() -> None:
    own = about_it(planned("gemma-2-2b-it-refusal"), read_published("refusal"))
    search = {"constraint": "jacobian_probes", "recovery.budget.absolute": 40.0}
    for dataset in ("advbench", "harmbench"):
        found = at_point(own, search | {"dataset": dataset})
        assert [each.trial.audit for each in found] == [f"{dataset}-published"]
    assert not at_point(own, search | {"dataset": "jailbreakbench"})
    suffix = {"dataset": "advbench", "attack.kind": "soft_suffix"}
    weights = {each.trial.attack.weight for each in at_point(own, suffix)}  # type: ignore[attr-defined]
    assert weights == {0.0, 0.1111}
    assert not at_point(own, suffix | {"attack.kind": "prefill"})
