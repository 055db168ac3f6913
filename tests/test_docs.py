"""The documentation: commands run as printed, links lead to files, the reading tour is short.

Commands that need only the data set `digits` run here, with two optimizer steps. For all others, the config is composed
and checked.
"""

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import trained
from PIL import Image

from core.composition import compose_config
from core.options.commands import SweepConfig
from core.options.declarations import TrainConfig
from core.options.overrides import check_overrides, parse_overrides
from sweeps.define.plan import read_plan

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {ROOT / "CHANGELOG.md"})
COMMAND = re.compile(r"python scripts/(\w+)\.py")
SMALL = ("trainer.max_steps=2", "trainer.threads=1", "trainer.log_graph=false", "trainer.log_images=false")
TOUR_LINES = 1300
# Commands that need something the tests do not have: the result of a sweep or of a long training, a Hydra plugin.
NOT_RUNNABLE = (
    "experiment=best",
    "folder=outputs/",
    "KEY=VALUE",
    "hydra/launcher=",
    "=FILE.csv",
    "split=all",
    "[outputs/A",
)


def commands(page: Path) -> list[str]:
    """Return the commands of a page: lines of code blocks, and inline code, from `python scripts/` on."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("python scripts/")]
    return lines + re.findall(r"`(python scripts/[^`]+)`", text)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Return a folder with what the commands name: a run, outputs/RUN, and a folder of images, FOLDER."""
    folder = tmp_path_factory.mktemp("workplace")
    trained(folder / "outputs" / "RUN", "trainer.max_epochs=1")
    for index, name in enumerate(("cat", "dog")):
        (folder / "FOLDER" / name).mkdir(parents=True)
        for number in range(60):
            image = Image.new("RGB", (70, 70), (100 * index, 4 * number, 0))
            image.save(folder / "FOLDER" / name / f"{number}.png")
    return folder


@pytest.fixture
def script(workplace, monkeypatch, capfd) -> Callable[..., int]:
    """Return a function that runs a script in the workplace, in this process, and returns its exit code."""
    monkeypatch.chdir(workplace)

    def run(name: str, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *arguments])
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


def first_of_grid(arguments: list[str]) -> list[str]:
    """Return the arguments of the first job of a grid."""
    overrides = parse_overrides([item for item in arguments if "=" in item and not item.startswith("-")])
    return [
        f"{override.key_or_group}={next(iter(override.sweep_iterator()))}"
        if override.is_sweep_override()
        else str(override.input_line)
        for override in overrides
    ]


def needs_other_data(arguments: list[str]) -> bool:
    """Return whether a training needs data beyond `digits`, the images in FOLDER, or the result of a sweep."""
    joined = " ".join(arguments)
    own_folder = "data=image_folder" in joined and "data.root=FOLDER" in joined
    return "experiment=" in joined or "--config-dir" in joined or ("data=" in joined and not own_folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_run_as_printed(page, script, workplace, tmp_path):
    for command in commands(page):
        words = shlex.split(command, comments=True)
        match = COMMAND.match(command)
        assert match is not None and words[0] == "python"
        name, arguments = match[1], words[2:]
        if not arguments or arguments == ["..."] or name == "zoo" or "pooled" in command:
            continue  # test_command_line runs the commands of the model `pooled`
        if name == "sweep":
            overrides = [item for item in arguments if not item.startswith("-")]
            read_plan(compose_config("sweep", overrides, SweepConfig, missing=None))
        elif any(text in command for text in NOT_RUNNABLE):
            overrides = [item for item in arguments if "=" in item and not item.startswith("-") and "=best" not in item]
            check_overrides(parse_overrides(overrides), TrainConfig if name == "train" else None)
        elif name in ("train", "look") and needs_other_data(arguments):
            compose_config("train", first_of_grid(arguments), TrainConfig, missing=None)
        else:
            folder = [] if "run_dir=" in command or name not in ("train", "look") else [f"run_dir={tmp_path / 'new'}"]
            if "resume=" in command or "--help" in command:
                folder = []
            small = SMALL if name in ("train", "look") and "--help" not in command else ()
            code = script(name, *arguments, *folder, *small)
            assert code == 0, f"{page.name}: {command}: exit {code}"
            for path in tmp_path.glob("new*"):
                path.rename(tmp_path / f"done-{len(list(tmp_path.iterdir()))}")


def test_pages_have_commands():
    assert {page.name for page in PAGES if len(commands(page)) > 5} >= {"README.md", "sweeps.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_printed_with_python_in_front(page):
    """The shell refuses `scripts/train.py model=mlp` alone: the scripts are not executable."""
    assert re.findall(r"(?<!python )(?<![\w/(\[.])scripts/\w+\.py [a-z~+'-]\S*=?.*", page.read_text()) == []


def test_notebook_example_of_the_readme_runs(workplace, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(workplace)
    Image.new("L", (20, 20), 90).save("seven.png")
    exec(code[1], {})
    assert re.fullmatch(r"[\w ]+\n", capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_index_of_docs_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name})" not in index] == ["README.md"]


def test_reading_tour_is_short():
    tour = (ROOT / "README.md").read_text().partition("## Reading tour of the code")[2].partition("\n## ")[0]
    files = re.findall(r"^\d\. .*", tour, re.MULTILINE)
    paths = [path for line in files for path in re.findall(r"\(([\w./]+)\)", line)]
    assert len(paths) >= 7 and sum(len((ROOT / path).read_text().splitlines()) for path in paths) <= TOUR_LINES
