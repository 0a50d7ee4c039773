"""A clamp comes back from its file bit for bit, and does the same on a plain model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from holdfast import SavedClamp, load_clamp, save_clamp
from holdfast.batch import Batch
from holdfast.discovery import with_scale
from holdfast.edits import Capture, Edit, FeatureEdit
from holdfast.errors import (
    DamagedRecordError,
    EditError,
    HoldfastError,
    SAEError,
    StoreError,
    SubjectError,
)
from holdfast.features import FeatureSet
from holdfast.interventions.clamp import Clamp, Condition
from holdfast.interventions.several import Several
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import check_edit, random_sae, tiny_batch, tiny_model, tiny_subject
from holdfast.trial import SAEIdentity, SubjectIdentity
from tests.unit.test_attach import N_NEW, same_tokens
from tests.unit.test_clamps import (
    KINDS,
    POLICIES,
    SITE,
    both,
    chat_prompts,
    claims,
    entry,
    given,
    of_modes,
    of_policies,
    one_site,
    prepared,
    with_sae,
)

LATER = Site(3)
IDENTITY = SubjectIdentity(
    name="tiny",
    weights_sha256="a" * 64,
    dtype="float32",
    attention="sdpa",
    prepend_bos=True,
    saes=tuple(SAEIdentity(site=str(s), sha256=c * 64) for s, c in ((SITE, "b"), (LATER, "c"))),
)
SLICED = [kind for kind in KINDS if KINDS[kind].k is None]


@pytest.fixture(scope="module")
def chats(subject: Subject) -> Batch:
    return chat_prompts(subject)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.clamp.safetensors"


def saved(path: Path, subject: Subject, *edits: Edit) -> SavedClamp:
    save_clamp(path, edits, subject, IDENTITY)
    return load_clamp(path)


def generated(clamp: SavedClamp, model: Any, batch: Batch, **options: Any) -> Tensor:
    """What a model adds to the prompts with the clamp on it."""
    with clamp.on(model, template_tokens=2, **options):
        out = model.generate(
            input_ids=batch.tokens, attention_mask=batch.mask, max_new_tokens=N_NEW,
            do_sample=False,
        )  # fmt: skip
    return out[:, batch.tokens.shape[1] :]


def check_same(one: FeatureEdit, other: FeatureEdit) -> None:
    """Bit for bit, padding included."""
    banks = [(one.bank, other.bank)]
    if one.gate is not None:
        assert other.gate is not None and one.gate.above == other.gate.above
        banks.append((one.gate.bank, other.gate.bank))
    for a, b in banks:
        assert (a.site, a.index, a.ids, a.norm) == (b.site, b.index, b.ids, b.norm)
        for name in ("W_enc", "W_dec", "b_enc", "threshold", "gain", "offset", "valid"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and torch.equal(x, y), name
    assert (one.gate is None) == (other.gate is None)
    same = ("mode", "where", "include_bos", "error_scale", "sae")
    assert all(getattr(one, name) == getattr(other, name) for name in same)
    torch.testing.assert_close(
        torch.as_tensor(one.value), torch.as_tensor(other.value), rtol=0, atol=0
    )


# --- The same clamp again -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SLICED)
@pytest.mark.parametrize("mode", of_modes("saved and attached"))
def test_every_mode_and_sae_comes_back_bit_for_bit(
    subject: Subject, chats: Batch, batch: Batch, path: Path, mode: str, kind: str
) -> None:
    other = with_sae(subject, KINDS[kind])
    edit, _ = both(other, with_scale(other, batch, one_site()), mode)
    clamp = saved(path, other, edit)
    check_same(edit, clamp.edits[0])
    check_edit(clamp.edits[0], batch, 32)
    expected = other.generate(chats, (edit,), N_NEW)
    assert same_tokens(generated(clamp, subject.model, chats), expected)


@pytest.mark.parametrize("include_bos", [False, True])
@pytest.mark.parametrize("policy", of_policies("saved and attached"))
def test_every_policy_comes_back(
    subject: Subject, chats: Batch, path: Path, policy: str, include_bos: bool
) -> None:
    edit, _ = both(subject, one_site(), "set", positions=POLICIES[policy], include_bos=include_bos)
    edit = replace(edit, value=8.0)
    clamp = saved(path, subject, edit)
    check_same(edit, clamp.edits[0])
    got = generated(clamp, subject.model, chats)
    assert same_tokens(got, subject.generate(chats, (edit,), N_NEW))
    assert not same_tokens(got, subject.generate(chats, (), N_NEW))


@pytest.mark.parametrize("term", claims(["keep"], "saved and attached", "error term: {}"))
def test_the_error_term_that_needs_no_sae(
    subject: Subject, chats: Batch, path: Path, term: str
) -> None:
    edit, _ = both(subject, one_site(), "set", error_term=term)
    assert saved(path, subject, edit).edits[0].error_scale == 1.0


@pytest.mark.proves("clamp modes", "conditional", "saved and attached")
@pytest.mark.parametrize("kind", SLICED)
def test_a_condition_comes_back(
    subject: Subject, chats: Batch, path: Path, grouped_features: FeatureSet, kind: str
) -> None:
    other = with_sae(subject, KINDS[kind])
    edit, _ = both(other, one_site(), "set", condition=Condition(feature=7, above=0.1))
    edit = replace(edit, value=-12.0)
    clamp = saved(path, other, edit)
    check_same(edit, clamp.edits[0])
    got = generated(clamp, subject.model, chats)
    assert same_tokens(got, other.generate(chats, (edit,), N_NEW))
    assert not same_tokens(got, other.generate(chats, (replace(edit, gate=None),), N_NEW))


@pytest.mark.parametrize("mode", ["set", "mean", "max_scaled"])
def test_groups_come_back(
    subject: Subject, batch: Batch, path: Path, grouped_features: FeatureSet, mode: str
) -> None:
    features = with_scale(subject, batch, grouped_features)
    edit, _ = both(subject, features, mode, condition=Condition(feature=7, above=0.1))
    clamp = saved(path, subject, edit)
    check_same(edit, clamp.edits[0])
    assert torch.equal(subject.outputs(batch, clamp.edits), subject.outputs(batch, (edit,)))
    own = batch.rows([row for row, group in enumerate(batch.groups) if group == "g1"])
    expected = subject.generate(own, (edit,), N_NEW)
    assert same_tokens(generated(clamp, subject.model, own, group="g1"), expected)
    with pytest.raises(HoldfastError, match="differ by group of prompts"):
        generated(clamp, subject.model, own)


def test_groups_keep_their_order_and_their_shared_features_once(
    subject: Subject, path: Path
) -> None:
    """The order of groups is that of the values' rows, not that of their names."""
    groups = (("z", (5, 9, 1)), ("a", (9,)), ("*", (1, 5)))
    features = FeatureSet(
        entries=tuple(
            entry(*ids, group=group).model_copy(
                update={"mean": tuple(float(10 * g + k) for k in range(len(ids)))}
            )
            for g, (group, ids) in enumerate(groups)
        ),
        source="test",
    )
    (edit,) = Clamp(mode="mean").edits(subject, features)
    clamp = saved(path, subject, edit)
    check_same(edit, clamp.edits[0])  # type: ignore[arg-type]
    assert list(clamp.edits[0].bank.index) == ["z", "a", "*"]
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("0.W_enc").shape == (3, 32), "six places, three features"


def test_columns_that_differ_by_rounding_are_kept_apart(subject: Subject, path: Path) -> None:
    """One feature, folded differently in two groups: neither is replaced by the other."""
    both_groups = FeatureSet(entries=(entry(5, group="g0"), entry(5, group="g1")), source="test")
    bank = FeatureBank.of(subject.sae(SITE), both_groups)
    nudged = bank.b_enc.clone()
    nudged[1] = torch.nextafter(nudged[1], torch.tensor(torch.inf))
    edit = FeatureEdit(replace(bank, b_enc=nudged), "set", 1.0)
    clamp = saved(path, subject, edit)
    check_same(edit, clamp.edits[0])


def test_several_edits_and_sites_come_back_in_their_order(chats: Batch, path: Path) -> None:
    subject = tiny_subject(sites=(SITE, LATER))
    kind = Several(
        of=(
            given("set", 6.0, entry(1, 5)),
            given("multiply", -3.0, entry(5), positions="prompt"),
            given("max_scaled", 4.0, entry(2, 40, site=LATER), positions=(2, 3)),
        )
    )
    edits = prepared(kind, subject, chats, one_site())
    clamp = saved(path, subject, *edits)
    for edit, again in zip(edits, clamp.edits, strict=True):
        check_same(edit, again)  # type: ignore[arg-type]
    got = generated(clamp, subject.model, chats)
    assert same_tokens(got, subject.generate(chats, edits, N_NEW))
    shas = [saved_edit.sae_sha256[0] for saved_edit in clamp.description.edits]
    assert shas == ["b", "b", "c"]


def test_loading_needs_neither_sae_nor_study_nor_any_of_this(
    subject: Subject, chats: Batch, path: Path, tmp_path: Path
) -> None:
    """In another process: a model in a folder, and the file."""
    edit, _ = both(subject, one_site(), "set", positions="generated")
    edit = replace(edit, value=8.0)
    save_clamp(path, (edit,), subject, IDENTITY)
    subject.model.save_pretrained(tmp_path / "model")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
from holdfast import load_clamp
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}).eval()
with load_clamp({str(path)!r}).on(model):
    tokens = torch.tensor({chats.rows([1]).tokens.tolist()})
    out = model.generate(tokens, max_new_tokens={N_NEW}, do_sample=False)
print(out[0, tokens.shape[1]:].tolist())
assert not [name for name in sys.modules if name.startswith(("sae_lens", "pandas"))]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = subject.generate(chats.rows([1]), (edit,), N_NEW)
    assert same_tokens(torch.tensor([json.loads(done.stdout.splitlines()[-1])]), expected)


# --- What the file says ---------------------------------------------------------------------------


def entry_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["holdfast.clamp"])
    return found


def test_the_file_says_what_it_is(subject: Subject, path: Path) -> None:
    edit, _ = both(
        subject, one_site(), "add", positions=(2, 9), condition=Condition(feature=7, above=0.5)
    )
    save_clamp(path, (edit,), subject, IDENTITY, origin={"study": "demo", "audit": "ioi"})
    told = entry_of(path)["clamp"]
    assert told["schema"] == 1 and told["holdfast"]
    assert told["model"] == {
        "name": "tiny", "model_type": "llama", "d_model": 32, "n_blocks": 3, "dtype": "float32",
        "weights_sha256": "a" * 64, "quantization": None, "prepend_bos": True,
    }  # fmt: skip
    assert told["edits"] == [
        {
            "site": "blocks.1.hook_resid_post", "sae_sha256": "b" * 64, "mode": "add", "value": 2.0,
            "features": [{"group": "*", "ids": [1, 5, 9, 30]}], "inputs": None,
            "positions": [2, 9], "include_bos": False, "condition": {"feature": 7, "above": 0.5},
        }
    ]  # fmt: skip
    assert told["origin"] == {"study": "demo", "audit": "ioi"}
    assert load_clamp(path).description.canonical() == told


def test_the_file_is_small_and_the_same_each_time(subject: Subject, tmp_path: Path) -> None:
    edit, _ = both(subject, one_site(), "set")
    one, two = (save_clamp(tmp_path / name, (edit,), subject, IDENTITY) for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    slices = 4 * (2 * 32 + 4) * 4  # four features, each a column, a row and four numbers
    assert slices < one.stat().st_size < slices + 2500
    # nothing of where it was made
    assert str(tmp_path).encode() not in one.read_bytes()


def test_a_file_is_written_over_by_itself_alone(subject: Subject, path: Path) -> None:
    edit, _ = both(subject, one_site(), "set")
    save_clamp(path, (edit,), subject, IDENTITY)
    save_clamp(path, (edit,), subject, IDENTITY)
    with pytest.raises(StoreError, match=r"some\.clamp\.safetensors exists and is another clamp"):
        save_clamp(path, (replace(edit, value=1.0),), subject, IDENTITY)
    check_same(edit, load_clamp(path).edits[0])
    with pytest.raises(StoreError, match="exists and is another"):
        save_clamp(path.parent, (edit,), subject, IDENTITY)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no litter"


# --- What cannot be saved -------------------------------------------------------------------------


def test_what_slices_do_not_determine_is_refused(subject: Subject, path: Path) -> None:
    topk = with_sae(subject, KINDS["topk"])
    dropped, _ = both(subject, one_site(), "set", error_term="drop")
    needs_all, _ = both(topk, one_site(), "set")
    sliced, _ = both(subject, one_site(), "set")
    gate, _ = both(topk, one_site(), "set", condition=Condition(feature=7))
    for edit, why in (
        (dropped, "it passes on 0 of the SAE's error, which needs the whole SAE"),
        (needs_all, "which features of a TopK SAE are on depends on all of them"),
        (replace(sliced, gate=gate.gate), "depends on all features of its TopK SAE"),
        (Capture(SITE), "is a Capture; a clamp's file holds changes of features"),
    ):
        with pytest.raises(EditError, match=rf"edit 1 .*{why}"):
            save_clamp(path, (sliced, edit), subject, IDENTITY)
    with pytest.raises(EditError, match="no edit to save"):
        save_clamp(path, (), subject, IDENTITY)
    assert not path.exists()


def test_features_of_an_sae_that_is_not_named_are_refused(path: Path) -> None:
    subject = tiny_subject(sites=(Site(1),))
    edits = Clamp(mode="set", value=1.0).edits(subject, one_site(site=Site(1)))
    with pytest.raises(SAEError, match=r"edit 0 clamps features at blocks\.0.*names SAEs at"):
        save_clamp(path, edits, subject, IDENTITY)


# --- What cannot be loaded ------------------------------------------------------------------------


def test_every_changed_byte_is_seen(subject: Subject, batch: Batch, path: Path) -> None:
    features = with_scale(subject, batch, one_site((1, 5)))
    edit, _ = both(subject, features, "mean", condition=Condition(feature=7))
    save_clamp(path, (edit,), subject, IDENTITY)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 3), *range(header, len(whole), 41), len(whole) - 1]
    for place in places:
        for flipped in (0x01, 0x80):
            changed = bytearray(whole)
            changed[place] ^= flipped
            path.write_bytes(changed)
            with pytest.raises(StoreError, match=r"some\.clamp\.safetensors"):
                load_clamp(path)
    for length in (0, 5, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedRecordError, match=r"some\.clamp\.safetensors"):
            load_clamp(path)
    path.write_bytes(whole)
    check_same(edit, load_clamp(path).edits[0])


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """The file with its entry and tensors changed, as somebody else would write it."""
    told = entry_of(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(told, tensors)
    save_file(tensors, path, metadata={"holdfast.clamp": json.dumps(told)})


def test_a_changed_meaning_is_seen(subject: Subject, path: Path) -> None:
    edit, _ = both(subject, one_site(), "set")

    def other_value(told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        told["clamp"]["edits"][0]["value"] = 3.0

    def other_tensor(told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["0.W_dec"][0, 0] = torch.nextafter(tensors["0.W_dec"][0, 0], torch.tensor(9.0))

    def other_name(told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["0.W_enc"], tensors["0.W_dec"] = tensors["0.W_dec"], tensors["0.W_enc"]

    def other_type(told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["0.slots"] = tensors["0.slots"].view(torch.float32)

    def one_more(told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["0.value"] = torch.ones(1, 4)

    def not_a_hash(told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        told["sha256"] = None

    def no_entry(told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del told["clamp"]

    def not_finite(told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        told["clamp"]["edits"][0]["value"] = float("nan")

    for change in (
        other_value, other_tensor, other_name, other_type, one_more, not_a_hash, no_entry,
        not_finite,
    ):  # fmt: skip
        path.unlink(missing_ok=True)
        save_clamp(path, (edit,), subject, IDENTITY)
        rewritten(path, change)
        with pytest.raises(DamagedRecordError, match=r"some\.clamp\.safetensors"):
            load_clamp(path)
    path.unlink()
    save_clamp(path, (edit,), subject, IDENTITY)
    rewritten(path, lambda told, tensors: None)
    check_same(edit, load_clamp(path).edits[0])  # written by other hands, and the same


def test_a_file_of_another_version_is_refused(
    subject: Subject, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hash that is right: it is sound, and not understood."""
    from holdfast import clamp_file

    edit, _ = both(subject, one_site(), "set")

    def schema(told: dict[str, Any]) -> None:
        told["schema"] = 2

    def key(told: dict[str, Any]) -> None:
        told["edits"][0]["per_head"] = True

    def mode(told: dict[str, Any]) -> None:
        told["edits"][0]["mode"] = "rotate"

    def value(told: dict[str, Any]) -> None:
        told["edits"][0]["value"] = None  # and no tensor has it

    for change in (schema, key, mode, value):
        path.unlink(missing_ok=True)
        save_clamp(path, (edit,), subject, IDENTITY)

        def hashed(
            told: dict[str, Any],
            tensors: dict[str, Tensor],
            change: Callable[[dict[str, Any]], None] = change,
        ) -> None:
            change(told["clamp"])
            told["sha256"] = clamp_file._sha256(told["clamp"], tensors)

        rewritten(path, hashed)
        with pytest.raises(StoreError, match=r"some\.clamp\.safetensors: written by another ver"):
            load_clamp(path)


def test_other_files_are_refused_by_name(path: Path) -> None:
    with pytest.raises(StoreError, match=r"no clamp at .*some\.clamp\.safetensors"):
        load_clamp(path)
    with pytest.raises(StoreError, match="no clamp at"):
        load_clamp(path.parent)
    save_file({"W": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(StoreError, match=r"without a clamp: expected .* found \['format'\]"):
        load_clamp(path)
    path.write_bytes(b"not at all")
    with pytest.raises(DamagedRecordError, match="no safetensors file, or damaged"):
        load_clamp(path)


# --- On another model -----------------------------------------------------------------------------


def test_another_models_shape_is_refused(subject: Subject, path: Path) -> None:
    edit, _ = both(subject, one_site(), "set")
    clamp = saved(path, subject, edit)
    from tests import families

    made_for = r"a clamp for tiny \(llama with d_model 32 and 3 blocks\)"
    for model, found in (
        (tiny_model(d_model=64), "llama with d_model 64 and 3 blocks"),
        (tiny_model(n_layers=4), "llama with d_model 32 and 4 blocks"),
        (families.family_subject("gpt2", "sdpa").model, "gpt2 with d_model 32 and 4 blocks"),
    ):
        with pytest.raises(SubjectError, match=rf"{made_for}.* the model given is {found}"):
            clamp.on(model)  # type: ignore[arg-type]
    with pytest.raises(SubjectError, match=r"is not in holdfast\.families"):
        odd: Any = tiny_model()
        odd.config.model_type = "mamba"
        clamp.on(odd)


def test_a_gated_saes_magnitudes_come_back(subject: Subject, batch: Batch, path: Path) -> None:
    other = with_sae(subject, KINDS["gated"])
    edit, _ = both(other, one_site(), "multiply")
    assert (edit.bank.gain != 1).all() and (edit.bank.offset != 0).all()
    clamp = saved(path, other, edit)
    got = subject.outputs(batch, clamp.edits)
    assert torch.equal(got, subject.outputs(batch, (edit,)))


def test_a_wide_sae_leaves_no_trace_of_its_width(path: Path) -> None:
    subject = tiny_subject()
    wide = with_sae(subject, random_sae(SITE, n_features=4096))
    edit, _ = both(wide, one_site((4000, 1)), "set")
    save_clamp(path, (edit,), wide, IDENTITY)
    assert path.stat().st_size < 4000
    batch = tiny_batch(subject, 3)
    assert torch.equal(subject.outputs(batch, load_clamp(path).edits), wide.outputs(batch, (edit,)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_file_goes_where_the_model_is(chats: Batch, path: Path) -> None:
    subject = tiny_subject(sites=(SITE, LATER))
    kind = Several(
        of=(
            given("mean", None, entry(1, 5), condition=Condition(feature=7, above=0.1)),
            given("set", 8.0, entry(2, 40, site=LATER), positions="generated"),
        )
    )
    edits = prepared(kind, subject, chats, one_site())
    clamp = saved(path, subject, *edits)
    model: Any = tiny_model().to("cuda")  # type: ignore[attr-defined]
    got = generated(clamp, model, chats.to("cuda"))
    assert same_tokens(got.cpu(), subject.generate(chats, edits, N_NEW))
    assert clamp.edits[0].bank.W_enc.device.type == "cpu", "what was loaded stays where it was"
