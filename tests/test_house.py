"""The house stands as it is drawn: imports run one way, every dependency is named and locked,
nothing heavy loads early"""

import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from places import NOTEBOOKS, ROOT

LIBRARY = sorted((ROOT / "cot_distill").rglob("*.py"))
FLOORS = [
    {"core"},
    {"grading"},
    {"asking", "student", "reading"},
    {"teachers"},
    {"generate", "train", "eval", "analysis"},
    {"batch"},
    {"web"},
    {"options", "starting", "doctor", "around", "cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Nothing of ours is below these; an import of theirs inside a function counts as well.
TOOLS_OF_THE_TESTS = {"vllm", "xllamacpp", "ray"}


def imports(path: Path) -> set[str]:
    "Every module that a file imports, wherever in it"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room(module: str) -> str:
    "The folder or chapter of a module of ours: `core` of `cot_distill.core.config`"
    return (module.split(".") + [""])[1]


def test_imports_run_one_way() -> None:
    wrong = []
    for path in LIBRARY:
        here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imports(path):
            there = room(module) if module.startswith("cot_distill.") else here
            if FLOOR.get(here) is None or FLOOR.get(there) is None or here == there:
                continue
            if FLOOR[there] >= FLOOR[here] and here not in FLOORS[-1]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(sorted(wrong))


def test_every_module_comes_from_a_notebook() -> None:
    "A module whose notebook was renamed or deleted would stay behind and be imported for ever"
    for path in LIBRARY:
        text = path.read_text(encoding="utf-8")
        source = re.search(r"File to edit: (\S+\.ipynb)", text)
        if path.name not in ("__init__.py", "_modidx.py"):
            assert source, f"{path}: no notebook made it"
            assert (path.parent / source[1]).resolve().exists(), f"{path}: {source[1]} is gone"


def requirements() -> tuple[set[str], set[str]]:
    "Names that settings.ini asks for, and all that constraints.txt fixes"
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = config["DEFAULT"]["requirements"] + " " + config["DEFAULT"]["dev_requirements"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    locked = {line.split("==")[0] for line in lines if "==" in line}
    return {distribution(name) for name in wanted.split()}, locked


def distribution(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.split("[")[0]).lower()


def test_every_dependency_is_locked() -> None:
    wanted, locked = requirements()
    assert not wanted - locked, "run: make lock"


def test_every_import_is_a_named_dependency() -> None:
    "What comes along with another package today may not tomorrow"
    wanted, _ = requirements()
    made_of = packages_distributions()
    unnamed = {}
    for path in LIBRARY:
        for top in {m.split(".")[0] for m in imports(path)} - {"cot_distill"} - TOOLS_OF_THE_TESTS:
            packages = {distribution(name) for name in made_of.get(top, [])}
            if top not in sys.stdlib_module_names and not packages & wanted:
                unnamed[top] = str(path.relative_to(ROOT))
    assert not unnamed, f"name these in settings.ini, then: make lock: {unnamed}"


def test_no_test_imports_from_another() -> None:
    "What two test files need lies in tests/helpers"
    tests = sorted((ROOT / "tests").rglob("*.py"))
    names = {path.stem for path in tests if path.name.startswith("test_")}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in tests
        for module in imports(path)
        if module.split(".")[0] in names
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("code", ["import cot_distill", "import cot_distill.cli as c; c.app"])
def test_nothing_heavy_loads_before_it_is_needed(code: str) -> None:
    heavy = "torch transformers pandas numpy papermill matplotlib".split()
    show = f"import sys; {code}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CHAPTERS = [path for path in NOTEBOOKS if path.name[0].isdigit()]


def code_of(notebook: Path, start: str = "") -> str:
    "The code of a notebook, or of its cells that start so"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return "\n".join(source for source in sources if source.startswith(start))


@pytest.mark.parametrize(
    ("chapter", "cells"),
    [(path, "#| export") for path in CHAPTERS] + [(path, "") for path in CHAPTERS[:2]],
    ids=lambda value: getattr(value, "stem", value or "lessons, too"),
)
def test_a_chapter_imports_what_it_tells_about(chapter: Path, cells: str) -> None:
    "At most 25 names of ours: what serves behind the scenes has its own room"
    body = "\n".join(f"    {line}" for line in code_of(chapter, cells).splitlines())
    names = {
        alias.name
        for node in ast.walk(ast.parse(f"async def chapter():\n{body}"))  # lessons await
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cot_distill")
        for alias in node.names
    }
    assert len(names) <= 25, sorted(names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_read_at_one_sitting(notebook: Path) -> None:
    "At most 400 lines of code"
    lines = [line.strip() for line in code_of(notebook).splitlines()]
    assert sum(bool(line) and not line.startswith("#") for line in lines) <= 400


@pytest.mark.parametrize(
    "target", "env demo test test-slow mock lab site notebooks check lock".split()
)
def test_what_make_would_do_is_a_command(target: str) -> None:
    "Down to the installation of what a target needs"
    shown = subprocess.run(
        ["make", "--always-make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
    )
    read = subprocess.run(["bash", "-n"], input=shown.stdout, capture_output=True, text=True)
    assert (shown.returncode, read.returncode) == (0, 0), shown.stderr + read.stderr
