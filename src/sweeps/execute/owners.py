"""Owners of trials: one locked token file per sweep, by which other sweeps detect that it has ended.

Each start of the script is a sweep with a new token. The database stores the token with each trial that it claims. The
file FOLDER/.owners/TOKEN is locked while the sweep or one of its trials is alive. The kernel releases the lock when the
last of these processes ends, also after SIGKILL.
"""

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path


class Owners:
    """The token files in a sweep's folder.

    `token` identifies this sweep, and `lock` is the descriptor of its locked token file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".owners"
        self.folder.mkdir(exist_ok=True)
        self.token = secrets.token_hex(8)
        # The file has a hidden name until it is locked. Other sweeps ignore hidden files, and treat a sweep with an
        # unlocked token file as dead.
        hidden = self.folder / f".{self.token}"
        self.lock = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        hidden.rename(self.folder / self.token)

    def close(self) -> None:
        """Close this process's descriptor of the lock. Child processes that inherited it still hold the lock."""
        os.close(self.lock)

    def forget(self, token: str) -> None:
        """Delete the token file of a sweep that owns no running trial."""
        with suppress(OSError):
            (self.folder / token).unlink()

    def dead(self) -> set[str]:
        """Return the tokens of dead sweeps: their lock is free, so all their processes have ended."""
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
