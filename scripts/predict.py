"""Classify a folder of images with a run's network.

    scripts/predict.py run=outputs/RUN input=FOLDER output=FILE.csv

Writes one line an image: file, class, probability, and the probability of each class.
"""

import csv
import io
from pathlib import Path

from core.command_line import launch
from core.config import Config
from core.errors import DataError
from core.schema import PREDICT


def predict(config: Config) -> None:
    """Rebuild the run, decode the images as in training, write the probabilities."""
    import torch

    from data.sources.datasets import pictures_in
    from data.sources.images import SUFFIXES
    from trainer.inference.load_run import load_run
    from trainer.storage.checkpoint import write_durably

    values = config.values
    source, output = Path(values["input"]), Path(values["output"])
    if not source.exists():
        raise DataError(str(source), "no such file or folder (input)")
    paths = pictures_in(source) if source.is_dir() else [source]
    if not paths:
        raise DataError(str(source), f"no images in it; known endings: {', '.join(sorted(SUFFIXES))}")
    run = load_run(values["run"], checkpoint=values["checkpoint"], device=values["device"], trust=values["trust"])
    content = io.StringIO(newline="")  # the file is written at the end, whole
    table = csv.writer(content)
    table.writerow(["file", "class", "probability", *run.class_names])
    with torch.inference_mode():
        for start in range(0, len(paths), values["batch_size"]):
            chunk = paths[start : start + values["batch_size"]]
            images = torch.stack([run.transform(path) for path in chunk])  # (B, C, H, W)
            probabilities = run.probabilities(run.model(images.to(run.device)).float()).cpu()  # (B, K)
            for path, row in zip(chunk, probabilities.tolist(), strict=True):
                name = path.relative_to(source) if source.is_dir() else path.name
                top = max(range(len(row)), key=row.__getitem__)
                table.writerow([name, run.class_names[top], f"{row[top]:.6f}", *(f"{value:.6f}" for value in row)])
    write_durably(output, content.getvalue().encode())
    print(f"{len(paths):,} images -> {output}")


if __name__ == "__main__":
    launch(predict, config_name="predict", rules=PREDICT)
