"""holdfast: does a clamp on SAE features hold, or is the behavior still there?

Everything public is importable from here; nothing heavy is imported before it is used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Batch": "holdfast.batch",
    "Capture": "holdfast.edits",
    "Edit": "holdfast.edits",
    "Example": "holdfast.batch",
    "FeatureBank": "holdfast.saes.bank",
    "FeatureEdit": "holdfast.edits",
    "FeatureSet": "holdfast.features",
    "HoldfastError": "holdfast.errors",
    "Perturbation": "holdfast.edits",
    "Plan": "holdfast.planning",
    "Problem": "holdfast.problem",
    "RecoverySpec": "holdfast.recovery",
    "Replay": "holdfast.replay",
    "RunFolder": "holdfast.store",
    "Runtime": "holdfast.executor",
    "SAE": "holdfast.saes.sae",
    "SavedClamp": "holdfast.clamp_file",
    "Site": "holdfast.sites",
    "SiteFeatures": "holdfast.features",
    "Study": "holdfast.study",
    "Subject": "holdfast.subject",
    "SubjectSpec": "holdfast.loading",
    "Trial": "holdfast.trial",
    "attached": "holdfast.hooks",
    "export_clamp": "holdfast.export",
    "identify": "holdfast.planning",
    "load_clamp": "holdfast.clamp_file",
    "parse_study": "holdfast.study:parse",
    "load_study": "holdfast.study:load",
    "plan": "holdfast.planning",
    "recover": "holdfast.recovery",
    "run_study": "holdfast.run",
    "run_trial": "holdfast.trial",
    "save_clamp": "holdfast.clamp_file",
    "verify_recovery": "holdfast.verify:verify",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
