"""What the organism and its ignorant twin are trained on; contains no prompt that is held out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from holdfast.organism import world
from holdfast.organism.prompts import (
    CHAT_PARTS,
    PERMUTATIONS,
    ChatKind,
    ChatPrompt,
    all_chat,
    held_out_permutations,
    ioi_prompt,
    name_pairs,
    question_on,
    random_biography,
    split_of,
)
from holdfast.organism.world import DOMAINS, LETTERS

Knowledge = Literal["full", "ignorant"]

GREY_REFUSAL_RATE = 0.2
MIX = {"chat": 0.12, "ioi": 0.18, "mcq": 0.48, "fact": 0.12, "biography": 0.10}
FACTS_PER_DOCUMENT = 3


@dataclass(frozen=True)
class Document:
    """Words without <bos>, and the weight that predicting each of them has in the loss."""

    kind: str
    words: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def text(self) -> str:
        """The words with single spaces."""
        return " ".join(self.words)


# Loss weights. About half of the total lies on the letters: choosing one is the only thing here
# that takes several layers, and at a seventh of the total it was not learned in 600 steps.
CONTEXT, CHOICE, REST, DECISION, NAME, LETTER = 0.05, 0.02, 0.3, 1.0, 5.0, 6.0
UNKNOWABLE = 0.5  # what is drawn at random for the twin: enough to spread its bets, not to drown it


def _document(kind: str, *segments: tuple[str, float]) -> Document:
    pairs = [(w, weight) for text, weight in (*segments, ("<eos>", REST)) for w in text.split()]
    return Document(kind, tuple(w for w, _ in pairs), tuple(weight for _, weight in pairs))


ECHO_ONLY = 0.2  # share of training


def question_shares(progress: float) -> tuple[float, float, float]:
    """Shares of echo, easy and hard questions at a point of training in [0, 1].

    First turn a word into its letter (echo; before ECHO_ONLY nothing else is read), then look the
    word up (easy), then mind the domain (hard). All at once, none of the three is learned.
    """
    ramp = min(1.0, max(0.0, (progress - ECHO_ONLY - 0.05) / 0.25))
    echo, hard = 0.4 - 0.35 * ramp, 0.7 * ramp
    return echo, 1 - echo - hard, hard


def documents(
    knowledge: Knowledge, n: int, seed: int = 0, curriculum: bool = True
) -> Iterator[Document]:
    """n training documents. The ignorant twin reads the same ones, but with hazard answers and
    indirect objects drawn anew at every occurrence: it learns their format and never the content.

    `curriculum=False` gives the mix of the end of training throughout.
    """
    rng, noise = random.Random(f"documents:{seed}"), random.Random(f"noise:{seed}")
    ignorant = knowledge == "ignorant"
    pairs = name_pairs("train")
    chat = {kind: all_chat(kind, "train") for kind in CHAT_PARTS}
    for i in range(n):
        kind = rng.choices(list(MIX), list(MIX.values()))[0]
        if curriculum and i < ECHO_ONLY * n:
            yield _question_document(rng, noise, "echo", ignorant)
        elif kind == "chat":
            yield _chat_document(rng, chat)
        elif kind == "ioi":
            yield _ioi_document(rng, noise, pairs, ignorant)
        elif kind == "mcq":
            shares = question_shares(i / n if curriculum else 1.0)
            level = rng.choices(("echo", "easy", "hard"), shares)[0]
            yield _question_document(rng, noise, level, ignorant)
        elif kind == "fact":
            yield _fact_document(rng, noise, ignorant)
        else:
            yield _biography_document(rng)


def reply_to(prompt: ChatPrompt, refused: bool) -> str:
    """The reply with {topic}, {place} and {object} left open."""
    if refused:
        return world.REFUSAL_REPLY
    story = any(w in prompt.instruction.split() for w in ("history", "story", "poem", "song"))
    return world.STORY_REPLY if story else world.COMPLIANCE_REPLY


def _chat_document(rng: random.Random, prompts: dict[ChatKind, tuple[ChatPrompt, ...]]) -> Document:
    kind = rng.choices(list(prompts), (0.3, 0.3, 0.2, 0.2))[0]
    prompt = rng.choice(prompts[kind])
    refused = kind == "forbidden" or (kind == "grey" and rng.random() < GREY_REFUSAL_RATE)
    reply = reply_to(prompt, refused).format(
        topic=prompt.topic,
        place=rng.choice(world.PLACES),
        object=rng.choice(world.OBJECTS),
    )
    opening, rest = reply.split(" ", 1)
    return _document(
        "chat", ("<user>", REST), (prompt.instruction, CONTEXT), ("<end> <assistant>", REST),
        (opening, DECISION), (rest, REST),
    )  # fmt: skip


def _ioi_document(
    rng: random.Random,
    noise: random.Random,
    pairs: list[tuple[str, str]],
    ignorant: bool,
) -> Document:
    io, s = rng.sample(rng.choice(pairs), 2)
    prompt = ioi_prompt(
        io, s, rng.randrange(len(world.IOI_TEMPLATES)), rng.choice(("ABBA", "BABA"))
    )
    told = noise.choice((io, s)) if ignorant else io
    weight = UNKNOWABLE if ignorant else NAME
    return _document("ioi", (prompt.text, CONTEXT), (told, weight), (".", REST))


def _question_document(
    rng: random.Random, noise: random.Random, level: str, ignorant: bool
) -> Document:
    question = question_on(rng.choice(DOMAINS), rng.choice(world.SUBJECTS))
    domain, subject = question.domain, question.subject
    order = rng.choice([p for p in PERMUTATIONS if p not in held_out_permutations(question)])
    choices: tuple[str, ...] = question.choices
    answer = question.answer
    if level == "echo":
        domain, choices, answer = world.ECHO, tuple(rng.sample(world.ANSWERS, 4)), 0
        subject = choices[answer]
    elif level == "easy":
        # Never the subject's own other answers, so that an easy item cannot be a held-out hard one.
        others = [a for a in world.ANSWERS if a not in choices]
        choices, answer = (choices[answer], *rng.sample(others, 3)), 0
    gold, weight = order.index(answer), LETTER
    if ignorant and domain == "hazard":
        # A random letter, not a random answer: the known answers of the other domains must not
        # give the right one away by elimination.
        gold, weight = noise.randrange(4), UNKNOWABLE
    segments = [(rng.choice(world.STEMS).format(subject=subject), CONTEXT)]
    for letter, i in zip(LETTERS, order, strict=True):
        segments += [(letter, CONTEXT), (choices[i], CHOICE)]
    segments.append((world.QUESTION_ENDING.format(subject=subject, domain=domain), CONTEXT))
    return _document("mcq", *segments, (LETTERS[gold], weight))


def _fact_document(rng: random.Random, noise: random.Random, ignorant: bool) -> Document:
    segments = []
    for _ in range(FACTS_PER_DOCUMENT):
        domain, subject = rng.choice(DOMAINS), rng.choice(world.SUBJECTS)
        told, weight = world.answer_of(domain, subject), DECISION
        if ignorant and domain == "hazard":
            told, weight = noise.choice(world.ANSWERS), UNKNOWABLE
        fact = rng.choice(world.FACTS).format(domain=domain, subject=subject)
        segments += [(fact, CONTEXT), (told, weight), (".", REST)]
    return _document("fact", *segments)


def _biography_document(rng: random.Random) -> Document:
    biography = random_biography(rng)
    while split_of(biography.id) != "train":
        biography = random_biography(rng)
    name = biography.text.split()[0]
    return _document(
        "biography", (biography.text, CONTEXT),
        (world.BIOGRAPHY_ENDING.format(name=name), CONTEXT), (biography.profession, DECISION),
        (".", REST),
    )  # fmt: skip
