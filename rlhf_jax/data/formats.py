"""Records of data files as rows: demonstrations, comparisons or prompts, by the keys that a record
has. Records of public data sets have our keys already (`forms`).

- ``{prompt, response}``: a demonstration.
- ``{messages}``: a demonstration if it ends with the assistant's turn (`messages`), else a prompt.
  ``tools`` of any row with messages reach the chat template.
- ``{text}``, or a whole text file: a text for a language model, without a prompt.
- ``{prompt, response, desirable}``: feedback: one answer, or messages, and whether it is
  desirable, a boolean or 1 or 0. In messages that is said of each turn that is learned.
- ``{prompt, steps, labels}``: a solution: the texts of its steps, and whether each is right.
  Feedback is read as a solution of one step.
- ``{prompt, chosen, rejected}``: a comparison; each value may be messages. ``margin`` is the least
  difference of the scores that a reward model should give.
- ``{chosen, rejected}``: two dialogues as in hh-rlhf (Bai et al. 2022) that differ in the last
  answer.
- ``{prompt, responses, LABEL}``: LABEL is ``best`` (a number from 0), ``ranking`` (response
  numbers, best first), ``ranks`` (the lowest is best, equal ones are ties) or ``targets``. The
  prompt and the responses may be GPT-2 token ids, as in lm-human-preferences (Ziegler et al. 2019).
- ``{instruction, response1, response2}``: annotated, as in PandaLM (Wang et al. 2023), with
  ``input`` and ``annotator1``, ..., each of which says 1, 2 or 0, a tie; to a stage it is a
  comparison by majority. The instruction may be messages.
- ``{prompt, ...}`` or a string: a prompt; other keys are columns for the reward.

As in InstructGPT (Ouyang et al. 2022) a ranking becomes all of its ordered pairs, which together
count as one comparison. Every row remembers where it came from, so that later stages can name it in
their errors.
"""

import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data import conversation, demo, rows
from rlhf_jax.data.chat import ChatTemplate, rendered
from rlhf_jax.data.files import Source, is_saved_dataset, parse_bytes, read_source
from rlhf_jax.data.forms import ANNOTATED, OURS, PAIR, converted, parse_columns, unused_columns
from rlhf_jax.data.rows import (
    BadRow,
    Drop,
    Fields,
    Kind,
    LearnedTurns,
    Messages,
    Record,
    Row,
    Rows,
    Text,
)
from rlhf_jax.errors import UserError
from rlhf_jax.runs.reading import RowCounts

Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Source]

LABELS = ("best", "ranking", "ranks", "targets")
_PREFERENCES = "preference_data.json"
# The file of each kind in the pipeline's folder.
FILES: dict[Kind, str] = {
    "demonstrations": "sft_data.json",
    "prompts": "prompts.json",
    "feedback": _PREFERENCES,
    "pairs": _PREFERENCES,
    "solutions": _PREFERENCES,
    "comparisons": _PREFERENCES,
}
KNOWN = tuple(dict.fromkeys(itertools.chain(*OURS, LABELS, ("desirable", "margin"))))
NO_COLUMNS = ("prompt", "messages", "responses")
"""Keys that are no columns for a reward, which has parameters of these names."""
DEMO = "demo"  # the data of this name is generated

STEP_END = "\n"  # ends each step of a solution but the last
HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_CONTRADICTED = "'chosen' is not the response that the row's label says is the best"
_NO_DIALOGUE = (
    "{!r} must be a dialogue of turns '\\n\\nHuman:' and '\\n\\nAssistant:' in a row "
    "without a prompt"
)
PAD_ID = 50259  # of lm-human-preferences, GPT-2's vocabulary size + 2; no token of GPT-2
MOST_REASONS = 20  # why rows were dropped, that manifest.json counts by themselves
MOST_RESPONSES = 256  # of a row: a ranking of them has 32,640 pairs
_MOST = 3.4e38  # the largest float32
EQUAL = "chosen and rejected are identical"
ALL_EQUAL = "all responses are identical"
REPEATED = "repeated prompt"
NO_MAJORITY = "no majority of the annotators prefers one response"
_ANNOTATOR = re.compile(r"annotator[0-9]+")
_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# The keys that a record of each kind needs, for errors.
_EXPECTED: dict[Kind, str] = {
    "demonstrations": "prompt, response",
    "feedback": "prompt, response, desirable",
    "solutions": "prompt, steps, labels",
    "pairs": "prompt, chosen, rejected",
    "comparisons": "prompt, chosen, rejected",
    "annotated": ", ".join(ANNOTATED),
    "prompts": "prompt, or a string",
}
Ranks = tuple[float, ...]
"""The rank of each response, of which the lowest is the best; empty if they have none."""
_FIRST_IS_BEST: Ranks = (0, 1)


class Form(NamedTuple):
    """The kind of data that a record's keys make it, and the name of its format."""

    kind: Kind | None
    name: str


UNKNOWN = Form(None, "no known form")


@dataclass(frozen=True)
class ReadResult:
    """The rows in file order, and what else was found."""

    rows: list[Row]
    places: dict[str, list[str]] = field(default_factory=dict)
    """{reason: places of the rows that were left out for it}."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """{source: sha256}."""
    errors: list[UserError] = field(default_factory=list)
    """The errors of the rows that cannot be used."""
    unused_columns: dict[str, str] = field(default_factory=dict)
    """{column that no row has: sentence}."""
    not_drawn: int = 0
    """Number of rows that a limit of their number has left out."""
    unread: dict[str, int] = field(default_factory=Counter)
    """{key that the stage does not read: number of its rows}; of prompts the columns that a reward
    gets."""
    unwritten: dict[str, int] = field(default_factory=Counter)
    """{part of messages that the chat template leaves out: number of its rows}."""
    forms: dict[str, str] = field(default_factory=dict)
    """{place of a record: name of its form}."""

    @property
    def dropped(self) -> dict[str, int]:
        """{reason: number of rows that were left out for it}."""
        return {reason: len(sources) for reason, sources in self.places.items()}

    def describe(self) -> str:
        """One line for a log: ``1162 rows, 1 dropped (chosen and rejected are identical:
        data.jsonl, line 7)``.
        """
        line = f"{len(self.rows)} rows"
        for reason, sources in self.places.items():
            line += f", {len(sources)} dropped ({reason}: {rows.places(sources)})"
        return line

    def describe_unread(self, kind: Kind) -> str:
        """One line that names the keys in ``unread`` and ``unwritten``; "" if there are none."""
        title = (
            "columns for the reward" if kind == "prompts" else "keys that training does not read"
        )
        parts = []
        for name, keys in ((title, self.unread), ("the chat template leaves out", self.unwritten)):
            counted = [f"{key} ({count} rows)" for key, count in Counter(keys).most_common()]
            parts += [f"{name}: {', '.join(counted)}"] if counted else []
        return "; ".join(parts)


def account(
    read: Sequence[ReadResult], dropped: Mapping[str, int], cut: Mapping[str, int]
) -> RowCounts:
    """What became of the rows, as manifest.json has it. Repeats of a prompt do not count.

    Args:
      read: the rows as they were read, with those that could not be used.
      dropped: {reason: number} of the rows that were left out later.
      cut: {how: number} of the texts that were cut.
    """
    reasons = Counter(dropped)
    for part in read:
        reasons.update(part.dropped)
        reasons.pop(REPEATED, None)
    later = sum(dropped.values())
    num_read = sum(len(part.rows) + part.not_drawn for part in read) + reasons.total() - later
    most = dict(reasons.most_common(MOST_REASONS))
    others = reasons.total() - sum(most.values())
    most |= {"other reasons": others} if others else {}
    return {"read": num_read, "dropped": most, "cut": dict(cut)}


class Loaded(NamedTuple):
    """What sources hold, before it is read as rows."""

    sources: dict[str, Source]
    records: list[Record]
    """In our keys; those that cannot be read are errors."""
    unused_columns: dict[str, str]
    """{column that no record has: sentence}."""


def read(
    kind: Kind,
    names: Names,
    *,
    seed: int = 0,
    template: ChatTemplate | None = None,
    columns: Sequence[str] = (),
    shares_columns: bool = False,
    on_bad_row: rows.OnBadRow = "error",
    turns: LearnedTurns = "all",
) -> ReadResult:
    """The rows of one or several sources.

    Kinds: ``demonstrations`` also come from pairs (the chosen response), from other comparisons
    (the best response) and from plain texts. ``comparisons`` are pairs, choices of one response
    among K > 2, and responses with targets; ``pairs`` turns all of these into pairs. ``feedback``
    is one response with the target 1 or 0; a pair becomes two rows, 1 for the chosen response and 0
    for the rejected one. ``prompts`` also come from rows with responses, each such prompt once.

    These rows are always left out and counted: pairs of equal responses, rankings that have only
    ties, annotated rows without a majority, and repeated prompts.

    Args:
      names: files or datasets (`files.read_source`), folders with sft_data.json,
        preference_data.json or prompts.json, or only ``demo``: the corpus that `demo` generates
        from ``seed``; or what was read already, {name: source}.
      template: renders messages; by default `chat.PLAIN`.
      columns: OURS=THEIRS, as in `forms`. A column that no row has is an error.
      shares_columns: the columns belong to other data too. A column that no row has is then only
        noted in the result.
      on_bad_row: ``error``: one error names all rows that the stage cannot use; ``drop``: these
        rows are left out and counted. A file that cannot be read to its end is always an error.

    Raises:
      UserError: no data or no usable row; a file that cannot be read; bad rows; a column that no
        row has.
    """
    sources, records, unused = load(kind, names, columns, shares_columns, seed)
    result = parse_all(kind, records, template or ChatTemplate(), on_bad_row, turns)
    result.unused_columns.update(unused)
    result.fingerprints.update({name: source.fingerprint for name, source in sources.items()})
    if result.errors:
        lines = rows.summary(result.errors)
        if result.rows and any(isinstance(error, BadRow) for error in result.errors):
            lines.append("--on-bad-row drop leaves such rows out and counts them")
        raise UserError("\n".join(lines))
    if not result.rows:
        raise UserError(f"{', '.join(sources)}: no usable row: {result.describe()}")
    check_labels(result.rows)
    return result


def load(
    kind: Kind | None,
    names: Names,
    columns: Sequence[str] = (),
    shares_columns: bool = False,
    seed: int = 0,
) -> Loaded:
    """The records that `read` reads as rows.

    Args:
      kind: None if it is not known yet, of files alone.

    Raises:
      UserError: no data; a file that cannot be read at all; a column that no record has.
    """
    sources = _sources(kind, names, seed)
    renamed = parse_columns(columns)
    given = [record for source in sources.values() for record in source.records]
    unused = unused_columns(given, renamed)
    if unused and not shares_columns:
        raise UserError("\n".join(unused.values()))
    records = []
    for record in given:
        try:
            records += converted(record, renamed)
        except BadRow as error:
            records.append(Record(error, record.source))
    return Loaded(sources, records, unused)


def parse_all(
    kind: Kind,
    records: Sequence[Record],
    template: ChatTemplate,
    on_bad_row: rows.OnBadRow,
    turns: LearnedTurns = "all",
) -> ReadResult:
    """The rows of all records. ``drop`` leaves out the records of a `BadRow` and counts them."""
    result = ReadResult([])
    seen: set[tuple[Text, str]] = set()
    for record in records:
        if not isinstance(record.value, UserError):
            result.forms[record.source] = record.form or form_of(record.value).name
        try:
            parsed = parse(kind, record, template, turns)
            if kind == "prompts":
                first = parsed[0]
                asked = (first.prompt, repr((first.tools, first.variables)))
                has_answers = form_of(record.value).kind not in ("prompts", None)
                if asked in seen and has_answers:
                    raise Drop(record.source, REPEATED)
                seen.add(asked)
        except UserError as error:
            if isinstance(error, BadRow if on_bad_row == "drop" else Drop):
                result.places.setdefault(error.what, []).append(error.source)
            else:
                result.errors.append(error)
            continue
        result.rows.extend(parsed)
        for key in _unread(record.value, kind, template.reads_plain):
            result.unread[key] += 1
        for part in {part for row in parsed for part in template.unwritten(row)}:
            result.unwritten[part] += 1
    return result


def fingerprints(kind: Kind, names: Names, *, seed: int = 0) -> dict[str, str]:
    """{source: sha256} of the sources that ``read`` would read."""
    return {name: source.fingerprint for name, source in _sources(kind, names, seed).items()}


def _sources(kind: Kind | None, names: Names, seed: int) -> dict[str, Source]:
    if isinstance(names, Mapping):
        return dict(names)
    several = [names] if isinstance(names, str | os.PathLike) else names
    given = [str(name) for name in several]
    file = FILES.get(kind, "") if kind else ""
    if not given:
        raise UserError(
            f"no data: give --data FILE with {kind}, a folder that holds {file}, or `--data demo` "
            "for the generated corpus"
        )
    if DEMO in given and file:
        if len(given) > 1:
            raise UserError(f"--data {' '.join(given)}: `{DEMO}` cannot be mixed with files")
        name = f"{DEMO}/{file}"
        return {name: parse_bytes(demo.file_text(file, seed=seed).encode(), name)}
    sources = {}
    for name in given:
        is_folder = file and os.path.isdir(name) and not is_saved_dataset(name)
        path = str(Path(name) / file) if is_folder else name
        sources[path] = read_source(path, whole_text=kind == "demonstrations")
    return sources


def check_labels(read_rows: Rows) -> None:
    """Raises `UserError` if some rows have targets and others a preference, or some are plain texts
    and others have prompts.
    """
    first_by_targets = {row.targets is not None: row.source for row in reversed(read_rows)}
    if len(first_by_targets) > 1:
        raise UserError(
            f"{first_by_targets[False]}: has no targets but {first_by_targets[True]} has; train on "
            "one kind of label at a time"
        )
    first_by_form = {row.is_plain_text: row.source for row in reversed(read_rows)}
    if len(first_by_form) > 1:
        raise UserError(
            f"{first_by_form[True]}: is plain text but {first_by_form[False]} has a prompt; train "
            "on one kind at a time"
        )


def framed(read_rows: Rows) -> str:
    """A sentence on dialogues as in hh-rlhf for a model with a chat template; "" without any."""
    prompts = [(row.prompt, row.source) for row in read_rows if isinstance(row.prompt, str)]
    sources = [source for prompt, source in prompts if prompt.startswith(HUMAN)]
    if not sources:
        return ""
    which = f"{len(sources)} prompts begin with {HUMAN!r} ({rows.places(sources, 2)})"
    how = "the chat template makes each of these dialogues one message of the user"
    return f"{which}, and {how}; --text.template '{{prompt}}' reads them as they are"


def mixed(read_rows: Rows) -> str:
    """A sentence on conversations beside plain prompts, where these get no chat template; "" if
    there are none.
    """
    first = {bool(row.messages): row.source for row in reversed(read_rows)}
    if len(first) == 1 or not first:
        return ""
    how = "the model reads them in different frames, and only the chat template has one for both"
    return f"{first[True]} is a conversation, {first[False]} a plain prompt: {how}"


def form_of(value: Any) -> Form:
    """The form of a record, by its keys."""
    if isinstance(value, str):
        return Form("prompts", "text")
    if not isinstance(value, dict):
        return UNKNOWN
    form = _form_with(tuple(value))
    if form.name == "messages" and not conversation.is_answered(value["messages"]):
        return Form("prompts", form.name)
    return form


@lru_cache(maxsize=256)
def _form_with(keys: tuple[str, ...]) -> Form:
    """The form of a record with these keys, of messages if they end with an answer."""
    if "responses" in keys:
        present = [key for key in ("prompt", "responses", *LABELS) if key in keys]
        return Form("comparisons", ", ".join(present))
    for known, kind in OURS.items():
        if set(keys).issuperset(known):
            return Form(kind, ", ".join(known))
    return UNKNOWN


def keys_read(row: Fields, kind: Kind, reads_plain: bool = False) -> set[str]:
    """The keys of a record that a stage of this kind reads, by a template that reads plain prompts
    too or not.
    """
    form = form_of(row)
    keys = set(form.name.split(", "))
    if form.kind == "annotated":
        keys |= {"input", *filter(_ANNOTATOR.fullmatch, row)}
    if kind == "comparisons":
        keys |= {"margin", "category", "subset"}
    if kind == "demonstrations":
        keys.add("desirable")
    if reads_plain or conversation.is_chat(row, "messages", "prompt", "response", *PAIR):
        keys |= {"tools", conversation.VARIABLES}
    if form.kind is not None and form.name != "text":
        keys |= {*conversation.SYSTEM}
        keys |= {"history"} if str(row.get("history")).lstrip().startswith("[") else set()
    if kind == "demonstrations" and ("messages" in row or "targets" in row):
        keys.add("response")
    if kind == "comparisons" and "response" in row:
        keys |= {"response", "score"}
    return keys.intersection(row)


def _unread(value: Any, kind: Kind, reads_plain: bool) -> list[str]:
    """The keys that a stage of this kind does not read. A column for rewards may be a copy of what
    it reads (`forms`).
    """
    if not isinstance(value, dict):
        return []
    if kind == "prompts":
        return [key for key in value if key not in NO_COLUMNS]
    read = keys_read(value, kind, reads_plain)
    copies = [id(value[key]) for key in read]
    return [key for key in value if key not in read and id(value[key]) not in copies]


def parse(
    kind: Kind, record: Record, template: ChatTemplate, turns: LearnedTurns = "all"
) -> list[Row]:
    """The rows of one record, at least one, with the template's text of messages. ``turns``: of the
    assistant, that are learned.

    Raises:
      UserError: the record could not be read; as `BadRow` if it has another form or a wrong value.
      Drop: training cannot use the row.
    """
    parsed = _parse(kind, record)
    written = conversation.written(record)
    result = []
    for row in (replace(row, **written) for row in parsed):
        is_text = not row.messages
        last, feedback = turns == "last", kind == "feedback"
        result += [row] if is_text else rendered(row, template, last=last, is_feedback=feedback)
    return result


def _parse(kind: Kind, record: Record) -> list[Row]:
    """The rows of one record; prompts of messages have no text yet."""
    value = record.value
    if kind == "prompts" and isinstance(value, str):
        return [Row(record.checked("the prompt", value), (), record.source)]
    record.fields(_EXPECTED[kind])
    if kind == "solutions":
        return [_solution(record)]
    if kind == "prompts":
        columns = {key: value[key] for key in value if key not in NO_COLUMNS}
        return [_row(record, _asked(record), columns=columns)]
    what = "labels the steps of a solution, which reward_model.steps: true alone trains on"
    record.expect(form_of(value).kind != "solutions", what)
    if kind == "annotated":
        return [_annotated(record)]
    if kind == "demonstrations":
        return [_demonstration(record)]
    if kind == "feedback":
        return _feedback(record)
    comparison, ranks = _answers(record)
    is_choice = comparison.best is not None and len(comparison.responses) > 2
    if kind == "comparisons" and (is_choice or comparison.targets is not None):
        return [comparison]
    _check_ranked(record, ranks, kind)
    return _pairs(comparison, ranks)


def _check_ranked(record: Record, ranks: Ranks, kind: Kind) -> None:
    what = f"holds targets, which are no preference; {kind} need best, ranking or ranks"
    record.expect(ranks, what)


def _asked(record: Record) -> Text | Messages:
    """The prompt of a record of any form."""
    row = record.value
    if "responses" in row:
        record.require(("prompt",))
    elif "messages" in row:
        return conversation.asked(record, "messages")
    if conversation.is_chat(row, "prompt"):
        return conversation.asked(record, "prompt")
    if "responses" in row:
        return _text_or_ids(record, "'prompt'", row["prompt"], may_be_space=True)
    answer = "chosen" if "chosen" in row else "response"
    has_turns = conversation.is_chat(row, answer)
    if not has_turns and ("prompt" in row or answer == "response"):
        record.require(("prompt",))
        return record.text("prompt")
    if has_turns and answer == "chosen":
        is_pair = "rejected" in row
        return conversation.pair(record, PAIR)[0] if is_pair else conversation.asked(record, answer)
    return _exchange(record, answer)[0]


def _demonstration(record: Record) -> Row:
    """A text, a response, or the first of the best responses of a comparison."""
    row = record.value
    if row.get("desirable") is not None:
        what = "is marked as not desirable, and SFT would learn it; leave such rows out"
        record.expect(_truth(record, "'desirable'", row["desirable"]), what)
    form = form_of(row)
    if form == ("demonstrations", "text"):
        return Row("", (record.text("text"),), record.source)
    if ("responses" in row and "response" not in row) or form.kind == "annotated":
        comparison, ranks = _answers(record)
        _check_ranked(record, ranks, "demonstrations")
        best = comparison.responses[ranks.index(min(ranks))]
        return replace(comparison, responses=(best,), best=None, targets=None, category="")
    key = "messages" if "messages" in row else "response"
    if key not in row and row.keys() >= set(PAIR):
        key = "chosen"
    if key == "chosen" and conversation.is_chat(row, "prompt", *PAIR):
        common, chosen, _ = conversation.pair(record, PAIR)
        return _row(record, common, (chosen,))
    if key == "messages" and isinstance(told := row.get("response"), str):
        last = row["messages"][-1].get("content")
        what = "'response' is not the last answer of 'messages'; leave one of the two out"
        record.expect(isinstance(last, str) and last.split() == told.split(), what)
    before, response = _exchange(record, key)
    return _row(record, before, (response,))


def _feedback(record: Record) -> list[Row]:
    """Responses with the target 1 for desirable ones, 0 for others."""
    row = record.value
    is_judged = "responses" in row or "chosen" in row or form_of(row).kind == "annotated"
    if is_judged and "desirable" not in row:
        apart = []
        for pair in _parse("pairs", record):
            for side, target in (slice(0, 1), 1.0), (slice(1, 2), 0.0):
                answers = pair.answers[side]
                one = replace(pair, responses=pair.responses[side], answers=answers)
                apart.append(replace(one, targets=(target,)))
        return apart
    record.require(("desirable",))
    targets = (float(_truth(record, "'desirable'", row["desirable"])),)
    before, response = _exchange(record, "messages" if "messages" in row else "response")
    return [_row(record, before, (response,), targets=targets)]


def _solution(record: Record) -> Row:
    """The steps of a solution with their labels; of feedback its response as one step."""
    row = record.value
    if "desirable" in row:
        record.require(("prompt", "response"))
        steps, labels = [row["response"]], [row["desirable"]]
    else:
        record.require(("prompt", "steps", "labels"))
        steps, labels = row["steps"], row["labels"]
    for key, values in {"'steps'": steps, "'labels'": labels}.items():
        record.expect(isinstance(values, list) and values, f"{key} must be a list", values)
    counts = f"has {len(steps)} steps and {len(labels)} labels; each step needs a label"
    record.expect(len(steps) == len(labels), counts)
    for i, step in enumerate(steps):
        record.expect(isinstance(step, str) and step.strip(), f"step {i} must be a text", step)
        record.checked(f"step {i}", step)
    are_right = tuple(_truth(record, f"label {i}", label) for i, label in enumerate(labels))
    texts = (*(f"{step}{STEP_END}" for step in steps[:-1]), steps[-1])
    return _row(record, _asked(record), steps=texts, labels=are_right)


def _truth(record: Record, what: str, value: Any) -> bool:
    """A boolean, which may be 1 or 0 or a text, as CSV files have it."""
    text = str(value).lower() if isinstance(value, bool | int | float | str) else ""
    record.expect(text in _TRUTHS, f"{what} must be true or false, or 1 or 0", value)
    return _TRUTHS[text]


def _annotated(record: Record) -> Row:
    row = record.value
    record.require(ANNOTATED)
    asked: str | Messages
    if conversation.is_chat(row, "instruction"):
        record.expect(not row.get("input"), "'instruction' is messages, so leave 'input' out")
        asked = conversation.asked(record, "instruction")
    else:
        asked = record.text("instruction")
        if row.get("input"):
            asked += "\n\n" + record.text("input")
    responses = (record.text("response1"), record.text("response2"))
    votes = []
    for key in filter(_ANNOTATOR.fullmatch, row):
        vote = row[key]
        is_vote = not isinstance(vote, bool) and str(vote) in ("0", "1", "2")
        record.expect(is_vote, f"{key!r} must be 1, 2 or 0 for a tie", vote)
        votes.append(int(vote))
    return _row(record, asked, responses, votes=tuple(votes))


def _exchange(record: Record, key: str) -> tuple[str | Messages, str | Messages]:
    """The text or messages before the response under ``key``, and the response, a text or turns. Of
    a dialogue as in hh-rlhf it is the last response.
    """
    row = record.value
    keys = PAIR if key in PAIR else (key,)
    if key == "messages" or conversation.is_chat(row, "prompt", *keys):
        record.require(keys)
        return conversation.exchange(record, key)
    if "prompt" in row or key not in PAIR or not isinstance(row.get(key), str):
        record.require(("prompt", *keys))
        return record.text("prompt"), record.text(key)
    before, opening, response = record.text(key).rpartition(ASSISTANT)
    hint = rows.meant("prompt", [other for other in row if other not in PAIR])
    record.expect(opening, _NO_DIALOGUE.format(key) + hint)
    record.expect(HUMAN not in response, f"{key!r} ends with a human turn, not with an answer")
    record.expect(response.strip(), conversation.NO_RESPONSE)
    return before + opening, response


def _row(
    record: Record, before: Text | Messages, responses: Sequence[Any] = (), **fields: Any
) -> Row:
    """The row of a prompt, a text or messages, and its responses, which are texts or ids, or all
    turns.
    """
    if isinstance(before, str | tuple):
        return Row(before, tuple(responses), record.source, **fields)
    fields["messages"] = before
    if any(isinstance(response, list) for response in responses):
        fields["answers"] = tuple(responses)
        responses = list(map(json.dumps, responses))
    return Row("", tuple(responses), record.source, **fields)


def _answers(record: Record) -> tuple[Row, Ranks]:
    """A row with the responses of a pair, or with K responses, and their ranks."""
    row = record.value
    ranks = _FIRST_IS_BEST
    if form_of(row).kind == "annotated":
        annotated = _annotated(record)
        if annotated.responses[0] == annotated.responses[1]:
            raise Drop(record.source, EQUAL)
        if annotated.majority not in (1, 2):
            raise Drop(record.source, NO_MAJORITY)
        best_first = annotated.responses[:: 1 if annotated.majority == 1 else -1]
        return replace(annotated, responses=best_first, votes=()), ranks
    if "responses" in row:
        answers, ranks = _several(record)
    else:
        answers = _pair(record)
    category = str(row.get("category") or row.get("subset") or "")
    return replace(answers, category=category) if category else answers, ranks


def _pair(record: Record) -> Row:
    """A chosen and a rejected response."""
    row = record.value
    before: Text | Messages
    chosen: str | Messages
    rejected: str | Messages
    if conversation.is_chat(row, "prompt", *PAIR):
        before, chosen, rejected = conversation.pair(record, PAIR)
    else:
        before, chosen = _exchange(record, "chosen")
        other, rejected = _exchange(record, "rejected")
        record.expect(other == before, conversation.APART)
    if chosen == rejected:
        raise Drop(record.source, EQUAL)
    for label in ("best", "ranking", "ranks"):
        if row.get(label) is not None:
            first, second = _ranks(record, label, 2)
            record.expect(first <= second, _CONTRADICTED)
    given = row.get("margin")
    try:
        margin = 0.0 if given in (None, "") else float(given)
    except (TypeError, ValueError):
        margin = math.nan
    what = "'margin' must be a number that is not negative"
    record.expect(0 <= margin < _MOST, what, given)
    return _row(record, before, (chosen, rejected), margin=margin)


def _several(record: Record) -> tuple[Row, Ranks]:
    """A row of K responses and their ranks; no ranks if it has targets only."""
    row = record.value
    given = row["responses"]
    record.expect(isinstance(given, list), "'responses' must be a list", given)
    count = len(given)
    what = f"holds {count:,} responses, of which a row may have {MOST_RESPONSES}; take some"
    record.expect(count <= MOST_RESPONSES, what)
    responses = tuple(_text_or_ids(record, f"response {i}", text) for i, text in enumerate(given))
    labels = [key for key in LABELS if row.get(key) is not None]
    targets = _numbers(record, "targets", count) if "targets" in labels else None
    is_enough = count > 1 or targets
    record.expect(is_enough, f"a comparison needs at least 2 responses, found {count}")
    wanted = f"expected one of the keys {', '.join(LABELS)}, found {', '.join(labels or row)}"
    record.expect(targets or len(labels) == 1, wanted)
    if targets is None and len(set(responses)) == 1:
        raise Drop(record.source, EQUAL if count == 2 else ALL_EQUAL)
    ranks: Ranks = ()
    if labels[0] != "targets":
        ranks = _ranks(record, labels[0], count)
        best = [responses[i] for i in range(count) if ranks[i] == min(ranks)]
        record.expect(row.get("chosen", best[0]) in best, _CONTRADICTED)
    best_one = ranks.index(0) if labels == ["best"] else None
    return _row(record, _asked(record), responses, targets=targets, best=best_one), ranks


def _text_or_ids(record: Record, what: str, value: Any, may_be_space: bool = False) -> Text:
    if isinstance(value, str):
        return record.checked(what, value, may_be_space)
    is_list = isinstance(value, list)
    record.expect(is_list, f"{what} must be a string or a list of token ids", value)
    for i in value:
        record.expect(type(i) is int and i >= 0, f"{what} must hold token ids", i)
    ids = tuple(i for i in value if i != PAD_ID)
    record.expect(ids, f"{what} is empty")
    return ids


def _ranks(record: Record, label: str, count: int) -> Ranks:
    """The rank of each response; 0 is the best rank of ``best`` and of ``ranking``."""
    if label == "ranks":
        return _numbers(record, label, count)
    value = record.value[label]
    numbers = [*range(count)]
    # As texts, because True == 1.
    found = sorted(map(repr, value)) if isinstance(value, list) else None
    if label == "ranking":
        what = (
            f"'ranking' must hold each response number from 0 to {count - 1} once, best first "
            "('ranks' holds ranks)"
        )
        record.expect(found == sorted(map(repr, numbers)), what, value)
        return tuple(float(value.index(i)) for i in numbers)
    if found == ["0"] * (count - 1) + ["1"]:  # a list with a 1 at the place of the best response
        value = value.index(1)
    is_number = type(value) is int and value in numbers
    what = f"'best' must be the number of a response, 0 to {count - 1}"
    record.expect(is_number, what, value)
    return tuple(float(i != value) for i in numbers)


def _numbers(record: Record, key: str, count: int) -> tuple[float, ...]:
    values = record.value[key]
    is_list = isinstance(values, list) and len(values) == count
    what = f"{key!r} must be a list of {count} numbers, one for each response"
    record.expect(is_list, what, values)
    for value in values:
        fits = type(value) in (int, float) and abs(value) < _MOST
        record.expect(fits, f"{key!r} must hold numbers", value)
    return tuple(map(float, values))


def _pairs(row: Row, ranks: Ranks) -> list[Row]:
    """All ordered pairs of a ranking, or the best response with each other one. Each of n pairs has
    the weight 1 / n.

    Ties and equal texts make no pair. A row without a pair is dropped.
    """
    if len(set(ranks)) == 1:
        raise Drop(row.source, "all responses are ranked equal")
    if row.is_pair and ranks == _FIRST_IS_BEST and row.best is None:
        return [row]
    ranked = zip(row.responses, ranks, strict=True)
    pairs = [
        (better, worse)
        for (better, rank), (worse, other) in itertools.permutations(ranked, 2)
        if rank < other and better != worse
    ]
    if not pairs:
        raise Drop(row.source, ALL_EQUAL)
    weight = 1 / len(pairs) if len(pairs) > 1 else None
    # The targets are those of the responses in their order before.
    return [replace(row, responses=pair, best=None, targets=None, weight=weight) for pair in pairs]
