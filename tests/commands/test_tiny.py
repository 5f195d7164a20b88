import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer

import finetune.models  # noqa: F401  registers the network and the tokenizer classes
from finetune.commands import tiny
from finetune.families import FAMILIES, by_name, detect, usable
from finetune.tiny import corpus
from finetune.tiny.demo_phrases import COLOURS

COMMON = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
_SPLIT = COMMON - {"tokenizer.json"} | {"vocab.json", "merges.txt", "added_tokens.json"}
NATIVE = tuple(family.name for family in FAMILIES if family.network is None)
_NATIVE = COMMON - {"preprocessor_config.json", "special_tokens_map.json"} | {
    "chat_template.jinja",
    "processor_config.json",
}
FILES = {family: COMMON for family in tiny.FAMILIES}
FILES |= {"v2_0": COMMON | {"tokenizer.model"}, "v4_5": _SPLIT, "o4_5": _SPLIT}
FILES |= dict.fromkeys(NATIVE, _NATIVE)
# What the published config.json holds; a tiny one may add sizes, never leave a key out.
OFFICIAL_KEYS = {
    "v2_0": "architectures attention_bias attention_dropout auto_map bos_token_id dim_model_base "
    "drop_vision_last_layer eos_token_id hidden_act hidden_size image_size initializer_range intermediate_size "
    "max_position_embeddings max_slice_nums mm_use_im_start_end model_type num_attention_heads num_hidden_layers "
    "num_key_value_heads patch_size pretraining_tp query_num rms_norm_eps rope_scaling rope_theta scale_depth "
    "scale_emb scale_resolution slice_mode tie_word_embeddings torch_dtype transformers_version use_cache "
    "vision_encoder vocab_size",
    "llama3_v2_5": "architectures attention_bias attention_dropout auto_map batch_vision_input bos_token_id "
    "drop_vision_last_layer eos_token_id hidden_act hidden_size image_size initializer_range intermediate_size "
    "max_position_embeddings mm_use_im_start_end model_type num_attention_heads num_hidden_layers "
    "num_key_value_heads patch_size pretraining_tp query_num rms_norm_eps rope_scaling rope_theta slice_config "
    "slice_mode tie_word_embeddings torch_dtype transformers_version use_cache version vision_config vocab_size",
}
OWN = tuple(family for family in tiny.FAMILIES if family not in NATIVE)


@pytest.fixture(scope="module", params=[family.name for family in usable()])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    return request.param, tiny.write_tiny_checkpoint(request.param, folder, seed=3)


def test_folder_is_complete(checkpoint: tuple[str, Path]) -> None:
    family, folder = checkpoint
    assert {file.name for file in folder.iterdir()} == FILES[family]
    config = json.loads((folder / "config.json").read_text())
    assert detect(config).name == family
    if family in NATIVE:
        assert json.loads((folder / "processor_config.json").read_text())["image_processor"]["scale_resolution"] == 112
        return
    assert set(OFFICIAL_KEYS.get(family, OFFICIAL_KEYS["llama3_v2_5"]).split()) <= set(config)
    assert by_name(family).slice_spec(config).scale_resolution == 112
    # The names that official code looks up; loading here must work although none of these files exists.
    letter = family[0] if family[0] == "o" else "v"
    name = f"MiniCPM{letter.upper()}"
    assert config["architectures"] == [name]
    assert config["auto_map"] == {
        "AutoConfig": f"configuration_minicpm.{name}Config",
        "AutoModel": f"modeling_minicpm{letter}.{name}",
        "AutoModelForCausalLM": f"modeling_minicpm{letter}.{name}",
    }
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    module = "tokenization_minicpmv" if family == "v2_0" else "tokenization_minicpmv_fast"
    assert tokenizer["auto_map"] == {"AutoTokenizer": [f"{module}.{tokenizer['tokenizer_class']}", None]}
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["image_feature_size"] == config["query_num"] == by_name(family).layout(config).query_num


def test_equal_bytes_for_a_seed(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = checkpoint
    torch.manual_seed(99)  # the state of the caller must not matter
    drawn = torch.random.get_rng_state()
    again = tiny.write_tiny_checkpoint(family, tmp_path / "again", seed=3)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    other = tiny.write_tiny_checkpoint(family, tmp_path / "other", seed=4)
    for name in FILES[family]:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
        differs = (other / name).read_bytes() != (folder / name).read_bytes()
        assert differs == (name in ("model.safetensors", "README.md")), name


def test_loads_with_the_auto_classes(checkpoint: tuple[str, Path]) -> None:
    family, folder = checkpoint
    loader = AutoModelForImageTextToText if family in NATIVE else AutoModel
    loaded: Any = loader.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    speech = {"tts.projector.weight"} if family.startswith("o") else set()
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert stored.metadata() == {"format": "pt"}
        state = {name: tensor for name, tensor in model.state_dict().items() if name in stored.keys()}  # noqa: SIM118
        assert set(stored.keys()) - speech == set(state)
        assert set(model.state_dict()) - set(state) == ({"lm_head.weight"} if family in NATIVE else set())
        for name, tensor in state.items():
            assert torch.equal(tensor, stored.get_tensor(name)), name
            assert torch.isfinite(tensor).all(), name
    if family in NATIVE:
        return
    # Text embeddings about as loud as image features: random, frozen and still of use to the demo.
    assert 0.9 < model.embedding_scale * model.get_input_embeddings().weight.std() < 1.3


def test_tokenizer_resolves_every_special_token(checkpoint: tuple[str, Path]) -> None:
    family, folder = checkpoint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if family not in NATIVE:
        named = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
        assert type(tokenizer).__name__.removesuffix("Fast") == named.removesuffix("Fast")
    assert len(tokenizer) <= config.get("text_config", config)["vocab_size"]
    tokens = by_name(family).required_tokens + by_name(family).stop_tokens
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    assert len(set(ids.values())) == len(set(tokens))
    for token, index in ids.items():
        assert tokenizer.encode(token, add_special_tokens=False) == [index]
    if family in ("v2_0", "llama3_v2_5", "v4_0"):
        assert tokenizer.bos_token_id == tokenizer.encode("x")[0]
    if family in OWN:
        assert tokenizer.bos_token_id == config["bos_token_id"]
        assert tokenizer.eos_token_id == config["eos_token_id"]
    if family == "v2_0":
        assert [ids[token] for token in ("<unk>", "<s>", "</s>", "<image>", "</image>")] == [0, 1, 2, 101, 102]
        assert [ids[token] for token in ("<slice>", "</slice>")] == [111, 112]


def test_answers_are_one_token_each(checkpoint: tuple[str, Path]) -> None:
    family, folder = checkpoint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = {"v2_0": "<AI>", "llama3_v2_5": "<|end_header_id|>\n\n"}.get(family, "<|im_start|>assistant\n")
    prompt = tokenizer.encode(before)
    answers = {tuple(tokenizer.encode(before + colour)[len(prompt) :]) for colour in COLOURS}
    assert all(tokenizer.encode(before + colour)[: len(prompt)] == prompt for colour in COLOURS)
    assert {len(answer) for answer in answers} == {1}
    assert len(answers) == len(COLOURS)


def test_sentencepiece_model_and_tokenizer_json_agree(tmp_path: Path) -> None:
    folder = tiny.write_tiny_checkpoint("v2_0", tmp_path / "tiny")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))  # pyright: ignore
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for line in {*corpus.lines("<用户>", "<AI>"), "Unseen words, numbers 12345 and 鱼 €."}:
        assert tokenizer.encode(line) == [1, *pieces.encode(line)], line


def test_published_template_of_2_5(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.write_tiny_checkpoint("llama3_v2_5", tmp_path / "tiny"))
    messages = [{"role": "user", "content": " hi "}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_stored_type(tmp_path: Path) -> None:
    full = tiny.write_tiny_checkpoint("llama3_v2_5", tmp_path / "full")
    half = tiny.write_tiny_checkpoint("llama3_v2_5", tmp_path / "half", dtype="bfloat16")
    with safe_open(full / "model.safetensors", "pt") as one, safe_open(half / "model.safetensors", "pt") as other:
        for name in one.keys():  # noqa: SIM118  not a dictionary
            assert torch.equal(one.get_tensor(name).bfloat16(), other.get_tensor(name)), name
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny"
    assert tiny.main(["--family", "llama3_v2_5", "--out", str(out)]) == 0
    (out / "stale.txt").write_text("left over")
    assert tiny.main(["--family", "llama3_v2_5", "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (out / "stale.txt").exists()
    assert tiny.main(["--family", "llama3_v2_5", "--out", str(out), "--overwrite"]) == 0
    assert {file.name for file in out.iterdir()} == COMMON
    (out / "README.md").write_text("# Somebody's only copy")
    assert tiny.main(["--family", "llama3_v2_5", "--out", str(out), "--overwrite"]) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert (out / "model.safetensors").exists()
    with pytest.raises(ValueError, match="no tiny checkpoint for family 'v9'"):
        tiny.write_tiny_checkpoint("v9", tmp_path / "other")
    with pytest.raises(FileExistsError, match="is a file"):
        tiny.write_tiny_checkpoint("v2_0", out / "config.json")
