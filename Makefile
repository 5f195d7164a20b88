# make train         installs everything into .venv and trains the built-in demo (two CPU processes, or the GPUs)
# make test          runs the tests
# make test-lowest   runs them with the oldest supported packages, in .venv-lowest
# make test-web      runs the tests of the chat page and of the reports in headless Chromium, in .venv-web
# make lint          ruff and pyright
# make docs          builds the documentation site of docs/ into build/site, in .venv-docs; a broken link fails
# make fuzz          feeds damaged records, images, audio and videos to the readers, for MINUTES=10
# make bench         measures the performance table of docs/performance.md again and writes it
# make soak          kills runs at random and checks what is lost and what stays (about half an hour; two hosts need root)
# make audit         looks the installed packages up in the advisory databases
# make install, make clean (keeps output/)
#
# PYTHON=python3.12 chooses the interpreter, PYTEST="-k launchers" passes options to pytest, WORKERS=4 runs the tests in
# four processes (files stay whole).

PYTHON ?= python3
PYTEST ?=
WORKERS ?= 2
MINUTES ?= 10
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet

.PHONY: train test test-lowest test-web lint docs fuzz bench soak audit install install-dev clean

train: install
	PYTHON="$(CURDIR)/.venv/bin/python" .venv/bin/python -m finetune demo

test: install-dev
	.venv/bin/python -m pytest $(SIDE_BY_SIDE) $(PYTEST)

# Of the end-to-end tests only the LoRA runs: the others take minutes and meet no other package.
# One process and one LoRA run from shell to adapter; the parallel modes are compared with the newest packages.
LOWEST := tests/arguments tests/batching tests/checkpoints tests/commands tests/data_check tests/data_files \
  tests/encoding tests/media tests/models tests/readers tests/templates tests/training \
  tests/test_trainer.py tests/test_imports.py

test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest $(SIDE_BY_SIDE) $(LOWEST) --ignore tests/models/test_zero3.py $(PYTEST)
	.venv-lowest/bin/python -m pytest tests/test_end_to_end.py -k "lora_run_ends_well or adapter_loads" $(PYTEST)

test-web: .venv-web/installed
	.venv-web/bin/python -m pytest tests/chat/test_web.py tests/chat/test_browser.py tests/pages/test_browser.py $(PYTEST)

lint: install-dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=true .venv-docs/bin/mkdocs build --strict --site-dir build/site

fuzz: install-dev
	.venv/bin/python tests/fuzz.py --minutes $(MINUTES)

# One after another: side by side they would measure each other.
bench: install-dev
	.venv/bin/python benchmarks/all.py

soak: install-dev
	.venv/bin/python tests/soak/soak.py
	.venv/bin/python tests/soak/two_hosts.py

# In an environment of its own, which looks at the other.
audit: install-dev .venv-audit/installed
	.venv-audit/bin/pip-audit --skip-editable --path "$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

.venv-audit/installed: | .venv-audit/bin/python
	.venv-audit/bin/python $(PIP_INSTALL) 'pip-audit>=2.9,<3'
	touch $@

install: .venv/installed
install-dev: .venv/installed-dev

# The stamps: a second run installs nothing unless the requirements have changed.
.venv/installed: requirements.txt pyproject.toml | .venv/bin/python
	.venv/bin/python $(PIP_INSTALL) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/python $(PIP_INSTALL) --editable '.[dev]'
	touch $@

.venv-lowest/installed: requirements.txt constraints-lowest.txt pyproject.toml | .venv-lowest/bin/python
	.venv-lowest/bin/python $(PIP_INSTALL) --constraint constraints-lowest.txt --editable '.[dev]'
	touch $@

# gradio asks for an older Pillow than the newest that the rest is tested with.
.venv-web/installed: requirements.txt pyproject.toml | .venv-web/bin/python
	.venv-web/bin/python $(PIP_INSTALL) --editable '.[dev,web]' playwright
	touch $@

# Only the generator of the pages, not the toolkit: the extra is read out of pyproject.toml.
.venv-docs/installed: pyproject.toml | .venv-docs/bin/python
	.venv-docs/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  | .venv-docs/bin/python $(PIP_INSTALL) --requirement /dev/stdin
	touch $@

.venv/bin/python .venv-lowest/bin/python .venv-web/bin/python .venv-audit/bin/python .venv-docs/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(@D:/bin=)

clean:
	rm -rf .venv .venv-lowest .venv-web .venv-audit .venv-docs build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find finetune tests -name __pycache__ -exec rm -rf {} +
