"""Tokens a second and peak memory of training: packed and padded, NF4 and full precision, and TRL's
SFTTrainer beside them.

    python benchmarks/train.py                                   # on this machine, some minutes
    python benchmarks/train.py --trl-python ~/trl/bin/python     # an environment with TRL and this
    python benchmarks/train.py --student Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --steps 40 \\
        --trl-python …                                           # on a GPU: with MFU

A variant is an engine and the weights it trains on: `packed-nf4`, `padded-fp32`, `trl-bf16`,
...; `trl_free` is TRL without padding, which needs FlashAttention; `trl_packed` is TRL's own
packing, by best fit into rows as long as the longest step here. Every variant runs in a process of
its own, in turn, `--rounds` times over, on the same examples in the same order with
the same recipe; the first step is not counted. Tokens are those of the examples: padding is no
work, and a beginning that packed examples share counts in each of them. Figures are medians,
ratios are of medians; without a GPU they are of processor seconds, which other work on the
machine changes little. The result is written after every round, so that a run that is cut off
leaves the rounds it finished."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}  # dense bfloat16
CPU_VARIANTS = "packed-fp32,padded-fp32,trl-fp32,trl_packed-fp32,packed-bf16,packed-nf4"
GPU_VARIANTS = (
    "packed-bf16,padded-bf16,trl-bf16,trl_free-bf16,trl_packed-bf16,packed-nf4,padded-nf4"
)


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="smollm2-135m")
    parser.add_argument(
        "--problems", default="two-step", help="sources as in a study, commas between"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora-r", type=int, default=64)
    parser.add_argument(
        "--variants",
        default="",
        help=f"default: {CPU_VARIANTS} without a GPU, {GPU_VARIANTS} with one",
    )
    parser.add_argument(
        "--trl-python",
        default="",
        help="python of an environment with trl; without it TRL is left out",
    )
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SOURCE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace, variant: str, source: str) -> dict[str, Any]:
    "Train one variant in this process"
    import torch
    from transformers import AutoConfig

    from cot_distill.core.settings import TrainConfig
    from cot_distill.student.model import device_of, load_student, student_source
    from cot_distill.student.packing import training_order
    from cot_distill.student.sizes import PeakMemory, plan_training, sizes_of
    from cot_distill.student.trainer import training_arguments

    student = student_for(args.student, variant.split("-")[1], torch.cuda.is_available())
    cfg = TrainConfig(
        lora_r=args.lora_r,
        lora_alpha=2 * args.lora_r,
        lora_dropout=0.0,
        learning_rate=2e-4,
        epochs=1,
        batch_size=args.batch_size,
        gradient_accumulation=1,
        packing=variant.startswith("packed"),
    )
    model, tokenizer = load_student(student)
    examples = examples_of(source, tokenizer, student, args.batch_size * args.steps)
    order = training_order(examples, cfg, seed=0)
    plan = plan_training(
        examples,
        student,
        cfg,
        0,
        sizes_of(AutoConfig.from_pretrained(student_source(student)), cfg.lora_r),
    )
    peak = PeakMemory(device_of(student))
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(examples, student, cfg, 0, Path(folder))
        arguments.save_strategy = "no"
        make = trl_trainer if variant.startswith("trl") else our_trainer
        trainer, batches = make(variant, model, tokenizer, examples, order, cfg, arguments)
        ends = timed(trainer)
    tokens = [sum(examples[i].n_tokens for i in step) for step in order]
    if variant.startswith("trl_packed"):  # its steps are of other examples
        tokens = [b["input_ids"].numel() for b in batches]
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    (wall_0, cpu_0), (wall_1, cpu_1) = ends[0], ends[-1]
    done = sum(tokens[1:]) / (wall_1 - wall_0)
    per_cpu_s = None if torch.cuda.is_available() else sum(tokens[1:]) / (cpu_1 - cpu_0)
    mfu = peak_flops() and plan.tflop * 1e12 / sum(tokens) * done / peak_flops()
    return {
        "tokens_per_s": done,
        "tokens_per_cpu_s": per_cpu_s,
        "pad_frac": pad_frac_of(batches),
        "peak_memory_gb": peak.gb(),
        "estimated_memory_gb": plan.memory_gb,
        "mfu": mfu,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def student_for(model: str, weights: str, has_gpu: bool) -> Any:
    "The student with one kind of weights"
    from cot_distill.core.settings import StudentConfig

    if weights not in ("fp32", "bf16", "nf4"):
        raise SystemExit(f"weights are fp32, bf16 or nf4: got {weights!r}")
    dtype = "bfloat16" if weights == "bf16" or (weights == "nf4" and has_gpu) else "float32"
    return StudentConfig(
        model=model, dtype=dtype, quantization="nf4" if weights == "nf4" else "none"
    )


def examples_of(source: str, tokenizer: Any, student: Any, n: int) -> list:
    "The first problems of a source with the solutions that come with them"
    from cot_distill.core.problems import load_problems
    from cot_distill.student.model import completion_ids, prompt_ids
    from cot_distill.student.packing import Example

    problems = load_problems(source, limit=n)
    return [
        Example(
            p.problem_id,
            tuple(prompt_ids(tokenizer, p.question, student)),
            tuple(completion_ids(tokenizer, p.solution)),
        )
        for p in problems
    ]


def our_trainer(
    variant: str, model: Any, tokenizer: Any, examples: list, order: list, cfg: Any, arguments: Any
) -> tuple[Any, list]:
    "This package's trainer, and what the model is called with in each step"
    from cot_distill.student.lora import add_lora
    from cot_distill.student.trainer import make_trainer

    trainer = make_trainer(
        add_lora(model, cfg, 0), examples, arguments, cfg, 0, tokenizer.pad_token_id
    )
    return trainer, [trainer.make_batch(p).inputs for p in trainer.train_dataset]


def trl_trainer(
    variant: str, model: Any, tokenizer: Any, examples: list, order: list, cfg: Any, arguments: Any
) -> tuple[Any, list]:
    """TRL's SFTTrainer on the same tokens with the same recipe, and in the same order unless it
    packs; and what the model is called with in each step"""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    flash = (
        find_spec("flash_attn") is not None
        and model.dtype.itemsize == 2
        and torch.cuda.is_available()
    )
    model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
    rows = [
        {"input_ids": [*e.prompt, *e.completion], "completion_mask": e.loss_mask}
        for e in (examples[i] for step in order for i in step)
    ]
    packs = variant.startswith("trl_packed")
    longest_step = max(sum(examples[i].n_tokens for i in step) for step in order)
    config = SFTConfig(
        output_dir=arguments.output_dir,
        per_device_train_batch_size=1 if packs else cfg.batch_size,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.warmup_steps,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        optim=arguments.optim,
        seed=0,
        bf16=arguments.bf16,
        use_cpu=arguments.use_cpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        packing=packs,
        max_length=longest_step if packs else cfg.max_length,
        completion_only_loss=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        padding_free=variant.startswith("trl_free"),
    )
    torch.manual_seed(0)
    lora = LoraConfig(
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    return trainer, list(trainer.get_train_dataloader())


def pad_frac_of(batches: list) -> float:
    "Positions that no one attends to, of all positions"
    n_pads = n_positions = 0
    for inputs in batches:
        n_positions += inputs["input_ids"].numel()
        if inputs.get("attention_mask") is not None:
            n_pads += int((inputs["attention_mask"] == 0).sum())
    return n_pads / n_positions


def timed(trainer: Any) -> list[tuple[float, float]]:
    "Train; when each step ended, in seconds and in this process's processor seconds"
    import torch
    from transformers import TrainerCallback

    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append((time.perf_counter(), time.process_time()))

    trainer.add_callback(Clock())
    trainer.train()
    return ends


def peak_flops() -> float | None:
    "What this GPU could do, dense, in bfloat16; None without one that is known"
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def main() -> int:
    args = settings()
    if args.one:
        print("RESULT " + json.dumps(measure(args, *args.one)))
        return 0
    import torch

    has_gpu = torch.cuda.is_available()
    variants = (args.variants or (GPU_VARIANTS if has_gpu else CPU_VARIANTS)).split(",")
    not_run = [
        common.skipped(v, "no --trl-python was given")
        for v in variants
        if v.startswith("trl") and not args.trl_python
    ]
    if not has_gpu:
        not_run.append(
            common.skipped(
                "model FLOP utilisation, and TRL without padding",
                "both need a GPU, and this machine has none",
            )
        )
    variants = [v for v in variants if args.trl_python or not v.startswith("trl")]
    sources = args.problems.split(",")
    found: dict[tuple[str, str], list[dict]] = {(s, v): [] for s in sources for v in variants}
    for number in range(1, args.rounds + 1):
        for source, variant in found:
            found[source, variant].append(one(args, variant, source))
            print(
                (
                    f"round {number}, {source}, {variant}: "
                    f"{found[source, variant][-1]['tokens_per_s']:.1f} tokens/s"
                ),
                file=sys.stderr,
                flush=True,
            )
        rows = [
            row(label(source), variant, results) for (source, variant), results in found.items()
        ]
        for r in rows:
            r["times_padded"] = over(
                rows, r["problems"], r["variant"], f"padded-{r['variant'].split('-')[1]}"
            )
        common.report(
            "train", rows, goals(rows, "bf16" if has_gpu else "fp32"), not_run, notes(args, number)
        )
    return 0


def one(args: argparse.Namespace, variant: str, source: str) -> dict[str, Any]:
    "Measure one variant in a process of its own"
    python = args.trl_python if variant.startswith("trl") else sys.executable
    quiet = os.environ | {
        "OMP_WAIT_POLICY": "PASSIVE"
    }  # a thread that waits costs no processor time
    done = subprocess.run(
        [python, __file__, *sys.argv[1:], "--one", variant, source],
        capture_output=True,
        text=True,
        env=quiet,
    )
    result = next(
        (line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")), None
    )
    if result is None:
        raise SystemExit(f"{variant} on {source} failed:\n{done.stderr[-2000:]}")
    return json.loads(result)


def label(source: str) -> str:
    "A source's name, or a file's with its folder's: `gsm8k/train`"
    return "/".join(Path(source).with_suffix("").parts[-2:])


def row(problems: str, variant: str, results: list[dict]) -> dict[str, Any]:
    "Medians of one variant"
    speeds = [r["tokens_per_s"] for r in results]
    middle = {
        key: None if results[0][key] is None else statistics.median(r[key] for r in results)
        for key in results[0]
    }
    return {
        "problems": problems,
        "variant": variant,
        **middle,
        "slowest_round": min(speeds),
        "fastest_round": max(speeds),
    }


def over(rows: list[dict], problems: str, variant: str, other: str) -> float | None:
    """How many times as fast one variant is as another: by the clock on a GPU, by processor seconds
    without one"""
    speeds = {
        r["variant"]: r["tokens_per_cpu_s"] or r["tokens_per_s"]
        for r in rows
        if r["problems"] == problems
    }
    return speeds[variant] / speeds[other] if {variant, other} <= set(speeds) else None


def goals(rows: list[dict], weights: str) -> list[dict]:
    "What was wanted, for each set of problems"
    found = []
    for problems in dict.fromkeys(r["problems"] for r in rows):
        mine, trl = (
            {r["variant"]: r for r in rows if r["problems"] == problems}.get(
                f"{engine}-{weights}", {}
            )
            for engine in ("packed", "trl")
        )
        gap = abs(mine["last_loss"] - trl["last_loss"]) if mine and trl else None
        found += [
            common.goal(
                f"{problems}: packed over padded, speed, times",
                1.25,
                over(rows, problems, f"packed-{weights}", f"padded-{weights}"),
            ),
            common.goal(
                f"{problems}: packed over TRL's SFTTrainer, speed, times",
                1.0,
                over(rows, problems, f"packed-{weights}", f"trl-{weights}"),
            ),
            common.goal(
                f"{problems}: packed over TRL's own packing, speed, times",
                1.0,
                over(rows, problems, f"packed-{weights}", f"trl_packed-{weights}"),
            ),
            common.goal(
                f"{problems}: padding when packed, share of positions",
                0.02,
                mine.get("pad_frac"),
                at_most=True,
            ),
            common.goal(
                f"{problems}: loss of the last step, packed and TRL apart, nats",
                0.01,
                gap,
                at_most=True,
            ),
            common.goal(f"{problems}: model FLOP utilisation on a GPU", 0.40, mine.get("mfu")),
        ]
    return found


def notes(args: argparse.Namespace, n_rounds: int) -> list[str]:
    "How the numbers came about"
    return [
        (
            f"{args.student}, LoRA r = {args.lora_r} on all linear layers, dropout 0, "
            f"{args.steps} steps of {args.batch_size} examples, medians of {n_rounds} rounds, "
            "variants in turn."
        ),
        (
            "tokens_per_s counts the tokens of the examples; times_padded compares with padded "
            "batches on the same weights, by the clock on a GPU and by processor seconds "
            "without one: other work on the machine lengthens the clock's seconds, hardly the "
            "processor's."
        ),
        (
            f"Load average of the last 15 minutes: {os.getloadavg()[2]:.1f} on {os.cpu_count()} "
            "cores; what is above the cores is other work beside this."
        ),
        (
            "TRL logs entropy and token accuracy at each step, as it does by default; gradient "
            "checkpointing, its default, is off."
        ),
        (
            "trl_packed fills rows as long as the longest step of the others by best fit, one row "
            "a step: the same examples in other steps, so its losses are of other steps too."
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
