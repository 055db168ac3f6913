"""Text of `--help`: the template of the script's config, the options of each group, and every key with its comment.

The comments come from the YAML files, so each option is explained in one place. Hydra's built-in help prints no
comments and takes 1.5 times as long, because it searches all groups once per group.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml

from core.config import CONFIGS
from core.options.files import comments_of
from core.options.schema import Schema, names_of

WIDTH, COLUMN = 120, 44  # length of a line; column at which comments start


def help_text(
    template: str,
    composed: Mapping[str, Any],
    *,
    schema: Schema,
    choices: Mapping[str, Any],
    config_name: str,
    folders: Sequence[Path],
) -> str:
    """Return the help text.

    `composed` is the config without Hydra's section, and `choices` holds the chosen option of each group. `folders` are
    all folders with options; folders of the user come first.
    """
    comments = _comments(choices, config_name, folders)
    for name in names_of(schema, free_on_resume=True):
        comments[name] = f"{comments.get(name, '')} (free on resume)".strip()
    shown = "\n".join(_lines(composed, comments))
    return Template(template).safe_substitute(APP_CONFIG_GROUPS="\n".join(_groups(folders)), CONFIG=shown)


def _groups(folders: Sequence[Path]) -> Iterator[str]:
    """Yield lines with the name and the options of each group."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.glob("**/[!_]*.yaml"):
            groups.setdefault(path.parent.relative_to(folder).as_posix(), set()).add(path.stem)
    for group in sorted(groups):
        if group != "." and not group.startswith("hydra/"):
            options = f"{group}: {', '.join(sorted(groups[group]))}"
            yield from textwrap.wrap(options, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _comments(choices: Mapping[str, Any], config_name: str, folders: Sequence[Path]) -> dict[str, str]:
    """Return the comment of each key of a composed config, by dotted name."""
    comments: dict[str, str] = {}
    with_training = ("sweep", "find", "look", "check")  # their configs include train.yaml
    for name in ("train", config_name) if config_name in with_training else (config_name,):
        top_level = comments_of(CONFIGS / f"{name}.yaml")
        groups = {key.removeprefix("defaults."): text for key, text in top_level.items() if key.startswith("defaults.")}
        comments |= groups | {key: text for key, text in top_level.items() if key and not key.startswith("defaults.")}
    for group, option in choices.items():
        for name in option if isinstance(option, list) else [option]:
            files = (folder / group / f"{name}.yaml" for folder in folders)
            if name is not None and (path := next((file for file in files if file.exists()), None)):
                keys = comments_of(path)
                is_global = "package _global_" in path.read_text(encoding="utf-8").partition("\n")[0]
                prefix = "" if is_global else f"{group}."
                comments |= {f"{prefix}{key}": text for key, text in keys.items() if key and not key.startswith("def")}
    return comments


def _lines(section: Mapping[str, Any], comments: Mapping[str, str], parent: str = "") -> Iterator[str]:
    """Yield one line per key of a section, with its value and, at a fixed column, its comment."""
    indent = "  " * parent.count(".")
    for key, value in section.items():
        is_section = isinstance(value, Mapping) and value
        line = f"{indent}{key}:" if is_section else f"{indent}{key}: {_spelled(value)}"
        yield from _commented(line, comments.get(f"{parent}{key}", ""))
        if is_section:
            yield from _lines(value, comments, f"{parent}{key}.")


def _spelled(value: Any) -> str:
    if isinstance(value, str) and "${" in value:
        return value
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000)).removesuffix("...\n").strip()


def _commented(line: str, comment: str) -> Iterator[str]:
    if not comment:
        yield line
        return
    if len(line) + 2 > COLUMN:
        yield line
        line = ""
    first, *others = textwrap.wrap(comment, WIDTH - COLUMN - 2, break_on_hyphens=False)
    yield f"{line:<{COLUMN}}# {first}"
    yield from (f"{'':<{COLUMN}}# {text}" for text in others)
