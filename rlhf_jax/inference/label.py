"""``rlhf-jax label``: a person chooses the better of two answers to a prompt, without knowing which
model wrote which answer.

OUT has rows {prompt, chosen, rejected}, and {prompt, responses, ranks} for ties: preferences that
``reward-model``, ``dpo`` and ``kto`` read. OUT.session.json has every judgement in order. The same
command continues after the last one.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import chat
from rlhf_jax.data.conversation import text_of
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, file_errors, logger
from rlhf_jax.evaluation.settings import check_at_least
from rlhf_jax.generation.generator import Generator
from rlhf_jax.inference import asking
from rlhf_jax.inference.chat import Console
from rlhf_jax.runs.writing import one_writer, write_atomically

KEYS = {"a": "a", "b": "b", "t": "tie", "s": "skip", "u": "undo", "q": "quit"}
QUESTION = "a, b, t(ie), s(kip), u(ndo), q(uit)?"
SESSION = {
    "settings": {str: object},
    "judgements": [
        {
            "pair": int,
            "answers": [str],
            "order": [int],
            "choice": str,
            "again": bool,
            "annotator": str,
            "seconds": (float, int, None),
            "strength": (str, None),
            "reason": (str, None),
            "chosen_by": str,
        }
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(asking.FromFiles):
    """Which answers are compared."""

    out: str
    """The file of preferences, JSON lines. If it was begun with these settings, it is continued."""
    against: str | None = None
    """Another run or model folder, which gives the second answer; null: the run gives both."""
    count: int | None = None
    """Pairs to compare, of the first prompts; null: one for each prompt."""
    again: float = 0.1
    """Share of the pairs that are asked a second time at the end, in the other order."""
    batch_size: int = 8
    """Prompts that are answered at once, before the first question."""

    def __post_init__(self) -> None:
        if not 0 <= self.again <= 1:
            raise UserError(f"--again must be from 0 to 1, got {self.again}")
        check_at_least(self, count=1, batch_size=1)


class Judgement(NamedTuple):
    """The judgement of the answers to a prompt."""

    pair: int  # number of the prompt
    prompt: Any  # text or messages
    answers: list[str]  # of RUN, and of the other run
    order: list[int]  # in which they were shown
    choice: str  # a, b, tie, bad (both), skip; or useless: the answers are equal or one is empty
    again: bool  # whether the pair is asked for the second time
    # Of a judgement on the page (`labelling`).
    annotator: str = ""
    seconds: float | None = None  # that the pair was looked at
    strength: str | None = None  # of the preference: slight, clear or strong
    reason: str | None = None
    chosen_by: str = "random"  # how the pair was chosen: --choose

    @property
    def verdict(self) -> int | str:
        """The better answer's number, or tie, bad, skip, useless."""
        place = {"a": 0, "b": 1}.get(self.choice)
        return self.choice if place is None else self.order[place]

    @property
    def row(self) -> dict[str, Any]:
        """The row of the preferences' file."""
        if self.choice in ("tie", "bad"):
            return {"prompt": self.prompt, "responses": self.answers, "ranks": [0, 0]}
        best = int(self.verdict)
        return {
            "prompt": self.prompt,
            "chosen": self.answers[best],
            "rejected": self.answers[1 - best],
        }


class Session(NamedTuple):
    """The judgements so far, and the next pair."""

    config: Config
    out: Path
    settings: dict[str, Any]
    judgements: list[Judgement]
    prompts: list[Any]  # texts or messages
    answers: Callable[[int], list[str]]  # to a prompt

    def next(self) -> Judgement | None:
        """The next pair, without a choice; None at the end."""
        done = len(self.judgements)
        if done < len(self.prompts):
            order = np.random.default_rng([self.config.seed, done]).permutation(2).tolist()
            return Judgement(done, self.prompts[done], self.answers(done), order, "", False)
        repeated = self._repeated()
        num_repeated = done - len(self.prompts)
        if num_repeated == len(repeated):
            return None
        first = repeated[num_repeated]
        return first._replace(order=first.order[::-1], choice="", again=True)

    def given(self, *, again: bool) -> list[Judgement]:
        """The judgements that compare the answers, of the first or of the second time."""
        return [done for done in self.judgements if is_given(done) and done.again == again]

    def _repeated(self) -> list[Judgement]:
        """The judgements whose pairs are asked again, drawn from the seed."""
        firsts = self.given(again=False)
        count = num_repeated(self.config.again, len(firsts))
        drawn = np.random.default_rng(self.config.seed).permutation(len(firsts))[:count]
        return [firsts[i] for i in drawn]

    def save(self) -> None:
        """Writes both files."""
        rows = [given.row for given in self.given(again=False)]
        write(self.out, {"settings": self.settings}, self.judgements, rows)


def write(
    out: Path,
    settings: dict[str, Any],
    judgements: Sequence[Judgement],
    rows: Iterable[dict[str, Any]],
) -> None:
    """Writes OUT.session.json, and OUT with the rows; a kill in between loses no judgement."""
    content = settings | {"judgements": [given._asdict() for given in judgements]}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with file_errors(out, "written"):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        # The rows follow from the session, and are written again when it goes on.
        write_atomically(session_file(out), text)
        write_atomically(out, "".join(lines))


def num_repeated(share: float, num_given: int) -> int:
    """How many of the judged pairs are asked again: this share, at least one of two or more."""
    count = round(share * num_given)
    return max(count, 1) if share and num_given > 1 else count


def is_given(judgement: Judgement) -> bool:
    """Whether the judgement compares the answers."""
    return judgement.choice in ("a", "b", "tie", "bad")


def session_file(out: Path) -> Path:
    """Where the judgements are kept."""
    return out.with_name(f"{out.name}.session.json")


def store_file(out: Path) -> Path:
    """Where the page (``--serve``) keeps the judgements while people label."""
    return out.with_name(f"{out.name}.session.sqlite")


def run(folder: str, config: Config, lines: Iterator[str], console: Console) -> str:
    """Asks until all pairs are judged, the lines end or a line is quit; returns a summary.

    Raises:
        UserError: the file was begun with other settings, or another process writes it; a folder, a
            file or a row is wrong; a line is no choice, unless it comes from a terminal.
    """
    with one_writer(Path(config.out)):
        session = _open(folder, config)
        session.save()
        if session.judgements:
            logger.info(f"{session.out}: {len(session.judgements)} judgements so far; it continues")
        while (pair := session.next()) is not None:
            if is_useless(pair.answers):
                session.judgements.append(pair._replace(choice="useless"))
                continue
            console.say(_shown(pair, session))
            choice = _choice(lines, console)
            if choice == "quit":
                break
            if choice == "undo":
                _undo(session.judgements, console)
            else:
                session.judgements.append(pair._replace(choice=choice))
            session.save()
        session.save()
        return _summary(folder, session)


def _open(folder: str, config: Config) -> Session:
    out = Path(config.out)
    if store_file(out).exists():
        raise UserError(
            f"{out}: was begun on the page; go on with --serve, or choose another --out"
        )
    asked = ask(folder, config)
    settings = asked.settings | {"again": config.again}
    judgements = []
    beside = session_file(out)
    if beside.exists() or out.exists():
        session = asking.read_beside(out, beside, SESSION)
        asking.check_unchanged(out, session["settings"], settings)
        judgements = [Judgement(**given) for given in session["judgements"]]
    return Session(config, out, settings, judgements, asked.prompts, asked.answers)


class Asked(NamedTuple):
    """Prompts, and the two answers to each."""

    settings: dict[str, Any]  # all that determines the answers
    prompts: list[Any]  # texts or messages
    answers: Callable[[int], list[str]]  # to a prompt, by its number


def ask(folder: str, config: Config) -> Asked:
    """Opens the run, or both runs, and the prompts. A batch is sampled when it is first needed."""
    asking.start(config)
    policies = [
        asking.open_policy(name, config, batch_size=config.batch_size)
        for name in filter(None, (folder, config.against))
    ]
    data = asking.read(policies[0], config, config.seed)
    rows = data.rows[: config.count]
    settings = asking.described(folder, policies[0], config, data)
    if config.against is not None:
        settings["against"] = asking.described(config.against, policies[1], config, data)
    settings["count"] = len(rows)
    prompts = [asking.as_given(row, policies[0].tokenizer) for row in rows]
    return Asked(settings, prompts, _answers(policies, rows, config))


def _answers(
    policies: list[Generator], rows: list[Row], config: Config
) -> Callable[[int], list[str]]:
    """The two answers to a prompt, by its number."""
    num_samples = 2 if len(policies) == 1 else 1
    asked = [policy.ask(_as_read(policy, rows), num_samples) for policy in policies]

    @functools.lru_cache(maxsize=2)
    def batch(number: int) -> list[list[str]]:
        start = number * config.batch_size
        columns: list[list[str]] = []
        for policy, prompts in zip(policies, asked, strict=True):
            part = prompts.part(start, start + config.batch_size)
            texts, _ = policy.sample(part, config.seed)
            columns += [texts[i::num_samples] for i in range(num_samples)]
        return [list(pair) for pair in zip(*columns, strict=True)]

    return lambda number: batch(number // config.batch_size)[number % config.batch_size]


def _as_read(policy: Generator, rows: list[Row]) -> list[Row]:
    """The rows with messages rendered by the policy's own chat template."""
    template = chat.template_of(policy.tokenizer, policy.template)
    rendered = []
    for row in rows:
        if row.messages:
            prompt = template.prompt(row.messages, row.source, tools=row.tools)
            row = dataclasses.replace(row, prompt=prompt)
        rendered.append(row)
    return rendered


def is_useless(answers: list[str]) -> bool:
    """Whether a choice between them teaches nothing: they are equal, or one is empty."""
    first, second = answers
    return first == second or not first.strip() or not second.strip()


def _shown(pair: Judgement, session: Session) -> str:
    number = "once more" if pair.again else f"{pair.pair + 1} of {len(session.prompts)}"
    prompt = pair.prompt
    if isinstance(prompt, list):
        prompt = "\n".join(f"{message['role']}: {text_of(message)}" for message in prompt)
    first, second = (pair.answers[i] for i in pair.order)
    return f"\n[{number}] {prompt}\n\na: {first}\n\nb: {second}\n\n{QUESTION}\n"


def _choice(lines: Iterator[str], console: Console) -> str:
    """The choice of the next line; quit at the end of the lines."""
    for line in lines:
        word = line.strip().lower()
        choice = KEYS.get(word[:1], "")
        if word and choice.startswith(word):
            return choice
        if not console.is_terminal:
            raise UserError(f"{line!r} is none of {QUESTION}")
        console.note(QUESTION)
    return "quit"


def _undo(judgements: list[Judgement], console: Console) -> None:
    """Removes the last choice, and the pairs without a choice after it."""
    while judgements and judgements[-1].choice == "useless":
        judgements.pop()
    if judgements:
        judgements.pop()
    else:
        console.note("nothing to undo")


def _summary(folder: str, session: Session) -> str:
    """The number of judgements, the person's agreement with themselves, and the next step."""
    firsts = [given for given in session.judgements if not given.again]
    count = collections.Counter(given.choice for given in firsts)
    num_choices = count["a"] + count["b"]
    lines = [
        f"{len(firsts)} of {len(session.prompts)} pairs: {num_choices} preferences, {count['tie']} "
        f"ties, {count['skip']} skipped, {count['useless']} with equal or empty answers",
        f"the answer shown first was chosen {count['a']} times of {num_choices}",
    ]
    if session.config.against is not None:
        won = sum(given.verdict == 0 for given in firsts)
        lines.append(f"{folder} was preferred {won} times of {num_choices}")
    verdicts = {given.pair: given.verdict for given in firsts}
    seconds = session.given(again=True)
    if seconds:
        same = sum(given.verdict == verdicts[given.pair] for given in seconds)
        lines.append(f"asked again, you said the same {same} times of {len(seconds)}")
    num_rows = num_choices + count["tie"]
    return "\n".join([*lines, f"{session.out}: {num_rows} rows for reward-model, dpo and kto"])
