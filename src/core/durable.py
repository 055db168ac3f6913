"""Write files atomically: after a crash, a file is complete or has its previous content.

    temporary file in the same folder -> write -> fsync -> replace -> fsync of the folder

Each step is one system call of `os`, so that a test can stop the process at every step.
"""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from core.errors import StorageError

TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}\.tmp$")


def write_durably(path: Path, *content: bytes | memoryview) -> None:
    """Write the pieces of `content` to a file; after a crash it is complete or has its previous content.

    Raises StorageError if it cannot be written.
    """
    temporary = _temporary(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            for piece in content:
                rest = memoryview(piece)
                while len(rest) > 0:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)  # noqa: PTH105  one system call
        sync_folder(path.parent)
    except OSError as exception:
        raise StorageError(str(path), _write_failure(path, sum(map(len, content)), exception)) from exception
    finally:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user names: durably if it is a regular file; follow links; never replace a device or FIFO.

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


def check_output(path: Path, *, key: str) -> None:
    """Raise StorageError if `write_output` could not write this file; `key` is the option that names it."""
    try:
        target = path.resolve()
        is_special = target.exists() and not target.is_file()
        if target.is_dir():
            reason = f"is a folder: {key} must name a file"
        elif not target.parent.is_dir():
            reason = f"cannot be written: the folder {target.parent} does not exist"
        elif not os.access(target if is_special else target.parent, os.W_OK if is_special else os.W_OK | os.X_OK):
            reason = f"cannot be written: no permission ({key})"
        else:
            return
    except (OSError, RuntimeError) as exception:  # RuntimeError: a loop of links
        raise StorageError(str(path), f"cannot be written: {exception}") from exception
    raise StorageError(str(path), reason)


def link_durably(existing: Path, path: Path) -> None:
    """Give an existing file a second name (hard link). Raises OSError if the file system has no hard links."""
    temporary = _temporary(path)
    try:
        os.link(existing, temporary)
        os.replace(temporary, path)  # noqa: PTH105
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108  it still exists if both names already were one file


def sync_folder(folder: Path) -> None:
    """Wait until the renames in a folder are on the disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a killed process. The caller must hold the folder's lock."""
    for path in folder.iterdir():
        if TEMPORARY.match(path.name) and (path.is_symlink() or not path.is_dir()):
            with suppress(OSError):  # on a read-only file system they remain
                path.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(hidden_name(path.name, "tmp"))


def hidden_name(name: str, ending: str) -> str:
    """Return a new hidden name for a file or folder that will be renamed to `name`, such as `.name.01234567.tmp`.

    It is at most as long as a name may be (255 bytes), even if `name` is.
    """
    short = os.fsdecode(os.fsencode(name)[:200])
    return f".{short}.{secrets.token_hex(4)}.{ending}"


def _write_failure(path: Path, needed: int, exception: OSError) -> str:
    """Return an error text: the reason, the number of bytes to write and the number of free bytes."""
    free = "unknown"
    with suppress(OSError):
        status = os.statvfs(path.parent)
        free = f"{status.f_bavail * status.f_frsize:,}"
    return f"cannot write {needed:,} bytes ({free} bytes are free): {exception.strerror or exception}"
