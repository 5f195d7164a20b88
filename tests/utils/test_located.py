"""The location of a record: added once to a user error, to no other exception, and kept by pickling."""

from __future__ import annotations

import pickle

import pytest

from finetune.sample import DataError, Source
from finetune.utils.errors import CheckpointError, UserError, located


def failed(error: Exception, location: object, outer: object = "all.json") -> Exception:
    with pytest.raises(type(error)) as caught, located(outer), located(location):
        raise error
    return caught.value


@pytest.mark.parametrize("kind", [UserError, DataError, CheckpointError])
def test_the_innermost_location_is_added_once(kind: type[UserError]) -> None:
    error = kind("turn 0 is empty")
    found = failed(error, Source("train.json", 3, "a"), Source("all.json", 9))
    assert found is error
    assert str(found) == "train.json, record 3 (id 'a'): turn 0 is empty"


def test_other_exceptions_stay_as_they_are() -> None:
    assert str(failed(RuntimeError("of a library"), "train.json, record 3")) == "of a library"


def test_it_survives_the_way_from_another_process() -> None:
    error = failed(DataError("turn 0 is empty"), "train.json, record 3")
    assert str(pickle.loads(pickle.dumps(error))) == "train.json, record 3: turn 0 is empty"


def test_a_location_cannot_control_the_terminal() -> None:
    error = failed(DataError("turn 0 is empty"), Source("\x1b[2Jtrain.json", 3))
    assert "\x1b" not in str(error)
