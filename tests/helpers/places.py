"Where the project lies, and the data that it does not bring along"

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("COT_DISTILL_DATA", ROOT.parent / "shared" / "data"))
NOTEBOOKS = sorted(  # JupyterLab keeps copies of opened ones beside them
    p for p in (ROOT / "nbs").glob("**/*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
