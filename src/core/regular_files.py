"""Opening of regular files only, without blocking.

A FIFO, socket or device can block the process or yield endless bytes. `open_regular` refuses these with an OSError.
With `follow=False` it refuses links too: a link in a run folder of another person could lead a command to any file.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
}


class IrregularFile(OSError):
    """A FIFO, socket, device, folder or link instead of a regular file; `strerror` names the kind."""


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading. Raises IrregularFile, such as "is a FIFO: must be a regular file"."""
    _refuse_irregular(path, path.stat(follow_symlinks=follow))
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        _refuse_irregular(path, os.fstat(descriptor))  # again: the name may refer to another file by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, *, follow: bool = True, limit: int | None = None) -> bytes:
    """Return the content of a regular file. Raises IrregularFile for another kind, OSError above `limit` bytes."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"has {size:,} bytes: must be at most {limit:,}", str(path))
        return file.read()


def append_regular(path: Path, text: str, *, sync: bool = False) -> None:
    """Append to a regular file that is not a link, and create it if missing; `sync` writes it through to the disk."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a FIFO that no process reads
            _refuse_irregular(path, path.lstat())
        raise
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:  # names may not be UTF-8
        _refuse_irregular(path, os.fstat(descriptor))
        file.write(text)
        if sync:
            file.flush()
            os.fsync(descriptor)


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise IrregularFile(errno.EINVAL, f"is {kind}: must be a regular file", str(path))
