"""Rewards that a rule verifies: a regular expression, or equality with the answer in the prompt's
data row.
"""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_jax.errors import TrainingFault

PROGRAM = Path(__file__).with_name("mathematics.py")
SECONDS = 60.0  # that a comparison may take; its work is bounded, so it takes one or less


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

    The package math-verify reads both, as numbers, expressions or LaTeX, and compares their values,
    within the bounds of `graders.mathematics`: a verdict depends on no clock. If a text has the
    mark ``####`` of GSM8K (Cobbe et al. 2021), only the part after the last mark is parsed. If the
    row's answer cannot be parsed, the score is None, which makes the response a missing row.

    Raises:
        TrainingFault: a comparison took a minute, or its process was ended.
    """
    pairs = zip(answer, responses, strict=True)
    return [_verdict(str(expected), response) for expected, response in pairs]


def _verdict(expected: str, response: str) -> float | None:
    worker = _worker()
    assert worker.stdin is not None
    assert worker.stdout is not None
    alarm = threading.Timer(SECONDS, worker.kill)
    alarm.start()
    try:
        worker.stdin.write(json.dumps([expected, response]) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        alarm.cancel()
    if not line:
        _worker.cache_clear()
        raise TrainingFault(
            f"math: the process that compares answers ended, or was ended after {SECONDS:g} s, at "
            f"the answer {expected!r:.200} and a response that ends in {response[-200:]!r}"
        )
    verdict: float | None = json.loads(line)
    return verdict


@functools.cache
def _worker() -> subprocess.Popen[str]:
    """The program's process. It ends when its input ends, and therefore together with this process.
    It finds the packages of this process, but gets no other variable of its environment.
    """
    packages = os.pathsep.join(filter(None, sys.path))
    worker = subprocess.Popen(
        [sys.executable, "-P", str(PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # The order of sets decides how many calls a comparison needs.
        env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONPATH": packages},
        start_new_session=True,  # Ctrl-C is for the run
    )
    atexit.register(worker.kill)
    return worker
