"""Evaluation of a run's model on a split of its data: metrics as tables in the terminal and as a JSON file."""

import errno
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from core.config import Config
from core.durable import check_output, write_durably, write_output
from core.errors import CheckpointError, ConfigError, DataError, StorageError, printable
from core.options.commands import EvaluateConfig
from core.options.declarations import DataOptions, TrainConfig
from data.loading.loaders import EvalLoader
from data.sources.image_folder import labelled_files
from data.sources.splits import Splits
from trainer.build.data import build_data
from trainer.device import configure_tf32
from trainer.inference.evaluation import measure, predict
from trainer.inference.load_run import LoadedRun, load_run, with_data_root

MAX_CLASSES = 20  # of a confusion matrix in the terminal; a larger matrix is written only to the JSON file


def evaluate_run(config: Config[EvaluateConfig]) -> None:
    """Evaluate the run's model on a split, print the metrics and write them to a JSON file.

    `split=all` evaluates the images of another labelled folder. If the run folder is read-only, a warning is printed
    and no file is written. Raises CheckpointError if the checkpoint is unusable or the data is not that of the run,
    ConfigError if `split=all` lacks its folder, DataError if the data has no such split or the folder is unsuitable,
    and StorageError if writing fails for another reason.
    """
    values = config.values
    folder, split, root = Path(values["run"]), values["split"], values["root"]
    if split == "all" and not root:
        raise ConfigError("split", "evaluates another labelled folder; type it too: root=FOLDER", value=split)
    if values["output"]:
        check_output(Path(values["output"]), key="output")  # before any work
    run = load_run(
        folder,
        checkpoint=values["checkpoint"],
        device=values["device"],
        trust=values["trust"],
        tta=values["tta"],
    )
    configure_tf32(run.config["trainer"]["tf32"], run.device)
    own_tta = run.config["trainer"]["tta"]
    report: dict[str, Any] = {
        "run": str(folder),
        "split": split,
        "step": run.snapshot.step,
        "tta": values["tta"] or own_tta,
    }
    if split == "all" and root:
        report |= {"root": root, **compute_folder(run, Path(root))}
    else:
        report |= compute(run, split, data_config=with_data_root(run, root))
    show(report)
    path = Path(values["output"] or folder / file_name(report, own_tta=own_tta))
    content = (json.dumps(report, indent=2) + "\n").encode()
    try:
        write_output(path, content) if values["output"] else write_durably(path, content)
    except StorageError as error:
        if values["output"] or not is_read_only(error):
            raise
        print(f"warning: {path} was not written: {error.explanation}", file=sys.stderr)
    else:
        print(f"written to {path}")


def file_name(report: dict[str, Any], *, own_tta: str) -> str:
    """Return a file name that differs for another folder or test-time augmentation than those of the run."""
    parts = ["evaluation", report["split"]]
    if "root" in report:
        parts.append(Path(report["root"]).resolve().name[:100])
    if report["tta"] != own_tta:
        parts.append(report["tta"])
    return f"{'-'.join(parts)}.json"


def is_read_only(error: StorageError) -> bool:
    """Return whether a file could not be written for lack of permission or because its file system is read-only."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM)


def compute(run: LoadedRun, split: str, *, data_config: TrainConfig) -> dict[str, Any]:
    """Return the metrics of the run's model on one split: the dict of `trainer.inference.evaluation.measure`.

    Raises DataError if the data has no such split, and CheckpointError if it is not the data of the run.
    """
    images = getattr(read_splits(run, split, data_config), split)
    if images is None:
        raise DataError(f"split={split}", f"the data of this run has no {split} split; choose another split")
    batch_size = data_config["data"]["eval_batch_size"]
    normalisation = run.transform.normalisation.to(run.device)
    loader = EvalLoader(images, batch_size=batch_size, normalisation=normalisation, device=run.device)
    logits, labels = predict(run.model, loader, autocast=run.autocast)
    return measure(logits, labels, run.class_names)


def compute_folder(run: LoadedRun, root: Path) -> dict[str, Any]:
    """Return the metrics of the run's model on all images of a folder with one folder per class.

    The images are decoded as by predict.py. Raises DataError if a folder is not a class of the run or has no images.
    """
    paths, labels = labelled_files(root, run.class_names)
    size = run.config["data"]["eval_batch_size"]

    def batches() -> Iterator[tuple[Tensor, Tensor, None]]:
        for start in range(0, len(paths), size):
            images = [run.transform(path) for path in paths[start : start + size]]
            yield torch.stack(images).to(run.device), labels[start : start + size], None

    logits, labels = predict(run.model, batches(), autocast=run.autocast)
    return measure(logits, labels, run.class_names)


def read_splits(run: LoadedRun, split: str, data_config: TrainConfig) -> Splits:
    """Return the splits of the run's data. Raises CheckpointError if their fingerprint differs from that of the run."""
    # Evaluation needs images of data.image_size, so training images are not read at data.stored_size.
    data = data_config["data"]
    normalisation = run.transform.normalisation
    options: DataOptions = {**data, "stored_size": None} if split == "train" else data
    splits = build_data(options, seed=data_config["seed"], normalisation=normalisation)
    if splits.fingerprint != run.snapshot.values["data"]["fingerprint"]:
        advice = "to evaluate other labelled images: split=all root=FOLDER"
        raise CheckpointError("data", f"differs from the data this run was trained on (fingerprint); {advice}")
    return splits


def read_all_splits(run: LoadedRun, *, data_config: TrainConfig) -> Splits:
    """Return the splits of the run's data, with training images of data.image_size, as `read_splits` does.

    Image files stay files, even if their pixels would fit into memory, so that each image has its path.
    """
    data = data_config["data"]
    if "on_bad_image" in data:  # a data set of image files; others are always in memory
        data = {**data, "memory_budget": 0}
    return read_splits(run, "train", {**data_config, "data": data})


def show(report: dict[str, Any]) -> None:
    """Print the report: a line of metrics, a table of classes and, up to MAX_CLASSES, the confusion matrix."""
    console = Console(highlight=False)
    shown = [name for name in ("accuracy", "top5_accuracy", "macro_f1", "cross_entropy") if name in report]
    metrics = "  ".join(f"{name} {report[name]:.4f}" for name in shown)
    console.print(f"{report['split']}, {report['samples']:,} samples: {metrics}", soft_wrap=True)
    names = list(report["classes"])
    table = Table("class", "precision", "recall", "F1", "samples", title="Classes", title_justify="left")
    for name, row in report["classes"].items():
        scores = (f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))
        table.add_row(Text(printable(name)), *scores, str(row["samples"]))  # Text: brackets in a name are not markup
    console.print(table)
    if len(names) > MAX_CLASSES:
        return
    columns = (str(index) for index in range(len(names)))
    matrix = Table("", *columns, title="Confusion (row: label, column: prediction)")
    matrix.title_justify = "left"
    for index, (name, counts) in enumerate(zip(names, report["confusion_matrix"], strict=True)):
        label = name if re.match(rf"{index}\b", name) else f"{index} {name}"  # MNIST: "0 - zero"
        matrix.add_row(Text(printable(label[:20])), *(str(count) if count else "." for count in counts))
    console.print(matrix)
