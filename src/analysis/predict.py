"""Class probabilities of a run's model for image files, written as CSV."""

import csv
import io
import sys
from pathlib import Path

import torch
from torch import Tensor

from core.config import Config
from core.durable import check_output, write_output
from core.errors import DataError, printable
from core.options.commands import PredictConfig
from data.sources.decode import BadImage
from data.sources.listing import SUFFIXES, Skipped, image_files
from trainer.device import configure_tf32
from trainer.inference.load_run import LoadedRun, load_run


def predict_images(config: Config[PredictConfig]) -> None:
    """Classify image files with a run's model, and write one CSV line per image: file, class and probabilities.

    The images are decoded as in training. With `on_bad_image=skip`, a file without a usable image is reported on stderr
    and gets no line. Raises DataError if there are no images or one is bad, StorageError if the CSV file cannot be
    written, and CheckpointError if the run cannot be loaded.
    """
    values = config.values
    source, output = Path(values["input"]), Path(values["output"])
    paths = image_paths(source)
    check_output(output, key="output")  # before any work
    run = load_run(values["run"], checkpoint=values["checkpoint"], device=values["device"], trust=values["trust"])
    configure_tf32(run.config["trainer"]["tf32"], run.device)
    content = io.StringIO(newline="")  # written to disk at the end: an error leaves no partial file
    table = csv.writer(content)
    table.writerow(["file", "class", "probability", *run.class_names])
    written = 0
    for start in range(0, len(paths), values["batch_size"]):
        batch, images = read_images(run, paths[start : start + values["batch_size"]], values["on_bad_image"])
        rows = probabilities(run, torch.stack(images)).tolist() if images else []
        for path, row in zip(batch, rows, strict=True):
            name = path.relative_to(source) if source.is_dir() else path.name
            top = max(range(len(row)), key=row.__getitem__)
            table.writerow([name, run.class_names[top], f"{row[top]:.6f}", *(f"{value:.6f}" for value in row)])
        written += len(batch)
    if not written:
        raise DataError(str(source), f"none of its {len(paths):,} files contains a usable image (input)")
    write_output(output, content.getvalue().encode(errors="surrogateescape"))
    skipped = f", {len(paths) - written:,} bad files skipped" if written < len(paths) else ""
    print(f"{written:,} images -> {output}{skipped}")


def read_images(run: LoadedRun, paths: list[Path], on_bad_image: str) -> tuple[list[Path], list[Tensor]]:
    """Return the files that contain a usable image, and their model inputs (C, H, W).

    With `on_bad_image="skip"`, the other files are reported on stderr. Raises BadImage without it, and DataError if a
    file cannot be read, which may be a failure of the drive.
    """
    usable, images = [], []
    for path in paths:
        try:
            images.append(run.transform(path))
            usable.append(path)
        except BadImage as error:
            if on_bad_image == "error":
                advice = f"{error.explanation}; to leave such files out: on_bad_image=skip"
                raise BadImage(error.subject, advice) from error
            print(printable(f"warning: {path}: {error.explanation}; skipped"), file=sys.stderr)
    return usable, images


def image_paths(source: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders; for a file, return only that file.

    A summary of skipped files is printed to stderr. Raises DataError if there are no images.
    """
    if not source.exists():
        raise DataError(str(source), "no such file or folder (input)")
    if not source.is_dir() and not source.is_file():
        raise DataError(str(source), "is neither a folder nor a regular file (input)")
    skipped = Skipped()
    paths = image_files(source, skipped) if source.is_dir() else [source]
    if skipped.counts:
        print(f"{source}: {skipped}", file=sys.stderr)
    if not paths:
        raise DataError(
            str(source), f"contains no images (input); supported file extensions: {', '.join(sorted(SUFFIXES))}"
        )
    return paths


def probabilities(run: LoadedRun, images: Tensor) -> Tensor:
    """Return the class probabilities (B, K), on the CPU, of model inputs (B, C, H, W)."""
    with torch.inference_mode():
        with run.autocast:
            logits = run.model(images.to(run.device)).float()
        return run.probabilities(logits).cpu()
