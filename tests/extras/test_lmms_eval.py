"""The model class for lmms-eval: prompts of the harness are those of ``evaluate``, and a task runs to its score."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.chat.lmms_eval_model import FinetunedModel, cut_at_stops, manifest, sampling_options, to_sample
from finetune.chat.pipeline import ChatPipeline, ChatPromptOptions
from finetune.evaluation.batched_generation import generate_answers, split_answer
from finetune.models import load_model
from finetune.readers import read
from finetune.utils.errors import ArgumentError

ROOT = Path(__file__).resolve().parents[2]
TASK = """\
task: tiny_colours
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {table}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function task.visual
doc_to_text: !function task.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false, until: ["\\n\\n"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """\
def visual(doc):
    return [doc["image"].convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Four records of the official form."""
    folder, records = tmp_path_factory.mktemp("questions"), []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (60 + 90 * number, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        turns = [{"role": "user", "content": f"<image>\nColour {number}?"}, {"role": "assistant", "content": "red"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def _request(messages: Any, settings: dict[str, Any], document: int = 0) -> Any:
    return SimpleNamespace(args=("text", lambda doc: messages[doc], settings, document, "task", "test"))


def test_prompts_and_answers_are_those_of_evaluate(tiny, questions) -> None:
    model = FinetunedModel(str(tiny("v2_6")), device="cpu", dtype="float32", batch_size="2")
    model.task_dict = {"task": {"test": list(range(4))}}
    samples = [split_answer(sample)[0] for sample in read(questions)]
    messages = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": Image.open(questions.parent / f"{number}.png")},
                    {"type": "text", "text": f"Colour {number}?"},
                ],
            }
        ]
        for number in range(4)
    ]
    encoder = model.pipeline.encoder(model.prompting)
    for sample, turns in zip(samples, messages, strict=True):
        wanted, given = (encoder.encode(each, generate=True) for each in (sample, to_sample(turns)))
        assert torch.equal(wanted.input_ids, given.input_ids)
        assert torch.equal(wanted.patches, given.patches)
    settings = {"max_new_tokens": 4, "temperature": 0, "until": ["\n\n"]}
    answers = model.generate_until([_request(messages, settings, number) for number in range(4)])
    assert answers == generate_answers(
        model.pipeline.model, model.pipeline.tokenizer, encoder, samples, batch_size=2, max_new_tokens=4
    )


def test_settings_of_tasks() -> None:
    greedy = sampling_options({"max_new_tokens": 7, "temperature": 0, "top_p": None, "num_beams": 1, "until": ["."]})
    assert (greedy.sampling, greedy.max_new_tokens) == (False, 7)
    assert sampling_options({"temperature": 0.5}).sampling
    assert sampling_options({"do_sample": False, "temperature": 0.5}).sampling is False
    with pytest.raises(ArgumentError, match="no option stop_words"):
        sampling_options({"stop_words": ["a"]})
    assert cut_at_stops("a. b\n\nc", ["\n\n", "."]) == "a"
    assert cut_at_stops(" a ", None) == "a"
    assert manifest.model_id == "minicpmv_finetune"


def test_a_task_of_the_harness_runs_to_its_score(tiny, questions, tmp_path) -> None:
    """By the command line, with an entry point and data made on the spot."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = {
        "image": [str(questions.parent / f"{number}.png") for number in range(4)],
        "question": [f"Colour {number}?" for number in range(4)],
        "answer": ["red"] * 4,
    }
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "table.parquet"))
    task = tmp_path / "tasks"
    task.mkdir()
    (task / "tiny_colours.yaml").write_text(TASK.format(table=tmp_path / "table.parquet"))
    (task / "task.py").write_text(FUNCTIONS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "minicpmv_finetune", "--tasks", "tiny_colours"]
    command += ["--model_args", f"pretrained={tiny('v2_6')},device=cpu,dtype=float32", "--batch_size", "2"]
    command += ["--include_path", str(task), "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (result,) = (tmp_path / "out").rglob("*_results.json")
    scores = json.loads(result.read_text())["results"]["tiny_colours"]
    (logged,) = (tmp_path / "out").rglob("*samples_tiny_colours.jsonl")
    answers = [json.loads(line)["filtered_resps"][0] for line in logged.read_text().splitlines()]
    assert len(answers) == 4
    assert scores["exact_match,none"] == pytest.approx(sum(answer == "red" for answer in answers) / 4)


def test_the_lines_for_vlmevalkit(tiny, questions) -> None:
    """docs/evaluation.md, run with a message as VLMEvalKit gives it."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"Path": Path}
    exec(code, names)  # noqa: S102 - our own page
    model = load_model(tiny("v2_6")).eval()
    message = [{"type": "image", "value": str(questions.parent / "0.png")}, {"type": "text", "value": "Colour 0?"}]
    answer = names["generate_inner"](SimpleNamespace(model=model), message)
    encoder = ChatPipeline(model).encoder(ChatPromptOptions())
    sample = split_answer(read(questions)[0])[0]
    tokenizer = ChatPipeline(model).tokenizer
    assert answer == generate_answers(model, tokenizer, encoder, [sample], max_new_tokens=1024)[0]
