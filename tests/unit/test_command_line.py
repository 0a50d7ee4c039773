"""A record keeps what was asked for, and no folder of the machine it was asked on."""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.command_line import told

NAME = st.text(
    st.characters(categories=("L", "N"), include_characters=" .-_='()"), min_size=1, max_size=8
).filter(lambda name: name.strip(".") != "" and not name.startswith("~"))


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("run", "run"),
        ("--limit", "--limit"),
        ("20", "20"),
        ("recovery.steps=40", "recovery.steps=40"),
        ("studies/mine.toml", "studies/mine.toml"),
        ("/home/ann/mine.toml", "mine.toml"),
        ("/home/ann/my runs/", "my runs"),
        ("~/mine.toml", "mine.toml"),
        ("~ann", "~"),
        ("../ann/mine.toml", "mine.toml"),
        (r"C:\Users\ann\mine.toml", "mine.toml"),
        ("--out=/home/ann/run", "--out=run"),
        ('subject.model="/home/ann/model"', 'subject.model="model"'),
        ("subject.model='/home/ann/model'", "subject.model='model'"),
        ("subject.model=/home/ann/model", "subject.model=model"),
        ('a.path=["/home/ann/x.csv", "data/y.csv"]', 'a.path=["x.csv", "data/y.csv"]'),
        ('a={path="organism:saes/1"}', 'a={path="organism:saes/1"}'),
        ('a.path="data/../../ann/x.csv"', 'a.path="x.csv"'),
        ("/home/ann=b/x.toml", "x.toml"),
        ('subject.model="google/gemma-2-2b"', 'subject.model="google/gemma-2-2b"'),
    ],
)  # fmt: skip
def test_only_the_folders_of_a_machine_go(argument: str, kept: str) -> None:
    assert shlex.split(told([argument])) == ["holdfast", kept]


@given(st.lists(NAME, min_size=1, max_size=4), NAME)
def test_no_folder_above_the_last_is_kept(folders: list[str], name: str) -> None:
    path = PurePosixPath("/", *folders, name)
    for argument in (str(path), f"--out={path}"):
        (_, kept) = shlex.split(told([argument]))
        assert kept == argument.removesuffix(str(path)) + name


@given(st.lists(st.text(max_size=12), max_size=4))
def test_what_is_told_is_told_again_as_it_is(arguments: list[str]) -> None:
    """Of any arguments: as many as before, and nothing more is taken from what is kept."""
    once = shlex.split(told(arguments))[1:]
    assert len(once) == len(arguments)
    assert shlex.split(told(once))[1:] == once
