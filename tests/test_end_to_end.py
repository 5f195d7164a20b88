"""The launchers as users run them: two processes, DeepSpeed, tiny checkpoints; the results load elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")
SHORT = ("--max_steps", "2", "--save_strategy", "no", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-2")


@dataclass(frozen=True)
class Run:
    """A finished launcher: exit status, both output streams, the output folder."""

    status: int
    text: str
    output: Path


def launch(script: str, model: Path, data: Path, output: Path, *flags: str, **env: str) -> Run:
    environment = {
        **os.environ,
        "MODEL": str(model),
        "DATA": str(data / "train.json"),
        "EVAL_DATA": str(data / "eval.json"),
        "OUTPUT_DIR": str(output),
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **env,
    }
    done = subprocess.run(
        ["sh", str(ROOT / script), *SHORT, *flags],
        cwd=output.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Run(done.returncode, done.stdout + done.stderr, output)


@pytest.fixture(scope="module", params=["v2_0", "llama3_v2_5"])
def lora(request, tiny, demo_data, tmp_path_factory, forked_python) -> tuple[Run, Path]:
    """A LoRA run of each family with ZeRO-2, from a directory with a space in its name; one as a user starts it."""
    base = tiny(request.param)
    folder = tmp_path_factory.mktemp("a folder")
    saved = ("--save_strategy", "steps", "--save_steps", "1")
    env = {"TMPDIR": str(folder)} | ({} if request.param == "v2_0" else {"PYTHON": forked_python})
    return launch("finetune_lora.sh", base, demo_data, folder / "out", *saved, **env), base


def test_lora_run_ends_well(lora):
    run, _ = lora
    assert run.status == 0, run.text
    assert "verified=true" in run.text
    assert re.search(r"vision +frozen", run.text)
    assert re.search(r"llm +LoRA r=64", run.text)
    assert re.search(r"base loss at step 0: \d", run.text)
    assert re.search(r"global batch 2 = 1 per device x 2 processes x 1 accumulation", run.text)
    assert "samples_per_second" in run.text
    assert "tokens_per_second" in run.text
    assert re.search(r"eval_loss \d", run.text)
    assert run.text.count("no GPU found: training runs in fp32 on the CPU") == 1
    assert (run.output / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "What was trained" in (run.output / "report.html").read_text()
    assert list((run.output / "runs").rglob("events.out.tfevents.*")), "no TensorBoard log"
    recorded = yaml.safe_load((run.output / "run.yaml").read_text())
    assert recorded["flags"]["use_lora"] is True
    assert recorded["flags"]["lr_scheduler_type"] == "cosine"


@pytest.mark.parametrize("place", [".", "checkpoint-2"])
def test_adapter_folder_is_complete(lora, place):
    run, base = lora
    folder = run.output / place
    for name in SIDE_FILES:
        assert (folder / name).read_bytes() == (base / name).read_bytes(), f"{name} differs from the base's"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    assert config["auto_mapping"] == {"base_model_class": "AutoModel", "parent_library": "transformers"}
    assert config["task_type"] is None
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert any(".lora_A." in name for name in names)
    assert any("resampler.proj" in name for name in names)
    assert not any("vpm" in name or "embed_tokens" in name for name in names)
    assert not list(folder.glob("training_args.bin")), "a pickle was left"


LOAD = """
import sys, torch
import finetune.models
from peft import AutoPeftModel, PeftModel
from transformers import AutoModel, AutoTokenizer
path, base = sys.argv[1:]
ids = torch.arange(20, 40)[None]
with torch.no_grad():
    plain = AutoModel.from_pretrained(base).eval()(input_ids=ids).logits
    for extra in ({"trust_remote_code": True}, {}):
        model = AutoPeftModel.from_pretrained(path, device_map="auto", **extra).eval()
        logits = model(input_ids=ids).logits
        assert (logits - plain).abs().max() > 1e-4, "the adapter has no effect"
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain), "base + adapter off differs from the base"
    other = PeftModel.from_pretrained(AutoModel.from_pretrained(base), path).eval()
    assert torch.equal(other(input_ids=ids).logits, logits)
assert len(AutoTokenizer.from_pretrained(path)) == len(AutoTokenizer.from_pretrained(base))
print("loaded")
"""


def test_adapter_loads_in_a_new_process_and_directory(lora, tmp_path):
    run, base = lora
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(run.output), str(base)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("loaded\n"), done.stderr


def leave_reference(adapter: Path, base: Path, data: Path, reference: Path) -> None:
    """What a run leaves to its verification: a batch with an image, and the logits of the trained network."""
    from dataset import make_supervised_data_module
    from finetune.arguments.data import DataArguments
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.checkpoints.verification import Origin, write_reference
    from finetune.encoding.collate import pad
    from finetune.encoding.encoder import Encoder
    from finetune.models import load_model, load_tokenizer

    found = resolve_base(str(base))
    encoder = Encoder(found.family, load_tokenizer(base), found.settings)
    train = make_supervised_data_module(DataArguments(data_path=str(data / "train.json")), encoder)["train_dataset"]
    batch = pad([train.first_usable()], encoder.pad_id)
    del batch["labels"]
    with torch.no_grad():
        logits = load_model(adapter).eval()(**batch, logits_to_keep=8).logits
    write_reference(reference, batch, logits, Origin("float32"))


def test_a_verified_run_leaves_no_sample_behind(lora):
    run, _ = lora
    assert not list(run.output.parent.glob("verify-*"))


def test_a_damaged_adapter_is_not_verified(lora, demo_data, tmp_path):
    """The check fails when what was saved is not what was trained."""
    run, base = lora
    output, reference = tmp_path / "out", tmp_path / "reference.safetensors"
    shutil.copytree(run.output, output)
    from safetensors.torch import load_file, save_file

    from finetune.commands.verify import main

    leave_reference(run.output, base, demo_data, reference)
    assert main([str(output), "--reference", str(reference), "--device", "cpu"]) == 0
    weights = load_file(output / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("resampler.proj"))
    weights[name].zero_()
    save_file(weights, output / "adapter_model.safetensors", metadata={"format": "pt"})
    assert main([str(output), "--reference", str(reference), "--device", "cpu"]) == 3


@pytest.mark.parametrize(
    ("family", "config"), [("v2_0", "ds_config_zero3.json"), ("llama3_v2_5", "ds_config_zero2.json")]
)
def test_full_run_saves_an_official_folder(tiny, demo_data, tmp_path, forked_python, family, config):
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny(family).iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "modeling_minicpmv.py").write_text("# the base's remote code\n")
    env = {} if family == "v2_0" else {"PYTHON": forked_python}
    run = launch("finetune_ds.sh", base, demo_data, tmp_path / "out", DS_CONFIG=config, **env)
    assert run.status == 0, run.text
    assert "verified=true" in run.text
    for name in (*SIDE_FILES, "config.json", "generation_config.json", "modeling_minicpmv.py"):
        saved, original = (run.output / name).read_text(), (base / name).read_text()
        if name == "config.json":
            assert json.loads(saved) == json.loads(original)
        else:
            assert saved == original, f"{name} differs from the base's"
    with safe_open(base / "model.safetensors", framework="pt") as old:
        shapes = {name: old.get_slice(name).get_shape() for name in old.keys()}  # noqa: SIM118
    with safe_open(run.output / "model.safetensors", framework="pt") as new:
        assert {name: new.get_slice(name).get_shape() for name in new.keys()} == shapes  # noqa: SIM118


def test_a_used_output_folder_keeps_what_is_foreign_and_a_wrong_llm_type_is_corrected(
    tiny, demo_data, tmp_path, forked_python
):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    (output / "model.safetensors").write_text("stale")
    again = ("--overwrite_output_dir", "true", "--verify_adapter", "off")
    run = launch(
        "finetune_lora.sh", tiny("llama3_v2_5"), demo_data, output, *again, LLM_TYPE="minicpm", PYTHON=forked_python
    )
    assert run.status == 0, run.text
    assert "LLM_TYPE minicpm does not fit: the checkpoint is MiniCPM-Llama3-V 2.5" in run.text
    assert (output / "mine.txt").read_text() == "keep"
    assert (output / "model.safetensors").read_text() == "stale", "no run of ours is known to have written it"


def test_a_bad_sample_stops_the_run_with_file_record_and_cause(tiny, demo_data, tmp_path, forked_python):
    records = json.loads((demo_data / "train.json").read_text())[:4]
    for record in records:
        record["image"] = "no_such.png"
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "eval.json").write_text(json.dumps(records))
    run = launch("finetune_lora.sh", tiny("llama3_v2_5"), tmp_path, tmp_path / "out", PYTHON=forked_python)
    assert run.status != 0
    assert re.search(r"error: .*train\.json, record \d.*no_such\.png", run.text), run.text


def test_skipped_records_leave_the_ranks_in_step(tiny, demo_data, tmp_path, forked_python):
    """Ranks meet bad records at different steps, under ZeRO-3, in training and in evaluation; the run ends well."""
    records = json.loads((demo_data / "train.json").read_text())[:8]
    for number, record in enumerate(records):
        if number in (0, 1, 4):
            record["image"] = str(tmp_path / "no_such.png")
    for name in ("train.json", "eval.json"):
        (tmp_path / name).write_text(json.dumps(records))
    flags = ("--max_steps", "6", "--on_bad_sample", "skip", "--max_bad_share", "1", "--image_root", str(demo_data))
    env = {"DS_CONFIG": "ds_config_zero3.json", "PYTHON": forked_python}
    run = launch("finetune_lora.sh", tiny("llama3_v2_5"), tmp_path, tmp_path / "out", *flags, **env)
    assert run.status == 0, run.text
    assert re.search(r"train\.json: 8 records in .*\n.* that cannot be used", run.text)
    assert "verified=true" in run.text
    lines = [json.loads(line) for line in (run.output / "bad_samples.jsonl").read_text().splitlines()]
    bad = {(Path(line["file"]).name, line["record"]) for line in lines}
    assert {("train.json", 0), ("train.json", 1), ("train.json", 4), ("eval.json", 4)} <= bad
    assert f"{len(bad)} records were skipped ({len(bad)} DataError)" in run.text
