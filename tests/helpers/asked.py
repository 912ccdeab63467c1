"One teacher behind a URL: its study, its process, what its ledger holds"

import sqlite3
from pathlib import Path

from faulty_server import Reply, completion, error

from cot_distill.core.config import StudyConfig, parse_study
from cot_distill.core.runs import RunFolder

HELPERS = Path(__file__).resolve().parent
GOOD = Reply(body=completion())
TOO_MANY = error(
    "Rate limit reached for test-model in organization on requests per min (RPM)",
    "rate_limit_exceeded",
)


def always(reply: Reply):
    return lambda request, n: reply


def first(*replies: Reply, then: Reply = GOOD):
    "These replies in turn, then the good one"
    return lambda request, n: replies[n - 1] if n <= len(replies) else then


def make_study(url: str, n: int = 1, teacher: dict | None = None, **generate) -> StudyConfig:
    "A study of n problems with one teacher at `url`, impatient enough for a test"
    settings = {
        "deadline_s": 1.0,
        "max_attempts": 3,
        "max_tokens": 64,
        "keep_wrong": True,
    } | generate
    return parse_study(
        {
            "name": "faults",
            "problems": {"source": "two-step", "limit": n},
            "eval_sets": [{"name": "two-step", "source": "two-step", "limit": 2}],
            "teachers": {
                "t": {
                    "provider": "openai",
                    "model": "test-model",
                    "base_url": url,
                    "max_in_flight": 4,
                    "usd_per_million_input": 1.0,
                    "usd_per_million_output": 2.0,
                }
                | (teacher or {})
            },
            "generate": settings,
        }
    )


def attempts(run: RunFolder) -> list[dict]:
    connection = sqlite3.connect(run.ledger("t"))
    connection.row_factory = sqlite3.Row
    return [dict(r) for r in connection.execute("SELECT * FROM attempts ORDER BY attempt_id")]


# A process that generates, to be killed
RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from asked import make_study
from cot_distill.core.errors import CotDistillError
from cot_distill.generate import run_generate
from cot_distill.core.runs import RunFolder
try:
    study = make_study({url!r}, n={n}, teacher={teacher!r}, deadline_s=20)
    run_generate(study, "t", RunFolder({run!r}))
except CotDistillError as err:
    print(err)
    sys.exit(err.exit_code)
"""
