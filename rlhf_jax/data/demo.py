"""A generated assistant corpus in the three files of the pipeline, with held-out prompts and pairs to judge by.

Deterministic by seed on every platform: all choices come from ``random.Random(text).random()``, whose sequence Python
keeps the same from version to version.
"""

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_jax.data import demo_language as language
from rlhf_jax.data import rubric
from rlhf_jax.data.demo_language import Topic
from rlhf_jax.errors import UserError

T = TypeVar("T")
Row = dict[str, Any]

CATEGORIES = tuple(language.TOPICS)


def write(
    folder: str | os.PathLike[str],
    seed: int = 0,
    *,
    num_demonstrations: int = 2000,
    num_pairs: int = 3000,
    num_prompts: int = 600,
    num_heldout_prompts: int = 144,
    num_heldout_pairs: int = 300,
    label_noise: float = 0.1,
    shuffle_labels: bool = False,
) -> None:
    """Writes the corpus, each file a JSON list with one row on a line.

    ``sft_data.json`` {prompt, response}; ``preference_data.json`` {prompt, chosen, rejected}; ``prompts.json`` and
    ``heldout_prompts.json`` {prompt, category, topic}; ``heldout_preference_data.json``, free of noise. The phrasings
    of the held-out files are in no other file.

    Args:
      label_noise: probability that chosen and rejected of a training pair are exchanged.
      shuffle_labels: exchanges them by coin flip instead, so that the labels mean nothing: a negative control.

    Raises:
      UserError: for more distinct prompts than the language has, or a label_noise outside [0, 1].
    """
    if not 0 <= label_noise <= 1:
        raise UserError(f"label_noise is a probability, got {label_noise}")
    noise = 0.5 if shuffle_labels else label_noise
    training, heldout = language.PHRASINGS, language.HELDOUT_PHRASINGS
    files = {
        "sft_data.json": demonstrations(num_demonstrations, training, _generator(seed, "demonstrations")),
        "preference_data.json": pairs(num_pairs, training, noise, _generator(seed, "pairs")),
        "prompts.json": prompts(num_prompts, training, _generator(seed, "prompts")),
        "heldout_prompts.json": prompts(num_heldout_prompts, heldout, _generator(seed, "heldout prompts")),
        "heldout_preference_data.json": pairs(num_heldout_pairs, heldout, 0.0, _generator(seed, "heldout pairs")),
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (path / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def demonstrations(n: int, phrasings: dict[str, tuple[str, ...]], generator: random.Random) -> list[Row]:
    """Rows {prompt, response} of mixed quality; each topic has its due share of every quality."""
    per_topic = len(CATEGORIES) * len(language.TOPICS[CATEGORIES[0]])
    rounds = -(-n // per_topic)
    # Stratified: the rounds of a topic visit its wordings in proportion to their weights, in an order of their own,
    # so that no topic happens to have mostly good demonstrations.
    orders: dict[tuple[str, str], list[int]] = {}
    rows = []
    for i, (category, topic) in zip(range(n), _subjects(), strict=False):
        order = orders.setdefault((category, topic.phrase), _shuffled(range(rounds), generator))
        quality = (order[i // per_topic] + generator.random()) / rounds
        prompt = language.fill(_pick(phrasings[category], generator), topic)
        rows.append({"prompt": prompt, "response": _response(category, topic, quality, generator)})
    return _shuffled(rows, generator)


def pairs(n: int, phrasings: dict[str, tuple[str, ...]], noise: float, generator: random.Random) -> list[Row]:
    """Rows {prompt, chosen, rejected}: the response with the higher rubric score is chosen, but for the noise."""
    rows = []
    for _, (category, topic) in zip(range(n), _subjects(), strict=False):
        judged = {"category": category, "topic": topic.phrase}
        better = worse = ""
        while rubric.score(judged, better) <= rubric.score(judged, worse):
            better, worse = (_response(category, topic, generator.random(), generator) for _ in range(2))
        chosen, rejected = (worse, better) if generator.random() < noise else (better, worse)
        prompt = language.fill(_pick(phrasings[category], generator), topic)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return _shuffled(rows, generator)


def prompts(n: int, phrasings: dict[str, tuple[str, ...]], generator: random.Random) -> list[Row]:
    """Distinct rows {prompt, category, topic}, the categories in equal parts."""
    by_category = [
        _shuffled(
            [
                {"prompt": language.fill(phrasing, topic), "category": category, "topic": topic.phrase}
                for topic in language.TOPICS[category]
                for phrasing in phrasings[category]
            ],
            generator,
        )
        for category in CATEGORIES
    ]
    rows = [row for together in zip(*by_category, strict=True) for row in together]
    if n > len(rows):
        raise UserError(f"the demo language has {len(rows)} distinct prompts of this kind, {n} asked for")
    return _shuffled(rows[:n], generator)


def _response(category: str, topic: Topic, quality: float, generator: random.Random) -> str:
    """A response; ``quality`` in [0, 1) picks the wording by the weights."""
    for wording in language.WORDINGS[category]:
        quality -= wording.weight
        if quality < 0:
            break
    if wording.off_topic:
        topic = _pick([other for other in language.TOPICS[category] if other != topic], generator)
    text = language.fill(wording.template, topic)
    closes = wording.may_close and generator.random() < language.CLOSE_SHARE
    return f"{text} {_pick(language.CLOSES, generator)}" if closes else text


def _subjects() -> Iterator[tuple[str, Topic]]:
    """Categories and topics in turn, for ever."""
    while True:
        for i in range(len(language.TOPICS[CATEGORIES[0]])):
            for category in CATEGORIES:
                yield category, language.TOPICS[category][i]


def _generator(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed}/{name}")


def _pick(items: Sequence[T], generator: random.Random) -> T:
    return items[int(generator.random() * len(items))]


def _shuffled(items: Sequence[T], generator: random.Random) -> list[T]:
    keys = [generator.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
