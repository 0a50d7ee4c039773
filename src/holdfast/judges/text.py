"""A reply's text made comparable: folded writing, what is only quoted taken out, sentences."""

from __future__ import annotations

import re
import unicodedata

_FOLDED = str.maketrans(
    dict.fromkeys("’‘ʼʹ´`＇‛′", "'")
    | dict.fromkeys("“”„‟«»″＂〝〞「」『』", '"')
    | dict.fromkeys("‐‑‒–—―−", "-")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad")  # invisible
)
# Tokenizers of words put spaces where people do not: "sorry , i ca n't".
_SPACED_STOP = re.compile(r"[ \t]+(?=[,.;:!?](?:\s|$))")
_SPACED_CLITIC = re.compile(r"[ \t]+(?=(?:n't|'(?:m|s|re|ve|ll|d))\b)")
_EMPHASIS = re.compile(r"\*+|(?<!\w)_+|_+(?!\w)|^[ \t]*#+", re.MULTILINE)

_CODE = re.compile(r"```.*?(?:```|\Z)|(?<!\w)`[^`\n]+`(?!\w)", re.DOTALL)
_BLOCK_QUOTE = re.compile(r"^[ \t]*>.*$", re.MULTILINE)
# A quotation opens after no letter and closes before none, so that apostrophes and inches are
# none; one that is never closed (a text cut at the limit) ends with its paragraph.
_DOUBLE = re.compile(r'(?<!\w)"(?=[^\s"]).*?(?:(?<=\S)"(?!\w)|(?=\n\s*\n)|\Z)', re.DOTALL)
_SINGLE = re.compile(r"(?<![\w'])'(?=[^\s'])[^\n]*?(?<=[^\s'])'(?![\w'])")
_ROLE = re.compile(r"^\W*(?:assistant|ai|bot|chatbot|model|answer|response|reply)\s*:\s*")

_SENTENCE_END = re.compile(r"""(?:(?<=[.!?…])["')\]]*\s+|(?<=[。！？])|\n)+""")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:'[^\W_]+)*")


def fold(text: str) -> str:
    """The text in one writing: case, apostrophes, quotation marks, dashes, emphasis, spaces."""
    text = unicodedata.normalize("NFKC", text.translate(_FOLDED)).casefold()
    text = _EMPHASIS.sub(" ", text.translate(_FOLDED))
    text = _SPACED_CLITIC.sub("", _SPACED_STOP.sub("", text))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(lines).strip()


def words(text: str) -> list[str]:
    """The words of a text in one writing; each sign of a script without spaces is one."""
    return _WORD.findall(fold(text))


def readable(text: str) -> bool:
    """Whether there is a letter or a digit."""
    return any(c.isalnum() for c in text)


def own_words(text: str) -> str:
    """The folded text without what it only quotes: quotations, code, quoted blocks.

    A text that is a quotation as a whole is nobody else's words: its marks are taken off.
    """
    code = _CODE.sub(" ", text)
    folded = fold(_BLOCK_QUOTE.sub(" ", code))
    left = _SINGLE.sub(" ", _DOUBLE.sub(" ", folded))
    if not readable(left):
        left = fold(text.replace("```", " ")).replace('"', " ").strip(" >'")
    return _ROLE.sub("", left.strip())


def sentences(text: str) -> list[str]:
    """The sentences and lines of a folded text that have a letter, without their full stops."""
    parts = (" ".join(part.split()) for part in _SENTENCE_END.split(text))
    return [part.rstrip(".!…。！ ") for part in parts if any(c.isalpha() for c in part)]
