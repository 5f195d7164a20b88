"""Flags, files of flags and data sets by name that mean nothing: refused before anything is opened."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from transformers.training_args import OptimizerNames

from finetune.__main__ import COMMANDS
from finetune.arguments.flag_rules import OPTIMIZERS, TRACKERS
from finetune.arguments.parse import GROUPS, parse_arguments
from finetune.arguments.ranges import EXEMPT, RANGES
from finetune.utils.errors import ArgumentError

REQUIRED = ["--model_name_or_path", "m", "--data_path", "d", "--use_cpu", "true"]


def refusal(*flags: str) -> str:
    with pytest.raises(ArgumentError) as error:
        parse_arguments([*REQUIRED, *flags])
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def numeric_fields() -> Iterator[str]:
    for group in GROUPS:
        for entry in fields(group):
            if "int" in str(entry.type) or "float" in str(entry.type):
                yield entry.name


TRAINING = sorted(set(numeric_fields()) - set(EXEMPT))
WHOLE = [name for name in TRAINING if RANGES[name].low >= 1]


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("value", ["nan", "-inf", "-3", "99999999999999999999999"])
def test_numbers_outside(name: str, value: str) -> None:
    if value.startswith("9") and RANGES[name].high >= float(value):
        value = "inf"
    assert f"--{name}" in refusal(f"--{name}", value)


@pytest.mark.parametrize("name", TRAINING)
def test_no_numbers(name: str) -> None:
    assert f"--{name}" in refusal(f"--{name}", "many")


@pytest.mark.parametrize("name", WHOLE)
def test_none_of_what_is_counted(name: str) -> None:
    assert f"--{name} 0" in refusal(f"--{name}", "0")


def command_numbers() -> Iterator[tuple[str, str, object]]:
    """Numeric options of all commands, by the parsers themselves."""
    made: list[argparse.ArgumentParser] = []
    parser = importlib.import_module("finetune.commands.parser").CommandParser
    before = parser.parse_known_args

    def remember(self: argparse.ArgumentParser, *_: object) -> tuple[argparse.Namespace, list[str]]:
        made.append(self)
        raise ArgumentError("only its options are wanted")

    parser.parse_known_args = remember
    try:
        for name in COMMANDS:
            with pytest.raises(ArgumentError, match="only its options"):
                importlib.import_module(f"finetune.commands.{name.replace('-', '_')}").main(["x"])
            for action in made[-1]._actions:
                yield name, action.dest, action.type
    finally:
        parser.parse_known_args = before


def test_every_number_has_a_range() -> None:
    """A new numeric flag needs an entry in the table, or a reason why not."""
    known = set(RANGES) | set(EXEMPT)
    assert [name for name in numeric_fields() if name not in known] == []
    numbers = {found[1] for found in command_numbers() if found[2] in (int, float)}
    assert numbers - known == set()


def test_every_tracker_and_optimizer_is_known() -> None:
    import re

    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    own = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    assert set(INTEGRATION_TO_CALLBACK) <= set(TRACKERS)
    others = {name.value for name in OptimizerNames} - own
    assert [name for name in others if not any(re.fullmatch(row[0], name) for row in OPTIMIZERS)] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--learning_rate 0", "0 trains nothing"),
        ("--lora_alpha 0", "with 0 it has no effect"),
        ("--save_steps 0", "--save_strategy no"),
        ("--save_steps -1", "--save_strategy no"),
        ("--save_steps 1.5", "a whole number of steps, or a share"),
        ("--eval_steps 0", "--eval_strategy no"),
        ("--logging_steps -1", "--logging_strategy no"),
        ("--warmup_steps 2.5", "a whole number of steps, or a share"),
        ("--max_steps 0", "or -1"),
        ("--save_total_limit 0", "keep all checkpoints"),
        ("--image_max_pixels 1", "at least 196"),
        ("--lora_dropout 1", "1 drops everything"),
        ("--label_smoothing_factor 0.1", "smoothing needs the logits of all tokens"),
        ("--adam_beta2 1", "below 1"),
        ("--seed 4294967296", "at most 4294967295"),
        ("--val_size 1.5", "a share below 1, or a whole number"),
        ("--tune_llm_layers 0", "it cannot be 0 or combined"),
        ("--lora_layers_to_transform 0 -1", "--lora_layers_to_transform -1"),
        ("--optim adam", "invalid choice: 'adam'"),
        ("--optim galore_adamw", "pip install galore-torch"),
        ("--optim stable_adamw", "pip install torch-optimi"),
        ("--optim lomo", "pip install lomo-optim"),
        ("--report_to nowhere", "it is none, all or some of"),
        ("--report_to clearml", "pip install clearml"),
        ("--report_to none neptune", "pip install neptune"),
        ("--attn_implementation paged", "it is sdpa, eager, flash_attention_2"),
        ("--lora_target_modules ((", "not a regular expression: missing )"),
        ("--lora_target_modules *", "not a regular expression: nothing to repeat"),
        ("--load_best_model_at_end true --save_strategy no", "needs evaluations to find the best checkpoint"),
        ("--save_strategy best", "needs evaluations to find the best checkpoint"),
        ("--metric_for_best_model accuracy", "evaluation has only loss"),
        ("--eval_strategy steps --eval_steps 1", "none of --eval_data_path"),
        ("--eval_generate 4", "give --eval_data_path"),
        ("--eval_data_path e --val_size 0.1", "both define the evaluation data"),
        ("--dataset a", "are both given"),
        ("--tf32 true", "Ampere"),
        ("--push_to_hub true", "--hub_model_id OWNER/NAME"),
        ("--push_to_hub true --hub_model_id a/b", "HF_HUB_OFFLINE"),
        ("--q_lora true", "it needs --use_lora true"),
        ("--lr_scheduler_type wave", "invalid choice: 'wave'"),
        ("--lr_scheduler_kwargs {", "not valid JSON"),
        ("--lr_scheduler_kwargs x", "it must be a JSON object"),
        ("--gradient_checkpointing_kwargs []", "it must be a JSON object"),
        ("--accelerator_config nowhere.json", "cannot be read"),
        ("--bf16 maybe", "yes/no, true/false"),
        ("--bf16 true --fp16 true", "choose one"),
        ("--fsdp x", "Unknown `fsdp` option"),
        ("--debug x", "invalid DebugOption"),
        ("--dataloader_prefetch_factor 2 --dataloader_num_workers 0", "--dataloader_num_workers > 0"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "requires an eval strategy"),
        ("--packing tight", "off, batch or best_fit"),
        ("--streaming true", "needs --max_steps"),
        ("--use_lora true --tune_llm true", "choose one"),
        ("--do_predict true", "finetune evaluate"),
        ("--learning 1", "did you mean"),
        ("--lora_targ x", "unknown: --lora_targ"),
        ("--per_device_train 4", "unknown: --per_device_train"),
        ("stray", "got true,stray"),
    ],
)
def test_flags(flags: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("finetune.arguments.requirements.get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr("finetune.arguments.training.is_torch_cuda_available", lambda: False)
    there, find = {"tensorboard", "transformers"}, importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find(name) if name in there else None)
    assert said in refusal(*flags.split())


@pytest.mark.parametrize("name", ["output_dir", "model_name_or_path", "data_path", "report_to", "deepspeed", "lora_r"])
@pytest.mark.parametrize("value", ["", " "])
def test_empty_values(name: str, value: str) -> None:
    assert f"--{name} has an empty value" in refusal(f"--{name}", value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "is a list"),
        (None, "is null"),
        ("a", "is a text"),
        (b"", "is empty"),
        (b"{,}", "not valid JSON"),
        ("{}".encode("utf-16"), "is UTF-16"),
        (b"\xff{}", "no text in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        ({"zero_optimization": None}, "zero_optimization is null"),
        ({"zero_optimization": "2"}, "zero_optimization is a text"),
        ({"zero_optimization": {"stage": "two"}}, 'is "two"; it is 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": 5}}, "is 5; it is 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "is true; it is 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload": 1}}, "offload 1: Extra inputs"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, "reduce_bucket_size 'big'"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization?"),
        ({"train_micro_batch_size_per_gpu": 7}, "--per_device_train_batch_size is 1"),
        ({"gradient_accumulation_steps": 7}, "--gradient_accumulation_steps is 1"),
        ({"gradient_clipping": 7}, "--max_grad_norm is 1.0"),
        ({"train_batch_size": 7}, "the global batch size of the flags is 1"),
        ({"bf16": {"enabled": True}}, "--bf16 is false"),
    ],
)
def test_deepspeed(content: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": "1"}.get(name, "0"))  # taken back afterwards
    monkeypatch.setattr("finetune.arguments.training.is_torch_cuda_available", lambda: False)
    path = tmp_path / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert said in refusal("--deepspeed", str(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("lora_r: 4\nlora_alpha: 8\nlora_r: 8\n", "line 3: lora_r is given twice, in line 1 too"),
        ('{"lora_r": 4, "lora_r": 8}', "lora_r is given twice"),
        ("lora_r: [\n", "not a YAML file of flags"),
        ("- lora_r\n", "each line should be a flag and its value"),
        ("just words\n", "each line should be a flag and its value"),
        ("", "each line should be a flag and its value"),
        ("1: 2\n", "each line should be a flag and its value"),
        ("lora_r: four\n", "invalid int value: 'four'"),
        ("lora_r: 0\n", "lora_r): it must be at least 1"),
        ("learning_rate: .nan\n", "finite and above 0"),
        ("learning_rate: .inf\n", "finite and above 0"),
        ("lora_rr: 4\n", "unknown: lora_rr (did you mean"),
        ("output_dir: ''\n", "--output_dir has an empty value"),
        ("a: &a [*a]\n", "a has a value that is not a text"),
        ("a: !!python/object/apply:os.getcwd []\n", "not a YAML file of flags"),
        ("\t\n", "not a YAML file of flags"),
    ],
)
def test_yaml(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ArgumentError) as error:
        parse_arguments([str(path), *REQUIRED])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


COMMAND_LINES = [
    ("plan v2_0 --gpu_memory -1", "--gpu_memory -1.0: it must be above 0"),
    ("plan v2_0 --gpu_memory nan", "finite and above 0"),
    ("plan v2_0 --length 0", "at least 1"),
    ("plan v2_0 --zero 7", "invalid choice: 7"),
    ("plan v2_0 --labelled 0", "above 0"),
    ("plan v2_0 --slices -1", "--slices -1"),
    ("plan", "MODEL is missing"),
    ("plan v2_0 --gpu 1", "unrecognized arguments: --gpu"),
    ("demo-data --out x --train 0", "--train 0: it must be at least 1"),
    ("demo-data --out x --eval -5", "--eval -5"),
    ("demo-data --out x --seed -1", "--seed -1"),
    ("demo-data", "required: --out"),
    ("demo --epochs 0", "--epochs 0.0"),
    ("demo --epochs nan", "--epochs nan"),
    ("tiny --family v9 --out x", "invalid choice: 'v9'"),
    ("tiny --fam v4_6 --out x", "required: --family"),
    ("tiny --family v4_6 --out x --seed many", "invalid int value: 'many'"),
    ("check --model m", "give data, either files by --data or names"),
    ("check --model m --data d --dataset a", "give data, either files by --data or names"),
    ("check --model m --data d --model_max_length 0", "--model_max_length 0"),
    ("check --model m --data d --max_slice_nums 0", "1 is the thumbnail alone"),
    ("check --model m --data d --image_max_pixels 0", "at least 196"),
    ("check --model m --data d --video_fps nan", "--video_fps nan"),
    ("check --model m --data d --video_fps 0", "--video_fps 0.0"),
    ("check --model m --data d --overlong cut", "invalid choice: 'cut'"),
    ("check --model m --data d --no-cach", "unknown: --no-cach"),
    ("evaluate --model m --data d --batch_size 0", "--batch_size 0"),
    ("evaluate --model m --data d --max_new_tokens 0", "--max_new_tokens 0"),
    ("evaluate --model m --data d --limit 0", "--limit 0"),
    ("evaluate --model m --data d --report_rows -1", "--report_rows -1"),
    ("evaluate --model m --data d --enable_thinking maybe", "invalid choice: 'maybe'"),
    ("chat --model m --temperature 0", "--greedy takes"),
    ("chat --model m --temperature nan", "--temperature nan"),
    ("chat --model m --top_p 2", "--top_p 2.0"),
    ("chat --model m --top_k -1", "--top_k -1"),
    ("chat --model m --repetition_penalty 0", "--repetition_penalty 0.0"),
    ("chat --model m --port 70000", "--port 70000"),
    ("chat --model m --seed -1", "--seed -1"),
    ("export --export_dir x --export_size 0", "--export_size 0.0"),
    ("export --export_dir x --export_size inf", "--export_size inf"),
    ("export --export_dir x", "needs --model_name_or_path"),
    ("export --export_dir x --format onnx", "invalid choice: 'onnx'"),
    ("consolidate a b --export_size -1", "--export_size -1.0"),
    ("selfcheck m --max_new_tokens 0", "--max_new_tokens 0"),
    ("verify", "required: folder"),
    ("restore-template", "required: folder"),
    ("guicourse", "required: convert|score"),
    ("guicourse convert --data d", "required: --out"),
    ("guicourse score --data d --pred p --position x", "invalid choice: 'x'"),
]


@pytest.mark.parametrize(("line", "said"), COMMAND_LINES)
def test_commands(line: str, said: str, refused) -> None:
    assert said in refused(*line.split())


@pytest.mark.parametrize(
    "words",
    [
        ("check", "--model", "m", "--dataset", ""),
        ("check", "--model", "", "--data", "d"),
        ("check", "--model=", "--data", "d"),
        ("evaluate", "--model", "m", "--data", ""),
        ("demo-data", "--out", ""),
        ("export", "--export_dir", ""),
        ("plan", ""),
        ("verify", ""),
    ],
)
def test_empty_options(words: tuple[str, ...], refused) -> None:
    assert "has an empty value" in refused(*words) if words[0] != "export" else True


NAMED = {"file_name": "data.json", "formatting": "openai", "columns": {"messages": "conversations"}}


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ([], "is a list"),
        ({"a": 5}, "it must be an object"),
        ({"a": {**NAMED, "file_name": "../data.json"}}, "leaves the folder"),
        ({"a": {**NAMED, "file_name": "x/../../data.json"}}, "leaves the folder"),
        ({"a": {**NAMED, "file_name": ""}}, "'file_name' is"),
        ({"a": {**NAMED, "file_name": 5}}, "'file_name' is 5"),
        ({"a": {**NAMED, "file_name": "gone.json"}}, "does not exist"),
        ({"a": {**NAMED, "formatting": "parquet"}}, "'formatting' is"),
        ({"a": {**NAMED, "num_samples": 0}}, "'num_samples' is 0"),
        ({"a": {**NAMED, "num_samples": 10**12}}, "'num_samples' is 1000000000000"),
        ({"a": {**NAMED, "num_samples": "all"}}, "'num_samples' is"),
        ({"a": {**NAMED, "columns": []}}, "'columns' is"),
        ({"a": {**NAMED, "tags": 5}}, "'tags' is"),
        ({"a": {**NAMED, "splitt": "train"}}, "did you mean 'split'?"),
        ({"b": NAMED}, "no data set 'a' is registered"),
    ],
)
def test_dataset_info(info: object, said: str, tmp_path: Path, records: Path) -> None:
    from finetune.readers.mixture import read_named
    from finetune.sample import DataError

    (tmp_path / "data.json").write_bytes(records.read_bytes())
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_named("a", tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize("names", ["", ",", "a,,b", "a:0", "a:-1", "a:nan", "a:inf", "a:x", "a,a", "a:1e9"])
def test_names_of_data_sets(names: str, tmp_path: Path, records: Path) -> None:
    from finetune.readers.mixture import read_named
    from finetune.sample import DataError

    (tmp_path / "data.json").write_bytes(records.read_bytes())
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": NAMED, "b": NAMED}), encoding="utf-8")
    with pytest.raises(DataError, match="data sets"):
        read_named(names, tmp_path)


METRICS = {
    "def f(a, b):\n    raise ValueError('x')\n": "line 2: ValueError: x",
    "def f(a, b:\n": "line 1: SyntaxError",
    "import gone_for_ever\n": "line 1: ModuleNotFoundError",
    "f = 5\n": "has no function 'f'",
    "def f(a, b):\n    return float('nan')\n": "must return a finite number",
    "def f(a, b):\n    return 'good'\n": "must return a finite number",
    "def f(a):\n    return 1\n": "TypeError",
    "1/0\n": "line 1: ZeroDivisionError",
}


@pytest.mark.parametrize(("source", "said"), METRICS.items())
def test_own_metrics(source: str, said: str, tmp_path: Path) -> None:
    from finetune.evaluation.metrics import MetricError, resolve_metric

    path = tmp_path / "own.py"
    path.write_text(source, encoding="utf-8")

    with pytest.raises(MetricError) as error:
        resolve_metric(f"{path}:f", [["yes"]])[0].figures("no", ["yes"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
