"Run folders: whole files, honest markers, one run at a time, nothing private in the provenance"

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from cot_distill.core import runs
from cot_distill.core.config import load_study, parse_study, to_toml
from cot_distill.core.errors import InputError
from cot_distill.core.files import (
    atomic_path,
    fingerprint,
    locked,
    read_json,
    read_parquet,
    write_json,
    write_parquet,
)
from cot_distill.core.inputs import begin_stage, finish_stage
from cot_distill.core.runs import (
    RunFolder,
    open_chapter,
    open_run,
    provenance,
    record_run,
    study_in,
)

TINY = {
    "name": "tiny",
    "problems": {"source": "two-step"},
    "eval_sets": [{"name": "two-step", "source": "two-step"}],
    "teachers": {"human": {"provider": "human"}},
}


def test_a_writer_killed_at_any_instant_leaves_a_whole_file(tmp_path: Path):
    path = tmp_path / "x.json"
    code = (
        "from cot_distill.core.files import write_json\n"
        "i = 0\n"
        "while True:\n"
        "    i += 1\n"
        f"    write_json({str(path)!r}, {{'i': i, 'pad': 'x' * 200000}})\n"
    )
    for pause in (0.01, 0.05, 0.11, 0.17):
        writer = subprocess.Popen([sys.executable, "-c", code])
        while not path.exists():
            time.sleep(0.01)
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert len(read_json(path)["pad"]) == 200000


def test_an_error_while_writing_leaves_the_old_file_and_no_litter(tmp_path: Path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(KeyError), atomic_path(tmp_path / "x.json") as part:
        part.write_text("half")
        raise KeyError("x")
    assert read_json(tmp_path / "x.json") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_is_a_sentence_and_the_old_file_stands(tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        write_json(small / "x.json", {"n": 1})
        with pytest.raises(InputError, match="no space is left"):
            write_json(small / "x.json", {"pad": "x" * 200_000})
        assert read_json(small / "x.json") == {"n": 1}
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_broken_files_are_named(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"half": ')
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    write_parquet(tmp_path / "b.parquet", pd.DataFrame({"x": range(1000)}))
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    for read, name in (
        (read_json, "a.json"),
        (read_parquet, "a.parquet"),
        (read_parquet, "b.parquet"),
        (read_json, "none.json"),
        (read_parquet, "none.parquet"),
    ):
        with pytest.raises(InputError, match=name):
            read(tmp_path / name)


def test_a_stage_knows_new_half_done_done_and_different(tmp_path: Path):
    inputs = {"seed": 0, "train": {"lr": 1e-5}}
    assert [begin_stage(tmp_path, "train", inputs) for _ in range(2)] == ["new", "resume"]
    finish_stage(tmp_path, "train", n=3)
    assert begin_stage(tmp_path, "train", {"train": {"lr": 1e-5}, "seed": 0}) == "done"
    with pytest.raises(InputError, match=r"train.lr: 1e-05 -> 0.0001"):
        begin_stage(tmp_path, "train", {"seed": 0, "train": {"lr": 1e-4}})


def test_the_second_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path):
    code = (
        "import time\n"
        "from cot_distill.core.files import locked\n"
        f"with locked({str(tmp_path / 'x.lock')!r}):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another run holds"), locked(tmp_path / "x.lock"):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path / "x.lock"):
        pass


def test_more_repeats_are_the_same_study(tmp_path: Path):
    open_run(tmp_path / "run", parse_study(TINY))
    run = open_run(tmp_path / "run", parse_study(TINY | {"repeats": 3}))
    assert list(load_study(run.config_file).variants()) == ["human", "human.seed1", "human.seed2"]


def test_the_compute_type_is_settled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "auto is measured when a run is made; the run goes on in that type wherever it goes on"
    monkeypatch.setattr(runs, "fastest_dtype", lambda device: "float32")
    (tmp_path / "tiny.toml").write_text(to_toml(parse_study(TINY)), encoding="utf-8")
    assert load_study(tmp_path / "tiny.toml").student.dtype == "auto"
    study, run = open_chapter(str(tmp_path / "tiny.toml"), run_dir=str(tmp_path / "run"))
    assert study.student.dtype == "float32"
    assert load_study(run.config_file).student.dtype == "float32"
    monkeypatch.setattr(runs, "fastest_dtype", lambda device: "bfloat16")
    study, _ = open_chapter(str(tmp_path / "tiny.toml"), run_dir=str(tmp_path / "run"))
    assert study.student.dtype == "float32"
    assert study_in(run, parse_study(TINY)).student.dtype == "float32"
    with pytest.raises(InputError, match="student.dtype: 'float32' -> 'bfloat16'"):
        open_run(run.path, parse_study(TINY | {"student": {"dtype": "bfloat16"}}))


def test_a_run_folder_takes_new_teachers_and_refuses_new_science(tmp_path: Path):
    open_run(tmp_path / "r", parse_study(TINY))
    more = TINY | {"teachers": TINY["teachers"] | {"x": {"provider": "openai", "rpm": 5}}}
    open_run(tmp_path / "r", parse_study(more))
    faster = TINY | {
        "teachers": TINY["teachers"] | {"x": {"provider": "openai", "rpm": 50}},
        "generate": {"max_usd": 3},
    }
    assert open_run(tmp_path / "r", parse_study(faster)).config_file.exists()
    with pytest.raises(InputError, match="train.epochs: 2.0 -> 3.0|train.epochs: 2 -> 3"):
        open_run(tmp_path / "r", parse_study(faster | {"train": {"epochs": 3}}))


def test_a_chapter_without_a_run_folder_of_its_own(tmp_path: Path):
    from cot_distill.core.config import to_toml

    (tmp_path / "lesson.toml").write_text(to_toml(parse_study(TINY | {"name": "lesson"})))
    _, run = open_chapter(str(tmp_path / "lesson.toml"), limit=2)
    assert run.path.is_absolute() and "lesson" in run.path.name
    (tmp_path / "tiny.toml").write_text(to_toml(parse_study(TINY)))
    study, run = open_chapter(str(tmp_path / "tiny.toml"), run_dir=str(tmp_path / "mine"))
    assert (study.problems.limit, run.path) == (None, tmp_path / "mine")


def test_a_report_opened_where_it_lies_belongs_to_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = open_run(tmp_path / "runs/tiny", parse_study(TINY))
    run.reports_dir.mkdir()
    monkeypatch.chdir(run.reports_dir)
    study, found = open_chapter(
        "../runs/tiny/config.toml", run_dir="../runs/tiny"
    )  # as papermill was told, seen from nbs/
    assert study.name == "tiny" and found.path.resolve() == run.path
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no study"):
        open_chapter("../runs/tiny/config.toml", run_dir="../runs/tiny")


def test_stages_side_by_side_all_reach_run_json(tmp_path: Path):
    code = (
        "import sys\n"
        "from cot_distill.core.runs import RunFolder, record_run\n"
        "for i in range(5): record_run(RunFolder(sys.argv[1]), 'train', f'{sys.argv[2]}-{i}', "
        "wall_s=1.0)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(4)
    ]
    assert [w.wait() for w in writers] == [0, 0, 0, 0]
    assert len(read_json(tmp_path / "run.json")["stages"]) == 20


def test_a_copy_without_its_repository_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert provenance()["commit"] is None
    monkeypatch.setenv("COT_DISTILL_COMMIT", "0123abc")
    assert provenance()["commit"] == "0123abc"


def test_provenance_is_a_fixed_list_without_anything_private(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-marked-fake-key")
    text = json.dumps(provenance())
    assert "sk-marked" not in text
    assert str(Path.home()) not in text
    assert socket.gethostname() not in text


def test_fingerprints_do_not_depend_on_order_but_on_every_value():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint(x) for x in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, [1])}) == 5


def test_facts_of_a_stage_replace_those_of_its_earlier_run(tmp_path: Path):
    run = RunFolder(tmp_path)
    record_run(run, "generate", "human", kept=3)
    record_run(run, "generate", "human", kept=4)
    assert read_json(run.run_json)["stages"]["generate/human"]["kept"] == 4
