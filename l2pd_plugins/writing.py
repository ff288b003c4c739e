"""Writing files and folders atomically.

Data is first written under a temporary name in the same folder and then renamed. A temporary name
contains the process that made it, so that `sweep` finds those of processes that have ended.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import reason_of

_HOST = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname()) or "localhost"
_TEMPORARY = re.compile(rf"\..+\.{_HOST}-(\d+)\.(tmp|old)(\.[^.]*)?")
"""Identifies this host: a process of another host, on a shared disk, may still be alive."""
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Error numbers by which a file system says that it does not support a call."""
_NO_LINKS = (*_NO_SYNC, errno.EPERM, errno.EXDEV, errno.EMLINK)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def temporary_of(path: Path, kind: str = "tmp") -> Path:
    """This process's temporary name for a file or folder; it keeps the file's suffix."""
    return path.with_name(f".{path.stem or path.name}.{_HOST}-{os.getpid()}.{kind}{path.suffix}")


def write_whole(path: Path, write: Callable[[Path], object], called: str | None = None) -> None:
    """Write a file under a temporary name, then rename it to its path.

    An existing special file (``/dev/stdout``) is written to directly.

    Args:
        write: writes to the path that it is given.
        called: the file's name in errors.

    Raises L2PDError if it cannot be written; an existing file is then unchanged.
    """
    called = str(path) if called is None else called
    place = _place_of(path)
    temporary = place if _is_special(place) else temporary_of(place)
    try:
        try:
            write(temporary)
            if temporary != place:
                apply_umask(temporary)
                _to_disk(temporary)
                temporary.replace(place)
        finally:
            if temporary != place:
                temporary.unlink(missing_ok=True)
    except L2PDError:
        raise
    except Exception as error:  # safetensors and matplotlib have errors of their own
        if not _of_writing(error):
            raise
        raise L2PDError(f"{called} cannot be written: {reason_of(error)}") from error


def apply_umask(file: Path) -> None:
    """Give a file the permissions that the process's umask, or its folder's default ACL, gives new
    files. A library that writes through a temporary file of its own (safetensors) leaves 0600, and
    a server of another user could not read the file.

    Raises OSError if the folder cannot be written.
    """
    probe = temporary_of(file.with_name(f"{file.name}.mode"))
    probe.touch()
    try:
        wanted = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    if file.is_file() and stat.S_IMODE(file.stat().st_mode) != wanted:
        file.chmod(wanted)


def write_text(path: Path, text: str, called: str | None = None) -> None:
    """Write a text file atomically. Raises L2PDError if it cannot be written."""
    write_whole(path, lambda place: place.write_text(text, encoding="utf-8"), called)


def require_writable(path: Path, called: str | None = None) -> None:
    """Raise L2PDError if `write_whole` could not write the file; call it before work that would be
    lost.

    An existing file is not changed.
    """
    called = str(path) if called is None else called
    try:
        _require_writable(_place_of(path), called)
    except OSError as error:
        raise L2PDError(f"{called} cannot be written: {reason_of(error)}") from error


def _require_writable(place: Path, called: str) -> None:
    if place.is_dir():
        raise L2PDError(f"{called} cannot be written: it is a folder, expected a file")
    if _is_special(place):
        if not os.access(place, os.W_OK):
            raise L2PDError(f"{called} cannot be written: {os.strerror(errno.EACCES)}")
        return
    if not place.parent.is_dir():
        raise L2PDError(f"{called}: there is no folder for such a file")
    temporary = temporary_of(place)
    temporary.touch()
    temporary.unlink()


def require_place(path: Path, called: str | None = None) -> None:
    """Raise L2PDError if nothing can be written under a path whose folders may not exist yet; call
    it before a program that creates them at the end of its work.
    """
    place = Path(os.path.realpath(path))
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_dir():
        require_writable(place / "probe", called)
    elif place != Path(os.path.realpath(path)):
        raise L2PDError(f"{called or path} cannot be written: {place} is not a folder")


def require_place_for_folder(folder: Path, called: str | None = None) -> None:
    """Raise L2PDError if no files can be written into a folder, which may not exist yet, nor its
    parents. Nothing is created.
    """
    called = str(folder) if called is None else called
    try:
        if folder.exists() and not folder.is_dir():
            raise L2PDError(f"{called} cannot be written: it is a file, expected a folder")
        require_place(folder, called)
    except OSError as error:  # the name is too long
        raise L2PDError(f"{called} cannot be written: {reason_of(error)}") from error


def require_writable_folder(folder: Path, called: str | None = None) -> None:
    """Raise L2PDError if `write_folder` could not write the folder; call it before the work. Also
    finishes an interrupted swap, and removes the temporary files of ended processes.

    Parent folders are created.
    """
    called = str(folder) if called is None else called
    place = Path(os.path.realpath(folder))
    if place.exists() and not place.is_dir():
        raise L2PDError(f"{called} cannot be made: it is a file, expected a folder")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        recover(place)
        sweep(place.parent)
        if place.is_dir():
            if place.stat().st_dev != place.parent.stat().st_dev or place == place.parent:
                raise L2PDError(
                    f"{called} cannot be replaced: it is a mount point; name a folder in it"
                )
            inner = sorted(entry.name for entry in place.iterdir() if entry.is_dir())
            if inner:
                raise L2PDError(
                    f"{called} cannot be replaced: it contains a folder ({inner[0]}); name another"
                )
        temporary = temporary_of(place)
        temporary.mkdir()
        temporary.rmdir()
    except OSError as error:
        raise L2PDError(f"{called} cannot be made: {reason_of(error)}") from error


def write_folder(folder: Path, write: Callable[[Path], object], called: str | None = None) -> None:
    """Write a folder under a temporary name, then swap it with the existing one.

    Files of the old folder that the new one does not have (a log, notes) are kept. On Linux the two
    are exchanged in one operation. On other systems there is a moment in which neither is in place;
    if a process ends then, `recover` puts the old one back. A reader of several files gets one
    consistent version by holding the folder open and reading relative to it.

    Args:
        write: fills the folder that it is given.
        called: the folder's name in errors.

    Raises L2PDError if it cannot be written. The old folder is then unchanged; a complete new
    folder that could not be moved into place is kept next to it, under a name that the error
    contains.
    """
    called = str(folder) if called is None else called
    place = Path(os.path.realpath(folder))
    temporary = temporary_of(place)
    complete = False
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for file in list(temporary.iterdir()):
            apply_umask(file)
            _to_disk(file)
        complete = True
        _keep_others(place, temporary)
        _swap(temporary, place)
    except Exception as error:
        if not _of_writing(error):
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if not complete:
            shutil.rmtree(temporary, ignore_errors=True)
            raise L2PDError(f"{called} cannot be written: {reason_of(error)}") from error
        kept = place.with_name(f"{place.name}.new-{os.getpid()}")  # `sweep` keeps this name
        try:
            temporary.rename(kept)
        except OSError:
            kept = temporary
        raise L2PDError(
            f"{called} cannot be replaced: {reason_of(error)}; what was made is in {kept}"
        ) from error


def recover(folder: Path) -> None:
    """Put the old folder back if a swap was interrupted between its two steps."""
    place = Path(os.path.realpath(folder))
    if place.exists() or not place.parent.is_dir():
        return
    kept = re.compile(rf"\.{re.escape(place.stem or place.name)}\.\w+-\d+\.old")
    for left in sorted(place.parent.iterdir()):
        ending = left.name.removesuffix(place.suffix) if place.suffix else left.name
        if kept.fullmatch(ending) and left.is_dir():
            left.rename(place)
            return


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files and folders of ended processes of this host; return them. Old
    folders (see `recover`) are removed only if a new one is in their place.
    """
    swept = []
    for left in sorted(folder.glob(".*")):
        found = _TEMPORARY.fullmatch(left.name)
        if found is None or _is_alive(int(found[1])):
            continue
        name = left.name[1 : found.start(1) - len(_HOST) - 2] + (found[3] or "")
        if found[2] == "old" and not (folder / name).exists():
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
        swept.append(left)
    return swept


def _swap(new: Path, place: Path) -> None:
    old = temporary_of(place, "old")
    if not place.exists():
        new.rename(place)
        return
    if _exchange(new, place):
        new.rename(old)  # a name by which it is not mistaken for a complete folder
    else:
        place.rename(old)
        new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one operation; False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux with glibc 2.28 or newer
        return False
    done: int = renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    return done == 0


def _keep_others(place: Path, new: Path) -> None:
    if not place.is_dir():
        return
    for file in place.iterdir():
        if not (new / file.name).exists() and not _TEMPORARY.fullmatch(file.name):
            _link(file, new / file.name)


def _link(file: Path, other: Path) -> None:
    """Hard-link the file instead of copying it, since a log may be open. On a disk without hard
    links (FAT, some shared disks) it is copied: the old folder has to stay complete until the swap.
    """
    try:
        os.link(file, other, follow_symlinks=False)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LINKS:
            raise
        shutil.copy2(file, other, follow_symlinks=False)
        if not other.is_symlink():
            _to_disk(other)


def _place_of(path: Path) -> Path:
    """The path with all links resolved; for a special file the given path, since the link of a pipe
    (/dev/stdout) has no target path.
    """
    return path if _is_special(path) else Path(os.path.realpath(path))


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _to_disk(file: Path) -> None:
    """Flush to disk, so that after a power failure a name never refers to an empty file."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _of_writing(error: Exception) -> bool:
    """Whether the error comes from the disk and not from a bug of ours."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
