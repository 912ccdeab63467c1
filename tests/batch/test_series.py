"""The series: what is read, what is done once, what survives a kill, what several machines make
together"""

import asyncio
import io
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
from places import DATA, ROOT
from rich.console import Console
from tiny_student import make_student

from cot_distill.asking.replies import Question
from cot_distill.batch.other_runs import merge
from cot_distill.batch.plan import estimate_seconds, find_done, plan_jobs
from cot_distill.batch.run import prepare_batch, record_answers, run_prepared
from cot_distill.batch.series import load_series
from cot_distill.batch.view import rows_listing, rows_table
from cot_distill.cli import main
from cot_distill.core.errors import InputError
from cot_distill.core.files import read_json, read_parquet, write_parquet
from cot_distill.core.inputs import stage_state
from cot_distill.core.problems import Problem, load_problems
from cot_distill.core.runs import RunFolder
from cot_distill.core.settings import TeacherConfig
from cot_distill.teachers import HumanTeacher


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


def run(
    series: Path, data: Path, out: Path, *only: str, limit: int | None = None, **options: str
) -> tuple[int, dict]:
    "Exit code, and why jobs failed: the stages called in this process"
    how = {"limit": limit, "run_dir": out, "data": data, "overrides": options}
    batch = prepare_batch(series, only=only, executor="inline", **how)
    code = run_prepared(batch, Console(file=io.StringIO()), executor="inline")
    return code, {job.name: job.error["evalue"] for job in batch.jobs if job.error}


@pytest.fixture(scope="module")
def whole(data, series_file, tmp_path_factory) -> Path:
    "The whole series, run without a break"
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(series_file, data, out) == (0, {})
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
    n_of = {"reference": 11, "checks/reference-small": 3}
    for name, n_studies in n_of.items():
        series = load_series(ROOT / "configs" / f"{name}.toml", data="data")
        assert len(series.studies) >= n_studies
        assert all(
            {s.name for s in study.eval_sets} <= set(series.estimate.answers)
            for study in series.studies.values()
        )
        first = series.rows[0]
        assert first.variant == "base" and "prompt" in first.asks, "the baseline gate comes first"


def test_reference_varies_one_thing_at_a_time():
    "Each study differs from the first in what its name says and in nothing else"
    series = load_series(ROOT / "configs" / "reference.toml", data="data")
    first = series.studies["lora"].model_dump(exclude={"name", "description"})
    changed = {
        name: {
            f"{part}.{key}"
            for part, value in study.model_dump(exclude={"name", "description"}).items()
            if isinstance(value, dict)
            for key in value
            if value[key] != first[part].get(key)
        }
        for name, study in series.studies.items()
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


def test_the_half_study_is_a_series(tmp_path):
    "The rows, in their order, with rates that the file states; the student's own texts come last"
    series = load_series(ROOT / "configs" / "half.toml", data="data", folder=tmp_path)
    names = [row.name for row in series.rows]
    assert names[:4] == ["gate/base", "half/base", "half/human", "half/gpt-4o-mini"]
    assert names.index("self-samples/base") < names.index("half/self")
    jobs = {job.name: job for job in plan_jobs(series)}
    assert jobs["half generate self"].needs == ("self-samples eval base",)
    assert jobs["self-samples eval base"].recording == tmp_path / "self.jsonl"
    assert len(list(rows_listing(rows_table(series)))) == len(names) + 1
    (tmp_path / "self.jsonl").write_text("{}\n")  # it lies beside the runs, not in one of them
    assert "self-samples analyze" not in find_done(list(jobs.values()))


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
    study = load_series(tmp_path / "more.toml").studies["slow"]
    assert (study.train.epochs, study.train.learning_rate, study.train.lora_r) == (5, 0.001, 4)
    changed = load_series(tmp_path / "more.toml", overrides={"train.epochs": "7"}, limit=3)
    assert {(s.train.epochs, s.problems.limit) for s in changed.studies.values()} == {(7, 3)}
    assert changed.folder == Path("runs/more-limit3")


def test_estimates_add_up(series_file, data, tmp_path):
    series = load_series(series_file, data, tmp_path)
    jobs = {job.name: job for job in plan_jobs(series)}

    def seconds(name: str) -> float:
        return estimate_seconds(jobs[name], stated=series.estimate)[0]

    assert seconds("fast eval base") == 10 + 6 * 20 / 50
    assert seconds("slow eval base") == 0, "shared with the first study"
    assert seconds("fast train human.seed1") == 2 * 8 * 50 / 100
    assert seconds("fast eval human.seed1") == 10 + 6 * 20 / 50
    assert seconds("fast train told") == 2 * 8 * 300 / 100


# --- what is done, and done once


def test_every_row_is_scored_and_base_only_once(whole):
    found = scores(whole)
    assert {(study, variant) for study, _, variant in found} == {
        ("fast", "base"),
        ("fast", "human"),
        ("fast", "told"),
        ("fast", "human.seed1"),
        ("slow", "base"),
        ("slow", "human"),
    }
    runs = [RunFolder(whole / study) for study in ("fast", "slow")]
    times = [read_json(run.run_json)["stages"]["eval test/base"]["finished_at"] for run in runs]
    ends = [read_json(run.eval_dir("base") / "test.stage.json")["finished_at"] for run in runs]
    assert times[0] == times[1] and ends[0] == ends[1], (
        "the second study has the first one's scores"
    )
    losses = [read_json(run.training_log("human"))["final_train_loss"] for run in runs]
    assert losses[0] != losses[1]
    assert list(whole.glob("*/students/*/adapter"))
    assert not list(whole.glob("*/students/*/checkpoints")), "disks are small"


def test_same_questions_are_graded_again_not_decoded_again(whole):
    folder = RunFolder(whole / "fast").eval_dir("human")
    test, corrected = (read_parquet(folder / f"{name}.parquet") for name in ("test", "corrected"))
    assert list(corrected["question"]) == list(test["question"][1:5])
    assert list(corrected["completion"]) == list(test["completion"][1:5])
    assert set(corrected["reference_answer"]) == {"777"} and not corrected["is_correct"].any()
    facts = read_json(folder / "corrected.stage.json")["facts"]
    assert facts["answers_from"] == "test" and facts["n"] == 4 and facts["wall_s"] < 5


def test_a_finished_series_is_left_alone_even_without_its_weights(
    whole, data, series_file, tmp_path
):
    shutil.copytree(whole, tmp_path / "out")
    for folder in (tmp_path / "out").glob("*/students/*/adapter"):
        shutil.rmtree(folder)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet")}
    assert run(series_file, data, tmp_path / "out") == (0, {})
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet")}


def test_a_row_is_done_again_when_scores_and_weights_are_gone(whole, data, series_file, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    slow = RunFolder(out / "slow")
    shutil.rmtree(slow.eval_dir("human"))
    shutil.rmtree(slow.adapter("human"))
    assert run(series_file, data, out, "slow") == (0, {})
    assert slow.adapter("human").exists() and scores(out) == scores(whole)


def test_a_row_that_fails_stops_no_other_and_is_written_down(data, tmp_path):
    series = tmp_path / "x.toml"
    series.write_text(SERIES.replace('["human", "told"]', '["gone", "human"]'))
    code, failures = run(series, data, tmp_path / "out", "fast/base", "fast/gone", "fast/human")
    assert code == 2 and list(failures) == ["fast generate gone"]
    assert "no recording at" in failures["fast generate gone"]
    table = rows_table(load_series(series, data, tmp_path / "out")).set_index(["study", "student"])
    states = {name: row["state"] for name, row in table.iterrows()}
    assert states["fast", "gone"] == "failed" and states["slow", "human"] == "not run"
    assert states["fast", "base"] == states["fast", "human"] == "run"
    assert "no recording at" in table.loc[("fast", "gone"), "why"]


def test_without_a_baseline_nothing_is_trained(data, tmp_path):
    series = tmp_path / "x.toml"
    series.write_text(SERIES.replace("{data}/corrected.jsonl", "{data}/none.jsonl"))
    code, failures = run(series, data, tmp_path / "out", "fast/base", "fast/human")
    assert code == 2 and "no problem file" in failures["fast eval base"]
    assert not list((tmp_path / "out").glob("*/students"))


def test_changed_settings_are_refused(whole, data, series_file, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(InputError, match="epochs"):
        run(series_file, data, tmp_path / "out", "fast/human", **{"train.epochs": "1"})
    assert scores(tmp_path / "out") == scores(whole)


# --- what survives


def test_killed_at_any_point_it_goes_on(whole, data, series_file, tmp_path):
    "kill -9 in training and in scoring; the third call ends as an unbroken run does"
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cot_distill.cli", "run", str(series_file)]
    command += ["--data", str(data), "--run-dir", str(out), "--only", "fast/base,fast/human"]
    command += ["--executor", "inline"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    fast = RunFolder(out / "fast")
    for sign in ("fast/students/human/checkpoints/checkpoint-*", "fast/evals/human/.parts/*.jsonl"):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list(out.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"killed before it was over: {sign}"
        assert stage_state(fast.eval_dir("human"), "corrected") == "missing"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [fast, RunFolder(whole / "fast")]
    losses = [[s["loss"] for s in read_json(r.training_log("human"))["steps"]] for r in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    answers = [read_parquet(r.eval_file("human", "test")) for r in runs]
    assert answers[0].equals(answers[1])


# --- what several machines make together


def pack(out: Path, *left_out: str) -> Path:
    "An archive of a series, as `tar czf` with `--exclude` makes it"

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if set(left_out) & set(Path(member.name).parts) else member

    with tarfile.open(out.with_suffix(".tar.gz"), "w:gz") as tar:
        tar.add(out, arcname=out.name, filter=kept)
    return out.with_suffix(".tar.gz")


def test_two_machines_make_one_result(whole, data, series_file, tmp_path):
    parts = {
        "a": ["fast/base", "fast/human"],
        "b": ["slow", "fast/told", "fast/human.seed1"],
    }
    for name, only in parts.items():
        assert run(series_file, data, tmp_path / name, *only) == (0, {})
    archive = pack(tmp_path / "b", "adapter", "checkpoints", "rationales.parquet")
    taken = merge(tmp_path / "both", [pack(tmp_path / "a", "adapter"), archive])
    assert {"fast/evals/human/test", "slow/students/human/train"} <= set(taken)
    assert scores(tmp_path / "both") == scores(whole)
    assert merge(tmp_path / "both", [tmp_path / "a.tar.gz", archive]) == []
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "both").rglob("*.parquet")}
    assert run(series_file, data, tmp_path / "both") == (0, {}), "nothing is left to do"
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "both").rglob("*.parquet")}


def test_rows_that_do_not_agree_are_not_merged(whole, data, series_file, tmp_path):
    only = ("fast/base", "fast/human")
    run(series_file, data, tmp_path / "other", *only, **{"train.epochs": "1"})
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(InputError, match=r"train\.epochs: 2.* -> 1"):
        merge(tmp_path / "out", [tmp_path / "other"])
    with pytest.raises(InputError, match="neither"):
        merge(tmp_path / "x", [series_file])


def test_results_of_another_machine_are_gone_on_with_where_the_data_lie_elsewhere(
    whole, data, series_file, tmp_path
):
    only = ("fast/base", "fast/human")
    assert run(series_file, data, tmp_path / "there", *only) == (0, {})
    merge(tmp_path / "here", [pack(tmp_path / "there", "adapter")])
    shutil.copytree(data, tmp_path / "elsewhere" / "moved")
    moved = tmp_path / "elsewhere" / "moved"
    assert run(series_file, moved, tmp_path / "here", *only, "fast/told") == (0, {})
    here, expected = scores(tmp_path / "here"), scores(whole)
    assert {k: v["n_correct"] for k, v in here.items()} == {
        k: expected[k]["n_correct"] for k in here
    }
    assert {variant for _, _, variant in here} == {"base", "human", "told"}


def test_the_command_lists_and_refuses(whole, series_file, capsys, tmp_path):
    def call(*words: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(["run", str(series_file), *words])
        return left.value.code

    assert call("--run-dir", str(whole), "--list") == 0
    assert "6 of 6 rows run" in capsys.readouterr().out
    assert call("--run-dir", str(tmp_path / "none"), "--list") == 0
    assert "0 of 6 rows run" in capsys.readouterr().out
    assert call("--run-dir", str(tmp_path / "none"), "--only", "fats") == 2
    assert "no study or row fats" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_inline_executor_needs_no_jupyter(whole, data, series_file, tmp_path):
    "A machine with torch, transformers and a few wheels: what only reports need is not there"
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "fast" / "evals" / "told")
    code = (
        "import sys\n"
        "for name in ('papermill', 'nbformat', 'nbconvert', 'nbclient', 'jupyter_client', "
        "'IPython',"
        " 'ipykernel', 'matplotlib', 'openai', 'google', 'datasets', 'bs4', 'nh3', 'dotenv'):\n"
        "    sys.modules[name] = None\n"
        "from cot_distill.cli import main\n"
        "main(sys.argv[1:])"
    )
    words = ["run", series_file, "--data", data, "--run-dir", tmp_path / "out"]
    words += ["--only", "fast/told", "--executor", "inline"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert scores(tmp_path / "out") == scores(whole)


# --- texts


def test_the_student_s_right_answers_become_a_recording(tmp_path, series_file, data):
    study = load_series(series_file, data).studies["fast"]
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


# --- the reference study itself, on the real data


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "teachers").is_dir(),
    reason="COT_DISTILL_DATA names no folder with GSM8K and the recorded teachers",
)
def test_the_reference_study_runs_on_real_data(tmp_path):
    "Every study and every student once: a million random parameters, few examples, few problems"
    make_student(tmp_path / "student", hidden=32, layers=1)
    series, out = tmp_path / "reference.toml", tmp_path / "out"
    sizes = "".join(f"[study.eval_sets.{i}]\nlimit = {n}\n" for i, n in enumerate((20, 16, 4)))
    series.write_text(f"like = '{ROOT / 'configs' / 'reference.toml'}'\n{sizes}")
    changes = {
        "student.model": str(tmp_path / "student"),
        "student.quantization": "none",
        "student.dtype": "float32",
        "student.device": "cpu",
        "generate.keep_wrong": "true",  # a random student is never right, and shall teach itself
        "train.lora_r": "4",
        "train.lora_alpha": "8",
        "eval.max_new_tokens": "12",
        "eval.slots": "20",
        "eval.n_bootstrap": "200",
    }
    few = dict(limit=20, **changes)
    assert run(series, DATA, out, "self-samples", **few) == (0, {})
    recording = out / "self.jsonl"
    assert len(recording.read_text().splitlines()) == 20
    whole = recording.read_text().replace('"length"', '"stop"')
    recording.write_text(whole)  # a random student never comes to an end
    chosen: list = []
    for row in load_series(series).rows:
        known = {name for r in chosen if r.variant != "base" for name in (r.study.name, r.variant)}
        is_new = row.variant == "base" or not {row.study.name, row.variant} <= known
        chosen += [row] if is_new else []
    assert run(series, DATA, out, *(row.name for row in chosen), **few) == (0, {})
    table = rows_table(load_series(series, DATA, out))
    table = table[table["state"] == "run"]
    assert len(table) == len(chosen)
    bases = table[table["student"] == "base"].groupby("study")["n"].first()
    assert (bases.drop("self-samples") == 20).all()
    ends = {read_json(p)["finished_at"] for p in out.glob("*/evals/base/gsm8k.stage.json")}
    assert len(ends) == 1, "one untrained student, scored once"
    regraded = list(out.glob("*/evals/*/gsm8k-platinum.stage.json"))
    assert {read_json(p)["facts"]["answers_from"] for p in regraded} == {"gsm8k"}
    asked = [row for row in chosen if "gsm8k-platinum" in {s.name for s in row.study.eval_sets}]
    assert len(regraded) == len(asked)
    merge(tmp_path / "there", [out])
    assert scores(tmp_path / "there") == scores(out)
