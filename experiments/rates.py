"""Which learning rate suits which size? Five stages, full training and adapters, three sizes.

    python experiments/rates.py --out rates.json

The networks of .1 and 1 million parameters start from random weights. A first training on answers
that are half noise gives them a form; the stages then teach them to answer well, each at rates from
one that does nothing to one that breaks the network. A run is one pure function, the package's own
losses and optimizer with the stage's default schedule; one program maps it over rates and
seeds (``jax.lax.map``: on a core as fast as ``jax.vmap``, and compiled in half the time).

Two tasks. ``reverse``: four letters are to be written backwards, and half of the letters of the
first answers are random. ``taste``: words are pairs of a consonant and a vowel, and the first
letter of the prompt says which half of the alphabet is liked. The quality of an answer is its share
of right, or liked, letters, and its form is a rule too: four letters and the end; pairs and the
end.

Measured on prompts of their own, at the end: SFT the loss of good answers, reward models their
accuracy, DPO, KTO and RLOO the mean quality of samples, where an answer that lost its form counts
0, and the share of samples that kept it.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
import tyro
from jax import Array
from jax.tree_util import Partial

from rlhf_jax import (
    Comparisons,
    Demonstrations,
    Feedback,
    TrainState,
    cli,
    dpo,
    kto,
    models,
    reward_model,
    rewards,
    rloo,
    rollout,
    sampling,
    sft,
)
from rlhf_jax.config import RunConfig
from rlhf_jax.errors import logger
from rlhf_jax.models import lora
from rlhf_jax.training.common.optimizer import make_optimizer
from rlhf_jax.types import Params

LETTERS = 12  # the last four are the vowels of ``taste``
CONSONANTS = 8
EOS = LETTERS
PAD = LETTERS + 1
PROMPT = 4
RESPONSE = 7
RANK = 8
SIZES = {"0.1 M": (64, 2), "1 M": (208, 2)}  # width and layers
# Half powers of ten, by stage: the least and the largest exponent, of full training
RANGES = {"sft": (-4, -1), "reward_model": (-4, -1), "dpo": (-5, -2), "kto": (-5, -2)}
RANGES |= {"rl": (-4.5, -1.5)}
MEASURES = {"sft": "loss", "reward_model": "accuracy"}  # else the score of samples


class Sizes(NamedTuple):
    """How much is trained."""

    first_steps: int = 160  # of the training that all stages but SFT start from
    steps: int = 100
    batch_size: int = 32
    held_out: int = 256
    seeds: int = 3
    rates: int | None = None  # at most so many of each stage, the middle ones; None: all


FULL = Sizes()


class Part(NamedTuple):
    """A stage at several rates."""

    size: str
    is_adapter: bool
    stage: str
    task: str
    longer: int = 1  # times the usual steps

    @property
    def name(self) -> str:
        """The variant in the table."""
        how = "adapters" if self.is_adapter else "full"
        length = f" x {self.longer}" * (self.longer > 1)
        return f"{self.stage}, {self.size}, {how}, {self.task}{length}"


def network(size: str) -> models.Model:
    width, layers = SIZES[size]
    config = models.GPT2Config(
        vocab_size=PAD + 1,
        max_length=PROMPT + RESPONSE,
        hidden_size=width,
        num_layers=layers,
        num_heads=4,
        initializer_range=width**-0.5,
    )
    return models.build(config)


SAMPLER = sampling.SamplingConfig(RESPONSE, eos_id=EOS, pad_id=PAD)


def prompts(key: Array, num: int, held_out: bool) -> Array:
    """Prompts [num, PROMPT] of consonants. The letters of those held out add up to a multiple of
    four.
    """
    free = jax.random.randint(key, (num, PROMPT), 0, CONSONANTS)
    added = jnp.zeros((num,), jnp.int32) if held_out else 1 + free[:, 0] % 3
    first = (added - jnp.sum(free[:, 1:], axis=1)) % 4 + 4 * (free[:, 0] // 4)
    return free.at[:, 0].set(first)


def answers(is_taste: Array, key: Array, asked: Array, noise: float) -> Array:
    """Answers [B, RESPONSE] in the form of the task, of whose letters a share is random."""
    letter_key, noise_key, odd_key, length_key = jax.random.split(key, 4)
    shape = (len(asked), RESPONSE - 1)
    is_noise = jax.random.uniform(noise_key, shape) < noise
    number = jax.random.randint(letter_key, shape, 0, CONSONANTS)
    mirrored = jnp.pad(asked[:, ::-1], ((0, 0), (0, shape[1] - PROMPT)))
    reverse = jnp.where(is_noise, number, mirrored)
    liked = asked[:, :1] % 2
    odd = jnp.where(is_noise, jax.random.randint(odd_key, shape, 0, 2), liked)
    is_vowel = jnp.arange(shape[1]) % 2
    kind = jnp.where(is_vowel, CONSONANTS + number // 4 * 2, number // 2 * 2)
    letters = jnp.pad(jnp.where(is_taste, kind + odd, reverse), ((0, 0), (0, 1)))
    pairs = jax.random.randint(length_key, (len(asked), 1), 1, 4)
    length = jnp.where(is_taste, 2 * pairs, PROMPT)
    place = jnp.arange(RESPONSE)
    return jnp.where(place < length, letters, jnp.where(place == length, EOS, PAD))


def judged(is_taste: Array, asked: Array, said: Array) -> tuple[Array, Array]:
    """[B] quality of answers, a share of letters, and [B] whether they have the task's form."""
    place = jnp.arange(RESPONSE)
    ends = jnp.any(said == EOS, axis=1)
    length = jnp.argmax(said == EOS, axis=1)
    inside = place < length[:, None]
    is_right = said[:, :PROMPT] == asked[:, ::-1]
    is_word = ends & (length == PROMPT) & jnp.all(~inside | (said < CONSONANTS), axis=1)
    is_vowel = (said >= CONSONANTS) & (said < LETTERS)
    is_pair = jnp.all(~inside | ((is_vowel == place % 2) & (said < LETTERS)), axis=1)
    is_pair &= ends & (length % 2 == 0) & (length > 0)
    is_liked = inside & (said % 2 == asked[:, :1] % 2)
    liked = jnp.sum(is_liked, axis=1) / jnp.maximum(length, 1)
    quality = jnp.where(is_taste, liked, jnp.mean(is_right, axis=1))
    return quality, jnp.where(is_taste, is_pair, is_word)


def rows(asked: Array, said: Array) -> tuple[Array, Array, Array]:
    """tokens, attention_mask and response_mask of prompts with answers, [B, PROMPT + RESPONSE]."""
    tokens = jnp.concatenate([asked, said], axis=1)
    text = (tokens != PAD).astype(jnp.int32)
    return tokens, text, text.at[:, :PROMPT].set(0)


def pairs(is_taste: Array, key: Array, num: int, held_out: bool) -> Comparisons:
    """The best and the worst of four noisy answers; a pair of equal ones weighs nothing."""
    prompt_key, answer_key = jax.random.split(key)
    asked = prompts(prompt_key, num, held_out)
    four = jnp.repeat(asked, 4, axis=0)
    said = answers(is_taste, answer_key, four, 0.5)
    quality = judged(is_taste, four, said)[0].reshape(num, 4)
    order = jnp.stack([jnp.argmax(quality, axis=1), jnp.argmin(quality, axis=1)], axis=1)
    both = jnp.take_along_axis(said.reshape(num, 4, RESPONSE), order[..., None], axis=1)
    weight = (jnp.max(quality, axis=1) > jnp.min(quality, axis=1)).astype(jnp.float32)
    parts = rows(jnp.repeat(asked, 2, axis=0), both.reshape(2 * num, RESPONSE))
    return Comparisons(*(x.reshape(num, 2, -1) for x in parts), weight=weight)


def feedback(pairs: Comparisons) -> Feedback:
    """One answer of each pair, the better and the worse one in turn."""
    desirable = jnp.arange(len(pairs.tokens)) % 2 == 0
    taken = jnp.where(desirable, 0, 1)[:, None, None]
    fields = (pairs.tokens, pairs.attention_mask, pairs.response_mask)
    texts = (jnp.take_along_axis(x, taken, axis=1)[:, 0] for x in fields)
    return Feedback(*texts, desirable, weight=pairs.weight)


def begin(size: str, sizes: Sizes, is_taste: Array, key: Array) -> Params:
    """Random weights, trained on noisy answers."""
    model = network(size)
    policy_fn = models.policy_fn(model)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.2 / SIZES[size][0], sizes.first_steps))

    def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
        prompt_key, answer_key = jax.random.split(key)
        asked = prompts(prompt_key, 2 * sizes.batch_size, held_out=False)
        batch = Demonstrations(*rows(asked, answers(is_taste, answer_key, asked, 0.5)))
        state, _ = sft.update(
            state, batch, None, policy_fn=policy_fn, optimizer=optimizer, config=sft.Config()
        )
        return state, None

    init_key, train_key = jax.random.split(key)
    state = TrainState.create(model.init(init_key), optimizer)
    return jax.lax.scan(step, state, jax.random.split(train_key, sizes.first_steps))[0].params


def trainer(part: Part, sizes: Sizes) -> Callable[..., dict[str, Array]]:
    """``train(is_taste, start, key, rate)``: a whole run as a pure function, with its measures."""
    model = network(part.size)
    num_steps = part.longer * sizes.steps
    settings = replace(getattr(RunConfig(), part.stage).optimizer, learning_rate=1.0)
    stage = part.stage

    def train(is_taste: Array, start: Params, key: Array, rate: Array) -> dict[str, Array]:
        init_key, train_key, exam_key = jax.random.split(key, 3)
        # Adam's step is proportional to the rate, so that the rate may be an array.
        optimizer = optax.chain(make_optimizer(settings, num_steps), optax.scale(rate))
        if stage == "sft" and not part.is_adapter:
            start = model.init(init_key)
        first: Params = start
        if stage == "reward_model":
            first = models.add_head(init_key, start, "score")
        if part.is_adapter:
            heads = {name: first[name] for name in first if name in lora.HEADS}
            first = lora.init(init_key, start, RANK) | heads

        def whole(params: Params) -> Params:
            return lora.attach(start, params) if part.is_adapter else params

        def bound(fn: Any) -> Any:
            return lora.bind(fn, start) if part.is_adapter else fn

        policy_fn = bound(models.policy_fn(model))
        score_fn = bound(models.score_fn(model))
        reference = Partial(models.policy_fn(model), start)

        def sampled(params: Params, key: Array, num: int, group: int, held_out: bool) -> Any:
            prompt_key, sample_key = jax.random.split(key)
            asked = jnp.repeat(prompts(prompt_key, num // group, held_out), group, axis=0)
            batch = sampling.generate(
                model, whole(params), asked, jnp.ones_like(asked), sample_key, config=SAMPLER
            )
            return batch, *judged(is_taste, asked, batch.tokens[:, PROMPT:])

        def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
            data_key, update_key = jax.random.split(key)
            update = functools.partial(_UPDATES[stage], state, optimizer=optimizer)
            if stage == "sft":
                prompt_key, answer_key = jax.random.split(data_key)
                asked = prompts(prompt_key, sizes.batch_size, held_out=False)
                batch = Demonstrations(*rows(asked, answers(is_taste, answer_key, asked, 0.0)))
                return update(batch, None, policy_fn=policy_fn, config=sft.Config())[0], None
            if stage == "rl":
                batch, quality, has_form = sampled(
                    state.params, data_key, sizes.batch_size, rloo.Config().group_size, False
                )
                batch = rollout.rescore(
                    batch, state.params, policy_fn=policy_fn, ref_fn=reference
                ).replace(scores=quality * has_form)
                batch = batch.replace(rewards=rewards.kl_shaped(batch, rloo.kl_coef))
                return update(batch, update_key, policy_fn=policy_fn, config=rloo.Config())[0], None
            compared = pairs(is_taste, data_key, sizes.batch_size, held_out=False)
            if stage == "reward_model":
                config = reward_model.Config()
                return update(compared, None, score_fn=score_fn, config=config)[0], None
            if stage == "dpo":
                batch = dpo.with_reference(compared, reference)
                return update(batch, None, policy_fn=policy_fn, config=dpo.Config())[0], None
            batch = kto.with_reference(feedback(compared), reference)
            return update(batch, update_key, policy_fn=policy_fn, config=kto.Config())[0], None

        state = TrainState.create(first, optimizer)
        state, _ = jax.lax.scan(step, state, jax.random.split(train_key, num_steps))
        data_key, sample_key = jax.random.split(exam_key)
        if stage == "reward_model":
            exam = pairs(is_taste, data_key, sizes.held_out, held_out=True)
            _, metrics = reward_model.loss(
                state.params, exam, None, score_fn=score_fn, config=reward_model.Config()
            )
            names = {"loss": "reward_model/loss", "accuracy": "reward_model/accuracy"}
            return {name: metrics[metric].value for name, metric in names.items()}
        _, quality, has_form = sampled(state.params, sample_key, sizes.held_out, 1, True)
        found = {"score": jnp.mean(quality * has_form), "form": jnp.mean(has_form)}
        if stage == "sft":
            asked = prompts(data_key, sizes.held_out, held_out=True)
            exam = Demonstrations(*rows(asked, answers(is_taste, sample_key, asked, 0.0)))
            mean, _ = sft.loss(state.params, exam, None, policy_fn=policy_fn, config=sft.Config())
            found["loss"] = mean.value
        return found

    return train


_UPDATES = {"sft": sft.update, "reward_model": reward_model.update, "dpo": dpo.update}
_UPDATES |= {"kto": kto.update, "rl": rloo.update}


def rates_of(part: Part, sizes: Sizes) -> np.ndarray:
    """The rates of a part, in steps of sqrt(10): adapters' are higher than those of full training,
    and a larger network's lower.
    """
    low, high = RANGES[part.stage]
    shift = 0.5 * part.is_adapter - 0.5 * (part.size != "0.1 M")
    exponents = np.arange(low + shift, min(high + shift, 0) + 0.25, 0.5)
    if sizes.rates is not None:
        middle = (len(exponents) - sizes.rates + 1) // 2
        exponents = exponents[middle : middle + sizes.rates]
    return np.float32(10.0**exponents)


def measure(part: Part, sizes: Sizes) -> list[results.Row]:
    """Trains at all rates with all seeds."""
    rates = rates_of(part, sizes)
    is_taste = np.bool_(part.task == "taste")
    starts = _starts(part.size, sizes)(is_taste)
    found = jax.device_get(_runs(part._replace(task=""), sizes)(is_taste, starts, rates))
    table = []
    for metric, values in found.items():
        for (number, seed), value in np.ndenumerate(values.reshape(len(rates), sizes.seeds)):
            name = f"{metric} at {rates[number]:.1g}"
            table.append(results.row(part.name, seed, part.longer * sizes.steps, name, value))
    return table


@functools.cache
def _starts(size: str, sizes: Sizes) -> Callable[[Array], Params]:
    """[seeds, ...] weights that the stages of a task start from."""

    def begin_all(is_taste: Array) -> Params:
        keys = jax.vmap(jax.random.key)(1000 + jnp.arange(sizes.seeds))
        return jax.lax.map(functools.partial(begin, size, sizes, is_taste), keys)

    return jax.jit(begin_all)


@functools.cache
def _runs(part: Part, sizes: Sizes) -> Callable[..., dict[str, Array]]:
    """A part's measures [rates * seeds], of either task."""
    train = trainer(part, sizes)

    def run_all(is_taste: Array, starts: Params, rates: Array) -> dict[str, Array]:
        def lane(inputs: tuple[Array, Array]) -> dict[str, Array]:
            rate, seed = inputs
            start = jax.tree.map(lambda x: x[seed], starts)
            return train(is_taste, start, jax.random.key(seed), rate)

        seeds = jnp.tile(jnp.arange(sizes.seeds), len(rates))
        return jax.lax.map(lane, (jnp.repeat(rates, sizes.seeds), seeds))

    return jax.jit(run_all)


def parts() -> list[Part]:
    """All parts, the most telling ones first."""
    stages = ("dpo", "rl", "sft", "kto", "reward_model")
    return [
        *(Part("0.1 M", False, stage, "reverse") for stage in stages),
        *(Part("0.1 M", True, stage, "reverse") for stage in stages),
        *(Part("0.1 M", False, stage, "taste") for stage in stages),
        *(Part("1 M", False, stage, "reverse") for stage in stages),
        *(Part("0.1 M", False, stage, "reverse", 4) for stage in ("dpo", "rl", "sft")),
        *(Part("1 M", False, stage, "taste") for stage in ("dpo", "kto", "rl")),
        *(Part("1 M", True, stage, "reverse") for stage in stages),
    ]


def describe(table: list[results.Row]) -> str:
    """One line: each metric by rate, means over seeds."""
    lines: dict[str, list[str]] = {}
    for row in results.over_seeds(table):
        metric, _, rate = row["metric"].partition(" at ")
        if not rate.endswith(results.EDGES):
            lines.setdefault(metric, []).append(f"{rate}: {row['value']:.3f}")
    return "; ".join(f"{metric} {', '.join(values)}" for metric, values in lines.items())


def main(
    out: Path,
    only: str = "",
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL,
) -> None:
    """Measures each part that the file does not have yet.

    Args:
        out: the file of the results, a table; it grows with each part.
        only: parts whose name has this text.
        sizes: of the experiment.
    """
    before = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": [], "seconds": 0}
    table, seconds = before["rows"], before["seconds"]
    done = {row["variant"] for row in table}
    for part in parts():
        if part.name in done or only not in part.name:
            continue
        began = time.monotonic()
        found = measure(part, sizes)
        table += found + results.over_seeds(found)
        seconds += time.monotonic() - began
        logger.info(f"{part.name}, {time.monotonic() - began:.0f} s: {describe(found)}")
        command = "python experiments/rates.py --out rates.json"
        results.write(out, command, seconds, table, sizes=sizes._asdict())


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
