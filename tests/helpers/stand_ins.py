"""Stand-ins for the stages: notebooks that run in a moment, write where the real ones write, and
misbehave when told to"""

import contextlib
import json
import time
from pathlib import Path

import nbformat
import psutil
from rich.console import Console

from cot_distill.batch.plan import STAGES as PLANNED
from cot_distill.batch.run import Batch, prepare_batch, run_prepared

PARAMETERS = "config = ''\nteacher = 'recorded'\nlimit = 4\nrun_dir = ''\n"
COMMON = """
import hashlib, json, os, time
from pathlib import Path
from cot_distill.core.errors import InputError, Interrupted, ResumeLater
from cot_distill.core.config import load_study
from cot_distill.core.inputs import begin_stage, finish_stage, marker_of
from cot_distill.core.inputs import rationales_fingerprint, stage_inputs
from cot_distill.core.showing import Progress
from cot_distill.core.files import atomic_path, write_json
from cot_distill.core.runs import RunFolder
run, variant = RunFolder(run_dir), None if STAGE in ('teachers', 'analyze') else teacher
orders = json.loads(Path('../orders.json').read_text()).get(f'{STAGE} {variant}', {})
with open('../seen.txt', 'a') as seen:
    one = {'stage': STAGE, 'variant': variant, 'at': time.time()}
    one['gpu'] = os.environ.get('CUDA_VISIBLE_DEVICES')
    one['threads'] = os.environ.get('OMP_NUM_THREADS')
    seen.write(json.dumps(one) + '\\n')
def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix('.part').write_text(text)
    os.replace(path.with_suffix('.part'), path)
def begin(part=None):
    study = load_study(config)
    folder = marker_of(run, STAGE, teacher, part).parent
    inputs = stage_inputs(study, STAGE, teacher, run, part)
    begin_stage(folder, part.name if part else STAGE, inputs)
    return folder
if orders.get('die'):
    os.kill(os.getpid(), 9)
if orders.get('raise'):
    errors = (InputError, ResumeLater, ZeroDivisionError)
    error = {e.__name__: e for e in errors}[orders['raise']]
    raise error(orders.get('message', 'told to'))
"""
STEPS = """
try:
    with Progress(10, STAGE, run.progress(STAGE, variant), unit='step') as bar:
        for step in range(10):
            time.sleep(orders.get('seconds', 0) / 10)
            bar.advance(loss=1 / (step + 1))
except KeyboardInterrupt:
    raise Interrupted('stopped; what was finished is saved') from None
"""
WORK = {
    "00_teachers": "",
    "01_generate": "folder = begin()\n"
    + STEPS
    + """
import pyarrow, pyarrow.parquet
row = {'problem_id': 'p-0', 'sample_idx': 0, 'question': '1 + 1?', 'kept': True}
row['completion'] = f'because {teacher}'
with atomic_path(run.rationales(teacher)) as part:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), part)
finish_stage(folder, STAGE, [run.rationales(teacher)])
""",
    # goes on where it was cut off; the weights depend on every step
    "02_train": """
folder = begin()
done = run.student_dir(teacher) / 'step.json'
begun = [0, rationales_fingerprint(run.rationales(teacher))]
state = json.loads(done.read_text()) if done.exists() else begun
while state[0] < 10:
    time.sleep(orders.get('seconds', 0) / 10)
    state = [state[0] + 1, hashlib.sha256(f'{state}'.encode()).hexdigest()]
    put(done, json.dumps(state))
put(run.adapter(teacher) / 'adapter_config.json', '{}')
put(run.adapter(teacher) / 'adapter_model.safetensors', state[1])
put(run.training_log(teacher), '{}')
finish_stage(folder, STAGE, [*run.adapter(teacher).iterdir(), run.training_log(teacher)])
""",
    "03_eval": STEPS
    + """
study = load_study(config)
source = run.adapter(teacher) / 'adapter_model.safetensors'
weights = source.read_bytes() if source.exists() else b'base'
grade = int(hashlib.sha256(weights).hexdigest(), 16) % 100
for part in study.eval_sets:
    folder = begin(part)
    put(run.eval_file(teacher, part.name), str(grade))
    finish_stage(folder, part.name, [run.eval_file(teacher, part.name)])
rows = []
for table in sorted((run.path / 'evals').glob(f'*/{study.eval_sets[0].name}.parquet')):
    value = int(table.read_text())
    row = {'variant': table.parent.name, 'teacher': None, 'n': 100, 'n_correct': value}
    row |= {'accuracy': value / 100, 'ci95': [0.0, 1.0], 'vs_base': None}
    rows.append(row | {'teacher_cost_usd': None})
whole = {'study': study.name, 'problem_set': 'test', 'n': 100, 'variants': rows}
write_json(run.results_json, whole)
""",
    "04_analysis": "len(json.loads(run.results_json.read_text())['variants'])",
}
# chapters that run once declare less, as the real ones do
ONCE = {
    "00_teachers": ("config = ''\n", "import os\nrun_dir = os.path.dirname(config)\n"),
    "04_analysis": ("run_dir = ''\n", ""),
}
STAGES = dict(zip(WORK, ("teachers", "generate", "train", "eval", "analyze"), strict=True))


def write_notebook(
    path: Path, *sources: str, tags: tuple[str, ...] = ("parameters",), kernel: str = "python3"
) -> None:
    "A notebook whose first cell has the tags"
    cells = [
        nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)} if i == 0 else {})
        for i, source in enumerate(sources)
    ]
    metadata = {"kernelspec": {"name": kernel, "language": "python", "display_name": kernel}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)


def make_project(
    folder: Path, *teachers: str, device: str = "cpu", provider: str = "human"
) -> Path:
    "A project with stand-in notebooks and one study; the study's file"
    nbs = folder / "nbs"
    nbs.mkdir(parents=True)
    (folder / "settings.ini").write_text("", encoding="utf-8")
    for name, work in WORK.items():
        declared, given = ONCE.get(name, (PARAMETERS, ""))
        write_notebook(
            nbs / f"{name}.ipynb", declared, f"STAGE = {STAGES[name]!r}\n{given}" + COMMON + work
        )
    orders(folder)
    tables = "".join(
        f"[teachers.{t}]\nprovider = '{provider}'\nmodel = 'm'\n"
        + ("base_url = 'http://127.0.0.1:9/v1'\n" if provider == "openai" else "")
        for t in teachers
    )
    study = folder / "study.toml"
    study.write_text(
        "name = 'small'\n"
        "[problems]\n"
        "source = 'two-step'\n"
        "limit = 4\n"
        "[[eval_sets]]\n"
        "name = 'test'\n"
        "source = 'two-step'\n"
        "limit = 2\n"
        "[student]\n"
        "model = 'smollm2-135m'\n"
        f"device = '{device}'\n"
        "[generate]\n"
        "drain_s = 0\n"
        f"{tables}",
        encoding="utf-8",
    )
    return study


def orders(folder: Path, **by_job: dict) -> None:
    "Tell stages to misbehave: `orders(folder, train_human={'die': True})`"
    text = json.dumps({name.replace("_", " ", 1): order for name, order in by_job.items()})
    (folder / "orders.json").write_text(text, encoding="utf-8")


def seen(folder: Path) -> list[dict]:
    "What kernels have started, in order"
    path = folder / "seen.txt"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )


def names(folder: Path, since: int = 0) -> list[str]:
    "Names of the jobs that kernels have started"
    return [
        f"{one['stage']} {one['variant']}" if one["variant"] else one["stage"]
        for one in seen(folder)[since:]
    ]


NO_PAGES = [stage for stage in PLANNED if stage != "site"]


def prepare(study: Path, **options: object) -> Batch:
    "Its plan, in the project's own folders"
    places = {"run_dir": study.parent / "runs/small", "nbs": study.parent / "nbs"}
    return prepare_batch(study, **places | options)


def run(study: Path, stages: list[str] = NO_PAGES, **executor: object) -> tuple[int, str]:
    "Exit code and everything that was printed"
    out = study.parent / "out.txt"
    with out.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=200, force_terminal=False, no_color=True)
        code = run_prepared(prepare(study, stages=stages), console, **executor)
    return code, out.read_text(encoding="utf-8")


def wait_for(study: Path, job: str, timeout_s: float = 60) -> None:
    "Until a kernel has started a job"
    until = time.monotonic() + timeout_s
    while job not in names(study.parent):
        assert time.monotonic() < until, f"{job} has not started: {names(study.parent)}"
        time.sleep(0.05)


def processes_of(study: Path) -> list[psutil.Process]:
    "Whoever works in the project's folders: processes of jobs, and kernels"
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            if is_alive and Path(process.cwd()).is_relative_to(study.parent):
                found.append(process)
    return found


def assert_all_end(study: Path, within_s: float = 10) -> None:
    "A process that is just starting learns of its launcher's death when it has started"
    until = time.monotonic() + within_s
    while left := processes_of(study):
        assert time.monotonic() < until, f"still running: {left}"
        time.sleep(0.05)


def results(study: Path) -> dict:
    return json.loads((study.parent / "runs/small/results.json").read_text(encoding="utf-8"))
