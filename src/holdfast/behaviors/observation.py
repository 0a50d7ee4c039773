"""What a model did on some prompts, as a behavior reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from holdfast.judges.fidelity import Fidelity
from holdfast.reply import Reply


@dataclass(frozen=True)
class Reading:
    """What one judge said of n replies. shows, opposite [n] bool: as in an Observation."""

    labels: tuple[str, ...]
    shows: Tensor
    opposite: Tensor


@dataclass(frozen=True)
class Observation:
    """n prompts under some edits.

    shows [n] bool: the behavior is there; opposite [n] bool: what the intervention is to bring
    about is there in its place. Both are false where the model does neither, breaks down say.
    Where replies are judged: labels, a judge's word for each; replies; tokens, those generated.
    Where they are read again (`BehaviorKind.read_again`): readings, by name of the judge, the one
    that decides first; fidelity, of each reply to its prompt's clean answer.
    """

    shows: Tensor
    opposite: Tensor
    labels: tuple[str, ...] = ()
    replies: tuple[Reply, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    readings: Mapping[str, Reading] = field(default_factory=dict)
    fidelity: tuple[Fidelity, ...] = ()

    @property
    def told(self) -> str:
        """How many replies were judged to be what, and how many of them were cut, in words; empty
        where no replies are judged."""
        if not self.labels:
            return ""
        counts = Counter(self.labels).most_common()
        said = f"judged {', '.join(f'{label} {n}' for label, n in counts)}"
        cut = sum(reply.truncated for reply in self.replies)
        if cut:
            said += f"; {cut} of {len(self.labels)} were cut at the limit: raise max_new_tokens"
        return said
