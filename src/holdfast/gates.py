"""Gates: where a clamp acts, decided from what its site's features do before it (METHODS A.6)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.errors import EditError
from holdfast.positions import selected
from holdfast.saes.bank import FeatureBank


class Gating(Protocol):
    """Lets an edit act on some tokens. bank: the features it reads, of the edit's site."""

    @property
    def bank(self) -> FeatureBank: ...

    @property
    def decides_on(self) -> str:
        """What it decides on, if that is more than each token by itself; empty otherwise."""
        ...

    @property
    def words(self) -> str:
        """When it is open, for people."""
        ...

    def opens(self, x: Tensor, frame: Frame) -> Tensor:
        """[b s] bool, read from x [b s d_model] as it is before the edit."""
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
    def words(self) -> str:
        n = len({i for ids in self.bank.ids for i in ids})
        return (
            f"on prompts with any of {n} features over {self.above:g} on more than {self.share:g} "
            "of their tokens"
        )

    def opens(self, x: Tensor, frame: Frame) -> Tensor:
        counted = frame.once(self, lambda: self._counted(frame))
        if counted is not None:
            fires = (self.bank.activations(x, frame) > self.above).any(-1) & counted
            decided = fires.sum(1) > self.share * counted.sum(1)
            frame.decided[id(self)] = (self, decided)
        if id(self) not in frame.decided:
            raise EditError(
                f"the clamp at {self.bank.site} acts {self.words}, and this pass goes on from a "
                "prompt that it never saw; begin with the whole prompt, with the clamp on"
            )
        return frame.decided[id(self)][1][:, None].expand(frame.positions.shape)

    def _counted(self, frame: Frame) -> Tensor | None:
        """[b s] bool: the prompts' tokens, None for a pass over what comes after them."""
        here = selected("prompt", True, frame).sum(1)
        if not here.any():
            return None
        if (here != frame.prompt_length).any():
            raise EditError(
                f"the clamp at {self.bank.site} acts {self.words}, and this pass is over a part of "
                "a prompt; give the whole prompt in one call"
            )
        return selected("prompt", self.include_bos, frame)

    def to(self, device: torch.device | str) -> PromptGate:
        return replace(self, bank=self.bank.to(device))
