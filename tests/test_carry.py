"What is carried to a bare machine arrives whole, or says what is missing"

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from carry import DATA, STUDENT, WHEELS  # noqa: E402


def carry(*words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "carry.py", *map(str, words)],
        capture_output=True,
        text=True,
    )


@pytest.fixture
def packed(tmp_path) -> Path:
    "Five MiB in pieces of one, no wheels"
    for number, name in enumerate([*DATA, "teachers/gpt-4o.jsonl"]):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(json.dumps({"question": str(number)}) + "\n")
    (tmp_path / "student.gguf").write_bytes(bytes(range(256)) * 4096 * 5)
    done = carry(
        "pack",
        "--data",
        tmp_path / "data",
        "--student",
        tmp_path / "student.gguf",
        "--have",
        ",".join(WHEELS),
        "--piece-mib",
        1,
        "--out",
        tmp_path / "carry",
    )
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_everything_arrives(packed):
    pieces = list((packed / "carry").glob("*.piece"))
    assert len(pieces) == 6 and max(p.stat().st_size for p in pieces) <= 1 << 20
    done = carry("unpack", "--carry", packed / "carry", "--to", packed / "carried")
    assert done.returncode == 0, done.stderr
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert (
        f"COT_DISTILL_COMMIT={commit} " in done.stdout and "configs/reference.toml" in done.stdout
    )
    assert (packed / "carried" / "data" / "student" / STUDENT).read_bytes() == (
        packed / "student.gguf"
    ).read_bytes()
    for name in [*DATA, "teachers/gpt-4o.jsonl"]:
        assert (packed / "carried" / "data" / name).read_text() == (
            packed / "data" / name
        ).read_text()


def test_what_did_not_arrive_is_named_and_nothing_is_written(packed):
    (packed / "carry" / "001.piece").unlink()
    (packed / "carry" / "003.piece").write_bytes(b"x")
    done = carry("unpack", "--carry", packed / "carry", "--to", packed / "carried")
    assert done.returncode == 1 and "001.piece (missing), 003.piece (damaged)" in done.stderr
    assert not (packed / "carried").exists()


def test_a_missing_source_is_named(packed):
    (packed / "data" / "gsm8k" / "train.jsonl").unlink()
    done = carry(
        "pack",
        "--data",
        packed / "data",
        "--student",
        packed / "student.gguf",
        "--have",
        ",".join(WHEELS),
        "--out",
        packed / "again",
    )
    assert done.returncode == 1 and "train.jsonl" in done.stderr
