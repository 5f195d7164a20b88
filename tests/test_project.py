"""The files around the code: requirement bounds, make targets, license."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in (raw.partition("#")[0].strip() for raw in text.splitlines()) if line]


def test_lowest_constraints_are_the_lower_bounds() -> None:
    """``make test-lowest`` installs what requirements.txt promises, package by package."""
    bounds = {}
    for line in lines("requirements.txt"):
        match = re.fullmatch(r"([a-z0-9-]+)>=([\d.]+),<([\d.]+)", line)
        assert match, f"not a range with both ends: {line}"
        bounds[match[1]] = match[2]
    pins = dict(line.split("==") for line in lines("constraints-lowest.txt"))
    assert list(pins) == list(bounds)
    for package, pin in pins.items():
        assert re.fullmatch(rf"{re.escape(bounds[package])}(\.0)*", pin), (package, bounds[package], pin)


def test_the_card_is_required() -> None:
    """The packages that the project is built on."""
    named = {line.partition(">")[0] for line in lines("requirements.txt")}
    assert {"torch", "transformers", "deepspeed", "peft", "accelerate", "pillow", "timm", "sentencepiece"} <= named


def test_every_file_of_the_package_is_installed() -> None:
    """What is no Python is named in pyproject.toml, or a wheel has it not."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    installed = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    others = (path for path in (ROOT / "finetune").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert {path for path in others if path.suffix != ".py"} == installed


def test_modules_found_by_path_have_names_of_their_own() -> None:
    """Of two modules of one name the first import in a process would decide for all tests."""
    paths = [path for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    names = [path.stem for path in paths if not path.stem.startswith(("test_", "conftest", "__"))]
    assert len(names) > 50
    assert [name for name in names if names.count(name) > 1] == []


def test_no_link_and_no_environment_is_part_of_the_project(tmp_path: Path) -> None:
    """A link to somebody's environment would replace that of everyone who takes the commit."""
    git = ["git", "-C", str(ROOT)]
    listed = subprocess.run([*git, "ls-files", "--stage"], capture_output=True, text=True, check=False)
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / ".venv").symlink_to(tmp_path)
    seen = subprocess.run(["git", "-C", str(tmp_path), "status", "--short"], capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["??", ".gitignore"]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_train_runs_the_demo_with_the_python_of_the_project() -> None:
    """Even if another python or torchrun is active."""
    done = make("--dry-run", "train", "PYTHON=python3.99")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f'PYTHON="{ROOT}/.venv/bin/python" .venv/bin/python -m finetune demo'


def test_old_python_is_refused(tmp_path: Path) -> None:
    """The message names the version found and the way out, before anything is made."""
    old = tmp_path / "python3.8"
    # The same interpreter claiming to be older: runs the check with the version replaced.
    old.write_text('#!/bin/sh\nexec python3 -c "import sys; sys.version_info = (3, 8, 1); $2"\n', encoding="utf-8")
    old.chmod(0o755)
    target = ".venv-lowest/bin/python"
    done = make("--always-make", target, f"PYTHON={old}")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr
    assert "3.8" in done.stderr


def test_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
