"""The performance table of docs/performance.md is that of the measured figures, and every benchmark explains itself."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from finetune.commands.check import main as check
from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.readers.mixture import open_data

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import their neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def table(bare: None) -> ModuleType:
    return importlib.import_module("table")


@pytest.fixture
def scaling(bare: None) -> ModuleType:
    return importlib.import_module("scaling_model")


def row(benchmark: str, case: str, ratio: float, **more: str) -> dict[str, str]:
    made = {"benchmark": benchmark, "case": case, "ours": "1", "theirs": str(ratio), "ratio": str(ratio), "unit": "s"}
    return made | {"versions": "python=3.11 torch=2", "hardware": "2 cores", "commit": ""} | more


def test_the_page_has_the_table_of_the_newest_figures():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "table.py"), "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"docs/performance.md is old: python benchmarks/table.py\n{done.stderr}"


def test_the_newest_row_counts_and_missing_ones_are_told(table):
    rows = [
        row("records", "reopening, 10 records, 1 MB json", 3),
        row("records", "reopening, 20 records, 1 MB json", 4, hardware="4 cores", commit="abc1234"),
        row("records", "private memory while indexing, 20 records", 9),
        row("packing", "rank imbalance, 8 ranks, batch_rebalance", 5),
    ]
    lines = table.section(rows).splitlines()
    assert len(lines) == len(table.GOALS) + 4
    found = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert "| **4** | 1 | 4 | s | abc1234 |" in found["opening a million records again"]
    assert "not measured" in found["their private memory"], "another case"
    assert "not measured" in found["slowest of 8 ranks by their mean"], "that of the longer case"
    assert "**5**" in found["the same"]
    assert lines[-1] == "Measured on 2 cores; 4 cores; python 3.11, torch 2."


def test_a_page_without_marks_is_an_error(table):
    with pytest.raises(ValueError, match="needs a line"):
        table.written("# Nothing", [])


def test_results_are_rows_of_numbers(bare):
    for line in importlib.import_module("results").rows():
        assert None not in line, "more cells than columns"
        assert all(float(line[name]) >= 0 for name in ("ours", "theirs", "ratio")), line


def test_a_row_names_the_commit_of_its_code(bare, tmp_path, monkeypatch):
    results = importlib.import_module("results")
    file = tmp_path / "results.csv"
    file.write_text(",".join(results.COLUMNS) + "\n2026-01-01,records,old,1,2,2,s,python=3.11,2 cores\n")
    monkeypatch.setattr(results, "FILE", file)
    results.append("records", [("new", 1.0, 2.0, 2.0, "s")], ["torch"])
    assert [row["commit"] for row in results.rows()] == ["", results.commit(FOLDER)]
    assert results.commit(tmp_path) == "", "no repository"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.py").write_text("1")
    for words in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert results.commit(tmp_path) == head[:7], "a file beside the code is not of it"
    (tmp_path / "a.py").write_text("2")
    assert results.commit(tmp_path) == f"{head[:7]}+"


def test_the_network_measured_against_has_our_loss_and_gradients(bare, tiny, tmp_path):
    """The published forward pass, written again, and ours, on a picture that is cut and one that is not."""
    module = importlib.import_module("official_network")
    samples, collate = (getattr(importlib.import_module("official_samples"), n) for n in ("OfficialSamples", "collate"))
    folder, config = tiny("llama3_v2_5"), json.loads((tiny("llama3_v2_5") / "config.json").read_text())
    records = []
    for number, size in enumerate([(300, 170), (90, 110)]):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{number}.png")
        words = "a red car " * (5 - 3 * number)
        turns = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": words.strip()}]
        records.append({"id": str(number), "image": str(tmp_path / f"{number}.png"), "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    tokenizer, ours = load_tokenizer(folder), load_model(folder, dtype=torch.float32).train()
    theirs = module.OfficialNetwork(load_model(folder, dtype=torch.float32)).train()
    made = samples(records, tokenizer, config["query_num"], config["slice_config"]["scale_resolution"])
    out = theirs(**collate([made[0], made[1]]), num_items_in_batch=100)
    encoder = Encoder(ours.config.family, tokenizer, config)
    examples = [encoder.encode(sample) for sample in open_data(tmp_path / "data.json", None)]
    loss = ours(**pad(examples, encoder.pad_id), num_items_in_batch=100).loss
    assert len(examples[0].tgt_sizes) > 2 > len(examples[1].tgt_sizes)
    assert out["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    out["loss"].backward()
    loss.backward()
    wanted = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_the_benchmark_for_gpus_runs(bare, side, monkeypatch, capsys):
    """A step of either side on a small network, so that the script is ready where a GPU is."""
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "ITEMS", {1: 1, 3: 1})
    given = Namespace(method="lora", layers=1, tiny=True, device="cpu", memory=False, steps=1)
    module.side_main(side, given)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["rate"] > 0
    assert (found["operations"] > 0) == (side == "ours")
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(SystemExit):
        module.main(["--device", "cpu"])
    assert "no GPU here" in capsys.readouterr().err


def test_the_benchmark_of_checking_runs(bare, monkeypatch, capsys):
    """A small round, with the checks in this process, where nothing has to be loaded again."""
    module, commands = importlib.import_module("checking"), []

    def measured(command: list[str], folder: Path) -> tuple[float, float]:
        commands.append(command[1:])
        done = check(command[4:]) if command[1:4] == ["-m", "finetune", "check"] else module.main(command[2:])
        assert done == 0
        return 0.01, 500.0 + 40 * len(commands)

    monkeypatch.setattr(module, "_measured", measured)
    assert module.main(["--records", "30", "--dry"]) == 0
    assert [command[0] for command in commands] == ["-m", "-m", str(FOLDER / "checking.py")]
    printed = capsys.readouterr().out
    assert "30 records" in printed
    assert "CPU time, check of 30 records, v2_6" in printed
    assert module.main(["--records", "30", "--dry", "--family", "llama3_v2_5"]) == 0
    monkeypatch.setattr(module, "_GOAL_MS", 0.1)
    assert module.main(["--records", "30", "--dry"]) == 1, "missed"


def test_time_and_memory_are_those_of_a_command(bare, tmp_path):
    measured = importlib.import_module("checking")._measured
    busy = "import time; kept = bytearray(60_000_000)\nwhile time.process_time() < 0.3: pass"
    seconds, held = measured([sys.executable, "-c", busy], tmp_path)
    assert seconds >= 0.3
    assert held > 60
    with pytest.raises(SystemExit, match="ended with"):
        measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_the_benchmark_of_short_commands_runs_both_sides(bare, capsys):
    module = importlib.import_module("startup")
    assert module.main(["help", "--runs", "1", "--dry", "--before", str(ROOT)]) in (0, 1), "one side is the other"
    *case, ours, theirs, ratio = capsys.readouterr().out.split()
    assert " ".join(case) == "CPU time, finetune.py --help"
    assert float(ratio) == pytest.approx(float(theirs) / float(ours), rel=0.3)
    with pytest.raises(SystemExit, match="ended with 2: "):
        module.cpu_seconds([sys.executable, "finetune.py", "--no_such_flag", "1"], ROOT, {})


def test_the_benchmark_of_manifests_runs_both_sides(bare, tmp_path, capsys):
    main = importlib.import_module("manifest").main
    main(["--gigabytes", "0.002", "--rounds", "1", "--dry", "--folder", str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["waiting", "manifest", "manifest", "manifest"]
    assert all(float(word) > 0 for row in rows for word in row[-4:-1])
    assert not list(tmp_path.iterdir())


def test_the_benchmark_of_sounds_runs_both_sides(bare, capsys):
    importlib.import_module("log_mel").main(["--rounds", "1", "--dry"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[3] for row in rows] == ["1", "5", "15", "30"]
    assert all(float(word) > 0 for row in rows for word in row[5:8])


def test_no_goal_is_there_twice(table):
    cases = [(goal.benchmark, goal.case) for goal in table.GOALS]
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script):
    """A docstring, which --help prints."""
    tree = ast.parse((FOLDER / script).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert any("ArgumentParser(" in call and "description=__doc__" in call for call in calls)


def test_help_is_printed_and_a_wrong_name_refused():
    run = [sys.executable, str(FOLDER / "all.py")]
    done = subprocess.run([*run, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "merge_memory" in done.stdout
    done = subprocess.run([*run, "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no benchmark nothing" in done.stderr


def test_make_bench_runs_them():
    make = ["make", "--dry-run", "--no-print-directory", "bench"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == ".venv/bin/python benchmarks/all.py"


def test_the_page_about_scaling_has_the_tables_of_its_program(scaling):
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert scaling.written(page) == page, "docs/scaling.md is old: python benchmarks/scaling_model.py"


def test_what_the_model_of_a_step_says(scaling):
    """Sums that can be done by hand, and what must be so whatever the assumptions."""
    assert scaling.operations("full") == pytest.approx(43e12, rel=0.02), "6 x 8.2 billion x 662, and the tower's"
    assert scaling.operations("lora") < 0.6 * scaling.operations("full")
    size, fast = scaling.size("full"), scaling.FAST
    alone = scaling.step(scaling.FULL, 8, 662, replace(fast, hop=0, overlap=0))
    assert alone.talk == pytest.approx(3 * 2 * size.weights * 7 / 8 / (450e9 * 0.8))
    assert alone.seconds == alone.compute + alone.talk
    hidden = scaling.step(scaling.FULL, 8, 662, replace(fast, overlap=1))
    assert hidden.seconds == max(hidden.compute, hidden.talk)
    for method in (scaling.FULL, scaling.LORA):
        found = [scaling.step(method, gpus, 4096, fast) for gpus in (8, 64, 512)]
        assert [made.efficiency for made in found] == sorted((made.efficiency for made in found), reverse=True)
        packed, single = found[-1], scaling.step(method, 512, 662, fast)
        assert packed.efficiency > single.efficiency
    sharded, near = (scaling.step(scaling.FULL, 512, 662, fast, hpz=hpz) for hpz in (False, True))
    assert near.talk < sharded.talk
    assert near.states > sharded.states
