"""The pairs that people compare: sampled by one run or two, or from a file; and which of them."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import conversation, files
from rlhf_jax.data.rows import Message, Messages, Record
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.inference import label
from rlhf_jax.inference.labelling.settings import Config
from rlhf_jax.inference.labelling.store import Pair, Store
from rlhf_jax.models import hf
from rlhf_jax.runs import manifest

_PATIENCE = 5.0  # seconds for a batch that is being sampled when the server ends


class Source(NamedTuple):
    """Pairs by their numbers."""

    settings: dict[str, Any]  # all that determines them
    num_pairs: int
    pair: Callable[[int], Pair]


def open_source(folder: str | None, config: Config) -> Source:
    """The pairs of ``--answers``, or of the run.

    Raises:
        UserError: a run, a file or a row is wrong.
    """
    if config.answers is not None:
        if folder is not None:
            raise UserError(f"--answers needs no run; leave {folder} out, or give --prompts")
        source = _from_file(config.answers, config)
    else:
        if folder is None:
            raise UserError("name the folder of a run: rlhf-jax label FOLDER --prompts FILE ...")
        source = _from_runs(folder, config)
    if config.choose == "random":
        return source
    models = [
        manifest.fingerprint(hf.find_folder(hf.model_folder(reward))) for reward in config.reward
    ]
    settings = {
        "choose": config.choose,
        "reward": models,
        "random_share": config.random_share,
        "count": config.count,
    }
    return source._replace(settings=source.settings | settings)


def _from_runs(folder: str, config: Config) -> Source:
    pool = config if config.choose == "random" else dataclasses.replace(config, count=None)
    asked = label.ask(folder, pool)

    def pair(number: int) -> Pair:
        return Pair(number, asked.prompts[number], asked.answers(number))

    return Source(asked.settings, len(asked.prompts), pair)


def _from_file(name: str, config: Config) -> Source:
    source = files.read_source(name)
    pairs = [_pair(number, record) for number, record in enumerate(source.records)]
    if config.choose == "random":
        pairs = pairs[: config.count]
    if not pairs:
        raise UserError(f"{name}: holds no rows")
    settings = {"answers": source.fingerprint, "seed": config.seed, "count": len(pairs)}
    return Source(settings, len(pairs), lambda number: pairs[number])


def _pair(number: int, record: Record) -> Pair:
    row = record.fields("prompt, responses")
    if "responses" not in row:
        record.require(("prompt", "chosen", "rejected"))
        row = row | {"responses": [row["chosen"], row["rejected"]]}
    record.require(("prompt",))
    answers = row["responses"]
    is_two = isinstance(answers, list) and len(answers) == 2
    record.expect(is_two and all(isinstance(text, str) for text in answers), "expected two texts")
    asked: str | Messages
    if conversation.is_chat(row, "prompt"):
        asked = conversation.asked(Record(row, record.source), "prompt")
    else:
        asked = Record(row, record.source).text("prompt")
    texts = [record.checked("an answer", text) for text in answers]
    chosen_by = row.get("chosen_by", "random")
    record.expect(isinstance(chosen_by, str), "'chosen_by' must be a string", chosen_by)
    return Pair(number, asked, texts, chosen_by)


class Feeder(threading.Thread):
    """Adds the pairs of a source to a store, in the background, ahead of the readers.

    ``error``: why it ended early, if it did.
    """

    def __init__(self, source: Source, store: Store, config: Config, on_error: Callable[[], None]):
        super().__init__(name="pairs", daemon=True)
        self.error: Exception | None = None
        self.is_complete = False  # whether all pairs are in the store
        self._source = source
        self._store = store
        self._config = config
        self._on_error = on_error
        self._stopping = threading.Event()

    def run(self) -> None:
        """Samples until all pairs are in the store, or until it is stopped."""
        try:
            self._feed()
        except Exception as error:  # a thread's own would reach nobody
            self.error = error
            self._on_error()

    def stop(self) -> None:
        """Ends the thread: it adds nothing any more, and a batch that takes long is left."""
        self._stopping.set()
        self.join(_PATIENCE)

    def _feed(self) -> None:
        config = self._config
        if config.choose != "random":
            if not self._store.num_pairs():
                names = [field.name for field in dataclasses.fields(Choice)]
                choice = Choice(**{name: getattr(config, name) for name in names})
                chosen = choose(self._sampled(), choice)
                if self._stopping.is_set():
                    return
                self._store.add(pair._replace(number=i) for i, pair in enumerate(chosen))
            self.is_complete = True
            return
        for number in range(self._store.num_pairs(), self._source.num_pairs):
            while self._store.num_waiting() >= config.ahead:
                if self._stopping.wait(0.2):
                    return
            pair = self._source.pair(number)
            if self._stopping.is_set():
                return
            self._store.add([pair])
        self.is_complete = True

    def _sampled(self) -> list[Pair]:
        """All pairs; none if it is stopped before."""
        pairs = []
        for number in range(self._source.num_pairs):
            if self._stopping.is_set():
                return []
            pairs.append(self._source.pair(number))
        return pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Which pairs are labelled; the names are those of ``Config``."""

    choose: str
    reward: Sequence[str]
    random_share: float
    count: int | None
    seed: int


def choose(pairs: Sequence[Pair], config: Choice) -> list[Pair]:
    """The pairs to label, in an order drawn from the seed.

    ``random_share`` of them are drawn from all pairs; the rest are those on which the models
    disagree most about which answer is better, or whose scores are closest.
    """
    useful = [pair for pair in pairs if not label.is_useless(pair.answers)]
    count = min(config.count or len(useful), len(useful))
    if not useful:
        return []
    margins = np.stack([_margins(folder, useful) for folder in config.reward])
    logger.info(f"{config.choose}: {count} of {len(useful)} pairs are chosen")
    return chosen_by_margins(useful, margins, count, config)


def chosen_by_margins(
    pairs: Sequence[Pair], margins: np.ndarray, count: int, config: Choice
) -> list[Pair]:
    """As `choose`, from the difference [models, pairs] of the two answers' scores."""
    rng = np.random.default_rng(config.seed)
    drawn = rng.permutation(len(pairs))
    num_random = round(config.random_share * count)
    at_random = set(drawn[:num_random].tolist())
    if config.choose == "close":
        wanted = np.abs(margins.mean(axis=0))
    else:
        wanted = -preference_spread(margins)
    rest = [i for i in np.argsort(wanted, kind="stable").tolist() if i not in at_random]
    kept = [(i, "random") for i in at_random]
    kept += [(i, config.choose) for i in rest[: count - num_random]]
    order = rng.permutation(len(kept)).tolist()
    return [pairs[i]._replace(chosen_by=why) for i, why in (kept[place] for place in order)]


def preference_spread(margins: np.ndarray) -> np.ndarray:
    """[pairs] the standard deviation over the models of P(the first answer is better), which is the
    sigmoid of the difference of its scores (Bradley & Terry 1952).
    """
    spread: np.ndarray = (1 / (1 + np.exp(-margins))).std(axis=0)
    return spread


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
