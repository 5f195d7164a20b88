from typing import Any

from finetune.media.numba_compiled import compiled


def test_without_a_folder_for_machine_code() -> None:
    """Numba finds none for what is in no file, as where nothing can be written."""
    made: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x", made)
    assert compiled(made["twice"])(21) == 42
