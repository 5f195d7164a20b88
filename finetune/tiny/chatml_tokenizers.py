"""Tokenizers of the tiny ChatML checkpoints: byte-level BPE with Qwen's split, or MiniCPM4's own vocabulary (4.0)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from finetune.tiny import corpus
from finetune.tiny.trained_tokenizers import BASE_SIZE, TOKEN_FLAGS, added_tokens_decoder, bos_template, write_json

_MARKS = tuple(f"<{slash}{name}>" for name in ("image", "ref", "box", "quad", "point", "slice") for slash in ("", "/"))
IMAGE_MARKS = (*_MARKS, "<image_id>", "</image_id>")
TURN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Added tokens that are not special, as in the published files.
THINKING = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
AUDIO_MARKS = ("<|audio_start|>", "<|audio|>", "<|audio_end|>", "<|spk_bos|>", "<|spk|>", "<|spk_eos|>", "<|tts_bos|>")
DUPLEX_MARKS = ("<|listen|>", "<|speak|>", "<|turn_eos|>", "<|chunk_eos|>", "<|tts_pad|>")
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TURNS = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
BARE_TEMPLATE = _TURNS


def template_with_system(text: str) -> str:
    """ChatML that begins with a system turn of this text unless the conversation brings its own."""
    system = f"'<|im_start|>system\n{text}<|im_end|>\n'"
    return "{%- if messages[0].role != 'system' %}{{ " + system + " }}{%- endif %}" + _TURNS


# Tool descriptions in the system turn, after its own text; OTHERWISE is replaced by the default text.
_TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}"
    "{{ messages[0].content + '\n\n' if messages[0].role == 'system' else 'OTHERWISE' }}{{ '# Functions' }}"
    "{%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{%- endfor %}"
    "{{ '\nCall them so: <tool_call>{name, arguments}</tool_call><|im_end|>\n' }}{%- endif %}"
)
# Tool calls after an answer, whose own text is ``spoken``.
_CALLS = (
    "{%- for call in message.tool_calls or [] %}{%- if spoken or not loop.first %}{{ '\n' }}{%- endif %}"
    "{%- set call = call.function or call %}"
    '{{ \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}{{ call.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{%- endfor %}"
)
_RESULTS = (
    "{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}"
    "{{ '\n<tool_response>\n' + text + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{%- endif %}"
)
# Answers after the last question keep their thinking, earlier ones lose it.
THINKING_TEMPLATE = (
    _TOOLS.replace("OTHERWISE", "")
    + "{%- set last = namespace(user=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set text = message.content %}"
    "{%- if message.role == 'assistant' %}{%- set thought = message.reasoning_content or '' %}"
    "{%- if not thought and '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- set spoken = text %}{%- if loop.index0 > last.user and (loop.last or thought) %}"
    "{%- set text = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') %}{%- endif %}"
    "{%- endif %}{%- if message.role == 'tool' %}"
    + _RESULTS
    + "{%- elif message.role != 'system' or not tools %}{{ '<|im_start|>' + message.role + '\n' + text }}"
    + _CALLS
    + "{{ '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{%- elif enable_thinking is defined and enable_thinking is true %}{{ '<think>\n' }}{%- endif %}{%- endif %}"
)


def template_with_tools(text: str) -> str:
    """As ``template_with_system``, with tool support."""
    default = f"<|im_start|>system\n{text}<|im_end|>\n"
    return (
        _TOOLS.replace("OTHERWISE", text + "\n\n")
        + "{%- if not tools and messages[0].role != 'system' %}{{ '"
        + default
        + "' }}{%- endif %}"
        "{%- for message in messages %}{%- set text = message.content %}{%- set spoken = text %}"
        "{%- if message.role == 'tool' %}"
        + _RESULTS
        + "{%- elif message.role != 'system' or not tools %}{{ '<|im_start|>' + message.role + '\n' + text }}"
        + _CALLS
        + "{{ '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatML:
    """Contents of the tokenizer folder of a ChatML family.

    Attributes:
        template: its chat template.
        special: added tokens flagged special, in order of their ids.
        plain: added tokens that are not, before them.
        base: special tokens at the end of the base vocabulary.
        tokenizer_class: as tokenizer_config.json names it.
        names: bos_token and the like.
        split_files: vocab.json, merges.txt and added_tokens.json in place of tokenizer.json.
    """

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    base: tuple[str, ...] = ("<unk>",)
    tokenizer_class: str = "MiniCPMVTokenizerFast"
    names: dict[str, str]
    split_files: bool = False


_QWEN_NAMES = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<unk>",
}
_OMNI = "MiniCPMOTokenizerFast"
_QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHATML = {
    "v2_6": ChatML(
        template=template_with_system("You are a helpful assistant."),
        special=(*TURN_MARKS, *IMAGE_MARKS),
        names=_QWEN_NAMES,
    ),
    "o2_6": ChatML(
        template=template_with_tools(_QWEN_SYSTEM),
        special=(*TURN_MARKS, *IMAGE_MARKS, "<unit>", "</unit>", *AUDIO_MARKS),
        tokenizer_class=_OMNI,
        names=_QWEN_NAMES,
    ),
    # The image tags are inside the base vocabulary, the turn tokens after it.
    "v4_0": ChatML(
        template=BARE_TEMPLATE,
        special=("<|im_end|>", "<|im_start|>"),
        base=("<unk>", "<s>", "</s>", *IMAGE_MARKS),
        names={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
    ),
    "v4_5": ChatML(
        template=THINKING_TEMPLATE,
        special=(*TURN_MARKS, *IMAGE_MARKS, "<unit>", "</unit>"),
        plain=THINKING,
        names=_QWEN_NAMES,
        split_files=True,
    ),
    "o4_5": ChatML(
        # With thinking enabled there is no opening tag.
        template=THINKING_TEMPLATE.replace(
            "{%- elif enable_thinking is defined and enable_thinking is true %}{{ '<think>\n' }}", ""
        ),
        special=(*TURN_MARKS, *IMAGE_MARKS, "<unit>", "</unit>", *AUDIO_MARKS, *DUPLEX_MARKS),
        plain=THINKING,
        tokenizer_class=_OMNI,
        names=_QWEN_NAMES,
        split_files=True,
    ),
}


def bpe(base: tuple[str, ...], split: str = _QWEN_SPLIT) -> Tokenizer:
    """Byte-level BPE on the demo's text whose vocabulary ends with the tokens of ``base``, which no merge produces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_SIZE, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(corpus.lines("user\n", "assistant\n"), trainer)
    spec = json.loads(tokenizer.to_str())
    size = len(spec["model"]["vocab"])
    spec["model"]["vocab"].update({token: size + index for index, token in enumerate(base)})
    return Tokenizer.from_str(json.dumps(spec))


def write_chatml(folder: Path, family: str) -> int:
    """Writes the tokenizer files of a ChatML generation into ``folder`` and gives the length of the tokenizer."""
    kind = CHATML[family]
    tokenizer = bpe(kind.base)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in kind.base])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in kind.plain])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in kind.special])
    if family == "v4_0":
        tokenizer.post_processor = bos_template("<s>", tokenizer.get_vocab()["<s>"])
    special = (*kind.base, *kind.special)
    decoder = added_tokens_decoder(tokenizer, special) | {
        str(tokenizer.token_to_id(token)): {"content": token, **TOKEN_FLAGS, "special": False} for token in kind.plain
    }
    config: dict[str, Any] = {
        "add_bos_token": family == "v4_0",
        "add_prefix_space": False,
        "added_tokens_decoder": dict(sorted(decoder.items(), key=lambda item: int(item[0]))),
        "additional_special_tokens": [token for token in special if token in IMAGE_MARKS],
        "auto_map": {"AutoTokenizer": [f"tokenization_minicpmv_fast.{kind.tokenizer_class}", None]},
        **kind.names,
        "chat_template": kind.template,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "tokenizer_class": kind.tokenizer_class,
    }
    write_json(folder / "tokenizer_config.json", config)
    names = {name: {"content": token, **TOKEN_FLAGS} for name, token in kind.names.items()}
    write_json(folder / "special_tokens_map.json", names)
    if kind.split_files:
        _write_split(folder, tokenizer, (*kind.plain, *kind.special))
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def _write_split(folder: Path, tokenizer: Tokenizer, added: tuple[str, ...]) -> None:
    """vocab.json, merges.txt and added_tokens.json, as in the published folders that have no tokenizer.json."""
    model = json.loads(tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    lines = [" ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    write_json(folder / "added_tokens.json", {token: tokenizer.token_to_id(token) for token in added})
