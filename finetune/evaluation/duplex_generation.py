"""Full-duplex records answered freely: unit by unit, each with what the model itself said before.

The limits are those of the published inference of MiniCPM-o 4.5: 20 tokens per unit; a unit ends with <|listen|> or
<|chunk_eos|>; while a turn is not ended, <|listen|> is not allowed. Its repetition and length penalties, its sampling
and its sliding window are not applied: decoding is greedy. Audio is encoded as in training, from the start of the
record to the end of the unit; the published inference encodes it as a stream, which differs at the edges of units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessorList

from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.evaluation.batched_generation import device_of, evaluating
from finetune.model_folders.downsample_mode import working_in
from finetune.sample import Sample
from finetune.templates.duplex import LISTEN, MOST_TOKENS, SPEAK, TURN_END, UNIT, UNIT_END, generated_units
from finetune.templates.prompt_types import IGNORE


@dataclass(slots=True)
class Played:
    """What the model did with a record.

    Attributes:
        units: the ids of each unit.
        texts: the text of each unit, empty where it listened.
        ends: whether a turn ended in the unit.
    """

    units: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All that it said."""
        return "".join(self.texts)


class _Listened:
    """The parts of a record that the model is given: system turn, and per unit the ids before its decision."""

    def __init__(self, encoder: Encoder, sample: Sample) -> None:
        self.example = encoder.encode(sample)
        assert sample.timeline is not None
        self.picture_units = sample.timeline.picture_units
        ids = self.example.input_ids.tolist()
        units = generated_units(ids, self.example.labels.tolist(), encoder.prompt_tokenizer)
        open_, close = (encoder.prompt_tokenizer.control(token) for token in UNIT)
        start = ids.index(open_)
        self.system, self.given, self.close = ids[:start], [], close
        self.starts: list[int] = []
        for unit in units:
            self.given.append(ids[start : unit.first])
            self.starts.append(start)
            start = unit.first + len(unit.ids) + 1

    def prompt(self, said: Sequence[Sequence[int]]) -> Example:
        """The example that ends before the decision of the next unit, after the units that were said."""
        unit = len(said)
        ids, places = list(self.system), []
        for number, given in enumerate(self.given[: unit + 1]):
            places.append(len(ids))
            ids += [*given, *said[number], self.close] if number < unit else given
        pictures = sum(each <= unit for each in self.picture_units)
        whole = self.example
        tiles = whole.tgt_sizes[:pictures]
        return replace(
            whole,
            input_ids=torch.tensor(ids),
            labels=torch.full((len(ids),), IGNORE),
            position_ids=torch.arange(len(ids)),
            patches=whole.patches[: int(tiles.prod(dim=1).sum())],
            tgt_sizes=tiles,
            temporal_ids=whole.temporal_ids[:pictures],
            image_bound=self._moved(whole.image_bound, places),
            audio_bound=self._moved(whole.audio_bound, places),
            audio=self._heard(unit + 1),
        )

    def _moved(self, bounds: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """The bounds of the system turn and of the first units, where they are in the new ids."""
        kept = []
        for first, last in bounds.tolist():
            unit = sum(start <= first for start in self.starts) - 1
            if unit < len(places):
                shift = 0 if unit < 0 else places[unit] - self.starts[unit]
                kept.append((first + shift, last + shift))
        return torch.tensor(kept, dtype=torch.int64).reshape(-1, 2)

    def _heard(self, seconds: int) -> tuple[torch.Tensor, ...]:
        """The log-mel chunks of the reference, and those of the user audio of the first seconds."""
        total = 100 * len(self.given)
        kept: list[torch.Tensor] = []
        chunks, frames = list(self.example.audio), 0
        while sum(chunk.shape[1] for chunk in chunks) > total:
            kept.append(chunks.pop(0))
        for chunk in chunks:
            left = 100 * seconds - frames
            if left > 0:
                kept.append(chunk[:, :left])
            frames += chunk.shape[1]
        return tuple(kept)


def play(
    model: nn.Module, encoder: Encoder, samples: Sequence[Sample], *, max_new_tokens: int = MOST_TOKENS
) -> list[Played]:
    """Plays full-duplex records side by side.

    Args:
        model: the model, or a PeftModel around it; its training mode is restored.
        encoder: that of the checkpoint.
        samples: samples with a timeline, one batch.
        max_new_tokens: tokens of a unit; more than MOST_TOKENS count as that.
    """
    listened, most = [_Listened(encoder, sample) for sample in samples], min(max_new_tokens, MOST_TOKENS)
    played = [Played() for _ in samples]
    for unit in range(max(len(each.given) for each in listened)):
        left = [place for place, each in enumerate(listened) if unit < len(each.given)]
        prompts = [listened[place].prompt(played[place].units) for place in left]
        rows = _generated(model, encoder, prompts, [_speaking(played[place]) for place in left], most)
        for place, row in zip(left, rows, strict=True):
            _take(encoder, played[place], row)
    return played


def _speaking(played: Played) -> bool:
    """Whether the last unit spoke without ending its turn."""
    return bool(played.units) and bool(played.texts[-1] or len(played.units[-1]) > 1) and not played.ends[-1]


def _generated(
    model: nn.Module, encoder: Encoder, prompts: Sequence[Example], speaking: Sequence[bool], most: int
) -> list[list[int]]:
    listen, unit_end = (encoder.prompt_tokenizer.control(token) for token in (LISTEN, UNIT_END))
    batch = pad(prompts, encoder.pad_id, side="left")
    inputs = {k: v.to(device_of(model)) for k, v in batch.items() if k not in ("labels", "position_ids")}
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    barred = torch.tensor(speaking, device=inputs["input_ids"].device)
    turn_end, prompt = encoder.prompt_tokenizer.control(TURN_END), inputs["input_ids"].shape[1]

    def no_listening(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """<|listen|> is out of reach while a turn goes on, also of one that began in this unit."""
        new = ids[:, prompt:]
        going_on = (barred | (new.shape[1] > 0)) & ~(new == turn_end).any(1)
        scores[going_on, listen] = -torch.inf
        return scores

    with torch.no_grad(), evaluating(model), working_in(model, encoder.downsample_mode):
        output = model.generate(  # pyright: ignore[reportCallIssue]
            **inputs,
            **options,
            max_new_tokens=most - 1,  # the last one is <|chunk_eos|>
            logits_processor=LogitsProcessorList([no_listening]),  # pyright: ignore[reportArgumentType]
            eos_token_id=[listen, unit_end],
            pad_token_id=encoder.pad_id,
            use_cache=True,
        )
    return [_until(row, listen, unit_end) for row in output[:, prompt:].tolist()]


def _until(row: Sequence[int], listen: int, unit_end: int) -> list[int]:
    """The ids up to the first <|listen|> or <|chunk_eos|>; without either, <|chunk_eos|> is added."""
    end = next((place for place, token in enumerate(row) if token in (listen, unit_end)), None)
    return [*row, unit_end] if end is None else list(row[: end + 1])


def _take(encoder: Encoder, played: Played, row: list[int]) -> None:
    control = [encoder.prompt_tokenizer.control(token) for token in (LISTEN, SPEAK, TURN_END, UNIT_END)]
    played.units.append(row)
    played.texts.append(str(encoder.tokenizer.decode([token for token in row if token not in control])))
    played.ends.append(control[2] in row)
