"""Servers and files that do what no manual mentions: nothing is lost, nothing leaks, nothing is
silently wrong"""

import asyncio
import json
import sqlite3
import time

import pandas as pd
import pytest
from asked import GOOD, TOO_MANY, always, attempts, first, make_study
from faulty_server import FaultyServer, Reply, completion, error, gemini_reply

from cot_distill.asking.keys import check_destination, redact
from cot_distill.asking.ledger import Ledger, read_attempts, salvage
from cot_distill.asking.replies import Question
from cot_distill.core.errors import InputError, ResumeLater
from cot_distill.core.problems import load_problems
from cot_distill.core.runs import RunFolder
from cot_distill.core.settings import TeacherConfig
from cot_distill.generate import run_generate
from cot_distill.teachers import GeminiTeacher, preflight

KEY = "sk-marked-5b1f0c7a9d"
PROBLEM = load_problems("two-step", limit=1)[0]
QUESTION = Question(PROBLEM, 0, [{"role": "user", "content": PROBLEM.question}], max_tokens=64)
SDKS = ["google-generativeai", "google-genai"]


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch):
    "Wait milliseconds where production waits seconds"
    monkeypatch.setattr("cot_distill.asking.loop.backoff_s", lambda n: 0.01)
    monkeypatch.setattr("cot_distill.asking.pace.backoff_s", lambda n: 0.01)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def raw(head: str, body: bytes = b"") -> Reply:
    "A reply byte by byte"
    return Reply(body=head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body, how="raw")


def good_raw(*headers: str) -> Reply:
    body = json.dumps(completion()).encode()
    lines = ["HTTP/1.1 200 OK", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return raw("\n".join([*lines, *headers]), body)


PROXY = [
    Reply(302, "", {"Location": "http://127.0.0.1:9/login"}),
    Reply(307, "", {"Location": "http://127.0.0.1:9/login"}),
    Reply(400, "<html>Bad Request</html>", content_type="text/html"),
    Reply(400, error("upstream connect error")),
    Reply(404, "<html>not here</html>", content_type="text/html"),
    Reply(418, ""),
    Reply(451, "no"),
]


@pytest.mark.parametrize("reply", PROXY, ids=lambda r: f"{r.status} {str(r.body)[:10]}")
def test_what_a_proxy_says_is_not_about_the_request(tmp_path, reply):
    "Asked again, and answered; said for ever, no row is settled and the run does not end well"
    run = RunFolder(tmp_path / "bad minute")
    with FaultyServer(first(reply, reply)) as server:
        assert run_generate(make_study(server.url), "t", run).n_kept == 1
    assert [r["status"] for r in attempts(run)] == ["turned_away", "turned_away", "ok"]
    run = RunFolder(tmp_path / "for ever")
    with FaultyServer(always(reply)) as server, pytest.raises(ResumeLater, match=str(reply.status)):
        run_generate(make_study(server.url), "t", run)
    assert not any(r["is_final"] for r in attempts(run))


def test_a_bad_minute_loses_no_row(tmp_path):
    run = RunFolder(tmp_path)
    bad = Reply(400, "<html>Bad Request</html>", content_type="text/html")
    with FaultyServer(lambda request, n: bad if n <= 100 else GOOD) as server:
        study = make_study(server.url, n=60, max_attempts=6)
        for _ in range(12):
            try:
                summary = run_generate(study, "t", run)
                break
            except ResumeLater:
                continue
    assert summary.n_kept == 60 and summary.drop_reasons == {}


def test_refused_rows_are_holes(tmp_path):
    "Three of twenty refused for good: no table that looks complete"
    too_long = Reply(400, error("This model's maximum context length is 10 tokens"))
    with FaultyServer(lambda request, n: too_long if n <= 3 else GOOD) as server:
        with pytest.raises(InputError, match=r"refused 3 of 20 .*maximum context length"):
            run_generate(make_study(server.url, n=20), "t", RunFolder(tmp_path))


def test_one_question_too_long_is_refused_once(tmp_path):
    run = RunFolder(tmp_path)
    too_long = Reply(400, error("This model's maximum context length is 10 tokens"))
    with FaultyServer(first(too_long)) as server:
        summary = run_generate(make_study(server.url, n=101), "t", run)
        assert len(server.requests) == 101
    assert summary.drop_reasons == {"refused": 1} and summary.attempts["bad_request"] == 1


def test_a_setting_that_the_provider_refuses_stops_at_once(tmp_path):
    reply = Reply(
        400, error("Unsupported parameter: 'temperature' is not supported", "unsupported_parameter")
    )
    with FaultyServer(always(reply)) as server:
        with pytest.raises(InputError, match="refuses a setting.*temperature"):
            run_generate(
                make_study(server.url, n=20, teacher={"max_in_flight": 1}), "t", RunFolder(tmp_path)
            )
        assert len(server.requests) == 1


@pytest.mark.parametrize("where", ["completion", "model", "finish_reason", "error"])
def test_half_a_character_blocks_nobody(tmp_path, where):
    lone = "so \ud83d it is\n#### 12"
    broken = {
        "completion": completion(text=lone),
        "model": completion(model="m\ud83d"),
        "finish_reason": completion(finish="stop\ud83d"),
        "error": error(lone),
    }[where]
    run = RunFolder(tmp_path)
    with FaultyServer(first(Reply(500 if where == "error" else 200, broken))) as server:
        assert run_generate(make_study(server.url), "t", run).n_kept == 1
    told = pd.read_parquet(run.rationales("t")).iloc[0]
    json.dumps(told["completion"]).encode()
    assert "#### 12" in told["completion"]


def test_malformed_replies_have_attempts_of_their_own(tmp_path):
    "Two refusals and one page of HTML leave the malformed reply two tries of its own"
    run = RunFolder(tmp_path)
    html = Reply(body="<html>hello</html>", content_type="text/html")
    busy = Reply(503, error("overloaded"))
    with FaultyServer(first(busy, html, busy, html)) as server:
        study = make_study(server.url, max_attempts=3)
        assert run_generate(study, "t", run).n_kept == 1
    assert [r["status"] for r in attempts(run)] == [
        *("server_error", "malformed", "server_error", "malformed", "ok"),
    ]


FRAMING = {
    "bad chunk": raw("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"ZZ\r\n{}\r\n0\r\n\r\n"),
    "cut chunk": raw("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"40\r\n{}"),
    "bad length": raw("HTTP/1.1 200 OK\nContent-Length: many", b"{}"),
    "negative length": raw("HTTP/1.1 200 OK\nContent-Length: -5", b"{}"),
    "two lengths": raw("HTTP/1.1 200 OK\nContent-Length: 2\nContent-Length: 7", b"{}"),
    "garbage": Reply(body=b"\x00\xff\xfe this is not HTTP\r\n\r\n", how="raw"),
    "no status": Reply(body=b"HTTP/1.1 OK\r\n\r\n", how="raw"),
    "huge headers": raw("HTTP/1.1 200 OK\nX-Pad: " + "a" * 70_000 + "\nContent-Length: 2", b"{}"),
    "204 with a body": raw("HTTP/1.1 204 No Content\nContent-Length: 5", b"hello"),
    "not gzip": raw("HTTP/1.1 200 OK\nContent-Encoding: gzip\nContent-Length: 5", b"hello"),
    "bad header": raw("HTTP/1.1 200 OK\nno colon here\nContent-Length: 2", b"{}"),
    "bad charset": raw(
        "HTTP/1.1 200 OK\nContent-Type: text/plain; charset=klingon\nContent-Length: 2", b"{}"
    ),
}
AGAIN = {"unreachable", "malformed", "server_error", "turned_away", "empty", "timeout"}


@pytest.mark.parametrize("name", FRAMING)
def test_broken_framing_is_an_answer(tmp_path, name):
    "Counted and asked again, never an exception of some library"
    run = RunFolder(tmp_path)
    with FaultyServer(first(FRAMING[name])) as server:
        assert run_generate(make_study(server.url), "t", run).n_kept == 1
    told = [r["status"] for r in attempts(run)]
    assert len(told) == 2 and told[0] in AGAIN and told[1] == "ok", told


@pytest.mark.parametrize("sdk", SDKS)
@pytest.mark.parametrize("name", FRAMING)
def test_broken_framing_through_gemini(name, sdk):
    assert ask_gemini(always(FRAMING[name]), sdk).status in AGAIN


def ask_gemini(script, sdk: str):
    "One answer of a Gemini server"
    with FaultyServer(script) as server:
        cfg = TeacherConfig(
            provider="gemini", model="m", sdk=sdk, base_url=server.url.removesuffix("/v1")
        )
        return asyncio.run(GeminiTeacher(cfg, deadline_s=3).ask(QUESTION))


@pytest.mark.parametrize("cookie", ["a=\xff\xfe", "\xe4=1; Domain=\xf6", "a=b; Expires=\x01"])
def test_cookies_of_any_alphabet(tmp_path, cookie):
    with FaultyServer(always(good_raw(f"Set-Cookie: {cookie}"))) as server:
        assert run_generate(make_study(server.url, n=3), "t", RunFolder(tmp_path)).n_kept == 3
        assert not any("cookie" in r.headers for r in server.requests)


@pytest.mark.parametrize(
    "wait",
    ["9" * 30, "9" * 400, "-3", "Wed, 21 Oct 9999 07:28:00 GMT", "Wed, 99 Foo 0000 99:99:99 X"],
)
def test_an_absurd_wait_is_no_wait(tmp_path, wait):
    run = RunFolder(tmp_path)
    with FaultyServer(first(Reply(429, TOO_MANY, {"Retry-After": wait}))) as server:
        assert run_generate(make_study(server.url), "t", run).n_kept == 1
    assert [r["status"] for r in attempts(run)] == ["rate_limited", "ok"]


@pytest.mark.parametrize("damage", ["cut", "header", "middle"])
def test_a_cut_ledger_gives_back_what_is_there(tmp_path, damage):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        for i in range(879):
            body = json.dumps(
                completion(text=f"answer {i} " + "so " * (3000 if i % 50 == 0 else 80))
            )
            attempt = ledger.begin(f"key-{i}", f"p-{i}", reserve_usd=0.5)
            ledger.finish(attempt, status="ok", is_final=True, raw_body=body, cost_usd=0.001)
    data = path.read_bytes()
    if damage == "cut":
        data = data[: 2 * len(data) // 3]
    elif damage == "header":
        data = bytes(4096) + data[4096:]
    else:
        data = data[: 30 * 4096] + bytes(10 * 4096) + data[40 * 4096 :]
    path.write_bytes(data)
    rescued, n_saved = salvage(path)
    with Ledger(rescued) as ledger:
        found = list(read_attempts(ledger, only_final=True))
    assert n_saved == len(found) >= {"cut": 500, "header": 860, "middle": 780}[damage]
    for attempt in found:
        i = attempt.problem_id.removeprefix("p-")
        assert attempt.request_key == f"key-{i}" and f"answer {i} " in attempt.raw_body
        assert attempt.cost_usd == 0.001
    assert path.read_bytes() == data


@pytest.mark.parametrize("sdk", SDKS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_gemini_follows_no_redirect(sdk, status):
    with FaultyServer(always(Reply(body=gemini_reply()))) as thief:
        away = Reply(status, "", {"Location": thief.url + "/x"})
        answer = ask_gemini(always(away), sdk)
        assert answer.status == "turned_away" and thief.all_requests == [], answer


def escaped(text: str) -> str:
    "As a JSON string that hides what it says"
    return "".join(f"\\u{ord(c):04x}" for c in text)


def test_the_key_is_nowhere_whatever_echoes_it(tmp_path, monkeypatch, capsys):
    "In model, finish reason, completion and error, plain, escaped and escaped twice"
    study_key = {"api_key_env": "OPENAI_API_KEY", "max_in_flight": 1}
    twice = escaped(KEY).replace("\\", "\\\\")
    bodies = [
        json.dumps(completion(text=f"{KEY} #### 1", model=f"m-{KEY}", finish=f"stop {KEY}")),
        json.dumps(completion(text="HERE #### 1", model="m-HERE", finish="HERE")).replace(
            "HERE", escaped(KEY)
        ),
        json.dumps(completion(text="HERE #### 1", model="m-HERE")).replace("HERE", twice),
    ]
    last = json.dumps(error("no, HERE")).replace("HERE", escaped(KEY))
    run = RunFolder(tmp_path)
    with FaultyServer(
        lambda request, n: Reply(body=bodies[n - 1]) if n <= 3 else Reply(401, last)
    ) as server:
        summary = run_generate(make_study(server.url, n=3, teacher=study_key), "t", run)
        with pytest.raises(InputError) as caught:
            run_generate(
                make_study(server.url, n=1, teacher=study_key), "t", RunFolder(tmp_path / "b")
            )
    told = capsys.readouterr()
    places = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    places += [str(summary).encode(), str(caught.value).encode(), (told.out + told.err).encode()]
    table = pd.read_parquet(run.rationales("t"))
    places.append(table.to_json().encode())
    for hidden in (KEY, escaped(KEY), twice):
        assert not [place for place in places if hidden.encode() in place], hidden
    assert (
        not table["completion"]
        .str.encode("utf-8")
        .str.decode("unicode_escape")
        .str.contains(KEY)
        .any()
    )
    assert (table["completion"].str.contains("key removed")).all()


def test_redact_sees_through_escapes(monkeypatch):
    from cot_distill.asking.keys import read_key

    read_key("SLASHED", environment={"SLASHED": "ab/cd+ef=gh-123"})
    for text in ("ab/cd+ef=gh-123", "ab\\/cd+ef=gh-123", "ab/cd\\u002bef\\u003dgh-123"):
        assert redact(f"x {text} y") == "x [key removed] y"


@pytest.mark.parametrize("path", ["ask", "preflight", "model list"])
def test_no_control_sequence_reaches_the_terminal(tmp_path, path):
    evil = "\x1b]0;owned\x07\x1b[31mred\x9b2J"
    cfg = {"api_key_env": "OPENAI_API_KEY"}
    with FaultyServer(always(Reply(401, error(evil))), models=[evil, "test-mode"]) as server:
        if path == "preflight":
            server.extra = lambda r: Reply(401, error(evil)) if r.method == "GET" else None
        if path == "ask":
            server.models.append("test-model")
        study = make_study(server.url, teacher=cfg)
        with pytest.raises(InputError) as caught:
            run_generate(study, "t", RunFolder(tmp_path))
        told = [str(caught.value), preflight(study)["t"][1]]
    for text in told:
        assert not set(text) & {"\x1b", "\x07", "\x9b"}, repr(text)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:9702\\@127.0.0.1:9703",
        "http://localhost@127.0.0.1:9703/v1",
        "https://api.openai.com:x@evil.example/v1",
        "https://api.openai.com\\.evil.example/v1",
        "https://api.openai.com/v1\r\nHost: evil",
        "https://api.openai.com /v1",
        "https://api.openai.com:99999/v1",
    ],
)
def test_an_address_with_two_meanings_is_refused(tmp_path, url):
    with pytest.raises(InputError, match="base_url"):
        check_destination("OPENAI_API_KEY", url)
    for key in ({"api_key_env": "OPENAI_API_KEY"}, {}):
        with pytest.raises(InputError, match="base_url"):
            run_generate(make_study(url, teacher=key), "t", RunFolder(tmp_path))


def test_a_key_goes_where_somebody_said(tmp_path, monkeypatch):
    "A name that no provider is known by needs its host spelled out"
    monkeypatch.setenv("SOME_KEY", KEY)
    with pytest.raises(InputError, match='allow_host = "llm.example.org"'):
        check_destination("SOME_KEY", "https://llm.example.org/v1")
    check_destination("SOME_KEY", "https://llm.example.org/v1", allow_host="llm.example.org")
    check_destination("OPENAI_API_KEY", "https://gate.example.org", allow_host="gate.example.org")
    with pytest.raises(InputError, match="SOME_KEY"):
        check_destination("SOME_KEY", "https://other.example.org", allow_host="llm.example.org")
    with pytest.raises(InputError, match="allow_host"):
        study = make_study("https://llm.example.org/v1", teacher={"api_key_env": "SOME_KEY"})
        run_generate(study, "t", RunFolder(tmp_path))


def test_the_first_second_is_paced_too(tmp_path):
    times, models = [], {"data": [{"id": "test-model"}]}

    def script(request, n):
        times.append(time.monotonic())
        return GOOD

    with FaultyServer(script) as server:
        slow = Reply(body=models, delay_s=0.8)  # the model was asked for first
        server.extra = lambda request: slow if request.method == "GET" else None
        study = make_study(server.url, n=35, teacher={"rpm": 600, "max_in_flight": 32})
        run_generate(study, "t", RunFolder(tmp_path))
    for i, start in enumerate(times):
        assert sum(start <= t < start + 1 for t in times[i:]) <= 13, times


def test_a_minute_holds_no_more_than_its_limit():
    "An hour of pacing on a clock of its own: never more than the limit in any minute"
    import random

    from cot_distill.asking.pace import RateBudget

    now, rng, sent = [100.0], random.Random(3), []
    budget = RateBudget(600, clock=lambda: now[0])
    now[0] += 30  # the model was asked for first
    while now[0] < 1000:
        now[0] += budget.reserve()
        sent.append(now[0])
        now[0] += rng.choice([0] * 40 + [0.01, 0.3])
    begin = 0
    for i, t in enumerate(sent):
        while sent[begin] <= t - 60:
            begin += 1
        assert i - begin + 1 <= 598


@pytest.mark.parametrize("sdk", SDKS)
@pytest.mark.parametrize("reply", [PROXY[4], Reply(404, ""), Reply(405, "no"), PROXY[2]], ids=str)
def test_gemini_preflight_takes_a_silent_proxy_on_trust(tmp_path, sdk, reply):
    with FaultyServer(always(Reply(body=gemini_reply(text="#### 12")))) as server:
        server.extra = lambda request: reply if request.method == "GET" else None
        url = server.url.removesuffix("/v1")
        study = make_study(url, teacher={"provider": "gemini", "sdk": sdk})
        good, told = preflight(study)["t"]
        assert good and "taken on trust" in told, told
        assert run_generate(study, "t", RunFolder(tmp_path)).n_kept == 1


@pytest.mark.parametrize("sdk", SDKS)
def test_gemini_preflight_knows_a_missing_model(sdk):
    said = {
        "error": {
            "code": 404,
            "message": "models/x is not found for API version v1beta",
            "status": "NOT_FOUND",
        }
    }
    with FaultyServer() as server:
        server.extra = lambda request: Reply(404, said) if request.method == "GET" else None
        study = make_study(
            server.url.removesuffix("/v1"), teacher={"provider": "gemini", "sdk": sdk, "model": "x"}
        )
        good, told = preflight(study)["t"]
    assert not good and "x" in told


def test_the_ledger_stays_a_database(tmp_path):
    "Whatever was in the replies above, sqlite3 reads it"
    run = RunFolder(tmp_path)
    with FaultyServer(
        always(Reply(body=completion(text="a\x00b \ud800 \x1b[0m #### 12")))
    ) as server:
        run_generate(make_study(server.url), "t", run)
    connection = sqlite3.connect(run.ledger("t"))
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert pd.read_parquet(run.rationales("t"))["drop_reason"][0] == "markup"
