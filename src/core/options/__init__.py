"""Options: their declarations, checks, help and override parsing. Only `overrides` imports Hydra.

    declarations.py   the options of a training: type, range, free on resume or not, compared between runs or not
    commands.py       the options of the other commands
    value_types.py    types with ranges, such as Positive and Duration, and marks
    rules.py          checks of single values: `integer`, `number`, `one_of`, ...
    schema.py         the declarations by dotted name, and the check of a whole config
    files.py          the YAML files: which options have a key, the comment of each key
    overrides.py      overrides of the command line: parsed and checked before Hydra composes the config
    help.py           what `--help` prints

To add an option: its line with a comment in configs/, its declaration, and the code that uses it.
"""
