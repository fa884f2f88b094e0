"""``rlhf-jax generate``: prompts from files in, a file of answers out.

    {"prompt": "Is ice warm?", "response": "No.", "log_prob": -1.2031, "score": 0.75}

The prompt is a text or a list of messages, as the data has it; the samples of a prompt follow each
other. So the rows are demonstrations that ``sft`` reads. OUT.settings.json has the settings of the
file. Until all rows are there they are in OUT.part. If the command is interrupted, the same command
completes them, to the same bytes. One process writes at a time.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError, file_errors, logger, read_file
from rlhf_jax.evaluation import bench
from rlhf_jax.evaluation.settings import check_at_least
from rlhf_jax.generation.generator import Asked, Generator
from rlhf_jax.graders import spec
from rlhf_jax.inference import asking
from rlhf_jax.runs import manifest, reading
from rlhf_jax.runs.writing import one_writer, open_to_append, write_atomically

_BATCHES = 4  # that are sorted by length and written together
_DIGITS = 3  # of log-probabilities and scores: further ones depend on the batch size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(asking.FromFiles):
    """The prompts, and the keys of the rows that are written."""

    out: str
    """The file of JSON lines. If it was begun with these settings, it is completed."""
    n: int = 1
    """Responses to each prompt."""
    log_probs: bool = False
    """Write each response's log-probability too, in nats, EOS included."""
    reward: tuple[str, ...] = ()
    """Write a score too: SPECs as --reward of a training run has them, such as runs/rm."""

    def __post_init__(self) -> None:
        check_at_least(self, n=1, batch_size=1)


def run(folder: str, config: Config) -> int:
    """Completes the file of answers of the policy in a run's or model's folder; returns how many it
    holds.

    Raises:
        UserError: the file was made in another way, another process writes it, or whatever is wrong
            with a folder, a file or a row.
    """
    out = Path(config.out)
    part_file = out.with_name(f"{out.name}.part")
    with one_writer(out):
        asking.start(config)
        policy = asking.open_policy(
            folder, config, reward=config.reward, batch_size=config.batch_size
        )
        data = asking.read(policy, config, config.seed)
        logger.info(f"prompts: {data.describe()}")
        columns = {name for row in data.rows for name in row.columns}
        reward = None
        if config.reward:
            reward = asking.reward_of(config.reward, policy, columns)
        asked = policy.ask(data.rows, config.n)
        total = asked.streams.size
        settings = asking.described(folder, policy, config, data)
        settings |= {"n": config.n, "log_probs": config.log_probs}
        settings["reward"] = {
            entry: [manifest.fingerprint(path) for path in spec.sources(entry).values()]
            for entry in config.reward
        }
        num_done = _take(out, part_file, settings)
        if num_done:
            logger.info(f"{out}: {num_done} of {total} responses are there")
        # Whole parts are sampled again, so that a row has the same neighbours as before.
        size = max(1, _BATCHES * config.batch_size // config.n)
        first = num_done // config.n // size * size
        with file_errors(out, "written"), open_to_append(part_file) as file:
            for start in range(first, len(data.rows), size):
                part = asked.part(start, start + size)
                lines = list(_lines(policy, reward, part, config, columns))
                num_before = start * config.n
                file.writelines(lines[max(0, num_done - num_before) :])
                file.flush()
                logger.info(f"{num_before + len(lines)} of {total} responses")
            os.fsync(file.fileno())
            part_file.replace(out)
    return int(total)


def _lines(
    policy: Generator,
    reward: spec.Reward | None,
    asked: Asked,
    config: Config,
    columns: Iterable[str],
) -> Iterator[str]:
    """Samples responses; yields the line of each. ``columns``: those that a reward reads."""
    texts, rollout = policy.sample(asked, config.seed)
    samples = [row for row in asked.rows for _ in range(config.n)]
    written = {"log_prob": rollout.log_probs.sum(axis=1)} if config.log_probs else {}
    if reward is not None:
        of_samples: dict[str, list[Any]] = {
            name: [row.columns.get(name) for row in samples] for name in columns
        }
        of_samples["messages"] = [row.conversation for row in samples]
        written["score"] = bench.score(reward, rollout, of_samples, config.batch_size)
    for i, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        prompt = asking.as_given(sample, policy.tokenizer)
        row: dict[str, Any] = {"prompt": prompt, "response": text}
        for name, values in written.items():
            number = round(float(values[i]), _DIGITS)
            row[name] = None if math.isnan(number) else number
        yield json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _take(out: Path, part_file: Path, settings: dict[str, Any]) -> int:
    """The number of complete lines, now all in ``part_file``; an incomplete last one is removed."""
    beside = out.with_name(f"{out.name}.settings.json")
    if not (out.exists() or part_file.exists()):
        written = json.dumps(settings, indent=1) + "\n"
        reading.parse_json(written, dict[str, Any], str(beside))  # as the same command reads it
        with file_errors(beside, "written"):
            write_atomically(beside, written)
        return 0
    if not beside.exists():
        missing = f"no {beside.name} says how it was made"
        raise UserError(f"{out}: exists already, and {missing}; choose another --out")
    asking.check_unchanged(out, reading.read_json(beside, dict[str, Any]), settings)
    with file_errors(out, "written"):
        if out.exists():  # complete, unless somebody has cut it
            out.replace(part_file)
        data = read_file(part_file, most=None)
        length = data.rfind(b"\n") + 1
        os.truncate(part_file, length)
    return data.count(b"\n")
