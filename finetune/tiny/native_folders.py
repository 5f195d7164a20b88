"""Writes all files but the weights of the tiny 4.6, 4.7 and OCR checkpoints, in the published layout.

The weights are drawn from the config.json written here, by ``AutoModelForImageTextToText.from_config`` (AutoModel gives
a model without lm_head for these types).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from finetune.tiny.chatml_tokenizers import THINKING, TURN_MARKS, bpe
from finetune.tiny.trained_tokenizers import write_json

# Prefix of their class names, and the model_type of config.json.
NATIVE = {
    "v4_6": ("MiniCPMV4_6", "minicpmv4_6"),
    "v4_7": ("MiniCPMV4_7", "minicpmv4_7"),
    "ocr1_0": ("MiniCPMOcr", "minicpm_ocr"),
}
# Where it is not 16x.
_MODES = {"ocr1_0": "4x"}
# Of these there are checkpoints whose language model is a mixture of experts (4.7: 35B-A3B).
MIXTURES = ("v4_7",)
VOCABULARY = 640
SCALE_RESOLUTION = 112
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


def write_native(family: str, folder: Path, experts: int = 0) -> None:
    """Writes config.json, generation_config.json and the files of tokenizer and processor into ``folder``.

    Args:
        family: one of NATIVE.
        folder: an existing folder.
        experts: routed experts of the language model, for one of MIXTURES; 0 for a dense one.
    """
    maker, _ = NATIVE[family]
    ids = _write_tokenizer(folder, f"{maker}Processor")
    write_json(folder / "config.json", native_config(family, ids, experts))
    write_json(folder / "processor_config.json", _processor_config(family))
    generation = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    write_json(folder / "generation_config.json", {**generation, "transformers_version": "5.23.0"})


def native_config(family: str, ids: dict[str, int], experts: int = 0) -> dict[str, Any]:
    """config.json with tiny sizes; ``ids`` are those of the tokenizer."""
    maker, model_type = NATIVE[family]
    text = _text_config(ids["<|endoftext|>"])
    text = _mixture(text, experts) if experts else text
    marks = {
        "image_start_id": ids["<image>"],
        "image_end_id": ids["</image>"],
        "slice_start_id": ids["<slice>"],
        "slice_end_id": ids["</slice>"],
        "newline_id": ids["Ċ"],
    }
    own = {"v4_6": {"drop_vision_last_layer": False}, "v4_7": marks, "ocr1_0": {}}
    return {
        "architectures": [f"{maker}ForConditionalGeneration"],
        "downsample_mode": _MODES.get(family, "16x"),
        **({} if family == "ocr1_0" else {"image_size": 448}),
        "image_token_id": ids["<|image_pad|>"],
        "insert_layer_id": 0,
        "merge_kernel_size": [2, 2],
        "merger_times": 1,
        "model_type": model_type,
        **own[family],
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "5.23.0",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": _vision_config(f"{model_type}_vision"),
    }


def _text_config(eos: int) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "bos_token_id": None,
        "dtype": "float32",
        "eos_token_id": eos,
        "full_attention_interval": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.1,
        "intermediate_size": 256,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 16,
        "max_position_embeddings": 8192,
        "model_type": "qwen3_5_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        # Rotary embedding on a quarter of the head: four frequencies, divided among time, height and width.
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def _mixture(dense: dict[str, Any], experts: int) -> dict[str, Any]:
    """The language model with experts in place of its MLPs, as Qwen3.5-35B-A3B has them: its ends are two tensors."""
    kept = {name: value for name, value in dense.items() if name != "intermediate_size"}
    return kept | {
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 64,
        "num_experts": experts,
        "num_experts_per_tok": min(2, experts),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 96,
        "tie_word_embeddings": False,
    }


def _vision_config(model_type: str) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "image_size": 980,
        "intermediate_size": 128,
        "layer_norm_eps": 1e-06,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "window_kernel_size": [2, 2],
    }


def _write_tokenizer(folder: Path, processor: str) -> dict[str, int]:
    """Writes the tokenizer files and gives the ids of all tokens."""
    tokenizer = bpe(("<unk>",))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINKING])
    special = (*TURN_MARKS, *MEDIA_TOKENS.values())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    assert tokenizer.get_vocab_size() <= VOCABULARY, tokenizer.get_vocab_size()
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
        "processor_class": processor,
        "tokenizer_class": "TokenizersBackend",
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer.get_vocab()


def _processor_config(family: str) -> dict[str, Any]:
    # 4.7 has the processors of 4.6; that of OCR upscales small images, which is the default.
    kind = "MiniCPMOcr" if family == "ocr1_0" else "MiniCPMV4_6"
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "downsample_mode": _MODES.get(family, "16x"),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_slice_nums": 9,
        "patch_size": 14,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "scale_resolution": SCALE_RESOLUTION,
        "slice_mode": True,
        "use_image_id": True,
    }
    small = {"small_image_upsize": "always"} if family == "ocr1_0" else {}
    video = {"do_sample_frames": True, "max_num_frames": 128, "max_slice_nums": 1, "stack_frames": 1}
    return {
        "image_processor": {**shared, **small, "image_processor_type": f"{kind}ImageProcessor"},
        "processor_class": f"{NATIVE[family][0]}Processor",
        "video_processor": {**shared, **video, "video_processor_type": f"{kind}VideoProcessor"},
    }
