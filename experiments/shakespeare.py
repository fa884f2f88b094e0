"""A policy learns to say nothing but 'h', as in jRLHF's Shakespeare job, in under ten minutes on
two CPU cores.

    python experiments/shakespeare.py                     # fetches the text, 1.1 MB
    python experiments/shakespeare.py --data input.txt    # any text of yours

Four stages: a character GPT-2 is pretrained on the text; a reward model learns, by regression, to
count the character in chunks of it; vanilla policy gradient then trains the pretrained policy on
the exact count, and once more on the reward model's scores, with the exact count beside them.
Prints a table and writes runs/shakespeare/.
"""

import dataclasses
import hashlib
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import rich.console
import rich.table

from rlhf_jax import cli, ops
from rlhf_jax.algorithms import vpg
from rlhf_jax.config import Network, RunConfig, parse
from rlhf_jax.data import files
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.report import records
from rlhf_jax.runs.manifest import fingerprint
from rlhf_jax.runs.writing import write_atomically
from rlhf_jax.training import pipeline, reward_model, rl, sft

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "shakespeare.yaml"
STAGES = ("pretrain", "reward_model", "vpg_exact", "vpg_learned")
SCORE = "validation/score"
EXACT = "validation/reward/count:{}"
CAP = 100  # the highest target, as in rewards.token_count
ENDED = 8  # one piece in so many ends in EOS; few, since a token more may need the next wider batch
TIMEOUT = 30  # seconds without an answer


@dataclasses.dataclass(frozen=True)
class Shakespeare:
    """The text, what is counted in it, and where the policy starts."""

    url: str = (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    )
    """Where the text is fetched from without --data."""
    sha256: str = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    """Of the text at url; another one is refused."""
    character: str = "h"
    """What the reward counts, in prompt and response."""
    starters: tuple[str, ...] = ("O ",)
    """Prompts of training and of validation."""
    chunk_sizes: tuple[int, ...] = (8, 16, 32, 64, 256)
    """Characters of the chunks that the reward model learns from."""
    overlaps: tuple[int, ...] = (0, 0, 0, 8, 64)
    """Characters that neighbouring chunks of each size share."""
    max_chunks: int | None = None
    """At most this many chunks of each size, at even distances over the text; null: all."""
    network: Network = dataclasses.field(default_factory=Network)
    """The reward model's network; max_length: the longest chunk and its EOS."""

    def __post_init__(self) -> None:
        if len(self.character) != 1:
            raise ValueError(f"character must be a single one, got {self.character!r}")
        if not self.starters:
            raise ValueError("starters must hold at least one text")
        if not self.chunk_sizes or len(self.chunk_sizes) != len(self.overlaps):
            counts = f"each of the {len(self.chunk_sizes)} chunk_sizes, got {len(self.overlaps)}"
            raise ValueError(f"overlaps must hold one number for {counts}")
        for size, overlap in zip(self.chunk_sizes, self.overlaps, strict=True):
            ops.check_number("chunk_sizes", size, at_least=2)
            ops.check_number("overlaps", overlap, at_least=0, below=size)
        ops.check_number("max_chunks", self.max_chunks, at_least=1)


@dataclasses.dataclass(frozen=True)
class ShakespeareConfig(RunConfig):
    """The stages' settings: ``sft`` of the pretraining, ``reward_model``, ``rl`` of both
    policy-gradient runs.
    """

    shakespeare: Shakespeare = Shakespeare()

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.shakespeare.starters)
        if self.rl.batch_size % count:
            raise ValueError(
                f"rl.batch_size must be a multiple of the {count} starters, got "
                f"{self.rl.batch_size}"
            )


# The data


def fetch(url: str, sha256: str, path: Path) -> None:
    """Downloads ``url`` to ``path``, unless a file with this sha256 is there already.

    Raises:
        UserError: nothing came, or a file with another sha256.
    """
    if path.is_file() and fingerprint(path) == sha256:
        return
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
    except (OSError, ValueError) as error:  # URLError is an OSError; ValueError: not a URL
        # Of its subclass HTTPError, the text says more than the reason: the code.
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise UserError(
            f"{url}: could not be fetched ({reason}); download the file and give --data PATH"
        ) from error
    if (fetched := hashlib.sha256(content).hexdigest()) != sha256:
        what = f"sha256 {fetched} was fetched, {sha256} is expected"
        raise UserError(f"{url}: {what}; download the text by hand and give --data PATH")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def read(path: Path) -> str:
    """The text of a file, its lines ended by ``\\n`` alone.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    return files.read_text(path).replace("\r\n", "\n").replace("\r", "\n")


def chunks(text: str, size: int, overlap: int = 0) -> list[str]:
    """Pieces of ``size`` characters, each beginning ``size - overlap`` after the one before.

    The last one ends where the text ends, so that it may overlap the one before by more. The text
    has at least ``size`` characters, and ``overlap`` is below ``size``.
    """
    last = len(text) - size
    starts = [*range(0, last, size - overlap), last]
    return [text[start : start + size] for start in starts]


def spaced(items: Sequence[str], limit: int | None) -> list[str]:
    """``limit`` items at even distances, or all of them if there are no more."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def write_demonstrations(path: Path, text: str, length: int) -> None:
    """Cuts the text into demonstrations that fill a model of ``length`` positions.

    A row's prompt is its first character, and no room is left for the EOS after its response: with
    ``text.too_long: truncate`` it is cut, since the end of a row is no end of a text.
    """
    write_lines(path, ({"prompt": row[0], "response": row[1:]} for row in chunks(text, length)))


def write_counts(path: Path, pieces: Sequence[str], character: str, tokenizer: Tokenizer) -> None:
    """Writes rows ``{prompt: ids, responses: [ids], targets: [min(count, CAP)]}``, together the ids
    of each piece.

    One piece in ``ENDED`` ends in EOS.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for i, (piece, ids) in enumerate(zip(pieces, tokenizer.encode_batch(pieces), strict=True)):
            ended = [*ids, tokenizer.eos_id] if i % ENDED == ENDED - 1 else ids
            target = min(piece.count(character), CAP)
            yield {"prompt": ended[:1], "responses": [ended[1:]], "targets": [target]}

    write_lines(path, rows())


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(
            json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows
        )


# The job


def run(config: ShakespeareConfig) -> dict[str, Any]:
    """Writes ``data/``, a run for each of ``STAGES`` and ``summary.json``; prints a table. Returns
    the summary.

    The text is the file of ``config.data``, or fetched. With ``resume``, finished stages are passed
    over and the one that was stopped goes on.
    """
    check(config)
    folder = Path(config.output_dir or "runs/shakespeare")
    pipeline.check_folder(folder, config, first=STAGES[0])
    data = folder / "data"
    settings = config.shakespeare
    path = Path(config.data[0]) if config.data else data / "input.txt"
    if not config.data:
        fetch(settings.url, settings.sha256, path)
    text = read(path)
    sha256 = fingerprint(path)
    print(f"{path}: {len(text)} characters, sha256 {sha256}", flush=True)
    longest = max(config.network.max_length, *settings.chunk_sizes)
    if len(text) < longest:
        raise UserError(
            f"{path}: the text is shorter than a row of {longest} characters; give a longer one"
        )
    pieces, counts = cut(text, settings)
    configs = stage_configs(config, folder)
    seconds = {}

    def train(stage: str, run_stage: Callable[..., Any], *algorithm: ModuleType) -> None:
        before = time.perf_counter()
        run_stage(configs[stage], *algorithm)
        seconds[stage] = time.perf_counter() - before

    write_demonstrations(data / "pretrain.jsonl", text, config.network.max_length)
    starters = json.dumps(settings.starters, ensure_ascii=False, indent=1)
    write_atomically(data / "starters.json", starters + "\n")
    train("pretrain", sft.run)
    tokenizer = load_tokenizer(folder / "pretrain" / "model")
    write_counts(data / "counts.jsonl", pieces, settings.character, tokenizer)
    train("reward_model", reward_model.run)
    train("vpg_exact", rl.run, vpg)
    train("vpg_learned", rl.run, vpg)
    summary = {
        "seed": config.seed,
        "text": {"characters": len(text), "sha256": sha256, "vocabulary": tokenizer.vocab_size},
        **summarize(config, folder, pieces, counts),
    }
    write_atomically(
        folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    )
    print_summary(summary, seconds)
    return summary


def stage_configs(config: ShakespeareConfig, folder: Path) -> dict[str, ShakespeareConfig]:
    """The settings of each stage, in the order in which they run."""
    settings = config.shakespeare
    data = folder / "data"
    pretrained, counter = (str(folder / stage / "model") for stage in STAGES[:2])
    starters = str(data / "starters.json")
    exact = f"count:{settings.character}"
    policies = dataclasses.replace(
        config.rl, validation_data=(starters,), validation_prompts=len(settings.starters)
    )

    def stage(name: str, file: str, model: str | None = None, **changes: Any) -> ShakespeareConfig:
        return pipeline.stage_config(
            config, folder / name, model, data=(str(data / file),), **changes
        )

    def policy(name: str, *reward: str) -> ShakespeareConfig:
        return stage(name, "starters.json", pretrained, reward=reward, rl=policies)

    truncated = dataclasses.replace(config.text, too_long="truncate")
    tokenizer = dataclasses.replace(config.tokenizer, name=pretrained)
    return {
        "pretrain": stage("pretrain", "pretrain.jsonl", text=truncated),
        "reward_model": stage(
            "reward_model", "counts.jsonl", network=settings.network, tokenizer=tokenizer
        ),
        "vpg_exact": policy("vpg_exact", exact),
        "vpg_learned": policy("vpg_learned", counter, f"{exact}*0"),
    }


def check(config: ShakespeareConfig) -> None:
    """Refuses settings that this job decides itself."""
    if len(config.data) > 1:
        raise UserError(f"--data {' '.join(config.data)}: give one text file")
    if config.model is not None:
        raise UserError(
            f"--model {config.model}: this job pretrains its own model; leave --model out"
        )
    if config.reward:
        rewards = "this job's rewards are the count and the model that learns it"
        raise UserError(f"--reward {' '.join(config.reward)}: {rewards}; leave --reward out")
    if config.reward_model.ensemble_size > 1:
        raise UserError("reward_model.ensemble_size: this job trains one reward model")
    if config.tokenizer.kind != "characters" or config.tokenizer.name is not None:
        raise UserError(
            "tokenizer: this job counts characters; set tokenizer.kind characters and no "
            "tokenizer.name"
        )
    longest = max(config.shakespeare.chunk_sizes) + 1
    room = config.shakespeare.network.max_length
    if room < longest:
        raise UserError(
            f"shakespeare.network.max_length {room}: the longest chunk and its EOS are {longest} "
            "tokens"
        )


def cut(text: str, settings: Shakespeare) -> tuple[list[str], dict[str, int]]:
    """The chunks of all sizes, one size after the other, and how many there are of each."""
    pieces: list[str] = []
    counts = {}
    for size, overlap in zip(settings.chunk_sizes, settings.overlaps, strict=True):
        every = chunks(text, size, overlap)
        kept = spaced(every, settings.max_chunks)
        print(f"chunks of {size} characters: {len(kept)} of {len(every)}", flush=True)
        pieces += kept
        counts[str(size)] = len(kept)
    return pieces, counts


def summarize(
    config: ShakespeareConfig, folder: Path, pieces: Sequence[str], counts: dict[str, int]
) -> dict[str, Any]:
    """The stages' part of ``summary.json``: the course of each metric over the validations."""
    rows = {stage: records.read_rows(folder / stage / "metrics.jsonl") for stage in STAGES}
    settings = config.shakespeare
    targets = [min(piece.count(settings.character), CAP) for piece in pieces]
    ceiling = config.rl.max_new_tokens + float(
        np.mean([text.count(settings.character) for text in settings.starters])
    )

    def course(stage: str, name: str) -> dict[str, float]:
        _, values = records.series(rows[stage], name)
        points = {
            "first": values[0],
            "last": values[-1],
            "lowest": min(values),
            "highest": max(values),
        }
        return {key: round(float(value), 6) for key, value in points.items()}

    return {
        "pretrain": course("pretrain", "validation/loss"),
        "reward_model": {
            "chunks": counts,
            "target_variance": round(float(np.var(targets)), 6),
            "mean_squared_error": course("reward_model", "validation/loss"),
        },
        "ceiling": round(ceiling, 6),
        "vpg_exact": course("vpg_exact", SCORE),
        "vpg_learned": {
            "learned": course("vpg_learned", SCORE),
            "exact": course("vpg_learned", EXACT.format(settings.character)),
        },
    }


def print_summary(summary: dict[str, Any], seconds: dict[str, float]) -> None:
    """The table in the terminal."""
    error = summary["reward_model"]["mean_squared_error"]
    learned = summary["vpg_learned"]
    rows = [
        (
            "pretrain",
            "held-out loss (nats per character)",
            summary["pretrain"],
            "lowest",
            seconds["pretrain"],
        ),
        (
            "reward_model",
            "held-out squared error of the count",
            error,
            "lowest",
            seconds["reward_model"],
        ),
        ("vpg_exact", "exact count", summary["vpg_exact"], "highest", seconds["vpg_exact"]),
        ("vpg_learned", "learned count", learned["learned"], "highest", seconds["vpg_learned"]),
        ("", "exact count", learned["exact"], "highest", None),
    ]
    table = rich.table.Table(title=f"Highest possible exact count: {summary['ceiling']:.3f}")
    for column in ("stage", "at validation", "first", "last", "best", "seconds"):
        table.add_column(
            column, justify="left" if column in ("stage", "at validation") else "right"
        )
    for stage, what, course, best, spent in rows:
        numbers = [f"{course[key]:.3f}" for key in ("first", "last", best)]
        table.add_row(stage, what, *numbers, "" if spent is None else f"{spent:.0f}")
    rich.console.Console().print(table)


def main() -> None:
    run(parse(ShakespeareConfig, ["--config", str(CONFIG), *sys.argv[1:]], description=__doc__))


if __name__ == "__main__":
    cli.run_script(main)
