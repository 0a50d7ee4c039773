"""Chat templates: where the instruction ends is known exactly, and nothing is there twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from holdfast.batch import Example
from holdfast.chat import render
from holdfast.errors import StudyError
from holdfast.organism.tokenizer import build_tokenizer
from holdfast.subject import Subject
from holdfast.testing import tiny_subject

TRIMS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim }}{{ '<over>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
"""Gemma's way: its own BOS, trimmed contents, no system role."""

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token + '<head>system</head>\n\nToday: ' + date_string + '\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<eot>' }}"
    "{% for m in messages %}{{ '<head>' + m['role'] + '</head>\n\n' + m['content'] + '<eot>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<head>assistant</head>\n\n' }}{% endif %}"
)
"""Llama 3's way: headers, a system turn with a date."""

THINKS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '[end]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '[think][/think]' }}{% endif %}"
    "{% endif %}"
)
"""A reasoning model's way: a thought comes before the answer unless it is told not to."""

MARKS = ["<s>", "<unk>", "<pad>", "<turn>", "<over>", "<head>", "</head>", "<eot>", "<user>"]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """Letter by letter, with a BOS that it puts in front by itself."""
    letters = [chr(i) for i in range(32, 127)] + ["\n"]
    ids = {token: i for i, token in enumerate([*MARKS, *letters])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens=MARKS[3:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


GEMMA, LLAMA, THINKER, ORGANISM = (
    tokenizer_with(TRIMS), tokenizer_with(DATED), tokenizer_with(THINKS), build_tokenizer()
)  # fmt: skip
SUFFIX = {
    "gemma": (GEMMA, "<over>\n<turn>model\n"),
    "llama": (LLAMA, "<eot><head>assistant</head>\n\n"),
    "thinker": (THINKER, "[end][assistant][think][/think]"),
    "organism": (ORGANISM, " <end> <assistant>"),
}


@pytest.mark.parametrize("name", SUFFIX)
def test_the_suffix_is_what_the_template_puts_after_the_instruction(name: str) -> None:
    tokenizer, suffix = SUFFIX[name]
    text, found = render(tokenizer, "say something about boxes")
    assert found == suffix and text.endswith(f"say something about boxes{suffix}")


@pytest.mark.parametrize("name", SUFFIX)
@given(instruction=st.text(st.characters(codec="ascii", exclude_categories=("Cc",)), max_size=30))
def test_any_instruction_is_found_again(name: str, instruction: str) -> None:
    """One that says what the template says, too."""
    tokenizer, suffix = SUFFIX[name]
    for said in (instruction, f" {instruction}\n", suffix.strip(), "model", "assistant", "<end>"):
        text, found = render(tokenizer, said)
        assert found == suffix
        assert text.removesuffix(found).rstrip().endswith(said.strip())


def test_a_template_may_trim_the_instruction() -> None:
    assert render(GEMMA, "  two words \n") == render(GEMMA, "two words")
    assert render(LLAMA, "two words \n").text.endswith(
        "two words \n<eot><head>assistant</head>\n\n"
    )


def test_the_date_is_the_same_every_day() -> None:
    text = render(LLAMA, "hello").text
    assert "Today: 26 Jul 2024\n" in text
    plain = tokenizer_with("{{ strftime_now('%Y-%m-%d') }}{{ '|' + messages[0]['content'] + '|' }}")
    assert render(plain, "hello") == ("26 Jul 2024|hello|", "|")


def test_a_system_prompt_stands_before_the_instruction() -> None:
    text, suffix = render(LLAMA, "hello", system="Be brief.")
    assert text.index("Be brief.") < text.index("hello") and suffix == SUFFIX["llama"][1]
    with pytest.raises(StudyError, match="cannot render a system prompt: no system role here; le"):
        render(GEMMA, "hello", system="Be brief.")


@pytest.mark.parametrize("name", ["gemma", "llama", "organism"])
def test_a_subject_sees_one_bos_and_the_templates_part(name: str) -> None:
    tokenizer, suffix = SUFFIX[name]
    made = tiny_subject()
    subject = Subject.of("named", made.model, tokenizer, {})
    text, found = render(tokenizer, "say boxes")
    example = Example("one", text, "A", ("B",), ("B",), "one", suffix=found, special=False)
    batch = subject.batch([example])
    assert batch.bos.all() and batch.tokens[0].tolist().count(tokenizer.bos_token_id) == 1
    start = int(batch.template[0])
    after = tokenizer.decode(batch.tokens[0, start:], skip_special_tokens=False)
    assert after.replace(" ", "").strip() == suffix.replace(" ", "").strip()


def test_no_template_and_a_broken_one_are_named() -> None:
    with pytest.raises(
        StudyError, match=r"no chat template: .*instruction-tuned .*chat_template.jinja"
    ):
        render(tokenizer_with(None), "hello")
    with pytest.raises(StudyError, match="cannot render a user turn"):
        render(tokenizer_with("{{ raise_exception('never') }}"), "hello")
    with pytest.raises(StudyError, match="cannot render a user turn"):
        render(tokenizer_with("{% if %}"), "hello")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] | upper }}!",
        "no place for it",
        "{{ messages[0]['content'][:3] }}!",
        "{{ '!' * (messages[0]['content'] | length) }}{{ messages[0]['content'] | reverse }}",
    ],
)
def test_a_template_that_changes_the_instruction_is_refused(template: str) -> None:
    with pytest.raises(StudyError, match="does not render instructions as they are: exp") as caught:
        render(tokenizer_with(template), "Hello there")
    assert "hello" not in str(caught.value).lower(), "which may be what nobody should read"


@pytest.mark.parametrize("template", [TRIMS, DATED, THINKS])
def test_earlier_turns_stand_before_the_last_in_the_templates_own_form(template: str) -> None:
    tokenizer = tokenizer_with(template)
    earlier = [("  who has the ring? ", "Mita has it."), ("why?", "She found it.")]
    made = render(tokenizer, "where is it?", earlier=earlier)
    alone = render(tokenizer, "where is it?")
    assert made.suffix == alone.suffix and made.text.endswith("where is it?" + made.suffix)
    said = ["who has the ring?", "Mita has it.", "why?", "She found it.", "where is it?"]
    places = [made.text.find(each) for each in said]
    assert -1 not in places and places == sorted(places)
    if template is not TRIMS:
        assert render(tokenizer, "b", "be kind", [("a", "c")]).text.count("be kind") == 1
