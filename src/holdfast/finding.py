"""A finding of a check: what was expected, what was measured, what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from holdfast.config import Config


class Finding(Config):
    """One check and its outcome.

    where: what was checked, an audit on a subject. level: what a failed check means. An error is
    what would end the run too, whatever is said to it; a fault makes the numbers of a run wrong, so
    a run stops; a caution is something the reader of its report should know.
    """

    check: str
    passed: bool
    expected: str
    measured: str
    remedy: str = ""
    level: Literal["error", "fault", "caution"] = "fault"
    where: str = ""

    @property
    def stops(self) -> bool:
        return self.level != "caution" and not self.passed

    @property
    def name(self) -> str:
        """The check, and where it was made."""
        return f"{self.where}: {self.check}" if self.where else self.check

    @property
    def sentence(self) -> str:
        """What went wrong and what to do, for messages."""
        if self.level == "error":  # its message has all three parts
            return f"{self.name}: {self.measured}"
        said = f"{self.name}: expected {self.expected}; measured {self.measured}"
        return f"{said}. To do: {self.remedy}" if self.remedy else said


def tally(findings: Sequence[Finding]) -> str:
    """How many checks there were, and how many failed at which level."""
    failed = Counter(finding.level for finding in findings if not finding.passed)
    counts = [f"{n} {level}{'s' if n > 1 else ''}" for level, n in sorted(failed.items())]
    checks = f"{len(findings)} check{'' if len(findings) == 1 else 's'}"
    return ", ".join([checks, *reversed(counts)] if counts else [checks, "all passed"])
