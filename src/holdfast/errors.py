"""Everything holdfast raises on purpose.

A finding (the clamp held, the search diverged) is a value, never an exception; these are mistakes
and impossible requests. Each message says what was expected, what came, and what to do.

    HoldfastError
    ├── StudyError              a study file that is missing, broken or asks for unknown things
    │   └── UnknownNameError    a name that is not known; the nearest known ones are in the message
    ├── SubjectError            a model or tokenizer that cannot be used
    │   ├── SAEError            an SAE that does not belong to this model or site
    │   ├── ContextError        a prompt with its answer that is longer than the model reads
    │   ├── DeviceError         a device that was asked for and is not there
    │   ├── NonFiniteError      NaN or infinite logits
    │   └── OutOfMemoryError    a single row, or what cannot be split, does not fit into memory
    ├── FeatureError            feature ids out of range, twice, or missing for a group
    ├── SplitError              prompts shared between splits that must be disjoint
    ├── ConstraintError         a constraint that could not keep its promise on this SAE
    ├── PreflightError          a check before the run found a fault
    ├── JudgeError              a judge that cannot be loaded, or cannot read what it was given
    ├── SheetError              an audit sheet that cannot be written or read
    ├── CompareError            two runs, or a run and published figures, with nothing in common
    ├── EmptyValidSetError      no prompt left to audit; carries the funnel
    ├── EditError               an edit that cannot be applied
    │   ├── EditNeverFiredError an edit that touched nothing
    │   └── PositionError       a position outside the sequence
    └── StoreError              a run's folder that cannot be used
        ├── ForeignRunError     the folder belongs to another study, or to no run at all
        ├── DamagedRecordError  a record or artifact that does not match its hash
        ├── ManifestError       tables of a run that contradict each other
        └── RunLockedError      another process is writing this run
"""

from __future__ import annotations


class HoldfastError(Exception):
    """Base of every error holdfast raises on purpose."""


class StudyError(HoldfastError):
    """A study file is missing, broken, or asks for something that does not exist."""


class UnknownNameError(StudyError):
    """A name is not known; the message lists the nearest known ones."""


class SubjectError(HoldfastError):
    """A model or tokenizer cannot be used."""


class SAEError(SubjectError):
    """An SAE does not belong to this model or site, or its file is of no known layout."""


class ContextError(SubjectError):
    """A prompt, or a prompt with its answer, is longer than the model's context."""


class DeviceError(SubjectError):
    """A device was asked for that is not there."""


class NonFiniteError(SubjectError):
    """The model returned NaN or infinite logits."""


class OutOfMemoryError(SubjectError):
    """A single row of some work, or what cannot be split into rows, does not fit into memory."""


class FeatureError(HoldfastError):
    """Feature ids are out of range, repeated, or missing for a group."""


class SplitError(HoldfastError):
    """Prompts are shared between splits that must be disjoint."""


class ConstraintError(HoldfastError):
    """A constraint could not keep what it promises for this SAE."""


class PreflightError(HoldfastError):
    """A check before the run found what would make its results wrong."""


class JudgeError(HoldfastError):
    """A judge cannot be loaded, or cannot read what it was given."""


class SheetError(HoldfastError):
    """An audit sheet cannot be written or read."""


class CompareError(HoldfastError):
    """Two runs, or a run and published figures, have nothing in common."""


class EmptyValidSetError(HoldfastError):
    """No prompt is left to audit.

    `funnel` maps each stage to the number of prompts that reached it, in order.
    """

    def __init__(self, message: str, funnel: dict[str, int]):
        super().__init__(message)
        self.funnel = funnel


class EditError(HoldfastError):
    """An edit cannot be applied."""


class EditNeverFiredError(EditError):
    """An edit was attached and touched no position of any row."""


class PositionError(EditError):
    """An edit names a position that is outside the sequence."""


class StoreError(HoldfastError):
    """A run's folder cannot be used."""


class ForeignRunError(StoreError):
    """The folder holds another study's run, or files that are no run."""


class DamagedRecordError(StoreError):
    """A record or an artifact does not match what was written."""


class ManifestError(StoreError):
    """The tables of a run contradict each other, or lack what a count is a share of."""


class RunLockedError(StoreError):
    """Another process is writing to this run's folder."""
