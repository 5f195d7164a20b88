"""``finetune.run.train``: a run from Python, its result, and errors before and during it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.run import RunFailedError, train
from finetune.utils.errors import UserError


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_run_from_python(tiny, demo_data, tmp_path, capfd) -> None:
    result = train(
        nproc=1,
        model_name_or_path=tiny("v2_0"),
        data_path=demo_data / "train.json",
        output_dir=tmp_path / "out",
        use_lora=True,
        lora_parts=["llm"],
        max_steps=1,
        eval_data_path=None,
        verify_adapter="auto",
    )
    assert (result.folder, result.steps, result.verified) == (tmp_path / "out", 1, True)
    assert (result.folder / "adapter_model.safetensors").is_file()
    assert result.train_loss == result.values["train_loss"] > 0
    assert result.eval_loss is None
    printed = capfd.readouterr().out
    assert json.loads(printed.splitlines()[-1].removeprefix("result="))["steps"] == 1


def test_what_is_wrong_is_raised_before_a_process_starts(tiny, tmp_path, monkeypatch) -> None:
    model = tiny("v2_0")
    monkeypatch.setattr("finetune.run.subprocess.Popen", None)
    with pytest.raises(UserError, match="did you mean --learning_rate"):
        train(model_name_or_path=model, data_path=tmp_path, learning_rat=1e-4)
    with pytest.raises(UserError, match=r"no\.yaml: no such file"):
        train(tmp_path / "no.yaml")
    with pytest.raises(UserError, match=r"train\(\): deepspeed has a value that is not"):
        train(deepspeed={"zero_optimization": {1, 2}})


def test_a_run_that_fails_has_its_message_and_status(tiny, tmp_path, monkeypatch, forked_python) -> None:
    monkeypatch.setattr("sys.executable", forked_python)
    data = tmp_path / "data.json"
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."}]
    (tmp_path / "page.jpg").write_text("<html></html>")
    data.write_text(json.dumps([{"id": "0", "image": "page.jpg", "conversations": turns}]))
    with pytest.raises(RunFailedError, match=r"page\.jpg is a web page") as caught:
        train(nproc=1, model_name_or_path=str(tiny("v2_0")), data_path=data, output_dir=tmp_path / "out", max_steps=1)
    assert (caught.value.exit_code, caught.value.result["status"]) == (2, "error")
    assert not Path(tmp_path / "out" / "trainer_state.json").exists()
