"""Print a table of all runs under a folder, and the mean over seeds of runs that differ only in their seed.

    python scripts/runs.py [folder=outputs] [sort=val/accuracy] [output=FILE.csv] [curves=FILE.png]

`output` writes the table as CSV, `curves` writes a figure of the learning curves.
"""

import own_packages  # noqa: F401  exits if another folder hides one of our packages

# isort: split
from core.command_line import launch
from core.options.commands import RunsConfig

if __name__ == "__main__":
    launch("analysis.runs_table.tabulate_runs", config_name="runs", schema=RunsConfig)
