"""Print the table of all runs under a folder, and the mean over seeds of runs that differ in nothing else.

python scripts/runs.py [folder=outputs] [sort=test/accuracy] [output=FILE.csv] [curves=FILE.png]
"""

from core.command_line import launch
from core.options.declarations import RunsConfig

if __name__ == "__main__":
    launch("analysis.runs_table.tabulate_runs", config_name="runs", schema=RunsConfig)
