"""Sums of two numbers, and a calculator that a policy can call: an environment, and rewards for it.

    python experiments/calculator.py runs/sums        # writes prompts.json into that folder
    rlhf-jax grpo --config configs/calculator.yaml --data runs/sums

A prompt is ``[+] 47+36=``. The calculator replies ``83`` to ``[47+36]``, and the policy may then
answer with that.
"""

import itertools
import json
import random
import re
from pathlib import Path

import tyro

from rlhf_jax import cli
from rlhf_jax.errors import UserError

CALL = re.compile(r"\[(\d+)\+(\d+)\]", re.ASCII)


def calculator(conversation: list[dict[str, str]], row: dict[str, int]) -> tuple[str | None, float]:
    """Answers a call with its sum, and ends the row after anything else.

    The reward of a response is the share of its characters that are right: those of the call that
    the prompt asks for, or after a call those of the answer.
    """
    response = conversation[-1]["content"]
    is_first = len(conversation) == 2
    a = row["a"]
    b = row["b"]
    wanted = f"[{a}+{b}]" if is_first else str(a + b)
    pairs = zip(response, wanted, strict=False)
    num_right = sum(given == right for given, right in pairs)
    reward = num_right / max(len(response), len(wanted))
    call = CALL.fullmatch(response)
    if call is None or not is_first:
        return None, reward
    first, second = map(int, call.groups())
    return str(first + second), reward


def correct(prompts: list[str], responses: list[str], a: list[int], b: list[int]) -> list[float]:
    """1.0 for a response that is the sum, with at most one call before it, else 0.0."""
    scores = []
    for response, x, y in zip(responses, a, b, strict=True):
        answer = CALL.sub("", response, count=1)
        scores.append(float(answer == str(x + y)))
    return scores


def write(folder: tyro.conf.Positional[str], seed: int = 0, num_prompts: int = 4000) -> None:
    """Write prompts.json, rows {prompt, a, b} of distinct pairs of numbers from 10 to 99.

    Args:
        folder: where to write; made if missing.
        seed: of the choice.
        num_prompts: how many sums.
    """
    numbers = range(10, 100)
    pairs = list(itertools.product(numbers, repeat=2))
    if num_prompts > len(pairs):
        raise UserError(f"there are {len(pairs)} sums, {num_prompts} asked for")
    generator = random.Random(seed)
    pairs.sort(key=lambda pair: generator.random())
    chosen = pairs[:num_prompts]
    rows = [{"prompt": f"[+] {a}+{b}=", "a": a, "b": b} for a, b in chosen]
    file = Path(folder) / "prompts.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=0), encoding="utf-8")
    print(f"wrote {file}: {num_prompts} sums")


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(write))
