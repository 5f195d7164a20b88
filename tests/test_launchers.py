"""The launchers under dash and bash, with a torchrun that only writes down what it was given."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("finetune_ds.sh", "finetune_lora.sh")
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]

RECORD = """#!{python}
import json, os, sys
with open({record!r}, "w") as file:
    json.dump({{"argv": sys.argv[1:], "environment": dict(os.environ), "directory": os.getcwd()}}, file)
"""
GPU_LIST = """#!/bin/sh
echo "GPU 0: A (UUID: GPU-0)"
echo "  MIG 1g.10gb     Device  0: (UUID: MIG-0)"
echo "GPU 1: A (UUID: GPU-1)"
"""
NO_GPU = '#!/bin/sh\necho "No devices found."\nexit 6\n'


def executable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@dataclass
class Call:
    """What the stub torchrun was given."""

    argv: list[str]
    environment: dict[str, str]
    directory: str

    @property
    def options(self) -> dict[str, str]:
        """torchrun's own options."""
        own = self.argv[: self.argv.index("--")]
        return dict(zip(own[::2], own[1::2], strict=True))

    @property
    def script(self) -> str:
        return self.argv[self.argv.index("--") + 1]

    @property
    def arguments(self) -> list[str]:
        return self.argv[self.argv.index("--") + 2 :]

    @property
    def flags(self) -> dict[str, str]:
        """The flags of finetune.py; as in argparse, the last one wins."""
        assert len(self.arguments) % 2 == 0, self.arguments
        return dict(zip(self.arguments[::2], self.arguments[1::2], strict=True))


@dataclass
class Launcher:
    """A copy of the launchers in a folder with a space, run in another folder with a space."""

    shell: str
    name: str
    home: Path
    caller: Path
    stubs: Path
    record: Path

    @property
    def script(self) -> Path:
        return self.home / self.name

    def edit(self, pattern: str, replacement: str) -> None:
        """Replaces whole lines of the script, as a user does with an editor."""
        text, count = re.subn(f"(?m)^{pattern}.*$", lambda _: replacement, self.script.read_text(encoding="utf-8"))
        assert count == 1, (pattern, count)
        self.script.write_text(text, encoding="utf-8")

    def start(self, *arguments: str, script: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.stubs}:/usr/bin:/bin", "HOME": str(self.caller), **variables}
        command = [self.shell, script or str(self.script), *arguments]
        return subprocess.run(
            command, cwd=self.caller, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def run(self, *arguments: str, script: str | None = None, **variables: str) -> Call:
        done = self.start(*arguments, script=script, **variables)
        assert done.returncode == 0, done.stderr
        return Call(**json.loads(self.record.read_text(encoding="utf-8")))

    def fail(self, *arguments: str, **variables: str) -> str:
        done = self.start(*arguments, **variables)
        assert done.returncode == 2, (done.returncode, done.stderr)
        assert not self.record.exists(), "torchrun was started all the same"
        return done.stderr


@pytest.fixture(params=[(shell, name) for shell in SHELLS for name in SCRIPTS], ids="-".join)
def launcher(request: pytest.FixtureRequest, tmp_path: Path) -> Launcher:
    shell, name = request.param
    home, caller, stubs = tmp_path / "the toolkit", tmp_path / "my work", tmp_path / "bin"
    for folder in (home, caller, stubs):
        folder.mkdir()
    for file in (*ROOT.glob("finetune_*.sh"), *ROOT.glob("ds_config_*.json"), ROOT / "finetune.py"):
        shutil.copy(file, home)
    record = tmp_path / "record.json"
    executable(stubs / "torchrun", RECORD.format(python=sys.executable, record=str(record)))
    executable(stubs / "nvidia-smi", NO_GPU)
    (stubs / "python3").symlink_to(sys.executable)
    (caller / "train.json").write_text("[]", encoding="utf-8")
    (caller / "eval.json").write_text("[]", encoding="utf-8")
    return Launcher(shell, name, home, caller, stubs, record)


def test_a_shell_was_found() -> None:
    assert SHELLS, "neither dash nor bash: the tests of this file would all be skipped"


def test_defaults(launcher: Launcher) -> None:
    call = launcher.run(DATA="train.json")
    assert call.script == str(launcher.home / "finetune.py")
    assert call.directory == str(launcher.caller), "the caller's directory stays the working directory"
    assert call.options["--nnodes"] == "1"
    assert call.options["--node_rank"] == "0"
    assert call.options["--master_addr"] == "localhost"
    lora = launcher.name == "finetune_lora.sh"
    expected = {
        "--model_name_or_path": "openbmb/MiniCPM-Llama3-V-2_5",
        "--data_path": "train.json",
        "--output_dir": "output/output_lora" if lora else "output/output_full",
        "--deepspeed": str(launcher.home / "ds_config_zero2.json"),
        "--model_max_length": "2048",
        "--max_slice_nums": "9",
        "--tune_vision": "false" if lora else "true",
        "--tune_llm": "false" if lora else "true",
        "--learning_rate": "1e-4" if lora else "1e-5",
        "--lr_scheduler_type": "cosine",
    }
    assert {name: call.flags.get(name) for name in expected} == expected
    assert call.flags.get("--use_lora") == ("true" if lora else None)
    # The family is read from the checkpoint, the number format from the device.
    assert not {"--llm_type", "--bf16", "--fp16"} & set(call.flags)


def test_every_variable_from_the_environment(launcher: Launcher) -> None:
    (launcher.caller / "mine.json").write_text("{}", encoding="utf-8")
    call = launcher.run(
        GPUS_PER_NODE="5",
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="10.0.0.1",
        MASTER_PORT="7001",
        MODEL="./my model",
        DATA="train.json",
        EVAL_DATA="eval.json",
        LLM_TYPE="minicpm",
        MODEL_MAX_Length="4096",
        OUTPUT_DIR="my output",
        DS_CONFIG="mine.json",
        HF_HOME="/models",
        HF_ENDPOINT="https://mirror.example",
        CUDA_VISIBLE_DEVICES="1",
    )
    assert call.options == {
        "--nproc_per_node": "5",
        "--nnodes": "2",
        "--node_rank": "1",
        "--master_addr": "10.0.0.1",
        "--master_port": "7001",
    }
    expected = {
        "--model_name_or_path": "./my model",
        "--data_path": "train.json",
        "--eval_data_path": "eval.json",
        "--llm_type": "minicpm",
        "--model_max_length": "4096",
        "--output_dir": "my output",
        "--deepspeed": "mine.json",
        "--do_eval": "true",
        "--eval_strategy": "steps",
    }
    assert {name: call.flags.get(name) for name in expected} == expected
    for name, value in (
        ("HF_HOME", "/models"),
        ("HF_ENDPOINT", "https://mirror.example"),
        ("CUDA_VISIBLE_DEVICES", "1"),
    ):
        assert call.environment[name] == value


def test_edited_as_the_guides_show(launcher: Launcher) -> None:
    """Plain assignments at the top, in place of ours and above them."""
    launcher.edit("set -eu", "set -eu\nexport CUDA_VISIBLE_DEVICES=0,1,2\nHF_HOME=/home/me/models/")
    for line in (
        "GPUS_PER_NODE=3",
        "NNODES=1",
        "NODE_RANK=0",
        "MASTER_ADDR=localhost",
        "MASTER_PORT=6001",
        'MODEL="openbmb/MiniCPM-V-2" # or openbmb/MiniCPM-V-2',
        'DATA="./train.json" # json file',
        'EVAL_DATA="./eval.json" # json file',
        'LLM_TYPE="minicpm" # if use openbmb/MiniCPM-V-2, please set LLM_TYPE=minicpm',
        "MODEL_MAX_Length=1024",
        "OUTPUT_DIR=out",
        'DS_CONFIG="ds_config_zero3.json"',
    ):
        launcher.edit(line.split("=")[0] + "=", line)
    call = launcher.run(MODEL="from the environment")
    assert call.options["--nproc_per_node"] == "3"
    assert call.options["--master_port"] == "6001"
    assert call.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    assert call.environment["HF_HOME"] == "/home/me/models/", "exported although the user did not write export"
    expected = {
        "--model_name_or_path": "openbmb/MiniCPM-V-2",
        "--data_path": "./train.json",
        "--eval_data_path": "./eval.json",
        "--llm_type": "minicpm",
        "--model_max_length": "1024",
        "--output_dir": "out",
        "--deepspeed": str(launcher.home / "ds_config_zero3.json"),
    }
    assert {name: call.flags.get(name) for name in expected} == expected


def test_three_rtx_3090_block(launcher: Launcher) -> None:
    """Uncommented, the block of finetune_lora.sh is the published setting."""
    if launcher.name != "finetune_lora.sh":
        pytest.skip("finetune_lora.sh only")
    text = launcher.script.read_text(encoding="utf-8")
    text, count = re.subn(r"(?m)^#(?=export CUDA|[A-Z_]+=)", "", text)
    assert count == 5
    launcher.script.write_text(text, encoding="utf-8")
    call = launcher.run(DATA="train.json")
    assert call.options["--nproc_per_node"] == "3"
    assert call.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    assert call.flags["--model_name_or_path"] == "openbmb/MiniCPM-V-2"
    assert call.flags["--llm_type"] == "minicpm"
    assert call.flags["--deepspeed"] == str(launcher.home / "ds_config_zero2_offload.json")


def test_unset_variables_stay_unset(launcher: Launcher) -> None:
    """An exported empty CUDA_VISIBLE_DEVICES would hide every GPU."""
    call = launcher.run(DATA="train.json")
    assert not {"CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_ENDPOINT"} & set(call.environment)


def test_arguments_come_last_and_unchanged(launcher: Launcher) -> None:
    extra = ["--learning_rate", "3e-4", "--run_name", "two  words and * 'quotes' \"too\" \\d $HOME", "--ev", ""]
    call = launcher.run(*extra, DATA="train.json")
    assert call.arguments[-len(extra) :] == extra
    assert call.flags["--learning_rate"] == "3e-4"


def test_the_users_arguments_are_counted(launcher: Launcher) -> None:
    """FINETUNE_USER_ARGS: how many at the end come from the variables at the top and the command line."""
    call = launcher.run("--run_name", "mine", DATA="train.json")
    own = call.arguments[-int(call.environment["FINETUNE_USER_ARGS"]) :]
    assert own[::2] == ["--model_name_or_path", "--data_path", "--output_dir", "--run_name"]
    edited = {"EVAL_DATA": "eval.json", "LLM_TYPE": "minicpm", "MODEL_MAX_Length": "4096"}
    call = launcher.run(DATA="train.json", **edited)
    own = call.arguments[-int(call.environment["FINETUNE_USER_ARGS"]) :]
    assert {"--eval_data_path", "--llm_type", "--model_max_length"} < set(own)
    assert not {"--eval_strategy", "--deepspeed", "--learning_rate"} & set(own)


def test_paths_with_spaces_and_quotes(launcher: Launcher) -> None:
    odd = 'it\'s a "folder" with $HOME'
    (launcher.caller / odd).mkdir()
    for name in ("train.json", "eval.json", "ds.json"):
        (launcher.caller / odd / name).write_text("[]", encoding="utf-8")
    names = {
        "DATA": "train.json",
        "EVAL_DATA": "eval.json",
        "DS_CONFIG": "ds.json",
        "MODEL": "model",
        "OUTPUT_DIR": "o",
    }
    call = launcher.run(**{variable: f"{odd}/{name}" for variable, name in names.items()})
    flags = ("--data_path", "--eval_data_path", "--deepspeed", "--model_name_or_path", "--output_dir")
    assert [call.flags[flag] for flag in flags] == [f"{odd}/{name}" for name in names.values()]


@pytest.mark.parametrize("script", ["../the toolkit/{name}", "{home}/{name}"])
def test_from_any_directory(launcher: Launcher, script: str) -> None:
    call = launcher.run(script=script.format(name=launcher.name, home=launcher.home), DATA="train.json")
    assert call.script == str(launcher.home / "finetune.py")
    assert call.flags["--deepspeed"] == str(launcher.home / "ds_config_zero2.json")
    assert call.flags["--data_path"] == "train.json"


def test_from_its_own_directory(launcher: Launcher) -> None:
    """``sh finetune_lora.sh``."""
    data = str(launcher.caller / "train.json")
    launcher.caller = launcher.home
    assert launcher.run(script=launcher.name, DATA=data).script == str(launcher.home / "finetune.py")


def test_cdpath_leads_nowhere_else(launcher: Launcher) -> None:
    """With a CDPATH, ``cd folder`` may go to another folder of that name, and prints where it went."""
    (launcher.stubs / launcher.home.name).mkdir()
    data = str(launcher.caller / "train.json")
    launcher.caller = launcher.home.parent
    call = launcher.run(script=f"{launcher.home.name}/{launcher.name}", DATA=data, CDPATH=str(launcher.stubs))
    assert call.script == str(launcher.home / "finetune.py")


def test_deepspeed_configuration(launcher: Launcher) -> None:
    """The caller's file, else the shipped one of that name; the shipped default is never shadowed."""
    own = launcher.caller / "ds_config_zero2.json"
    own.write_text("{}", encoding="utf-8")
    shipped = str(launcher.home / own.name)
    offload = str(launcher.home / "ds_config_zero2_offload.json")
    assert launcher.run(DATA="train.json").flags["--deepspeed"] == shipped
    assert launcher.run(DATA="train.json", DS_CONFIG=own.name).flags["--deepspeed"] == own.name
    own.unlink()
    assert launcher.run(DATA="train.json", DS_CONFIG=own.name).flags["--deepspeed"] == shipped
    assert launcher.run(DATA="train.json", DS_CONFIG="cpu_low_memo").flags["--deepspeed"] == offload
    launcher.record.unlink()
    assert "'nowhere.json'" in launcher.fail(DATA="train.json", DS_CONFIG="nowhere.json")


def test_missing_data(launcher: Launcher) -> None:
    message = launcher.fail(DATA="no such file.json")
    assert "'no such file.json'" in message
    assert "set DATA " in message
    assert "'path/to/trainging_data'" in launcher.fail()
    message = launcher.fail(DATA="train.json", EVAL_DATA="gone.json")
    assert "'gone.json'" in message
    assert "set EVAL_DATA" in message
    assert "'gone.json'" in launcher.fail("--data_path=gone.json", DATA="train.json")


def test_data_given_as_flags(launcher: Launcher) -> None:
    """The command line wins, also where the script has to know the value."""
    call = launcher.run("--data_path", "train.json", "--eval_data_path=eval.json")
    assert call.arguments.count("train.json") == 2
    assert call.arguments[call.arguments.index("--eval_data_path") + 1] == "eval.json"
    assert "--eval_strategy" in call.arguments


@pytest.mark.parametrize("variables", [{"EVAL_DATA": ""}, {}], ids=["empty", "not edited"])
def test_without_evaluation(launcher: Launcher, variables: dict[str, str]) -> None:
    call = launcher.run(DATA="train.json", **variables)
    assert not [name for name in call.flags if "eval" in name and name != "--per_device_eval_batch_size"]


def test_free_port_on_one_node(launcher: Launcher) -> None:
    ports = {int(launcher.run(DATA="train.json").options["--master_port"]) for _ in range(3)}
    assert len(ports) > 1, "three starts on the same port"
    assert min(ports) > 1023


def test_fixed_port_on_several_nodes(launcher: Launcher) -> None:
    call = launcher.run(DATA="train.json", NNODES="2", NODE_RANK="1", MASTER_ADDR="head")
    assert call.options["--master_port"] == "6001"
    assert (call.options["--nnodes"], call.options["--node_rank"], call.options["--master_addr"]) == ("2", "1", "head")


@pytest.mark.parametrize(
    ("visible", "count"), [("0,1,2", 3), ("5", 1), ("GPU-aa,MIG-bb", 2), ("0, 1", 2), ("0,-1,2", 1), ("", 2), ("-1", 2)]
)
def test_visible_devices_are_counted(launcher: Launcher, visible: str, count: int) -> None:
    executable(launcher.stubs / "nvidia-smi", GPU_LIST * 2)
    call = launcher.run(DATA="train.json", CUDA_VISIBLE_DEVICES=visible)
    assert call.options["--nproc_per_node"] == str(count)
    cpu = visible in ("", "-1")
    assert call.environment.get("DS_ACCELERATOR") == ("cpu" if cpu else None)
    assert call.environment.get("OMP_NUM_THREADS") == ("1" if cpu else None)


def test_gpus_of_the_machine_are_counted(launcher: Launcher) -> None:
    executable(launcher.stubs / "nvidia-smi", GPU_LIST * 2)
    call = launcher.run(DATA="train.json")
    assert call.options["--nproc_per_node"] == "4", "GPUs, not their MIG slices"
    assert "DS_ACCELERATOR" not in call.environment


def test_two_processes_without_gpu(launcher: Launcher) -> None:
    call = launcher.run(DATA="train.json")
    assert call.options["--nproc_per_node"] == "2"
    assert (call.environment["OMP_NUM_THREADS"], call.environment["DS_ACCELERATOR"]) == ("1", "cpu")
    call = launcher.run(DATA="train.json", OMP_NUM_THREADS="4", DS_ACCELERATOR="xpu", GPUS_PER_NODE="1")
    assert call.options["--nproc_per_node"] == "1"
    assert (call.environment["OMP_NUM_THREADS"], call.environment["DS_ACCELERATOR"]) == ("4", "xpu")


def test_dry_run_prints_a_command_that_can_be_pasted(launcher: Launcher) -> None:
    extra = ["--run_name", "two  words and 'quotes' \\d $HOME"]
    fixed = {"DATA": "train.json", "MASTER_PORT": "7001"}
    started = launcher.run(*extra, **fixed).argv
    launcher.record.unlink()
    done = launcher.start(*extra, DRY_RUN="1", **fixed)
    assert done.returncode == 0, done.stderr
    assert not launcher.record.exists()
    assert shlex.split(done.stdout) == ["torchrun", *started]
    launcher.run(DRY_RUN="0", **fixed)


def test_dry_run_only_reports_what_is_missing(launcher: Launcher) -> None:
    (launcher.stubs / "torchrun").unlink()
    done = launcher.start(DRY_RUN="1", DS_CONFIG="gone.json")
    assert done.returncode == 0
    assert "--model_name_or_path" in done.stdout
    for missing in ("trainging_data", "gone.json", "torchrun"):
        assert missing in done.stderr


def test_torchrun_is_found(launcher: Launcher) -> None:
    """The active one, else the one of .venv; TORCHRUN and PYTHON choose."""
    beside = launcher.home / ".venv" / "bin"
    beside.mkdir(parents=True)
    record = str(launcher.record)
    executable(beside / "torchrun", RECORD.format(python=sys.executable, record=record).replace("argv[1:]", "argv"))
    assert "torchrun" not in launcher.run(DATA="train.json").argv[0], "the active one comes first"
    (launcher.stubs / "torchrun").rename(launcher.stubs / "other run")
    assert launcher.run(DATA="train.json").argv[0] == str(beside / "torchrun")
    chosen = launcher.run(DATA="train.json", TORCHRUN=str(launcher.stubs / "other run"))
    assert chosen.argv[0] == "--nproc_per_node"
    executable(launcher.stubs / "my python", RECORD.format(python=sys.executable, record=record))
    call = launcher.run(DATA="train.json", PYTHON=str(launcher.stubs / "my python"), MASTER_PORT="7001")
    assert call.argv[:2] == ["-m", "finetune.launch"]
    assert call.environment["PYTHONPATH"] == str(launcher.home)
    both = {"PYTHON": str(launcher.stubs / "my python"), "TORCHRUN": str(launcher.stubs / "other run")}
    assert launcher.run(DATA="train.json", MASTER_PORT="7001", **both).argv[0] == "--nproc_per_node"
    (beside / "torchrun").unlink()
    launcher.record.unlink()
    message = launcher.fail(DATA="train.json")
    assert "no torchrun" in message
    assert f"pip install -r '{launcher.home / 'requirements.txt'}'" in message


def test_torch_s_own_torchrun_is_called_through_its_interface(launcher: Launcher) -> None:
    """By the Python beside it; a torchrun that is something else is called as it is."""
    (launcher.stubs / "torchrun").write_text("#!/bin/sh\n# from torch.distributed.run import main\nexit 9\n")
    (launcher.stubs / "python3").unlink()  # a link to the real one
    executable(launcher.stubs / "python3", RECORD.format(python=sys.executable, record=str(launcher.record)))
    call = launcher.run(DATA="train.json", MASTER_PORT="7001")
    assert call.argv[:2] == ["-m", "finetune.launch"]
    assert call.script == str(launcher.home / "finetune.py")
    pasted = launcher.start(DATA="train.json", MASTER_PORT="7001", DRY_RUN="1", PYTHONPATH="/other").stdout
    assert shlex.split(pasted)[:3] == ["env", f"PYTHONPATH={launcher.home}:/other", str(launcher.stubs / "python3")]


def test_a_file_of_flags_is_handed_to_train(launcher: Launcher) -> None:
    executable(launcher.stubs / "my python", RECORD.format(python=sys.executable, record=str(launcher.record)))
    method = "lora" if launcher.name == "finetune_lora.sh" else "full"
    python = {"PYTHON": str(launcher.stubs / "my python")}
    call = launcher.run("x.yaml", "--seed", "3", **python)
    assert call.argv == ["-m", "finetune", "train", "--method", method, "x.yaml", "--seed", "3"]
    assert call.directory == str(launcher.caller)
    call = launcher.run("a b.yml", NNODES="2", NODE_RANK="1", MASTER_ADDR="host", GPUS_PER_NODE="4", **python)
    options = ["--nproc", "4", "--nnodes", "2", "--node_rank", "1", "--master_addr", "host"]
    assert call.argv[3:] == ["--method", method, *options, "a b.yml"]
    done = launcher.start("x.yaml", DRY_RUN="1", **python)
    assert shlex.split(done.stdout)[-1] == "x.yaml"
    assert "MODEL, DATA and the other variables are not used" in done.stderr
    launcher.record.unlink()
    assert "TORCHRUN has no effect" in launcher.fail("x.yaml", TORCHRUN="torchrun")


def test_a_copy_says_what_it_must_stand_beside(launcher: Launcher) -> None:
    (launcher.home / "finetune.py").unlink()
    assert "leave this script in its repository and call it from anywhere" in launcher.fail(DATA="train.json")


def test_exit_status_is_torchruns(launcher: Launcher) -> None:
    executable(launcher.stubs / "torchrun", "#!/bin/sh\nexit 37\n")
    assert launcher.start(DATA="train.json").returncode == 37


def test_the_two_differ_in_the_method_only() -> None:
    """Header, RTX 3090 block, output folder and the method line; everything else is word for word the same."""
    full, lora = ((ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS)
    lora = re.sub(r"(?ms)^# Three RTX 3090.*?^$\n", "", lora)
    different = [
        (a, b)
        for a, b in zip(full.splitlines(), lora.splitlines(), strict=True)
        if a != b and not (a.startswith("#") and b.startswith("#"))
    ]
    assert len(different) == 3, different
    assert all("output/output_" in line for line in different[0])
    assert [line.strip() for line in different[1]] == [
        f'run finetune train --method {method} "$@"' for method in ("full", "lora")
    ]
    assert all(line.startswith("set -- --tune_vision") for line in different[2])


def test_flags_are_known_to_finetune(launcher: Launcher) -> None:
    """Every flag that the launcher passes exists under exactly that name, and takes the value."""
    if launcher.shell != SHELLS[0]:
        pytest.skip("one shell is enough")
    from transformers import HfArgumentParser

    from finetune.arguments.data import DataArguments
    from finetune.arguments.model import LoraArguments, ModelArguments
    from finetune.arguments.training import TrainingArguments

    call = launcher.run(DATA="train.json", EVAL_DATA="eval.json", LLM_TYPE="llama3")
    kinds = [ModelArguments, DataArguments, LoraArguments, TrainingArguments]
    parser = HfArgumentParser(kinds, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    parsed, unknown = parser.parse_known_args(call.arguments)
    assert not unknown
    assert parsed.eval_steps == parsed.save_steps == 0.1
    assert parsed.label_names == ["labels"]
    assert parsed.tune_llm is (launcher.name == "finetune_ds.sh")


def test_preference_training_is_a_wrapper(launcher: Launcher) -> None:
    if launcher.name != "finetune_lora.sh":
        pytest.skip("finetune_lora.sh only")
    wrapper = str(launcher.home / "finetune_dpo.sh")
    flags = launcher.run("--lora_r", "8", script=wrapper, DATA="train.json").flags
    expected = {"--stage": "dpo", "--use_lora": "true", "--learning_rate": "5e-6", "--lora_r": "8"}
    assert {name: flags.get(name) for name in expected} == expected
    assert launcher.run("--learning_rate", "1e-6", script=wrapper, DATA="train.json").flags["--learning_rate"] == "1e-6"
    words = ("x.yaml", "--learning_rate", "1e-6")
    said = launcher.start(*words, script=wrapper, DRY_RUN="1", PYTHON=sys.executable).stdout
    assert "'x.yaml' '--stage' 'dpo' '--learning_rate' '1e-6'" in said
