"""Lists every model of `configs/model`: its input, its parameters, and the multiply-adds for one image.

    python scripts/zoo.py            the table
    python scripts/zoo.py --write    writes the numbers to tests/goldens.json, which a test compares with the code, and
                                     the page docs/models.md, from those numbers, the configs and the files' docstrings

Each model is measured at its own input (C, H, W), number of classes and overrides, which are kept in the goldens; edit
them there and write again. A config without an entry starts at (3, 32, 32) and 10 classes.

A multiply-add is one use of one weight, half of what torch's counter says; biases, norms and activations are free.
Nothing is computed: the networks live on torch's `meta` device, which has shapes but no numbers.
"""

import argparse
import ast
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "model"
GOLDENS = ROOT / "tests" / "goldens.json"
PAGE = ROOT / "docs" / "models.md"

Entry = dict[str, Any]
NEW_ENTRY: Entry = {"input": [3, 32, 32], "num_classes": 10, "overrides": []}

INTRODUCTION = """\
# The networks

Made by `python scripts/zoo.py --write` from the configs and the code; do not edit it by hand.

Choose a network by the name in the table, as in `python scripts/train.py model=resnet20 data=cifar10`. Channels and
classes follow the data. The numbers are those at the input given:

- **Parameters** are the numbers that training adjusts. Each takes 4 bytes in memory, and training needs three to four
  times that: the gradients, and what the optimizer remembers.
- **Multiply-adds** are the work for one image: one for each use of each weight. Training costs about three times as
  much. A CPU core does tens of billions a second, a large GPU tens of thousands of billions and more.
- **Input** is channels x height x width. Networks made for 224 pixels need images of about 100 or more to be of use:
  they halve the size five times. Those made for 28 or 32 pixels take larger images too, at more work.

On a CPU, begin with `lenet` or `vgg_tiny` for grey images and with `resnet20` for colour. With a GPU and photographs,
begin with `resnet18` or `resnet50`. AlexNet, VGG, NIN and GoogLeNet are here to see what each idea brought.

`model.init` chooses the first weights, which [blocks.py](../src/models/blocks.py) explains; the config behind a name in
the table explains every other key.
"""


def build(name: str, entry: Entry) -> Any:
    """The network of `configs/model/NAME.yaml` for the entry's input, on whatever torch's default device is."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    channels, height, _ = entry["input"]
    data = {"num_classes": entry["num_classes"], "channels": channels, "image_size": height}
    overrides = [f"+model={name}", *(f"++data.{key}={value}" for key, value in data.items()), *entry["overrides"]]
    with initialize_config_dir(str(CONFIGS.parent), version_base="1.3"):
        return instantiate(compose(overrides=overrides).model)


def measure(name: str, entry: Entry) -> Entry:
    """The entry with its class and its counts as they are now."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = build(name, entry).eval()
        image = torch.empty(1, *entry["input"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
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
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    return {name: measure(name, goldens.get(name, NEW_ENTRY)) for name in names}


def page(entries: dict[str, Entry]) -> str:
    """docs/models.md: the families and their networks, oldest paper first, the cheaper of a family's networks first."""
    sources = {name: source_of(name) for name in entries}
    papers = {name: paper_of(name) for name in entries}
    years = {name: re.findall(r"\d{4}", papers[name] or "9999")[0] for name in entries}
    first_years = {
        source: min(years[name] for name in entries if sources[name] == source) for source in sources.values()
    }

    def place(name: str) -> tuple[str, str, int]:
        return first_years[sources[name]], sources[name], entries[name]["multiply_adds"]

    names = sorted(entries, key=place)
    families = [
        f"- {first_sentence(source)} ([{Path(source).name}](../{source}))"
        for source in dict.fromkeys(sources[name] for name in names)
    ]
    rows = [
        "| Network | Paper | Parameters | Multiply-adds | Input | File |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for name in names:
        entry, source = entries[name], sources[name]
        network = f"[{' '.join([name, *entry['overrides']])}](../configs/model/{name}.yaml)"
        size = " x ".join(str(side) for side in entry["input"])
        cells = [
            *(
                network,
                papers[name] or f"that of {entry['class']}",
                f"{entry['parameters']:,}",
                f"{entry['multiply_adds']:,}",
            ),
            *(size, f"[{Path(source).name}](../{source})"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    parts = [INTRODUCTION, "## Families", "\n".join(families), "## Networks", "\n".join(rows)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def source_of(name: str) -> str:
    """The file of the class that a config names or inherits."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    if target := re.search(r"^_target_: (\S+)\.\w+", text, re.MULTILINE):
        return f"src/{target[1].replace('.', '/')}.py"
    return source_of(re.findall(r"^defaults: \[(\w+)", text, re.MULTILINE)[0])


def paper_of(name: str) -> str | None:
    """The paper in parentheses in a config's first line, such as `He et al. 2015, table 1`."""
    first_line = (CONFIGS / f"{name}.yaml").read_text().partition("\n")[0]
    match = re.search(r"\(([^()]* \d{4}[^()]*)\)", first_line)
    return match[1] if match else None


def first_sentence(source: str) -> str:
    """What a file's docstring says first, in one line."""
    docstring = ast.get_docstring(ast.parse((ROOT / source).read_text())) or ""
    return " ".join(re.split(r"(?<=\.)\s", docstring, maxsplit=1)[0].split())


def main() -> None:
    parser = argparse.ArgumentParser(description="Lists every model with its parameters and multiply-adds.")
    parser.add_argument("--write", action="store_true", help="write tests/goldens.json and docs/models.md")
    arguments = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    entries = measure_all(json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {})
    table = Table("model", "input")
    for title in ("classes", "parameters", "multiply-adds"):
        table.add_column(title, justify="right")
    for name, entry in entries.items():
        model = " ".join([name, *entry["overrides"]])
        size = "x".join(str(side) for side in entry["input"])
        counts = (f"{entry[key]:,}" for key in ("num_classes", "parameters", "multiply_adds"))
        table.add_row(model, size, *counts)
    Console().print(table)

    if arguments.write:
        lines = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a model a line, so that diffs name the model
        PAGE.write_text(page(entries))


if __name__ == "__main__":
    main()
