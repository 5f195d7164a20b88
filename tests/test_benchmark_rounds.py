"""Every benchmark makes a small round of both sides, so that what nobody starts for months still runs.

What a script does in a process of its own is done in this one, where nothing has to be loaded again.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 600}

SMALLER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Threads, type and processes of the scripts end with them."""
    threads, children = torch.get_num_threads(), set(multiprocessing.active_children())
    yield
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() == torch.float32
    for child in set(multiprocessing.active_children()) - children:
        child.terminate()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """A script by its name, with values of its own for some of its constants."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str, **constants: Any) -> ModuleType:
        module = importlib.import_module(name)
        for key, value in constants.items():
            monkeypatch.setattr(module, key, value)
        return module

    return load


@pytest.fixture
def few_pictures(script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the mix two small pictures and a large one."""
    classes = script("mix").CLASSES
    for name in list(classes):
        monkeypatch.delitem(classes, name)
    monkeypatch.setitem(classes, "640x480 jpg", 2)
    monkeypatch.setitem(classes, "1344x1344 jpg", 1)


def figures(printed: str) -> list[list[float]]:
    """Ours, theirs and the ratio of every line that has these three."""
    found = []
    for line in printed.splitlines():
        words = line.replace(",", "").split()
        numbers = [float(word) for word in words if word.replace(".", "", 1).isdigit() and "." in word]
        if len(numbers) >= 3:
            found.append(numbers[:3])
    assert all(number > 0 for each in found for number in each), printed
    return found


def test_samples(script, few_pictures, capsys):
    """Both sides and --image_backend fast, compared by the script itself."""
    script("samples", _RUNS=1, _TURN=0).main(["--rounds", "1", "--dry"])
    printed = capsys.readouterr().out
    assert "pixels of 3 samples are identical" in printed
    assert len(figures(printed)) == 9, "three cases of the mix and of two classes"


def test_transport(script, few_pictures, capsys):
    script("transport", _BATCHES=3, _WARM=1).main(["--rounds", "1", "--dry"])
    assert len(figures(capsys.readouterr().out)) == 1


def test_video(script, monkeypatch, capsys):
    """Both sides that need nothing more, in this process; the script itself compares the pixels."""
    module = script("video", SIZE=(320, 192), SECONDS=4, RATE=10, KEY_FRAMES=15, FRAMES=8)
    options = {name: replace(given, fps=2.0, max_frames=8) for name, given in module.FAMILIES.items()}

    class Side:
        def __init__(self, way: str, clip: Path) -> None:
            self.way, self.clip = way, clip

        def once(self, family: str, file: str = "") -> dict[str, float]:
            return module.once(self.way, self.clip, family, file)

    script("video", Side=Side, FAMILIES=options).main(["--rounds", "1", "--dry"])
    printed = capsys.readouterr().out
    assert printed.count("sequential: 0.0000 levels apart, 0 at most") == 2
    assert len(figures(printed)) == 4


def test_step(script, capsys):
    """Loss and gradients of both sides are compared by the script itself."""
    sizes = {"small": SMALL, "large": SMALL | {"vocab_size": 900}}
    module = script("step", SIZES=sizes, ROUNDS=1, LENGTHS=(31, 64, 115), LABELLED=(7, 16, 32))
    script("step", peak_in_its_own_process=lambda size, side: module.peak(size, side) / 1e6)
    module.main(dry=True)
    assert len(figures(capsys.readouterr().out)) == 3


def test_packing(script, capsys):
    script("packing", SAMPLES=640).main(["--dry"])
    assert len(figures(capsys.readouterr().out)) == 5


def test_adapter_bytes(script, capsys):
    config = script("gpu").config_of(2, tiny=True)
    script("adapter_bytes", CONFIG=config).main(dry=True)
    found = figures(capsys.readouterr().out)
    assert len(found) == 4
    assert found[2][2] > found[0][2], "adapters alone are the fewest bytes"


def test_preference(script, capsys):
    script("preference", ROUNDS=1, WORDS=8, VOCABULARY=5_000).main(dry=True, pairs=2)
    ratios = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step of")]
    assert len(ratios) == 10
    assert all(ratio > 0 for ratio in ratios)
    operations = ratios[:2] + ratios[4:6]
    assert operations[0] <= operations[2] <= 1.1, "answers that share their image cost less than the same without"
    assert operations[1] <= operations[3] <= 1.55


def test_records(script, capsys):
    """Each opening is a process, as memory is measured."""
    assert script("records", _REACHED=10).main(["--records", "300", "--dry"]) in (0, 1)
    printed = capsys.readouterr().out
    assert printed.count("reopening, 300 records") == 2
    assert printed.count("private memory while indexing") == 2


def test_merge_memory(script, capsys):
    module = script("merge_memory", SIZES=SMALL | {"vocab_size": 1024})
    script("merge_memory", alone=module.merge)
    module.main(["--layers", "1", "--dry"])
    printed = capsys.readouterr().out
    assert "ours " in printed
    assert "theirs " in printed


@pytest.mark.parametrize("case", ["LoRA", "mixture, LoRA, 2 rows with images"])
def test_plan_memory(script, capsys, case):
    """The smallest case of each network, planned and measured."""
    from tools.measured_peak import measured

    module = script("plan_memory")
    text = module.MIXTURE["text_config"]
    fewer = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "vocab_size": 2000}
    module = script(
        "plan_memory",
        CONFIG=module.CONFIG | {"num_hidden_layers": 2, "vocab_size": 2000},
        MIXTURE=module.MIXTURE | {"insert_layer_id": 1, "text_config": text | fewer},
    )
    setup, shape = module.CASES[case]
    script("plan_memory", CASES={case: (setup, replace(shape, tokens=128, items=min(shape.items, 1)))})
    script("plan_memory", alone=lambda name: measured(module.config_of(name), *module.CASES[name]))
    module.main([case], dry=True)
    ours, theirs, ratio = figures(capsys.readouterr().out)[0]
    assert 0.5 < ratio < 2, (ours, theirs)


def test_step_memory(script, monkeypatch, capsys):
    """Both sides in this process, of the smallest case of the other benchmark's network."""
    module, plan = script("step_memory"), script("plan_memory")
    setup, shape = plan.CASES["LoRA, images"]
    small = {case: (setup, replace(shape, tokens=128, items=1)) for case in ("LoRA, images, layers run again",)}
    small["LoRA, images"] = small["LoRA, images, layers run again"]
    script("plan_memory", CONFIG=plan.CONFIG | {"num_hidden_layers": 2, "vocab_size": 2000}, CASES=small)
    monkeypatch.setattr(module, "FAMILIES", ("v2_6",))
    script("step_memory", of=module.one).main(["--dry"])
    found = figures(capsys.readouterr().out)
    assert len(found) == 4
    assert all(ours <= theirs for ours, theirs, _ in found)


def test_end_to_end(script, tmp_path, capfd):
    """Every side on one rank without DeepSpeed; their losses are the same."""
    module = script(
        "end_to_end", RANKS=1, PER_RANK=3, STEPS=2, WARM=1, AHEAD=1, KINDS=((2, 64, 48, 6), (1, 500, 300, 9))
    )
    words, losses = module.flags, {}
    module.prepare(tmp_path)
    script("end_to_end", flags=lambda folder, side: _without(words(folder, side), "--deepspeed"))
    for side in module.SIDES:
        module.rank_main(tmp_path, side, None)
        found = json.loads(next(line for line in capfd.readouterr().out.splitlines() if line.startswith('{"rate"')))
        assert found["rate"] > 0
        losses[side] = found["losses"]
    for side in ("theirs", "theirs_plain"):
        module._compare(losses["ours"], losses[side])


def _without(flags: list[str], name: str) -> list[str]:
    at = flags.index(name)
    return flags[:at] + flags[at + 2 :]


def test_scaling(script, monkeypatch, forked_python, capsys):
    """One and two ranks of one way, in the processes of a run."""
    monkeypatch.setattr("sys.executable", forked_python)
    monkeypatch.setenv("PYTHON_EXEC", forked_python)  # by which torchrun starts ranks
    script("scaling", SIZES=script("scaling").SIZES | SMALLER, _STEPS=3, _LEFT_OUT=1, _BATCH=1).main(
        ["--ways", "DDP", "--dry"]
    )
    printed = capsys.readouterr().out
    assert "DDP, 1 ranks" in printed
    assert "DDP, 2 ranks" in printed


def test_evaluation(script, tmp_path):
    """Both sides in this process; the script itself compares the answers."""
    from finetune.commands.evaluate import main as evaluate

    few = {"QUESTIONS": 5, "BATCH": 2, "NEW_TOKENS": 4, "VOCABULARY": 700, "KINDS": ((2, 64, 48), (1, 300, 200))}
    module = script("evaluation", **few)
    module.prepare(tmp_path, None)
    assert evaluate(module.our_words(tmp_path)) == 0
    module.chat_one_by_one(tmp_path)
    module.compare(tmp_path)
    answers = json.loads((tmp_path / "theirs.json").read_text(encoding="utf-8"))
    (tmp_path / "theirs.json").write_text(json.dumps([*answers[:-1], "else"]), encoding="utf-8")
    with pytest.raises(AssertionError, match="1 of 5 answers differ; number 4"):
        module.compare(tmp_path)


def test_llamafactory_samples(script, few_pictures, monkeypatch, capsys):
    """Our side; what LLaMA-Factory's process would answer is said here."""
    module = script("llamafactory_samples")

    class Theirs:
        version = "0"

        def __init__(self, python: str, folder: Path, processor: Path) -> None:
            assert shutil.which(python)
            assert (folder / "tokenizer.json").is_file()

        def compare(self, number: int, ours: Any, file: Path) -> None:
            assert len(ours.input_ids) > 100

        def time(self, number: int) -> float:
            return 50.0

    monkeypatch.setattr(module, "_Theirs", Theirs)
    module.main(["python3", "image_processing_minicpmv.py", "--rounds", "1", "--dry"])
    assert len(figures(capsys.readouterr().out)) == 2
