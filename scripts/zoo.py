"""Lists every model of `configs/model`: its class, its parameters, and the multiply-adds for one image.

    python scripts/zoo.py            the table
    python scripts/zoo.py --write    writes the numbers to tests/goldens.json, which a test compares with the code

Each model is measured at its own input (C, H, W), number of classes and overrides, which are kept in the goldens; edit
them there and write again. A config without an entry starts at (3, 32, 32) and 10 classes.

A multiply-add is one use of one weight, half of what torch's counter says; biases, norms and activations are free.
Nothing is computed: the networks live on torch's `meta` device, which has shapes but no numbers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens.json"

Entry = dict[str, Any]
NEW_ENTRY: Entry = {"input": [3, 32, 32], "num_classes": 10, "overrides": []}


def build(name: str, entry: Entry) -> Any:
    """The network of `configs/model/NAME.yaml` for the entry's input, on whatever torch's default device is."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    channels, height, _ = entry["input"]
    data = {"num_classes": entry["num_classes"], "channels": channels, "image_size": height}
    overrides = [f"+model={name}", *(f"++data.{key}={value}" for key, value in data.items()), *entry["overrides"]]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return instantiate(compose(overrides=overrides).model)


def measure(name: str, entry: Entry) -> Entry:
    """The entry with its class and its counts as they are now."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = build(name, entry).eval()
        network(torch.empty(1, *entry["input"]))
    return {
        "class": type(network).__name__,
        "input": entry["input"],
        "num_classes": entry["num_classes"],
        "overrides": entry["overrides"],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
    }


def measure_all(goldens: dict[str, Entry]) -> dict[str, Entry]:
    """Every config, sorted by name, measured at the input that its golden entry gives."""
    names = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
    return {name: measure(name, goldens.get(name, NEW_ENTRY)) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description="Lists every model with its parameters and multiply-adds.")
    parser.add_argument("--write", action="store_true", help="write the numbers to tests/goldens.json")
    arguments = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    entries = measure_all(json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {})
    table = Table("model", "class", "input")
    for title in ("classes", "parameters", "multiply-adds"):
        table.add_column(title, justify="right")
    for name, entry in entries.items():
        model = " ".join([name, *entry["overrides"]])
        size = "x".join(str(side) for side in entry["input"])
        counts = (f"{entry[key]:,}" for key in ("num_classes", "parameters", "multiply_adds"))
        table.add_row(model, entry["class"], size, *counts)
    Console().print(table)

    if arguments.write:
        lines = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a model a line, so that diffs name the model


if __name__ == "__main__":
    main()
