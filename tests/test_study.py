"""One study as a whole: the same inputs give the same numbers, and every number says where it comes
from"""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
from huggingface_hub import ModelCard
from loopback_hub import open_hub
from peft import PeftModel
from places import ROOT
from rich.console import Console
from tiny_student import make_student
from transformers import AutoModelForCausalLM

from cot_distill.batch.other_runs import compare_runs, compare_sources
from cot_distill.batch.plan import find_done, plan_jobs
from cot_distill.batch.series import Row, Series
from cot_distill.cli import main
from cot_distill.core.config import StudyConfig, load_study, parse_study, to_toml
from cot_distill.core.files import read_json, read_parquet, write_json, write_parquet
from cot_distill.core.runs import RunFolder, open_run
from cot_distill.eval import run_eval
from cot_distill.generate import run_generate
from cot_distill.reading.results import write_results
from cot_distill.student.live import answer_side_by_side, open_students
from cot_distill.train import run_train
from cot_distill.web.freeze import freeze

TEACHERS = {
    "human": {"provider": "human"},
    "recorded": {"provider": "recorded", "path": "package:two-step-qwen2.5-coder-1.5b.jsonl"},
}


def study_of(student: Path, **settings: object) -> StudyConfig:
    "Two teachers, six problems, a student of some thousand parameters"
    return parse_study(
        {
            "name": "whole",
            "problems": {"source": "two-step", "limit": 6},
            "eval_sets": [{"name": "two-step", "source": "two-step", "split": "test", "limit": 4}],
            "student": {"model": str(student), "dtype": "float32", "device": "cpu"},
            "teachers": TEACHERS,
            "train": {
                "lora_r": 4,
                "lora_alpha": 8,
                "lora_dropout": 0.1,
                "learning_rate": 0.01,
                "epochs": 2,
                "batch_size": 2,
                "gradient_accumulation": 1,
            },
            "eval": {"max_new_tokens": 12, "slots": 3, "n_bootstrap": 200},
        }
        | settings
    )


def complete(study: StudyConfig, folder: Path) -> RunFolder:
    "All stages, one after the other in this process"
    run = open_run(folder, study)
    study = load_study(run.config_file)
    run_eval(study, "base", run)
    for teacher in study.teachers:
        run_generate(study, teacher, run)
        run_train(study, teacher, run)
        run_eval(study, teacher, run)
    write_results(study, run)
    return run


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("student"), hidden=32, layers=2)


@pytest.fixture(scope="module")
def first(student: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return complete(study_of(student), tmp_path_factory.mktemp("first") / "whole")


def losses(run: RunFolder, teacher: str) -> list[float]:
    return [step["loss"] for step in read_json(run.training_log(teacher))["steps"]]


def test_same_config_same_seed_same_numbers(
    student: Path, first: RunFolder, tmp_path: Path
) -> None:
    again = complete(study_of(student), tmp_path / "whole")
    for teacher in TEACHERS:
        texts = [
            read_parquet(run.rationales(teacher)).drop(columns=["latency_s"])
            for run in (first, again)
        ]
        assert texts[0].equals(texts[1])
        assert (
            losses(first, teacher) == losses(again, teacher)
            and len(set(losses(first, teacher))) > 1
        )
    for variant in ("base", *TEACHERS):
        answers = [read_parquet(run.eval_file(variant, "two-step")) for run in (first, again)]
        assert answers[0].equals(answers[1])
    assert compare_runs(first.path, again.path) == []
    assert compare_sources(first.path, again.path) == {}
    frozen = tmp_path / "frozen"
    freeze(again.path, frozen, texts=False)
    assert compare_runs(first.path, frozen) == [], "a frozen copy without texts reproduces it"
    assert call_cli("diff", first.path, frozen) == 0


def call_cli(*words: object) -> int:
    "Exit code of the command line"
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code or 0


def test_what_differs_is_told_the_largest_first(
    first: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = RunFolder(tmp_path / "other")
    shutil.copytree(first.path, other.path)
    for variant, n in (("base", 1), ("human", 3)):
        path = other.eval_file(variant, "two-step")
        table = read_parquet(path)
        table.loc[: n - 1, "is_correct"] = ~table.loc[: n - 1, "is_correct"]
        write_parquet(path, table)
    found = compare_runs(first.path, other.path)
    assert [one.what.partition(":")[0] for one in found] == [
        "human on two-step",
        "base on two-step",
    ]
    assert "3 of" in found[0].what
    assert call_cli("diff", first.path, other.path) == 1
    assert capsys.readouterr().out.startswith("human on two-step")


def test_students_answer_a_person_as_they_answered_the_evaluation(
    first: RunFolder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = {name: read_parquet(first.eval_file(name, "two-step")) for name in ("base", *TEACHERS)}
    asked = scored["base"].iloc[0]
    drawn = Console(file=io.StringIO(), width=200)
    spoken = answer_side_by_side(open_students(first), asked.question, "0", drawn)
    assert {name: one.text for name, one in spoken.items()} == {
        name: table.completion[0] for name, table in scored.items()
    }
    assert list(spoken) == ["base", *TEACHERS]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{asked.question}\n{asked.reference_answer}\n\n"))
    assert call_cli("try", first.path, "--students", "base,human") == 0
    out = capsys.readouterr().out
    assert (
        "human" in out and "recorded" not in out and out.count("question (nothing ends this)") == 2
    )
    assert call_cli("try", first.path, "What?", "--students", "nobody") == 2
    assert "it has base, human, recorded" in capsys.readouterr().err.replace("\n", " ")


def test_what_is_published_is_loaded_by_name_and_says_what_it_scored(
    first: RunFolder, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, allow = tmp_path / "out", ("--allow", "human,recorded")
    assert call_cli("publish", first.path, "--to", out) == 2
    assert "--allow human,recorded" in capsys.readouterr().err and not out.exists()
    assert call_cli("publish", first.path, "--to", out, *allow) == 0
    rows = datasets.load_dataset(
        str(out / "dataset"), "recorded", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows["completion"] == read_parquet(first.rationales("recorded"))["completion"].tolist()
    card = ModelCard.load(out / "students" / "human" / "README.md")
    scored = {v["variant"]: v for v in read_json(first.results_json)["variants"]}
    assert [one.metric_value for one in card.data.eval_results] == [scored["human"]["accuracy"]]
    assert "n = 4" in card.text and str(student.parent) not in card.content
    base = AutoModelForCausalLM.from_pretrained(student, dtype="float32")
    PeftModel.from_pretrained(base, out / "students" / "human")


def test_a_hub_is_given_what_a_folder_would_hold(first: RunFolder, tmp_path: Path) -> None:
    server = open_hub()
    command = [Path(sys.executable).with_name("cot-distill"), "publish", first.path]
    command += ["--allow", "human,recorded"]
    there = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | there
    told = subprocess.run([*command, "--to", "hub:me/pens"], env=environment, capture_output=True)
    assert told.returncode == 2 and b"HF_TOKEN is not set" in told.stderr and not server.kept
    environment["HF_TOKEN"] = "example-token-of-a-lesson"
    for to in ("hub:me/pens", tmp_path / "out"):
        subprocess.run([*command, "--to", to], env=environment, check=True, capture_output=True)
    server.shutdown()
    server.server_close()
    refused = subprocess.run(
        [*command, "--to", "hub:me/pens"], env=environment, capture_output=True
    )
    assert refused.returncode == 2 and b"me/pens could not be uploaded" in refused.stderr
    assert server.tokens == {"Bearer example-token-of-a-lesson"}
    places = {"datasets/me/pens": "dataset", "me/pens-human": "students/human"}
    places["me/pens-recorded"] = "students/recorded"
    assert set(server.kept) == set(places)
    for repo, place in places.items():
        here = tmp_path / "out" / place
        files = {str(p.relative_to(here)): p.read_bytes() for p in here.rglob("*") if p.is_file()}
        assert server.kept[repo] == files


def test_another_seed_is_found_out(student: Path, first: RunFolder, tmp_path: Path) -> None:
    other = complete(study_of(student, seed=1), tmp_path / "whole")
    found = compare_runs(first.path, other.path)
    assert (found[0].what, found[0].a, found[0].b) == ("seed", 0, 1)
    assert losses(first, "human") != losses(other, "human")
    facts = read_json(other.run_json)
    for stage in facts["stages"].values():
        stage["provenance"]["packages"]["torch"] = "9.9"
    write_json(other.run_json, facts)
    assert list(compare_sources(first.path, other.path)) == ["packages.torch"], (
        "said once, not once a stage"
    )


def test_run_json_says_where_everything_comes_from(first: RunFolder) -> None:
    "Resolved study, commit, versions, data, seed, machine, time, tokens, dollars"
    facts = read_json(first.run_json)
    assert facts["study"]["train"]["learning_rate"] == 0.01 and facts["study"]["seed"] == 0
    assert set(facts["stages"]) == {"eval two-step/base"} | {
        f"{stage}/{t}" for t in TEACHERS for stage in ("generate", "train", "eval two-step")
    }
    for name, stage in facts["stages"].items():
        source = stage["provenance"]
        assert {"commit", "dirty", "packages", "hardware", "python"} <= source.keys() and source[
            "packages"
        ]["torch"]
        assert stage["wall_s"] > 0 and stage["inputs"], name
    train = facts["stages"]["train/recorded"]["inputs"]
    assert train["seed"] == 0 and len(train["data"]) == 16
    assert len(facts["stages"]["generate/recorded"]["inputs"]["problems"]["content"]) == 16
    assert len({facts["stages"][f"eval two-step/{v}"]["data"] for v in ("base", *TEACHERS)}) == 1, (
        "all answered the same problems"
    )
    assert (
        facts["totals"]["completion_tokens"]
        == sum(stage.get("completion_tokens", 0) for stage in facts["stages"].values())
        > 0
    )
    assert facts["totals"]["wall_s"] == pytest.approx(
        sum(stage["wall_s"] for stage in facts["stages"].values()), abs=1e-3
    )


def test_the_footer_of_a_report_is_text_whatever_the_study_says(
    student: Path, tmp_path: Path
) -> None:
    from nbformat.v4 import new_markdown_cell, new_notebook

    from cot_distill.batch.report import footer_text
    from cot_distill.web.pages import notebook_html

    run = open_run(
        tmp_path / "whole",
        study_of(student, description="</pre></details><script>alert(1)</script>\n\n| x |"),
    )
    text = footer_text(run, "train", "human", finished=False)
    html = notebook_html(new_notebook(cells=[new_markdown_cell(text)]))
    assert "<script" not in text + html and "&lt;script&gt;" in html
    assert (
        html.index("<details>") < html.index("learning_rate = 0.01") < html.index("</details>")
    ), "the resolved study stays behind its fold"


@pytest.mark.slow
def test_one_student_on_two_processes(student: Path, first: RunFolder, tmp_path: Path) -> None:
    """accelerate launch: the passes of a step are shared out, the student is the one of a single
    process"""
    study = study_of(
        student,
        train={
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "learning_rate": 0.01,
            "epochs": 2,
            "batch_size": 1,
            "gradient_accumulation": 2,
        },
    )
    runs = [open_run(tmp_path / name, study) for name in ("one", "two")]
    for run in runs:
        run_generate(load_study(run.config_file), "human", run)
    run_train(load_study(runs[0].config_file), "human", runs[0])
    (tmp_path / "study.toml").write_text(to_toml(study, tmp_path))
    command = [
        Path(sys.executable).parent / "accelerate",
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command += ["-m", "cot_distill.train", tmp_path / "study.toml", "human", runs[1].path]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(runs[1], "human") == pytest.approx(losses(runs[0], "human"), rel=1e-4)
    log = run_train(load_study(runs[1].config_file), "human", runs[1])
    assert (
        log["final_train_loss"]
        == json.loads(runs[1].training_log("human").read_text())["final_train_loss"]
    ), "done already, not made again"


COMMAND = [
    Path(sys.executable).parent / "cot-distill",
    "run",
    ROOT / "configs/lesson.toml",
    "--teachers",
    "human",
    "--stages",
    "generate,train,eval",
    "--json",
]


def numbers(run_dir: Path) -> list[dict]:
    "results.json without times"
    return [
        {key: value for key, value in row.items() if not key.endswith("_s")}
        for row in read_json(run_dir / "results.json")["variants"]
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_stages_killed_at_any_instant_end_with_the_same_numbers(tmp_path: Path) -> None:
    """kill -9 of the launcher, then of a papermill process or kernel, in turn; the last run goes to
    its end"""
    calm, killed, rng = tmp_path / "calm", tmp_path / "killed", random.Random(0)
    assert subprocess.run([*COMMAND, "--run-dir", calm], capture_output=True).returncode == 0
    for victim in ("launcher", "stage", "launcher", "stage"):
        launcher = psutil.Popen(
            [*COMMAND, "--run-dir", killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(4, 30))
        family = launcher.children(recursive=True)
        if victim == "launcher" or not family:
            launcher.kill()
        else:
            rng.choice(family).kill()
        launcher.wait(timeout=600)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
    done = subprocess.run([*COMMAND, "--run-dir", killed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert numbers(killed) == numbers(calm)


def test_a_damaged_adapter_is_trained_again_before_its_student_is_asked(first, tmp_path):
    "The planner sees both stages as due, instead of other settings in the second"
    run = RunFolder(shutil.copytree(first.path, tmp_path / "whole"))
    study = load_study(run.config_file)
    jobs = plan_jobs(Series("whole", [Row(study, "base"), Row(study, "human")], run.path))
    assert {"train human", "eval human"} <= find_done(jobs)
    weights = run.adapter("human") / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = find_done(jobs)
    assert "eval base" in done and not {"train human", "eval human"} & done
