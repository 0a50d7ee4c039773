"""What attempts in the prompt found, as plain numbers: a record's result, and its rows.

An attempt counts where its template works without the clamp: a wording under which even the
untouched model does not show the behavior says nothing of the clamp, whatever comes under it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor

from holdfast.attacks.conversation import Held
from holdfast.attacks.opposed import NONE_OPPOSED
from holdfast.controls import Case
from holdfast.funnel import dropped_of, funnel_of
from holdfast.measure import Measurement, rate
from holdfast.prompt_rows import prompt_of
from holdfast.setting import Setting

NOTHING_MOVED = (
    "nothing is added to the residual stream, so no clamped feature is moved but by other words"
)
NO_WORDING = "without the clamp too, no template brought the behavior"


@dataclass(frozen=True)
class Attempts:
    """n audited prompts, asked with every template without the intervention and with it.

    without, clamped: the template's name → how it went; turned: on m prompts on which the model by
    itself does what the intervention makes it do, without the intervention.
    """

    setting: Setting
    case: Case
    without: dict[str, Held]
    clamped: dict[str, Held]
    turned: dict[str, Held]

    def asked(self, name: str) -> Tensor:
        """[n] bool: with this template the behavior is there without the intervention, and the
        prompt was asked under it too."""
        return self.without[name].shows & _tried(self.clamped[name])

    def back(self, name: str) -> Tensor:
        """[n] bool: and with the intervention as well."""
        return self.asked(name) & self.clamped[name].shows


def _any(of: Callable[[str], Tensor], names: Iterable[str]) -> Tensor:
    """[n] bool: true with any of the templates."""
    return torch.stack([of(name) for name in names]).any(0)


def result_of(made: Attempts) -> dict[str, Any]:
    """The `result` of a record: plain numbers and words, the same for every run of one trial."""
    asked, back = _any(made.asked, made.without), _any(made.back, made.without)
    turned = _any(lambda name: made.turned[name].shows, made.turned)
    turned = turned[_any(lambda name: _tried(made.turned[name]), made.turned)]
    funnel = funnel_of(made.setting, made.case, None)
    funnel["stages"] |= {"asked": int(asked.sum()), "recovered": int(back.sum())}
    return {
        "funnel": funnel,
        "outcome": _outcome(made, asked, back, turned),
        "measurements": [
            m.model_dump(mode="json") for m in _measurements(made, asked, back, turned)
        ],
        "templates": [_template(made, name) for name in made.without],
        "checks": {
            "preactivation_drift_max": nan,
            "drift_relative_mean": nan,
            "drift_relative_max": nan,
            "reason": NOTHING_MOVED,
        },
        "labels": _labels(made),
        "features": made.case.features.model_dump(mode="json"),
        "intervention": made.setting.intervention.model_dump(mode="json"),
    }


def _outcome(made: Attempts, asked: Tensor, back: Tensor, turned: Tensor) -> dict[str, Any]:
    n, n_asked, n_back = len(back), int(asked.sum()), int(back.sum())
    templates = f"{len(made.without)} template" + ("s" if len(made.without) > 1 else "")
    if n_back:
        found = f"asked in other words the behavior came back on {n_back} of {n_asked} prompts"
    elif n_asked:
        found = (
            f"asked with {templates} the behavior came back on none of {n_asked} prompts, which "
            "says nothing of other words"
        )
    else:
        found = f"{NO_WORDING} on any of {n} prompts, so nothing is said of the clamp"
    if n_back and turned.any():
        found += (
            f"; without any clamp the same words also turn {int(turned.sum())} of {len(turned)} "
            "prompts on which the model does the opposite by itself"
        )
    return {
        "outcome": "recovered" if n_back else "not_recovered" if n_asked else "unscored",
        "sentence": found,
        "counts": {
            "recovered": n_back,
            "not_recovered": n_asked - n_back,
            "unscored": n - n_asked,
        },
    }


def _measurements(made: Attempts, asked: Tensor, back: Tensor, turned: Tensor) -> list[Measurement]:
    """Over all templates, then one by one; each rate over the prompts it can be read on."""
    found = [
        _rate(made, "recovery_rate", back, asked, NO_WORDING),
        _rate(made, "without_clamp_rate", asked, torch.ones_like(asked), ""),
        _turned("turned_rate", turned),
    ]
    for name, without in made.without.items():
        tried = _tried(without)
        found += [
            _rate(made, f"template.{name}.recovery_rate", made.back(name), made.asked(name),
                  "without the clamp too, this template did not bring the behavior"),
            _rate(made, f"template.{name}.without_clamp_rate", without.shows, tried,
                  "longer than the model's context"),
            _turned(f"template.{name}.turned_rate", _shown(made.turned[name])),
        ]  # fmt: skip
    return found


def _rate(made: Attempts, name: str, hits: Tensor, scored: Tensor, reason: str) -> Measurement:
    """The rate over the scored prompts, and how many of the others there are."""
    clusters = made.case.batch.clusters
    kept = scored.nonzero().flatten().tolist()
    found = rate(name, hits[kept], [clusters[row] for row in kept])
    missing = len(hits) - len(kept)
    return found.model_copy(
        update={"n_unscored": missing, "reason": reason if missing else found.reason}
    )


def _turned(name: str, shows: Tensor) -> Measurement:
    """Of the opposed prompts, the share that these words turn without any intervention."""
    found = rate(name, shows, [str(row) for row in range(len(shows))])
    return found if len(shows) else found.model_copy(update={"reason": NONE_OPPOSED})


def _shown(held: Held) -> Tensor:
    """[m] bool: whether the behavior shows, of the prompts that were asked."""
    return held.shows[_tried(held)]


def _tried(held: Held) -> Tensor:
    return torch.as_tensor([not why for why in held.excluded], device=held.shows.device)


def _template(made: Attempts, name: str) -> dict[str, Any]:
    """Counts of one template. only_clamped: the behavior is there under the clamp and not without
    it, which no rate counts."""
    without, clamped = made.without[name], made.clamped[name]
    return {
        "name": name,
        "n": len(without.labels),
        "n_excluded": int((~(_tried(without) & _tried(clamped))).sum()),
        "n_asked": int(made.asked(name).sum()),
        "n_recovered": int(made.back(name).sum()),
        "only_clamped": int((clamped.shows & ~without.shows).sum()),
        "n_opposed": len(_shown(made.turned[name])),
        "n_turned": int(made.turned[name].shows.sum()),
    }


def _labels(made: Attempts) -> dict[str, dict[str, int]]:
    """Condition → label → replies: of the prompts tried for clean and suppressed, of those audited
    for every template."""
    setting = made.setting
    seen = {"clean": setting.observed, "suppressed": setting.changed}
    labels = {name: each.labels for name, each in seen.items() if each is not None}
    for name in made.without:
        labels[f"{name}, no clamp"] = made.without[name].labels
        labels[f"{name}, clamped"] = made.clamped[name].labels
        labels[f"{name}, opposed"] = made.turned[name].labels
    return {
        name: dict(sorted(Counter(label for label in each if label).items()))
        for name, each in labels.items()
    }


def examples_of(made: Attempts) -> list[dict[str, Any]]:
    """A row for every audited prompt and template, and one for every prompt that is not audited.

    Prompts and replies are in it by label and hash, never by text.
    """
    setting = made.setting
    dropped = dropped_of(setting, made.case)
    audited = {example: row for row, example in enumerate(made.case.batch.ids)}
    rows = []
    for index, example in enumerate(setting.test.ids):
        own = {
            **prompt_of(setting, index),
            "dropped": dropped.get(example, ""),
            "clean_label": setting.observed.labels[index] if setting.observed else "",
            "suppressed_label": setting.changed.labels[index] if setting.changed else "",
        }
        tried = made.without if example in audited else {"": None}
        rows += [own | _attempt(made, name, audited.get(example)) for name in tried]
    return rows


def _attempt(made: Attempts, name: str, row: int | None) -> dict[str, Any]:
    """The columns of one attempt; empty where none was made."""
    pair = {} if row is None else {"without": made.without[name], "clamped": made.clamped[name]}
    found: dict[str, Any] = {
        "template": name,
        "asked": row is not None and bool(made.asked(name)[row]),
        "recovered": row is not None and bool(made.back(name)[row]),
    }
    for condition in ("without", "clamped"):
        held = pair.get(condition)
        for column in ("labels", "sha256", "prompt_sha256", "excluded"):
            value = "" if held is None or row is None else getattr(held, column)[row]
            found[f"{condition}_{column.removesuffix('s')}"] = value
    return found
