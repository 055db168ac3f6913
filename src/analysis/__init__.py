"""Tables, metrics and figures of finished runs, data and models. Only scripts import this package.

A script's function gets the checked `Config`, reads a run folder (`trainer.inference.load_run`) or builds the objects
of a training (`trainer.build`), computes, prints tables, and writes JSON, CSV or figures.

    evaluate.py      metrics of a run's model on a split: table and RUN/evaluation-SPLIT.json
    predict.py       class probabilities of image files: CSV
    runs_table.py    all runs under a folder, mean and standard deviation over seeds: table, CSV, learning curves
    look.py          what a training would see: class counts, augmented images, learning rate
    model_table.py   parameters and multiply-adds of every model config: table, goldens, docs/models.md
    figures.py       the figures that the others write, drawn with matplotlib from plain numbers
"""
