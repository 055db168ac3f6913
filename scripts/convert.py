"""Convert weights of a pickle file (.pth, .pt) to safetensors, for `init_from`.

    python scripts/convert.py input=FILE.pth output=FILE.safetensors

The file is read in a separate process that accepts tensors only.
"""

import own_packages  # noqa: F401  exits if another folder hides one of our packages

# isort: split
from core.command_line import launch
from core.options.commands import ConvertConfig

if __name__ == "__main__":
    launch("analysis.convert.convert_weights", config_name="convert", schema=ConvertConfig)
