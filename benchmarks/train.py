"""Tokens a second and peak memory of training: packed and padded, NF4 and full precision, and TRL's SFTTrainer beside them.

    python benchmarks/train.py                                   # on this machine, a few minutes
    python benchmarks/train.py --trl-python ~/trl/bin/python     # with TRL, from an environment that has it and this package
    python benchmarks/train.py --student Qwen/Qwen2.5-1.5B-Instruct --dtype bfloat16 --source gsm8k   # on a GPU, with MFU

Every variant runs in a process of its own, in turn, `--rounds` times over, on the same examples in the same order with the
same recipe; the first step is not counted. Tokens are those of the examples: padding is not work, and a beginning that
packed examples share is counted in each. Ratios are of medians within one run of this script.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}  # dense bfloat16


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--source", default="two-step", help="problems, as in a study")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variants", default="packed,padded,packed-nf4,padded-nf4,trl")
    parser.add_argument("--trl-python", default="", help="python of an environment with trl; without it TRL is left out")
    parser.add_argument("--out", default="", help="JSON file for the results")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict:
    "Train one variant in this process"
    import torch
    from transformers import AutoConfig, TrainerCallback

    from cot_distill.config import StudentConfig, TrainConfig
    from cot_distill.packing import Example, training_order
    from cot_distill.problems import load_problems
    from cot_distill.sizes import add_lora, plan_training, sizes_of
    from cot_distill.students import completion_ids, device_of, load_student, prompt_ids, student_source
    from cot_distill.train import PeakMemory
    from cot_distill.trainer import make_trainer, training_arguments

    engine, _, quantization = args.one.partition("-")
    student = StudentConfig(model=args.student, dtype=args.dtype, quantization=quantization or "none")
    cfg = TrainConfig(
        lora_dropout=args.dropout, learning_rate=2e-4, epochs=1, batch_size=args.batch_size, gradient_accumulation=args.accumulation,
        packing=engine == "packed", checkpoint_every=10_000,
    )  # fmt: skip
    model, tokenizer = load_student(student)
    problems = load_problems(args.source, limit=args.batch_size * args.accumulation * args.steps)
    examples = [Example(p.problem_id, tuple(prompt_ids(tokenizer, p.question, student)), tuple(completion_ids(tokenizer, p.solution))) for p in problems]
    order = training_order(examples, cfg, seed=0)
    plan = plan_training(examples, student, cfg, 0, sizes_of(AutoConfig.from_pretrained(student_source(student)), cfg.lora_r))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(student, cfg, 0, len(order), Path(folder))
        arguments.save_strategy = "no"
        peak = PeakMemory(device_of(student))
        if engine == "trl":
            trainer = trl_trainer(model, tokenizer, [examples[i] for step in order for i in step], cfg, arguments)
        else:
            trainer = make_trainer(add_lora(model, cfg, 0), examples, arguments, cfg, 0, tokenizer.pad_token_id)
        trainer.add_callback(Clock())
        trainer.train()
    tokens = [sum(examples[i].n_tokens for i in step) for step in order]
    seconds = ends[-1] - ends[0]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"variant": args.one, "tokens_per_s": sum(tokens[1:]) / seconds, "peak_memory_gb": peak.gb(), "first_loss": float(losses[0]), "last_loss": float(losses[-1])}
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        flops = next((f for key, f in PEAK_FLOPS.items() if key in name), None)
        result |= {"gpu": name, "mfu": plan.tflop * 1e12 * sum(tokens[1:]) / sum(tokens) / seconds / flops if flops else None}
    return result


def trl_trainer(model, tokenizer, examples: list, cfg, arguments):
    "TRL's SFTTrainer on the same tokens, with the same recipe"
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": [*e.prompt, *e.completion], "completion_mask": e.loss_mask} for e in examples]
    config = SFTConfig(
        output_dir=arguments.output_dir, per_device_train_batch_size=cfg.batch_size, gradient_accumulation_steps=cfg.gradient_accumulation,
        learning_rate=cfg.learning_rate, lr_scheduler_type="cosine", warmup_steps=arguments.warmup_steps, weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm, optim=arguments.optim, num_train_epochs=1, seed=0, bf16=arguments.bf16, use_cpu=arguments.use_cpu,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, max_length=cfg.max_length, completion_only_loss=True,
        gradient_checkpointing=False, shuffle_dataset=False, dataloader_pin_memory=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    lora = LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora)


def main() -> int:
    args = settings()
    if args.one:
        print("RESULT " + json.dumps(measure(args)))
        return 0
    variants = [v for v in args.variants.split(",") if v != "trl" or args.trl_python]
    results: dict[str, list[dict]] = {v: [] for v in variants}
    for _ in range(args.rounds):
        for variant in variants:
            python = args.trl_python if variant == "trl" else sys.executable
            done = subprocess.run([python, __file__, *sys.argv[1:], "--one", variant], capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(f"{variant} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                continue
            results[variant].append(json.loads(lines[0][7:]))
            print(f"{variant}: {results[variant][-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    report(args, results)
    return 0


def report(args: argparse.Namespace, results: dict[str, list[dict]]) -> None:
    "A table of medians, on the screen and as JSON"
    from cot_distill.runs import provenance

    def median(variant: str, key: str) -> float:
        return statistics.median(r[key] for r in results[variant])

    done = [v for v in results if results[v]]
    print(f"\n{args.student}, {args.dtype}, batch {args.batch_size} x {args.accumulation}, {args.steps} steps, dropout {args.dropout:g}, {args.source}\n")
    print("| variant | tokens/s | of padded | peak memory, GB | MFU | loss, first and last step |\n|---|---|---|---|---|---|")
    for v in done:
        ratio = f"{median(v, 'tokens_per_s') / median('padded', 'tokens_per_s'):.2f}" if "padded" in done else ""
        mfu = f"{median(v, 'mfu'):.0%}" if results[v][0].get("mfu") else "–"
        spread = f"{min(r['tokens_per_s'] for r in results[v]):.0f}–{max(r['tokens_per_s'] for r in results[v]):.0f}"
        print(f"| {v} | {median(v, 'tokens_per_s'):.1f} ({spread}) | {ratio} | {median(v, 'peak_memory_gb'):.2f} | {mfu} | {median(v, 'first_loss'):.3f}, {median(v, 'last_loss'):.3f} |")
    if args.out:
        Path(args.out).write_text(json.dumps({"settings": vars(args), "results": results, "provenance": provenance()}, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
