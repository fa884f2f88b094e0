"""Rewards that a rule verifies: a regular expression, equality with the answer in the prompt's data
row, or a task of reasoning-gym.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_jax.errors import TrainingFault, UserError, did_you_mean, logger
from rlhf_jax.graders import answers, literals
from rlhf_jax.graders.answers import Form, Found, Gold, Place, Value
from rlhf_jax.graders.worker import Ended, Worker

ROW_SECONDS = 600.0  # that reasoning-gym may take to make a row
SECONDS = 20.0  # that a comparison may take; its work is bounded, so it takes a few or less
PATTERN_SECONDS = 10.0  # that a search of one response may take
FEWEST = 8  # rewarded answers of a batch of which one can be the most common

Status = Literal["missing", "unreadable", "repeated", "wrong", "right"]
Reward = Callable[..., Any]
"""``fn(prompts, responses, **columns)``: scores, or scores and {component: values}."""

_mathematics = Worker(Path(__file__).with_name("mathematics.py"))
_patterns = Worker(Path(__file__).with_name("patterns.py"))
_gym = Worker(Path(__file__).with_name("gym.py"))


@dataclass(frozen=True)
class Settings:
    """How `--reward math` reads answers."""

    form: Form | None = None
    """number: where the gold answer is a number, only a number is right, not an expression such as
    3 + 4; expression: whatever has its value is right. null: number if most golds are numbers."""
    place: Place = "auto"
    """Where the answer of a response stands: boxed, <answer> tags, hashes (after ####), last
    expression; auto: the first of these that there is."""


DEFAULT = Settings()


class Verdict(NamedTuple):
    """What a response is, and the text that was read as its answer."""

    status: Status
    answer: str = ""

    @property
    def score(self) -> float | None:
        """1, 0, or None if the row has no answer that could be compared."""
        return None if self.status == "missing" else float(self.status == "right")


def regex(pattern: str) -> Reward:
    """``fn(prompts, responses, **columns)``: 1 where the pattern (Python's syntax) is found in the
    response, else 0.

    The function raises TrainingFault, with the pattern and the response, if a search takes longer
    than ten seconds, as with repeats inside repeats.
    """
    re.compile(pattern)

    def found(response: str) -> float:
        try:
            return float(_patterns.ask([pattern, response], PATTERN_SECONDS))
        except Ended:
            raise TrainingFault(
                f"regex:{pattern}: no result after {PATTERN_SECONDS:g} s for a response of "
                f"{len(response)} characters that ends in {response[-200:]!r}; a repeat inside a "
                "repeat, such as (a+)+, can take for ever: write it with one repeat"
            ) from None

    return lambda prompts, responses, **columns: list(map(found, responses))


def gym_rows(task: str, seed: int = 0, count: int = 0) -> list[dict[str, Any]]:
    """The first rows {prompt, answer, gym} of a task and seed of reasoning-gym.

    Raises:
      UserError: there is no such task, or another version of reasoning-gym.
    """
    if [one.version for one in metadata.distributions(name="reasoning_gym")] != ["0.1.25"]:
        raise UserError("gym: needs reasoning_gym 0.1.25; pip install 'rlhf-jax[gym]'")
    tasks = _gym.ask([""], ROW_SECONDS)
    if task not in tasks:
        raise UserError(f"gym: there is no task {task!r}{did_you_mean(task, tasks)}")
    return [_gym.ask([f"{task}/{seed}/{number}"], ROW_SECONDS) for number in range(count)]


def gym(task: str) -> Reward:
    """``fn(prompts, responses, gym)``: what the task's verifier gives the answer of each response,
    the last in ``<answer>`` tags or a box, else all of it without its thoughts.
    """
    gym_rows(task)

    def score(prompt: str, response: str, name: Any) -> float:
        named = name if isinstance(name, str) else type(name).__name__
        try:  # made before the seconds of the verifier begin
            if not re.fullmatch(rf"{task}/[0-9]{{1,9}}/[0-9]{{1,9}}", named):
                raise Ended
            _gym.ask([named], ROW_SECONDS)
        except Ended:
            raise UserError(
                f"gym:{task}: the prompt {prompt!r:.200} has {named!r:.80} in the column gym, of "
                f"which no row of this task is made; write the rows with `rlhf-jax data gym {task}`"
            ) from None
        text = answers.after_thoughts(response, prompt)
        for place in ("tags", "boxed"):
            text = (answers.find(text, "words", place) or Found(text.strip(), False)).text
        try:
            told = _gym.ask([name, text], SECONDS) if text else 0.0
        except Ended:
            told = f"no score after {SECONDS:g} s"
        if isinstance(told, str):
            logger.warning(f"gym: {name}: 0 for {text!r:.200}: {told}")
            return 0.0
        return float(told)

    return lambda prompts, responses, gym: [*map(score, prompts, responses, gym)]


def mathematics(settings: Settings = DEFAULT) -> Reward:
    """``fn(prompts, responses, answer, messages)``: 1 for a response whose answer equals that of
    its data row, else 0, and None if the row has none (`verdict`).

    Components: ``unreadable``, 1 where no answer was found or a number is not worked out;
    ``repeats_prompt``, 1 where the answer is a part of the prompt; ``one_answer``, for all rows the
    share of the rewarded answers that are the same one, if the golds of the rows are not.

    The function has ``examples``, {component: a response of the last batch that raised it}.
    """
    examples: dict[str, str] = {}

    def math(
        prompts: list[str],
        responses: list[str],
        answer: list[Any],
        messages: Sequence[Any] | None = None,
    ) -> tuple[list[float | None], dict[str, list[float | None]]]:
        questions = map(question, prompts, messages or [None] * len(prompts))
        golds = list(map(answers.gold, answer))
        rows = zip(golds, responses, questions, prompts, strict=True)
        verdicts = [verdict(*row, settings) for row in rows]
        scores = [one.score for one in verdicts]
        # Few answers, or golds most of which are one value too, say nothing about one answer.
        right = [answers.squeezed(one.answer) for one in verdicts if one.status == "right"]
        wanted = Counter(answers.squeezed(gold.values[0].text) for gold in golds if gold.values)
        [(common, count)] = Counter(right).most_common(1) or [("", 0)]
        is_told = len(right) >= FEWEST and 2 * max(wanted.values()) <= wanted.total()
        share = count / len(right) if is_told else 0.0
        examples.clear()
        if is_told:
            examples["one_answer"] = common
        for one, response in zip(verdicts, responses, strict=True):
            if one.status == "repeated":
                examples.setdefault("repeats_prompt", response)

        def where(status: Status) -> list[float | None]:
            return [None if one.score is None else float(one.status == status) for one in verdicts]

        return scores, {
            "unreadable": where("unreadable"),
            "repeats_prompt": where("repeated"),
            "one_answer": [None if score is None else share for score in scores],
        }

    math.examples = examples  # type: ignore[attr-defined]
    return math


def question(prompt: str, messages: Any = None) -> str:
    """What a prompt asks: the content of its last message of the user, or the prompt itself."""
    for message in reversed(messages or ()):
        content = message.get("content")
        if message.get("role") == "user" and isinstance(content, str):
            return content
    return prompt


def verdict(
    gold: Gold,
    response: str,
    asked: str = "",
    prompt: str = "",
    settings: Settings = DEFAULT,
) -> Verdict:
    """Compares the answer of a response (`answers.find`) with that of its data row.

    Numbers are compared exactly, letters of a choice, times, ratios and words as texts, and other
    expressions by the package math-verify within the bounds of `graders.mathematics`. A comparison
    that takes 20 seconds all the same, or ends its process, counts as wrong, with a warning.

    Args:
      asked: the question, which may not be repeated as the answer.
      prompt: as the model reads it; if it ends with ``<think>``, the response begins in thoughts.
      settings: ``form`` None counts as number.
    """
    if not gold.values:
        return Verdict("missing")
    text = answers.after_thoughts(response, prompt)
    read = Verdict("unreadable")
    for value in gold.values:
        found = answers.find(text, value.kind, settings.place)
        if answers.repeats(text, found, gold.values, asked):
            return Verdict("repeated", found.text if found else text)
        if found is None:
            continue
        status = _status(value, found, settings.form)
        if status == "right":
            return Verdict(status, found.text)
        if status == "wrong":
            read = Verdict(status, found.text)
    return read


def _status(value: Value, found: Found, form: Form | None) -> Status:
    """The status of an answer that was found."""
    if value.kind == "words":
        return "right" if value.text in answers.said_words(found.text) else "wrong"
    if value.kind in ("choice", "ratio"):
        read = answers.choice_of if value.kind == "choice" else answers.ratio_of
        said = read(found.text)
        if said is None:
            return "unreadable"
        return "right" if said == value.text else "wrong"
    if answers.compact(found.text) == answers.compact(value.text):
        return "right"
    number = answers.number_of(found) if value.number else None
    if value.number and number and number.is_worked_out:
        return "right" if literals.equal(value.number, number) else "wrong"
    if value.number and form != "expression":
        return "unreadable"
    return "right" if are_equal(value.text, found.text) else "wrong"


def are_equal(expected: str, answer: str) -> bool:
    """Whether two expressions are equal; not if one of them cannot be parsed."""
    if not answers.same_brackets(expected, answer):
        return False
    try:
        return bool(_mathematics.ask([literals.latex(expected), literals.latex(answer)], SECONDS))
    except Ended:
        logger.warning(
            f"math: the process that compares answers ended, or was ended after {SECONDS:g} s; the "
            f"response counts as wrong: the answer is {expected!r:.200}, the response ends in "
            f"{answer[-200:]!r}"
        )
        return False
