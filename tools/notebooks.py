"""Run notebooks in place with their default parameters, clean them, export the library, write
README.md.

    python tools/notebooks.py [NAME ...]      e.g. 02_train grading/answer; none is all

Outputs stay in the notebooks: the reader of the site sees them.
"""

import os
import subprocess
import sys
from pathlib import Path

from check_sync import write_all

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def main() -> None:
    found = sorted((ROOT / "nbs").glob("[!.]*/*.ipynb")) + sorted((ROOT / "nbs").glob("*.ipynb"))
    asked = {ROOT / "nbs" / f"{name}.ipynb" for name in sys.argv[1:]}
    if unknown := asked - set(found):
        sys.exit(f"no such notebook: {', '.join(str(p.relative_to(ROOT)) for p in unknown)}")
    environment = {
        **os.environ,
        "COT_DISTILL_PROGRESS": "off",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore::SyntaxWarning",  # of packages compiled for the first time: paths
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    chosen = [path for path in found if path in asked or not asked]
    run = [sys.executable, "-m", "nbconvert", "--log-level=ERROR", "--to", "notebook"]
    for number, path in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {path.relative_to(ROOT)}", flush=True)
        subprocess.run(
            [*run, "--execute", "--inplace", path], check=True, env=environment, cwd=ROOT
        )
    write_all()


if __name__ == "__main__":
    main()
