import copy

import pytest
from golden_tokenizers import tokenizer
from transformers import PreTrainedTokenizerFast

from finetune.families.llama3_v2_5 import LLAMA3_V2_5
from finetune.families.v2_0 import V2_0
from finetune.templates.probe import TemplateMismatchError, check_chat_template

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
