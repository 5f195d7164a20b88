"""The flag lists of published launchers, as they stand in their repositories, each train two steps on a tiny model."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from side_by_side import ranks, run_all

ROOT = Path(__file__).resolve().parent.parent
COMMON = (
    "--remove_unused_columns false --label_names labels --prediction_loss_only false --do_train --do_eval "
    "--logging_strategy steps --evaluation_strategy steps --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 "
    "--lr_scheduler_type cosine --logging_steps 1 --gradient_checkpointing true --report_to tensorboard "
    "--save_total_limit 10 --logging_dir output/logs "
)
BF16 = "--bf16 true --bf16_full_eval true --fp16 false --fp16_full_eval false "
FP16 = "--bf16 false --bf16_full_eval false --fp16 true --fp16_full_eval true "
LORA = "--tune_llm false --use_lora true --lora_target_modules "
# Name -> family, LLM_TYPE and flags. Sizes of runs (max_steps and the like) are cut by the test.
PUBLISHED = {
    "OpenBMB/MiniCPM-V finetune_ds.sh": (
        "llama3_v2_5",
        "llama3",
        BF16 + "--tune_vision true --tune_llm true --model_max_length 2048 --max_steps 10000 --eval_steps 1000 "
        "--output_dir output/output_minicpmv2 --per_device_train_batch_size 2 --per_device_eval_batch_size 1 "
        "--gradient_accumulation_steps 1 --save_strategy steps --save_steps 1000 --learning_rate 1e-6 "
        "--deepspeed ds_config_zero2.json",
    ),
    "OpenBMB/MiniCPM-V finetune_lora.sh": (
        "v2_0",
        "minicpm",
        FP16 + "--tune_vision true " + LORA + r"'llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)' "
        "--model_max_length 2048 --max_slice_nums 9 --max_steps 10000 --eval_steps 1000 "
        "--output_dir output/output_minicpmv2_lora --per_device_train_batch_size 2 --per_device_eval_batch_size 1 "
        "--gradient_accumulation_steps 1 --save_strategy steps --save_steps 1000 --learning_rate 1e-6 "
        "--deepspeed ds_config_zero2.json",
    ),
    "qyc-98/MiniCPM-V-LLama3 finetune_ds.sh": (
        "llama3_v2_5",
        "llama3",
        BF16 + "--dataloader_pin_memory false --dataloader_num_workers 0 --tune_vision true --tune_llm false "
        "--model_max_length 2048 --max_slice_nums 9 --max_steps 80000 --eval_steps 500 "
        "--output_dir output/output_minicpmv3 --per_device_train_batch_size 8 --per_device_eval_batch_size 1 "
        "--gradient_accumulation_steps 1 --save_strategy steps --save_steps 500 --learning_rate 1e-6 "
        "--deepspeed ds_config_zero2.json",
    ),
    "qyc-98/MiniCPM-V-LLama3 finetune_lora.sh": (
        "llama3_v2_5",
        "llama3",
        BF16
        + "--dataloader_pin_memory false --dataloader_num_workers 1 --tune_vision true --q_lora false "
        + LORA
        + r"'llm\.model\.layers\.\d+\.self_attn\.(q_proj|v_proj|k_proj|o_proj)' "
        "--model_max_length 2048 --max_slice_nums 9 --max_steps 80000 --eval_steps 1000 "
        "--output_dir output/output_minicpmv3_lora_gui --per_device_train_batch_size 4 "
        "--per_device_eval_batch_size 1 --gradient_accumulation_steps 2 --save_strategy steps --save_steps 1000 "
        "--learning_rate 1e-6 --deepspeed ds_config_zero2.json",
    ),
    "OpenBMB/MiniCPM-CookBook ft_language finetune_ds.sh": (
        "llama3_v2_5",
        "llama3",
        BF16 + "--num_train_epochs 3 --tune_vision false --tune_llm true --model_max_length 1500 --max_slice_nums 9 "
        "--eval_steps 100 --output_dir output/output_minicpmv2 --per_device_train_batch_size 2 "
        "--per_device_eval_batch_size 5 --gradient_accumulation_steps 8 --save_strategy epoch --learning_rate 1e-6 "
        "--deepspeed ds_config_zero3.json",
    ),
    "OpenBMB/MiniCPM-CookBook ft_language finetune_lora.sh": (
        "llama3_v2_5",
        "llama3",
        # The published expression has a full-width bar.
        BF16 + "--tune_vision false " + LORA + r"'llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj｜v_proj)' "  # noqa: RUF001
        "--model_max_length 2048 --max_slice_nums 9 --num_train_epochs 3 --eval_steps 300 "
        "--output_dir output/output_minicpmv2_lora --per_device_train_batch_size 2 --per_device_eval_batch_size 1 "
        "--gradient_accumulation_steps 8 --save_strategy steps --save_steps 100 --learning_rate 1e-4 "
        "--deepspeed ds_config_zero3.json",
    ),
    "OpenBMB/MiniCPM-CookBook OCR_Multimodal_Search and agent_auto_plan finetune_ds.sh": (
        "v2_6",
        "qwen2",
        BF16 + "--tune_vision true --tune_llm true --model_max_length 2048 --max_slice_nums 9 --max_steps 10000 "
        "--eval_steps 1000 --output_dir output/output_minicpmv26 --per_device_train_batch_size 1 "
        "--per_device_eval_batch_size 1 --gradient_accumulation_steps 1 --save_strategy steps --save_steps 1000 "
        "--learning_rate 1e-6 --deepspeed ds_config_zero2.json",
    ),
    "OpenBMB/MiniCPM-CookBook OCR_Multimodal_Search finetune_lora.sh": (
        "v2_0",
        "minicpm",
        FP16 + "--tune_vision false --tune_llm false --use_lora true --model_max_length 700 --max_slice_nums 9 "
        "--max_steps 10000 --eval_steps 1000 --output_dir output/output_lora --per_device_train_batch_size 12 "
        "--per_device_eval_batch_size 1 --gradient_accumulation_steps 4 --save_strategy steps --save_steps 1000 "
        "--learning_rate 1e-4 --deepspeed ds_config_zero2.json",
    ),
    "OpenBMB/MiniCPM-CookBook agent_auto_plan finetune_lora.sh": (
        "v2_0",
        "qwen2",
        FP16 + "--tune_vision false " + LORA + r"'llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)' "
        "--model_max_length 2048 --max_slice_nums 9 --max_steps 1000 --eval_steps 100 "
        "--output_dir output/output__lora --per_device_train_batch_size 1 --per_device_eval_batch_size 1 "
        "--gradient_accumulation_steps 8 --save_strategy steps --save_steps 100 --learning_rate 1e-4 "
        "--deepspeed ds_config_zero3.json",
    ),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def torchrun(words: list[str], folder: Path, **env: str) -> str:
    """What a run of two ranks says; it must end well."""
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "--nnodes", "1"]
    command += ["--node_rank", "0", "--master_addr", "localhost", "--master_port", str(free_port()), "--", *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def one_rank(python: str, words: list[str], folder: Path) -> str:
    """The same of a rank on its own."""
    (done,) = run_all(*ranks([python, *words], 1), cwd=folder, timeout=180)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flags_run_unchanged(name, tiny, demo_data, tmp_path, forked_python):
    family, llm_type, flags = PUBLISHED[name]
    paths = ["--model_name_or_path", str(tiny(family)), "--llm_type", llm_type]
    paths += ["--data_path", str(demo_data / "train.json"), "--eval_data_path", str(demo_data / "eval.json")]
    # The last of two equal flags counts; nothing of the published list is left out.
    short = "--max_steps 2 --eval_steps 2 --save_steps 2 --gradient_accumulation_steps 1 --verify_adapter off"
    words = [str(ROOT / "finetune.py"), *paths, *shlex.split(COMMON + flags), *shlex.split(short)]
    # The vendor's own as they are launched; the flags of the others mean the same to every number of ranks.
    if name == "OpenBMB/MiniCPM-V finetune_ds.sh":
        text = torchrun(words, tmp_path)
    elif name == "OpenBMB/MiniCPM-V finetune_lora.sh":
        text = torchrun(words, tmp_path, PYTHON_EXEC=forked_python)
    else:
        text = one_rank(forked_python, words, tmp_path)
    output = tmp_path / shlex.split(flags)[shlex.split(flags).index("--output_dir") + 1]
    assert list(output.glob("*model*.safetensors")), "nothing was saved"
    assert list((tmp_path / "output/logs").glob("events.*")), "logging_dir was not respected"
    assert "--warmup_ratio is now --warmup_steps" in text
    assert ("--fp16 is ignored, training runs in fp32 on the CPU" in text) == (FP16 in flags)
    assert ("low for LoRA" in text) == ("--use_lora true" in flags and "1e-6" in flags)
    assert (f"LLM_TYPE {llm_type} does not fit" in text) == (llm_type == "qwen2" and family == "v2_0")
    assert ("is not ASCII" in text) == ("｜" in flags)  # noqa: RUF001
