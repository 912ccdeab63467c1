"""A small run folder in the layout of a real one, its texts written by a program: input for tests
of what reads runs"""

import json
import random
import re
from pathlib import Path

import pandas as pd

from cot_distill.core.problems import Problem, load_problems
from cot_distill.core.stats import holm, paired_difference, wilson
from cot_distill.grading import final_answer, grade, is_correct

STUDY = """\
name = "made"
description = "Texts made by a program, for tests"
seed = 0
[problems]
source = "two-step"
limit = {n_train}
[[eval_sets]]
name = "two-step"
source = "two-step"
limit = {n_eval}
[[eval_sets]]
name = "other"
source = "two-step"
offset = 200
limit = 24
[student]
model = "smollm2-135m"
dtype = "float32"
[teachers.human]
provider = "human"
[teachers.recorded]
provider = "recorded"
path = "package:two-step.jsonl"
"""


def numbers_of(problem: Problem) -> list[str]:
    "The two equations of a two-step solution"
    return re.findall(r"\d+ [*+-] \d+ = \d+", problem.solution)


def slipped(equation: str, rng: random.Random) -> str:
    "The same equation with a wrong result"
    left, right = equation.split(" = ")
    return f"{left} = {int(right) + rng.choice([-10, -1, 1, 2, 10])}"


def teacher_text(teacher: str, problem: Problem, rng: random.Random) -> str:
    "What one of two made-up teachers would write"
    first, second = numbers_of(problem)
    if teacher == "human":
        return problem.solution
    if rng.random() < 0.12:
        second = slipped(second, rng)
    answer = second.split(" = ")[1]
    return (
        f"To solve this problem, we go step by step.\n\n1. **First step**: we compute {first}.\n"
        f"2. **Second step**: then {second}.\n\n#### <answer>{answer}</answer>"
    )


def student_text(variant: str, problem: Problem, rng: random.Random) -> tuple[str, bool]:
    "What a student would answer, and whether it was cut off"
    first, second = numbers_of(problem)
    kind = rng.random()
    if variant == "base":
        if kind < 0.1:
            return f"The answer is {problem.reference_answer}.", False
        return (
            "Let's think about this. " + f"There are {first.split()[0]} of them. " * 12,
            kind < 0.8,
        )
    if variant == "human":
        if kind < 0.3:
            second = slipped(second, rng)
        elif kind < 0.4:
            return f"First, {first}.\n#### {first.split(' = ')[1]}", False
        return f"First, {first}. Then, {second}.\n#### {second.split(' = ')[1]}", False
    if kind < 0.1:
        return teacher_text(variant, problem, rng)[:70], True
    text = teacher_text(variant, problem, rng)
    return text if kind < 0.9 else text.replace(first.split()[0], "99"), False


def eval_frame(variant: str, problems: list[Problem], rng: random.Random) -> pd.DataFrame:
    "One evaluation in the columns of `evals/<variant>/<set>.parquet`"
    rows = []
    for problem in problems:
        text, truncated = student_text(variant, problem, rng)
        rows.append(
            {
                "problem_id": problem.problem_id,
                "question": problem.question,
                "reference_answer": problem.reference_answer,
                "completion": text,
                "final_answer": final_answer(text, truncated),
                "is_correct": is_correct(text, problem.reference_answer, truncated),
                "n_tokens": len(text) // 3,
                "truncated": truncated,
            }
        )
    return pd.DataFrame(rows)


def rationale_frame(teacher: str, problems: list[Problem], rng: random.Random) -> pd.DataFrame:
    "A teacher's rationales in the columns of `teachers/<teacher>/rationales.parquet`"
    rows = []
    for problem in problems:
        text = teacher_text(teacher, problem, rng)
        right = is_correct(text, problem.reference_answer)
        rows.append(
            {
                "problem_id": problem.problem_id,
                "question": problem.question,
                "reference_answer": problem.reference_answer,
                "teacher": teacher,
                "model": "made-by-a-program",
                "sample_idx": 0,
                "completion": text,
                "final_answer": final_answer(text),
                "is_correct": right,
                "kept": right,
                "drop_reason": None if right else "wrong",
                "finish_reason": "stop",
                "prompt_tokens": len(problem.question) // 4,
                "completion_tokens": len(text) // 3,
                "cost_usd": 0.0 if teacher == "human" else 0.0002,
                "latency_s": 0.0 if teacher == "human" else 1.5,
            }
        )
    return pd.DataFrame(rows)


def training_log(n_examples: int, mean_nll: float) -> dict:
    "A training log with a falling loss"
    steps = max(2, n_examples // 8)
    return {
        "n_examples": n_examples,
        "n_tokens": n_examples * 40,
        "n_steps": steps,
        "steps": [
            {"step": i + 1, "loss": 0.2 + 1.6 / (i + 1), "learning_rate": 2e-4}
            for i in range(steps)
        ],
        "mean_nll": mean_nll,
        "final_train_loss": 0.25,
        "train_wall_s": 61.0,
        "trainable_params": 1000,
        "total_params": 100_000,
    }


def result_row(variant: str, frame: pd.DataFrame, base: pd.DataFrame, cost: float | None) -> dict:
    "One variant of results.json"
    right = frame["is_correct"]
    rules = {
        rule: pd.Series(
            [
                grade(row.completion, row.reference_answer, rule=rule)[1]
                for row in frame.itertuples()
            ]
        )
        for rule in ("last_number", "lm_eval_strict")
    }
    row = {
        "variant": variant,
        "teacher": None if variant == "base" else variant,
        "n": len(frame),
        "n_correct": int(right.sum()),
        "accuracy": float(right.mean()),
        "ci95": list(wilson(int(right.sum()), len(frame))),
        "n_truncated": int(frame["truncated"].sum()),
        "n_no_answer": int(frame["final_answer"].isna().sum()),
        "final_train_loss": None if variant == "base" else 0.25,
        "train_wall_s": None if variant == "base" else 61.0,
        "eval_wall_s": 33.0,
        "teacher_cost_usd": cost,
        "vs_base": None,
        "accuracy_by_rule": {rule: float(grades.mean()) for rule, grades in rules.items()},
    }
    if variant != "base":
        gain = paired_difference(right, base["is_correct"])
        row["vs_base"] = {
            "delta": gain.delta,
            "ci95": list(gain.ci95),
            "p_mcnemar": gain.p_mcnemar,
            "p_holm": gain.p_mcnemar,
        }
    return row


def results_of(
    study: str, problem_set: str, frames: dict[str, pd.DataFrame], costs: dict[str, float]
) -> dict:
    "results.json of one problem set"
    rows = [result_row(v, frame, frames["base"], costs.get(v)) for v, frame in frames.items()]
    corrected = holm({r["variant"]: r["vs_base"]["p_mcnemar"] for r in rows if r["vs_base"]})
    for row in rows:
        if row["vs_base"]:
            row["vs_base"]["p_holm"] = corrected[row["variant"]]
    return {"study": study, "problem_set": problem_set, "n": rows[0]["n"], "variants": rows}


def make_run(folder: Path, n_train: int = 48, n_eval: int = 64, seed: int = 0) -> Path:
    "Write a whole run folder, all files but the adapters and ledgers; returns it"
    rng = random.Random(seed)
    train = load_problems("two-step", "train", n_train)
    sets = {
        "two-step": load_problems("two-step", "test", n_eval),
        "other": load_problems("two-step", "test", 24, 200),
    }
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(STUDY.format(n_train=n_train, n_eval=n_eval))
    costs, evals = {}, {name: {} for name in sets}
    for variant in ("base", "human", "recorded"):
        for name, problems in sets.items():
            evals[name][variant] = frame = eval_frame(variant, problems, rng)
            (folder / "evals" / variant).mkdir(parents=True, exist_ok=True)
            frame.to_parquet(folder / "evals" / variant / f"{name}.parquet", index=False)
        if variant == "base":
            continue
        (folder / "teachers" / variant).mkdir(parents=True)
        (folder / "students" / variant).mkdir(parents=True)
        rationales = rationale_frame(variant, train, rng)
        rationales.to_parquet(folder / "teachers" / variant / "rationales.parquet", index=False)
        costs[variant] = float(rationales["cost_usd"].sum())
        log = training_log(int(rationales["kept"].sum()), {"human": 1.9, "recorded": 1.2}[variant])
        (folder / "students" / variant / "training_log.json").write_text(json.dumps(log))
    results = results_of("made", "two-step", evals["two-step"], costs)
    results["other_problem_sets"] = [results_of("made", "other", evals["other"], costs)]
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    run = {
        "study": "made",
        "seed": 0,
        "commit": "0" * 40,
        "versions": {"python": "3.11"},
        "stages": {},
    }
    (folder / "run.json").write_text(json.dumps(run, indent=1))
    return folder
