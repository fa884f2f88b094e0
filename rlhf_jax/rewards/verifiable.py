"""Rewards that a rule verifies: a regular expression, or equality with the answer in the prompt's
data row.
"""

import re
from collections.abc import Callable
from typing import Any


def regex(pattern: str) -> Callable[..., list[float]]:
    """``fn(prompts, responses, **columns)``: 1 where the pattern (Python's syntax) is found in the
    response, else 0.
    """
    search = re.compile(pattern).search
    return lambda prompts, responses, **columns: [
        float(search(response) is not None) for response in responses
    ]


def math(prompts: list[str], responses: list[str], answer: list[Any]) -> list[float | None]:
    """1 for a response whose answer equals that of its data row, else 0.

    The package math-verify reads both, as numbers, expressions or LaTeX, and compares their values.
    Of a text with the mark ``####`` of GSM8K (Cobbe et al. 2021) only what follows the last one is
    read. None, which leaves the response out, if nothing can be read in the row's answer.
    """
    from math_verify import parse, verify  # an optional package

    def read(text: Any) -> list[Any]:
        last = str(text).rpartition("####")[2].strip()
        return parse(last) or parse(f"${last}$")

    pairs = [
        (read(expected), response) for expected, response in zip(answer, responses, strict=True)
    ]
    return [
        float(verify(expected, read(response))) if expected else None
        for expected, response in pairs
    ]
