"""Fixtures: tiny checkpoints and the demo data, made once per session; no network, few threads."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from finetune.encoding.encoder import Encoder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("DOWNSAMPLE_MODE", None)  # a setting of the user's runs
# Test processes side by side have a core each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # not what the process that started this one has set for itself
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# In the background of a shell Ctrl-C is ignored, under nohup SIGHUP, and by every program that a test starts.
for _ignored, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_ignored) is signal.SIG_IGN:
        signal.signal(_ignored, _usual)


# Files that take long; begun last, one process would wait for the other.
_LONG = ("test_matrix", "test_modes", "test_published_launchers", "test_learning", "test_resume.", "test_streaming_run")
_LONG += ("test_llamafactory", "test_end_to_end", "test_zero3", "test_readme", "test_length_policy")
_LONG += ("test_downsample_mode", "test_terminal", "test_benchmark_rounds", "test_launchers")


_OF_A_RUN = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "LOCAL_SIZE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order within a file stays."""
    items.sort(key=lambda item: not any(name in item.path.name for name in _LONG))


def pytest_collection(session: pytest.Session) -> None:
    """Modules are imported now, which are no garbage to search for."""
    gc.disable()


def pytest_collection_finish() -> None:
    """They are there to stay: no search for garbage, of which every Trainer makes some, goes through them."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_deepspeed_left() -> Iterator[None]:
    """Flags with --deepspeed set variables for their process; the next test is another run."""
    before = {name: os.environ.get(name) for name in _OF_A_RUN}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Several threads only wait for each other on networks of this size."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a tiny checkpoint by its name in ``variants``, mostly a family; callers must not write into it."""
    from variants import experts_of, family_name

    from finetune.tiny.checkpoint_writer import write_tiny_checkpoint

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("tiny") / name
            made[name] = write_tiny_checkpoint(family_name(name), folder, experts=experts_of(name))
        return made[name]

    return make


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.json (32 records) and eval.json (8); callers must not write into it."""
    from finetune.tiny.demo_dataset import write_demo_dataset

    return write_demo_dataset(tmp_path_factory.mktemp("demo") / "data", train=32, eval=8)


@pytest.fixture(scope="session", autouse=True)
def reader_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is cached about data files goes into a folder of the session."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of image files of every troublesome kind; callers must not write into it."""
    from zoo import write_zoo

    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def forked_python(reader_cache: Path) -> Iterator[str]:
    """A python for scripts and ``-m`` whose processes have imported what training needs when they start."""
    from fork_server import forking

    with forking() as program:
        yield program


@pytest.fixture
def write_records(zoo: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a data file with one record per image name (None for text only), or with given records."""

    def write(*images: Any, name: str = "data.json", **changes: Any) -> Path:
        records = []
        for number, image in enumerate(images):
            if isinstance(image, (str, type(None))):
                turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
                image = {"id": str(number), "conversations": turns, **({"image": str(zoo / image)} if image else {})}
            records.append({**image, **changes} if isinstance(image, dict) else image)
        (tmp_path / name).write_text(json.dumps(records))
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., Encoder]:
    """An encoder of Llama3-V 2.5 with 4 placeholders per item; its vocabulary is shared."""
    from golden_tokenizers import SMALL_IMAGES, tokenizer

    from finetune.encoding.encoder import Encoder
    from finetune.families import by_name

    first = Encoder(by_name("llama3_v2_5"), tokenizer("llama3"), SMALL_IMAGES)

    def make(max_length: int | None = None) -> Encoder:
        made = object.__new__(Encoder)
        made.__dict__.update(first.__dict__, max_length=max_length)
        return made

    return make
