"""A run's folder survives crashes, tampering and a second process; identities are canonical."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.atomic import write_atomic
from holdfast.canonical import SCHEMA, canonical_json, digest, sha256_file, sha256_tree, trial_id
from holdfast.errors import DamagedRecordError, ForeignRunError, RunLockedError, StoreError
from holdfast.store import RunFolder
from holdfast.strict_json import json_safe

STUDY = {"name": "demo", "seed": 0, "audits": [{"name": "ioi", "value": -5.0}]}
TEXT = 'name = "demo"  # with a comment\n'
ROWS = [
    {"id": "ioi/0", "clean": 1.5, "norm": 0.25, "text": "Anna", "tokens": [1, 2]},
    {"id": "ioi/1", "clean": math.nan, "norm": math.inf, "text": None, "tokens": []},
]


def make_record(number: int = 0, **changes: Any) -> dict[str, Any]:
    trial = {"audit": "ioi", "number": number, "budget": {"relative": 0.25}}
    record = {
        "schema": SCHEMA,
        "id": trial_id(trial),
        "trial": trial,
        "result": {"funnel": {"tried": 2}, "outcome": "recovered", "rate": math.nan},
        "run": {"seconds": 4.2, "device": "cpu"},
    }
    return record | changes


def make_tensors() -> dict[str, torch.Tensor]:
    delta = torch.arange(12, dtype=torch.float32).reshape(2, 3, 2)
    return {"delta": delta, "half": delta.to(torch.bfloat16), "view": delta.transpose(0, 1)}


def new_run(path: Path) -> RunFolder:
    return RunFolder.open(path, STUDY, TEXT)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with new_run(tmp_path / "runs" / "demo") as folder:
        yield folder


@pytest.fixture
def finished(run: RunFolder) -> tuple[RunFolder, str, Path]:
    """A run with one finished trial: the run, the trial's id, and its folder."""
    record = run.write(make_record(), make_tensors(), ROWS)
    return run, record["id"], run.path / "trials" / record["id"]


# --- Writing and reading --------------------------------------------------------------------------


def test_what_is_written_is_read_back(finished: tuple[RunFolder, str, Path]) -> None:
    run, trial, folder = finished
    assert run.has(trial)
    record = run.load(trial)
    assert record["result"]["rate"] is None  # NaN, not scored
    assert list(record) == ["schema", "id", "trial", "result", "artifacts", "run"]
    assert record["artifacts"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("perturbation.safetensors", "examples.parquet")
    }
    tensors = run.tensors(trial)
    for name, tensor in make_tensors().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    rows = run.examples(trial)
    assert rows[0] == ROWS[0]
    assert math.isnan(rows[1]["clean"])
    assert rows[1]["norm"] == math.inf
    assert rows[1]["text"] is None


def test_write_returns_what_load_gives(run: RunFolder) -> None:
    written = run.write(make_record(), {}, [])
    assert run.load(written["id"]) == written
    assert run.tensors(written["id"]) == {}
    assert run.examples(written["id"]) == []


def test_the_folder_is_laid_out_as_documented(finished: tuple[RunFolder, str, Path]) -> None:
    run, trial, _ = finished
    run.write_summary({"schema": 1, "complete": True, "rate": math.nan})
    files = {p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file()}
    assert files == {
        "study.toml",
        "study.json",
        "lock",
        "summary.json",
        f"trials/{trial}/perturbation.safetensors",
        f"trials/{trial}/examples.parquet",
        f"trials/{trial}/record.json",
    }
    assert (run.path / "study.toml").read_text() == TEXT
    assert json.loads((run.path / "summary.json").read_text())["rate"] is None


def test_records_are_all_finished_trials_in_order(run: RunFolder) -> None:
    ids = [run.write(make_record(number), {}, [])["id"] for number in range(5)]
    (run.path / "trials" / "0123456789abcdef").mkdir()  # unfinished
    assert [record["id"] for record in run.records()] == sorted(ids)


def test_a_finished_trial_is_not_overwritten(finished: tuple[RunFolder, str, Path]) -> None:
    run, trial, _ = finished
    before = run.load(trial)
    with pytest.raises(StoreError, match="never overwritten"):
        run.write(make_record(run={"seconds": 9.0}), {}, [])
    assert run.load(trial) == before


def test_a_record_must_be_that_of_its_trial(run: RunFolder) -> None:
    with pytest.raises(StoreError, match="hashes to"):
        run.write(make_record(id="0123456789abcdef"), {}, [])
    with pytest.raises(StoreError, match="schema 99"):
        run.write(make_record(schema=99), {}, [])
    with pytest.raises(StoreError, match="16 hex digits"):
        run.write(make_record(id="../../elsewhere"), {}, [])
    with pytest.raises(StoreError, match="expected the keys"):
        run.write(make_record(note="hm"), {}, [])
    with pytest.raises(ValueError, match=r"\$\.result\.rate"):
        run.write(make_record(result={"rate": math.inf}), {}, [])
    assert run.records() == []


def test_examples_of_different_columns_are_refused(run: RunFolder) -> None:
    with pytest.raises(StoreError, match="row 1 has other columns than row 0: b"):
        run.write(make_record(), {}, [{"a": 1}, {"a": 1, "b": 2}])


# --- Damage ---------------------------------------------------------------------------------------


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damage_is_found_and_the_message_says_what_to_do(
    finished: tuple[RunFolder, str, Path],
) -> None:
    run, trial, folder = finished
    file = folder / "record.json"
    sound = file.read_text()

    def expect(what: str) -> None:
        with pytest.raises(DamagedRecordError, match=what) as error:
            run.load(trial)
        assert str(file) in str(error.value)
        assert f"Remove {folder}" in str(error.value)
        with pytest.raises(DamagedRecordError):
            run.records()
        file.write_text(sound)

    file.write_text("not JSON")
    expect("no JSON")
    file.write_text(sound[: len(sound) // 2])
    expect("no JSON")
    file.write_text("")
    expect("no JSON")
    file.write_bytes(b"\xff\xfe\x00")
    expect("no JSON")
    file.write_text(sound.replace("4.2", "NaN"))
    expect("no JSON")
    file.write_text(sound.replace("0.25", "1e999"))
    expect("no JSON")
    file.write_text("[]")
    expect("expected the keys")
    rewrite(file, schema=SCHEMA + 1)
    expect("schema 2")
    rewrite(file, id="0123456789abcdef")
    expect("0123456789abcdef")
    rewrite(file, trial={"audit": "another"})
    expect("hashes to")
    rewrite(file, artifacts={"../study.json": "0"})
    expect("expected artifacts")
    assert run.load(trial)


def test_a_record_moved_to_another_trials_folder_is_found(
    finished: tuple[RunFolder, str, Path],
) -> None:
    run, _, folder = finished
    folder.rename(folder.with_name("0123456789abcdef"))
    with pytest.raises(DamagedRecordError, match="in the place of '0123456789abcdef'"):
        run.records()


@pytest.mark.parametrize("name", ["perturbation.safetensors", "examples.parquet"])
def test_a_tampered_artifact_is_found_by_every_reader(
    finished: tuple[RunFolder, str, Path], name: str
) -> None:
    run, trial, folder = finished
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    for reader in (run.load, run.tensors, run.examples):
        with pytest.raises(DamagedRecordError, match=f"{name} is damaged: its sha256"):
            reader(trial)
    (folder / name).unlink()
    with pytest.raises(DamagedRecordError, match="not there"):
        run.load(trial)


def test_a_trial_without_a_record_is_not_loaded(run: RunFolder) -> None:
    with pytest.raises(DamagedRecordError, match="not there"):
        run.load("0123456789abcdef")


# --- Whose folder ---------------------------------------------------------------------------------


def test_the_same_study_continues(finished: tuple[RunFolder, str, Path]) -> None:
    run, trial, _ = finished
    run.close()
    with RunFolder.open(run.path, dict(reversed(STUDY.items())), "# other comments\n") as again:
        assert again.has(trial)
        assert again.study == STUDY
        assert again.study_hash == run.study_hash == digest(STUDY)
    assert (run.path / "study.toml").read_text() == TEXT


def test_another_studys_folder_is_refused(run: RunFolder) -> None:
    run.close()
    with pytest.raises(ForeignRunError, match="another study") as error:
        RunFolder.open(run.path, STUDY | {"name": "mine", "seed": 1}, None)
    for part in (str(run.path), "'demo'", "'mine'", digest(STUDY)[:16], "--out", "remove"):
        assert part in str(error.value)
    new_run(run.path).close()  # the refusal let go of the lock


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ForeignRunError, match=r"holds files but no run: thesis\.tex.*--out"):
        new_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(StoreError, match="is a file"):
        new_run(tmp_path / "demo")


def test_a_run_that_died_before_its_study_was_written_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("1\n")
    (tmp_path / ".study.json.tmp").write_text('{"half')
    new_run(tmp_path).close()
    assert RunFolder.read(tmp_path).study == STUDY


def test_a_damaged_study_is_found(run: RunFolder) -> None:
    run.close()
    file = run.path / "study.json"
    sound = file.read_text()
    for text, what in (
        (sound[:20], "no JSON"),
        ("{}", "not a study"),
        (sound.replace("-5.0", "-4.0"), "was changed"),
        (sound.replace('"schema": 1', '"schema": 2'), "schema 2"),
    ):
        file.write_text(text)
        for opening in (lambda: new_run(run.path), lambda: RunFolder.read(run.path)):
            with pytest.raises(DamagedRecordError, match=what) as error:
                opening()
            assert "--out" in str(error.value)


def test_reading_needs_a_run_and_writes_nothing(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no run.*holdfast run"):
        RunFolder.read(tmp_path / "nowhere")
    reader = RunFolder.read(run.path)  # while the run is being written
    assert reader.study == STUDY
    for write in (lambda: reader.write(make_record(), {}, []), lambda: reader.write_summary({})):
        with pytest.raises(StoreError, match="reading only"):
            write()


# --- Other processes and crashes ------------------------------------------------------------------

WRITER = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_store import make_record, new_run
from pathlib import Path
run = new_run(Path(sys.argv[1]))
print("open", flush=True)
if sys.argv[2] == "hold":
    sys.stdin.read()
for number in range(int(sys.argv[3]), 10**6):
    run.write(make_record(number), {{"delta": torch.full((20_000,), float(number))}},
              [{{"row": i, "number": number}} for i in range(50)])
    run.write_summary({{"schema": 1, "count": number + 1}})
    print("written", flush=True)
"""


def start_writer(path: Path, mode: str, first: int = 0) -> subprocess.Popen[str]:
    code = WRITER.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), mode, str(first)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "demo", "hold")
    try:
        with pytest.raises(RunLockedError, match=f"process {process.pid}"):
            new_run(tmp_path / "demo")
        RunFolder.read(tmp_path / "demo")
    finally:
        process.kill()
        process.communicate()
    new_run(tmp_path / "demo").close()  # the lock died with its process


def test_one_process_cannot_open_a_run_twice(run: RunFolder) -> None:
    with pytest.raises(RunLockedError, match=f"process {os.getpid()}"):
        new_run(run.path)


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_crash_before_the_record_leaves_unfinished_work(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    record, replaced = make_record(), 0
    real = os.replace

    def crash(source: Path, target: Path) -> None:
        nonlocal replaced
        if replaced == survivors:
            raise KeyboardInterrupt
        replaced += 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            run.write(record, make_tensors(), ROWS)
    folder = run.path / "trials" / record["id"]
    assert len([p for p in folder.iterdir() if not p.name.startswith(".")]) == survivors
    assert not run.has(record["id"])
    assert run.records() == []

    run.write(record, make_tensors(), ROWS)
    assert [r["id"] for r in run.records()] == [record["id"]]
    assert len(list(folder.iterdir())) == 3  # no temporary file is left


def test_a_killed_run_leaves_whole_records_only(tmp_path: Path) -> None:
    path, done = tmp_path / "demo", 0
    for delay in np.random.default_rng(0).uniform(0, 0.2, size=4):
        process = start_writer(path, "go", done)
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"  # past the imports of the first write
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        run = RunFolder.read(path)
        records = run.records()  # verifies each
        assert {record["trial"]["number"] for record in records} == set(range(len(records)))
        for record in records[-3:]:
            number = record["trial"]["number"]
            assert run.tensors(record["id"])["delta"].unique().tolist() == [number]
            assert len(run.examples(record["id"])) == 50
        count = json.loads((path / "summary.json").read_text())["count"]
        assert len(records) - 1 <= count <= len(records)
        assert len(records) > done
        done = len(records)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "summary.json"
    write_atomic(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="no space"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"


# --- Canonical JSON -------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.text()
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    SCALARS | FLOATS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_canonical_json_reads_back_as_the_same_object(obj: Any) -> None:
    text = canonical_json(obj)
    assert text.isascii()
    back = json.loads(text)
    assert back == obj
    assert canonical_json(back) == text  # types too: 1 and 1.0 differ
    assert canonical_json(json.loads(json.dumps(obj, indent=3))) == text


@given(st.dictionaries(st.text(), JSON, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(obj: dict[str, Any], random: Any) -> None:
    items = list(obj.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(obj)
    assert trial_id(dict(items)) == trial_id(obj)


@given(FLOATS)
def test_floats_are_written_as_python_writes_them(number: float) -> None:
    assert canonical_json(number) == repr(number)


def test_canonical_json_by_hand() -> None:
    obj = {"b": [1, 1.0, 1e-7, True, None], "a": {"ü": "x y"}, "B": -0.5}
    expected = r'{"B":-0.5,"a":{"\u00fc":"x y"},"b":[1,1.0,1e-07,true,null]}'
    assert canonical_json(obj) == expected
    assert digest(obj) == hashlib.sha256(expected.encode()).hexdigest()


def test_the_identity_of_a_trial_is_pinned() -> None:
    # A changed value here makes every stored run a foreign one.
    trial = {"audit": "ioi", "seed": 0, "budget": {"relative": 0.25}}
    text = '{"schema":1,"trial":{"audit":"ioi","budget":{"relative":0.25},"seed":0}}'
    assert trial_id(trial) == hashlib.sha256(text.encode()).hexdigest()[:16] == "abbc2e5f285a2f81"


@pytest.mark.parametrize(
    ("value", "error", "path"),
    [
        (math.nan, ValueError, r"\$\.a\[1\]\.b is nan"),
        (-math.inf, ValueError, r"\$\.a\[1\]\.b is -inf"),
        ((1, 2), TypeError, r"\$\.a\[1\]\.b is a builtins\.tuple"),
        (np.float64(1), TypeError, r"\$\.a\[1\]\.b is a numpy\.float64"),
        (torch.zeros(1), TypeError, r"\$\.a\[1\]\.b is a torch\.Tensor"),
        ({1: 2}, TypeError, r"\$\.a\[1\]\.b has the key 1 of type int"),
    ],
)
def test_what_has_no_identity_is_refused_with_its_path(
    value: Any, error: type[Exception], path: str
) -> None:
    with pytest.raises(error, match=path):
        canonical_json({"a": [0, {"b": value}]})


def test_json_safe_turns_the_unscored_into_null() -> None:
    value = {
        "rate": math.nan,
        "pair": (1, 2.0),
        "array": np.array([1.0, math.nan]),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "single": np.float32(0.5),
    }
    safe = json_safe(value)
    assert safe == {
        "rate": None,
        "pair": [1, 2.0],
        "array": [1.0, None],
        "count": 3,
        "flag": True,
        "single": 0.5,
    }
    canonical_json(safe)
    with pytest.raises(ValueError, match=r"\$\.a\[0\] is inf"):
        json_safe({"a": [math.inf]})
    with pytest.raises(TypeError, match=r"\$\.a is a Tensor"):
        json_safe({"a": torch.zeros(1)})
    with pytest.raises(TypeError, match="expected str"):
        json_safe({1: 2})


def test_a_tree_is_hashed_by_names_and_contents(tmp_path: Path) -> None:
    def tree(folder: Path, **files: str) -> str:
        (folder / "sub").mkdir(parents=True)
        for name, text in files.items():
            (folder / name.replace("__", "/").replace("_", ".")).write_text(text)
        return sha256_tree(folder, ("*.json", "sub/*.json"))

    reference = tree(tmp_path / "1", a_json="x", sub__b_json="y")
    assert tree(tmp_path / "2", sub__b_json="y", a_json="x", a_txt="not matched") == reference
    assert tree(tmp_path / "3", a_json="y", sub__b_json="x") != reference
    assert tree(tmp_path / "4", a_json="x", b_json="y") != reference
    assert sha256_tree(tmp_path / "1", ("sub/*.json", "*.json", "*.json")) == reference

    linked = tmp_path / "5"
    linked.mkdir()
    (linked / "sub").symlink_to(tmp_path / "1" / "sub")
    (linked / "a.json").symlink_to(tmp_path / "1" / "a.json")  # as the hub's cache does
    assert sha256_tree(linked, ("*.json", "sub/*.json")) == reference

    with pytest.raises(FileNotFoundError, match=r"\*\.bin"):
        sha256_tree(tmp_path / "1", ("*.bin",))
    with pytest.raises(TypeError, match="sequence of patterns"):
        sha256_tree(tmp_path / "1", "*.json")
    file = tmp_path / "1" / "a.json"
    assert sha256_file(file) == hashlib.sha256(b"x").hexdigest()
