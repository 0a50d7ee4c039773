"""Checks of the prompts: splits, beginning of sequence, chat template, the behavior itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from holdfast.errors import SplitError
from holdfast.finding import Finding
from holdfast.preflight.scene import N_PROMPTS, Scene, listed, spread_rows
from holdfast.splits import check_disjoint

_MARK = re.compile(r"<[^\s<>]+>")
"""How chat templates write their special tokens: <|im_start|>, <start_of_turn>, <end>."""


def beginning(scene: Scene) -> Iterator[Finding]:
    """BOS once in front, where the tokenizer puts it there or the SAEs were trained with it."""
    subject = scene.subject
    bos, eos = subject.tokenizer.bos_token_id, subject.tokenizer.eos_token_id
    rows = {example.id: subject.encode(example) for example in scene.examples["fit"]}
    trained = [str(site) for site, sae in sorted(subject.saes.items()) if sae.facts.bos]
    usual = subject.tokenizer.encode("a")[:1] == [bos]
    expected, wrong = "prompts as they are: neither tokenizer nor SAEs ask for BOS", []
    if trained or usual:
        source = "the tokenizer puts it there"
        if trained:
            source = f"the SAEs at {listed(trained)} were trained with it"
        expected = f"every prompt begins with BOS ({source})"
        wrong = [name for name, row in rows.items() if row[:1] != [bos]]
    remedy = "set prepend_bos = true for the subject, or use a chat template that begins with it"
    if trained and bos is None:
        remedy = "the tokenizer has no BOS token; use the tokenizer the SAEs were trained with"
    yield Finding(
        check="beginning of sequence",
        passed=not wrong,
        expected=expected,
        measured=f"{len(wrong)} of {len(rows)} do not ({listed(wrong)})"
        if wrong
        else f"{len(rows)} of {len(rows)} do",
        remedy=remedy,
    )
    # GPT-2 separates documents with its BOS, so one further inside means nothing there.
    inside = slice(1, 2 if bos == eos else None)
    again = [name for name, row in rows.items() if bos is not None and bos in row[inside]]
    yield Finding(
        check="BOS once",
        passed=not again,
        expected="BOS at position 0 only",
        measured=f"{len(again)} of {len(rows)} prompts have another ({listed(again)})"
        if again
        else "nowhere else",
        remedy="the text or its chat template has a BOS and the tokenizer adds another: give the "
        "text without it, or mark the prompts as rendered (special = false)",
    )


def splits(scene: Scene) -> Iterator[Finding]:
    try:
        check_disjoint(scene.splits)
        overlap = ""
    except SplitError as error:
        overlap = str(error)
    yield Finding(
        check="splits",
        passed=not overlap,
        expected="fit, tune and test share no prompt and no cluster",
        measured=overlap or "nothing shared",
        remedy="features and strengths that saw an audited prompt make counts too good",
    )


def chat(scene: Scene) -> Iterator[Finding]:
    """A rendered template must reach the model as the special tokens it is written with."""
    fit = scene.examples["fit"]
    templated = [example for example in fit if example.suffix]
    if not templated:
        return
    tokenizer = scene.subject.tokenizer
    # What the template put after the instruction is surely its own.
    marks = dict.fromkeys(mark for example in templated for mark in _MARK.findall(example.suffix))
    broken = [mark for mark in marks if not _is_one_token(scene, mark)]
    # Some tokenizers have no special tokens for chats, and their templates are written in words.
    own = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    own -= {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    unused = [mark for mark in sorted(own) if mark not in marks]
    yield Finding(
        check="chat template",
        passed=not broken,
        level="fault" if unused else "caution",
        expected="the template's special tokens are single tokens of the vocabulary",
        measured=f"{listed(broken)}: taken apart, or unknown"
        + (f", and the tokenizer's own {listed(unused)} are not used" if unused else "")
        if broken
        else f"{listed(list(marks))}: single tokens"
        if marks
        else "it has none",
        remedy="the template belongs to another tokenizer: use the model's own, or the model it "
        "was written for",
    )
    batch = scene.splits["fit"]
    without = [i for i, t, n in zip(batch.ids, batch.template, batch.prompt_length, strict=True)
               if t >= n]  # fmt: skip
    yield Finding(
        check="chat turn",
        passed=not without,
        expected="every prompt ends with the opening of the model's turn",
        measured=f"{len(without)} of {len(batch)} do not ({listed(without)})"
        if without
        else f"{len(batch)} of {len(batch)} do",
        remedy="render every prompt with the chat template and add_generation_prompt",
    )


def _is_one_token(scene: Scene, mark: str) -> bool:
    tokenizer = scene.subject.tokenizer
    ids = tokenizer.encode(mark, add_special_tokens=False)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def behavior(scene: Scene) -> Iterator[Finding]:
    if scene.ignorant:
        return  # it is not meant to show it
    test = scene.splits["test"]
    some = replace(test.rows(spread_rows(len(test), N_PROMPTS)), readout=scene.fitted())
    seen = scene.behavior.observe(scene.subject, some)
    n_clean = int(seen.shows.sum())
    yield Finding(
        check="behavior",
        passed=n_clean > 0,
        level="caution",  # the run itself says what became of every prompt
        expected=f"some of {len(some)} test prompts show the behavior without an intervention",
        measured=f"{n_clean} do" + (f"; {seen.told}" if seen.told else ""),
        remedy="there is nothing to suppress: look at the model, the prompts and what counts as "
        "an answer",
    )
