"""Reading untrusted files: only in the folder, within bounds, with errors of one line."""

import json
import os
from pathlib import Path

import pytest

from l2pd_plugins import L2PDError
from l2pd_plugins.files import (
    one_line,
    parse_json,
    path_inside,
    read_object,
    read_text,
    reading,
    require_file,
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read: Expecting value"),
        (b"[]", "holds a list; expected an object"),
        (b"7", "holds a number; expected an object"),
        (b"null", "holds null; expected an object"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 64"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64"),
        (b'{"a": 1, "a": 2}', "the key 'a' is given twice, with two values"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\uDC00": 1}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "it is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "it is UTF-16, expected UTF-8"),
    ],
)
def test_text_that_is_not_a_json_object_is_refused(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(L2PDError) as raised:
        read_object(path, "x.json")
    told = str(raised.value)
    assert told.startswith("x.json ") and words in told and "\n" not in told and len(told) < 600


def test_a_json_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"a": "\\ud83d\\ude00é", "b": 1, "b": 1}'.encode())
    assert read_object(path) == {"a": "\U0001f600é", "b": 1}
    deep = '{"a": ' + "[" * 63 + "]" * 63 + "}"
    assert parse_json(deep) == json.loads(deep)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "it is a folder"),
        (os.mkfifo, "it is a pipe"),
        (lambda path: path.symlink_to(path), "Too many levels"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (lambda path: path.write_bytes(b"12345"), "it has 5 bytes, expected at most 4"),
    ],
)
def test_a_path_that_is_not_a_regular_file_is_refused(tmp_path: Path, make, words: str) -> None:
    """Reading a pipe without a writer would wait forever, and a device never ends."""
    make(tmp_path / "x")
    with pytest.raises(L2PDError, match=f"x cannot be read: .*{words}"):
        require_file(tmp_path / "x", largest=4)
    with pytest.raises(L2PDError, match="x cannot be read"):
        read_text(tmp_path / "x", largest=4)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "/etc/passwd",
        "\0",
        "a\0",
        5,
        None,
        ["x"],
        "link",
    ],
)
def test_a_name_outside_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "x").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "x")
    with pytest.raises(L2PDError) as raised:
        path_inside(folder, name)
    assert "secret" not in str(raised.value) and str(raised.value).isprintable()


def test_a_name_in_the_folder_is_accepted(tmp_path: Path) -> None:
    """Links within the folder, a folder that is a link, and links of the hub's cache are read."""
    folder = tmp_path / "real"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "x").write_text("1")
    (folder / "y").symlink_to("part/x")
    (tmp_path / "other").symlink_to(folder)
    for inside in (folder, tmp_path / "other"):
        assert path_inside(inside, "part/x").read_text() == "1"
        assert path_inside(inside, "y").read_text() == "1"
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").write_text("2")
    (snapshot / "x").symlink_to("../../blobs/123")
    assert path_inside(snapshot, "x").read_text() == "2"
    (snapshot / "y").symlink_to("../../../../real/part/x")
    with pytest.raises(L2PDError, match="'y' is a link that leads out of the folder"):
        path_inside(snapshot, "y")


def test_errors_of_libraries_are_one_line() -> None:
    class PanicException(BaseException):
        """Like the PanicException of pyo3."""

    for error, words in (
        (KeyError("a"), "KeyError: 'a'"),
        (Exception("one\ntwo \x1b[2J"), r"one two \\x1b\[2J"),
        (OSError(28, "No space left"), "No space left"),
        (RecursionError("deep"), "deep"),
        (PanicException("called unwrap"), "called unwrap"),
    ):
        with pytest.raises(L2PDError, match=f"^it: {words}$"), reading("it"):
            raise error
    with pytest.raises(L2PDError, match=r"^mine$"), reading("it"):
        raise L2PDError("mine")
    with pytest.raises(KeyboardInterrupt), reading("it"):
        raise KeyboardInterrupt


def test_one_line() -> None:
    assert one_line("a\n  b\t\x1b[2J\u2028\ud800") == r"a b \x1b[2J \ud800"
    assert len(one_line("x" * 10**6)) < 500
