"""Files and folders are written completely or not at all, however the writer ends."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from l2pd_plugins import L2PDError, writing
from l2pd_plugins.writing import (
    recover,
    require_place,
    require_writable,
    require_writable_folder,
    sweep,
    temporary_of,
    write_folder,
    write_text,
    write_whole,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def of_dead_process(path: Path, kind: str = "tmp") -> Path:
    """The temporary name that an ended process would have used."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    made = temporary_of(path, kind)
    return made.with_name(made.name.replace(f"-{os.getpid()}.", f"-{ended.pid}."))


@contextmanager
def full_disk() -> Iterator[None]:
    """Limit files to 100 bytes, so that writing more fails as on a full disk. This is no fixture,
    because pytest could then not write its own report."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_text(path, "old")
    said = r"^--json-file x cannot be written: File too large$"
    with full_disk(), pytest.raises(L2PDError, match=said):
        write_text(path, "new" * 100, "--json-file x")
    assert path.read_text() == "old" and names(tmp_path) == ["x.json"]


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "filter"
    write_folder(folder, lambda made: (made / "a").write_text("old"))

    def write(made: Path) -> None:
        (made / "a").write_text("new")
        (made / "b").write_text("new" * 100)

    said = r"filter cannot be written: File too large$"
    with full_disk(), pytest.raises(L2PDError, match=said):
        write_folder(folder, write)
    assert names(tmp_path) == ["filter"] and names(folder) == ["a"]
    assert (folder / "a").read_text() == "old"


@pytest.mark.parametrize(
    "path", ["file/x.json", "no/such/x.json", "/proc/x.json", "/dev/null/x.json", "folder"]
)
def test_an_unwritable_path_is_refused_before_the_work(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(L2PDError, match=r"^--plot p"):
        require_writable(tmp_path / path, "--plot p")
    if path != "folder":
        with pytest.raises(L2PDError, match=r"cannot be written"):
            write_text(tmp_path / path, "x")
    assert names(tmp_path) == ["file", "folder"]


def test_the_check_leaves_a_writable_path_unchanged(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    require_writable(tmp_path / "x")
    require_writable(tmp_path / "y.png")
    require_place(tmp_path / "a" / "b" / "c.json")
    require_writable(Path("/dev/null"))
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "mine"
    with pytest.raises(L2PDError, match="cannot be written"):
        require_place(tmp_path / "x" / "b")


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "x")
    assert not Path("/dev/null").is_file()
    with pytest.raises(L2PDError, match=r"^/dev/full cannot be written: No space left on device$"):
        write_text(Path("/dev/full"), "x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "x"


def test_a_programming_error_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "x", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "y", lambda path: 1 / 0)
    assert names(tmp_path) == []


def test_a_path_that_cannot_be_a_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / "of").mkdir(parents=True)
    for path, words in (
        (tmp_path / "file", "it is a file, expected a folder"),
        (tmp_path / "file" / "x", "File exists|Not a directory"),
        (Path("/proc/x"), "No such file|cannot be made"),
        (Path("/proc"), "it is a mount point"),
        (tmp_path / "full", r"it contains a folder \(of\)"),
    ):
        with pytest.raises(L2PDError, match=words):
            require_writable_folder(path)
    require_writable_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == ["a", "file", "full"] and names(tmp_path / "a") == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_in_one_operation(tmp_path: Path, monkeypatch, exchange: bool) -> None:
    """Other files of the old folder are kept, as the same files."""
    if not exchange:
        monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    folder = tmp_path / "filter.v2"
    write_folder(folder, lambda made: (made / "a").write_text("1"))
    (folder / "log").write_text("mine")
    inode = (folder / "log").stat().st_ino, folder.stat().st_ino
    write_folder(folder, lambda made: (made / "a").write_text("2"))
    assert names(tmp_path) == ["filter.v2"] and names(folder) == ["a", "log"]
    assert (folder / "a").read_text() == "2"
    assert (folder / "log").stat().st_ino == inode[0] and folder.stat().st_ino != inode[1]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_is_written_is_as_readable_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    """Also what a library has written through a temporary file of its own, which is private."""

    def write(place: Path) -> None:
        descriptor, made = tempfile.mkstemp(dir=place.parent)
        os.close(descriptor)
        os.rename(made, place)

    before = os.umask(umask)
    try:
        write_whole(tmp_path / "file", write)
        write_folder(tmp_path / "folder", lambda made: write(made / "weights"))
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "folder" / "weights"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["weights"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, None])
def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch, code: int | None) -> None:
    """Other files of the old folder are copied, with time and mode; links stay links."""

    def link(*args: object, **keywords: object) -> None:
        raise OSError(code, os.strerror(code)) if code else NotImplementedError

    monkeypatch.setattr(os, "link", link)
    folder = tmp_path / "filter"
    write_folder(folder, lambda made: (made / "a").write_text("1"))
    (folder / "log").write_text("mine")
    os.utime(folder / "log", (5, 5))
    (folder / "log").chmod(0o600)
    (folder / "latest").symlink_to("log")
    write_folder(folder, lambda made: (made / "a").write_text("2"))
    assert names(tmp_path) == ["filter"] and names(folder) == ["a", "latest", "log"]
    assert (folder / "a").read_text() == "2" and (folder / "latest").read_text() == "mine"
    assert os.readlink(folder / "latest") == "log"
    assert ((folder / "log").stat().st_mtime, (folder / "log").stat().st_mode & 0o777) == (5, 0o600)


@pytest.mark.parametrize("name", ["link", "fsync"])
def test_a_disk_that_fails_keeps_the_old_folder(tmp_path: Path, monkeypatch, name: str) -> None:
    def fail(*args: object, **keywords: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    folder = tmp_path / "filter"
    write_folder(folder, lambda made: (made / "a").write_text("1"))
    (folder / "log").write_text("mine")
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(L2PDError, match=r"filter cannot be (replaced|written): Input/output error"):
        write_folder(folder, lambda made: (made / "a").write_text("2"))
    assert names(folder) == ["a", "log"] and (folder / "a").read_text() == "1"


def test_a_disk_that_cannot_sync(tmp_path: Path, monkeypatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a", "1")
    assert (tmp_path / "a").read_text() == "1"


def test_the_temporary_copy_is_named_if_the_target_cannot_be_written(
    tmp_path: Path, monkeypatch
) -> None:
    def fail(new: Path, place: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(writing, "_swap", fail)
    with pytest.raises(
        L2PDError, match=r"replaced: Read-only file system; .* is in (.*)"
    ) as raised:
        write_folder(tmp_path / "filter", lambda made: (made / "a").write_text("1"))
    kept = Path(re.search(r"is in (.*)", str(raised.value))[1])
    assert (kept / "a").read_text() == "1"
    sweep(tmp_path)
    assert kept.is_dir()


def test_an_interrupted_replacement_is_undone(tmp_path: Path) -> None:
    folder = tmp_path / "filter.v2"
    old = of_dead_process(folder, "old")
    old.mkdir()
    (old / "a").write_text("old")
    assert sweep(tmp_path) == []  # the folder exists only under this name
    recover(folder)
    assert (folder / "a").read_text() == "old" and names(tmp_path) == ["filter.v2"]
    recover(folder)
    assert names(tmp_path) == ["filter.v2"]


def test_leftover_files_of_ended_processes_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "shard-0.safetensors"
    path.write_text("mine")
    dead = [of_dead_process(path), of_dead_process(path, "old"), of_dead_process(tmp_path / "d")]
    for left in dead[:2]:
        left.write_text("half")
    dead[2].mkdir()
    (dead[2] / "x").write_text("half")
    kept = [temporary_of(path), tmp_path / ".mine.tmp", tmp_path / ".x.otherhost-1.tmp"]
    for each in kept:
        each.write_text("theirs")
    assert sorted(sweep(tmp_path)) == sorted(dead)
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])


WRITER = """
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from l2pd_plugins import writing
if sys.argv[2] == "moved":
    writing._exchange = lambda one, other: False
number = 0
while True:
    number += 1
    def write(made):
        for name in ("config", "weights", "metrics"):
            (made / name).write_text(str(number))
    writing.write_folder(Path(sys.argv[1]), write)
"""


@contextmanager
def opened_folder(folder: Path) -> Iterator[Callable[[str], str]]:
    """Reads files of the folder that has this path now, even if another gets the path later."""
    descriptor = os.open(folder, os.O_RDONLY)

    def read(name: str) -> str:
        with open(os.open(name, os.O_RDONLY, dir_fd=descriptor)) as file:
            return file.read()

    try:
        yield read
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("way", ["exchanged", "moved"])
def test_a_reader_never_finds_a_mixed_folder(tmp_path: Path, way: str) -> None:
    """The writer is killed at random moments, again and again, while a reader reads all the time.

    The reader keeps the folder open and reads through it: inode numbers cannot distinguish two
    folders, since a new one may get the number of a removed one. If the system can exchange two
    folders atomically, there is always a folder; otherwise `recover` restores it.
    """
    folder = tmp_path / "filter"
    read = gone = 0
    for turn in range(5):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), way]
        writer = subprocess.Popen(command, stderr=subprocess.PIPE)
        until = None
        while until is None or time.monotonic() < until:
            try:
                with opened_folder(folder) as below:
                    found = [below(name) for name in ("config", "weights", "metrics")]
            except FileNotFoundError:
                gone += until is not None and not folder.exists()
                assert writer.poll() is None
                continue
            until = until or time.monotonic() + 0.02 + 0.013 * turn
            read += 1
            assert len(set(found)) == 1 and found[0]
        writer.kill()
        assert writer.wait() == -signal.SIGKILL
        require_writable_folder(folder)
        assert names(folder) == ["config", "metrics", "weights"]
        assert len({(folder / name).read_text() for name in names(folder)}) == 1
        assert names(tmp_path) == ["filter"]
    assert read > 20
    if way == "exchanged" and sys.platform == "linux":
        assert not gone
