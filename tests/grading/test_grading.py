"""The grader: every dress of a number comes back, every wrong reading is refused, at speed, on any
text"""

import json
import sys
import time
import unicodedata
from fractions import Fraction

import pytest
from grading_cases import CASES, TRUNCATED
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DATA

from cot_distill.grading import (
    RULES,
    explain,
    final_answer,
    final_choice,
    grade,
    is_correct,
    same_number,
)
from cot_distill.grading.numbers import exact_number, read_answer

EQUAL_TO_GOLD = {
    "gpt-4o-mini": 900,
    "gpt-4o": 946,
    "claude-3-5-sonnet": 960,
    "qwen2.5-7b-instruct": 946,
}


def rows(name: str) -> list[dict]:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no recorded data: {path} is missing; COT_DISTILL_DATA names their folder")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("completion", "answer"), CASES)
def test_cases(completion: str, answer: str | None) -> None:
    explained(completion)
    assert final_answer(completion) == answer


@pytest.mark.parametrize(("completion", "answer"), TRUNCATED)
def test_truncated(completion: str, answer: str | None) -> None:
    explained(completion, truncated=True)
    assert final_answer(completion, truncated=True) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("29", "$29.00", True),
        ("1,234", "1234.0", True),
        ("1/2", "50/100", True),
        ("-0", "0", True),
        ("7:30 PM", "19:30", True),
        ("7:00 pm", "7", True),
        ("12:15 am", "0:15", True),
        ("6, 9, 3", "6,9,3", True),
        ("3,4", "34", False),
        ("50%", "0.5", False),
        ("0.5%", "50", False),
        ("1/3", "0.333", False),
        ("1/3", "0.3333333333333333", False),
        ("0.1", "0.1000000000000000055511151231257827", False),
        ("9007199254740993", "9007199254740992", False),
        ("1e400", "1e401", False),
        ("7:30", "730", False),
        ("7:30", "30", False),
        ("7:30", "7.5", False),
        ("7:30 AM", "7:30 PM", False),
        ("4 or 5", "4", False),
        ("72", "-72", False),
        ("", "", False),
        ("none", "none", False),
    ],
)
def test_same_number(one: str, other: str, same: bool) -> None:
    assert same_number(one, other) is same
    assert same_number(other, one) is same


CHOICES = [
    ("B", "B"), ("(B) 7", "B"), ("B. 7", "B"), ("B) Paris", "B"), ("The answer is B.", "B"),
    ("the answer is: b", None),
    ("**Answer: (B)** 7 is prime.", "B"), (r"\boxed{B}", "B"), (r"$\boxed{\text{(B)}}$", "B"),
    ("#### B", "B"), ("####(B)", "B"),
    ("A prime is 7. So option B.", "B"), ("A prime has two divisors.", None), ("No idea.", None),
    ("The answer is A dog.", None),
    ("The answer is a dog.", None), ("The correct answer is option **B**: 7", "B"),
    ("<answer>B</answer>", "B"), ('{"answer": "B"}', "B"),
    ("Option A is wrong, option B is right.", "B"), ("Answer: Because", None),
    ("Answer:\n\n**B) 7**", "B"), ("B\n\nA prime is odd.", "B"),
    ("x\n**B**\n", "B"), ("The answer is B because A is even.", "B"),
    ("Answer: I don't know", None), ("A) 4\nB) 6\nC) 7\nD) 9", None),
    ("A) 4\nB) 6\nSo the answer is (A).", "A"),
    ("<think>The answer is A.</think>The answer is B.", "B"),
    ("The answer is B.\nQuestion: 2?\nAnswer: C", "B"),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "letter"), CHOICES)
def test_choices(completion: str, letter: str | None) -> None:
    assert final_choice(completion) == letter
    assert is_correct(completion, "B") is (letter == "B")


def test_a_choice_that_may_have_been_cut_is_none() -> None:
    assert final_choice("The answer is B", truncated=True) is None
    assert final_choice("The answer is B.", truncated=True) == "B"


@pytest.mark.parametrize("unit", ["answer ", "option A", "\nB ", "#### (", "answer is (B"])
def test_choices_of_ten_megabytes(unit: str) -> None:
    began = time.process_time()
    final_choice(unit * (10_000_000 // len(unit)))
    assert time.process_time() - began < 2


def test_every_dash_is_a_minus() -> None:
    waves = "〜〰゠"
    dashes = [
        chr(code) for code in range(sys.maxunicode) if unicodedata.category(chr(code)) == "Pd"
    ]
    for dash in [*(set(dashes) - set(waves)), *"−˗⁻₋➖"]:
        for dressed in ("#### {}5", "The answer is {}5.", r"\boxed{{{}5}}", "x = {}5", "{}$5"):
            assert final_answer(dressed.format(dash)) == "-5", (hex(ord(dash)), dressed)


@pytest.mark.parametrize("nothing", [None, float("nan"), "", " \n ", "#### ", r"\boxed{}", "####"])
@pytest.mark.parametrize("reference", ["72", "", "none"])
def test_no_answer_is_a_wrong_answer(nothing: object, reference: str) -> None:
    assert is_correct(nothing, reference) is False
    assert final_answer(nothing) is None


@pytest.mark.parametrize(
    "reference", ["72", "72.0", "$72", "48 + 24 = <<48+24=72>>72\n#### 72", "#### 72"]
)
def test_reference_bare_or_as_a_solution(reference: str) -> None:
    assert is_correct("The answer is 72 clips.", reference) is True
    assert is_correct("The answer is 7.", reference) is False


def test_a_list_is_right_only_as_a_list() -> None:
    assert is_correct("Final Answer: 4, 18", "4, 18") is True
    assert (
        is_correct("Final Answer: 4, 18", "18") is is_correct("Final Answer: 4, 18", "4") is False
    )


# What a number may wear, and what a completion may put around it


def grouped(digits: str, separator: str) -> str:
    whole, point, decimals = digits.partition(".")
    return f"{int(whole):,}".replace(",", separator) + point + decimals


def dress_number(value: Fraction, dress: str) -> str:
    text = exact_number(abs(value))
    sign = "-" if value < 0 else ""
    if dress == "fraction":
        return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    if dress == "slash" or "/" in text:
        return f"{value.numerator}/{value.denominator}"
    if dress == "zeros":
        return sign + "00" + text + (".00" if "." not in text else "00")
    if dress == "unicode minus":
        return sign.replace("-", "−") + text
    if dress == "full width":
        return sign + "".join(chr(ord(digit) + 0xFEE0) for digit in text)
    if dress == "scientific":
        return f"{sign}{text}e0"
    if dress in ("$", "€"):
        return f"{sign}{dress}{grouped(text, ',')}"
    return sign + (grouped(text, dress) if dress else text)


NUMBER_DRESSES = [
    "",
    ",",
    "{,}",
    r"\,",
    "\u00a0",
    "\u202f",
    " ",
    "'",
    "$",
    "€",
    "fraction",
    "slash",
]
NUMBER_DRESSES += ["zeros", "unicode minus", "full width", "scientific"]
TEXT_DRESSES = """#### {}|####{}|#### **{}**|#### {} clips|#### <answer>{}</answer>|\\boxed{{{}}}
$\\boxed{{{}}}$|\\boxed{{{} \\text{{ clips}}}}|\\boxed{{x = {}}}|The answer is {}.
the final answer is **{}**|Final Answer: {}
**Final Answer:** {}|Final Answer\\n\\n{}|<answer>{}</answer>|{{"answer": "{}"}}
So the answer is \\({}\\) clips.|Answer: {}%|The total is {}.|In total: **{}**|x = {}|{}|`{}`
The answer is {}, which is plausible.|The answer is {} (checked).
Final Answer: {}\\n\\nI hope this helps!""".replace("\n", "|").split("|")

numbers = st.one_of(
    st.integers(-(10**24), 10**24).map(Fraction),
    st.decimals(-(10**9), 10**9, places=4).map(Fraction),
    st.fractions(-(10**6), 10**6, max_denominator=10**4),
    st.integers(-20, 2000).map(Fraction),
)


@settings(max_examples=1500, deadline=None)
@given(numbers, st.sampled_from(NUMBER_DRESSES), st.sampled_from(TEXT_DRESSES))
def test_any_number_in_any_dress_comes_back(value: Fraction, number: str, text: str) -> None:
    completion = "Of 48 and 24, half is 12.\n" + text.replace("\\n", "\n").format(
        dress_number(value, number)
    )
    assert final_answer(completion) == exact_number(value)
    assert is_correct(completion, exact_number(value)) is True
    assert is_correct(completion, exact_number(value + Fraction(1, 10**6))) is False


@settings(max_examples=300, deadline=None)
@given(
    st.integers(-(10**6), 10**6),
    st.integers(1, 400),
    st.integers(2, 500),
    st.sampled_from(["{} {}/{}", r"{}\frac{{{}}}{{{}}}"]),
)
def test_mixed_numbers(whole: int, part: int, parts: int, text: str) -> None:
    value = abs(whole) + Fraction(part % parts, parts)
    sign = "-" if whole < 0 else ""
    dressed = sign + text.format(abs(whole), part % parts, parts)
    assert final_answer(f"#### {dressed}") == exact_number(-value if sign else value)


@settings(max_examples=500, deadline=None)
@given(st.fractions(max_denominator=10**6))
def test_canonical_text_is_exact_and_reads_back(value: Fraction) -> None:
    text = exact_number(value)
    assert Fraction(text) == value
    assert read_answer(text) == final_answer(text) == text


ALPHABET = list("0123456789.,:/%$()[]{}<>*_~`'\"#=+-×^\\ \n") + ["−", "½", "\u202f", "５", "²"]
PIECES = [
    "answer",
    "final answer",
    "####",
    r"\boxed{",
    "the answer is ",
    "}",
    "wait, ",
    "<think>",
    "</think>",
]
PIECES += [
    " and ",
    " or ",
    "e5",
    " million",
    r"\frac{",
    r"\text{",
    "<answer>",
    "= ",
    "Question:",
    "no, ",
]


def explained(completion: str, truncated: bool = False) -> None:
    "Check that an explanation tells what the grader did, of places that are there"
    found = explain(completion, truncated)
    answer = final_answer(completion, truncated)
    assert [c.value for c in found if c.counts] == ([] if answer is None else [answer])
    assert all(completion[c.start : c.end] == c.text and c.because for c in found)
    assert [c.start for c in found] == sorted(c.start for c in found)


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.sampled_from(ALPHABET + PIECES), max_size=60).map("".join), st.booleans())
def test_no_text_breaks_it(completion: str, truncated: bool) -> None:
    answer = final_answer(completion, truncated)
    assert answer is None or (isinstance(answer, str) and read_answer(answer) == answer)
    assert is_correct(completion, "72", truncated) is same_number(answer, "72")
    explained(completion, truncated)
    for rule in RULES:
        assert isinstance(grade(completion, "72", rule=rule)[1], bool)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_no_character_breaks_it(completion: str) -> None:
    assert final_answer(completion) is None or read_answer(final_answer(completion)) is not None


ATTACKS = [
    "7",
    "#",
    "#### ",
    r"\boxed{",
    "{",
    "}",
    r"\boxed{}",
    "answer ",
    "The answer is 1+1. ",
    " ",
    "\n",
]
ATTACKS += [
    "1,",
    "(1",
    "= 5 ",
    "\\",
    r"\frac{",
    "<",
    "<think>",
    "wait, it is 5+",
    "\nQuestion: 5",
    "~~1",
    "−５",
]
ATTACKS += [
    "1/",
    "1:",
    "5 and ",
    "&#4",
    '"answer": "',
    "answer to " + "a" * 50 + " ",
    "#### " + "x" * 900 + "\n",
]
ATTACKS += [
    "The answer is " + "1+1=" * 230 + "1+1\n",
    "The answer is " + "1*" * 490 + "\n",
    "in 5 of 6 ",
]
NO_LINE_TWICE = "".join(f"The answer is {n}+1. " for n in range(20_000))  # nothing to remember
ATTACKS += [pytest.param(NO_LINE_TWICE, id="no line twice")]


@pytest.mark.parametrize("unit", ATTACKS)
def test_time_grows_with_length_only(unit: str) -> None:
    text = (unit * (400_000 // len(unit) + 1))[:400_000]
    for completion in (text, "The answer is 5. " + text, text + "\n#### 72"):
        began = time.process_time()
        final_answer(completion)
        final_answer(completion, truncated=True)
        assert time.process_time() - began < 3


@pytest.mark.parametrize("unit", ["7", r"\boxed{", "answer "])
def test_ten_megabytes(unit: str) -> None:
    text = unit * (10_000_000 // len(unit))
    began = time.process_time()
    assert final_answer(text + "\n#### 72") == "72"
    assert all(isinstance(grade(text, "72", rule=rule)[1], bool) for rule in RULES)
    assert time.process_time() - began < 20


def test_an_explanation_names_the_rule_and_why_the_others_lost() -> None:
    text = (
        "<think>#### 9</think>#### Step 1\n"
        "\\boxed{5} is wrong: the answer is 6.\n\n"
        "Question: #### 8"
    )
    told = {(c.rule, c.value): c.because for c in explain(text)}
    assert told["####", None] == "a heading"
    assert told["box", "5"] == "another answer is stated later"
    assert told["answer", "6"] == "the last answer that is stated"
    assert told["####", "8"] == "belongs to another question"
    assert ("####", "9") not in told, "thoughts are not read"
    (end,) = explain("So we add 48 and")
    assert (end.rule, end.value, end.counts, end.because) == (
        "conclusion",
        None,
        False,
        "the text breaks off",
    )


def test_a_number_too_long_to_read_is_no_answer() -> None:
    assert final_answer("#### " + "7" * 5000) is None
    assert final_answer("7" * 5000) is None
    assert final_answer("#### " + "7" * 900) == "7" * 900
    assert final_answer("The answer is 1e999999999.") is None


@pytest.mark.parametrize(
    ("completion", "reference", "right"),
    [
        ("#### 29", "29", {"final_answer", "lm_eval_strict", "lm_eval_flexible", "last_number"}),
        (
            "#### 1,234",
            "1234",
            {"final_answer", "lm_eval_strict", "lm_eval_flexible", "last_number"},
        ),
        ("#### 5.", "5", {"final_answer", "lm_eval_strict", "lm_eval_flexible", "last_number"}),
        ("#### $29.00", "29", {"final_answer", "last_number"}),
        ("The answer is 29.", "#### 29", {"final_answer", "lm_eval_flexible", "last_number"}),
        ("The answer is 29. She bought 2.", "29", {"final_answer"}),
        ("#### 29\nThat is 2 more.", "29", {"final_answer", "lm_eval_strict"}),
        ("#### 28\n#### 29", "29", {"final_answer", "lm_eval_flexible", "last_number"}),
        ("#### 28\n#### 29", "28", {"lm_eval_strict"}),
        ("The answer is −29.", "-29", {"final_answer"}),
        ("It starts at 7:30", "30", {"lm_eval_flexible", "last_number"}),
        ("nothing", "29", set()),
    ],
)
def test_rules_differ(completion: str, reference: str, right: set[str]) -> None:
    assert {rule for rule in RULES if grade(completion, reference, rule=rule)[1]} == right


def test_unknown_rule_names_the_known() -> None:
    with pytest.raises(ValueError, match="lm_eval_flexible.*'strict'"):
        grade("#### 72", "72", rule="strict")


@pytest.mark.parametrize(("split", "n"), [("train", 7473), ("test", 1319)])
def test_human_solutions_equal_their_own_answer(split: str, n: int) -> None:
    answers = [row["answer"] for row in rows(f"gsm8k/{split}")]
    wrong = [text for text in answers if not is_correct(text, text.split("####")[1].strip())]
    assert (len(answers), wrong) == (n, [])


@pytest.mark.parametrize("name", ["svamp", "gsm8k_platinum"])
def test_references_of_other_sets_are_numbers(name: str) -> None:
    for row in rows(f"eval/{name}"):
        assert Fraction(row["answer"]) == Fraction(read_answer(row["answer"])), row


@pytest.mark.parametrize("teacher", EQUAL_TO_GOLD)
def test_recorded_teachers(teacher: str) -> None:
    recorded = rows(f"teachers/{teacher}")
    right = sum(is_correct(row["completion"], row["gold"]) for row in recorded)
    missing = [row for row in recorded if final_answer(row["completion"]) is None]
    assert (len(recorded), right, missing) == (1000, EQUAL_TO_GOLD[teacher], [])


def test_conclusions_find_what_the_marker_said() -> None:
    found = n = 0
    for teacher in EQUAL_TO_GOLD:
        for row in rows(f"teachers/{teacher}"):
            body, marker, _ = row["completion"].rpartition("Final Answer:")
            if marker and body.strip():
                n += 1
                found += same_number(final_answer(body), final_answer(row["completion"]))
    assert found / n > 0.97


@pytest.mark.slow
def test_twenty_thousand_a_second() -> None:
    recorded = [row for teacher in EQUAL_TO_GOLD for row in rows(f"teachers/{teacher}")]
    rates = []
    for _ in range(5):
        began = time.process_time()
        for row in recorded:
            is_correct(row["completion"], row["gold"])
        rates.append(len(recorded) / (time.process_time() - began))
    assert max(rates) >= 20_000


@pytest.mark.slow
@pytest.mark.parametrize("teacher", EQUAL_TO_GOLD)
def test_agrees_with_math_verify(teacher: str) -> None:
    math_verify = pytest.importorskip(
        "math_verify", reason="pip install 'math-verify[antlr4_13_2]'"
    )
    differ = []
    for row in rows(f"teachers/{teacher}"):
        gold, found = (
            math_verify.parse(text, parsing_timeout=None)
            for text in (row["gold"], row["completion"])
        )
        theirs = bool(math_verify.verify(gold, found, timeout_seconds=None))
        if theirs != is_correct(row["completion"], row["gold"]):
            differ.append((row["train_index"], row["gold"], final_answer(row["completion"])))
    million = [(402, "192000000", "192000000")]  # "$192 million": math-verify reads 192
    assert differ == (million if teacher.startswith("qwen") else [])


@pytest.mark.slow
def test_rules_of_the_harness_are_its_own() -> None:
    extraction = pytest.importorskip("lm_eval.filters.extraction", reason="pip install lm-eval")
    from lm_eval.api.metrics import exact_match_hf_evaluate

    how = {
        "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
        "ignore_case": True,
        "ignore_punctuation": False,
    }
    filters = {
        "lm_eval_strict": extraction.RegexFilter(regex_pattern=r"#### (\-?[0-9\.\,]+)"),
        "lm_eval_flexible": extraction.RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    }
    texts = [
        ("#### 1,234. or 5", "#### 1234"),
        ("$29.00", "29"),
        ("5.", "5"),
        ("", "5"),
        ("a $", "1"),
    ]
    texts += [(r["completion"], r["gold"]) for t in EQUAL_TO_GOLD for r in rows(f"teachers/{t}")]
    for rule, theirs in filters.items():
        found = theirs.apply([[text] for text, _ in texts], [{}] * len(texts))
        for (text, gold), (extracted,) in zip(texts, found, strict=True):
            assert (RULES[rule](text) or "[invalid]") == extracted
            score = exact_match_hf_evaluate(predictions=[extracted], references=[gold], **how)
            assert grade(text, gold, rule=rule)[1] == bool(score["exact_match"])
