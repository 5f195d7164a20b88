"""``python -m finetune train``: what is said before any process starts, processes and nodes, and one run by YAML."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from finetune.arguments.flag_names import flag_types, takes_many
from finetune.arguments.parse import GROUPS
from finetune.commands import train
from finetune.early_check import check_early
from finetune.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_flags_read_from_source_are_those_of_the_dataclasses() -> None:
    """By the annotations of the classes: a parser changes the types that their fields name."""
    declared = {entry.name for group in GROUPS for entry in fields(group)}
    classes = [cls for group in GROUPS for cls in reversed(group.__mro__)]
    kinds = {name: str(kind) for cls in classes for name, kind in cls.__dict__.get("__annotations__", {}).items()}
    assert set(flag_types()) == declared
    assert {name for name, many in takes_many().items() if many} == {
        name for name in declared if "list" in kinds[name] and not re.search(r"(^|\| )str\b", kinds[name])
    }
    for kind in ("bool", "int", "float"):
        own = {name for name, given in flag_types().items() if given == kind}
        assert own == {name for name in declared if kinds[name] in (kind, f"<class '{kind}'>")}


@pytest.fixture
def records(tmp_path: Path) -> Path:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "0", "conversations": turns}]))
    return path


def write_mistakes(folder: Path, good: dict) -> None:
    """Files of flags and data with one ordinary mistake each."""
    question, answer = good["conversations"]
    (folder / "syntax.yaml").write_text("lora_target_modules: [q_proj, v_proj\nseed: 1\n")
    (folder / "tab.yaml").write_text("seed: 1\n\tlora_r: 8\n")
    (folder / "comma.json").write_text(f"[\n{json.dumps(good)},\n]\n")
    (folder / "a.png").touch()
    marked = {"role": "user", "content": "<image>\n<image>\nWhat?"}
    mistaken = {
        "compared": {"prompt": "What?", "chosen": "A dog.", "rejected": "A cat."},
        "role": {**good, "conversations": [{**question, "role": "bot"}, answer]},
        "count": {**good, "image": "a.png", "conversations": [marked, answer]},
    }
    for name, record in mistaken.items():
        (folder / f"{name}.json").write_text(json.dumps([record]))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model_name_or_path {model}s --data_path {data}", "no such folder (looked in"),
        ("--model_name_or_path {model} --data_path {data}x", "no such file (did you mean {data}?) (looked in"),
        ("--model_name_or_path {model} --data_pat {data}", "unknown: --data_pat (did you mean --data_path?)"),
        ("--model_name_or_path {model} --data_path {data} --num_train_epochs 0", "--num_train_epochs 0.0: it must be"),
        ("--model_name_or_path {model} --data_path {data} --lora_r four", "--lora_r four: a whole number is wanted"),
        (
            "--model_name_or_path {model} --data_path {data} --use_lora maybe",
            "--use_lora: maybe: it must be true or false",
        ),
        ("--model_name_or_path {model} --data_path {data} --seed", "--seed true: a whole number is wanted"),
        ("--model_name_or_path {model} --data_path {model}/config.json", "neither a JSON array nor JSON Lines"),
        ("--model_name_or_path {model}", "--data_path is missing"),
        ("--data_path {data}", "--model_name_or_path is missing"),
        ("no_such.yaml", "no_such.yaml: no such file"),
        ("{model}", "{model} is a folder, give a YAML file"),
        ("--model_name_or_path {model} --data_path {model}", "neither a JSON array nor JSON Lines"),
        (
            "--model_name_or_path {model} --data_path {data} --deepspeed no.json",
            "in {here} or {root}; there are ds_config",
        ),
        (
            "--model_name_or_path {model} --data_path {data} --use_lora true --tune_llm true",
            "choose one (LoRA needs --tune_llm false)",
        ),
        ("{required} --on_bad_sample drop", "--on_bad_sample drop: it is error, skip"),
        ("{required} --output_dir {used}", "OUTPUT_DIR {used} is not empty: choose another"),
        ("{required} --resume_from_checkpoint {used}/checkpoint-9", "no such folder; give OUTPUT_DIR/checkpoint-N"),
        ("{required} --q_lora true", "it needs --use_lora true"),
        ("{required} --report_to clearml", "--report_to clearml is not installed: pip install clearml"),
        ("{required} --optim lomo", "--optim lomo is not installed: pip install lomo-optim"),
        ("{required} --eval_strategy steps", "none of --eval_data_path, --eval_dataset and --val_size is given"),
        ("{required} --dataset a", "are both given"),
        ("--model_name_or_path {model} --dataset a --dataset_dir {used}", "dataset_info.json: no such file"),
        ("--model_name_or_path {used} --data_path {data}", "{used} has no config.json; it is not a model folder"),
        (
            "--model_name_or_path {adapter} --data_path {data}",
            "is an adapter; training starts from its base checkpoint",
        ),
        (
            "--model_name_or_path openbmb/MiniCPM-V-2_7 --data_path {data}",
            "(did you mean openbmb/MiniCPM-V-2_6 or openbmb/MiniCPM-V-2?) is no folder in {here} and cannot be",
        ),
        ("--model_name_or_path {model} --data_path {bad}", "2 of 3 records looked at cannot be used, the first: {bad}"),
        ("{made}/syntax.yaml", "syntax.yaml, line 2: not a YAML file of flags: expected ',' or ']'"),
        ("{made}/tab.yaml", "tab.yaml, line 2: not a YAML file of flags: found character"),
        ("{given} {made}/comma.json", "comma.json, line 2: not valid JSON: trailing comma before ']'; remove"),
        ("{given} {made}/compared.json", "compared.json: records have 'chosen' and 'rejected'"),
        ("{given} {made}/role.json", "record 0 (id '0'): turn 0 has role 'bot'; known roles are system, user"),
        ("{given} {made}/count.json", "2 <image> in the user turns, 1 images under 'image'; the numbers must be equal"),
        ("{required} --eval_data_path {bad}", "record 1 (id '1'): no answer: the last turn (0) is user"),
        ("", "nothing to train"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_starts(tiny, records, tmp_path, flags, said) -> None:
    used, adapter, bad = tmp_path / "used", tmp_path / "adapter", records.with_name("bad.json")
    for folder, name in ((used, "notes.txt"), (adapter, "adapter_config.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    (first,) = json.loads(records.read_text())
    unanswered = {"id": "1", "conversations": first["conversations"][:1]}
    bad.write_text(json.dumps([first, unanswered, {**first, "id": "2", "image": "gone.png"}]))
    write_mistakes(tmp_path, first)
    where = {"model": tiny("llama3_v2_5"), "data": records, "root": ROOT, "used": used, "adapter": adapter, "bad": bad}
    where["here"] = tmp_path  # not the checkout, where runs of its user may have left an output folder
    where["made"] = tmp_path
    where["given"] = f"--model_name_or_path {where['model']} --data_path"
    where["required"] = f"--model_name_or_path {where['model']} --data_path {records}"
    code = (
        "import sys\nfrom finetune.__main__ import main\nstatus = main(['train', *sys.argv[1:]])\n"
        "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))\nsys.exit(status)"
    )
    command = [sys.executable, "-c", code, *flags.format(**where).split()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    *result, imported = done.stdout.splitlines()
    assert (done.returncode, imported) == (2, "[]"), done.stderr
    assert all('"exit_code": 2' in line for line in result)
    assert said.format(**where) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_warnings_are_left_to_the_run(tiny, records, capfd, monkeypatch) -> None:
    monkeypatch.chdir(records.parent)
    check_early(["--model_name_or_path", str(tiny("v2_0")), "--data_path", str(records), "--evaluation_strategy", "no"])
    assert capfd.readouterr() == ("", "")


def test_what_is_right_is_let_through(tiny, records, monkeypatch) -> None:
    monkeypatch.chdir(records.parent)
    check_early(["--model_name_or_path", str(tiny("v2_0")), "--data_path", str(records), "--bf16", "true"])
    bad = records.with_name("bad.json")
    bad.write_text(json.dumps([{"id": "0", "conversations": [{"role": "user", "content": "What?"}]}]))
    required = ["--model_name_or_path", str(tiny("v2_0")), "--data_path", str(bad)]
    for flag, value in (("--on_bad_sample", "skip"), ("--check", "off")):
        check_early([*required, flag, value])
    used = records.with_name("used")
    used.mkdir()
    (used / "notes.txt").touch()
    required = ["--model_name_or_path", str(tiny("v2_0")), "--data_path", str(records), "--output_dir", str(used)]
    for flag, value in (("--resume_from_checkpoint", "auto"), ("--overwrite_output_dir", "true")):
        check_early([*required, flag, value])
    (records.parent / "config.json").write_text("{}")
    with pytest.raises(UserError, match="unknown checkpoint"):
        check_early(["--model_name_or_path", str(records.parent), "--data_path", str(records)])


@pytest.mark.parametrize(
    ("visible", "count"), [("0,1,2", 3), ("", 0), ("-1", 0), ("0,-1,1", 1), ("GPU-4f2e,GPU-77", 2)]
)
def test_visible_gpus(monkeypatch, visible, count) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert train.visible_gpus() == count


def started(monkeypatch: pytest.MonkeyPatch, *argv: str) -> dict[str, str]:
    """Options of torchrun that a command line leads to."""
    calls: list[list[str]] = []
    monkeypatch.setattr("finetune.launch.main", lambda options: calls.append(options) or 0)
    assert train.main(list(argv)) == 0
    (options,) = calls
    split = options.index("--")
    assert options[split + 1 :] == [str(ROOT / "finetune.py"), "x.yaml"]
    return dict(zip(options[:split:2], options[1:split:2], strict=True))


def test_one_node(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = started(monkeypatch, "x.yaml")
    assert (found["--nproc_per_node"], found["--nnodes"], found["--master_addr"]) == ("2", "1", "localhost")
    assert int(found["--master_port"]) > 1024
    assert started(monkeypatch, "--nproc", "7", "x.yaml")["--nproc_per_node"] == "7"


def test_without_gpus_two_processes_of_one_thread(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert started(monkeypatch, "x.yaml")["--nproc_per_node"] == "2"
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    ("method", "said", "result"),
    [
        ("lora", "", "true"),
        ("full", "", "false"),
        ("lora", "use_lora: yes", None),
        ("full", "finetuning_type: full", None),
    ],
)
def test_the_method_of_a_launcher(tiny, records, monkeypatch, method, said, result) -> None:
    path = records.with_name("x.yaml")
    path.write_text(f"model_name_or_path: {tiny('v2_0')}\ndata_path: {records}\n{said}\n")
    calls: list[list[str]] = []
    monkeypatch.setattr("finetune.launch.main", lambda options: calls.append(options) or 0)
    assert train.main(["--method", method, str(path)]) == 0
    flags = calls[0][calls[0].index("--") + 2 :]
    assert flags == [str(path), *([] if result is None else ["--use_lora", result])]
    with pytest.raises(UserError, match=r"x\.yaml says use_lora (True|False), but this is a launcher of"):
        train.main(["--method", "full" if method == "lora" else "lora", str(path), "--use_lora", str(method == "lora")])


def test_nodes_from_slurm_or_from_the_command_line(monkeypatch, tmp_path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n1\necho n2\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    settings = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "41"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = started(monkeypatch, "x.yaml")
    nodes = {key: found[key] for key in ("--nnodes", "--node_rank", "--master_addr", "--master_port")}
    assert nodes == {"--nnodes": "2", "--node_rank": "1", "--master_addr": "n1", "--master_port": "10041"}
    assert started(monkeypatch, "--nnodes", "1", "x.yaml")["--nnodes"] == "1"
    with pytest.raises(UserError, match=r"--nnodes 3 needs --node_rank \(0 to 2\) and --master_addr"):
        train.main(["--nnodes", "3", "x.yaml"])


def test_a_file_of_llamafactory_trains_and_is_verified(tiny, demo_data, tmp_path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": str(demo_data / "train.json")}})
    )
    (tmp_path / "x.yaml").write_text(
        f"model_name_or_path: {tiny('llama3_v2_5')}\nstage: sft\ndo_train: true\nfinetuning_type: lora\ndataset: mine\n"
        f"dataset_dir: {tmp_path / 'sets'}\ntemplate: minicpm_v\noutput_dir: {tmp_path / 'out'}\nmax_steps: 1\n"
        "dataloader_num_workers: 0\nlearning_rate: 1.0e-4\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "finetune",
        "train",
        "--nproc",
        "1",
        str(tmp_path / "x.yaml"),
        "--logging_steps",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("result="))
    assert (result["status"], result["steps"], result["verified"]) == ("ok", 1, True)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
