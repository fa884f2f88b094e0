"""Rewards to copy into a file of one's own: --reward FILE.py:FUNCTION."""

import re
import subprocess
import sys
import unicodedata

from rlhf_jax.rewards import Unscored

FORM = re.compile(r"\s*<think>.*?</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
CODE = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)


def form(responses):
    """Format: 1 for a response of reasoning and answer in their tags, and nothing else."""
    return [float(FORM.fullmatch(response) is not None) for response in responses]


def tags(responses):
    """Tags: a quarter for each tag that occurs exactly once: a policy finds them one by one."""
    names = ("<think>", "</think>", "<answer>", "</answer>")
    return [sum(response.count(name) == 1 for name in names) / 4 for response in responses]


def soft_length(completion_ids, shortest=20, longest=200):
    """Length: 1 between two numbers of tokens, falling to 0 at nothing and at twice as many."""
    lengths = [len(ids) for ids in completion_ids]
    return [max(0.0, min(1.0, n / shortest, 2 - n / longest)) for n in lengths]


def code(responses, tests):
    """Code with tests: the share of the row's tests, such as "assert f(2) == 4", that pass."""
    return [run_tests(response, row) for response, row in zip(responses, tests, strict=True)]


def run_tests(response, tests):
    if not tests:
        return Unscored("the row has no tests")
    blocks = CODE.findall(response)
    if not blocks:
        return 0.0
    return sum(passes(f"{blocks[-1]}\n{test}") for test in tests) / len(tests)


def passes(program):
    """In a process of its own, with a limit of time. This is no sandbox: it runs what the policy
    writes. Use a container without network and files for anything else than a test."""
    command = [sys.executable, "-I", "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, timeout=5, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def language(responses, script="LATIN"):
    """Language: the share of the letters of a script, such as LATIN, CYRILLIC or CJK."""
    return [share_of(script, response) for response in responses]


def share_of(script, text):
    letters = [unicodedata.name(character, "") for character in text if character.isalpha()]
    if not letters:
        return Unscored("the response has no letters")
    return sum(name.startswith(script) for name in letters) / len(letters)


def only_maths(responses, answer, task):
    """Several tasks in one file: None for the rows of other tasks."""
    rows = zip(responses, answer, task, strict=True)
    return [float(text.strip() == gold) if kind == "maths" else None for text, gold, kind in rows]


def only_code(responses, tests, task):
    """Another task: --reward 'copied.py:only_maths else 0' 'copied.py:only_code else 0'."""
    rows = zip(responses, tests, task, strict=True)
    return [run_tests(text, row) if kind == "code" else None for text, row, kind in rows]


def no_repeated_lines(responses):
    """Rewards at tokens: -1 where a line begins that came before."""
    return [repeated(response) for response in responses]


def repeated(response):
    seen = set()
    rewards = []
    position = 0
    for line in response.split("\n"):
        if line.strip() and line in seen:
            rewards.append((position, -1.0))
        seen.add(line)
        position += len(line) + 1
    return rewards


def careful(prompts, responses):
    """Components: the sum, and what it is made of, reported as reward/careful/form and .../tags."""
    parts = {"form": form(responses), "tags": tags(responses)}
    return [sum(values) for values in zip(*parts.values(), strict=True)], parts


async def remote(responses):
    """A reward that waits for something: all calls at once."""
    import asyncio

    async def one(response):
        await asyncio.sleep(0)  # in its place: a call of your service
        return float(len(response))

    return await asyncio.gather(*map(one, responses))
