"""The command line: quick to answer, exact about mistakes, the same words for people and for
machines"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from stand_ins import make_project, names, orders

COMMAND = [str(Path(sys.executable).parent / "cot-distill")]
COMMANDS = (
    "run generate train eval analyze init quote doctor diff compare try merge freeze publish site"
).split()


def call(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
        timeout=300,
    )


def cpu_s() -> float:
    "Processor seconds of all ended child processes: what a call costs, however busy the machine is"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cost_s(*words: str) -> float:
    "Processor seconds of the cheapest of five starts of a program"
    took = []
    for _ in range(5):
        begun = cpu_s()
        subprocess.run(words, check=True, capture_output=True)
        took.append(cpu_s() - begun)
    return min(took)


def test_help_costs_little_more_than_the_libraries_that_print_it() -> None:
    bare = cost_s(sys.executable, "-c", "import typer, rich.panel, rich.table, rich.markdown")
    assert cost_s(str(Path(sys.executable).with_name("cot-distill")), "--help") < 2.5 * bare


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("cot_distill.cli", "torch transformers pandas numpy papermill matplotlib"),
        ("cot_distill.batch.run", "torch transformers papermill matplotlib"),
        ("cot_distill.doctor", "torch transformers pandas papermill matplotlib"),
    ],
)
def test_commands_load_nothing_heavy_before_it_is_used(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = call(command, "--help")
    assert done.returncode == 0 and f"Example: cot-distill {command}" in done.stdout
    assert "\x1b[" not in done.stdout, "no colours where there is no terminal"


def test_every_option_has_help_and_an_example() -> None:
    "In an example of its command, or in its own help"
    from typer.main import get_command

    from cot_distill.cli import app

    commands = get_command(app).commands
    assert sorted(commands) == sorted(COMMANDS)
    for name, command in commands.items():
        examples = [line for line in command.help.splitlines() if line.startswith("Example: ")]
        for option in command.params:
            shown = any(flag in line for flag in option.opts for line in examples)
            assert option.help and (shown or "such as" in option.help), f"{name} {option.opts}"


def test_shells_can_complete_commands_and_options() -> None:
    words = {"_COT_DISTILL_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert call(**words, COMP_WORDS="cot-distill d").stdout.split() == ["doctor", "diff"]
    assert (
        "--dry-run" in call(**words | {"COMP_CWORD": "2"}, COMP_WORDS="cot-distill run --d").stdout
    )


def test_exit_codes_are_documented() -> None:
    text = " ".join(call("--help").stdout.split())
    assert all(
        part in text
        for part in (
            "0 all is well",
            "2 the input cannot be used",
            "75 run it again later",
            "130 and 143 stopped by a signal",
        )
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "configs/nowhere.toml"], "no study at configs/nowhere.toml"),
        (
            ["run", "configs/lesson.toml", "--teachers", "humann", "--dry-run"],
            "unknown teacher 'humann'",
        ),
        (["run", "configs/lesson.toml", "--stages", "trian", "--dry-run"], "unknown stage 'trian'"),
        (["run", "configs/lesson.toml", "--set", "train.epochs"], "--set wants KEY=VALUE"),
        (["run", "configs/lesson.toml", "--set", "train.epoch=2", "--dry-run"], "epochs"),
        (["run", "configs/lesson.toml", "--limit", "0"], "limit"),
        (["run", "Makefile"], "is not a TOML file"),
        (["run", "configs"], "is a folder"),
        (["freeze", "configs", "--to", "nowhere"], "is no run folder"),
        (["train", "configs/lesson.toml", "--teachers", "nobody"], "unknown teacher 'nobody'"),
        (["diff", "nbs", "tests"], "is no run folder"),
        (["rnu"], "rnu"),
    ],
)
def test_bad_input_is_a_sentence_and_code_2(
    arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    if "--run-dir" not in arguments and arguments[0] in ("run", "train"):
        arguments = [*arguments, "--run-dir", str(tmp_path / "run")]
    done = call(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_run_for_machines_and_for_people(tmp_path: Path) -> None:
    study = make_project(tmp_path, "human")
    stages = "generate,train,eval,analyze"
    done = call("run", study, "--stages", stages, "--json", cwd=tmp_path)
    summary = json.loads(done.stdout)
    assert done.returncode == summary["exit_code"] == 0
    assert summary["results"]["study"] == "small" and {job["state"] for job in summary["jobs"]} == {
        "finished"
    }
    assert summary["run_dir"] == "runs/small"

    n, begun = len(names(tmp_path)), cpu_s()
    done = call("run", study, "--stages", stages, cwd=tmp_path)
    assert done.returncode == 0 and cpu_s() - begun < 5 and len(names(tmp_path)) == n
    assert (
        "student of" in done.stdout
        and "human" in done.stdout
        and done.stdout.strip().splitlines()[-1] == "runs/small"
    )
    assert "\x1b[" not in done.stdout + done.stderr

    orders(tmp_path, train_human={"raise": "ResumeLater", "message": "the budget is spent"})
    (tmp_path / "runs/small/students/human/training_log.json").unlink()
    done = call("run", study, "--stages", stages, "--json", cwd=tmp_path)
    job = next(job for job in json.loads(done.stdout)["jobs"] if job["job"] == "train human")
    assert done.returncode == 75 and job["error"]["evalue"] == "the budget is spent"
    assert (
        "train human failed: the budget is spent (report: runs/small/reports/02_train-human.ipynb)"
        in done.stderr
    )


def test_dry_run_shows_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    study = make_project(tmp_path, "human")
    done = call("run", study, "--stages", "train,eval", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "train human" in done.stdout and "rough" in done.stdout
    plan = json.loads(
        call("run", study, "--stages", "train,eval", "--dry-run", "--json", cwd=tmp_path).stdout
    )
    assert [job["job"] for job in plan["jobs"]] == ["eval base", "train human", "eval human"]
    assert plan["seconds"] > 0 and plan["quotes"] == {}
    assert names(tmp_path) == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "content", "sentence"),
    [
        ("problems.source", None, "problems.jsonl"),
        ("problems.source", "", "problems.jsonl"),
        ("problems.source", '{"frage": "1 + 1?"}\n', "problems.jsonl"),
        ("problems.source", "gsm9k", "gsm9k"),
        ("teachers.human.provider", "gemini", "GEMINI_API_KEY is not set"),
        ("student.model", "./nowhere.gguf", "nowhere.gguf"),
    ],
    ids=["no file", "empty file", "wrong columns", "unknown source", "no key", "no student"],
)
def test_a_dry_run_says_what_stands_in_the_way(
    tmp_path: Path, setting: str, content: str | None, sentence: str
) -> None:
    "And a real one refuses for the same reason, before a kernel starts"
    study, problems = make_project(tmp_path, "human"), tmp_path / "problems.jsonl"
    value = str(problems) if setting == "problems.source" else content
    if setting == "problems.source" and content == "gsm9k":
        value = content
    elif content is not None:
        problems.write_text(content)
    value = {"teachers.human.provider": "gemini", "student.model": "./nowhere.gguf"}.get(
        setting, value
    )
    for more in (["--dry-run"], []):
        done = call("run", study, "--set", f"{setting}={value}", *more, cwd=tmp_path)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and names(tmp_path) == []


def test_only_those_who_are_asked_are_quoted(tmp_path: Path) -> None:
    done = call("quote", "configs/lesson.toml")
    assert (
        done.returncode == 0
        and done.stdout == "human, recorded: nobody is asked, nothing is paid\n"
    )
    study = make_project(tmp_path, "gpt", "other", provider="openai")
    quotes = json.loads(call("quote", study, "--json", cwd=tmp_path).stdout)
    assert set(quotes) == {"gpt", "other"} and quotes["gpt"]["requests"] == 4
    rows = [line.split() for line in call("quote", study, cwd=tmp_path).stdout.splitlines()]
    assert [row[0] for row in rows] == ["teacher", "gpt", "other", "all"] and rows[-1][1] == "8"


def test_doctor_never_shows_a_key(tmp_path: Path) -> None:
    study = make_project(tmp_path, "gpt", provider="gemini")
    done = call("doctor", study, cwd=tmp_path, GEMINI_API_KEY="AIza-secret-value-123456")
    assert (
        "key of gpt: GEMINI_API_KEY" in done.stdout
        and "AIza-secret" not in done.stdout + done.stderr
    )
    done = call("doctor", study, "--json", cwd=tmp_path)
    findings = {one["what"]: one for one in json.loads(done.stdout)}
    assert done.returncode == 2 and findings["key of gpt"]["state"] == "fail"
    assert "GEMINI_API_KEY is not set" in findings["key of gpt"]["advice"]
    assert all(one["advice"] for one in findings.values() if one["state"] != "ok")


def test_a_defect_shows_its_traceback_without_keys(tmp_path: Path) -> None:
    code = (
        "from cot_distill import cli\n"
        "def broken(*a, **k):\n"
        "    raise RuntimeError('sk-abcdefghijklmnop1234 leaked')\n"
        "cli.app = broken\n"
        "cli.main([])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "RuntimeError: [key removed] leaked" in done.stderr
        and "Traceback" in done.stderr
    )
