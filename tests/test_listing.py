"""Listing of image folders: which files are read, in which order, and how skipped files are reported."""

import logging
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from analysis.predict import image_paths
from core.errors import DataError
from data.sources.image_folder import image_folder
from data.sources.listing import SUFFIXES, PackedPaths, Skipped, image_files, image_names, pack_class_folders


def write(root: Path, *names: str) -> None:
    """Write an image at each of these paths below a folder."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), number % 256, dtype=np.uint8)).save(path, "PNG")


def collection(root: Path):
    return image_folder(root=str(root), image_size=4, channels=1, test_fraction=0, empty_class="error")


def relative(paths, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_listing_equals_that_of_torchvision(tmp_path):
    """On a tree without hidden files: the same files, classes and labels; sorted by the whole relative path."""
    names = [f"{label}/{folder}{number}{suffix}" for label in ("b", "a", "ä c") for folder in ("", "z/", "a.b/", "A/")
             for number, suffix in enumerate([*sorted(SUFFIXES), ".PNG", ".txt", ".npy", ""])]  # fmt: skip
    write(tmp_path, *names)
    reference = ImageFolder(str(tmp_path), is_valid_file=lambda path: Path(path).suffix.lower() in SUFFIXES)
    expected = sorted((Path(path).relative_to(tmp_path).as_posix(), label) for path, label in reference.samples)
    listed = collection(tmp_path).train
    assert collection(tmp_path).class_names == reference.classes
    assert list(zip(relative(listed.pixels.paths, tmp_path), listed.labels.tolist(), strict=True)) == expected


def test_hidden_system_and_other_files_are_skipped_and_counted(tmp_path, monkeypatch, caplog, capsys):
    write(tmp_path, "a/1.png", "a/2.jpg", "b/1.png")
    expected = relative(image_files(tmp_path, Skipped()), tmp_path)
    write(tmp_path, "a/.ipynb_checkpoints/1-checkpoint.png", "a/.Trash-1000/files/2.png", "a/@eaDir/1.png@SYNO.png")
    write(tmp_path, "b/__MACOSX/1.png", "__MACOSX/b/1.png", ".git/x.png", "a/.hidden.png", "b/Thumbs.db", "b/1.heic")
    write(tmp_path, "b/2.avif", "b/notes", "b/sub/3.HEIC")
    (tmp_path / "b/gone.png").symlink_to(tmp_path / "nowhere.png")
    with socket.socket(socket.AF_UNIX) as pipe:
        monkeypatch.chdir(tmp_path)
        pipe.bind("b/socket.png")
        os.mkfifo(tmp_path / "b/fifo.png")
        data = collection(tmp_path)
        assert data.class_names == ["a", "b"] and relative(data.train.pixels.paths, tmp_path) == expected
        assert relative(image_paths(tmp_path), tmp_path) == expected
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage().partition(f"{tmp_path}: ")[2]
    reasons = [re.sub(r" \(.*", "", part) for part in text.partition(": ")[2].split("), ")]
    assert text.startswith("13 files or folders skipped: ") and reasons == [
        "6 hidden or of the system",
        "4 of another format",
        "2 neither file nor folder",
        "1 dangling links",
    ]
    assert "(.avif, .heic, notes)" in text and "(fifo.png, socket.png)" in text and "(gone.png)" in text
    assert ": 15 files or folders skipped: 8 hidden" in capsys.readouterr().err  # two more outside the class folders


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    outside = tmp_path / "outside"
    write(outside, "x/1.png", "x/deeper/2.png", "3.png")
    write(tmp_path, "root/b/4.png")
    (tmp_path / "root/a").symlink_to(outside / "x")  # a class
    (tmp_path / "root/b/more").symlink_to(outside)  # a folder in a class
    (tmp_path / "root/b/5.png").symlink_to(outside / "3.png")  # a file
    (outside / "x/deeper/up").symlink_to(outside / "x")  # loops
    (outside / "again").symlink_to(tmp_path / "root/b")
    root, skipped = tmp_path / "root", Skipped()
    expected = ["a/1.png", "a/deeper/2.png", "b/4.png", "b/5.png", "b/more/3.png", "b/more/x/1.png"]
    expected.append("b/more/x/deeper/2.png")
    paths, counts = pack_class_folders(root, ["a", "b"], skipped)
    assert relative(paths, root) == expected and counts == [2, 5]
    assert skipped.counts == {"reached twice by links": 3}
    assert relative(collection(root).train.pixels.paths, root) == expected
    everything = image_names(tmp_path, Skipped())  # each folder once, real ones first
    assert b"outside/x/1.png" in everything and b"root/a/1.png" not in everything


def test_many_links_between_folders_do_not_multiply_the_files(tmp_path):
    """Twelve folders that link to each other have 12! paths; each folder is read once."""
    for number in range(12):
        write(tmp_path, f"{number:02d}/1.png")
        for other in range(12):
            (tmp_path / f"{number:02d}/to{other:02d}").symlink_to(tmp_path / f"{other:02d}")
    assert image_names(tmp_path, Skipped()) == [f"{number:02d}/1.png".encode() for number in range(12)]


def test_file_names_that_are_not_utf8_are_kept(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png")
    name = os.fsencode(tmp_path) + b"/a/\xff\xe4.png"
    (tmp_path / "a/1.png").rename(os.fsdecode(name))
    paths = collection(tmp_path).train.pixels.paths
    assert os.fsencode(paths[0]) == name and paths[0].exists() and len(paths) == 2


@pytest.mark.parametrize("names", [
    ("Train", "Val", "Test"),
    ("training", "validation", "testing"),
    ("TRAIN", "valid", "test"),
    ("train", "dev", None),
    ("train", "eval", None),
])  # fmt: skip
def test_usual_names_of_split_folders_are_recognised(tmp_path, names):
    for size, name in zip((3, 2, 1), names, strict=True):
        if name is not None:
            write(tmp_path, *(f"{name}/{label}/{number}.png" for label in "ab" for number in range(size)))
    write(tmp_path, ".cache/x.png", "__MACOSX/x.png")
    data = collection(tmp_path)
    assert data.class_names == ["a", "b"] and (len(data.train), len(data.val)) == (6, 4)
    assert data.test is None if names[2] is None else len(data.test) == 2


@pytest.mark.parametrize(("folders", "message"), [
    (("train", "test", "extra"), "has extra beside the split folder train: move or remove them"),
    (("Train", "cats", "dogs"), "has cats, dogs beside the split folder Train"),
    (("train", "val", "valid"), "has val and valid: both are names of the val split"),
    (("train", "Train"), "has Train and train: both are names of the train split"),
    (("val", "Testing"), "has Testing and val but no train"),
    (("valid",), "has valid but no train"),
])  # fmt: skip
def test_ambiguous_split_folders_are_refused(tmp_path, folders, message):
    for folder in folders:
        write(tmp_path, f"{folder}/a/1.png", f"{folder}/b/1.png")
    with pytest.raises(DataError, match=message):
        collection(tmp_path)


def test_class_folders_may_have_names_of_splits(tmp_path):
    write(tmp_path, "test/1.png", "val/1.png", "other/1.png")
    assert collection(tmp_path).class_names == ["other", "test", "val"]


def test_listing_needs_no_stat_per_file(tmp_path, monkeypatch):
    write(tmp_path, *(f"{label}/{number}.png" for label in "ab" for number in range(50)))
    calls = []
    real = os.stat

    def stat(path, *arguments, **options):
        calls.append(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    _, counts = pack_class_folders(tmp_path, ["a", "b"], Skipped())
    assert counts == [50, 50] and len(calls) == 2  # one per folder


def test_packed_paths_take_less_than_fifty_bytes_each():
    names = [f"n{number // 1000:08d}/n{number // 1000:08d}_{number}.JPEG".encode() for number in range(100_000)]
    paths = PackedPaths(Path("/data/train"), names)
    assert paths.characters.nbytes + paths.starts.nbytes < 50 * len(paths)
    assert paths[99_999] == Path("/data/train/n00000099/n00000099_99999.JPEG")
