"""Gates: where a clamp acts, decided from what the residual is before it (METHODS A.6).

A gate reads the clamp's own site, or, where a `Sensor` stands at another, an earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.errors import EditError
from holdfast.positions import selected
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.waiting import waits


class Gating(Protocol):
    """Lets an edit act on some tokens. site: what it reads; not after the edit's own."""

    @property
    def site(self) -> Site: ...

    @property
    def decides_on(self) -> str:
        """What it decides on, if that is more than each token by itself; empty otherwise."""
        ...

    @property
    def words(self) -> str:
        """When it is open, for people."""
        ...

    def opens(self, x: Tensor, frame: Frame) -> Tensor:
        """[b s] bool; x [b s d_model] is the residual as it is before the edit."""
        ...

    def to(self, device: torch.device | str) -> Gating: ...


@dataclass(frozen=True)
class Gate:
    """Lets an edit act on the tokens where one feature of the edit's site exceeds a value.

    bank: a slice of that one feature; above: in the SAE's activation units, strict.
    """

    bank: FeatureBank
    above: float
    decides_on = ""

    @property
    def site(self) -> Site:
        return self.bank.site

    @property
    def words(self) -> str:
        return f"where feature {self.bank.ids[0][0]} is over {self.above:g}"

    def opens(self, x: Tensor, frame: Frame) -> Tensor:
        return self.bank.activations(x, frame)[..., 0] > self.above

    def to(self, device: torch.device | str) -> Gate:
        return replace(self, bank=self.bank.to(device))


@dataclass(frozen=True)
class PromptGate:
    """Lets an edit act on a whole prompt and what follows it, or on nothing of it.

    It is open if on more than `share` of the prompt's tokens any of the bank's features exceeds
    `above`, both strictly. The prompt decides, once: what is generated after it is treated as it
    was. include_bos: whether BOS is one of the tokens that count.
    """

    bank: FeatureBank
    above: float
    share: float
    include_bos: bool = False
    decides_on = "a clamp's condition on the whole prompt"

    @property
    def site(self) -> Site:
        return self.bank.site

    @property
    def words(self) -> str:
        n = len({i for ids in self.bank.ids for i in ids})
        return (
            f"on prompts with any of {n} features over {self.above:g} on more than {self.share:g} "
            "of their tokens"
        )

    def opens(self, x: Tensor, frame: Frame) -> Tensor:
        prompt = frame.once(self, lambda: self._prompt(frame))
        if prompt is not None:
            counted, there = prompt
            fires = (self.bank.activations(x, frame) > self.above).any(-1) & counted
            decided = fires.sum(1) > self.share * counted.sum(1)
            if id(self) in frame.decided:
                decided = torch.where(there, decided, frame.decided[id(self)][1])
            frame.decided[id(self)] = (self, decided)
        if id(self) not in frame.decided:
            raise EditError(
                f"the clamp at {self.bank.site} acts {self.words}, and this pass goes on from a "
                "prompt that it never saw; begin with the whole prompt, with the clamp on"
            )
        return frame.decided[id(self)][1][:, None].expand(frame.positions.shape)

    def _prompt(self, frame: Frame) -> tuple[Tensor, Tensor] | None:
        """Which tokens count [b s], and which prompts are here as a whole [b]; None for a pass over
        what comes after them. A device that has to be waited for is asked of the first pass alone,
        not once a token of an answer."""
        here = selected("prompt", True, frame).sum(1)
        if id(self) not in frame.decided or not waits(here.device):
            if not here.any():
                return None
            if (here != frame.prompt_length).any():
                raise EditError(
                    f"the clamp at {self.bank.site} acts {self.words}, and this pass is over a "
                    "part of a prompt; give the whole prompt in one call"
                )
        return selected("prompt", self.include_bos, frame), here == frame.prompt_length

    def to(self, device: torch.device | str) -> PromptGate:
        return replace(self, bank=self.bank.to(device))


@dataclass(frozen=True)
class DirectionGate:
    """Lets an edit act on a whole prompt and what follows it, or on nothing of it.

    It is open if at the prompt's last token the cosine of the residual at `site` with `direction`
    [d_model] is over `above`, strictly: the condition vector of CAST. The prompt decides, once, as
    its `Sensor` passes by; edits at later sites ask what was decided.
    """

    site: Site
    direction: Tensor
    above: float
    decides_on = "a clamp's condition on the prompt's last token"

    @property
    def words(self) -> str:
        return (
            f"on prompts whose last token is at a cosine over {self.above:g} to a direction at "
            f"{self.site}"
        )

    def cosines(self, x: Tensor, frame: Frame) -> Tensor:
        """[b] of x [b s d_model] at the last token of each prompt, in float32 at least."""
        at = self._last(frame).int().argmax(1).to(x.device)
        h = x[torch.arange(len(x), device=x.device), at]
        h = h if h.dtype == torch.float64 else h.float()
        unit = (self.direction / self.direction.norm()).to(h)
        return h @ unit / h.norm(dim=-1).clamp_min(torch.finfo(h.dtype).tiny)

    def decide(self, x: Tensor, frame: Frame) -> None:
        """Note in the frame whether it is open on each prompt whose last token is there."""
        decided = (self.cosines(x, frame) > self.above).detach()
        if id(self) in frame.decided:
            there = self._last(frame).any(1).to(x.device)
            decided = torch.where(there, decided, frame.decided[id(self)][1].to(x.device))
        frame.decided[id(self)] = (self, decided)

    def _last(self, frame: Frame) -> Tensor:
        """[b s] bool: the last token of each prompt."""
        return frame.once(self, lambda: frame.positions == frame.prompt_length[:, None] - 1)

    def opens(self, x: Tensor, frame: Frame) -> Tensor:
        if id(self) not in frame.decided:
            raise EditError(
                f"a clamp acts {self.words}, and this pass never saw that token there; begin with "
                "the whole prompt, with the clamp's sensor on"
            )
        decided = frame.decided[id(self)][1].to(x.device)
        return decided[:, None].expand(frame.positions.shape)

    def to(self, device: torch.device | str) -> DirectionGate:
        return replace(self, direction=self.direction.to(device))


@dataclass(frozen=True)
class Sensor:
    """An edit that changes nothing: it lets a gate decide at the site that the gate reads."""

    gate: DirectionGate

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.gate.site,)

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return frame.positions == frame.prompt_length[:, None] - 1

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        self.gate.decide(x, frame)
        return x

    def check_fired(self, site: Site, n_fired: int) -> None:
        """What needs its decision and has none says so."""
