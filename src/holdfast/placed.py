"""An audit at a point of its grid: what is loaded there, and what its trials are made of."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.behaviors import BEHAVIORS, BehaviorKind
from holdfast.config import nearest
from holdfast.discovery import DISCOVERIES
from holdfast.dotted import put, value_at
from holdfast.errors import StudyError
from holdfast.grid import Point, expanded
from holdfast.interventions import INTERVENTIONS
from holdfast.loading import SubjectSpec
from holdfast.recovery import RecoverySpec
from holdfast.setting import Data

if TYPE_CHECKING:
    from holdfast.study import Audit, Study

_GRID_ROOTS = (
    "recovery", "data", "behavior", "discovery", "intervention", "seed", "subject", "ignorant",
    "variant",
)  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """An audit at a point of its grid: subjects to load, and a trial's other fields."""

    subject: SubjectSpec
    ignorant: SubjectSpec | None
    fields: dict[str, Any]


def at_point(study: Study, audit: Audit, point: Point) -> Placed:
    """What a grid point makes of an audit. Raises StudyError for what cannot vary."""
    own = audit.subject is not None
    twin = audit.ignorant if own else audit.ignorant or study.ignorant
    fields: dict[str, Any] = {
        "subject": (audit.subject or study.subject).model_dump(mode="json"),
        **({"ignorant": twin.model_dump(mode="json")} if twin else {}),
        "seed": study.seed,
        "data": (audit.data or study.data).model_dump(mode="json"),
        "recovery": study.recovery.model_dump(mode="json"),
        "behavior": audit.behavior.model_dump(mode="json"),
        "discovery": audit.discovery.model_dump(mode="json"),
        "intervention": audit.intervention.model_dump(mode="json"),
    }
    for path, value in expanded(point, study.variants).items():
        root = path.split(".")[0]
        if root not in _GRID_ROOTS:
            raise StudyError(
                f"grid: {path!r} cannot vary; a path begins with one of them: "
                f"{nearest(root, _GRID_ROOTS)}"
            )
        if root not in fields:
            raise StudyError(
                f"grid: {path!r} cannot vary: audit {audit.name!r} has no ignorant twin; name it "
                "under [ignorant]"
            )
        if path.endswith(".kind") and value_at(fields, path) != value:
            # Another kind has other fields: those of the kind it replaces would be unknown to it.
            put(fields, path.removesuffix(".kind"), {"kind": value})
        else:
            table = value_at(fields, path.rpartition(".")[0])
            if isinstance(table, dict) and not path.endswith(".sha256"):
                table.pop("sha256", None)  # it was that of what is replaced
            put(fields, path, deepcopy(value))
    recovery = RecoverySpec.model_validate(fields["recovery"])
    behavior = BEHAVIORS.parse(fields["behavior"])
    assert isinstance(behavior, BehaviorKind)
    # The last token that is read is never run: there is no position of it to perturb.
    if recovery.perturb.answer > behavior.n_read - 1:
        raise StudyError(
            f"audit {audit.name!r}: recovery.perturb.answer = {recovery.perturb.answer} names "
            f"positions that are not there: the search reads {behavior.n_read} tokens of an answer "
            f"and runs {behavior.n_read - 1}; perturb no more than these, or read more of a "
            "generated answer (n_forced)"
        )
    placed = Placed(
        subject=SubjectSpec.model_validate(fields["subject"]),
        ignorant=SubjectSpec.model_validate(fields["ignorant"]) if twin else None,
        fields={
            "seed": fields["seed"],
            "data": Data.model_validate(fields["data"]),
            "recovery": recovery,
            "behavior": behavior,
            "discovery": DISCOVERIES.parse(fields["discovery"]),
            "intervention": INTERVENTIONS.parse(fields["intervention"]),
        },
    )
    _check_twin(study, audit, placed, moved=placed.subject != (audit.subject or study.subject))
    return placed


def _check_twin(study: Study, audit: Audit, placed: Placed, moved: bool) -> None:
    """Raise StudyError where a point takes the subject to sites at which its twin has no SAE."""
    controls = study.controls if audit.controls is None else audit.controls
    if not moved or placed.ignorant is None or "ignorant" not in [c.kind for c in controls]:
        return
    here = [{sae.site for sae in spec.saes} for spec in (placed.subject, placed.ignorant)]
    if here[0] != here[1]:
        raise StudyError(
            f"grid: audit {audit.name!r} comes to SAEs at {', '.join(sorted(here[0]))}, and its "
            f"ignorant twin has them at {', '.join(sorted(here[1]))}; move both in one variant "
            "(`subject.saes` and `ignorant.saes`), or leave out the control 'ignorant'"
        )
