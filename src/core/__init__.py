"""What every package uses: configs, errors, the command line, seeds and durable files. Nothing here imports torch.

A script calls `command_line.launch`. Hydra's composition becomes a checked `Config` of plain values (composition), as
the declarations of the options require (options). The function that the script names gets that `Config`. What it raises
becomes an exit code (errors).

    command_line.py   start of every script: signals, exit codes
    arguments.py      the arguments of a command, in the order that Hydra wants
    composition.py    Hydra: compose, resolve, check; explain what fails
    options/          every option, declared once; rules, overrides, help
    config.py         `Config`; needs no Hydra
    run_config.py     RUN/config.yaml, read as data and checked
    resume.py         the config of a run to resume, and which changes are allowed
    errors.py         one class per kind of error, each with its exit code
    seeding.py        seeds as a pure function of the run's seed and a purpose
    durable.py        files that are written completely or not at all
    json_lines.py     reading files of one JSON object per line
    processes.py      when and how a process forks, how it ends with its parent, how it ended
    fork_server.py    the only place that forks: a process that forks a child for each job, and why
    server_process.py what runs in that process
"""
