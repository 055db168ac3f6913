"""predict.py on files with unusual names, bad files, large files and outputs that cannot be written."""

import csv
import io
import os
from pathlib import Path

import pytest
import torch
from conftest import trained
from PIL import Image

from analysis.predict import predict_images
from analysis.runs_table import tabulate_runs
from core.config import Config
from core.errors import DataError, StorageError
from trainer.inference.load_run import load_run

ODD = os.fsdecode(b"caf\xe9")  # Latin-1, which is not UTF-8


def encoded(side: int, value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side), value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with class folders, a run on them with max_pixels=100, and file and class names that are not UTF-8."""
    root = tmp_path_factory.mktemp("predict")
    for name in ("a", ODD):
        (root / "images" / name).mkdir(parents=True)
        for number in range(8):
            (root / "images" / name / f"{ODD}{number}.png").write_bytes(encoded(8, 30 * number))
    data = ("data=image_folder", f"data.root={root}/images", "data.max_pixels=100", "data.image_size=8")
    trained(root / f"run-{ODD}", *data, "data.channels=1", "data.batch_size=4", "trainer.max_epochs=1")
    return root


def predict(root: Path, source: Path, output: Path, on_bad_image: str = "error") -> list[list[str]]:
    values = {"run": str(root / f"run-{ODD}"), "input": str(source), "output": str(output), "batch_size": 3}
    values |= {"checkpoint": "best", "device": "cpu", "trust": [], "on_bad_image": on_bad_image}
    predict_images(Config(values=values, record={}, job=None))
    return list(csv.reader(io.StringIO(os.fsdecode(output.read_bytes()), newline="")))


def test_tables_keep_names_that_are_not_utf8(root, tmp_path):
    header, *rows = predict(root, root / "images", tmp_path / "out.csv")
    assert header == ["file", "class", "probability", "a", ODD]
    assert [row[0] for row in rows] == [f"{name}/{ODD}{number}.png" for name in ("a", ODD) for number in range(8)]
    output = tmp_path / "runs.csv"
    where = {"model": None, "data": None, "name": None, "status": None, "tags": [], "debug": False}
    values = {"folder": str(root), "sort": "val/accuracy", "where": where, "output": str(output), "curves": None}
    tabulate_runs(Config(values=values, record={}, job=None))
    assert os.fsencode(f"run-{ODD},,,mlp,image_folder") in output.read_bytes()


def test_predict_skips_bad_files_only_on_request_and_reports_each(root, tmp_path, capsys):
    for number in range(7):  # batches of 3: the second contains bad files only
        (tmp_path / f"{number}.png").write_bytes(b"no image" if number in (3, 4, 5) else encoded(8, 30 * number))
    with pytest.raises(DataError, match=r"3\.png: is not an image.*on_bad_image=skip"):
        predict(root, tmp_path, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    _, *rows = predict(root, tmp_path, tmp_path / "out.csv", "skip")
    assert [row[0] for row in rows] == ["0.png", "1.png", "2.png", "6.png"]
    run = load_run(root / f"run-{ODD}")
    with torch.inference_mode():  # the row of the last image has the values of this image
        expected = run.model(run.transform(tmp_path / "6.png")[None]).softmax(1)[0]
    assert [float(value) for value in rows[-1][3:]] == pytest.approx(expected.tolist(), abs=2e-6)
    errors = capsys.readouterr().err
    assert [f"{number}.png: is not an image" in errors for number in range(7)] == [n in (3, 4, 5) for n in range(7)]
    with pytest.raises(DataError, match="none of its 1 files"):
        predict(root, tmp_path / "4.png", tmp_path / "out.csv", "skip")


def test_predict_uses_max_pixels_of_the_run(root, tmp_path):
    for side, is_allowed in ((10, True), (11, False)):
        file = tmp_path / f"{side}.png"
        file.write_bytes(encoded(side, 0))
        if is_allowed:
            assert len(predict(root, file, tmp_path / "out.csv")) == 2
        else:
            with pytest.raises(DataError, match="121 pixels: must be at most data.max_pixels = 100"):
                predict(root, file, tmp_path / "out.csv")


@pytest.mark.parametrize("output", [".", "missing/out.csv", "a.png/out.csv", "loop"])
def test_predict_refuses_an_output_it_cannot_write_before_it_loads_the_run(root, tmp_path, monkeypatch, output):
    (tmp_path / "a.png").write_bytes(encoded(8, 0))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr("analysis.predict.load_run", lambda *_, **__: pytest.fail("the run was loaded"))
    with pytest.raises(StorageError, match=r"cannot be written|is a folder: output must name a file"):
        predict(root, tmp_path / "a.png", tmp_path / output)
