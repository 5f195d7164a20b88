"""Loading and saving of model folders; errors for incomplete ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from visual_batch import FAMILIES, GOLDEN, OMNI, TINY, Row, make_batch, prompt, small_model

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.families import UnknownFamilyError
from finetune.model_folders.checkpoint_folder import resolve_folder
from finetune.models import CheckpointError, MiniCPMO, MiniCPMOConfig, MiniCPMV, MiniCPMVConfig, load_model

ROWS: list[Row] = [(3, [(4, 6)], 5), (6, [], 3), (2, [(3, 3)], 4)]
TOKENIZERS = {"v2_0": "minicpm", "llama3_v2_5": "llama3"}
REMOTE = {
    "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
    "AutoModel": "modeling_minicpmv.MiniCPMV",
    "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
}


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    """A writable copy of a recorded model, without the cases."""

    def make(family: str) -> Path:
        ignore = shutil.ignore_patterns("cases.*")
        return Path(shutil.copytree(GOLDEN / "forward" / family, tmp_path / family, ignore=ignore))

    return make


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trust", [None, True, False])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_auto_classes_need_no_remote_code(copy_of: Callable, family: str, trust: bool | None, auto: type) -> None:
    """The folder names python files, as published ones do, and does not contain them."""
    folder = copy_of(family)
    edit_config(folder, auto_map=REMOTE)
    options = {} if trust is None else {"trust_remote_code": trust}
    config, model_class = (MiniCPMOConfig, MiniCPMO) if family in OMNI else (MiniCPMVConfig, MiniCPMV)
    assert type(AutoConfig.from_pretrained(folder, **options)) is config
    assert type(auto.from_pretrained(folder, **options)) is model_class


def test_dtype_of_the_file_and_of_the_caller(copy_of: Callable) -> None:
    folder = copy_of("llama3_v2_5")
    assert {p.dtype for p in MiniCPMV.from_pretrained(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in MiniCPMV.from_pretrained(folder, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("loader", [MiniCPMV, AutoModel])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("resampler.query"), "1 tensors are missing in the file: resampler.query"),
        (lambda w: w.update({"apm.conv1.weight": torch.zeros(2)}), "unknown to the model: apm.conv1.weight"),
        (lambda w: w.update({"resampler.query": torch.zeros(7, 256)}), r"resampler.query.*\b7\b.*\b8\b"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_errors(copy_of: Callable, loader: type, change: Callable, message: str) -> None:
    folder = copy_of("llama3_v2_5")
    edit_weights(folder, change)
    with pytest.raises((CheckpointError, RuntimeError), match="(?s)" + message):
        loader.from_pretrained(folder)


def test_mismatched_sizes_only_when_asked_for(copy_of: Callable) -> None:
    folder = copy_of("llama3_v2_5")
    edit_weights(folder, lambda w: w.update({"llm.lm_head.weight": torch.zeros(150, 256)}))
    loaded: Any = MiniCPMV.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    model, info = loaded
    assert isinstance(model, MiniCPMV)
    assert len(info["mismatched_keys"]) == 1
    edit_weights(folder, lambda w: w.pop("resampler.query"))
    with pytest.raises(CheckpointError, match="resampler.query"):
        MiniCPMV.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_tables_of_older_files_are_allowed(copy_of: Callable) -> None:
    folder = copy_of("llama3_v2_5")
    edit_weights(folder, lambda w: w.update({"resampler.pos_embed": torch.zeros(70, 70, 256)}))
    assert isinstance(MiniCPMV.from_pretrained(folder), MiniCPMV)


def test_position_table_of_v2_0_is_not_optional(copy_of: Callable) -> None:
    folder = copy_of("v2_0")
    edit_weights(folder, lambda w: w.pop("resampler.pos_embed"))
    with pytest.raises(CheckpointError, match=r"resampler\.pos_embed"):
        MiniCPMV.from_pretrained(folder)


@pytest.mark.parametrize("loader", [MiniCPMV.from_pretrained, AutoModel.from_pretrained, load_model])
def test_folders_that_are_no_checkpoint(copy_of: Callable, loader: Callable) -> None:
    folder = copy_of("v2_0")
    (folder / "model.safetensors").rename(folder / "model.txt")
    with pytest.raises(CheckpointError, match=r"no weights: model\*\.safetensors is missing"):
        loader(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only as pytorch_model\.bin.*convert"):
        loader(folder)


@pytest.mark.parametrize("loader", [MiniCPMV.from_pretrained, AutoModel.from_pretrained, load_model])
@pytest.mark.parametrize(
    ("files", "second"),
    [
        (("model.safetensors", "model.safetensors.index.json"), r"model\.safetensors\.index\.json"),
        (("model.safetensors", "pytorch_model.bin"), r"pytorch_model\.bin"),
        (("model.safetensors", "pytorch_model.bin.index.json"), r"pytorch_model\.bin\.index\.json"),
    ],
)
def test_two_sets_of_weights(copy_of: Callable, loader: Callable, files: tuple[str, str], second: str) -> None:
    """As two saves into one folder leave them: transformers would take one, and the user may mean the other."""
    folder = copy_of("v2_0")
    (folder / files[1]).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"two sets of weights, model\.safetensors and {second}, which may"):
        loader(folder)
    (folder / files[1]).unlink()
    MiniCPMV.from_pretrained(folder)


def test_what_load_model_says_about_wrong_paths(tmp_path: Path, copy_of: Callable) -> None:
    with pytest.raises(CheckpointError, match="absent: no such folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json is missing \(found: nothing\)"):
        load_model(tmp_path)
    folder = copy_of("v2_0")
    with pytest.raises(CheckpointError, match="is a file"):
        load_model(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"no tokenizer: it needs one of tokenizer\.json"):
        load_model(folder)
    edit_config(folder, version=9.9)
    with pytest.raises(UnknownFamilyError, match=r"version=9\.9"):
        load_model(folder)


def test_hub_ids_only_from_the_cache_when_offline() -> None:
    with pytest.raises(CheckpointError, match="is no folder in"):
        load_model("nobody/nothing-of-this-name")


@pytest.mark.parametrize("family", TINY)
def test_required_tokens(copy_of: Callable, family: str) -> None:
    folder = copy_of(family)
    for file in (GOLDEN / "encode" / "tokenizers" / TOKENIZERS[family]).iterdir():
        shutil.copy(file, folder)
    with pytest.raises(CheckpointError, match=r"has id \d+ .* 160 embeddings"):
        load_model(folder)  # the recorded model has fewer embeddings than this tokenizer
    assert isinstance(load_model(folder, tokenizer_required=False), MiniCPMV)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<slice>"]
    data["model"]["vocab"].pop("<slice>", None)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("added_tokens_decoder", "additional_special_tokens")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(CheckpointError, match="does not know <slice>"):
        load_model(folder)


@pytest.mark.parametrize("family", TINY)
def test_load_model_on_a_complete_folder(tiny: Callable[[str], Path], family: str) -> None:
    model = load_model(tiny(family), dtype=torch.float32, attn_implementation="eager")
    assert isinstance(model, MiniCPMV)
    assert model.dtype == torch.float32
    assert model.llm.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_keeps_names_values_and_layout(copy_of: Callable, tmp_path: Path, family: str) -> None:
    folder = copy_of(family)
    edit_config(folder, auto_map=REMOTE, rope_scaling=None, torch_dtype="bfloat16")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    shards = sorted((tmp_path / "saved").glob("model-*.safetensors"))
    assert len(shards) > 1
    saved = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    original = load_file(folder / "model.safetensors")
    assert set(saved) == set(original)
    assert all(torch.equal(saved[name], tensor.float()) for name, tensor in original.items())
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (after.pop("dtype"), before.pop("torch_dtype")) == ("float32", "bfloat16")
    after.pop("transformers_version")
    assert after == before
    assert AutoModel.from_pretrained(tmp_path / "saved").config.family.name == family


def test_configuration_keeps_a_scaled_rope_flat_and_hands_it_on() -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    config = json.loads((GOLDEN / "forward" / "llama3_v2_5" / "config.json").read_text())
    read = MiniCPMVConfig(**config | {"rope_scaling": rope})
    assert read.to_dict()["rope_scaling"] == rope
    assert read.to_dict()["rope_theta"] == config["rope_theta"]
    with torch.device("meta"):
        llm = MiniCPMV(read).llm
    assert dict(llm.config.rope_parameters or {}) == rope | {"rope_theta": config["rope_theta"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_new_networks_have_sensible_weights(family: str) -> None:
    """Built from a configuration: no parameter is left as it lay in memory."""
    config = AutoConfig.from_pretrained(GOLDEN / "forward" / family)
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    two = AutoModel.from_config(config)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.isfinite(a).all(), name
        assert a.abs().max() < 20, name
        assert torch.equal(a, b), name
        if "norm" in name or ".ln_" in name:
            assert (a == (1 if name.endswith("weight") else 0)).all(), name
        elif not name.endswith("bias"):
            assert a.std() > 0, name
    for name in one.config.family.fixed_parameters:
        recorded = load_file(GOLDEN / "forward" / family / "model.safetensors")[name]
        assert torch.allclose(one.get_parameter(name), recorded.float(), atol=1e-2)


def greedy(model: MiniCPMV) -> list[list[int]]:
    batch = make_batch(ROWS, model.query_num, side="left")
    return model.generate(**prompt(batch), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_device_maps(tmp_path: Path, family: str) -> None:
    expected = greedy(small_model(family))
    assert greedy(small_model(family, device_map="auto")) == expected
    assert greedy(small_model(family, device_map={"": "cpu"})) == expected
    media = [name for name, _ in small_model(family).named_children() if name != "llm"]
    for parts in (media, ["llm.model"]):
        device_map = {name: "cpu" for name in (*media, "llm.model", "llm.lm_head")}
        device_map |= dict.fromkeys(parts, "disk")
        model = small_model(family, device_map=device_map, offload_folder=tmp_path / parts[0])
        assert next(model.get_submodule(parts[0]).parameters()).device.type == "meta"
        assert greedy(model) == expected


def test_offloaded_loss(tmp_path: Path) -> None:
    """The loss reaches the output projection by itself; offloaded weights must be there then."""
    batch = make_batch(ROWS, 8)
    device_map = {"vpm": "cpu", "resampler": "cpu", "llm.model": "cpu", "llm.lm_head": "disk"}
    model = small_model("llama3_v2_5", device_map=device_map, offload_folder=tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(**batch).loss, small_model("llama3_v2_5")(**batch).loss)


def test_no_layer_is_split() -> None:
    for family in FAMILIES:
        kept = set(small_model(family)._no_split_modules or ())
        assert {"Resampler", "TemporalResampler"} <= kept
        assert kept & {f"{name}DecoderLayer" for name in ("Llama", "Granite", "Qwen2", "Qwen3")}
        assert kept & {"NavitLayer", "TimmBlock"}
        assert ("WhisperEncoderLayer" in kept) == ("AudioProjection" in kept) == (family in OMNI)


@pytest.mark.parametrize("family", FAMILIES)
def test_resized_embeddings(family: str, tmp_path: Path) -> None:
    model = small_model(family)
    batch = make_batch(ROWS, model.query_num)
    before = model(**batch).loss.item()
    old = model.llm.lm_head.weight.detach().clone()
    model.resize_token_embeddings(170, mean_resizing=False)
    assert model.config.vocab_size == model.llm.config.vocab_size == 170
    assert model.llm.model.embed_tokens.weight.shape == model.llm.lm_head.weight.shape == (170, 256)
    assert torch.equal(model.llm.lm_head.weight[:160], old)
    after = model(**batch)
    assert after.loss.item() >= before  # ten more classes
    after.loss.backward()
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.vocab_size == 170


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: edit_config(f, quantization_config={"quant_method": "bitsandbytes"}), "has quantization_config"),
        (lambda f: (f / "quant_config.json").write_text("{}"), "it has quant_config.json"),
        (lambda f: (f / "model.safetensors").rename(f / "Q4.gguf"), "its weights are Q4.gguf"),
        (
            lambda f: edit_weights(f, lambda w: w.update({"llm.model.layers.0.mlp.up_proj.qweight": torch.zeros(1)})),
            "has llm.model.layers.0.mlp.up_proj.qweight",
        ),
    ],
    ids=["bitsandbytes", "AWQ", "GGUF", "GPTQ"],
)
@pytest.mark.parametrize("loader", [AutoModel.from_pretrained, load_model, lambda folder: resolve_base(str(folder))])
def test_quantised_folders_are_refused(copy_of: Callable, loader: Callable, change: Callable, reason: str) -> None:
    folder = copy_of("v2_6")
    change(folder)
    with pytest.raises(CheckpointError, match=f"{reason}.*openbmb/MiniCPM-V-2_6"):
        loader(folder)


def test_weights_in_4_bit_beside_whole_ones_do_not_matter(copy_of: Callable) -> None:
    folder = copy_of("v2_6")
    (folder / "Q4.gguf").write_bytes(b"GGUF")
    assert isinstance(AutoModel.from_pretrained(folder), MiniCPMV)


def test_published_sliding_window_is_handed_on_and_stays_off() -> None:
    config = json.loads((GOLDEN / "forward" / "v2_6" / "config.json").read_text())
    published = {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28}
    read = MiniCPMVConfig(**config | published)
    assert MiniCPMV(read).llm.config.sliding_window is None
    read = MiniCPMVConfig(**config | published | {"use_sliding_window": True, "max_window_layers": 1})
    llm = MiniCPMV(read).llm
    assert llm.config.sliding_window == 131072
    assert llm.config.layer_types == ["full_attention", "sliding_attention"]


def test_long_rope_and_embedding_scale_come_from_the_json() -> None:
    config = json.loads((GOLDEN / "forward" / "v4_0" / "config.json").read_text())
    factors = {"long_factor": [float(i + 2) for i in range(32)], "short_factor": [1.5] * 32}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, **factors}
    torch.manual_seed(0)
    plain = MiniCPMV(MiniCPMVConfig(**config)).eval()
    scaled = MiniCPMV(MiniCPMVConfig(**config | {"rope_scaling": rope, "scale_emb": 12})).eval()
    assert plain.embedding_scale == 1
    assert scaled.embedding_scale == 12
    base = plain.llm.model.rotary_emb.inv_freq
    assert torch.allclose(scaled.llm.model.rotary_emb.inv_freq, base / 1.5)
    with torch.no_grad():  # beyond the original length the other factors apply
        scaled(input_ids=torch.ones(1, 80, dtype=torch.int64), position_ids=torch.arange(80)[None])
    assert torch.allclose(scaled.llm.model.rotary_emb.inv_freq, base / torch.tensor(factors["long_factor"]))


def test_speech_output_is_passed_over_and_only_that(copy_of: Callable) -> None:
    folder = copy_of("o2_6")
    edit_weights(folder, lambda w: w.update({"tts.emb_text.weight": torch.zeros(3)}))
    model = load_model(folder, tokenizer_required=False)
    assert not any(name.startswith("tts") for name, _ in model.named_parameters())
    edit_weights(folder, lambda w: w.update({"ttx.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"unknown to the model: ttx\.weight"):
        load_model(folder, tokenizer_required=False)


def test_embeddings_can_be_replaced() -> None:
    model = small_model("llama3_v2_5")
    table, head = torch.nn.Embedding(12, 256), torch.nn.Linear(256, 12, bias=False)
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is table is model.llm.model.embed_tokens
    assert model.get_output_embeddings() is head is model.llm.lm_head


def test_a_folder_that_is_missing_names_the_nearest(tmp_path):
    for name in ("saves/minicpmv4_5/lora/sft", "saves/other/full"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no such folder .*; the nearest that exist are \S+minicpmv4_5/lora/sft"):
        resolve_folder(str(tmp_path / "saves/minicpm_v4_5/lora/sft"))
    with pytest.raises(CheckpointError, match=r"no such folder \(looked in [^;]*$"):
        resolve_folder(str(tmp_path / "x/y/z"))
