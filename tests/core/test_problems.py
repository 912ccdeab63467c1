"Problems: what a row may look like, what is set aside, and that train and test stay apart"

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cot_distill.core.config import parse_study
from cot_distill.core.errors import InputError
from cot_distill.core.problems import (
    NAMES,
    THINGS,
    load_problems,
    parse_rows,
    split_solution,
    study_problems,
)

GOOD = {"question": "2 + 3?", "answer": "so 5\n#### 5"}


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(
        b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
    )
    return path


@pytest.mark.parametrize(
    ("row", "answer", "solution"),
    [
        (GOOD, "5", "so 5\n#### 5"),
        ({"question": "q", "answer": "1,234"}, "1,234", None),
        ({"question": "q", "answer": "x #### 1,234"}, "1234", "x #### 1,234"),
        ({"question": "q", "answer": "a #### 1 b #### 2"}, "2", "a #### 1 b #### 2"),
        ({"problem": "q", "target": 7}, "7", None),
        ({"question": "q", "reference_answer": "8", "solution": "it is 8"}, "8", "it is 8"),
        ({"question": "q", "answer": 0}, "0", None),
        ({"prompt": "q", "label": "9"}, "9", None),
        ({"input": "q", "output": "so 9\n#### 9"}, "9", "so 9\n#### 9"),
    ],
)
def test_rows_in_the_forms_that_data_sets_use(row: dict, answer: str, solution: str | None):
    (problem,), set_aside = parse_rows([row], "x")
    assert (problem.reference_answer, problem.solution, set_aside) == (answer, solution, [])


@pytest.mark.parametrize(
    ("row", "letter"),
    [
        ({"question": "q?", "choices": ["x", "y", "z", "w"], "answer": 2, "subject": "s"}, "C"),
        ({"question": "q?", "choices": ["x", "y"], "answer": "B"}, "B"),
        ({"question": "q?", "choices": ["x", "y"], "answer": "y"}, "B"),
        (
            {
                "question": "q?",
                "choices": {"text": ["x", "y"], "label": ["1", "2"]},
                "answerKey": "2",
            },
            "B",
        ),
    ],
)
def test_multiple_choice_in_the_forms_of_mmlu_and_arc(row: dict, letter: str):
    (problem,), set_aside = parse_rows([row], "x")
    assert (problem.reference_answer, set_aside) == (letter, [])
    assert problem.question.startswith("q?\n\nA) x\nB) y") and "letter" in problem.question


def test_a_choice_that_there_is_not_is_set_aside():
    rows = [{"question": "q", "choices": ["x", "y"], "answer": 4}]
    assert "none of 2 choices" in parse_rows(rows, "x")[1][0]["reason"]


def test_a_story_in_a_column_of_its_own():
    row = {"ID": "chal-1", "Body": "Dan had $4.", "Question": "How much is half?", "Answer": 2.0}
    (problem,), _ = parse_rows([row], "svamp")
    assert (problem.question, problem.reference_answer) == ("Dan had $4. How much is half?", "2.0")


def test_bad_rows_are_set_aside_with_line_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = write(
        tmp_path / "p.jsonl",
        GOOD,
        {"question": "", "answer": "1"},
        {"question": "q"},
        {"question": "q", "answer": "x ####"},
        b"{torn",
        b'{"question": "\xff"}',
        [1, 2],
        None,
        GOOD,
        {"question": "last", "answer": "9"},
    )
    problems = load_problems(str(path), quarantine=tmp_path / "quarantine.jsonl")
    assert [p.reference_answer for p in problems] == ["5", "9"]
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [r["row"] for r in rows] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert "no question" in rows[0]["reason"] and "no answer" in rows[1]["reason"]
    assert "same question as row 1" in rows[-1]["reason"]
    assert "2 problems, 8 rows set aside" in capsys.readouterr().err


def test_columns_of_any_name_are_read_once_they_are_named(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", {"Frage": "2 + 3?", "loesung": "5", "answer": "no"})
    says = r'there are: frage, loesung, answer\); say which: columns = \{ question = "..." \}'
    with pytest.raises(InputError, match=says):
        load_problems(str(path))
    named = {"question": "frage", "answer": "Loesung"}
    (problem,) = load_problems(str(path), columns=named)
    assert (problem.question, problem.reference_answer) == ("2 + 3?", "5")
    study = {
        "name": "own",
        "problems": {"source": str(path), "columns": named},
        "eval_sets": [{"name": "own", "source": str(path), "columns": named}],
        "teachers": {"human": {"provider": "human"}},
    }
    assert study_problems(parse_study(study)) == [problem]
    with pytest.raises(InputError, match="problems.columns"):
        parse_study(study | {"problems": {"source": str(path), "columns": {"frage": "x"}}})


def test_ids_do_not_shift_with_limit_and_offset(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", *({"question": f"q{i}", "answer": str(i)} for i in range(9)))
    all_ids = [p.problem_id for p in load_problems(str(path))]
    assert [p.problem_id for p in load_problems(str(path), limit=3, offset=4)] == all_ids[4:7]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_file_kind_gives_the_same_problems(suffix: str, tmp_path: Path):
    import pandas as pd

    frame = pd.DataFrame([{"question": "q1", "answer": "007"}, {"question": "q2", "answer": "8"}])
    path = tmp_path / f"p{suffix}"
    {
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".json": lambda: frame.to_json(path, orient="records"),
        ".parquet": lambda: frame.to_parquet(path),
        ".csv": lambda: frame.to_csv(path, index=False),
    }[suffix]()
    assert [(p.question, p.reference_answer) for p in load_problems(str(path))] == [
        ("q1", "007"),
        ("q2", "8"),
    ]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("gsm9k", "known: gsm8k"),
        ("./none.jsonl", "no problem file"),
        ("wrong.jsonl", "no question"),
        ("empty.jsonl", "it is empty"),
        ("x.parquet", "cannot be read"),
        ("x.json", "cannot be read"),
    ],
)
def test_a_source_that_cannot_be_used_gets_a_sentence(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "wrong.jsonl", {"frage": "q", "antwort": "1"})
    for name in ("empty.jsonl", "x.parquet", "x.json"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=re.escape(says)):
        load_problems(source)


def test_two_step_splits_share_no_numbers_and_answers_hold():
    train = load_problems("two-step", "train", 1000)
    other = load_problems("two-step", "test", 400) + load_problems("two-step", "held-out", 400)
    numbers = [{tuple(sorted(re.findall(r"\d+", p.question))) for p in ps} for ps in (train, other)]
    assert not numbers[0] & numbers[1]
    assert len({p.question for p in train + other}) == 1800
    for problem in train + other:
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", problem.solution)
        assert len(steps) == 2
        for left, operator, right, result in steps:
            assert {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
            }[operator] == int(result)
        assert steps[-1][-1] == problem.reference_answer


def test_held_out_stories_are_never_taught():
    "Questions without their names, things and numbers"
    changing = re.compile(rf"{'|'.join([*NAMES, *THINGS])}|\d+")
    taught, tested, held_out = (
        {changing.sub("_", p.question) for p in load_problems("two-step", split, 100)}
        for split in ("train", "test", "held-out")
    )
    assert taught == tested and not taught & held_out and len(held_out) >= 4


def test_a_longer_draw_begins_like_a_shorter_one():
    assert load_problems("two-step", limit=50)[:20] == load_problems("two-step", limit=20)


def test_gsm_symbolic_has_answers_that_agree_with_its_solutions():
    pytest.importorskip("reasoning_gym")
    problems = load_problems("gsm-symbolic", "test", 30)
    assert len(problems) == 30
    assert all("####" in p.solution for p in problems)
    assert not {p.question for p in problems} & {
        p.question for p in load_problems("gsm-symbolic", "train", 30)
    }


@given(
    st.integers(-(10**12), 10**12),
    st.text(max_size=50).filter(lambda s: "####" not in s and not s.endswith("#")),
)
def test_the_answer_behind_the_marks_comes_back(number: int, solution: str):
    assert split_solution(f"{solution}\n#### {number:,}")[0] == str(number)
