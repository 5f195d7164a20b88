"""Prompts and pixels follow the file that published inference reads."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import MiniCPMV4_6ImageProcessor, MiniCPMV4_6VideoProcessor

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.families import FAMILIES, by_name
from finetune.families.settings import FILES, disagreements, value_of
from finetune.media.audio_layout import plan_audio
from finetune.media.slicing import item_sizes, plan
from finetune.models import load_tokenizer
from finetune.utils.errors import CheckpointError
from finetune.utils.log_once import warn_once
from tools import settings_doc

NAMES = [family.name for family in FAMILIES]
PICTURES = ((448, 448), (1344, 1344), (1920, 1080))
# Items and placeholders of the three pictures, and runs of placeholders of 5 s of sound. From published files: 2.0,
# 2.6, 4.5 and o-4.5; from the values in official code and classes: the others (``Published.assumed``, and 2.5).
LOOKS: dict[str, tuple[list[tuple[int, int]], tuple[int, ...] | None]] = {
    "v2_0": ([(1, 64), (10, 640), (9, 576)], None),
    "llama3_v2_5": ([(1, 96), (10, 960), (9, 864)], None),
    "v2_6": ([(1, 64), (10, 640), (9, 576)], None),
    "o2_6": ([(1, 64), (10, 640), (9, 576)], (25, 25, 25, 25, 25)),
    "v4_0": ([(1, 64), (10, 640), (9, 576)], None),
    "v4_5": ([(1, 64), (10, 640), (9, 576)], None),
    "o4_5": ([(1, 64), (10, 640), (9, 576)], (50,)),
    "v4_6": ([(1, 64), (10, 640), (9, 578)], None),
    "v4_7": ([(1, 64), (10, 640), (9, 578)], None),
    "ocr1_0": ([(1, 256), (10, 2560), (9, 2292)], None),
}


def test_the_page_shows_the_tables_of_the_code() -> None:
    page = settings_doc.PAGE.read_text(encoding="utf-8")
    assert settings_doc.written(page) == page, "python -m tools.settings_doc writes it anew"


@pytest.mark.parametrize("name", NAMES)
def test_what_a_published_checkpoint_looks_at(name: str) -> None:
    family, given = by_name(name), by_name(name).published.settings
    spec, layout = family.slice_spec(given), family.layout(given)
    sizes = [item_sizes(plan(*picture, spec)) for picture in PICTURES]
    seen = [(len(items), sum(layout.item_tokens(*size) for size in items)) for items in sizes]
    heard = None if family.audio_spec is None else plan_audio(5 * 16_000, family.audio_spec(given)).runs
    assert (seen, heard) == LOOKS[name]
    # Only o-4.5 is published with files that disagree.
    said = disagreements(given, family.settings)
    assert bool(said) == (name == "o4_5")


def test_which_figures_are_published() -> None:
    assert not any(by_name(name).published.assumed for name in ("v2_0", "v2_6", "v4_5", "o4_5"))
    assert by_name("o4_5").published.config["slice_config"]["max_slice_nums"] == 1
    assert by_name("o4_5").published.config["stream_input"] is True


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_every_setting_is_read_in_the_order_of_its_table(family) -> None:
    """Each place alone counts; of two the first; a place without the key counts with the default of its class."""
    for setting in family.settings.values():
        for number, place in enumerate(setting.places):
            config: dict[str, Any] = {}
            for later in setting.places[number:]:
                put(config, later.file, later.key, f"from {later.file} {later.key}")
            assert value_of(config, setting) == f"from {place.file} {place.key}"
            if place.file == "config.json" and place.default is not None:
                break  # it is always there
            if place.default is not None:
                assert value_of({place.file: {}}, setting) == place.default


def put(config: dict[str, Any], file: str, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    inner = config if file == "config.json" else config.setdefault(file, {})
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value


def test_both_values_are_named() -> None:
    given = {**by_name("o4_5").published.settings, FILES: {"image_processor": "preprocessor_config.json"}}
    table = by_name("o4_5").settings
    assert disagreements(given, table) == [
        "max_slice_nums is 9 (in preprocessor_config.json (max_slice_nums)), which published inference reads; "
        "1 in config.json (slice_config.max_slice_nums) is not used"
    ]
    assert disagreements(given, table, frozenset({"max_slice_nums"})) == []


@pytest.mark.parametrize(
    ("name", "file", "key", "value", "message"),
    [
        ("v2_6", "image_processor", "patch_size", 16, "patch_size is 16 .* and 14 in config.json"),
        ("v4_5", "image_processor", "image_feature_size", 32, "query_num is 64 .* and 32 in"),
        ("o2_6", "image_processor", "audio_pool_step", 3, "audio_pool_step is 2 .* and 3 in"),
        ("o4_5", "audio_processor", "feature_size", 128, "mel_bins is 128 .* and 80 in config.json"),
        ("v4_6", "video_processor", "scale_resolution", 224, "scale_resolution is 448 .* and 224 in"),
        ("v4_5", "image_processor", "norm_mean", [0.48, 0.46, 0.41], r"image_mean is \[0.48, .* only \[0.5"),
        ("v4_7", "image_processor", "do_normalize", False, "do_normalize is False .* only True is supported"),
    ],
)
def test_what_no_network_can_follow_is_refused(name: str, file: str, key: str, value: Any, message: str) -> None:
    given = json.loads(json.dumps(by_name(name).published.settings))
    if name in ("v4_6", "v4_7"):
        given |= {"image_processor": {"patch_size": 14}, "video_processor": {"patch_size": 14}}
    put(given, file, key, value)
    with pytest.raises(CheckpointError, match=message):
        disagreements(given, by_name(name).settings)


def test_the_files_that_transformers_reads(tiny, tmp_path: Path) -> None:
    """processor_config.json before the older names; videos fall back to what is said of images."""
    config = json.loads((tiny("v4_6") / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    steps = [
        ("preprocessor_config.json", {"max_slice_nums": 5, "max_num_frames": 50}, (5, 5, 50)),
        ("video_preprocessor_config.json", {"max_slice_nums": 2, "max_num_frames": 20}, (5, 2, 20)),
        ("processor_config.json", {"image_processor": {"max_slice_nums": 7}}, (7, 2, 20)),
        (
            "processor_config.json",
            {"image_processor": {"max_slice_nums": 7}, "video_processor": {"max_slice_nums": 3}},
            (7, 3, 128),
        ),
    ]
    for file, content, wanted in steps:
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
        base = resolve_base(str(tmp_path))
        assert base.family.video is not None
        video = base.family.video.defaults(base.settings)
        ours = base.family.slice_spec(base.settings).max_slice_nums, video.max_slice_nums, video.max_frames
        images: Any = MiniCPMV4_6ImageProcessor.from_pretrained(tmp_path)
        videos: Any = MiniCPMV4_6VideoProcessor.from_pretrained(tmp_path)
        assert ours == (images.max_slice_nums, videos.max_slice_nums, videos.max_num_frames) == wanted


def test_the_tiny_checkpoint_disagrees_as_the_published_one_does(tiny, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    base = resolve_base(str(tiny("o4_5")))
    assert (base.config["slice_config"]["max_slice_nums"], base.config["stream_input"]) == (1, True)
    tokenizer = load_tokenizer(base.folder)
    for _ in range(2):
        encoder = Encoder(base.family, tokenizer, base.settings)
        assert encoder.slicing.max_slice_nums == 9
        assert encoder.audio_spec is not None
        assert plan_audio(5 * 16_000, encoder.audio_spec).runs == (50,)
    said = [record.getMessage() for record in caplog.records if "max_slice_nums" in record.getMessage()]
    assert said == [
        "MiniCPM-o 4.5: max_slice_nums is 9 (in preprocessor_config.json (max_slice_nums)), which published inference "
        "reads; 1 in config.json (slice_config.max_slice_nums) is not used"
    ]
    assert Encoder(base.family, tokenizer, base.settings, max_slice_nums=2).slicing.max_slice_nums == 2


def test_families_travel_to_other_processes() -> None:
    for family in FAMILIES:
        assert pickle.loads(pickle.dumps(family)).name == family.name
