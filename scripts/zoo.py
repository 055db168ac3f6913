"""List every model of `configs/model`: its input, its parameters, and the multiply-adds for one image.

    python scripts/zoo.py            prints the table
    python scripts/zoo.py --write    also writes the numbers to tests/goldens.json, which a test compares with the code,
                                     and the page docs/models.md, from those numbers, the configs and the docstrings

Each model is measured at its own input (C, H, W), number of classes and overrides, which are kept in the goldens; edit
them there and write again. A config without an entry starts at (3, 32, 32) and 10 classes.
"""

import argparse

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lists every model with its parameters and multiply-adds.")
    parser.add_argument("--write", action="store_true", help="write tests/goldens.json and docs/models.md")
    arguments = parser.parse_args()

    from analysis.model_table import show_models, write_models  # torch is imported here, after the help

    entries = show_models()
    if arguments.write:
        write_models(entries)
