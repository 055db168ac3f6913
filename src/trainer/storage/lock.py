"""Lock of a run folder. The operating system releases it when the process ends, even after a kill."""

import errno
import fcntl
import os
import platform
import time
from pathlib import Path

from core.errors import InUse


def take_lock(folder: Path) -> int:
    """Lock a folder exclusively and return the file descriptor; closing it, or the end of the process, unlocks.

    A read-only file system needs no lock, because nothing can be written. Raises InUse if another process has the
    lock, and OSError if the lock file cannot be opened.
    """
    try:
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock_or_refuse(lock, folder)
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())
    except BaseException:
        os.close(lock)
        raise
    return lock


def lock_or_refuse(lock: int, folder: Path) -> None:
    """Lock an open file exclusively. Raises InUse, which names the process that has the lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        for _ in range(20):  # the process may have taken the lock, but not yet written its name
            if holder := os.pread(lock, 200, 0).decode(errors="replace"):
                break
            time.sleep(0.005)
        raise InUse(str(folder), f"in use by {holder or 'another process'}") from None
