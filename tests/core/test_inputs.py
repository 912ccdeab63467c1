"What can change a number, and what cannot: settings by name, data and weights by content"

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from cot_distill.batch.plan import Job, is_done, plan_jobs
from cot_distill.batch.run import prepare_batch
from cot_distill.batch.series import Row, Series
from cot_distill.core import config
from cot_distill.core.config import StudyConfig, load_study, parse_study
from cot_distill.core.errors import InputError
from cot_distill.core.files import locked, write_json
from cot_distill.core.inputs import (
    adapter_fingerprint,
    begin_stage,
    check_stage,
    finish_stage,
    marker_of,
    stage_inputs,
    stages_of,
)
from cot_distill.core.runs import RunFolder, open_run
from cot_distill.core.settings import Part, kind_of

PARTS = [p for p in vars(config).values() if isinstance(p, type) and issubclass(p, Part)]
KEYS = sorted({name for part in PARTS for name in part.model_fields})
STUDY = {
    "name": "own",
    "problems": {"source": "./data/train.jsonl"},
    "eval_sets": [{"name": "own", "source": "./data/test.jsonl"}],
    "student": {"model": "./student", "dtype": "float32"},
    "teachers": {"told": {"provider": "recorded", "path": "./told.jsonl"}},
}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    "A folder with everything that a study names: problems, answers, a student"
    for split, n in {"train": 3, "test": 2}.items():
        rows = [
            {"question": f"{split}: {i} + 1?", "answer": f"Add.\n#### {i + 1}"} for i in range(n)
        ]
        write_lines(tmp_path / f"data/{split}.jsonl", rows)
    write_lines(tmp_path / "told.jsonl", [{"question": "train: 1 + 1?", "completion": "#### 2"}])
    (tmp_path / "student").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / "student" / name).write_text(f"{name} as it was")
    return tmp_path


def study_in(place: Path, **changes: object) -> StudyConfig:
    return parse_study(STUDY | changes, place)


def jobs_of(study: StudyConfig, run: RunFolder) -> list[Job]:
    "The jobs of a study"
    rows = [Row(study, variant) for variant in ["base", *study.variants()]]
    return plan_jobs(Series(study.name, rows, run.path))


def finish_all(place: Path) -> RunFolder:
    "A run in which every stage has ended, without asking or training anybody"
    run = open_run(place / "run", study_in(place))
    study = load_study(run.config_file)
    row = {"problem_id": "p", "sample_idx": 0, "question": "?", "completion": "2", "kept": True}
    run.rationales("told").parent.mkdir(parents=True)
    pd.DataFrame([row]).to_parquet(run.rationales("told"))
    write_json(run.adapter("told") / "adapter_config.json", {"target_modules": ["a", "b"]})
    (run.adapter("told") / "adapter_model.safetensors").write_text("weights")
    write_json(run.results_json, {})
    for stage, variant, eval_set in stages_of(study):
        marker = marker_of(run, stage, variant, eval_set)
        name = marker.name.removesuffix(".stage.json")
        begin_stage(marker.parent, name, stage_inputs(study, stage, variant, run, eval_set))
        finish_stage(marker.parent, name)
    for job in [job for job in jobs_of(study, run) if job.report]:
        facts = {"end_time": "2", "exception": None, "parameters": {"teacher": job.variant}}
        write_json(job.report, {"metadata": {"papermill": facts}})
    return run


def refused_in(study: StudyConfig, run: RunFolder) -> set[str]:
    "The stages whose markers do not fit the study any more"
    found = set()
    for stage, variant, eval_set in stages_of(study):
        inputs = stage_inputs(study, stage, variant, run, eval_set)
        try:
            assert check_stage(marker_of(run, stage, variant, eval_set), inputs) == "done"
        except InputError:
            found.add(stage)
    return found


def test_a_teacher_may_have_the_name_of_any_setting_and_hides_no_change(tmp_path: Path):
    names = [key for key in KEYS if key != "base"]
    teachers = {name: {"provider": "openai", "model": "one"} for name in names}
    study = STUDY | {"problems": {"source": "two-step"}, "teachers": teachers}
    open_run(tmp_path / "run", parse_study(study))
    before = (tmp_path / "run/config.toml").read_text()
    for name in names:
        changed = teachers | {name: teachers[name] | {"model": "another"}}
        with pytest.raises(InputError, match=rf"teachers\.{name}\.model: 'one' -> 'another'"):
            open_run(tmp_path / "run", parse_study(study | {"teachers": changed}))
    assert (tmp_path / "run/config.toml").read_text() == before


EDITS = {
    "weights": ("student/model.safetensors", {"train", "eval"}),
    "chat template": ("student/chat_template.jinja", {"train", "eval"}),
    "tokenizer": ("student/tokenizer.json", {"train", "eval"}),
    "recorded answers": ("told.jsonl", {"generate"}),
    "train problems": ("data/train.jsonl", {"generate"}),
    "evaluation questions": ("data/test.jsonl", {"eval"}),
    "rationales": ("run/teachers/told/rationales.parquet", {"train"}),
    "adapter": ("run/students/told/adapter/adapter_model.safetensors", {"eval"}),
}


@pytest.mark.parametrize(("name", "stages"), EDITS.values(), ids=EDITS)
def test_another_file_at_the_same_path_is_refused(place: Path, name: str, stages: set[str]):
    run = finish_all(place)
    study, path = load_study(run.config_file), place / name
    assert refused_in(study, run) == set()
    if path.suffix == ".parquet":
        pd.read_parquet(path).assign(completion="3").to_parquet(path)
    else:
        text = path.read_text().replace("1?", "3?").replace("was", "is")
        path.write_text(text.replace("weights", "Weights"))
    assert refused_in(study, run) == stages
    if not name.startswith("run/"):
        with pytest.raises(InputError, match="was made with other settings or data"):
            prepare_batch(run.config_file, run_dir=run.path)
    for job in [job for job in jobs_of(study, run) if job.variant]:
        if job.stage in stages and not (name.startswith("run/") and job.variant == "base"):
            with pytest.raises(InputError, match="was made with other settings or data"):
                is_done(job)
        else:
            assert is_done(job)


@pytest.mark.parametrize(("split", "stage"), [("train", "generate"), ("test", "eval")])
def test_another_gold_answer_is_refused(place: Path, split: str, stage: str):
    run = finish_all(place)
    path = place / f"data/{split}.jsonl"
    path.write_text(path.read_text().replace("#### 1", "#### 7"))
    assert refused_in(load_study(run.config_file), run) == {stage}


def test_what_has_moved_is_the_same(place: Path):
    run = finish_all(place)
    (place / "elsewhere").mkdir()
    for name in ("data", "student", "told.jsonl"):
        shutil.move(place / name, place / "elsewhere" / name)
    moved = study_in(
        place,
        problems={"source": "./elsewhere/data/train.jsonl"},
        eval_sets=[{"name": "own", "source": "./elsewhere/data/test.jsonl"}],
        student=STUDY["student"] | {"model": "./elsewhere/student"},
        teachers={"told": {"provider": "recorded", "path": "./elsewhere/told.jsonl"}},
    )
    assert open_run(run.path, moved).path == run.path
    again = load_study(run.config_file)
    assert again.problems.source == "../elsewhere/data/train.jsonl"
    assert refused_in(again, run) == set()


def test_a_move_to_other_data_leaves_the_run_as_it_was(place: Path):
    run = finish_all(place)
    before = run.config_file.read_bytes()
    shutil.copytree(place / "student", place / "other")
    (place / "other/model.safetensors").write_text("other weights")
    other = study_in(place, student=STUDY["student"] | {"model": "./other"})
    with pytest.raises(InputError, match=r"student.model"):
        open_run(run.path, other)
    assert run.config_file.read_bytes() == before


def test_data_that_are_gone_are_not_held_against_what_is_finished(place: Path):
    run = finish_all(place)
    shutil.rmtree(place / "data")
    shutil.rmtree(place / "student")
    (place / "told.jsonl").unlink()
    assert refused_in(load_study(run.config_file), run) == set()
    # weights are large: a student trained elsewhere may come without them
    (run.adapter("told") / "adapter_model.safetensors").unlink()
    assert refused_in(load_study(run.config_file), run) == set()


APPEAR = {
    "generate": {"system_prompt": "Be brief."},
    "train": {"max_examples": 7},
    "eval": {"n_shots": 2},
    "student": STUDY["student"] | {"system_prompt": "You are a pupil."},
    "problems": STUDY["problems"] | {"limit": 2},
}


@pytest.mark.parametrize(("part", "settings"), APPEAR.items(), ids=APPEAR)
def test_a_setting_may_neither_appear_nor_vanish(place: Path, part: str, settings: dict):
    run = finish_all(place)
    before, more = run.config_file.read_bytes(), study_in(place, **{part: settings})
    with pytest.raises(InputError, match=rf"{part}\.\w+: (None|0) -> "):
        open_run(run.path, more)
    assert run.config_file.read_bytes() == before
    (name,) = settings.keys() - STUDY.get(part, {}).keys()
    open_run(place / "with", more)
    with pytest.raises(InputError, match=rf"{part}\.{name}: .* -> (None|0)"):
        open_run(place / "with", study_in(place))


FASTER = {
    "description": "told anew",
    "repeats": 2,
    "student": STUDY["student"] | {"device": "cpu"},
    "teachers": {"told": STUDY["teachers"]["told"] | {"rpm": 5, "max_in_flight": 2, "batch": True}},
    "generate": {"max_usd": 1.0, "max_attempts": 3, "deadline_s": 9.0, "drain_s": 1.0},
    "train": {"checkpoint_every": 7, "checkpoints_kept": 1, "merge": True},
    "eval": {"slots": 3, "n_bootstrap": 200},
}


@pytest.mark.parametrize(("part", "settings"), FASTER.items(), ids=FASTER)
def test_pace_may_change(place: Path, part: str, settings: object):
    run = finish_all(place)
    open_run(run.path, study_in(place, **{part: settings}))
    study = load_study(run.config_file)
    assert study.model_dump() != study_in(place).model_dump()
    done = study.model_copy(update={"repeats": 1})
    done._base_dir = study._base_dir
    assert refused_in(done, run) == set()


def test_a_study_is_not_changed_while_it_is_worked_on(place: Path):
    run = open_run(place / "run", study_in(place))
    before = run.config_file.read_bytes()
    with locked(run.launcher_lock):
        assert open_run(run.path, study_in(place)).path == run.path
        with pytest.raises(InputError, match="a run is at work in"):
            open_run(run.path, study_in(place, eval={"slots": 3}))
    assert run.config_file.read_bytes() == before


def test_teachers_and_problem_sets_may_be_added(place: Path):
    run = finish_all(place)
    teachers = STUDY["teachers"] | {"human": {"provider": "human"}}
    sets = [*STUDY["eval_sets"], {"name": "more", "source": "two-step", "limit": 2}]
    open_run(run.path, study_in(place, teachers=teachers, eval_sets=sets))
    assert set(load_study(run.config_file).teachers) == {"told", "human"}


def test_an_adapter_is_known_by_what_it_does(tmp_path: Path):
    for name, order in {"one": "abc", "two": "cab"}.items():
        settings = {"r": 4, "target_modules": list(order), "base_model_name_or_path": f"/{name}"}
        write_json(tmp_path / name / "adapter_config.json", settings)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"weights")
    assert adapter_fingerprint(tmp_path / "one") == adapter_fingerprint(tmp_path / "two")
    (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"Weights")
    assert adapter_fingerprint(tmp_path / "one") != adapter_fingerprint(tmp_path / "two")


def test_an_output_that_was_changed_is_made_again(place: Path, capsys: pytest.CaptureFixture):
    folder = place / "stage"
    begin_stage(folder, "eval", {"seed": 0})
    (folder / "table").write_text("0 right")
    finish_stage(folder, "eval", [folder / "table"])
    assert begin_stage(folder, "eval", {"seed": 0}) == "done"
    (folder / "table").write_text("1 right")
    assert begin_stage(folder, "eval", {"seed": 0}) == "resume"
    assert "table is damaged; eval is done again" in capsys.readouterr().err


def test_every_setting_has_a_kind():
    kinds = {kind_of(f) for part in PARTS for f in part.model_fields.values()}
    assert kinds == {None, "pace", "content"}
