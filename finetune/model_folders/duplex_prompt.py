"""Resolves the prompt of full-duplex records from flag, adapter and checkpoint, and writes it into results.

The prompt o45_fc has 24 tokens behind the published vocabulary. A result records it with the version of minicpm-o5-sdk,
in config.json, or in auto_mapping of an adapter; its tokenizer has the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.families.common import vocab_size
from finetune.families.family import Config, Family
from finetune.model_folders.checkpoint_folder import ADAPTER_CONFIG, CONFIG, has_adapter, read_adapter_config
from finetune.templates.duplex_fc import FIRST_ID, LAST_ID, NEW_TOKENS, PUBLISHED_IDS
from finetune.templates.prompt_types import DuplexName
from finetune.timeline import SDK_VERSION
from finetune.utils.errors import ArgumentError, CheckpointError
from finetune.utils.json_objects import read_object

DUPLEX_PROMPT = "duplex_prompt"
"""Key of the prompt in config.json and in auto_mapping."""
DUPLEX_SDK = "duplex_sdk"
"""Key of the version of minicpm-o5-sdk there."""
NATIVE: DuplexName = "native"
O45_FC: DuplexName = "o45_fc"
FLAG = f"--{DUPLEX_PROMPT}"
_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True, slots=True)
class DuplexPrompt:
    """The prompt o45_fc of a run.

    Attributes:
        origin: the flag, or the folder that records it.
        adds_rows: whether the base has the published rows only, to which 24 are added at load.
    """

    origin: str
    adds_rows: bool

    def __str__(self) -> str:
        rows = f", {len(NEW_TOKENS)} rows added: {LAST_ID}" if self.adds_rows else ""
        return f"{DUPLEX_PROMPT} {O45_FC} by minicpm-o5-sdk {SDK_VERSION} ({self.origin}{rows})"


def decide_duplex_prompt(
    family: Family, config: Config, folder: Path, wish: str | None, trained: Path | None = None
) -> DuplexPrompt | None:
    """The prompt of a run: that of the flag, else of what was trained, else of the base; None for the native one.

    Args:
        family: the generation.
        config: config.json of the base.
        folder: its folder.
        wish: value of the flag, None if it is not given.
        trained: adapter or checkpoint trained on the base.

    Raises:
        ArgumentError: an unknown prompt, a family without full duplex, or a flag against what was trained.
        CheckpointError: a result of another version of the package, or a base with another vocabulary.
    """
    if wish not in (None, NATIVE, O45_FC):
        why = "its network is another one (Qwen3.5), and its tokenizer does not load with transformers 5.23 and later"
        reason = f": {why}" if wish == "o5" else ""
        raise ArgumentError(f"{FLAG} {wish}: known are {NATIVE} and {O45_FC}{reason}")
    if wish is not None and family.render_timeline is None:
        raise ArgumentError(f"{FLAG} {wish}: {family.title} has no full-duplex prompt; omit the flag")
    if family.render_timeline is None:
        return None
    before = trained if trained is not None and prompt_of(trained) == O45_FC else None
    if before is None and _checked(config, folder / CONFIG) == O45_FC:
        before = folder
    if before is not None and wish == NATIVE:
        raise ArgumentError(f"{FLAG} {NATIVE}: {before} was trained in the prompt {O45_FC}; omit the flag")
    if before is None and wish != O45_FC:
        return None
    rows = vocab_size(config)
    if rows not in (FIRST_ID, LAST_ID):
        raise CheckpointError(
            f"{FLAG} {O45_FC}: its ids are those of the published vocabulary of {FIRST_ID} rows, and {folder / CONFIG} "
            f"has vocab_size {rows}; use {family.hub_id}"
        )
    return DuplexPrompt(FLAG if wish else str(before), rows == FIRST_ID)


def prompt_of(folder: Path) -> str | None:
    """The prompt that an adapter or model folder records; None for none.

    Raises:
        CheckpointError: it was trained by another version of minicpm-o5-sdk.
    """
    if has_adapter(folder):
        return _checked(read_adapter_config(folder).get("auto_mapping") or {}, folder / ADAPTER_CONFIG)
    return _checked(read_object(folder / CONFIG), folder / CONFIG) if (folder / CONFIG).is_file() else None


def _checked(values: Mapping[str, Any], file: Path) -> str | None:
    if (prompt := values.get(DUPLEX_PROMPT)) is not None and values.get(DUPLEX_SDK) != SDK_VERSION:
        raise CheckpointError(
            f"{file}: trained on records as minicpm-o5-sdk {values.get(DUPLEX_SDK)} writes them, and this version "
            f"reads them by {SDK_VERSION}, which gives other ids: train again, or use the version of the toolkit that "
            "trained it"
        )
    return prompt


def recorded_as() -> dict[str, str]:
    """The keys with which a result records the prompt."""
    return {DUPLEX_PROMPT: O45_FC, DUPLEX_SDK: SDK_VERSION}


def write_duplex_prompt(folder: Path) -> None:
    """Adds the new tokens to the tokenizer files of a folder, and prompt and rows to its config.json."""
    new = {FIRST_ID + number: token for number, token in enumerate(NEW_TOKENS)}
    _edit(folder / CONFIG, lambda values: values.update(vocab_size=LAST_ID, **recorded_as()))
    _edit(folder / "tokenizer.json", lambda values: _add_tokens(values["added_tokens"], new))
    decoder = {str(number): {"content": token, **_TOKEN} for number, token in new.items()}
    _edit(
        folder / "tokenizer_config.json", lambda values: values.setdefault("added_tokens_decoder", {}).update(decoder)
    )
    _edit(folder / "added_tokens.json", lambda values: values.update({token: number for number, token in new.items()}))


def _add_tokens(added: list[dict[str, Any]], new: Mapping[int, str]) -> None:
    there = {token["id"] for token in added}
    added += [{"id": number, "content": token, **_TOKEN} for number, token in new.items() if number not in there]


def _edit(path: Path, change: Any) -> None:
    """Changes a JSON object of a file that exists."""
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        change(values)
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_published_ids(vocabulary: Mapping[str, int], where: str) -> None:
    """Refuses a tokenizer whose control tokens have other ids than the published ones, on which the prompt depends.

    Raises:
        CheckpointError: naming the first one.
    """
    for token, number in PUBLISHED_IDS.items():
        if vocabulary.get(token) != number:
            raise CheckpointError(
                f"{FLAG} {O45_FC}: {token} must have id {number}, as published, and the tokenizer of {where} has "
                f"{vocabulary.get(token, 'no such token')}; put the published tokenizer files back"
            )
