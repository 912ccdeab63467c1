"A first study: what `cot-distill init` writes can be run, and what it cannot write it says"

import json
from pathlib import Path

import pytest

from cot_distill.core.config import load_study
from cot_distill.core.errors import InputError
from cot_distill.core.problems import study_problems
from cot_distill.core.settings import warn_of_few_steps
from cot_distill.starting import write_study


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    "A file of bare answers in a folder of its own"
    file = tmp_path / "data" / "my pens.jsonl"
    file.parent.mkdir()
    rows = [{"question": f"How many pens are {i} and 2?", "answer": str(i + 2)} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_it_can_be_loaded_from_anywhere_and_asks_nothing_it_taught(
    problems: Path, tmp_path: Path
) -> None:
    (tmp_path / "told.jsonl").write_text("{}\n")
    teachers = ["http://127.0.0.1:9/v1#some/model:7b", str(tmp_path / "told.jsonl")]
    study = load_study(write_study(problems, teachers, tmp_path / "pens.toml"))
    taught = {p.question for p in study_problems(study)}
    asked = {p.question for p in study_problems(study, study.eval_sets[0])}
    assert (len(taught), len(asked), taught & asked) == (30, 30, set())
    assert list(study.teachers) == ["some-model-7b", "told"]
    assert study.path(study.teachers["told"].path) == tmp_path / "told.jsonl"
    assert not warn_of_few_steps(len(taught), study.train)


def test_what_cannot_become_a_study_is_said(problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "pens.toml"
    with pytest.raises(InputError, match="no worked solutions"):
        write_study(problems, ["human"], out)
    with pytest.raises(InputError, match="which model at"):
        write_study(problems, ["http://127.0.0.1:9/v1"], out)
    with pytest.raises(InputError, match="there is no file"):
        write_study(tmp_path / "none.jsonl", ["gpt-4o-mini"], out)
    out.write_text("mine")
    with pytest.raises(InputError, match="there already"):
        write_study(problems, ["gpt-4o-mini"], out)
    assert out.read_text() == "mine"
