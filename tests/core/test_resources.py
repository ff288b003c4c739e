"""Files of policies: read each time outside of servers, and once before a server starts."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.resources import Resources, load


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise L2PDError(f"{path.name}: cannot be read") from error


def test_without_a_server_a_file_is_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("first")
    assert load(read, file) == "first"
    file.write_text("second")
    assert load(read, file) == "second"


def test_a_server_reads_a_file_once_and_none_after_sealing(tmp_path: Path) -> None:
    file, other, missing = tmp_path / "file", tmp_path / "other", tmp_path / "missing"
    file.write_text("first")
    other.write_text("other")
    resources = Resources()
    with resources.in_use():
        assert load(read, file) == "first"
        with pytest.raises(L2PDError, match="cannot be read"):
            load(read, missing)
    resources.sealed = True
    file.unlink()
    missing.write_text("there now")
    for each in (resources, pickle.loads(pickle.dumps(resources))):
        with each.in_use():
            assert load(read, file) == "first"
            with pytest.raises(L2PDError, match="cannot be read"):
                load(read, missing)
            with pytest.raises(L2PDError, match="not loaded when the server started"):
                load(read, other)
    assert load(read, other) == "other"
