"""Score against KL for every algorithm: the sentiment task of Ziegler et al. (2019) in miniature.

Prompts are the beginnings of texts that the model writes by itself; a function of the user's scores what follows. PPO
with a fixed and with an adaptive KL coefficient, RLOO and GRPO are trained on that reward, DPO on samples of the base
model that the reward has ranked, each at several strengths. All of them, and best-of-n, are measured in the same way.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.table

from rlhf_jax import generator, models, rewards, sampling
from rlhf_jax.algorithms import grpo, ppo, rloo
from rlhf_jax.config import RunConfig
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.report import figures, html
from rlhf_jax.runs import folder as runs
from rlhf_jax.training import dpo, frontier, pipeline, rl, setup
from rlhf_jax.training.reward_functions import RunReward
from rlhf_jax.training.stage import start
from rlhf_jax.types import Params

TextReward = Callable[[list[str], list[str]], Sequence[float]]  # (prompts, responses) -> scores
TITLES = {
    "ppo_fixed": "PPO, fixed KL",
    "ppo_adaptive": "PPO, adaptive KL",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "dpo": "DPO",
}


@dataclasses.dataclass(frozen=True)
class Sentiment:
    """Prompts, what is measured, and the strengths at which each algorithm is run."""

    num_prompts: int = 1024
    """Distinct beginnings to train on."""
    num_heldout: int = 256
    """Further ones to measure on."""
    shortest_prompt: int = 8
    """Tokens of the shortest beginning, the start token not counted."""
    longest_prompt: int = 16
    """Tokens of the longest one."""
    samples: int = 4
    """Responses of the base model to each prompt, which DPO learns from; as many of each policy are measured."""
    best_of: int = 64
    """The largest n of best-of-n, a power of 2."""
    kl_coefs: tuple[float, ...] = (0.05,)
    """KL coefficients in the reward, of PPO with a fixed one and of RLOO."""
    kl_targets: tuple[float, ...] = (6.0,)
    """KL targets in nats per response, of PPO with an adaptive coefficient that starts at rl.kl_coef."""
    grpo_kl_coefs: tuple[float, ...] = (0.04,)
    """Weights of the KL term in GRPO's loss."""
    dpo_betas: tuple[float, ...] = (0.1,)
    """DPO's beta."""
    shown: int = 4
    """Held-out prompts whose responses are shown."""

    def __post_init__(self) -> None:
        least = {"num_prompts": 1, "num_heldout": 2, "shortest_prompt": 1, "samples": 2, "best_of": 2, "shown": 1}
        least["longest_prompt"] = self.shortest_prompt
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if self.best_of.bit_count() != 1:
            raise ValueError(f"best_of must be a power of 2, got {self.best_of}")


@dataclasses.dataclass(frozen=True)
class SentimentConfig(RunConfig):
    """``rl`` and the algorithms' sections hold what their runs share; ``sentiment`` holds the strengths."""

    sentiment: Sentiment = Sentiment()


class SentimentResult(NamedTuple):
    """The folder with the runs, and the summary that was written into it."""

    folder: Path
    summary: dict[str, Any]


class _Planned(NamedTuple):
    method: str
    strength: float
    setting: str  # what the strength is called
    algorithm: ModuleType  # of RL; or the module training.dpo
    sections: dict[str, Any]


def run(config: SentimentConfig, reward: TextReward) -> SentimentResult:
    """Writes ``base/``, ``data/``, a run for each algorithm and strength, ``summary.json``, ``score_kl.svg`` and
    ``report.html``; prints a table.

    ``reward(prompts, responses)`` gives a number for each response. With ``resume``, finished runs are passed over and
    the one that was stopped goes on.

    Raises:
        UserError: the folder is used, the model does not suit, or a setting does not fit.
        FloatingPointError: a score that is not finite.
    """
    folder = Path(config.output_dir or "runs/sentiment")
    if config.model is None:
        raise UserError("no model: give --model FOLDER with a language model that has a start token")
    if config.data or config.reward:
        raise UserError("--data, --reward: this job has its own prompts and its own reward; leave them out")
    if not (config.overwrite and (folder / "base").is_dir()):
        pipeline.check_folder(folder, config)
    start(config)
    model, params, tokenizer = setup.load_language_model(config.model, config.compute)
    host = rewards.from_text(reward, tokenizer)
    prompts = _beginnings(config, model, params, tokenizer)
    models.save(folder / "base", model, jax.device_get(params))
    tokenizer.save(folder / "base")
    bench = _bench(config, folder / "data", prompts, model, params, tokenizer, host)
    measure = frontier.measurement(bench)
    base = measure(params, "base", "")
    points = []
    for planned in _runs(config, folder / "data"):
        path = folder / f"{planned.method}_{planned.strength:g}"
        before = time.perf_counter()
        stage = dataclasses.replace(
            config,
            model=str(folder / "base"),
            output_dir=str(path),
            resume=config.resume and path.exists(),
            overwrite=config.overwrite and path.exists(),
            **planned.sections,
        )
        if planned.algorithm is dpo:
            result = dpo.run(stage)
        else:
            result = rl.run(stage, planned.algorithm, RunReward(host=host))
        point = measure(models.load(result.model_folder)[1], TITLES[planned.method], planned.setting)
        points.append(point)
        seconds = time.perf_counter() - before
        print(f"{path.name}: score {point.score:.3f} at {point.kl:.2f} nats, {seconds:.0f} s", flush=True)
    best, scores = frontier.best_of_n(bench, config.sentiment.best_of)
    every = [base, *points, *best]
    texts = [tokenizer.decode(prompt[1:]) for prompt in prompts[: config.sentiment.shown]]
    summary = {
        "seed": config.seed,
        "prompts": config.sentiment.num_prompts,
        "heldout_prompts": config.sentiment.num_heldout,
        "shown": texts,
        "points": [
            {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
            | {"responses": point.texts[: len(texts)], "scores": point.scores[: len(texts)]}
            for point, row in ((point, frontier.as_row(point)) for point in every)
        ],
    }
    runs.write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    plot = frontier.plot(base, points, best, frontier.optimum(scores))
    runs.write_atomically(folder / "score_kl.svg", figures.svg(plot))
    _report(folder / "report.html", config, every, texts, plot)
    _print(every)
    return SentimentResult(folder, summary)


def _runs(config: SentimentConfig, data: Path) -> Iterator[_Planned]:
    own, train = config.sentiment, (str(data / "train.jsonl"),)
    shared = dataclasses.replace(config.rl, data=train, validation_data=(str(data / "heldout.jsonl"),), kl_target=None)

    def reinforced(**changes: Any) -> dict[str, Any]:
        return {"rl": dataclasses.replace(shared, **changes)}

    for coef in own.kl_coefs:
        yield _Planned("ppo_fixed", coef, f"KL coefficient {coef:g}", ppo, reinforced(kl_coef=coef))
    for target in own.kl_targets:
        yield _Planned("ppo_adaptive", target, f"KL target {target:g}", ppo, reinforced(kl_target=target))
    for coef in own.kl_coefs:
        yield _Planned("rloo", coef, f"KL coefficient {coef:g}", rloo, reinforced(kl_coef=coef))
    for coef in own.grpo_kl_coefs:
        sections = reinforced(kl_coef=0.0) | {"grpo": dataclasses.replace(config.grpo, kl_loss_coef=coef)}
        yield _Planned("grpo", coef, f"KL in the loss {coef:g}", grpo, sections)
    for beta in own.dpo_betas:
        sections = {"dpo": dataclasses.replace(config.dpo, data=train, beta=beta)}
        yield _Planned("dpo", beta, f"beta {beta:g}", dpo, sections)


def _beginnings(config: SentimentConfig, model: models.Model, params: Params, tokenizer: Tokenizer) -> list[list[int]]:
    """Distinct beginnings of texts, the start token first; those held out come first."""
    own = config.sentiment
    bos = tokenizer.backend.token_to_id(str(tokenizer.config.get("bos_token")))
    if bos is None:
        raise UserError(f"{config.model}: the tokenizer names no bos_token, with which the model's texts would begin")
    wanted = own.num_prompts + own.num_heldout
    count = 4 * wanted
    alone = np.full((count, 1), bos, np.int32)
    sampling_config = sampling.SamplingConfig(own.longest_prompt, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    key = setup.stream(config.seed, "sentiment", "init")
    written = generator.generate(model, params, alone, np.ones_like(alone), key, sampling_config, batch_size=512)
    lengths = jax.random.randint(jax.random.fold_in(key, 1), (count,), own.shortest_prompt, own.longest_prompt + 1)
    found = dict.fromkeys(
        tuple(row[: length + 1].tolist())
        for row, mask, length in zip(written.tokens, written.response_mask, np.asarray(lengths), strict=True)
        if mask.sum() == own.longest_prompt and bos not in row[1:]
    )
    if len(found) < wanted:
        raise UserError(
            f"sentiment: the model began {count} texts in {len(found)} ways only, fewer than num_prompts "
            f"{own.num_prompts} + num_heldout {own.num_heldout}; raise longest_prompt, or ask for fewer"
        )
    return [list(prompt) for prompt in found][:wanted]


def _bench(
    config: SentimentConfig,
    folder: Path,
    prompts: list[list[int]],
    model: models.Model,
    params: Params,
    tokenizer: Tokenizer,
    host: rewards.HostReward,
) -> frontier.Bench:
    """Writes the prompts with the base model's responses, which the reward has ranked: train.jsonl, heldout.jsonl."""
    own = config.sentiment
    sampling_config = sampling.SamplingConfig(
        config.rl.max_new_tokens, config.rl.temperature, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
    width = max(map(len, prompts))
    tokens = np.array([[tokenizer.pad_id] * (width - len(prompt)) + prompt for prompt in prompts], np.int32)
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int32)
    bench = frontier.Bench(
        model,
        params,
        tokenizer,
        tokens[: own.num_heldout],
        mask[: own.num_heldout],
        sampling_config,
        setup.stream(config.seed, "sentiment", "eval"),
        lambda rollout: np.asarray(rewards.on_host(host, rollout, {}).rollout.scores),
        own.samples,
    )
    answers = generator.generate(
        model,
        params,
        np.repeat(tokens, own.samples, axis=0),
        np.repeat(mask, own.samples, axis=0),
        setup.stream(config.seed, "sentiment", "data"),
        sampling_config,
        batch_size=512,
    )
    pairs = zip(np.asarray(answers.tokens), np.asarray(answers.response_mask), strict=True)
    said = [row[mask != 0].tolist() for row, mask in pairs]
    ranks = (-bench.score(answers)).tolist()  # the lowest is best
    lines = []
    for i, prompt in enumerate(prompts):
        of_it = slice(i * own.samples, (i + 1) * own.samples)
        lines.append(json.dumps({"query": prompt, "responses": said[of_it], "ranks": ranks[of_it]}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_atomically(folder / "train.jsonl", "".join(lines[own.num_heldout :]))
    runs.write_atomically(folder / "heldout.jsonl", "".join(lines[: own.num_heldout]))
    return bench


def _report(
    path: Path, config: SentimentConfig, every: Sequence[frontier.Point], prompts: Sequence[str], plot: figures.Plot
) -> None:
    own = config.sentiment
    table = html.Table(
        "Measurements",
        frontier.NAMES,
        [list(frontier.as_row(point).values()) for point in every],
        formats=dict(zip(frontier.NAMES[2:], (".3f", ".3f", ".2f", ".2f", ".1f", ".3f"), strict=True)),
        note=f"Means over {own.num_heldout} held-out prompts, of {own.samples} responses each (one for best of n), and "
        "standard errors over prompts; KL in nats per response; length in tokens; repeated words: the share of a "
        "response's words that it has said before.",
    )
    methods = dict.fromkeys(point.method for point in every)
    tables = []
    for where, choose in (("lowest", min), ("highest", max)):
        ends = [choose((p for p in every if p.method == method), key=lambda point: point.kl) for method in methods]
        rows = [
            (prompt, f"{point.method} {point.setting}".strip(), point.texts[i], point.scores[i])
            for i, prompt in enumerate(prompts)
            for point in ends
        ]
        columns = ("prompt", "policy", "response", "score")
        tables.append(html.Table(f"Samples, each method at its {where} KL", columns, rows, {"score": ".2f"}))
    text = html.render(
        "Sentiment: score against KL",
        [html.Figures("Held-out prompts", [plot]), table, *tables],
        summary="A language model goes on with texts that it has begun itself, and a function scores what it writes. "
        f"Each algorithm was run on {own.num_prompts} prompts, at several strengths. Where a high score comes from few "
        "words said again and again, the reward has been exploited: the samples show it.",
    )
    runs.write_atomically(path, text)


def _print(every: Sequence[frontier.Point]) -> None:
    table = rich.table.Table(title="Held-out prompts: mean score against KL(policy || base) in nats per response")
    for name in ("method", "strength", "score", "KL", "length", "repeated words"):
        table.add_column(name, justify="left" if name in ("method", "strength") else "right")
    for point in every:
        kl = f"{point.kl:.2f}" + (f" ± {point.kl_error:.2f}" if point.kl_error is not None else "")
        score = f"{point.score:.3f} ± {point.score_error:.3f}"
        table.add_row(point.method, point.setting, score, kl, f"{point.length:.1f}", f"{point.repeated:.3f}")
    rich.console.Console().print(table)
