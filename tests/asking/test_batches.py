"""The Batch API over real sockets: submitted, killed, found again, expired half-way, refused; half
the price"""

import json
import os
import subprocess
import sys
import time

import pandas as pd
import pytest
from asked import HELPERS, RUN, make_study
from faulty_server import FaultyServer, Reply, Request, completion

from cot_distill.asking.ledger import Ledger
from cot_distill.core.errors import InputError, ResumeLater
from cot_distill.core.runs import RunFolder
from cot_distill.generate import run_generate


class BatchServer(FaultyServer):
    "Files and batches as OpenAI has them; a batch ends after it has been looked at `looks` times"

    def __init__(self, looks: int = 1, end: str = "completed", answered: float = 1.0):
        super().__init__()
        self.looks, self.end, self.answered = looks, end, answered
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict] = {}
        self.extra = self.route
        self.create_delay_s = 0.0
        self.reply_to = lambda line: {"status_code": 200, "body": completion()}

    def route(self, request: Request) -> Reply | None:
        parts = request.path.split("?")[0].removeprefix("/v1/").split("/")
        if parts[0] == "files" and request.method == "POST":
            raw = request.body["raw"]
            lines = [
                line
                for line in raw.replace("\r\n", "\n").split("\n")
                if line.startswith('{"custom_id"')
            ]
            file_id = f"file-{len(self.files)}"
            self.files[file_id] = "\n".join(lines)
            return Reply(
                body={
                    "id": file_id,
                    "object": "file",
                    "bytes": len(raw),
                    "created_at": 1,
                    "filename": "batch.jsonl",
                    "purpose": "batch",
                    "status": "processed",
                }
            )
        if parts[0] == "files":
            return Reply(body=self.files[parts[1]], content_type="application/octet-stream")
        if parts[0] == "batches" and request.method == "POST":
            batch_id = f"batch_{len(self.batches)}"
            self.batches[batch_id] = self.batch(batch_id, request.body) | {"seen": 0}
            return Reply(body=self.shown(batch_id), delay_s=self.create_delay_s)
        if parts[0] == "batches" and len(parts) == 1:
            return Reply(
                body={
                    "object": "list",
                    "data": [self.shown(b) for b in reversed(self.batches)],
                    "has_more": False,
                }
            )
        if parts[0] == "batches":
            self.look(self.batches[parts[1]])
            return Reply(body=self.shown(parts[1]))
        return None

    def batch(self, batch_id: str, body: dict) -> dict:
        facts = {
            "id": batch_id,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "created_at": 1,
        }
        return facts | {
            "status": "validating",
            "metadata": body.get("metadata"),
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
        }

    def shown(self, batch_id: str) -> dict:
        return {k: v for k, v in self.batches[batch_id].items() if k != "seen"}

    def look(self, batch: dict) -> None:
        "Once looked at often enough, the batch ends"
        batch["seen"] += 1
        if batch["status"] != "validating" or batch["seen"] < self.looks:
            return
        batch["status"] = self.end
        if self.end == "failed":
            batch["errors"] = {
                "object": "list",
                "data": [
                    {"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}
                ],
            }
            return
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        self.end = "completed" if self.end == "expired" else self.end
        n = round(self.answered * len(lines))
        out = [
            {
                "id": "r",
                "custom_id": line["custom_id"],
                "response": self.reply_to(line),
                "error": None,
            }
            for line in reversed(lines[:n])
        ]
        late = [
            {
                "id": "r",
                "custom_id": line["custom_id"],
                "response": None,
                "error": {"code": "batch_expired", "message": "window ended"},
            }
            for line in lines[n:]
        ]
        self.answered = 1.0
        for name, rows in (("output_file_id", out), ("error_file_id", late)):
            if rows:
                batch[name] = f"{name}-{batch['id']}"
                self.files[batch[name]] = "\n".join(map(json.dumps, rows))


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr("cot_distill.asking.batches.POLL_S", 0.02)


def study_of(server: FaultyServer, n: int = 10, **teacher):
    return make_study(server.url, n=n, teacher={"batch": True} | teacher)


def test_a_batch(tmp_path):
    with BatchServer(looks=3) as server:
        run = RunFolder(tmp_path)
        summary = run_generate(study_of(server), "t", run)
        assert summary.n_kept == 10 and server.requests == [], "no single call was made"
        assert summary.cost_usd == pytest.approx(0.5 * 10 * (20 * 1.0 + 10 * 2.0) / 1e6)
        run_generate(study_of(server), "t", run)
        assert len(server.batches) == 1
    assert len(pd.read_parquet(run.rationales("t"))) == 10


def test_split_to_the_queue(tmp_path):
    with BatchServer(looks=2) as server:
        summary = run_generate(study_of(server, batch_queue_tokens=200), "t", RunFolder(tmp_path))
        assert summary.n_kept == 10 and len(server.batches) >= 3
        sizes = [
            len(text.splitlines())
            for name, text in server.files.items()
            if name.startswith("file-")
        ]
        assert sum(sizes) == 10


def test_expired_half_way(tmp_path):
    "What was finished is taken; the rest costs nothing and is asked again"
    with BatchServer(end="expired", answered=0.6) as server:
        summary = run_generate(study_of(server), "t", RunFolder(tmp_path))
        assert summary.n_kept == 10 and len(server.batches) >= 2
        assert summary.cost_usd == pytest.approx(0.5 * 10 * 40 / 1e6)
        assert summary.attempts["timeout"] >= 4


def test_refused_batch(tmp_path):
    run = RunFolder(tmp_path)
    with BatchServer(end="failed") as server:
        with pytest.raises(ResumeLater, match="Enqueued token limit reached"):
            run_generate(study_of(server), "t", run)
        server.end = "completed"
        assert run_generate(study_of(server), "t", run).n_kept == 10


def test_mixed_answers(tmp_path):
    "Cut texts get a wider second try, blocked ones stay blocked, broken ones are asked again"
    seen: dict[str, int] = {}

    def reply(line):
        question, cap = line["body"]["messages"][-1]["content"], line["body"]["max_tokens"]
        seen[question] = seen.get(question, 0) + 1
        first = seen[question] == 1
        if len(seen) % 4 == 1 and first:
            return {"status_code": 200, "body": completion(text="3 *", finish="length")}
        if len(seen) % 4 == 2:
            return {"status_code": 200, "body": completion(text="", finish="content_filter")}
        if len(seen) % 4 == 3 and first:
            return {"status_code": 500, "body": {"error": {"message": "oops"}}}
        return {"status_code": 200, "body": completion(text=f"cap {cap}\n#### 1")}

    with BatchServer() as server:
        server.reply_to = reply
        run = RunFolder(tmp_path)
        summary = run_generate(study_of(server, n=4), "t", run)
    assert summary.drop_reasons == {"blocked": 1}
    assert pd.read_parquet(run.rationales("t"))["completion"].str.contains("cap 128").sum() == 1


def test_cap_in_dollars(tmp_path):
    "Nothing beyond the cap is submitted; what was submitted is collected"
    run = RunFolder(tmp_path)
    with BatchServer() as server:
        study = make_study(
            server.url, n=10, teacher={"batch": True, "batch_queue_tokens": 200}, max_usd=0.00022
        )
        for _ in range(3):
            with pytest.raises(ResumeLater, match="max_usd"):
                run_generate(study, "t", run)
        n_submitted = sum(
            len(t.splitlines()) for name, t in server.files.items() if name.startswith("file-")
        )
        assert 0 < n_submitted < 10
    with Ledger(run.ledger("t")) as ledger:
        rows = ledger._connection.execute(
            "SELECT SUM(is_final), SUM(cost_usd) FROM attempts"
        ).fetchone()
    assert rows[0] == n_submitted and rows[1] <= 0.00022


def test_only_where_there_is_one(tmp_path):
    study = make_study(
        "http://127.0.0.1:9/v1", teacher={"provider": "human", "model": "", "batch": True}
    )
    with pytest.raises(InputError, match="Batch API"):
        run_generate(study, "t", RunFolder(tmp_path))


@pytest.mark.parametrize("moment", ["while submitting", "while waiting"])
def test_killed_and_found_again(tmp_path, moment):
    "A process that dies finds its batch by number or by tag; nothing is submitted twice"
    run = RunFolder(tmp_path / "run")
    with BatchServer(looks=10**9) as server:
        server.create_delay_s = 30.0 if moment == "while submitting" else 0.0
        code = RUN.format(
            tests=str(HELPERS),
            url=server.url,
            n=10,
            run=str(run.path),
            teacher={"batch": True},
        ).replace("deadline_s=20", "deadline_s=1.0")
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"COT_DISTILL_PROGRESS": "off"}
        )
        end = time.monotonic() + 120
        while not (
            server.batches
            and (moment == "while submitting" or server.batches["batch_0"]["seen"] >= 1)
        ):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
        server.looks, server.create_delay_s = 0, 0.0
        summary = run_generate(study_of(server), "t", run)
        assert summary.n_kept == 10 and len(server.batches) == 1


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(401, {"error": {"message": "Incorrect API key provided"}}), InputError),
        (Reply(503, ""), ResumeLater),
        (Reply(how="reset"), ResumeLater),
        (Reply(body=b"\x00\xff this is not HTTP\r\n\r\n", how="raw"), ResumeLater),
        (Reply(body='{"id": '), ResumeLater),
        (Reply(body="<html>hello</html>", content_type="text/html"), ResumeLater),
    ],
)
def test_the_interface_itself_fails(tmp_path, reply, kind):
    with BatchServer() as server:
        route = server.route
        server.extra = lambda request: (
            reply
            if request.method == "POST" and request.path.endswith("/batches")
            else route(request)
        )
        with pytest.raises(kind, match="batch"):
            run_generate(study_of(server), "t", RunFolder(tmp_path))
        server.extra = route
        assert run_generate(study_of(server), "t", RunFolder(tmp_path)).n_kept == 10
