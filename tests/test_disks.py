"A read-only or full disk, under every stage: one sentence, exit code 2, nothing lost"

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_student import make_student, make_study

from cot_distill.cli import main
from cot_distill.core.config import to_toml
from cot_distill.core.showing import Progress

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("student"), hidden=32, layers=1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    "A small file system of its own"
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def call(
    tmp_path: Path,
    disk: Path,
    student: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, str]]:
    "A command on a tiny study whose run lies on that disk: its exit code and what it printed"
    # the checks beforehand see plenty of room: what is tested is what comes after them
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    study = make_study(student, n=6, checkpoint_every=1, epochs=1)
    cfg = study.eval.model_copy(update={"max_new_tokens": 8, "n_bootstrap": 200})
    text = to_toml(study.model_copy(update={"eval": cfg}), tmp_path)
    (tmp_path / "tiny.toml").write_text(text)

    def call(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main(
                [words[0], str(tmp_path / "tiny.toml"), "--run-dir", str(disk / "run"), *words[1:]]
            )
        told = capsys.readouterr()
        return caught.value.code or 0, told.out + told.err

    return call


STAGES = (["generate"], ["train"], ["eval", "--teachers", "base"])


def fill(disk: Path, leave_kb: int) -> None:
    "Use a disk up to so many kilobytes"
    seen = os.statvfs(disk)
    free_kb = seen.f_bavail * seen.f_frsize // 1024
    (disk / "filler").write_bytes(bytes(1024 * max(free_kb - leave_kb, 0)))


@pytest.mark.parametrize("words", [*STAGES, ["run", "--executor", "inline"]], ids=lambda w: w[0])
def test_a_read_only_run_folder_is_a_sentence(disk: Path, call: Callable, words: list[str]) -> None:
    "No traceback, whether the folder is new or half done"
    for before in STAGES[: STAGES.index(words) if words in STAGES else 0]:
        assert call(*before)[0] == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, told = call(*words)
    assert code == 2 and "read-only" in told and "Traceback" not in told, told


@pytest.mark.parametrize("words", STAGES, ids=lambda w: w[0])
def test_a_disk_that_runs_full_is_a_sentence_and_the_stage_goes_on(
    disk: Path, call: Callable, words: list[str]
) -> None:
    "Wherever in the stage the room ends; with room again the same command finishes it"
    for before in STAGES[: STAGES.index(words)]:
        assert call(*before)[0] == 0
    codes = []
    for leave_kb in (0, 8, 24, 64, 160, 400):
        fill(disk, leave_kb)
        code, told = call(*words)
        (disk / "filler").unlink()
        full = code == 2 and ("no space" in told.lower() or "make room" in told)
        assert (full or code == 0) and "Traceback" not in told, (leave_kb, code, told)
        codes.append(code)
    assert codes[0] == 2 and call(*words)[0] == 0


def test_the_progress_file_never_speaks_over_the_work(disk: Path) -> None:
    "On a full or read-only disk the error that is seen is the work's own"
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ZeroDivisionError), Progress(2, "work", disk / "status.json") as bar:
        bar.advance()
        1 / 0
