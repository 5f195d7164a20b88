"""python -m finetune evaluate on tiny checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from clips import write_clip
from peft import LoraConfig, get_peft_model

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.commands import evaluate
from finetune.commands.questions import read_questions
from finetune.encoding.encoder import Encoder
from finetune.evaluation.batched_generation import answer_batch, generate_answers, split_answer
from finetune.media.video_sampling import VideoOptions
from finetune.models import load_model, load_tokenizer
from finetune.readers import read
from finetune.readers.mixture import Mixture
from finetune.runtime.out_of_memory import OutOfMemoryError
from finetune.utils.errors import UserError

SHORT = ["--max_new_tokens", "6", "--dtype", "float32", "--device", "cpu"]


def run(*words: object) -> None:
    assert evaluate.main([str(word) for word in words] + SHORT) == 0


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """A LoRA adapter with random weights that change answers."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r"llm\..*q_proj", init_lora_weights=False)
    model = get_peft_model(load_model(tiny("llama3_v2_5"), dtype=torch.float32), config)
    model.peft_config["default"].base_model_name_or_path = str(tiny("llama3_v2_5"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.5)
    model.save_pretrained(str(folder))
    return folder


def test_answers_are_those_of_one_by_one_generation(tiny, demo_data, tmp_path, capsys):
    run("--model", tiny("v2_0"), "--data", demo_data / "eval.json", "--out", tmp_path, "--batch_size", 3)
    base = resolve_base(str(tiny("v2_0")))
    tokenizer = load_tokenizer(base.folder)
    encoder = Encoder(base.family, tokenizer, base.settings)
    model = load_model(base.folder, dtype=torch.float32)
    pairs = [split_answer(sample) for sample in read(demo_data / "eval.json")]
    prompts = [prompt for prompt, _ in pairs]
    single = [generate_answers(model, tokenizer, encoder, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    rows = lines(tmp_path)
    assert [row["prediction"] for row in rows] == single
    assert [row["references"] for row in rows] == [[answer] for _, answer in pairs]
    assert [row["index"] for row in rows] == list(range(len(pairs)))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["metric"] == "normalised"
    assert metrics["why"].startswith("auto: short references")
    assert metrics["samples"] == len(pairs)
    shown = capsys.readouterr().out
    assert "normalised (auto: short references" in shown
    assert (tmp_path / "report.html").read_text().count("<img") >= len(pairs)


def test_a_stopped_evaluation_goes_on(tiny, demo_data, tmp_path, monkeypatch):
    data = demo_data / "eval.json"
    words = ("--model", tiny("v2_0"), "--data", data, "--out", tmp_path, "--batch_size", 2)
    calls = []

    def stopping(*args, **kwargs):
        calls.append(len(args[3]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer_batch(*args, **kwargs)

    monkeypatch.setattr("finetune.evaluation.batched_generation.answer_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert len(lines(tmp_path)) == 4
    assert not (tmp_path / "metrics.json").exists()
    run(*words)
    assert sum(calls[3:]) == 4
    calls.clear()
    run(*words, "--metric", "cer")
    assert calls == [], "another metric asks nothing again"
    assert json.loads((tmp_path / "metrics.json").read_text())["metric"] == "cer"
    with pytest.raises(UserError, match="max_slice_nums was None and is 1"):
        run(*words, "--max_slice_nums", 1)


def test_out_of_memory_names_smaller_settings_and_keeps_the_answers(tiny, demo_data, tmp_path, monkeypatch):
    calls = []

    def short(*args, **kwargs):
        calls.append(len(args[3]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"
            )
        return answer_batch(*args, **kwargs)

    words = ("--model", tiny("v2_0"), "--data", demo_data / "eval.json", "--out", tmp_path, "--batch_size", 2)
    monkeypatch.setattr("finetune.evaluation.batched_generation.answer_batch", short)
    with pytest.raises(OutOfMemoryError) as raised:
        run(*words)
    assert raised.value.exit_code == 6
    first, *flags = str(raised.value).splitlines()
    assert first == (
        "out of GPU memory: 2.0 GB asked for; the answers so far are kept: the same command continues. "
        "What needs less, the cheapest first:"
    )
    assert [flag.strip() for flag in flags] == ["--batch_size 1", "--dtype bfloat16", "--max_slice_nums 4"]
    run(*words[:-1], 1)
    assert sum(calls[2:]) == len(lines(tmp_path)) - 2


def test_comparison_with_the_base(tiny, demo_data, adapter, tmp_path):
    data = demo_data / "eval.json"
    run("--model", adapter, "--data", data, "--out", tmp_path / "a", "--compare", "base", "--metric", "cer")
    run("--model", tiny("llama3_v2_5"), "--data", data, "--out", tmp_path / "b")
    rows, plain = lines(tmp_path / "a"), lines(tmp_path / "b")
    assert [row["prediction_base"] for row in rows] == [row["prediction"] for row in plain]
    changed = sum(row["prediction"] != row["prediction_base"] for row in rows)
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert 0 < changed == metrics["other_answer"]
    assert metrics["base"]["cer"] != metrics["scores"]["cer"]
    assert "Answer of the base" in (tmp_path / "a" / "report.html").read_text()
    base = tiny("llama3_v2_5")
    run("--model", base, "--adapter", adapter, "--data", data, "--out", tmp_path / "c", "--compare", base, "--limit", 2)
    assert [row["prediction_base"] for row in lines(tmp_path / "c")] == [row["prediction"] for row in plain[:2]]


def test_what_cannot_be_is_said(tiny, demo_data, adapter, tmp_path):
    data = demo_data / "eval.json"
    with pytest.raises(UserError, match="--compare base means the model without its adapter"):
        run("--model", tiny("v2_0"), "--data", data, "--out", tmp_path, "--compare", "base")
    with pytest.raises(UserError, match="give one of them"):
        run("--model", adapter, "--adapter", adapter, "--data", data, "--out", tmp_path)
    with pytest.raises(UserError, match="unknown metric 'exat'; did you mean 'exact'"):
        run("--model", tiny("v2_0"), "--data", data, "--out", tmp_path, "--metric", "exat")
    record = {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "data.json").write_text(json.dumps([{**record, "answers": "b"}]))
    with pytest.raises(UserError, match="'answers' must be a list of strings"):
        run("--model", tiny("v2_0"), "--data", tmp_path / "data.json", "--out", tmp_path)


def test_several_accepted_answers(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns, "answers": ["b", "c"]}]))
    questions, _ = read_questions(Mixture([read(tmp_path / "data.json")]), None, pytest.fail)
    assert [references for _, references in questions.values()] == [["b", "c"]]


def test_an_answer_may_be_a_tool_call(tiny, tmp_path):
    """It is compared as the chat template writes it, as the model would."""
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    turns = [{"role": "user", "content": "Look up."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns, "tools": [tool]}]))
    out = tmp_path / "out"
    run(
        "--model",
        tiny("v4_6"),
        "--data",
        tmp_path / "data.json",
        "--out",
        out,
        "--max_new_tokens",
        2,
        "--metric",
        "exact",
    )
    (row,) = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
    (reference,) = row["references"]
    assert reference.startswith("<tool_call>")
    assert '"look"' in reference or "=look>" in reference
    with pytest.raises(
        UserError, match=r"has tools and tool calls, and the chat template of MiniCPM-V 2\.0 does not support"
    ):
        run("--model", tiny("v2_0"), "--data", tmp_path / "data.json", "--out", tmp_path / "other")


def test_bad_records_are_left_out_only_when_asked(tiny, tmp_path, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "empty.png").write_bytes(b"")
    records = [{"image": "empty.png", "conversations": turns}, {"conversations": turns}, {"conversations": turns[:1]}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = ("--model", tiny("v2_0"), "--data", tmp_path / "data.json", "--out", tmp_path / "out")
    with pytest.raises(UserError, match=r"data\.json, record"):
        run(*words)
    run(*words, "--on_bad_sample", "skip", "--max_bad_share", "1")
    assert [row["index"] for row in lines(tmp_path / "out")] == [1]
    assert json.loads((tmp_path / "out/metrics.json").read_text())["left_out"] == "2"
    assert capsys.readouterr().out.count("skipped    ") == 2
    (tmp_path / "data.json").write_text(json.dumps(records[:1]))
    with pytest.raises(UserError, match="no record can be used"):
        run(*words, "--on_bad_sample", "skip", "--max_bad_share", "1")


def test_records_without_answers(tiny, adapter, tmp_path, capsys):
    """The last user turn is answered, also where an answer follows; nothing is scored."""
    asked = {"role": "user", "content": "How many?"}
    told = [asked, {"role": "assistant", "content": "Two."}]
    records = [{"conversations": [asked]}, {"conversations": told}, {"conversations": [*told, asked], "id": "three"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = ("--model", adapter, "--data", tmp_path / "data.json", "--out", tmp_path / "out")
    with pytest.raises(UserError, match=r"must be the reference answer \(evaluate --predict_only needs none\)"):
        run(*words)
    run(*words, "--predict_only", "--compare", "base")
    first, second, third = lines(tmp_path / "out")
    assert set(first) == {"index", "id", "question", "prediction", "prediction_base"}
    assert (third["id"], third["question"]) == ("three", "How many?")
    assert first["prediction"] == second["prediction"] != first["prediction_base"]
    base = resolve_base(str(tiny("llama3_v2_5")))
    model, tokenizer = load_model(adapter, dtype=torch.float32), load_tokenizer(base.folder)
    encoder = Encoder(base.family, tokenizer, base.settings)
    prompts = list(read(tmp_path / "data.json"))
    (expected,) = generate_answers(model, tokenizer, encoder, prompts[2:], max_new_tokens=6)
    assert third["prediction"] == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json", "predictions.jsonl"]
    assert "3 answers without scores" in capsys.readouterr().out
    for flag in (["--metric", "cer"], ["--report_rows", 3]):
        with pytest.raises(UserError, match="--metric and --report_rows have no effect"):
            run(*words, "--predict_only", *flag)


def test_videos(tiny, tmp_path):
    """As training looks at them, in answers and in the report; one that is cut short is left out."""
    write_clip(tmp_path / "whole.mp4", 12, fps=4, size=(112, 112))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:800])
    records = []
    for name in ("whole.mp4", "cut.mp4"):
        turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "b"}]
        records.append({"messages": turns, "videos": [name]})
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = (
        "--data",
        tmp_path / "data.json",
        "--out",
        tmp_path / "out",
        "--on_bad_sample",
        "skip",
        "--max_bad_share",
        "1",
        "--video_fps",
        2,
    )
    run("--model", tiny("v2_6"), *words)
    base = resolve_base(str(tiny("v2_6")))
    tokenizer, model = load_tokenizer(base.folder), load_model(base.folder, dtype=torch.float32)
    encoder = Encoder(base.family, tokenizer, base.settings, video=VideoOptions(fps=2.0))
    prompt = split_answer(read(tmp_path / "data.json")[0])[0]
    assert len(encoder.encode(prompt, generate=True).tgt_sizes) == 6
    (row,) = lines(tmp_path / "out")
    assert [row["prediction"]] == generate_answers(model, tokenizer, encoder, [prompt], max_new_tokens=6)
    assert (tmp_path / "out" / "report.html").read_text().count("<img") == 1


def test_two_processes_share_the_work(tiny, demo_data, tmp_path, forked_python):
    run("--model", tiny("v2_0"), "--data", demo_data / "eval.json", "--out", tmp_path / "one", "--metric", "cer")
    words = ["--model", str(tiny("v2_0")), "--data", str(demo_data / "eval.json"), "--out", str(tmp_path / "two")]
    words += [*SHORT, "--batch_size", "2", "--metric", "cer"]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [forked_python, "-m", "finetune", "evaluate", *words],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""},
            cwd=Path(evaluate.__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    shown = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    assert [text.count("written") for text in shown] == [1, 0]
    assert not list((tmp_path / "two").glob("*rank*"))
