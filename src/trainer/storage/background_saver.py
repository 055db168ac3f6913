"""BackgroundSaver: writes checkpoints in a thread while training continues."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from trainer.snapshot import Snapshot
from trainer.storage.checkpoint import CheckpointFolder


class BackgroundSaver:
    """Saves snapshots in a thread, one at a time.

    If a save fails, the next call of `save`, `check` or `wait` raises its error. `saved` is the step of the newest
    snapshot on the disk.
    """

    def __init__(self, folder: CheckpointFolder, *, saved: int) -> None:
        self.folder, self.saved = folder, saved
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._running: Future[None] | None = None
        self._unsaved: Callable[[], None] | None = None  # the last save, until it succeeds

    def save(self, kinds: list[str], snapshot: Snapshot, *, keep: Mapping[str, int | None]) -> None:
        """Start to save a snapshot under each of `kinds`; first wait until the previous save has ended.

        The caller must not change the snapshot later. `keep` limits the number of checkpoints, as in
        `CheckpointFolder.save`. Raises the error of the previous save.
        """

        def save() -> None:
            self.folder.save(kinds, snapshot, keep=keep)
            self.saved, self._unsaved = snapshot.step, None

        self.wait()
        self._unsaved = save
        self._running = self._thread.submit(save)

    def check(self) -> None:
        """Raise the error of a save that has failed; do not wait for a save that is running."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last snapshot is on the disk. Raises the error of its save."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def retry(self) -> None:
        """Repeat the last save if it failed. A later checkpoint may refer to the `best` of this save."""
        with suppress(Exception):
            self.wait()
        if self._unsaved is not None:
            self._unsaved()

    def close(self) -> None:
        """Wait for the last save and end the thread; errors of the save are not raised here."""
        try:
            self._thread.shutdown()
        except KeyboardInterrupt:  # wait again: the folder's lock must not be released while the thread writes
            self._thread.shutdown()
            raise
