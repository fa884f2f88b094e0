"""The pairs that people compare: sampled by one run or two, or from a file; and which of them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import chat, conversation, formats
from rlhf_jax.data.rows import Message, Messages, Record
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.inference import asking
from rlhf_jax.inference.labelling.settings import Config
from rlhf_jax.inference.labelling.store import Pair
from rlhf_jax.models import hf
from rlhf_jax.runs import manifest


class Source(NamedTuple):
    """Pairs to be put into a store."""

    settings: dict[str, Any]  # all that determines them
    num_pairs: int  # that will be shown, as far as it is known before they are sampled
    batches: Callable[[int], Iterator[list[Pair]]]
    """The pairs from a number on, some at a time; none at a time while the pairs are sampled from
    which they will be chosen."""


def open_source(folder: str | None, config: Config) -> Source:
    """The pairs of ``--answers``, or of the run.

    Raises:
        UserError: a run, a file or a row is wrong.
    """
    is_random = config.choose == "random"
    count = config.count if is_random else None
    if config.answers is not None:
        if folder is not None:
            raise UserError(f"--answers needs no run; leave {folder} out, or give --prompts")
        settings, num_pairs, pair = _from_file(config.answers, config.seed, count)
    else:
        if folder is None:
            raise UserError(
                "name the folder of a run: rlhf-jax label FOLDER --prompts FILE --out FILE"
            )
        settings, num_pairs, pair = _from_runs(folder, config, count)
    if is_random:
        return Source(
            settings, num_pairs, lambda start: ([pair(i)] for i in range(start, num_pairs))
        )
    models = [hf.find_folder(hf.model_folder(reward)) for reward in config.reward]
    settings |= {
        "choose": config.choose,
        "reward": [manifest.fingerprint(model) for model in models],
        "random_share": config.random_share,
        "count": config.count,
    }

    def batches(start: int) -> Iterator[list[Pair]]:
        if start:  # they were added together
            return
        pool = []
        for number in range(num_pairs):
            pool.append(pair(number))
            yield []
        chosen = choose(
            pool,
            config.choose,
            config.reward,
            count=config.count,
            random_share=config.random_share,
            seed=config.seed,
        )
        yield [one._replace(number=number) for number, one in enumerate(chosen)]

    return Source(settings, min(config.count or num_pairs, num_pairs), batches)


_Pairs = tuple[dict[str, Any], int, Callable[[int], Pair]]
"""All that determines pairs, their number, and each of them."""


def _from_runs(folder: str, config: Config, count: int | None) -> _Pairs:
    """A batch is sampled when its first pair is needed."""
    asking.start(config)
    policies = [
        asking.open_policy(name, config, batch_size=config.batch_size)
        for name in filter(None, (folder, config.against))
    ]
    data = asking.read(policies[0], config, config.seed)
    rows = data.rows[:count]
    settings = asking.described(folder, policies[0], config, data)
    if config.against is not None:
        settings["against"] = asking.described(config.against, policies[1], config, data)
    settings["count"] = len(rows)
    num_samples = 3 - len(policies)
    asked = []
    for policy in policies:
        template = chat.template_of(policy.tokenizer, policy.template)
        own = []  # the rows with messages in the policy's own chat template
        for row in rows:
            if row.messages:
                row = dataclasses.replace(row, prompt=template.prompt_of(row))
            own.append(row)
        asked.append(policy.ask(own, num_samples))

    @functools.lru_cache(maxsize=2)
    def batch(start: int) -> list[tuple[str, ...]]:
        columns: list[list[str]] = []
        for policy, prompts in zip(policies, asked, strict=True):
            texts, _ = policy.sample(prompts.part(start, start + config.batch_size), config.seed)
            columns += [texts[i::num_samples] for i in range(num_samples)]
        return list(zip(*columns, strict=True))

    def pair(number: int) -> Pair:
        place = number % config.batch_size
        prompt = asking.as_given(rows[number], policies[0].tokenizer)
        return Pair(number, prompt, list(batch(number - place)[place]))

    return settings, len(rows), pair


def _from_file(name: str, seed: int, count: int | None) -> _Pairs:
    loaded = formats.load(None, [name])
    pairs = [_pair(number, record) for number, record in enumerate(loaded.records)][:count]
    if not pairs:
        raise UserError(f"{name}: holds no rows")
    settings = {"answers": loaded.sources[name].fingerprint, "seed": seed, "count": len(pairs)}
    return settings, len(pairs), lambda number: pairs[number]


def _pair(number: int, record: Record) -> Pair:
    row = record.fields("prompt, responses")
    is_pair = "responses" not in row
    record.require(("prompt", *formats.PAIR) if is_pair else ("prompt",))
    answers = [row[key] for key in formats.PAIR] if is_pair else row["responses"]
    is_two = isinstance(answers, list) and len(answers) == 2
    record.expect(is_two and all(isinstance(text, str) for text in answers), "expected two texts")
    asked: str | Messages
    if conversation.is_chat(row, "prompt"):
        asked = conversation.asked(record, "prompt")
        is_alone = all(map(conversation.is_system, asked))
        record.expect(not is_alone, "no stage trains on a pair behind a system's message alone")
    else:
        asked = record.text("prompt")
    texts = [record.checked("an answer", text) for text in answers]
    chosen_by = row.get("chosen_by", "random")
    record.expect(isinstance(chosen_by, str), "'chosen_by' must be a string", chosen_by)
    return Pair(number, asked, texts, chosen_by)


def choose(
    pool: Sequence[Pair],
    how: str,
    models: Sequence[str],
    *,
    count: int | None,
    random_share: float,
    seed: int,
) -> list[Pair]:
    """The pairs to label, in an order drawn from the seed.

    ``random_share`` of them are drawn from all pairs; the rest are those on which the ``models``,
    folders of reward models, disagree most about which answer is better, or (``how`` is close)
    whose scores are closest.
    """
    useful = [pair for pair in pool if not pair.is_useless]
    if not useful:
        return []
    count = min(count or len(useful), len(useful))
    margins = np.stack([_margins(folder, useful) for folder in models])
    logger.info(f"{how}: {count} of {len(useful)} pairs are chosen")
    return chosen_by_margins(
        useful, margins, how, count=count, random_share=random_share, seed=seed
    )


def chosen_by_margins(
    pairs: Sequence[Pair],
    margins: np.ndarray,
    how: str,
    *,
    count: int,
    random_share: float,
    seed: int,
) -> list[Pair]:
    """As `choose`, from the difference [models, pairs] of the two answers' scores.

    Models disagree by the standard deviation of P(the first answer is better), which is the sigmoid
    of the difference of its scores (Bradley & Terry 1952).
    """
    rng = np.random.default_rng(seed)
    num_random = round(random_share * count)
    at_random = set(rng.permutation(len(pairs))[:num_random].tolist())
    if how == "close":
        wanted = np.abs(margins.mean(axis=0))
    else:
        wanted = -(1 / (1 + np.exp(-margins))).std(axis=0)
    rest = [i for i in np.argsort(wanted, kind="stable").tolist() if i not in at_random]
    kept = [(i, "random") for i in at_random]
    kept += [(i, how) for i in rest[: count - num_random]]
    order = rng.permutation(len(kept)).tolist()
    return [pairs[i]._replace(chosen_by=why) for i, why in (kept[place] for place in order)]


def _margins(folder: str, pairs: Sequence[Pair]) -> np.ndarray:
    """[pairs] the reward model's score of the first answer minus that of the second."""
    judge = LanguageModel.load(hf.model_folder(folder))
    if "score" not in judge.params:
        raise UserError(f"{folder}: this model has no score head; give a reward model's folder")
    asked: list[list[Message]] = [
        pair.prompt if isinstance(pair.prompt, list) else [{"role": "user", "content": pair.prompt}]
        for pair in pairs
    ]
    columns = [
        judge.score_texts(asked, [pair.answers[place] for pair in pairs]) for place in range(2)
    ]
    difference: np.ndarray = columns[0] - columns[1]
    return difference
