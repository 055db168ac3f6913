"""What every package uses: configs, errors, the command line, seeds and durable files. Nothing here imports torch.

A script calls `command_line.launch`. Hydra's composition becomes a checked `Config` of plain values (composition,
schema, rules). The function that the script names gets that `Config`. What it raises becomes an exit code (errors).

    command_line.py   start of every script: arguments, signals, exit codes
    composition.py    Hydra: compose, resolve, check; the config of a run to resume
    hydra_errors.py   Hydra's errors in one line, with hints
    config.py         `Config`, and reading RUN/config.yaml; needs no Hydra
    schema.py         tables of the allowed keys, one per script, and the check that applies them
    rules.py          constructors of the schema's rules: `whole`, `number`, `one_of`, ...
    errors.py         one class per kind of error, each with its exit code
    seeding.py        seeds as a pure function of the run's seed and a purpose
    durable.py        files that are written completely or not at all
    json_lines.py     reading files of one JSON object per line
    processes.py      when and how a process forks, how it ends with its parent, how it ended
    fork_server.py    the only place that forks: a process that forks a child for each job, and why
    server_process.py what runs in that process
"""
