"""What is served is what was trained: servers of full, merged and adapted models, compared with the models themselves.

The adapter is of every part; "merged" and "adapter" are what ``export`` writes, and are compared with that: the export
compares it with what was trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import networks
import pytest
import servers
from folders import linked, put
from made_adapters import make_adapter, save
from runs import command
from served_rows import Cell, Row

APART = ("llama3_v2_5", "v2_6", "o2_6", "v4_0", "v4_5", "o4_5")
FAMILIES = (*APART, *networks.NATIVE)
# llama.cpp at the tested commit knows no 4.7.
CONVERTED = (*APART, "v4_6")
# vLLM on CPU computes the linear attention of these in bfloat16 only.
HALF = networks.NATIVE


def vllm_dtype(family: str) -> str:
    return "bfloat16" if family in HALF else "float32"


def check(row: Row, family: str) -> None:
    if family == "llama3_v2_5" and row.engine == "vllm":
        # findings/transformers_own_init_loses_pre_tokenizer.sh
        assert row.equal == 0
        return
    assert row.equal == row.prompts
    if family == "llama3_v2_5":
        # llama.cpp gives the patches positions in two dimensions, the published code in one: pictures look otherwise.
        assert float(row.first_token) > 1
        assert row.greedy < row.prompts
    elif row.engine == "vllm" and family not in HALF:
        assert float(row.first_token) < 1e-3
        assert row.greedy == row.prompts
    else:
        # In bfloat16 near ties of random weights turn, so that answers say nothing.
        assert float(row.first_token) < (0.5 if row.engine == "vllm" else 0.2)
        assert row.greedy >= (0 if row.engine == "vllm" else row.prompts - 1)


@pytest.mark.parametrize("kind", ["full", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm(family: str, kind: str, network, merged, compare, tmp_path: Path) -> None:
    model, dtype = (network if kind == "full" else merged)(family), vllm_dtype(family)
    with servers.vllm(model, tmp_path / "log", dtype=dtype) as url:
        check(compare(url, model, Cell(family, "vllm", kind), dtype), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_with_an_adapter(family: str, adapter, compare, tmp_path: Path) -> None:
    out, dtype = tmp_path / "out", vllm_dtype(family)
    command("export", "--adapter_name_or_path", adapter(family), "--export_dir", out, "--format", "vllm")
    with servers.vllm(out / "base", tmp_path / "log", dtype=dtype, adapter=out / "adapter", rank=8) as url:
        row = compare(url, out / "adapter", Cell(family, "vllm", "adapter"), dtype)
    check(row, family)


def converted(model: Path, out: Path, family: str, *more: str) -> list[str]:
    """Converts a model folder by the documented command; gives what its server needs besides the files."""
    own = servers.ROOT / ".venv" / "bin" / "python"
    python = servers.LLAMA_PYTHON if family in APART else own
    # Its code imports what only an older transformers has.
    python = servers.LLAMA_PYTHON_OF_O2_6 if family == "o2_6" else python
    words = ["--model_name_or_path", model, "--export_dir", out, "--format", "gguf", "--llama_cpp", servers.LLAMA_CPP]
    words += ["--llama_cpp_python", python, "--trust_remote_code", "true", "--infer_dtype", "float32"]
    said = command("export", *words, "--verify", "off", *more)
    assert f"converted={out}" in said
    return ["--chat-template-kwargs", '{"enable_thinking": false}'] if "enable_thinking" in said else []


@pytest.mark.parametrize("kind", ["full", "merged"])
@pytest.mark.parametrize("family", CONVERTED)
def test_llama_cpp(family: str, kind: str, network, merged, compare, tmp_path: Path) -> None:
    model, out = (network if kind == "full" else merged)(family), tmp_path / "out"
    more = converted(model, out, family)
    with servers.llama_server(out, tmp_path / "log", "language.gguf", *more) as url:
        check(compare(url, model, Cell(family, "llama.cpp", kind), "float32"), family)


def test_llama_cpp_with_a_quantised_model(network, compare, tmp_path: Path) -> None:
    out, model = tmp_path / "out", network("v2_6")
    converted(model, out, "v2_6", "--quantize", "Q8_0")
    with servers.llama_server(out, tmp_path / "log", "language-Q8_0.gguf") as url:
        row = compare(url, model, Cell("v2_6", "llama.cpp", "full, Q8_0"), "float32")
    assert row.equal == row.prompts
    assert float(row.first_token) < 2


def test_an_output_layer_that_is_tied_no_more(network, compare, tmp_path: Path) -> None:
    """An adapter that trains the output layer of 4.6 alone: the merged model has two tensors where there was one."""
    model = make_adapter(network("v4_6"), "v4_6", r=4, modules_to_save=["lm_head"])
    merged, out = tmp_path / "merged", tmp_path / "out"
    command("export", "--adapter_name_or_path", save(model, tmp_path / "adapter"), "--export_dir", merged)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    with servers.vllm(merged, tmp_path / "log", dtype="bfloat16") as url:
        check(compare(url, merged, Cell("v4_6", "vllm", "merged, untied"), "bfloat16"), "v4_6")
    more = converted(merged, out, "v4_6")
    with servers.llama_server(out, tmp_path / "log", "language.gguf", *more) as url:
        check(compare(url, merged, Cell("v4_6", "llama.cpp", "merged, untied"), "float32"), "v4_6")


def test_a_config_without_a_next_token_layer(network, compare, tmp_path: Path) -> None:
    """config.json of 4.6 as ``save_pretrained`` of other tools may leave it, without the key that is published."""
    model, out = linked(network("v4_6"), tmp_path / "model"), tmp_path / "out"
    config = json.loads((model / "config.json").read_text())
    del config["text_config"]["mtp_num_hidden_layers"]
    put(model / "config.json", config)
    more = converted(model, out, "v4_6")
    with servers.llama_server(out, tmp_path / "log", "language.gguf", *more) as url:
        check(compare(url, model, Cell("v4_6", "llama.cpp", "full, no next-token key"), "float32"), "v4_6")
