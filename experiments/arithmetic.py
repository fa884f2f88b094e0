"""Word problems of one step, and reward functions that check their answers, for policies that learn
from rewards alone.

    python experiments/arithmetic.py runs/problems        # writes prompts.json into that folder
    rlhf-jax grpo --config configs/arithmetic.yaml --data runs/problems

The config names ``correct`` and ``is_number``, below, in ``reward``. The rows of the data are
{prompt, answer}; a column beside the prompt reaches the function as the argument of its name.
GSM8K's rows (Cobbe et al. 2021) are {question, answer}: rename the column ``question`` to
``prompt``; its answers, which end with "#### 42", are understood.
"""

import json
import random
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import tyro

from rlhf_jax import cli
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
LARGEST_CHANGE = 3
# 1,000 or 42, with decimals or without; the minus of "5-3" is no sign.
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None if it has none."""
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def correct(
    prompts: list[str], responses: list[str], answer: list[str | int]
) -> list[float | None]:
    """1.0 or 0.0 for each response; None, which leaves the row out, if the data's answer has no
    number.
    """
    scores = []
    for response, text in zip(responses, answer, strict=True):
        right = last_number(str(text))
        score = None if right is None else float(last_number(response) == right)
        scores.append(score)
    return scores


def is_number(prompts: list[str], responses: list[str]) -> list[float]:
    """1.0 if the response is a whole number and nothing else, right or wrong: what there is to
    learn first.
    """
    return [float(bool(re.fullmatch(r"\s*[0-9]+\s*", response))) for response in responses]


def write(
    folder: tyro.conf.Positional[str], seed: int = 0, num_prompts: int = 4000, largest: int = 10
) -> None:
    """Write prompts.json, a JSON list with one row {prompt, answer} on a line; the answer is an
    integer.

    Half of the problems add 1, 2 or 3 to a number, half take it away; every number and every answer
    is from 1 to ``largest``. No two rows hold the same combination of wording, name, thing and
    numbers, so that rows held out for validation differ from all rows of the training. The same
    arguments give the same file on every platform.

    Args:
        folder: where to write; made if missing.
        seed: of Python's ``random.random()``, whose sequence stays the same from version to
            version.
        num_prompts: how many problems.
        largest: the largest number in a problem.
    """
    if largest < 3:
        raise UserError(f"largest: expected at least 3, got {largest}")
    lines = ",\n".join(json.dumps(row) for row in problems(num_prompts, seed, largest))
    file = Path(folder) / "prompts.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"wrote {file}: {num_prompts} problems")


def problems(n: int, seed: int, largest: int) -> list[dict[str, Any]]:
    """``n`` distinct rows {prompt, answer}; arguments as `write`."""
    changes = range(1, LARGEST_CHANGE + 1)
    # Grouped by answer, so that no answer is a much better guess than another. The first number is
    # at least 2: a noun in the plural follows it.
    sums = []
    for total in range(3, largest + 1):
        sums.append([(total - b, b, total) for b in changes if total - b >= 2])
    differences = []
    for left in range(1, largest):
        differences.append([(left + b, b, left) for b in changes if left + b <= largest])
    wordings = len(ADDITIONS) * len(NAMES) * len(THINGS)
    num_sums = sum(map(len, sums))
    num_differences = sum(map(len, differences))
    available = 2 * wordings * min(num_sums, num_differences)
    if n > available:
        raise UserError(f"there are {available} problems of numbers up to {largest}, {n} asked for")
    generator = random.Random(f"{seed}/arithmetic")
    rows: dict[str, int] = {}
    for i in range(n):
        facts = differences if i % 2 else sums
        templates = SUBTRACTIONS if i % 2 else ADDITIONS
        while len(rows) == i:  # until it is a new one
            of_answer = pick(facts, generator)
            a, b, answer = pick(of_answer, generator)
            name = pick(NAMES, generator)
            things = pick(THINGS, generator)
            template = pick(templates, generator)
            rows[template.format(name=name, things=things, a=a, b=b)] = answer
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows.items()]


def pick(items: Sequence[T], generator: random.Random) -> T:
    """One of the items."""
    return items[int(generator.random() * len(items))]


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(write))
