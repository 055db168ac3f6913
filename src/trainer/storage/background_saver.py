"""Writes checkpoints in a thread while training continues."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from trainer.snapshot import Snapshot
from trainer.storage.checkpoint import CheckpointFolder


class BackgroundSaver:
    """Saves snapshots in the background, one at a time. The next call raises the error of a failed save.

    `saved` is the step of the newest snapshot that is on the disk.
    """

    def __init__(self, folder: CheckpointFolder, *, saved: int) -> None:
        self.folder, self.saved = folder, saved
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._running: Future[None] | None = None
        self._unsaved: Callable[[], None] | None = None  # the last save, until it has succeeded

    def save(self, kinds: list[str], snapshot: Snapshot, *, keep: Mapping[str, int | None]) -> None:
        """Start to save a snapshot, which must not be changed later, after the previous save has ended."""

        def save() -> None:
            self.folder.save(kinds, snapshot, keep=keep)
            self.saved, self._unsaved = snapshot.step, None

        self.wait()
        self._unsaved = save
        self._running = self._thread.submit(save)

    def check(self) -> None:
        """Raise the error of a save that has ended; do not wait for one that is running."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def retry(self) -> None:
        """Repeat a failed save: a later checkpoint may refer to a best one that only the failed save has."""
        with suppress(Exception):
            self.wait()
        if self._unsaved is not None:
            self._unsaved()

    def close(self) -> None:
        """Wait, and end the thread. An error of the last save was raised before, or is not the reason for the end."""
        try:
            self._thread.shutdown()
        except KeyboardInterrupt:  # the lock of the folder must not be released while the thread writes
            self._thread.shutdown()
            raise
