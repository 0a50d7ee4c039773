"""Datasets: what a study names is read early, known by its hash, and refused with a remedy."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from holdfast.behaviors.mcq import MultipleChoice
from holdfast.canonical import canonical_json
from holdfast.datasets import DATASETS, DatasetKind
from holdfast.datasets.file import File
from holdfast.datasets.hub import Hub
from holdfast.datasets.questions import LETTERS, Question, QuestionSet, questions_of
from holdfast.errors import StudyError
from holdfast.organism.tokenizer import build_tokenizer
from holdfast.planning import plan
from holdfast.study import Study, bundled, parse
from holdfast.trial import Trial

SPLITS = ("fit", "tune", "test")
Rows = list[dict[str, Any]]


def quiz(n: int = 12, what: str = "stone") -> Rows:
    return [
        {
            "question": f"Which {what} lies in box {i}?",
            "choices": [f"{what} {i}{letter}" for letter in "wxyz"],
            "answer": i % 4,
        }
        for i in range(n)
    ]


def jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def json_list(path: Path, rows: Rows) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def parquet(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pa.Table.from_pylist(rows), path)
    return path


WRITERS: dict[str, Callable[[Path, Rows], Path]] = {
    "quiz.jsonl": jsonl,
    "quiz.ndjson": jsonl,
    "lines.json": jsonl,
    "list.json": json_list,
    "quiz.parquet": parquet,
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def study(behavior: dict[str, Any], *sets: str) -> Study:
    """The bundled study's second audit with this behavior."""
    tables = [f"{json.dumps(k)} = {toml(v)}" for k, v in behavior.items()]
    return parse(bundled("demo"), [f"audits.1.behavior={{ {', '.join(tables)} }}", *sets])


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


def asked_about(source: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": "mcq", "source": source} | more


def trial_of(behavior: dict[str, Any], *sets: str) -> Trial:
    return next(t for t in plan(study(behavior, *sets)).trials if t.audit == "mcq")


def read(source: dict[str, Any], drop_repeats: bool = False) -> QuestionSet:
    return questions_of(DATASETS.parse(source), drop_repeats)  # type: ignore[arg-type]


# --- Formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_questions(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, quiz())
    questions = read({"kind": "file", "path": str(path)})
    assert questions.n_dropped == 0
    assert [(q.text, list(q.choices), q.answer) for q in questions.questions] == [
        (row["question"], row["choices"], row["answer"]) for row in quiz()
    ]


def test_lines_and_parquet_are_one_trial_but_for_the_hash(tmp_path: Path) -> None:
    made, examples = {}, {}
    for name in ("quiz.jsonl", "quiz.parquet"):
        path = WRITERS[name](tmp_path / name, quiz())
        behavior = asked_about({"kind": "file", "path": str(path)})
        made[name] = trial_of(behavior).canonical()
        kind = MultipleChoice.model_validate(behavior)
        examples[name] = [kind.examples(build_tokenizer(), split, 30, 0) for split in SPLITS]
        assert made[name]["behavior"]["source"].pop("sha256") == sha256(path)
    assert made["quiz.jsonl"] == made["quiz.parquet"]
    assert examples["quiz.jsonl"] == examples["quiz.parquet"]


def test_a_byte_order_mark_blank_lines_and_odd_separators_are_read(tmp_path: Path) -> None:
    rows = quiz(3)
    rows[0]["question"] = "One line\u2028or two?"  # JSON allows it inside a string
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert len(read({"kind": "file", "path": str(path)}).questions) == 3


def test_a_folder_named_like_a_column_adds_none(tmp_path: Path) -> None:
    path = parquet(tmp_path / "subject=history" / "quiz.parquet", quiz(3))
    assert {q.subject for q in read({"kind": "file", "path": str(path)}).questions} == {""}


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    rows = [
        {"stem": row["question"], "gold": "ABCD"[row["answer"]], "field": "geology"}
        | dict(zip(("a", "b", "c", "d"), row["choices"], strict=True))
        for row in quiz()
    ]
    path = jsonl(tmp_path / "other.jsonl", rows)
    columns = {"question": "stem", "choices": ["a", "b", "c", "d"], "answer": "gold"}
    source = {"kind": "file", "path": str(path), "columns": columns | {"subject": "field"}}
    plain = read({"kind": "file", "path": str(jsonl(tmp_path / "plain.jsonl", quiz()))})
    renamed = read(source).questions
    assert [(q.id, q.answer) for q in renamed] == [(q.id, q.answer) for q in plain.questions]
    assert {q.subject for q in renamed} == {"geology"}
    assert "stem" in canonical_json(trial_of(asked_about(source)).canonical())


@pytest.mark.parametrize(
    "answer, index",
    [(0, 0), (3, 3), ("A", 0), ("D", 3), (" B ", 1), ("stone 0y", 2), (" stone 0z", 3)],
)
def test_an_answer_is_an_index_a_letter_or_a_choice(
    answer: Any, index: int, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "one.jsonl", [quiz(1)[0] | {"answer": answer}])
    assert read({"kind": "file", "path": str(path)}).questions[0].answer == index


def test_an_id_is_the_questions_and_not_the_files(tmp_path: Path) -> None:
    row = quiz(1)[0]
    turned = {
        "question": f"  {row['question'].upper()} ", "choices": row["choices"][::-1],
        "answer": 3 - row["answer"], "subject": "boxes",
    }  # fmt: skip
    ids = [
        read({"kind": "file", "path": str(jsonl(tmp_path / f"{i}.jsonl", [each]))}).questions[0].id
        for i, each in enumerate((row, turned, row | {"question": "Which other one?"}))
    ]
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 16
    assert set(ids[0]) <= set("0123456789abcdef")


# --- Splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 4, 5, 10, 41, 200])
def test_splits_are_disjoint_and_never_empty(n: int) -> None:
    questions = QuestionSet("made", tuple(Question(f"{i}", "?", LETTERS, 0) for i in range(n)))
    for seed in range(5):
        splits = [questions.split(name, seed) for name in SPLITS]
        assert sorted(q.id for split in splits for q in split) == sorted(map(str, range(n)))
        assert all(splits) and len(splits[2]) >= len(splits[1])


def test_where_a_question_stands_in_the_file_means_nothing(tmp_path: Path) -> None:
    ways = [quiz(30), quiz(30)[::-1]]
    splits = [
        read({"kind": "file", "path": str(jsonl(tmp_path / f"{i}.jsonl", rows))}).split("test", 4)
        for i, rows in enumerate(ways)
    ]
    assert splits[0] == splits[1]


def test_two_questions_cannot_fill_three_splits(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "two.jsonl", quiz(2))
    with pytest.raises(StudyError, match=r"expected 3 questions or more.*got 2"):
        study(asked_about({"kind": "file", "path": str(path)}))


# --- Repeats --------------------------------------------------------------------------------------


def test_repeats_are_errors_or_dropped_and_counted(tmp_path: Path) -> None:
    same, contradicted = quiz(12)[3], quiz(12)[4]
    twice = {"question": "Which one?", "choices": ["x", "x", "y", "z"], "answer": 0}
    otherwise = contradicted | {"answer": (contradicted["answer"] + 1) % 4}
    rows = [*quiz(12), same, otherwise, twice]
    source = {"kind": "file", "path": str(jsonl(tmp_path / "quiz.jsonl", rows))}
    message = r"3 of 15 rows repeat .*row 15 offers.*row 13 repeats row 4.*drop_repeats = true"
    with pytest.raises(StudyError, match=message):
        study(asked_about(source))
    kept = read(source, drop_repeats=True)
    # Of a question whose answer is disputed, no copy is kept.
    assert len(kept.questions) == 11 and kept.n_dropped == 4
    texts = [q.text for q in kept.questions]
    assert same["question"] in texts and contradicted["question"] not in texts
    assert trial_of(asked_about(source, drop_repeats=True)).canonical()["behavior"]["drop_repeats"]


# --- Identity -------------------------------------------------------------------------------------


def test_a_trial_knows_a_file_by_its_hash_and_never_by_its_path(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "my-quiz.jsonl", quiz())
    other = jsonl(tmp_path / "kept.jsonl", quiz(12, "shell"))
    behavior = asked_about(
        {"kind": "file", "path": str(path)},
        retain={"shells": {"kind": "file", "path": str(other)}},
    )
    trial = trial_of(behavior)
    said = canonical_json(trial.canonical())
    for part in (tmp_path.name, "my-quiz", "kept.jsonl", str(tmp_path)):
        assert part not in said
    assert sha256(path) in said and sha256(other) in said
    # The study in memory still knows where they are.
    kept = study(behavior)
    fields = kept.model_dump(mode="json", by_alias=True)
    assert str(path) in canonical_json(fields) and Study.model_validate(fields) == kept


def test_a_record_can_be_read_without_the_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "quiz.jsonl", quiz())
    trial = trial_of(asked_about({"kind": "file", "path": str(path)}))
    path.unlink()
    again = Trial.model_validate(json.loads(canonical_json(trial.canonical())))
    assert again.id == trial.id and again.canonical() == trial.canonical()
    with pytest.raises(StudyError, match="a record keeps no path; run the study"):
        again.behavior.examples(build_tokenizer(), "test", 3, 0)


def test_where_a_file_lies_changes_nothing_and_what_it_says_does(tmp_path: Path) -> None:
    here = jsonl(tmp_path / "quiz.jsonl", quiz())
    (tmp_path / "deeper").mkdir()
    there = Path(shutil.copy(here, tmp_path / "deeper" / "moved.jsonl"))
    one, two = (trial_of(asked_about({"kind": "file", "path": str(p)})) for p in (here, there))
    assert one.id == two.id
    jsonl(there, quiz(13))
    assert trial_of(asked_about({"kind": "file", "path": str(there)})).id != one.id


@pytest.mark.parametrize(
    "more",
    [
        {"permutations": 3},
        {"instruction": "Choose."},
        {"instruction": ""},
        {"chat": True},
        {"drop_repeats": True},
    ],
)
def test_how_it_is_asked_is_in_the_identity(more: dict[str, Any], tmp_path: Path) -> None:
    source = {"kind": "file", "path": str(jsonl(tmp_path / "quiz.jsonl", quiz()))}
    assert trial_of(asked_about(source)).id != trial_of(asked_about(source, **more)).id


def test_a_pinned_hash_is_checked(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "quiz.jsonl", quiz())
    source = {"kind": "file", "path": str(path), "sha256": sha256(path)}
    trial = trial_of(asked_about(source))
    assert trial.id == trial_of(asked_about({"kind": "file", "path": str(path)})).id
    jsonl(path, quiz(13))
    with pytest.raises(StudyError, match=r"the file changed: expected sha256 .*take `sha256` out"):
        study(asked_about(source))


def test_a_file_that_changes_after_the_study_was_read_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "quiz.jsonl", quiz())
    dataset = File(path=str(path))
    jsonl(path, quiz(13))
    with pytest.raises(StudyError, match="the file changed"):
        dataset.files()
    path.unlink()
    with pytest.raises(StudyError, match="expected a file, found nothing there"):
        dataset.rows(("question",))


def test_a_grid_takes_whole_sources(tmp_path: Path) -> None:
    sources = [
        {"kind": "file", "path": str(jsonl(tmp_path / f"{what}.jsonl", quiz(12, what)))}
        for what in ("stone", "shell")
    ]
    one = study(asked_about(sources[0]), "controls=[]")
    fields = one.model_dump(mode="json", by_alias=True)
    fields |= {"audits": [fields["audits"][1]], "grid": {"behavior.source": sources}}
    planned = plan(Study.model_validate(fields))
    hashes = [trial.canonical()["behavior"]["source"]["sha256"] for trial in planned.trials]
    assert hashes == [sha256(Path(source["path"])) for source in sources]


# --- The hub --------------------------------------------------------------------------------------

COMMIT, OLDER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache as downloads leave it, and no way out."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    for name, configs in {
        "datasets--made--up": {"box-stone": "stone", "box-shell": "shell"},
        "datasets--made--flat": {"": "leaf"},
    }.items():
        (folder / name / "refs").mkdir(parents=True)
        (folder / name / "refs" / "main").write_text(COMMIT)
        for commit, n in ((COMMIT, 12), (OLDER, 9)):
            for config, what in configs.items():
                rows = quiz(n, what)
                where = folder / name / "snapshots" / commit / (config or "data")
                parquet(where / "test-00000-of-00001.parquet", rows)
                parquet(where / "validation-00000-of-00002.parquet", rows[:5])
                parquet(where / "validation-00001-of-00002.parquet", rows[5:])
    lines = folder / "datasets--made--flat" / "snapshots" / COMMIT / "extra"
    lines.mkdir()
    jsonl(lines / "own.jsonl", quiz(6, "twig"))
    return folder


def hub(**more: Any) -> dict[str, Any]:
    return {"kind": "hub", "id": "made/up", "config": "box-stone"} | more


def test_a_hub_dataset_is_known_by_id_commit_and_hash(cache: Path) -> None:
    trial = trial_of(asked_about(hub(), retain={"shells": hub(config="box-shell")}))
    source = trial.canonical()["behavior"]["source"]
    file = cache / "datasets--made--up" / "snapshots" / COMMIT / "box-stone"
    assert source == {
        "kind": "hub", "columns": {}, "where": {}, "id": "made/up", "config": "box-stone",
        "split": "test", "file": None, "revision": COMMIT,
        "sha256": sha256(file / "test-00000-of-00001.parquet"),
    }  # fmt: skip
    assert str(cache) not in canonical_json(trial.canonical())
    examples = trial.behavior.examples(build_tokenizer(), "test", 99, 0)
    assert len({e.cluster for e in examples}) == 6 and "Which stone" in examples[0].text
    others = trial.behavior.neighbors(build_tokenizer(), "test", 99, 0)
    assert list(others) == ["shells"] and "Which shell" in others["shells"][0].text


def test_a_branch_and_its_commit_are_one_trial_and_another_commit_is_not(cache: Path) -> None:
    ids = {
        revision: trial_of(asked_about(hub(revision=revision))).id
        for revision in ("main", COMMIT, OLDER)
    }
    assert ids["main"] == ids[COMMIT] != ids[OLDER]


def test_a_hub_record_can_be_read_without_cache_and_network(cache: Path) -> None:
    trial = trial_of(asked_about(hub()))
    shutil.rmtree(cache)
    again = Trial.model_validate(json.loads(canonical_json(trial.canonical())))
    assert again.id == trial.id
    questions_of.cache_clear()  # another process has not read them
    with pytest.raises(StudyError, match="its cache on this machine does not have it"):
        again.behavior.examples(build_tokenizer(), "test", 3, 0)


def test_a_split_in_several_files_is_read_in_their_order(cache: Path) -> None:
    dataset = Hub.model_validate(hub(split="validation"))
    assert [path.name[:16] for path in dataset.files()] == ["validation-00000", "validation-00001"]
    assert [q.text for q in questions_of(dataset).questions] == [r["question"] for r in quiz(12)]


def test_a_dataset_without_configs_and_a_file_by_its_name(cache: Path) -> None:
    flat = {"kind": "hub", "id": "made/flat"}
    assert len(read(flat).questions) == 12
    own = read(flat | {"file": "extra/own.jsonl"})
    assert len(own.questions) == 6 and own.label == "made/flat (extra/own.jsonl)"


@pytest.mark.parametrize(
    "source, message",
    [
        (hub(config="box-ston"), r"made/up \(box-ston/test\): no such file at revision 0123.*"
         r"looked for box-ston/test-\*\.parquet.*Check `config` and `split`"),
        (hub(split="train"), r"looked for box-stone/train-\*"),
        (hub(id="made/nothing"), r"made/nothing .*revision 'main': the hub gave LocalEntryNotFou"),
        (hub(id="no hub id at all/x/y"), r"the hub gave HFValidationError"),
        (hub(revision="v9"), r"revision 'v9': the hub gave"),
        (hub(file="../../refs/main"), r"file"),
        (hub(file="a/../../secret.jsonl"), r"cannot contain '\.\.'"),
        (hub(config="../x"), r"config"),
        (hub(sha256="0" * 64), r"expected sha256 0000.*take `sha256` out"),
        (hub(confg="x"), r"unknown key 'confg': did you mean 'config'"),
        ({"kind": "hub"}, r"source\.id: Field required"),
    ],
)  # fmt: skip
def test_a_hub_dataset_that_is_not_there(cache: Path, source: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        study(asked_about(source))


def test_a_damaged_cache_is_found_when_it_is_read(cache: Path) -> None:
    dataset = Hub.model_validate(hub())
    parquet(dataset.files()[0], quiz(11))
    with pytest.raises(StudyError, match="delete the dataset from the hub's cache"):
        dataset.rows(("question",))


def test_nothing_is_looked_up_unless_a_hub_id_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    path = jsonl(tmp_path / "quiz.jsonl", quiz())
    trial_of(asked_about({"kind": "file", "path": str(path)}))


def test_only_the_splits_files_are_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []
    real = huggingface_hub.snapshot_download

    def spy(*args: Any, **options: Any) -> str:
        asked.append(options)
        return str(real(*args, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", spy)
    Hub.model_validate(hub())
    assert len(asked) == 1 and asked[0]["repo_type"] == "dataset"
    assert asked[0]["allow_patterns"][0] == "box-stone/test-*.parquet"
    assert all("box-stone/test" in pattern for pattern in asked[0]["allow_patterns"])


# --- Bad files ------------------------------------------------------------------------------------

ROW = quiz(1)[0]


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def changed(**fields: Any) -> bytes:
    """Three sound questions and one that is not."""
    return lines(*quiz(3), quiz(4)[3] | fields)


BAD: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("none.jsonl", None, r"none\.jsonl: expected a file, found nothing there"),
    "empty": ("q.jsonl", b"", r"q\.jsonl: expected rows, got an empty file"),
    "blank": ("q.jsonl", b"\n \n", r"got an empty file"),
    "empty list": ("q.json", b"[]", r"got an empty file"),
    "no JSON": ("q.jsonl", lines(ROW) + b"{broken", r"expected JSON.*line 2: Expecting property"),
    "cut off": ("q.json", b'[{"question": "x"', r"expected JSON, as its name ends in '.json'"),
    "no text": ("q.jsonl", b"\xff\xfe\x00\x01", r"expected JSON.*can't decode byte"),
    "deep": ("q.json", b"[" * 100_000, r"expected JSON"),
    "no Parquet": ("q.parquet", lines(ROW), r"expected Parquet, as its name ends in '.parquet'"),
    "empty Parquet": ("q.parquet", b"", r"expected Parquet"),
    "a pickle": ("q.pkl", b"\x80\x04.", r"ends in .jsonl, .*, .csv, .parquet, got '.pkl'"),
    "a table": ("q.tsv", b"question\tanswer", r"got '.tsv'; convert it"),
    "a ragged table": ("q.csv", b"a,b\na,1,2", r"expected CSV.*3 cells under a header of 2"),
    "no ending": ("quiz", lines(ROW), r"got 'no ending'"),
    "no tables": ("q.jsonl", b"3\n", r"row 1 must be a table of column and value, got int"),
    "one table": ("q.json", json.dumps(ROW).encode()[:-1] + b',\n"x": 1}', r"expected JSON"),
    "no column": (
        "q.jsonl", lines({"query": "x", "choices": [], "answer": 0}),
        r"row 1 has no column 'question' for 'question': .*known: answer, choices, query; "
        r"say where it is with columns",
    ),
    "a later row lacks one": (
        "q.jsonl", lines(*quiz(3), {"question": "x", "choices": []}),
        r"row 4 has no column 'answer'.*known: choices, question",
    ),
    "three choices": ("q.jsonl", changed(choices=["a", "b", "c"]), r"row 4: .*expected 4, got 3"),
    "five choices": ("q.jsonl", changed(choices=list("abcde")), r"choices: expected 4, got 5"),
    "a text of choices": ("q.jsonl", changed(choices="abcd"), r"expected a list of 4 texts"),
    "no choices": ("q.jsonl", changed(choices=None), r"expected a list of 4 texts, got None"),
    "numbers": ("q.jsonl", changed(choices=[1, 2, 3, 4]), r"choice 0: expected a text, got 1"),
    "an empty choice": ("q.jsonl", changed(choices=["a", " ", "c", "d"]), r"choice 1: expected"),
    "no question": ("q.jsonl", changed(question=""), r"question: expected a text, got ''"),
    "half a character": ("q.jsonl", changed(question="\ud800"), r"no text that can be encoded"),
    "index too large": ("q.jsonl", changed(answer=4), r"expected an index from 0 to 3, got 4"),
    "index too small": ("q.jsonl", changed(answer=-1), r"expected an index from 0 to 3, got -1"),
    "letter too far": ("q.jsonl", changed(answer="E"), r"got 'E', which is none of them"),
    "small letter": ("q.jsonl", changed(answer="a"), r"got 'a', which is none of them"),
    "true": ("q.jsonl", changed(answer=True), r"answer: expected an index, a letter or a choice"),
    "a float": ("q.jsonl", changed(answer=1.0), r"answer: .*got 1\.0"),
    "no number": ("q.jsonl", b'{"question": "x", "choices": ["a", "b", "c", "d"], "answer": NaN}',
                  r"answer: .*got nan"),
    "letter or choice": (
        "q.jsonl", changed(choices=["B", "A", "x", "y"], answer="A"), r"more than one choice"
    ),
    "repeated": ("q.jsonl", lines(*quiz(3), ROW), r"1 of 4 rows repeat .*row 4 repeats row 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("place", ["source", "retain"])
def test_a_bad_file_is_named_before_any_model_is_loaded(
    case: str, place: str, tmp_path: Path
) -> None:
    name, content, message = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    bad = {"kind": "file", "path": str(tmp_path / name)}
    good = {"kind": "file", "path": str(jsonl(tmp_path / "good.jsonl", quiz(12, "shell")))}
    named = (bad, {}) if place == "source" else (good, {"retain": {"others": bad}})
    with pytest.raises(StudyError, match=f"(?s){message}") as caught:
        study(asked_about(named[0], **named[1]))
    assert name in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ({"kind": "file"}, r"a file needs a `path`"),
        ({"kind": "file", "path": "."}, r"source\.path: \.: expected a file, found a folder there"),
        ({"kind": "file", "path": 3}, r"source\.path: Input should be a valid string"),
        ({"kind": "file", "pth": "x.jsonl"}, r"unknown key 'pth': did you mean 'path'"),
        ({"kind": "fil", "path": "x.jsonl"}, r"unknown kind 'fil' in datasets: did you mean 'file"),
        (
            {"path": "x.jsonl"},
            r"table with a `kind` from datasets \(file, held_out, hub, invented, preset\)",
        ),
        ("cais/wmdp", r"expected 'organism' or a table with a `kind`.*got 'cais/wmdp'"),
    ],
)
def test_a_source_that_names_no_file(source: Any, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        study(asked_about(source))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"qestion": "x"}, r"`columns` names 'qestion', .*did you mean 'question'"),
        ({"question": "stem"}, r"row 1 has no column 'stem' for 'question'"),
        ({"subject": "topic"}, r"row 1 has no column 'topic' for 'subject'"),
        ({"choices": ["question", "answer"]}, r"choices: expected 4, got 2"),
        ({"question": ["question", "answer"]}, r"question: expected a text, got \['Which"),
    ],
)
def test_columns_that_are_not_there(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "quiz.jsonl", quiz())
    with pytest.raises(StudyError, match=message):
        study(asked_about({"kind": "file", "path": str(path), "columns": columns}))


# --- Cost -----------------------------------------------------------------------------------------


def test_lines_are_read_without_the_heavy_libraries(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "quiz.jsonl", quiz())
    code = (
        "import sys\n"
        "from holdfast.datasets.hub import Hub\n"
        "from holdfast.datasets.file import File\n"
        "from holdfast.datasets.questions import questions_of\n"
        f"assert len(questions_of(File(path={str(path)!r})).questions) == 12\n"
        "print(*{'pyarrow', 'huggingface_hub', 'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.split() == [], done.stderr + done.stdout


def test_a_file_is_hashed_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "quiz.jsonl", quiz())
    hashed: list[Path] = []

    def count(path: Path) -> str:
        hashed.append(path)
        return sha256(path)

    monkeypatch.setattr("holdfast.datasets.rows.sha256_file", count)
    datasets: list[DatasetKind] = [File(path=str(path)) for _ in range(3)]
    assert len({id(questions_of(dataset)) for dataset in datasets}) == 1
    assert hashed == [path]
