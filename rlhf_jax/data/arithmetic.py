"""Word problems of one step, in the manner of GSM8K (Cobbe et al. 2021), for rewards that check an answer.

Deterministic by seed on every platform: all choices come from ``random.Random(text).random()``, whose sequence Python
keeps the same from version to version.
"""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_jax.errors import UserError

T = TypeVar("T")

NAMES = ("Ann", "Ben", "Eve", "Jim", "Max", "Mia", "Sam", "Zoe")
THINGS = ("cups", "eggs", "figs", "hats", "keys", "nuts", "pens", "toys")
ADDITIONS = (
    "{name} has {a} {things} and gets {b} more. How many?",
    "{name} finds {a} {things}, then {b} more. How many?",
    "{a} {things} in a box, {name} adds {b} more. How many?",
)
SUBTRACTIONS = (
    "{name} has {a} {things} and gives {b} away. How many?",
    "{name} buys {a} {things}, then throws {b} away. How many?",
    "{a} {things} in a box, {name} takes {b} away. How many?",
)
NUM_PROMPTS = 4000
LARGEST_CHANGE = 3


def write(folder: str | os.PathLike[str], seed: int = 0, *, num_prompts: int = NUM_PROMPTS, largest: int = 10) -> None:
    """Writes ``prompts.json``, a JSON list with one row {prompt, answer} on a line; the answer is an integer.

    Half of the problems add 1, 2 or 3 to a number, half take it away; every number and every answer is from 1 to
    ``largest``. No two rows hold the same combination of wording, name, thing and numbers, so that rows held out for
    validation ask what no row of the training does.

    Raises:
      UserError: for a ``largest`` below 3, or more problems than there are.
    """
    if largest < 3:
        raise UserError(f"largest: expected at least 3, got {largest}")
    lines = ",\n".join(json.dumps(row) for row in problems(num_prompts, seed, largest))
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "prompts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def problems(n: int, seed: int, largest: int) -> list[dict[str, Any]]:
    """``n`` distinct rows {prompt, answer}; arguments and errors as `write`."""
    changes = range(1, LARGEST_CHANGE + 1)
    # Grouped by answer, so that no answer is a much better guess than another. The first number is at least 2: a noun
    # in the plural follows it.
    sums = [[(t - b, b, t) for b in changes if t - b >= 2] for t in range(3, largest + 1)]
    differences = [[(left + b, b, left) for b in changes if left + b <= largest] for left in range(1, largest)]
    wordings = len(ADDITIONS) * len(NAMES) * len(THINGS)
    available = 2 * wordings * min(sum(map(len, facts)) for facts in (sums, differences))
    if n > available:
        raise UserError(f"there are {available} problems of numbers up to {largest}, {n} asked for")
    generator = random.Random(f"{seed}/arithmetic")
    rows: dict[str, int] = {}
    for i in range(n):
        templates, facts = ((ADDITIONS, sums), (SUBTRACTIONS, differences))[i % 2]
        while len(rows) == i:  # until it is a new one
            a, b, answer = _pick(_pick(facts, generator), generator)
            name, things = _pick(NAMES, generator), _pick(THINGS, generator)
            rows[_pick(templates, generator).format(name=name, things=things, a=a, b=b)] = answer
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows.items()]


def _pick(items: Sequence[T], generator: random.Random) -> T:
    return items[int(generator.random() * len(items))]
