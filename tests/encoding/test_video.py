"""Videos of a conversation: the prompt, the pixels, the batch and the network, per generation."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import number, picture, write_clip
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding import video_frames
from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.encoding.length_policy import LengthPolicy
from finetune.families import by_name
from finetune.media.slicing import MERGES, SliceSpec
from finetune.media.transformers_processor import check_videos
from finetune.media.video_sampling import VideoOptions
from finetune.model_folders.downsample_mode import write_mode
from finetune.models import load_model, load_tokenizer
from finetune.sample import DataError, Media, Message, Part, Sample, Source, Text
from finetune.utils.errors import UserError
from finetune.utils.log_once import warn_once

FRAMES = 40
"""Of the clip, 8 per second: 5 seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("videos")
    write_clip(data / "clip.mp4", FRAMES, fps=8, size=(112, 112))
    write_clip(data / "wide.mp4", 12, fps=4, size=(240, 112))
    picture(3, (60, 50)).save(data / "image.png")
    return data


def sample(*parts: Part, answer: str = "Yes.") -> Sample:
    messages = (Message("user", parts), Message("assistant", (Text(answer),), train=True))
    return Sample(id="s", source=Source("data.json", 3), messages=messages)


def video(folder: Path, name: str = "clip.mp4") -> Media:
    return Media("video", folder / name)


def encoder(model: Path, video: VideoOptions | None = None, **options: Any) -> Encoder:
    base = resolve_base(str(model))
    return Encoder(base.family, load_tokenizer(model), base.settings, video=video, **options)


def prompt(made: Encoder, example: Example) -> str:
    """The user turn, runs of placeholders as their number."""
    text = str(made.tokenizer.decode(example.input_ids)).partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
    for token, short in (("<unk>", "u"), ("<|image_pad|>", "i"), ("<|video_pad|>", "v")):
        for count in range(64, 0, -1):
            text = text.replace(token * count, f"{count}{short}")
    return text.replace("<image>", "[").replace("</image>", "]").replace("<slice>", "{").replace("</slice>", "}")


@pytest.mark.parametrize("family", ["v2_6", "v4_0", "o2_6", "o4_5"])
def test_frames_are_images_without_numbers(tiny, folder: Path, family: str) -> None:
    made = encoder(tiny(family))
    whole = sample(video(folder), Text("What?"))
    assert prompt(made, made.encode(whole)) == "\n".join(["[8u]"] * 5) + "What?"
    mixed = sample(Media("image", folder / "image.png"), Text("Then "), video(folder), Text("\nand "), video(folder))
    example = made.encode(mixed)
    assert prompt(made, example) == "[8u]Then " + "\n".join(["[8u]"] * 5) + "\nand " + "\n".join(["[8u]"] * 5)
    assert example.group_sizes is None
    assert (example.temporal_ids == -1).all()
    numbered = made.encode(sample(Media("image", folder / "image.png"), Text("What?")))
    assert prompt(made, numbered) == "<image_id>0</image_id>[8u]What?"


def test_pixels_are_those_of_the_chosen_frames(tiny, folder: Path) -> None:
    made = encoder(tiny("v2_6"))
    example = made.encode(sample(video(folder), Text("What?")))
    side = made.slicing.patch_size
    for place, patches in enumerate(example.patches.split(example.tgt_sizes.prod(1).tolist())):
        shown = patches.reshape(-1, 3, side, side).permute(0, 2, 3, 1).reshape(-1, side, 3)
        assert number(Image.fromarray(shown.numpy())) == 8 * place


def test_packed_groups(tiny, folder: Path) -> None:
    """15 frames of 5 seconds; at most 3 groups are wanted, and so 3 frames share one."""
    made = encoder(tiny("v4_5"), VideoOptions(max_frames=5))
    example = made.encode(sample(Text("See "), video(folder), Text("What?")))
    assert prompt(made, example) == "See " + "\n".join(["[8u]"] * 5) + "What?"
    assert example.group_sizes is not None
    assert example.group_sizes.tolist() == [3] * 5
    assert example.temporal_ids.tolist() == [1, 5, 7, 11, 15, 17, 21, 24, 27, 31, 34, 37, 41, 45, 47]
    assert len(example.tgt_sizes) == 15
    assert len(example.image_bound) == 5


def test_slices_of_a_group_are_side_by_side(tiny, folder: Path) -> None:
    """All thumbnails of a group, then all their first slices, ...: every run of placeholders has one of each frame."""
    made = encoder(tiny("v4_5"), VideoOptions(packing=2, max_slice_nums=2))
    example = made.encode(sample(video(folder, "wide.mp4"), Text("What?")))
    groups = 5  # 9 frames, 3 per second
    assert prompt(made, example) == "\n".join(["[8u]{8u}{8u}"] * groups) + "What?"
    assert example.group_sizes is not None
    assert example.group_sizes.tolist() == [2, 2, 2] * 4 + [1, 1, 1]
    times = example.temporal_ids.tolist()
    assert times[:6] == times[:2] * 3
    side, found = made.slicing.patch_size, []
    for patches in example.patches.split(example.tgt_sizes.prod(1).tolist())[:6]:
        shown = patches.reshape(-1, 3, side, side).permute(0, 2, 3, 1).reshape(-1, side, 3)
        found.append(number(Image.fromarray(shown.numpy())))
    assert found == found[:2] * 3
    assert found[0] != found[1]


@pytest.mark.parametrize(("family", "options"), [("v2_6", None), ("v4_5", VideoOptions(max_frames=3)), ("v4_7", None)])
def test_rows_of_a_batch_do_not_mix(tiny, folder: Path, family: str, options: VideoOptions | None) -> None:
    """Loss and logits of two videos and an image in one batch are those of each alone, padded on either side."""
    made, model = encoder(tiny(family), options), load_model(tiny(family), dtype=torch.float32).eval()
    samples = [
        sample(video(folder), Text("What?")),
        sample(Media("image", folder / "image.png"), video(folder, "wide.mp4"), Text("Which of them?")),
        sample(Media("image", folder / "image.png"), Text("What?"), answer="No, never."),
    ]
    examples = [made.encode(each) for each in samples]
    side: Any
    for side in ("right", "left"):
        with torch.no_grad():
            together = model(**pad(examples, made.pad_id, side)).row_loss
            alone = torch.cat([model(**pad([example], made.pad_id)).row_loss for example in examples])
        assert torch.allclose(together, alone, atol=1e-4), side


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("family", ["v4_6", "v4_7"])
def test_batch_is_the_one_of_the_published_processor(
    tiny, folder: Path, tmp_path: Path, family: str, mode: str
) -> None:
    """Ids, types, pixels and sizes; frames are given as decoded here, they choose and cut them."""
    model = shutil.copytree(tiny(family), tmp_path / "model")
    write_mode(model, by_name(family), mode)
    made = encoder(model)
    with video_frames.video.Decoder(video_frames.video.probe(video(folder, "wide.mp4"))) as decoder:
        frames = torch.stack([torch.tensor(list(decoder.take(index).tobytes())) for index in range(12)])
    frames = frames.to(torch.uint8).reshape(12, 112, 240, 3).permute(0, 3, 1, 2)
    image = Image.open(folder / "image.png")
    given = sample(Media("image", folder / "image.png"), video(folder, "wide.mp4"), Text("What?"))
    if mode == "4x" and version("transformers").startswith("5.20."):
        with pytest.raises(UserError, match="need transformers 5.21 or newer"):
            made.measure(given, True)
        return
    ours = pad([made.encode(given, generate=True)], made.pad_id)
    processor = AutoProcessor.from_pretrained(model)
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    metadata = VideoMetadata(total_num_frames=12, fps=4.0, duration=3.0)
    theirs = processor(
        text=[text], images=[image], videos=[frames], videos_kwargs={"video_metadata": [metadata]}, return_tensors="pt"
    )
    assert ours.keys() - {"labels"} == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor.to(ours[key].dtype)), key


def test_versions_that_cut_videos_in_another_mode() -> None:
    """The processor of transformers 5.20 cuts frames in 16x whatever it is told."""
    spec = SliceSpec(max_slice_nums=9, scale_resolution=448, patch_size=14, merge=MERGES["4x"])
    with pytest.raises(UserError, match=r"need transformers 5.21 or newer, installed is 5.20.2: pip install"):
        check_videos(spec, "5.20.2")
    check_videos(spec, "5.21.0")
    check_videos(replace(spec, merge=MERGES["16x"]), "5.20.2")
    check_videos(replace(spec, merge=1), "5.20.2")


@pytest.mark.parametrize("family", ["v4_6", "v4_7"])
def test_every_layer_is_called_once_for_images_and_videos(tiny, folder: Path, family: str) -> None:
    made, model = encoder(tiny(family)), load_model(tiny(family), dtype=torch.float32)
    calls: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    batch = pad([made.encode(sample(Media("image", folder / "image.png"), video(folder), Text("What?")))], made.pad_id)
    evaluated = model.eval()(**batch).loss
    assert len(calls) == 1
    model.train()(**batch).loss.backward()
    assert len(calls) == 2
    with torch.no_grad():
        logits = model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits
    labels = batch["labels"][:, 1:]
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    assert torch.allclose(evaluated, wanted, atol=1e-5)


@pytest.mark.parametrize("family", ["v2_0", "llama3_v2_5"])
def test_families_without_video_name_those_with(tiny, folder: Path, family: str) -> None:
    with pytest.raises(
        DataError, match=r"record 3: video \S*clip.mp4: .* takes images and text, no video; .*V 2.6.*4.5"
    ):
        encoder(tiny(family)).encode(sample(video(folder), Text("What?")))


def test_measure_and_length(tiny, folder: Path) -> None:
    made = encoder(tiny("v4_5"), VideoOptions(max_frames=5), max_length=2000)
    given = sample(Media("image", folder / "image.png"), video(folder), Text("What?"))
    example, measure = made.encode(given), made.measure(given)
    assert (measure.tokens, measure.items) == (len(example.input_ids), len(example.tgt_sizes))
    assert measure.patches == len(example.patches)
    made.max_length = 20
    with pytest.raises(DataError, match="lower max_slice_nums or video_max_frames"):
        made.encode(given)


def test_long_samples_lose_slices_of_images_and_turns_but_no_frames(tiny, folder: Path) -> None:
    made = encoder(tiny("v2_6"), max_slice_nums=4)
    Image.new("RGB", (300, 300)).save(folder / "large.png")
    last = sample(Media("image", folder / "large.png"), video(folder), Text("What?"))
    made.max_length = made.measure(last).tokens - 1
    example, outcome = LengthPolicy(made, "shrink").encode(last)
    assert outcome == "shrunk"
    assert prompt(made, example).count("[") == 6
    first = sample(video(folder), Text("Before?")).messages
    made.max_length = made.measure(last).tokens
    example, outcome = LengthPolicy(made, "shrink").encode(Sample("s", Source("d", 0), first + last.messages))
    assert outcome == "turns removed"
    assert "Before" not in prompt(made, example)
    # Text that joins frames is not text of the record: truncation leaves it.
    long = sample(video(folder), Text("word " * 50 + "What?"))
    made.max_length = made.measure(long).tokens - 20
    example, outcome = LengthPolicy(made, "truncate").encode(long)
    assert outcome == "truncated"
    assert prompt(made, example).startswith("\n".join(["[8u]"] * 5))


def test_folder_of_frames(tiny, tmp_path: Path) -> None:
    for index in range(4):
        picture(index, (112, 112)).save(tmp_path / f"{index}.png")
    for family, options in (("v2_6", None), ("v2_6", VideoOptions(fps=4.0)), ("v4_5", None), ("v4_6", None)):
        example = encoder(tiny(family), options).encode(sample(Media("video", tmp_path), Text("What?")))
        assert len(example.tgt_sizes) == 4, family


def test_options_without_effect_are_said_once(tiny, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        encoder(tiny("v2_6"), VideoOptions(packing=2, fps=2.0))
    encoder(tiny("v4_5"), VideoOptions(packing=2))
    said = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert said == ["videos: packing has no effect: MiniCPM-V 2.6 does not support it"]


def test_a_clip_that_is_cut_short_while_training(tiny, folder: Path, tmp_path: Path) -> None:
    """The header was read before: an error that names file and record."""
    made = encoder(tiny("v2_6"))
    path = tmp_path / "clip.mp4"
    path.write_bytes((folder / "clip.mp4").read_bytes())
    given = sample(Media("video", path), Text("What?"))
    plans = made.plans(made.sizes(given))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"data.json, record 3: video \S*clip.mp4"):
        made.assemble(given, plans, made.render(given, plans))
