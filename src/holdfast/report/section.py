"""A section of the page: what its template is given, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.report.figures import Figure


@dataclass(frozen=True)
class Section:
    """id: anchor on the page and name of the template; context: names the template uses."""

    id: str
    title: str
    context: Mapping[str, Any]
    figures: tuple[Figure, ...] = field(default=())

    @property
    def template(self) -> str:
        return f"{self.id}.html.j2"
