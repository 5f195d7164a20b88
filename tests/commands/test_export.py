"""The export command: complete, equal, self-contained, and never more than was asked for."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from made_adapters import EXPERTS, RESAMPLERS, make_adapter, save
from safetensors.torch import load_file
from variants import MIXTURE

from finetune.checkpoints.base_checkpoint import FULL_FILES
from finetune.checkpoints.safetensors_io import stored_in
from finetune.commands.export import main
from finetune.export import result_folder as folders
from finetune.export.sharded_writer import WeightFiles
from finetune.families import by_name, usable
from finetune.model_folders.checkpoint_folder import weight_files
from finetune.models.adapters import put_adapter
from finetune.models.loading import load_model
from finetune.runtime.out_of_memory import OutOfMemoryError
from finetune.utils.errors import UserError

NAMES = [family.name for family in usable()]


# peft warns of tied ends that are trained apart, which is what is tested.
pytestmark = pytest.mark.usefixtures("one_thread", "recwarn")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """A folder with LoRA on all parts of a family and its resampler in full, made once; not to be written to."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            trained = make_adapter(
                tiny(family), family, modules_to_save=[RESAMPLERS.get(family, "resampler")], target_modules=llm(family)
            )
            made[family] = save(trained, tmp_path_factory.mktemp("adapters") / family)
        return made[family]

    return make


def llm(family: str) -> str:
    """Layers of the language model and the vision tower; the resampler is trained in full."""
    found = by_name(family).lora_targets
    return "|".join(found[part] for part in found if part != "resampler")


def flags(base: Path | None, adapter: Path | str | None, out: Path, *more: str) -> list[str]:
    words = [] if base is None else ["--model_name_or_path", str(base)]
    words += [] if adapter is None else ["--adapter_name_or_path", str(adapter)]
    return [*words, "--export_dir", str(out), *more]


def tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a model folder."""
    found = {}
    for name, stored in stored_in(weight_files(folder)).items():
        with stored.file.open("rb") as file:
            file.seek(stored.offset)
            found[name] = file.read(stored.size)
    return found


@pytest.mark.parametrize("family", NAMES)
def test_round_trip(tiny, adapter, tmp_path, capsys, family):
    base, out = tiny(family), tmp_path / "out"
    adapter(family)
    capsys.readouterr()
    assert main(flags(base, adapter(family), out, "--export_size", "0.0005")) == 0
    said, bars = capsys.readouterr()
    assert bars.count("Loading weights: 100%") == 1, "two models of the same size are loaded"
    assert "verified=true" in said
    assert float(said.split("base_difference=")[1]) > 0.05, "the adapter does nothing"
    for pattern in FULL_FILES:
        for path in base.glob(pattern):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = tensors(base), tensors(out)
    assert set(before) == set(after)
    trained = {name for name in before if before[name] != after[name]}
    written = load_file(adapter(family) / "adapter_model.safetensors")
    touched = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in written if ".lora_" in name}
    full = {name.removeprefix("base_model.model.") for name in written if ".lora_" not in name}
    assert trained <= {f"{name}.weight" for name in touched} | full
    assert {f"{name}.weight" for name in touched} <= trained
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(before)
    assert index["metadata"]["total_size"] == sum(map(len, before.values()))
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert len(sizes) == len(set(index["weight_map"].values())) > 2
    assert str(adapter(family)) in yaml.safe_load((out / "export.yaml").read_text())["adapters"]
    assert base.name in (out / "README.md").read_text()


@pytest.mark.parametrize("served", [False, True], ids=["merged", "vllm"])
def test_adapters_on_experts_are_merged(tiny, tmp_path, capsys, served):
    """Into the fused weights, also for vLLM, whose LoRA knows linear layers alone."""
    base, out = tiny(MIXTURE), tmp_path / "out"
    model = make_adapter(base, MIXTURE, target_parameters=EXPERTS, target_modules=by_name("v4_7").lora_targets["llm"])
    assert main(flags(base, save(model, tmp_path / "adapter"), out, *(["--format", "vllm"] if served else []))) == 0
    said = capsys.readouterr().out
    assert "verified=true" in said
    assert float(said.split("base_difference=")[1].split()[0]) > 0.05, "the adapter does nothing"
    before, after = tensors(base), tensors(out / "base" if served else out)
    changed = {name for name in before if before[name] != after[name]}
    fused = {name for name in before if name.endswith(tuple(EXPERTS))}
    assert fused == changed if served else fused < changed
    if served:
        assert not any("experts" in name for name in load_file(out / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}],
)
def test_tied_ends_that_were_trained_apart(tiny, tmp_path, capsys, options):
    base, out = tiny("v4_6"), tmp_path / "out"
    assert main(flags(base, save(make_adapter(base, "v4_6", **options), tmp_path / "adapter"), out)) == 0
    assert "verified=true" in capsys.readouterr().out
    assert set(tensors(out)) == {*tensors(base), "lm_head.weight"}
    config = json.loads((out / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (False, False)


def test_lora_over_a_merged_model_is_merged_again(tiny, adapter, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(flags(None, adapter("v2_6"), first, "--verify", "off")) == 0
    again = save(make_adapter(first, "v2_6", seed=1), tmp_path / "again")
    assert main(flags(None, again, second)) == 0
    assert "verified=true" in capsys.readouterr().out
    once = tmp_path / "once"
    assert main(flags(tiny("v2_6"), f"{adapter('v2_6')},{again}", once)) == 0
    said = capsys.readouterr().out
    assert "verified=true" in said
    assert f"it was trained on {first}" in said
    one, other = load_file(once / "model.safetensors"), load_file(second / "model.safetensors")
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)
    assert {path.name for path in second.iterdir()} == {path.name for path in once.iterdir()}


def test_another_type_and_the_speech_output(tiny, adapter, tmp_path, capsys):
    base, out = tiny("o2_6"), tmp_path / "out"
    assert main(flags(base, adapter("o2_6"), out, "--infer_dtype", "bfloat16")) == 0
    said = capsys.readouterr().out
    assert "verified=true" in said
    assert 1e-4 < float(said.split("tolerance=")[1].split()[0]) < 0.1, "not what bfloat16 leaves open"
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    before, after = tensors(base), tensors(out)
    spoken = {name for name in before if name.startswith("tts.")}
    assert spoken
    assert all(before[name] == after[name] for name in spoken)
    kinds = {stored.dtype for name, stored in stored_in(weight_files(out)).items() if name not in spoken}
    assert kinds == {"BF16"}


def test_without_an_adapter_a_model_is_dealt_out_anew(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(flags(tiny("v4_5"), None, out, "--export_size", "0.0005")) == 0
    assert tensors(out) == tensors(tiny("v4_5"))
    assert len(list(out.glob("*.safetensors"))) > 2
    said = capsys.readouterr().out
    assert f"exported={out} verified=true" in said
    assert " MB in " in said
    assert "merged" not in said


def test_qlora_is_said(tiny, adapter, tmp_path, capsys):
    trained = shutil.copytree(adapter("v2_6"), tmp_path / "adapter")
    (trained / "run.yaml").write_text("base: {family: v2_6}\nflags: {q_lora: true}\n")
    assert main(flags(tiny("v2_6"), trained, tmp_path / "out", "--verify", "off")) == 0
    assert "merged into the unquantised base" in capsys.readouterr().out
    assert "q_lora" in (tmp_path / "out" / "training.yaml").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_that_differs_is_not_verified(tiny, adapter, tmp_path, capsys, monkeypatch, dtype):
    from finetune.export.lora_merge import MergedTensors

    real = MergedTensors.read
    monkeypatch.setattr(MergedTensors, "read", lambda self, name: real(self, name) * 1.5)
    assert main(flags(tiny("v2_6"), adapter("v2_6"), tmp_path / "out", "--infer_dtype", dtype)) == 3
    said = capsys.readouterr().out
    assert "verified=false" in said
    assert "do not use it" in said


def test_an_interrupted_export_leaves_nothing(tiny, adapter, tmp_path, monkeypatch):
    def fail(self: WeightFiles, folder: Path) -> int:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(WeightFiles, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        main(flags(tiny("v2_6"), adapter("v2_6"), tmp_path / "place" / "out"))
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize(
    ("command", "fails"), [("export", "finetune.export.merge_check.load_model"), ("verify", "peft.AutoPeftModel")]
)
def test_out_of_memory_is_said_with_what_needs_less(tiny, adapter, tmp_path, monkeypatch, command, fails):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(f"{fails}.from_pretrained" if command == "verify" else fails, full)
    folder, out = adapter("llama3_v2_5"), tmp_path / "out"
    words = [str(folder)] if command == "verify" else flags(tiny("llama3_v2_5"), folder, out)
    with pytest.raises(OutOfMemoryError) as raised:
        import_module(f"finetune.commands.{command}").main(words)
    device = "--device cpu" if command == "verify" else "--export_device cpu"
    assert str(raised.value).startswith("out of GPU memory: 2.0 GB asked for; ")
    assert str(raised.value).splitlines()[-1].strip() == device
    assert command == "verify" or weight_files(out), "the comparison runs out of memory, the model is there"


def test_what_is_in_the_way_is_kept(tiny, adapter, tmp_path, capsys):
    base, out = tiny("v2_6"), tmp_path / "out"
    shutil.copytree(base, out)
    words = flags(base, adapter("v2_6"), out, "--verify", "off")
    with pytest.raises(UserError, match="not empty"):
        main(words)
    assert main([*words, "--overwrite_output_dir", "true"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert main([*words, "--overwrite_output_dir"]) == 0
    (out / "export.yaml").unlink()
    (out / "checkpoint-5").mkdir()
    with pytest.raises(UserError, match="contains more than a model"):
        main([*words, "--overwrite_output_dir"])
    with pytest.raises(UserError, match="which is read"):
        main(flags(base, adapter("v2_6"), base, "--overwrite_output_dir"))
    assert tensors(base)


def test_wrong_flags_are_refused(tiny, adapter, tmp_path, monkeypatch):
    out, one = tmp_path / "out", adapter("v2_6")
    with pytest.raises(UserError, match="safetensors only"):
        main(flags(None, one, out, "--export_legacy_format", "true"))
    with pytest.raises(UserError, match="export_hub_model_id"):
        main(flags(None, one, out, "--push_to_hub", "true"))
    with pytest.raises(UserError, match="model_name_or_path"):
        main(flags(None, None, out))
    with pytest.raises(UserError, match=r"no adapter_config.json"):
        main(flags(None, tiny("v2_6"), out))
    with pytest.raises(UserError, match="does not fit"):
        main(flags(tiny("v4_5"), one, out))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="GB free"):
        main(flags(None, one, out))
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_asked_for_is_uploaded(tiny, adapter, tmp_path, capsys, monkeypatch):
    sent = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda _, name, **more: sent.append((name, more)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda _, **more: sent.append(more))
    words = flags(None, adapter("v2_6"), tmp_path / "out", "--verify", "off", "--export_hub_model_id", "me/tuned")
    assert main(words) == 0
    assert sent == []
    assert "nothing was uploaded" in capsys.readouterr().out
    assert main([*words, "--overwrite_output_dir", "--push_to_hub", "true"]) == 0
    assert sent == [
        ("me/tuned", {"private": True, "exist_ok": True}),
        {"repo_id": "me/tuned", "folder_path": tmp_path / "out"},
    ]


def test_the_published_yaml(tiny, adapter, tmp_path, capsys):
    """LLaMA-Factory's merge file, its paths replaced."""
    text = f"""### model
model_name_or_path: {tiny("v4_5")}
adapter_name_or_path: {adapter("v4_5")}
template: minicpm_v
finetuning_type: lora
trust_remote_code: true

### export
export_dir: {tmp_path / "out"}
export_size: 2
export_device: cpu
export_legacy_format: false
"""
    (tmp_path / "merge.yaml").write_text(text)
    assert main([str(tmp_path / "merge.yaml"), "--verify", "off"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert folders.RECORD in {path.name for path in (tmp_path / "out").iterdir()}


def test_what_a_second_adapter_replaces_is_said(tiny, tmp_path, capsys):
    """LoRA of two adapters adds up; modules trained in full and biases of the first are lost."""
    base = tiny("v2_6")
    # "all": the oldest peft saves no biases for "lora_only".
    options = {"modules_to_save": ["resampler"], "bias": "all"}
    both = [save(make_adapter(base, "v2_6", seed, **options), tmp_path / str(seed)) for seed in (1, 2)]
    out = tmp_path / "out"
    words = ["--model_name_or_path", str(base), "--infer_dtype", "float32", "--export_dir", str(out)]
    assert main([*words, "--adapter_name_or_path", ",".join(map(str, both))]) == 0
    printed = capsys.readouterr().out
    assert f"warning    {both[1]} replaces" in printed
    assert "llm.model.layers.0.self_attn.q_proj.bias" in printed
    merged = load_file(out / "model.safetensors")
    last = put_adapter(load_model(base, dtype="float32"), both[1]).merge_and_unload().state_dict()
    for name in ("resampler.query", "llm.model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(merged[name], last[name])
    assert not torch.equal(*(tensors["llm.model.layers.0.self_attn.q_proj.weight"] for tensors in (merged, last)))
    plain = [save(make_adapter(base, "v2_6", seed), tmp_path / f"plain-{seed}") for seed in (1, 2)]
    words[-1] = str(tmp_path / "third")
    assert main([*words, "--verify", "off", "--adapter_name_or_path", ",".join(map(str, plain))]) == 0
    assert "replaces" not in capsys.readouterr().out
