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

# A unit and its other names.
_UNITS = """mm millimeter millimetre; cm centimeter centimetre; m meter metre
km kilometer kilometre; in inch inches; ft foot feet; yd yard; mi mile; mg milligram; g gram
kg kilogram; oz ounce; lb pound lbs; ml milliliter millilitre; l liter litre; s second sec
min minute mins; h hour hr hrs; day; week; month; year yr yrs; $ dollar usd; cent ¢
€ euro eur; £ gbp; ° degree deg; rad radian"""
_UNIT_OF = {
    name: names.split()[0] for names in re.split(r"[;\n]", _UNITS) for name in names.split()
}
_FUNCTIONS = """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt det max
min gcd lcm sup lim mod pi infty infinity inf oo and or if"""
FUNCTION_NAMES = frozenset(_FUNCTIONS.split())

_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol|operatorname)"
    r"\s*\{([^{}]*)\}"
)
_SPACES = re.compile(r"\\[,;: ]|~|\\q?quad\b|\s+")
_PRESENTATION = re.compile(r"\\!|\\(?:left|right|big|Big|bigl|bigr|displaystyle)(?![A-Za-z])")
_DELIMITERS = re.compile(r"\\[()\[\]]")
_COMMANDS = {"\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "{,}": ","}
_COMMANDS |= {"\\%": "%", "\\$": "$", "^\\circ": "°", "^{\\circ}": "°", "\\degree": "°"}
_COMMANDS |= {"\\lbrace": "\\{", "\\rbrace": "\\}", "\\le ": "\\leq ", "\\ge ": "\\geq "}
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
_TRANSLATION = str.maketrans(_SIGNS)
# Plain signs that LaTeX has commands for.
_PLAIN = {
    re.compile(r"\*\*"): "^",
    re.compile("<="): r"\\leq ",
    re.compile(">="): r"\\geq ",
    re.compile(r"\\?sqrt\s*\(([^()]*)\)"): r"\\sqrt{\1}",
    re.compile(r"(?<![\\A-Za-z])(?:infinity|infty|inf|oo)(?![A-Za-z])"): r"\\infty ",
    re.compile(
        r"(?<![\\A-Za-z])(pi|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp)(?![A-Za-z])"
    ): r"\\\1 ",
    re.compile(r"\^(-?\d{2,}|-\d)"): r"^{\1}",
}

_PART = r"\s*(?:\{\s*(-?)(\d+)\s*\}|(\d))"
_FRACTION = re.compile(rf"\\frac{_PART}{_PART}")
_TIMES_TEN = re.compile(r"(?<=[\d.])\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?")
_POWER_OF_TEN = re.compile(r"(?<![\d.])10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?")
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:\ \d{3})+|\d+)"
_LITERAL = re.compile(
    rf"""
    (?P<sign>[-+]?)\s*(?P<money>[$€£]?)\s*(?P<sign_behind>(?:(?<!-)-)?)\s*
    (?:
        (?:(?P<whole>\d+)\s+)?(?P<above>{_WHOLE})\s*/\s*(?P<below>{_WHOLE})
      | (?P<decimal>{_WHOLE}(?:\.\d*)?|\.\d+)(?:[eE](?P<exponent>[-+]?\d+))?
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
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3"}


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
    for mark, word in _COMMANDS.items():
        text = text.replace(mark, word)
    text = _PRESENTATION.sub("", text)
    for _ in range(3):  # \textbf{\text{...}}
        text = _WRAPPER.sub(r" \1 ", text)
    return text


def _without_delimiters(text: str) -> str:
    text = _DELIMITERS.sub(" ", text).strip()
    # Dollars stand around mathematics; a single one is money.
    return text.replace("$", "") if text.count("$") % 2 == 0 else text


def latex(text: str) -> str:
    r"""An expression as LaTeX, also if it has plain signs: ``sqrt(2)/3``, ``2*pi``, ``x^10``."""
    text = _without_delimiters(text.translate(_TRANSLATION))
    for sign, command in _PLAIN.items():
        text = sign.sub(command, text)
    return text


def trimmed(text: str) -> str:
    """Spaces as one space; without dollars around it, Markdown's marks and a full stop."""
    text = _DELIMITERS.sub(" ", _SPACES.sub(" ", text).strip(" *_`\"'")).strip()
    text = _without_delimiters(text.rstrip(".,;:*_`\"' "))
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
        sign, whole, digits, period = periodic.groups()
        nines = Fraction(int(period), 10 ** len(period) - 1)
        value = int(whole) + (int(digits or 0) + nines) / 10 ** len(digits)
        return Number(-value if sign else value)
    text = _POWER_OF_TEN.sub(r"1e\1", _TIMES_TEN.sub(r"e\1", _FRACTION.sub(_with_slash, text)))
    match = _LITERAL.fullmatch(text.strip())
    if match is None:
        return None
    scale = _SCALE.match(match["rest"])
    unit = _unit_of(match["money"], match["rest"][scale.end() if scale else 0 :])
    exponent = match["exponent"] or "0"
    if unit is None or len(exponent) > 6 or abs(int(exponent)) > MOST_EXPONENT:
        return None
    is_worked_out = True
    decimals = None
    if match["below"]:
        above, below = [int(re.sub("[, ]", "", match[part])) for part in ("above", "below")]
        if not below:
            return None
        is_worked_out = below > 1 and math.gcd(above, below) == 1
        value = int(match["whole"] or 0) + Fraction(above, below)
    else:
        digits = re.sub("[, ]", "", match["decimal"])
        value = Fraction(digits.rstrip(".")) * Fraction(10) ** int(exponent)
        if not (match["exponent"] or scale):
            decimals = len(digits.partition(".")[2])
    if scale:
        value *= _SCALES[scale[1]]
    if (match["sign"] == "-") != (match["sign_behind"] == "-"):
        value = -value
    return Number(value, *unit, is_worked_out, decimals)


def _with_slash(match: re.Match[str]) -> str:
    r"""``\frac{-3}{4}`` as `` -3/4``."""
    sign, above, digit, other_sign, below, other_digit = match.groups()
    minus = "-" if (sign or "") != (other_sign or "") else ""
    return f" {minus}{above or digit}/{below or other_digit}"


def equal(gold: Number, answer: Number) -> bool:
    """Whether the values are equal and the units, if both have one, are the same. 50% is 0.5, and
    as an answer to a question about percent 50.
    """
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.is_percent == answer.is_percent:
        return _same_value(gold.value, answer)
    if gold.is_percent:
        return _same_value(gold.value, answer) or _same_value(gold.value / 100, answer)
    may_be_percent = abs(gold.value) > 1 and _same_value(gold.value, answer)
    return may_be_percent or gold.value == answer.value / 100


def _same_value(value: Fraction, answer: Number) -> bool:
    """Exactly, or rounded if no decimal is exact: 0.333333 is 1/3, with six digits at least."""
    if value == answer.value:
        return True
    # Only denominators of the primes 2 and 5 have an exact decimal.
    is_endless = pow(10, value.denominator.bit_length(), value.denominator) != 0
    if not is_endless or answer.decimals is None:
        return False
    digits = math.floor(abs(answer.value) * 10**answer.decimals)
    half_a_digit = Fraction(1, 2 * 10**answer.decimals)
    return digits >= 10**5 and abs(value - answer.value) <= half_a_digit


def _unit_of(money: str, rest: str) -> tuple[str, bool] | None:
    """The unit and whether there is a sign of percent; None if ``rest`` is no unit."""
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
    # With its power: ``square inches`` is ``in^2``.
    power = re.search(r"\^\{?([23])", text)
    powers = [f"^{power[1]}"] if power else [_POWERS[word] for word in words if word in _POWERS]
    named = [word for word in words if word not in _POWERS]
    unit = ""
    if len(named) == 1 and "/" not in text:
        unit = _UNIT_OF.get(named[0]) or _UNIT_OF.get(named[0].removesuffix("s"), "")
    if not unit and not is_apart:
        return None
    unit = f"{unit}{powers[-1] if powers else ''}" if unit else _UNIT_OF.get(money, "")
    return unit, percent is not None
