"""Print a table of all models in `configs/model`: input, parameters, and multiply-adds for one image.

    python scripts/zoo.py            prints the table
    python scripts/zoo.py --write    also writes the counts to tests/goldens.json, and the page docs/models.md

A test compares the goldens with the code. The page is generated from the goldens, the configs and the docstrings.

The goldens also contain the settings of each measurement: input (C, H, W), number of classes, and overrides. To change
them, edit tests/goldens.json and run the command with --write. A new model gets the input (3, 32, 32) and 10 classes.
"""

import argparse

import own_packages  # noqa: F401  exits if another folder hides one of our packages

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print a table of all models with their parameters and multiply-adds.")
    parser.add_argument("--write", action="store_true", help="write tests/goldens.json and docs/models.md")
    arguments = parser.parse_args()

    # Imported only here: this imports torch, which takes seconds, and --help must not wait for it.
    from analysis.model_table import show_models, write_models

    entries = show_models()
    if arguments.write:
        write_models(entries)
