"""--format gguf: what a checkout of llama.cpp is told, in which order, and what is left when it fails.

The checkout is a stand-in whose scripts write down their arguments and make the files that the real ones make.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from folders import linked, put
from made_adapters import make_adapter, save
from safetensors.torch import load_file

from finetune.__main__ import main
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.export.llama_cpp import COMMIT
from finetune.export.prompt_files import encoder_of, prompt_pieces, write_prompt_files
from finetune.families import FAMILIES
from finetune.sample import Media, Message, Sample, Source, Text

LEGACY = "tools/mtmd/legacy-models"
VERSIONS = {"llama3_v2_5": 2, "v2_6": 3, "o2_6": 4, "v4_0": 5, "v4_5": 6, "o4_5": 100045}
ASKED = """import json, os, sys
from pathlib import Path
argv = sys.argv[1:]
typed = "" if sys.stdin is None else sys.stdin.read()
with open(Path(__file__).resolve().parents[{depth}] / "asked.jsonl", "a") as file:
    row = {{"name": Path(__file__).name, "argv": argv, "typed": typed, "paths": os.environ.get("PYTHONPATH", "")}}
    row |= {{"offline": os.environ.get("HF_HUB_OFFLINE")}}
    file.write(json.dumps(row) + "\\n")
def after(flag): return Path(argv[argv.index(flag) + 1])
{body}
"""
SCRIPTS = {
    "convert_hf_to_gguf.py": 'assert Path(argv[0], "config.json").is_file(); after("--outfile").write_text("gguf")',
    f"{LEGACY}/minicpmv-surgery.py": """model = after("-m"); (model / "minicpmv.projector").write_text("")
(model / "model").mkdir(); (model / "model" / "config.json").write_text("{}")
(model / "added_tokens.json").write_text("{}")
if (model / "resampler.py").is_file(): exec((model / "resampler.py").read_text())""",
    f"{LEGACY}/minicpmv-convert-image-encoder-to-gguf.py": (
        'kind = "f32" if "--use-f32" in argv else "f16"\n'
        '(after("--output-dir") / f"mmproj-model-{kind}.gguf").write_text("gguf")'
    ),
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "llama.cpp"
    for name, body in SCRIPTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ASKED.format(depth=name.count("/"), body=body))
    (folder / "conversion").mkdir()
    (folder / "conversion" / "__init__.py").write_text('"MiniCPMV4_6ForConditionalGeneration": "minicpm"')
    quantiser = folder / "build" / "bin" / "llama-quantize"
    quantiser.parent.mkdir(parents=True)
    body = 'Path(argv[1]).write_text("small")'
    quantiser.write_text(f"#!{sys.executable}\n" + ASKED.format(depth=2, body=body))
    quantiser.chmod(0o755)
    return folder


def with_code(folder: Path, target: Path) -> Path:
    """A base with the code files that its config.json names."""
    base = linked(folder, target)
    put(base / "config.json", {**json.loads((base / "config.json").read_text()), "auto_map": {"AutoModel": "code.A"}})
    (base / "code.py").write_text("")
    return base


def words(base: Path, checkout: Path | None, out: Path, *more: str) -> list[str]:
    given = ["export", "--model_name_or_path", str(base), "--export_dir", str(out), "--format", "gguf"]
    given += ["--verify", "off", *more]
    return given if checkout is None else [*given, "--llama_cpp", str(checkout)]


def asked(checkout: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (checkout / "asked.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", VERSIONS)
def test_older_generations_go_in_three_steps(tiny, checkout, tmp_path, capsys, family) -> None:
    base, out = with_code(tiny(family), tmp_path / "base"), tmp_path / "out"
    (base / "resampler.py").write_text("class Resampler:\n    sizes: List[int]\n")
    assert main(words(base, checkout, out, "--trust_remote_code", "true", "--quantize", "Q4_K_M")) == 0
    said = capsys.readouterr().out
    surgery, encoder, language, small = asked(checkout)
    model = Path(str(surgery["argv"][1]))  # pyright: ignore[reportIndexIssue]
    assert surgery["name"] == "minicpmv-surgery.py"
    assert surgery["argv"] == ["-m", str(model)]
    assert model.name == "to_convert", "older versions of transformers import the code of no folder with a dot"
    unfinished = str(model.parent)
    assert encoder["argv"] == [
        *("-m", str(model), "--minicpmv-projector", str(model / "minicpmv.projector"), "--output-dir", unfinished),
        *("--image-mean", "0.5", "0.5", "0.5", "--image-std", "0.5", "0.5", "0.5"),
        *("--minicpmv_version", str(VERSIONS[family])),
    ]
    assert language["argv"] == [str(model / "model"), "--outfile", f"{unfinished}/language.gguf"]
    assert str(language["typed"]).startswith("y\n")
    assert small["argv"] == [f"{unfinished}/language.gguf", f"{unfinished}/language-Q4_K_M.gguf", "Q4_K_M"]
    for row in (surgery, encoder, language):
        assert str(row["paths"]).split(os.pathsep)[0] == str(checkout / "gguf-py")
        assert row["offline"] == "1"
    written = {path.name for path in out.iterdir()}
    assert written == {
        *("language.gguf", "language-Q4_K_M.gguf", "mmproj.gguf", "Modelfile", "prompt_example.md", "export.yaml"),
        "conversion.log",
    }
    assert "FROM ./language-Q4_K_M.gguf\nFROM ./mmproj.gguf\n" in (out / "Modelfile").read_text()
    assert "from typing import List" in said
    assert ("other positions than training" in said) == (family == "llama3_v2_5")
    assert f"serve with llama-server -m {out / 'language-Q4_K_M.gguf'} --mmproj {out / 'mmproj.gguf'}" in said
    assert f"ollama create out -f {out / 'Modelfile'}" in said
    assert "List[int]" in (base / "resampler.py").read_text().splitlines()[1], "the base stays as it is"


def test_4_6_goes_as_it_is_and_without_the_layer_that_has_no_weights(tiny, checkout, tmp_path, capsys) -> None:
    adapter, out = save(make_adapter(tiny("v4_6"), "v4_6"), tmp_path / "adapter"), tmp_path / "out"
    given = ["export", "--adapter_name_or_path", str(adapter), "--model_name_or_path", str(tiny("v4_6"))]
    given += ["--export_dir", str(out), "--format", "gguf", "--llama_cpp", str(checkout), "--infer_dtype", "float32"]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert f"converted={out} verified=true" in said
    language, projector = asked(checkout)
    model, unfinished = language["argv"][0], str(Path(language["argv"][0]).parent)  # pyright: ignore[reportIndexIssue]
    assert language["argv"] == [
        *(model, "--outfile", f"{unfinished}/language.gguf", "--outtype", "f32", "--no-mtp"),
    ]
    assert projector["argv"] == [model, "--mmproj", "--outfile", f"{unfinished}/mmproj.gguf", "--outtype", "f32"]
    assert """--chat-template-kwargs '{"enable_thinking": false}'""" in said
    assert not any(path.is_dir() for path in out.iterdir())


def test_float32_keeps_the_vision_tower_in_float32(tiny, checkout, tmp_path) -> None:
    base, out = with_code(tiny("v2_6"), tmp_path / "base"), tmp_path / "out"
    assert main(words(base, checkout, out, "--trust_remote_code", "--infer_dtype", "float32")) == 0
    assert "--use-f32" in asked(checkout)[1]["argv"]  # pyright: ignore[reportOperatorIssue]
    assert (out / "mmproj.gguf").is_file()


def test_a_relative_interpreter_is_the_one_of_this_folder(tiny, checkout, tmp_path, monkeypatch) -> None:
    """The scripts run in the checkout, which has no such path."""
    (tmp_path / "env").symlink_to(Path(sys.executable).parent)
    monkeypatch.chdir(tmp_path)
    given = ("--llama_cpp_python", f"env/{Path(sys.executable).name}")
    assert main(words(tiny("v4_6"), checkout, tmp_path / "out", *given)) == 0
    assert (tmp_path / "out" / "language.gguf").is_file()


def test_a_padding_token_that_is_a_word_is_replaced_in_the_copy(tiny, checkout, tmp_path, capsys) -> None:
    """As 2.5 has it: "!" would be a special token, and the converter knows no such tokenizer."""
    base, out = with_code(tiny("llama3_v2_5"), tmp_path / "base"), tmp_path / "out"
    config = json.loads((base / "tokenizer_config.json").read_text())
    put(base / "tokenizer_config.json", {**config, "pad_token": "!"})
    surgery = checkout / f"{LEGACY}/minicpmv-surgery.py"
    read = "print(json.loads((model / 'tokenizer_config.json').read_text())['pad_token'])"
    surgery.write_text(f"{surgery.read_text()}\n{read}\n")
    assert main(words(base, checkout, out, "--trust_remote_code", "true")) == 0
    assert "tokenizer_config.json: pad_token '!' was replaced in the copy" in capsys.readouterr().out
    assert config["eos_token"] in (out / "conversion.log").read_text().splitlines()
    assert json.loads((base / "tokenizer_config.json").read_text())["pad_token"] == "!"


@pytest.mark.parametrize(
    ("family", "more", "bytes_each"),
    [("v2_6", (), 2 + 2), ("v2_6", ("--quantize", "Q4_K_M", "--infer_dtype", "float32"), 2 + 4 + 2), ("v4_6", (), 2)],
)
def test_the_disk_must_have_space_for_the_files_of_llama_cpp(
    tiny, checkout, tmp_path, capsys, monkeypatch, family, more, bytes_each
) -> None:
    """Beside the merged model there is what the first script writes, two GGUF files and the quantised one."""
    base, out = with_code(tiny(family), tmp_path / "base"), tmp_path / "out"
    stored = load_file(base / "model.safetensors")
    everything = sum(tensor.numel() for tensor in stored.values())
    needed = sum(tensor.nbytes for tensor in stored.values()) + bytes_each * everything
    more = ("--trust_remote_code", "true", *more)
    # A little less than what is written without the parts that the language model is not.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(0.7 * needed) + (1 << 28)))
    assert "GB free, the result needs" in refused(capsys, words(base, checkout, out, *more))
    assert not (checkout / "asked.jsonl").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * needed + (1 << 28)))
    assert main(words(base, checkout, out, *more)) == 0


def refused(capsys: pytest.CaptureFixture[str], given: list[str]) -> str:
    assert main(given) == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_converted_is_said_before_anything_is_written(tiny, checkout, tmp_path, capsys) -> None:
    base, out = with_code(tiny("v2_6"), tmp_path / "base"), tmp_path / "out"
    get = f"git clone https://github.com/ggml-org/llama.cpp && git -C llama.cpp checkout {COMMIT}"
    allowed = ("--trust_remote_code", "true")
    assert f"--format gguf needs --llama_cpp DIR, a checkout of llama.cpp: {get}" in refused(
        capsys, words(base, None, out, *allowed)
    )
    assert f"no convert_hf_to_gguf.py and no {LEGACY}/minicpmv-surgery.py" in refused(
        capsys, words(base, tmp_path, out, *allowed)
    )
    assert "runs the code files of" in refused(capsys, words(base, checkout, out))
    assert "has no configuration_minicpm.py, modeling_minicpmv.py: download" in refused(
        capsys, words(tiny("v2_6"), checkout, out, *allowed)
    )
    assert "does not know MiniCPMV4_7ForConditionalGeneration" in refused(capsys, words(tiny("v4_7"), checkout, out))
    assert "no such program" in refused(
        capsys, words(base, checkout, out, *allowed, "--llama_cpp_python", "/nowhere/python")
    )
    (checkout / "build" / "bin" / "llama-quantize").unlink()
    assert "cmake --build build --target llama-quantize" in refused(
        capsys, words(base, checkout, out, *allowed, "--quantize", "Q4_K_M")
    )
    plain = ["export", "--model_name_or_path", str(base), "--export_dir", str(out), "--quantize", "Q4_K_M"]
    assert "--quantize: no effect without --format gguf" in refused(capsys, plain)
    assert not out.exists()
    assert not (checkout / "asked.jsonl").exists()


@pytest.mark.parametrize("family", [each.name for each in FAMILIES if each.name in ("v2_0", "ocr1_0")])
def test_families_without_a_converter_are_refused_by_name(tiny, checkout, tmp_path, capsys, family) -> None:
    title = next(each.title for each in FAMILIES if each.name == family)
    said = refused(capsys, words(tiny(family), checkout, tmp_path / "out"))
    assert f"llama.cpp has no converter for {title}; it takes MiniCPM-Llama3-V 2.5, MiniCPM-V 2.6" in said


@pytest.mark.parametrize(
    "end", ["print('first'); sys.exit('BPE pre-tokenizer was not recognized')", "print('nothing')"]
)
def test_a_failing_step_is_told_with_its_last_lines_and_leaves_nothing(tiny, checkout, tmp_path, capsys, end) -> None:
    (checkout / "convert_hf_to_gguf.py").write_text(f"import sys\n{end}\n")
    out = tmp_path / "out"
    said = refused(capsys, words(tiny("v4_6"), checkout, out))
    assert re.search(r"llama.cpp, language model: .*--no-mtp (ended with status 1|left no language.gguf)\.", said)
    assert "BPE pre-tokenizer was not recognized" in said or "The last lines: nothing" in said
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("family", ["llama3_v2_5", "v2_6", "v4_5", "v4_6"])
def test_the_pieces_of_the_modelfile_are_the_prompt_of_training(tiny, family) -> None:
    encoder = encoder_of(resolve_base(str(tiny(family))))
    pieces = prompt_pieces(encoder)

    def prompt(*turns: tuple[str, str]) -> str:
        messages = tuple(Message(role, (Text(text),)) for role, text in turns)  # pyright: ignore[reportArgumentType]
        ids = encoder.render(Sample("0", Source("memory", 0), messages), (), True).input_ids
        return str(encoder.tokenizer.decode(ids)).removeprefix("<|begin_of_text|>")

    two = f"{pieces.user}Q{pieces.reply}A{pieces.answered}{pieces.user}R{pieces.generation}"
    assert prompt(("user", "Q"), ("assistant", "A"), ("user", "R")) == pieces.opening + two
    assert pieces.system is not None
    whole = "S".join(pieces.system) + f"{pieces.user}Q{pieces.generation}"
    assert prompt(("system", "S"), ("user", "Q")) == whole.removeprefix("<|begin_of_text|>")


def test_the_modelfile_of_2_6_numbers_the_picture(tiny, tmp_path) -> None:
    encoder = encoder_of(resolve_base(str(tiny("v2_6"))))
    write_prompt_files(tmp_path, encoder, language="language.gguf", projector="mmproj.gguf")
    turns = (
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ else if eq .Role "user" }}'
        "<|im_start|>user\n{{ if .Images }}<image_id>0</image_id>{{ end }}{{ .Content }}{{ else }}"
        "<|im_end|>\n<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}"
    )
    opening = (
        '{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n'
    )
    assert (tmp_path / "Modelfile").read_text() == (
        "# MiniCPM-V 2.6: the template is the prompt of training, exact for one picture in a conversation.\n"
        "FROM ./language.gguf\nFROM ./mmproj.gguf\n"
        f'TEMPLATE """{opening}{{{{ end }}}}{{{{ range .Messages }}}}{turns}{{{{ end }}}}'
        '<|im_end|>\n<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\nPARAMETER temperature 0\nPARAMETER num_ctx 4096\n'
    )
    plain = encoder_of(resolve_base(str(tiny("v2_6")), use_image_id=False))
    write_prompt_files(tmp_path, plain, language="language.gguf", projector="mmproj.gguf")
    assert "image_id" not in (tmp_path / "Modelfile").read_text() + (tmp_path / "prompt_example.md").read_text()


def test_the_example_is_the_prompt_and_its_request_types_the_number(tiny, tmp_path) -> None:
    base = resolve_base(str(tiny("v4_6")))
    out = tmp_path / "out"
    given = ["export", "--model_name_or_path", str(base.folder), "--export_dir", str(out), "--verify", "off"]
    assert main(given) == 0
    page = (out / "prompt_example.md").read_text()
    body = json.loads(page.partition("```json\n")[2].partition("\n```")[0])
    kinds = [part.get("text", part["type"]) for part in body["messages"][0]["content"]]
    assert kinds == ["<image_id>0</image_id>", "image_url", "\nWhat does the picture show?"]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    from PIL import Image

    encoder = encoder_of(base)
    parts = (Media("image", Image.new("RGB", (448, 448))), Text("\nWhat does the picture show?"))
    ids = encoder.encode(Sample("0", Source("m", 0), (Message("user", parts),)), generate=True).input_ids.tolist()
    shown = page.partition("```text\n")[2].partition("\n```")[0]
    full = re.sub(r"\((\d+) x (.+?)\)", lambda found: int(found[1]) * found[2], shown)
    assert full == encoder.tokenizer.decode(ids)
