"""Export, clean and convert must change nothing: notebooks, library and README say the same.

python tools/check_sync.py       exit 1, naming the files, when they do not agree
"""

import hashlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.pop("IN_TEST", None)  # where nbdev's test runner has set it, nbdev exports nothing


def contents() -> dict[Path, str]:
    "Hash of every file that the tools write"
    files = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("cot_distill/**/*.py"), ROOT / "README.md"]
    files = [p for p in files if p.exists() and ".ipynb_checkpoints" not in p.parts]
    return {p.relative_to(ROOT): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def write_all() -> None:
    "Write everything that is made from notebooks, all in this process"
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export
    from readme import write_readme

    os.chdir(ROOT)
    nbdev_export()
    nbdev_clean()
    write_readme()


def main() -> None:
    before = contents()
    write_all()
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
