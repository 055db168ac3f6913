"""Opening files of a run or of the user: only regular files, and never a wait.

A FIFO, socket or device in the place of a file would block the process, or yield bytes without end. `open_regular`
refuses it with an OSError, as if it could not be read. With `follow=False` a link is refused too: the files of a run
folder are real ones, so that a link in a folder from elsewhere cannot lead a command to another run or file.
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
    """A FIFO, socket, device, folder or link in the place of a regular file; `strerror` says which."""


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading. Raises IrregularFile, such as "is a FIFO: must be a regular file"."""
    _refuse_irregular(path, path.stat(follow_symlinks=follow))
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        _refuse_irregular(path, os.fstat(descriptor))  # again: the name may lead to another file by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, *, follow: bool = True, limit: int | None = None) -> bytes:
    """Return the content of a regular file; IrregularFile for another kind, OSError for more than `limit` bytes."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"has {size:,} bytes: must be at most {limit:,}", str(path))
        return file.read()


def append_regular(path: Path, text: str, *, sync: bool = False) -> None:
    """Append to a regular file that is no link, and create it if it does not exist; `sync`: it is then on the disk."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a FIFO that no process reads
            _refuse_irregular(path, path.lstat())
        raise
    with os.fdopen(descriptor, "w") as file:
        _refuse_irregular(path, os.fstat(descriptor))
        file.write(text)
        if sync:
            file.flush()
            os.fsync(descriptor)


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise IrregularFile(errno.EINVAL, f"is {kind}: must be a regular file", str(path))
