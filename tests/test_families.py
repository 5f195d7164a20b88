"""Which checkpoints are known, and which of them the installed packages can have."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from finetune.encoding.media_collation import COLLATION
from finetune.encoding.pixel_inputs import INPUTS
from finetune.families import FAMILIES, UnknownFamilyError, by_name, check_transformers, detect, usable

OCR = by_name("ocr1_0")


@pytest.mark.parametrize(
    ("config", "read"),
    [
        # MiniCPM-o 5, as a fork has it
        ({"model_type": "minicpmo", "version": "4.6", "hidden_size": 2048}, "model_type='minicpmo', version='4.6'"),
        ({"model_type": "minicpmo", "version": 5, "vocab_size": 248144}, "version=5, vocab_size=248144"),
        ({"model_type": "minicpmv", "version": "3.0"}, "model_type='minicpmv', version='3.0'"),
        ({"model_type": "minicpmv4_8"}, "model_type='minicpmv4_8'"),
        ({"model_type": "minicpm_ocr2", "architectures": ["MiniCPMOcr2"]}, r"architectures=\['MiniCPMOcr2'\]"),
        ({"model_type": "qwen3_5", "hidden_size": 1024}, "model_type='qwen3_5', hidden_size=1024"),
        ({}, "none of the expected keys"),
    ],
)
def test_what_is_unknown_is_refused_with_what_was_read(config: dict[str, object], read: str) -> None:
    with pytest.raises(UnknownFamilyError, match=f"unknown checkpoint: config.json has .*{read}") as refused:
        detect(config)
    assert "\n" not in str(refused.value)
    for family in FAMILIES:
        assert f"{family.title} ({family.hub_id})" in str(refused.value)


@pytest.mark.parametrize("installed", ["5.20.0", "5.22.4", "4.57.1"])
def test_a_transformers_without_the_network_is_named(installed: str) -> None:
    said = rf"MiniCPM-OCR 1.0 needs transformers 5.23 or newer, installed is {installed}: pip install '[^\n]*>=5.23'$"
    with pytest.raises(UnknownFamilyError, match=said):
        check_transformers(OCR, installed)
    assert usable(installed) == tuple(family for family in FAMILIES if family is not OCR)
    for family in usable(installed):
        check_transformers(family, installed)


@pytest.mark.parametrize("installed", ["5.23.0", "5.24.0.dev0", "5.100.1", "6.0.0rc1"])
def test_one_that_has_it_is_taken(installed: str) -> None:
    check_transformers(OCR, installed)
    assert usable(installed) == FAMILIES


def test_detection_asks_for_the_installed_one() -> None:
    config = {"model_type": "minicpm_ocr"}
    if OCR in usable(version("transformers")):
        assert detect(config) is OCR
    else:
        with pytest.raises(UnknownFamilyError, match="needs transformers 5.23"):
            detect(config)


def test_every_pixel_input_has_its_collation():
    assert set(COLLATION) == set(INPUTS) >= {family.inputs for family in FAMILIES}
