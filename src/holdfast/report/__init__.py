"""The report: one self-contained HTML page and one picture, made from a run's records alone."""

from __future__ import annotations

from holdfast.report.page import write_report
from holdfast.report.picture import write_picture

__all__ = ["write_picture", "write_report"]
