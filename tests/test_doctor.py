"The doctor: one finding a thing, and nothing called well that is not"

import json
from pathlib import Path

import pytest
from asked import make_study
from faulty_server import FaultyServer, Reply, completion

from cot_distill.core.config import StudyConfig, parse_study
from cot_distill.doctor import (
    check_answers,
    check_keys,
    check_precision,
    check_problems,
    check_providers,
    check_size,
    check_student,
)


def study_of(path: Path, answers: list[str], **more: object) -> StudyConfig:
    "A study of one's own problems"
    rows = [{"question": f"How many pens has {i}?", "answer": a} for i, a in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"source": str(path)}
    return parse_study(
        {
            "name": "own",
            "problems": source,
            "eval_sets": [{"name": "own", "split": "test"} | source],
            "student": {"model": "smollm2-135m"},
            "teachers": {"human": {"provider": "human"}},
        }
        | more
    )


def test_answers_that_cannot_be_graded_are_not_well(tmp_path: Path) -> None:
    states = {
        tuple(answers): [f.state for f in check_problems(study_of(tmp_path / "x.jsonl", answers))]
        for answers in (["5", "B", "1/2"], ["5", "7", "a lot of pens"], ["many", "few", "5"])
    }
    assert list(states.values()) == [["ok"] * 2, ["warn"] * 2, ["fail"] * 2]
    found = check_problems(study_of(tmp_path / "x.jsonl", ["5", "7", "a lot of pens"]))[0]
    assert "1 answers are neither" in found.advice and "'a lot of pens'" in found.advice


def test_humans_who_wrote_no_solutions_teach_nothing(tmp_path: Path) -> None:
    path, worked = tmp_path / "x.jsonl", "2 and 3 are 5.\n#### 5"
    heard = {n: check_answers(study_of(path, [worked] * n + ["5"] * (3 - n)))[0] for n in (0, 2, 3)}
    assert [(f.state, f.found) for f in heard.values()] == [
        ("fail", "0 of 3"),
        ("warn", "2 of 3"),
        ("ok", "3 of 3"),
    ]
    assert "no worked solution" in heard[0].advice and "another teacher" in heard[0].advice


def test_a_study_too_small_to_teach_or_to_tell_is_warned_of(tmp_path: Path) -> None:
    small = {f.what: f for f in check_size(study_of(tmp_path / "x.jsonl", ["5"] * 12))}
    assert {f.state for f in small.values()} == {"warn"}
    assert "optimiser steps" in small["training"].advice
    assert "no difference at all" in small["scoring"].found
    large = check_size(study_of(tmp_path / "x.jsonl", ["5"] * 400))
    assert {f.state for f in large} == {"ok"}


@pytest.mark.parametrize(("fast", "state"), [("float32", "warn"), ("bfloat16", "ok")])
def test_bfloat16_where_it_is_slow_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: str, state: str
) -> None:
    monkeypatch.setattr("cot_distill.core.machine.fastest_dtype", lambda device: fast)
    student = {"model": "smollm2-135m", "dtype": "bfloat16"}
    study = study_of(tmp_path / "x.jsonl", ["5"], student=student)
    assert check_precision(study).state == state


def test_a_model_of_another_name_is_not_well() -> None:
    with FaultyServer(lambda r, n: Reply(body=completion()), models=["quite-another"]) as server:
        (found,) = check_providers(make_study(server.url))
    assert found.state == "warn" and "quite-another" in found.found


def test_a_missing_key_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LESSON_API_KEY", raising=False)
    study = make_study("http://127.0.0.1:9/v1", teacher={"api_key_env": "LESSON_API_KEY"})
    said = [*check_keys(study), *check_providers(study)]
    assert [f.state for f in said] == ["fail"]


def test_a_student_that_is_nowhere_fails(tmp_path: Path) -> None:
    study = study_of(tmp_path / "x.jsonl", ["5"], student={"model": str(tmp_path / "none.gguf")})
    assert check_student(study).state == "fail"
