"""Report on a run: findings with overrides to try, bias and variance, mistakes, slices, calibration.

    python scripts/report.py run=outputs/RUN [report.human_error=0.01]
    python scripts/report.py 'run=[outputs/A,outputs/B]'

It prints the findings, and writes report.html (one file, for a browser) and report.json to the run folder. The command
also works on failed, interrupted and running runs. Several runs are compared, paired over their seeds.
"""

import own_packages  # noqa: F401  exits if another folder hides one of our packages

# isort: split
from core.command_line import launch
from core.options.commands import ReportConfig

if __name__ == "__main__":
    launch("analysis.report.command.write_report", config_name="report", schema=ReportConfig)
