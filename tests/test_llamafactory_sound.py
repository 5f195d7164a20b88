"""The published guide's records with sound and video, as their data sets describe them, train a MiniCPM-o 2.6."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from clips import write_clip
from sounds import write_coded

from dataset import make_supervised_data_module
from finetune.arguments.parse import parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.training.freezing import adapt
from finetune.utils.errors import UserError

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
COLUMNS = {"messages": "messages", "videos": "videos", "audios": "audios"}
DATASET_INFO = {
    "mllm_audio_demo": {
        "file_name": "mllm_audio_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "audios": "audios"},
        "tags": TAGS,
    },
    "mllm_video_audio_demo": {
        "file_name": "mllm_video_audio_demo.json",
        "formatting": "sharegpt",
        "columns": COLUMNS,
        "tags": TAGS,
    },
}
GLASS = {"content": "It is the sound of glass shattering.", "role": "assistant"}
SOUND = [{"messages": [{"content": "<audio>What's that sound?", "role": "user"}, GLASS], "audios": ["demo/1.mp3"]}]
BOTH = [
    {
        "messages": [{"content": "<video><audio>What is happening?", "role": "user"}, GLASS],
        "videos": ["demo/1.mp4"],
        "audios": ["demo/1.mp4"],
    },
    {"messages": [{"content": "<video>What is happening?", "role": "user"}, GLASS], "videos": ["demo/1.mp4"]},
]
LORA = """### model
model_name_or_path: openbmb/MiniCPM-o-2_6
trust_remote_code: true

### method
stage: sft # sft training
do_train: true
finetuning_type: lora # LoRA fine-tuning
lora_target: q_proj,v_proj # LoRA layers to insert

### dataset
dataset: mllm_audio_demo,mllm_video_audio_demo
template: minicpm_o
cutoff_len: 3072
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
audio_sampling_rate: 16000

### output
output_dir: saves/minicpmo2_6/lora/sft
logging_steps: 1
overwrite_output_dir: true

### train
per_device_train_batch_size: 3
gradient_accumulation_steps: 1
learning_rate: 1.0e-3
num_train_epochs: 2.0
lr_scheduler_type: cosine
bf16: false
"""


def test_sound_and_video_train(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data/demo", "openbmb"):
        (tmp_path / name).mkdir(parents=True)
    write_coded(tmp_path / "data/demo/1.mp3", 1.2)
    write_clip(tmp_path / "data/demo/1.mp4", 8, sound=True)
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(DATASET_INFO))
    (tmp_path / "data/mllm_audio_demo.json").write_text(json.dumps(SOUND))
    (tmp_path / "data/mllm_video_audio_demo.json").write_text(json.dumps(BOTH))
    (tmp_path / "lora.yaml").write_text(LORA)
    (tmp_path / "openbmb/MiniCPM-o-2_6").symlink_to(tiny("o2_6"))
    monkeypatch.chdir(tmp_path)
    args = parse_arguments(["lora.yaml", "--use_cpu", "true"])
    base = resolve_base(args.model.model_name_or_path)
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings)
    data = make_supervised_data_module(args.data, encoder)
    batch = data["data_collator"]([data["train_dataset"][index] for index in range(3)])
    del batch["sources"]
    assert batch["audio_bound"][:, 0].unique().tolist() == [0, 1]
    assert batch["image_bound"][:, 0].unique().tolist() == [1, 2]
    model = adapt(load_model(base.folder), base.family, args.training, args.lora)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all(each.grad is not None and each.grad.abs().max() > 0 for name, each in trained.items() if "lora" in name)
    with pytest.raises(UserError, match="audio_sampling_rate 22050 .* resampled to 16000"):
        parse_arguments(["lora.yaml", "audio_sampling_rate=22050"])
