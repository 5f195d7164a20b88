"""``python -m finetune export``: merges adapters into their base, lays them out for vLLM, or converts them to GGUF.

The merge reads the weights one layer at a time and needs little memory; the result is complete, loads offline, and its
logits are compared with those of the adapted model. Flags have LLaMA-Factory's names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.commands.gguf import add_gguf_flags, check_gguf_space, convert_to_gguf, find_gguf_checkout
from finetune.commands.parser import CommandParser
from finetune.commands.shared_flags import add_prompt_flags
from finetune.runtime.out_of_memory import explaining
from finetune.runtime.outcome import NOT_VERIFIED, OK, UNUSABLE_RESULT
from finetune.utils.errors import UserError
from finetune.utils.number_format import significant, size_text
from finetune.utils.paths import expand
from finetune.utils.terminal import red

if TYPE_CHECKING:
    from finetune.checkpoints.base_checkpoint import BaseCheckpoint
    from finetune.export.llama_cpp import Checkout
    from finetune.export.lora_merge import BaseTensors, MergedTensors
    from finetune.export.merge_check import Agreement

_DTYPES = ("auto", "float16", "bfloat16", "float32")


class DisagreementError(UserError):
    """A merged model that is not the adapted one."""

    exit_code = NOT_VERIFIED


def main(argv: list[str]) -> int:
    """Exports; returns 0 on success, 3 when the logits differ from the adapted model's, 4 for an idle adapter."""
    given = build_parser().parse_args(expand_yaml(argv))
    if given.export_legacy_format == "true":
        raise UserError("--export_legacy_format true: weights are written as safetensors only; remove the flag")
    if given.push_to_hub == "true" and given.export_hub_model_id is None:
        raise UserError("--push_to_hub true needs --export_hub_model_id OWNER/NAME")

    import finetune.models  # noqa: F401  hides bitsandbytes from peft, and so comes first
    from finetune.export.result_folder import check_target

    wished = (given.downsample_mode, given.use_image_id)
    sources = resolve_sources(given.model_name_or_path, given.adapter_name_or_path, *wished)
    out = expand(given.export_dir).absolute()
    check_target(out, sources.folders, overwrite=given.overwrite_output_dir == "true")
    checkout = find_gguf_checkout(given, sources.base)
    for line in sources.notes:
        print(line)
    if given.template is not None and given.template not in sources.base.family.llamafactory_templates:
        print(f"note: template {given.template} does not fit {sources.base.family.title}; it is ignored")
    with explaining(lambda: ["--export_device cpu"], f"what {out} holds is complete or as it was"):
        agreement = _export(given, sources, out, checkout)
    if agreement is not None and not agreement.ok:
        whose = "adapted" if sources.adapters else "original"
        print(
            f"error: {out} does not give the logits of the {whose} model. The folder was kept; do not use it before "
            "the difference is understood"
        )
        return NOT_VERIFIED
    if agreement is not None and agreement.no_effect is not None:
        print(red(f"error: the adapter changes nothing: {agreement.no_effect}; {out} is the base", sys.stdout))
        return UNUSABLE_RESULT
    _upload(given, out)
    return OK


def expand_yaml(argv: list[str]) -> list[str]:
    """The command line as argv, preceded by the flags of the YAML file that it may begin with."""
    from finetune.arguments.resolve import resolve

    known = vars(build_parser().parse_args(["--export_dir", "OUT"]))
    return resolve(argv, dict.fromkeys(known, False), "export").argv


@dataclass(frozen=True, slots=True)
class Sources:
    """Inputs of an export: the base, the adapters in merge order, and notes to print about them."""

    base: BaseCheckpoint
    adapters: list[Path]
    notes: list[str]

    @property
    def folders(self) -> list[Path]:
        """All folders that are read."""
        return [self.base.folder, *self.adapters]


def resolve_sources(
    model: str | None, adapters: str | None, downsample_mode: str | None = None, use_image_id: bool | None = None
) -> Sources:
    """The base and the adapters; without a model, or with an adapter as model, the base that the adapter names.

    Raises:
        UserError: neither is given, or a folder is missing; or adapters were trained with different modes or image ids.
    """
    from finetune.model_folders.checkpoint_folder import has_adapter, is_adapter, resolve_folder

    names = [name.strip() for name in (adapters or "").split(",") if name.strip()]
    folders = [resolve_folder(name) for name in names]
    if model is not None and is_adapter(found := resolve_folder(model)):
        folders, model = [found, *folders], None
    if model is None and not folders:
        raise UserError("export needs --model_name_or_path, --adapter_name_or_path or both")
    if wrong := next((folder for folder in folders if not has_adapter(folder)), None):
        raise UserError(f"--adapter_name_or_path {wrong}: no adapter_config.json there; give the folder of an adapter")
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.models import base_of

    name = str(base_of(folders[0])) if model is None else model
    base, *others = [
        resolve_base(name, downsample_mode, use_image_id=use_image_id, trained=folder)
        for folder in folders[::-1] or [None]
    ]
    if base.in_4bit:
        raise UserError(
            f"{base.folder} is stored in 4 bit, into which nothing is merged: name the unquantised base, "
            f"--model_name_or_path {base.family.hub_id}, and the adapter is merged into that"
        )
    for folder, own in zip(folders[-2::-1], others, strict=True):
        _check_alike(folders[-1], base, folder, own)
    notes = [f"base       {base.name}, {base.family.title}", *(f"mode       {line}" for line in base.choices)]
    for folder in folders:
        notes += [f"adapter    {folder}", *_notes(folder, base)]
    return Sources(base, folders, notes)


def _check_alike(last: Path, base: BaseCheckpoint, folder: Path, own: BaseCheckpoint) -> None:
    """Refuses two adapters whose prompts differ."""
    ids = [each.image_ids and str(each.image_ids.used).lower() for each in (base, own)]
    modes = [base.downsample_mode, own.downsample_mode]
    for flag, (one, other) in {"downsample_mode": modes, "use_image_id": ids}.items():
        if one != other:
            raise UserError(
                f"{last} was trained with {flag} {one}, {folder} with {other}: a model has one; choose it with --{flag}"
            )


def _notes(adapter: Path, base: BaseCheckpoint) -> list[str]:
    """Notes for the user about an adapter on this base.

    Raises:
        CheckpointError: a named base that is not the adapter's.
    """
    from finetune.export.named_base import check_named_base
    from finetune.model_folders.checkpoint_folder import read_adapter_config

    notes = []
    named = str(read_adapter_config(adapter).get("base_model_name_or_path") or "a base without a name")
    if named != base.name and expand(named).resolve() != base.folder:
        check_named_base(adapter, expand(named), base)
        notes.append(
            f"           it was trained on {named}; family, shapes and ids are compared, the weights cannot be"
        )
    if _flags_of(adapter).get("q_lora"):
        notes.append("           it was trained on the base in 4 bit (QLoRA); it is merged into the unquantised base")
    return notes


def _flags_of(adapter: Path) -> dict[str, Any]:
    """The flags that an adapter was trained with, from its run.yaml; empty without one."""
    import yaml

    from finetune.model_folders.output_contents import RUN_FILE

    run = adapter / RUN_FILE
    try:
        content = yaml.safe_load(run.read_text(encoding="utf-8")) if run.is_file() else None
    except yaml.YAMLError:
        return {}
    flags = content.get("flags") if isinstance(content, dict) else None
    return flags if isinstance(flags, dict) else {}


def _export(
    given: argparse.Namespace, sources: Sources, out: Path, checkout: Checkout | None = None
) -> Agreement | None:
    """Writes into a temporary folder, moves it to --export_dir and verifies it."""
    from finetune.export.prompt_files import encoder_of, write_prompt_files
    from finetune.export.result_folder import unfinished, write_record

    base, agreement = sources.base, None
    served = given.format == "vllm"
    with unfinished(out, sources.folders, overwrite=given.overwrite_output_dir == "true") as folder:
        model = folder / {"vllm": "base", "gguf": "to_convert"}.get(given.format, "")
        model.mkdir(exist_ok=True)
        weights = _write_weights(given, sources, model)
        if served:
            _write_vllm(weights, base, folder / "adapter", out)
        write_record(folder, sources.adapters, _record(given, sources))
        if checkout is None:
            write_prompt_files(folder, encoder_of(base))
        else:
            # Before the conversion: the model folder does not outlive it.
            agreement = _verify(given, sources, model, []) if given.verify == "auto" else None
            if agreement is not None and not agreement.ok:
                raise DisagreementError(
                    "the merged model does not give the logits of the adapted model; nothing was converted:"
                    f"{_describe(agreement)}"
                )
            convert_to_gguf(given, base, checkout, model, folder, out)
    # After the move: should the check run out of memory, the complete folder is there.
    if checkout is None and given.verify == "auto":
        agreement = _verify(given, sources, *((out / "base", [out / "adapter"]) if served else (out, [])))
    done = "converted" if checkout else "merged" if sources.adapters else "exported"
    print(f"{done}={out}{'' if agreement is None else _describe(agreement)}")
    return agreement


def _write_weights(given: argparse.Namespace, sources: Sources, model: Path) -> BaseTensors | MergedTensors:
    """Writes the model folder; returns its tensors."""
    import torch

    from finetune.checkpoints.model_card import code_note
    from finetune.export.result_folder import model_card, write_model
    from finetune.export.sharded_writer import WeightFiles

    base = sources.base
    weights = _weights(given, sources)
    dtype = None if given.infer_dtype == "auto" else getattr(torch, given.infer_dtype)
    files = WeightFiles(weights, dtype=dtype, shard_size=round(given.export_size * 1e9))
    if given.format == "gguf":
        check_gguf_space(given, base, files, model)
    card = model_card(base, [each.name for each in sources.adapters])
    count = write_model(model, base, files, dtype=dtype, card=card)
    changed = f"{len(weights.changed)} tensors changed" if sources.adapters else "the weights as they are"
    print(f"written    {size_text(files.total_size)} in {count} file(s), {changed}")
    if (note := code_note(model)) is not None:
        print(f"note       {note}")
    return weights


def _weights(given: argparse.Namespace, sources: Sources) -> BaseTensors | MergedTensors:
    """The tensors of the result, computed lazily."""
    from finetune.export.lora_merge import BaseTensors, MergedTensors, empty_model
    from finetune.export.vllm_layout import check_servable, stays

    base, device = sources.base, _device(given.export_device)
    weights: BaseTensors | MergedTensors = BaseTensors(base.folder, duplex_rows=base.adds_duplex_rows)
    if given.format == "vllm":
        if len(sources.adapters) != 1:
            raise UserError("--format vllm needs exactly one adapter; merge the earlier ones first")
        served = MergedTensors(
            weights,
            empty_model(base.folder, duplex_rows=base.adds_duplex_rows),
            sources.adapters[0],
            device=device,
            keep=stays(base.family),
        )
        check_servable(sources.adapters[0], served.config)
        return served
    for adapter in sources.adapters:
        weights = MergedTensors(
            weights, empty_model(base.folder, duplex_rows=base.adds_duplex_rows), adapter, device=device
        )
        if weights.overridden:
            print(_overridden(adapter, weights.overridden))
    return weights


def _overridden(adapter: Path, names: Collection[str]) -> str:
    """What the merge of a later adapter takes from an earlier one: LoRA adds up, tensors trained in full do not."""
    from finetune.models.strict_loading import some

    return (
        f"warning    {adapter} replaces {len(names)} tensors that an earlier adapter trained in full or as biases, the "
        f"earlier training of them is lost: {some(sorted(names))}"
    )


def _write_vllm(weights: BaseTensors | MergedTensors, base: BaseCheckpoint, folder: Path, out: Path) -> None:
    from finetune.export.lora_merge import MergedTensors
    from finetune.export.vllm_layout import max_lora_rank, write_served_adapter

    assert isinstance(weights, MergedTensors)
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
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.export.merge_check import compare, logits_of, make_prompts, one_bar

    prompts = make_prompts(sources.base)
    device = _device(given.export_device)
    base = sources.base
    adapted = logits_of(base, sources.adapters, prompts, dtype=given.infer_dtype, device=device)
    # With the downsample_mode of its own files, as users will load it.
    result = resolve_base(str(model), trained=left[0] if left else None, environment={})
    with one_bar():
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

    from finetune.utils.hub_errors import hub_errors

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except hub_errors() as error:
        raise UserError(f"{folder} is complete but could not be uploaded to {name}: {error}") from error
    print(f"uploaded   {name}")


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m finetune export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    yes = {"choices": ["true", "false"], "nargs": "?", "const": "true", "default": "false"}
    parser.add_argument("--model_name_or_path", help="base: folder or hub id (default: the one that the adapter names)")
    parser.add_argument("--adapter_name_or_path", help="adapter, or several separated by commas, merged in this order")
    add_prompt_flags(parser)
    parser.add_argument("--template", help="only validated: LLaMA-Factory's name of a chat template")
    parser.add_argument("--export_dir", required=True, help="folder of the result")
    parser.add_argument(
        "--format",
        choices=["hf", "vllm", "gguf"],
        default="hf",
        help="hf: one model folder; vllm: base/ and adapter/, with LoRA of the language model alone; gguf: two files "
        "for llama.cpp and Ollama, made by a checkout of llama.cpp (docs/export.md)",
    )
    add_gguf_flags(parser)
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
