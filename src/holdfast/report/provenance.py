"""Where the numbers come from: versions, hashes, commands, and the tables to take away."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable
from typing import Any

from holdfast.report.data import ReportData
from holdfast.report.section import Section
from holdfast.strict_json import json_safe
from holdfast.wording import NOTHING, arm_name, power


def section(data: ReportData) -> Section:
    runs = [record["run"] for record in data.records]
    subjects = {
        identity.model_dump_json(): identity
        for arm in data.arms
        for identity in (arm.trial.subject, arm.trial.twin)
        if identity
    }
    context = {
        "study": data.study,
        "study_hash": data.study_hash,
        "commands": _different(run["command"] for run in runs if run["command"]),
        "devices": _different(f"{run['device']}, {run['platform']}" for run in runs),
        "threads": _different(run["threads"] for run in runs),
        "batch_sizes": _different(_rows_at_once(run["batch_plan"]) for run in runs),
        "versions": _different(
            ", ".join(f"{name} {v}" for name, v in run["versions"].items()) for run in runs
        ),
        "n_trials": len(runs),
        "seconds": sum(run["seconds"] for run in runs),
        "foreseen": any(_foreseen(run, "if_found") for run in runs),
        "peak_of": " or ".join(_different(run.get("peak_memory_of", "a device") for run in runs)),
        "started": min((run["started"] for run in runs), default=""),
        "subjects": list(subjects.values()),
        "trials": [
            {
                "row": arm.row,
                "arm": arm_name(arm.kind),
                "run": arm.record["run"],
                "if_found": _foreseen(arm.record["run"], "if_found"),
                "if_not_found": _foreseen(arm.record["run"], "if_not_found"),
                "memory": _bytes(arm.record["run"].get("forecast", {}).get("memory_bytes")),
                "peak": _bytes(arm.record["run"].get("peak_memory_bytes")),
            }
            for arm in data.arms
        ],
        "csv": _uri("text/csv", _csv(data.summary["trials"])),
        "json": _uri("application/json", json.dumps(json_safe(data.summary), indent=1)),
        "study_json": json.dumps(data.study_fields, indent=1, ensure_ascii=False),
    }
    return Section("provenance", "Provenance", context)


def _rows_at_once(plan: dict[str, Any]) -> str:
    """As asked for or found from memory, and what it came to where that differs."""
    work = plan.get("work", {})  # records of earlier versions have none
    found = [f"{name} {own['rows']}" for name, own in work.items()]
    return f"{plan['batch_size']}" + (f" ({', '.join(found)})" if found else "")


def _foreseen(run: dict[str, Any], case: str) -> str:
    """Seconds as they were forecast for a case; nothing where they were not."""
    least, most = run.get("forecast", {}).get(f"seconds_{case}", (None, None))
    return "" if least is None else f"{power(least)} to {power(most)}"


def _bytes(value: float | None) -> str:
    return NOTHING if value is None else f"{power(value / 1e9)} GB"


def _different(values: Iterable[Any]) -> list[str]:
    """In order, each once: more than one where a run was continued elsewhere."""
    return list(dict.fromkeys(str(value) for value in values))


def _csv(rows: list[dict[str, Any]]) -> str:
    """The summary's rows; what is no single value is left to the JSON."""
    columns = [name for name in (rows[0] if rows else {}) if name != "separations"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _uri(media: str, text: str) -> str:
    return f"data:{media};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
