"The ledger: what reaches the disk stays, one writer at a time, damage is noticed and survived"

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cot_distill.asking.ledger import (
    Ledger,
    read_attempts,
    request_key,
    salvage,
    spending,
    status_tally,
)
from cot_distill.core.errors import InputError

WRITER = """
import sys
from cot_distill.asking.ledger import Ledger
with Ledger(sys.argv[1]) as ledger:
    for i in range(100_000):
        attempt = ledger.begin(f"key-{i}", f"p-{i}")
        ledger.finish(attempt, status="ok", is_final=True, raw_body="x" * 500)
        ledger.commit()
        print(i, flush=True)
"""


def filled(path: Path, n: int = 200) -> Path:
    with Ledger(path) as ledger:
        for i in range(n):
            ledger.finish(
                ledger.begin(f"key-{i}", f"p-{i}", reserve_usd=0.5),
                status="ok",
                is_final=True,
                raw_body="body " * 100,
                cost_usd=0.001,
            )
    return path


def test_key_depends_on_what_shapes_the_answer():
    base = {"model": "m", "messages": [{"role": "user", "content": "6 * 7?"}], "temperature": 0.0}
    keys = {
        request_key(base),
        request_key(base, 1),
        request_key(base | {"model": "n"}),
        request_key(base | {"temperature": 0.1}),
        request_key(base | {"messages": []}),
    }
    assert len(keys) == 5


@pytest.mark.parametrize("round_", range(3))
def test_kill_9_loses_nothing_committed(tmp_path, round_):
    path = tmp_path / "ledger.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    seen = -1
    end = time.monotonic() + 60
    for line in process.stdout:
        seen = int(line)
        if seen >= 20 + 37 * round_ or time.monotonic() > end:
            os.kill(process.pid, signal.SIGKILL)
            break
    rest = [int(line) for line in process.stdout.read().split()]
    process.wait()
    last = rest[-1] if rest else seen
    with Ledger(path) as ledger:  # the lock died with its holder; the file is whole
        assert len(list(read_attempts(ledger, only_final=True))) >= last + 1


def test_one_writer(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path), pytest.raises(InputError, match="another run holds"):
        Ledger(path)
    Ledger(path).close()


def test_many_coroutines_share_a_commit(tmp_path):
    commits = []

    class Counting(Ledger):
        def commit(self):
            commits.append(1)
            super().commit()

    async def write(ledger, i):
        ledger.finish(ledger.begin(f"key-{i}", f"p-{i}"), status="ok", is_final=True)
        await ledger.committed()

    async def all_of_them(ledger):
        await asyncio.gather(*(write(ledger, i) for i in range(500)))

    with Counting(tmp_path / "ledger.sqlite") as ledger:
        asyncio.run(all_of_them(ledger))
        other = sqlite3.connect(tmp_path / "ledger.sqlite")
        assert (
            other.execute("SELECT COUNT(*) FROM attempts WHERE is_final = 1").fetchone()[0] == 500
        )
    assert len(commits) < 50


def test_reservations_count_as_spent(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin("a", "p", reserve_usd=0.25)
        ledger.finish(ledger.begin("b", "p", reserve_usd=0.25), status="ok", cost_usd=0.01)
        assert spending(ledger) == (2, pytest.approx(0.26))
        assert status_tally(ledger) == {"ok": 1, "sent": 1}
        assert [a.cost_usd for a in read_attempts(ledger, key="a")] == [0.25]


@pytest.mark.parametrize("damage", ["header", "middle", "not a database"])
def test_damage_is_noticed_and_salvaged(tmp_path, damage):
    path = filled(tmp_path / "ledger.sqlite")
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[:64] = b"\0" * 64
    elif damage == "middle":
        data[8 * 4096 : 10 * 4096] = os.urandom(2 * 4096)
    else:
        data = bytearray(b"this is a text file, not a ledger\n" * 300)
    path.write_bytes(data)
    with pytest.raises(InputError, match="is damaged"):
        Ledger(path)
    if damage != "not a database":
        rescued, n_saved = salvage(path)
        with Ledger(rescued) as ledger:
            assert len(list(read_attempts(ledger))) == n_saved >= 100
    else:
        with pytest.raises(InputError, match="nothing of .* can be read"):
            salvage(path)
    assert path.read_bytes() == bytes(data), "the damaged file stays as it is"


def test_salvage_as_a_command(tmp_path):
    path = filled(tmp_path / "ledger.sqlite", 5)
    done = subprocess.run(
        [sys.executable, "-m", "cot_distill.asking.ledger", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "saved 5 attempts" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_full_disk_is_a_sentence(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger._connection.execute("PRAGMA max_page_count = 12")
        with pytest.raises((InputError, sqlite3.OperationalError)) as caught:
            for i in range(500):
                ledger.finish(ledger.begin(f"key-{i}", "p"), status="ok", raw_body="x" * 2000)
                ledger.commit()
        assert isinstance(caught.value, InputError) and "make room" in str(caught.value)
