"""Damaged, oversized, missing and changed data."""

import contextlib
import errno
import hashlib
import io
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import built, reopened, run_to_end, stop_after
from PIL import Image

from core.errors import CheckpointError, ConfigError, DataError, StopSignal
from data.augment.pipeline import Augmentations
from data.loading.loaders import EvalLoader, TrainLoader
from data.loading.normalisation import Normalisation
from data.sources import datasets, splits
from data.sources import decode as decoding
from data.sources.collection import Collection
from data.sources.decode import decode
from data.sources.image_folder import image_folder
from data.sources.images import Images
from trainer.state import changed_data

HTML = b"<!doctype html><title>404</title>"


def encoded(colour: int, *, kind: str = "png", size: tuple[int, int] = (9, 7)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (colour, 50, 100)).save(content, kind)
    return content.getvalue()


def bad_contents() -> dict[str, bytes]:
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise, "jpeg")
    return {
        "truncated JPEG": noise.getvalue()[:1000],
        "zero bytes": b"",
        "text": b"not an image",
        "HTML": HTML,
        "truncated PNG": encoded(1)[:-30],
        "too large": encoded(1, size=(31, 30)),
    }


def write(base: Path, counts: dict[str, int], bad: dict[tuple[str, int], bytes]) -> None:
    """Write images whose red value encodes class and number; `bad` replaces the content of some."""
    for shift, (name, count) in enumerate(counts.items()):
        (base / name).mkdir(parents=True)
        for number in range(count):
            content = bad.get((name, number), encoded(100 * shift + number % 100))
            (base / name / f"{number:03}.jpg").write_bytes(content)


def prepared(root: Path, *, streamed: bool = False, **changes: object) -> splits.Splits:
    settings = {"image_size": 4, "channels": 3, "test_fraction": 0.0, "empty_class": "error"}
    settings |= {"on_bad_image": "skip", "max_pixels": 900} | changes
    return splits.prepare(
        image_folder(root=str(root), **settings),
        seed=0,
        val_fraction=0,
        image_size=4,
        channels=3,
        fit="resize",
        num_classes=None,
        limit_train=None,
        memory_budget=0 if streamed else 1,
    )


def epoch(images: Images, *, num_workers: int, start: int = 0) -> list[torch.Tensor]:
    loader = TrainLoader(
        images,
        batch_size=min(16, len(images)),
        accumulate=1,
        seed=1,
        num_workers=num_workers,
        device=torch.device("cpu"),
        augmentations=Augmentations({}, seed=1, num_classes=3),
        normalisation=Normalisation({"mean": torch.zeros(3), "std": torch.ones(3)}),
    )
    return [tensor for [batch] in loader.steps(2, start) for tensor in batch]


@pytest.mark.parametrize("kind", bad_contents())
def test_unreadable_image_is_an_error_or_skipped(tmp_path, caplog, kind):
    write(tmp_path, {"a": 3, "b": 3}, {("a", 1): bad_contents()[kind]})
    for streamed in (False, True):
        with pytest.raises(DataError) as caught:
            prepared(tmp_path, streamed=streamed, on_bad_image="error")
        assert caught.value.subject == str(tmp_path / "a/001.jpg") and caught.value.exit_code == 3
    pixels = prepared(tmp_path).train.load()
    assert pixels[:, 0, 0, 0].tolist() == [0, 2, 2, 100, 101, 102]
    [record] = caplog.records
    assert (record.name, record.levelname) == ("preceptor.data", "WARNING")
    assert record.getMessage().startswith(f"{tmp_path / 'a/001.jpg'}: ")


def test_first_frame_of_a_gif_is_decoded(tmp_path):
    frames = [Image.new("RGB", (9, 7), (red, 0, 0)) for red in (7, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "moving.gif", image_size=4, channels=3)[0, 0, 0] == 7


def test_replacement_of_an_unreadable_image_does_not_depend_on_loading_or_resume(tmp_path, caplog):
    contents = list(bad_contents().values())
    bad = {("a", 0): contents[0], ("a", 1): contents[1], ("b", 69): contents[2], ("c", 5): contents[4]}
    write(tmp_path, {"a": 200, "b": 70, "c": 130}, bad)
    in_memory = prepared(tmp_path)
    red = in_memory.train.pixels[:, 0, 0, 0]
    # The replacement is the next readable image of the class, wrapping around after the last image of b.
    assert [red[row].item() for row in (0, 1, 2, 269, 270, 275)] == [2, 2, 2, 100, 200, 206]
    assert in_memory.train.labels.bincount().tolist() == [200, 70, 130]
    reported = sorted(record.getMessage().partition(":")[0] for record in caplog.records)
    assert reported == sorted(str(tmp_path / name / f"{number:03}.jpg") for name, number in bad)
    expected = epoch(in_memory.train, num_workers=0)
    for num_workers in (0, 1, 2):
        caplog.clear()
        streamed = prepared(tmp_path, streamed=True)
        assert all(
            torch.equal(streamed.normalisation.tensors[key], in_memory.normalisation.tensors[key])
            for key in ("mean", "std")
        )
        for start in (0, 7):
            tensors = epoch(streamed.train, num_workers=num_workers, start=start)
            assert all(torch.equal(*pair) for pair in zip(tensors, expected[3 * start :], strict=True))
        loader = EvalLoader(
            streamed.train,
            batch_size=7,
            normalisation=in_memory.normalisation,
            device=torch.device("cpu"),
            num_workers=num_workers,
        )
        assert torch.equal(
            torch.cat([batch.images for batch in loader]), in_memory.normalisation(in_memory.train.pixels)
        )
        assert len(caplog.records) == 4  # each image is reported once, although it was read four times
    fresh = prepared(tmp_path, streamed=True)
    fresh.train.pixels.known.bad.clear()  # as if unknown to the statistics: the workers find and report them
    caplog.clear()
    epoch(fresh.train, num_workers=2)
    assert sorted(record.getMessage().partition(":")[0] for record in caplog.records) == reported


@pytest.mark.parametrize("streamed", [False, True])
def test_too_many_unreadable_images_end_the_run(tmp_path, streamed):
    write(tmp_path, {"a": 150, "b": 149}, {("a", 3): b"", ("b", 7): HTML})
    prepared(tmp_path, streamed=streamed)  # 2 of 299 unreadable: allowed
    (tmp_path / "a/004.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 299 images are unreadable; data.on_bad_image=skip allows 2") as caught:
        prepared(tmp_path, streamed=streamed)
    assert Path(caught.value.subject).name in ("003.jpg", "004.jpg", "007.jpg")


def test_class_without_a_readable_image_is_an_error(tmp_path):
    write(tmp_path, {"a": 150, "b": 2}, {("b", 0): b"", ("b", 1): b""})
    (tmp_path / "a/000.jpg").rename(tmp_path / "b/extra.txt")
    with pytest.raises(DataError, match="2 of 151 images are unreadable"):
        prepared(tmp_path)
    (tmp_path / "b/001.jpg").unlink()
    with pytest.raises(DataError, match="is bad, as are all other images of its class") as caught:
        prepared(tmp_path)
    assert caught.value.subject == str(tmp_path / "b/000.jpg")


def test_config_error_names_the_key_of_image_checks(tmp_path):
    write(tmp_path, {"a": 3, "b": 3}, {})
    for key, value in (("on_bad_image", "warn"), ("max_pixels", 0)):
        with pytest.raises(ConfigError, match="must be") as caught:
            prepared(tmp_path, **{key: value})
        assert (caught.value.subject, caught.value.value) == (key, value)


def test_run_that_skips_unreadable_images_resumes_after_a_stop(tmp_path, caplog):
    write(tmp_path / "images", {"a": 20, "b": 20}, {("a", 3): b"", ("b", 19): HTML})
    overrides = ("data=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=8", "data.batch_size=8")
    overrides += ("data.on_bad_image=skip", "data.memory_budget=0", "data.test_fraction=0.5", "data.num_workers=1")
    overrides += ("data.timeout_s=77",)
    weights = []
    for name, stop in (("uninterrupted", None), ("stopped", 2)):
        run = built(tmp_path / name, *overrides)
        if stop:
            stop_after(run, stop)
            with pytest.raises(StopSignal):
                run_to_end(run)
            assert run.training.train_loader.source.timeout_s == run.training.val_loader.source.timeout_s == 77
            run = reopened(tmp_path / name, "data.timeout_s=300")
            assert run.training.train_loader.source.timeout_s == 300
        run_to_end(run)
        weights.append(torch.cat([parameter.flatten() for parameter in run.state.model.parameters()]))
    assert torch.equal(*weights)
    assert "003.jpg" in caplog.text and "019.jpg" in caplog.text


# ---------------------------------------------------------------------------------------------------------- max_pixels


def png(width: int, height: int) -> bytes:
    """Return a valid black PNG: a row of zeros is compressed to about a thousandth of its size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_decompression_bomb_is_refused_without_allocating_memory(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(20_000, 15_000))
    assert (tmp_path / "bomb.png").stat().st_size < 3_000_000
    program = (
        "import resource, sys\nfrom core.errors import DataError\nfrom data.sources.decode import decode\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode(sys.argv[1], image_size=4, channels=1)\nexcept DataError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "bomb.png")], capture_output=True, text=True, timeout=60
    )
    message, growth = done.stdout.splitlines()
    assert message.startswith(f"error[data] {tmp_path / 'bomb.png'}: has 20000 x 15000 = 300,000,000 pixels: ")
    assert message.endswith("must be at most data.max_pixels = 100,000,000")
    assert int(growth) < 20_000  # KiB
    assert done.stderr == ""  # no warning from Pillow


def test_odd_image_sizes_work_and_max_pixels_is_exact(tmp_path):
    for width, height in ((1, 1), (30_000, 2), (2, 30_000)):
        (tmp_path / "odd.png").write_bytes(png(width, height))
        assert decode(tmp_path / "odd.png", image_size=4, channels=3).shape == (3, 4, 4)
        decode(tmp_path / "odd.png", image_size=4, channels=3, max_pixels=width * height)
        with pytest.raises(DataError, match=f"data.max_pixels = {width * height - 1:,}"):
            decode(tmp_path / "odd.png", image_size=4, channels=3, max_pixels=width * height - 1)


def test_images_over_pillows_own_limit_are_decoded_up_to_max_pixels(tmp_path, recwarn):
    assert Image.MAX_IMAGE_PIXELS is not None and 14_000 * 13_000 > 2 * Image.MAX_IMAGE_PIXELS  # Pillow would raise
    (tmp_path / "large.png").write_bytes(png(14_000, 13_000))
    assert decode(tmp_path / "large.png", image_size=4, channels=1, max_pixels=182_000_000).shape == (1, 4, 4)
    assert not recwarn.list


@pytest.mark.parametrize("limit", [100, None])
def test_decoding_restores_pillows_limit(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # 900 pixels are far beyond 100
    contents = {"good.png": png(30, 30), "cut.png": png(30, 30)[:45], "none.png": b"no image"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    seen, real = [], decoding.ImageOps.exif_transpose

    def spy(image: Image.Image) -> Image.Image:
        seen.append(Image.MAX_IMAGE_PIXELS)
        time.sleep(0.001)  # so that threads overlap
        return real(image)

    def decode_one(name: str) -> bool:
        try:
            decode(tmp_path / name, image_size=4, channels=3)
        except decoding.BadImage:
            return False
        return True

    monkeypatch.setattr(decoding.ImageOps, "exif_transpose", spy)
    for name in contents:
        assert decode_one(name) == (name == "good.png")
        assert Image.MAX_IMAGE_PIXELS == limit
    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(decode_one, list(contents) * 50)) == 50
    assert Image.MAX_IMAGE_PIXELS == limit
    assert len(seen) >= 50 and set(seen) == {None}


def test_fork_during_decoding_restores_pillows_limit_in_the_child(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "good.png").write_bytes(png(30, 30))
    with decoding.UNLIMITED, decoding.UNLIMITED._lock:  # as if another thread were decoding and held the lock
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                signal.alarm(20)
                limit_before = Image.MAX_IMAGE_PIXELS
                decode(tmp_path / "good.png", image_size=4, channels=3)
                code = 0 if limit_before == Image.MAX_IMAGE_PIXELS == 100 else 2
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert Image.MAX_IMAGE_PIXELS == 100


def test_importing_the_decoder_has_no_side_effects():
    program = (
        "import atexit, signal, sys, warnings\n"
        "import torch\nfrom PIL import Image\n"
        "state = lambda: (Image.MAX_IMAGE_PIXELS, sys.excepthook, atexit._ncallbacks(), torch.get_num_threads(),\n"
        "    torch.get_rng_state().tolist(), torch.backends.cuda.matmul.allow_tf32, list(warnings.filters),\n"
        "    [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)])\n"
        "before = state()\n"
        "import data.sources.decode, data.sources.images, data.sources.pixels, data.loading.normalisation\n"
        "assert state() == before, (before, state())\n"
        "plugins = sorted(name for name in sys.modules if name.startswith('PIL.') and name.endswith('Plugin'))\n"
        "packages = {name.partition('.')[0] for name in sys.modules}\n"
        "print(plugins, sorted(packages & {'rich', 'torchvision', 'hydra', 'omegaconf'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[] []\n", "")


# --------------------------------------------------------------------------------------------------------- lost files


def test_file_that_disappears_is_a_data_error_not_an_unreadable_image(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "PAUSES", (0.01, 0.02, 0.03))
    write(tmp_path, {"a": 3, "b": 3}, {})
    splits = prepared(tmp_path, streamed=True)
    (tmp_path / "b/002.jpg").unlink()
    for num_workers in (0, 2):
        with pytest.raises(DataError, match=r"cannot be read: No such file or directory \(tried 4 times\)") as caught:
            epoch(splits.train, num_workers=num_workers)
        assert caught.value.subject == str(tmp_path / "b/002.jpg")
    tmp_path.rename(tmp_path.with_name("unmounted"))
    with pytest.raises(DataError, match="tried 4 times"):
        epoch(splits.train, num_workers=2)
    assert splits.train.pixels.known.bad == {}


@pytest.mark.parametrize("failures", [3, 4])
def test_reading_continues_when_a_drive_is_mounted_again(tmp_path, monkeypatch, failures):
    (tmp_path / "0.png").write_bytes(encoded(5))
    pauses, calls, opened = [], [], Image.open

    def unreliable(*arguments, **settings):
        calls.append(arguments)
        if len(calls) <= failures:
            raise OSError(errno.EIO, "Input/output error")
        return opened(*arguments, **settings)

    monkeypatch.setattr(Image, "open", unreliable)
    monkeypatch.setattr(decoding.time, "sleep", pauses.append)
    if failures == 3:
        assert decode(tmp_path / "0.png", image_size=4, channels=3)[0, 0, 0] == 5
    else:
        with pytest.raises(DataError, match="cannot be read: Input/output error") as caught:
            decode(tmp_path / "0.png", image_size=4, channels=3)
        assert not isinstance(caught.value, decoding.BadImage)
    assert pauses == sorted(pauses) and len(pauses) == 3 and sum(pauses) < 2


# -------------------------------------------------------------------------------------------------------- pixel values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pixels: pixels.float(), "train pixels = torch.float32: must be torch.uint8, 0 to 255"),
        (lambda pixels: pixels.float().index_fill(0, torch.tensor([3, 5]), float("nan")), "NaN or infinity in image 3"),
        (lambda pixels: pixels.double().index_fill(0, torch.tensor([4]), float("-inf")), "NaN or infinity in image 4"),
        (lambda pixels: pixels.long(), "torch.int64: must be torch.uint8"),
        (lambda pixels: pixels[:, 0], "must be (N, C, H, W) with 1 or 3 channels"),
    ],
)
def test_pixels_of_a_user_function_are_checked(change, message):
    pixels, labels = torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 2
    with pytest.raises(DataError) as caught:
        splits.prepare(
            Collection(Images(change(pixels), labels), None, None, ["a", "b"]),
            seed=0,
            val_fraction=0,
            image_size=4,
            channels=1,
            fit="resize",
            num_classes=None,
            limit_train=None,
            memory_budget=1,
        )
    assert message in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_images_keep_their_mean(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 65536, (40, 40)).astype(np.uint16)
    values[:20] //= 256  # dark values, which clipping at 255 would turn white
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    pixels = decode(tmp_path / f"deep.{suffix}", image_size=40, channels=1)
    assert abs(pixels.double().mean().item() / 255 - values.mean() / 65535) < 1 / 255
    assert np.abs(pixels[0].numpy() - values / 257).max() <= 0.5


# ------------------------------------------------------------------------------------------- changed data at a resume


def test_resume_reports_an_added_image(tmp_path):
    write(tmp_path / "images", {"a": 20, "b": 25}, {})
    overrides = ("data=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=8", "data.batch_size=8")
    run = built(tmp_path / "run", *overrides)
    stop_after(run, 2)
    with pytest.raises(StopSignal):
        run_to_end(run)
    image = tmp_path / "images/a/new.jpg"
    image.write_bytes(encoded(1))
    with pytest.raises(CheckpointError, match="train 36 -> 37 images; put it back, .* with init_from=RUN") as caught:
        reopened(tmp_path / "run")
    assert caught.value.exit_code == 6
    (tmp_path / "images/a/000.jpg").unlink()
    with pytest.raises(CheckpointError, match="the same number of images, other names or labels"):
        reopened(tmp_path / "run")
    image.unlink()
    (tmp_path / "images/a/000.jpg").write_bytes(encoded(0))
    assert reopened(tmp_path / "run") is not None


def test_resume_reports_added_and_removed_splits():
    now = {"counts": {"train": 5, "test": 2}}
    assert "val 3 -> none images, test none -> 2 images" in changed_data({"counts": {"train": 5, "val": 3}}, now)


# ------------------------------------------------------------------------------------------------------------ archives


def hostile_archive(path: Path, outside: Path) -> None:
    """Write an archive that would write outside its folder if a program unpacked it without checks."""
    with tarfile.open(path, "w:gz") as archive:
        for name, kind, target in (
            ("../escaped", tarfile.REGTYPE, ""),
            (str(outside / "absolute"), tarfile.REGTYPE, ""),
            ("cifar-10-batches-py", tarfile.SYMTYPE, str(outside)),
            ("cifar-10-batches-py/through", tarfile.REGTYPE, ""),
            ("hard", tarfile.LNKTYPE, "/etc/passwd"),
            ("device", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, target, 0o6755
            archive.addfile(member, io.BytesIO())


def test_hostile_archive_is_refused_unread(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    hostile_archive(tmp_path / "root/cifar-10-python.tar.gz", tmp_path / "outside")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="digest does not match c58f30108f718f92721af3b95e74349a") as caught:
        datasets.cifar10(root=str(tmp_path / "root"), download=True)
    assert caught.value.subject == str(tmp_path / "root/cifar-10-python.tar.gz")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fault", ["truncated", "hostile"])
def test_download_is_verified_before_it_is_unpacked(tmp_path, monkeypatch, fault):
    from torchvision.datasets import CIFAR10

    for name in ("served", "outside"):
        (tmp_path / name).mkdir()
    archive = tmp_path / "served/cifar-10-python.tar.gz"
    hostile_archive(archive, tmp_path / "outside")
    if fault == "truncated":
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        archive.write_bytes(archive.read_bytes()[:-9])
    before = sorted(tmp_path.rglob("*"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=archive.parent)) as server:
        Thread(target=server.serve_forever, args=(0.02,)).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        with pytest.raises(DataError, match="the digest of the downloaded file does not match"):
            datasets.cifar10(root=str(tmp_path / "root"), download=True)
        server.shutdown()
    assert sorted(tmp_path.rglob("*")) == before


def test_every_download_has_a_digest():
    from torchvision import datasets as official

    digests = [
        digest for name in ("MNIST", "FashionMNIST", "KMNIST") for _, digest in getattr(official, name).resources
    ]
    digests += [official.CIFAR10.tgz_md5, official.CIFAR100.tgz_md5]
    digests += [official.SVHN.split_list[split][2] for split in ("train", "test")]
    assert len(digests) == 16 and all(len(bytes.fromhex(digest)) == 16 for digest in digests)


def test_warnings_of_pillow_do_not_reach_the_terminal(tmp_path):
    path = tmp_path / "exif.jpg"
    Image.new("RGB", (4, 4)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\0\0")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"), Image.open(path) as image:
        image.getexif()
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(path, image_size=4, channels=3).shape == (3, 4, 4)
    assert not caught and warnings.filters == filters
