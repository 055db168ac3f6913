"""Evaluate a run's model on a split of its data; needs nothing but the run folder and the data.

    scripts/evaluate.py run=outputs/RUN [split=test]

Prints accuracy, top-5 accuracy, precision, recall and F1 of each class, and the confusion matrix, and writes them to
RUN/evaluation-SPLIT.json.
"""

from core.command_line import launch
from core.options.declarations import EvaluateConfig

if __name__ == "__main__":
    launch("analysis.evaluate.evaluate_run", config_name="evaluate", schema=EvaluateConfig)
