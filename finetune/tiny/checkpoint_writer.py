"""Tiny checkpoints with random weights in the official folder layout, for the demo and the tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from finetune import families
from finetune.families import by_name, check_transformers
from finetune.families.family import Family
from finetune.tiny import chatml_tokenizers, config_files, native_folders, trained_tokenizers
from finetune.tiny.trained_tokenizers import write_json

FAMILIES = tuple(family.name for family in families.FAMILIES)
DTYPES = ("float32", "bfloat16", "float16")


def write_tiny_checkpoint(
    family: str,
    out: Path | str,
    seed: int = 0,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    experts: int = 0,
) -> Path:
    """Write a tiny checkpoint folder in the official layout and return its path; equal arguments give equal bytes.

    Args:
        family: name of the family, one of FAMILIES.
        out: folder to write; created when absent.
        seed: seed of the random weights; the tokenizer does not depend on it.
        dtype: dtype of the stored weights and ``torch_dtype`` of config.json.
        overwrite: replace an earlier result of this command instead of refusing the folder.
        experts: routed experts of the language model, two of them active per token; 0 for a dense model.

    Raises:
        ValueError: there is no tiny checkpoint of this family, an invalid number of experts, or no such dtype.
        FileExistsError: the folder holds something (that this command did not write), or the path is a file.
        UnknownFamilyError: the installed transformers does not have its model class.
    """
    made = _checked(family, dtype, experts)
    folder = start_folder(Path(out), _readme(family, seed, dtype, experts), overwrite=overwrite)
    if made.network is None:
        native_folders.write_native(made, folder, experts)
    else:
        _write_own(made, folder, dtype)
    _write_weights(folder, seed, dtype, config_files.louder(made))
    return folder


def _checked(name: str, dtype: str, experts: int) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"no tiny checkpoint for family {name!r}; there is one for {', '.join(FAMILIES)}")
    family = by_name(name)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if experts and not family.published.experts:
        mixtures = ", ".join(each.name for each in families.FAMILIES if each.published.experts)
        raise ValueError(f"--experts {experts}: {name} is dense; a mixture is {mixtures}")
    if experts < 0 or experts == 1:
        raise ValueError(f"--experts {experts}: a mixture has at least 2 experts, 0 means a dense model")
    check_transformers(family)
    return family


def _write_own(family: Family, folder: Path, dtype: str) -> None:
    """All files but the weights of a family with a network of this package."""
    if family.llm_type == "minicpm":
        length = trained_tokenizers.write_minicpm(folder)
    elif family.inference_template:
        length = trained_tokenizers.write_llama3(folder, family.inference_template)
    else:
        length = chatml_tokenizers.write_chatml(folder, family.name)
    # peft grows the base when the tokenizer beside an adapter is longer than the embedding table.
    assert length <= config_files.vocabulary(family), (length, config_files.vocabulary(family))
    bos, eos = _sentence_ids(folder)
    config = config_files.config(family, bos, eos, dtype)
    generation = config_files.generation_config(bos, eos, config["transformers_version"])
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "preprocessor_config.json", config_files.preprocessor_config(family, config["query_num"]))


def start_folder(folder: Path, readme: str, *, overwrite: bool) -> Path:
    """Create the folder with nothing but README.md in it.

    With ``overwrite`` a previous result is removed, and only that: its README.md starts with the same heading. A wrong
    path to a real checkpoint or to a home directory is refused.

    Raises:
        FileExistsError: the folder is in use, or the path is a file.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} is not empty; give another folder or --overwrite")
        heading, old = readme.partition("\n")[0], folder / "README.md"
        if not old.is_file() or old.read_text(encoding="utf-8").partition("\n")[0] != heading:
            raise FileExistsError(
                f"{folder} was not written by this command; remove it yourself or give another folder"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def _sentence_ids(folder: Path) -> tuple[int, int]:
    """Ids of the bos and the eos token, read from tokenizer_config.json."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {entry["content"]: int(index) for index, entry in config["added_tokens_decoder"].items()}
    return ids[config["bos_token"]], ids[config["eos_token"]]


def _readme(family: str, seed: int, dtype: str, experts: int) -> str:
    command = f"python -m finetune tiny --family {family} --seed {seed} --dtype {dtype}"
    command += f" --experts {experts}" if experts else ""
    return (
        "# Tiny random checkpoint\n\n"
        f"Random weights in the layout of a published checkpoint (family {family}), for demos and tests.\n"
        f"It has learnt nothing. Made by `{command}`.\n"
    )


def _write_weights(folder: Path, seed: int, dtype: str, factors: dict[str, float]) -> None:
    """Build the model from the config.json in ``folder``, draw its weights from ``seed``, store model.safetensors.

    ``factors`` scales the tensors that it names.
    """
    # Imported late: the tokenizer part and --help need no torch.
    import torch
    from safetensors.torch import save
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    import finetune.models  # noqa: F401  registers the model class

    config = AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn in float32 whatever is stored, so that the types differ by rounding alone.
        # AutoModel gives a model without lm_head for 4.6, 4.7 and OCR.
        maker = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModel
        model = maker.from_config(config, dtype=torch.float32)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    state = {
        name: (tensor.detach() * factors.get(name, 1.0)).to(getattr(torch, dtype)).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    assert set(factors) <= set(state), factors
    if hasattr(config, "audio_config"):
        # Tensors of the speech output, which are not loaded here; finetuning must pass them through unchanged.
        state["tts.projector.weight"] = torch.arange(64, dtype=torch.bfloat16).reshape(8, 8)
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
