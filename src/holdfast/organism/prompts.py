"""Held-out prompts for every behavior, and which split each of them belongs to.

A prompt belongs to exactly one split, decided by a hash of what it is, never by a random number
generator, so that a training document can be checked against it anywhere.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

from holdfast.organism import world
from holdfast.organism.world import DOMAINS, LETTERS

Split = Literal["train", "fit", "tune", "test"]
ChatKind = Literal["forbidden", "grey", "safe", "benign"]
_T = TypeVar("_T")
Permutation = tuple[int, int, int, int]

PERMUTATIONS: tuple[Permutation, ...] = tuple(itertools.permutations(range(4)))  # type: ignore
N_HELD_OUT = 12  # of the 24 permutations of a question
CUE_RELIABILITY = 0.8


def _hash(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(key: str, train: float = 0.35, fit: float = 0.25, tune: float = 0.10) -> Split:
    """The split of anything that has a key; the shares are probabilities, test takes the rest."""
    h = _hash("split:" + key)
    if h < train:
        return "train"
    if h < train + fit:
        return "fit"
    return "tune" if h < train + fit + tune else "test"


def _take(items: list[_T], n: int, what: str, split: str) -> list[_T]:
    if n > len(items):
        raise ValueError(f"asked for {n} {what} prompts of split {split!r}, but {len(items)} exist")
    return items[:n]


# --- indirect object -------------------------------------------------------------------------
@dataclass(frozen=True)
class IoiPrompt:
    """`text` ends right before the indirect object `io`; `third` is a name that is not in it."""

    id: str
    text: str
    io: str
    s: str
    third: str
    template: int
    order: str  # "ABBA": the indirect object is named first, "BABA": second


def _ioi_id(io: str, s: str, template: int, order: str) -> str:
    return f"ioi:{template}:{order}:{io}:{s}"


def ioi_prompt(io: str, s: str, template: int, order: str) -> IoiPrompt:
    """The one prompt with these two names, template and order."""
    prompt_id = _ioi_id(io, s, template, order)
    rng = random.Random(prompt_id)
    a, b = (io, s) if order == "ABBA" else (s, io)
    text = world.IOI_TEMPLATES[template].format(
        a=a, b=b, s=s, place=rng.choice(world.PLACES), object=rng.choice(world.OBJECTS)
    )
    third = rng.choice([name for name in world.NAMES if name not in (io, s)])
    return IoiPrompt(prompt_id, text, io, s, third, template, order)


def name_pairs(split: Split) -> list[tuple[str, str]]:
    """The unordered pairs of names of a split."""
    pairs = itertools.combinations(world.NAMES, 2)
    return [p for p in pairs if split_of("pair:" + "|".join(p), 0.5, 0.22, 0.10) == split]


def ioi_prompts(
    split: Split, n: int, seed: int = 0, templates: tuple[int, ...] | None = None
) -> list[IoiPrompt]:
    """The first n of a fixed order in which the names take turns as the indirect object.

    Unordered pairs of names are disjoint between splits.
    """
    chosen = tuple(range(len(world.IOI_TEMPLATES))) if templates is None else templates
    return [ioi_prompt(*parts) for parts in _take(_ioi_order(split, seed, chosen), n, "ioi", split)]


@cache
def _ioi_order(
    split: Split, seed: int, templates: tuple[int, ...]
) -> list[tuple[str, str, int, str]]:
    """What `ioi_prompt` makes every prompt of a split from. There are thousands, most of which are
    never written. Only read it."""
    by_name: dict[str, list[tuple[str, str, int, str]]] = defaultdict(list)
    for pair in name_pairs(split):
        for (io, s), template, order in itertools.product(
            (pair, pair[::-1]), templates, ("ABBA", "BABA")
        ):
            by_name[io].append((io, s, template, order))
    for own in by_name.values():
        own.sort(key=lambda parts: _hash(f"{seed}:{_ioi_id(*parts)}"))
    rounds = itertools.zip_longest(*(by_name[name] for name in world.NAMES))
    return [parts for one_round in rounds for parts in one_round if parts is not None]


# --- multiple choice -------------------------------------------------------------------------
@dataclass(frozen=True)
class Question:
    """A hard item: the distractors are the subject's answers in the other three domains."""

    id: str
    domain: str
    subject: str
    stem: str
    choices: tuple[str, str, str, str]
    answer: int  # index into choices


@cache
def subject_split(subject: str) -> Split:
    """fit (12 subjects), tune (6) or test (22): all questions about a subject together."""
    rank = sorted(world.SUBJECTS, key=lambda s: _hash("subject:" + s)).index(subject)
    return "fit" if rank < 12 else "tune" if rank < 18 else "test"


def question_on(domain: str, subject: str) -> Question:
    """The hard item that asks for the subject's answer in a domain."""
    question_id = f"mcq:{domain}:{subject}"
    stem = world.STEMS[int(_hash("stem:" + question_id) * len(world.STEMS))]
    a, b, c, d = (world.answer_of(each, subject) for each in DOMAINS)
    stem = stem.format(subject=subject)
    return Question(question_id, domain, subject, stem, (a, b, c, d), DOMAINS.index(domain))


def questions(domain: str, split: Split) -> list[Question]:
    """One question a subject; "train" has all subjects, as every fact is taught.

    What is held out is the order of the choices: see `held_out_permutations`.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; known are {', '.join(DOMAINS)}")
    chosen = [s for s in world.SUBJECTS if split == "train" or subject_split(s) == split]
    return [question_on(domain, subject) for subject in chosen]


def question_text(question: Question, permutation: Permutation, blind: bool = False) -> str:
    """Slot j shows choices[permutation[j]]; the text ends right before the answer letter.

    blind: without the question, whose domain and subject are left out wherever they stand.
    """
    slots = [f"{a} {question.choices[i]}" for a, i in zip(LETTERS, permutation, strict=True)]
    if blind:
        return " ".join((*slots, *world.QUESTION_ENDING.format(subject="", domain="").split()))
    ending = world.QUESTION_ENDING.format(subject=question.subject, domain=question.domain)
    return " ".join((question.stem, *slots, ending))


def open_text(question: Question) -> str:
    """The question as the beginning of a fact; the text ends right before the answer itself."""
    fact = world.FACTS[int(_hash("fact:" + question.id) * len(world.FACTS))]
    return fact.format(subject=question.subject, domain=question.domain)


def held_out_permutations(question: Question) -> list[Permutation]:
    """The 12 of 24 orders of its choices in which no training document ever asks this question."""
    return list(_held_out(question.id))


@cache
def _held_out(question_id: str) -> tuple[Permutation, ...]:
    ranked = sorted(PERMUTATIONS, key=lambda p: _hash(f"{question_id}:{p}"))
    return tuple(sorted(ranked[:N_HELD_OUT]))


# --- chat ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ChatPrompt:
    """One user turn. Forbidden is refused, grey complied with barely, safe and benign readily."""

    id: str
    messages: tuple[tuple[str, str], ...]  # (role, content)
    kind: ChatKind
    topic: str

    @property
    def instruction(self) -> str:
        """What the user asks."""
        return self.messages[-1][1]


CHAT_PARTS: dict[ChatKind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "forbidden": (world.FORBIDDEN, world.OPERATIONAL),
    "grey": (world.GREY, world.OPERATIONAL),
    "safe": (world.FORBIDDEN + world.GREY, world.SAFE),
    "benign": (world.BENIGN, world.OPERATIONAL + world.SAFE),
}


def _chat_prompt(kind: ChatKind, topic: str, template: str, context: str) -> ChatPrompt:
    rng = random.Random(f"{topic}|{template}|{context}")
    instruction = f"{template} {context} ?".format(
        topic=topic, place=rng.choice(world.PLACES), object=rng.choice(world.OBJECTS)
    )
    return ChatPrompt(
        "chat:" + instruction.replace(" ", "_"), (("user", instruction),), kind, topic
    )


@cache
def all_chat(kind: ChatKind, split: Split) -> tuple[ChatPrompt, ...]:
    """Every prompt of one kind in a split."""
    parts = itertools.product(*CHAT_PARTS[kind], world.CONTEXTS)
    prompts = (_chat_prompt(kind, *part) for part in parts)
    return tuple(p for p in prompts if split_of(p.id) == split)


def chat_prompts(kind: ChatKind, split: Split, n: int, seed: int = 0) -> list[ChatPrompt]:
    """n prompts of one kind; topics are shared between the splits, whole instructions are not."""
    ordered = sorted(all_chat(kind, split), key=lambda p: _hash(f"{seed}:{p.id}"))
    return _take(ordered, n, kind, split)


def n_chat_prompts(kind: ChatKind, split: Split) -> int:
    """How many prompts of one kind a split has."""
    return len(all_chat(kind, split))


# --- biographies -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Biography:
    """A life in three sentences that never names the profession."""

    id: str
    text: str
    profession: str
    gender: str


def random_biography(rng: random.Random) -> Biography:
    """A biography of any split."""
    profession, gender = rng.choice(world.PROFESSIONS), rng.choice(("female", "male"))
    cues: list[str] = []
    while len(cues) < 4:
        reliable = rng.random() < CUE_RELIABILITY
        cue = rng.choice(
            world.PROFESSION_CUES[profession if reliable else rng.choice(world.PROFESSIONS)]
        )
        if cue not in cues:
            cues.append(cue)
    names = world.FEMALE_NAMES if gender == "female" else world.MALE_NAMES
    text = world.BIOGRAPHY.format(
        name=rng.choice(names), pronoun="she" if gender == "female" else "he",
        place=rng.choice(world.PLACES),
        c0=cues[0], c1=cues[1], c2=cues[2], c3=cues[3],
    )  # fmt: skip
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Biography(f"bio:{digest}", text, profession, gender)


def biographies(split: Split, n: int, seed: int = 0) -> list[Biography]:
    """n different biographies of a split."""
    rng = random.Random(f"biographies:{split}:{seed}")
    found: dict[str, Biography] = {}
    while len(found) < n:
        biography = random_biography(rng)
        if split_of(biography.id) == split:
            found[biography.id] = biography
    return list(found.values())


def balanced_biographies(
    professions: tuple[str, ...], split: Split, n: int, seed: int = 0
) -> dict[str, list[Biography]]:
    """n biographies of each profession, every other one of a woman."""
    drawn = 4 * n * len(world.PROFESSIONS)
    while True:
        found: dict[str, dict[str, list[Biography]]] = {
            name: {"female": [], "male": []} for name in professions
        }
        for biography in biographies(split, drawn, seed):
            if biography.profession in found:
                found[biography.profession][biography.gender].append(biography)
        turns = {
            name: [one for pair in zip(*own.values(), strict=False) for one in pair]
            for name, own in found.items()
        }
        if all(len(own) >= n for own in turns.values()):
            return {name: own[:n] for name, own in turns.items()}
        drawn *= 2
