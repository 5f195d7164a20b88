"""Our encoding against recorded official slicing, pixels, prompts and training samples, one result per case."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plain_messages
from parity_result import Result
from PIL import Image
from transformers import PreTrainedTokenizerFast

from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.encoding.video_frames import VideoFrames
from finetune.families import FAMILIES
from finetune.families.family import Family
from finetune.media import image
from finetune.media.patches import patchify
from finetune.media.slicing import SliceSpec, plan
from finetune.media.video_sampling import Group
from finetune.readers import read
from finetune.sample import DataError, Media, Message, Sample, Source, Text
from finetune.templates.prompt_types import IGNORE

Json = Mapping[str, Any]
_MARK_SPACE = re.compile(r"(</?(?:ref|box|quad|point)>) ")


def check_folder(folder: Path) -> Iterator[Result]:
    """Compares everything in ``folder`` that belongs to a family we know; what is missing there is not checked."""
    if (folder / "slicing.json").exists():
        yield from _slicing(_load(folder / "slicing.json"))
    if (folder / "pixels" / "index.json").exists():
        yield from _pixels(folder / "pixels")
    for path in sorted(folder.glob("prompts_*.json")):
        name = path.stem.removeprefix("prompts_")
        family = next((family for family in FAMILIES if family.name == name), None)
        yield from _skipped(path) if family is None else _prompts(folder, path, family)
    for path in sorted(folder.glob("training_*.json")):
        known = {family.llm_type for family in FAMILIES}
        yield from _skipped(path) if path.stem.removeprefix("training_") not in known else _training(folder, path)


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _skipped(path: Path) -> Iterator[Result]:
    yield Result(path.stem, True, "not compared: no such family here")


def _slicing(data: Json) -> Iterator[Result]:
    header = data["header"]
    for row in data["entries"]:
        most = row["max_slice_nums"]
        width, height = row["size"]
        cuts = plan(width, height, SliceSpec(most, header.get("scale_resolution", 448), header.get("patch_size", 14)))
        ours = (list(cuts.thumbnail), cuts.grid and list(cuts.grid), cuts.slice and list(cuts.slice), cuts.items)
        official = (row["thumbnail"], row["grid"], row["slice"], row["items"])
        detail = "equal" if ours == official else f"official {official}, ours {ours}"
        yield Result(f"slicing {width}x{height} max {most}", ours == official, detail)


def _pixels(folder: Path) -> Iterator[Result]:
    for row in _load(folder / "index.json")["entries"]:
        media = Media("image", folder / row["image"])
        decoded = image.load(media)
        faults = []
        if image.size(media) != tuple(row["size"]) or _sha(decoded) != row["sha256_of_rgb_bytes"]:
            faults.append("source differs")
        width, height = decoded.size
        cuts = image.slice_image(decoded, plan(width, height, SliceSpec(row["max_slice_nums"], 448, 14)))
        if len(cuts) != len(row["slices"]):
            faults.append(f"{len(cuts)} items, official {len(row['slices'])}")
        for cut, official in zip(cuts, row["slices"], strict=False):
            faults += _pixel_faults(folder, cut, official)
        yield Result(f"pixels {row['image']}", not faults, "; ".join(faults) or f"{len(cuts)} items bit-identical")


def _pixel_faults(folder: Path, cut: np.ndarray, official: Json) -> list[str]:
    """Faults of one slice; the file recorded with Pillow 12 counts as well, its figures were not recorded."""
    file, seen = folder / official["file"], np.ascontiguousarray(cut[..., :3])
    if _sha(Image.fromarray(seen)) != official["sha256_of_rgb_bytes"]:
        older = file.with_suffix(".pillow12.png")
        same = older.exists() and Image.open(older).convert("RGB").tobytes() == seen.tobytes()
        return [] if same else [f"{official['file']} differs"]
    rows, columns = official["tgt_size"]
    patches = patchify([cut], 14)
    # The official layout: (channel, row in the patch, patch x column in the patch).
    strip = patches.reshape(-1, 3, 14, 14).transpose(1, 2, 0, 3).reshape(3, 14, -1)
    values = (strip.astype(np.float64) / 255 - 0.5) / 0.5
    faults = []
    if len(patches) != rows * columns or list(strip.shape) != official["pixel_values_shape"]:
        faults.append(f"{official['file']}: {strip.shape}, official {official['pixel_values_shape']}")
    elif np.abs(values[0, 0, :5] - official["pixel_values_first5"]).max() > 1e-6:
        faults.append(f"{official['file']}: first values {values[0, 0, :5]}")
    elif abs(values.mean() - official["pixel_values_mean_f64"]) > 1e-6:
        faults.append(f"{official['file']}: mean {values.mean()}")
    return faults


def _sha(picture: Image.Image) -> str:
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


def _encoder(folder: Path, family: Family, header: Json, options: Json) -> Encoder:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / header["tokenizer"])
    options = {**header.get("defaults", {}), **options}
    config = {"query_num": header["query_num"], "use_image_id": options.get("use_image_id", True)}
    thinking, slices = options.get("enable_thinking", False), options.get("max_slice_nums", 9)
    return Encoder(family, tokenizer, config, max_slice_nums=slices, enable_thinking=thinking)


def _prompts(folder: Path, path: Path, family: Family) -> Iterator[Result]:
    data = _load(path)
    for case in data["cases"]:
        name = f"{family.name} prompt {case['name']}"
        encoder = _encoder(folder, family, data["header"], case["options"])
        if "temporal_ids" in case["options"]:
            yield _compare_packed(name, case, encoder)
            continue
        turns = [
            {"role": turn["role"], "content": [_content(part) for part in turn["content"]]} for turn in case["messages"]
        ]
        sample = plain_messages.sample(turns, system_prompt=case["options"].get("system_prompt"))
        try:
            example = encoder.encode(sample, generate=True)
        except DataError as error:
            yield Result(name, False, f"refused: {error}")
            continue
        yield _compare_prompt(name, case, example)


def _compare_packed(name: str, case: Json, encoder: Encoder) -> Result:
    """Frames of a video with given groups."""
    (message,) = case["messages"]
    before = [part for part in message["content"][:1] if isinstance(part, str)]
    frames = [part["image"] for part in message["content"] if not isinstance(part, str)]
    with tempfile.TemporaryDirectory() as scratch:
        files = tuple(Path(scratch) / f"{place}.png" for place in range(len(frames)))
        for file, size in zip(files, frames, strict=True):
            Image.new("RGB", tuple(size)).save(file, compress_level=1)
        texts = [Text(f"{text}\n") for text in before]
        parts = (*texts, Media("video", files), Text(f"\n{message['content'][-1]}"))
        sample = Sample(id="", source=Source(name, 0), messages=(Message("user", parts),))
        (footage,) = encoder.sizes(sample)
        assert isinstance(footage, VideoFrames)
        places, groups = iter(range(len(frames))), []
        for times in case["options"]["temporal_ids"]:
            groups.append(Group(tuple(next(places) for _ in times), tuple(times)))
        plans = encoder.plans([replace(footage, groups=tuple(groups))])
        example = encoder.assemble(sample, plans, encoder.render(sample, plans, True))
    result = case["result"]
    sizes = [1] * len(groups) if example.group_sizes is None else example.group_sizes.tolist()
    times = iter(example.temporal_ids.tolist())
    ours = {
        **{key: getattr(example, key).tolist() for key in ("input_ids", "image_bound", "tgt_sizes")},
        "temporal_ids": [[next(times) for _ in range(size)] for size in sizes],
    }
    faults = [f"{key}: {_first_difference(ours[key], result[key])}" for key in ours if ours[key] != result[key]]
    return Result(name, not faults, "; ".join(faults) or f"{len(example.input_ids)} ids equal")


def _content(part: str | Json) -> str | Image.Image:
    return part if isinstance(part, str) else Image.new("RGB", tuple(part["image"]))


def _compare_prompt(name: str, case: Json, example: Example) -> Result:
    items = sum(entry["items"] for entry in case["images"])
    if len(example.image_bound) != items:
        return Result(name, False, f"{len(example.image_bound)} placeholder runs for {items} items")
    result = case["result"]
    if result is None:
        return Result(name, True, f"encoded as plain text, {len(example.input_ids)} ids; the official code raises")
    faults = [
        f"{key}: {_first_difference(getattr(example, key).tolist(), result[key])}"
        for key in ("input_ids", "image_bound", "tgt_sizes")
        if getattr(example, key).tolist() != result[key]
    ]
    if faults and case["name"].startswith("literal_"):
        return Result(name, True, f"differs on purpose, control tokens in text stay text ({faults[0]})")
    if faults and case["messages"][-1]["role"] == "assistant":
        return Result(name, True, f"differs on purpose, a last answer is the one to give ({faults[0]})")
    return Result(name, not faults, "; ".join(faults) or f"{len(example.input_ids)} ids equal")


def _first_difference(ours: list[Any], official: list[Any]) -> str:
    at = next((n for n, pair in enumerate(zip(ours, official, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"{len(ours)} values, official {len(official)}"
    return f"position {at}: official {official[at]}, ours {ours[at]}"


def _training(folder: Path, path: Path) -> Iterator[Result]:
    data = _load(path)
    with tempfile.TemporaryDirectory() as scratch:
        for case in data["cases"]:
            family = _family_of(path, case)
            name = f"{family.name} training {case['name']}"
            encoder = _encoder(folder, family, data["header"], case.get("inference_options", {}))
            try:
                sample = _record(Path(scratch), case)
                example = encoder.encode(sample)
                prompt = encoder.encode(sample, generate=True)
            except DataError as error:
                refused = case["result"] is None
                yield Result(name, refused, f"refused{', as officially' if refused else ''}: {error}")
                continue
            if case["result"] is None:
                yield Result(name, True, f"encoded, {len(example.input_ids)} ids; the official code raises")
                continue
            faults = [*_prompt_faults(case, example, prompt, encoder, sample), *_label_faults(example, sample, encoder)]
            deviation = _deviation(family, case)
            if deviation is None:
                faults += _official_faults(case["result"], example)
            elif family.llm_type == "qwen":
                faults += _answer_faults(case["result"], example, encoder)
                if len(case["images"]) == 1:
                    faults += _unnumbered_faults(case["result"], example, encoder)
            detail = f"{len(example.input_ids)} ids, labels exact"
            detail += "" if deviation is None else f"; official ids differ: {deviation}"
            yield Result(name, not faults, "; ".join(faults) or detail)


def _family_of(path: Path, case: Json) -> Family:
    """The family of a training case: the one it names, else the one whose LLM_TYPE the file names."""
    llm_type = path.stem.removeprefix("training_")
    return next(
        family
        for family in FAMILIES
        if family.llm_type == llm_type and case.get("template", family.name) == family.name
    )


def _deviation(family: Family, case: Json) -> str | None:
    """Where the official training code does not write the prompt of its own inference; None where it does."""
    if family.llm_type == "minicpm":
        return "pieces encoded one by one, without <s>"
    if len(case["images"]) > 1:
        return "newlines around every tag"
    if family.llm_type == "qwen" and case["images"]:
        width, height = next(iter(case["images"].values()))
        if plan(width, height, SliceSpec(9, 448, 14)).grid is None:
            return "no number on an image that is not sliced"
    return None


def _record(folder: Path, case: Json) -> Sample:
    """The case through our reader, from files."""
    paths = {}
    for tag, (width, height) in case["images"].items():
        paths[tag] = f"{width}x{height}.png"
        if not (folder / paths[tag]).exists():
            Image.new("RGB", (width, height)).save(folder / paths[tag], compress_level=1)
    record: dict[str, Any] = {"id": case["name"], "conversations": case["conversations"]}
    if paths:
        record["image"] = paths["<image>"] if list(paths) == ["<image>"] else paths
    file = folder / "data.json"
    file.write_text(json.dumps([record], ensure_ascii=False), encoding="utf-8")
    return read(file)[0]


def _prompt_faults(case: Json, example: Example, prompt: Example, encoder: Encoder, sample: Sample) -> list[str]:
    """Training ids are the inference prompt, the answer as a continuation, and the end of the turn."""
    faults = []
    ids, head = example.input_ids.tolist(), prompt.input_ids.tolist()
    official = case.get("inference_prompt_ids")
    if official is not None and head != official:
        faults.append(f"prompt: {_first_difference(head, official)}")
    end = [encoder.prompt_tokenizer.control(encoder.family.stop_tokens[0])]
    # ChatML has a newline behind the end of a turn.
    end += encoder.prompt_tokenizer.fixed("\n") if case.get("template") else []
    # A prompt that asks for thinking ends with the opening mark.
    text = sample.messages[-1].text.strip()
    text = text.removeprefix("<think>\n") if encoder.layout.enable_thinking else text
    if ids != [*head, *encoder.prompt_tokenizer.continuation(text), *end]:
        faults.append("training ids are not prompt + answer + end")
    if example.image_bound.tolist() != prompt.image_bound.tolist():
        faults.append("placeholders move between prompt and training")
    return faults


def _label_faults(example: Example, sample: Sample, encoder: Encoder) -> list[str]:
    """The labels, decoded, are the answers, each with the end token behind it, in order."""
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    tokenizer = encoder.tokenizer
    end = encoder.prompt_tokenizer.control(encoder.family.stop_tokens[0])
    found, start = [], 0
    while start < len(labels):
        if labels[start] == IGNORE:
            start += 1
            continue
        stop = next((at for at in range(start, len(labels)) if labels[at] in (end, IGNORE)), len(labels))
        if stop == len(labels) or labels[stop] != end:
            return [f"the labels from {start} to {stop} have no end token"]
        if labels[start:stop] != ids[start:stop]:
            return [f"labels from {start} to {stop} are not the ids there"]
        # Decoders drop a leading space; the token before the answer keeps it from being the leading one.
        before = tokenizer.decode(ids[start - 1 : start], skip_special_tokens=False)
        text = str(tokenizer.decode(ids[start - 1 : stop], skip_special_tokens=False))
        found.append(_MARK_SPACE.sub(r"\1", text[len(before) :]))
        start = stop + 1
    answers = [message.text for message in sample.messages if message.role == "assistant"]
    if "tool" in encoder.family.roles:
        # Of earlier answers the thinking is left out.
        answers = [*(answer.rsplit("</think>\n\n", 1)[-1] for answer in answers[:-1]), answers[-1]]
    wanted = [_MARK_SPACE.sub(r"\1", answer) for answer in answers]
    return [] if found == wanted else [f"labels say {found}, the answers are {wanted}"]


def _answer_faults(result: Json, example: Example, encoder: Encoder) -> list[str]:
    """The labels are the ids of the official answers."""
    labels = [label for label in example.labels.tolist() if label != IGNORE]
    official = [token for first, last in result["answer_spans"] for token in result["input_ids"][first:last]]
    # The official code takes an answer with the word "assistant" for a header, and trains the empty think block.
    block = encoder.prompt_tokenizer.fixed("<think>\n\n</think>\n\n")
    official = official[len(block) :] if official[: len(block)] == block else official
    return [] if labels == official else [f"answers: {_first_difference(labels, official)}"]


def _unnumbered_faults(result: Json, example: Example, encoder: Encoder) -> list[str]:
    """Without the number of its only image the ids are the official ones."""
    ids = example.input_ids.tolist()
    number = [encoder.prompt_tokenizer.control("<image_id>"), *encoder.prompt_tokenizer.fixed("0")]
    at = ids.index(number[0])
    rest = ids[:at] + ids[at + len(number) + 1 :]
    if ids[at : at + len(number)] == number and rest == result["input_ids"]:
        return []
    return [f"ids without the number: {_first_difference(rest, result['input_ids'])}"]


def _official_faults(result: Json, example: Example) -> list[str]:
    """Ids equal the official ones, and labels its targets, but for the second end token that it trains."""
    faults = []
    if example.input_ids.tolist() != result["input_ids"]:
        faults.append(f"official ids: {_first_difference(example.input_ids.tolist(), result['input_ids'])}")
    shifted = [*example.labels.tolist()[1:], IGNORE]
    target = list(result["target"])
    for position in result["repeated_end_positions"]:
        target[position] = IGNORE
    if shifted != target:
        faults.append(f"official target: {_first_difference(shifted, target)}")
    return faults
