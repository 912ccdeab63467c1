"""The notebooks are lesson, source and test at once: they run, they agree with the library, they
can be given parameters"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import papermill
import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook
from places import NOTEBOOKS, ROOT
from tiny_student import make_student, make_study, write_rationales

from cot_distill.core.runs import open_run
from cot_distill.train import run_train

NUMBERED = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)]
STAGES = [p for p in NUMBERED if p.name[:2] in ("01", "02", "03")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "nbs").with_suffix(""))


def cells(path: Path) -> list[dict]:
    return [
        c | {"source": "".join(c["source"])}
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]


LONG = [ROOT / "nbs/after.ipynb"]  # a dozen commands, each a program that starts


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] * (p in LONG), id=name(p)) for p in NOTEBOOKS],
)
def test_runs_top_to_bottom(path: Path, capfd: pytest.CaptureFixture) -> None:
    "What `nbdev_test` does, notebook by notebook"
    here, found, variables = os.getcwd(), list(sys.path), dict(os.environ)
    try:
        passed, _ = run_notebook(path, skip_flags=get_config().tst_flags.split())
    finally:
        os.chdir(here)
        sys.path[:] = found
        for name in os.environ.keys() - variables.keys():  # a lesson's key is nobody else's
            del os.environ[name]
    assert passed, capfd.readouterr().err[-4000:]


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_declares_its_parameters(path: Path) -> None:
    "Without the tag papermill runs every teacher as the default one and exits 0"
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert set(papermill.inspect_notebook(str(path))) == {"config", "teacher", "limit", "run_dir"}


def test_the_chapters_that_run_once_declare_what_they_can_use() -> None:
    assert set(papermill.inspect_notebook(str(ROOT / "nbs/00_teachers.ipynb"))) == {"config"}
    assert "run_dir" in papermill.inspect_notebook(str(ROOT / "nbs/04_analysis.ipynb"))


def test_plain_papermill_and_its_report_opened_where_it_lies(tmp_path: Path) -> None:
    """As people are used to; the report is then continued from the files of its run, in its own
    folder as JupyterLab does it"""
    run, report = tmp_path / "runs/demo", tmp_path / "runs/demo/reports/01_generate-template.ipynb"
    report.parent.mkdir(parents=True)
    tool, quiet = (
        [Path(sys.executable).parent / "papermill", "--no-progress-bar"],
        os.environ | {"COT_DISTILL_PROGRESS": "off"},
    )
    given = {
        "teacher": "template",
        "config": "configs/demo.toml",
        "limit": 4,
        "run_dir": os.path.relpath(run, ROOT / "nbs"),
    }
    options = [word for name, value in given.items() for word in ("-p", name, str(value))]
    subprocess.run(
        [*tool, "nbs/01_generate.ipynb", report, *options, "--cwd", "nbs"],
        cwd=ROOT,
        check=True,
        env=quiet,
    )
    table = pd.read_parquet(run / "teachers/template/rationales.parquet")
    assert list(table["teacher"]) == ["template"] * 4
    subprocess.run([*tool, report.name, "again.ipynb"], cwd=report.parent, check=True, env=quiet)
    assert "(already done)" in (report.parent / "again.ipynb").read_text(encoding="utf-8")
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["demo"], (
        "no second run folder beside it"
    )


@pytest.mark.parametrize(
    ("chapter", "student", "settings"),
    [
        ("02_train", "human.seed1", {}),
        ("03_eval", "human.seed1", {}),
        ("03_eval", "base", {"n_samples": 2, "temperature": 0.7}),
    ],
)
def test_chapters_know_repeats_and_samples(
    tmp_path: Path, chapter: str, student: str, settings: dict
) -> None:
    """A student with another seed is taught by the same teacher's texts; an answer may be asked for
    more than once"""
    study = make_study(
        make_student(tmp_path / "student", hidden=32, layers=1), n=8, epochs=1
    ).model_copy(update={"repeats": 2})
    study = study.model_copy(
        update={
            "eval": study.eval.model_copy(
                update={"max_new_tokens": 4, "n_bootstrap": 200} | settings
            )
        }
    )
    run = open_run(tmp_path / "run", study)
    if (chapter, student) == ("03_eval", "human.seed1"):
        write_rationales(run, 8)
        run_train(study, student, run)
    asked = {"config": str(run.config_file), "teacher": student, "run_dir": str(run.path)}
    papermill.execute_notebook(
        str(ROOT / f"nbs/{chapter}.ipynb"),
        str(tmp_path / "out.ipynb"),
        asked,
        cwd=str(ROOT / "nbs"),
        progress_bar=False,
    )
    assert (
        run.training_log(student).exists()
        if chapter == "02_train"
        else run.eval_file(student, "two-step").exists()
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_is_written_as_a_chapter(path: Path) -> None:
    "Title and one line first; exported cells short; outputs without this machine in them"
    all_cells = cells(path)
    assert re.match(r"# .+\n> .+", all_cells[0]["source"]), (
        "first cell: `# Title`, then `> one line`"
    )
    exported = [c["source"] for c in all_cells if c["source"].startswith("#| export")]
    long = {
        lines[1]: len(lines)
        for source in exported
        if len(lines := [line for line in source.splitlines() if line.strip()]) - 1
        > (65 if "\nclass " in source else 46)
    }
    assert not long, f"exported cells over 46 lines, or 65 with a class: {long}"
    outputs = json.dumps([c.get("outputs", []) for c in all_cells])
    assert str(ROOT) not in outputs and str(Path.home()) + "/" not in outputs
    assert "site-packages" not in outputs
    assert path.stat().st_size <= 300_000


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of what the sync check touches"
    copy = tmp_path_factory.mktemp("checkout")
    for item in ("nbs", "cot_distill", "tools", "settings.ini", "README.md"):
        source = ROOT / item
        if source.is_dir():
            shutil.copytree(
                source,
                copy / item,
                ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
            )
        elif source.exists():
            shutil.copy(source, copy / item)
    return copy


def check(checkout: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, checkout / "tools" / "check_sync.py"],
        cwd=checkout,
        capture_output=True,
        text=True,
    )


def test_notebooks_library_and_readme_agree(checkout: Path) -> None:
    done = check(checkout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_library_edited_by_hand_is_found(checkout: Path) -> None:
    module = checkout / "cot_distill" / "core" / "errors.py"
    before = module.read_text(encoding="utf-8")
    module.write_text(before.replace("exit_code = 75", "exit_code = 76"), encoding="utf-8")
    done = check(checkout)
    assert done.returncode == 1 and "cot_distill/core/errors.py" in done.stderr
    assert module.read_text(encoding="utf-8") == before
