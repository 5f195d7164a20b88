import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import plain_messages
import pytest
import simplejpeg
import torch
from golden_tokenizers import small_images, tokenizer
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import AlignmentError, Encoder
from finetune.encoding.example import Example
from finetune.encoding.length_policy import LengthPolicy
from finetune.families import by_name
from finetune.families.family import Family
from finetune.media import image
from finetune.media.slicing import SlicePlan, SliceSpec
from finetune.models import load_tokenizer
from finetune.readers import read
from finetune.sample import DataError, Media, Message, Sample, Source, Text
from finetune.templates.prompt_types import TokenizedPrompt

SOURCE = Source("data.json", 5, "q")
NAMES = {"v2_0": "minicpm", "llama3_v2_5": "llama3"}
BOTH = pytest.mark.parametrize("family", NAMES)


def encoder(family: str | Family, **options: Any) -> Encoder:
    chosen = by_name(family) if isinstance(family, str) else family
    return Encoder(chosen, tokenizer(NAMES[chosen.name]), small_images(side=112), **options)


def sample(*media: Media, reply: str = "A dog.", text: str = "What?", train: bool = True) -> Sample:
    question = Message("user", (*media, Text(text)))
    return Sample("q", SOURCE, (question, Message("assistant", (Text(reply),), train=train)))


def picture(width: int, height: int) -> Media:
    return Media("image", Image.new("RGB", (width, height), (10, 20, 30)))


@BOTH
@pytest.mark.parametrize("sizes", [[], [(30, 30)], [(300, 200), (50, 400), (112, 112)]])
@pytest.mark.parametrize("generate", [False, True])
def test_measure_equals_encode(family: str, sizes: list[tuple[int, int]], generate: bool) -> None:
    conversation = sample(*(picture(*size) for size in sizes), text="What <unk> is <box>(1,2)</box>?")
    measured = encoder(family).measure(conversation, generate)
    example = encoder(family).encode(conversation, generate)
    assert measured.tokens == len(example.input_ids)
    assert measured.items == len(example.tgt_sizes) >= len(sizes)
    assert measured.patches == len(example.patches)
    assert measured.cost == pytest.approx(measured.tokens + 0.1 * measured.patches)


def test_large_images_are_shrunk_before_they_are_cut() -> None:
    """As the same image made smaller beforehand."""
    shrinking = encoder("llama3_v2_5", max_pixels=150 * 100)
    noise = Image.effect_noise((300, 200), 90).convert("RGB")
    small = Media("image", noise.resize((150, 100), Image.Resampling.BICUBIC))
    conversation = sample(Media("image", noise))
    example, expected = shrinking.encode(conversation), encoder("llama3_v2_5").encode(sample(small))
    assert torch.equal(example.patches, expected.patches)
    assert torch.equal(example.input_ids, expected.input_ids)
    assert shrinking.measure(conversation).items == len(example.tgt_sizes)
    assert len(encoder("llama3_v2_5").encode(conversation).tgt_sizes) > len(example.tgt_sizes)


@BOTH
def test_measure_takes_a_sample_as_it_is(family: str) -> None:
    conversation = sample()
    question = replace(conversation, messages=conversation.messages[:1])
    both = encoder(family)
    assert both.measure(conversation) == both.measure(conversation, generate=False)
    assert both.measure(question) == both.measure(conversation, generate=True)


@BOTH
def test_measure_reads_headers_only(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.effect_noise((300, 200), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    conversation = sample(Media("image", tmp_path / "a.jpg"))
    monkeypatch.setattr(Image.Image, "resize", None)
    # 300 x 200 at 112: six slices and the thumbnail.
    assert encoder(family).measure(conversation).items == 7
    with pytest.raises(DataError, match=r"record 5 \(id 'q'\): image .*a.jpg cannot be decoded"):
        encoder(family).encode(conversation)


@BOTH
def test_contract(family: str) -> None:
    example = encoder(family).encode(sample(picture(200, 112), picture(20, 20)))
    length, items = len(example.input_ids), len(example.tgt_sizes)
    for tensor, shape in (
        (example.labels, (length,)),
        (example.position_ids, (length,)),
        (example.tgt_sizes, (items, 2)),
        (example.image_bound, (items, 2)),
        (example.temporal_ids, (items,)),
    ):
        assert tensor.dtype == torch.int64
        assert tensor.shape == shape
    assert example.patches.dtype == torch.uint8
    assert example.patches.shape == (example.tgt_sizes.prod(1).sum(), 588)
    assert (example.patches.reshape(-1, 3, 196) == torch.tensor([10, 20, 30]).reshape(1, 3, 1)).all()
    assert example.position_ids.tolist() == list(range(length))
    assert set(example.temporal_ids.tolist()) == {-1}
    assert ((example.image_bound[:, 1] - example.image_bound[:, 0]) == 4).all()
    assert example.labels[0] == -100
    assert example.source == "data.json, record 5 (id 'q')"


def test_text_only_shapes() -> None:
    example = encoder("v2_0").encode(sample())
    assert example.patches.shape == (0, 588)
    assert example.tgt_sizes.shape == example.image_bound.shape == (0, 2)
    assert example.temporal_ids.shape == (0,)


@BOTH
def test_generate_carries_no_label(family: str) -> None:
    turns = (*sample().messages, *sample(text="And?").messages)
    example = encoder(family).encode(Sample("q", SOURCE, turns), generate=True)
    assert set(example.labels.tolist()) == {-100}


@BOTH
def test_chat_and_file_give_the_same_example(family: str, tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 50).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(
        '{"image": "a.png", "conversations": [{"role": "user", "content": "<image>\\nWhat?"}, '
        '{"role": "assistant", "content": "Noise."}]}'
    )
    trained = encoder(family).encode(read(tmp_path / "data.jsonl")[0])
    with Image.open(tmp_path / "a.png") as opened:
        asked = plain_messages.sample([{"role": "user", "content": [opened, "What?"]}])
        prompt = encoder(family).encode(asked, generate=True)
    head = len(prompt.input_ids)
    assert head < len(trained.input_ids)
    assert torch.equal(trained.input_ids[:head], prompt.input_ids)
    assert torch.equal(trained.patches, prompt.patches)
    assert (trained.labels[:head] == -100).all()
    assert (trained.labels[head:] != -100).all()


@BOTH
def test_too_long_is_an_error_and_nothing_is_cut(family: str) -> None:
    conversation = sample(picture(20, 20))
    length = encoder(family).measure(conversation).tokens
    assert len(encoder(family, max_length=length).encode(conversation).input_ids) == length
    limit = length - 1
    message = (
        rf"^data.json, record 5 \(id 'q'\): {length} tokens \(4 of them for 1 image slices\), the limit is {limit}; "
        "raise model_max_length, lower max_slice_nums, or shorten"
    )
    with pytest.raises(DataError, match=message):
        encoder(family, max_length=limit).encode(conversation)
    assert encoder(family, max_length=limit).measure(conversation).tokens == length


def test_nothing_to_train() -> None:
    with pytest.raises(DataError, match=r"record 5 \(id 'q'\): no token has a label"):
        encoder("v2_0").encode(sample(train=False))
    assert encoder("v2_0").encode(sample(train=False), generate=True).labels.max() == -100


def test_other_media() -> None:
    with pytest.raises(DataError, match=r"record 5 .*video clip.mp4: MiniCPM-V 2.0 takes images and text, no video"):
        encoder("v2_0").encode(sample(Media("video", Path("clip.mp4"))))


def test_unknown_character_names_the_record() -> None:
    with pytest.raises(DataError, match=r"^data.json, record 5 \(id 'q'\): the tokenizer has no id of its own"):
        encoder("llama3_v2_5").encode(sample(text="\U0010ffff710\U0010ffff"))


def test_pixel_limit_is_passed_on() -> None:
    small = encoder("v2_0", refuse_above_pixels=99)
    for use in (small.encode, small.measure):
        with pytest.raises(DataError, match="the limit is 99"):
            use(sample(picture(10, 10)))


@BOTH
def test_settings_and_options(family: str) -> None:
    config = {"query_num": 8, "max_slice_nums": 4, "slice_config": {"max_slice_nums": 4}, "patch_size": 14}
    chosen = by_name(family)
    made = Encoder(chosen, tokenizer(NAMES[family]), config)
    assert (made.layout.query_num, made.slicing, made.max_length) == (8, SliceSpec(4, 448, 14), None)
    assert made.refuse_above_pixels == image.MAX_PIXELS
    made = Encoder(chosen, tokenizer(NAMES[family]), config, max_slice_nums=1, max_length=9, refuse_above_pixels=5)
    assert (made.slicing.max_slice_nums, made.max_length, made.refuse_above_pixels) == (1, 9, 5)


def faulty(change: Callable[[TokenizedPrompt], None]) -> Family:
    """V-2.0 with a template that makes a mistake."""
    family = by_name("v2_0")

    def render(*args: Any) -> TokenizedPrompt:
        rendered = family.render(*args)
        change(rendered)
        return rendered

    return replace(family, render=render)


FAULTS: list[tuple[Callable[[TokenizedPrompt], Any], str]] = [
    (lambda rendered: rendered.image_bounds.pop(), "0 placeholder runs for 1 visual items"),
    (lambda rendered: rendered.image_bounds.__setitem__(0, (4, 8)), "placeholder runs whose lengths are not"),
    (lambda rendered: rendered.add([0]), "5 placeholder tokens, 4 of them in runs"),
    (lambda rendered: rendered.labels.pop(), "labels that do not match input_ids"),
    (lambda rendered: rendered.labels.__setitem__(0, 1), "labels that do not match input_ids"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_alignment_of_ids(change: Callable[[TokenizedPrompt], None], message: str) -> None:
    with pytest.raises(AlignmentError, match=rf"^data.json, record 5 \(id 'q'\): .*{message}.*; please report"):
        encoder(faulty(change)).encode(sample(picture(20, 20)))
    encoder(faulty(lambda rendered: None)).encode(sample(picture(20, 20)))


def test_alignment_of_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = image.slice_image

    def missing(opened: Image.Image, cuts: SlicePlan) -> list[np.ndarray]:
        return whole(opened, cuts)[:-1]

    monkeypatch.setattr(image, "slice_image", missing)
    with pytest.raises(AlignmentError, match=r"items of \[\] patches, the image headers give"):
        encoder("v2_0").encode(sample(picture(20, 20)))


def test_a_picture_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header is read for the plan, and its pixels for the patches; a fitting sample needs no other look."""
    Image.effect_noise((300, 200), 50).convert("RGB").save(tmp_path / "a.jpg")
    opened: list[object] = []
    begin, decode = JpegImageFile.load_prepare, simplejpeg.decode_jpeg

    def counted(self: JpegImageFile) -> None:
        opened.append(self)
        begin(self)

    def counted_too(data: bytes, colorspace: str) -> np.ndarray:
        opened.append(data)
        return decode(data, colorspace)

    monkeypatch.setattr(JpegImageFile, "load_prepare", counted)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted_too)
    conversation = sample(Media("image", tmp_path / "a.jpg"))
    for image_backend in ("pillow", "fast"):
        LengthPolicy(encoder("v2_0", max_length=10_000, image_backend=image_backend), "shrink").encode(conversation)
        assert len(opened) == 1
        opened.clear()


@pytest.mark.parametrize("kind", ["sixteen.png", "cmyk.jpg", "palette.png", "animated.gif", "good.png", "whole.jpg"])
def test_fast_backend_takes_every_picture(zoo: Path, kind: str) -> None:
    """As Pillow decodes it."""
    conversation = sample(Media("image", zoo / kind))
    plain, quick = (encoder("v2_0", image_backend=name).encode(conversation) for name in ("pillow", "fast"))
    for field in fields(Example):
        ours, theirs = getattr(quick, field.name), getattr(plain, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, field.name


@pytest.mark.parametrize("family", ["v4_6", "v4_7"])
def test_fast_backend_before_a_processor_of_transformers(tiny, zoo: Path, family: str) -> None:
    base = resolve_base(tiny(family))
    plain, quick = (
        Encoder(base.family, load_tokenizer(base.folder), base.settings, image_backend=name).encode(
            sample(Media("image", zoo / "whole.jpg"))
        )
        for name in ("pillow", "fast")
    )
    assert torch.equal(plain.patches, quick.patches)


@pytest.mark.parametrize("kind", ["truncated.jpg", "empty.png", "page.jpg", "huge.png", "nowhere.jpg"])
def test_fast_backend_refuses_what_pillow_refuses(zoo: Path, kind: str) -> None:
    messages = []
    for name in ("pillow", "fast"):
        with pytest.raises(DataError) as caught:
            encoder("v2_0", image_backend=name).encode(sample(Media("image", zoo / kind)))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_survives_a_worker_process() -> None:
    made = encoder("v2_0")
    copied = pickle.loads(pickle.dumps(made))
    assert torch.equal(copied.encode(sample()).input_ids, made.encode(sample()).input_ids)
