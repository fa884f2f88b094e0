"""Records of data files as rows: demonstrations, comparisons or prompts, by the keys that a record
has.

- ``{prompt, response}``: a demonstration.
- ``{messages}``: a demonstration if it ends with the assistant's turn (`chat`), else a prompt.
- ``{text}``, or a whole text file: a text for a language model, without a prompt.
- ``{prompt, response, desirable}``: feedback: one answer, or messages, and whether it is
  desirable, a boolean.
- ``{prompt, chosen, rejected}``: a comparison; each value may be messages.
- ``{prompt, chosen: [], rejected: []}``: the right and the wrong ones of several answers, as in
  RewardBench 2.
- ``{chosen, rejected}``: two dialogues as in hh-rlhf (Bai et al. 2022) that differ in the last
  answer.
- ``{query, sample0, sample1, ..., best}``: as in lm-human-preferences (Ziegler et al. 2019), texts
  or GPT-2 token ids.
- ``{prompt, responses, LABEL}``: LABEL is ``best`` (a number from 0), ``ranking`` (response
  numbers, best first), ``ranks`` (the lowest is best, equal ones are ties) or ``targets``.
- ``{instruction, response1, response2}``: annotated, as in PandaLM (Wang et al. 2023), with
  ``input`` and ``annotator1``, ..., each of which says 1, 2 or 0, a tie; to a stage it is a
  comparison by majority.
- ``{prompt, ...}`` or a string: a prompt; other keys are columns for the reward.

As in InstructGPT (Ouyang et al. 2022) a ranking becomes all of its ordered pairs, which together
count as one comparison. Every row remembers where it came from, so that later stages can name it in
their errors.
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data import chat, demo, rows
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.columns import adapted, unused
from rlhf_jax.data.files import Source, parse_text, read_source
from rlhf_jax.data.rows import BadRow, Drop, Kind, Message, Record, Row, Text
from rlhf_jax.errors import UserError

Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

PAIR = ("chosen", "rejected")
ANNOTATED = ("instruction", "response1", "response2", "annotator1")
LABELS = ("best", "ranking", "ranks", "targets")
_PREFERENCES = "preference_data.json"
# The file of each kind in the pipeline's folder.
FILES: dict[Kind, str] = {
    "demonstrations": "sft_data.json",
    "prompts": "prompts.json",
    "feedback": _PREFERENCES,
    "pairs": _PREFERENCES,
    "comparisons": _PREFERENCES,
}
# The kind of a record is that of the first format whose keys it has. A record with ``responses`` is
# a comparison before any of them.
FORMATS: dict[tuple[str, ...], Kind] = {
    ("prompt", *PAIR): "comparisons",
    PAIR: "comparisons",
    ("messages", "desirable"): "feedback",
    ("messages",): "demonstrations",
    ("prompt", "response", "desirable"): "feedback",
    ("prompt", "response"): "demonstrations",
    ANNOTATED: "annotated",
    ("prompt",): "prompts",
    ("text",): "demonstrations",
}
KNOWN = tuple(dict.fromkeys(itertools.chain(*FORMATS, ("query", "responses"), LABELS)))
DEMO = "demo"  # the data of this name is generated

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_CONTRADICTED = "'chosen' is not the response that the row's label says is the best"
_NO_DIALOGUE = (
    "{!r} must be a dialogue of turns '\\n\\nHuman:' and '\\n\\nAssistant:' in a row "
    "without a prompt"
)
PAD_ID = 50259  # of lm-human-preferences, GPT-2's vocabulary size + 2; no token of GPT-2
EQUAL = "chosen and rejected are identical"
ALL_EQUAL = "all responses are identical"
NO_MAJORITY = "no majority of the annotators prefers one response"
_ANNOTATOR = re.compile(r"annotator[0-9]+")


@dataclasses.dataclass(frozen=True)
class ReadResult:
    """The rows in file order, and what else was found."""

    rows: list[Row]
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """{reason: places of the rows that were left out for it}."""
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    """{source: sha256}."""
    errors: list[UserError] = dataclasses.field(default_factory=list)
    """Of the rows that cannot be used."""
    unused_columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """{column that no row has: sentence}."""

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


def read(
    kind: Kind,
    names: Names,
    *,
    seed: int = 0,
    template: ChatTemplate | None = None,
    columns: Sequence[str] = (),
    shares_columns: bool = False,
    on_bad_row: rows.OnBadRow = "error",
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
        from ``seed``.
      template: renders messages; by default `chat.PLAIN`.
      columns: OURS=THEIRS, as in `columns`. A column that no row has is an error.
      shares_columns: the columns belong to other data too. A column that no row has is then only
        noted in the result.
      on_bad_row: ``error``: one error names all rows that the stage cannot use; ``drop``: these
        rows are left out and counted. A file that cannot be read to its end is always an error.

    Raises:
      UserError: no data or no usable row; a file that cannot be read; bad rows; a column that no
        row has.
    """
    sources = _sources(kind, names, seed)
    records = [record for source in sources.values() for record in source.records]
    unused_columns = unused(records, columns)
    if unused_columns and not shares_columns:
        raise UserError("\n".join(unused_columns.values()))
    result = parse_all(kind, adapted(records, columns), template or ChatTemplate(), on_bad_row)
    result.unused_columns.update(unused_columns)
    if result.errors:
        lines = rows.summary(result.errors)
        if result.rows and any(isinstance(error, BadRow) for error in result.errors):
            lines.append("--on-bad-row drop leaves such rows out and counts them")
        raise UserError("\n".join(lines))
    result.fingerprints.update({name: source.fingerprint for name, source in sources.items()})
    if not result.rows:
        raise UserError(f"{', '.join(sources)}: no usable row: {result.describe()}")
    check_labels(result.rows)
    return result


def fingerprints(kind: Kind, names: Names, *, seed: int = 0) -> dict[str, str]:
    """{source: sha256} of the sources that ``read`` would read."""
    return {name: source.fingerprint for name, source in _sources(kind, names, seed).items()}


def parse_all(
    kind: Kind,
    records: Sequence[Record],
    template: ChatTemplate,
    on_bad_row: rows.OnBadRow,
) -> ReadResult:
    """The rows of all records. ``drop`` leaves out the records of a `BadRow` and counts them."""
    result = ReadResult([])
    seen: set[Text] = set()
    left_out = BadRow if on_bad_row == "drop" else Drop
    for record in records:
        try:
            parsed = parse(kind, record, template)
            if kind == "prompts":
                prompt = parsed[0].prompt
                if prompt in seen and not _is_prompt(record.value):
                    raise Drop(record.source, "repeated prompt")
                seen.add(prompt)
            result.rows.extend(parsed)
        except UserError as error:
            if isinstance(error, left_out):
                result.places.setdefault(error.what, []).append(error.source)
            else:
                result.errors.append(error)
    return result


def _is_prompt(value: Any) -> bool:
    """Whether the keys of a record are those of a prompt, not of a row with answers."""
    form = form_of(value)
    return form is None or form[0] == "prompts"


def _sources(kind: Kind, names: Names, seed: int) -> dict[str, Source]:
    several = [names] if isinstance(names, str | os.PathLike) else names
    given = [str(name) for name in several]
    if not given:
        folder = f"a folder that holds {FILES[kind]}"
        raise UserError(
            f"no data: give --data FILE with {kind}, {folder}, or `--data demo` for the generated "
            "corpus"
        )
    if DEMO in given:
        if len(given) > 1:
            raise UserError(f"--data {' '.join(given)}: `{DEMO}` cannot be mixed with files")
        return _demo(FILES[kind], seed)
    sources = {}
    for name in given:
        is_folder = kind in FILES and os.path.isdir(name)
        file = str(Path(name) / FILES[kind]) if is_folder else name
        sources[file] = read_source(file, whole_text=kind == "demonstrations")
    return sources


def _demo(file: str, seed: int) -> dict[str, Source]:
    """A file of the generated corpus."""
    name = f"{DEMO}/{file}"
    content = demo.file_text(file, seed)
    records, form = parse_text(content, name)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return {name: Source(list(records), digest, form)}


def check_labels(read_rows: Sequence[Row]) -> None:
    """Raises `UserError` if some rows have targets and others a preference, or some are plain texts
    and others have prompts.
    """
    have = [row.source for row in read_rows if row.targets is not None]
    lack = [row.source for row in read_rows if row.targets is None]
    if have and lack:
        raise UserError(
            f"{lack[0]}: has no targets but {have[0]} has; train on one kind of label at a time"
        )
    plain = [row.source for row in read_rows if row.is_plain_text]
    framed = [row.source for row in read_rows if not row.is_plain_text]
    if plain and framed:
        raise UserError(
            f"{plain[0]}: is plain text but {framed[0]} has a prompt; train on one kind at a time"
        )


def form_of(value: Any) -> tuple[Kind, str] | None:
    """The kind of data that a record's keys make it, and the name of its format; None if the format
    is unknown.
    """
    if isinstance(value, str):
        return "prompts", "text"
    if not isinstance(value, dict):
        return None
    if "responses" in value:
        present = [key for key in ("prompt", "responses", *LABELS) if key in value]
        return "comparisons", ", ".join(present)
    for keys, kind in FORMATS.items():
        if all(key in value for key in keys):
            if keys == ("messages",) and not chat.is_answered(value["messages"]):
                kind = "prompts"
            return kind, ", ".join(keys)
    return None


def keys_read(row: dict[str, Any]) -> set[str]:
    """The keys of a record that its format reads."""
    kind, name = form_of(row) or ("", "")
    keys = set(name.split(", "))
    if kind == "annotated":
        keys |= {"input", *filter(_ANNOTATOR.fullmatch, row)}
    return keys & set(row)


def parse(kind: Kind, record: Record, template: ChatTemplate) -> Sequence[Row]:
    """The rows of one record.

    Raises:
      UserError: the record could not be read; as `BadRow` if it has another form or a wrong value.
      Drop: the row is to be left out.
    """
    if kind == "prompts":
        return [_prompt(record, template)]
    if kind == "annotated":
        return [_annotated(record)]
    if kind == "feedback":
        return _feedback(record, template)
    if kind == "demonstrations":
        return [_demonstration(record, template)]
    rows.fields(record, f"prompt, {', '.join(PAIR)}")
    comparison, ranks = _answers(record, template)
    is_choice = comparison.best is not None and len(comparison.responses) > 2
    if kind == "comparisons" and (is_choice or comparison.targets is not None):
        return [comparison]
    return _pairs(comparison, _needed(ranks, kind, record))


def _needed(ranks: tuple[float, ...] | None, kind: Kind, record: Record) -> tuple[float, ...]:
    """The ranks. Raises BadRow if the record has none."""
    if ranks is None:
        raise BadRow(
            record.source,
            f"holds targets, which are no preference; {kind} need best, ranking or ranks",
        )
    return ranks


def _demonstration(record: Record, template: ChatTemplate) -> Row:
    """A text, a response, or the best response of a comparison, the first of several."""
    row = rows.fields(record, "prompt, response")
    if form_of(row) == ("demonstrations", "text"):
        return Row("", (rows.text(record, "text"),), record.source)
    if "responses" in row or _is_annotated(row):
        comparison, ranks = _answers(record, template)
        first, *_ = _best(_needed(ranks, "demonstrations", record))
        best = comparison.responses[first]
        return dataclasses.replace(comparison, responses=(best,), best=None, category="")
    is_pair = "response" not in row and all(key in row for key in PAIR)
    key = "chosen" if is_pair else "response"
    before, response = _exchange(record, "messages" if "messages" in row else key)
    return _row(record, before, template, (response,))


def _feedback(record: Record, template: ChatTemplate) -> list[Row]:
    """Responses with the target 1 for desirable ones, 0 for others."""
    row = rows.fields(record, "prompt, response, desirable")
    if "desirable" not in row and ("responses" in row or "chosen" in row or _is_annotated(row)):
        judged = []
        for pair in parse("pairs", record, template):
            chosen, rejected = pair.responses
            judged.append(dataclasses.replace(pair, responses=(chosen,), targets=(1.0,)))
            judged.append(dataclasses.replace(pair, responses=(rejected,), targets=(0.0,)))
        return judged
    rows.require(record, ("desirable",))
    is_bool = isinstance(row["desirable"], bool)
    rows.expect(is_bool, record, "'desirable' must be true or false", row["desirable"])
    before, response = _exchange(record, "messages" if "messages" in row else "response")
    targets = (float(row["desirable"]),)
    return [_row(record, before, template, (response,), targets=targets)]


def _prompt(record: Record, template: ChatTemplate) -> Row:
    if isinstance(record.value, str):
        return Row(rows.checked(record, "the prompt", record.value), (), record.source)
    row = rows.fields(record, "prompt, or a string")
    if "responses" in row:
        return _row(record, _before_answers(record), template)
    others = ("prompt", "response", "messages", *PAIR)
    columns = {key: value for key, value in row.items() if key not in others}
    return _row(record, _asked(record), template, columns=columns)


def _asked(record: Record) -> str | list[Message]:
    """The prompt of a record of any form with at most two responses."""
    row = record.value
    if "messages" in row:
        return chat.conversation(record, "messages")
    key = "chosen" if "chosen" in row and "prompt" not in row else "prompt"
    if chat.is_chat(row, key):
        return chat.conversation(record, key)
    response = "chosen" if "chosen" in row else "response"
    if key == "chosen" or chat.is_chat(row, response):
        before, _ = _exchange(record, response)
        return before
    rows.require(record, ("prompt",))
    return rows.text(record, "prompt")


def _is_annotated(row: dict[str, Any]) -> bool:
    form = form_of(row)
    return form is not None and form[0] == "annotated"


def _annotated(record: Record) -> Row:
    row = rows.fields(record, ", ".join(ANNOTATED))
    rows.require(record, ANNOTATED)
    prompt = rows.text(record, "instruction")
    if row.get("input"):
        prompt += "\n\n" + rows.text(record, "input")
    responses = (rows.text(record, "response1"), rows.text(record, "response2"))
    votes = []
    for key in filter(_ANNOTATOR.fullmatch, row):
        vote = row[key]
        is_vote = not isinstance(vote, bool) and str(vote) in ("0", "1", "2")
        rows.expect(is_vote, record, f"{key!r} must be 1, 2 or 0 for a tie", vote)
        votes.append(int(vote))
    return Row(prompt, responses, record.source, votes=tuple(votes))


def _exchange(record: Record, key: str) -> tuple[str | list[Message], str]:
    """The text or messages before the response under ``key``, and the response. Of a dialogue it is
    the last response.
    """
    row = record.value
    keys = PAIR if key in PAIR else (key,)
    if key == "messages" or chat.is_chat(row, "prompt", *keys):
        rows.require(record, keys)
        return chat.exchange(record, key)
    if "prompt" not in row and key in PAIR and isinstance(row.get(key), str):
        return _dialogue(record, key)
    rows.require(record, ("prompt", *keys))
    return rows.text(record, "prompt"), rows.text(record, key)


def _dialogue(record: Record, key: str) -> tuple[str, str]:
    """The turns of a dialogue of hh-rlhf up to its last response, and that response."""
    row = record.value
    before, opening, response = row[key].rpartition(ASSISTANT)
    hint = rows.meant("prompt", [other for other in row if other not in PAIR])
    rows.expect(opening, record, _NO_DIALOGUE.format(key) + hint)
    ends_with_answer = HUMAN not in response
    rows.expect(ends_with_answer, record, f"{key!r} ends with a human turn, not with an answer")
    rows.expect(response.strip(), record, chat.NO_RESPONSE)
    return rows.checked(record, key, before + opening), rows.checked(record, key, response)


def _row(
    record: Record,
    before: Text | list[Message],
    template: ChatTemplate,
    responses: tuple[Text, ...] = (),
    **fields: Any,
) -> Row:
    """The row of a prompt and its responses; the template renders a prompt of messages."""
    if not isinstance(before, list):
        return Row(before, responses, record.source, **fields)
    prompt = template.prompt(before, record.source)
    return Row(prompt, responses, record.source, messages=before, **fields)


def _answers(record: Record, template: ChatTemplate) -> tuple[Row, tuple[float, ...] | None]:
    """A row with the responses of a pair, or with K responses, and their ranks, if known. The
    lowest rank is the best.
    """
    row = record.value
    if _is_annotated(row):
        return _by_majority(_annotated(record)), (0, 1)
    category = str(row.get("category") or row.get("subset") or "")
    if "responses" in row:
        return _several(record, template, category)
    before, chosen = _exchange(record, "chosen")
    other, rejected = _exchange(record, "rejected")
    rows.expect(other == before, record, "dialogues differ before the last response")
    if chosen == rejected:
        raise Drop(record.source, EQUAL)
    for label in ("best", "ranking", "ranks"):
        if row.get(label) is not None:
            ranks = _ranks(record, label, 2)
            rows.expect(0 in _best(ranks), record, _CONTRADICTED)
    pair = _row(record, before, template, (chosen, rejected), category=category)
    return pair, (0, 1)


def _several(
    record: Record,
    template: ChatTemplate,
    category: str,
) -> tuple[Row, tuple[float, ...] | None]:
    """A row of K responses and their ranks, which are None if it has targets only."""
    row = record.value
    given = row["responses"]
    rows.expect(isinstance(given, list), record, "'responses' must be a list", given)
    count = len(given)
    responses = tuple(_text_or_ids(record, f"response {i}", value) for i, value in enumerate(given))
    labels = [key for key in LABELS if row.get(key) is not None]
    targets = _numbers(record, "targets", count) if "targets" in labels else None
    least = 1 if targets else 2
    wanted = f"a comparison needs at least 2 responses, found {count}"
    rows.expect(count >= least, record, wanted)
    wanted = f"expected one of the keys {', '.join(LABELS)}, found {', '.join(labels or row)}"
    rows.expect(targets or len(labels) == 1, record, wanted)
    if targets is None and len(set(responses)) == 1:
        raise Drop(record.source, EQUAL if count == 2 else ALL_EQUAL)
    ranks = None
    best = None
    if labels[0] != "targets":
        ranks = _ranks(record, labels[0], count)
        if labels == ["best"]:
            best = ranks.index(0)
        if "chosen" in row:
            is_best = row["chosen"] in [responses[i] for i in _best(ranks)]
            rows.expect(is_best, record, _CONTRADICTED)
    fields: Any = {"best": best, "targets": targets, "category": category}
    return _row(record, _before_answers(record), template, responses, **fields), ranks


def _by_majority(annotated: Row) -> Row:
    """The pair whose chosen response most annotators prefer."""
    if annotated.responses[0] == annotated.responses[1]:
        raise Drop(annotated.source, EQUAL)
    if annotated.majority not in (1, 2):
        raise Drop(annotated.source, NO_MAJORITY)
    first, second = annotated.responses
    pair = (first, second) if annotated.majority == 1 else (second, first)
    return Row(annotated.prompt, pair, annotated.source)


def _before_answers(record: Record) -> Text | list[Message]:
    """The prompt of a row of K responses: text, token ids or messages."""
    rows.require(record, ("prompt",))
    if chat.is_chat(record.value, "prompt"):
        return chat.conversation(record, "prompt")
    return _text_or_ids(record, "'prompt'", record.value["prompt"], may_be_space=True)


def _text_or_ids(
    record: Record,
    what: str,
    value: Any,
    may_be_space: bool = False,
) -> Text:
    if isinstance(value, str):
        return rows.checked(record, what, value, may_be_space)
    expected = f"{what} must be a string or a list of token ids"
    rows.expect(isinstance(value, list), record, expected, value)
    for i in value:
        is_id = type(i) is int and i >= 0
        rows.expect(is_id, record, f"{what} must hold token ids", i)
    ids = tuple(i for i in value if i != PAD_ID)
    rows.expect(ids, record, f"{what} is empty")
    return ids


def _ranks(record: Record, label: str, count: int) -> tuple[float, ...]:
    """The rank of each response."""
    value = record.value[label]
    last = count - 1
    if label == "best":
        one_hot = ["0"] * last + ["1"]  # a list with a 1 at the place of the best response
        if isinstance(value, list) and sorted(map(str, value)) == one_hot:
            value = value.index(1)
        is_number = type(value) is int and 0 <= value < count
        what = f"'best' must be the number of a response, 0 to {last}"
        rows.expect(is_number, record, what, value)
        return tuple(float(i != value) for i in range(count))
    if label == "ranking":
        are_ints = isinstance(value, list) and all(type(i) is int for i in value)
        is_order = are_ints and sorted(value) == [*range(count)]
        what = (
            f"'ranking' must hold each response number from 0 to {last} once, best first "
            "('ranks' holds ranks)"
        )
        rows.expect(is_order, record, what, value)
        return tuple(float(value.index(i)) for i in range(count))
    return _numbers(record, label, count)


def _best(ranks: Sequence[float]) -> list[int]:
    least = min(ranks)
    return [i for i, rank in enumerate(ranks) if rank == least]


def _numbers(record: Record, key: str, count: int) -> tuple[float, ...]:
    values = record.value[key]
    what = f"{key!r} must be a list of {count} numbers, one for each response"
    rows.expect(isinstance(values, list) and len(values) == count, record, what, values)
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and abs(value) < 3.4e38  # as float32
        rows.expect(fits, record, f"{key!r} must hold numbers", value)
    return tuple(map(float, values))


def _pairs(row: Row, ranks: tuple[float, ...]) -> list[Row]:
    """All ordered pairs of a ranking, or the best response with each other one. Each of n pairs has
    the weight 1 / n.

    Ties and equal texts make no pair. A row without a pair is dropped.
    """
    ranked = zip(row.responses, ranks, strict=True)
    pairs = []
    have_ranks = False
    for (better, rank), (worse, other) in itertools.permutations(ranked, 2):
        if rank < other:
            have_ranks = True
            if better != worse:
                pairs.append((better, worse))
    if not pairs:
        raise Drop(row.source, ALL_EQUAL if have_ranks else "all responses are ranked equal")
    weight = 1 / len(pairs) if len(pairs) > 1 else None
    return [dataclasses.replace(row, responses=pair, best=None, weight=weight) for pair in pairs]
