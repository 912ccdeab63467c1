"""The study file: what is refused, in which words, and that nothing is lost on the way to the run
folder"""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from cot_distill.core.config import load_study, parse_study, to_toml, with_limit
from cot_distill.core.errors import InputError
from cot_distill.core.files import difference

FOUND = sorted((ROOT / "configs").rglob("*.toml"))
CONFIGS = [path for path in FOUND if "steps" not in tomllib.loads(path.read_text())]
TINY = {
    "name": "tiny",
    "problems": {"source": "two-step"},
    "eval_sets": [{"name": "two-step", "source": "two-step"}],
    "teachers": {"human": {"provider": "human"}},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_studies_load_and_carry_their_file_name(path: Path):
    assert load_study(path).name == path.stem


def test_repeats_are_students_with_other_seeds():
    study = parse_study(TINY | {"seed": 7, "repeats": 3})
    assert study.variants() == {
        "human": ("human", 7),
        "human.seed8": ("human", 8),
        "human.seed9": ("human", 9),
    }
    assert study.variant("human.seed8").seed == 8
    assert list(parse_study(TINY).variants()) == ["human"]
    with pytest.raises(InputError, match="no student 'human.seed3'; did you mean"):
        study.variant("human.seed3")
    teachers = dict.fromkeys(("human", "human.seed1"), TINY["teachers"]["human"])
    assert len(parse_study(TINY | {"teachers": teachers}).variants()) == 2
    with pytest.raises(
        InputError, match="'human.seed1' is also the name of another teacher's repeat"
    ):
        parse_study(TINY | {"teachers": teachers, "repeats": 2})


def test_a_series_is_no_study():
    (series, *_) = [path for path in FOUND if path not in CONFIGS]
    with pytest.raises(InputError, match="a series of studies.*cot-distill run"):
        load_study(series)


def test_the_study_as_asked_for_is_configured():
    study = load_study(next(p for p in CONFIGS if p.stem == "gsm8k"))
    assert set(study.teachers) == {"gpt-4o-mini", "deepseek", "gemini", "human"}
    assert study.student.model == "Qwen/Qwen2.5-1.5B-Instruct"
    assert study.student.quantization == "nf4"
    recipe = study.train
    assert (recipe.lora_r, recipe.lora_alpha, recipe.lora_dropout) == (64, 128, 0.08)
    assert (recipe.learning_rate, recipe.warmup_frac, recipe.epochs) == (1e-5, 0.1, 2)
    assert (recipe.batch_size, recipe.gradient_accumulation) == (4, 4)
    assert study.eval.temperature == 0
    keys = {t.api_key_env for t in study.teachers.values()} - {None}
    assert keys == {"OPENAI_API_KEY", "DEEPSEEK_API_KEY", "GEMINI_API_KEY"}


BAD = {
    "misspelt": ({"train": {"learning_rte": 1e-4}}, "did you mean 'learning_rate'"),
    "misspelt table": ({"trian": {}}, "did you mean 'train'"),
    "misspelt teacher key": (
        {"teachers": {"x": {"provider": "human", "modle": "y"}}},
        "did you mean 'model'",
    ),
    "misspelt set key": ({"eval_sets": [{"name": "a", "sauce": "b"}]}, "did you mean 'source'"),
    "teacher called base": ({"teachers": {"base": {"provider": "human"}}}, "untrained student"),
    "teacher with a slash": ({"teachers": {"../x": {"provider": "human"}}}, "folder name"),
    "no teacher": ({"teachers": {}}, "teachers"),
    "negative rate": ({"train": {"learning_rate": -1}}, "train.learning_rate"),
    "prompt without question": ({"student": {"prompt_template": "hi"}}, "{question}"),
    "two sets of one name": ({"eval_sets": TINY["eval_sets"] * 2}, "different names"),
    "text for a number": ({"seed": "many"}, "seed"),
}


@pytest.mark.parametrize(("change", "says"), BAD.values(), ids=BAD.keys())
def test_a_mistake_gets_a_sentence(change: dict, says: str):
    with pytest.raises(InputError) as err:
        parse_study(TINY | change)
    assert says in str(err.value)
    assert "\n" not in str(err.value)


def test_a_missing_table_is_named():
    with pytest.raises(InputError, match="'problems' is missing"):
        parse_study({k: v for k, v in TINY.items() if k != "problems"})


def test_files_that_are_no_study(tmp_path: Path):
    with pytest.raises(InputError, match="no study at"):
        load_study(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"name = \xff")
    with pytest.raises(InputError, match="not a TOML file"):
        load_study(tmp_path / "bad.toml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_written_and_read_back_is_the_same_study(path: Path, tmp_path: Path):
    study = load_study(path)
    (tmp_path / "config.toml").write_text(to_toml(study, tmp_path))
    again = load_study(tmp_path / "config.toml")
    assert difference(study.model_dump(), again.model_dump()) == {}


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(
    description=text,
    key=text.filter(bool),
    value=st.one_of(text, st.integers(-(2**62), 2**62), st.booleans(), st.floats(-1e300, 1e300)),
)
def test_any_text_survives_the_toml(description: str, key: str, value: object):
    study = parse_study(
        TINY
        | {
            "description": description,
            "teachers": {
                "x": {"provider": "openai", "extra_body": {key: value, "deep": {"er": [value]}}}
            },
        }
    )
    again = parse_study(tomllib.loads(to_toml(study)))
    assert again == study


def test_relative_paths_start_at_the_studys_folder_and_move_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a").mkdir()
    data = TINY | {"problems": {"source": "./mine.jsonl"}}
    (tmp_path / "a" / "study.toml").write_text(to_toml(parse_study(data)))
    study = load_study(tmp_path / "a" / "study.toml")
    assert Path(study.source("./mine.jsonl")) == tmp_path / "a" / "mine.jsonl"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(study, tmp_path / "run"))
    moved = load_study(tmp_path / "run" / "config.toml")
    assert moved.problems.source == "../a/mine.jsonl"
    assert Path(moved.source(moved.problems.source)) == tmp_path / "a" / "mine.jsonl"


def test_overrides_reach_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "s.toml"
    path.write_text(to_toml(parse_study(TINY)))
    study = load_study(
        path,
        overrides={
            "train.learning_rate": "1e-4",
            "eval_sets.0.limit": "7",
            'teachers."a.b".provider': "human",
            "problems.source": "./p.jsonl",
        },
    )
    assert (study.train.learning_rate, study.eval_sets[0].limit) == (1e-4, 7)
    assert study.teachers["a.b"].provider == "human"
    assert (
        study.path(study.problems.source) == tmp_path / "p.jsonl"
        or study.path(study.problems.source).resolve() == tmp_path / "p.jsonl"
    )
    with pytest.raises(InputError, match="no dotted key"):
        load_study(path, overrides={"train learning": "1"})
    with pytest.raises(InputError, match="'seed': Input should be a valid integer"):
        load_study(path, overrides={"seed.x": "1"})


def test_a_limit_cuts_every_set_and_never_raises_one():
    study = with_limit(parse_study(TINY | {"problems": {"source": "two-step", "limit": 3}}), 5)
    assert (study.problems.limit, study.eval_sets[0].limit) == (3, 5)
    with pytest.raises(InputError, match="limit must be >= 1"):
        with_limit(study, 0)


def test_a_study_like_another_says_only_what_differs(tmp_path: Path) -> None:
    "Paths of the other file start at its own folder; a list is replaced whole"
    (tmp_path / "checks").mkdir()
    (tmp_path / "big.toml").write_text(
        "name = 'big'\n[problems]\nsource = './data/train.jsonl'\nlimit = 7\n"
        "[[eval_sets]]\n"
        "name = 'a'\n"
        "source = 'two-step'\n"
        "[[eval_sets]]\n"
        "name = 'b'\n"
        "source = 'two-step'\n"
        "[teachers.human]\nprovider = 'human'\n"
    )
    small = tmp_path / "checks" / "small.toml"
    small.write_text(
        "like = '../big.toml'\nname = 'small'\n[problems]\nlimit = 2\n"
        "[[eval_sets]]\nname = 'c'\nsource = 'two-step'\n"
    )
    study = load_study(small)
    assert study.path(study.problems.source) == tmp_path / "data/train.jsonl"
    assert (study.name, study.problems.limit, [s.name for s in study.eval_sets]) == (
        "small",
        2,
        ["c"],
    )
    assert list(study.teachers) == ["human"]
    small.write_text("like = 'small.toml'\n")
    with pytest.raises(InputError, match="is like itself"):
        load_study(small)
