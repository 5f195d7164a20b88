import copy
import logging
from typing import Any

import pytest
from golden_tokenizers import tokenizer, written
from tokenizers import processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.encoding.encoder import Encoder
from finetune.families import by_name
from finetune.families.llama3_v2_5 import LLAMA3_V2_5
from finetune.families.v2_0 import V2_0
from finetune.templates.probe import TemplateMismatchError, check_chat_template, complete_layout
from finetune.templates.rendering import Layout

TURNS = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
)
HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
MINICPM = (
    "{{ '<s>' }}{% for m in messages %}{{ ('<用户>' if m.role == 'user' else '<AI>') + m.content }}{% endfor %}<AI>"
)


def with_template(name: str, template: str | None) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer(name))
    changed.chat_template = template
    return changed


def test_no_template_is_nothing_to_compare() -> None:
    assert check_chat_template(LLAMA3_V2_5, with_template("llama3", None)) is False


def test_published_templates_agree() -> None:
    assert check_chat_template(LLAMA3_V2_5, with_template("llama3", TURNS + HEADER)) is True
    assert check_chat_template(V2_0, with_template("minicpm", MINICPM)) is True


def test_the_training_template_of_the_official_scripts() -> None:
    with pytest.raises(TemplateMismatchError) as caught:
        check_chat_template(LLAMA3_V2_5, with_template("llama3", TURNS))
    text = str(caught.value)
    assert (
        "after turn 2 (user), where the answer begins, it has '<|eot_id|>', ours '<|eot_id|><|start_header_id|>" in text
    )
    assert text.count("First question?") == text.count("Second question?") == 2
    assert "openbmb/MiniCPM-Llama3-V-2_5" in text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TURNS.replace("\n\n", "\n") + HEADER, r"before turn 0 \(user\) it has .*; after turn 0 \(user\) it has "),
        (HEADER, r"turn 0 \(user\), turn 1 \(assistant\), turn 2 \(user\) does not appear"),
        ("{{ raise_exception('no') }}", "cannot render user, assistant, user: no"),
    ],
)
def test_other_differences(template: str, message: str) -> None:
    with pytest.raises(TemplateMismatchError, match=message):
        check_chat_template(LLAMA3_V2_5, with_template("llama3", template))


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def system(text: str) -> str:
    turn = f"<|im_start|>system\n{text}<|im_end|>\n"
    return "{% if messages[0].role != 'system' %}{{ '" + turn + "' }}{% endif %}" + CHATML


def changed(family: str, template: str | None, *, bos: bool = True) -> PreTrainedTokenizerBase:
    """The small tokenizer of a family with another chat template, and perhaps without the bos that it adds."""
    made = copy.deepcopy(written(family))
    made.chat_template = template
    if not bos:
        made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore
    return made


def completed(family: str, tokenizer: PreTrainedTokenizerBase) -> Layout:
    return complete_layout(by_name(family), by_name(family).layout({}), tokenizer)


@pytest.mark.parametrize("family", ["v2_6", "o2_6", "v4_0", "v4_5", "o4_5"])
@pytest.mark.parametrize("thinking", [False, True, None])
def test_chatml_templates_agree(family: str, thinking: Any) -> None:
    made = Encoder.from_config(by_name(family), written(family), {}, enable_thinking=thinking)
    assert check_chat_template(made.family, made.tokenizer, made.layout) is True
    assert made.layout.assumed == ()


@pytest.mark.parametrize("family", ["v2_6", "v4_5", "o4_5"])
def test_what_is_known_is_not_asked(family: str) -> None:
    made = changed(family, system("You are somebody else."))
    layout = by_name(family).layout({})
    assert complete_layout(by_name(family), layout, made) is layout
    with pytest.raises(TemplateMismatchError, match=r"before turn 0 \(user\) it has .*somebody else"):
        check_chat_template(by_name(family), made)


@pytest.mark.parametrize("text", ["Be kind.\nAlways.", "", None])
def test_the_default_system_text_is_the_template_s(text: str | None) -> None:
    made = changed("o2_6", CHATML if text is None else system(text.replace("\n", "\\n")))
    layout = completed("o2_6", made)
    assert (layout.default_system, layout.assumed) == (text, ())
    assert check_chat_template(by_name("o2_6"), made)


def test_a_template_that_begins_otherwise() -> None:
    made = changed("o2_6", "{{ 'Today is Monday. ' }}" + CHATML)
    with pytest.raises(TemplateMismatchError, match=r"begins with 'Today is Monday. ', the prompt of MiniCPM-o 2.6"):
        completed("o2_6", made)


def test_a_template_of_another_family_is_shown_by_the_comparison() -> None:
    with pytest.raises(TemplateMismatchError, match=r"before turn 0 \(user\) it has '<用户>'"):
        check_chat_template(by_name("o2_6"), changed("o2_6", MINICPM.replace("{{ '<s>' }}", "")))


@pytest.mark.parametrize(
    ("template", "adds", "bos", "assumed"),
    [
        (CHATML, True, "<s>", ()),
        (CHATML, False, "", ()),
        ("{{ '<s>' }}" + CHATML, False, "<s>", ()),
        ("{{ '<s>' }}" + CHATML, True, "<s>", ()),
        (None, True, "<s>", ("default_system",)),
        (None, False, "<s>", ("bos", "default_system")),
    ],
)
def test_bos(template: str | None, adds: bool, bos: str, assumed: tuple[str, ...]) -> None:
    made = changed("v4_0", template, bos=adds)
    layout = completed("v4_0", made)
    assert (layout.bos, layout.assumed) == (bos, assumed)
    assert check_chat_template(by_name("v4_0"), made) is (template is not None)


def test_what_nobody_tells_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    made = changed("o2_6", None)
    made.name_or_path = "a folder without template"
    with caplog.at_level(logging.WARNING):
        layouts = [completed("o2_6", made) for _ in range(3)]
    assert layouts[0].assumed == ("default_system",)
    assert layouts[0].default_system == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert len(caplog.messages) == 1
    assert "'a folder without template' has no chat template: MiniCPM-o 2.6 gets default_system 'You are" in caplog.text
