"""A folder that trains with LLaMA-Factory, as the published guide writes its files, trains and exports here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from clips import write_clip
from PIL import Image
from safetensors import safe_open
from side_by_side import ranks, run_all

from finetune.arguments.data import VIDEO_FLAGS
from finetune.commands.export import main as export
from finetune.models import load_model
from finetune.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

DATASET_INFO = """{
"cpmv_img": {
    "file_name": "image_caption.json",
    "formatting": "sharegpt",
    "columns": {
      "messages": "messages",
      "images": "images"
    },
    "tags": {
      "role_tag": "role",
      "content_tag": "content",
      "user_tag": "user",
      "assistant_tag": "assistant"
    }
},
"mllm_video_demo": {
  "file_name": "mllm_video_demo.json",
  "formatting": "sharegpt",
  "columns": {
    "messages": "messages",
    "videos": "videos"
  },
  "tags": {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant"
  }
}
}
"""
VIDEO_RECORDS = [
    {
        "messages": [
            {"content": "<video>Why is this video funny?", "role": "user"},
            {"content": "Because a baby is reading, and he is so cute!", "role": "assistant"},
        ],
        "videos": ["mllm_demo_data/1.mp4"],
    }
]
BOTH = "dataset=cpmv_img,mllm_video_demo"
RECORDS = [
    {
        "messages": [
            {"content": "<image>Who are they?", "role": "user"},
            {"content": "They're Kane and Gretzka from Bayern Munich.", "role": "assistant"},
            {"content": "What are they doing?<image>", "role": "user"},
            {"content": "They are celebrating on the soccer field.", "role": "assistant"},
        ],
        "images": ["mllm_demo_data/1.jpg", "mllm_demo_data/1.jpg"],
    },
    {
        "messages": [
            {"content": "<image>Who is he?", "role": "user"},
            {"content": "He's Thomas Muller from Bayern Munich.", "role": "assistant"},
            {"content": "Why is he on the ground?", "role": "user"},
            {"content": "Because he's sliding on his knees to celebrate.", "role": "assistant"},
        ],
        "images": ["mllm_demo_data/2.jpg"],
    },
]
SHARED = """
### dataset
dataset: cpmv_img # Use the key you added in data/dataset_info.json
template: minicpm_v # Do not change
cutoff_len: 3072 # Model token length including multimodal
max_samples: 1000 # Max number of samples
overwrite_cache: true
preprocessing_num_workers: 16

### output
logging_steps: 1
save_steps: 100 # Save every N steps
plot_loss: true # Plot loss curve
overwrite_output_dir: true # Overwrite previous outputs
save_total_limit: 10

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
learning_rate: 1.0e-5
num_train_epochs: 20.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
save_only_model: true

### eval
do_eval: false
"""
LORA = f"""### model
model_name_or_path: openbmb/MiniCPM-V-4_5 # Can be MiniCPM-V or MiniCPM-o local model
trust_remote_code: true

### method
stage: sft # sft training
do_train: true
finetuning_type: lora # LoRA fine-tuning
lora_target: q_proj,v_proj # LoRA layers to insert
output_dir: saves/minicpmv4_5/lora/sft
{SHARED}
### video processor
video_fps: 15.0
video_maxlen: 128
enable_high_fps: true
double_frame_duration: 30
packing_maxlen: 3
time_scale: 0.1
"""
FULL = f"""### model
model_name_or_path: openbmb/MiniCPM-V-4_5 # MiniCPM-o-2_6 or MiniCPM-V-2_6 or local path
trust_remote_code: true
freeze_vision_tower: true # Freeze vision module
print_param_status: true
flash_attn: fa2 # Use flash attention 2

### method
stage: sft
do_train: true
finetuning_type: full # Full fine-tuning
deepspeed: configs/deepspeed/ds_z2_config.json # Use deepspeed zero2 distributed training
output_dir: saves/minicpmv4_5/full/sft
{SHARED}"""
MERGE = """### model
model_name_or_path: openbmb/MiniCPM-V-4_5 # Original model path, can be local
adapter_name_or_path: saves/minicpm_v4_5/lora/sft # Path to saved LoRA model
template: minicpm_v
finetuning_type: lora
trust_remote_code: true

### export
export_dir: models/minicpmv4_5_lora_sft
export_size: 2
export_device: cpu
export_legacy_format: false
"""


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """The working directory of a user of LLaMA-Factory, with the model as a local folder."""
    folder = tmp_path_factory.mktemp("llamafactory")
    for name in ("data/mllm_demo_data", "configs", "openbmb"):
        (folder / name).mkdir(parents=True)
    for number in (1, 2):
        Image.effect_noise((180, 120), 80).convert("RGB").save(folder / f"data/mllm_demo_data/{number}.jpg")
    (folder / "data/dataset_info.json").write_text(DATASET_INFO)
    (folder / "data/image_caption.json").write_text(json.dumps(RECORDS))
    write_clip(folder / "data/mllm_demo_data/1.mp4", 24, fps=24, size=(112, 64))
    (folder / "data/mllm_video_demo.json").write_text(json.dumps(VIDEO_RECORDS))
    (folder / "configs/minicpmv4_5_lora_sft.yaml").write_text(LORA)
    (folder / "configs/minicpmv4_5_full_sft.yaml").write_text(FULL)
    (folder / "configs/minicpmv4_5_lora_export.yaml").write_text(MERGE)
    (folder / "openbmb/MiniCPM-V-4_5").symlink_to(tiny("v4_5"))
    return folder


def train(python: str, folder: Path, *words: str, processes: int = 1) -> str:
    """What a run says; it must end well."""
    ended = run_all(*ranks([python, str(ROOT / "finetune.py"), *words], processes), cwd=folder)
    return "".join(one.stdout + one.stderr for one in ended)


@pytest.fixture(scope="module")
def adapter(folder, forked_python) -> tuple[Path, str]:
    """The folder of the LoRA run and what the run said."""
    words = (BOTH, "num_train_epochs=2", "learning_rate=1e-2")
    return folder / "saves/minicpmv4_5/lora/sft", train(
        forked_python, folder, "configs/minicpmv4_5_lora_sft.yaml", *words
    )


def test_lora(adapter):
    out, said = adapter
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["modules_to_save"]) == (8, 16, 0.0, None)
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        layers = {name.split(".lora_")[0].rpartition(".")[2] for name in file.keys()}  # noqa: SIM118 - no mapping
        assert all(name.startswith("base_model.model.llm.") for name in file.keys())  # noqa: SIM118
    assert layers == {"q_proj", "v_proj"}
    assert "2 records of data/image_caption.json in the sharegpt format" in said
    assert '"verified": true' in said
    for key in ("trust_remote_code true", "plot_loss true", "preprocessing_num_workers 16"):
        assert said.count(f"{key} has no effect") == 1
    flags = yaml.safe_load((out / "run.yaml").read_text())["flags"]
    assert (flags["num_train_epochs"], flags["model_max_length"], flags["dataset"]) == (
        2.0,
        3072,
        "cpmv_img,mllm_video_demo",
    )
    video = {name: value for name, value in flags.items() if name in VIDEO_FLAGS and value is not None}
    assert video == {
        "video_fps": 15.0,
        "video_max_frames": 128,
        "enable_high_fps": True,
        "double_frame_duration": 30.0,
        "packing_maxlen": 3,
        "time_scale": 0.1,
    }
    assert "1 records of data/mllm_video_demo.json in the sharegpt format" in said


def test_full(folder, forked_python):
    """On two processes, of which one has images and the other a video."""
    words = [BOTH, "max_steps=2", "per_device_train_batch_size=1", "verify_adapter=off"]
    said = train(forked_python, folder, "configs/minicpmv4_5_full_sft.yaml", *words, processes=2)
    assert "the equivalent ds_config_zero2.json is used" in said
    assert "sdpa is used instead" in said
    assert "llm.model.norm.weight: (128,), bfloat16, trained" in said
    assert re.search(r"resampler\.query: .*, frozen", said)
    load_model(folder / "saves/minicpmv4_5/full/sft")


def test_export(folder, adapter, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"the nearest that exist are \S*saves/minicpmv4_5/lora/sft"):
        export(["configs/minicpmv4_5_lora_export.yaml"])  # the guide's merge.yaml has another folder than its training
    right = ["--adapter_name_or_path", "saves/minicpmv4_5/lora/sft"]
    assert export(["configs/minicpmv4_5_lora_export.yaml", *right]) == 0
    assert "verified=true" in capsys.readouterr().out
    merged = folder / "models/minicpmv4_5_lora_sft"
    load_model(merged)
    assert (merged / "config.json").is_file()
    assert (merged / "preprocessor_config.json").is_file()
    with pytest.raises(UserError, match="safetensors only"):
        export(["configs/minicpmv4_5_lora_export.yaml", *right, "--export_legacy_format", "true"])


def test_run_yaml_of_a_run_is_a_run(folder, adapter, forked_python):
    out, _ = adapter
    said = train(
        forked_python,
        folder,
        str(out / "run.yaml"),
        "--output_dir",
        "again",
        "--max_steps",
        "1",
        "--verify_adapter",
        "off",
    )
    assert '"steps": 1' in said
    again = yaml.safe_load((folder / "again/run.yaml").read_text())["flags"]
    first = yaml.safe_load((out / "run.yaml").read_text())["flags"]
    changed = {name for name in first if again.get(name) != first[name]}
    assert changed == {"output_dir"}
