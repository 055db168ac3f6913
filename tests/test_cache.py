"""Image cache: pixels as decoded, atomic creation, repair after damage and after file changes."""

import errno
import hashlib
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

from core.errors import DataError
from data.loading.loaders import EvalLoader
from data.sources import cache, cache_creation, cache_index
from data.sources import decode as decode_module
from data.sources.image_folder import image_folder
from data.sources.images import Files, Images, with_cache
from data.sources.listing import PackedPaths

BAD = 3


@pytest.fixture
def root(tmp_path) -> Path:
    """Return a folder with 36 images in three classes, of several sizes and modes."""
    generator = np.random.default_rng(0)
    for index in range(36):
        path = tmp_path / "images" / f"class {index % 3}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (9 + index % 4, 8) if index % 2 else (9, 12, 3)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return tmp_path / "images"


def files_of(root: Path, *, size: int = 7, on_bad_image: str = "error") -> Images:
    collection = image_folder(
        root=str(root), image_size=size, channels=3, test_fraction=0, empty_class="error", on_bad_image=on_bad_image
    )
    return collection.train


CACHE = ["index", "npy"]


def cache_endings(root: Path) -> list[str]:
    """Return the endings of the files in the cache folder."""
    return sorted(path.name.rsplit(".", 1)[1] for path in (root / ".preceptor").iterdir())


def cache_file(root: Path, ending: str) -> Path:
    """Return the only file of the cache with this ending."""
    (path,) = (root / ".preceptor").glob(f"*.{ending}")
    return path


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Return the names of files decoded for a cache, or because their cached pixels were unusable."""
    names: list[str] = []
    real = decode_module.decode_file

    def decode_file(file: Any, name: str, **options: Any) -> Any:
        names.append(Path(name).name)
        return real(file, name, **options)

    monkeypatch.setattr(cache_creation, "decode_file", decode_file)
    monkeypatch.setattr(decode_module, "decode_file", decode_file)
    return names


def load(root: Path, **options: Any) -> torch.Tensor:
    """Return all pixels, read with the cache in ROOT/.preceptor."""
    images = files_of(root, **options)
    return Images(with_cache(images.pixels, root / ".preceptor"), images.labels).load()


def test_cached_pixels_equal_decoded_ones_and_each_image_is_decoded_once(root, monkeypatch):
    uncached = files_of(root)
    assert isinstance(uncached.pixels, Files)
    folder = root / ".preceptor"
    first = Images(with_cache(uncached.pixels, folder), uncached.labels)
    assert cache_endings(root) == CACHE
    monkeypatch.setattr("data.sources.images.decode", None)
    monkeypatch.setattr("data.sources.cache_creation.decode_file", None)
    reopened = Images(with_cache(uncached.pixels, folder), uncached.labels)
    monkeypatch.undo()
    expected, rows = uncached.load(), torch.tensor([5, 5, 0, 35])
    for images in (first, reopened):
        assert torch.equal(images.load(), expected)
        assert torch.equal(images.fetch(rows)[0], expected[rows]) and torch.equal(images.pixels[5], expected[5])
        subset = images.take(torch.tensor([30, 2, 7]))
        assert torch.equal(subset.load(), expected[[30, 2, 7]])
        assert torch.equal(subset.take(torch.tensor([2])).fetch(torch.tensor([0]))[0], expected[[7]])


def test_pickled_cache_holds_the_path_and_opens_the_file_again(root, monkeypatch):
    monkeypatch.chdir(root)
    files = with_cache(files_of(root, size=64).pixels, Path(".preceptor")).take(torch.tensor([30, 2, 7]))
    content = pickle.dumps(files)
    assert len(content) < 36 * 64 * 64
    monkeypatch.chdir("/")
    unpickled = pickle.loads(content)  # noqa: S301  as in a worker
    assert unpickled.cache.path == files.cache.path and unpickled.cache.path.is_absolute()
    assert list(unpickled.paths) == unpickled.paths[:] == list(files.paths) and unpickled.paths[-1] == files.paths[-1]
    assert torch.equal(unpickled.cache.rows, files.cache.rows) and unpickled.shape == files.shape
    rows = torch.tensor([2, 0])
    assert torch.equal(unpickled.cached(rows), files.cached(rows))
    files.cache.path.unlink()
    assert pickle.loads(content).cached(rows) is None  # noqa: S301
    assert torch.equal(pickle.loads(content)[2], files[2])  # noqa: S301  decoded from its file


def test_only_changed_files_are_decoded_again(root, decoded, caplog):
    before, path = load(root), root / "class 0" / "00.png"
    decoded.clear()
    path.write_bytes(path.read_bytes())  # other times, the same content
    assert torch.equal(load(root), before) and not decoded and not caplog.records
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path, compress_level=0)
    after = load(root)
    assert decoded == ["00.png"] and not torch.equal(before[0], after[0]) and torch.equal(before[1:], after[1:])
    assert [record.getMessage().partition(" in the cache")[0] for record in caplog.records] == ["1 of 36 images"]
    decoded.clear()
    assert torch.equal(load(root), after) and not decoded and cache_endings(root) == CACHE

    same_size = bytearray(path.read_bytes())
    status = path.stat()
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path, compress_level=0)
    assert len(path.read_bytes()) == len(same_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the change time differs
    assert torch.equal(load(root), before) and decoded == ["00.png"]


def test_new_cache_is_announced_in_the_log_of_the_run(root, tmp_path):
    data = ("data=image_folder", f"data.root={root}", "data.image_size=7", "data.batch_size=4", "data.memory_budget=0")
    for name, announced in (("first", True), ("second", False)):
        trained(tmp_path / name, *data, "trainer.max_steps=1")
        log = (tmp_path / name / "train.log").read_text()
        assert ("created an image cache" in log) is announced
    assert f".preceptor/{cache_file(root, 'npy').name}" in (tmp_path / "first/train.log").read_text()


def test_copied_folder_keeps_its_cache_and_renamed_files_get_a_new_one(root, decoded):
    pixels = load(root)
    decoded.clear()
    copy = shutil.copytree(root, root.with_name("copy"), copy_function=shutil.copyfile)  # with new times
    assert torch.equal(load(copy), pixels) and not decoded and cache_endings(copy) == CACHE
    first = cache_index.read_index(cache_file(copy, "index"), rows=36)
    path = copy / "class 0" / "00.png"
    assert first.has_facts(0, cache_index.facts_of(path))  # the index has the new times: nothing is hashed again
    path.rename(copy / "class 0" / "99.png")
    assert not torch.equal(load(copy), pixels) and len(decoded) == 36
    assert cache_endings(copy) == sorted(2 * CACHE)


def test_change_of_a_file_that_is_not_sampled_is_detected_at_its_first_read(root, monkeypatch, decoded, caplog):
    monkeypatch.setattr(cache_creation, "SAMPLED", 2)  # the first and the last file
    before, path = load(root), root / "class 1" / "04.png"
    decoded.clear()
    Image.new("RGB", (9, 9), "red").save(path)
    for can_create in (False, True):  # a config from a run folder creates no cache
        images = files_of(root)
        caplog.clear()
        images = Images(with_cache(images.pixels, root / ".preceptor", create=can_create), images.labels)
        rows = torch.tensor([14, 12, 13, 14])  # 04.png is the second file of the second class
        for _ in range(2):
            pixels, problems = images.fetch(rows)
            images.report(problems)
            assert list(problems.uncached) == [13] and torch.equal(pixels[[0, 1, 3]], before[rows[[0, 1, 3]]])
            assert pixels[2].float().mean((1, 2)).tolist() == [255, 0, 0]
        (record,) = caplog.records
        assert "04.png: its file was changed" in record.getMessage()
        assert ("the next run repairs the cache" in record.getMessage()) is can_create
        assert cache_endings(root) == (["check", *CACHE] if can_create else CACHE)
    decoded.clear()
    after = load(root)
    assert decoded == ["04.png"] and torch.equal(after[:13], before[:13]) and cache_endings(root) == CACHE
    decoded.clear()
    assert torch.equal(load(root), after) and not decoded


def flipped(content: bytes, at: int) -> bytes:
    """Return the content with one bit changed."""
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


HEADER = len(cache.header_of((36, 3, 7, 7)))
DAMAGE = {  # file of the cache -> its new content; None: removed
    "pixels truncated": ("npy", lambda content: content[:-1]),
    "pixels longer": ("npy", lambda content: content + b"x"),
    "pixels empty": ("npy", lambda content: b""),
    "pixels missing": ("npy", None),
    "another header": ("npy", lambda content: flipped(content, 8)),
    "another dtype": ("npy", lambda content: content.replace(b"|u1", b"|i1")),
    "other rows": ("npy", lambda content: content.replace(b"(36,", b"(35,")),
    "index truncated": ("index", lambda content: content[:-5]),
    "index empty": ("index", lambda content: b""),
    "index missing": ("index", None),
    "index of another kind": ("index", lambda content: b"[[[1], 2]]\n"),
    "deep index": ("index", lambda content: b"[" * 10_000),
    "a bit of the index": ("index", lambda content: flipped(content, -3)),
    "bad images of the index": ("index", lambda content: content.replace(b"{}", b'{"3": "x"}')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_created_again_with_one_warning(root, decoded, caplog, damage):
    before = load(root)
    decoded.clear()
    ending, change = DAMAGE[damage]
    path = cache_file(root, ending)
    content = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(content))
        assert path.read_bytes() != content
    assert torch.equal(load(root), before) and len(decoded) == 36
    (record,) = caplog.records
    assert "is damaged" in record.getMessage() and "a new one is created" in record.getMessage()
    decoded.clear()
    assert torch.equal(load(root), before) and not decoded and len(caplog.records) == 1 and cache_endings(root) == CACHE


def test_cache_with_a_fifo_or_folder_in_place_of_a_file_does_not_block(root, caplog):
    before = load(root)
    cache_file(root, "npy").unlink()
    os.mkfifo(cache_file(root, "index").with_suffix(".npy"))
    assert torch.equal(load(root), before) and "is a FIFO" in caplog.text and cache_endings(root) == CACHE
    path = cache_file(root, "index")
    path.unlink()
    path.mkdir()
    assert torch.equal(load(root), before) and "no cache in" in caplog.text


def test_other_pixels_in_the_cache_are_detected_and_replaced(root, decoded, caplog):
    before = load(root)
    decoded.clear()
    path = cache_file(root, "npy")
    path.write_bytes(flipped(path.read_bytes(), HEADER + 5 * 147 + 20))  # of image 5
    assert torch.equal(load(root), before) and decoded == ["15.png"]
    (record,) = caplog.records
    assert "15.png: its cached pixels are damaged" in record.getMessage() and cache_endings(root) == ["check", *CACHE]
    decoded.clear()
    assert torch.equal(load(root), before) and decoded == ["15.png"] and cache_endings(root) == CACHE  # repaired
    decoded.clear()
    caplog.clear()
    assert torch.equal(load(root), before) and not decoded and not caplog.records


@pytest.mark.parametrize("num_workers", [0, 2])
def test_truncation_during_a_run_changes_no_pixel(root, tmp_path, caplog, num_workers):
    """A memory-mapped file would end the process with SIGBUS."""
    expected = load(root)
    images = files_of(root)
    images = Images(with_cache(images.pixels, root / ".preceptor"), images.labels)
    loader = EvalLoader(
        images, batch_size=7, normalisation=lambda pixels: pixels, device=torch.device("cpu"), num_workers=num_workers
    )
    for _ in range(2):
        assert torch.equal(torch.cat([batch.images for batch in loader]), expected)
        os.truncate(cache_file(root, "npy"), HEADER + 300)
    (record,) = caplog.records
    assert "is shorter than it was" in record.getMessage()


def test_existing_cache_in_a_read_only_folder_is_used(root, monkeypatch, decoded, caplog):
    before = load(root)
    (root / "class 0" / "00.png").write_bytes((root / "class 0" / "00.png").read_bytes())
    decoded.clear()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert torch.equal(load(root), before) and not decoded and not caplog.records and cache_endings(root) == CACHE
    shutil.rmtree(root / ".preceptor")
    (root / ".preceptor").mkdir()
    assert torch.equal(load(root), before) and "Permission denied" in caplog.messages[-1] and cache_endings(root) == []


def test_files_changed_during_creation_leave_no_cache(root, monkeypatch, caplog):
    files = files_of(root).pixels
    real = cache_creation.decode_file

    def decode_file(file: Any, name: str, **options: Any) -> Any:
        pixels = real(file, name, **options)
        if name.endswith("30.png"):
            Image.new("RGB", (9, 9), "red").save(name)
        return pixels

    monkeypatch.setattr(cache_creation, "decode_file", decode_file)
    assert with_cache(files, root / ".preceptor") is files
    assert "changed" in caplog.messages[-1] and cache_endings(root) == []


def test_unreadable_file_prevents_the_cache(root, monkeypatch):
    files = files_of(root).pixels
    tries, real, fails = itertools.count(), decode_module.open_regular, 100

    def fail(path: Path, **options: Any) -> Any:
        if path.name == "30.png" and next(tries) < fails:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, **options)

    monkeypatch.setattr(decode_module, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(decode_module, "open_regular", fail)
    assert with_cache(files, root / ".preceptor") is files and cache_endings(root) == []
    tries, fails = itertools.count(), 2  # the third try succeeds
    assert with_cache(files, root / ".preceptor").cache is not None and cache_endings(root) == CACHE


def test_unreadable_images_are_treated_as_without_a_cache(root, caplog):
    path = root / "class 0" / "00.png"
    path.write_bytes(path.read_bytes()[:60])
    files = files_of(root).pixels
    with pytest.raises(DataError, match="00.png"):
        with_cache(files, root / ".preceptor")
    assert cache_endings(root) == []
    skipping = files_of(root, on_bad_image="skip")
    assert isinstance(skipping.pixels, Files)
    expected = skipping.load()
    caplog.clear()
    for _ in range(2):  # the first pass creates the cache, the second reads it
        images = Images(with_cache(files_of(root, on_bad_image="skip").pixels, root / ".preceptor"), skipping.labels)
        assert torch.equal(images.load(), expected)
        assert torch.equal(images.fetch(torch.arange(36))[0], expected)
    assert [record.getMessage().count("00.png") for record in caplog.records] == [1, 1]


def test_training_with_a_cache_is_bit_identical(root, tmp_path):
    overrides = ("data=image_folder", f"data.root={root}", "data.image_size=8", "data.channels=1", "data.batch_size=4")
    overrides += ("augment=[crop_flip,mixup]", "data.val_fraction=0.2")
    states = [
        last_state(trained(tmp_path / str(number), *overrides, *cache_overrides).folder.path)
        for number, cache_overrides in enumerate(
            [
                ("data.cache_dir=null",),
                (),  # created, then read into memory
                ("data.memory_budget=0", "data.num_workers=0"),  # streamed from the cache
                ("data.memory_budget=0", "data.num_workers=2"),
                ("data.memory_budget=0", "data.num_workers=1", f"data.cache_dir={tmp_path / 'elsewhere'}"),
            ]
        )
    ]
    assert states == states[:1] * 5
    assert cache_endings(root) == CACHE and len(list((tmp_path / "elsewhere").iterdir())) == 2


@pytest.mark.parametrize("trouble", ["no room", "a file in its place", "a full disk"])
def test_images_are_decoded_if_the_cache_cannot_be_created(root, monkeypatch, caplog, trouble):
    files = files_of(root).pixels
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trouble == "no room":
        monkeypatch.setattr(cache_creation, "FREE_SHARE", 0.0)
    elif trouble == "a file in its place":
        (root / ".preceptor").write_text("mine")
    else:
        monkeypatch.setattr(signal, "SIGXFSZ", signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        pixels = with_cache(files, root / ".preceptor")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert pixels is files
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "data.cache_dir" in record.getMessage()
    assert (root / ".preceptor").is_file() or cache_endings(root) == []


def decoder_that_kills_at(number: int) -> Any:
    """Return a decoder that kills its process at the image with this number."""
    real, calls = cache_creation.decode_file, itertools.count()

    def decode(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    return decode


def test_kill_during_creation_does_not_block_the_next_creation(root, monkeypatch):
    """A kill at any image leaves no partial cache; the next creation removes the temporary files."""
    files = files_of(root).pixels
    expected, folder = files_of(root).load(), root / ".preceptor"
    monkeypatch.setattr(cache_creation, "ABANDONED", -1)
    for number in range(1, 36, 7):
        child = os.fork()
        if child == 0:
            cache_creation.decode_file = decoder_that_kills_at(number)
            with_cache(files, folder)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert cache_endings(root) == ["tmp"]
    assert torch.equal(with_cache(files, folder).cached(torch.arange(36)), expected)
    assert cache_endings(root) == CACHE


def test_only_unfinished_caches_without_a_writer_are_removed(root):
    folder = root / ".preceptor"
    folder.mkdir()
    other = folder / ".notes.tmp"  # belongs to another program
    other.touch()
    os.utime(other, (1, 1))
    abandoned = folder / f".{'0' * 24}.npy.01234567.tmp"
    abandoned.touch()
    os.utime(abandoned, (1, 1))
    with cache_creation._unfinished(folder / f"{'0' * 24}.npy") as file:
        os.utime(file.fileno(), (1, 1))
        cache_creation._remove_abandoned(folder)
        assert Path(file.name).exists() and time.time() - Path(file.name).stat().st_mtime > cache_creation.ABANDONED
        assert not abandoned.exists()
    assert list(folder.iterdir()) == [other]


def test_packed_paths_behave_like_a_list_of_paths():
    paths = [Path("a"), Path("/x y/ä.png"), Path(os.fsdecode(b"/raw/\xff.jpg")), Path("b/c/d.gif")]
    packed = pickle.loads(pickle.dumps(PackedPaths.of(paths)))  # noqa: S301  as in a worker
    assert list(packed) == paths and len(packed) == 4
    assert packed[-1] == paths[-1] and packed[1:3] == paths[1:3] and packed[::-2] == paths[::-2]
    taken = packed.take(torch.tensor([3, 0, 0]))
    assert list(taken) == [paths[3], paths[0], paths[0]] and list(taken.take(torch.tensor([1]))) == [paths[0]]
    with pytest.raises(IndexError):
        packed[4]
    with pytest.raises(IndexError):
        taken[3]
    assert list(PackedPaths.of([])) == []
    digests = set()
    for sequence in (
        packed,
        taken,
        PackedPaths.of(paths[::-1]),
        PackedPaths.of(["a", "bc"]),
        PackedPaths.of(["ab", "c"]),
    ):
        digest = hashlib.sha256()
        sequence.update(digest)
        digests.add(digest.digest())
    assert len(digests) == 5
