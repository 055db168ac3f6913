"""The architecture's rules, checked by reading the source: imports, sizes, maps of packages, assignments, configs.

CONTRIBUTING.md has the rules as text. The last test runs a script, to count the frames of a command.
"""

import ast
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from trainer.loop import Loop

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
SOURCES = sorted(SRC.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
BENCH = sorted((ROOT / "bench").glob("*.py"))
FOLDERS = sorted(path.parent for path in SRC.rglob("__init__.py"))
PACKAGES = {path.name for path in FOLDERS if path.parent == SRC}
MODULES = {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in SOURCES if path.stem != "__init__"}

# The packages that a package's files may import. `trainer.build` and those below tie the packages together.
ALLOWED = {
    "own_packages.py": set(),
    "core": {"core"},
    "diagnosis": {"core", "diagnosis"},
    "models": {"core", "models"},
    "data": {"core", "data"},
    "trainer": {"core", "diagnosis", "trainer"},
    "sweeps": {"core", "diagnosis", "sweeps", "trainer"},
    "analysis": {"core", "analysis", "diagnosis", "trainer", "data"},
}
MAY_IMPORT_DATA = ("trainer/build/", "trainer/inference/", "trainer/run.py")
LOADERS = (
    *("data.loading.loaders", "data.loading.pixel_sources", "data.loading.prefetch", "data.loading.workers"),
    "data.augment",
)
MAY_IMPORT_HYDRA = ("core/command_line.py", "core/composition.py", "core/options/overrides.py")
SCRIPTS_CALL = ("core", "analysis", "sweeps", "trainer.run")

MOST_LINES, MOST_LINES_OF_SCRIPT, MOST_LINES_OF_FUNCTION = 300, 40, 60
MOST_FILES, MOST_MODELS = 15, 20
SHARED_ATTRIBUTES = {"bias", "state"}  # attributes of torch's modules and Optuna's tables that a built-in class has too


def relative_path(path: Path) -> str:
    """Return a file's path relative to `src`, or to the repository for scripts and benchmarks."""
    return path.relative_to(SRC if path.is_relative_to(SRC) else ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported_modules(tree: ast.AST) -> set[str]:
    """Return all modules imported below a node, including in functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {module_of(node.module or "", alias.name) for alias in node.names}
    return names


def module_of(module: str, name: str) -> str:
    """Return the module that `from module import name` imports: `module.name` if it exists, else `module`."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def for_each(paths: list[Path]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("path", paths, ids=relative_path)


# Imports


@for_each(SOURCES)
def test_packages_import_only_allowed_packages(path):
    file, modules = relative_path(path), imported_modules(tree_of(path))
    allowed = set(ALLOWED[file.partition("/")[0]])
    if file.startswith(MAY_IMPORT_DATA):
        allowed.add("data")
    assert {module.partition(".")[0] for module in modules} & (PACKAGES | {"scripts", "bench"}) <= allowed
    if file.startswith("trainer/") and not file.startswith("trainer/build/"):
        assert not [module for module in modules if is_in(module, *LOADERS)]
    if file == "trainer/loop.py":
        assert not [module for module in modules if is_in(module, "trainer.build", "trainer.storage", "trainer.run")]


@for_each(SOURCES + SCRIPTS + BENCH)
def test_hydra_is_imported_only_by_the_files_that_compose_configs(path):
    if not relative_path(path).startswith(MAY_IMPORT_HYDRA):
        assert not [module for module in imported_modules(tree_of(path)) if is_in(module, "hydra", "omegaconf")]


@for_each(list(MODULES.values()))
def test_there_is_no_import_cycle(path):
    """No module imports itself through other modules; the shortest cycle is reported."""
    (start,) = (name for name, file in MODULES.items() if file == path)
    chains, reached = [[start]], {start}
    for chain in chains:  # the list grows in the loop: breadth-first search
        for module in sorted(imported_modules(tree_of(MODULES[chain[-1]])) & set(MODULES)):
            assert module != start, f"import cycle: {' -> '.join([*chain, start])}"
            if module not in reached:
                reached.add(module)
                chains.append([*chain, module])


@for_each([path for path in SOURCES if relative_path(path).startswith(("core/", "diagnosis/"))])
def test_core_and_diagnosis_do_not_import_torch(path):
    assert not {module.partition(".")[0] for module in imported_modules(tree_of(path))} & {
        *("torch", "torchvision", "numpy", "sklearn", "rich", "matplotlib", "tensorboard"),
    }


@for_each(SCRIPTS + BENCH)
def test_scripts_import_only_core_at_module_level(path):
    """Importing torch takes seconds; help and command-line errors must be printed before."""
    allowed = {
        "core",
        "own_packages",
        *sys.stdlib_module_names,
        *(sibling.stem for sibling in path.parent.glob("*.py")),
    }
    top = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {module.partition(".")[0] for node in top for module in imported_modules(node)} <= allowed


@for_each(SCRIPTS)
def test_scripts_call_only_core_analysis_sweeps_and_trainer_run(path):
    modules = [module for module in imported_modules(tree_of(path)) if module.partition(".")[0] in PACKAGES]
    for call in ast.walk(tree_of(path)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "launch":
            module, _, name = ast.literal_eval(call.args[0]).rpartition(".")
            assert name in {node.name for node in tree_of(MODULES[module]).body if isinstance(node, ast.FunctionDef)}
            modules.append(module)
    assert modules and all(is_in(module, *SCRIPTS_CALL) for module in modules), modules


# Sizes


@for_each(SOURCES + SCRIPTS + BENCH)
def test_files_and_functions_are_short(path):
    limit = MOST_LINES_OF_SCRIPT if path in SCRIPTS else MOST_LINES
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{lines} lines; at most {limit}"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MOST_LINES_OF_FUNCTION, f"{node.name}: {lines} lines; at most {MOST_LINES_OF_FUNCTION}"


@for_each(FOLDERS)
def test_folders_are_small(path):
    files = [file.name for file in path.glob("*.py") if file.name != "__init__.py"]
    assert len(files) <= (MOST_MODELS if path.name == "models" else MOST_FILES), files


# Packages


@for_each(FOLDERS)
def test_package_init_names_its_files_and_imports_nothing(path):
    """The docstring names every file and folder of the package, and only files that exist."""
    tree = tree_of(path / "__init__.py")
    assert [type(node) for node in tree.body] in ([], [ast.Expr])
    text = ast.get_docstring(tree) or ""
    files = {file.name for file in path.glob("*.py")} - {"__init__.py"}
    named_files = set(re.findall(r"\b\w+\.py\b", text))
    assert files <= named_files, f"not in the docstring: {sorted(files - named_files)}"
    assert named_files <= {file.name for file in path.rglob("*.py")}, "names files that do not exist"
    folders = {folder.name for folder in FOLDERS if folder.parent == path}
    assert folders <= set(re.findall(r"\b(\w+)/", text)), f"the docstring must name each of {sorted(folders)} as NAME/"


def test_no_file_shadows_a_module():
    module_names = set(sys.stdlib_module_names) | PACKAGES
    for folder in ("scripts", "bench", "tests"):
        assert not {path.stem for path in (ROOT / folder).glob("*.py")} & module_names
    assert not [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name in PACKAGES]


# Objects


def assigned_attributes(node: ast.AST) -> Iterator[ast.Attribute]:
    """Yield the attributes that a statement assigns or deletes, also within tuples."""
    if isinstance(node, ast.Assign | ast.Delete):
        pending = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.AsyncFor | ast.NamedExpr):
        pending = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        pending = [node.optional_vars]
    else:
        return
    while pending:
        target = pending.pop()
        if isinstance(target, ast.Tuple | ast.List):
            pending += target.elts
        elif isinstance(target, ast.Starred):
            pending.append(target.value)
        elif isinstance(target, ast.Attribute):
            yield target


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_assignments(path: Path) -> list[tuple[str, int]]:
    """Return name and line of each attribute assigned to an object other than `self`, including by setattr."""
    assignments = []
    for node in ast.walk(tree_of(path)):
        assignments += [
            (target.attr, target.lineno) for target in assigned_attributes(node) if not is_self(target.value)
        ]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr", "object.__setattr__"):
            owner, name = node.args[:2]
            if not is_self(owner) and isinstance(name, ast.Constant):
                assignments.append((str(name.value), node.lineno))
    return assignments


@cache
def defined_attributes(path: Path) -> dict[str, str]:
    """Return {attribute: class} of a file: fields, `self.x = ...`, parameters and buffers."""
    attributes = {}
    for owner in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)):
        if path.parent.name == "options":  # its fields declare config keys
            continue
        for node in owner.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                names = node.targets if isinstance(node, ast.Assign) else [node.target]
                attributes |= {name.id: owner.name for name in names if isinstance(name, ast.Name)}
        for node in ast.walk(owner):
            attributes |= {target.attr: owner.name for target in assigned_attributes(node) if is_self(target.value)}
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "self.register_buffer",
                "self.register_parameter",
                "self.add_module",
            ):
                attributes |= {name.value: owner.name for name in node.args[:1] if isinstance(name, ast.Constant)}
    return attributes


@for_each(SOURCES)
def test_attributes_are_assigned_only_in_the_file_of_their_class(path):
    """Only a class changes its state; code in other files calls a method."""
    owners: dict[str, list[str]] = {}
    for other in SOURCES:
        if other != path:
            for name, owner in defined_attributes(other).items():
                owners.setdefault(name, []).append(f"{owner} ({relative_path(other)})")
    names = [
        (name, line) for name, line in foreign_assignments(path) if name in owners and name not in SHARED_ATTRIBUTES
    ]
    violations = [f"line {line}: {name} of {owners[name]}" for name, line in names]
    assert not violations, "; ".join(violations)


# Configs


def test_every_yaml_key_has_a_comment():
    """The comment is beside the key or in the line above; Hydra's section and lists of defaults need none."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), f"{path.name} does not start with a comment"
        for number, line in enumerate(lines):
            if line.startswith("hydra:"):
                break
            key = line.split(":")[0].strip()
            is_key = ":" in line and key.replace("_", "").isalnum() and not line.lstrip().startswith(("#", "-"))
            if not is_key or key == "defaults":
                continue
            opens_section = line.split("#")[0].rstrip().endswith(":")
            above = lines[number - 1].lstrip() if number else ""
            assert "#" in line or above.startswith("#") or opens_section, f"{path.name}: {key} has no comment"


# Stack frames


def test_at_most_four_frames_lead_from_a_command_to_the_loop(tmp_path, monkeypatch):
    """`execute` calls `Loop.fit` for a new run, a resumed run and the jobs of a grid."""
    monkeypatch.chdir(tmp_path)
    stacks: list[list[str]] = []

    def fit(loop: Loop, real: Any = Loop.fit) -> str:
        frame, names = sys._getframe(1), []
        while frame:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(SRC) or path.parent == ROOT / "scripts":
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        stacks.append(names[::-1])
        return real(loop)

    def train(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["scripts/train.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")

    monkeypatch.setattr(Loop, "fit", fit)
    small_run = ("data.limit_train=40", "data.limit_eval=20", "model=mlp", "data.batch_size=20", "trainer.threads=1")
    train(*small_run, "trainer.max_epochs=1", "run_dir=run")
    train("resume=run", "trainer.max_epochs=2")
    train(*small_run, "trainer.max_epochs=1", "run_dir=grid", "-m", "seed=1,2")
    single_run, grid_job = ["<module>", "launch", "execute"], ["<module>", "launch", "job", "execute"]
    assert stacks == [single_run, single_run, grid_job, grid_job]


# Walks in CONTRIBUTING


@pytest.mark.parametrize("walk", ["one batch", "`optimizer.lr`"])
def test_walks_of_contributing_name_existing_code(walk):
    """At most twelve stops; each names a file, and the code words after it occur in that file."""
    heading = f"## Path of {walk} through the code\n"
    text = (ROOT / "CONTRIBUTING.md").read_text().partition(heading)[2].partition("\n## ")[0]
    stops = re.findall(r"^(\d+)\. `([^`]+)`: (.*)$", text, re.MULTILINE)
    assert [int(number) for number, _, _ in stops] == list(range(1, len(stops) + 1)) and 8 <= len(stops) <= 12
    for _, name, description in stops:
        content = (ROOT / name).read_text()
        for word in re.findall(r"`([A-Za-z_.]+)`", description):
            assert word.rpartition(".")[2] in content, f"{name} has no {word}"
