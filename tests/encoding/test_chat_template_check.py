import copy
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_tokenizers import tokenizer, written
from tokenizers import processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.chat_template_check import TemplateMismatchError, check_chat_template, complete_layout
from finetune.encoding.encoder import Encoder
from finetune.families import by_name, usable
from finetune.families.llama3_v2_5 import LLAMA3_V2_5
from finetune.families.v2_0 import V2_0
from finetune.models import load_tokenizer
from finetune.sample import Message, Sample, Source, Text
from finetune.templates.prompt_types import PromptLayout

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
        ("{{ raise_exception('no') }}", "cannot render user, assistant, user .TemplateError: no"),
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


def completed(family: str, tokenizer: PreTrainedTokenizerBase) -> PromptLayout:
    return complete_layout(by_name(family), by_name(family).layout({}), tokenizer)


@pytest.mark.parametrize("family", ["v2_6", "o2_6", "v4_0", "v4_5", "o4_5"])
@pytest.mark.parametrize("thinking", [False, True, None])
def test_chatml_templates_agree(family: str, thinking: Any) -> None:
    made = Encoder(by_name(family), written(family), {}, enable_thinking=thinking)
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
    assert "'a folder without template' has no chat template: MiniCPM-o 2.6 uses default_system 'You are" in caplog.text


@pytest.fixture(scope="module")
def thinker(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 4.6 whose chat template asks for thinking unless it is told not to, as 4.6-Thinking has it."""
    folder = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(tiny("v4_6"), folder)
    file = folder / "chat_template.jinja"
    before, after = "enable_thinking is true", "enable_thinking is false"
    text = file.read_text(encoding="utf-8")
    assert before in text
    opened, closed = "{{- '<think>\\n' -}}", "{{- '<think>\\n\\n</think>\\n\\n' -}}"
    assert text.count(opened) == text.count(closed) == 1
    text = text.replace(before, after).replace(opened, "@").replace(closed, opened).replace("@", closed)
    file.write_text(text, encoding="utf-8")
    return folder


def test_a_checkpoint_that_thinks_by_default(thinker: Path) -> None:
    base = resolve_base(str(thinker))
    made = Encoder(base.family, load_tokenizer(thinker), base.settings)
    assert made.layout.enable_thinking is True
    assert check_chat_template(base.family, made.tokenizer, made.layout, made.prompt_tokenizer) is True
    asked = Message("user", (Text("第 3 题?"),))
    for answer, trained in (
        ("<think>\n三。\n</think>\n\nThree.", "<think>\n三。\n</think>\n\nThree.<|im_end|>"),
        ("Three.", "\n</think>\n\nThree.<|im_end|>"),
    ):
        sample = Sample("x", Source("data.json", 0), (asked, Message("assistant", (Text(answer),), train=True)))
        prompt = made.encode(sample, generate=True).input_ids.tolist()
        example = made.encode(sample)
        assert str(made.tokenizer.decode(prompt)).endswith("<|im_start|>assistant\n<think>\n")
        # What is trained goes on exactly where the prompt of inference ends.
        assert example.input_ids[: len(prompt)].tolist() == prompt
        assert made.tokenizer.decode(example.labels[example.labels >= 0]) == trained
        conversation = [{"role": "user", "content": "第 3 题?"}, {"role": "assistant", "content": answer}]
        theirs = str(made.tokenizer.apply_chat_template(conversation, tokenize=False))
        assert str(made.tokenizer.decode(example.input_ids)) == theirs
    told = Encoder(base.family, made.tokenizer, base.settings, enable_thinking=False)
    assert told.layout.enable_thinking is False
    assert check_chat_template(base.family, made.tokenizer, told.layout) is True


@pytest.mark.parametrize("family", [family.name for family in usable()])
def test_tiny_checkpoints_agree_with_their_templates(tiny, family: str) -> None:
    base = resolve_base(str(tiny(family)))
    made = Encoder(base.family, load_tokenizer(base.folder), base.settings)
    agrees = check_chat_template(base.family, made.tokenizer, made.layout, made.prompt_tokenizer)
    assert agrees == bool(made.tokenizer.chat_template)
    assert made.layout.enable_thinking in (False, None)


def test_the_probe_reads_chinese_and_digits() -> None:
    with pytest.raises(TemplateMismatchError) as caught:
        check_chat_template(LLAMA3_V2_5, with_template("llama3", TURNS))
    assert all(len(re.findall(kind, str(caught.value))) > 9 for kind in ("[一-龥]", "[0-9]"))
