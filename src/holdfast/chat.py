"""Instructions in a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from holdfast.errors import StudyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "⟪instruction⟫"  # stands nowhere in a template
_DATE = "26 Jul 2024"
# Some templates write today's date into the prompt. A macro hides the function they ask.
_FIXED_DATE = "{% macro strftime_now(format) %}" + _DATE + "{% endmacro %}"


class Rendered(NamedTuple):
    """A prompt that ends where the answer begins; suffix: its end, what the template put after
    the instruction."""

    text: str
    suffix: str


def render(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    system: str | None = None,
    earlier: Sequence[tuple[str, str]] = (),
) -> Rendered:
    """One user turn in the tokenizer's chat template, up to where the assistant answers.

    earlier: the exchanges before it, what the user said and what was answered each time. The text
    has the template's own special tokens: encode it without adding any, or BOS is there twice. A
    date in the template is fixed, and templates that can think before they answer are asked not to:
    the answer is read at the last token. Raises StudyError without a template, for a system prompt
    or earlier turns it does not take, and if it changes the instruction by more than trimming it.
    """
    suffix = _rendered(tokenizer, _PROBE, system, earlier).rpartition(_PROBE)[2]
    text = _rendered(tokenizer, instruction, system, earlier)
    # A template may trim the instruction, and what the instruction says may be in the suffix too.
    kept = text.removesuffix(suffix).rstrip()
    if not text.endswith(suffix) or not kept.endswith(instruction.strip()):
        # No words of the instruction: what refuses it may be shown where prompts are not.
        raise StudyError(
            f"the chat template of {_name(tokenizer)} does not render instructions as they are: "
            f"expected the {len(instruction.strip())} characters of one and {suffix!r} after them, "
            f"got a text of {len(text)} characters that does not end so; render the prompts "
            "yourself and give them as plain text"
        )
    at = 0
    for number, (said, _) in enumerate(earlier, 1):
        at = text.find(said.strip(), at)
        if at < 0:
            raise StudyError(
                f"the chat template of {_name(tokenizer)} leaves out turn {number} of a "
                "conversation: expected every earlier turn before the last; use a tokenizer whose "
                "template renders several turns"
            )
        at += len(said.strip())
    return Rendered(text, suffix)


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    system: str | None,
    earlier: Sequence[tuple[str, str]],
) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise StudyError(
            f"{_name(tokenizer)} has no chat template: expected the tokenizer of a chat model; "
            "name the instruction-tuned model, put the template it was trained with into its "
            "folder as chat_template.jinja, or, for questions, leave `chat` out"
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    for said, answered in earlier:
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": answered})
    messages.append({"role": "user", "content": instruction})
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _FIXED_DATE + template
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            date_string=_DATE,
            enable_thinking=False,
        )
    except (TemplateError, ValueError, TypeError) as error:
        what = "a system prompt" if system is not None else "a user turn"
        what = "several turns" if earlier else what
        given = (instruction, *(said for said, _ in earlier))
        quoted = any(each.strip() and each.strip() in str(error) for each in given)
        why = type(error).__name__ if quoted else str(error)
        raise StudyError(
            f"the chat template of {_name(tokenizer)} cannot render {what}: {why}"
            + ("; leave the system prompt out" if system is not None else "")
        ) from None
    return text


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What messages call a tokenizer; the last part of where it is from, which may be a path."""
    return str(tokenizer.name_or_path or "the tokenizer").rstrip("/").rpartition("/")[2]
