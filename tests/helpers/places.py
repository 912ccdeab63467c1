"Where the project lies, and the data that it does not bring along"

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("COT_DISTILL_DATA", ROOT.parent / "shared" / "data"))
