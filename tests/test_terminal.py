"""What a training run prints: what is trained, the user's own flags, and at most 25 lines beside progress bars."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 25
# A state of tqdm's bars: all up to its figures in brackets.
BAR = re.compile(r"[^\r\n]*?\d+%\|[^\r\n]*?\]")
NOISE = ("deprecated", "mismatch", "gemm_4bit", "falling back", "ds_accelerator", "PAD/BOS/EOS", "OMP_NUM_THREADS")


def lines_of(text: str) -> list[str]:
    """The lines besides progress bars."""
    return [line.strip() for line in BAR.sub("", text).replace("\r", "\n").split("\n") if line.strip()]


def launch(model: Path, folder: Path, *flags: str, **env: str) -> tuple[list[str], dict[str, object], str]:
    """A run of finetune_lora.sh on one record: its lines, the flags in run.yaml, and run.yaml as text."""
    Image.effect_noise((120, 90), 50).convert("RGB").save(folder / "a.png")
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Noise."}]
    (folder / "one.json").write_text(json.dumps([{"id": "0", "image": "a.png", "conversations": turns}]))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        "MODEL": str(model),
        "DATA": "one.json",
        "OUTPUT_DIR": "out",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **env,
    }
    done = subprocess.run(
        ["sh", str(ROOT / "finetune_lora.sh"), *flags],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    recorded = (folder / "out" / "run.yaml").read_text(encoding="utf-8")
    return lines_of(done.stdout), yaml.safe_load(recorded)["flags"], recorded


@pytest.mark.parametrize("family", ["llama3_v2_5", "v2_6", "v4_6"])
def test_a_run_prints_at_most_25_lines(family, tiny, tmp_path, forked_python):
    """What is printed while libraries are imported is that of one family."""
    env = {} if family == "llama3_v2_5" else {"PYTHON": forked_python}
    lines, flags, recorded = launch(tiny(family), tmp_path, **env)
    text = "\n".join(lines)
    assert len(lines) <= MOST_LINES, text
    assert not [words for words in NOISE if words in text], text
    # What is trained comes first (after what the device is), then the user's flags and no others.
    start = next(number for number, line in enumerate(lines) if line.startswith("training MiniCPM"))
    assert start == 1, text
    assert "vision frozen, resampler full, llm LoRA r=64, DeepSpeed ZeRO-2" in lines[start]
    assert lines[start + 1].split() == ["model_name_or_path", str(tiny(family))]
    assert lines[start + 2].split() == ["data_path", "one.json"]
    assert lines[start + 3].split() == ["output_dir", "out"]
    assert "weight_decay" not in text
    assert "'learning_rate': '0.00005'" in text
    assert not re.search(r"\d[eE]-?\d", text), "a number with an exponent"
    # The launcher's defaults and derived values are in run.yaml, which says where each comes from.
    assert (flags["weight_decay"], flags["max_slice_nums"], flags["use_lora"]) == (0.1, 9, True)
    assert "  weight_decay: 0.1  # launcher default\n" in recorded
    assert "  data_path: one.json  # command line\n" in recorded
    assert "  # use_cpu: true  # derived\n" in recorded


def test_flags_of_the_user_are_shown_even_with_default_values(tiny, tmp_path, forked_python):
    """Also where the launcher gives the same flag; what they cause is still warned of."""
    given = ("--weight_decay", "0", "--max_steps", "1", "--learning_rate", "1e-4", "--llm_type", "minicpm")
    lines, flags, _ = launch(tiny("v2_6"), tmp_path, *given, "--verify_adapter", "off", PYTHON=forked_python)
    text = "\n".join(lines)
    shown = dict(line.split() for line in lines if len(line.split()) == 2)
    assert (shown["weight_decay"], shown["learning_rate"], shown["max_steps"]) == ("0", "0.0001", "1")
    assert "adam_beta2" not in shown
    assert "LLM_TYPE minicpm does not fit" in text
    assert flags["adam_beta2"] == 0.95
