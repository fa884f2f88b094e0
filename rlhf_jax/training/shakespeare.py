"""jRLHF's Shakespeare job: a policy learns to say nothing but one character, paid by a counter or by a learned one.

Four stages: a character GPT-2 is pretrained on the text; a reward model learns, by regression, to count the character
in chunks of it; vanilla policy gradient then trains the pretrained policy on the exact count, and once more on the
reward model's scores, with the exact count beside them.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.table

from rlhf_jax.algorithms import vpg
from rlhf_jax.config import Network, RunConfig
from rlhf_jax.data import shakespeare
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.report import records
from rlhf_jax.runs import folder as runs
from rlhf_jax.training import pipeline, reward_model, rl, sft
from rlhf_jax.training.stage import RunResult

STAGES = ("pretrain", "reward_model", "vpg_exact", "vpg_learned")
SCORE, EXACT = "validation/score", "validation/reward/count:{}"


@dataclasses.dataclass(frozen=True)
class Shakespeare:
    """The text, what is counted in it, and where the policy starts."""

    url: str = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
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
            raise ValueError(
                f"overlaps must hold one number for each of the {len(self.chunk_sizes)} chunk_sizes, got "
                f"{len(self.overlaps)}"
            )
        for size, overlap in zip(self.chunk_sizes, self.overlaps, strict=True):
            if size < 2:
                raise ValueError(f"chunk_sizes must be at least 2, got {size}")
            if not 0 <= overlap < size:
                raise ValueError(f"overlaps must be at least 0 and below their chunk size {size}, got {overlap}")
        if self.max_chunks is not None and self.max_chunks < 1:
            raise ValueError(f"max_chunks must be at least 1, got {self.max_chunks}")


@dataclasses.dataclass(frozen=True)
class ShakespeareConfig(RunConfig):
    """The stages' settings: ``sft`` of the pretraining, ``reward_model``, ``rl`` of both policy-gradient runs."""

    shakespeare: Shakespeare = Shakespeare()

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.shakespeare.starters)
        if self.rl.batch_size % count:
            raise ValueError(f"rl.batch_size must be a multiple of the {count} starters, got {self.rl.batch_size}")


class ShakespeareResult(NamedTuple):
    """The folder with the stages' runs, and the summary that was written into it."""

    folder: Path
    summary: dict[str, Any]


def run(config: ShakespeareConfig) -> ShakespeareResult:
    """Writes ``data/``, a run for each of ``STAGES`` and ``summary.json``; prints a table.

    The text is the file of ``config.data``, or fetched. With ``resume``, finished stages are passed over and the one
    that was stopped goes on.

    Raises:
        UserError: the folder is used, there is no text, or a setting does not fit.
    """
    _check(config)
    folder = Path(config.output_dir or "runs/shakespeare")
    if not (config.overwrite and (folder / STAGES[0]).is_dir()):
        pipeline.check_folder(folder, config)
    data = folder / "data"
    settings = config.shakespeare
    if config.data:
        path = Path(config.data[0])
    else:
        path = data / "input.txt"
        shakespeare.fetch(settings.url, settings.sha256, path)
    text = shakespeare.read(path)
    sha256 = shakespeare.digest(path)
    print(f"{path}: {len(text)} characters, sha256 {sha256}", flush=True)
    longest = max(config.network.max_length, *settings.chunk_sizes)
    if len(text) < longest:
        raise UserError(f"{path}: the text is shorter than a row of {longest} characters; give a longer one")
    pieces, counts = _pieces(text, settings)

    seconds: dict[str, float] = {}
    before = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal before
        now = time.perf_counter()
        seconds[stage], before = now - before, now

    shakespeare.write_demonstrations(data / "pretrain.jsonl", text, config.network.max_length)
    pretrained = sft.run(
        dataclasses.replace(
            _stage(config, folder / STAGES[0], data / "pretrain.jsonl"),
            text=dataclasses.replace(config.text, too_long="truncate"),
        )
    )
    lap(STAGES[0])
    tokenizer = load_tokenizer(pretrained.model_folder)
    shakespeare.write_counts(data / "counts.jsonl", pieces, settings.character, tokenizer)
    counter = reward_model.run(
        dataclasses.replace(
            _stage(config, folder / STAGES[1], data / "counts.jsonl"),
            network=settings.network,
            tokenizer=dataclasses.replace(config.tokenizer, name=str(pretrained.model_folder)),
        )
    )
    lap(STAGES[1])
    starters = data / "starters.json"
    runs.write_atomically(starters, json.dumps(settings.starters, ensure_ascii=False, indent=1) + "\n")
    exact = f"count:{settings.character}"
    results = [pretrained, counter]
    for stage, reward in zip(STAGES[2:], ((exact,), (str(counter.model_folder), f"{exact}*0")), strict=True):
        policy = dataclasses.replace(
            _stage(config, folder / stage, starters),
            model=str(pretrained.model_folder),
            reward=reward,
            rl=dataclasses.replace(
                config.rl, validation_data=(str(starters),), validation_prompts=len(settings.starters)
            ),
        )
        results.append(rl.run(policy, vpg))
        lap(stage)
    summary = {
        "seed": config.seed,
        "text": {"characters": len(text), "sha256": sha256, "vocabulary": tokenizer.vocab_size},
        **_summary(config, results, pieces, counts),
    }
    runs.write_atomically(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _print(summary, seconds)
    return ShakespeareResult(folder, summary)


def _check(config: ShakespeareConfig) -> None:
    if len(config.data) > 1:
        raise UserError(f"--data {' '.join(config.data)}: give one text file")
    if config.model is not None:
        raise UserError(f"--model {config.model}: this job pretrains its own model; leave --model out")
    if config.reward:
        raise UserError(
            f"--reward {' '.join(config.reward)}: this job's rewards are the count and the model that learns it; leave "
            "--reward out"
        )
    if config.reward_model.ensemble_size > 1:
        raise UserError("reward_model.ensemble_size: this job trains one reward model")
    if config.tokenizer.kind != "characters" or config.tokenizer.name is not None:
        raise UserError("tokenizer: this job counts characters; set tokenizer.kind characters and no tokenizer.name")
    longest = max(config.shakespeare.chunk_sizes) + 1
    if config.shakespeare.network.max_length < longest:
        raise UserError(
            f"shakespeare.network.max_length {config.shakespeare.network.max_length}: the longest chunk and its EOS "
            f"are {longest} tokens"
        )


def _pieces(text: str, settings: Shakespeare) -> tuple[list[str], dict[str, int]]:
    """The chunks of all sizes, one size after the other, and how many there are of each."""
    pieces: list[str] = []
    counts = {}
    for size, overlap in zip(settings.chunk_sizes, settings.overlaps, strict=True):
        every = shakespeare.chunks(text, size, overlap)
        kept = shakespeare.spaced(every, settings.max_chunks)
        print(f"chunks of {size} characters: {len(kept)} of {len(every)}", flush=True)
        pieces += kept
        counts[str(size)] = len(kept)
    return pieces, counts


def _stage(config: ShakespeareConfig, folder: Path, data: Path) -> ShakespeareConfig:
    return dataclasses.replace(
        config,
        data=(str(data),),
        output_dir=str(folder),
        resume=config.resume and folder.exists(),
        overwrite=config.overwrite and folder.exists(),
    )


def _summary(
    config: ShakespeareConfig, results: Sequence[RunResult], pieces: Sequence[str], counts: dict[str, int]
) -> dict[str, Any]:
    pretrained, counter, *policies = (records.read_rows(result.folder / "metrics.jsonl") for result in results)
    settings = config.shakespeare
    targets = [min(piece.count(settings.character), shakespeare.CAP) for piece in pieces]
    ceiling = config.rl.max_new_tokens + float(np.mean([text.count(settings.character) for text in settings.starters]))
    exact, learned = policies
    part = EXACT.format(settings.character)
    return {
        "pretrain": _course(pretrained, "validation/loss"),
        "reward_model": {
            "chunks": counts,
            "target_variance": round(float(np.var(targets)), 6),
            "mean_squared_error": _course(counter, "validation/loss"),
        },
        "ceiling": round(ceiling, 6),
        "vpg_exact": _course(exact, SCORE),
        "vpg_learned": {"learned": _course(learned, SCORE), "exact": _course(learned, part)},
    }


def _course(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """The first, last, lowest and highest value of a metric."""
    _, values = records.series(rows, name)
    found = {"first": values[0], "last": values[-1], "lowest": min(values), "highest": max(values)}
    return {key: round(float(value), 6) for key, value in found.items()}


def _print(summary: dict[str, Any], seconds: dict[str, float]) -> None:
    error = summary["reward_model"]["mean_squared_error"]
    learned = summary["vpg_learned"]
    rows = [
        ("pretrain", "held-out loss (nats per character)", summary["pretrain"], "lowest", seconds["pretrain"]),
        ("reward_model", "held-out squared error of the count", error, "lowest", seconds["reward_model"]),
        ("vpg_exact", "exact count", summary["vpg_exact"], "highest", seconds["vpg_exact"]),
        ("vpg_learned", "learned count", learned["learned"], "highest", seconds["vpg_learned"]),
        ("", "exact count", learned["exact"], "highest", None),
    ]
    table = rich.table.Table(title=f"Highest possible exact count: {summary['ceiling']:.3f}")
    for column in ("stage", "at validation", "first", "last", "best", "seconds"):
        table.add_column(column, justify="left" if column in ("stage", "at validation") else "right")
    for stage, what, course, best, spent in rows:
        numbers = [f"{course[key]:.3f}" for key in ("first", "last", best)]
        table.add_row(stage, what, *numbers, "" if spent is None else f"{spent:.0f}")
    rich.console.Console().print(table)
