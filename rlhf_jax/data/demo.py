"""A generated assistant corpus in the three files of the pipeline, with held-out prompts and pairs
for evaluation.

Its small language is in demo.json. Three categories after Askell et al. 2021: helpful (how to do
something), harmless (requests to decline) and honest (questions without a known answer). Responses
repeat the topic of their prompt, so a two-layer model learns the language in seconds. Wordings of
different quality share their beginning, and the next word is most often that of a mediocre one:
greedy decoding of a model trained on the demonstrations is mediocre, sampling meets good responses.

Deterministic by seed on every platform: all choices come from ``random.Random(text).random()``,
whose sequence Python keeps the same from version to version.
"""

import itertools
import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

from rlhf_jax.errors import UserError, file_errors
from rlhf_jax.runs import writing

T = TypeVar("T")
Phrasings = dict[str, list[str]]
"""{category: templates of prompts}."""
Fields = dict[str, str]
"""A row of a file."""


class Topic(NamedTuple):
    """What a prompt is about and the two concrete details that a good response gives."""

    phrase: str
    first: str  # helpful: a step; harmless and honest: the reason
    second: str  # helpful: the next step; harmless: a safe alternative; honest: how to find out


class Wording(NamedTuple):
    """A response template; ``{t}``, ``{a}``, ``{b}`` are the parts of a topic, the prompt's own or
    another one.
    """

    template: str
    weight: float  # its share of the responses of its category
    score: float  # in [0, 1], its quality by which pairs are labelled
    off_topic: bool = False
    may_close: bool = True


_LANGUAGE = json.loads(Path(__file__).with_name("demo.json").read_text("utf-8"))
TOPICS = {
    category: [Topic(*topic) for topic in topics]
    for category, topics in _LANGUAGE["topics"].items()
}
PHRASINGS: Phrasings = _LANGUAGE["phrasings"]
# All of their words occur in the training phrasings.
HELDOUT_PHRASINGS: Phrasings = _LANGUAGE["heldout_phrasings"]
WORDINGS = {
    category: [Wording(**wording) for wording in some]
    for category, some in _LANGUAGE["wordings"].items()
}
CLOSES: list[str] = _LANGUAGE["closes"]
CLOSE_SHARE = 0.3  # of the responses that may close, so that the most frequent one does not
MAX_WORDS = 24
PER_EXTRA_WORD = 0.03  # the score that each word beyond the first 24 costs
LABEL_NOISE = 0.1  # probability that chosen and rejected of a training pair are exchanged
# The score of a courteous close, or of a reason from another topic that the prompt's topic shares.
DETAIL = 0.1

# Each file's number of rows, and the name of its random stream, which ends with the kind of its
# rows.
FILES = {
    "sft_data.json": (2000, "demonstrations"),
    "preference_data.json": (3000, "pairs"),
    "prompts.json": (600, "prompts"),
    "heldout_prompts.json": (144, "heldout prompts"),
    "heldout_preference_data.json": (300, "heldout pairs"),
}


def write(
    folder: str | Path,
    seed: int = 0,
    sizes: dict[str, int] | None = None,
    shuffle_labels: bool = False,
) -> None:
    """Writes the corpus, each file a JSON list with one row on a line.

    ``sft_data.json`` {prompt, response}; ``preference_data.json`` {prompt, chosen, rejected};
    ``prompts.json`` and ``heldout_prompts.json`` {prompt, category, topic};
    ``heldout_preference_data.json``, free of noise. No other file has the phrasings of the held-out
    files.

    Args:
      sizes: the number of rows of some of the files, by their names, in place of that in `FILES`.
      shuffle_labels: chosen and rejected of a training pair are exchanged by coin flip, so that the
        labels mean nothing (a negative control), instead of with probability `LABEL_NOISE`.

    Raises:
      UserError: for more distinct prompts than the language has, or a folder that cannot be
        written.
    """
    path = Path(folder)
    writing.check_writable(path)
    noise = 0.5 if shuffle_labels else LABEL_NOISE
    rows = sizes or {}
    texts = {
        name: file_text(name, seed=seed, size=rows.get(name), label_noise=noise) for name in FILES
    }
    with file_errors(path, "written"):
        if path.exists():
            writing.write_together({path / name: text for name, text in texts.items()})
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing.replacing(path) as new:
            writing.write_together({new / name: text for name, text in texts.items()})


def file_text(
    name: str,
    *,
    seed: int = 0,
    size: int | None = None,
    label_noise: float = LABEL_NOISE,
) -> str:
    """The text of one of the `FILES`, of ``size`` rows instead of its own number."""
    default_size, stream = FILES[name]
    kind = stream.removeprefix("heldout ")
    is_heldout = kind != stream
    phrasings = HELDOUT_PHRASINGS if is_heldout else PHRASINGS
    count = size or default_size
    generator = Random(f"{seed}/{stream}")
    if kind == "demonstrations":
        rows = _demonstrations(count, phrasings, generator)
    elif kind == "pairs":
        rows = _pairs(count, phrasings, generator, noise=0.0 if is_heldout else label_noise)
    else:
        rows = _prompts(count, phrasings, generator)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f"[\n{lines}\n]\n"


def fill(template: str, topic: Topic) -> str:
    """The template with the parts of the topic in it."""
    return template.format(t=topic.phrase, a=topic.first, b=topic.second)


def _demonstrations(
    n: int,
    phrasings: Phrasings,
    generator: Random,
) -> list[Fields]:
    """Rows {prompt, response} of mixed quality; each topic has its due share of every quality."""
    num_topics = sum(map(len, TOPICS.values()))
    rounds = -(-n // num_topics)
    rows = []
    # Stratified: the rounds of a topic visit its wordings in proportion to their weights, in an
    # order of their own, so that no topic happens to have mostly good demonstrations.
    orders: dict[tuple[str, str], list[int]] = {}
    for i, (category, topic) in zip(range(n), _subjects(), strict=False):
        order = orders.setdefault((category, topic.phrase), _shuffled(range(rounds), generator))
        quantile = (order[i // num_topics] + generator.random()) / rounds
        prompt = fill(_pick(phrasings[category], generator), topic)
        response, _ = _response(category, topic, quantile, generator)
        rows.append({"prompt": prompt, "response": response})
    return _shuffled(rows, generator)


def _pairs(
    n: int,
    phrasings: Phrasings,
    generator: Random,
    noise: float,
) -> list[Fields]:
    """Rows {prompt, chosen, rejected} by score; the other way with the probability ``noise``."""
    rows = []
    for _, (category, topic) in zip(range(n), _subjects(), strict=False):
        score = worse_score = 0.0
        while score <= worse_score:
            better, score = _response(category, topic, generator.random(), generator)
            worse, worse_score = _response(category, topic, generator.random(), generator)
        pair = [better, worse]
        if generator.random() < noise:
            pair.reverse()
        prompt = fill(_pick(phrasings[category], generator), topic)
        rows.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1]})
    return _shuffled(rows, generator)


def _prompts(
    n: int,
    phrasings: Phrasings,
    generator: Random,
) -> list[Fields]:
    """Distinct rows {prompt, category, topic}, the categories in equal parts."""
    by_category = []
    for category, topics in TOPICS.items():
        rows = []
        for topic, phrasing in itertools.product(topics, phrasings[category]):
            prompt = fill(phrasing, topic)
            rows.append({"prompt": prompt, "category": category, "topic": topic.phrase})
        by_category.append(_shuffled(rows, generator))
    rows = list(itertools.chain.from_iterable(zip(*by_category, strict=True)))
    if n > len(rows):
        raise UserError(
            f"the demo language has {len(rows)} distinct prompts of this kind, {n} asked for"
        )
    return _shuffled(rows[:n], generator)


def _response(
    category: str,
    topic: Topic,
    quantile: float,
    generator: Random,
) -> tuple[str, float]:
    """A response and its score; ``quantile`` in [0, 1) picks the wording by the weights."""
    for wording in WORDINGS[category]:
        quantile -= wording.weight
        if quantile < 0:
            break
    others = [other for other in TOPICS[category] if other != topic]
    about = _pick(others, generator) if wording.off_topic else topic
    text = fill(wording.template, about)
    score = wording.score + DETAIL * (about != topic and about.first == topic.first)
    if wording.may_close and generator.random() < CLOSE_SHARE:
        text += " " + _pick(CLOSES, generator)
        score += DETAIL
    num_extra = max(0, len(text.split()) - MAX_WORDS)
    return text, round(score - PER_EXTRA_WORD * num_extra, 4)


def _subjects() -> Iterator[tuple[str, Topic]]:
    """Categories and topics in turn, for ever."""
    by_topic = zip(*TOPICS.values(), strict=True)
    return itertools.cycle(
        subject for topics in by_topic for subject in zip(TOPICS, topics, strict=True)
    )


def _pick(items: Sequence[T], generator: Random) -> T:
    return items[int(generator.random() * len(items))]


def _shuffled(items: Iterable[T], generator: Random) -> list[T]:
    keyed = [(generator.random(), item) for item in items]
    return [item for _, item in sorted(keyed, key=operator.itemgetter(0))]
