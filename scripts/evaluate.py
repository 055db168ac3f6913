"""Measure a run's network on a part of its data; needs nothing but the run folder and the data.

    scripts/evaluate.py run=outputs/RUN [split=test]

Prints accuracy, top-5 accuracy, precision, recall and F1 of each class, and the confusion matrix, and writes them to
RUN/evaluation-SPLIT.json.
"""

import json
from pathlib import Path
from typing import Any

from core.command_line import launch
from core.config import Config
from core.errors import DataError
from core.schema import EVALUATE


def evaluate(config: Config) -> None:
    """Rebuild the run, predict the split, measure, print and write."""
    from data.loading.loaders import EvalLoader
    from trainer.build.training import build_data
    from trainer.inference.evaluation import measure, predict
    from trainer.inference.load_run import load_run, with_data_root
    from trainer.storage.checkpoint import write_durably

    values = config.values
    folder, split = Path(values["run"]), values["split"]
    run = load_run(folder, checkpoint=values["checkpoint"], device=values["device"], trust=values["trust"])
    run_config = with_data_root(run, values["root"])
    # Nothing is fitted again: the run has its normalisation with it. Training pictures are seen as all others are.
    changed = {"normalise": "none"} | ({"stored_size": None} if split == "train" else {})
    splits = build_data({**run_config["data"], **changed}, seed=run_config["seed"])
    if splits.fingerprint != run.snapshot.values["data"]["fingerprint"]:
        raise DataError("data", "differs from the data this run was trained on (fingerprint)")
    images = getattr(splits, split)
    if images is None:
        raise DataError(f"split={split}", "this run's data has no such part")
    batch_size = run_config["data"]["eval_batch_size"]
    normalisation = run.transform.normalisation.to(run.device)
    loader = EvalLoader(images, batch_size=batch_size, normalisation=normalisation, device=run.device)
    logits, labels = predict(run.model, loader)
    report = {"run": str(folder), "split": split, "step": run.snapshot.step}
    report |= measure(logits, labels, run.class_names)
    show(report)
    path = folder / f"evaluation-{split}.json"
    write_durably(path, (json.dumps(report, indent=2) + "\n").encode())
    print(f"written to {path}")


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    figures = "  ".join(
        f"{name} {report[name]:.4f}" for name in ("accuracy", "top5_accuracy", "macro_f1", "cross_entropy")
    )
    console.print(f"{report['split']}, {report['samples']:,} samples: {figures}", soft_wrap=True)
    names = list(report["classes"])
    table = Table("class", "precision", "recall", "F1", "samples", title="Classes", title_justify="left")
    for name, row in report["classes"].items():
        table.add_row(name, *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1")), str(row["samples"]))
    console.print(table)
    if len(names) > 20:
        return  # a matrix of hundreds of columns is for the JSON
    columns = (str(index) for index in range(len(names)))
    matrix = Table("", *columns, title="Confusion (row: label, column: prediction)")
    matrix.title_justify = "left"
    for index, (name, counts) in enumerate(zip(names, report["confusion_matrix"], strict=True)):
        label = name if name == str(index) else f"{index} {name}"
        matrix.add_row(label[:20], *(str(count) if count else "." for count in counts))
    console.print(matrix)


if __name__ == "__main__":
    launch(evaluate, config_name="evaluate", rules=EVALUATE)
