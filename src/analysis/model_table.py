"""The table of all models of `configs/model`: parameters, and multiply-adds for one image.

A multiply-add is one use of one weight, half of what torch's counter counts; biases, norms and activations count as 0.
Nothing is computed: the models are built on torch's `meta` device, which has shapes but no numbers.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core.composition import compose_config
from trainer.build.model import build_model

ROOT = Path(__file__).resolve().parents[2]
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


def build(name: str, entry: Entry) -> nn.Module:
    """Return the model of `configs/model/NAME.yaml` for the entry's input, on torch's current default device."""
    channels, height, _ = entry["input"]
    data = {"num_classes": entry["num_classes"], "channels": channels, "image_size": height}
    overrides = [f"+model={name}", *(f"++data.{key}={value}" for key, value in data.items()), *entry["overrides"]]
    return build_model(compose_config(None, overrides, schema=None).values, init_seed=0)


def measure(name: str, entry: Entry) -> Entry:
    """Return the entry with its class and its counts as they are now."""
    with torch.device("meta"):
        model = build(name, entry).eval()
        image = torch.empty(1, *entry["input"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return {
        "class": type(model).__name__,
        "input": entry["input"],
        "num_classes": entry["num_classes"],
        "overrides": entry["overrides"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
    }


def measure_all(goldens: dict[str, Entry]) -> dict[str, Entry]:
    """Measure every config, sorted by name, at the input that its golden entry gives."""
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    return {name: measure(name, goldens.get(name, NEW_ENTRY)) for name in names}


def page(entries: dict[str, Entry]) -> str:
    """Return docs/models.md: the families by the year of their first paper, and their models, cheaper ones first."""
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
        model = f"[{' '.join([name, *entry['overrides']])}](../configs/model/{name}.yaml)"
        size = " x ".join(str(side) for side in entry["input"])
        cells = [
            *(
                model,
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
    """Return the file of the class that a config names or inherits."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    if target := re.search(r"^_target_: (\S+)\.\w+", text, re.MULTILINE):
        return f"src/{target[1].replace('.', '/')}.py"
    return source_of(re.findall(r"^defaults: \[(\w+)", text, re.MULTILINE)[0])


def paper_of(name: str) -> str | None:
    """Return the paper in parentheses in a config's first line, such as `He et al. 2015, table 1`."""
    first_line = (CONFIGS / f"{name}.yaml").read_text().partition("\n")[0]
    match = re.search(r"\(([^()]* \d{4}[^()]*)\)", first_line)
    return match[1] if match else None


def first_sentence(source: str) -> str:
    """Return the first sentence of a file's docstring, in one line."""
    docstring = ast.get_docstring(ast.parse((ROOT / source).read_text())) or ""
    return " ".join(re.split(r"(?<=\.)\s", docstring, maxsplit=1)[0].split())


def show_models() -> dict[str, Entry]:
    """Measure every model, print the table, return the entries."""
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
    return entries


def write_models(entries: dict[str, Entry]) -> None:
    """Write tests/goldens.json and docs/models.md."""
    lines = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # one line per model, so that a diff names the model
    PAGE.write_text(page(entries))
