"Beyond one machine: a two-node Ray cluster does the jobs, a shot worker costs only time"

import io
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest
from places import ROOT
from rich.console import Console
from stand_ins import make_project, names, orders, prepare, processes_of, results, run, seen

from cot_distill.batch.run import run_prepared
from cot_distill.core.config import load_study
from cot_distill.core.errors import InputError

RENTAL = ROOT / "configs/rent-a-gpu.sky.yaml"


def test_without_ray_the_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    study = make_project(tmp_path, "human")
    batch = prepare(study)
    with pytest.raises(InputError, match=r"pip install 'cot-distill\[ray\]'"):
        run_prepared(batch, Console(file=io.StringIO()), executor="ray")


def test_the_rental_task_fits_the_command_line() -> None:
    """What SkyPilot is told to run are commands and options that exist; its own schema agrees where
    it is installed"""
    import yaml
    from typer.main import get_command

    from cot_distill.cli import app

    task = yaml.safe_load(RENTAL.read_text(encoding="utf-8"))
    commands = get_command(app).commands
    for line in task["run"].strip().splitlines():
        words = shlex.split(line.partition("||")[0])
        known = {flag for option in commands[words[1]].params for flag in option.opts}
        assert (
            words[0].endswith("cot-distill")
            and {word for word in words if word.startswith("--")} <= known
        )
    assert task["file_mounts"][str(Path(words[words.index("--run-dir") + 1]).parent)]["mode"] == (
        "MOUNT_CACHED"
    ), "what is written, a database included, reaches the bucket"
    study = load_study(ROOT / task["envs"]["STUDY"])
    assert {
        t.api_key_env or "GEMINI_API_KEY" for t in study.teachers.values() if t.provider != "human"
    } == set(task["secrets"])
    assert not any(task["secrets"].values()), "keys are given on the command line, never written"
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    assert sky.Task.from_yaml_config(
        task | {"envs": task["envs"] | {"BUCKET": "s3://bucket/run"}}
    ).use_spot


# --- a real cluster, slow ---


@pytest.fixture(params=[{}])
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    "Two nodes on this machine, with whatever each shall claim to have besides a core"
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    from ray.cluster_utils import Cluster

    two = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False} | request.param,
    )
    two.add_node(**{"num_cpus": 1} | request.param)
    yield two
    ray.shutdown()
    two.shutdown()


@pytest.mark.slow
def test_two_nodes_make_what_one_machine_makes(tmp_path: Path, cluster) -> None:
    alone, many = (
        make_project(tmp_path / "alone", "a", "b"),
        make_project(tmp_path / "many", "a", "b"),
    )
    assert run(alone)[0] == 0
    orders(many.parent, train_a={"seconds": 4}, train_b={"seconds": 4})
    code, text = run(many, executor="ray", address=cluster.address)
    assert code == 0, text
    assert results(many) == results(alone)
    began = {f"{one['stage']} {one['variant']}": one["at"] for one in seen(many.parent)}
    assert abs(began["train a"] - began["train b"]) < 4, "two nodes train side by side"


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [{"num_gpus": 1}], indirect=True)
def test_each_student_gets_a_gpu_of_its_own(
    tmp_path: Path, cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray only counts the GPUs it is told of; what a job sees of them is what it would see of real
    ones"""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    many = make_project(tmp_path, "a", "b", "c", device="auto")
    orders(many.parent, train_a={"seconds": 6}, train_b={"seconds": 6}, train_c={"seconds": 6})
    code, text = run(many, executor="ray", address=cluster.address)
    assert code == 0, text
    compute = [one for one in seen(many.parent) if one["stage"] in ("train", "eval")]
    assert {one["gpu"] for one in compute} == {"0"}, "the first GPU of either node"
    assert {
        one["gpu"] or "" for one in seen(many.parent) if one["stage"] not in ("train", "eval")
    } == {""}
    begun = sorted(one["at"] for one in compute if one["stage"] == "train")
    assert begun[1] - begun[0] < 6 < begun[2] - begun[0], "two train side by side, the third waits"


@pytest.mark.slow
def test_a_shot_worker_costs_a_retry(tmp_path: Path, cluster) -> None:
    alone, many = make_project(tmp_path / "alone", "a"), make_project(tmp_path / "many", "a")
    assert run(alone)[0] == 0
    orders(many.parent, train_a={"seconds": 6})
    shot: list[int] = []

    def shoot() -> None:
        while "train a" not in names(many.parent):
            time.sleep(0.1)
        time.sleep(2)
        for process in processes_of(many):  # the kernel's grandparent is Ray's worker
            for parent in process.parents():
                if parent.name().startswith("ray::"):
                    shot.append(parent.pid)
                    os.kill(parent.pid, signal.SIGKILL)
                    return

    thread = threading.Thread(target=shoot, daemon=True)
    thread.start()
    code, text = run(many, executor="ray", address=cluster.address)
    assert code == 0, text
    assert shot and names(many.parent).count("train a") == 2
    assert results(many) == results(alone)
    time.sleep(0.5)
    assert processes_of(many) == []


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [{"num_cpus": 0}], indirect=True)
def test_a_lost_node_costs_a_retry(tmp_path: Path, cluster) -> None:
    "The machine that trains goes; the study ends on the other one"
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    many = make_project(tmp_path, "a")
    orders(many.parent, train_a={"seconds": 8})
    lost: list[int] = []

    def pull_the_plug() -> None:
        while "train a" not in names(many.parent):
            time.sleep(0.1)
        time.sleep(2)
        above = {parent.pid for process in processes_of(many) for parent in process.parents()}
        for node in nodes:
            if (pid := node.all_processes["raylet"][0].process.pid) in above:
                lost.append(pid)
                cluster.remove_node(node, allow_graceful=False)
                return

    thread = threading.Thread(target=pull_the_plug, daemon=True)
    thread.start()
    code, text = run(many, executor="ray", address=cluster.address)
    assert code == 0, text
    assert lost and names(many.parent).count("train a") == 2
    assert results(many)["variants"]
