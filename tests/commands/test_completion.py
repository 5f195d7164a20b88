"""Shell completion, asked as a shell asks."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from finetune.__main__ import COMMANDS, main


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("completion") / "completion.bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    return str(path)


def completed(script: str, *words: str, cwd: str = "/") -> list[str]:
    """What bash offers for the last of some words."""
    code = (
        f"source {script}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
        "$(complete -p minicpmv-finetune | sed -E 's/.*-F ([^ ]+).*/\\1/'); printf '%s\\n' ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_commands_and_flags(script) -> None:
    assert set(COMMANDS) <= set(completed(script, "minicpmv-finetune", ""))
    assert completed(script, "minicpmv-finetune", "ev") == ["evaluate"]
    assert completed(script, "minicpmv-finetune", "train", "--learning_r") == ["--learning_rate"]
    assert "--metric" in completed(script, "minicpmv-finetune", "evaluate", "--metr")
    assert set(completed(script, "minicpmv-finetune", "init", "--task", "g")) == {"grounding", "gui"}


def test_files_where_a_file_is_wanted(script, tmp_path) -> None:
    (tmp_path / "mine.json").touch()
    assert completed(script, "minicpmv-finetune", "train", "--data_path", "mi", cwd=str(tmp_path)) == ["mine.json"]
    assert completed(script, "minicpmv-finetune", "train", "mi", cwd=str(tmp_path)) == ["mine.json"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell, capsys) -> None:
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert "minicpmv-finetune" in printed
    assert "learning_rate" in printed
