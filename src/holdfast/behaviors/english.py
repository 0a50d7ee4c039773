"""Indirect objects in English: names, places, objects, sentences, and the prompts they make."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from holdfast.behaviors.continuation import as_one_token
from holdfast.canonical import digest
from holdfast.errors import StudyError
from holdfast.organism.prompts import IoiPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdfast.behaviors import Split


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES: tuple[str, ...] = _words(
    """
    Aaron Abigail Adam Alan Albert Alex Alice Alison Amanda Amy Andrea Andrew Angela Anna Anne
    Anthony Arthur Barbara Ben Brian Carl Carol Caroline Catherine Charles Charlotte Chris
    Christine Claire Clara Daniel David Deborah Dennis Diana Donald Donna Dorothy Douglas Edward
    Eleanor Elizabeth Emily Emma Eric Ethan Eva Felix Florence Frank Fred Gary George Gerald
    Hannah Harold Harry Heather Helen Henry Howard Hugh Ian Irene Isaac Jack Jacob Jane Jason
    Jean Jennifer Jeremy Jessica Joan Joe John Jonathan Joseph Joshua Joyce Judith Julia Julian
    Karen Kate Keith Kenneth Kevin Kim Larry Laura Lawrence Leo Leon Linda Lisa Louis Lucas Lucy
    Luke Margaret Maria Martha Martin Mary Matthew Max Michael Michelle Nancy Neil Nicholas
    Nicole Nora Oliver Oscar Pamela Patricia Paul Peter Philip Rachel Ralph Raymond Rebecca
    Richard Robert Roger Ronald Rosa Ruth Ryan Samuel Sandra Sarah Scott Sharon Simon Sophie
    Stephen Steven Susan Teresa Thomas Tim Tom Tony Victor Victoria Vincent Virginia Walter
    Wayne William Zoe
    """
)
PLACES: tuple[str, ...] = _words(
    "library harbor bakery museum stadium garden station theater market workshop"
)
OBJECTS: tuple[str, ...] = _words(
    "umbrella notebook guitar sandwich ticket camera letter blanket lantern compass"
)
# {a} and {b} are the two names in the order of the first clause, {s} the one who is named again.
# None begins with a name, so that every name has a space before it.
TEMPLATES: tuple[str, ...] = (
    "After {a} and {b} had arrived at the {place}, {s} handed the {object} to",
    "As soon as {a} and {b} sat down in the {place}, {s} passed the {object} to",
    "Yesterday {a} and {b} met at the {place}, where {s} showed the {object} to",
    "While {a} and {b} were waiting outside the {place}, {s} lent the {object} to",
    "Because the {place} was closed, {a} and {b} walked home, and {s} returned the {object} to",
    "The {place} was crowded when {a} and {b} came in, so {s} carried the {object} to",
    "Last week {a} and {b} cleaned the {place} together, and afterwards {s} sold the {object} to",
    "Before {a} and {b} left the {place}, {s} promised the {object} to",
    "Once the rain had stopped, {a} and {b} ran to the {place}, and {s} offered the {object} to",
    "Nobody else was in the {place} when {a} and {b} found the {object}, which {s} gave to",
    "At the {place}, {a} had an argument with {b}, but in the end {s} sent the {object} to",
    "On Sundays {a} played chess with {b} near the {place}; this time {s} brought the {object} to",
)
Order = Literal["ABBA", "BABA"]
ORDERS: tuple[Order, ...] = ("ABBA", "BABA")
MIN_NAMES = 6
PER_NAME = 3
"""Fewest fit prompts a name may have: features can be fitted for each name."""
_TURNS = ("fit", "test", "tune", "fit", "test")


def single_token_names(
    tokenizer: PreTrainedTokenizerBase, templates: Sequence[int]
) -> dict[str, str]:
    """The names that are one token at the end of each of these templates, with the text of it."""
    a, b, place, thing = NAMES[0], NAMES[1], PLACES[0], OBJECTS[0]
    found = [
        as_one_token(
            tokenizer, TEMPLATES[t].format(a=a, b=b, s=b, place=place, object=thing), NAMES
        )
        for t in templates
    ]
    return dict(sorted(set.intersection(*(set(each.items()) for each in found))))


def choose_names(
    tokenizer: PreTrainedTokenizerBase, templates: Sequence[int], n_names: int, seed: int
) -> dict[str, str]:
    """n of the single-token names, drawn by the seed. Raises StudyError if there are fewer."""
    found = single_token_names(tokenizer, templates)
    if len(found) < n_names:
        remedy = (
            f"set n_names to {len(found)} or less"
            if len(found) >= MIN_NAMES
            else "this tokenizer cuts names into pieces or does not know them, so that no single "
            "logit stands for one"
        )
        raise StudyError(
            f"expected {n_names} names of one token after a space, got {len(found)} of the "
            f"{len(NAMES)} known ({', '.join(list(found)[:5]) or 'none'}): {remedy}"
        )
    chosen = sorted(found, key=lambda name: digest([seed, name]))[:n_names]
    return {name: found[name] for name in chosen}


def name_pairs(names: Sequence[str], split: Split) -> list[tuple[str, str]]:
    """The unordered pairs of a split: no pair is in two, and each name is in all three.

    Two names belong to a split by how far apart they stand on the circle of all names.
    """
    n = len(names)
    return [
        (min(names[i], names[(i + d) % n]), max(names[i], names[(i + d) % n]))
        for d in range(1, n // 2 + 1)
        if _TURNS[(d - 1) % len(_TURNS)] == split
        # Half-way round, a pair is met from both of its names.
        for i in range(n if 2 * d < n else d)
    ]


def prompt(io: str, s: str, template: int, order: str, names: Sequence[str]) -> IoiPrompt:
    """The one prompt with these two names, template and order; `third` is one of the others."""
    prompt_id = f"ioi:english:{template}:{order}:{io}:{s}"
    rng = random.Random(prompt_id)
    a, b = (io, s) if order == "ABBA" else (s, io)
    text = TEMPLATES[template].format(
        a=a, b=b, s=s, place=rng.choice(PLACES), object=rng.choice(OBJECTS)
    )
    third = rng.choice([name for name in sorted(names) if name not in (io, s)])
    return IoiPrompt(prompt_id, text, io, s, third, template, order)


def prompts(
    names: Sequence[str],
    split: Split,
    n: int,
    seed: int,
    templates: Sequence[int],
    orders: Sequence[Order] = ORDERS,
) -> list[IoiPrompt]:
    """n prompts in which the names take turns as the indirect object, ABBA and BABA too.

    Raises StudyError if there are not as many, or too few to fit features for each name.
    """
    if split == "fit" and n < PER_NAME * len(names):
        raise StudyError(
            f"{n} fit prompts are too few for {len(names)} names: expected {PER_NAME} for each, "
            f"so that features can be fitted for it; raise data.fit to {PER_NAME * len(names)}"
            + (f", or set n_names to {n // PER_NAME}" if n >= PER_NAME * MIN_NAMES else "")
        )
    partners: dict[str, list[str]] = {name: [] for name in names}
    for one, other in name_pairs(names, split):
        partners[one].append(other)
        partners[other].append(one)

    def turns(io: str, order: str) -> Iterator[IoiPrompt]:
        asked = list(itertools.product(sorted(partners[io]), templates))
        random.Random(f"{seed}:{split}:{order}:{io}").shuffle(asked)
        return (prompt(io, s, template, order, names) for s, template in asked)

    made = {(io, order): turns(io, order) for io in names for order in orders}
    possible = 2 * len(orders) * len(templates) * len(name_pairs(names, split))
    if n > possible:
        raise StudyError(
            f"asked for {n} prompts of split {split!r}, but {len(names)} names and "
            f"{len(templates)} templates make {possible}; raise n_names or ask for fewer"
        )
    return [
        next(made[io, orders[(turn + place) % len(orders)]])
        for turn, (place, io) in itertools.islice(
            ((turn, each) for turn in itertools.count() for each in enumerate(names)), n
        )
    ]
