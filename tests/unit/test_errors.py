"""Errors cross process borders whole."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

from ps import errors
from ps.errors import IdRangeError, InputError, MantaError, ServerError

EXAMPLES: dict[str, tuple[Any, ...]] = {
    "InputError": ("bad weights", "clicks"),
    "IdRangeError": ("clicks", "ads", -(2**63), 5),
    "ServerError": (422, "Id out of range", "id 9 is not in [0, 5)"),
}
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, MantaError)]


def example(cls: type[MantaError]) -> MantaError:
    return cls(*EXAMPLES.get(cls.__name__, ("table 'ads': something is wrong",)))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_pickling(cls: type[MantaError]) -> None:
    error = example(cls)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error, protocol))
        assert type(back) is cls
        assert str(back) == str(error) != ""
        assert back.args == error.args
        assert vars(back) == vars(error)
    assert str(copy.copy(error)) == str(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_caught_as_a_manta_error_and_says_what_it_is(cls: type[MantaError]) -> None:
    with pytest.raises(MantaError) as caught:
        raise example(cls)
    assert type(caught.value) is cls
    assert cls.__doc__


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_input_is_a_value_error_and_nothing_else_is(cls: type[MantaError]) -> None:
    bad_input = {"ConfigError", "DataError", "ExportError", "InputError", "IdRangeError"}
    bad_input |= {"StorageError", "SnapshotError", "CheckpointError"}
    assert issubclass(cls, ValueError) == (cls.__name__ in bad_input)


def test_a_range_error_names_feature_id_range_and_table() -> None:
    error = IdRangeError("clicks", "ads", 9, 5)
    assert str(error) == "feature 'clicks': id 9 is not in [0, 5) of table 'ads'"
    assert (error.feature, error.table, error.bad_id, error.num_rows) == ("clicks", "ads", 9, 5)
    assert isinstance(error, InputError)


def test_an_input_error_shows_its_message_only() -> None:
    assert str(InputError("bad shape", "clicks")) == "bad shape"
    assert InputError("bad shape", "clicks").feature == "clicks"
    assert InputError("bad shape").feature is None


def test_a_server_error_shows_status_title_and_detail() -> None:
    error = ServerError(422, "Id out of range", "id 9")
    assert str(error) == "422 Id out of range: id 9"
    assert (error.status, error.title, error.detail) == (422, "Id out of range", "id 9")
