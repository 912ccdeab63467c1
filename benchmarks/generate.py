"""How much of a provider's limits is used, and what a request costs: this project beside `openai`
alone, `distilabel` and `curator`.

    python benchmarks/generate.py       # this project and `openai`, a quarter of an hour
    python benchmarks/generate.py --distilabel-python ~/d/bin/python --curator-python ~/c/bin/python

The other two come from environments of their own: `pip install 'distilabel[openai]' requests`,
`pip install bespokelabs-curator`. Everything asks one loopback server, a process of its own, for
the same completions of the same prompts, each variant in a process of its own. Three questions:

limits   The server refuses what passes 500 requests or 200,000 tokens in any minute; here a
         minute lasts `--minute` seconds.
latency  Answers take 8 seconds and 500 requests a minute are allowed (true minutes): how much
         faster than one at a time?
cost     Nothing is limited and answers take half a second: requests a second (of the middle
         half, when all is under way), and processor time a request, by number in flight. What a
         variant costs once (starting, its first round) is measured by a short run and taken off.
         This project's runs end with graded rationales in a parquet file, each attempt on the
         disk before it is sent; `openai` keeps nothing.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

PROMPT = (
    "A baker fills trays with rolls, sells some of them, and wants to know how many are left in "
    "the evening. Number {i}."
)
TEXT = "There are 3 trays with 4 rolls each, so there are 3 * 4 = 12 rolls. " * 8 + "\n#### 12"
RPM, TPM = 500, 200_000


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--distilabel-python",
        default="",
        help="python of an environment with distilabel[openai] and requests",
    )
    parser.add_argument(
        "--curator-python", default="", help="python of an environment with bespokelabs-curator"
    )
    parser.add_argument("--questions", default="limits,latency,cost")
    parser.add_argument("--in-flight", default="64,256,512")
    parser.add_argument("--requests", type=int, default=2000, help="of one run under `cost`")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant under `cost`")
    parser.add_argument(
        "--minute", type=float, default=20.0, help="seconds that a minute lasts under `limits`"
    )
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the server


class Limits:
    """So many requests and tokens in any window of a minute; a strict provider, who lets nothing be
    saved up"""

    def __init__(self, rpm: float, tpm: float, minute_s: float):
        self.rpm, self.tpm, self.minute_s = rpm, tpm, minute_s
        self.window: deque[tuple[float, int]] = deque()
        self.tokens = 0

    def wait_s(self, now: float, n_tokens: int) -> float:
        "0: admitted and counted; else the seconds until the oldest call leaves the window"
        while self.window and self.window[0][0] <= now - self.minute_s:
            self.tokens -= self.window.popleft()[1]
        if self.rpm and (len(self.window) >= self.rpm or self.tokens + n_tokens > self.tpm):
            return self.window[0][0] + self.minute_s - now
        self.window.append((now, n_tokens))
        self.tokens += n_tokens
        return 0.0


class Server(asyncio.Protocol):
    "One connection; answers to chat completions after a while, to `/models` and `/stats` at once"

    limits: Limits
    latency_s = 0.0
    stats: ClassVar[dict[str, Any]] = {
        "ok": 0,
        "refused": 0,
        "tokens": 0,
        "first": 0.0,
        "last_in": 0.0,
        "replies": [],
        "in_flight": 0,
        "most_in_flight": 0,
    }

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = (
                self.buffer[end + 4 : end + 4 + length],
                self.buffer[end + 4 + length :],
            )
            self.answer(head.split(b" ")[1], body)

    def answer(self, path: bytes, body: bytes) -> None:
        stats, now = self.stats, time.monotonic()
        if not body:
            return self.send(
                stats
                if path == b"/stats"
                else {"object": "list", "data": [{"id": "test-model", "object": "model"}]}
            )
        request = json.loads(body)
        n_prompt = sum(len(m["content"]) for m in request["messages"]) // 4
        n_tokens = n_prompt + int(
            request.get("max_tokens") or request.get("max_completion_tokens") or 0
        )
        stats["first"], stats["last_in"] = stats["first"] or now, now
        if wait := self.limits.wait_s(now, n_tokens):
            stats["refused"] += 1
            return self.send(
                {
                    "error": {
                        "message": "Rate limit reached for test-model on requests per min (RPM)",
                        "code": "rate_limit_exceeded",
                    }
                },
                429,
                wait,
            )
        stats["ok"], stats["tokens"], stats["in_flight"] = (
            stats["ok"] + 1,
            stats["tokens"] + n_tokens,
            stats["in_flight"] + 1,
        )
        stats["most_in_flight"] = max(stats["most_in_flight"], stats["in_flight"])
        asyncio.get_running_loop().call_later(self.latency_s, self.complete, n_prompt)

    def complete(self, n_prompt: int) -> None:
        self.stats["in_flight"] -= 1
        self.stats["replies"].append(time.monotonic())
        message = {"role": "assistant", "content": TEXT, "refusal": None}
        usage = {
            "prompt_tokens": n_prompt,
            "completion_tokens": 150,
            "total_tokens": n_prompt + 150,
        }
        self.send(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": "test-model",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": usage,
            }
        )

    def send(self, data: dict, status: int = 200, retry_after_s: float = 0.0) -> None:
        body = json.dumps(data).encode()
        wait = f"retry-after-ms: {retry_after_s * 1000:.0f}\r\n" if retry_after_s else ""
        head = (
            f"HTTP/1.1 {status} X\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n"
            f"{wait}\r\n"
        )
        self.transport.write(head.encode() + body)


async def serve(told: dict) -> None:
    Server.limits, Server.latency_s = (
        Limits(told["rpm"], told["tpm"], told["minute_s"]),
        told["latency_s"],
    )
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def served(
    latency_s: float, rpm: float = 0, tpm: float = 0, minute_s: float = 60.0
) -> Iterator[tuple[str, Callable[[], dict]]]:
    "A fresh server: (its address, what it counted)"
    told = json.dumps({"latency_s": latency_s, "rpm": rpm, "tpm": tpm, "minute_s": minute_s})
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", told], stdout=subprocess.PIPE, text=True
    )
    try:
        origin = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        yield (
            f"{origin}/v1",
            lambda: json.load(urllib.request.urlopen(f"{origin}/stats", timeout=20)),
        )
    finally:
        process.kill()
        process.wait()


# --- the variants: each asks n questions, so many at a time, and leaves the answers somewhere


def ask_ours(url: str, n: int, in_flight: int, **limits: float) -> None:
    from cot_distill.core.config import parse_study
    from cot_distill.core.runs import RunFolder
    from cot_distill.generate import run_generate

    with tempfile.TemporaryDirectory() as folder:
        problems = Path(folder, "problems.jsonl")
        problems.write_text(
            "".join(
                json.dumps({"question": PROMPT.format(i=i), "answer": "#### 12"}) + "\n"
                for i in range(n)
            )
        )
        test = Path(folder, "test.jsonl")
        test.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "#### 2"}) + "\n")
        max_tokens = int(limits.pop("max_tokens", 300))
        teacher = {
            "provider": "openai",
            "model": "test-model",
            "base_url": url,
            "max_in_flight": in_flight,
            **limits,
        }
        study = {
            "name": "b",
            "problems": {"source": str(problems)},
            "eval_sets": [{"name": "e", "source": str(test)}],
            "teachers": {"t": teacher},
        }
        summary = run_generate(
            parse_study(
                study | {"generate": {"prompt_template": "{question}", "max_tokens": max_tokens}}
            ),
            "t",
            RunFolder(Path(folder, "run")),
        )
        assert summary.n_kept == n, summary


def ask_openai(url: str, n: int, in_flight: int, backend: str = "") -> None:
    import openai

    async def main() -> None:
        client = openai.AsyncOpenAI(
            api_key="none",
            base_url=url,
            max_retries=0,
            http_client=openai.DefaultAioHttpClient() if backend else None,
        )
        todo = iter(range(n))

        async def work() -> list[str]:
            return [(await ask(i)).choices[0].message.content for i in todo]

        async def ask(i: int) -> "openai.types.chat.ChatCompletion":
            return await client.chat.completions.create(
                model="test-model",
                messages=[{"role": "user", "content": PROMPT.format(i=i)}],
                temperature=0.0,
                max_tokens=300,
            )

        texts = await asyncio.gather(*[work() for _ in range(in_flight)])
        assert sum(map(len, texts)) == n
        await client.close()

    asyncio.run(main())


def ask_distilabel(url: str, n: int, in_flight: int) -> None:
    from distilabel.models.llms import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    with Pipeline(name="benchmark") as pipeline:
        load = LoadDataFromDicts(
            data=[{"instruction": PROMPT.format(i=i)} for i in range(n)], batch_size=in_flight
        )
        llm = OpenAILLM(
            model="test-model",
            base_url=url,
            api_key="none",
            max_retries=0,
            generation_kwargs={"max_new_tokens": 300, "temperature": 0.0},
        )
        load >> TextGeneration(llm=llm, input_batch_size=in_flight)
    texts = pipeline.run(use_cache=False)["default"]["train"]["generation"]
    assert len(texts) == n and all(texts)


def ask_curator(url: str, n: int, in_flight: int) -> None:
    tokenizers = (
        Path(importlib.util.find_spec("litellm").origin).parent
        / "litellm_core_utils"
        / "tokenizers"
    )
    quiet = {
        "CURATOR_DISABLE_CACHE": "1",
        "TELEMETRY_ENABLED": "false",
        "CURATOR_VIEWER": "0",
        "CURATOR_DISABLE_RICH_DISPLAY": "1",
    }
    os.environ |= quiet | {
        "TIKTOKEN_CACHE_DIR": str(tokenizers),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
    }
    from bespokelabs import curator

    bounds = {
        "max_requests_per_minute": 10**7,
        "max_tokens_per_minute": 10**10,
        "max_concurrent_requests": in_flight,
        "max_retries": 0,
    }
    llm = curator.LLM(
        model_name="test-model",
        backend="openai",
        generation_params={"max_tokens": 300, "temperature": 0.0},
        backend_params={"base_url": url, "api_key": "none"} | bounds,
    )
    answers = llm([PROMPT.format(i=i) for i in range(n)])
    assert len(getattr(answers, "dataset", answers)) == n


VARIANTS = {
    "cot_distill": ask_ours,
    "openai": ask_openai,
    "openai, aiohttp": ask_openai,
    "distilabel": ask_distilabel,
    "curator": ask_curator,
}


def one(told: dict) -> None:
    "One variant, in this process; prints what it cost"
    os.environ["COT_DISTILL_PROGRESS"] = "off"
    VARIANTS[told.pop("variant")](**told)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print("RESULT " + json.dumps({"cpu_s": sum(u.ru_utime + u.ru_stime for u in used)}))


def run_one(
    python: str, variant: str, latency_s: float, limits: dict | None = None, **told
) -> dict:
    """One variant against a fresh server: processor seconds of all its processes, and what the
    server counted"""
    with (
        served(latency_s, **(limits or {})) as (url, stats),
        tempfile.TemporaryDirectory() as folder,
    ):
        told |= {"variant": variant, "url": url} | (
            {"backend": "aiohttp"} if variant == "openai, aiohttp" else {}
        )
        done = subprocess.run(
            [python, __file__, "--one", json.dumps(told)],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"HOME": folder, "OMP_NUM_THREADS": "1"},
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise RuntimeError(f"{variant} failed: {(done.stderr or done.stdout).strip()[-600:]}")
        return json.loads(lines[-1][7:]) | stats()


# --- the questions


def limits_rows(args: argparse.Namespace, goals: list) -> Iterator[dict]:
    "Five minutes' worth at each of the two limits"
    from common import goal

    scale = 60 / args.minute
    for bound, max_tokens, n in (("requests", 200, 5 * RPM), ("tokens", 900, 1000)):
        enforced = {"rpm": RPM, "tpm": TPM, "minute_s": args.minute}
        got = run_one(
            sys.executable,
            "cot_distill",
            1.0,
            enforced,
            n=n,
            in_flight=256,
            max_tokens=max_tokens,
            rpm=RPM * scale,
            tpm=TPM * scale,
        )
        minutes = (got["last_in"] - got["first"]) / args.minute
        used = got["ok"] / minutes / RPM if bound == "requests" else got["tokens"] / minutes / TPM
        refused = got["refused"] / (got["ok"] + got["refused"])
        yield {
            "question": f"limits, {bound} bind",
            "variant": "cot_distill",
            "requests": got["ok"],
            "minutes": minutes,
            "used_%": 100 * used,
            "refused_%": 100 * refused,
        }
        goals += [
            goal(f"of the limit used where {bound} bind, %", 95, 100 * used),
            goal(f"429s where {bound} bind, %", 1, 100 * refused, at_most=True),
        ]


def latency_rows(goals: list) -> Iterator[dict]:
    "Eight seconds an answer: one at a time, then as many as the limit allows"
    from common import goal

    rates = {}
    for in_flight, n in ((1, 4), (128, 1000)):
        got = run_one(
            sys.executable,
            "cot_distill",
            8.0,
            {"rpm": RPM, "tpm": TPM},
            n=n,
            in_flight=in_flight,
            max_tokens=200,
            rpm=RPM,
            tpm=TPM,
        )
        rates[in_flight] = got["ok"] / (got["replies"][-1] - got["first"])
        yield {
            "question": "latency of 8 s",
            "variant": "cot_distill",
            "in_flight": in_flight,
            "requests": n,
            "requests_per_s": rates[in_flight],
            "times_one_at_a_time": rates[in_flight] / rates[1],
        }
    goals.append(
        goal(
            "times as fast as one at a time at 8 s latency and 500 requests a minute",
            60,
            rates[128] / rates[1],
        )
    )


def cost_rows(args: argparse.Namespace, goals: list, not_run: list) -> Iterator[dict]:
    "Processor time and requests a second of every variant at every number in flight, in turn"
    from common import goal, skipped

    pythons = {
        "cot_distill": sys.executable,
        "openai": sys.executable,
        "openai, aiohttp": sys.executable,
        "distilabel": args.distilabel_python,
        "curator": args.curator_python,
    }
    not_run += [
        skipped(name, f"its environment was not given (--{name}-python)")
        for name, python in pythons.items()
        if not python
    ]
    pythons = {name: python for name, python in pythons.items() if python}
    for in_flight in map(int, args.in_flight.split(",")):
        small = {
            name: run_one(python, name, 0.5, n=in_flight, in_flight=in_flight)["cpu_s"]
            for name, python in pythons.items()
        }
        runs: dict[str, list[dict]] = {name: [] for name in pythons}
        n = max(args.requests, 4 * in_flight)
        for _ in range(args.rounds):
            for name, python in pythons.items():
                runs[name].append(run_one(python, name, 0.5, n=n, in_flight=in_flight))
                print(
                    f"{name}, {in_flight} in flight: {runs[name][-1]['cpu_s']:.1f} s for {n}",
                    file=sys.stderr,
                )
        cpu = {
            name: statistics.median(
                1000 * (got["cpu_s"] - small[name]) / (n - in_flight) for got in all_
            )
            for name, all_ in runs.items()
        }
        for name, all_ in runs.items():
            rate = statistics.median(
                (n // 2) / (got["replies"][3 * n // 4] - got["replies"][n // 4]) for got in all_
            )
            most = statistics.median(got["most_in_flight"] for got in all_)
            yield {
                "question": "cost",
                "variant": name,
                "in_flight": in_flight,
                "reached_in_flight": most,
                "requests": n,
                "requests_per_s": rate,
                "cpu_ms_per_request": cpu[name],
                "cpu_times_openai": cpu[name] / cpu["openai"],
            }
        goals.append(
            goal(
                f"processor time a request at {in_flight} in flight, of `openai` alone",
                1.0,
                cpu["cot_distill"] / cpu["openai"],
                at_most=True,
            )
        )


def main() -> int:
    args = settings()
    if args.serve:
        asyncio.run(serve(json.loads(args.serve)))
    if args.one:
        one(json.loads(args.one))
        return 0
    from common import report

    rows, goals, not_run, load = [], [], [], os.getloadavg()[0]
    if "limits" in args.questions:
        rows += limits_rows(args, goals)
    if "latency" in args.questions:
        rows += latency_rows(goals)
    if "cost" in args.questions:
        rows += cost_rows(args, goals, not_run)
    notes = [
        (
            f"limits: a minute lasts {args.minute:g} s, so {RPM * 60 / args.minute:,.0f} "
            f"requests and {TPM * 60 / args.minute:,.0f} tokens a true minute; the server "
            "counts the prompt and the whole cap, in any window of that length"
        ),
        (
            f"load average at the start {load:.1f}: what else ran on these cores slows all "
            "variants alike"
        )
        if load > 0.5
        else "nothing else ran",
        (
            f"cost: medians of {args.rounds} rounds, the variants in turn; client and server "
            f"share {os.cpu_count()} cores, so requests a second are those of the pair; "
            "`cot_distill` does the whole stage (ledger on disk, grading, screening, parquet)"
        ),
    ]
    report("generate", rows, goals, not_run, notes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
