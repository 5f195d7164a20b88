"""``python -m finetune export``: merges adapters into their base, or lays them out for vLLM.

The merge reads the weights one layer at a time and needs little memory; the result is complete, loads offline, and its
logits are compared with those of the adapted model. Flags have LLaMA-Factory's names.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.arguments.legacy import template_fits
from finetune.commands.parser import CommandParser
from finetune.commands.shared_flags import add_mode_flag
from finetune.runtime.outcome import NOT_VERIFIED, OK
from finetune.utils.errors import UserError
from finetune.utils.number_format import significant
from finetune.utils.paths import expand

if TYPE_CHECKING:
    from finetune.checkpoints.base_checkpoint import Checkpoint
    from finetune.export.lora_merge import Base, Merged
    from finetune.export.merge_check import Agreement

_DTYPES = ("auto", "float16", "bfloat16", "float32")


def main(argv: list[str]) -> int:
    """Exports; returns 0 on success, 3 when the logits differ from those of the adapted model."""
    given = _parser().parse_args(expand_yaml(argv))
    if given.export_legacy_format == "true":
        raise UserError("--export_legacy_format true: weights are written as safetensors only; remove the flag")
    if given.push_to_hub == "true" and given.export_hub_model_id is None:
        raise UserError("--push_to_hub true needs --export_hub_model_id OWNER/NAME")

    from finetune.export.result_folder import check_target

    sources = resolve_sources(given.model_name_or_path, given.adapter_name_or_path, given.downsample_mode)
    out = expand(given.export_dir).absolute()
    check_target(out, sources.folders, overwrite=given.overwrite_output_dir == "true")
    for line in sources.notes:
        print(line)
    if given.template is not None and not template_fits(given.template, sources.base.family.name):
        print(f"note: template {given.template} does not fit {sources.base.family.title}; it is ignored")
    agreement = _export(given, sources, out)
    if agreement is not None and not agreement.ok:
        print(
            f"error: {out} does not give the logits of the adapted model. The folder was kept; do not use it before "
            "the difference is understood"
        )
        return NOT_VERIFIED
    _upload(given, out)
    return OK


def expand_yaml(argv: list[str]) -> list[str]:
    """The command line as argv, preceded by the flags of the YAML file that it may begin with."""
    from finetune.arguments.resolve import resolve

    known = vars(_parser().parse_args(["--export_dir", "OUT"]))
    return resolve(argv, dict.fromkeys(known, False), "export").argv


@dataclass(frozen=True, slots=True)
class Sources:
    """Inputs of an export: the base, the adapters in merge order, and notes to print about them."""

    base: Checkpoint
    adapters: list[Path]
    notes: list[str]

    @property
    def folders(self) -> list[Path]:
        """All folders that are read."""
        return [self.base.folder, *self.adapters]


def resolve_sources(model: str | None, adapters: str | None, downsample_mode: str | None = None) -> Sources:
    """The base and the adapters; without a model, or with an adapter as model, the base that the adapter names.

    Raises:
        UserError: neither is given, or a folder is missing; or adapters were trained with different modes.
    """
    from finetune.model_folders.checkpoint_folder import has_adapter, is_adapter, local_folder

    names = [name.strip() for name in (adapters or "").split(",") if name.strip()]
    folders = [local_folder(name) for name in names]
    if model is not None and is_adapter(found := local_folder(model)):
        folders, model = [found, *folders], None
    if model is None and not folders:
        raise UserError("export needs --model_name_or_path, --adapter_name_or_path or both")
    if wrong := next((folder for folder in folders if not has_adapter(folder)), None):
        raise UserError(f"--adapter_name_or_path {wrong}: no adapter_config.json there; give the folder of an adapter")
    from finetune.checkpoints.base_checkpoint import resolve
    from finetune.models import base_of

    name = str(base_of(folders[0])) if model is None else model
    base = resolve(name, downsample_mode, trained=folders[-1] if folders else None)
    notes = [f"base       {base.name}, {base.family.title}"]
    if base.mode is not None:
        notes.append(f"mode       {base.mode}")
        for folder in folders:
            own = resolve(name, downsample_mode, trained=folder)
            if own.downsample_mode != base.downsample_mode:
                raise UserError(
                    f"{folders[-1]} was trained with downsample_mode {base.downsample_mode}, {folder} with "
                    f"{own.downsample_mode}: a model has one mode; choose it with --downsample_mode"
                )
    for folder in folders:
        notes += [f"adapter    {folder}", *_notes(folder, base)]
    return Sources(base, folders, notes)


def _notes(adapter: Path, base: Checkpoint) -> list[str]:
    """Notes for the user about an adapter on this base."""
    from finetune.model_folders.checkpoint_folder import read_adapter_config

    notes = []
    named = str(read_adapter_config(adapter).get("base_model_name_or_path") or "a base without a name")
    if named != base.name and expand(named).resolve() != base.folder:
        notes.append(f"           it was trained on {named}; family and shapes are compared, the weights cannot be")
    if _flags_of(adapter).get("q_lora"):
        notes.append("           it was trained on the base in 4 bit (QLoRA); it is merged into the unquantised base")
    return notes


def _flags_of(adapter: Path) -> dict[str, Any]:
    """The flags that an adapter was trained with, from its run.yaml; empty without one."""
    import yaml

    run = adapter / "run.yaml"
    try:
        content = yaml.safe_load(run.read_text(encoding="utf-8")) if run.is_file() else None
    except yaml.YAMLError:
        return {}
    flags = content.get("flags") if isinstance(content, dict) else None
    return flags if isinstance(flags, dict) else {}


def _export(given: argparse.Namespace, sources: Sources, out: Path) -> Agreement | None:
    """Writes into a temporary folder, moves it to --export_dir and verifies it."""
    import torch

    from finetune.export.result_folder import model_card, unfinished, write_model, write_record
    from finetune.export.sharded_writer import WeightFiles

    base, adapters = sources.base, sources.adapters
    weights = _weights(given, sources)
    dtype = None if given.infer_dtype == "auto" else getattr(torch, given.infer_dtype)
    files = WeightFiles(weights, dtype=dtype, shard_size=round(given.export_size * 1e9))
    served = given.format == "vllm"
    with unfinished(out, sources.folders, overwrite=given.overwrite_output_dir == "true") as folder:
        model = folder / "base" if served else folder
        model.mkdir(exist_ok=True)
        count = write_model(model, base, files, dtype=dtype, card=model_card(base, [each.name for each in adapters]))
        print(f"written    {files.total_size / 1e9:.2f} GB in {count} file(s), {len(weights.changed)} tensors changed")
        if served:
            _write_served(weights, base, folder / "adapter", out)
        write_record(folder, adapters, _record(given, sources))
    # After the move: should the check run out of memory, the complete folder is there.
    agreement = None
    if given.verify == "auto":
        agreement = _verify(given, sources, *((out / "base", [out / "adapter"]) if served else (out, [])))
    print(f"merged={out}{'' if agreement is None else _describe(agreement)}")
    return agreement


def _weights(given: argparse.Namespace, sources: Sources) -> Base | Merged:
    """The tensors of the result, computed lazily."""
    from finetune.export.lora_merge import Base, Merged, empty_model
    from finetune.export.vllm_layout import check_servable, stays

    base, device = sources.base, _device(given.export_device)
    weights: Base | Merged = Base(base.folder)
    if given.format == "vllm":
        if len(sources.adapters) != 1:
            raise UserError("--format vllm needs exactly one adapter; merge the earlier ones first")
        served = Merged(weights, empty_model(base.folder), sources.adapters[0], device=device, keep=stays(base.family))
        check_servable(sources.adapters[0], served.config)
        return served
    for adapter in sources.adapters:
        weights = Merged(weights, empty_model(base.folder), adapter, device=device)
    return weights


def _write_served(weights: Base | Merged, base: Checkpoint, folder: Path, out: Path) -> None:
    from finetune.export.lora_merge import Merged
    from finetune.export.vllm_layout import max_lora_rank, write_served_adapter

    assert isinstance(weights, Merged)
    folder.mkdir()
    rank = write_served_adapter(folder, weights, base, str(out / "base"))
    print(
        f"serve with vllm serve {out / 'base'} --trust-remote-code --enable-lora --max-lora-rank {max_lora_rank(rank)} "
        f"--lora-modules tuned={out / folder.name}"
    )


def _record(given: argparse.Namespace, sources: Sources) -> dict[str, Any]:
    import finetune

    base = sources.base
    return {
        "base": {"name": base.name, "revision": base.revision, "family": base.family.name},
        "adapters": [str(adapter) for adapter in sources.adapters],
        "format": given.format,
        "infer_dtype": given.infer_dtype,
        **base.auto_mapping_extra,
        "finetune": finetune.__version__,
    }


def _verify(given: argparse.Namespace, sources: Sources, model: Path, left: list[Path]) -> Agreement:
    from finetune.checkpoints.base_checkpoint import resolve
    from finetune.export.merge_check import compare, logits_of, make_prompts

    prompts = make_prompts(sources.base)
    device = _device(given.export_device)
    base = sources.base
    adapted = logits_of(base, sources.adapters, prompts, dtype=given.infer_dtype, device=device)
    # With the downsample_mode of its own files, as users will load it.
    result = resolve(str(model), trained=left[0] if left else None, environment={})
    return compare(adapted, logits_of(result, left, prompts, dtype="auto", device=device))


def _describe(agreement: Agreement) -> str:
    effect = "" if agreement.effect is None else f" base_difference={significant(agreement.effect)}"
    return (
        f" verified={str(agreement.ok).lower()} logit_difference={significant(agreement.difference)} "
        f"relative={significant(agreement.relative)} tolerance={significant(agreement.tolerance)}{effect}"
    )


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--export_device cuda: there is no GPU here; cpu and auto merge without one")
    return asked


def _upload(given: argparse.Namespace, folder: Path) -> None:
    """Uploads the folder to the hub with --push_to_hub true."""
    name = given.export_hub_model_id
    if given.push_to_hub != "true":
        if name is not None:
            print(f"note: nothing was uploaded; --push_to_hub true uploads {folder} to {name}")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{folder} is complete but could not be uploaded to {name}: {error}") from error
    print(f"uploaded   {name}")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m finetune export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    yes = {"choices": ["true", "false"], "nargs": "?", "const": "true", "default": "false"}
    parser.add_argument("--model_name_or_path", help="base: folder or hub id (default: the one that the adapter names)")
    parser.add_argument("--adapter_name_or_path", help="adapter, or several separated by commas, merged in this order")
    add_mode_flag(parser)
    parser.add_argument("--template", help="only validated: LLaMA-Factory's name of a chat template")
    parser.add_argument("--export_dir", required=True, help="folder of the result")
    parser.add_argument(
        "--format",
        choices=["hf", "vllm"],
        default="hf",
        help="hf: one model folder; vllm: base/ and adapter/, with LoRA of the language model alone (docs/export.md)",
    )
    parser.add_argument("--export_size", type=float, default=5, help="maximum GB per weight file (default: 5)")
    parser.add_argument("--export_device", choices=["cpu", "auto", "cuda"], default="cpu", help="device of the merge")
    parser.add_argument(
        "--infer_dtype", choices=_DTYPES, default="auto", help="dtype of the result (default: the base's)"
    )
    parser.add_argument(
        "--verify", choices=["auto", "off"], default="auto", help="compare logits with the adapted model"
    )
    parser.add_argument("--overwrite_output_dir", **yes, help="replace the model that --export_dir holds")
    parser.add_argument("--export_legacy_format", **yes, help="refused: weights are written as safetensors only")
    parser.add_argument("--export_hub_model_id", help="OWNER/NAME on the hub, private when it is new")
    parser.add_argument("--push_to_hub", **yes, help="upload the result; nothing is uploaded without it")
    return parser
