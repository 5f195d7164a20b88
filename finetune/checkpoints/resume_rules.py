"""Compares a resumed run with that of its checkpoint, and decides per flag whether a difference is accepted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from typing import Any

from finetune.arguments.parse import GROUPS
from finetune.checkpoints.manifest import Manifest
from finetune.checkpoints.run_identity import RunIdentity


class Decision(Enum):
    """How a difference of a flag is handled."""

    REFUSED = "refused"
    ACCEPTED = "accepted"
    NOT_COMPARED = "compared elsewhere, or specific to one start of the run"


@dataclass(frozen=True, slots=True)
class FlagRule:
    """How differences of some flags are handled, and why.

    Attributes:
        decision: refused, accepted or not compared.
        why: the reason of a refusal, or the effect of an accepted change.
        flags: names separated by spaces.
    """

    decision: Decision
    why: str
    flags: str


_ORDER = "samples are not seen exactly once"
_SAMPLES = "samples are encoded differently from here on"

# Every flag has exactly one rule; a test checks that.
RULES = (
    FlagRule(
        Decision.REFUSED,
        "the weights and the optimizer state of the checkpoint belong to other parameters",
        "tune_vision tune_resampler tune_audio tune_llm tune_llm_layers lora_parts lora_r lora_target_modules "
        "duplex_prompt lora_target_parameters lora_bias lora_modules_to_save lora_weight_path lora_layers_to_transform "
        "lora_layers_pattern lora_layer_replication use_dora q_lora",
    ),
    FlagRule(Decision.REFUSED, "the adapters were trained with another scale", "lora_alpha use_rslora"),
    FlagRule(
        Decision.REFUSED,
        "the checkpoint holds the state of another optimizer",
        "optim optim_args optim_target_modules",
    ),
    FlagRule(
        Decision.REFUSED,
        "it would have no effect: the optimizer state of the checkpoint restores the previous value",
        "learning_rate vision_lr resampler_lr audio_lr weight_decay adam_beta1 adam_beta2 adam_epsilon",
    ),
    FlagRule(
        Decision.REFUSED,
        "the schedule is computed from step 0: the learning rate would jump to another curve",
        "lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio",
    ),
    FlagRule(Decision.REFUSED, "weights and optimizer state have other dtypes", "bf16 fp16"),
    FlagRule(Decision.REFUSED, "the records seen so far would be unknown", "streaming"),
    FlagRule(Decision.REFUSED, "it would be another training, on other records", "stage"),
    FlagRule(
        Decision.ACCEPTED,
        "the schedule is computed for the new length: the learning rate continues on the curve of a run of that length",
        "max_steps num_train_epochs",
    ),
    FlagRule(
        Decision.ACCEPTED,
        _ORDER,
        "seed data_seed packing_items dataloader_drop_last max_samples val_size ignore_data_skip length_column_name "
        "accelerator_config full_determinism",
    ),
    FlagRule(
        Decision.ACCEPTED,
        _SAMPLES,
        "model_max_length overlong on_bad_sample train_on thinking data_format image_root media_dir max_slice_nums "
        "use_image_id max_image_pixels image_max_pixels image_backend video_fps video_max_frames video_max_slice_nums "
        "video_max_pixels video_packing packing_maxlen enable_high_fps double_frame_duration time_scale",
    ),
    FlagRule(
        Decision.ACCEPTED,
        "applies from here on",
        "unit_loss_weights pref_beta pref_loss pref_ftx dpo_label_smoothing simpo_gamma pref_reference "
        "max_grad_norm label_smoothing_factor neftune_noise_alpha lora_dropout average_tokens_across_devices "
        "max_nonfinite_steps attn_implementation use_hub_kernels tf32 torch_compile torch_compile_backend "
        "torch_compile_mode gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
        "activation_checkpointing_kwargs checkpoint_parts vision_batch use_cache use_liger_kernel "
        "liger_kernel_config auto_find_batch_size torch_empty_cache_steps use_cpu deepspeed fsdp fsdp_config "
        "parallelism_config check check_base_loss verify_adapter max_bad_share strict_paths",
    ),
    FlagRule(
        Decision.ACCEPTED,
        "",
        "output_dir llm_type template print_param_status eval_data_path eval_dataset eval_strategy eval_steps "
        "eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches "
        "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics bf16_full_eval "
        "fp16_full_eval eval_generate eval_metric eval_max_new_tokens eval_generate_zero3 logging_strategy "
        "logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen "
        "log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
        "trackio_static_space_id save_only_model save_strategy save_steps save_on_each_node save_total_limit "
        "enable_jit_checkpoint push_to_hub hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "load_best_model_at_end metric_for_best_model greater_is_better restore_callback_states_from_checkpoint "
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names "
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
        "hang_timeout save_on_signal_timeout debug skip_memory_metrics do_train do_eval do_predict logging_dir "
        "jit_mode_eval torchdynamo save_safetensors",
    ),
    FlagRule(
        # base, data, method, batch size, downsample_mode and streams are compared by their effect; see ``resume``
        Decision.NOT_COMPARED,
        "",
        "model_name_or_path data_path dataset dataset_dir use_lora downsample_mode buffer_size packing packing_tokens "
        "train_sampling_strategy per_device_train_batch_size gradient_accumulation_steps resume_from_checkpoint "
        "overwrite_output_dir overwrite_cache local_rank hub_token",
    ),
)
_BY_FLAG = {name: rule for rule in RULES for name in rule.flags.split()}


@dataclass(slots=True)
class RunComparison:
    """Result of a comparison: descriptions of what is equal, and of differences that are accepted or refused.

    Attributes:
        same: equal values that are not defaults.
        accepted: differences that are accepted.
        refused: differences that are refused.
        affects_training: whether an accepted difference changes what is trained.
    """

    same: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    affects_training: bool = False

    def __str__(self) -> str:
        """The three lists."""
        lists = {"same": self.same, "differs, accepted": self.accepted, "refused": self.refused}
        return "\n".join(f"  {title}: {'; '.join(found) or 'nothing'}" for title, found in lists.items())


def compare(manifest: Manifest, now: RunIdentity) -> RunComparison:
    """Compares the identity of a checkpoint's run with that of the run that resumes from it.

    Values that one side does not have, as in manifests of older versions, are not compared.
    """
    result = RunComparison()
    _compare_base(manifest.base, now.base, result)
    _compare_data(manifest.data, now.data, result)
    same, refused = [], {}
    defaults = _defaults()
    for name, before, after in _flags(manifest.flags, now.flags, defaults):
        rule = _BY_FLAG.get(name, FlagRule(Decision.ACCEPTED, "not known to this version", name))
        if before == after:
            if after != defaults.get(name) and rule.decision is not Decision.NOT_COMPARED:
                same.append(name)
        elif rule.decision is Decision.REFUSED:
            refused.setdefault(rule.why, []).append(f"--{name} was {_short(before)}, now {_short(after)}")
        elif rule.decision is Decision.ACCEPTED:
            why = f" ({rule.why})" if rule.why else ""
            result.affects_training |= bool(why)
            result.accepted.append(f"{name} {_short(before)} -> {_short(after)}{why}")
    result.refused += [f"{', '.join(flags)}: {why}" for why, flags in refused.items()]
    if same:
        result.same.append(", ".join(same))
    for name, before in manifest.versions.items():
        if name in now.versions and now.versions[name] != before:
            result.accepted.append(f"{name} {before} -> {now.versions[name]}")
    return result


def _compare_base(before: Mapping[str, Any], after: Mapping[str, Any], result: RunComparison) -> None:
    if not before or not after:
        return
    if before.get("family") != after["family"]:
        result.refused.append(
            f"the base was {before.get('name')} ({before.get('family')}), now {after['name']} ({after['family']}): "
            "another model family"
        )
    elif before.get("digest") != after["digest"]:
        named = after["name"] if after["name"] != before.get("name") else f"{after['name']}, changed since"
        result.refused.append(
            f"the base was {before.get('name')}, now {named}: the trained weights belong to the previous base"
        )
    else:
        result.same.append(f"base {after['name']}")


def _compare_data(before: Mapping[str, Any], after: Mapping[str, Any], result: RunComparison) -> None:
    files, now = before.get("files"), after.get("files")
    if not files or not now or not isinstance(files, dict):
        return
    digests, found = ([entry.get("digest") for entry in side.values()] for side in (files, now))
    if digests == found:
        result.same.append(f"data {', '.join(now)}")
        return
    count = f" ({before['samples']} samples)" if before.get("samples") else ""
    changed = [name for name in now if name in files and files[name] != now[name]]
    result.affects_training = True
    what = f"changed: {', '.join(changed)}" if changed else f"{', '.join(files)}{count} -> {', '.join(now)}"
    result.accepted.append(f"data {what} ({_ORDER})")


def _flags(
    before: Mapping[str, Any], after: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of every flag; the default for a flag that the other version did not have."""
    if before and after:
        for name in sorted({*before, *after}):
            if name in defaults or (name in before and name in after):
                yield name, before.get(name, defaults.get(name)), after.get(name, defaults.get(name))


def _defaults() -> dict[str, Any]:
    entries = [entry for group in GROUPS for entry in fields(group)]  # pyright: ignore[reportArgumentType]
    return {entry.name: entry.default for entry in entries if entry.default is not MISSING}


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
