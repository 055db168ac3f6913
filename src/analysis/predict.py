"""Class probabilities of a run's model for image files, written as CSV."""

import csv
import io
import sys
from pathlib import Path

import torch
from torch import Tensor

from core.config import Config
from core.durable import write_output
from core.errors import DataError
from core.options.commands import PredictConfig
from data.sources.listing import SUFFIXES, Skipped, image_files
from trainer.device import configure_tf32
from trainer.inference.load_run import LoadedRun, load_run


def predict_images(config: Config[PredictConfig]) -> None:
    """Classify image files with a run's model, and write one CSV line per image: file, class and probabilities.

    The images are decoded as in training. Raises DataError if there are no images or one is unreadable, and
    CheckpointError if the run cannot be loaded.
    """
    values = config.values
    source, output = Path(values["input"]), Path(values["output"])
    paths = image_paths(source)
    run = load_run(values["run"], checkpoint=values["checkpoint"], device=values["device"], trust=values["trust"])
    configure_tf32(run.config["trainer"]["tf32"], run.device)
    content = io.StringIO(newline="")  # written to disk at the end: an error leaves no partial file
    table = csv.writer(content)
    table.writerow(["file", "class", "probability", *run.class_names])
    for start in range(0, len(paths), values["batch_size"]):
        batch = paths[start : start + values["batch_size"]]
        for path, row in zip(batch, probabilities(run, batch).tolist(), strict=True):
            name = path.relative_to(source) if source.is_dir() else path.name
            top = max(range(len(row)), key=row.__getitem__)
            table.writerow([name, run.class_names[top], f"{row[top]:.6f}", *(f"{value:.6f}" for value in row)])
    write_output(output, content.getvalue().encode(errors="surrogateescape"))
    print(f"{len(paths):,} images -> {output}")


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


def probabilities(run: LoadedRun, paths: list[Path]) -> Tensor:
    """Return the class probabilities of B image files: (B, K), on the CPU."""
    with torch.inference_mode():
        images = torch.stack([run.transform(path) for path in paths])  # (B, C, H, W)
        with run.autocast:
            logits = run.model(images.to(run.device)).float()
        return run.probabilities(logits).cpu()
