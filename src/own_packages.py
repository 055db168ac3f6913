"""Checks that Python finds the packages of this repository, and not folders of the same names.

A folder such as `models/` in a folder of PYTHONPATH hides ours. Every script imports this module before all others of
the repository. It imports none of them, because they may be the hidden ones.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

SRC = Path(__file__).resolve().parent


def hidden_package() -> str | None:
    """Return one line that names the first hidden package, where it is imported from and where it is; or None."""
    for init in sorted(SRC.glob("*/__init__.py")):
        name = init.parent.name
        specification = PathFinder.find_spec(name)
        origin = specification and (specification.origin or next(iter(specification.submodule_search_locations or [])))
        if origin and Path(origin).resolve() != init:
            other = Path(origin).parent if Path(origin).name == "__init__.py" else Path(origin)
            advice = f"rename it, or remove {other.parent} from PYTHONPATH"
            return f"error[config] {name}: would be imported from {other} instead of {init.parent}; {advice}"
    return None


if message := hidden_package():
    print(message.encode(errors="backslashreplace").decode(), file=sys.stderr)
    sys.exit(2)
