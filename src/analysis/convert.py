"""Convert a pickle file with weights (.pth, .pt) to a safetensors file, which `init_from` accepts."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from core.config import Config
from core.durable import write_output
from core.errors import CheckpointError, DataError
from core.options.commands import ConvertConfig
from core.regular_files import read_regular
from trainer.storage import read_pickle
from trainer.storage.checkpoint import load_weights_file


def convert_weights(config: Config[ConvertConfig]) -> None:
    """Read the tensors of `input` in a separate process, check them, and write them to `output`.

    Raises DataError if the input does not exist, and CheckpointError if it holds anything but tensors.
    """
    source, output = Path(config.values["input"]), Path(config.values["output"])
    if not source.is_file():
        raise DataError(str(source), "no such file (input)")
    if output.suffix != ".safetensors":
        raise CheckpointError(str(output), "must end in .safetensors (output)")
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "weights.safetensors"
        # -P: the working directory is not searched for modules.
        command = [sys.executable, "-P", str(read_pickle.__file__), str(source), str(converted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        report = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"error": "the reading process ended"}
        if error := report.get("error"):
            raise CheckpointError(str(source), f"cannot be converted: {error}")
        load_weights_file(converted)  # checks it as init_from does
        write_output(output, read_regular(converted))
    where = f" of its key {report['from']!r}" if report["from"] else ""
    print(f"{report['tensors']:,} tensors{where} -> {output}")
    if skipped := report["skipped"]:
        print(f"not tensors, so not converted: {', '.join(skipped[:8])}{', ...' if len(skipped) > 8 else ''}")
    print(f"next        python scripts/train.py init_from={output} model=...")
