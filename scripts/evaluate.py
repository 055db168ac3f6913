"""Evaluate a run's model on a split of its data. The command needs only the run folder and the data.

    python scripts/evaluate.py run=outputs/RUN [split=test]
    python scripts/evaluate.py run=outputs/RUN split=all root=FOLDER     another labelled folder

It prints accuracy, top-5 accuracy (with more than five classes), macro F1 and cross-entropy, a table of precision,
recall and F1 of each class, and the confusion matrix. It writes them to RUN/evaluation-SPLIT.json.
"""

import own_packages  # noqa: F401  exits if another folder hides one of our packages

# isort: split
from core.command_line import launch
from core.options.commands import EvaluateConfig

if __name__ == "__main__":
    launch("analysis.evaluate.evaluate_run", config_name="evaluate", schema=EvaluateConfig)
