"""Keys and comments in the YAML files of configs/, for error messages and `--help`."""

import contextlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from core.config import CONFIGS, leaves
from core.errors import ConfigError
from core.regular_files import read_regular

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the loader of libyaml is ten times as fast
MAX_BYTES = 2**24  # of a YAML file of the user
MAX_VALUES = 100_000  # in a YAML file of the user, after expansion of its aliases
COMMENT = re.compile(r"^\s*#\s?(.*)$")


def options_of_group(group: str) -> list[str]:
    """Return the options of a group, such as ["lenet", "mlp", ...] of `model`, without base files (`_*.yaml`)."""
    return sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))


@cache
def keys_of_options() -> dict[str, list[str]]:
    """Return for each key the options that have it, such as {"model.hidden": ["mlp"]}."""
    options_by_key: dict[str, list[str]] = {}
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        group = path.parent.name
        for file in [path, *_bases(path)]:
            for key, _ in leaves(_read(file)):
                options = options_by_key.setdefault(f"{group}.{key}", [])
                if not path.stem.startswith("_") and path.stem not in options:
                    options.append(path.stem)
    return options_by_key


def options_with(key: str) -> str:
    """Return the options that have a key, as text such as `optimizer=muon, nesterov`; "" if no option has it."""
    options = keys_of_options().get(key, [])
    names = ", ".join(options[:6]) + (", ..." if len(options) > 6 else "")
    return f"{key.partition('.')[0]}={names}" if options else ""


def check_yaml_files(folders: list[Path]) -> None:
    """Raise ConfigError for a YAML file in the folders whose aliases expand to more than MAX_VALUES values.

    With aliases and merge keys, two kilobytes can expand to 2^1000 values. The expanded size is computed from the
    events of the parser, without constructing a value. Files that are not YAML are reported when they are used.
    """
    for folder in folders:
        for path in folder.rglob("*.yaml"):
            with contextlib.suppress(OSError, yaml.YAMLError, ValueError):
                if _expanded_size(read_regular(path, limit=MAX_BYTES)) > MAX_VALUES:
                    raise ConfigError(str(path), f"its aliases (*name) expand to more than {MAX_VALUES:,} values")


def _expanded_size(content: bytes) -> int:
    """Return how many values a YAML document contains when each alias is replaced by what it refers to."""
    sizes: dict[str, int] = {}  # by anchor
    stack: list[tuple[str | None, int]] = [(None, 0)]  # anchor and size of each open collection
    for event in yaml.parse(content, Loader):
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            stack.append((event.anchor, 1))
            continue
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            anchor, size = stack.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(event.anchor or "", 1)
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        stack[-1] = (stack[-1][0], stack[-1][1] + size)
    return stack[0][1]


def first_unreadable_file(folders: list[Path]) -> ConfigError | None:
    """Return the error of the first unreadable YAML file in the folders or in configs/; None if all are readable."""
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
    """Return the files of the same group that a file lists in its `defaults`, nearest first."""
    names = [
        name
        for name in _read(path).get("defaults", ())
        if isinstance(name, str) and name != "_self_" and "@" not in name
    ]
    nearest = [path.parent / f"{name}.yaml" for name in names if (path.parent / f"{name}.yaml").exists()]
    return [file for base in nearest for file in (base, *_bases(base))]


# Comments


def comments_of(path: Path) -> dict[str, str]:
    """Return the comment of each key of a YAML file and its bases, by dotted name.

    A key's comment is at the end of its line, or in the lines above it. The key "" holds the comment at the start of
    the file.
    """
    comments: dict[str, str] = {}
    for file in reversed([path, *_bases(path)]):
        comments |= _comments_in(file.read_text(encoding="utf-8"))
    return comments


def _comments_in(text: str) -> dict[str, str]:
    root, lines = yaml.compose(text, Loader), text.splitlines()
    comments = {"": _block_at(lines, 0)}
    for name, line, column in _key_positions(root, ""):
        match = COMMENT.match(lines[line][column:])
        if comment := match[1] if match else _block_above(lines, line):
            comments[name] = comment
    return comments


def _key_positions(node: Any, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Yield each key with the line and column after which its comment can start."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        for item in node.value:
            yield from _key_positions(item, prefix)  # the list `defaults`: each item is a mapping with one key
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        is_block = value.style in ("|", ">") if isinstance(value, yaml.ScalarNode) else not value.flow_style
        end = key.end_mark if is_block else value.end_mark
        yield f"{prefix}{key.value}", end.line, end.column + is_block  # after the colon
        yield from _key_positions(value, f"{prefix}{key.value}.")


def _block_above(lines: list[str], line: int) -> str:
    start = line
    while start and COMMENT.match(lines[start - 1]):
        start -= 1
    return _joined(lines[start:line]) if start else ""  # the comment at the start of the file belongs to no key


def _block_at(lines: list[str], line: int) -> str:
    end = line
    while end < len(lines) and COMMENT.match(lines[end]):
        end += 1
    return _joined([text for text in lines[line:end] if "@package" not in text])


def _joined(lines: list[str]) -> str:
    return " ".join(match[1].strip() for text in lines if (match := COMMENT.match(text)))
