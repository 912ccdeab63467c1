"""Against a mock of hosted models that nobody here wrote: `@copilotkit/aimock` speaks OpenAI,
Gemini and batches, and misbehaves at random.

`make mock` installs it below tests/mock; without Node these tests are skipped.
"""

import asyncio
import json
import re
import shutil
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from asked import attempts, make_study
from places import ROOT

from cot_distill.asking.replies import Question
from cot_distill.core.errors import CotDistillError, InputError
from cot_distill.core.problems import load_problems
from cot_distill.core.runs import RunFolder
from cot_distill.core.settings import TeacherConfig
from cot_distill.generate import run_generate
from cot_distill.teachers import GeminiTeacher

SERVER = ROOT / "tests" / "mock" / "node_modules" / "@copilotkit" / "aimock" / "dist" / "cli.js"
pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and SERVER.is_file()),
    reason="needs Node 20 and the mock server: make mock",
)
ANSWER = "3 * 4 = 12\n#### 12"
KEY = "sk-marked-0f4e21"


class Mock:
    "A running mock server"

    def __init__(self, folder: Path):
        reply = {"content": ANSWER, "model": "gpt-4o-2024-08-06", "finishReason": "stop"}
        (folder / "fixtures.json").write_text(
            json.dumps({"fixtures": [{"match": {}, "response": reply}]})
        )
        command = ["node", str(SERVER), "-p", "0", "-f", str(folder / "fixtures.json")]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.origin = next(
            match[1]
            for line in self.process.stdout
            if (match := re.search(r"listening on (http://\S+)", line))
        )

    def call(self, method: str, path: str, body: dict | None = None) -> dict | list:
        request = urllib.request.Request(
            self.origin + path,
            method=method,
            data=json.dumps(body).encode() if body else None,
            headers={"Content-Type": "application/json"},
        )
        return json.loads(urllib.request.urlopen(request, timeout=20).read() or "{}")

    def asked(self, path: str) -> list[dict]:
        "Requests of this path that the server has counted"
        return [
            entry
            for entry in self.call("GET", "/__aimock/journal")
            if entry["path"].startswith(path)
        ]


@pytest.fixture
def mock(tmp_path) -> Iterator[Mock]:
    server = Mock(tmp_path)
    yield server
    server.process.terminate()
    server.process.wait(20)


@pytest.fixture(autouse=True)
def quick_and_keyed(monkeypatch):
    monkeypatch.setattr("cot_distill.asking.loop.backoff_s", lambda n: 0.01)
    monkeypatch.setattr("cot_distill.asking.batches.POLL_S", 0.05)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)


def test_openai(mock, tmp_path):
    "Every problem asked once; the dated model that answered is the one asked for"
    run = RunFolder(tmp_path / "run")
    summary = run_generate(
        make_study(f"{mock.origin}/v1", n=12, teacher={"model": "gpt-4o"}), "t", run
    )
    assert (summary.n_kept, summary.models, summary.rerouted) == (12, {"gpt-4o-2024-08-06": 12}, {})
    assert len(mock.asked("/v1/chat/completions")) == 12
    assert set(pd.read_parquet(run.rationales("t"))["completion"]) == {ANSWER}


def test_a_model_that_is_not_served(mock, tmp_path):
    with pytest.raises(InputError, match="no model 'gpt-9'"):
        run_generate(
            make_study(
                f"{mock.origin}/v1", teacher={"model": "gpt-9", "api_key_env": "GEMINI_API_KEY"}
            ),
            "t",
            RunFolder(tmp_path / "run"),
        )
    assert mock.asked("/v1/chat/completions") == []


@pytest.mark.parametrize("sdk", ["google-generativeai", "google-genai"])
def test_gemini(mock, sdk):
    "Google's own path and form, through either of its packages"
    if sdk == "google-genai":
        pytest.importorskip("google.genai", reason="the optional extra genai")
    problem = load_problems("two-step", limit=1)[0]

    async def ask():
        teacher = GeminiTeacher(
            TeacherConfig(
                provider="gemini", model="gemini-2.5-flash-lite", sdk=sdk, base_url=mock.origin
            ),
            deadline_s=20,
        )
        return await teacher.ask(
            Question(problem, 0, [{"role": "user", "content": problem.question}], max_tokens=64)
        )

    answer = asyncio.run(ask())
    assert (answer.status, answer.text, answer.finish_reason) == ("ok", ANSWER, "STOP")
    assert [entry["path"].partition("?")[0] for entry in mock.asked("/v1beta")] == [
        "/v1beta/models/gemini-2.5-flash-lite:generateContent"
    ]


def test_batch(mock, tmp_path):
    "File, batch, two polls, output file: as the Batch API has them"
    run = RunFolder(tmp_path / "run")
    study = make_study(f"{mock.origin}/v1", n=8, teacher={"model": "gpt-4o", "batch": True})
    summary = run_generate(study, "t", run)
    assert summary.n == 8 and summary.attempts == {"ok": 8}
    assert mock.asked("/v1/chat/completions") == []
    assert len([e for e in mock.asked("/v1/batches") if e["method"] == "POST"]) == 1
    assert run_generate(study, "t", run) == summary
    assert len([e for e in mock.asked("/v1/batches") if e["method"] == "POST"]) == 1


def test_chaos(mock, tmp_path):
    """A server that drops, refuses, garbles and hangs up on four of ten calls: every problem is
    answered, once, and each call is in the ledger"""
    run = RunFolder(tmp_path / "run")
    study = make_study(
        f"{mock.origin}/v1",
        n=40,
        teacher={"model": "gpt-4o"},
        max_attempts=20,
        retry_budget_frac=10,
        deadline_s=10,
    )
    mock.call(
        "POST",
        "/__aimock/chaos",
        {"dropRate": 0.15, "malformedRate": 0.1, "disconnectRate": 0.15, "rateLimitRate": 0.02},
    )
    try:
        for _ in range(20):  # the preflight may meet the chaos too, and then says so
            try:
                summary = run_generate(study, "t", run)
                break
            except CotDistillError as err:
                assert "cannot be reached" in str(err) or "unanswered" in str(err), err
    finally:
        mock.call("DELETE", "/__aimock/chaos")
    rows = attempts(run)
    assert summary.n == 40 and "failed" not in summary.drop_reasons
    answered = Counter(row["problem_id"] for row in rows if row["is_final"])
    assert len(answered) == 40 and set(answered.values()) == {1}
    assert {"server_error", "unreachable"} <= {row["status"] for row in rows}
    assert len(rows) == len(mock.asked("/v1/chat/completions"))
