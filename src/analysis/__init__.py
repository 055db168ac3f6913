"""Analysis: tables, metrics and figures of finished runs, data and models. Only scripts import this package.

Each script calls one function with the checked `Config`. The function reads a run folder (`trainer.inference.load_run`)
or builds the objects of a training (`trainer.build`). It then computes, prints tables, and writes JSON, CSV or figures.

    evaluate.py      metrics of a run's model on a split: table and RUN/evaluation-SPLIT.json
    predict.py       class probabilities of image files: CSV
    convert.py       weights of a pickle file as a safetensors file, for init_from
    runs_table.py    all runs under a folder, mean and standard deviation over seeds: table, CSV, learning curves
    check/           checks before the first step: gradients, initial weights, duplicates, classes
    find/            learning-rate range test; throughput over batch size
    report/          report of a run: findings, parts of the error, mistakes, calibration; HTML and JSON
    look.py          input of a training: class counts, augmented images, learning rate; nothing is trained
    findings.py      findings in the terminal, for check/ and report/
    layers.py        layers of a model: shape, parameters, multiply-adds, memory, receptive field
    model_table.py   parameters and multiply-adds of every model config: table, goldens, docs/models.md
    figures.py       figures for the other files, drawn with matplotlib from plain arrays and dicts
"""
