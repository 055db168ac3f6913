"""Images decoded and resized once, kept on the disk, and from then on only read.

    <digest>.npy            uint8 (N, C, H, W), mapped into memory: what is read often stays in the system's cache
    <digest>.json           which of them could not be decoded, and why
    <folder>.contents.json  the hash of each file's content, by its name, length, times and inode when it was read

The digest is of the rule that makes pixels of images, the size, and each file's name and content: a folder that has
changed has another cache, one that was moved or copied has the same. Contents are read once; afterwards only those of
files that the system says were touched, as git does it. A cache appears by one rename, whole and on the disk.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from core.durable import sync_folder, write_durably
from core.errors import StorageError
from data.sources.decode import PAUSES, BadImage, decode

RULE = 1  # of data.sources.decode; another rule makes other pixels
PIECE = 64  # images that a thread decodes before the next piece
ROOM = 0.9  # share of the free disk that a cache may take
ABANDONED = 60  # seconds after which an unfinished cache without a writer is removed
log = logging.getLogger("preceptor.data")


@dataclass(frozen=True)
class Cache:
    """Decoded images on the disk, or some of them. A pickled one holds the file's path, and maps it again."""

    path: Path  # absolute: <digest>.npy
    pixels: Tensor  # uint8 (M, C, H, W), the mapped file
    bad: dict[int, str]  # row -> why it could not be decoded
    rows: Tensor  # int64 (N,): where in `pixels` the images are

    def __reduce__(self) -> tuple[Any, ...]:
        return _mapped, (self.path, self.bad, self.rows)

    def take(self, indices: Tensor) -> "Cache":
        """Those at these positions."""
        return replace(self, rows=self.rows[indices])

    def has(self, indices: Tensor) -> bool:
        """Are all of these good?"""
        return not self.bad or self.bad.keys().isdisjoint(self.rows[indices].tolist())

    def read(self, indices: Tensor) -> Tensor:
        """Images (B, C, H, W), copied."""
        return self.pixels.index_select(0, self.rows[indices])


def _mapped(path: Path, bad: dict[int, str], rows: Tensor) -> Cache:
    pixels = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    return Cache(path, pixels, bad, rows)


def open_cache(
    paths: Sequence[Path],
    folder: Path,
    *,
    shape: tuple[int, int, int, int],
    max_pixels: int,
    skip_bad: bool,
    create: bool = True,
) -> Cache | None:
    """Return the cache in a folder of these files, decoded to this shape (N, C, H, W).

    With `create`, it is created if it does not exist; without, no file is created or removed.

    None if it cannot be created: a warning gives the reason, unless the reason is an unreadable file. Raises
    BadImage for a bad image, unless `skip_bad`.
    """
    if not paths:
        return None
    try:
        if not create and not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "it does not exist, and a run's config creates none")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK) and not any(folder.glob("*.npy")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if create:
            _remove_abandoned(folder)
        contents = Contents(paths, folder, writes=create)
        if None in contents.hashes:
            return None  # reading that file will report what is wrong with it
        path = folder.absolute() / f"{fingerprint(contents, shape=shape, max_pixels=max_pixels)}.npy"
        if not path.exists():
            if not create:
                raise FileNotFoundError(errno.ENOENT, "there is none of these images, and a run's config creates none")
            needed = int(np.prod(shape))
            if needed > ROOM * (free := shutil.disk_usage(folder).free):
                raise OSError(None, f"it needs {needed:,} bytes, and {free:,} are free")
            _make(path, contents, shape=shape, max_pixels=max_pixels, skip_bad=skip_bad)
    except (OSError, StorageError) as error:
        reason = error.explanation if isinstance(error, StorageError) else error.strerror
        log.warning(f"no cache in {folder} ({reason}): images are decoded each time they are read (data.cache_dir)")
        return None
    bad = json.loads(path.with_suffix(".json").read_text())
    return _mapped(path, {int(row): why for row, why in bad.items()}, torch.arange(len(paths)))


def fingerprint(contents: "Contents", *, shape: tuple[int, int, int, int], max_pixels: int) -> str:
    """Return a hash of everything that the decoded pixels depend on."""
    digest = hashlib.blake2b(repr((RULE, shape, max_pixels)).encode(), digest_size=12)
    for name, content in zip(contents.names, contents.hashes, strict=True):
        digest.update(repr((name, content)).encode())
    return digest.hexdigest()


class Contents:
    """The content of files by its hash: read where the system says that a file is not the one that was read before.

    `names` and `hashes` are in the order of the paths; the names are relative to the folder that all are in.
    """

    def __init__(self, paths: Sequence[Path], folder: Path, *, writes: bool = True) -> None:
        common = Path(os.path.commonpath([path.parent for path in paths]))
        name = hashlib.blake2b(os.fsencode(common.resolve()), digest_size=12).hexdigest()
        self.place = folder / f"{name}.contents.json"
        known: dict[str, str] = {}
        with suppress(OSError, ValueError, AttributeError, RecursionError):  # not there, or damaged
            found = json.loads(self.place.read_text()).items()
            known = {key: content for key, content in found if isinstance(content, str)}
        self.paths = paths
        self.names = [os.path.relpath(path, common) for path in paths]
        self.keys = self._keys()
        self.hashes = [known.get(key) for key in self.keys]
        new = [row for row, content in enumerate(self.hashes) if content is None]

        def read_piece(start: int) -> None:
            for row in new[start : start + PIECE]:
                self.hashes[row] = _content(paths[row])

        _by_threads(read_piece, len(new), text=f"hashing {len(new):,} images")
        now = {key: content for key, content in zip(self.keys, self.hashes, strict=True) if content is not None}
        if writes and now != known:
            with suppress(OSError, StorageError):  # a folder of others, who do not let us write there
                write_durably(self.place, json.dumps(now).encode())

    def are_as_they_were(self) -> bool:
        """Has no file been touched since its content was read?"""
        return self._keys() == self.keys

    def _keys(self) -> list[str]:
        return [repr((name, *_facts(path))) for name, path in zip(self.names, self.paths, strict=True)]


def _facts(path: Path) -> tuple[int, ...]:
    """Return what changes with a file's content: at least the change time, which users cannot set."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _content(path: Path) -> str | None:
    """The hash of a file's content; None where it cannot be read."""
    for pause in (*PAUSES, None):
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
        except OSError:
            if pause is not None:
                time.sleep(pause)
    return None


def _by_threads(task: Callable[[int], None], count: int, *, text: str) -> None:
    """Run the task for each PIECE of `count` images, in one thread per core. Show a bar on a terminal."""
    from rich.console import Console  # here, so that importing this module does not import rich
    from rich.progress import track

    pool = ThreadPoolExecutor()
    try:
        pieces = [pool.submit(task, start) for start in range(0, count, PIECE)]
        terminal = Console(stderr=True)
        for piece in track(
            pieces, text, console=terminal, transient=True, disable=not terminal.is_terminal, total=len(pieces)
        ):
            piece.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _make(path: Path, contents: Contents, *, shape: tuple[int, int, int, int], max_pixels: int, skip_bad: bool) -> None:
    """Decode all images, in threads: Pillow's decoders release the GIL."""
    count, channels, image_size, _ = shape
    bad: dict[int, str] = {}

    def decode_piece(start: int) -> None:
        for row in range(start, min(start + PIECE, count)):
            try:
                image = decode(contents.paths[row], image_size=image_size, channels=channels, max_pixels=max_pixels)
                pixels[row] = image.numpy()
            except BadImage as error:
                if not skip_bad:
                    raise
                bad[row] = error.explanation

    with _unfinished(path) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        # A full disk is an error here; behind the map it would end the process.
        os.posix_fallocate(file.fileno(), 0, start + int(np.prod(shape)))
        pixels = np.memmap(file, dtype=np.uint8, mode="r+", offset=start, shape=shape)
        _by_threads(decode_piece, count, text=f"decoding {count:,} images, once")
        pixels.flush()
        os.fsync(file.fileno())
        if not contents.are_as_they_were():
            raise OSError(None, "images were changed while it was made")
        write_durably(path.with_suffix(".json"), json.dumps(bad).encode())
        Path(file.name).replace(path)
        sync_folder(path.parent)


@contextmanager
def _unfinished(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path`, locked while it is written, and gone afterwards unless it was renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("x+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            temporary.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the unfinished caches of killed processes."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError), path.open("rb") as file:
            if time.time() - path.stat().st_mtime > ABANDONED:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
