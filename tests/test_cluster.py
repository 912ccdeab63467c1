"Beyond one machine: the run folder travels, a two-node Ray cluster does the jobs, a shot worker costs only time"

import io
import json
import os
import shlex
import shutil
import signal
import sqlite3
import threading
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from stand_ins import make_project, names, orders, seen
from test_pipeline import NO_PAGES, results, run

from cot_distill.batch.ray import KeptExecutor, changed_files, discard, pull, push, send
from cot_distill.batch.run import prepare_batch, run_prepared
from cot_distill.core.config import load_study
from cot_distill.core.errors import InputError, ResumeLater
from cot_distill.core.runs import RunFolder

ROOT = Path(__file__).resolve().parents[1]
RENTAL = ROOT / "configs/rent-a-gpu.sky.yaml"


def test_a_folder_travels_and_only_changes_are_sent(tmp_path: Path) -> None:
    here, there, store, known = (
        tmp_path / "here",
        tmp_path / "there",
        f"file://{tmp_path}/store",
        {},
    )
    (here / "evals/base").mkdir(parents=True)
    (here / "evals/base/a.json").write_text("one")
    (here / "x.lock").write_text("")
    push(here, store, changed_files(here, known))
    assert pull(store, there) == ["evals/base/a.json"] and pull(store, there) == []
    (here / "evals/base/a.json").write_text("two")  # of the same size
    push(here, store, changed_files(here, known))
    assert (
        pull(store, there) == ["evals/base/a.json"]
        and (there / "evals/base/a.json").read_text() == "two"
    )
    discard(store, ["evals/base"])
    assert pull(store, tmp_path / "third") == []
    assert pull(store, there) == [] and (there / "evals/base/a.json").exists()
    assert (
        pull(store, there, exact=lambda name: True) == []
        and not (there / "evals/base/a.json").exists()
    )


def test_a_ledger_in_use_travels_whole(tmp_path: Path) -> None:
    live = sqlite3.connect(tmp_path / "ledger.sqlite")
    live.execute("pragma journal_mode=wal")
    live.execute("create table attempts (n)")
    live.executemany("insert into attempts values (?)", [(n,) for n in range(500)])
    live.commit()  # still in the log beside the file
    push(tmp_path, f"file://{tmp_path}/store", ["ledger.sqlite"])
    pull(f"file://{tmp_path}/store", tmp_path / "there")
    assert sqlite3.connect(tmp_path / "there/ledger.sqlite").execute(
        "select count(*) from attempts"
    ).fetchone() == (500,)


def test_an_object_store_will_do(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    push(tmp_path, "memory://bucket/run", ["results.json"])
    assert pull("memory://bucket/run", tmp_path / "there") == ["results.json"]


def test_without_ray_the_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    study = make_project(tmp_path, "human")
    batch = prepare_batch(study, run_dir=tmp_path / "runs/small", nbs=tmp_path / "nbs")
    with pytest.raises(InputError, match=r"pip install 'cot-distill\[ray\]'"):
        run_prepared(batch, Console(file=io.StringIO()), ray=True)


def test_a_file_moved_while_the_store_is_listed_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    (tmp_path / "store").mkdir()
    (tmp_path / "store/a").write_text("whole")
    real, looks = LocalFileSystem.find, []

    def find(self, *arguments: object, **options: object) -> dict:
        looks.append(1)
        if len(looks) < 3:
            raise FileNotFoundError("a.part")
        return real(self, *arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "find", find)
    assert pull(f"file://{tmp_path}/store", tmp_path / "here") == ["a"] and len(looks) == 3


def test_a_vanished_file_vanishes_from_the_store(tmp_path: Path) -> None:
    folder, store, known = tmp_path / "here", f"file://{tmp_path}/store", {}
    (folder / "checkpoints").mkdir(parents=True)
    for step in (10, 20):
        (folder / f"checkpoints/{step}").write_text("weights")
        send(folder, store, known)
        (folder / "checkpoints/10").unlink(missing_ok=True)
    send(folder, store, known)
    assert [path.name for path in sorted((tmp_path / "store/checkpoints").iterdir())] == ["20"]


def kept(study: Path, store: str, run_dir: Path) -> int:
    batch = prepare_batch(
        study, stages=["generate", "train"], run_dir=run_dir, nbs=study.parent / "nbs", store=store
    )
    return run_prepared(batch, Console(file=io.StringIO()), store=store)


def test_a_lost_machine_costs_nothing_that_was_kept(tmp_path: Path) -> None:
    study, store = make_project(tmp_path / "p", "a"), f"file://{tmp_path}/store"
    orders(study.parent, train_a={"raise": "ZeroDivisionError"})
    assert kept(study, store, tmp_path / "p/runs/lost") == 1
    shutil.rmtree(tmp_path / "p/runs/lost")
    orders(study.parent)
    assert kept(study, store, tmp_path / "p/runs/next") == 0
    assert names(study.parent) == ["generate a", "train a", "train a"], (
        "what was generated on the lost machine was not generated again"
    )
    assert kept(study, store, tmp_path / "p/runs/third") == 0 and len(names(study.parent)) == 3
    with pytest.raises(InputError, match="written by another machine"):
        kept(study, store, tmp_path / "p/runs/next")


class Idle:
    "An executor that has nothing to do"

    n_places, has_gpu = 1, False

    def close(self) -> None:
        pass


def test_a_store_that_fails_for_a_while_gets_everything_later(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, place = RunFolder(tmp_path / "run"), tmp_path / "store"
    (run.path / "evals").mkdir(parents=True)
    keeper = KeptExecutor(Idle(), run, f"file://{place}")
    for name in ("config.toml", "evals/a", "evals/b"):
        (run.path / name).write_text(name)
    place.write_text("a file where the store should be")
    keeper.send_now_and_then(0.0)
    assert "could not be written" in capsys.readouterr().err
    with pytest.raises(ResumeLater, match="nothing is lost here"):
        keeper.close()
    place.unlink()
    keeper.close()
    assert sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()) == [
        "config.toml",
        "evals/a",
        "evals/b",
    ]


def test_a_run_folder_taken_away_takes_nothing_from_the_store(tmp_path: Path) -> None:
    study, store = make_project(tmp_path / "p", "a"), f"file://{tmp_path}/store"
    orders(study.parent, train_a={"raise": "ZeroDivisionError"})
    assert kept(study, store, tmp_path / "p/runs/small") == 1
    files = sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file())
    batch = prepare_batch(
        study,
        stages=["generate", "train"],
        run_dir=tmp_path / "p/runs/small",
        nbs=study.parent / "nbs",
        store=store,
    )
    shutil.rmtree(tmp_path / "p/runs/small")
    with pytest.raises(InputError, match="has vanished while the study ran"):
        run_prepared(batch, Console(file=io.StringIO()), store=store)
    assert sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file()) == files


def test_a_store_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--store nowhere://x cannot be opened.*s3fs"):
        kept(make_project(tmp_path, "a"), "nowhere://x", tmp_path / "runs/small")


def test_the_rental_task_fits_the_command_line() -> None:
    "What SkyPilot is told to run are commands and options that exist; its own schema agrees where it is installed"
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
    study = load_study(ROOT / task["envs"]["STUDY"])
    assert {
        t.api_key_env or "GEMINI_API_KEY" for t in study.teachers.values() if t.provider != "human"
    } == set(task["secrets"])
    assert not any(task["secrets"].values()), "keys are given on the command line, never written"
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    assert sky.Task.from_yaml_config(
        task | {"envs": task["envs"] | {"STORE": "s3://bucket/run"}}
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


def on_ray(study: Path, address: str, store: str | None = None) -> tuple[int, str]:
    out = study.parent / "out.txt"
    batch = prepare_batch(
        study, stages=NO_PAGES, run_dir=study.parent / "runs/small", nbs=study.parent / "nbs"
    )
    with out.open("w") as file:
        code = run_prepared(
            batch,
            Console(file=file, width=200, force_terminal=False),
            ray=True,
            address=address,
            store=store,
        )
    return code, out.read_text()


def kernels_of(study: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.status() != psutil.STATUS_ZOMBIE
                and Path(process.cwd()) == study.parent / "nbs"
            ):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.slow
def test_two_nodes_make_what_one_machine_makes(tmp_path: Path, cluster) -> None:
    alone, many = (
        make_project(tmp_path / "alone", "a", "b"),
        make_project(tmp_path / "many", "a", "b"),
    )
    assert run(alone)[0] == 0
    orders(many.parent, train_a={"seconds": 4}, train_b={"seconds": 4})
    code, text = on_ray(many, cluster.address)
    assert code == 0, text
    assert results(many) == results(alone)
    began = {f"{one['stage']} {one['variant']}": one["at"] for one in seen(many.parent)}
    assert abs(began["train a"] - began["train b"]) < 4, "two nodes train side by side"


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [{"num_gpus": 1}], indirect=True)
def test_each_student_gets_a_gpu_of_its_own(
    tmp_path: Path, cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Ray only counts the GPUs it is told of; what a job sees of them is what it would see of real ones"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    many = make_project(tmp_path, "a", "b", "c", device="auto")
    orders(many.parent, train_a={"seconds": 6}, train_b={"seconds": 6}, train_c={"seconds": 6})
    code, text = on_ray(many, cluster.address)
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
        for process in kernels_of(many):  # the kernel's grandparent is Ray's worker
            for parent in process.parents():
                if parent.name().startswith("ray::"):
                    shot.append(parent.pid)
                    os.kill(parent.pid, signal.SIGKILL)
                    return

    thread = threading.Thread(target=shoot, daemon=True)
    thread.start()
    code, text = on_ray(many, cluster.address)
    assert code == 0, text
    assert shot and names(many.parent).count("train a") == 2
    assert results(many) == results(alone)
    time.sleep(0.5)
    assert kernels_of(many) == []


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
        above = {parent.pid for process in kernels_of(many) for parent in process.parents()}
        for node in nodes:
            if (pid := node.all_processes["raylet"][0].process.pid) in above:
                lost.append(pid)
                cluster.remove_node(node, allow_graceful=False)
                return

    thread = threading.Thread(target=pull_the_plug, daemon=True)
    thread.start()
    code, text = on_ray(many, cluster.address)
    assert code == 0, text
    assert lost and names(many.parent).count("train a") == 2
    assert results(many)["variants"]


@pytest.mark.slow
def test_a_store_in_place_of_a_shared_disk(
    tmp_path: Path, cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Notebooks and run folder travel; workers see neither the launcher's checkout nor its runs"
    from cot_distill.batch.ray import Mirror

    def collect(self) -> None:  # as the stand-ins do it
        rows = []
        for path in sorted(self.run.path.glob("evals/*/test.parquet")):
            value = int(path.read_text())
            rows.append(
                {
                    "variant": path.parent.name,
                    "teacher": None,
                    "n": 100,
                    "n_correct": value,
                    "accuracy": value / 100,
                    "ci95": [0.0, 1.0],
                    "vs_base": None,
                    "teacher_cost_usd": None,
                }
            )
        self.run.results_json.write_text(
            json.dumps({"study": "small", "problem_set": "test", "n": 100, "variants": rows})
        )

    monkeypatch.setattr(Mirror, "write_results", collect)
    alone, many = make_project(tmp_path / "alone", "a"), make_project(tmp_path / "many", "a")
    assert run(alone)[0] == 0
    code, text = on_ray(many, cluster.address, f"file://{tmp_path}/store")
    assert code == 0, text
    assert seen(many.parent) == [], "nothing ran in the launcher's own project"
    assert results(many) == results(alone)
    assert (many.parent / "runs/small/reports/02_train-a.ipynb").exists()
    (many.parent / "runs/small/evals/a/test.parquet").unlink()
    assert on_ray(many, cluster.address, f"file://{tmp_path}/store")[0] == 0
    assert results(many) == results(alone)
