"""downsample_mode of 4.6 and 4.7: decided once, in processor and network alike, and carried by what is saved."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conversations import CONVERSATIONS, LARGE, as_published, picture, sample
from peft import AutoPeftModel
from test_training import FLAGS

from dataset import make_supervised_data_module
from finetune.__main__ import main
from finetune.arguments.parse import parse_arguments
from finetune.chat import MiniCPMVChat
from finetune.chat.pipeline import ChatPromptOptions, SamplingOptions
from finetune.chat.session import OFF, ChatSession
from finetune.checkpoints.base_checkpoint import SIDE_FILES, BaseCheckpoint, resolve_base
from finetune.checkpoints.resume import ResumeError, choose_checkpoint
from finetune.checkpoints.run_start import find_base
from finetune.commands import export, plan
from finetune.data_check.check_cache import fingerprint
from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import LengthPolicy
from finetune.families import FAMILIES, by_name
from finetune.model_folders.downsample_mode import VARIABLE, decide, saved_with, write_mode
from finetune.models import load_adapter, load_model, load_tokenizer
from finetune.planning.memory_estimate import MemoryEstimator
from finetune.planning.training_setup import SampleShape, TrainingSetup
from finetune.sample import as_sample_set
from finetune.training.freezing import adapt
from finetune.utils.errors import ArgumentError, CheckpointError, UserError
from finetune.utils.log_once import warn_once
from trainer import CPMTrainer

ROOT = Path(__file__).resolve().parents[2]
PROCESSOR = "processor_config.json"
WITHOUT = [family.name for family in FAMILIES if "downsample_mode" not in family.settings]


def encoder(base: BaseCheckpoint) -> Encoder:
    return Encoder(base.family, load_tokenizer(base.folder), base.settings)


def batch_of(base: BaseCheckpoint, *, generate: bool = False) -> dict[str, torch.Tensor]:
    made = encoder(base)
    batch = pad([made.encode(sample(CONVERSATIONS["several"]), generate=generate)], made.pad_id)
    del batch["labels"]
    return batch


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def values(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def as_16x(path: Path) -> bytes:
    return path.read_bytes().replace(b'"downsample_mode": "4x"', b'"downsample_mode": "16x"')


@pytest.fixture
def folder(native, tmp_path: Path) -> Path:
    """A folder of 4.6 without its weights, to write into."""
    return shutil.copytree(native("v4_6"), tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))


def put(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("wish", "variable", "adapter", "mode", "origin"),
    [
        (None, None, None, "16x", "config.json"),
        (None, "", None, "16x", "config.json"),
        (None, None, "4x", "4x", "adapter_config.json"),
        (None, "4x", None, "4x", f"environment variable {VARIABLE}"),
        (None, "16x", "4x", "16x", f"environment variable {VARIABLE}"),
        ("4x", "16x", None, "4x", "--downsample_mode"),
        ("16x", "4x", "4x", "16x", "--downsample_mode"),
    ],
)
def test_the_first_that_says_it_decides(
    folder: Path, tmp_path: Path, wish: str, variable: str, adapter: str, mode: str, origin: str
) -> None:
    trained = None
    if adapter:
        (trained := tmp_path / "adapter").mkdir()
        (trained / "adapter_config.json").write_text(json.dumps({"auto_mapping": {"downsample_mode": adapter}}))
    environment = {} if variable is None else {VARIABLE: variable}
    base = resolve_base(str(folder), wish, trained=trained, environment=environment)
    assert base.mode is not None
    assert (base.mode.name, base.mode.base) == (mode, "16x")
    assert base.mode.origin.endswith(origin)
    assert base.mode.chosen == (wish is not None or bool(variable))
    other = {"16x": "4x", "4x": "16x"}[mode]
    assert (f"says {other}" in str(base.mode)) == (other in (wish, variable, adapter, "16x"))
    assert base.settings["downsample_mode"] == mode
    assert {base.settings[part]["downsample_mode"] for part in ("image_processor", "video_processor")} == {mode}
    assert base.family.slice_spec(base.settings).merge == {"16x": 4, "4x": 2}[mode]
    assert base.config["downsample_mode"] == "16x", "config.json as it was read"


def test_a_processor_beside_an_adapter_counts_where_it_is_not_the_one_of_the_base(folder: Path, tmp_path: Path) -> None:
    (adapter := tmp_path / "adapter").mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"auto_mapping": None}))
    shutil.copy(folder / PROCESSOR, adapter)
    put(folder / "config.json", lambda content: content.update(downsample_mode="4x"))
    assert resolve_base(str(folder), trained=adapter).downsample_mode == "4x", "a copy says nothing about the adapter"
    write_mode(folder, by_name("v4_6"), "16x")
    write_mode(adapter, by_name("v4_6"), "4x")
    assert resolve_base(str(folder), trained=adapter).downsample_mode == "4x"


@pytest.mark.parametrize("family", ["v4_6", "v4_7"])
def test_an_unknown_mode_is_refused(native, folder: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    known = "downsample_mode '8x' is unknown; it is 16x or 4x"
    with pytest.raises(ArgumentError, match=f"^--downsample_mode: {known}$"):
        resolve_base(str(folder), "8x")
    with pytest.raises(ArgumentError, match=f"^environment variable DOWNSAMPLE_MODE: {known}$"):
        resolve_base(str(folder), environment={VARIABLE: "8x"})
    model = load_model(native(family))
    model.config.downsample_mode = "8x"
    with pytest.raises(ValueError, match=known):
        model(**batch_of(resolve_base(str(native(family)))))
    put(folder / PROCESSOR, lambda content: content["image_processor"].update(downsample_mode="8x"))
    put(folder / "config.json", lambda content: content.pop("downsample_mode"))
    with pytest.raises(CheckpointError, match=f"{PROCESSOR}, image_processor: {known}"):
        resolve_base(str(folder))
    for value in ("8x", 4, ["4x"]):
        put(folder / "config.json", lambda content, value=value: content.update(downsample_mode=value))
        with pytest.raises(CheckpointError, match=r"config\.json: downsample_mode .* is unknown"):
            resolve_base(str(folder), "4x")


@pytest.mark.parametrize("name", WITHOUT)
def test_families_without_modes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    family = by_name(name)
    with pytest.raises(
        ArgumentError, match=f"--downsample_mode 4x: {family.title} has no downsample modes .*4.6.*omit the flag"
    ):
        decide(family, {}, None, "4x")
    warn_once.cache_clear()
    assert decide(family, {}, None, environment={VARIABLE: "4x"}) is None
    assert [f"{VARIABLE}=4x has no effect: {family.title}" in message for message in caplog.messages] == [True]


def test_files_that_disagree_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> str:
        warn_once.cache_clear()
        caplog.clear()
        assert resolve_base(str(folder)).downsample_mode == "4x"
        return "\n".join(record.message for record in caplog.records if record.levelno == logging.WARNING)

    write_mode(folder, by_name("v4_6"), "4x")
    assert said() == ""
    put(folder / PROCESSOR, lambda content: content["video_processor"].update(downsample_mode="16x"))
    assert f"config.json: downsample_mode is 4x, but 16x in {PROCESSOR}, video_processor;" in said()
    put(folder / PROCESSOR, lambda content: content["video_processor"].pop("downsample_mode"))
    assert f"16x, the default, in {PROCESSOR}, video_processor;" in said()
    put(folder / "config.json", lambda content: content.pop("downsample_mode"))
    assert f"{PROCESSOR}, image_processor: downsample_mode is 4x, but 16x, the default, in config.json and" in said()
    caplog.clear()
    warn_once.cache_clear()
    assert resolve_base(str(folder), "16x").downsample_mode == "16x"
    assert not caplog.messages, "the user has decided it"


def test_only_the_mode_changes_in_a_file(folder: Path) -> None:
    (folder / PROCESSOR).write_bytes((folder / PROCESSOR).read_bytes().replace(b"\n", b"\r\n"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_mode(folder, by_name("v4_6"), "16x")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write_mode(folder, by_name("v4_6"), "4x")
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"config.json", PROCESSOR}
    assert all(as_16x(folder / name) == before[name] for name in changed)
    put(folder / PROCESSOR, lambda content: content["video_processor"].pop("downsample_mode"))
    without = values(folder, PROCESSOR)
    write_mode(folder, by_name("v4_6"), "4x")
    assert values(folder, PROCESSOR)["video_processor"].pop("downsample_mode") == "4x"
    assert values(folder, PROCESSOR)["image_processor"] == without["image_processor"]


def test_what_is_remembered_depends_on_it(folder: Path) -> None:
    prints = {
        fingerprint(LengthPolicy(encoder(resolve_base(str(folder), mode))), as_sample_set([])) for mode in ("16x", "4x")
    }
    assert len(prints) == 2


@pytest.fixture(scope="module")
def lora(native, demo_data: Path, tmp_path_factory: pytest.TempPathFactory, forked_python: str) -> Path:
    """A run of finetune.py with the environment variable of the published guides; its verification has another."""
    output = tmp_path_factory.mktemp("modes") / "lora"
    words = ["--model_name_or_path", str(native("v4_6")), "--data_path", str(demo_data / "train.json"), "--use_cpu"]
    words += ["true", "--output_dir", str(output), "--max_steps", "1", "--report_to", "none", "--use_lora", "true"]
    words += ["--lora_r", "2", "--learning_rate", "1e-2", "--check", "off", "--dataloader_num_workers", "0"]
    done = subprocess.run(
        [forked_python, str(ROOT / "finetune.py"), *words, "--disable_tqdm", "true", "--tune_resampler", "false"],
        env={**os.environ, VARIABLE: "4x", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"downsample_mode 4x (environment variable {VARIABLE}; " in done.stderr
    assert "verified=true" in done.stdout
    return output


def test_a_run_by_the_environment_variable_says_so_and_runs_again(lora: Path) -> None:
    run = yaml.safe_load((lora / "run.yaml").read_text())
    assert run["flags"]["downsample_mode"] == "4x"
    assert run["base"]["downsample_mode"] == "4x"
    again = parse_arguments([str(lora / "run.yaml"), "--output_dir", "elsewhere"])
    assert again.model.downsample_mode == "4x"
    assert 'model.config.downsample_mode = "4x"' in (lora / "README.md").read_text()


def test_an_adapter_carries_its_mode(native, lora: Path) -> None:
    folder = native("v4_6")
    assert saved_with(lora) == "4x"
    assert as_16x(lora / PROCESSOR) == (folder / PROCESSOR).read_bytes()
    base = resolve_base(str(folder), trained=lora)
    batch, model = batch_of(base), load_model(lora)
    assert model.config.downsample_mode == "4x"
    wanted = logits(model, batch)
    anywhere = AutoPeftModel.from_pretrained(lora)
    assert anywhere.config.downsample_mode == "16x"
    with pytest.raises((ValueError, RuntimeError)):  # loud, not wrong
        logits(anywhere, batch)
    anywhere.config.downsample_mode = "4x"
    assert torch.equal(logits(anywhere, batch), wanted)
    processor = transformers.AutoProcessor.from_pretrained(lora)
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    theirs = processor.apply_chat_template(as_published(CONVERSATIONS["several"]), **options)
    assert torch.equal(theirs["input_ids"], batch["input_ids"])


def test_another_mode_does_not_go_on_from_a_checkpoint(lora: Path) -> None:
    checkpoint = str(lora / "checkpoint-1")
    words = ["--model_name_or_path", "m", "--data_path", "d", "--use_cpu", "true", "--use_lora", "true"]
    training = parse_arguments([*words, "--resume_from_checkpoint", checkpoint]).training
    assert choose_checkpoint(training, lora, downsample_mode="4x") == Path(checkpoint)
    with pytest.raises(ResumeError, match="trained with downsample_mode 4x, this run has 16x: give --downsample_mode"):
        choose_checkpoint(training, lora, downsample_mode="16x")


def test_training_goes_on_from_an_adapter_in_its_mode(native, lora: Path) -> None:
    words = ["--model_name_or_path", str(native("v4_6")), "--data_path", "d", "--use_cpu", "true", "--use_lora", "true"]
    words += ["--lora_weight_path", str(lora)]
    assert find_base(parse_arguments(words)).downsample_mode == "4x"
    assert find_base(parse_arguments([*words, "--downsample_mode", "16x"])).downsample_mode == "16x"


def test_every_voice_of_a_chat_has_its_own_mode(native, lora: Path, tmp_path: Path) -> None:
    """An adapter speaks in the mode it was trained in, the base in its own."""
    other = shutil.copytree(lora, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoint-*"))
    put(other / "adapter_config.json", lambda content: content["auto_mapping"].update(downsample_mode="16x"))
    session = ChatSession(None, [f"first={lora}", f"second={other}"], device="cpu")
    names = {name: each.downsample_mode for name, each in session.checkpoints.items()}
    assert names == {"first": "4x", "second": "16x", OFF: "16x"}
    asked, greedy = sample(CONVERSATIONS["several"][:1]), SamplingOptions(sampling=False, max_new_tokens=4)
    for name, mode in names.items():
        model = load_model(native("v4_6") if name == OFF else lora, downsample_mode=mode)
        wanted = model.chat(msgs=[{"role": "user", "content": parts(asked)}], sampling=False, max_new_tokens=4)  # pyright: ignore[reportCallIssue]
        assert "".join(session.stream(asked, ChatPromptOptions(), greedy, name)).strip() == wanted, name
    model = load_model(lora)
    load_adapter(model, other, "second")  # pyright: ignore[reportArgumentType]
    pipeline = MiniCPMVChat(lora, device="cpu", downsample_mode="16x")
    assert pipeline.model.config.downsample_mode == "16x"
    with pytest.raises(ArgumentError, match="'8x' is unknown"):
        session.pipeline.encoder(ChatPromptOptions(downsample_mode="8x"))


def parts(asked: Any) -> list[Any]:
    return [getattr(part, "text", None) or part.data for part in asked.messages[0].parts]


def test_load_adapter_warns_of_another_mode(native, lora: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(lora, downsample_mode="16x")
    load_adapter(model, lora, "again")  # pyright: ignore[reportArgumentType]
    assert any("was trained with downsample_mode 4x, the model uses 16x" in text for text in caplog.messages)


def test_evaluate_and_export_use_the_mode_of_the_adapter(
    native, lora: Path, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--limit", "1", "--max_new_tokens", "2", "--device", "cpu", "--data", str(demo_data / "eval.json")]
    assert main(["evaluate", "--model", str(lora), "--compare", "base", "--out", str(tmp_path / "out"), *words]) == 0
    said = capsys.readouterr().out
    assert f"mode       downsample_mode 4x ({lora / 'adapter_config.json'}; " in said
    assert "mode       downsample_mode 16x" in said
    folder, target = native("v4_6"), tmp_path / "merged"
    assert main(["export", "--adapter_name_or_path", str(lora), "--export_dir", str(target)]) == 0
    said = capsys.readouterr().out
    assert "mode       downsample_mode 4x" in said
    assert "verified=true" in said
    for name in ("config.json", PROCESSOR):
        assert as_16x(target / name) == (folder / name).read_bytes() != (target / name).read_bytes()
    assert "with downsample_mode 4x in place of 16x" in (target / "README.md").read_text()
    assert yaml.safe_load((target / "export.yaml").read_text())["downsample_mode"] == "4x"
    assert load_model(target).config.downsample_mode == "4x"
    other = shutil.copytree(lora, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoint-*"))
    put(other / "adapter_config.json", lambda content: content["auto_mapping"].update(downsample_mode="16x"))
    with pytest.raises(UserError, match="a model has one; choose it with --downsample_mode"):
        export.resolve_sources(None, f"{lora},{other}")
    assert export.resolve_sources(None, f"{lora},{other}", "4x").base.downsample_mode == "4x"


@pytest.mark.parametrize("family", ["v4_6", "v4_7"])
def test_a_full_result_works_everywhere_in_its_mode(native, demo_data: Path, tmp_path: Path, family: str) -> None:
    words = ["--model_name_or_path", str(native(family)), "--data_path", str(demo_data / "train.json"), "--max_steps"]
    words += ["1", "--save_strategy", "no", "--report_to", "none", "--dataloader_num_workers", "0", "--use_cpu", "true"]
    args = parse_arguments([*words, "--output_dir", str(tmp_path), *FLAGS["full"], "--downsample_mode", "4x"])
    base = resolve_base(args.model.model_name_or_path, args.model.downsample_mode)
    model = load_model(base.folder, dtype=torch.float32, downsample_mode=base.downsample_mode)
    rates = args.training.part_learning_rates
    module = make_supervised_data_module(args.data, encoder(base))
    made = CPMTrainer(
        model=adapt(model, base.family, args.training, args.lora),
        args=args.training,
        base=base,
        part_learning_rates=rates,
        **module,
    )
    made.train()
    made.save_model()
    for name in ("config.json", PROCESSOR):
        assert values(tmp_path, name) != values(native(family), name)
    assert as_16x(tmp_path / PROCESSOR) == (native(family) / PROCESSOR).read_bytes()
    saved = {**values(tmp_path, "config.json"), "downsample_mode": "16x", "torch_dtype": None}
    assert saved == {**values(native(family), "config.json"), "torch_dtype": None}
    for path in (path for pattern in SIDE_FILES for path in tmp_path.glob(pattern) if path.name != PROCESSOR):
        assert path.read_bytes() == (native(family) / path.name).read_bytes()
    messages = CONVERSATIONS["several"]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    theirs = dict(processor.apply_chat_template(as_published(messages), **options))
    stock = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    wanted = logits(stock, theirs)
    result = resolve_base(str(tmp_path), environment={})
    assert result.downsample_mode == "4x"
    assert torch.equal(logits(load_model(tmp_path), batch_of(result)), wanted)
    assert torch.equal(logits(made.accelerator.unwrap_model(made.model), batch_of(base)), wanted)


def test_generation_follows_the_prompt_and_leaves_the_network_as_it_was(native) -> None:
    """The stock class with the processor of that mode, whatever mode the network is in."""
    for family in ("v4_6", "v4_7"):
        model = load_model(native(family))
        for mode in ("16x", "4x"):
            stock: Any = transformers.AutoModelForImageTextToText.from_pretrained(native(family))
            stock.config.downsample_mode = mode
            made = encoder(resolve_base(str(native(family)), mode))
            batch = pad([made.encode(sample(CONVERSATIONS["several"]), generate=True)], made.pad_id, side="left")
            length = batch["input_ids"].shape[1]
            given = {key: value for key, value in batch.items() if key != "labels"}
            ids = stock.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=made.stop_ids, pad_token_id=0)
            wanted = str(made.tokenizer.decode(ids[0, length:])).partition("<|im_end|>")[0].strip()
            msgs = [{"role": "user", "content": parts(sample(CONVERSATIONS["several"]))}]
            options = {"sampling": False, "max_new_tokens": 4, "downsample_mode": mode}
            assert model.chat(msgs=msgs, **options) == wanted  # pyright: ignore[reportCallIssue]
            assert model.config.downsample_mode == "16x"


def test_the_environment_of_a_load_is_said(native, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    warn_once.cache_clear()
    monkeypatch.setenv(VARIABLE, "4x")
    assert load_model(native("v4_6")).config.downsample_mode == "4x"
    assert [f"environment variable {VARIABLE}" in text for text in caplog.messages] == [True]
    assert load_model(native("v4_6"), downsample_mode="16x").config.downsample_mode == "16x"


def test_lengths_and_plans_follow(native, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(LARGE).save(tmp_path / "large.png")
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Noise."}]
    record = {"id": "0", "image": str(tmp_path / "large.png"), "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    lengths = {}
    for mode in ("16x", "4x"):
        words = ["--model", str(native("v4_6")), "--data", str(tmp_path / "data.json"), "--overwrite_cache", "true"]
        assert main(["check", *words, "--downsample_mode", mode]) == 0
        said = capsys.readouterr().out
        assert f"downsample_mode {mode} (--downsample_mode" in said
        lengths[mode] = int(said.partition("longest ")[2].partition(" ")[0])
    made = {mode: encoder(resolve_base(str(native("v4_6")), mode)) for mode in lengths}
    asked = sample(CONVERSATIONS["last"])
    tokens = {mode: made[mode].measure(asked).tokens for mode in lengths}
    pads = {mode: int((made[mode].encode(asked).input_ids == made[mode]._placeholder).sum()) for mode in lengths}
    assert tokens["4x"] - tokens["16x"] == pads["4x"] - pads["16x"] == lengths["4x"] - lengths["16x"] > 0
    shape, recipe = SampleShape(tokens=256, items=10, patches=64), TrainingSetup(method="full")
    planners = {mode: MemoryEstimator(resolve_base(str(native("v4_6")), mode).settings) for mode in lengths}
    blocks = {
        mode: [each for each in planners[mode].blocks(recipe, shape) if each.part == "vision"] for mode in lengths
    }
    kept = {mode: blocks[mode][-1].saved for mode in lengths}  # of the last norm and the merger
    assert 3.5 < kept["4x"] / kept["16x"] < 4.1, "the merger makes four times the tokens of the same patches"


@pytest.mark.parametrize(("flags", "tokens", "items"), [((), 3072, 10), (("--length", "1024"), 1024, 4)])
def test_a_plan_without_data_has_room_for_its_images(flags: tuple[str, ...], tokens: int, items: int) -> None:
    given = plan.build_parser().parse_args(["v4_6", "--downsample_mode", "4x", *flags])
    config, settings, _, mode = plan._model(given)
    assert config["downsample_mode"] == "4x"
    assert str(mode) == "downsample_mode 4x (--downsample_mode; config.json says 16x)"
    shape = plan._shape(given, settings)
    assert (shape.tokens, shape.items, shape.patches) == (tokens, items, 1024)
    given.downsample_mode = None
    shape = plan._shape(given, plan._model(given)[1])
    assert (shape.tokens, shape.items) == (given.length or 2048, 10)
