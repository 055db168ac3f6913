"""Creation and repair of an image cache (cache.py)."""

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from core.durable import sync_folder
from core.errors import DataError, StorageError
from core.regular_files import open_regular
from data.loading.parcels import bytes_of
from data.sources.cache import Cache, Shape, check_mark, header_of, index_path, load_cache, signed
from data.sources.cache_index import Facts, Index, UnusableRow, content_of, facts_of, write_index
from data.sources.decode import BadImage, decode_file, with_retries
from data.sources.listing import PackedPaths

RULE = 1  # version of data.sources.decode: another version makes other pixels
PIECE = 64  # images that a thread handles before it takes the next piece
FREE_SHARE = 0.9  # share of the free disk that a cache may take
ABANDONED = 60  # seconds after which an unfinished cache without a writer is removed
SAMPLED = 100  # files whose size and times are compared when a cache is opened
UNFINISHED = re.compile(r"^\.[0-9a-f]{24}\.npy\.[0-9a-f]{8}\.tmp$")
log = logging.getLogger("preceptor.data")


def open_cache(
    paths: PackedPaths,
    folder: Path,
    *,
    shape: Shape,
    max_pixels: int,
    skip_bad: bool,
    bits: int | None = None,
    create: bool = True,
) -> Cache | None:
    """Return the cache of these files in a folder, decoded to the shape (N, C, H, W).

    With `create`, a cache that is missing, damaged or outdated is created; without, no file is created or removed.

    None if it cannot be created: a warning gives the reason, unless the reason is an unreadable file. Raises
    BadImage for a bad image, unless `skip_bad`.
    """
    if not paths:
        return None
    path = folder.absolute() / f"{cache_key(paths, shape=shape, max_pixels=max_pixels, bits=bits)}.npy"
    try:
        cache = load_cache(path, shape, can_repair=create)
        if cache is None and not create:
            raise FileNotFoundError(errno.ENOENT, "it does not exist, and a run's config creates none")
        if create and (cache is None or _is_outdated(cache, paths)):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                if cache is not None:
                    return cache
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            _remove_abandoned(folder)
            Creation(path, paths, shape=shape, max_pixels=max_pixels, skip_bad=skip_bad, old=cache, bits=bits).run()
            cache = load_cache(path, shape, can_repair=True)
    except BadImage:
        raise
    except DataError:
        return None  # reading that file will report its error
    except (OSError, StorageError) as error:
        reason = error.explanation if isinstance(error, StorageError) else error.strerror
        log.warning(f"no cache in {folder} ({reason}): images are decoded each time they are read (data.cache_dir)")
        return None
    return cache


def cache_key(paths: PackedPaths, *, shape: Shape, max_pixels: int, bits: int | None = None) -> str:
    """Return a hash of what the decoded pixels depend on, without the content of the files."""
    digest = hashlib.blake2b(repr((RULE, shape, max_pixels, *([bits] if bits else []))).encode(), digest_size=12)
    paths.update(digest)
    return digest.hexdigest()


def _is_outdated(cache: Cache, paths: PackedPaths) -> bool:
    """Return whether all rows must be checked: a run asked for it, or files of a sample were changed or copied."""
    if check_mark(cache.path).exists():
        return True
    sample = np.unique(np.linspace(0, len(paths) - 1, SAMPLED).astype(int)).tolist()
    with suppress(OSError):  # a missing file is reported when it is read
        return not all(cache.index.has_facts(row, facts_of(paths[row])) for row in sample)
    return False


def _by_threads(task: Callable[[int], None], count: int, *, text: str) -> None:
    """Run a task for the start of each PIECE of `count` images, in one thread per core. Show a bar on a terminal."""
    from rich.console import Console  # here, so that importing this module does not import rich
    from rich.progress import track

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        pieces = [pool.submit(task, start) for start in range(0, count, PIECE)]
        terminal = Console(stderr=True)
        for piece in track(
            pieces, text, console=terminal, transient=True, disable=not terminal.is_terminal, total=len(pieces)
        ):
            piece.result()
    finally:
        pool.shutdown(cancel_futures=True)


class Creation:
    """Creates a cache, or replaces the rows of an old one that are damaged or outdated."""

    def __init__(
        self,
        path: Path,
        paths: PackedPaths,
        *,
        shape: Shape,
        max_pixels: int,
        skip_bad: bool,
        old: Cache | None,
        bits: int | None = None,
    ) -> None:
        self.path, self.paths, self.shape = path, paths, shape
        self.max_pixels, self.skip_bad, self.old, self.bits = max_pixels, skip_bad, old, bits
        self.index = Index.empty(shape[0])
        # Views of its tensors: assigning a row of them is ten times as fast.
        self._facts, self._contents = self.index.facts.numpy(), self.index.contents.numpy()
        self._checksums = self.index.checksums.numpy()
        self.needs_decoding = np.ones(shape[0], dtype=bool)

    def run(self) -> None:
        """Check the old rows, decode the others, and replace the files of the cache."""
        if self.old is not None:
            _by_threads(self._check_rows, len(self.paths), text=f"checking {len(self.paths):,} cached images")
        changed = int(self.needs_decoding.sum())
        if self.old is None or changed:
            needed = int(np.prod(self.shape))
            if needed > FREE_SHARE * (free := shutil.disk_usage(self.path.parent).free):
                raise OSError(None, f"it needs {needed:,} bytes, and {free:,} are free")
            self._write_pixels(changed)
        write_index(index_path(self.path), self.index)
        check_mark(self.path).unlink(missing_ok=True)
        if self.old is None:
            size = int(np.prod(self.shape)) / 2**20
            name = Path(self.path.parent.name, self.path.name)  # the folder may come from an environment variable
            text = f"created an image cache of {len(self.paths):,} images ({size:,.0f} MiB): {name} (data.cache_dir)"
            log.info(f"{text}; later runs read it, and it can be deleted")
        elif changed:
            log.warning(f"{changed:,} of {len(self.paths):,} images in the cache {self.path} were decoded again")

    def _check_rows(self, start: int) -> None:
        """Keep the rows of the old cache whose files have the same content and whose pixels are undamaged."""
        assert self.old is not None
        out = memoryview(bytearray(int(np.prod(self.shape[1:]))))
        for row in range(start, min(start + PIECE, len(self.paths))):
            path = self.paths[row]
            with suppress(UnusableRow):
                facts = facts_of(path)
                try:
                    self.old.read(row, path, out)
                except BadImage as error:
                    self.index.bad[row] = error.explanation
                self._facts[row] = facts
                self.index.contents[row] = self.old.index.contents[row]
                self.index.checksums[row] = self.old.index.checksums[row]
                self.needs_decoding[row] = False

    def _write_pixels(self, count: int) -> None:
        header, size = header_of(self.shape), int(np.prod(self.shape[1:]))
        rows = self.needs_decoding.nonzero()[0].tolist()
        with _unfinished(self.path) as file:
            if self.old is not None and self.old.file is not None:
                os.lseek(self.old.file.descriptor, 0, os.SEEK_SET)
                with open(self.old.file.descriptor, "rb", closefd=False) as pixels:
                    shutil.copyfileobj(pixels, file, 2**24)
                file.flush()
            os.posix_fallocate(file.fileno(), 0, len(header) + int(np.prod(self.shape)))
            os.pwrite(file.fileno(), header, 0)

            def decode_piece(start: int) -> None:
                chosen = rows[start : start + PIECE]
                pixels = [self._decoded(row) for row in chosen]
                if chosen[-1] - chosen[0] + 1 == len(chosen):  # adjacent rows: one system call
                    chosen, pixels = chosen[:1], [torch.stack(pixels)]
                for row, content in zip(chosen, pixels, strict=True):
                    _write_at(file.fileno(), bytes_of(content), len(header) + row * size)

            _by_threads(decode_piece, count, text=f"decoding {count:,} images, once")
            os.fsync(file.fileno())
            Path(file.name).replace(self.path)
            sync_folder(self.path.parent)

    def _decoded(self, row: int) -> Tensor:
        """Return the pixels of an image and fill its row of the index; zeros for a bad image."""
        path = self.paths[row]
        facts, content, pixels = with_retries(path, lambda file: self._decode_open(file, str(path), row))
        if facts_of(path) != facts:
            raise OSError(None, "images were changed while it was created")
        self._facts[row] = facts
        self._contents[row] = np.frombuffer(content, dtype=np.uint8)
        self._checksums[row] = signed(zlib.crc32(bytes_of(pixels)))
        return pixels

    def _decode_open(self, file: BinaryIO, name: str, row: int) -> tuple[Facts, bytes, Tensor]:
        facts, (_, channels, image_size, _) = facts_of(file.fileno()), self.shape
        try:
            limits: dict[str, Any] = {"max_pixels": self.max_pixels, "bits": self.bits}
            pixels = decode_file(file, name, image_size=image_size, channels=channels, **limits)
        except BadImage as error:
            if not self.skip_bad:
                raise
            self.index.bad[row] = error.explanation
            pixels = torch.zeros(self.shape[1:], dtype=torch.uint8)
        return facts, content_of(file), pixels


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while len(content):
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


@contextmanager
def _unfinished(path: Path) -> Iterator[Any]:
    """Yield a temporary file beside `path`, locked while it is written; it is removed unless it was renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("x+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            temporary.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the unfinished caches of killed processes."""
    for path in folder.iterdir():
        if UNFINISHED.match(path.name):
            with suppress(OSError), open_regular(path, follow=False) as file:
                if time.time() - path.stat().st_mtime > ABANDONED:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
