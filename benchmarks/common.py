"""What every benchmark writes down: `results/<name>.json` with machine, versions, rows and goals,
and a table on the screen.

# any columns, the same ones in each row; None where unknown
rows = [{"variant": "packed", "tokens_per_s": 91.2}, ...]
goals = [goal("packed over padded, times", 1.25, 1.41), goal("pad share, %", 2, 0, at_most=True)]
not_run = [skipped("GPU, with MFU", "this machine has none")]
report("train", rows, goals, not_run, notes=["medians of 3 rounds"])
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def goal(
    text: str,  # what is wanted, with its unit
    wanted: float,
    measured: float | None,  # None: not measured here, and so not reached
    at_most: bool = False,  # lower is better
) -> dict[str, Any]:  # goal, wanted, measured, reached
    "One goal beside what was measured"
    reached = measured is not None and (measured <= wanted if at_most else measured >= wanted)
    return {"goal": text, "wanted": wanted, "measured": measured, "reached": bool(reached)}


def skipped(
    what: str,
    why: str,
) -> dict[str, str]:  # what, why
    "Something that the benchmark has and this run left out"
    return {"what": what, "why": why}


def report(
    name: str,  # of the benchmark: `benchmarks/<name>.py`
    rows: Iterable[Mapping[str, Any]],  # JSON values; numbers unrounded
    goals: Iterable[Mapping[str, Any]] = (),  # made by `goal`
    not_run: Iterable[Mapping[str, str]] = (),  # made by `skipped`
    notes: Iterable[str] = (),  # what a reader must know to read the numbers
    folder: Path = RESULTS,
) -> Path:  # the file
    "Write the result whole, over the last one, and print it"
    import torch  # noqa: F401  GPUs are named where torch is loaded

    from cot_distill.core.files import write_json
    from cot_distill.core.runs import provenance

    source = provenance()
    data = {
        "benchmark": name,
        "command": command(),
        "commit": source["commit"],
        "hardware": source["hardware"],
        "packages": source["packages"] | {"python": source["python"]},
        "rows": [dict(r) for r in rows],
        "goals": [dict(g) for g in goals],
        "not_run": [dict(n) for n in not_run],
        "notes": [*notes, *_uncommitted()],
    }
    path = folder / f"{name}.json"
    write_json(path, data)
    print(markdown(data))
    return path


def command(argv: list[str] | None = None) -> str:
    """The command line as anyone would type it; absolute paths, which are this machine's, become
    PATH"""
    script, *words = sys.argv if argv is None else argv
    return shlex.join(
        [
            "python",
            f"benchmarks/{Path(script).name}",
            *[re.sub(r"^(--[\w-]+=)?/.*", r"\1PATH", word) for word in words],
        ]
    )


def _uncommitted() -> list[str]:
    "A note when the code measured is not the commit's"
    status = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"],
        cwd=RESULTS.parents[1],
        capture_output=True,
        text=True,
    )
    return ["measured with changes that the commit does not hold"] if status.stdout.strip() else []


def markdown(
    data: Mapping[str, Any],  # one result file
) -> str:
    "A result as Markdown: command, machine, rows, goals, what was left out"
    machine = data["hardware"]
    where = ", ".join(
        [
            machine["cpu"],
            f"{machine['cores']} cores",
            f"{machine['memory_gb']:g} GB",
            *machine["gpus"],
        ]
    )
    parts = [
        f"`{data['command']}`  \n{where}; commit {(data['commit'] or 'unknown')[:7]}",
        table(data["rows"]),
    ]
    if data["goals"]:
        parts.append(
            table([{**g, "reached": "yes" if g["reached"] else "no"} for g in data["goals"]])
        )
    parts += [f"Not run: {n['what']} ({n['why']})" for n in data["not_run"]] + list(data["notes"])
    return "\n\n".join(parts)


def table(
    rows: list[Mapping[str, Any]],
) -> str:
    "Rows as a Markdown table, numbers at three significant digits at least"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *[[_shown(row.get(key)) for key in columns] for row in rows],
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    "One value of a table"
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else str(value).replace("|", "\\|")
    )


def load(
    name: str,
    folder: Path = RESULTS,
) -> dict[str, Any]:
    "A result file"
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def shown(
    name: str,  # of the benchmark
    folder: Path = RESULTS,
) -> str:
    "The last result as Markdown, what was not reached first; or that there is none"
    if not (folder / f"{name}.json").exists():
        return f"*Not run yet: `python benchmarks/{name}.py` makes this table.*"
    data = load(name, folder)
    return f"{verdict(data['goals'])}\n\n{markdown(data)}".strip()


def verdict(
    goals: list[Mapping[str, Any]],
) -> str:
    "How many goals were reached, and by how much the others were missed"
    missed = [
        f"{g['goal']}: wanted {_shown(g['wanted'])}, measured {_shown(g['measured'])}"
        for g in goals
        if not g["reached"]
    ]
    told = f" **Not reached:** {'; '.join(missed)}." if missed else ""
    return f"{len(goals) - len(missed)} of {len(goals)} goals reached.{told}" if goals else ""
