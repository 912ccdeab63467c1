"The batch: what it does, what it leaves alone, and what it survives"

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import stand_ins
from rich.console import Console
from stand_ins import (
    NO_PAGES,
    PARAMETERS,
    assert_all_end,
    make_project,
    names,
    orders,
    prepare,
    processes_of,
    results,
    run,
    seen,
    wait_for,
    write_notebook,
)

from cot_distill.batch.execute import failure
from cot_distill.batch.executors import Executor, Places, make_private_folder, visible_gpus
from cot_distill.batch.plan import Job, estimate_seconds
from cot_distill.batch.report import report_finished, secret_values, trim_chapter
from cot_distill.batch.run import Batch, advance, prepare_batch
from cot_distill.batch.view import batch_table, exit_code, plan_report, seconds_left
from cot_distill.core.config import load_study
from cot_distill.core.errors import InputError
from cot_distill.core.files import locked, write_json
from cot_distill.core.runs import open_run


def launch(study: Path, *more: str) -> subprocess.Popen:
    "The same in a process of its own, for signals"
    code = (
        f"import sys; sys.path[:0] = {[str(Path(stand_ins.__file__).parent)]}; "
        "from pathlib import Path; from stand_ins import run; "
        "code, text = run(Path(sys.argv[1]), sys.argv[2].split(',')); print(text); sys.exit(code)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(study), ",".join(more or NO_PAGES)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def footer_of(report: Path) -> str:
    "Last cell of an executed notebook"
    cell = json.loads(report.read_text(encoding="utf-8"))["cells"][-1]
    assert cell["metadata"]["tags"] == ["provenance"]
    return cell["source"]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return make_project(tmp_path, "human")


# --- with an executor that only pretends: order, skipping, exit codes ---


class Pretender(Executor):
    "An executor whose jobs end when they are told to"

    def __init__(self, failures: dict[str, str] | None = None, places: int = 99):
        self.failures, self.places, self.order, self.busy = failures or {}, places, [], 0

    def start(self, job):
        if self.busy >= self.places:
            return None
        self.order.append(job.name)
        self.busy += 1
        return PretendedJob(self, self.failures.get(job.name))


class PretendedJob:
    def __init__(self, executor: Pretender, ename: str | None):
        self.executor, self.ename = executor, ename

    def poll(self):
        self.executor.busy -= 1
        return failure(self.ename, "told to", 1) if self.ename else {"state": "finished"}


def pretend(study: Path, executor: Pretender, **options: object) -> Batch:
    batch = prepare(study, **options)
    for _ in range(50):
        if batch.is_over:
            return batch
        advance(batch, executor)
    raise AssertionError(f"never over: {batch.states}")


def test_three_teachers_one_failing(tmp_path: Path) -> None:
    study = make_project(tmp_path, "human", "deepseek", "gemini")
    for name in ("results.json", "html/index.html"):
        write_json(tmp_path / "runs/small" / name, {})
    executor = Pretender({"generate deepseek": "ResumeLater"}, places=1)
    batch = pretend(study, executor)
    assert batch.states["train deepseek"] == batch.states["eval deepseek"] == "skipped"
    assert {state for name, state in batch.states.items() if "deepseek" not in name} == {"finished"}
    assert (
        executor.order.index("analyze")
        > executor.order.index("eval gemini")
        > executor.order.index("train gemini")
    )
    assert executor.order[-1] == "site"
    assert exit_code(batch) == 75


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ({}, 0),
        ({"train human": "InputError"}, 2),
        ({"eval base": "ResumeLater"}, 75),
        ({"eval base": "ResumeLater", "generate human": "InputError"}, 2),
        ({"eval base": "OutOfMemoryError", "generate human": "InputError"}, 1),
    ],
)
def test_exit_code_says_what_kind(study: Path, failures: dict, code: int) -> None:
    assert exit_code(pretend(study, Pretender(failures))) == code


def test_what_cannot_be_compared_is_not_trained(tmp_path: Path) -> None:
    "Where the untrained student cannot be scored, hours of training would tell nothing"
    study = make_project(tmp_path, "human", "deepseek")
    batch = pretend(study, Pretender({"eval base": "InputError"}))
    assert batch.states["generate human"] == batch.states["generate deepseek"] == "finished"
    left = ("train human", "eval human", "train deepseek", "eval deepseek", "analyze")
    assert {batch.states[name] for name in left} == {"skipped"}
    assert exit_code(batch) == 2


def test_repeats_share_texts_and_base(study: Path) -> None:
    executor = Pretender({"train human.seed1": "OutOfMemoryError"})
    batch = pretend(
        study, executor, overrides={"repeats": "2"}, stages=["generate", "train", "eval"]
    )
    assert executor.order.count("generate human") == executor.order.count("eval base") == 1
    assert {name for name, state in batch.states.items() if state == "finished"} == {
        "generate human",
        "eval base",
        "train human",
        "eval human",
    }
    assert batch.states["eval human.seed1"] == "skipped"


def test_without_any_result_nothing_is_analysed(study: Path) -> None:
    batch = pretend(study, Pretender({"eval base": "InputError"}))
    assert batch.states["analyze"] == "skipped"


def test_the_table_shows_every_state(study: Path) -> None:
    batch = pretend(study, Pretender({"train human": "InputError"}))
    scored = next(job for job in batch.jobs if job.name == "eval base")
    scored.state, scored.wall_s = "done", None
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(batch_table(batch))
    text = console.export_text()
    assert all(mark in text for mark in ("✓ done", "✗", "– skipped", "human", "base", "analyze"))


# --- notebooks checked before anything runs ---


def test_a_lost_tag_is_an_error(study: Path) -> None:
    write_notebook(study.parent / "nbs/02_train.ipynb", PARAMETERS, "1", tags=())
    with pytest.raises(InputError, match="02_train.ipynb has no cell tagged `parameters`"):
        run(study)
    assert seen(study.parent) == []


def test_a_misspelt_parameter_is_an_error(study: Path) -> None:
    write_notebook(study.parent / "nbs/03_eval.ipynb", PARAMETERS.replace("teacher", "techer"), "1")
    with pytest.raises(InputError, match="03_eval.ipynb does not declare teacher"):
        run(study)
    assert seen(study.parent) == []


def test_a_foreign_kernel_is_an_error(study: Path) -> None:
    write_notebook(study.parent / "nbs/01_generate.ipynb", PARAMETERS, "1", kernel="some-conda-env")
    with pytest.raises(InputError, match="some-conda-env"):
        run(study)


def test_a_missing_notebook_is_an_error(study: Path) -> None:
    (study.parent / "nbs/01_generate.ipynb").unlink()
    with pytest.raises(InputError, match=r"no notebook at .*01_generate\.ipynb"):
        run(study)


def test_a_full_disk_is_told_before_anything_runs(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cot_distill.batch.run.MIN_FREE_BYTES", 10**18)
    with pytest.raises(InputError, match="make room or use --run-dir"):
        run(study)


def test_another_study_in_the_folder_is_refused(study: Path) -> None:
    assert run(study, ["teachers"])[0] == 0
    with pytest.raises(InputError, match=r"train.epochs.*--run-dir"):
        prepare(study, overrides={"train.epochs": "3"})


def test_two_launchers_on_one_folder(study: Path) -> None:
    batch = prepare(study)
    open_run(batch.folder, batch.jobs[0].study)
    with (
        locked(batch.folder / ".batch.lock"),
        pytest.raises(InputError, match="another run holds"),
    ):
        run(study)


def test_a_plan_needs_no_key_and_leaves_nothing(tmp_path: Path) -> None:
    study = make_project(tmp_path / "p", "gpt", provider="gemini")
    batch = prepare(study, overrides={"train.epochs": "3"})
    assert {job.study.train.epochs for job in batch.jobs} == {3}
    assert {row["state"] for row in plan_report(batch, gpu=False)} == {"waiting"}
    assert not (tmp_path / "p/runs").exists()


def test_few_steps_are_told_once_at_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study = make_project(tmp_path, "human", "deepseek")
    prepare(study)
    assert capsys.readouterr().err.count("4 examples make 2 optimiser steps") == 1
    prepare(study, stages=["generate"])
    prepare(study, overrides={"problems.limit": "4000"})
    assert capsys.readouterr().err == ""


# --- estimates ---


def test_estimates_come_from_the_record_nearest_in_size(study: Path) -> None:
    batch = prepare(study)
    job = next(job for job in batch.jobs if job.name == "train human")
    guess, measured = estimate_seconds(job)
    assert guess > 0 and not measured
    kind = {"kind": "train smollm2-135m cpu"}
    write_json(
        study.parent / "runs/tiny/run.json",
        {"jobs": {"train human": kind | {"n": 2, "wall_s": 40, "stage_s": 2}}},
    )
    write_json(
        study.parent / "runs/huge/run.json",
        {"jobs": {"train human": kind | {"n": 4000, "wall_s": 2040, "stage_s": 2000}}},
    )
    write_json(
        study.parent / "runs/other/run.json",
        {"jobs": {"train human": {"kind": "train another cpu", "n": 8, "wall_s": 1, "stage_s": 1}}},
    )
    n = 4 * job.study.train.epochs
    assert estimate_seconds(job) == (38 + 2 * n / 2, True)
    larger = load_study(study, overrides={"train.epochs": "600"})
    assert estimate_seconds(replace(job, study=larger)) == (40 + 2000 * 2400 / 4000, True)


def test_time_left_shares_compute_out_and_adds_the_end(study: Path) -> None:
    batch = prepare(study)
    jobs = {job.name: job for job in batch.jobs}
    expected = {"teachers": 5, "generate human": 60, "analyze": 7, "site": 3}
    for name, job in jobs.items():
        job.seconds = expected.get(name, 100)
    assert seconds_left(batch) == 60 + 300 + 7 + 3
    batch.places = 2
    assert seconds_left(batch) == 60 + 150 + 7 + 3
    for name, state in {
        "eval base": "done",
        "train human": "failed",
        "eval human": "skipped",
        "generate human": "finished",
    }.items():
        jobs[name].state = state
    assert seconds_left(batch) == 5 + 7 + 3
    jobs["site"].seconds = None
    assert seconds_left(batch) is None


def test_a_run_lands_where_it_was_started_and_a_limit_is_a_run_of_its_own(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.parent)
    batch = prepare_batch(study, limit=1, nbs=study.parent / "nbs")
    assert batch.folder == Path("runs/small-limit1")
    parameters = {job.name: job.parameters for job in batch.jobs if job.notebook}
    assert parameters["train human"] == {
        "config": "../runs/small-limit1/config.toml",
        "limit": 0,
        "run_dir": "../runs/small-limit1",
        "teacher": "human",
    }
    assert {job.study.problems.limit for job in batch.jobs} == {1}


# --- with real kernels ---


def test_whole_study_then_nothing_then_only_what_is_missing(study: Path) -> None:
    folder, run_dir = study.parent, study.parent / "runs/small"
    code, text = run(study)
    assert code == 0, text
    assert sorted(names(folder)) == sorted(
        ["teachers", "generate human", "eval base", "train human", "eval human", "analyze"]
    )
    for report in (
        "00_teachers",
        "01_generate-human",
        "02_train-human",
        "03_eval-human",
        "03_eval-base",
        "04_analysis",
    ):
        facts = json.loads((run_dir / f"reports/{report}.ipynb").read_text(encoding="utf-8"))[
            "metadata"
        ]["papermill"]
        assert (
            facts["end_time"]
            and not facts["exception"]
            and "../runs/small"
            in (
                facts["parameters"].get("run_dir"),
                os.path.dirname(facts["parameters"].get("config", "")),
            )
        )
        assert not os.path.isabs(facts["output_path"]) and not os.path.isabs(facts["input_path"])
        footer = footer_of(run_dir / f"reports/{report}.ipynb")
        assert all(
            row in footer
            for row in (
                "| study | small, seed 0 |",
                "| code | cot",
                "| packages | torch",
                "| machine |",
                "seed = 0",
                'name = "small"',
            )
        )

    n, begun = len(seen(folder)), time.process_time()
    assert run(study)[0] == 0
    assert time.process_time() - begun < 3 and len(seen(folder)) == n

    first = results(study)
    (run_dir / "evals/human/test.parquet").unlink()
    assert run(study)[0] == 0
    assert names(folder, since=n) == ["eval human"]
    assert results(study) == first

    n = len(seen(folder))
    report = run_dir / "reports/02_train-human.ipynb"
    report.write_text(
        report.read_text(encoding="utf-8").replace('"end_time": "2', '"end_time": "", "x": "2'),
        encoding="utf-8",
    )
    assert run(study)[0] == 0
    assert names(folder, since=n) == ["train human"]


def test_failure_keeps_the_report_and_the_rerun_goes_on(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LESSON_API_KEY", "sk-never-to-be-seen-1234")
    folder, run_dir = study.parent, study.parent / "runs/small"
    orders(
        folder,
        train_human={"raise": "ZeroDivisionError", "message": "with key sk-never-to-be-seen-1234"},
    )
    code, text = run(study)
    report = run_dir / "reports/02_train-human.ipynb"
    assert code == 1
    assert (
        f"train human failed: ZeroDivisionError: with key [key removed] (report: {report})" in text
    )
    assert "Traceback" not in text
    assert "ZeroDivisionError" in report.read_text(encoding="utf-8")
    assert "| stage | train of human, not finished |" in footer_of(report)
    assert not report_finished(report)
    assert "eval human: skipped" in text and "analyze: finished" in text
    left = [p for p in run_dir.rglob("*") if p.is_file() and b"never-to-be-seen" in p.read_bytes()]
    assert left == []

    orders(folder)
    n = len(seen(folder))
    assert run(study)[0] == 0
    assert names(folder, since=n) == ["train human", "eval human", "analyze"]


def test_a_kernel_that_is_killed_is_a_sentence(study: Path) -> None:
    orders(study.parent, train_human={"die": True})
    code, text = run(study, ["generate", "train"])
    assert code == 1
    assert "train human failed" in text and "out of memory" in text
    orders(study.parent)
    assert run(study, ["generate", "train"])[0] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_and_saves(study: Path, number: int, code: int) -> None:
    orders(study.parent, generate_human={"seconds": 60})
    launcher = launch(study, "generate", "train")
    wait_for(study, "generate human")
    time.sleep(0.5)
    launcher.send_signal(number)
    text, _ = launcher.communicate(timeout=40)
    assert launcher.returncode == code, text
    assert "stopping; what is finished stays" in text and "generate human: stopped" in text
    assert "memory" not in text and "failed" not in text
    assert "Interrupted" in (study.parent / "runs/small/reports/01_generate-human.ipynb").read_text(
        encoding="utf-8"
    )
    assert processes_of(study) == []


def kill_until_done(study: Path, n_kills: int, rng: random.Random, longest_s: float) -> None:
    """Kill launchers at random instants, then let one finish; nothing is left running, nothing is
    wrong"""
    for _ in range(n_kills):
        launcher = launch(study)
        time.sleep(rng.uniform(0.3, longest_s))
        launcher.kill()
        launcher.communicate()
        assert_all_end(study)
    code, text = run(study)
    assert code == 0, text


def test_kill_9_leaves_no_orphans_and_the_next_run_goes_on(tmp_path: Path) -> None:
    calm, killed = (
        make_project(tmp_path / "calm", "human"),
        make_project(tmp_path / "killed", "human"),
    )
    assert run(calm)[0] == 0
    orders(killed.parent, train_human={"seconds": 2}, generate_human={"seconds": 1})
    kill_until_done(killed, 2, random.Random(1), 8)
    assert results(killed) == results(calm)


@pytest.mark.parametrize("name", ["generate human", "site"])
def test_a_launcher_that_dies_at_once_leaves_nothing(study: Path, name: str) -> None:
    "Gone before the process it started could ask to die with it"
    code = f"""
import os
from pathlib import Path
from cot_distill.batch.executors import PapermillExecutor
from cot_distill.batch.run import prepare_batch
home = Path({str(study.parent)!r})
batch = prepare_batch(home / {study.name!r}, run_dir=home / "runs/small", nbs=home / "nbs")
job = next(job for job in batch.jobs if job.name == {name!r})
(home / "runs/small").mkdir(parents=True)
PapermillExecutor(batch.jobs).start(job)
os._exit(0)
"""
    orders(study.parent, generate_human={"seconds": 30})
    subprocess.run([sys.executable, "-c", code], check=True)
    assert_all_end(study)
    assert names(study.parent) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_many_instants(tmp_path: Path, seed: int) -> None:
    calm, killed = (
        make_project(tmp_path / "calm", "human", "deepseek"),
        make_project(tmp_path / "killed", "human", "deepseek"),
    )
    assert run(calm)[0] == 0
    orders(
        killed.parent,
        train_human={"seconds": 3},
        train_deepseek={"seconds": 3},
        generate_human={"seconds": 1},
    )
    kill_until_done(killed, 6, random.Random(seed), 15)
    assert results(killed) == results(calm)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kill_9_of_a_stage(tmp_path: Path, seed: int) -> None:
    calm, killed = (
        make_project(tmp_path / "calm", "human"),
        make_project(tmp_path / "killed", "human"),
    )
    assert run(calm)[0] == 0
    rng = random.Random(seed)
    orders(killed.parent, train_human={"seconds": 2}, eval_human={"seconds": 1})
    for _ in range(4):
        launcher = launch(killed)
        time.sleep(rng.uniform(1, 6))
        if victims := processes_of(killed):
            rng.choice(victims).kill()
        text, _ = launcher.communicate(timeout=120)
        assert launcher.returncode in (0, 1), text
        assert processes_of(killed) == []
    assert run(killed)[0] == 0
    assert results(killed) == results(calm)


def test_two_gpus_train_two_students_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    study = make_project(tmp_path, "a", "b", "c", device="auto")
    for teacher in "abc":
        path = tmp_path / f"runs/small/teachers/{teacher}/rationales.parquet"
        path.parent.mkdir(parents=True)
        row = {"problem_id": "p", "sample_idx": 0, "question": "?", "completion": "", "kept": True}
        pd.DataFrame([row]).to_parquet(path)
    orders(tmp_path, train_a={"seconds": 3}, train_b={"seconds": 3})
    code, text = run(study, ["train"])
    assert code == 0, text
    first, second, third = seen(tmp_path)
    assert {first["gpu"], second["gpu"]} == {"3", "5"} and third["gpu"] in ("3", "5")
    assert third["at"] - max(first["at"], second["at"]) > 1.5


def test_hosted_teachers_are_asked_side_by_side(tmp_path: Path) -> None:
    study = make_project(tmp_path, "a", "b", "c", provider="openai")
    orders(tmp_path, **{f"generate_{t}": {"seconds": 5} for t in "abc"})
    assert run(study, ["generate"])[0] == 0
    at = [one["at"] for one in seen(tmp_path)]
    assert max(at) - min(at) < 5
    assert {one["threads"] for one in seen(tmp_path)} == {"1"}


def job_of(stage: str, variant: str | None, lane: str) -> Job:
    "A job of no study in particular"
    return Job(None, None, stage, variant, lane)


def test_places_are_shared_out() -> None:
    "One training at a time on a processor, light work beside it, and never more than asked for"
    train, other = (job_of("train", teacher, "compute") for teacher in "ab")
    light, asking = job_of("teachers", None, "light"), job_of("generate", "a", "api")
    places = Places(gpus=[], n_cores=2, n_jobs=99)
    assert places.take(train)["OMP_NUM_THREADS"] == "2" and places.take(other) is None
    assert places.take(light)["OMP_NUM_THREADS"] == "1" and places.take(asking) is not None
    places = Places(gpus=[], n_cores=2, n_jobs=1)
    assert places.take(train) and places.take(light) is None


def test_many_cores_are_shared_out_as_far_as_memory_allows() -> None:
    trains = [job_of("train", teacher, "compute") for teacher in "abc"]
    places = Places(gpus=[], n_cores=32, n_jobs=99, memory_gb=40)
    assert [(places.take(job) or {}).get("OMP_NUM_THREADS") for job in trains] == ["16", "16", None]
    small = Places(gpus=[], n_cores=2, n_jobs=99, memory_gb=24, billions=0.135)
    assert [small.take(trains[i], n)["OMP_NUM_THREADS"] for i, n in enumerate((2, 1))] == [
        "1",
        "2",
    ], "the last one to compute has nobody to share with"
    alone = Places(gpus=[], n_cores=32, n_jobs=1, memory_gb=999)
    assert alone.take(trains[0])["OMP_NUM_THREADS"] == "32", (
        "who wants one job at a time gives it all cores"
    )
    gpus = Places(gpus=["0", "1", "2", "3"], n_cores=8, n_jobs=99)
    assert {gpus.take(job)["OMP_NUM_THREADS"] for job in trains} == {"2"}


def test_a_dead_launcher_s_private_folders_are_swept(tmp_path: Path) -> None:
    "Those of a launcher that lives stay"
    code = (
        "import os; from cot_distill.batch.executors import make_private_folder\n"
        "print(make_private_folder()[0], flush=True); os.kill(os.getpid(), 9)"
    )
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    left = Path(dead.stdout.strip())
    assert left.is_dir()
    mine, lock = make_private_folder()
    second, second_lock = make_private_folder()
    assert not left.exists() and mine.is_dir() and second.is_dir()
    for folder, held in ((mine, lock), (second, second_lock)):
        held.close()
        shutil.rmtree(folder)


def test_a_report_holds_the_run_and_no_lesson(study: Path) -> None:
    "Lessons and exported cells are left out, so nothing in them can fail on the reader's data"
    path = study.parent / "nbs/02_train.ipynb"
    chapter = nbformat.read(path, 4)
    lesson = nbformat.v4.new_code_cell("1 / 0", metadata={"tags": ["lesson"]})
    said = nbformat.v4.new_markdown_cell("a lesson", metadata={"tags": ["lesson"]})
    library = nbformat.v4.new_code_cell("#| export\nraise RuntimeError")
    chapter.cells[1:1] = [lesson, said, library]
    nbformat.write(chapter, path)
    code, text = run(study, ["generate", "train"])
    assert code == 0, text
    report = nbformat.read(study.parent / "runs/small/reports/02_train-human.ipynb", 4)
    sources = [cell.source for cell in report.cells]
    assert not [s for s in sources if "1 / 0" in s or "a lesson" in s or "RuntimeError" in s]
    assert report.metadata.papermill.input_path == "02_train.ipynb"
    whole = nbformat.v4.new_notebook(cells=[library])
    assert trim_chapter(whole) == whole, "a notebook without lessons is executed as it is"


@pytest.mark.parametrize(
    ("chosen", "gpus"),
    [
        ("3,5", ["3", "5"]),
        (" 0 , 1,", ["0", "1"]),
        ("", []),
        ("-1", []),
        ("1,-1,2", ["1"]),
        ("0,0", ["0"]),
        ("MIG-6e7e,GPU-8932f937", ["MIG-6e7e", "GPU-8932f937"]),
    ],
)
def test_the_chosen_gpus_are_read_as_cuda_reads_them(
    monkeypatch: pytest.MonkeyPatch, chosen: str, gpus: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus(["auto"]) == gpus


def test_gpus_are_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    tool.chmod(0o755)
    assert visible_gpus(["auto", "cpu"]) == ["0", "1", "2"]
    assert visible_gpus(["cpu"]) == []
    tool.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    assert visible_gpus(["auto"]) == []


def test_keys_are_found_by_their_names() -> None:
    found = secret_values(
        {
            "DEEPSEEK_API_KEY": "sk-12345678",
            "MY_TOKEN": "abcdefghij",
            "PATH": "/usr/bin/and/more",
            "X": "chosen-value",
        },
        names=("X",),
    )
    assert (
        set(found) >= {"sk-12345678", "abcdefghij", "chosen-value"}
        and "/usr/bin/and/more" not in found
    )


def test_check_is_quick_when_all_is_done(study: Path) -> None:
    "Deciding what is done starts no kernel and loads neither torch nor papermill"
    assert run(study, ["generate"])[0] == 0
    code = f"""
import sys
from cot_distill.batch.run import prepare_batch
from pathlib import Path
home = Path({str(study.parent)!r})
places = dict(run_dir=home / "runs/small", nbs=home / "nbs")
batch = prepare_batch(home / {study.name!r}, stages=["generate"], **places)
heavy = ("torch", "papermill", "transformers", "pandas")
print(batch.states, [m for m in heavy if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'generate human': 'done'} []"
