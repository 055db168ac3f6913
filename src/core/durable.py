"""Files that are whole or not there, whatever ends the process while they are written.

    temporary file in the same folder -> write -> fsync -> replace -> fsync of the folder

Every step is one system call of `os`, so that a test can stop at each of them.
"""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from core.errors import StorageError

TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}\.tmp$")


def write_durably(path: Path, *content: bytes | memoryview) -> None:
    """Write a file, given in parts, so that a crash leaves the whole of it, or what was there before.

    Raises StorageError when it cannot be written.
    """
    temporary = _temporary(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            for part in content:
                rest = memoryview(part)
                while len(rest) > 0:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)  # noqa: PTH105  one system call
        sync_folder(path.parent)
    except OSError as exception:
        raise StorageError(str(path), _told(path, sum(map(len, content)), exception)) from exception
    finally:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user names: durably, through a link, and into a device or FIFO without replacing it.

    Raises StorageError if it cannot be written.
    """
    try:
        target = path.resolve()
        if not target.exists() or target.is_file():
            write_durably(target, content)
            return
        with target.open("wb") as file:
            file.write(content)
    except OSError as exception:
        raise StorageError(str(path), f"cannot be written: {exception.strerror or exception}") from exception


def link_durably(existing: Path, path: Path) -> None:
    """A second name for a file that is written; OSError where the file system has no links."""
    temporary = _temporary(path)
    try:
        os.link(existing, temporary)
        os.replace(temporary, path)  # noqa: PTH105
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108  also there when both were one file already


def sync_folder(folder: Path) -> None:
    """What was renamed in a folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Temporary files that a killed process left. Only for who holds the folder's lock."""
    for path in folder.iterdir():
        if TEMPORARY.match(path.name):
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _told(path: Path, needed: int, exception: OSError) -> str:
    """What happened, how many bytes were wanted and how many are free."""
    free = "unknown"
    with suppress(OSError):
        found = os.statvfs(path.parent)
        free = f"{found.f_bavail * found.f_frsize:,}"
    return f"cannot write {needed:,} bytes ({free} are free there): {exception.strerror or exception}"
