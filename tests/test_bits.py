"""`data.bits`: 10- and 12-bit values in 16-bit image files."""

import logging

import numpy as np
import pytest
from conftest import trained
from PIL import Image

from core.errors import DataError
from data.sources.decode import decode
from data.sources.image_folder import image_folder
from trainer.inference.load_run import load_run


def write(path, largest):
    """Write a 16-bit image of 8 x 8 values from 0 to `largest`, and return the values."""
    values = np.linspace(0, largest, 64).round().astype(np.uint16).reshape(8, 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return values


def folder(root, **settings):
    shared = {"image_size": 8, "channels": 1, "test_fraction": 0.0, "empty_class": "error", "cache_dir": "auto"}
    return image_folder(root=str(root), **shared | settings)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_values_of_16_bit_files_are_scaled_by_their_bits(tmp_path, bits, suffix):
    values = write(tmp_path / f"a.{suffix}", 2**bits - 1)
    decoded = decode(tmp_path / f"a.{suffix}", image_size=8, channels=1, bits=bits)[0].numpy()
    assert np.abs(decoded - values * (255 / (2**bits - 1))).max() <= 0.5 + 1e-9
    assert decoded.max() == 255
    if bits < 16:
        write(tmp_path / f"a.{suffix}", 2**bits)
        with pytest.raises(DataError, match=rf"within 0 to {2**bits - 1} \(data.bits={bits}\)"):
            decode(tmp_path / f"a.{suffix}", image_size=8, channels=1, bits=bits)


def test_bits_of_8_bit_files_change_nothing(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png", image_size=8, channels=1, bits=12)[0].numpy() == pixels).all()


@pytest.mark.parametrize(("largest", "needed"), [(1023, 10), (4095, 12), (200, 8), (60000, None)])
def test_one_warning_names_the_first_file_the_largest_value_and_data_bits(tmp_path, caplog, largest, needed):
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        write(tmp_path / name, largest)
    with caplog.at_level(logging.WARNING):
        folder(tmp_path)
        folder(tmp_path, bits=needed or 16)  # a set key warns of nothing
    texts = [record.getMessage() for record in caplog.records if "data.bits" in record.getMessage()]
    assert len(texts) == (needed is not None)
    for text in texts:
        assert str(tmp_path / "a/0.png") in text and f"{largest:,}" in text and f"data.bits={needed}," in text


def test_caches_of_other_bits_are_separate(tmp_path):
    for name in ("a/0.png", "b/0.png"):
        write(tmp_path / name, 4095)
    assert [folder(tmp_path, bits=bits).train.load().max().item() for bits in (None, 12, None)] == [16, 255, 16]


def test_a_loaded_run_decodes_with_its_own_bits(tmp_path):
    for label in ("a", "b"):
        for number in range(8):
            write(tmp_path / "data" / label / f"{number}.png", 4095)
    data = (f"data.root={tmp_path}/data", "data.image_size=8", "data.channels=1", "data.bits=12", "data.batch_size=4")
    trained(tmp_path / "run", "data=image_folder", *data, "data.normalise=none", "trainer.max_epochs=1")
    image = load_run(tmp_path / "run").transform(tmp_path / "data/a/0.png")
    assert image.max() - image.min() == pytest.approx(1.0, rel=1e-6)
