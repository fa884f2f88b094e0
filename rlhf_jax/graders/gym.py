"""A program that makes the rows of reasoning-gym and scores answers to them.

    echo '["leg_counting/0/7", "42"]' | python gym.py    # prints the score; without "42" the row

The name of a row is TASK/SEED/NUMBER. Some verifiers evaluate answers: those of `EVALUATED` tasks.
"""

import functools
import io
import json
import re
import resource
import sys

from reasoning_gym import factory

UNUSABLE = {"composite", "game_of_life_halting"}  # of other tasks; calls every answer right
EVALUATED = r"binary_m|countdown|n_q|puzzle24|spiral|string_i|polynomial_m|.*_integration"
HARMLESS = r"([\s0-9+*/^().,\[\]-]|\b([A-Za-z_]|[A-E]+|a?(sin|cos|tan)h?|exp|log|sqrt)\b)*"
create = functools.lru_cache(maxsize=16)(factory.create_dataset)
made = functools.lru_cache(maxsize=1024)(lambda rows, place: rows[place])


def reply(name: str, answer: str | None = None) -> object:
    """The row, or the score of an answer to it, or as a text why the verifier gave none. Of "" the
    names of all tasks.
    """
    if not name:
        return sorted(factory.DATASETS.keys() - UNUSABLE)
    task, seed, number = name.split("/")
    block, place = divmod(int(number), 500)  # some tasks make all rows of a data set at once
    # Far from the next seed: of most tasks row 1 of a seed is row 0 of the next.
    rows = create(task, seed=int(seed) * 1_000_000 + block * 500, size=500)
    entry = made(rows, place)
    if answer is None:
        return {"prompt": entry["question"], "answer": entry["answer"], "gym": name}
    if re.match(EVALUATED, task) and not re.fullmatch(HARMLESS, answer):
        return 0.0
    try:
        return float(rows.score_answer(answer, entry))
    except Exception as error:  # of some verifiers, for what they cannot read
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # [0] * 10**12 asks for more
    replies, sys.stdout = sys.stdout, io.StringIO()  # some tasks print
    for line in sys.stdin:
        print(json.dumps(reply(*json.loads(line))), file=replies, flush=True)
