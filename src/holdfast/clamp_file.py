"""A clamp in a file of its own: it runs on a plain transformers model, without SAE or study.

One safetensors file. Its tensors are the columns and rows of the clamped features, each once; its
one metadata entry is canonical JSON that says what they are, with a hash over all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from holdfast.atomic import write_atomic
from holdfast.canonical import canonical_json
from holdfast.config import Config
from holdfast.edits import MODES, Edit, FeatureEdit
from holdfast.errors import DamagedRecordError, EditError, SAEError, StoreError, SubjectError
from holdfast.families import d_model_of, family_of
from holdfast.features import EVERY_GROUP
from holdfast.gates import Gate
from holdfast.hooks import attached
from holdfast.positions import Where
from holdfast.saes.bank import FeatureBank
from holdfast.saes.inputs import Inputs
from holdfast.sites import Site
from holdfast.subject import Subject, _device_of
from holdfast.trial import SubjectIdentity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENTRY = "holdfast.clamp"
_BANK = ("W_enc", "W_dec", "b_enc", "threshold", "gain", "offset")


class SavedModel(Config):
    """The model a clamp was made for. The hash is over its files, which a model at hand has not."""

    name: str
    model_type: str
    d_model: int
    n_blocks: int
    weights_sha256: str
    dtype: str
    quantization: str | None
    prepend_bos: bool


class SavedFeatures(Config):
    """The features of one group of prompts, `*` for every other."""

    group: str
    ids: tuple[int, ...]


class SavedInputs(Config):
    """What happens to each token's residual before it is encoded, where that is not affine."""

    center: bool
    scale: float
    norm: Literal["layer_norm", "constant_norm_rescale"]


class SavedCondition(Config):
    """The feature that has to exceed a value."""

    feature: int
    above: float


class SavedEdit(Config):
    """One edit of a clamp, but for its tensors. value: None where each feature has its own."""

    site: str
    sae_sha256: str
    features: tuple[SavedFeatures, ...] = Field(min_length=1)
    inputs: SavedInputs | None
    mode: str
    value: float | None
    positions: Where
    include_bos: bool
    condition: SavedCondition | None


class ClampDescription(Config):
    """What a clamp's file says. origin: where the clamp came from, in its maker's words."""

    schema_: Literal[1] = Field(1, alias="schema")
    holdfast: str
    model: SavedModel
    edits: tuple[SavedEdit, ...] = Field(min_length=1)
    origin: dict[str, Any]

    def canonical(self) -> dict[str, Any]:
        """As plain JSON types."""
        return self.model_dump(mode="json", by_alias=True)


@dataclass(frozen=True)
class SavedClamp:
    """A clamp read from a file: edits like any other, and what they were made for."""

    path: Path
    description: ClampDescription
    edits: tuple[FeatureEdit, ...] = field(repr=False)

    def on(
        self, model: PreTrainedModel, group: str | None = None, template_tokens: int | None = None
    ) -> AbstractContextManager[None]:
        """The clamp on a plain transformers model inside a `with` block, see `attached`.

        Raises SubjectError if the model is of another family, width or depth than the one it was
        made for. Whether the weights are the same cannot be seen on a loaded model.
        """
        self.check_fits(model)
        blocks = family_of(model.config, model).blocks_of(model)
        placed = [_to(e, _device_of(blocks[max(e.bank.site.layer, 0)])) for e in self.edits]
        return attached(model, placed, group, template_tokens)

    def check_fits(self, model: PreTrainedModel) -> None:
        """Raise SubjectError saying what model was expected and what was found."""
        made_for = self.description.model
        expected = (made_for.model_type, made_for.d_model, made_for.n_blocks)
        n_blocks = len(family_of(model.config, model).blocks_of(model))
        found = (model.config.model_type, d_model_of(model.config), n_blocks)
        if found != expected:
            told = "{} with d_model {} and {} blocks"
            raise SubjectError(
                f"{self.path} holds a clamp for {made_for.name} ({told.format(*expected)}), and "
                f"the model given is {told.format(*found)}; load the model it was made for"
            )


def save_clamp(
    path: Path | str,
    edits: Sequence[Edit],
    subject: Subject,
    identity: SubjectIdentity,
    origin: dict[str, Any] | None = None,
) -> Path:
    """Write edits that were made for `subject` to a file of their own, and return its path.

    identity: names and hashes, what `identify` says of the subject's spec; origin: anything worth
    knowing later, as JSON. The same clamp gives the same bytes. Raises EditError for what slices of
    an SAE do not determine: TopK SAEs and a dropped or scaled error term; StoreError if the file
    exists and holds something else.
    """
    saes = {Site.parse(sae.site): sae.sha256 for sae in identity.saes}
    saved: list[SavedEdit] = []
    tensors: dict[str, Tensor] = {}
    for index, edit in enumerate(edits):
        checked = _saveable(edit, index)
        if checked.bank.site not in saes:
            raise SAEError(
                f"edit {index} clamps features at {checked.bank.site}, and the subject's identity "
                f"names SAEs at {', '.join(map(str, saes))}"
            )
        saved.append(_describe(checked, saes[checked.bank.site]))
        tensors |= {f"{index}.{name}": t for name, t in _tensors(checked).items()}
    if not saved:
        raise EditError("there is no edit to save")
    description = ClampDescription(
        holdfast=version("holdfast"),
        model=SavedModel(
            name=identity.name,
            model_type=subject.model.config.model_type,
            d_model=subject.d_model,
            n_blocks=subject.n_blocks,
            weights_sha256=identity.weights_sha256,
            dtype=identity.dtype,
            quantization=identity.quantization,
            prepend_bos=identity.prepend_bos,
        ),
        edits=tuple(saved),
        origin=origin or {},
    )
    told = description.canonical()
    entry = canonical_json({"clamp": told, "sha256": _sha256(told, tensors)})
    data, path = save(tensors, metadata={_ENTRY: entry}), Path(path)
    if path.exists() and not (path.is_file() and path.read_bytes() == data):
        raise StoreError(f"{path} exists and is another clamp, or none; remove it, or name another")
    write_atomic(path, data)
    return path


def load_clamp(path: Path | str) -> SavedClamp:
    """Read a clamp. Needs neither SAE nor study.

    Raises StoreError where there is none, DamagedRecordError if the file is not what was written.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"no clamp at {path}; `holdfast export` writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedRecordError(f"{path} is no safetensors file, or damaged: {error}") from None
    if _ENTRY not in metadata:
        raise StoreError(
            f"{path} is a safetensors file without a clamp: expected a metadata entry {_ENTRY!r}, "
            f"found {sorted(metadata)}"
        )
    try:
        entry = json.loads(metadata[_ENTRY])
        told, sha256 = entry["clamp"], entry["sha256"]
        sound = _sha256(told, tensors) == sha256
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedRecordError(f"{path}: its metadata cannot be read: {error}") from None
    if not sound:
        raise DamagedRecordError(
            f"{path} was changed since it was written: tensors and metadata do not give the hash "
            f"{str(sha256)[:16]}… that it holds; export the clamp again"
        )
    try:
        description = ClampDescription.model_validate(told)
        edits = tuple(_edit(e, i, tensors) for i, e in enumerate(description.edits))
    except (ValidationError, KeyError, IndexError) as error:
        raise StoreError(f"{path}: written by another version of holdfast: {error}") from None
    return SavedClamp(path, description, edits)


def _saveable(edit: Edit, index: int) -> FeatureEdit:
    """The edit, if slices of its SAE are all it needs. Raises EditError saying what else."""
    if not isinstance(edit, FeatureEdit):
        raise EditError(
            f"edit {index} is a {type(edit).__name__}; a clamp's file holds changes of features"
        )
    why = ""
    if edit.error_scale != 1.0:
        why = f"it passes on {edit.error_scale:g} of the SAE's error, which needs the whole SAE"
    elif edit.bank.rivals is not None:
        why = "which features of a TopK SAE are on depends on all of them"
    elif edit.decides_on:
        why = f"a file has no place for {edit.decides_on}"
    elif isinstance(edit.gate, Gate) and edit.gate.bank.rivals is not None:
        why = "whether its condition's feature is on depends on all features of its TopK SAE"
    elif isinstance(edit.gate, Gate) and edit.gate.bank.index.keys() != {EVERY_GROUP}:
        why = "its condition differs by group of prompts"
    if why:
        raise EditError(
            f"edit {index} at {edit.bank.site} cannot be saved by itself: {why}; keep the study "
            "and its SAE, and attach its edits instead"
        )
    return edit


def _describe(edit: FeatureEdit, sae_sha256: str) -> SavedEdit:
    bank, gate = edit.bank, edit.gate
    labels = sorted(bank.index, key=bank.index.__getitem__)
    return SavedEdit(
        site=str(bank.site),
        sae_sha256=sae_sha256,
        features=tuple(
            SavedFeatures(group=group, ids=ids) for group, ids in zip(labels, bank.ids, strict=True)
        ),
        inputs=None if bank.norm is None else SavedInputs(**vars(bank.norm)),
        mode=edit.mode,
        value=None if isinstance(edit.value, Tensor) else edit.value,
        positions=edit.where,
        include_bos=edit.include_bos,
        condition=SavedCondition(feature=gate.bank.ids[0][0], above=gate.above)
        if isinstance(gate, Gate)
        else None,
    )


def _tensors(edit: FeatureEdit) -> dict[str, Tensor]:
    """W_enc [n d], W_dec [n d], vectors [n] of different features; slots [g k], -1 for padding.

    slots: which of the n stands where in the bank. Groups share features, so each is kept once;
    compared by content, so that the bank comes back bit for bit.
    """
    out = _columns(edit.bank)
    if isinstance(edit.value, Tensor):
        out["value"] = edit.value.detach().cpu().contiguous()
    if isinstance(edit.gate, Gate):
        out |= {f"condition.{name}": t for name, t in _columns(edit.gate.bank).items()}
    return out


def _columns(bank: FeatureBank) -> dict[str, Tensor]:
    bank = bank.to("cpu")
    known: dict[bytes, int] = {}
    kept: list[list[Tensor]] = []
    slots = torch.full(bank.valid.shape, -1, dtype=torch.int32)
    for g, k in bank.valid.nonzero().tolist():
        own = [bank.W_enc[g, :, k], bank.W_dec[g, k], *(getattr(bank, n)[g, k] for n in _BANK[2:])]
        content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in own)
        if content not in known:
            known[content] = len(kept)
            kept.append(own)
        slots[g, k] = known[content]
    columns = (torch.stack(column) for column in zip(*kept, strict=True))
    return {**dict(zip(_BANK, columns, strict=True)), "slots": slots}


def _edit(saved: SavedEdit, index: int, tensors: dict[str, Tensor]) -> FeatureEdit:
    """The edit of a description and its tensors. Raises KeyError if one is missing."""
    own = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{index}.")}
    if saved.mode not in MODES:
        raise KeyError(f"no mode {saved.mode!r}")
    site = Site.parse(saved.site)
    norm = None if saved.inputs is None else Inputs(**saved.inputs.model_dump())
    gate = None
    if saved.condition is not None:
        only = (SavedFeatures(group=EVERY_GROUP, ids=(saved.condition.feature,)),)
        bank = _bank(site, only, norm, {n: own[f"condition.{n}"] for n in (*_BANK, "slots")})
        gate = Gate(bank, saved.condition.above)
    return FeatureEdit(
        bank=_bank(site, saved.features, norm, own),
        mode=saved.mode,
        value=own["value"] if saved.value is None else saved.value,
        where=saved.positions,
        include_bos=saved.include_bos,
        gate=gate,
    )


def _bank(
    site: Site, features: tuple[SavedFeatures, ...], norm: Inputs | None, own: dict[str, Tensor]
) -> FeatureBank:
    """The bank that `_columns` was given."""
    slots = own["slots"].long()
    valid = slots >= 0

    def placed(name: str, padding: float) -> Tensor:
        column = own[name][slots.clamp_min(0)]
        mask = valid if column.ndim == 2 else valid[..., None]
        return torch.where(mask, column, padding)

    return FeatureBank(
        site=site,
        index={entry.group: row for row, entry in enumerate(features)},
        ids=tuple(entry.ids for entry in features),
        W_enc=placed("W_enc", 0.0).transpose(1, 2).contiguous(),
        W_dec=placed("W_dec", 0.0),
        b_enc=placed("b_enc", 0.0),
        threshold=placed("threshold", torch.inf),
        gain=placed("gain", 1.0),
        offset=placed("offset", 0.0),
        valid=valid,
        norm=norm,
    )


def _to(edit: FeatureEdit, device: torch.device) -> FeatureEdit:
    value = edit.value.to(device) if isinstance(edit.value, Tensor) else edit.value
    gate = edit.gate and edit.gate.to(device)
    return replace(edit, bank=edit.bank.to(device), value=value, gate=gate)


def _sha256(told: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Over the description and every tensor's name, type, shape and bytes."""
    hashed = hashlib.sha256(canonical_json(told).encode("ascii"))
    for name in sorted(tensors):
        tensor = tensors[name]
        hashed.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()
