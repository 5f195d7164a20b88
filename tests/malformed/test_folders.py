"""Model and adapter folders in which one file is not what it should be: every command says so in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import linked, put
from safetensors.torch import load_file, save_file

from finetune.utils.errors import CheckpointError

Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def base(tiny) -> Path:
    return tiny("llama3_v2_5")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from made_adapters import make_adapter, save

    model = make_adapter(base, "llama3_v2_5")
    # As training writes it: any user's peft finds the class.
    model.peft_config["default"].auto_mapping = {"base_model_class": "AutoModel", "parent_library": "transformers"}
    return save(model, tmp_path_factory.mktemp("adapter") / "lora")


NOT_OBJECTS: dict[str, bytes] = {
    "is a list": b"[]",
    "is null": b"null",
    "is the number 5": b"5",
    "is a text": b'"a"',
    "is empty": b"",
    "is not valid JSON": b'{"a": ',
    "is UTF-16": '{"a": 1}'.encode("utf-16"),
    "is UTF-8 with a byte order mark": b"\xef\xbb\xbf{}",
    "is no text in UTF-8": b'{"a": "\xff"}',
    "is nested too deeply": b'{"a": ' + b"[" * 100_000,
    "has a number that cannot be read": b'{"a": ' + b"9" * 5000 + b"}",
}
FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.json",
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("said", NOT_OBJECTS)
def test_files_that_hold_no_object(said: str, file: str, base: Path, records: Path, refused, tmp_path: Path) -> None:
    folder = linked(base, tmp_path / "model")
    put(folder / file, NOT_OBJECTS[said])
    line = refused("check", "--model", str(folder), "--data", str(records))
    assert str(folder / file) in line
    assert said in line


def _nested(keys: str, value: Any) -> dict[str, Any]:
    for key in reversed(keys.split(".")):
        value = {key: value}
    return value


def _merged(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A change of keys inside of objects; an empty object stands for itself."""
    known = {key: values[key] for key in change if isinstance(values.get(key), dict)}
    inside = {key: _merged(known[key], change[key]) for key in known if isinstance(change[key], dict) and change[key]}
    return {**values, **change, **inside}


COUNTS = ("big", 0, -1, 2.5, True, [], {}, 10**12)
CONFIG: dict[str, tuple[Any, ...]] = {
    "hidden_size": (*COUNTS, None, 130),
    "num_attention_heads": (*COUNTS, None, 3),
    "num_hidden_layers": (*COUNTS, None),
    "vocab_size": (*COUNTS, None),
    "num_key_value_heads": (*COUNTS, 3),
    "intermediate_size": COUNTS,
    "query_num": COUNTS,
    "patch_size": COUNTS,
    "image_size": COUNTS,
    "max_position_embeddings": ("long", 0),
    "rope_theta": ("x", 0, -1),
    "rope_scaling": (
        "x",
        5,
        [],
        {"type": "x"},
        {"rope_type": "x", "factor": 2},
        {"rope_type": "linear", "factor": "2"},
    ),
    "rms_norm_eps": ("x", 0, -1, 5),
    "torch_dtype": ("float7", 5, [], "int8"),
    "dtype": ("float7", 32),
    "hidden_act": ("x", 5, []),
    "tie_word_embeddings": ("yes", 1),
    "slice_mode": ("yes", 1),
    "slice_config": ("x", 5, []),
    "vision_config": ("x", 5, [], None),
    "architectures": ("MiniCPMV", 5, [5]),
    "model_type": (5, []),
    "eos_token_id": ("x", -1, [], ["x"]),
    "attention_dropout": ("x", 2, -1),
    "vision_config.hidden_size": (*COUNTS, None, 65),
    "vision_config.num_attention_heads": (0, None, 3),
    "vision_config.patch_size": ("x", 0),
    "slice_config.max_slice_nums": ("x", 0, -1),
    "slice_config.scale_resolution": ("x", 0),
}
PROCESSOR: dict[str, tuple[Any, ...]] = {
    "max_slice_nums": COUNTS,
    "scale_resolution": COUNTS,
    "patch_size": COUNTS,
    "image_feature_size": COUNTS,
    "norm_mean": ("x", 0.5, [], [0.5, 0.5], [0.5, 0.5, "x"]),
    "norm_std": ("x", 0.5, [], [0.5, 0.5, 0], [0.5, 0.5, -1], [0.5, 0.5, 0.5, 0.5]),
    "slice_mode": ("yes", 1),
    "use_image_id": ("yes", 0),
}
TOKENIZER_CONFIG: dict[str, tuple[Any, ...]] = {
    "tokenizer_class": (5, [], {}),
    "chat_template": (5, {}, [5], [{"name": "a"}], True),
    "added_tokens_decoder": (5, [], "x", {"1": "x"}, {"a": {"content": "x"}}, {"1": {}}),
    "eos_token": (5, [], {}, {"text": "x"}),
    "bos_token": (5, True),
    "pad_token": (5, ["x"]),
    "model_max_length": ("x", 0, []),
    "add_bos_token": ("yes", 1),
}
GENERATION: dict[str, tuple[Any, ...]] = {
    "temperature": ("x", -1, []),
    "top_p": ("x", 2, -1),
    "top_k": ("x", -1, 2.5),
    "do_sample": ("yes", 1),
    "eos_token_id": ("x", -1),
    "max_new_tokens": ("x", 0),
    "repetition_penalty": (0, "x"),
}
OTHERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "config.json": CONFIG,
    "preprocessor_config.json": PROCESSOR,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "generation_config.json": GENERATION,
    "special_tokens_map.json": {"eos_token": (5, []), "pad_token": (True, {})},
    "added_tokens.json": {"<x>": ("x", -1, 2.5)},
    "tokenizer.json": {"model": (5, None, []), "added_tokens": (5, ["x"], {})},
    "chat_template.json": {"chat_template": (5, [])},
}


def values() -> Iterator[Any]:
    for file, table in OTHERS.items():
        for key, wrong in table.items():
            yield from (pytest.param(file, key, value, id=f"{file}-{key}-{value!r}") for value in wrong)


@pytest.mark.parametrize(("file", "key", "value"), values())
def test_values(file: str, key: str, value: Any, base: Path, records: Path, refused, tmp_path: Path) -> None:
    folder = linked(base, tmp_path / "model")
    found = json.loads((folder / file).read_text(encoding="utf-8")) if (folder / file).is_file() else {}
    put(folder / file, _merged(found, _nested(key, value)))
    line = refused("check", "--model", str(folder), "--data", str(records))
    assert str(folder / file) in line
    assert key.rpartition(".")[2] in line


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Edit:
    def edit(folder: Path) -> None:
        name = next(name for name in ("model.safetensors", "adapter_model.safetensors") if (folder / name).is_file())
        change(tensors := load_file(folder / name))
        (folder / name).unlink()
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return edit


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if "q_proj" in name)


def poison(value: float, count: int | None = None) -> Edit:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first(tensors)].view(-1)[:count] = value

    return weights(change)


def retype(kind: torch.dtype) -> Edit:
    return weights(lambda tensors: tensors.update({first(tensors): tensors[first(tensors)].to(kind)}))


def cut(name: str, size: int) -> Edit:
    return lambda folder: put(folder / name, (folder / name).read_bytes()[:size])


def write(name: str, content: Any) -> Edit:
    return lambda folder: put(folder / name, content)


def shard(places: Any, *, kept: str = "model-00001-of-00002.safetensors") -> Edit:
    """The weights under the name of a shard, beside an index."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / kept)
        if places is not None:
            put(folder / "model.safetensors.index.json", places)

    return edit


def several(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for each in edits:
            each(folder)

    return edit


HALVES = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
WEIGHTS: dict[str, tuple[Edit, str]] = {
    "one NaN": (poison(float("nan"), 1), "q_proj.weight has values that are not finite"),
    "a tensor of NaN": (poison(float("nan")), "q_proj.weight has values that are not finite"),
    "infinity": (poison(float("inf"), 1), "not finite"),
    "minus infinity": (poison(-float("inf"), 1), "not finite"),
    "int8": (retype(torch.int8), "is of type I8; weights are floating point"),
    "int64": (retype(torch.int64), "is of type I64"),
    "uint8": (retype(torch.uint8), "is of type U8"),
    "bool": (retype(torch.bool), "is of type BOOL"),
    "cut": (cut("model.safetensors", 1000), "truncated or not a safetensors file"),
    "empty": (cut("model.safetensors", 0), "truncated or not a safetensors file"),
    "a page of HTML": (write("model.safetensors", "<html>" * 40), "truncated or not a safetensors file"),
    "a pointer of Git LFS": (
        write("model.safetensors", "version https://git-lfs"),
        "truncated or not a safetensors file",
    ),
    "a tensor is missing": (weights(lambda tensors: tensors.__delitem__(first(tensors))), "missing in the file"),
    "a tensor too many": (weights(lambda tensors: tensors.update(x=torch.zeros(1))), "unknown to the model: x"),
    "another shape": (weights(lambda tensors: tensors.update({first(tensors): torch.zeros(2, 2)})), "another shape"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model*.safetensors is missing"),
    "no index": (shard(None), "neither model.safetensors nor model.safetensors.index.json"),
    "index lacks a shard": (shard({"weight_map": HALVES}), "lacks model-00002-of-00002.safetensors of the 2"),
    "index is no object": (shard([]), "is a list"),
    "index is cut": (shard(b'{"weight_map": {'), "is not valid JSON"),
    "index without map": (shard({"metadata": {}}), "weight_map is null"),
    "index of text": (shard({"weight_map": "x"}), 'weight_map is "x"'),
    "index of numbers": (shard({"weight_map": {"a": 5}}), "weight_map is"),
    "index is empty": (shard({"weight_map": {}}), "weight_map is {}"),
    "index leaves the folder": (shard({"weight_map": {"a": "../../x.safetensors"}}), "which is not a file beside it"),
    "index names a root": (shard({"weight_map": {"a": "/etc/passwd"}}), "which is not a file beside it"),
    "index names a folder below": (shard({"weight_map": {"a": "x/y.safetensors"}}), "which is not a file beside it"),
    "vocabulary of another size": (
        lambda folder: put(
            folder / "config.json", json.loads((folder / "config.json").read_text()) | {"vocab_size": 700}
        ),
        "another shape",
    ),
    "hidden size of another model": (
        lambda folder: put(
            folder / "config.json", json.loads((folder / "config.json").read_text()) | {"hidden_size": 256}
        ),
        "another shape",
    ),
    "nothing of the vision tower": (
        lambda folder: put(
            folder / "config.json", json.loads((folder / "config.json").read_text()) | {"vision_config": {}}
        ),
        "the model cannot be built from its files (KeyError: 'hidden_size')",
    ),
    "template that fails": (
        lambda folder: put(
            folder / "tokenizer_config.json",
            json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": "{{ 1 / 0 }}"},
        ),
        "cannot render user, assistant, user (ZeroDivisionError",
    ),
    "template with a slip": (
        lambda folder: put(
            folder / "tokenizer_config.json",
            json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": "{% for %}"},
        ),
        "TemplateSyntaxError",
    ),
    "template of numbers": (
        lambda folder: put(
            folder / "tokenizer_config.json",
            json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages + 5 }}"},
        ),
        "TypeError",
    ),
    "tokenizer of another kind": (
        lambda folder: put(folder / "tokenizer.json", {"model": {"type": "x"}}),
        "the tokenizer of",
    ),
    "tokenizer without words": (
        lambda folder: put(folder / "tokenizer.json", {"model": {"type": "BPE", "vocab": 5, "merges": []}}),
        "the tokenizer of",
    ),
    "end of text of another tokenizer": (
        lambda folder: put(
            folder / "tokenizer_config.json",
            json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<gone>"},
        ),
        'eos_token is "<gone>", which tokenizer.json does not have',
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "unknown generation": (write("config.json", {"model_type": "x"}), "unknown checkpoint"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "no config.json"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, base: Path, refused, tmp_path: Path, one_thread: None) -> None:
    folder = linked(base, tmp_path / "model")
    edit, said = WEIGHTS[name]
    edit(folder)
    line = refused("selfcheck", str(folder), "--device", "cpu")
    assert said in line
    assert str(folder) in line or name == "unknown generation"


def configured(**change: Any) -> Edit:
    """adapter_config.json with other values; a value of ... takes a key away."""

    def edit(folder: Path) -> None:
        found = {**json.loads((folder / "adapter_config.json").read_text()), **change}
        put(folder / "adapter_config.json", {key: value for key, value in found.items() if value is not ...})

    return edit


ADAPTERS: dict[str, tuple[Edit, str]] = {
    **{said: (write("adapter_config.json", content), said) for said, content in NOT_OBJECTS.items()},
    "base number": (configured(base_model_name_or_path=5), "base_model_name_or_path is 5"),
    "base list": (configured(base_model_name_or_path=[]), "base_model_name_or_path is []"),
    "base null": (configured(base_model_name_or_path=None), "names no base model"),
    "base gone": (configured(base_model_name_or_path="/gone/for/ever"), "/gone/for/ever of adapter"),
    "PREFIX_TUNING": (configured(peft_type="PREFIX_TUNING"), 'peft_type is "PREFIX_TUNING"'),
    "peft_type null": (configured(peft_type=None), "peft_type is null"),
    "peft_type list": (configured(peft_type=["LORA"]), "peft_type is"),
    "r text": (configured(r="four"), 'r is "four"; it should be a whole number of at least 1'),
    "r 0": (configured(r=0), "r is 0"),
    "r -1": (configured(r=-1), "r is -1"),
    "r null": (configured(r=None), "r is null"),
    "r list": (configured(r=[4]), "r is [4]"),
    "r of another adapter": (configured(r=8), "is of rank 2, adapter_config.json beside it says 8"),
    "alpha text": (configured(lora_alpha="x"), 'lora_alpha is "x"'),
    "alpha null": (configured(lora_alpha=None), "lora_alpha is null"),
    "alpha 0": (configured(lora_alpha=0), "lora_alpha is 0"),
    "alpha NaN": (configured(lora_alpha=float("nan")), "lora_alpha is NaN"),
    "dropout 2": (configured(lora_dropout=2), "lora_dropout is 2"),
    "dropout text": (configured(lora_dropout="x"), 'lora_dropout is "x"'),
    "targets number": (configured(target_modules=5), "target_modules is 5"),
    "targets empty": (configured(target_modules=[]), "target_modules is []"),
    "targets of numbers": (configured(target_modules=[5]), "target_modules is [5]"),
    "targets no expression": (configured(target_modules="(("), 'target_modules is "(("'),
    "targets null": (configured(target_modules=None), "neither target_modules nor target_parameters"),
    "targets missing": (configured(target_modules=...), "neither target_modules nor target_parameters"),
    "targets nothing": (configured(target_modules=["nothing"]), "cannot be loaded onto its base"),
    "parameters text": (configured(target_parameters="x"), 'target_parameters is "x"'),
    "saved modules text": (configured(modules_to_save="x"), 'modules_to_save is "x"'),
    "ranks list": (configured(rank_pattern=[1]), "rank_pattern is [1]"),
    "ranks text": (configured(rank_pattern={"q_proj": "x"}), "rank_pattern is"),
    "ranks 0": (configured(rank_pattern={"q_proj": 0}), "rank_pattern is"),
    "ranks no expression": (configured(rank_pattern={"((": 4}), "rank_pattern is"),
    "scales list": (configured(alpha_pattern=[1]), "alpha_pattern is [1]"),
    "scales text": (configured(alpha_pattern={"q_proj": "x"}), "alpha_pattern is"),
    "bias": (configured(bias="some"), 'bias is "some"'),
    "bias number": (configured(bias=5), "bias is 5"),
    "layers text": (configured(layers_to_transform="x"), 'layers_to_transform is "x"'),
    "layers negative": (configured(layers_to_transform=[-1]), "layers_to_transform is [-1]"),
    "replication": (configured(layer_replication=[[0]]), "layer_replication is [[0]]"),
    "replication text": (configured(layer_replication="x"), 'layer_replication is "x"'),
    "mapping text": (configured(auto_mapping="x"), 'auto_mapping is "x"'),
    "rslora text": (configured(use_rslora="yes"), 'use_rslora is "yes"'),
    "dora number": (configured(use_dora=1), "use_dora is 1"),
    "fan_in text": (configured(fan_in_fan_out="x"), 'fan_in_fan_out is "x"'),
    "start number": (configured(init_lora_weights=5), "init_lora_weights is 5"),
    "start pissa": (configured(init_lora_weights="pissa"), "changes the weights of the base"),
    "start pissa_niter": (configured(init_lora_weights="pissa_niter_16"), "changes the weights of the base"),
    "start olora": (configured(init_lora_weights="olora"), "changes the weights of the base"),
    "weights missing": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "not adapter_model.safetensors",
    ),
    "weights cut": (cut("adapter_model.safetensors", 100), "truncated or not a safetensors file"),
    "weights empty": (cut("adapter_model.safetensors", 0), "truncated or not a safetensors file"),
    "weights NaN": (poison(float("nan")), "not finite"),
    "weights infinite": (poison(float("inf"), 1), "not finite"),
    "weights int8": (retype(torch.int8), "is of type I8"),
    "a tensor is missing": (weights(lambda tensors: tensors.__delitem__(first(tensors))), "lacks tensors"),
    "a tensor too many": (weights(lambda tensors: tensors.update(x=torch.zeros(1))), "does not describe: x"),
    "another shape": (weights(lambda tensors: tensors.update({first(tensors): torch.zeros(2, 7)})), "does not fit"),
}


@pytest.fixture(scope="module")
def network(base: Path) -> Any:
    from finetune.models import load_model

    return load_model(base, device_map={"": "cpu"})


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, adapter: Path, network: Any, tmp_path: Path, one_thread: None) -> None:
    """Put on a loaded network, as every command that takes an adapter does."""
    from finetune.models.adapters import put_adapter
    from finetune.models.loading import base_of

    folder = linked(adapter, tmp_path / "lora")
    edit, said = ADAPTERS[name]
    edit(folder)

    def use() -> None:
        base_of(folder)
        put_adapter(network, folder, f"adapter_{len(name)}")

    with pytest.raises(CheckpointError) as error:
        use()
    message = str(error.value)
    assert said in message
    assert str(folder) in message
    assert "\n" not in message


WAYS = {
    "evaluate": ["--model", "ADAPTER", "--data", "DATA", "--device", "cpu", "--out", "OUT"],
    "chat": ["--adapter", "ADAPTER", "--device", "cpu"],
    "export": ["--adapter_name_or_path", "ADAPTER", "--export_dir", "OUT"],
    "verify": ["ADAPTER", "--device", "cpu"],
    "selfcheck": ["BASE", "--adapter", "ADAPTER", "--device", "cpu"],
}
EVERYWHERE = ("is a list", "is UTF-16", "r text", "r of another adapter", "weights cut", "weights NaN", "start pissa")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_way_in(
    way: str, name: str, adapter: Path, base: Path, records: Path, refused, tmp_path: Path, one_thread: None
) -> None:
    folder = linked(adapter, tmp_path / "lora")
    edit, said = ADAPTERS[name]
    edit(folder)
    places = {"ADAPTER": folder, "BASE": base, "DATA": records, "OUT": tmp_path / "out"}
    line = refused(way, *(str(places.get(word, word)) for word in WAYS[way]))
    assert said in line
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_an_adapter_that_is_gone_on_from(name: str, adapter: Path, network: Any, tmp_path: Path) -> None:
    from finetune.arguments.model import LoraArguments
    from finetune.families import by_name
    from finetune.training.lora import add_lora

    folder = linked(adapter, tmp_path / "lora")
    edit, said = ADAPTERS[name]
    edit(folder)
    lora = LoraArguments(lora_weight_path=str(folder))
    with pytest.raises(CheckpointError, match=said.split(";")[0].replace("(", r"\(")):
        add_lora(network, by_name("llama3_v2_5"), [], lora)


BASES = {
    "plan": ["MODEL"],
    "chat": ["--model", "MODEL", "--device", "cpu"],
    "evaluate": ["--model", "MODEL", "--data", "DATA", "--device", "cpu", "--out", "OUT"],
    "export": ["--model_name_or_path", "MODEL", "--export_dir", "OUT"],
    "verify": ["MODEL", "--device", "cpu"],
    "selfcheck": ["MODEL"],
}


@pytest.mark.parametrize("way", BASES)
@pytest.mark.parametrize("said", ["is a list", "is null", "is UTF-16"])
def test_config_everywhere(said: str, way: str, base: Path, records: Path, refused, tmp_path: Path) -> None:
    folder = linked(base, tmp_path / "model")
    put(folder / "config.json", NOT_OBJECTS[said])
    places = {"MODEL": folder, "DATA": records, "OUT": tmp_path / "out"}
    assert said in refused(way, *(str(places.get(word, word)) for word in BASES[way]))


@pytest.mark.parametrize("way", [way for way in BASES if way != "plan"])
@pytest.mark.parametrize("name", ["one NaN", "int8", "index lacks a shard"])
def test_weights_everywhere(
    name: str, way: str, base: Path, records: Path, refused, tmp_path: Path, one_thread: None
) -> None:
    folder = linked(base, tmp_path / "model")
    edit, said = WEIGHTS[name]
    edit(folder)
    places = {"MODEL": folder, "DATA": records, "OUT": tmp_path / "out"}
    assert said in refused(way, *(str(places.get(word, word)) for word in BASES[way]))


def test_files_that_may_not_be_read(
    base: Path, records: Path, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a user whom the permissions leave out; the tests may run as one whom nothing stops."""
    folder = linked(base, tmp_path / "model")
    before = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "tokenizer_config.json":
            raise PermissionError(13, os.strerror(13))
        return before(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    line = refused("check", "--model", str(folder), "--data", str(records))
    assert "tokenizer_config.json cannot be read (Permission denied)" in line
