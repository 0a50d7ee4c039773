"""Whether the behavior is back, in the behavior's own terms, with the saved perturbation on.

For what is read from logits the verified margin says it. Text is generated anew, freely, under the
cache, with clamp and perturbation on at their absolute positions, and judged like clean and clamped
text; the published code lost its answer perturbations there (METHODS D.9-1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.behaviors.observation import Observation
from holdfast.checks import Checks
from holdfast.controls import Case
from holdfast.edits import Edit, Perturbation, in_order
from holdfast.embedding import likeness
from holdfast.judges.alike import BASE_LIKE, STRICT, alike
from holdfast.judges.writing import foreign_share
from holdfast.likelihood import nll
from holdfast.problem import Problem
from holdfast.setting import Setting
from holdfast.verify import verify


@dataclass(frozen=True)
class Regained:
    """n audited prompts. recovered [n] bool; drift [n]: largest preactivation drift of held
    features at tokens of the generated text that carry no perturbation, against a pass over the
    same tokens without it; NaN where nothing was generated. counted [n] bool: no held feature was
    overtaken, without which no judge's word counts. seen: the judged replies, if any. measured,
    where the audited behavior itself was searched in the audited subject: name → [n], see
    `_measured`. alike: rule → [n] bool, likewise: the behavior is back, and the reply like the
    clean answer by a published rule."""

    recovered: Tensor
    drift: Tensor
    counted: Tensor
    seen: Observation | None = None
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    alike: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.seen.labels if self.seen is not None else ()

    @property
    def unscored(self) -> str:
        """Why likeness to the clean answer has no value, in the words of most prompts."""
        told = self.seen.fidelity if self.seen is not None else ()
        reasons = Counter(each.reason for each in told if each.reason)
        return reasons.most_common(1)[0][0] if reasons else ""

    def label(self, row: int) -> str:
        return self.labels[row] if self.seen is not None else ""


def regain(
    setting: Setting,
    case: Case,
    problem: Problem,
    perturbation: Perturbation,
    checks: Checks,
    clamp_first: bool,
) -> Regained:
    """Read the recovered state as the behavior reads every other."""
    nothing = torch.full_like(checks.margin, torch.nan)
    if setting.observed is None or setting.behavior is None:
        return Regained(checks.recovered, nothing, checks.overtaken == 0)
    edits = in_order(case.edits, perturbation, clamp_first)
    references = setting.observed.replies
    seen = setting.behavior.observe(case.subject, case.batch, edits, references)
    prompts = case.batch.unforced()
    # The last token of a forced answer is read and not run: one more makes all of the text run.
    text = prompts.forcing([[*tokens, tokens[-1]] for tokens in seen.tokens])
    scale = {site: case.features.median_active(site) for site in problem.held}
    along = verify(
        case.subject, text, case.edits, perturbation.within(text), problem.held, scale, clamp_first
    )
    # Whether an answer was forced is read from its own tokens; whether the behavior is back, from
    # what the judge says.
    back = seen.shows if case.own else checks.margin > 0
    counted, drift = checks.overtaken == 0, along.preactivation_drift_elsewhere
    if not case.own:
        return Regained(back & counted, drift, counted, seen)
    seen = setting.behavior.read_again(case.subject, seen, references)
    # A twin's replies are no more likely or faithful by another subject's clean answers.
    own = case.subject is setting.subject
    if not own:
        return Regained(back & counted, drift, counted, seen)
    return Regained(
        back & counted, drift, counted, seen, _measured(setting, case, edits, seen),
        alike_by_rule(setting, case, seen),
    )  # fmt: skip


RULES = {"base_like": BASE_LIKE, "strict": STRICT}


def alike_by_rule(setting: Setting, case: Case, seen: Observation) -> dict[str, Tensor]:
    """Rule → [n] bool: the reply shows the behavior and is like the prompt's clean answer."""
    assert setting.observed is not None
    clean = [setting.observed.replies[row].text for row in case.rows.tolist()]
    replies = [reply.text for reply in seen.replies]
    return {
        name: seen.shows
        & torch.as_tensor(
            [alike(*texts, rule) for texts in zip(replies, clean, strict=True)],
            dtype=torch.bool, device=seen.shows.device,
        )
        for name, rule in RULES.items()
    }  # fmt: skip


def _measured(
    setting: Setting, case: Case, edits: Sequence[Edit], seen: Observation
) -> dict[str, Tensor]:
    """Name → [n], of the audited prompts (METHODS H.4).

    clean_answer_nll.<condition>: of the clean answer, teacher-forced in that condition, nats a
    token. reply_perplexity.<condition>: of the condition's reply under the model without any edit:
    text that breaks down is unlikely text. reply_foreign_letters.<condition>: share of its letters
    in scripts that neither the prompt nor the clean answer has. fidelity_embedding.<condition>: see
    `embedding.likeness`. <likeness>.<condition>: of the
    reply to the clean answer; NaN where the judge's test of fidelity cannot say.
    """
    assert setting.observed is not None and setting.changed is not None
    rows = case.rows.tolist()
    prompts = case.batch.unforced()
    answers = [setting.observed.tokens[row] for row in rows]
    replies = {
        "clean": answers,
        "suppressed": [setting.changed.tokens[row] for row in rows],
        "recovered": list(seen.tokens),
    }
    within = {"clean": (), "suppressed": case.edits, "recovered": tuple(edits)}
    out = {
        f"clean_answer_nll.{name}": nll(case.subject, prompts, answers, on)
        for name, on in within.items()
    }
    for name, tokens in replies.items():
        out[f"reply_perplexity.{name}"] = nll(case.subject, prompts, tokens).exp()
    changed = {name: replies[name] for name in ("suppressed", "recovered")}
    alike = likeness(case.subject, changed, rows, setting.observed.tokens)
    out |= {f"fidelity_embedding.{name}": values for name, values in alike.items()}
    said = {
        "suppressed": [setting.changed.replies[row] for row in rows],
        "recovered": list(seen.replies),
    }
    for name, made in said.items():
        shares = [
            foreign_share(reply.text, text, setting.observed.replies[row].text)
            for reply, text, row in zip(made, prompts.texts, rows, strict=True)
        ]
        out[f"reply_foreign_letters.{name}"] = torch.as_tensor(shares, dtype=torch.float64)
    compared = {
        "suppressed": [setting.changed.fidelity[row] for row in rows if setting.changed.fidelity],
        "recovered": list(seen.fidelity),
    }
    for name, found in compared.items():
        for measure in ("token_f1", "rouge_l", "z") if found else ():
            values = [getattr(each, measure) for each in found]
            out[f"fidelity_{measure}.{name}"] = torch.as_tensor(
                [torch.nan if value is None else value for value in values], dtype=torch.float64
            )
    return out
