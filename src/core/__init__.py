"""Code that every package uses: configs, errors, the command line, seeds and durable files. Nothing here imports torch.

A script calls `command_line.launch`. `composition` turns the config that Hydra composes into a `Config` of plain
values, checked against the declarations in `options`. `launch` passes this `Config` to the function that the script
names, and turns an exception into an exit code (errors).

    command_line.py   start of every script: signals, exit codes
    arguments.py      the arguments of a command, in the order that Hydra wants
    composition.py    Hydra: compose, resolve, check; explain errors
    options/          every option, declared once; rules, overrides, help
    config.py         `Config`; needs no Hydra
    run_config.py     RUN/config.yaml, read as data and checked
    resume.py         the config of a run to resume, and which changes are allowed
    regular_files.py  files that must be regular ones: no FIFO, device or link
    errors.py         one class per kind of error, each with its exit code
    seeding.py        seeds as a pure function of the run's seed and a purpose
    durable.py        files that are written completely or not at all
    intervals.py      the 95% interval of an accuracy
    json_lines.py     reading files of one JSON object per line
    processes.py      forks: whether one is safe, ending with the parent, exit codes as text
    fork_server.py    the only code that forks: a server process with one child per job, and the reasons for it
    server_process.py the code that runs in the server process
"""
