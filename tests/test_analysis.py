"""The analysis: the published study's table, every question on a made run, and what is said when
there is nothing to say"""

import json
import math
import random
import re
import time
import tomllib
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_run import make_run
from matplotlib.text import Text
from places import ROOT

from cot_distill import analysis
from cot_distill.core.errors import InputError
from cot_distill.core.inputs import begin_stage, finish_stage
from cot_distill.core.problems import load_problems
from cot_distill.core.runs import RunFolder
from cot_distill.core.showing import teacher_color
from cot_distill.core.stats import holm, paired_difference
from cot_distill.reading import figures, verdict
from cot_distill.reading.format import equations, text_features, value_of
from cot_distill.reading.frames import RESULT_COLUMNS, Runs, load_runs, result_rows
from cot_distill.reading.mistakes import (
    MISTAKES,
    lost_table,
    mistake,
    outcome_shares,
    solved_table,
    with_outcomes,
)
from cot_distill.reading.words import draw, percent, say

matplotlib.use("Agg")
PUBLISHED = ROOT / "reports" / "original-study"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return load_runs([make_run(tmp_path_factory.mktemp("runs") / "made")])


@pytest.fixture(scope="module")
def published() -> Runs:
    return load_runs([PUBLISHED])


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    "A run in which nothing has happened yet"
    folder = tmp_path_factory.mktemp("runs") / "empty"
    folder.mkdir()
    (folder / "config.toml").write_text('name = "empty"\n')
    return load_runs([folder])


# ---------------------------------------------------------------- reading


def test_the_published_study_gets_the_intervals_it_lacked(published: Runs) -> None:
    rows = published.results.set_index("variant")
    assert list(rows.index) == ["base", "gpt-4o-mini", "deepseek", "gemini", "human"]
    assert list(rows["n_correct"]) == [804, 886, 852, 822, 624]
    assert not rows["is_paired"].any()
    p = rows["p"].drop("base").astype(float)
    assert p["gpt-4o-mini"] == pytest.approx(0.0009, abs=1e-4)
    assert p["deepseek"] == pytest.approx(0.054, abs=1e-3)
    assert p["gemini"] == pytest.approx(0.47, abs=5e-3)
    trained = rows.drop("base").astype({"delta": float, "delta_low": float, "delta_high": float})
    assert (trained["delta_low"] < trained["delta"]).all() and (
        trained["delta"] < trained["delta_high"]
    ).all()
    table = verdict.results_table(published.results)
    assert table.loc["gpt-4o-mini", "accuracy"] == "67.2 % [64.6, 69.7]"
    assert table.loc["base", "difference to base, points"] == ""
    assert "cut off" not in table.columns  # never published
    sentences = " ".join(verdict.gain_sentences(published.results))
    assert "better than the base at the 5 % level: **gpt-4o-mini**" in sentences
    assert "not distinguishable from the base at the 5 % level: **deepseek**" in sentences


def test_a_run_is_read_in_the_order_of_its_study(made: Runs) -> None:
    assert list(made.results.columns) == ["run", *RESULT_COLUMNS]
    assert list(made.evals["variant"].unique()) == ["base", "human", "recorded"]
    assert set(made.evals["problem_set"]) == {"two-step", "other"}
    assert list(made.training["variant"]) == ["human", "recorded"]
    assert made.info["student"].tolist() == ["smollm2-135m"]


def test_what_results_json_says_is_what_the_answers_say(made: Runs) -> None:
    for (name, variant), answers in made.evals.groupby(["problem_set", "variant"]):  # noqa: B007 (the query reads it)
        row = made.results.query("problem_set == @name and variant == @variant").iloc[0]
        assert row["n_correct"] == answers["is_correct"].sum() and row["n"] == len(answers)
        base = made.evals.query("problem_set == @name and variant == 'base'")
        if variant != "base":
            gain = paired_difference(answers["is_correct"].tolist(), base["is_correct"].tolist())
            assert row["delta"] == pytest.approx(gain.delta) and row["p"] == pytest.approx(
                gain.p_mcnemar
            )


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        load_runs([tmp_path])


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "broken", 8, 8)
    (run / "evals" / "human" / "two-step.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(InputError, match=r"human/two-step\.parquet"):
        load_runs([run])


def test_a_number_that_was_changed_in_results_json_is_not_believed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path / "changed", 8, 8)
    before = load_runs([run]).results.query("is_headline").set_index("variant")
    text = (run / "results.json").read_text()
    right = before.loc["human", "n_correct"]
    changed = text.replace(f'"n_correct": {right}', f'"n_correct": {right + 1}', 1)
    assert changed != text
    (run / "results.json").write_text(changed)
    after = load_runs([run]).results.query("is_headline").set_index("variant")
    assert after["n_correct"].to_dict() == before["n_correct"].to_dict()
    assert after["delta"].to_dict() == pytest.approx(before["delta"].to_dict(), nan_ok=True)
    assert "n_correct" in capsys.readouterr().err
    (run / "results.json").write_text(text.replace('"human"', '"humane"', 1))
    with pytest.raises(InputError, match="humane"):
        load_runs([run])


@pytest.mark.parametrize("key", ["problem_set", "variants", "variant"])
def test_a_key_that_was_damaged_in_results_json_is_a_sentence(tmp_path: Path, key: str) -> None:
    "One wrong byte in a key ends the reading: no KeyError, and no row that is left out in silence"
    run = make_run(tmp_path / "damaged", 8, 8)
    text = (run / "results.json").read_text()
    (run / "results.json").write_text(text.replace(f'"{key}"', f'"{key[:-1]}~"', 1))
    with pytest.raises(InputError, match=rf"results\.json is damaged \('{key}' is missing\)"):
        load_runs([run])


@pytest.mark.parametrize("stage", ["generate", "train"])
def test_what_a_stage_wrote_is_not_believed_once_it_was_edited(tmp_path: Path, stage: str) -> None:
    "A price in a table of rationales, a loss in a training log: edited by hand, still whole files"
    run = RunFolder(make_run(tmp_path / "edited", 8, 8))
    path = {"generate": run.rationales, "train": run.training_log}[stage]("human")
    begin_stage(path.parent, stage, {})
    finish_stage(path.parent, stage, [path])
    load_runs([run.path])
    if stage == "generate":
        pd.read_parquet(path).assign(cost_usd=0.5).to_parquet(path, index=False)
    else:
        path.write_text(path.read_text().replace("0.25", "0.15"))
    with pytest.raises(InputError, match=f"{path.name} is damaged since it was made"):
        load_runs([run.path])


def test_results_without_a_base_have_no_differences() -> None:
    rows = result_rows({"n": 10, "variants": [{"variant": "human", "accuracy": 0.5}]})
    assert rows[0]["delta"] is None and rows[0]["n_correct"] == 5


# ---------------------------------------------------------------- questions


def test_every_question_has_an_answer_on_a_full_run(made: Runs) -> None:
    main = verdict.headline(made.results)
    answers = with_outcomes(analysis.with_features(verdict.first_set(made.evals, made.results)))
    texts = analysis.with_features(made.rationales)
    shares = outcome_shares(answers)
    beside = analysis.gains_beside_texts(main, texts, made.training)
    said = {
        1: verdict.gain_sentences(main),
        2: verdict.ranking_sentences(verdict.pairwise(answers)),
        3: analysis.teacher_sentences(texts),
        4: analysis.collapse_sentences(shares),
        5: analysis.mistake_sentences(shares),
        6: verdict.cost_sentences(
            verdict.cost_table(main, verdict.teacher_prices(made)), "a machine"
        ),
        8: analysis.brittle_sentences(analysis.other_sets(made.results)),
    }
    for number, sentences in said.items():
        assert sentences, number
        assert not re.search(r"\bnan\b|None", " ".join(sentences)), (number, sentences)
    assert list(beside["surprise"]) == [1.9, 1.2]
    assert analysis.rule_table(main).shape == (2, 3)
    assert set(analysis.style_table(answers, texts).index) == {
        "untrained student",
        "human, teacher",
        "human, student",
        "recorded, teacher",
        "recorded, student",
    }


def test_every_figure_draws_labels_and_all_its_rows(made: Runs) -> None:
    main = verdict.headline(made.results)
    answers = with_outcomes(verdict.first_set(made.evals, made.results))
    texts = analysis.with_features(made.rationales)
    beside = analysis.gains_beside_texts(main, texts, made.training)
    drawings = {
        "accuracy": (figures.plot_accuracy, main),
        "forest": (figures.plot_forest, main),
        "pairwise": (figures.plot_pairwise, verdict.pairwise(answers)),
        "lengths": (figures.plot_lengths, texts),
        "gain": (figures.plot_gain_against, beside),
        "outcomes": (figures.plot_outcomes, outcome_shares(answers)),
        "pareto": (figures.plot_pareto, verdict.cost_table(main, verdict.teacher_prices(made))),
        "others": (figures.plot_differences, analysis.other_sets(made.results)),
    }
    for name, (plot, data) in drawings.items():
        ax = plot(data)
        assert ax.get_xlabel() or ax.get_title(), name
        drawn = {
            t.get_text()
            for t in [
                *ax.texts,
                *ax.get_yticklabels(),
                *(ax.get_legend().get_texts() if ax.get_legend() else []),
            ]
        }
        assert any("human" in text for text in drawn), (name, drawn)
        assert all("nan" not in text for text in drawn), (name, drawn)


def test_no_name_in_a_figure_lies_on_another() -> None:
    "As the study of GSM8K has it: some teachers are alike in their property, some in their gain"
    names = ["human", "human-own-format", "gpt-4o-mini", "claude-3-5-sonnet", "qwen2.5-7b-instruct"]
    surprise, gains = [1.02, 0.83, 0.605, 0.619, 0.36], [-0.088, -0.077, 0.07, 0.053, 0.108]
    beside = pd.DataFrame({"variant": names, "n": 1319, "surprise": surprise, "delta": gains})
    beside = beside.assign(delta_low=beside["delta"] - 0.03, delta_high=beside["delta"] + 0.03)
    ax = figures.plot_gain_against(beside, "surprise")
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(name) for name in ax.texts]  # without the line to its point
    assert len(boxes) == len(names)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_figures_change_no_global_setting_and_not_their_data(made: Runs) -> None:
    before, main = dict(matplotlib.rcParams), verdict.headline(made.results)
    copy = main.copy(deep=True)
    figures.plot_forest(main)
    figures.plot_accuracy(main)
    assert dict(matplotlib.rcParams) == before
    pd.testing.assert_frame_equal(main, copy)


def test_answers_whose_texts_were_withheld_have_no_outcome(made: Runs) -> None:
    answers = verdict.first_set(made.evals, made.results)
    first, *others = answers["variant"].unique()
    texts = ("question", "completion")
    held = {name: answers[name].where(answers["variant"] != first, "") for name in texts}
    found = with_outcomes(answers.assign(**held))
    assert list(found["variant"].unique()) == others


def test_outcomes_add_up_and_agree_with_accuracy(made: Runs) -> None:
    answers = with_outcomes(verdict.first_set(made.evals, made.results))
    shares = outcome_shares(answers)
    assert shares.sum(axis="columns").round(6).eq(100).all()
    accuracy = verdict.headline(made.results).set_index("variant")["accuracy"].astype(float)
    assert (shares["right"] / 100 - accuracy).abs().max() < 1e-9
    table = solved_table(answers)
    assert len(table) == answers["problem_id"].nunique()
    assert (table["base"] == "✓").sum() == answers.query("variant == 'base'")["is_correct"].sum()
    assert table.iloc[0][["base", "human", "recorded"]].ne("✓").all()  # the hardest first


def test_what_was_lost_and_won_is_the_whole_change(made: Runs) -> None:
    answers = with_outcomes(verdict.first_set(made.evals, made.results))
    table, main = lost_table(answers), verdict.headline(made.results).set_index("variant")
    for variant, row in table.iterrows():
        assert (
            row["won"] - row["lost"]
            == main.loc[variant, "n_correct"] - main.loc["base", "n_correct"]
        )
        assert row["lost"] == sum(row[name] for name in MISTAKES if name in table)


def test_form_and_content_add_up_to_the_change(made: Runs) -> None:
    shares = outcome_shares(with_outcomes(verdict.first_set(made.evals, made.results)))
    for sentence in analysis.collapse_sentences(shares):
        total, form, content = (float(x) for x in re.findall(r"[+-]\d+\.\d", sentence)[:3])
        assert total == pytest.approx(form + content, abs=0.11)


def test_a_ranking_is_corrected_for_the_number_of_pairs() -> None:
    rng = random.Random(1)
    ids = [f"p{i}" for i in range(200)]
    frames = [
        pd.DataFrame(
            {"variant": v, "problem_id": ids, "is_correct": [rng.random() < share for _ in ids]}
        )
        for v, share in (("base", 0.3), ("a", 0.5), ("b", 0.55), ("c", 0.8))
    ]
    pairs = verdict.pairwise(pd.concat(frames))
    assert [(r.first, r.second) for r in pairs.itertuples()] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert (pairs["p_holm"] >= pairs["p"] - 1e-15).all() and pairs["p_holm"].max() <= 1
    assert "better than c." in " ".join(verdict.ranking_sentences(pairs))


def test_teachers_that_no_test_tells_apart_share_a_rank(made: Runs) -> None:
    main = verdict.headline(made.results)
    pairs = verdict.pairwise(verdict.first_set(made.evals, made.results))
    tied = verdict.ranking(main, pairs.assign(p_holm=0.2))
    assert list(tied["rank"]) == [1, 1] and set(tied["ties"]) == {"human", "recorded"}
    apart = verdict.ranking(main, pairs.assign(p_holm=0.001))
    assert list(apart["rank"]) == [1, 2] and set(apart["ties"]) == {""}
    assert apart["delta"].is_monotonic_decreasing
    table = analysis.ranking_table(tied, verdict.cost_table(main, verdict.teacher_prices(made)))
    assert list(table.columns[:2]) == ["rank", "difference to base, points"]


def test_a_price_of_a_point_has_the_interval_of_the_gain(made: Runs) -> None:
    main = verdict.headline(made.results).assign(delta=0.05, delta_low=0.02, delta_high=0.08)
    known = pd.DataFrame({"variant": ["human", "recorded"], "usd": [math.nan, 0.4]})
    costs = verdict.cost_table(main, known.assign(basis=["no price is stated", "list price"]))
    row = costs.set_index("variant").loc["recorded"]
    ends = [row[f"usd a point{end}"] for end in ("", " low", " high")]
    assert ends == pytest.approx([0.08, 0.05, 0.2])
    assert verdict.points_a_dollar(row.to_dict()) == "+12.5 [+5, +20]"
    text = " ".join(verdict.cost_sentences(costs))
    assert "$0.08 a point, 95 % interval $0.05 to $0.20" in text
    assert "**human**: no price is stated" in text
    open_end = verdict.cost_table(main.assign(delta_low=-0.01), known.assign(basis="list price"))
    assert "without an upper end" in " ".join(verdict.cost_sentences(open_end))
    ax = figures.plot_price(verdict.with_price(open_end))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["recorded"]


def test_a_paid_teacher_that_did_harm_has_no_price_and_stands_in_no_figure_of_prices(
    made: Runs,
) -> None:
    gains = {"delta": [0.05, -0.3], "delta_low": [0.02, -0.4], "delta_high": [0.08, -0.2]}
    main = verdict.headline(made.results).tail(2).assign(**gains)
    known = pd.DataFrame({"variant": main["variant"], "usd": 0.4, "basis": "list price"})
    costs = verdict.cost_table(main, known)
    priced = verdict.with_price(costs)
    assert list(priced["variant"]) == [main["variant"].iloc[0]]
    assert len(figures.plot_price(priced).get_yticklabels()) == 1
    assert f"**{main['variant'].iloc[1]}**" in " ".join(verdict.cost_sentences(costs))


def test_an_interval_without_zero_beside_a_p_above_five_percent_is_explained(made: Runs) -> None:
    main = verdict.headline(made.results).assign(delta_low=0.01, delta_high=0.2, p_holm=0.058)
    assert "excludes zero although p is above 5 %" in verdict.gain_sentences(main)[-1]
    wide = verdict.gain_sentences(main.assign(delta_low=-0.01))
    assert not any("excludes zero" in sentence for sentence in wide)


def test_two_sizes_make_a_learning_curve(tmp_path: Path) -> None:
    runs = load_runs(
        [make_run(tmp_path / "small", 12, 40), make_run(tmp_path / "full", 60, 40, seed=1)]
    )
    table = analysis.sizes(analysis.over_runs(runs))
    assert sorted(table["variant"].unique()) == ["human", "recorded"] and len(table) == 4
    assert len(analysis.size_sentences(table)) == 2
    ax = figures.plot_learning_curve(table)
    labelled = [float(tick.get_text().replace(",", "")) for tick in ax.get_xticklabels()]
    assert set(labelled) <= set(table["n_examples"]) and labelled[0] == table["n_examples"].min()
    assert all(second > 1.25 * first for first, second in pairwise(labelled)), labelled


def test_runs_are_told_apart_by_what_their_settings_say(tmp_path: Path) -> None:
    small, full, other = (
        make_run(tmp_path / name, n, 40, seed)
        for name, n, seed in (("small", 12, 0), ("full", 60, 1), ("other", 60, 2))
    )
    config = (other / "config.toml").read_text()
    (other / "config.toml").write_text(config + "\n[train]\nlearning_rate = 1e-5\n")
    runs = load_runs([small, full, other])
    assert runs.info.set_index("run")["recipe"].to_dict() == {
        "small": "",
        "full": "",
        "other": "learning rate 1e-05",
    }  # what most share goes without saying
    assert runs.info.set_index("run")["size"].to_dict() == {
        "small": "12 problems",
        "full": "60 problems",
        "other": "60 problems",
    }
    every = analysis.over_runs(runs)
    assert len(every) == 6 and (every["p_holm"] >= every["p"].astype(float)).all()
    assert every["p_holm"].tolist() == list(
        holm(dict(enumerate(every["p"].astype(float)))).values()
    )
    table = analysis.runs_table(every)
    assert set(table["recipe"]) == {"", "learning rate 1e-05"} and list(table.index.unique()) == [
        "small",
        "full",
        "other",
    ]
    assert set(analysis.sizes(every)["run"]) == {
        "small",
        "full",
    }  # the other recipe has one size only
    ax = figures.plot_differences(every, "setting")
    assert ax.get_yticklabels()[2].get_text() == "other\nlearning rate 1e-05\n60 problems\n(n = 40)"
    assert "6 differences in 3 runs" in analysis.run_sentences(every)[0]
    two = load_runs([full, other]).info.set_index("run")
    assert two["recipe"].to_dict() == {
        "full": "learning rate default",
        "other": "learning rate 1e-05",
    } and set(two["size"]) == {""}
    first = runs.first()
    assert (
        set(first.results["run"])
        == set(first.evals["run"])
        == set(first.training["run"])
        == {"small"}
    )
    assert (
        len(analysis.teacher_table(analysis.with_features(first.rationales), first.training)) == 2
    )
    assert set(load_runs([PUBLISHED, small]).first().results["run"]) == {
        "original-study"
    }  # though it has no settings of its own


def test_folders_of_one_name_stay_apart(tmp_path: Path) -> None:
    runs = load_runs(
        [make_run(tmp_path / place / "demo", 8, 8) for place in ("a", "b")]
        + [tmp_path / "a" / "demo"]
    )
    assert list(runs.info["run"]) == ["a/demo", "b/demo"]


def test_the_spread_over_seeds_stands_in_table_and_forest(made: Runs) -> None:
    main = verdict.headline(made.results).copy()
    spread = {"n_seeds": 3, "mean": 0.5, "sd": 0.04, "min": 0.45, "max": 0.55}
    main["over_seeds"] = [spread if variant == "human" else None for variant in main["variant"]]
    assert verdict.results_table(main).loc["human", "over seeds"] == "50.0 ± 4.0 % (3 seeds)"
    assert verdict.results_table(main).loc["base", "over seeds"] == ""
    base = main.set_index("variant").loc["base", "accuracy"]
    ends = [line.get_xdata() for line in figures.plot_forest(main).lines]
    assert any(
        len(x) == 2
        and abs(x[0] - 100 * (0.45 - base)) < 1e-9
        and abs(x[1] - 100 * (0.55 - base)) < 1e-9
        for x in ends
    )


def test_a_run_without_its_texts_is_counted_and_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 8, 20)
    for path in run.glob("evals/*/*.parquet"):
        pd.read_parquet(path).assign(question="", completion="").to_parquet(path, index=False)
    runs = load_runs([run])
    answers = verdict.first_set(runs.evals, runs.results)
    assert len(verdict.pairwise(answers)) == 1 and analysis.with_texts(answers).empty
    shares = outcome_shares(with_outcomes(analysis.with_features(analysis.with_texts(answers))))
    assert shares.empty and analysis.collapse_sentences(shares) == []


def test_students_that_solve_nothing() -> None:
    rows = [
        {
            "problem_id": f"p{i}",
            "variant": v,
            "question": "1 + 1?",
            "reference_answer": "2",
            "completion": "#### 3",
            "final_answer": "3",
            "truncated": False,
            "is_correct": False,
        }
        for v in ("base", "human")
        for i in range(3)
    ]
    shares = outcome_shares(with_outcomes(pd.DataFrame(rows)))
    assert shares["right"].tolist() == [0, 0] and shares.sum(axis=1).tolist() == [100, 100]
    assert "+0.0 points of accuracy" in analysis.collapse_sentences(shares)[
        0
    ] and analysis.mistake_sentences(shares)
    assert figures.plot_outcomes(shares) is not None


def test_without_data_every_question_says_so(empty: Runs, published: Runs) -> None:
    for runs in (empty, published):
        main = verdict.headline(runs.results)
        answers = with_outcomes(analysis.with_features(verdict.first_set(runs.evals, runs.results)))
        texts = analysis.with_features(runs.rationales)
        shares = outcome_shares(answers)
        assert verdict.ranking_sentences(verdict.pairwise(answers)) == []
        assert (
            analysis.teacher_sentences(texts) == []
            and analysis.teacher_table(texts, runs.training).empty
        )
        assert (
            analysis.collapse_sentences(shares) == [] and analysis.mistake_sentences(shares) == []
        )
        assert analysis.gains_beside_texts(main, texts, runs.training).empty
        assert analysis.rule_table(main).empty
        every = analysis.over_runs(runs)
        assert (
            every.empty
            and analysis.sizes(every).empty
            and analysis.run_sentences(every) == []
            and analysis.other_sets(runs.results).empty
        )
        assert solved_table(answers).empty and analysis.style_table(answers, texts).empty
        assert "Not run: no answers" in say([], "no answers").data
        assert draw(figures.plot_outcomes, shares) is None and say([]) is None
    assert verdict.gain_sentences(verdict.headline(empty.results)) == []


def test_one_colour_a_teacher() -> None:
    known = ["base", "human", "gpt-4o-mini", "deepseek", "gemini", "recorded"]
    assert len({teacher_color(variant) for variant in known}) == len(known)
    teachers = tomllib.loads((ROOT / "configs" / "reference.toml").read_text(encoding="utf-8"))[
        "study"
    ]["teachers"]
    assert len({teacher_color(teacher) for teacher in ("base", *teachers)}) == 1 + len(teachers)


@pytest.mark.parametrize(("value", "text"), [(0.46, "46.0 %"), (math.nan, ""), (None, "")])
def test_shares_as_text(value: float | None, text: str) -> None:
    assert percent(value) == text


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2 = <<48/2=24>>24 clips", [True]),
        (r"\(3 \times 4 = 12\)", [True]),
        (r"\[ 60 \text{ meters/sprint} \times 3 \text{ sprints} = 180 \text{ m} \]", [True]),
        ("5 boxes * 12 apples = 60 apples", [True]),
        ("**Total**: $1,200 ÷ 4 = $300.00", [True]),
        ("10 / 3 = 3.33", [True]),
        ("7 + 8 = 16", [False]),
        ("50% of 20 = 10", [True]),
        ("15 / 90 * 100 = 16.67%", [True]),
        ("- 200 + 200 = 400 miles", [True]),
        ("2 * 900 = 30 * 60", []),
        ("4w - 6 = 54", []),
        ("x = 5", []),
        ("1 hour + 20 minutes = 1 hour 20 minutes", []),
        ("26 + 1/6 = 26 1/6 cups", []),
        ("50 / 3 = 16 remainder 2", []),
        ("6 nickels = 6 * 0.05 = 0.30", [True]),
    ],
)
def test_equations_are_read_as_a_person_reads_them(text: str, expected: list[bool]) -> None:
    assert [equation.is_true for equation in equations(text)] == expected


def test_programme_made_solutions_hold_no_false_equation() -> None:
    for problem in load_problems("two-step", "train", 300):
        found = equations(problem.solution)
        assert len(found) == 2 and all(equation.is_true for equation in found), problem


@pytest.mark.parametrize(
    "text",
    [
        "1 + " * 5000,
        "(" * 20_000,
        "9" * 20_000,
        "1 a " * 5000 + "=",
        "1+1=2 " * 4000,
        "\\frac{" * 4000,
        "<" * 20_000,
        "9**9**9 = 1",
        "=" * 9000,
    ],
)
def test_hostile_texts_cost_no_time(text: str) -> None:
    started = time.process_time()
    equations(text)
    text_features(text)
    assert time.process_time() - started < 3


@given(st.text(alphabet="0123456789+-*/()=.%$ xab\n\\{}", max_size=200))
def test_no_text_breaks_the_reading(text: str) -> None:
    for equation in equations(text):
        assert math.isfinite(equation.value)
    features = text_features(text)
    assert features["n_false"] <= features["n_equations"]
    assert mistake("How many are 2 and 3?", "5", text, "4") in MISTAKES


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('x')",
        "9**9**9",
        "1/0",
        "[1]*9",
        "a+1",
        "lambda: 1",
        "1 if 1 else 2",
        "'a'*9",
    ],
)
def test_nothing_but_arithmetic_is_computed(expression: str) -> None:
    assert value_of(expression) is None


def test_the_chapter_says_nothing_that_was_typed() -> None:
    """Numbers in the analysis' own prose come from cells; markdown cells hold none but in names and
    titles"""
    cells = json.loads((ROOT / "nbs" / "04_analysis.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            prose = re.sub(
                r"\[[^\]]*\]\([^)]*\)|`[^`]*`|^#+ .*$|question \d|chapter \d|95 %|5 %",
                "",
                "".join(cell["source"]),
                flags=re.MULTILINE,
            )
            assert not re.search(r"\d+(\.\d+)?\s*(%|points|problems)", prose), prose
