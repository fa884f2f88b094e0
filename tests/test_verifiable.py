"""Answers that a rule verifies: what a gold is, where the answer of a response stands, and which
answers are equal. Every verdict below was worked out by hand.
"""

import dataclasses
import importlib.util
import re
import time
from pathlib import Path

import pytest
from builders import slow

from rlhf_jax import vpg
from rlhf_jax.config import RunConfig, data_source
from rlhf_jax.data import check as checks
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.graders import answers, selftest, verifiable
from rlhf_jax.graders.verifiable import Settings
from rlhf_jax.graders.worker import Ended, Worker
from rlhf_jax.runs import reading
from rlhf_jax.training import rl
from rlhf_jax.training.common import initial
from rlhf_jax.training.rl import answers as trial

needs_math = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs math-verify"
)

# (gold, responses that are right, responses that are near it and wrong)
NUMBERS = [
    ("7", ["7", "So it is 7.", "\\boxed{7}", "7.0", "<answer>7</answer>"], ["-7", "7 or 8", "17"]),
    (7, ["#### 7", "3 + 4 = 7", "$x = 7$", "**7**"], ["3 + 4", "3 + 4 =", "14/2", "7^2", ""]),
    ("so 5 + 2\n#### 7", ["#### 7", "#### about 7 eggs", "8 no, 7"], ["7 is not it, 8", "#### 8"]),
    ("#### 1,000", ["1000", "it is $1000.", "1,000", "1 000", "10^3"], ["1", "1,00", "000"]),
    ("32,\\!760", ["32760", "\\boxed{32,760}", "\\boxed{32{,}760}"], ["32", "760", "32.760"]),
    ("-3", ["-3", "\\boxed{-3}", "−3", "x = -3"], ["3", "\\boxed{3}"]),
    ("0.5", ["1/2", "so \\boxed{\\frac{1}{2}}", "50\\%", ".5", "5e-1"], ["2/4", "0.5\\%", "5"]),
    ("50\\%", ["50%", "0.5", "50", "\\boxed{50\\%}", "50 percent"], ["5", "0.05", "0.5\\%"]),
    ("50", ["50", "50\\%", "50 percent"], ["0.5", "5", "51"]),
    ("7/2", ["3 1/2", "3.5", "\\boxed{\\frac{7}{2}}", "\\boxed{3\\frac12}"], ["7", "2", "2/7"]),
    ("6 \\frac{3}{4}", ["27/4", "6.75", "\\boxed{6\\frac{3}{4}}"], ["3/4", "6", "18/4"]),
    ("\\frac{1}{3}", ["1/3", "0.333333", "\\boxed{\\tfrac13}"], ["0.3", "0.333", "1.3", "3"]),
    ("-\\frac{3}{4}", ["-3/4", "-0.75", "\\boxed{\\frac{-3}{4}}"], ["3/4", "-4/3", "-3"]),
    (2.5e-07, ["2.5e-07", "0.00000025", "\\boxed{2.5\\times10^{-7}}"], ["0", "3e-07", "2.5"]),
    (1e16, ["10000000000000000", "10^{16}", "1e16"], ["1", "10^{15}", "16"]),
    ("1e3", ["1000", "1,000", "1e3"], ["1", "3", "13"]),
    ("10^{-3}", ["0.001", "\\boxed{10^{-3}}", "1/1000"], ["-3", "10", "1000"]),
    ("1.5\\times10^3", ["1500", "1,500", "1.5e3"], ["1.5", "10^3", "15"]),
    ("\\$18.90", ["18.90", "\\$18.9", "$18.90", "18.9 dollars"], ["18", "90", "18.90 cents"]),
    ("5 cm", ["5", "5 cm", "5 centimeters.", "\\boxed{5\\text{ cm}}"], ["5 m", "5 cm^2", "50 mm"]),
    ("12 \\text{ square inches}", ["12", "\\boxed{12\\text{ in}^2}"], ["12 inches", "144"]),
    ("90^\\circ", ["90", "90°", "90 degrees", "\\boxed{90^{\\circ}}"], ["9", "90 radians"]),
    ("2516_8", ["2516", "\\boxed{2516_{8}}"], ["2516_9", "1358", "8"]),
    ("0.1\\overline{6}", ["1/6", "0.166667", "\\boxed{0.1\\overline{6}}"], ["0.1", "0.16", "6"]),
    ("5 million", ["5000000", "5,000,000", "5 million"], ["5", "5 billion"]),
    ("x = 5", ["5", "x=5", "\\boxed{x = 5}"], ["6", "x = 6", "x"]),
    ("3 apples", ["3", "3 apples", "There are 3 apples left."], ["2 apples", "apples"]),
]
TEXTS = [
    ("on", ["on", "On.", "\\boxed{\\text{on}}", "The answer is on"], ["no", "off", "one"]),
    ("silent", ["silent", "**Silent**", "<answer>silent</answer>"], ["listen", "silent night"]),
    ("yes", ["Yes", "I see.\n\nYes.", "Answer: yes"], ["no", "yes and no", "I say yes to no"]),
    ("\\text{Evelyn}", ["Evelyn", "\\boxed{\\text{Evelyn}}"], ["Eve", "Evelyn or Ann"]),
    ("New York", ["new york", "The answer is New York."], ["York", "York New"]),
    ("no solution", ["No solution", "\\boxed{\\text{no solution}}"], ["solution", "0"]),
    ("May 5", ["\\boxed{May 5}", "May 5"], ["May 6", "5", "June 5"]),
    ("Größe", ["größe", "GRÖSSE"], ["Große", "Grüße"]),
    (True, ["true", "True."], ["false", "1"]),
    (
        "A",
        ["A", "(A)", "A.", "A) 5 cm", "The answer is (A)."],
        ["B", "A and B", "a dog", "(A) (B)"],
    ),
    ("(B)", ["B", "\\boxed{B}", "\\boxed{\\text{(B)}}", "I think it is B"], ["C", "(C) not (B)"]),
    ("\\text{(C)}", ["(C)", "**Answer: C**"], ["(D)", "C or D"]),
    ("12:30", ["12:30", "at 12:30.", "\\boxed{12:30}"], ["12:45", "12", "30", "12:30:15"]),
    ("7:30 p.m.", ["7:30 pm", "07:30 PM"], ["7:30 am", "7:45 pm"]),
    ("1:2", ["1:2", "1 : 2", "\\boxed{1:2}"], ["1:3", "2:1", "1/2", "12"]),
    (["7", "seven"], ["7", "seven", "\\boxed{7}", "Seven."], ["8", "eight"]),
]
EXPRESSIONS = [
    (
        "144\\pi \\text{ cubic inches}",
        ["\\boxed{144\\pi}", "\\boxed{144\\pi\\text{ in}^3}"],
        ["144"],
    ),
    ("2+3i", ["\\boxed{2+3i}", "\\boxed{3i + 2}"], ["2", "\\boxed{2-3i}", "3"]),
    ("1 \\pm \\sqrt{19}", ["\\boxed{1\\pm\\sqrt{19}}"], ["\\boxed{1+\\sqrt{19}}", "19", "1"]),
    ("3, 5, 7", ["\\boxed{3,5,7}", "3, 5, 7", "\\boxed{7,5,3}"], ["7", "3, 5", "\\boxed{3,5,8}"]),
    ("\\left( -\\infty, 3 \\right)", ["\\boxed{(-\\infty,3)}"], ["3", "\\boxed{(-\\infty,3]}"]),
    ("[1, 2)", ["\\boxed{[1,2)}", "[1, 2)"], ["\\boxed{[1,2]}", "\\boxed{(1,2)}", "1"]),
    ("(1, 2)", ["\\boxed{(1,2)}", "(1, 2)"], ["\\boxed{(2,1)}", "\\boxed{1,2}", "\\boxed{[1,2]}"]),
    ("\\{1, 2\\}", ["\\boxed{\\{2, 1\\}}", "\\boxed{1,2}"], ["\\boxed{\\{1\\}}", "\\boxed{(1,2)}"]),
    ("5!", ["\\boxed{120}", "5!", "120"], ["5", "\\boxed{4!}"]),
    (
        "2\\sqrt{2} \\cdot 10^{-8}",
        ["\\boxed{\\sqrt{8}\\cdot10^{-8}}"],
        ["0", "\\boxed{10^{-8}}"],
    ),
    (
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        ["\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}"],
        ["\\boxed{\\begin{pmatrix} 1 \\\\ 3 \\end{pmatrix}}", "1", "2"],
    ),
    ("xy", ["\\boxed{xy}"], ["x", "\\boxed{x+y}"]),
    ("2xy", ["\\boxed{2yx}"], ["2", "\\boxed{xy}"]),
    ("\\frac{\\sqrt{2}}{1000}", ["0.00141421356", "\\boxed{\\sqrt2/1000}"], ["0.001414", "0.001"]),
]
MORE_EXPRESSIONS = [  # for which SymPy takes longer
    ("3\\sqrt{13}", ["\\boxed{3\\sqrt{13}}", "It is $3\\sqrt{13}$.", "3 sqrt(13)"], ["3", "13"]),
    ("\\frac{3}{4}\\pi", ["\\boxed{\\frac{3\\pi}{4}}", "3*pi/4"], ["\\boxed{\\frac34}", "0.75"]),
    ("4x - 2", ["\\boxed{4x-2}", "The answer is 4x - 2.", "\\boxed{2(2x-1)}"], ["2", "4x", "4x+2"]),
    ("y = 2x + 3", ["\\boxed{y = 2x + 3}", "\\boxed{2x+3}"], ["3", "y = 2x", "\\boxed{y=3x+2}"]),
    ("$x^2 + 2x + 1$", ["\\boxed{(x+1)^2}", "x^2+2x+1"], ["\\boxed{x^2+2x}", "1", "(x-1)^2"]),
    ("\\sqrt{2}", ["\\boxed{\\sqrt2}", "1.41421356"], ["1.41", "2", "\\boxed{2\\sqrt{2}}"]),
    ("x \\le 3", ["\\boxed{x\\le3}", "\\boxed{(-\\infty,3]}"], ["3", "\\boxed{x<3}"]),
    ("x=1, y=2", ["\\boxed{y=2, x=1}"], ["\\boxed{x=2, y=1}", "2", "\\boxed{x=1}"]),
    ("so $a$ is\n\\boxed{\\frac{\\pi}{4}}", ["\\boxed{\\pi/4}"], ["\\boxed{\\pi}", "4"]),
]


# (expected, answer, whether they are equal), of expressions with symbols: by values at points
AT_POINTS = [
    ("x^{2020}-1", "x^{2020}-2", False),
    ("10^{30}+x", "x+10^{30}+1", False),
    ("10^{-40}x", "2\\cdot 10^{-40}x", False),
    ("10^{-40}x", "x\\cdot 10^{-40}", True),
    ("0", "\\sin^2 x+\\cos^2 x-1", True),
    ("|x-1|", "x-1", False),
    ("|x|", "\\sqrt{x^2}", True),
    ("\\ln(xy)", "\\ln x+\\ln y", False),
    ("\\lfloor x+1\\rfloor", "\\lfloor x\\rfloor+1", True),
    # Equal near 0, and different far from it.
    ("|x-5|", "5-x", False),
    ("|x+10|", "x+10", False),
    ("\\sqrt{(x-5)^2}", "5-x", False),
    ("\\max(x,5)", "5", False),
    ("|x-4|+|x+4|", "8", False),
    ("|x-500|", "500-x", False),
    ("\\lfloor x/8\\rfloor", "\\lfloor x/9\\rfloor", False),
    ("\\lfloor n/100\\rfloor", "\\lfloor n/200\\rfloor", False),
    ("y=|x-5|", "y=5-x", False),
    ("x<|y-5|", "x<5-y", False),
    ("|x-y+10|", "x-y+10", False),
    ("|x-5|", "|5-x|", True),
    ("\\sqrt{(x-5)^2}", "|x-5|", True),
    ("2^{x+1}", "2\\cdot 2^x", True),
    ("e^{x+1}", "e\\cdot e^x", True),
    ("e^{2x}\\sin(x+1)", "e^x e^x\\sin(1+x)", True),
    ("x^x", "x\\cdot x^{x-1}", True),
    ("f(2x)", "2f(x)", False),
    ("f(x)+1", "1+f(x)", True),
    ("\\begin{pmatrix}x+1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1+x\\\\2\\end{pmatrix}", True),
    ("\\begin{pmatrix}x+1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2+x\\\\2\\end{pmatrix}", False),
    ("\\frac{x+1}{x-1}", "1+\\frac{2}{x-1}", True),
    ("y=x^5+1", "2y=2x^5+2", True),
    ("n \\choose 2", "2", False),
    ("1", "\\frac{(a+b+c+d+e)^{60}}{(e+d+c+b+a)^{60}}", True),
    ("(x+1)^{300}", "(1+x)^{299}(x+1)", True),
]


@needs_math
def test_expressions_are_compared_at_points():
    wrong = [pair for *pair, is_equal in AT_POINTS if verifiable.are_equal(*pair) != is_equal]
    assert wrong == []


def status(gold, response, asked="", **settings):
    return verifiable.verdict(answers.gold(gold), response, asked, settings=Settings(**settings))[0]


def check(golds):
    wrong = []
    for gold, right, near in golds:
        for response, is_right in [(text, True) for text in right] + [
            (text, False) for text in near
        ]:
            if (status(gold, response) == "right") != is_right:
                wrong.append((gold, response))
    assert wrong == []


def test_numbers_and_texts_by_hand():
    check([*NUMBERS, *TEXTS])


@needs_math
@pytest.mark.parametrize("golds", [EXPRESSIONS, slow(MORE_EXPRESSIONS)], ids=["few", "more"])
def test_expressions_by_hand(golds):
    check(golds)


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("#### 1,000", "it is $1000.", 1),
        ("0.5", "so \\boxed{\\frac{1}{2}}", 1),
        ("18", "", 0),
        ("2", "#### about 2 eggs", 1),
        ("so 5 + 2\n#### 7", "7 or 8", 0),
        (7, "#### 8 #### 7", 1),
        ("", "7", None),
        (None, "7", None),
        ({"a": 1}, "7", None),
        ([], "7", None),
        (float("nan"), "7", None),
        pytest.param(10**5_000, "7", None, id="integer of 5001 digits"),
        ("2", "1\n" * 5_000 + "\\boxed{2}", 1),
        ("2", "\\boxed{2}" + " and so on" * 1_000, 1),
    ],
)
def test_scores(answer, response, expected):
    scores, _ = verifiable.mathematics()([""], [response], [answer])
    assert scores == [expected]


HUGE = {
    "tower": "9^9^9^9",
    "tower in LaTeX": "$9^{9^{9^9}}$",
    "tower of decimals": "$1.5^{1.5^{10^9}}$",
    "interval to a tower": "$[1, 9^{9^{9^9}}]$",
    "factorial": "$(10^8)!$",
    "binomial": "$\\binom{10^7}{10^6}$",
    "product": "$\\prod_{n=1}^{10^9} n$",
    "expansion": "$(x+1)^{1000}$",
    "expansion that loops in one call": "$(x+1)^{10^9}$",
    "power of a sum": "$(a+b+c+d+e)^{99}$",
    "power of a sum in a fraction": "$\\frac{x}{(a+b+c+d)^{-200}}$",
    "nested roots": "$" + r"\sqrt{" * 50 + "2" + "}" * 50 + "$",
    "nested brackets": "$" + "(" * 300 + "1" + ")" * 300 + "$",
    "many terms": "$" + "+".join(map(str, range(3_000))) + "$",
    "many numbers": "1 " * 50_000,
    "digits of a sine": "$\\sin(10^{100000})$",
    "tower of exponentials": "$e^{e^{e^{e^{x}}}}+1$",
    "power of a matrix": "$\\begin{pmatrix}1&x\\\\2&y\\end{pmatrix}^{2000}$",
    "root of many digits": "$\\sqrt[2500]{x^{2499}+1}$",
    "many elements": "$\\{" + ",".join(f"x^{{{i}}}+{i}" for i in range(30)) + "\\}$",
    "integral": "$\\int_0^1 e^{-x^2} dx$",
    "a series": "$\\sum_{n=1}^{\\infty} \\frac{1}{2^n}$",
}
MORE_HUGE = {
    "sum": "$\\sum_{n=1}^{100000} \\frac1n$",
    "power of a power of a sum": "$((a+b+c)^{9}+d)^{20}$",
    "power of a sum of roots": "$(\\sqrt{2}+\\sqrt{3}+\\sqrt{5}+\\pi)^{99}$",
    "power of a sum in a function": "$\\sin(e^{(a+b+c+d+e)^{60}})$",
}


@needs_math
@pytest.mark.parametrize("huge", [HUGE, slow(MORE_HUGE)], ids=["few", "more"])
def test_an_answer_that_would_take_long_is_not_equal_at_once(huge):
    assert status("\\sqrt{2}", "\\boxed{\\sqrt{3}}") == "wrong"  # starts the process
    assert verifiable.are_equal("1999!", "1999!")
    long = {}
    for what, text in huge.items():
        started = time.perf_counter()
        assert status("\\sqrt{2}", f"\\boxed{{{text}}}") != "right"
        assert status("7", f"\\boxed{{{text}}}") != "right"
        if time.perf_counter() - started > verifiable.SECONDS / 2:
            long[what] = time.perf_counter() - started
    assert long == {}


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """Both programs hang, and are given a fifth of a second."""
    program = tmp_path / "hangs.py"
    program.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(verifiable, "_mathematics", Worker(program))
    monkeypatch.setattr(verifiable, "_patterns", Worker(program))
    monkeypatch.setattr(verifiable, "SECONDS", 0.2)
    monkeypatch.setattr(verifiable, "PATTERN_SECONDS", 0.2)


def test_a_comparison_that_hangs_is_wrong_and_the_run_goes_on(hanging, caplog):
    started = time.perf_counter()
    assert status("2+x", "x+3") == "wrong"
    assert re.search(r"after 0.2 s.* wrong.* '2\+x', .* in 'x\+3'", caplog.text)
    with pytest.raises(TrainingFault, match=r"regex:\(a\+\)\+\$: .* 0.2 s .* '.*aab'"):
        verifiable.regex("(a+)+$")([""], ["a" * 40 + "b"])
    assert time.perf_counter() - started < 50  # the programs would sleep a minute


def test_a_program_that_was_ended_is_started_again():
    score = verifiable.regex("^b")
    assert score([], ["bc", "cb"]) == [1, 0]
    verifiable._patterns._process.kill()
    verifiable._patterns._process.wait()
    with pytest.raises(TrainingFault):
        score([], ["bc"])
    assert score([], ["bc"]) == [1]


# --- Where an answer stands

PLACES = {
    "\\boxed{1} <answer>2</answer>\n#### 3\n4": "1",
    "<answer>2</answer>\n#### 3\n4": "2",
    "#### 3\n4": "3",
    "5 and 4": "4",
    "\\boxed{1} \\boxed{2}": "2",
    "\\boxed{\\frac{1}{2}} \\boxed{3": "\\frac{1}{2}",
    "\\boxed{12}\n\n#### Check\n12 - 5 = 7": "12",
    "#### Check\n12 - 5 = 7": "12 - 5 = 7",
    "<think>so \\boxed{7}</think> 5": "5",
    "so \\boxed{7}</think> 5": "5",
    "<think>I get 7</think><answer>5</answer>": "5",
    "<think>I get 7": None,
    "no digit": None,
}


@pytest.mark.parametrize("response", PLACES)
def test_the_place_of_an_answer(response):
    found = answers.find(answers.after_thoughts(response), "number", "auto")
    assert (found and found.text) == PLACES[response]


SEVENS = ["7 (seven)", "(7 points)", "a 7-year-old", "$7/hour", "≈ 7", "the 7th", "+7", "(7)"]
SEVENS += ["\\boxed{7 \\text{ eggs}}", "\\boxed{\\$7}", "\\boxed{\\text{7}}", "\\boxed{7.00}"]
SEVENS += ["\\boxed{\\mathbf{7}}", "\\boxed{\\approx 7}", "#### Answer: 7", "\\boxed{3 + 4 = 7}"]
SEVENS += ["<answer>\nx = 7\n</answer>", "1. No\n2. 7", "Day 1: 5\nDay 2: 7", "$$7$$", "7 %"]
NO_SEVENS = [
    "3-7",
    "7 + 0",
    "7, 8",
    "7 ± 1",
    "70",
    "0.7",
    "7\\pi",
    "7x",
    "7:00",
    "7^1",
    "7e1",
    "seven",
]
NO_SEVENS += ["\\boxed{7 \\text{ or } 8}", "\\boxed{\\sqrt{49}}", "7 thousand", "7/10", "6.9999999"]
NO_SEVENS += ["\\boxed{}", "\\boxed{7} \\boxed{8}", "<think>7</think>", "7 = x"]


def test_ways_to_write_seven():
    assert [text for text in SEVENS if status("7", text) != "right"] == []
    assert [text for text in NO_SEVENS if status("7", text) == "right"] == []


def test_a_place_that_is_set_is_the_only_one():
    response = "\\boxed{1} <answer>2</answer>\n#### 3\n4"
    read = {place: answers.find(response, "number", place).text for place in SET}
    assert read == SET
    assert status("4", "4", place="boxed") == "unreadable"
    assert answers.after_thoughts("7", prompt="What? <think>\n") == ""


SET = {"boxed": "1", "tags": "2", "hashes": "3", "last": "4"}


def test_what_repeats_the_prompt_is_not_paid():
    asked = "What is 3 + 4? Reply with the number only."
    for form in ("number", "expression"):
        for response in ("3 + 4 =", "\\boxed{3+4}", asked, asked[:25]):
            assert status("7", response, asked, form=form) == "repeated"
        assert status("7", "7", asked, form=form) == "right"
        assert status("3 + 4", "3 + 4", asked, form=form) == "right"  # the gold says it itself
    assert status("2x", "\\boxed{x + x}", "Simplify x + x.") == "repeated"
    assert status("B", asked + " (A) 6 (B) 7", asked + " (A) 6 (B) 7") == "repeated"
    assert status("12", "12", "She earns 12 an hour. What does she earn in an hour?") == "right"


@needs_math
def test_an_expression_that_is_not_worked_out():
    read = [status("7", "\\boxed{4 + 3}", form=form) for form in ("number", "expression")]
    assert read == ["unreadable", "right"]
    read = [status("7", "14/2", form=form) for form in ("number", "expression")]
    assert read == ["unreadable", "right"]
    assert status("2/4", "2/4") == "right"  # as the gold is written


def test_components_and_examples():
    score = verifiable.mathematics()
    messages = [[{"role": "user", "content": "What is 3 + 4?"}]] * 4
    given = (["..."] * 4, ["3 + 4", "none", "8", "7"], ["7", "7", "7", None])
    scores, parts = score(*given, messages)
    assert scores == [0, 0, 0, None]
    assert parts["repeats_prompt"] == [1, 0, 0, None]
    assert parts["unreadable"] == [0, 1, 0, None]
    assert score.examples == {"repeats_prompt": "3 + 4"}
    golds = ["yes", "no"] * 8
    scores, parts = score([""] * 16, ["Yes."] * 16, golds)
    assert (sum(scores), parts["one_answer"][0]) == (8, 1)
    scores, parts = score([""] * 17, ["Yes."] * 17, [*golds, "yes"])
    assert (sum(scores), parts["one_answer"][0]) == (9, 0)  # most golds say it
    scores, parts = score([""] * 16, ["A"] * 16, [*"AABBCCDDA" * 2][:16])
    assert (sum(scores), parts["one_answer"][0]) == (5, 0)  # too few to tell
    golds = [*"AABCD" * 4]
    scores, parts = score([""] * 20, ["A"] * 20, golds)
    assert (sum(scores), parts["one_answer"][0], score.examples) == (8, 1, {"one_answer": "a"})


# --- The self-test


def faults(pairs, **settings):
    asked, golds = zip(*pairs, strict=True)
    return selftest.mathematics(asked, golds, Settings(**settings)).faults


@needs_math
@pytest.mark.parametrize(
    ("place", "golds"),
    [
        ("auto", [*NUMBERS, *TEXTS, *EXPRESSIONS]),
        *((place, [*NUMBERS, *TEXTS]) for place in SET),
        *(slow(place, [*EXPRESSIONS, *MORE_EXPRESSIONS]) for place in ("auto", *SET)),
    ],
)
def test_no_false_alarm(place, golds):
    rows = [("What is the answer?", gold) for gold, *_ in golds]
    rows += [("What is 3 + 4?", "7"), ("What is 12?", "12"), ("Is it on?", None)]
    assert faults(rows, place=place) == {}


def test_what_the_self_test_finds(monkeypatch):
    rows = [("What is 3 + 4?", "7"), ("What is 3 + 5?", {"a": 8}), ("So?", "I think\nso")]
    found = faults(rows)
    assert list(found) == [1, 2]
    assert "dict" in found[1]
    assert "####" in found[2]
    rows = [("What is 3 + 4?", "7"), ("What is 4 + 4?", "8"), ("Is it on?", "no"), ("?", "yes")]
    verdict = verifiable.verdict

    def broken(status, when):
        """The self-test with a verifier that says ``status`` where ``when(gold, response)``."""

        def say(gold, response, *given, **options):
            is_broken = when(gold.values[0].text, response)
            return (
                verifiable.Verdict(status)
                if is_broken
                else verdict(gold, response, *given, **options)
            )

        monkeypatch.setattr(verifiable, "verdict", say)
        return faults(rows, form="number")

    assert "its own answer 8" in broken("wrong", lambda gold, text: gold == "8")[1]
    assert "empty" in broken("right", lambda gold, text: not text)[0]
    assert "prompt itself" in broken("right", lambda gold, text: text.startswith("What"))[1]
    assert "part of the prompt" in broken("right", lambda gold, text: "{3 + 4}" in text)[0]
    assert "not worked out" in broken("right", lambda gold, text: "7 + 0" in text)[0]
    assert "yes, the answer of another" in broken("right", lambda gold, text: "yes" in text)[2]


@needs_math
def test_a_gold_that_equals_two_unequal_answers_is_a_fault(monkeypatch):
    equal = verifiable.are_equal
    is_broken = lambda gold, text: gold == "3x" or equal(gold, text)  # noqa: E731
    monkeypatch.setattr(verifiable, "are_equal", is_broken)
    found = faults([("?", gold) for gold in ("3x", "x^2", "y + 1", "2x")])
    assert list(found) == [0]
    assert "both score 1" in found[0]


@needs_math
def test_another_decision_than_recorded_refuses_the_run(monkeypatch):
    monkeypatch.setattr(verifiable, "are_equal", lambda gold, text: True)
    with pytest.raises(UserError, match=r"math-verify [\d.]+ says of \(x\+1\)\^2 and x\^2\+2x\+2"):
        faults([("?", "x + 1")])
    assert faults([("?", "7")]) == {}  # numbers and words are compared by us


@needs_math
def test_a_column_is_described():
    entries = ["#### 7", "#### 8", "#### x + 1", None, {"a": 1}]
    found = selftest.mathematics(["?"] * 5, entries, Settings())
    line = "3 answers, 3 after ####, number: 2, expression: 1, math.form number, "
    assert found.line == line + "1 rows without an answer"
    assert selftest.mathematics(["?"] * 2, ["7", "x + 1"], Settings()).form == "expression"


def test_patterns_and_functions_are_warned_of():
    assert selftest.regex(r"^<a>", ["one", "two"]) == []
    empty, prompt = selftest.regex(r"^\d*$", ["1", "one"])
    assert "empty" in empty
    assert "1 of 2 rows" in prompt

    def contains(prompts, responses, answer):
        return [float(gold in text) for gold, text in zip(answer, responses, strict=True)]

    def rewards_none(prompts, responses, answer):
        return [None] * len(responses), {"part": [None] * len(responses)}

    columns = {"answer": ["7", "8", None]}
    asked = ["is it 7?", "is it?", ""]
    [warning] = selftest.function(contains, asked, columns)
    assert warning.startswith("the prompt itself")
    assert "1 of 2 rows" in warning
    assert selftest.function(rewards_none, asked, columns) == []


ROWS = [
    {"prompt": "What is 3 + 4?", "answer": "7"},
    {"prompt": "What is 3 + 5?", "answer": "8"},
    {"prompt": "Why?", "answer": "because\nof it"},
    {"prompt": "What is 3 + 6?", "answer": None},
]


def test_the_report_on_a_file_tries_the_rewards(write, tmp_path):
    (tmp_path / "mine.py").write_text("def f(prompts, responses, answer): return [1] * len(answer)")
    path = write(ROWS)
    report = checks.check([path], reward=["math", "regex:[0-9]"])
    assert report.num_problems == 1
    assert "data.jsonl, line 3: math: the answer is a whole text" in report.text
    assert "math: 2 answers, 2 bare, number: 2, math.form number, 1 rows without" in report.text
    assert "warning: regex:[0-9]: the prompt itself scores 1 in 3 of 4 rows" in report.text
    report = checks.check([path], reward=["math", "mine.py:f"], on_bad_row="drop")
    assert report.num_problems == 0
    assert "dropped, math: the answer is a whole text" in report.text
    assert "warning: mine.py:f: an empty response scores as much" in report.text
    report = checks.check([write([{"prompt": "a"}])], reward=["math"])
    assert "no row has an answer" in report.text
    assert report.num_problems == 1


def trial_of(config):
    prompts = [initial.stage_rows(data_source(config), "prompts", config.data)]
    drops = config.on_bad_row == "drop"
    return trial.tested(config.reward, config.math, prompts, drops=drops)


def test_a_run_tries_the_answers_first(write, caplog):
    config = RunConfig(data=(write(ROWS),), reward=("math*2", "regex:[0-9]"))
    with caplog.at_level("INFO", "rlhf_jax"):
        with pytest.raises(UserError, match="line 3: math: ") as error:
            trial_of(config)
        assert "--on-bad-row drop" in str(error.value)
        config = dataclasses.replace(config, on_bad_row="drop")
        found, [prompts] = trial_of(config)
    assert found.form == "number"
    assert [row.source[-1] for row in prompts.rows] == ["1", "2", "4"]
    assert prompts.dropped == {
        "math: the answer is a whole text; mark its end by #### or \\boxed{}": 1
    }
    assert "2 answers, 2 bare, number: 2, math.form number, 1 rows without an answer" in caplog.text
    assert "warning: regex:[0-9]: the prompt itself scores 1 in 3 of 4 rows" in caplog.text
    config = RunConfig(data=(write(ROWS[2:3]),), reward=("math",), on_bad_row="drop")
    with pytest.raises(UserError, match="no row is left"):
        trial_of(config)


@pytest.mark.slow
def test_a_run_records_what_the_answers_are(config, write):
    settings = dataclasses.replace(config.rl, data=(write(ROWS * 4),), validation_fraction=0.0)
    config = dataclasses.replace(config, rl=settings, reward=("math", "regex:z*0.5"))
    result = rl.run(dataclasses.replace(config, on_bad_row="drop"), vpg)
    rows = reading.read_rows(Path(result.folder) / "metrics.jsonl")
    parts = {f"reward/math{part}" for part in ("", "/unreadable", "/repeats_prompt", "/one_answer")}
    assert parts <= rows[-1].keys()
    assert "form: number" in (Path(result.folder) / "config.yaml").read_text()


LONG = "9" * 5000


@pytest.mark.parametrize(
    "name",
    [
        f"gcd/{LONG}/0",
        f"gcd/0/{LONG}",
        LONG,
        int("9" * 4000) ** 2,
        "gcd/0/\u0663",
        "gcd/-1/0",
        "gcd/0/0\n",
        "gcd/4295/0",
        "gcd//0",
        None,
        ["gcd/0/0"],
        1e308,
    ],
    ids=lambda name: f"{type(name).__name__}-{name!s:.12}" if isinstance(name, str) else "other",
)
def test_what_names_no_row_of_a_gym_is_refused_with_its_prompt(name, monkeypatch):
    """Of a name, reasoning-gym makes an int; of a seed of 2^32 NumPy makes an error."""

    class Gym:
        def ask(self, question, seconds):
            if question != ["gcd/4295/0"]:
                [_, seed, number] = question[0].split("/")
                pytest.fail(f"a row of seed {int(seed)} and number {int(number)}")
            raise Ended

    monkeypatch.setattr(verifiable, "_gym", Gym())
    monkeypatch.setattr(verifiable, "gym_rows", lambda task: [])
    with pytest.raises(UserError, match=r"'How many\?' has .* `rlhf-jax data gym gcd`") as refused:
        verifiable.gym("gcd")(["How many?"], ["1"], [name])
    assert len(str(refused.value)) < 300
