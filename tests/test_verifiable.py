"""Answers that a rule verifies: what a gold is, where the answer of a response stands, and which
answers are equal. Every verdict below was worked out by hand.
"""

import importlib.util
import time

import pytest

from rlhf_jax.errors import TrainingFault
from rlhf_jax.graders import answers, verifiable
from rlhf_jax.graders.verifiable import Settings
from rlhf_jax.graders.worker import Worker

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
    ("3\\sqrt{13}", ["\\boxed{3\\sqrt{13}}", "It is $3\\sqrt{13}$.", "3 sqrt(13)"], ["3", "13"]),
    (
        "144\\pi \\text{ cubic inches}",
        ["\\boxed{144\\pi}", "\\boxed{144\\pi\\text{ in}^3}"],
        ["144"],
    ),
    ("2+3i", ["\\boxed{2+3i}", "\\boxed{3i + 2}"], ["2", "\\boxed{2-3i}", "3"]),
    ("\\frac{3}{4}\\pi", ["\\boxed{\\frac{3\\pi}{4}}", "3*pi/4"], ["\\boxed{\\frac34}", "0.75"]),
    ("1 \\pm \\sqrt{19}", ["\\boxed{1\\pm\\sqrt{19}}"], ["\\boxed{1+\\sqrt{19}}", "19", "1"]),
    ("4x - 2", ["\\boxed{4x-2}", "The answer is 4x - 2.", "\\boxed{2(2x-1)}"], ["2", "4x", "4x+2"]),
    ("y = 2x + 3", ["\\boxed{y = 2x + 3}", "\\boxed{2x+3}"], ["3", "y = 2x", "\\boxed{y=3x+2}"]),
    ("3, 5, 7", ["\\boxed{3,5,7}", "3, 5, 7", "\\boxed{7,5,3}"], ["7", "3, 5", "\\boxed{3,5,8}"]),
    ("\\left( -\\infty, 3 \\right)", ["\\boxed{(-\\infty,3)}"], ["3", "\\boxed{(-\\infty,3]}"]),
    ("[1, 2)", ["\\boxed{[1,2)}", "[1, 2)"], ["\\boxed{[1,2]}", "\\boxed{(1,2)}", "1"]),
    ("(1, 2)", ["\\boxed{(1,2)}", "(1, 2)"], ["\\boxed{(2,1)}", "\\boxed{1,2}", "\\boxed{[1,2]}"]),
    ("\\{1, 2\\}", ["\\boxed{\\{2, 1\\}}", "\\boxed{1,2}"], ["\\boxed{\\{1\\}}", "\\boxed{(1,2)}"]),
    ("$x^2 + 2x + 1$", ["\\boxed{(x+1)^2}", "x^2+2x+1"], ["\\boxed{x^2+2x}", "1", "(x-1)^2"]),
    ("5!", ["\\boxed{120}", "5!", "120"], ["5", "\\boxed{4!}"]),
    ("\\sqrt{2}", ["\\boxed{\\sqrt2}", "1.41421356"], ["1.41", "2", "\\boxed{2\\sqrt{2}}"]),
    ("2\\sqrt{2} \\cdot 10^{-8}", ["\\boxed{\\sqrt{8}\\cdot10^{-8}}"], ["0", "\\boxed{10^{-8}}"]),
    ("x \\le 3", ["\\boxed{x\\le3}", "\\boxed{(-\\infty,3]}"], ["3", "\\boxed{x<3}"]),
    (
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        ["\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}"],
        ["\\boxed{\\begin{pmatrix} 1 \\\\ 3 \\end{pmatrix}}", "1", "2"],
    ),
    ("x=1, y=2", ["\\boxed{y=2, x=1}"], ["\\boxed{x=2, y=1}", "2", "\\boxed{x=1}"]),
    ("xy", ["\\boxed{xy}"], ["x", "\\boxed{x+y}"]),
    ("2xy", ["\\boxed{2yx}"], ["2", "\\boxed{xy}"]),
    ("so $a$ is\n\\boxed{\\frac{\\pi}{4}}", ["\\boxed{\\pi/4}"], ["\\boxed{\\pi}", "4"]),
]


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
def test_expressions_by_hand():
    assert len([*NUMBERS, *TEXTS, *EXPRESSIONS]) >= 60
    check(EXPRESSIONS)


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
    "sum": "$\\sum_{n=1}^{100000} \\frac1n$",
    "product": "$\\prod_{n=1}^{10^9} n$",
    "expansion": "$(x+1)^{1000}$",
    "expansion that loops in one call": "$(x+1)^{10^9}$",
    "nested roots": "$" + r"\sqrt{" * 50 + "2" + "}" * 50 + "$",
    "nested brackets": "$" + "(" * 300 + "1" + ")" * 300 + "$",
    "many terms": "$" + "+".join(map(str, range(3_000))) + "$",
    "many numbers": "1 " * 50_000,
    "digits of a sine": "$\\sin(10^{100000})$",
}


@needs_math
def test_an_answer_that_would_take_long_is_not_equal_at_once():
    assert status("\\sqrt{2}", "\\boxed{\\sqrt{3}}") == "wrong"  # starts the process
    slow = {}
    for what, text in HUGE.items():
        started = time.perf_counter()
        assert status("\\sqrt{2}", f"\\boxed{{{text}}}") != "right"
        assert status("7", f"\\boxed{{{text}}}") != "right"
        if time.perf_counter() - started > 9:
            slow[what] = time.perf_counter() - started
    assert slow == {}


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """Both programs hang, and are given a fifth of a second."""
    program = tmp_path / "hangs.py"
    program.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(verifiable, "_mathematics", Worker(program))
    monkeypatch.setattr(verifiable, "_patterns", Worker(program))
    monkeypatch.setattr(verifiable, "SECONDS", 0.2)
    monkeypatch.setattr(verifiable, "PATTERN_SECONDS", 0.2)


def test_a_comparison_that_hangs_is_an_error_and_no_verdict(hanging):
    started = time.perf_counter()
    with pytest.raises(TrainingFault, match=r"after 0.2 s, at the answer '2\+x' and .* in 'x\+3'"):
        status("2+x", "x+3")
    with pytest.raises(TrainingFault, match=r"regex:\(a\+\)\+\$: no result after 0.2 s .* '.*aab'"):
        verifiable.regex("(a+)+$")([""], ["a" * 40 + "b"])
    assert time.perf_counter() - started < 5


def test_a_program_that_was_ended_is_started_again():
    score = verifiable.regex("^b")
    assert score([], ["bc", "cb"]) == [1, 0]
    verifiable._patterns._process.kill()
    verifiable._patterns._process.wait()
    with pytest.raises(TrainingFault):
        score([], ["bc"])
    assert score([], ["bc"]) == [1]
