"""All files but the weights of the tiny checkpoints whose model class is in transformers (4.6, 4.7, OCR).

The weights are drawn from the config.json written here, by ``AutoModelForImageTextToText.from_config`` (AutoModel gives
a model without lm_head for these types).
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken

from finetune.families.family import Family
from finetune.tiny import config_files
from finetune.tiny.chatml_tokenizers import THINKING, TURN_MARKS, bpe
from finetune.tiny.trained_tokenizers import write_json

# Tokens that the processor looks up by these attribute names.
MEDIA_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
# ChatML as Qwen3.5 has it: contents trimmed, media by their placeholder, thinking after the last question alone, and
# no thinking unless it is asked for.
CHAT_TEMPLATE = """\
{%- macro shown(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}<|image_pad|>
{%- elif part.type == 'video' -%}<|video_pad|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- '<|im_start|>system\\n# Functions' -}}
{%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
{{- '\\nCall them so: <tool_call><function=name>...</function></tool_call>' -}}
{%- if messages[0].role == 'system' -%}{{- '\\n\\n' + shown(messages[0].content) | trim -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- set last = namespace(user=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set text = shown(message.content) | trim -%}
{%- if message.role == 'assistant' -%}
{%- set thought = (message.reasoning_content or '') | trim -%}
{%- if not thought and '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1] | trim -%}
{%- set text = text.split('</think>')[-1] | trim -%}
{%- endif -%}
{%- set spoken = text -%}
{%- if loop.index0 > last.user -%}
{%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text -%}
{%- endif -%}
{%- endif -%}
{%- if message.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + text + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif message.role != 'system' or not tools -%}
{{- '<|im_start|>' + message.role + '\\n' + text -}}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function or call -%}
{{- ('' if loop.first and not spoken else '\\n\\n' if loop.first else '\\n') -}}
{{- '<tool_call>\\n<function=' + call.name + '>' -}}
{%- for name, value in call.arguments | items -%}
{{- '\\n<parameter=' + name + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>' -}}
{%- endfor -%}
{{- '\\n</function>\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is true -%}
{{- '<think>\\n' -}}
{%- else -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


def write_native(family: Family, folder: Path, experts: int = 0) -> None:
    """Writes config.json, generation_config.json and the files of tokenizer and processor into ``folder``.

    Args:
        family: one whose model class is in transformers.
        folder: an existing folder.
        experts: routed experts of the language model, for a family that has such checkpoints; 0 for a dense one.
    """
    ids = _write_tokenizer(folder, family)
    config = config_files.native_config(family, ids, experts)
    write_json(folder / "config.json", config)
    write_json(folder / "processor_config.json", config_files.processor_config(family))
    generation = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    generation |= {"transformers_version": config["transformers_version"]}
    write_json(folder / "generation_config.json", generation)


def _write_tokenizer(folder: Path, family: Family) -> dict[str, int]:
    """Writes the tokenizer files and gives the ids of all tokens."""
    tokenizer = bpe(("<unk>",))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINKING])
    special = (*TURN_MARKS, *MEDIA_TOKENS.values())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    assert tokenizer.get_vocab_size() <= config_files.vocabulary(family), tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "backend": "tokenizers",
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "extra_special_tokens": MEDIA_TOKENS,
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "processor_class": config_files.processor_class(family),
        "tokenizer_class": "TokenizersBackend",
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer.get_vocab()
