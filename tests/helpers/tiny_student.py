"""A Qwen2-shaped student of a few million parameters, random, with SmolLM2's tokenizer; and a study
around it"""

from pathlib import Path

import pandas as pd
import torch

from cot_distill.core.config import StudyConfig, parse_study
from cot_distill.core.files import write_parquet
from cot_distill.core.problems import load_problems
from cot_distill.core.runs import RunFolder
from cot_distill.core.settings import StudentConfig
from cot_distill.student.model import load_tokenizer


def make_student(folder: Path, hidden: int = 64, layers: int = 2) -> Path:
    "Write a random student as a model folder"
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load_tokenizer(StudentConfig(model="smollm2-135m", dtype="float32", device="cpu"))
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_study(student: Path | str, n: int = 12, **train: object) -> StudyConfig:
    "A study of two-step problems with that student"
    recipe = {
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "learning_rate": 0.01,
        "epochs": 2,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "checkpoint_every": 2,
    }
    settings = {"quantization": "none", "dtype": "float32", "device": "cpu"}
    return parse_study(
        {
            "name": "tiny",
            "problems": {"source": "two-step", "limit": n},
            "eval_sets": [{"name": "two-step", "source": "two-step", "limit": 4}],
            "student": {"model": str(student), **settings},
            "teachers": {"human": {"provider": "human"}},
            "train": recipe | train,
        }
    )


def write_rationales(run: RunFolder, n: int = 12, teacher: str = "human") -> pd.DataFrame:
    "The humans' solutions as a table of kept rationales"
    problems = load_problems("two-step", limit=n)
    rows = [
        {
            "problem_id": p.problem_id,
            "question": p.question,
            "reference_answer": p.reference_answer,
            "teacher": teacher,
            "model": "",
            "sample_idx": 0,
            "completion": p.solution,
            "kept": True,
        }
        for p in problems
    ]
    table = pd.DataFrame(rows)
    write_parquet(run.rationales(teacher), table)
    return table
