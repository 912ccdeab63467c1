"""Every test runs offline, without anybody's keys and without bars; importing this file loads no
torch"""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

for name in [
    n
    for n in os.environ
    if n.endswith(("_API_KEY", "_API_TOKEN")) or n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
]:
    del os.environ[name]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "COT_DISTILL_PROGRESS": "off",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "JUPYTER_PLATFORM_DIRS": "1",
}  # what the tests start inherits it
if n_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # side by side: share cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // n_workers)))


@pytest.fixture(autouse=True)
def stays_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    "A test that tries to leave the machine fails where it tries"
    real = socket.socket.connect

    def connect(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0])
            if not (host.startswith("127.") or host in ("::1", "localhost", "0.0.0.0")):
                raise OSError(f"a test tried to reach {host}; tests stay on this machine")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield


@pytest.fixture
def root() -> Path:
    "The project's folder"
    return ROOT
