"""Owners of trials in one folder: a locked token file per sweep, by which other sweeps find dead ones.

FOLDER/.owners/TOKEN     locked while a process of this sweep is alive; the token is the owner of its trials
"""

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path


class Owners:
    """The token files of a folder; `token` is the one of this sweep, and `lock` its open, locked file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".owners"
        self.folder.mkdir(exist_ok=True)
        self.token = secrets.token_hex(8)
        # All processes of this sweep inherit the lock, so it is free when the last of them has ended. The file is
        # hidden until it is locked: other sweeps ignore hidden files, but an unlocked token means a dead sweep.
        hidden = self.folder / f".{self.token}"
        self.lock = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        hidden.rename(self.folder / self.token)

    def close(self) -> None:
        """Release the lock of this sweep."""
        os.close(self.lock)

    def forget(self, token: str) -> None:
        """Delete the token file of a sweep whose trials are all finished or waiting."""
        with suppress(OSError):
            (self.folder / token).unlink()

    def dead(self) -> set[str]:
        """Return the tokens whose lock is free: all processes of the sweep have ended."""
        dead = set()
        for path in self.folder.iterdir():
            if path.name == self.token or path.name.startswith("."):
                continue
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    dead.add(path.name)
                except OSError:  # locked: the sweep is alive
                    pass
                finally:
                    os.close(descriptor)
        return dead
