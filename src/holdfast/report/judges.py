"""What judges and people say of the replies, for behaviors that are read from text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.report.data import Arm, AuditData, ReportData
from holdfast.report.section import Section
from holdfast.retelling import CONDITIONS
from holdfast.second_opinions import ALL, PREFIX, TOGETHER

MEASURES = {
    "clean_answer_nll": "clean answer: negative log-likelihood, nats a token",
    "reply_perplexity": "reply: perplexity under the model without clamp and vector",
    "reply_foreign_letters": "reply: letters in a script of neither prompt nor clean answer",
    "fidelity_token_f1": "reply: token F1 with the clean answer",
    "fidelity_rouge_l": "reply: ROUGE-L with the clean answer",
    "fidelity_embedding": "reply: cosine with the clean answer in the model's middle layer",
    "fidelity_z": "reply: distance from unrelated answers, in their standard deviations",
}


def section(data: ReportData) -> Section | None:
    audits = [_audit(a, data) for a in data.audits if _labels(a.headlines[0].main)]
    if not audits:
        return None
    context = {"audits": audits, "conditions": CONDITIONS, "all": ALL, "together": TOGETHER}
    return Section("judges", "What judges say of the replies", context)


def _labels(main: Arm) -> Mapping[str, Mapping[str, int]]:
    found: Mapping[str, Mapping[str, int]] = main.result.get("labels") or {}
    return found


def _audit(audit: AuditData, data: ReportData) -> dict[str, Any]:
    point = audit.headlines[0]
    main, counted = point.main, _labels(point.main)
    opinions = main.result.get("opinions") or {}
    return {
        "name": audit.name,
        "point": point.label,
        "labels": sorted({label for labels in counted.values() for label in labels}),
        "counted": counted,
        "judges": [_judge(name, main, opinions) for name in opinions.get("valid", {})],
        "agreement": opinions.get("agreement", {}),
        "measures": _measures(main),
        "people": [found for found in data.people if found["trial"] == main.trial.id],
    }


def _judge(name: str, main: Arm, opinions: Mapping[str, Any]) -> dict[str, Any]:
    """A judge's row: the rate under it, and its agreement with the judge that decides."""
    pairs = opinions["agreement"][TOGETHER]["pairs"]
    first = opinions["agreement"][TOGETHER]["judges"][0]
    with_first = [p for p in pairs if p["first"] == first and p["second"] == name]
    return {
        "name": name,
        "decides": name == first,
        "valid": opinions["valid"][name],
        "rate": main.measured(f"{PREFIX}{name}"),
        "pair": with_first[0] if with_first else None,
    }


def _measures(main: Arm) -> list[dict[str, Any]]:
    rows = []
    for name, said in MEASURES.items():
        cells = [main.measured(f"{name}.{condition}") for condition in CONDITIONS]
        if any(cells):
            rows.append({"said": said, "cells": cells})
    return rows
