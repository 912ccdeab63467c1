"""Anybody's answers beside one another: runs of ours, tables, and logs that lm-eval 0.4.13 and
inspect 0.3.285 wrote with a table of answers as their model"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from cot_distill.cli import app
from cot_distill.core.errors import InputError
from cot_distill.reading.compare import compare_answers, read_answers

HERE = Path(__file__).parent
LM_EVAL, INSPECT = str(HERE / "logs/samples_pens.jsonl"), str(HERE / "logs/pens.eval")
DEMO = str(HERE.parents[1] / "reports/demo")


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("source", "accuracy"),  # as the tools themselves printed it
    [
        (LM_EVAL, 0.4166666666666667),
        (f"{LM_EVAL}:strict-match", 0.4166666666666667),
        (f"{LM_EVAL}:flexible-extract", 0.5833333333333334),
        (INSPECT, 0.8333333333333334),
    ],
)
def test_a_log_says_what_its_tool_said(source: str, accuracy: float):
    answers = read_answers(source)
    assert len(answers) == 24
    assert answers["is_correct"].mean() == pytest.approx(accuracy)


def test_one_rule_for_all_finds_what_a_strict_filter_missed():
    assert read_answers(LM_EVAL, "final_answer")["is_correct"].sum() == 14
    assert read_answers(INSPECT, "final_answer")["is_correct"].sum() == 20


def test_models_are_matched_by_question_and_compared_in_pairs():
    found = compare_answers([f"{DEMO}:template", LM_EVAL, INSPECT])
    assert len(found.questions) == 24
    assert list(found.scores()["answered"]) == [100, 24, 24]
    pair = found.pairs.iloc[2]
    assert (pair["first"], pair["second"]) == (LM_EVAL, INSPECT)
    apart = found.disagreements(LM_EVAL, INSPECT)
    assert len(apart) == pair["only first"] + pair["only second"]
    assert (found.pairs["p_holm"] >= found.pairs["p"]).all()


def test_a_table_is_graded_or_believed_whatever_its_columns_are_called(tmp_path: Path):
    graded = [{"problem": f"{i} + 1?", "answer": str(i + 1), "response": "= 3"} for i in range(4)]
    believed = [{"prompt": f"{i} +  1?\n", "correct": i != 2} for i in range(4)]
    pd.DataFrame(believed).to_csv(tmp_path / "b.csv", index=False)
    a, b = table(tmp_path / "a.jsonl", graded), str(tmp_path / "b.csv")
    assert list(read_answers(a)["is_correct"]) == [False, False, True, False]
    assert list(read_answers(b)["is_correct"]) == [True, True, False, True]
    assert compare_answers([a, b]).pairs.iloc[0]["delta"] == -0.5


def test_a_problem_answered_twice_counts_once(tmp_path: Path):
    rows = [{"question": "1 + 1?", "is_correct": right} for right in (False, True)]
    assert list(read_answers(table(tmp_path / "a.jsonl", rows))["is_correct"]) == [False]


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([LM_EVAL], "two different sources"),
        ([LM_EVAL, LM_EVAL], "two different sources"),
        ([LM_EVAL, "runs/nowhere:human"], "nothing is at runs/nowhere"),
        ([LM_EVAL, f"{DEMO}:humen"], "has no answers of 'humen' to two-step; it has those of base"),
        ([LM_EVAL, f"{LM_EVAL}:loose"], "has the filters strict-match, flexible-extract"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(sources: list[str], said: str):
    with pytest.raises(InputError, match=said):
        compare_answers(sources)


def test_broken_files_and_strange_questions_are_sentences(tmp_path: Path):
    (tmp_path / "b.eval").write_bytes(b"PK no zip")
    with pytest.raises(InputError, match="log of inspect"):
        read_answers(str(tmp_path / "b.eval"))
    with pytest.raises(InputError, match="row 1 needs a question, and a verdict"):
        read_answers(table(tmp_path / "a.jsonl", [{"question": "1?", "completion": "1"}]))
    other = table(tmp_path / "c.jsonl", [{"question": "What else?", "is_correct": True}])
    with pytest.raises(InputError, match="no question in common"):
        compare_answers([LM_EVAL, other])


def test_the_command_prints_and_what_a_model_wrote_does_not_reach_the_terminal(tmp_path: Path):
    rows = [
        {"question": "Q?", "reference": "\x1b[2J1", "completion": "\x1b[2J1", "is_correct": True}
    ]
    a = table(tmp_path / "a.jsonl", rows)
    b = table(tmp_path / "b.jsonl", [rows[0] | {"is_correct": False}])
    shown = CliRunner().invoke(app, ["compare", a, b])
    assert shown.exit_code == 0
    assert "\x1b" not in shown.output
    assert "only the first: 1, only the second: 0" in shown.output
    told = json.loads(CliRunner().invoke(app, ["compare", a, b, "--json"]).stdout)
    assert told["pairs"][0]["p_holm"] == 1.0
    assert [model["right"] for model in told["models"]] == [1, 0]
