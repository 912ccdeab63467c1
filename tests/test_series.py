"""The series: what is read, what is done once, what survives a kill, what several machines make
together"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pandas as pd
import pytest
from tiny_student import make_student

from cot_distill.asking.replies import Question
from cot_distill.batch.series import (
    Row,
    Step,
    estimate_s,
    load_series,
    main,
    merge_results,
    merged,
    pack_results,
    record_answers,
    row_inputs,
    rows_of,
    rows_table,
    run_series,
    study_of,
)
from cot_distill.core.config import TeacherConfig
from cot_distill.core.errors import InputError
from cot_distill.core.files import read_json, read_parquet, write_json, write_parquet
from cot_distill.core.problems import Problem, load_problems
from cot_distill.core.runs import RunFolder
from cot_distill.teachers import HumanTeacher

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder: a random student, problems, the same test problems with one label changed, a
    recording"""
    folder = tmp_path_factory.mktemp("data")
    make_student(folder / "student", hidden=32, layers=1)
    problems = load_problems("two-step", "test", 6)
    lines = [{"question": p.question, "answer": p.reference_answer} for p in problems]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "corrected.jsonl").write_text(
        "".join(json.dumps(line | {"answer": "777"}) + "\n" for line in lines[1:5])
    )
    taught = [
        {"question": p.question, "completion": p.solution, "model": "m"}
        for p in load_problems("two-step", limit=8)
    ]
    (folder / "teacher.jsonl").write_text("".join(json.dumps(line) + "\n" for line in taught))
    return folder


SERIES = """
name = "tiny"
[study]
repeats = 2
problems = { source = "two-step", limit = 8 }
eval_sets = [
    { name = "test", source = "{data}/test.jsonl" },
    { name = "corrected", source = "{data}/corrected.jsonl" },
]
student = { model = "{data}/student", dtype = "float32", device = "cpu" }
eval = { max_new_tokens = 60, slots = 2, n_bootstrap = 200 }
[study.train]
lora_r = 4
lora_alpha = 8
lora_dropout = 0.0
learning_rate = 0.01
epochs = 2
batch_size = 2
gradient_accumulation = 2
checkpoint_every = 1
[study.teachers]
human = { provider = "human" }
told = { provider = "recorded", path = "{data}/teacher.jsonl" }
gone = { provider = "recorded", path = "{data}/no-such-file.jsonl" }
[[steps]]
study = "fast"
asks = "Who teaches?"
students = ["human", "told"]
[[steps]]
study = "slow"
asks = "And slowly?"
students = ["human"]
with = { train = { learning_rate = 0.001 } }
[[steps]]
study = "fast"
asks = "By luck?"
students = ["human.seed1"]
[estimate]
machine = "a test"
start_s = 10
train_tokens_per_s = 100
decode_tokens_per_s = 50
answer_tokens = 20
answers = { test = 6, corrected = 0 }
example_tokens = { human = 50 }
"""


@pytest.fixture(scope="module")
def series_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("series") / "tiny.toml"
    path.write_text(SERIES)
    return path


@pytest.fixture(scope="module")
def whole(data, series_file, tmp_path_factory) -> Path:
    "The whole series, run without a break"
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run_series(load_series(series_file), data, out) == {}
    return out


def scores(out: Path) -> dict:
    "All results without times"
    found = {}
    for path in sorted(out.glob("*/results.json")):
        results = read_json(path)
        for block in (results, *results.pop("other_problem_sets", [])):
            for row in block["variants"]:
                kept = {k: v for k, v in row.items() if not k.endswith("_wall_s")}
                found[path.parent.name, block["problem_set"], row["variant"]] = kept
    return found


# --- what is read


def test_reference_files_are_whole():
    for name, n_studies in (("reference", 11), ("reference-small", 3), ("reference-slice", 1)):
        series = load_series(ROOT / "configs" / f"{name}.toml")
        studies = {row.study: study_of(series, row.study, "data", "out") for row in rows_of(series)}
        assert len(studies) >= n_studies
        assert all(
            set(s.name for s in study.eval_sets) <= set(series.estimate.answers)
            for study in studies.values()
        )
        assert (
            rows_of(series)[0].variant == "base"
            and "prompts and graders" in rows_of(series)[0].asks
        ), "the baseline gate comes first"


def test_reference_varies_one_thing_at_a_time():
    "Each study differs from the first in what its name says and in nothing else"
    series = load_series(ROOT / "configs" / "reference.toml")
    first = study_of(series, "lora").model_dump(exclude={"name", "description"})
    changed = {
        name: {
            f"{part}.{key}"
            for part, value in study_of(series, name)
            .model_dump(exclude={"name", "description"})
            .items()
            if isinstance(value, dict)
            for key in value
            if value[key] != first[part].get(key)
        }
        for name in dict.fromkeys(row.study for row in rows_of(series))
    }
    assert changed["recipe"] == changed["lora-2e-4"] == {"train.learning_rate"}
    assert changed["lora-100"] == changed["lora-all"] == {"problems.limit"}
    assert changed["equal-tokens"] == {"train.max_tokens_total"} and changed["equal-problems"] == {
        "train.max_examples"
    }
    assert changed["all-texts"] == {"generate.keep_wrong"}
    assert (
        changed["recipe-all"] == changed["recipe-100"] == {"problems.limit", "train.learning_rate"}
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('students = ["human", "told"]', 'students = ["humann"]', "did you mean 'human'"),
        ('["human.seed1"]', '["human.seed2"]', "human.seed2"),
        ('asks = "By luck?"', 'asks = "?"\nwith = { seed = 3 }', "has settings of its own already"),
        ("learning_rate = 0.001", "learnin_rate = 0.001", "did you mean 'learning_rate'"),
        ("[estimate]", "[estimates]", "estimate"),
        ("name = ", "name == ", "not a TOML file"),
    ],
)
def test_mistakes_are_sentences(tmp_path, old, new, words):
    (tmp_path / "x.toml").write_text(SERIES.replace(old, new, 1))
    with pytest.raises(InputError, match=words.replace("'", ".")):
        load_series(tmp_path / "x.toml")


def test_like_lays_one_series_over_another(tmp_path, series_file):
    shutil.copy(series_file, tmp_path / "tiny.toml")
    (tmp_path / "more.toml").write_text(
        'like = "tiny.toml"\nname = "more"\n[study.train]\nepochs = 5\n'
    )
    study = study_of(load_series(tmp_path / "more.toml"), "slow")
    assert (study.train.epochs, study.train.learning_rate, study.train.lora_r) == (5, 0.001, 4)
    assert merged({"a": {"x": 1}, "b": 1}, {"a": {}}) == {"a": {}, "b": 1}, "an empty table empties"


def test_estimates_add_up(series_file):
    series = load_series(series_file)
    assert estimate_s(series, Row("fast", "base", "")) == 10 + 6 * 20 / 50
    assert estimate_s(series, Row("fast", "base", ""), shared=True) == 0
    assert estimate_s(series, Row("fast", "human.seed1", "")) == 10 + 2 * 8 * 50 / 100 + 6 * 20 / 50
    assert estimate_s(series, Row("fast", "told", "")) == 10 + 2 * 8 * 300 / 100 + 6 * 20 / 50


# --- what is done, and done once


def test_every_row_is_scored_and_base_only_once(whole):
    assert [row.name for row in rows_of(load_series_of(whole))] == [
        "fast/base",
        "fast/human",
        "fast/told",
        "slow/base",
        "slow/human",
        "fast/human.seed1",
    ]
    found = scores(whole)
    assert {(study, variant) for study, _, variant in found} == {
        ("fast", "base"),
        ("fast", "human"),
        ("fast", "told"),
        ("fast", "human.seed1"),
        ("slow", "base"),
        ("slow", "human"),
    }
    times = [
        read_json(whole / study / "run.json")["stages"]["eval test/base"]["finished_at"]
        for study in ("fast", "slow")
    ]
    wall = [
        read_json(whole / study / "evals" / "base" / "test.stage.json")["finished_at"]
        for study in ("fast", "slow")
    ]
    assert times[0] == times[1] and wall[0] == wall[1], (
        "the second study has the first one's scores"
    )
    logs = [
        read_json(whole / study / "students" / "human" / "training_log.json")["final_train_loss"]
        for study in ("fast", "slow")
    ]
    assert logs[0] != logs[1]
    assert list(whole.glob("*/students/*/adapter")) and not list(
        whole.glob("*/students/*/checkpoints")
    ), "disks are small"


def load_series_of(whole: Path):
    "The series that a results folder was made from"
    path = whole.parent / "again.toml"
    path.write_text(SERIES)
    return load_series(path)


def test_same_questions_are_graded_again_not_decoded_again(whole):
    test, corrected = (
        read_parquet(whole / "fast" / "evals" / "human" / f"{name}.parquet")
        for name in ("test", "corrected")
    )
    assert list(corrected["question"]) == list(test["question"][1:5]) and list(
        corrected["completion"]
    ) == list(test["completion"][1:5])
    assert set(corrected["reference_answer"]) == {"777"} and not corrected["is_correct"].any()
    facts = read_json(whole / "fast" / "evals" / "human" / "corrected.stage.json")["facts"]
    assert facts["answers_from"] == "test" and facts["n"] == 4 and facts["wall_s"] < 5


def test_a_finished_series_is_left_alone_even_without_its_weights(
    whole, data, series_file, tmp_path
):
    shutil.copytree(whole, tmp_path / "out")
    for folder in (tmp_path / "out").glob("*/students/*/adapter"):
        shutil.rmtree(folder)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet")}
    assert run_series(load_series(series_file), data, tmp_path / "out") == {}
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet")}


def test_half_a_row_goes_when_its_weights_are_gone(whole, data, series_file, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    run = RunFolder(out / "slow")
    marker = run.eval_dir("human") / "row.stage.json"
    write_json(
        marker, {k: v for k, v in read_json(marker).items() if k != "facts"} | {"state": "running"}
    )
    shutil.rmtree(run.adapter("human"))
    assert run_series(load_series(series_file), data, out, only=["slow"]) == {}
    assert run.adapter("human").exists() and scores(out) == scores(whole)


def test_a_row_that_fails_stops_no_other(data, series_file, tmp_path):
    series = load_series(series_file)
    series = series.model_copy(
        update={"steps": [Step(study="fast", asks="?", students=["gone", "human"])]}
    )
    failures = run_series(series, data, tmp_path / "out")
    assert list(failures) == ["fast/gone"] and "no recording at" in failures["fast/gone"]
    broken = RunFolder(tmp_path / "out" / "fast")
    write_json(
        broken.teacher_dir("human") / "generate.stage.json",
        read_json(broken.teacher_dir("human") / "generate.stage.json") | {"facts": {}},
    )  # as an older version might have left it
    (broken.eval_dir("human") / "row.stage.json").unlink()
    assert "TypeError" in run_series(series, data, tmp_path / "out")["fast/human"]
    states = rows_table(series, tmp_path / "out").set_index("student")["state"].to_dict()
    assert states == {"base": "run", "gone": "failed", "human": "run"}


def test_changed_settings_are_refused(whole, data, series_file, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    series = load_series(series_file)
    other = series.model_copy(update={"study": merged(series.study, {"train": {"epochs": 1}})})
    failures = run_series(other, data, tmp_path / "out", only=["fast/human"])
    assert "epochs" in failures["fast/human"] and scores(tmp_path / "out") == scores(whole)


# --- what survives


def test_killed_at_any_point_it_goes_on(whole, data, series_file, tmp_path):
    """kill -9 in training and in scoring; the third call ends with the same numbers as an unbroken
    run"""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "cot_distill.batch.series",
        str(series_file),
        "--data",
        str(data),
        "--out",
        str(out),
        "--only",
        "fast/human",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    marker = out / "fast" / "evals" / "human" / "row.stage.json"
    for sign in ("fast/students/human/checkpoints/checkpoint-*", "fast/evals/human/.parts/*.jsonl"):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list(out.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"killed before it was over: {sign}"
        assert not marker.exists() or read_json(marker)["state"] == "running"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [
        [
            step["loss"]
            for step in read_json(folder / "fast" / "students" / "human" / "training_log.json")[
                "steps"
            ]
        ]
        for folder in (out, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    answers = [
        read_parquet(folder / "fast" / "evals" / "human" / "test.parquet")
        for folder in (out, whole)
    ]
    assert answers[0].equals(answers[1])


# --- what several machines make together


def test_two_machines_make_one_result(whole, data, series_file, tmp_path):
    series = load_series(series_file)
    for name, only in (
        ("a", ["fast/base", "fast/human"]),
        ("b", ["slow", "fast/told", "fast/human.seed1"]),
    ):
        run_series(series, data, tmp_path / name, only, tmp_path / f"{name}.tar.gz")
    with tarfile.open(tmp_path / "b.tar.gz") as tar:
        names = tar.getnames()
    assert not [n for n in names if "adapter" in n or "checkpoint" in n or "rationales" in n], (
        "no weights, no teachers' texts"
    )
    taken = merge_results(tmp_path / "both", [tmp_path / "a.tar.gz", tmp_path / "b.tar.gz"])
    assert sorted(taken) == sorted(row.name for row in rows_of(series))
    assert scores(tmp_path / "both") == scores(whole)
    assert merge_results(tmp_path / "both", [tmp_path / "a.tar.gz", tmp_path / "b"]) == []
    assert run_series(series, data, tmp_path / "both") == {}, "and nothing is left to do"


def test_a_shared_baseline_reaches_every_study_that_is_merged(data, series_file, tmp_path):
    run_series(load_series(series_file), data, tmp_path / "a", ["fast/base"], tmp_path / "a.tar.gz")
    run_series(load_series(series_file), data, tmp_path / "a", ["slow"], tmp_path / "b.tar.gz")
    merge_results(tmp_path / "both", [tmp_path / "b.tar.gz", tmp_path / "a.tar.gz"])
    assert scores(tmp_path / "both") == scores(tmp_path / "a")
    assert scores(tmp_path / "both")["slow", "test", "human"]["vs_base"]


def test_markers_alone_keep_a_machine_from_doing_a_row_again(whole, data, series_file, tmp_path):
    pack_results(whole, tmp_path / "markers.tar.gz", rows=["fast/base"])
    merge_results(tmp_path / "out", [tmp_path / "markers.tar.gz"])
    assert run_series(load_series(series_file), data, tmp_path / "out") == {}
    assert not list((tmp_path / "out").glob("*/students/*/adapter"))
    assert set(scores(tmp_path / "out")) == {
        ("fast", "test", "base"),
        ("fast", "corrected", "base"),
    }
    assert "slow/human" in merge_results(tmp_path / "out", [whole]), (
        "the scores can still be brought"
    )
    assert scores(tmp_path / "out") == scores(whole)


def test_rows_that_do_not_agree_are_not_merged(whole, data, series_file, tmp_path):
    series = load_series(series_file)
    other = series.model_copy(update={"study": merged(series.study, {"train": {"epochs": 1}})})
    run_series(other, data, tmp_path / "other", only=["fast/base", "fast/human"])
    with pytest.raises(InputError, match=r"train\.epochs: 2.* -> 1"):
        merge_results(whole, [tmp_path / "other"])
    with pytest.raises(InputError, match="neither"):
        merge_results(tmp_path / "x", [series_file])


def test_a_row_is_known_by_content_not_by_place(data, series_file, tmp_path):
    shutil.copytree(data, tmp_path / "moved")
    series = load_series(series_file)
    here, there = (
        row_inputs(study_of(series, "fast", place), "told") for place in (data, tmp_path / "moved")
    )
    assert here == there
    (tmp_path / "moved" / "teacher.jsonl").write_text(
        (data / "teacher.jsonl").read_text().replace("First", "Then")
    )
    assert row_inputs(study_of(series, "fast", tmp_path / "moved"), "told") != here


def test_command_line(whole, series_file, capsys, tmp_path):
    assert main([str(series_file), "--out", str(whole), "--list"]) == 0
    assert "6 of 6 rows run" in capsys.readouterr().out
    assert main([str(series_file), "--out", str(tmp_path / "none"), "--list"]) == 0
    assert "0 of 6 rows run" in capsys.readouterr().out
    assert main([str(series_file), "--out", str(tmp_path / "none"), "--only", "fats"]) == 2
    assert "no study or row fats" in capsys.readouterr().err


# --- texts


def test_the_student_s_right_answers_become_a_recording(tmp_path, series_file, data):
    study = study_of(load_series(series_file), "fast", data)
    from cot_distill.core.runs import open_run

    run = open_run(tmp_path / "run", study)
    rows = [
        ("q1", 0, "wrong", False, False),
        ("q1", 1, "right", True, False),
        ("q2", 0, "first", True, False),
        ("q2", 1, "second", True, False),
        ("q3", 0, "cut", False, True),
        ("q3", 1, "bad", False, False),
    ]
    table = pd.DataFrame(
        rows, columns=["question", "sample_idx", "completion", "is_correct", "truncated"]
    ).assign(n_tokens=3)
    write_parquet(run.eval_dir("base") / "samples" / "train.parquet", table)
    assert record_answers(run, "train", tmp_path / "self.jsonl") == 2
    kept = [json.loads(line) for line in (tmp_path / "self.jsonl").read_text().splitlines()]
    assert [(r["question"], r["completion"], r["finish_reason"]) for r in kept] == [
        ("q1", "right", "stop"),
        ("q2", "first", "stop"),
        ("q3", "cut", "length"),
    ]


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        ("She has <<2+3=5>>5 eggs.\n#### 5", "She has 5 eggs.\nThe answer is \\boxed{5}."),
        ("No mark here, 5.", "No mark here, 5.\nThe answer is \\boxed{5}."),
    ],
)
def test_a_human_text_in_the_student_s_own_form(solution, text):
    problem = Problem("p", "q", "5", solution)
    teacher = HumanTeacher(
        TeacherConfig(
            provider="human", calculator_marks=False, answer_line="The answer is \\boxed{{answer}}."
        )
    )
    assert asyncio.run(teacher.ask(Question(problem, 0, []))).text == text


def test_results_of_another_machine_are_gone_on_with_where_the_data_lie_elsewhere(
    whole, data, series_file, tmp_path
):
    series = load_series(series_file)
    run_series(series, data, tmp_path / "there", ["fast/human"], tmp_path / "there.tar.gz")
    merge_results(tmp_path / "here", [tmp_path / "there.tar.gz"])
    shutil.copytree(data, tmp_path / "elsewhere" / "moved")
    assert (
        run_series(
            series, tmp_path / "elsewhere" / "moved", tmp_path / "here", ["fast/human", "fast/told"]
        )
        == {}
    )
    assert {k: scores(tmp_path / "here")[k]["n_correct"] for k in scores(tmp_path / "here")} == {
        k: v["n_correct"]
        for k, v in scores(whole).items()
        if k[0] == "fast" and k[2] in ("human", "told")
    }


# --- the reference study itself, on the real data


DATA = Path(os.environ.get("COT_DISTILL_DATA", ROOT.parent / "shared" / "data"))


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "teachers").is_dir(),
    reason="COT_DISTILL_DATA names no folder with GSM8K and the recorded teachers",
)
def test_the_reference_study_runs_on_real_data(tmp_path):
    """Every study and every student once, with random weights of a million parameters, few examples
    and few problems"""
    series = load_series(ROOT / "configs" / "reference.toml")
    make_student(tmp_path / "student", hidden=32, layers=1)
    n_test = [{"limit": 20}, {"limit": 16}, {"limit": 4}]
    smaller = {
        "problems": {"limit": 24},
        "eval_sets": [s | n for s, n in zip(series.study["eval_sets"], n_test, strict=True)],
        "student": {
            "model": str(tmp_path / "student"),
            "quantization": "none",
            "dtype": "float32",
            "device": "cpu",
        },
        "generate": {
            "keep_wrong": True
        },  # a random student is never right, and shall be its own teacher
        "train": {"lora_r": 4, "lora_alpha": 8},
        "eval": {"max_new_tokens": 12, "slots": 20, "n_bootstrap": 200},
    }
    fewer = {"problems": {"limit": 12}}

    def smaller_step(step: Step) -> Step:
        settings = merged(step.settings, fewer if "problems" in step.settings else {})
        for eval_set in settings.get("eval_sets", []):
            eval_set["limit"] = 12
        return step.model_copy(update={"settings": settings})

    series = series.model_copy(
        update={
            "study": merged(series.study, smaller),
            "steps": [smaller_step(s) for s in series.steps],
        }
    )
    assert (
        run_series(series, DATA, tmp_path / "out", ["self-samples"], tmp_path / "out.tar.gz") == {}
    )
    recording = tmp_path / "out" / "self.jsonl"
    assert len(recording.read_text().splitlines()) == 12
    recording.write_text(
        recording.read_text().replace('"length"', '"stop"')
    )  # a random student never comes to an end
    chosen: list[Row] = []
    for row in rows_of(series):
        known = {
            name
            for other in chosen
            if other.variant != "base"
            for name in (other.study, other.variant)
        }
        chosen += [row] if row.variant == "base" or not {row.study, row.variant} <= known else []
    assert (
        run_series(
            series, DATA, tmp_path / "out", [row.name for row in chosen], tmp_path / "rest.tar.gz"
        )
        == {}
    )
    table = rows_table(series, tmp_path / "out")
    table = table[table["state"] == "run"]
    assert len(table) == len(chosen) and set(table["student"]) == {
        row.variant for row in rows_of(series)
    }
    assert (
        table[table["student"] == "base"].groupby("study")["n"].first().drop("self-samples") == 20
    ).all()
    once = {
        read_json(p)["finished_at"]
        for p in (tmp_path / "out").glob("*/evals/base/gsm8k.stage.json")
    }
    assert len(once) == 1, "one untrained student, scored once"
    facts = [
        read_json(p)["facts"]["answers_from"]
        for p in (tmp_path / "out").glob("*/evals/*/gsm8k-platinum.stage.json")
    ]
    assert set(facts) == {"gsm8k"} and len(facts) == len(table) - 1
    merge_results(tmp_path / "there", [tmp_path / "rest.tar.gz", tmp_path / "out.tar.gz"])
    assert scores(tmp_path / "there") == scores(tmp_path / "out")
