"""The statistics against independent implementations and against the published table they were made
for"""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

from cot_distill.core.stats import (
    holm,
    majority_answer,
    minimum_detectable_difference,
    paired_difference,
    pass_at_k,
    rank_correlation,
    seed_spread,
    two_proportion_p,
    wilson,
)


@pytest.mark.parametrize(("accuracy", "p"), [(0.6717, 0.0009), (0.6459, 0.054), (0.6232, 0.47)])
def test_published_table(accuracy: float, p: float) -> None:
    n = 1319
    assert two_proportion_p(round(accuracy * n), round(0.6096 * n), n) == pytest.approx(p, rel=0.04)


@pytest.mark.parametrize(
    ("n_correct", "n"), [(0, 1), (0, 100), (1, 1), (46, 100), (100, 100), (804, 1319)]
)
def test_wilson_is_the_formula(n_correct: int, n: int) -> None:
    z, p = sps.norm.ppf(0.975), n_correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
    assert wilson(n_correct, n) == pytest.approx(expected, abs=1e-12)
    assert 0 <= wilson(n_correct, n)[0] <= p <= wilson(n_correct, n)[1] + 1e-12 <= 1 + 1e-9


@pytest.mark.parametrize(("n_correct", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses(n_correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="n_correct"):
        wilson(n_correct, n)


def _two_students(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    before = rng.random(n) < 0.5
    now = np.where(rng.random(n) < 0.25, rng.random(n) < 0.7, before)
    return now, before


def test_paired_difference_is_mcnemar_and_bootstrap() -> None:
    now, before = _two_students(400, 1)
    result = paired_difference(now, before, seed=3)
    n_gained, n_lost = int((now & ~before).sum()), int((before & ~now).sum())
    assert (result.n_gained, result.n_lost) == (n_gained, n_lost)
    assert result.delta == pytest.approx(now.mean() - before.mean())
    assert result.p_mcnemar == pytest.approx(sps.binomtest(n_gained, n_gained + n_lost).pvalue)
    drawn = sps.bootstrap(
        (now.astype(int) - before.astype(int),),
        np.mean,
        method="percentile",
        n_resamples=10_000,
        rng=5,
    )
    assert result.ci95 == pytest.approx(tuple(drawn.confidence_interval), abs=0.006)


def test_paired_difference_is_repeatable_and_antisymmetric() -> None:
    now, before = _two_students(300, 2)
    there, back = paired_difference(now, before), paired_difference(before, now)
    assert there == paired_difference(list(now), list(before))
    assert there.delta == -back.delta and there.p_mcnemar == back.p_mcnemar


@pytest.mark.parametrize("answers", [[True] * 7, [False] * 7, [True, False]])
def test_no_difference_is_no_finding(answers: list[bool]) -> None:
    result = paired_difference(answers, answers)
    most = wilson(0, len(answers))[1]
    assert (result.delta, result.ci95, result.p_mcnemar) == (0.0, (-most, most), 1.0), (
        "seven equal answers do not prove that all are equal"
    )


@pytest.mark.parametrize(
    ("now", "before"), [([], []), ([True], [True, False]), ([[True]], [[True]])]
)
def test_paired_difference_refuses(now: list, before: list) -> None:
    with pytest.raises(ValueError, match="same problems twice"):
        paired_difference(now, before)


def test_holm_by_hand() -> None:
    assert holm({}) == {}
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    assert list(holm({"z": 0.5, "a": 0.9})) == ["z", "a"]
    assert holm({"only": 0.02}) == pytest.approx({"only": 0.02})


@pytest.mark.parametrize("discordance", [0.1, 0.2])
def test_detectable_difference_is_detected_so_often(discordance: float) -> None:
    n, rng = 1319, np.random.default_rng(0)
    delta = minimum_detectable_difference(n, discordance)
    shares = [(discordance - delta) / 2, (discordance + delta) / 2, 1 - discordance]
    counts = rng.multinomial(n, shares, size=2000)
    found = [sps.binomtest(int(g), int(g + lost)).pvalue < 0.05 for lost, g, _ in counts]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)


def test_detectable_difference_at_the_edges() -> None:
    assert minimum_detectable_difference(1319, 0.0) is None
    assert minimum_detectable_difference(4, 0.25) is None
    assert minimum_detectable_difference(100, 1.0) < 0.3
    with pytest.raises(ValueError, match="discordance"):
        minimum_detectable_difference(100, 1.2)


@pytest.mark.parametrize(
    ("n_samples", "n_correct", "k"), [(5, 2, 1), (5, 2, 3), (8, 0, 4), (8, 8, 1), (6, 1, 6)]
)
def test_pass_at_k_is_counting(n_samples: int, n_correct: int, k: int) -> None:
    expected = 1 - math.comb(n_samples - n_correct, k) / math.comb(n_samples, k)
    assert pass_at_k(n_samples, n_correct, k) == pytest.approx(expected)


def test_majority_and_spread() -> None:
    assert majority_answer([]) is None
    assert majority_answer([None, "4"]) == "4"
    assert majority_answer(["5", "4", "4", "5"]) == "5"
    assert seed_spread([0.4, 0.6]) == pytest.approx(
        {"n_seeds": 2, "mean": 0.5, "sd": math.sqrt(0.02), "min": 0.4, "max": 0.6}
    )
    with pytest.raises(ValueError, match="at least one"):
        seed_spread([])


@given(st.permutations(range(5)), st.lists(st.integers(0, 9), min_size=5, max_size=5, unique=True))
@settings(max_examples=30, deadline=None)
def test_a_rank_correlation_is_judged_by_all_orders(order: list[int], other: list[int]) -> None:
    "The share of all orders of one side that look as strong, both ways"
    rho, p = rank_correlation(order, other)
    all_of_them = [sps.spearmanr(one, other).statistic for one in permutations(order)]
    assert rho == pytest.approx(sps.spearmanr(order, other).statistic)
    assert p == pytest.approx(np.mean([abs(one) >= abs(rho) - 1e-9 for one in all_of_them]))
