"""python -m finetune selfcheck on tiny checkpoints: every step runs, faults are named."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from finetune.__main__ import main
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.commands.selfcheck import CAPTION, caption_loss, draw
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer

QUICK = ("--device", "cpu", "--max_new_tokens", "4")


def test_the_picture_is_a_red_circle_with_a_word():
    image = draw()
    assert image.getpixel((224, 150)) == (220, 20, 30)
    assert image.getpixel((5, 5)) == (255, 255, 255)
    word = image.crop((100, 300, 348, 400)).convert("L")
    assert word.getextrema() == (0, 255)


@pytest.mark.parametrize("family", ["v2_0", "llama3_v2_5"])
def test_a_checkpoint(tiny, capsys, family):
    folder = tiny(family)
    assert main(["selfcheck", str(folder), *QUICK]) == 0
    text = capsys.readouterr().out
    base = resolve_base(str(folder))
    assert f"loaded     {base.family.title}" in text
    assert "runs on    cpu, float32" in text
    ids = re.search(r"(\d+) ids: ([\d ]+)", text)
    assert ids is not None
    assert len(ids[2].split()) == min(int(ids[1]), 24)
    agrees = "the same prompt by its own chat template" if load_tokenizer(folder).chat_template else "none in the"
    assert agrees in text
    losses = re.search(r"loss +([\d.]+) correct caption, ([\d.]+) words shuffled, ([\d.]+) chance", text)
    assert losses is not None
    encoder = Encoder(base.family, load_tokenizer(folder), base.config)
    expected = caption_loss(load_model(folder).eval(), encoder, draw(), CAPTION)
    assert float(losses[1]) == pytest.approx(expected, abs=1e-3)
    assert re.search(r"caption +'", text)
    assert "does NOT behave like a trained checkpoint" in text


def test_an_adapter_goes_on_the_given_model(tiny, tmp_path, capsys):
    base = tiny("llama3_v2_5")
    torch.manual_seed(0)
    adapted = get_peft_model(
        load_model(base), LoraConfig(target_modules=r"llm\..*q_proj", init_lora_weights=False, r=4)
    )
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/moved/since"
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    assert main(["selfcheck", str(base), "--adapter", str(tmp_path / "adapter"), *QUICK]) == 0
    with_adapter = capsys.readouterr().out
    assert "adapter    " in with_adapter
    assert main(["selfcheck", str(base), *QUICK]) == 0
    assert with_adapter.split("loss ")[1] != capsys.readouterr().out.split("loss ")[1], "the adapter has no effect"


FAULTS = {
    "no folder": "no such folder",
    "no adapter": "is not an adapter",
    "template": "does not write the prompt of",
    "weights": "is truncated",
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items())
def test_faults_end_with_2(tiny, tmp_path, capsys, fault, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama3_v2_5"), folder)
    arguments = ["selfcheck", str(folder), *QUICK]
    if fault == "no folder":
        arguments[1] = str(tmp_path / "nowhere")
    elif fault == "no adapter":
        arguments += ["--adapter", str(folder)]
    elif fault == "template":
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        settings["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        path.write_text(json.dumps(settings))
    else:
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    assert main(arguments) == 2
    assert message in [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")][-1]
