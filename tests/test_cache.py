"""The cache of decoded images: the same pixels, read without decoding; whole or not there; never in the way."""

import errno
import itertools
import logging
import os
import pickle
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import last_state, trained
from PIL import Image

from core.errors import DataError, StorageError
from data.sources import cache
from data.sources.image_folder import image_folder
from data.sources.images import Files, Images, PackedPaths, with_cache

BAD = 3


@pytest.fixture
def root(tmp_path) -> Path:
    """36 images of three classes, of several sizes and modes."""
    draw = np.random.default_rng(0)
    for index in range(36):
        path = tmp_path / "images" / f"class {index % 3}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (9 + index % 4, 8) if index % 2 else (9, 12, 3)
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return tmp_path / "images"


def files_of(root: Path, *, size: int = 7, on_bad_image: str = "error") -> Images:
    collection = image_folder(
        root=str(root), image_size=size, channels=3, test_fraction=0, empty_class="error", on_bad_image=on_bad_image
    )
    return collection.train


CACHE = ["contents", "json", "npy"]


def kept(root: Path) -> list[str]:
    names = [path.name.replace(".contents.json", ".contents") for path in (root / ".preceptor").iterdir()]
    return sorted(name.rsplit(".", 1)[1] for name in names)


def test_cached_pixels_are_the_decoded_ones_and_each_image_is_decoded_once(root, monkeypatch):
    plain = files_of(root)
    assert isinstance(plain.pixels, Files)
    place = root / ".preceptor"
    first = Images(with_cache(plain.pixels, place), plain.labels)
    assert kept(root) == CACHE
    monkeypatch.setattr("data.sources.images.decode", None)
    monkeypatch.setattr("data.sources.cache.decode", None)
    again = Images(with_cache(plain.pixels, place), plain.labels)
    monkeypatch.undo()
    expected, rows = plain.load(), torch.tensor([5, 5, 0, 35])
    for images in (first, again):
        assert torch.equal(images.load(), expected)
        assert torch.equal(images.fetch(rows)[0], expected[rows]) and torch.equal(images.pixels[5], expected[5])
        part = images.take(torch.tensor([30, 2, 7]))
        assert torch.equal(part.load(), expected[[30, 2, 7]])
        assert torch.equal(part.take(torch.tensor([2])).fetch(torch.tensor([0]))[0], expected[[7]])


def test_pickled_cache_holds_the_path_and_maps_the_file_again(root, monkeypatch):
    monkeypatch.chdir(root)
    files = with_cache(files_of(root, size=64).pixels, Path(".preceptor")).take(torch.tensor([30, 2, 7]))
    content = pickle.dumps(files)
    assert len(content) < 5_000 < files.cache.pixels.numel()
    monkeypatch.chdir("/")
    again = pickle.loads(content)  # noqa: S301  as a worker does
    assert again.cache.path == files.cache.path and again.cache.path.is_absolute()
    assert list(again.paths) == again.paths[:] == files.paths and again.paths[-1] == files.paths[-1]
    assert torch.equal(again.cache.rows, files.cache.rows) and again.shape == files.shape
    rows = torch.tensor([2, 0])
    assert torch.equal(again.cached(rows), files.cached(rows))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(files.cache.path.name)]
    assert len(mapped) == 2 and not any("deleted" in line for line in mapped)


def test_changed_files_get_another_cache(root, monkeypatch):
    decoded, real = [], cache.decode

    def decode(path: Path, **named: Any) -> Any:
        decoded.append(path.name)
        return real(path, **named)

    def load(root: Path, place: Path | None = None) -> torch.Tensor:
        decoded.clear()
        files = files_of(root).pixels
        assert isinstance(files, Files)
        return with_cache(files, place or root / ".preceptor").cached(torch.arange(36))

    monkeypatch.setattr(cache, "decode", decode)
    before, path = load(root), root / "class 0" / "00.png"
    path.write_bytes(path.read_bytes())  # touched, and as it was
    assert torch.equal(load(root), before) and not decoded
    other = Image.open(path).transpose(Image.Transpose.ROTATE_180)
    other.save(path, compress_level=0)
    as_long = path.read_bytes()
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path, compress_level=0)
    assert path.stat().st_size == len(as_long)
    load(root)
    facts = path.stat()
    path.write_bytes(as_long)  # of the same length, at the same time
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    after = load(root)
    assert len(decoded) == 36 and not torch.equal(before[0], after[0]) and torch.equal(before[1:], after[1:])
    caches = kept(root).count("npy")

    monkeypatch.setattr(cache, "_content", None)  # known by now: nothing is read
    assert torch.equal(load(root), after) and not decoded
    monkeypatch.undo()
    monkeypatch.setattr(cache, "decode", decode)
    for damage in ('["damaged"', "null", "5", "[[[1], 2]]", "[" * 10000, '{"a": 1}'):
        for index in (root / ".preceptor").glob("*.contents.json"):
            index.write_text(damage)
        assert torch.equal(load(root), after) and not decoded
    copy = shutil.copytree(root, root.with_name("copy"))  # the cache comes along
    assert torch.equal(load(copy), after) and not decoded
    assert kept(copy).count("npy") == kept(root).count("npy") == caches
    assert kept(copy).count("contents") == 2  # one of another folder, as it was
    (copy / "class 0" / "00.png").rename(copy / "class 0" / "99.png")
    assert not torch.equal(load(copy), after) and len(decoded) == 36


def test_existing_cache_in_a_read_only_folder_is_used(root, monkeypatch):
    files = files_of(root).pixels
    assert isinstance(files, Files)
    with_cache(files, root / ".preceptor")
    for path in (root / ".preceptor").glob("*.contents.json"):
        path.unlink()

    def refuse(path: Path, *_: object) -> None:
        raise StorageError(str(path), "read-only")

    monkeypatch.setattr(cache, "write_durably", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert with_cache(files, root / ".preceptor").cache is not None
    assert kept(root) == ["json", "npy"]


def test_file_contents_are_hashed_once_even_if_no_cache_can_be_created(root, monkeypatch, caplog):
    files = files_of(root).pixels
    assert isinstance(files, Files)
    monkeypatch.setattr(cache, "ROOM", 0.0)
    assert with_cache(files, root / ".preceptor") is files and kept(root) == ["contents"]
    monkeypatch.setattr(cache, "_content", None)
    assert with_cache(files, root / ".preceptor") is files
    monkeypatch.setattr(os, "access", lambda *_: False)  # nothing is read where nothing may be kept
    monkeypatch.setattr(cache, "Contents", None)
    assert with_cache(files, root / ".preceptor") is files
    assert "Permission denied" in caplog.messages[-1]


def test_images_changed_during_creation_leave_no_cache(root, monkeypatch, caplog):
    files = files_of(root).pixels
    assert isinstance(files, Files)
    real = cache.decode

    def decode(path: Path, **named: Any) -> Any:
        if path.name == "30.png":
            Image.new("RGB", (9, 9), "red").save(path)
        return real(path, **named)

    monkeypatch.setattr(cache, "decode", decode)
    assert with_cache(files, root / ".preceptor") is files
    assert "changed" in caplog.messages[-1] and kept(root) == ["contents"]


def test_unreadable_file_prevents_the_cache(root, monkeypatch):
    files = files_of(root).pixels
    assert isinstance(files, Files)
    tries, real = itertools.count(), Path.open

    def fail(path: Path, *given: Any, **named: Any) -> Any:
        if path.name == "30.png" and next(tries) < (1 if passing else 100):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *given, **named)

    monkeypatch.setattr(cache, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(Path, "open", fail)
    passing = False
    assert with_cache(files, root / ".preceptor") is files and kept(root) == ["contents"]
    passing, tries = True, itertools.count()
    assert with_cache(files, root / ".preceptor").cache is not None and kept(root) == CACHE


def test_unreadable_images_are_treated_as_without_a_cache(root, caplog):
    path = root / "class 0" / "00.png"
    path.write_bytes(path.read_bytes()[:60])
    files = files_of(root).pixels
    assert isinstance(files, Files)
    with pytest.raises(DataError, match="00.png"):
        with_cache(files, root / ".preceptor")
    assert kept(root) == ["contents"]
    skipping = files_of(root, on_bad_image="skip")
    assert isinstance(skipping.pixels, Files)
    expected = skipping.load()
    caplog.clear()
    for _ in range(2):  # made, and read
        images = Images(with_cache(files_of(root, on_bad_image="skip").pixels, root / ".preceptor"), skipping.labels)
        assert torch.equal(images.load(), expected)
        assert torch.equal(images.fetch(torch.arange(36))[0], expected)
    assert [record.getMessage().count("00.png") for record in caplog.records] == [1, 1]


def test_training_with_a_cache_is_bit_identical(root, tmp_path):
    given = ("data=image_folder", f"data.root={root}", "data.image_size=8", "data.channels=1", "data.batch_size=4")
    given += ("augment=[crop_flip,mixup]", "data.val_fraction=0.2")
    states = [
        last_state(trained(tmp_path / str(number), *given, *more).folder.path)
        for number, more in enumerate(
            [
                ("data.cache_dir=null",),
                (),  # made, and read into memory
                ("data.memory_budget=0", "data.num_workers=0"),  # mapped
                ("data.memory_budget=0", "data.num_workers=2"),
                ("data.memory_budget=0", "data.num_workers=1", f"data.cache_dir={tmp_path / 'elsewhere'}"),
            ]
        )
    ]
    assert states == states[:1] * 5
    assert kept(root) == CACHE and len(list((tmp_path / "elsewhere").iterdir())) == 3


@pytest.mark.parametrize("trouble", ["no room", "a file in its place", "a full disk"])
def test_images_are_decoded_if_the_cache_cannot_be_created(root, monkeypatch, caplog, trouble):
    files = files_of(root).pixels
    assert isinstance(files, Files)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trouble == "no room":
        monkeypatch.setattr(cache, "ROOM", 0.0)
    elif trouble == "a file in its place":
        (root / ".preceptor").write_text("mine")
    else:
        monkeypatch.setattr(signal, "SIGXFSZ", signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        found = with_cache(files, root / ".preceptor")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found is files
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "data.cache_dir" in record.getMessage()
    assert (root / ".preceptor").is_file() or kept(root) in ([], ["contents"])


def killed_at(number: int) -> Any:
    """A decoder that kills its process at its number-th image."""
    real, calls = cache.decode, itertools.count()

    def decode(*given: Any, **named: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    return decode


def test_kill_during_creation_leaves_no_obstacle(root, monkeypatch):
    """Killed at every image: never half a cache; the next creation removes what was left."""
    files = files_of(root).pixels
    assert isinstance(files, Files)
    expected, place = files_of(root).load(), root / ".preceptor"
    monkeypatch.setattr(cache, "ABANDONED", -1)
    for number in range(1, 36, 7):
        child = os.fork()
        if child == 0:
            cache.decode = killed_at(number)
            with_cache(files, place)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert kept(root) == ["contents", "tmp"]
    assert torch.equal(with_cache(files, place).cached(torch.arange(36)), expected)
    assert kept(root) == CACHE


def test_unfinished_cache_of_a_running_process_is_kept(root, monkeypatch):
    place = root / ".preceptor"
    place.mkdir()
    with cache._unfinished(place / "x.npy") as file:
        os.utime(file.fileno(), (1, 1))
        cache._remove_abandoned(place)
        assert Path(file.name).exists() and time.time() - Path(file.name).stat().st_mtime > cache.ABANDONED
    assert list(place.iterdir()) == []


def test_packed_paths_equal_the_paths():
    paths = [Path("a"), Path("/x y/ä.png"), Path(os.fsdecode(b"/raw/\xff.jpg")), Path("b/c/d.gif")]
    packed = pickle.loads(pickle.dumps(PackedPaths(paths)))  # noqa: S301  as a worker does
    assert list(packed) == paths and len(packed) == 4
    assert packed[-1] == paths[-1] and packed[1:3] == paths[1:3] and packed[::-2] == paths[::-2]
    with pytest.raises(IndexError):
        packed[4]
    assert list(PackedPaths([])) == []
