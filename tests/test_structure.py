"""The architecture's rules, held by reading the source: import directions, shadowing names, comments in YAML."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {path.name for path in (ROOT / "src").iterdir() if (path / "__init__.py").exists()}
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# Who may import whom among our packages; `trainer.build` and those that restore and begin runs tie the ends together.
ALLOWED = {
    "core": {"core"},
    "models": {"core", "models"},
    "data": {"core", "data"},
    "trainer": {"core", "trainer"},
    "analysis": {"core", "analysis"},
    "sweeps": {"core", "sweeps", "trainer"},
}
MAY_IMPORT_DATA = {"trainer/build/training.py", "trainer/begin.py", "trainer/inference/load_run.py"}
MAY_IMPORT_HYDRA = {"core/config.py", "core/command_line.py", "trainer/build/training.py"}
MAY_IMPORT_HYDRA |= {f"sweeps/{name}.py" for name in ("compose", "plan", "best")}


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_import_directions(path):
    place = str(path.relative_to(ROOT / "src"))
    roots = {name.partition(".")[0] for name in imported(path)}
    allowed = ALLOWED[place.partition("/")[0]] | ({"data"} if place in MAY_IMPORT_DATA else set())
    assert roots & (PACKAGES | {"scripts"}) <= allowed
    assert place in MAY_IMPORT_HYDRA or not roots & {"hydra", "omegaconf"}


def test_core_needs_no_torch():
    for path in (ROOT / "src/core").glob("*.py"):
        assert not {name.partition(".")[0] for name in imported(path)} & {"torch", "torchvision", "numpy", "sklearn"}


def test_scripts_import_torch_only_inside_main():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    for path in (ROOT / "scripts").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                allowed = PACKAGES & {"core"} | scripts | set(sys.stdlib_module_names)
                assert str(module).partition(".")[0] in allowed, f"{path.name} imports {module} at its top"


def test_package_inits_import_nothing():
    for package in PACKAGES:
        assert (ROOT / "src" / package / "__init__.py").read_text().strip() == ""


def test_no_file_shadows_a_module():
    taken = set(sys.stdlib_module_names) | PACKAGES
    for folder in ("scripts", "tests"):
        assert not {path.stem for path in (ROOT / folder).glob("*.py")} & taken
    assert not [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name in PACKAGES]


def test_every_yaml_key_has_a_comment():
    """Beside the key, or in the line above it; Hydra's own section and lists of defaults explain themselves."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), f"{path.name} does not say what it is"
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
