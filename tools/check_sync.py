"""Export, clean and convert must change nothing: notebooks, library and README say the same.

python tools/check_sync.py       exit 1, naming the files, when they do not agree
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def contents() -> dict[Path, str]:
    "Hash of every file that the tools write"
    files = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("cot_distill/**/*.py"), ROOT / "README.md"]
    files = [p for p in files if p.exists() and ".ipynb_checkpoints" not in p.parts]
    return {p.relative_to(ROOT): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main() -> None:
    before = contents()
    # where IN_TEST is set, as nbdev's own test runner sets it, nbdev_export returns at once and says nothing
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    for command in (
        [BIN / "nbdev_export"],
        [BIN / "nbdev_clean"],
        [sys.executable, ROOT / "tools" / "readme.py"],
    ):
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
    after = contents()
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed:
        sys.exit(
            "export, clean or README changed files; commit what they made:\n  "
            + "\n  ".join(changed)
        )
    print(f"in step: {len(after)} notebooks, modules and README")


if __name__ == "__main__":
    main()
