"""A program that says whether two answers are equal, by math-verify, within bounds of work.

    echo '["\\\\frac{1}{2}", "0.5"]' | python mathematics.py        # prints 1.0

math-verify itself ends a comparison after five seconds, so that its verdict depends on the machine.
Here nothing depends on a clock: texts, expressions and numbers have a largest size, and a
comparison has a number of function calls. Answers beyond a bound are not equal. The program runs in
a process of its own (`graders.verifiable` starts it), because it changes SymPy and counts calls.
"""

import functools
import json
import logging
import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import math_verify
import sympy
from math_verify import parser
from math_verify.errors import TimeoutException
from sympy.core.cache import clear_cache
from sympy.core.function import DefinedFunction
from sympy.functions.elementary import complexes, exponential, integers, trigonometric
from sympy.ntheory import multinomial
from sympy.polys import rings

MOST_CHARACTERS = 4_000  # of a text
MOST_IN_EXPRESSION = 400  # characters
MOST_NESTED = 12  # brackets within brackets
MOST_BITS = 20_000  # of a number, about 6,000 digits
MOST_ARGUMENT = 2_000  # of factorials and other functions that grow or loop with their argument
MOST_EXPONENT = 2_500  # of expressions that are no number, such as x + 1
MOST_TERMS = 2_000  # of an expanded power of a sum
MOST_CALLS = 2_000_000  # and returns of functions, in one comparison

_ELEMENTARY = (
    trigonometric.TrigonometricFunction,
    trigonometric.InverseTrigonometricFunction,
    exponential.log,
    integers.RoundFunction,
    complexes.Abs,
    complexes.sign,
)


class TooLarge(ValueError):
    """An expression is beyond the bounds; math-verify then compares it as a text."""


def verdict(expected: str, answer: str) -> float | None:
    """1 if two expressions in LaTeX are equal, else 0; None if the expected one has no value."""
    gold = _read(expected)
    if not gold:
        return None
    read = _read(answer)
    is_equal = _equal(gold, read)
    if is_equal is None:
        # SymPy imports modules when it needs them: the first attempt may have used up its calls.
        is_equal = _equal(gold, read)
    return float(is_equal or False)


def _read(latex: str) -> list[Any]:
    """What the whole text is; math-verify takes a number inside of a text without a box."""
    if len(latex) > MOST_CHARACTERS:
        return []
    read = math_verify.parse(f"\\boxed{{{latex}}}", parsing_timeout=None)
    return [value for value in read if not isinstance(value, str)]


def _equal(gold: list[Any], answer: list[Any]) -> bool | None:
    """Whether math-verify calls them equal; None if that takes too many function calls."""
    clear_cache()  # earlier comparisons must not make this one cheaper
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += 1
        # Raised inside of the hook, it would be ignored and end the counting.
        if calls > MOST_CALLS and frame.f_code is not count_again.__code__:
            raise TimeoutException  # math-verify takes it for the timeout of its own clock

    def count_again(ignored: Any) -> None:
        """An exception that Python ignores, in the end of a generator, has ended the counting."""
        sys.setprofile(count)

    sys.unraisablehook = count_again
    sys.setprofile(count)
    try:
        is_equal = bool(math_verify.verify(gold, answer, timeout_seconds=None))
        is_equal = is_equal and not _are_far_apart(gold[0], answer[0])
    finally:
        sys.setprofile(None)
    return None if calls > MOST_CALLS else is_equal


def _are_far_apart(gold: Any, answer: Any) -> bool:
    """Whether two numbers differ by more than a millionth of the first: math-verify rounds to
    six digits behind the point, where small numbers are 0.
    """
    if not (_is_number(gold) and _is_number(answer)):
        return False
    try:
        first = complex(sympy.N(gold, 15))
        second = complex(sympy.N(answer, 15))
    except (ArithmeticError, TypeError, ValueError):  # no finite number
        return False
    return abs(first - second) > abs(first) * 1e-6


def _bits(value: Any) -> float:
    """A bound of the bits of a number: log2 of its absolute value, or of a fraction's parts."""
    if value.is_Rational:
        return max(math.log2(abs(value.p) or 1), math.log2(value.q))
    if value.is_Float:
        return abs(float(sympy.log(abs(value), 2))) if value else 0.0
    if value.is_Pow:
        return _bits_of_power(value.base, value.exp)
    if value.is_Add:
        return max(map(_bits, value.args)) + math.log2(len(value.args))
    return sum(map(_bits, value.args)) if value.args else 2.0


def _bits_of_power(base: Any, exponent: Any) -> float:
    bits = 0.0 if base == sympy.I else _bits(base)
    return bits * _magnitude(exponent) if bits else 0.0


def _magnitude(value: Any) -> float:
    """A bound of a number's absolute value."""
    if value.is_Rational:
        bits = math.log2(abs(value.p) or 1) - math.log2(value.q)
    else:
        bits = _bits(value)
    return 2.0**bits if bits < 1_000 else math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and value.is_number


def _check_power(base: Any, exponent: Any) -> None:
    base = sympy.sympify(base)
    exponent = sympy.sympify(exponent)
    if not _is_number(exponent):
        return
    if _is_number(base):
        if _bits_of_power(base, exponent) > MOST_BITS:
            raise TooLarge
    elif _magnitude(exponent) > MOST_EXPONENT:
        raise TooLarge


def _check_function(kind: type, arguments: tuple[Any, ...]) -> None:
    for argument in map(sympy.sympify, arguments):
        if not _is_number(argument) or issubclass(kind, _ELEMENTARY):
            continue
        if _magnitude(argument) > MOST_ARGUMENT:
            raise TooLarge


def _check_latex(latex: str) -> None:
    """The parser needs time that grows steeply with nested brackets."""
    depth = 0
    for character in latex:
        depth += (character in "({[") - (character in ")}]")
        if depth > MOST_NESTED:
            raise TooLarge
    if len(latex) > MOST_IN_EXPRESSION:
        raise TooLarge


def _bound_sympy() -> None:
    """Every power, expansion, function and parsed expression is checked before it is made."""
    make_power = sympy.Pow.__new__
    make_function = DefinedFunction.__new__
    expand_power = multinomial.multinomial_coefficients
    parse_latex = parser.latex2sympy
    parse_expression = parser.parse_expr

    def power(
        cls: type,
        base: Any,
        exponent: Any,
        evaluate: bool | None = None,
    ) -> Any:
        _check_power(base, exponent)
        return make_power(cls, base, exponent, evaluate)

    def coefficients(summands: int, exponent: int) -> Any:
        # The loop makes no calls that could be counted.
        if math.comb(summands + exponent - 1, exponent) > MOST_TERMS:
            raise TooLarge
        return expand_power(summands, exponent)

    def function(cls: type, *arguments: Any, **options: Any) -> Any:
        _check_function(cls, arguments)
        return make_function(cls, *arguments, **options)

    def checked(parse: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(parse)
        def parse_checked(text: str, **options: Any) -> Any:
            _check_latex(text)
            return parse(text, **options)

        return parse_checked

    sympy.Pow.__new__ = power
    multinomial.multinomial_coefficients = rings.multinomial_coefficients = coefficients
    DefinedFunction.__new__ = function
    parser.latex2sympy = checked(parse_latex)
    parser.parse_expr = checked(parse_expression)


def main() -> None:
    """Answers each line of standard input, a pair [expected, response], with a verdict."""
    logging.disable()
    _bound_sympy()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(verdict(*json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
