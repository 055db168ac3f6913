"""The lock of a run folder: the system holds it, and releases it however the process ends."""

import fcntl
import os
import platform
import time
from pathlib import Path

from core.errors import InUse


def take_lock(folder: Path) -> int:
    """An exclusive lock on the folder, held until the process ends however it ends; StorageError when it is taken."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        lock_or_refuse(lock, folder)
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())
    except BaseException:
        os.close(lock)
        raise
    return lock


def lock_or_refuse(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        for _ in range(20):  # who has just taken it is about to write who it is
            if holder := os.pread(lock, 200, 0).decode(errors="replace"):
                break
            time.sleep(0.005)
        raise InUse(str(folder), f"in use by {holder or 'another process'}") from None
