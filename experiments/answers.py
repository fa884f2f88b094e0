"""Reward functions of one's own: does a response end with the right number, and is it a number at all?

    python experiments/grpo.py --config configs/arithmetic.yaml

The config names them in ``reward``. The rows of the data are {prompt, answer}; a column beside the prompt reaches the
function as the argument of its name. GSM8K's rows are {question, answer}: rename the column ``question`` to ``prompt``;
its answers, which end with "#### 42", are understood.
"""

import re
from decimal import Decimal

# 1,000 or 42, with decimals or without; the minus of "5-3" is no sign.
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, None where it has none."""
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def correct(prompts: list[str], responses: list[str], answer: list[str | int]) -> list[float | None]:
    """1.0 or 0.0 for each response; None, which leaves the row out, where the data's answer has no number."""
    right = [last_number(str(text)) for text in answer]
    said = [last_number(response) for response in responses]
    return [None if r is None else float(s == r) for s, r in zip(said, right, strict=True)]


def is_number(prompts: list[str], responses: list[str]) -> list[float]:
    """1.0 where the response is a whole number and nothing else, right or wrong: what there is to learn first."""
    return [float(bool(re.fullmatch(r"\s*[0-9]+\s*", response))) for response in responses]
