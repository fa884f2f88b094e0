"""Continuations of stories grow more positive: score against KL for every algorithm, on two CPU
cores.

    python experiments/sentiment.py --model PATH --lexicon vader_lexicon.txt

The first experiment of "Fine-Tuning Language Models from Human Preferences" (Ziegler et al. 2019)
in miniature. PATH is a Hugging Face folder, or holds stories260K.bin and tok512.bin, the small
Llama trained on TinyStories. Prompts are the beginnings of texts that the model writes by itself;
the reward is the sentiment of what follows, by the words of the VADER lexicon. PPO with a fixed and
with an adaptive KL coefficient, RLOO and GRPO are trained on that reward, DPO on samples of the
base model that the reward has ranked, each at several strengths. All of them, and best-of-n, are
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

from rlhf_jax import cli, models, ops, rewards, rollout, sampling
from rlhf_jax.algorithms import grpo, ppo, rloo
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.data import encoding, files
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError
from rlhf_jax.generation import generator
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.report import figures, page
from rlhf_jax.runs.writing import write_atomically
from rlhf_jax.training import dpo, pipeline, rl
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.opening import stream_key
from rlhf_jax.training.common.setup import set_up
from rlhf_jax.types import Params, Rollout

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "sentiment.yaml"
VADER_ALPHA = 15.0
WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")
# Of each method: title, strength in words, algorithm, the section and the key of the strength in
# the run's settings.
METHODS: dict[str, tuple[str, str, ModuleType, str, str]] = {
    "ppo_fixed": ("PPO, fixed KL", "KL coefficient", ppo, "rl", "kl_coef"),
    "ppo_adaptive": ("PPO, adaptive KL", "KL target", ppo, "rl", "kl_target"),
    "rloo": ("RLOO", "KL coefficient", rloo, "rl", "kl_coef"),
    "grpo": ("GRPO", "KL in the loss", grpo, "grpo", "kl_loss_coef"),
    "dpo": ("DPO", "beta", dpo, "dpo", "beta"),
}
BASE = "base"
BEST_OF_N = "best of n"
OPTIMUM = "optimum"
# Names and formats of the first eight fields of a Point.
FORMATS = {
    "method": "",
    "strength": "",
    "score": ".3f",
    "score error": ".3f",
    "KL": ".2f",
    "KL error": ".2f",
}
FORMATS |= {"length": ".1f", "repeated words": ".3f"}
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
    """Responses of the base model to each prompt, which DPO learns from; as many of each policy are
    measured.
    """
    best_of: int = 64
    """The largest n of best-of-n, a power of 2."""
    kl_coefs: tuple[float, ...] = (0.05,)
    """KL coefficients in the reward, of PPO with a fixed one and of RLOO."""
    kl_targets: tuple[float, ...] = (6.0,)
    """KL targets in nats per response, of PPO with an adaptive coefficient that starts at
    rl.kl_coef.
    """
    grpo_kl_coefs: tuple[float, ...] = (0.04,)
    """Weights of the KL term in GRPO's loss."""
    dpo_betas: tuple[float, ...] = (0.1,)
    """DPO's beta."""
    shown: int = 4
    """Held-out prompts whose responses are shown."""

    def __post_init__(self) -> None:
        least = {
            "num_prompts": 1,
            "num_heldout": 2,
            "shortest_prompt": 1,
            "samples": 2,
            "best_of": 2,
            "shown": 1,
        }
        for name, value in (least | {"longest_prompt": self.shortest_prompt}).items():
            ops.check_number(name, getattr(self, name), at_least=value)
        if self.best_of.bit_count() != 1:
            raise ValueError(f"best_of must be a power of 2, got {self.best_of}")


@dataclasses.dataclass(frozen=True)
class SentimentConfig(RunConfig):
    """``rl`` and the algorithms' sections hold what their runs share; ``sentiment`` holds the
    strengths.
    """

    sentiment: Sentiment = Sentiment()
    lexicon: str | None = None
    """File of words and their valences, tab separated, such as VADER's vader_lexicon.txt."""


# The reward


def read_lexicon(path: str | Path) -> dict[str, float]:
    """``{word: mean valence}`` of a file whose lines are a word, a tab, a number, and columns that
    are not read.

    Raises:
        UserError: the file cannot be read, is empty, or has another kind of line.
    """
    lexicon = {}
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        word, *columns = line.split("\t")
        try:
            lexicon[word] = float(columns[0])
        except (IndexError, ValueError):
            raise UserError(
                f"{path}, line {number}: expected a word, a tab and a number, found {line!r}"
            ) from None
    if not lexicon:
        raise UserError(f"{path}: the lexicon is empty")
    return lexicon


def valence(lexicon: Mapping[str, float], text: str) -> float:
    """s / sqrt(s^2 + 15) for the sum s of the valences (-4 to 4) of the text's words; unknown words
    count 0.

    VADER's own normalisation (Hutto and Gilbert 2014). Its rules for negation, intensifiers,
    punctuation, capitals and emoticons are left out, so the reward is exact and plain rather than a
    good judge.
    """
    total = sum(lexicon.get(word, 0.0) for word in WORD.findall(text.lower()))
    return total / math.sqrt(total * total + VADER_ALPHA)


# Measurements: nothing here trains


class Bench(NamedTuple):
    """What policies are measured with."""

    base: LanguageModel  # from which the KL is counted
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
        """The numbers by their names in ``FORMATS``."""
        return dict(zip(FORMATS, self, strict=False))


def measurement(bench: Bench) -> Callable[..., Point]:
    """A function ``(params, method, setting) -> Point`` for policies of the base model's shape.

    All policies sample with the same key. The KL is the mean over responses of the sum of
    log-ratios (k1).
    """
    model = bench.base.model
    config = bench.sampling_config
    policy_fn = models.policy_fn(model, config.temperature, bench.tokens.shape[1])
    collect = jax.jit(
        functools.partial(rollout.collect, model, sampling=config, policy_fn=policy_fn)
    )
    prompts = [
        jnp.asarray(np.repeat(array, bench.samples, axis=0))
        for array in (bench.tokens, bench.attention_mask)
    ]
    ref_fn = jax.tree_util.Partial(policy_fn, bench.base.params)

    def measure(params: Params, method: str, setting: str = "") -> Point:
        responses = jax.device_get(collect(params, *prompts, bench.key, ref_fn=ref_fn))
        kl = np.sum(responses.log_probs - responses.ref_log_probs, axis=1)
        scored = responses.replace(scores=bench.score(responses))
        return point(bench, method, setting, scored, *mean_and_error(kl, bench.samples))

    return measure


def best_of_n(bench: Bench, largest: int) -> tuple[list[Point], np.ndarray]:
    """Best-of-n of the base model for n = 2, 4, ... up to ``largest``, one response to each prompt.

    Returns:
        The points, at ``sampling.best_of_n_kl(n)``, an upper bound on their KL; and the scores [N,
        largest] of all samples for the last of them.
    """

    def sample(n: int, rows: slice) -> tuple[Rollout, jax.Array]:
        """Not jitted, since the reward runs on the host."""
        return sampling.best_of_n(
            bench.base.model,
            bench.base.params,
            jnp.asarray(bench.tokens[rows]),
            jnp.asarray(bench.attention_mask[rows]),
            jax.random.fold_in(bench.key, n),
            config=bench.sampling_config,
            n=n,
            reward_fn=lambda samples: (jnp.asarray(bench.score(samples)), {}),
            row_ids=jnp.arange(len(bench.tokens), dtype=jnp.int32)[rows],
        )

    points = []
    for n in (2**power for power in range(1, largest.bit_length())):
        at_once = max(ROWS_AT_ONCE // n, 1)
        parts = [
            sample(n, slice(first, first + at_once))
            for first in range(0, len(bench.tokens), at_once)
        ]
        best, scores = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        points.append(point(bench, BEST_OF_N, f"{n}", best, sampling.best_of_n_kl(n), None))
    return points, scores


def optimum(scores: np.ndarray) -> tuple[list[float], list[float]]:
    """KLs in nats and mean scores of the policies of the highest score for their KL, base *
    exp(score / beta).

    scores: [N, M] of M samples of the base policy for each of N prompts, as an estimate of its
        distribution. The points end at a KL of ln(M) / 2: further out too few of the samples carry
        the weight.
    """
    count = scores.shape[1]
    kls = [0.0]
    means = [float(scores.mean())]
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
    base: Point,
    points: Iterable[Point],
    best: Sequence[Point],
    bound: tuple[list[float], list[float]],
) -> figures.Plot:
    """Score against KL: a curve for each method, from the base model, best-of-n and ``optimum``."""
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
        note="Every curve starts at the base model. "
        f"{BEST_OF_N.capitalize()} is drawn at ln n - (n - 1)/n, the upper bound of its KL. The "
        "optimum is base * exp(score / beta), estimated from the base model's samples as far as "
        "they reach.",
    )


def point(
    bench: Bench,
    method: str,
    setting: str,
    responses: Rollout,
    kl: float,
    kl_error: float | None = None,
) -> Point:
    """The point of scored responses, as many to each prompt, those of one prompt adjacent."""
    texts = generator.responses(responses, bench.base.tokenizer)
    each = len(texts) // len(bench.tokens)
    words = [text.lower().split() for text in texts]
    repeated = float(np.mean([1 - len(set(row)) / max(len(row), 1) for row in words]))
    length = float(np.sum(responses.response_mask != 0) / len(texts))
    scores = np.asarray(responses.scores)
    first = texts[::each], scores[::each].tolist()
    return Point(
        method, setting, *mean_and_error(scores, each), kl, kl_error, length, repeated, *first
    )


def mean_and_error(values: np.ndarray, each: int) -> tuple[float, float]:
    """Mean and standard error of values [N * each]; those of one prompt are not independent."""
    of_prompts = values.reshape(-1, each).mean(axis=1)
    return float(of_prompts.mean()), float(of_prompts.std(ddof=1) / np.sqrt(len(of_prompts)))


# The job


def run(config: SentimentConfig) -> dict[str, Any]:
    """Writes ``base/``, ``data/``, a run for each algorithm and strength, ``summary.json``,
    ``score_kl.svg`` and ``report.html``; prints a table. Returns the summary.

    With ``resume``, finished runs are passed over and the one that was stopped goes on.
    """
    folder = Path(config.output_dir or "runs/sentiment")
    own = config.sentiment
    if config.model is None:
        raise UserError(
            "no model: give --model FOLDER with a language model that has a start token"
        )
    if config.data or config.reward:
        raise UserError(
            "--data, --reward: this job has its own prompts and its own reward; leave them out"
        )
    if config.lexicon is None:
        raise UserError("no reward: give --lexicon vader_lexicon.txt")
    lexicon = read_lexicon(config.lexicon)
    pipeline.check_folder(folder, config, first="base")
    set_up(config)
    language_model = initial.load_language_model(config.model, config.compute)
    tokenizer = language_model.tokenizer
    host = rewards.from_text(
        lambda prompts, responses: [valence(lexicon, text) for text in responses], tokenizer
    )
    prompts = beginnings(config, language_model)
    models.save(folder / "base", language_model.model, jax.device_get(language_model.params))
    tokenizer.save(folder / "base")
    bench = Bench(
        language_model,
        prompts.tokens[: own.num_heldout],
        prompts.attention_mask[: own.num_heldout],
        initial.sampling_config(config.rl, tokenizer),
        stream_key(config.seed, "sentiment", "eval"),
        lambda responses: np.asarray(rewards.on_host(host, responses, {})[0].scores),
        own.samples,
    )
    write_data(config, folder / "data", prompts, bench)
    measure = measurement(bench)
    base = measure(language_model.params, BASE)
    points = []
    for method, strength, sections in plan(config, folder / "data"):
        path = folder / f"{method}_{strength:g}"
        before = time.perf_counter()
        stage = pipeline.stage_config(config, path, str(folder / "base"), **sections)
        title, words, algorithm, *_ = METHODS[method]
        trained = dpo.run(stage) if algorithm is dpo else rl.run(stage, algorithm, reward=host)
        points.append(measure(models.load(trained.model_folder)[1], title, f"{words} {strength:g}"))
        place = f"score {points[-1].score:.3f} at {points[-1].kl:.2f} nats"
        print(f"{path.name}: {place}, {time.perf_counter() - before:.0f} s", flush=True)
    best, scores = best_of_n(bench, own.best_of)
    every = [base, *points, *best]
    shown = [tokenizer.decode(row.prompt[1:]) for row in prompts.rows[: own.shown]]
    summary = summarize(config, every, shown)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    drawing = plot(base, points, best, optimum(scores))
    write_atomically(folder / "score_kl.svg", figures.svg(drawing) + "\n")
    write_report(folder / "report.html", config, every, shown, drawing)
    print_points(every)
    return summary


def plan(config: SentimentConfig, data: Path) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Every method at every strength, with the sections of the run's settings."""
    own = config.sentiment
    prompts = (str(data / "train.jsonl"),)
    policies: dict[str, Any] = {
        "data": prompts,
        "validation_data": (str(data / "heldout.jsonl"),),
        "kl_target": None,
    }
    strengths = (own.kl_coefs, own.kl_targets, own.kl_coefs, own.grpo_kl_coefs, own.dpo_betas)
    for (method, (*_, section, key)), of_method in zip(METHODS.items(), strengths, strict=True):
        for strength in of_method:
            kl_in_reward: dict[str, Any] = {"kl_coef": 0.0} if section == "grpo" else {}
            rl_stage = dataclasses.replace(config.rl, **policies, **kl_in_reward)
            sections: dict[str, Any] = {
                "rl": rl_stage,
                "grpo": config.grpo,
                "dpo": dataclasses.replace(config.dpo, data=prompts),
            }
            yield (
                method,
                strength,
                sections | {section: dataclasses.replace(sections[section], **{key: strength})},
            )


def beginnings(config: SentimentConfig, base: LanguageModel) -> encoding.EncodedPrompts:
    """Distinct beginnings of texts, the start token first; those held out come first."""
    own = config.sentiment
    tokenizer = base.tokenizer
    bos = tokenizer.backend.token_to_id(str(tokenizer.config.get("bos_token")))
    if bos is None:
        raise UserError(
            f"{config.model}: the tokenizer names no bos_token, with which the model's texts would "
            "begin"
        )
    wanted = own.num_prompts + own.num_heldout
    count = 4 * wanted
    sampling_config = sampling.SamplingConfig(
        own.longest_prompt, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
    key = stream_key(config.seed, "sentiment", "init")
    written, _ = base.respond(
        encoding.encode_prompts([Row((bos,), (), "the start")], tokenizer),
        key,
        config=sampling_config,
        numbers=np.zeros(count, int),
        batch_size=BATCH_SIZE,
    )
    lengths = jax.random.randint(
        jax.random.fold_in(key, 1), (count,), own.shortest_prompt, own.longest_prompt + 1
    )
    prompts = dict.fromkeys(
        tuple(row[: length + 1].tolist())
        for row, mask, length in zip(
            written.tokens, written.response_mask, np.asarray(lengths), strict=True
        )
        if mask.sum() == own.longest_prompt and bos not in row[1:]
    )
    if len(prompts) < wanted:
        raise UserError(
            f"sentiment: the model began {count} texts in {len(prompts)} ways only, fewer than "
            f"num_prompts {own.num_prompts} + num_heldout {own.num_heldout}; raise longest_prompt, "
            "or ask for fewer"
        )
    return encoding.encode_prompts(
        [Row(prompt, (), "a beginning") for prompt in prompts][:wanted], tokenizer
    )


def write_data(
    config: SentimentConfig, folder: Path, prompts: encoding.EncodedPrompts, bench: Bench
) -> None:
    """Writes the prompts with the base model's responses, ranked by the reward: train.jsonl,
    heldout.jsonl.
    """
    own = config.sentiment
    answers, _ = bench.base.respond(
        prompts,
        stream_key(config.seed, "sentiment", "data"),
        config=bench.sampling_config,
        numbers=np.repeat(np.arange(len(prompts)), own.samples),
        batch_size=BATCH_SIZE,
    )
    pairs = zip(np.asarray(answers.tokens), np.asarray(answers.response_mask), strict=True)
    responses = [row[response != 0].tolist() for row, response in pairs]
    ranks = (-bench.score(answers)).tolist()  # the lowest is best
    lines = []
    for i, row in enumerate(prompts.rows):
        own_rows = slice(i * own.samples, (i + 1) * own.samples)
        line = {"query": row.prompt, "responses": responses[own_rows], "ranks": ranks[own_rows]}
        lines.append(json.dumps(line) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "train.jsonl", "".join(lines[own.num_heldout :]))
    write_atomically(folder / "heldout.jsonl", "".join(lines[: own.num_heldout]))


def summarize(
    config: SentimentConfig, every: Sequence[Point], shown: Sequence[str]
) -> dict[str, Any]:
    """What ``summary.json`` holds."""

    def row(measured: Point) -> dict[str, Any]:
        values = {
            name: round(v, 6) if isinstance(v, float) else v for name, v in measured.row().items()
        }
        return values | {
            "responses": measured.texts[: len(shown)],
            "scores": measured.scores[: len(shown)],
        }

    return {
        "seed": config.seed,
        "prompts": config.sentiment.num_prompts,
        "heldout_prompts": config.sentiment.num_heldout,
        "shown": shown,
        "points": [row(measured) for measured in every],
    }


def write_report(
    path: Path,
    config: SentimentConfig,
    every: Sequence[Point],
    prompts: Sequence[str],
    drawing: figures.Plot,
) -> None:
    """The page: the plot, the table, and samples of each method at its lowest and highest KL."""
    own = config.sentiment
    table = page.Table(
        "Measurements",
        tuple(FORMATS),
        [list(measured.row().values()) for measured in every],
        formats=FORMATS,
        note=f"Means over {own.num_heldout} held-out prompts, of {own.samples} responses each (one "
        "for best of n), and standard errors over prompts; KL in nats per response; length in "
        "tokens; repeated words: the share of a response's words that occur earlier in it.",
    )
    methods = dict.fromkeys(measured.method for measured in every)
    samples = []
    for where, choose in (("lowest", min), ("highest", max)):
        ends = [
            choose((m for m in every if m.method == method), key=lambda m: m.kl)
            for method in methods
        ]
        rows = [
            (prompt, f"{end.method} {end.setting}".strip(), end.texts[i], end.scores[i])
            for i, prompt in enumerate(prompts)
            for end in ends
        ]
        columns = ("prompt", "policy", "response", "score")
        samples.append(
            page.Table(f"Samples, each method at its {where} KL", columns, rows, {"score": ".2f"})
        )
    report = page.render(
        "Sentiment: score against KL",
        [page.Figures("Held-out prompts", [drawing]), table, *samples],
        summary="A language model continues texts that it has begun itself, and a function scores "
        f"its responses. Each algorithm was run on {own.num_prompts} prompts, at several "
        "strengths. If a high score comes from a few repeated words, the policy has exploited the "
        "reward: the samples show it.",
    )
    write_atomically(path, report)


def print_points(every: Sequence[Point]) -> None:
    """The table in the terminal."""
    table = rich.table.Table(
        title="Held-out prompts: mean score against KL(policy || base) in nats per response"
    )
    for name, form in FORMATS.items():
        table.add_column(name, justify="right" if form else "left")
    for measured in every:
        table.add_row(
            *("" if x is None else f"{x:{FORMATS[name]}}" for name, x in measured.row().items())
        )
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
