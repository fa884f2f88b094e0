"""How KTO bears few desirable answers, or few undesirable ones: weights and rates on two tasks.

    python experiments/kto_imbalance.py --out kto_imbalance.json

A small network learns a language from demonstrations, some of which are good. Then KTO gets 1,500
other answers, of which 300, 750 or 1,200 are good, and the policy answers prompts that it has not
seen. A rule, which labels the data too, says of an answer whether it is good, and whether it is of
the language at all. Weights, rates and seeds are lanes of one program (``jax.vmap``).

With ``totals 1.5`` desirable answers weigh 1.5 times as much as undesirable ones in all. This was
chosen on the task ``letters`` with 300 good answers and other seeds; the task ``lengths`` and the
other numbers were kept for the end.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
import tyro
from jax import Array
from jax.tree_util import Partial

from rlhf_jax import Demonstrations, Feedback, TrainState, cli, kto, models, ops, sampling, sft
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import logger
from rlhf_jax.types import Params

BATCH_SIZE = 32
NUM_EPOCHS = 2


class Text(NamedTuple):
    prompt: str
    answer: str


class Task(NamedTuple):
    """A language, and what is good in it."""

    draw: Callable[[int, int], list[Text]]  # (number, seed)
    judge: Callable[[Text], tuple[bool, bool]]  # is it well-formed, is it good


def letters(num: int, seed: int) -> list[Text]:
    """Answers have a bracket, six to ten letters and a mark; seven letters of ten are of the group
    that the prompt's first letter names.
    """
    rng = Random(f"letters {seed}")
    found = []
    for _ in range(num):
        prompt = "".join(rng.choices("abcdefgh", k=5))
        groups = ("abcd", "efgh") if prompt[0] in "abcd" else ("efgh", "abcd")
        said = [rng.choice(groups[rng.random() > 0.7]) for _ in range(rng.randint(6, 10))]
        found.append(Text(prompt, rng.choice("([{") + "".join(said) + rng.choice(".!?")))
    return found


def judge_letters(text: Text) -> tuple[bool, bool]:
    """Good: at least 85% of the letters are of the group."""
    said = text.answer[1:-1]
    is_formed = text.answer[:1] in ("(", "[", "{") and text.answer[-1:] in (".", "!", "?")
    is_formed = is_formed and 6 <= len(said) <= 10 and set(said) <= set("abcdefgh")
    group = "abcd" if text.prompt[0] in "abcd" else "efgh"
    return is_formed, is_formed and sum(map(group.__contains__, said)) >= 0.85 * len(said)


def lengths(num: int, seed: int) -> list[Text]:
    """Answers have letters and a mark; a digit in the prompt says how many letters, which holds in
    one answer of four.
    """
    rng = Random(f"lengths {seed}")
    found = []
    for _ in range(num):
        asked = rng.randint(3, 6)
        said = asked if rng.random() < 0.25 else asked + rng.choice((-2, -1, 1, 2))
        prompt = rng.choice("xyz") + str(asked) + rng.choice("xyz")
        found.append(Text(prompt, "".join(rng.choices("lmnr", k=said)) + rng.choice(".!?")))
    return found


def judge_lengths(text: Text) -> tuple[bool, bool]:
    """Good: as many letters as asked for."""
    said = text.answer[:-1]
    is_formed = text.answer[-1:] in (".", "!", "?") and 1 <= len(said) <= 8
    is_formed = is_formed and set(said) <= set("lmnr")
    return is_formed, is_formed and len(said) == int(text.prompt[1])


TASKS = {"letters": Task(letters, judge_letters), "lengths": Task(lengths, judge_lengths)}


class Sizes(NamedTuple):
    """How much is trained."""

    demonstrations: int = 300  # steps of supervised training
    rows: int = 1500
    rare: int = 300  # of the rarer kind
    asked: int = 128  # prompts, and held-out rows of each kind
    seeds: int = 12
    rates: tuple[float, ...] = (3e-4,)


FULL = Sizes()


class Lane(NamedTuple):
    """What one run of KTO has for itself."""

    rate: float
    desirable_weight: float
    undesirable_weight: float
    beta: float = 0.1
    least: float = 0.0  # of the reference point; -inf: it is not clamped
    in_proportion: float = 0.0  # 1: each batch has both kinds in their proportion


FIGURES = ("accuracy", "desirable log-ratio", "undesirable log-ratio", "reference point", "KL")


GAIN = "good minus weights 1's"


class Bench:
    """A task's arrays and programs."""

    def __init__(self, task: Task, sizes: Sizes) -> None:
        self.task = task
        self.sizes = sizes
        texts = task.draw(2000, 0)
        self.asked = [text.prompt for text in task.draw(sizes.asked, 1)]
        self.tokenizer = tokenizers.characters([part for text in texts for part in text])
        prompts = self.tokenizer.encode_batch([*self.asked, *(text.prompt for text in texts)])
        answers = self.tokenizer.encode_batch([text.answer for text in texts])
        self.start = max(map(len, prompts))
        room = max(map(len, answers)) + 4
        size = {"hidden_size": 32, "num_layers": 1, "num_heads": 4}
        network = models.GPT2Config(self.tokenizer.vocab_size, self.start + room, **size)
        self.model = models.build(network)
        self.policy_fn = models.policy_fn(self.model)
        ids = {"eos_id": self.tokenizer.eos_id, "pad_id": self.tokenizer.pad_id}
        self.sampler = sampling.SamplingConfig(room, **ids)
        self.questions = self.arrays([Text(prompt, "") for prompt in self.asked])
        self.begin = jax.jit(self._begin)
        self.train = jax.jit(jax.vmap(self._train, (0, 0, 0, None, None, None)))

    def arrays(self, texts: list[Text]) -> Demonstrations:
        """[N, T]: all prompts end, and all answers begin, at one column."""
        shape = (len(texts), self.model.config.max_length)
        tokens = np.full(shape, self.tokenizer.pad_id, np.int32)
        is_text, is_answer = np.zeros((2, *shape), np.int32)
        prompts = self.tokenizer.encode_batch([text.prompt for text in texts])
        answers = self.tokenizer.encode_batch([text.answer for text in texts])
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = [*prompt, *answer, self.tokenizer.eos_id]
            columns = slice(self.start - len(prompt), self.start + len(answer) + 1)
            tokens[row, columns] = ids
            is_text[row, columns] = 1
            is_answer[row, self.start : columns.stop] = 1
        return Demonstrations(tokens, is_text, is_answer)

    def feedback(self, num_good: int, num_bad: int, seed: int) -> Feedback:
        """[N, T] answers of both kinds, the good ones first."""
        found: dict[bool, list[Text]] = {True: [], False: []}
        for part in itertools.count():
            for text in self.task.draw(2000, 1000 * seed + part):
                found[self.task.judge(text)[1]].append(text)
            if len(found[True]) >= num_good and len(found[False]) >= num_bad:
                break
        rows = self.arrays([*found[True][:num_good], *found[False][:num_bad]])
        is_good = np.arange(num_good + num_bad) < num_good
        return Feedback(rows.tokens, rows.attention_mask, rows.response_mask, is_good)

    def _begin(self, rows: Demonstrations, numbers: Array, key: Array) -> Params:
        """A network that has seen demonstrations."""
        optimizer = optax.adam(3e-3)

        def step(state: TrainState, numbers: Array) -> tuple[TrainState, None]:
            batch = jax.tree.map(lambda x: x[numbers], rows)
            options: Any = {"policy_fn": self.policy_fn, "optimizer": optimizer}
            return sft.update(state, batch, None, config=sft.Config(), **options)[0], None

        state = TrainState.create(self.model.init(key), optimizer)
        return jax.lax.scan(step, state, numbers)[0].params

    def _train(
        self, lane: Lane, rows: Feedback, numbers: Array, begun: Params, exam: Feedback, key: Array
    ) -> tuple[Array, Array]:
        """A run: FIGURES, and the tokens of answers to the questions."""
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adam(lambda step: lane.rate * (1 - step / len(numbers))),
        )
        reference = Partial(self.policy_fn, begun)
        options: Any = {"policy_fn": self.policy_fn}
        options["config"] = SimpleNamespace(**lane._asdict(), kind="kto")

        def step(state: TrainState, numbers: Array) -> tuple[TrainState, Array]:
            batch = kto.with_reference(jax.tree.map(lambda x: x[numbers], rows), reference)
            others: Any = batch.mismatched
            log_probs = ops.response_log_probs(self.policy_fn, state.params, others)
            point = jnp.maximum(jnp.mean(log_probs - others.ref_log_probs), lane.least)
            batch = batch.replace(mismatched=None, reference_point=jnp.full(len(numbers), point))
            gradient = jax.grad(lambda params: kto.loss(params, batch, None, **options)[0].value)
            gradients = gradient(state.params)
            changes, moments = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, changes)
            return state.replace(params=params, opt_state=moments), point

        state, points = jax.lax.scan(step, TrainState.create(begun, optimizer), numbers)
        point = jnp.mean(points[-len(points) // 4 :])
        exam = kto.with_reference(exam, reference)
        exam = exam.replace(reference_point=jnp.full(exam.desirable.shape, point))
        measured = kto.loss(state.params, exam, None, **options)[1]
        names = ("accuracy", "desirable_log_ratio", "undesirable_log_ratio", "reference_point")
        figures = [measured[f"kto/{name}"].value for name in names]
        asked = (x[:, : self.start] for x in (self.questions.tokens, self.questions.attention_mask))
        said = sampling.generate(self.model, state.params, *asked, key, config=self.sampler)
        ratios = (
            ops.response_log_probs(self.policy_fn, params, said) for params in (state.params, begun)
        )
        kl = jnp.mean(next(ratios) - next(ratios))
        return jnp.stack([*figures, kl]), said.tokens[:, self.start :]

    def scores(self, answers: np.ndarray) -> dict[str, float]:
        """Of tokens [N, R]: the shares of answers that are well-formed, and that are good."""
        judged = []
        for prompt, ids in zip(self.asked, answers.tolist(), strict=True):
            ends = self.tokenizer.eos_id in ids
            text = self.tokenizer.decode(ids[: ids.index(self.tokenizer.eos_id)]) if ends else ""
            judged.append(self.task.judge(Text(prompt, text)) if ends else (False, False))
        formed, good = np.mean(judged, axis=0)
        return {"well-formed": formed, "good": good}


def order(num_good: int, num_bad: int, seed: int, in_proportion: bool) -> np.ndarray:
    """[steps, BATCH_SIZE] numbers of rows, the good ones first: shuffled, or with both kinds in
    their proportion in each batch.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(NUM_EPOCHS):
        numbers = rng.permutation(num_good + num_bad)
        if in_proportion:
            places = [(rng.permutation(num) + rng.random()) / num for num in (num_good, num_bad)]
            numbers = np.argsort(np.concatenate(places))
        batches = numbers[: len(numbers) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
        found.append(rng.permuted(rng.permutation(batches), axis=1))
    return np.concatenate(found)


def variants(num_good: int, num_bad: int, rates: tuple[float, ...], why: bool) -> dict[str, Lane]:
    """The runs by their names: weights and rates, and what else may be the cause."""
    ratio = num_bad / num_good
    totals = {f"totals {times:g}": times * ratio for times in (1.0, 1.5)}
    weights = {"weights 1": 1.0} | {name: value for name, value in totals.items() if value != 1}
    found = {"before": Lane(0.0, 1.0, 1.0)}
    for (name, desirable), rate in itertools.product(weights.items(), rates):
        found[f"{name}, {rate:g}"] = Lane(rate, max(desirable, 1.0), max(1 / desirable, 1.0))
    for rate in rates if why else ():
        even, more = (found[f"totals {times}, {rate:g}"] for times in ("1", "1.5"))
        found |= {
            f"totals 1, not clamped, {rate:g}": even._replace(least=-np.inf),
            f"totals 1, in proportion, {rate:g}": even._replace(in_proportion=1.0),
            f"totals 1, beta 0.5, {rate:g}": even._replace(beta=0.5),
            f"totals 1.5, beta 0.5, {rate:g}": more._replace(beta=0.5),
        }
    return found


def measure(bench: Bench, name: str, seed: int) -> list[results.Row]:
    """The rows of all variants of a task, in one program."""
    sizes = bench.sizes
    demonstrations = bench.arrays(bench.task.draw(2000, seed))
    seen = np.random.default_rng(seed).integers(0, 2000, (sizes.demonstrations, 64))
    begun = bench.begin(demonstrations, seen, jax.random.key(seed))
    exam = bench.feedback(sizes.asked, sizes.asked, 200 + seed)
    runs: dict[str, Any] = {}
    for num_good in (sizes.rare, sizes.rows // 2, sizes.rows - sizes.rare):
        counts = (num_good, sizes.rows - num_good)
        data = bench.feedback(*counts, 100 + seed)
        why = name == "letters" and num_good == sizes.rare
        for variant, lane in variants(*counts, sizes.rates, why).items():
            numbers = order(*counts, seed, bool(lane.in_proportion))
            title = f"{name}, {num_good} of {sizes.rows} good: {variant}"
            runs[title] = (Lane(*np.float32(lane)), data, numbers)
    many = jax.tree.map(lambda *x: np.stack(x), *runs.values())
    figures, answers = jax.device_get(bench.train(*many, begun, exam, jax.random.key(seed)))
    rows = []
    for variant, values, said in zip(runs, figures, answers, strict=True):
        measured = dict(zip(FIGURES, values, strict=True)) | bench.scores(said)
        steps = len(many[2][0])
        rows += [results.row(variant, seed, steps, *item) for item in measured.items()]
    return rows


def gains(rows: list[results.Row]) -> list[results.Row]:
    """The share of good answers minus that with weights of 1, by the rows of single seeds."""
    good: dict[tuple[str, int], float] = {
        (row["variant"], row["seed"]): row["value"] for row in rows if row["metric"] == "good"
    }
    found = []
    for (variant, seed), value in good.items():
        cell, _, name = variant.partition(": ")
        plain = good.get((f"{cell}: weights 1, {name.rpartition(', ')[2]}", seed))
        if plain is not None and not name.startswith("weights 1"):
            found.append(results.row(variant, seed, rows[-1]["step"], GAIN, value - plain))
    return found


def main(out: Path, sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL) -> None:
    """Trains all variants, and says what came out. Tasks and seeds that the file has are passed
    over.

    Args:
        out: the file of the results, a table; it grows.
        sizes: of the experiment.
    """
    rows: list[results.Row] = []
    seconds = 0.0
    if out.exists():
        content = json.loads(out.read_text("utf-8"))
        rows = [row for row in content["rows"] if row["seed"] != results.ALL]
        rows = [row for row in rows if row["metric"] != GAIN]
        seconds = content["seconds"]
    started = time.monotonic() - seconds
    benches = {name: Bench(task, sizes) for name, task in TASKS.items()}
    for seed, name in itertools.product(range(10, 10 + sizes.seeds), TASKS):
        if any(row["variant"].startswith(name) and row["seed"] == seed for row in rows):
            continue
        rows += measure(benches[name], name, seed)
        command = "python experiments/kto_imbalance.py --out kto_imbalance.json"
        with_gains = [*rows, *gains(rows)]
        table = [*with_gains, *results.over_seeds(with_gains)]
        results.write(out, command, time.monotonic() - started, table, sizes=sizes._asdict())
        logger.info(f"{name}, seed {seed}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
