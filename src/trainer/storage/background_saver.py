"""Checkpoints are written by a thread while training continues."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from trainer.snapshot import Snapshot
from trainer.storage.checkpoint import CheckpointFolder


class BackgroundSaver:
    """Saves behind the training's back, one after the other; a failed save is raised by the next call.

    `saved` is the step of the newest snapshot that is on the disk.
    """

    def __init__(self, folder: CheckpointFolder, *, saved: int) -> None:
        self.folder, self.saved = folder, saved
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._running: Future[None] | None = None
        self._unsaved: Callable[[], None] | None = None  # what the last save does, until it has succeeded

    def save(self, kinds: list[str], snapshot: Snapshot, *, keep: Mapping[str, int | None]) -> None:
        """Start to save a snapshot, which is no longer changed, after the previous save has ended."""

        def save() -> None:
            self.folder.save(kinds, snapshot, keep=keep)
            self.saved, self._unsaved = snapshot.step, None

        self.wait()
        self._unsaved = save
        self._running = self._thread.submit(save)

    def check(self) -> None:
        """Raise what a save that has ended meanwhile has raised; waits for nothing."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Until everything is on the disk."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def retry(self) -> None:
        """A failed save once more: a later one may name a best that only the failed one has."""
        with suppress(Exception):
            self.wait()
        if self._unsaved is not None:
            self._unsaved()

    def close(self) -> None:
        """Wait, and end the thread; what the last save raised was raised before, or is not what ended the run."""
        try:
            self._thread.shutdown()
        except KeyboardInterrupt:  # the folder's lock must not be given back while the thread writes
            self._thread.shutdown()
            raise
