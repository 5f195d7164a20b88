"""Runs over streamed data: every record once per pass on two ranks, resumed where it stopped, saved and verified."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from side_by_side import ranks, run_all
from streaming_worker import run
from torch.utils.data import DataLoader

from dataset import StreamedDataset
from finetune.arguments.parse import parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.resume import ResumeError
from finetune.checkpoints.stream_resume import assignment, batches_seen
from finetune.data_files.streaming import Stream
from finetune.encoding.encoder import Encoder
from finetune.encoding.sample_policy import SamplePolicy
from finetune.models import load_tokenizer
from finetune.readers import read
from finetune.readers.streamed_samples import StreamedSamples
from finetune.sample import DataError
from finetune.utils.errors import ArgumentError

WORKER = Path(__file__).with_name("streaming_worker.py")
ONE = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "0")
TEXTS = 11

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "train.jsonl"
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    path.write_text("".join(json.dumps({"id": str(n), "conversations": turns}) + "\n" for n in range(TEXTS)))
    return path


def test_two_ranks_see_every_record_once_per_pass(
    tiny: Tiny, demo_data: Path, tmp_path: Path, forked_python: str
) -> None:
    """From flags to a verified adapter; the loaders have processes of their own."""
    records = json.loads((demo_data / "train.json").read_text())[:TEXTS]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--model_name_or_path", str(tiny("llama3_v2_5")), "--data_path", str(data), "--use_lora", "true"]
    words += ["--image_root", str(demo_data), "--output_dir", str(tmp_path / "out"), "--save_strategy", "no"]
    words += ["--streaming", "true", "--buffer_size", "4", "--max_steps", "5", "--per_device_train_batch_size", "1"]
    words += ["--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1", "--max_slice_nums", "1"]
    words += ["--use_cpu", "true", "--report_to", "none"]
    outputs = run_all(*ranks([forked_python, str(WORKER), str(tmp_path), *words]))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert any("verified" in output.stdout for output in outputs)
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [(report["world"], len(report["seen"])) for report in reports] == [(2, 10)] * 2
    first_pass = []
    for rank, report in enumerate(reports):
        sources = [source for batch in report["seen"] for source in batch]
        share = len(list(Stream([data], seed=42, buffer_size=4).one_pass(0, rank, 2)))
        assert 0 < share <= len(sources), "the run is shorter than a pass"
        first_pass += [source.rpartition("(id ")[2] for source in sources[:share]]
    assert Counter(first_pass) == {f"{str(record['id'])!r})": 1 for record in records}


def test_a_resumed_run_goes_on_where_it_stopped(tiny: Tiny, lines: Path, tmp_path: Path) -> None:
    saving = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", *ONE)
    whole = run(tiny("llama3_v2_5"), lines, tmp_path, *saving)
    whole_seen = whole.seen
    assert (whole.state.global_step, len(whole_seen)) == (4, 8)
    half = tmp_path / "checkpoint-2"
    rest = run(tiny("llama3_v2_5"), lines, tmp_path / "rest", *saving, resume=half)
    rest_seen = rest.seen
    assert len(rest_seen) == 4
    assert rest_seen == whole_seen[4:]
    assert rest.state.epoch == whole.state.epoch
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (whole, rest)]
    assert losses[0] == losses[1]
    now = assignment("the data", rest.args)
    with pytest.raises(
        ResumeError,
        match=r"records were assigned to ranks and workers with data, seed and buffer_size .* \(now the data\)",
    ):
        batches_seen(half, now)
    with pytest.raises(ResumeError, match="was streamed and this one is not"):
        batches_seen(half, None)
    (half / "stream.json").unlink()
    with pytest.raises(ResumeError, match="was not streamed and this one is"):
        batches_seen(half, now)
    assert batches_seen(half, None) == 0


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--val_size", "0.1"], DataError, "a stream cannot be split"),
        (["--max_samples", "5"], DataError, "limit training with --max_steps"),
        (["--buffer_size", "0"], ArgumentError, "must be at least 1"),
        (["--max_steps", "-1"], ArgumentError, "--streaming true needs --max_steps"),
    ],
)
def test_wishes_that_a_stream_cannot_fulfil(
    lines: Path, flags: list[str], error: type[Exception], message: str
) -> None:
    from dataset import make_supervised_data_module

    words = ["--model_name_or_path", "m", "--data_path", str(lines), "--streaming", "true", "--max_steps", "1"]
    with pytest.raises(error, match=message):
        make_supervised_data_module(parse_arguments([*words, *flags]).data, None)  # pyright: ignore[reportArgumentType]


def test_a_bad_line_leaves_an_empty_row(tiny: Tiny, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    good = {"conversations": turns}
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(good)}\n{{'bad': 1}}\n")
    checkpoint = resolve_base(str(tiny("llama3_v2_5")))
    encoder = Encoder(checkpoint.family, load_tokenizer(checkpoint.folder), checkpoint.config)
    streamed = StreamedSamples(Stream([path], seed=0), [read(path, records=[good])])
    report = tmp_path / "bad.jsonl"
    dataset = StreamedDataset(streamed, SamplePolicy(streamed.head, encoder, on_bad_sample="skip", report=report))
    rows = list(islice(dataset, 6))
    assert sum(len(row.input_ids) == 1 for row in rows) == 3
    assert dataset.first_usable().source == f"{path}, record 0"
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(line["record"], line["exception"]) for line in lines] == [(len(json.dumps(good)) + 1, "DataError")]
    assert "line 2: not valid JSON: JSON needs double quotes" in lines[0]["message"]
    with pytest.raises(DataError, match="line 2"):
        list(islice(StreamedDataset(streamed, SamplePolicy(streamed.head, encoder)), 6))


def test_batches_that_were_trained_before_are_empty_rows(lines: Path, tiny: Tiny) -> None:
    """Cheap to pass over; what follows them is what would have followed."""
    checkpoint = resolve_base(str(tiny("llama3_v2_5")))
    encoder = Encoder(checkpoint.family, load_tokenizer(checkpoint.folder), checkpoint.config)
    streamed = StreamedSamples(Stream([lines], seed=0), [read(lines)])
    dataset = StreamedDataset(streamed, SamplePolicy(streamed.head, encoder))
    loaders = [DataLoader(dataset, batch_size=2, collate_fn=list, num_workers=workers) for workers in (0, 2)]
    for loader in loaders:
        dataset.set_shard(1, 2, 2)
        whole = list(islice(loader, 7))
        dataset.set_shard(1, 2, 2, passed=3)
        rest = list(islice(loader, 7))
        assert [row.source for batch in rest[3:] for row in batch] == [
            row.source for batch in whole[3:] for row in batch
        ]
        assert [[len(row.input_ids) == 1 for row in batch] for batch in rest] == [[True] * 2] * 3 + [[False] * 2] * 4
