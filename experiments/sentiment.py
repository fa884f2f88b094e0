"""Continuations of stories grow more positive: score against KL for every algorithm, on two CPU cores.

    python experiments/sentiment.py --model PATH --lexicon vader_lexicon.txt

The first experiment of "Fine-Tuning Language Models from Human Preferences" (Ziegler et al. 2019) in miniature. PATH is
a Hugging Face folder, or holds stories260K.bin and tok512.bin, the small Llama trained on TinyStories. Prompts are the
beginnings of texts that the model writes by itself; the reward is the sentiment of what follows, by the words of the
VADER lexicon. PPO with a fixed and with an adaptive KL coefficient, RLOO and GRPO are trained on that reward, DPO on
samples of the base model that the reward has ranked, each at several strengths. All of them, and best-of-n, are
measured in the same way on held-out prompts; runs/sentiment/report.html shows all of it.
"""

import dataclasses
import functools
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import scipy.special
import stories260k

from rlhf_jax import cli, generator, models, rewards, rollout, sampling
from rlhf_jax.algorithms import grpo, ppo, rloo
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.report import figures, page
from rlhf_jax.rewards import spec
from rlhf_jax.runs.folder import write_atomically
from rlhf_jax.training import dpo, initial, pipeline, rl
from rlhf_jax.training import stage as stages
from rlhf_jax.types import Params, Rollout

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "sentiment.yaml"
VADER_ALPHA = 15.0
WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")
TITLES = {
    "ppo_fixed": "PPO, fixed KL",
    "ppo_adaptive": "PPO, adaptive KL",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "dpo": "DPO",
}
BASE, BEST_OF_N, OPTIMUM = "base", "best of n", "optimum"
NAMES = ("method", "strength", "score", "score error", "KL", "KL error", "length", "repeated words")  # of Point[:8]
ROWS_AT_ONCE = 4096  # sampled in one batch by best_of_n
BATCH_SIZE = 512  # of the base model's own texts


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
    lexicon: str | None = None
    """File of words and their valences, tab separated, such as VADER's vader_lexicon.txt."""


# The reward


def read_lexicon(path: str | Path) -> dict[str, float]:
    """``{word: mean valence}`` of a file whose lines are a word, a tab, a number, and columns that are not read.

    Raises:
        UserError: the file cannot be read, is empty, or has another kind of line.
    """
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the lexicon cannot be read: {getattr(error, 'strerror', None) or error}") from None
    lexicon = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        word, *columns = line.split("\t")
        try:
            lexicon[word] = float(columns[0])
        except (IndexError, ValueError):
            raise UserError(f"{path}, line {number}: expected a word, a tab and a number, found {line!r}") from None
    if not lexicon:
        raise UserError(f"{path}: the lexicon is empty")
    return lexicon


def valence(lexicon: Mapping[str, float], text: str) -> float:
    """s / sqrt(s^2 + 15) for the sum s of the valences (-4 to 4) of the text's words; unknown words count 0.

    VADER's own normalisation (Hutto and Gilbert 2014). Its rules for negation, intensifiers, punctuation, capitals and
    emoticons are left out, so the reward is exact and plain rather than a good judge.
    """
    total = sum(lexicon.get(word, 0.0) for word in WORD.findall(text.lower()))
    return total / math.sqrt(total * total + VADER_ALPHA)


# Measurements: nothing here trains


class Bench(NamedTuple):
    """What policies are measured with."""

    model: models.Model
    params: Params  # of the base model, from which the KL is counted
    tokenizer: Tokenizer
    tokens: np.ndarray  # [N, P] held-out prompts, left-padded
    attention_mask: np.ndarray  # [N, P]
    sampling_config: sampling.SamplingConfig
    key: jax.Array
    score: Callable[[Rollout], np.ndarray]  # on the host: scores [B]
    samples: int  # responses to each prompt


class Point(NamedTuple):
    """A policy's place: means over all responses, with standard errors over the prompts."""

    method: str
    setting: str
    score: float
    score_error: float
    kl: float  # KL(policy || base) in nats per response
    kl_error: float | None  # None: the KL is not an estimate
    length: float  # tokens
    repeated: float  # share of a response's words that occur earlier in it
    texts: Sequence[str]  # the first response to each prompt
    scores: Sequence[float]  # of these

    def row(self) -> dict[str, Any]:
        """The numbers by their names in ``NAMES``."""
        return dict(zip(NAMES, self[: len(NAMES)], strict=True))


def measurement(bench: Bench) -> Callable[..., Point]:
    """A function ``(params, method, setting) -> Point`` for policies of the base model's shape.

    All policies sample with the same key. The KL is the mean over responses of the sum of log-ratios (k1).
    """
    policy_fn = models.policy_fn(bench.model, bench.sampling_config.temperature, bench.tokens.shape[1])
    collect = jax.jit(
        functools.partial(rollout.collect, bench.model, sampling=bench.sampling_config, policy_fn=policy_fn)
    )
    prompts = [jnp.asarray(np.repeat(array, bench.samples, axis=0)) for array in (bench.tokens, bench.attention_mask)]
    ref_fn = jax.tree_util.Partial(policy_fn, bench.params)

    def measure(params: Params, method: str, setting: str = "") -> Point:
        responses = jax.device_get(collect(params, *prompts, bench.key, ref_fn=ref_fn))
        kl = np.sum(responses.log_probs - responses.ref_log_probs, axis=1)
        scored = responses.replace(scores=bench.score(responses))
        return point(bench, method, setting, scored, *mean_and_error(kl, bench.samples))

    return measure


def best_of_n(bench: Bench, largest: int) -> tuple[list[Point], np.ndarray]:
    """Best-of-n of the base model for n = 2, 4, ... up to ``largest``, one response to each prompt.

    Returns:
        The points, at ``sampling.best_of_n_kl(n)``, an upper bound on their KL; and the scores [N, largest] of all
        samples for the last of them.
    """
    points = []
    for n in (2**power for power in range(1, largest.bit_length())):
        at_once = max(ROWS_AT_ONCE // n, 1)
        parts = [
            # Not jitted, since the reward runs on the host.
            sampling.best_of_n(
                bench.model,
                bench.params,
                jnp.asarray(bench.tokens[rows]),
                jnp.asarray(bench.attention_mask[rows]),
                jax.random.fold_in(bench.key, n),
                config=bench.sampling_config,
                n=n,
                reward_fn=lambda samples: (jnp.asarray(bench.score(samples)), {}),
                row_ids=jnp.arange(len(bench.tokens), dtype=jnp.int32)[rows],
            )
            for rows in (slice(first, first + at_once) for first in range(0, len(bench.tokens), at_once))
        ]
        best, scores = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        points.append(point(bench, BEST_OF_N, f"{n}", best, sampling.best_of_n_kl(n), None))
    return points, scores


def optimum(scores: np.ndarray) -> tuple[list[float], list[float]]:
    """KLs in nats and mean scores of the policies of the highest score for their KL, base * exp(score / beta).

    scores: [N, M] of M samples of the base policy for each of N prompts, as an estimate of its distribution. The points
        end at a KL of ln(M) / 2: further out too few of the samples carry the weight.
    """
    count = scores.shape[1]
    kls, means = [0.0], [float(scores.mean())]
    for beta in np.geomspace(10.0, 0.01, 100):
        logits = scores / beta
        mean = np.sum(scipy.special.softmax(logits, axis=1) * scores, axis=1)
        kl = float(np.mean(mean / beta - scipy.special.logsumexp(logits, axis=1) + np.log(count)))
        if kl > np.log(count) / 2:
            break
        kls.append(kl)
        means.append(float(mean.mean()))
    return kls, means


def plot(
    base: Point, points: Iterable[Point], best: Sequence[Point], bound: tuple[list[float], list[float]]
) -> figures.Plot:
    """Score against KL: a curve for each method from the base model on, best-of-n, and ``optimum``."""
    methods: dict[str, list[Point]] = {}
    for measured in points:
        methods.setdefault(measured.method, [base]).append(measured)

    def series(curve: Sequence[Point], **more: Any) -> figures.Series:
        ordered = sorted(curve, key=lambda measured: measured.kl)
        return figures.Series([m.kl for m in ordered], [m.score for m in ordered], **more)

    curves = {method: series(curve) for method, curve in methods.items()}
    curves[BEST_OF_N] = series([base, *best], labels=["", *(measured.setting for measured in best)])
    curves[OPTIMUM] = figures.Series(*bound, style=1)
    return figures.Plot(
        "Score against KL",
        "KL(policy || base), nats per response",
        "mean score",
        curves,
        note=f"Every curve starts at the base model. {BEST_OF_N.capitalize()} stands at ln n - (n - 1)/n, the "
        "most that its KL can be. The optimum is base * exp(score / beta), estimated from the base model's samples as "
        "far as they reach.",
    )


def point(
    bench: Bench, method: str, setting: str, responses: Rollout, kl: float, kl_error: float | None = None
) -> Point:
    """The point of scored responses, as many to each prompt, those of one prompt adjacent."""
    texts = generator.responses(responses, bench.tokenizer)
    each = len(texts) // len(bench.tokens)
    words = [text.lower().split() for text in texts]
    repeated = float(np.mean([1 - len(set(row)) / max(len(row), 1) for row in words]))
    length = float(np.sum(responses.response_mask != 0) / len(texts))
    scores = np.asarray(responses.scores)
    first = texts[::each], scores[::each].tolist()
    return Point(method, setting, *mean_and_error(scores, each), kl, kl_error, length, repeated, *first)


def mean_and_error(values: np.ndarray, each: int) -> tuple[float, float]:
    """Mean and standard error of values [N * each]; those of one prompt are not independent."""
    of_prompts = values.reshape(-1, each).mean(axis=1)
    return float(of_prompts.mean()), float(of_prompts.std(ddof=1) / np.sqrt(len(of_prompts)))


# The job


def run(config: SentimentConfig) -> dict[str, Any]:
    """Writes ``base/``, ``data/``, a run for each algorithm and strength, ``summary.json``, ``score_kl.svg`` and
    ``report.html``; prints a table. Returns the summary.

    With ``resume``, finished runs are passed over and the one that was stopped goes on.
    """
    folder = Path(config.output_dir or "runs/sentiment")
    if config.model is None:
        raise UserError("no model: give --model FOLDER with a language model that has a start token")
    if config.data or config.reward:
        raise UserError("--data, --reward: this job has its own prompts and its own reward; leave them out")
    if config.lexicon is None:
        raise UserError("no reward: give --lexicon vader_lexicon.txt")
    lexicon = read_lexicon(config.lexicon)
    if not (config.overwrite and (folder / "base").is_dir()):
        pipeline.check_folder(folder, config)
    stages.set_up(config)
    model, params, tokenizer = initial.load_language_model(config.model, config.compute)
    host = rewards.from_text(lambda prompts, responses: [valence(lexicon, text) for text in responses], tokenizer)
    prompts = beginnings(config, model, params, tokenizer)
    models.save(folder / "base", model, jax.device_get(params))
    tokenizer.save(folder / "base")
    bench = make_bench(config, prompts, model, params, tokenizer, host)
    write_data(config, folder / "data", prompts, bench)
    measure = measurement(bench)
    base, points = measure(params, BASE), []
    for planned in plan(config, folder / "data"):
        path = folder / f"{planned.method}_{planned.strength:g}"
        before = time.perf_counter()
        trained = train(config, planned, path, folder / "base", host)
        points.append(measure(trained, TITLES[planned.method], planned.setting))
        place = f"score {points[-1].score:.3f} at {points[-1].kl:.2f} nats"
        print(f"{path.name}: {place}, {time.perf_counter() - before:.0f} s", flush=True)
    best, scores = best_of_n(bench, config.sentiment.best_of)
    every = [base, *points, *best]
    shown = [tokenizer.decode(prompt[1:]) for prompt in prompts[: config.sentiment.shown]]
    summary = summarize(config, every, shown)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    drawing = plot(base, points, best, optimum(scores))
    write_atomically(folder / "score_kl.svg", figures.svg(drawing) + "\n")
    write_report(folder / "report.html", config, every, shown, drawing)
    print_points(every)
    return summary


class Planned(NamedTuple):
    """A run to be made."""

    method: str
    strength: float
    setting: str  # the strength in words
    algorithm: ModuleType  # of RL; or the module training.dpo
    sections: dict[str, Any]  # of the run's settings


def plan(config: SentimentConfig, data: Path) -> Iterator[Planned]:
    """Every algorithm at every strength."""
    own, prompts = config.sentiment, (str(data / "train.jsonl"),)
    shared = dataclasses.replace(
        config.rl, data=prompts, validation_data=(str(data / "heldout.jsonl"),), kl_target=None
    )

    def rl_section(**changes: Any) -> dict[str, Any]:
        return {"rl": dataclasses.replace(shared, **changes)}

    for coef in own.kl_coefs:
        yield Planned("ppo_fixed", coef, f"KL coefficient {coef:g}", ppo, rl_section(kl_coef=coef))
    for target in own.kl_targets:
        yield Planned("ppo_adaptive", target, f"KL target {target:g}", ppo, rl_section(kl_target=target))
    for coef in own.kl_coefs:
        yield Planned("rloo", coef, f"KL coefficient {coef:g}", rloo, rl_section(kl_coef=coef))
    for coef in own.grpo_kl_coefs:
        sections = rl_section(kl_coef=0.0) | {"grpo": dataclasses.replace(config.grpo, kl_loss_coef=coef)}
        yield Planned("grpo", coef, f"KL in the loss {coef:g}", grpo, sections)
    for beta in own.dpo_betas:
        sections = {"dpo": dataclasses.replace(config.dpo, data=prompts, beta=beta)}
        yield Planned("dpo", beta, f"beta {beta:g}", dpo, sections)


def train(config: SentimentConfig, planned: Planned, path: Path, base: Path, host: rewards.HostReward) -> Params:
    """Makes a planned run in the folder ``path``, from the model in ``base``; its parameters."""
    stage = dataclasses.replace(
        config,
        model=str(base),
        output_dir=str(path),
        resume=config.resume and path.exists(),
        overwrite=config.overwrite and path.exists(),
        **planned.sections,
    )
    if planned.algorithm is dpo:
        result = dpo.run(stage)
    else:
        result = rl.run(stage, planned.algorithm, run_reward=spec.Reward(host=host))
    return models.load(result.model_folder)[1]


def beginnings(config: SentimentConfig, model: models.Model, params: Params, tokenizer: Tokenizer) -> list[list[int]]:
    """Distinct beginnings of texts, the start token first; those held out come first."""
    own = config.sentiment
    bos = tokenizer.backend.token_to_id(str(tokenizer.config.get("bos_token")))
    if bos is None:
        raise UserError(f"{config.model}: the tokenizer names no bos_token, with which the model's texts would begin")
    wanted = own.num_prompts + own.num_heldout
    count = 4 * wanted
    alone = np.full((count, 1), bos, np.int32)
    sampling_config = sampling.SamplingConfig(own.longest_prompt, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    key = stages.stream(config.seed, "sentiment", "init")
    inputs = (model, params, alone, np.ones_like(alone), key)
    written = generator.sample_in_batches(*inputs, config=sampling_config, batch_size=BATCH_SIZE)
    lengths = jax.random.randint(jax.random.fold_in(key, 1), (count,), own.shortest_prompt, own.longest_prompt + 1)
    prompts = dict.fromkeys(
        tuple(row[: length + 1].tolist())
        for row, mask, length in zip(written.tokens, written.response_mask, np.asarray(lengths), strict=True)
        if mask.sum() == own.longest_prompt and bos not in row[1:]
    )
    if len(prompts) < wanted:
        raise UserError(
            f"sentiment: the model began {count} texts in {len(prompts)} ways only, fewer than num_prompts "
            f"{own.num_prompts} + num_heldout {own.num_heldout}; raise longest_prompt, or ask for fewer"
        )
    return [list(prompt) for prompt in prompts][:wanted]


def left_padded(prompts: Sequence[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and attention mask [N, P]."""
    width = max(map(len, prompts))
    tokens = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return np.array(tokens, np.int32), np.array(mask, np.int32)


def make_bench(
    config: SentimentConfig,
    prompts: list[list[int]],
    model: models.Model,
    params: Params,
    tokenizer: Tokenizer,
    host: rewards.HostReward,
) -> Bench:
    """The bench of the held-out prompts, which are the first of ``prompts``."""
    own = config.sentiment
    sampling_config = sampling.SamplingConfig(
        config.rl.max_new_tokens, config.rl.temperature, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
    tokens, mask = (array[: own.num_heldout] for array in left_padded(prompts, tokenizer.pad_id))
    key = stages.stream(config.seed, "sentiment", "eval")

    def score(responses: Rollout) -> np.ndarray:
        return np.asarray(rewards.on_host(host, responses, {}).rollout.scores)

    return Bench(model, params, tokenizer, tokens, mask, sampling_config, key, score, own.samples)


def write_data(config: SentimentConfig, folder: Path, prompts: list[list[int]], bench: Bench) -> None:
    """Writes the prompts with the base model's responses, ranked by the reward: train.jsonl, heldout.jsonl."""
    own = config.sentiment
    tokens, mask = (np.repeat(array, own.samples, axis=0) for array in left_padded(prompts, bench.tokenizer.pad_id))
    key = stages.stream(config.seed, "sentiment", "data")
    inputs = (bench.model, bench.params, tokens, mask, key)
    answers = generator.sample_in_batches(*inputs, config=bench.sampling_config, batch_size=BATCH_SIZE)
    pairs = zip(np.asarray(answers.tokens), np.asarray(answers.response_mask), strict=True)
    responses = [row[response != 0].tolist() for row, response in pairs]
    ranks = (-bench.score(answers)).tolist()  # the lowest is best
    lines = []
    for i, prompt in enumerate(prompts):
        rows = slice(i * own.samples, (i + 1) * own.samples)
        lines.append(json.dumps({"query": prompt, "responses": responses[rows], "ranks": ranks[rows]}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "train.jsonl", "".join(lines[own.num_heldout :]))
    write_atomically(folder / "heldout.jsonl", "".join(lines[: own.num_heldout]))


def summarize(config: SentimentConfig, every: Sequence[Point], shown: Sequence[str]) -> dict[str, Any]:
    """What ``summary.json`` holds."""

    def row(measured: Point) -> dict[str, Any]:
        values = {name: round(v, 6) if isinstance(v, float) else v for name, v in measured.row().items()}
        return values | {"responses": measured.texts[: len(shown)], "scores": measured.scores[: len(shown)]}

    return {
        "seed": config.seed,
        "prompts": config.sentiment.num_prompts,
        "heldout_prompts": config.sentiment.num_heldout,
        "shown": shown,
        "points": [row(measured) for measured in every],
    }


def write_report(
    path: Path, config: SentimentConfig, every: Sequence[Point], prompts: Sequence[str], drawing: figures.Plot
) -> None:
    """The page: the plot, the table, and samples of each method at its lowest and highest KL."""
    own = config.sentiment
    table = page.Table(
        "Measurements",
        NAMES,
        [list(measured.row().values()) for measured in every],
        formats=dict(zip(NAMES[2:], (".3f", ".3f", ".2f", ".2f", ".1f", ".3f"), strict=True)),
        note=f"Means over {own.num_heldout} held-out prompts, of {own.samples} responses each (one for best of n), and "
        "standard errors over prompts; KL in nats per response; length in tokens; repeated words: the share of a "
        "response's words that occur earlier in it.",
    )
    methods = dict.fromkeys(measured.method for measured in every)
    samples = []
    for where, choose in (("lowest", min), ("highest", max)):
        ends = [choose((m for m in every if m.method == method), key=lambda m: m.kl) for method in methods]
        rows = [
            (prompt, f"{end.method} {end.setting}".strip(), end.texts[i], end.scores[i])
            for i, prompt in enumerate(prompts)
            for end in ends
        ]
        columns = ("prompt", "policy", "response", "score")
        samples.append(page.Table(f"Samples, each method at its {where} KL", columns, rows, {"score": ".2f"}))
    report = page.render(
        "Sentiment: score against KL",
        [page.Figures("Held-out prompts", [drawing]), table, *samples],
        summary="A language model goes on with texts that it has begun itself, and a function scores what it writes. "
        f"Each algorithm was run on {own.num_prompts} prompts, at several strengths. Where a high score comes from few "
        "words repeated again and again, the reward has been exploited: the samples show it.",
    )
    write_atomically(path, report)


def print_points(every: Sequence[Point]) -> None:
    """The table in the terminal."""
    table = rich.table.Table(title="Held-out prompts: mean score against KL(policy || base) in nats per response")
    for name in ("method", "strength", "score", "KL", "length", "repeated words"):
        table.add_column(name, justify="left" if name in ("method", "strength") else "right")
    for m in every:
        kl = f"{m.kl:.2f}" + (f" ± {m.kl_error:.2f}" if m.kl_error is not None else "")
        score = f"{m.score:.3f} ± {m.score_error:.3f}"
        table.add_row(m.method, m.setting, score, kl, f"{m.length:.1f}", f"{m.repeated:.3f}")
    rich.console.Console().print(table)


def main() -> None:
    config = parse(SentimentConfig, ["--config", str(CONFIG), *sys.argv[1:]], description=__doc__)
    with tempfile.TemporaryDirectory() as converted:
        if config.model is not None and (Path(config.model) / stories260k.WEIGHTS).is_file():
            stories260k.convert(config.model, converted)
            config = dataclasses.replace(config, model=converted)
        run(config)


if __name__ == "__main__":
    cli.run_script(main)
