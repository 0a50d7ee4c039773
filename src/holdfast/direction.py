"""The linear baseline: a direction in an SAE's place, so that it is clamped and audited like one.

The refusal direction of METHODS M.1 is a difference in means: the residual at the last token of
prompts that are refused, minus that of others. Ablating it is `h − (h·r̂)r̂`, adding it steers. As
the files of an SAE whose features are `relu(±h·q)` for an orthonormal basis q with r̂ first, both
are clamps of features 0 and 1 (r̂ and −r̂): `set` to 0 at all positions ablates, `add` to feature 0
steers. A recovery that holds them is orthogonal to r̂ (`encoder_null`), one under `unconstrained` is
not, and random features are other directions of the basis. No SAE is trained, and none is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from holdfast.batch import Batch
from holdfast.edits import CaptureAt
from holdfast.errors import StoreError, StudyError
from holdfast.executor import Runtime, load_lab, threads_for
from holdfast.export import trial_of
from holdfast.planning import Plan
from holdfast.saes.formats.saelens import CONFIG, WEIGHTS
from holdfast.sites import Site
from holdfast.subject import Subject

FEATURES = (0, 1)
"""r̂ and −r̂ among the features that are written."""

TOLD_APART = 1e-4
"""Least length of a difference in means, relative to the means, that is a direction."""


@dataclass(frozen=True)
class Written:
    """The folders of a direction, one a site. lengths: of the difference in means there, relative
    to the mean norm of the residuals; n_with, n_without: prompts it was measured on."""

    folders: Mapping[Site, Path]
    lengths: Mapping[Site, float]
    n_with: int
    n_without: int

    def toml(self) -> str:
        """What to put into a study: SAEs, and the features to clamp."""
        lines = []
        for site, folder in self.folders.items():
            source = f'{{ kind = "folder", path = {json.dumps(str(folder))} }}'
            lines += ["[[subject.saes]]", f'site   = "{site}"', f"source = {source}"]
        ids = list(FEATURES)
        named = ", ".join(f'{{ site = "{site}", ids = {ids} }}' for site in self.folders)
        lines += [
            f'discovery    = {{ kind = "given", features = [{named}] }}',
            'intervention = { kind = "clamp", mode = "set", value = 0.0, positions = "all" }',
        ]
        return "\n".join(lines)


def write_direction(
    plan: Plan,
    audit: str | None,
    out: Path,
    runtime: Runtime,
    sites: Sequence[Site] = (),
    measured_at: Site | None = None,
) -> Written:
    """Measure an audit's direction on its fit split and write it as an SAE's files, site by site.

    sites: after every block if none is named. measured_at: the one site whose direction is written
    for all of them, as published; every site's own if it is left out. Prompts of the fit split
    stand against the behavior's neighbors there, or its opposed prompts where it has no neighbors;
    test prompts are never seen.

    Raises StudyError where there is nothing to stand against them, or no difference, StoreError if
    the folder exists.
    """
    if out.exists():
        raise StoreError(f"{out} exists: a direction is written to a folder of its own")
    trial = trial_of(plan, audit)
    lab = load_lab(plan, [trial], runtime)
    subject, behavior, n = lab.subject(trial.subject), trial.behavior, trial.data.fit
    fit = behavior.examples(subject.tokenizer, "fit", n, trial.seed)
    beside = behavior.neighbors(subject.tokenizer, "fit", n, trial.seed)
    others = [example for own in beside.values() for example in own]
    others = others or behavior.opposed(subject.tokenizer, "fit", n, trial.seed)
    if not others:
        raise StudyError(
            f"audit {trial.audit!r}: a difference in means needs prompts to stand against those of "
            f"the fit split, and the behavior {behavior.kind!r} names none here (refusal: `benign`)"
        )
    places = tuple(sites) or tuple(Site(depth) for depth in range(1, subject.n_blocks + 1))
    with threads_for(lab, runtime):
        found = difference_in_means(
            subject, subject.batch(fit), subject.batch(others),
            places if measured_at is None else (measured_at,),
        )  # fmt: skip
    if measured_at is not None:
        found = dict.fromkeys(places, found[measured_at])
    folders = {}
    for site, (direction, length) in found.items():
        if not length > TOLD_APART:
            raise StudyError(
                f"audit {trial.audit!r}: at {site} the two sets of prompts have the same mean "
                f"(difference {length:.1e} of its norm): they are the same prompts, or end alike "
                "where nothing before them is read; name others, or a later site"
            )
        folders[site] = out / str(site)
        save_direction(folders[site], site, direction)
    lengths = {site: length for site, (_, length) in found.items()}
    return Written(folders, lengths, len(fit), len(others))


def difference_in_means(
    subject: Subject, present: Batch, absent: Batch, sites: Sequence[Site]
) -> dict[Site, tuple[Tensor, float]]:
    """Site → (direction [d_model], its length relative to the mean norm of both sets' residuals):
    mean residual at the last prompt token of `present` minus that of `absent`, nothing clamped."""
    last = {True: _last(subject, present, sites), False: _last(subject, absent, sites)}
    found = {}
    for site in sites:
        own, other = last[True][site], last[False][site]
        direction = own.mean(0) - other.mean(0)
        scale = torch.cat([own, other]).norm(dim=1).mean()
        found[site] = (direction, float(direction.norm() / scale))
    return found


def _last(subject: Subject, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Site → [b d_model] float64: the residual at the last prompt token."""
    at = batch.prompt_length[:, None] - 1
    reads = [CaptureAt(site, batch.ids, at) for site in sites]
    subject.outputs(batch, reads)
    return {read.site: read.read[:, 0].double() for read in reads}


def basis_of(direction: Tensor) -> Tensor:
    """[d d] float64, orthonormal columns, the first along `direction` [d]: the Householder
    reflection that takes the first axis there."""
    unit = direction.double() / direction.double().norm()
    mirror = unit.clone()
    # Of the two reflections the one without cancellation; the sign is put back below.
    sign = 1.0 if unit[0] <= 0 else -1.0
    mirror[0] -= sign
    mirror = mirror / mirror.norm()
    reflection = torch.eye(len(unit), dtype=torch.float64, device=unit.device)
    reflection = reflection - 2 * torch.outer(mirror, mirror)
    reflection[:, 0] *= sign
    return reflection


def save_direction(folder: Path, site: Site, direction: Tensor) -> None:
    """Write a direction [d_model] as the SAELens folder of an SAE with 2·d_model features.

    Features 2i and 2i + 1 are `relu(h·q_i)` and `relu(−h·q_i)`, decoded along q_i and −q_i: the
    reconstruction is h itself, so that clamps keep no error and change nothing but what they name.
    """
    basis = basis_of(direction).cpu()
    rows = torch.stack([basis.T, -basis.T], 1).flatten(0, 1).float().contiguous()  # [2d d]
    n_features, d_model = rows.shape
    folder.mkdir(parents=True)
    save_file(
        {
            "W_enc": rows.T.contiguous(), "W_dec": rows, "b_enc": torch.zeros(n_features),
            "b_dec": torch.zeros(d_model),
        },
        folder / WEIGHTS,
    )  # fmt: skip
    said = {
        "architecture": "standard", "d_in": d_model, "d_sae": n_features, "dtype": "float32",
        "normalize_activations": "none", "apply_b_dec_to_input": False,
        "reshape_activations": "none", "metadata": {"hook_name": str(site)},
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
