"""What several model families share: modules and LoRA targets of the parts, token lists, readers of settings.

The settings are those of slicing, video, audio and prompts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune.families.family import Config, Video
from finetune.families.settings import DOWNSAMPLE_MODE, TRANSFORMERS, WITH_IMAGE_IDS, Table, value_of
from finetune.media.audio_layout import AudioSpec
from finetune.media.slicing import MERGES, SliceSpec
from finetune.media.video_sampling import PACKED, PER_SECOND, VideoOptions, packed, per_second, processor_sampling
from finetune.templates.prompt_types import PromptLayout
from finetune.utils.errors import CheckpointError

# Part of the model -> its modules, of models that the published folders bring as remote code.
REMOTE_CODE_PARTS = {"vision": ("vpm",), "resampler": ("resampler",), "llm": ("llm",)}
OMNI_PARTS = {**REMOTE_CODE_PARTS, "audio": ("apm", "audio_projection_layer")}

# Part of the model -> regular expression of its LoRA target modules.
NAVIT_LORA = {
    "llm": r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
    "vision": r"vpm\.encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    "resampler": r"resampler\.(kv_proj|attn\.out_proj)",
}
TIMM_LORA = {**NAVIT_LORA, "vision": r"vpm\.blocks\.\d+\.attn\.(qkv|proj)"}
OMNI_LORA = {**NAVIT_LORA, "audio": r"apm\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"}

SLICE_TOKENS = ("<unk>", "<image>", "</image>", "<slice>", "</slice>")
IMAGE_ID_TOKENS = ("<image_id>", "</image_id>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
AUDIO_TOKENS = ("<|audio_start|>", "<|audio|>", "<|audio_end|>")
SPEECH_TOKENS = ("<|spk_bos|>", "<|spk|>", "<|spk_eos|>", "<|tts_bos|>", "<|tts_eos|>")


_FRAMES = ("fps", "max_frames", "max_slice_nums", "max_pixels")


def _single(config: Config) -> VideoOptions:
    return PER_SECOND


def _grouped(config: Config) -> VideoOptions:
    return PACKED


def _processed(config: Config) -> VideoOptions:
    cut = value_of(config, TRANSFORMERS["video_slice_mode"])
    return VideoOptions(
        max_frames=value_of(config, TRANSFORMERS["video_max_frames"]),
        max_slice_nums=value_of(config, TRANSFORMERS["video_max_slice_nums"]) if cut else 1,
    )


SINGLE_FRAMES = Video(sample=per_second, defaults=_single, separator="\n", options=_FRAMES)
"""2.6, 4.0 and MiniCPM-o: frames as images, separated by newlines."""
PACKED_FRAMES = Video(
    sample=packed,
    defaults=_grouped,
    separator="\n",
    options=(*_FRAMES, "packing", "max_packing", "high_fps", "high_fps_below", "time_scale"),
)
"""4.5: groups of packed frames with one placeholder run each, separated by newlines."""
PROCESSED_FRAMES = Video(sample=processor_sampling, defaults=_processed, separator="", options=_FRAMES[1:])
"""4.6 and later: sampling of transformers' video processor."""


def slicing(table: Table, config: Config) -> SliceSpec:
    """Slicing settings of a checkpoint, by the settings table of its family."""
    return SliceSpec(
        max_slice_nums=value_of(config, table["max_slice_nums"]) if value_of(config, table["slice_mode"]) else 1,
        scale_resolution=value_of(config, table["scale_resolution"]),
        patch_size=value_of(config, table["patch_size"]),
    )


def audio_spec(table: Table, config: Config) -> AudioSpec:
    """Audio settings of a MiniCPM-o checkpoint, by the settings table of its family."""
    return AudioSpec(
        pool_step=value_of(config, table["audio_pool_step"]),
        run_seconds=value_of(config, table["run_seconds"]),
        bins=value_of(config, table["mel_bins"]),
        hop=value_of(config, table["hop_length"]),
        window=value_of(config, table["n_fft"]),
        chunk_seconds=value_of(config, table["chunk_seconds"]),
    )


def numbered_layout(config: Config) -> PromptLayout:
    """2.6 and later: a fixed number of placeholders per item, and numbered images."""
    return PromptLayout(
        query_num=value_of(config, WITH_IMAGE_IDS["query_num"]),
        image_ids=value_of(config, WITH_IMAGE_IDS["use_image_id"]),
    )


def published_as(config: Config, model_type: str, version: str) -> bool:
    """Whether config.json has this model_type and version (a number or a string)."""
    return config.get("model_type") == model_type and str(config.get("version")) == version


# Families whose model classes are in transformers (4.6 and later).
TRANSFORMERS_PARTS = {
    "vision": ("model.vision_tower",),
    "resampler": ("model.merger",),
    "llm": ("model.language_model", "lm_head"),
}
# Three of four layers use linear attention. Packed rows need these kernels: without them transformers refuses
# segments.
LINEAR_ATTENTION = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}
# Projections of linear attention, without the two small gate projections.
TRANSFORMERS_LORA = {
    "llm": (
        r"model\.language_model\.layers\.\d+\."
        r"(self_attn\.(q_proj|k_proj|v_proj|o_proj)|linear_attn\.(in_proj_qkv|in_proj_z|out_proj))"
    ),
    "vision": r"model\.vision_tower\.(encoder\.layers\.\d+|vit_merger)\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    "resampler": r"model\.merger\.mlp\.\d+\.(linear_1|linear_2)",
}
MARK_TOKENS = ("<image>", "</image>", "<slice>", "</slice>")
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


def vocab_size(config: Config) -> int:
    """Rows of the embedding table; 4.6 and later have it in ``text_config``.

    Raises:
        CheckpointError: config.json does not say it.
    """
    if (size := (config.get("text_config") or config).get("vocab_size")) is None:
        raise CheckpointError("config.json has no vocab_size; download it again")
    return size


def merged_slicing(table: Table, config: Config) -> SliceSpec:
    """Slicing settings of 4.6 and later: sides are multiples of 4 patches (2 with "4x"), merged into one token."""
    return replace(slicing(table, config), merge=_merge(table, config))


def merged_layout(table: Table, config: Config) -> PromptLayout:
    """4.6 and later: placeholders by item size, numbered images, turns in the format of Qwen3.5."""
    side = value_of(config, table["patch_size"]) * _merge(table, config)
    return PromptLayout(
        pixels_per_token=side * side,
        placeholder=IMAGE_PAD,
        video_placeholder=VIDEO_PAD,
        image_ids=value_of(config, table["use_image_id"]),
        ids_beside_video=True,
        trim=True,
        thinks_between=True,
        # Defaults from reports; the checkpoint's own chat template decides.
        assumed=("default_system", "enable_thinking", "trim"),
    )


def _merge(table: Table, config: Config) -> int:
    return merge_of(value_of(config, table[DOWNSAMPLE_MODE]))


def merge_of(mode: Any) -> int:
    """Patches per side that are merged into one token, by downsample_mode.

    Raises:
        CheckpointError: unknown mode.
    """
    if not isinstance(mode, str) or mode not in MERGES:
        raise CheckpointError(f"{DOWNSAMPLE_MODE} {mode!r} is unknown; it is {' or '.join(MERGES)}")
    return MERGES[mode]
