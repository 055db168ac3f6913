"""The YAML files in configs/, read for errors and help: keys of each option, comments of each key."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from core.config import CONFIGS, leaves
from core.errors import ConfigError

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's reads ten times as fast
COMMENT = re.compile(r"^\s*#\s?(.*)$")


def options_of_group(group: str) -> list[str]:
    """Return the options of a group, such as ["lenet", "mlp", ...] of `model`; a base of options is none."""
    return sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))


@cache
def keys_of_options() -> dict[str, list[str]]:
    """Return the options of its group that have a key, as {"model.hidden": ["mlp"]}; a base of options is none."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        group = path.parent.name
        for file in [path, *_bases(path)]:
            for key, _ in leaves(_read(file)):
                options = found.setdefault(f"{group}.{key}", [])
                if not path.stem.startswith("_") and path.stem not in options:
                    options.append(path.stem)
    return found


def options_with(key: str) -> str:
    """Return the options of its group that have a key as a text such as `optimizer=muon, nesterov`; "" if none has."""
    options = keys_of_options().get(key, [])
    names = ", ".join(options[:6]) + (", ..." if len(options) > 6 else "")
    return f"{key.partition('.')[0]}={names}" if options else ""


def first_unreadable_file(folders: list[Path]) -> ConfigError | None:
    """Return the error of the first YAML file in the folders or in configs/ that cannot be read."""
    for folder in (*folders, CONFIGS):
        for path in sorted(folder.rglob("*.yaml")):
            try:
                yaml.load(path.read_text(encoding="utf-8"), Loader)
            except (OSError, UnicodeError, yaml.YAMLError) as error:
                return ConfigError(str(path), f"cannot be read as YAML in UTF-8: {error}")
    return None


def _read(path: Path) -> dict[str, Any]:
    content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    return content if isinstance(content, dict) else {}


def _bases(path: Path) -> list[Path]:
    """Return the files of the same group that a file takes over, nearest first."""
    names = [name for name in _read(path).get("defaults", ()) if isinstance(name, str) and name != "_self_"]
    nearest = [path.parent / f"{name}.yaml" for name in names if (path.parent / f"{name}.yaml").exists()]
    return [file for base in nearest for file in (base, *_bases(base))]


# Comments


def comments_of(path: Path) -> dict[str, str]:
    """Return the comment of each key of a YAML file and its bases, by dotted name.

    It is the comment at the end of the key's line, or else the lines above it. "" is the name of the comment that
    begins the file.
    """
    comments: dict[str, str] = {}
    for file in reversed([path, *_bases(path)]):
        comments |= _comments_in(file.read_text(encoding="utf-8"))
    return comments


def _comments_in(text: str) -> dict[str, str]:
    root, lines = yaml.compose(text, Loader), text.splitlines()
    comments = {"": _block_at(lines, 0)}
    for name, line, column in _places(root, ""):
        match = COMMENT.match(lines[line][column:])
        if comment := match[1] if match else _block_above(lines, line):
            comments[name] = comment
    return comments


def _places(node: Any, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Yield each key with the line and column after which its comment may begin."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        for item in node.value:
            yield from _places(item, prefix)  # the list of defaults: its items are mappings of one key
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        is_block = value.style in ("|", ">") if isinstance(value, yaml.ScalarNode) else not value.flow_style
        end = key.end_mark if is_block else value.end_mark
        yield f"{prefix}{key.value}", end.line, end.column + is_block  # after the colon
        yield from _places(value, f"{prefix}{key.value}.")


def _block_above(lines: list[str], line: int) -> str:
    start = line
    while start and COMMENT.match(lines[start - 1]):
        start -= 1
    return _joined(lines[start:line]) if start else ""  # the comment of the file is no key's


def _block_at(lines: list[str], line: int) -> str:
    end = line
    while end < len(lines) and COMMENT.match(lines[end]):
        end += 1
    return _joined([text for text in lines[line:end] if "@package" not in text])


def _joined(lines: list[str]) -> str:
    return " ".join(match[1].strip() for text in lines if (match := COMMENT.match(text)))
