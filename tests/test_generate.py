"""Generation against real loopback sockets: every fault, what is sent, what the ledger holds
afterwards."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from asked import GOOD, HELPERS, RUN, TOO_MANY, always, attempts, first, make_study
from faulty_server import FaultyServer, Reply, completion, error

from cot_distill.asking.cards import pace_of, tell_solved
from cot_distill.asking.ledger import Ledger, read_attempts
from cot_distill.asking.pace import Pacer
from cot_distill.core.config import parse_study
from cot_distill.core.errors import InputError, ResumeLater
from cot_distill.core.problems import load_problems
from cot_distill.core.runs import RunFolder
from cot_distill.core.settings import TeacherConfig
from cot_distill.generate import COLUMNS, run_generate


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch):
    "Wait milliseconds where production waits seconds"
    monkeypatch.setattr("cot_distill.asking.loop.backoff_s", lambda n: 0.01)
    monkeypatch.setattr("cot_distill.asking.pace.backoff_s", lambda n: 0.01)


HTML = Reply(body="<html>502 Bad Gateway</html>", content_type="text/html")

# name, script, requests sent, statuses in the ledger, outcome: a drop reason, None (kept), or the
# error that stops the teacher
FAULTS = [
    ("good", always(GOOD), 1, ["ok"], None),
    ("401 bad key", always(Reply(401, error("Incorrect API key provided: sk-x"))),
     1, ["bad_key"], InputError),
    ("403 forbidden", always(Reply(403, error("Country not supported"))),
     1, ["bad_key"], InputError),
    ("404 model retired",
     always(Reply(404, error("The model `test-model` does not exist", "model_not_found"))),
     1, ["no_model"], InputError),
    ("400 model not exist", always(Reply(400, error("Model Not Exist"))),
     1, ["no_model"], InputError),
    ("429 with Retry-After", first(Reply(429, TOO_MANY, {"Retry-After": "0.3"})),
     2, ["rate_limited", "ok"], None),
    ("429 with retry-after-ms", first(Reply(429, TOO_MANY, {"retry-after-ms": "200"})),
     2, ["rate_limited", "ok"], None),
    ("429 without", first(Reply(429, TOO_MANY), Reply(429, TOO_MANY)),
     3, ["rate_limited", "rate_limited", "ok"], None),
    ("429 for ever", always(Reply(429, TOO_MANY)), 3, ["rate_limited"] * 3, ResumeLater),
    ("429 insufficient_quota",
     always(Reply(429, error("You exceeded your current quota", "insufficient_quota"))),
     1, ["quota"], ResumeLater),
    ("402 insufficient balance", always(Reply(402, error("Insufficient Balance"))),
     1, ["quota"], ResumeLater),
    ("429 requests per day",
     always(Reply(429, error("Rate limit reached on requests per day (RPD): Limit 10000"))),
     1, ["quota"], ResumeLater),
    ("429 wait of two hours", always(Reply(429, TOO_MANY, {"Retry-After": "7200"})),
     1, ["rate_limited"], ResumeLater),
    ("500 once", first(Reply(500, error("oops"))), 2, ["server_error", "ok"], None),
    ("502 html", first(Reply(502, "<html>bad gateway</html>", content_type="text/html")),
     2, ["server_error", "ok"], None),
    ("503 twice", first(Reply(503, error("overloaded")), Reply(503, "")),
     3, ["server_error", "server_error", "ok"], None),
    ("504", first(Reply(504, "")), 2, ["server_error", "ok"], None),
    ("529 overloaded", first(Reply(529, error("overloaded_error"))),
     2, ["server_error", "ok"], None),
    ("500 for ever", always(Reply(500, error("oops"))), 3, ["server_error"] * 3, ResumeLater),
    ("connection reset", first(Reply(how="reset")), 2, ["unreachable", "ok"], None),
    ("short body", first(Reply(body=completion(), how="short")), 2, ["unreachable", "ok"], None),
    ("blank lines keep it alive", first(Reply(body=completion(), how="blank_lines")),
     2, ["timeout", "ok"], None),
    ("slow drip", first(Reply(body=completion(), how="drip")), 2, ["timeout", "ok"], None),
    ("stall", first(Reply(body=completion(), how="stall")), 2, ["timeout", "ok"], None),
    ("slow answer", first(Reply(body=completion(), delay_s=1.5)), 2, ["timeout", "ok"], None),
    ("empty body", first(Reply(body=b"")), 2, ["malformed", "ok"], None),
    ("truncated JSON", first(Reply(body='{"choices": [{"mess')), 2, ["malformed", "ok"], None),
    ("html with status 200", first(HTML), 2, ["malformed", "ok"], None),
    ("wrong content type", first(Reply(body=json.dumps(completion()), content_type="text/plain")),
     1, ["ok"], None),
    ("no choices", first(Reply(body={"id": "x"})), 2, ["malformed", "ok"], None),
    ("empty choices", first(Reply(body={"choices": []})), 2, ["malformed", "ok"], None),
    ("choices null", first(Reply(body={"choices": None})), 2, ["malformed", "ok"], None),
    ("a JSON list", first(Reply(body=[1, 2])), 2, ["malformed", "ok"], None),
    ("content a list", first(Reply(body=completion(text=["a"]))), 2, ["malformed", "ok"], None),
    ("not UTF-8", first(Reply(body=b"\xff\xfe{}")), 2, ["malformed", "ok"], None),
    ("malformed for ever", always(Reply(body="{")), 3, ["malformed"] * 3, "malformed"),
    ("empty content", first(Reply(body=completion(text=""))), 2, ["empty", "ok"], None),
    ("null content", first(Reply(body=completion(text=None))), 2, ["empty", "ok"], None),
    ("empty for ever", always(Reply(body=completion(text="  "))), 3, ["empty"] * 3, "empty"),
    ("cut once", first(Reply(body=completion(text="3 * 4", finish="length"))),
     2, ["truncated", "ok"], None),
    ("cut twice", always(Reply(body=completion(text="3 * 4", finish="length"))),
     2, ["truncated", "truncated"], "truncated"),
    ("content filter", always(Reply(body=completion(text="", finish="content_filter"))),
     1, ["blocked"], "blocked"),
    ("refusal", always(Reply(body=completion(text=None, refusal="I cannot help"))),
     1, ["blocked"], "blocked"),
    ("thinking only", always(Reply(body=completion(text="", reasoning_content="hm, let me see"))),
     1, ["thinking_only"], InputError),
    ("redirect", always(Reply(302, "", {"Location": "http://127.0.0.1:9/steal"})),
     3, ["turned_away"] * 3, ResumeLater),
    ("no usage", always(Reply(body=completion(usage=False))), 1, ["ok"], None),
    ("no final answer", always(Reply(body=completion(text="I like turtles."))), 1, ["ok"], None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "n_sent", "statuses", "outcome"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_fault(tmp_path, script, n_sent, statuses, outcome):
    run = RunFolder(tmp_path)
    with FaultyServer(script) as server:
        study = make_study(server.url)
        if isinstance(outcome, type):
            with pytest.raises(outcome) as caught:
                run_generate(study, "t", run)
            assert len(str(caught.value)) > 30
        else:
            run_generate(study, "t", run)
            row = pd.read_parquet(run.rationales("t")).iloc[0]
            assert (None if pd.isna(row["drop_reason"]) else row["drop_reason"]) == outcome
            assert bool(row["kept"]) == (outcome is None)
        assert len(server.requests) == n_sent
    rows = attempts(run)
    assert [r["status"] for r in rows] == statuses
    assert sum(r["is_final"] for r in rows) == (0 if isinstance(outcome, type) else 1)


def test_columns_and_card(tmp_path):
    run = RunFolder(tmp_path)
    with FaultyServer() as server:
        summary = run_generate(make_study(server.url, n=5), "t", run)
    table = pd.read_parquet(run.rationales("t"))
    assert tuple(table.columns) == COLUMNS
    assert list(table["problem_id"]) == [p.problem_id for p in load_problems("two-step", limit=5)]
    assert summary.cost_usd == pytest.approx(5 * (20 * 1.0 + 10 * 2.0) / 1e6)
    card = (run.teacher_dir("t") / "README.md").read_text()
    assert "test-model (5)" in card and "{question}" in card
    assert json.loads(run.run_json.read_text())["stages"]["generate/t"]["n"] == 5


def test_nothing_is_asked_twice(tmp_path):
    run = RunFolder(tmp_path)
    with FaultyServer() as server:
        study = make_study(server.url, n=6)
        run_generate(study, "t", run)
        run_generate(study, "t", run)
        assert len(server.requests) == 6
        run.rationales("t").write_bytes(
            b"half a parq"
        )  # broken: made again from the ledger, for nothing
        run_generate(study, "t", run)
        assert len(server.requests) == 6
    assert len(pd.read_parquet(run.rationales("t"))) == 6


def test_a_larger_second_try_is_wider(tmp_path):
    cut = Reply(body=completion(text="3 *", finish="length"))
    with FaultyServer(first(cut)) as server:
        run_generate(make_study(server.url), "t", RunFolder(tmp_path))
        assert [r.body["max_tokens"] for r in server.requests] == [64, 128]


def test_long_answers_are_no_trouble(tmp_path):
    "Thirty texts cut at their limit get thirty wider tries: that is no storm of retries"
    with FaultyServer(always(Reply(body=completion(text="3 *", finish="length")))) as server:
        summary = run_generate(make_study(server.url, n=30), "t", RunFolder(tmp_path))
        assert len(server.requests) == 60 and summary.drop_reasons == {"truncated": 30}


@pytest.mark.parametrize(("setting", "n_sent"), [({"max_requests": 3}, 3), ({"max_usd": 0.001}, 2)])
def test_caps_are_hard(tmp_path, setting, n_sent):
    "Checked before each send, across restarts too: ten more tries send nothing more"
    run = RunFolder(tmp_path)
    with FaultyServer(always(Reply(body=completion(), delay_s=0.05))) as server:
        study = make_study(
            server.url, n=20, teacher={"max_in_flight": 1}, max_tokens=200, **setting
        )
        for _ in range(4):
            with pytest.raises(ResumeLater, match=next(iter(setting))):
                run_generate(study, "t", run)
        assert abs(len(server.requests) - n_sent) <= (0 if "max_requests" in setting else 20)
        spent = sum(r["cost_usd"] for r in attempts(run))
        assert spent <= setting.get("max_usd", 1.0)


def test_shared_gate(tmp_path):
    "One 429 with Retry-After holds everybody back"
    times = []

    def script(request, n):
        times.append(time.monotonic())
        return Reply(429, TOO_MANY, {"Retry-After": "1"}) if n == 1 else GOOD

    with FaultyServer(script) as server:
        run_generate(
            make_study(server.url, n=12, teacher={"max_in_flight": 1}, max_tokens=8),
            "t",
            RunFolder(tmp_path),
        )
    assert times[1] - times[0] >= 1.0


def test_requests_per_minute(tmp_path):
    "600 a minute: 20 requests take about two seconds, not none"
    with FaultyServer() as server:
        started = time.monotonic()
        run_generate(make_study(server.url, n=20, teacher={"rpm": 600}), "t", RunFolder(tmp_path))
        assert 0.8 <= time.monotonic() - started <= 6


def test_a_refusal_without_a_wait_holds_everybody_back(monkeypatch, tmp_path):
    monkeypatch.setattr("cot_distill.asking.pace.backoff_s", lambda n: 1.0)
    times = []

    def script(request, n):
        times.append(time.monotonic())
        return Reply(429, TOO_MANY) if n == 1 else GOOD

    with FaultyServer(script) as server:
        run_generate(
            make_study(server.url, n=6, teacher={"max_in_flight": 1}), "t", RunFolder(tmp_path)
        )
    assert times[1] - times[0] >= 0.9


def test_slow_start(tmp_path):
    "Without stated limits the number in flight doubles each round, up to the teacher's own bound"
    with FaultyServer(always(Reply(body=completion(), delay_s=0.3))) as server:
        run_generate(
            make_study(server.url, n=120, teacher={"max_in_flight": 40}), "t", RunFolder(tmp_path)
        )
        # a slow machine may answer the first of a round before it has read the last
        assert 32 < server.max_in_flight <= 40


def test_requests_per_day(tmp_path):
    "A day's limit counts what earlier processes sent, and begins anew with the day"
    run = RunFolder(tmp_path)
    with FaultyServer() as server:
        study = make_study(server.url, n=5, teacher={"rpd": 3})
        for _ in range(2):
            with pytest.raises(ResumeLater, match="after midnight UTC"):
                run_generate(study, "t", run)
        assert len(server.requests) == 3
        with sqlite3.connect(run.ledger("t")) as connection:
            connection.execute("UPDATE attempts SET started_at = '2020-01-01T00:00:00'")
        assert run_generate(study, "t", run).n == 5
    day = iter(["Monday", "Monday", "Monday", "Tuesday"])
    pacer = Pacer(TeacherConfig(provider="openai", rpd=1), day=lambda: next(day))

    async def admitted() -> None:
        await pacer.admit(1)
        with pytest.raises(ResumeLater, match="of Monday"):
            await pacer.admit(1)
        await pacer.admit(1)

    asyncio.run(admitted())


@pytest.mark.parametrize(
    ("reply", "when"),
    [
        (
            Reply(
                429,
                error(
                    "Rate limit reached on requests per day (RPD): Limit 10000. Please try "
                    "again in 7h12m0s."
                ),
                {},
            ),
            7.2,
        ),
        (
            Reply(
                429,
                error("You exceeded your current quota", "insufficient_quota"),
                {"Retry-After": "86400"},
            ),
            24.0,
        ),
    ],
)
def test_the_message_says_when_to_come_back(tmp_path, reply, when):
    with FaultyServer(always(reply)) as server, pytest.raises(ResumeLater) as caught:
        run_generate(make_study(server.url), "t", RunFolder(tmp_path))
    told = datetime.strptime(
        re.search(r"after (.* UTC)", str(caught.value))[1], "%Y-%m-%d %H:%M UTC"
    ).replace(tzinfo=UTC)
    assert (told - datetime.now(UTC)).total_seconds() / 3600 == pytest.approx(when, abs=0.03)


def test_samples_of_one_problem(tmp_path):
    """Three samples a problem: a second text that says the same is dropped, one that differs is
    kept; the ledger has three requests"""
    texts = [
        "Three rows of 4 apples are 12 apples in all.\n#### 12",
        "three rows of 4 apples, are 12 apples: in all!\n#### 12",
        "Since 4 + 4 + 4 = 12, there are twelve.\n#### 12",
    ]
    run = RunFolder(tmp_path)
    with FaultyServer(lambda request, n: Reply(body=completion(text=texts[(n - 1) % 3]))) as server:
        summary = run_generate(
            make_study(
                server.url,
                n=1,
                teacher={"max_in_flight": 1},
                n_samples=3,
                temperature=0.7,
                top_p=0.9,
            ),
            "t",
            run,
        )
        assert [(r.body["temperature"], r.body["top_p"]) for r in server.requests] == [
            (0.7, 0.9)
        ] * 3
    table = pd.read_parquet(run.rationales("t"))
    assert table["sample_idx"].tolist() == [0, 1, 2] and table["kept"].tolist() == [
        True,
        False,
        True,
    ]
    assert summary.drop_reasons == {"near_duplicate": 1}


def test_samples_are_asked_for_until_one_is_right(tmp_path):
    """Of three problems one is solved at once, one at the third try, one never; an interrupted run
    goes on where it was, and asks nobody again"""
    problems = load_problems("two-step", limit=3)
    needed = dict(zip([p.question for p in problems], (1, 3, 9), strict=True))
    right = {p.question: p.reference_answer for p in problems}
    sent = Counter()

    def answer(request, n):
        asked = request.body["messages"][-1]["content"].split("\n")[0]
        sent[asked] += 1
        said = right[asked] if sent[asked] >= needed[asked] else "-1"
        return Reply(body=completion(text=f"#### {said}"))

    how = {"n_samples": 4, "temperature": 0.7, "until_right": 1}
    with FaultyServer(answer) as server:
        with pytest.raises(ResumeLater):
            run_generate(
                make_study(server.url, n=3, max_requests=5, **how), "t", RunFolder(tmp_path)
            )
        assert sum(sent.values()) == 5
        summary = run_generate(make_study(server.url, n=3, **how), "t", RunFolder(tmp_path))
    assert list(sent.values()) == [1, 3, 4] and summary.n == 8
    table = pd.read_parquet(RunFolder(tmp_path).rationales("t"))
    assert table.groupby("problem_id", sort=False)["is_correct"].sum().tolist() == [1, 1, 0]
    told = "2 of 3 problems; not two-step-train-00002; 4 questions spared"
    assert tell_solved(table, n_samples=4) == told
    card = (RunFolder(tmp_path).teacher_dir("t") / "README.md").read_text(encoding="utf-8")
    assert f"| with a right answer | {told} |" in card


def test_two_solutions_that_calculate_alike_are_one(tmp_path):
    (problem,) = load_problems("two-step", limit=1)
    said = ["10 + 9 = 19.", "That makes 10+9 = 19!", "3 * 11 = 33", "never asked for"]

    def answer(request, n):
        return Reply(body=completion(text=f"{said[n - 1]}\n#### {problem.reference_answer}"))

    how = {"n_samples": 4, "temperature": 0.7, "until_right": 2}
    with FaultyServer(answer) as server:
        summary = run_generate(make_study(server.url, n=1, **how), "t", RunFolder(tmp_path))
    assert (summary.n, summary.n_kept) == (3, 3)


def test_the_same_answer_is_not_paid_for_twice(tmp_path):
    with FaultyServer() as server, pytest.raises(InputError, match="temperature 0"):
        run_generate(make_study(server.url, n_samples=4), "t", RunFolder(tmp_path))
    assert server.all_requests == []


def contaminated_study(tmp_path: Path, url: str):
    """Real words, not templates: one training question is a test question, and the teacher recites
    a test solution"""
    test = [
        {
            "question": (
                "Natalia sold clips to 48 of her friends in April, and then she sold half as "
                "many clips in May. How many clips in all?"
            ),
            "answer": (
                "She sold 48 / 2 = 24 clips in the month of May and so 48 + 24 = 72 "
                "altogether.\n#### 72"
            ),
        }
    ]
    train = [
        {"question": test[0]["question"].upper(), "answer": "x\n#### 72"},
        {"question": "Tom has 3 boxes of 4 pens. How many pens?", "answer": "x\n#### 12"},
        {
            "question": "She sold half as many clips in May, how many clips did Ann and Bo sell?",
            "answer": "x\n#### 12",
        },
    ]
    for name, rows in (("test", test), ("train", train)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_study(
        {
            "name": "c",
            "problems": {"source": str(tmp_path / "train.jsonl")},
            "eval_sets": [{"name": "e", "source": str(tmp_path / "test.jsonl")}],
            "teachers": {"t": {"provider": "openai", "model": "test-model", "base_url": url}},
            "generate": {"keep_wrong": True},
        }
    )


def test_contamination_is_counted_by_text_and_length(tmp_path):
    recited = "She sold 48 / 2 = 24 clips in the month of May and so 48 + 24 = 72.\n#### 12"
    with FaultyServer(
        lambda request, n: Reply(
            body=completion(
                text=recited
                if "Tom" in request.body["messages"][-1]["content"]
                else "short\n#### 12"
            )
        )
    ) as server:
        run = RunFolder(tmp_path / "run")
        summary = run_generate(contaminated_study(tmp_path, server.url), "t", run)
    assert summary.shared_with_tests == {
        "question": {"exact": 1, "8": 2, "10": 2, "13": 1},
        "completion": {"exact": 0, "8": 1, "10": 1, "13": 1},
    }
    table = pd.read_parquet(run.rationales("t"))
    assert table["drop_reason"].fillna("").tolist() == ["contaminated", "contaminated", ""]
    assert "| question | 1 | 2 | 2 | 1 |" in (run.teacher_dir("t") / "README.md").read_text()


def test_disk_full_in_the_middle(tmp_path, monkeypatch):
    "A sentence; what was written is safe; with room again only what was lost is asked again"
    import cot_distill.asking.ledger

    connect, run = cot_distill.asking.ledger._connect, RunFolder(tmp_path)

    def small(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("PRAGMA max_page_count = 20")
        return connection

    long = Reply(body=completion(text="so " * 500 + "\n#### 12"))
    with FaultyServer(always(long)) as server:
        study = make_study(server.url, n=80, teacher={"max_in_flight": 2})
        monkeypatch.setattr(cot_distill.asking.ledger, "_connect", small)
        with pytest.raises(InputError, match="make room on the disk"):
            run_generate(study, "t", run)
        monkeypatch.setattr(cot_distill.asking.ledger, "_connect", connect)
        n_sent, n_kept = len(server.requests), sum(r["is_final"] for r in attempts(run))
        assert 0 < n_kept < 80 and n_sent - n_kept <= 2
        assert run_generate(study, "t", run).n == 80
        assert len(server.requests) == 80 + n_sent - n_kept


def test_rows_that_are_no_problems_are_set_aside_not_asked(tmp_path):
    train = tmp_path / "train.jsonl"
    rows = [
        '{"question": "What is 3 * 4?", "answer": "#### 12"}',
        '{"question": null, "answer": "#### 1"}',
        "{not json",
        '{"question": "No answer?"}',
    ]
    train.write_text("\n".join(rows))
    run = RunFolder(tmp_path / "run")
    with FaultyServer() as server:
        study = make_study(server.url)
        study = study.model_copy(
            update={
                "problems": study.problems.model_copy(update={"source": str(train), "limit": None})
            }
        )
        assert run_generate(study, "t", run).n == len(server.requests) == 1
    aside = [
        json.loads(line)
        for line in (run.teacher_dir("t") / "quarantine.jsonl").read_text().splitlines()
    ]
    assert len(aside) == 3 and all(row["reason"] for row in aside)


def test_throughput_beside_the_limit(tmp_path):
    run = RunFolder(tmp_path)
    with FaultyServer() as server:
        study = make_study(server.url, n=60, teacher={"rpm": 1200, "tpm": 10**6})
        run_generate(study, "t", run)
    with Ledger(run.ledger("t")) as ledger:
        pace = pace_of(read_attempts(ledger), study.generate.max_tokens)
    card = (run.teacher_dir("t") / "README.md").read_text()
    assert re.search(r"\| asked \| [0-9,]+ requests a minute \(\d+% of the limit\), ", card), card
    assert 0.5 < pace["requests"] / 1200 <= 1.5
    assert pace["tokens"] == pytest.approx(84 * pace["requests"])


def test_dead_provider_trips_the_breaker(tmp_path):
    run = RunFolder(tmp_path)
    with FaultyServer(always(Reply(500, error("down")))) as server:
        with pytest.raises(ResumeLater):
            run_generate(make_study(server.url, n=100, max_attempts=6, drain_s=1), "t", run)
        assert len(server.requests) <= 40


def test_other_configuration_is_refused(tmp_path):
    run = RunFolder(tmp_path)
    with FaultyServer() as server:
        run_generate(make_study(server.url), "t", run)
        with pytest.raises(InputError, match="temperature"):
            run_generate(make_study(server.url, temperature=0.7), "t", run)


def test_reroute_is_kept(tmp_path):
    run = RunFolder(tmp_path)
    with FaultyServer(always(Reply(body=completion(model="other-model")))) as server:
        summary = run_generate(make_study(server.url), "t", run)
    assert summary.models == summary.rerouted == {"other-model": 1}
    assert (
        "other-model" in str(summary)
        and "not asked for: other-model" in (run.teacher_dir("t") / "README.md").read_text()
    )
    assert pd.read_parquet(run.rationales("t"))["model"].tolist() == ["other-model"]
    assert json.loads(run.run_json.read_text())["stages"]["generate/t"]["rerouted"] == {
        "other-model": 1
    }


def test_a_response_that_names_no_model_gets_none(tmp_path):
    run = RunFolder(tmp_path)
    with FaultyServer(always(Reply(body=completion(model=None)))) as server:
        assert run_generate(make_study(server.url), "t", run).models == {}
    assert pd.read_parquet(run.rationales("t"))["model"].isna().all()


def start(url: str, run: Path, n: int, **teacher) -> subprocess.Popen:
    code = RUN.format(tests=str(HELPERS), url=url, n=n, run=str(run), teacher=teacher)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COT_DISTILL_PROGRESS": "off"},
    )


def wait_for(condition, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_drains(tmp_path, number, code):
    "What is in flight comes home, nothing more is sent, the next run goes on"
    run = RunFolder(tmp_path / "run")
    with FaultyServer(always(Reply(body=completion(), delay_s=0.3))) as server:
        process = start(server.url, run.path, n=40, max_in_flight=4)
        wait_for(lambda: len(server.requests) >= 6)
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == code, out
        assert "run the same command to go on" in out
        n_sent = len(server.requests)
        assert n_sent < 20
        assert all(r["status"] == "ok" for r in attempts(run))
        assert start(server.url, run.path, n=40, max_in_flight=40).wait(200) == 0
        assert len(server.requests) == 40
    assert len(pd.read_parquet(run.rationales("t"))) == 40


def test_two_runs_at_once(tmp_path):
    run = RunFolder(tmp_path / "run")
    with FaultyServer(always(Reply(body=completion(), delay_s=1))) as server:
        process = start(server.url, run.path, n=8)
        wait_for(lambda: len(server.requests) >= 1)
        with pytest.raises(InputError, match="another run"):
            run_generate(make_study(server.url, n=8, deadline_s=20), "t", run)
        process.kill()
        process.wait()


def killed_runs(tmp_path: Path, n_problems: int, n_kills: int, delay_s: float) -> None:
    """Kill a run at random instants; every question must end with one answer, no finished call sent
    again"""
    import random

    rng, run = random.Random(7), RunFolder(tmp_path / "run")
    with FaultyServer(always(Reply(body=completion(), delay_s=delay_s))) as server:
        n_lost = 0
        for _ in range(n_kills):
            n_before = len(server.requests)
            process = start(server.url, run.path, n=n_problems, max_in_flight=8)
            target = n_before + rng.randint(1, max(2, n_problems // n_kills))
            wait_for(
                lambda target=target, process=process: (
                    len(server.requests) >= target or process.poll() is not None
                )
            )
            time.sleep(rng.uniform(0, 2 * delay_s))
            process.kill()
            process.wait()
        assert start(server.url, run.path, n=n_problems, max_in_flight=8).wait(400) == 0
        rows = attempts(run)
        n_lost = sum(r["status"] == "sent" for r in rows)
        table = pd.read_parquet(run.rationales("t"))
        assert (
            len(table) == n_problems
            and table["problem_id"].is_unique
            and (table["completion"] != "").all()
        )
        finished = Counter(r["request_key"] for r in rows if r["status"] == "ok")
        assert len(finished) == n_problems and set(finished.values()) == {1}
        assert n_lost <= 8 * n_kills
        assert n_problems <= len(server.requests) <= n_problems + n_lost


def test_kill_9_a_few_times(tmp_path):
    killed_runs(tmp_path, n_problems=60, n_kills=3, delay_s=0.1)


@pytest.mark.slow
def test_kill_9_twenty_times(tmp_path):
    killed_runs(tmp_path, n_problems=500, n_kills=20, delay_s=0.05)
