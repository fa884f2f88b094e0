r"""Numbers as people and data sets write them, read exactly: ``1,000``, ``\$18.90``, ``7/2``,
``6 \frac{3}{4}``, ``50\%``, ``2.5e-07``, ``1.5\times10^3``, ``90^\circ``, ``5 cm``, ``2516_8``.

A sum, a product or a root is no number here, and neither is a fraction that can be reduced: it is
an expression that nobody worked out.
"""

import functools
import math
import re
from fractions import Fraction
from typing import NamedTuple

MOST_CHARACTERS = 4_000  # of a number
MOST_EXPONENT = 6_000  # of ten

_UNITS = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram",
    "kg": "kilogram",
    "oz": "ounce",
    "lb": "pound lbs",
    "ml": "milliliter millilitre",
    "l": "liter litre",
    "s": "second sec",
    "min": "minute mins",
    "h": "hour hr hrs",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr yrs",
    "$": "dollar usd",
    "cent": "cent ¢",
    "€": "euro eur",
    "£": "gbp",
    "°": "degree deg",
    "rad": "radian",
}
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split())}
_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt det"
_FUNCTIONS += " max min gcd lcm sup lim mod pi infty infinity inf oo and or if"
FUNCTION_NAMES = frozenset(_FUNCTIONS.split())

_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol|operatorname)"
    r"\s*\{([^{}]*)\}"
)
_SPACES = re.compile(r"\\[,;: ]|~|\\q?quad\b|\s+")
_PRESENTATION = re.compile(r"\\!|\\(?:left|right|big|Big|bigl|bigr|displaystyle)(?![A-Za-z])")
_WORDS_OF = {"\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "{,}": ","}
_WORDS_OF |= {"\\%": "%", "\\$": "$", "^\\circ": "°", "^{\\circ}": "°", "\\degree": "°"}
_WORDS_OF |= {"\\lbrace": "\\{", "\\rbrace": "\\}", "\\le ": "\\leq ", "\\ge ": "\\geq "}
_SIGNS = {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "∞": "\\infty "}
_SIGNS |= {
    "π": "\\pi ",
    "≤": "\\leq ",
    "≥": "\\geq ",
    "≈": "\\approx ",
    "√": "\\sqrt",
    "∪": "\\cup ",
}
_SIGNS |= {"²": "^2", "³": "^3", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}"}
_SIGNS |= {"±": "\\pm ", "≠": "\\neq ", "∈": "\\in ", "\u00a0": " ", "\u202f": " ", "º": "°"}
# Plain signs that LaTeX has commands for.
_ROOT = re.compile(r"\\?sqrt\s*\(([^()]*)\)")
_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:infinity|infty|inf|oo)(?![A-Za-z])")
_COMMANDLESS = re.compile(
    r"(?<![\\A-Za-z])(pi|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp)(?![A-Za-z])"
)
_LONG_EXPONENT = re.compile(r"\^(-?\d{2,}|-\d)")
_TRANSLATION = str.maketrans(_SIGNS)

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:\ \d{3})+|\d+)"
_PART = r"(?:\{\s*(?P<{0}>-?\d+)\s*\}|(?P<{0}_digit>\d))"
_LITERAL = re.compile(
    rf"""
    (?P<sign>[-+]?)\s*(?P<money>[$€£]?)\s*(?P<sign_behind>-?)\s*
    (?:
        (?:(?P<whole>\d+)\s*)?\\frac\s*{_PART.replace("{0}", "above")}\s*
            {_PART.replace("{0}", "below")}
      | (?:(?P<plain_whole>\d+)\s+)?(?P<plain_above>{_WHOLE})\s*/\s*(?P<plain_below>{_WHOLE})
      | (?P<power>10)\s*\^\s*\{{?\s*(?P<power_of_ten>[-+]?\d+)\s*\}}?
      | (?P<decimal>{_WHOLE}(?:\.\d*)?|\.\d+)
        (?:[eE](?P<exponent>[-+]?\d+)
          | \s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?\s*(?P<times_ten>[-+]?\d+)\s*\}}?)?
    )
    (?P<rest>.*)
    """,
    re.VERBOSE | re.DOTALL,
)
_PERIODIC = re.compile(r"(-?)(\d+)\.(\d*)\s*\\overline\s*\{(\d+)\}")
_SCALE = re.compile(r"\s*(thousand|million|billion|trillion)\b")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_BASE = re.compile(r"_\{?\s*(\d+)\s*\}?")
_PERCENT = re.compile(r"\s*(?:%|percent\b|per\s?cent\b)\s*", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+|[°¢€£$]")
_UNIT = re.compile(r"[^\W\d_]+|[°¢€£$]|\^?\{?[23]\}?|[ /.-]")


class Number(NamedTuple):
    """A number, its unit, and whether it is worked out."""

    value: Fraction
    unit: str = ""  # of the table above, or ``base 8``; "": none, or another one
    is_percent: bool = False
    is_worked_out: bool = True  # false: a fraction that can be reduced
    decimals: int | None = None  # digits behind the point; None: a fraction


@functools.lru_cache(maxsize=1024)
def plain(text: str) -> str:
    """The text without marks that only change how LaTeX looks; other signs as LaTeX has them."""
    text = text.translate(_TRANSLATION)
    for mark, word in _WORDS_OF.items():
        text = text.replace(mark, word)
    text = _PRESENTATION.sub("", text)
    for _ in range(3):  # \textbf{\text{...}}
        text = _WRAPPER.sub(r" \1 ", text)
    return text


def latex(text: str) -> str:
    r"""An expression as LaTeX, also if it has plain signs: ``sqrt(2)/3``, ``2*pi``, ``x^10``."""
    text = text.translate(_TRANSLATION).replace("\\(", " ").replace("\\)", " ")
    text = text.replace("\\[", " ").replace("\\]", " ").strip()
    if text.count("$") % 2 == 0:
        text = text.replace("$", "")
    text = text.replace("**", "^").replace("<=", "\\leq ").replace(">=", "\\geq ")
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    text = _INFINITY.sub(r"\\infty ", text)
    text = _COMMANDLESS.sub(r"\\\1 ", text)
    return _LONG_EXPONENT.sub(r"^{\1}", text)


def trimmed(text: str) -> str:
    """Spaces as one space; without dollars around it, Markdown's marks and a full stop."""
    text = _SPACES.sub(" ", text).strip(" *_`\"'")
    text = text.replace("\\(", " ").replace("\\)", " ")
    text = text.replace("\\[", " ").replace("\\]", " ").strip()
    text = text.rstrip(".,;:*_`\"' ")
    if text.count("$") % 2 == 0:
        text = text.replace("$", "")  # around mathematics; a single one is money
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1]
    return text.strip()


def number(text: str) -> Number | None:
    """The number that the whole text is; None if it is none or larger than the bounds."""
    text = trimmed(plain(text))
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    if len(text) > MOST_CHARACTERS:
        return None
    periodic = _PERIODIC.fullmatch(text)
    if periodic:
        return Number(_value_of_period(periodic))
    match = _LITERAL.fullmatch(text)
    if match is None:
        return None
    scale = _SCALE.match(match["rest"])
    found = _unit_of(match, match["rest"][scale.end() if scale else 0 :])
    value = _value_of(match)
    if found is None or value is None:
        return None
    unit, is_percent = found
    above = match["above"] or match["above_digit"] or match["plain_above"]
    below = match["below"] or match["below_digit"] or match["plain_below"]
    is_worked_out = True
    if below is not None:
        divisor = _integer(below)
        if not divisor:
            return None
        is_worked_out = divisor > 1 and math.gcd(_integer(above), divisor) == 1
    decimals = None
    if match["decimal"] and not (match["exponent"] or match["times_ten"] or scale):
        decimals = len(match["decimal"].partition(".")[2])
    if scale:
        value *= _SCALES[scale[1]]
    if "-" in (match["sign"], match["sign_behind"]):
        value = -value
    return Number(value, unit, is_percent, is_worked_out, decimals)


def equal(gold: Number, answer: Number) -> bool:
    """Whether the values are equal and the units, if both have one, are the same. 50% is 0.5, and
    as an answer to a question about percent 50.
    """
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.is_percent == answer.is_percent:
        return _same_value(gold.value, answer)
    if gold.is_percent:
        in_units = gold.value / 100
        return _same_value(gold.value, answer) or _same_value(in_units, answer)
    may_be_percent = abs(gold.value) > 1 and _same_value(gold.value, answer)
    return may_be_percent or gold.value == answer.value / 100


def _same_value(value: Fraction, answer: Number) -> bool:
    """Exactly, or rounded if no decimal is exact: 0.333333 is 1/3, with six digits at least."""
    if value == answer.value:
        return True
    is_endless = value.denominator != 1 and _has_other_factors(value.denominator)
    if not is_endless or answer.decimals is None:
        return False
    digits = math.floor(abs(answer.value) * 10**answer.decimals)
    half_a_digit = Fraction(1, 2 * 10**answer.decimals)
    return digits >= 10**5 and abs(value - answer.value) <= half_a_digit


def _has_other_factors(denominator: int) -> bool:
    """Whether a prime other than 2 and 5 divides it, so that no decimal is exact."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator != 1


def _integer(digits: str) -> int:
    return int(digits.replace(",", "").replace(" ", ""))


def _value_of(match: re.Match[str]) -> Fraction | None:
    """The absolute value; None beyond the bounds."""
    exponent = match["exponent"] or match["times_ten"] or match["power_of_ten"] or "0"
    if len(exponent) > 6 or abs(int(exponent)) > MOST_EXPONENT:
        return None
    scale = Fraction(10) ** int(exponent)
    if match["power"]:
        return scale
    if match["decimal"]:
        digits = match["decimal"].replace(",", "").replace(" ", "")
        return Fraction(digits.rstrip(".")) * scale
    above = _integer(match["above"] or match["above_digit"] or match["plain_above"])
    below = _integer(match["below"] or match["below_digit"] or match["plain_below"])
    if below == 0:
        return None
    whole = int(match["whole"] or match["plain_whole"] or 0)
    return whole + Fraction(above, below)


def _value_of_period(match: re.Match[str]) -> Fraction:
    r"""``0.1\overline{6}`` is 1/6."""
    sign, whole, digits, period = match.groups()
    nines = Fraction(int(period), 10 ** len(period) - 1)
    value = int(whole) + (int(digits or 0) + nines) / 10 ** len(digits)
    return -value if sign else value


def _unit_of(match: re.Match[str], rest: str) -> tuple[str, bool] | None:
    """The unit and whether there is a sign of percent; None if ``rest`` is no unit."""
    money = match["money"]
    percent = _PERCENT.match(rest)
    if percent:
        rest = rest[percent.end() :]
    base = _BASE.fullmatch(rest.strip())
    if base:
        return f"base {int(base[1]):d}", False
    text = rest.strip().casefold()
    if not text:
        return _UNIT_OF.get(money, ""), percent is not None
    words = _WORD.findall(text)
    if _UNIT.sub("", text) or not words or words[0] in FUNCTION_NAMES - {"min"}:
        return None
    is_apart = rest.startswith(" ")
    is_letter = len(words[0]) == 1 and words[0].isalpha()
    if is_letter and not (is_apart and words[0] in _UNIT_OF):
        return None  # 4x, 2i and 3m are products, 3 m is a length
    unit = _known(text)
    if not unit and not is_apart:
        return None
    return unit or _UNIT_OF.get(money, ""), percent is not None


def _known(text: str) -> str:
    """The unit of the table, with its power: ``square inches`` is ``in^2``."""
    power = ""
    for sign, names in {"^2": "square sq", "^3": "cubic"}.items():
        words = text.replace(".", " ").split()
        if sign in text.replace("{", "").replace("}", "") or set(names.split()) & set(words):
            power = sign
    words = [word for word in _WORD.findall(text) if word not in ("square", "sq", "cubic")]
    if len(words) != 1 or "/" in text:
        return ""
    [word] = words
    unit = _UNIT_OF.get(word) or _UNIT_OF.get(word.removesuffix("s"), "")
    return f"{unit}{power}" if unit else ""
