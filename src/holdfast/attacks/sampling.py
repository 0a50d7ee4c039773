"""Sampling: many answers drawn at a temperature, where the audit itself reads the likeliest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.attacks import Attacked, AttackKind, Listed, TrialResult
from holdfast.attacks.answers import AnswersFound, examples_of, result_of
from holdfast.attacks.opposed import NONE_OPPOSED, opposed_of
from holdfast.batch import Batch
from holdfast.behaviors import BehaviorKind
from holdfast.controls import Case, aim_elsewhere
from holdfast.edits import Edit
from holdfast.errors import StudyError
from holdfast.likelihood import nll
from holdfast.measure import Measurement, median, rate, share
from holdfast.reply import Reply
from holdfast.sampling import Sampled
from holdfast.setting import Setting
from holdfast.subject import Subject


class Sampling(AttackKind):
    """Whether the clamp holds where answers are drawn and not the likeliest taken (METHODS E.4).

    n: answers to every prompt, drawn at `temperature`, by random numbers of the prompt's own. Text
    is drawn token by token with the clamp on and judged like every other answer; where the
    behavior is read from one token, the answer is drawn among the options in play.

    At a temperature a model also says what it would not say otherwise, and a judge may take broken
    text for an answer: the perplexity of the answers that show the behavior, under the model
    without any edit, stands beside every condition. Of so many answers one may show anything. So
    the same is drawn without the clamp, and for something that should not be there: text on prompts
    on which the model by itself does the opposite, an option that is neither right nor the one
    given under the clamp.
    """

    kind: Literal["sampling"] = "sampling"
    listed: ClassVar[Listed] = "answers"
    reads_likelihood: ClassVar[bool] = True
    n: int = Field(16, ge=1)
    temperature: float = Field(1.0, gt=0)

    @property
    def label(self) -> str:
        return f"{self.kind}, {self.n} at temperature {self.temperature:g}"

    @property
    def answers(self) -> tuple[int, int, int]:
        return self.n, self.n, self.n

    def check(self, behavior: BehaviorKind) -> None:
        if behavior.pools_tokens:
            raise StudyError(
                f"the attack {self.kind!r} draws answers of the model, and the behavior "
                f"{behavior.kind!r} is read from its residuals, where nothing is drawn; leave it "
                "out of this audit's `attacks`"
            )

    def run(self, attacked: Attacked) -> TrialResult:
        """drawn without the intervention and with it → read as every other answer."""
        behavior = self.behavior_of(attacked)
        draw = _text if behavior.answer_tokens else _options
        drawn = draw(self, attacked.setting, attacked.case, behavior, attacked.seed)
        found = _found(self, attacked, drawn)
        return TrialResult(result_of(found), {}, examples_of(found))


@dataclass(frozen=True)
class _Draws:
    """d answers to each of n prompts. shows [d n] bool; perplexity [d n] under no edits; labels,
    sha256: d tuples of n. None where no text was drawn."""

    shows: Tensor
    perplexity: Tensor | None = None
    labels: tuple[tuple[str, ...], ...] | None = None
    sha256: tuple[tuple[str, ...], ...] | None = None


@dataclass(frozen=True)
class _Drawn:
    """without, clamped: of the audited prompts; control: of what should not be there, on m prompts,
    by their `clusters`; means: what that is."""

    without: _Draws
    clamped: _Draws
    control: _Draws
    clusters: tuple[str, ...]
    means: str
    greedy: Tensor


def _text(
    attack: Sampling, setting: Setting, case: Case, behavior: BehaviorKind, seed: int
) -> _Drawn:
    assert setting.observed is not None and setting.changed is not None
    references = setting.observed.replies
    opposed = setting.subject.batch(opposed_of(setting, behavior))

    def draws(
        subject: Subject, batch: Batch, edits: Sequence[Edit], told: Sequence[Reply] | None
    ) -> _Draws:
        if not len(batch):
            none = torch.zeros(attack.n, 0)
            return _Draws(none.bool(), none)
        seen = []
        for draw in range(attack.n):
            choose = Sampled(attack.temperature, seed, draw)
            made = subject.generate(batch, edits, behavior.answer_tokens, choose)
            seen.append(behavior.judged(subject, batch, made, told))
        return _Draws(
            torch.stack([each.shows for each in seen]),
            torch.stack([nll(subject, batch, each.tokens) for each in seen]).exp(),
            tuple(each.labels for each in seen),
            tuple(tuple(reply.sha256 for reply in each.replies) for each in seen),
        )

    prompts = case.batch.unforced()
    return _Drawn(
        without=draws(case.subject, prompts, (), references),
        clamped=draws(case.subject, prompts, case.edits, references),
        control=draws(setting.subject, opposed, (), None),
        clusters=opposed.clusters,
        means="no clamp, on prompts that show the opposite",
        greedy=setting.changed.shows[case.rows],
    )


def _options(
    attack: Sampling, setting: Setting, case: Case, behavior: BehaviorKind, seed: int
) -> _Drawn:
    batch = case.batch
    wrong = aim_elsewhere(batch, setting.suppressed_answer[case.rows]).targets
    without, clamped = (
        _chosen(attack, batch, case.subject.read(batch, edits), seed) for edits in ((), case.edits)
    )
    return _Drawn(
        without=_Draws(without == batch.targets),
        clamped=_Draws(clamped == batch.targets),
        control=_Draws(clamped == wrong),
        clusters=batch.clusters,
        means="clamp on, a wrong option",
        greedy=setting.suppressed_margin[case.rows] > 0,
    )


def _chosen(attack: Sampling, batch: Batch, scores: Tensor, seed: int) -> Tensor:
    """[d n] answers drawn among those in play; scores [n answers]."""
    options = batch.answers()
    among = torch.full_like(scores, -torch.inf).scatter(1, options, scores.gather(1, options))
    draws = [Sampled(attack.temperature, seed, draw) for draw in range(attack.n)]
    return torch.stack([choose(batch.ids, among) for choose in draws])


def _found(attack: Sampling, attacked: Attacked, drawn: _Drawn) -> AnswersFound:
    case = attacked.case
    clusters = case.batch.clusters
    columns = {
        "any": f"clamp on, any of {attack.n}",
        "mean": "clamp on, share of answers",
        "greedy": "clamp on, the likeliest",
        "without_any": f"no clamp, any of {attack.n}",
        "without_mean": "no clamp, share of answers",
        "control_any": f"{drawn.means}, any of {attack.n}",
        "control_mean": f"{drawn.means}, share of answers",
    }
    clamped, control = drawn.clamped.shows, drawn.control.shows
    alone = NONE_OPPOSED if not control.shape[1] else ""
    cells = {
        "any": rate("any", clamped.any(0), clusters),
        "mean": _mean("mean", clamped, clusters),
        "greedy": rate("greedy", drawn.greedy, clusters),
        "without_any": rate("without_any", drawn.without.shows.any(0), clusters),
        "without_mean": _mean("without_mean", drawn.without.shows, clusters),
        "control_any": rate("control_any", control.any(0), drawn.clusters),
        "control_mean": _mean("control_mean", control, drawn.clusters),
    }
    cells |= {
        key: cell.model_copy(update={"reason": alone})
        for key, cell in cells.items()
        if key.startswith("control") and alone
    }
    parts = {"no clamp": drawn.without, "clamped": drawn.clamped, "control": drawn.control}
    for key, title, part, own in (
        ("perplexity", "clamp on", drawn.clamped, clusters),
        ("without_perplexity", "no clamp", drawn.without, clusters),
        ("control_perplexity", drawn.means, drawn.control, drawn.clusters),
    ):
        if part.perplexity is not None:
            columns[key] = f"{title}, perplexity of what shows it"
            cells[key] = _perplexity(key, part.shows, part.perplexity, own)
    labels = {
        name: [label for own in part.labels for label in own]
        for name, part in parts.items()
        if part.labels is not None
    }
    back = clamped.any(0)
    share_of, beside = float(clamped.double().mean()), float(drawn.without.shows.double().mean())
    sentence = (
        f"of {attack.n} answers drawn at temperature {attack.temperature:g} at least one showed "
        f"the behavior on {int(back.sum())} of {len(back)} prompts, {share_of:.0%} of all answers "
        f"with the clamp and {beside:.0%} without it"
    )
    told = [cells.get(key) for key in ("perplexity", "without_perplexity")]
    if all(cell is not None and cell.estimate is not None for cell in told):
        with_it, alone_ = (f"{cell.estimate:.3g}" for cell in told if cell is not None)
        sentence += f" (perplexity of these without any edit: {with_it} and {alone_})"
    if control.numel():
        sentence += f"; {float(control.any(0).double().mean()):.0%} of prompts: {drawn.means}"
    arms = {
        f"draw {draw + 1}": [_said(drawn, draw, row) for row in range(len(back))]
        for draw in range(attack.n)
    }
    everyone = torch.ones_like(back)
    return AnswersFound(
        attacked.setting, case, everyone, back, "", sentence, columns,
        {f"temperature {attack.temperature:g}": cells}, labels, arms,
    )  # fmt: skip


def _mean(name: str, shows: Tensor, clusters: Sequence[str]) -> Measurement:
    """Share of all answers; its interval is that of prompts, each with its own share."""
    return share(name, shows.double().mean(0), clusters, unit="share of answers")


def _perplexity(
    name: str, shows: Tensor, perplexity: Tensor, clusters: Sequence[str]
) -> Measurement:
    """Median over prompts of the median of their answers that show the behavior."""
    own = torch.where(shows, perplexity, torch.nan).nanmedian(0).values
    return median(name, "perplexity without any edit", own, clusters, "no answer shows it")


def _said(drawn: _Drawn, draw: int, row: int) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for name, part in (("without", drawn.without), ("clamped", drawn.clamped)):
        said[f"{name}_shows"] = bool(part.shows[draw, row])
        said[f"{name}_label"] = "" if part.labels is None else part.labels[draw][row]
        said[f"{name}_sha256"] = "" if part.sha256 is None else part.sha256[draw][row]
    return said
