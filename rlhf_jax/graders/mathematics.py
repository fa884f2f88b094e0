"""A program that says whether two answers are equal, by math-verify, within bounds of work.

    echo '["\\\\frac{1}{2}", "0.5"]' | python mathematics.py        # prints 1.0

math-verify itself ends a comparison after five seconds, so that its verdict depends on the machine.
Here nothing depends on a clock. Texts, numbers and exponents have a largest size, which is known
before any algebra begins; answers beyond a bound are not equal. And no expression is expanded or
simplified, whose terms could be any number: two are equal if their values are, at fixed points. The
program runs in a process of its own (`graders.verifiable` starts it), because it changes SymPy.
"""

import itertools
import json
import logging
import math
import random
import re
import sys
from typing import Any

import math_verify
import sympy
from math_verify import grader
from math_verify.parser import LatexExtractionConfig
from sympy.core.evalf import PrecisionExhausted
from sympy.core.function import DefinedFunction
from sympy.functions.elementary import complexes, exponential, integers, trigonometric

MOST_CHARACTERS = 400
MOST_NESTED = 12  # brackets within brackets
MOST_CELLS = 12  # of a matrix that do not begin a row
MOST_BITS = 20_000  # of a number, about 6,000 digits
MOST_ARGUMENT = 2_000  # of factorials and other functions that grow or loop with their argument
MOST_EXPONENT = 2_500  # of expressions that are no number, such as x + 1
MOST_BITS_OF_ROOT = 1_000  # of a number whose root is taken
MOST_OF_MATRIX = 3.0  # exponent of a matrix
MOST_ELEMENTS = 40  # of a set or list
MOST_WITH_SYMBOLS = 8  # elements, if there are symbols in them
MOST_SUMMANDS = 100  # of a sum or product with a sign for it
MOST_SOLVED = 6  # exponent in a relation that is solved; it has no functions or roots
POINTS = 8  # at each scale
SCALES = (1, 10**2, 10**4, 10**8)  # |x - 5| and 5 - x differ from 5 on alone
DIGITS = 200

_ELEMENTARY = (
    trigonometric.TrigonometricFunction,
    trigonometric.InverseTrigonometricFunction,
    exponential.log,
    integers.RoundFunction,
    complexes.Abs,
    complexes.sign,
    complexes.re,
    complexes.im,
)
# The parser works them out, or their work has no bound.
_NOT_READ = re.compile(r"\\(?:gcd|lcm|int|oint|lim)(?![A-Za-z])")


class TooLarge(ValueError):
    """An expression is beyond the bounds."""


def verdict(expected: str, answer: str) -> float | None:
    """1 if two expressions in LaTeX are equal, else 0; None if the expected one has no value."""
    gold = _read(expected)
    if gold is None:
        return None
    read = _read(answer)
    is_equal = read is not None and math_verify.verify(gold, read, timeout_seconds=None)
    return float(is_equal and not _are_far_apart(gold, read))


def _read(latex: str) -> Any:
    """What the whole text is, or None; math-verify takes a number inside of a text without a box.
    Its parser needs time that grows steeply with nested brackets.
    """
    depths = [0]
    for character in latex:
        depths.append(depths[-1] + (character in "({[") - (character in ")}]"))
    if len(latex) > MOST_CHARACTERS or max(depths) > MOST_NESTED or latex.count("&") > MOST_CELLS:
        return None
    if _NOT_READ.search(latex):
        return None
    forms = [LatexExtractionConfig()]  # else 2 would be what `n \choose 2` is
    read = math_verify.parse(f"\\boxed{{{latex}}}", forms, parsing_timeout=None)
    if not read or isinstance(read[0], str) or read[0].has(sympy.Derivative):
        return None
    for part in read[0].atoms(sympy.FiniteSet, sympy.Tuple):
        if len(part.args) > (MOST_WITH_SYMBOLS if part.free_symbols else MOST_ELEMENTS):
            return None
    for part in read[0].atoms(sympy.Sum, sympy.Product):
        counts = [last - first for _, first, last in part.limits]
        if not all(count.is_Integer and count < MOST_SUMMANDS for count in counts):
            return None
    return read[0]


def _are_far_apart(gold: Any, answer: Any) -> bool:
    """Whether two numbers differ by more than a millionth of the first: math-verify rounds to
    six digits behind the point, where small numbers are 0.
    """
    if not (_is_number(gold) and _is_number(answer)):
        return False
    try:
        first = complex(sympy.N(gold, 15))
        second = complex(sympy.N(answer, 15))
        return abs(first - second) > abs(first) * 1e-6
    except (ArithmeticError, TypeError, ValueError):  # no finite number
        return False


def _agree(gold: Any, answer: Any) -> bool:
    """Whether two expressions, or all elements of two matrices, have equal values at fixed points:
    rational functions exactly, others to 200 digits and also far from 0.
    """
    both = [grader.unwrap_fcs(value) for value in (gold, answer)]  # f(x) is a symbol
    if all(isinstance(value, sympy.MatrixBase) for value in both):
        first, second = both
        return first.shape == second.shape and all(map(_agree, first.flat(), second.flat()))
    difference = both[0] - both[1]
    symbols = sorted(difference.free_symbols, key=str)
    scales = (1,) if difference.is_rational_function(*symbols) else SCALES
    for seed, scale in itertools.product(range(POINTS if symbols else 1), scales):
        draw = random.Random(seed)
        # Odd sixteenths of both signs, at which few answers have a pole.
        drawn = {one: sympy.Rational(2 * draw.randrange(-30, 30) + 1, 16) for one in symbols}
        try:
            value = difference.xreplace({one: scale * number for one, number in drawn.items()})
            if value if value.is_Rational else value.evalf(5, maxn=DIGITS, strict=True):
                return False
        except PrecisionExhausted:  # as exactly as that it is 0
            pass
        except TooLarge:  # such as 2^x far from 0
            if scale == 1:
                raise
    return True


# --- Numbers: checked before they are made, since the parser makes some


def _is_number(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and value.is_number


def _bits(value: Any) -> float:
    """A bound of the bits of a number: log2 of its absolute value, or of a fraction's parts."""
    if value.is_Rational:
        return max(math.log2(abs(value.p) or 1), math.log2(value.q))
    if value.is_Float:
        return abs(float(sympy.log(abs(value), 2))) if value else 0.0
    if value.is_Pow:
        bits = 0.0 if value.base == sympy.I else _bits(value.base)
        return bits * _magnitude(value.exp) if bits else 0.0
    if value.is_Add:
        return max(map(_bits, value.args)) + math.log2(len(value.args))
    if isinstance(value, sympy.Function) and not isinstance(value, _ELEMENTARY):
        return sum(max(_bits(one), 2.0) * _magnitude(one) for one in value.args)
    return sum(map(_bits, value.args)) if value.args else 2.0


def _magnitude(value: Any) -> float:
    """A bound of a number's absolute value."""
    if value.is_Rational:
        bits = math.log2(abs(value.p) or 1) - math.log2(value.q)
    else:
        bits = _bits(value)
    return 2.0**bits if bits < 1_000 else math.inf


def _bound_sympy() -> None:
    """Powers, functions and relations are checked before they are made; nothing is simplified."""
    make_power = sympy.Pow.__new__
    make_function = DefinedFunction.__new__
    solve = grader.sympy_solve_and_compare

    def power(cls: type, base: Any, exponent: Any, evaluate: bool | None = None) -> Any:
        base = sympy.sympify(base)
        exponent = sympy.sympify(exponent)
        if _is_number(exponent):
            most = float(MOST_EXPONENT)
            if _is_number(base):
                bits = 0.0 if base == sympy.I else _bits(base)
                most = MOST_BITS / bits if bits else math.inf
                if bits > MOST_BITS_OF_ROOT and not exponent.is_Integer:
                    raise TooLarge
            elif not isinstance(base, sympy.Expr) or base.is_Matrix:
                most = MOST_OF_MATRIX
            if _magnitude(exponent) > most:
                raise TooLarge
        return make_power(cls, base, exponent, evaluate)

    def function(cls: type, *arguments: Any, **options: Any) -> Any:
        for argument in map(sympy.sympify, arguments):
            is_bounded = not _is_number(argument) or issubclass(cls, _ELEMENTARY)
            if not is_bounded and _magnitude(argument) > MOST_ARGUMENT:
                raise TooLarge
        return make_function(cls, *arguments, **options)

    def solve_small(gold: Any, answer: Any, *precision: int) -> bool:
        for relation in (gold, answer):
            exponents = [power.exp for power in relation.atoms(sympy.Pow)]
            is_small = all(one.is_Integer and one <= MOST_SOLVED for one in exponents)
            if relation.has(sympy.Function) or not is_small:
                return False
        return solve(gold, answer, *precision)

    sympy.Pow.__new__ = power
    DefinedFunction.__new__ = function
    grader.sympy_solve_and_compare = solve_small
    grader.sympy_symbolic_eq = _agree


def main() -> None:
    """Answers each line of standard input, a pair [expected, response], with a verdict."""
    logging.disable()
    _bound_sympy()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(verdict(*json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
