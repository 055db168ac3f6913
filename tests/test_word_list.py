"""The word list (tests/word_list.txt): phrases that must not occur in any file of the repository."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "word_list.txt"
SUFFIXES = (".py", ".yaml", ".md", ".toml", "Makefile")


def phrases() -> dict[str, str]:
    """Return {phrase: replacement} of the word list."""
    lines = [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split(" => ") for line in lines)


def uses(text: str) -> list[tuple[int, str]]:
    """Return the line and the phrase of each use: words may be joined by spaces, underscores or a line break."""
    matches = []
    for phrase in phrases():
        words = r"[\s_#>*\"]+".join(re.escape(word) for word in phrase.split())
        for match in re.finditer(rf"(?<![A-Za-z]){words}(?![A-Za-z])", text, re.IGNORECASE):
            matches.append((text.count("\n", 0, match.start()) + 1, phrase))
    return matches


def test_no_file_uses_a_phrase_of_the_word_list():
    tracked_names = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split("\n")
    files = [ROOT / name for name in tracked_names if name.endswith(SUFFIXES) and (ROOT / name).exists()]
    assert len(files) > 300
    replacements = phrases()
    report = [
        f"{path.relative_to(ROOT)}:{line}: {phrase!r}; write: {replacements[phrase]}"
        for path in files
        if path != Path(__file__).resolve()
        for line, phrase in uses(path.read_text())
    ]
    assert not report, "\n".join(report)


def test_word_list_finds_prose_names_and_wrapped_lines():
    text = "# A run\n# goes\n# on. def test_learns_by_heart(): pass\nNobodyElse, anewer, 'It is told.'"
    assert sorted(uses(text)) == [(2, "goes on"), (3, "by heart"), (4, "is told")]
