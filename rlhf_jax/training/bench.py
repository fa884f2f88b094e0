"""The data that ``rlhf_jax.evaluation.evaluate`` judges by: which categories there are, and their rows from files.

- prompts: whatever ``data.formats.read`` reads as prompts; a column ``answerable`` (true or false) says which of them a
  model can know the answer to.
- safety: prompts with a column ``label``, safe or unsafe, as the CSV of XSTest (Röttger et al. 2024) has it.
- preferences: pairs and rankings, whatever ``data.formats.read`` reads as pairs; a column ``category`` splits them, as
  in the HHH alignment data (Askell et al. 2021).
- annotated: ``{instruction, input, response1, response2, annotator1, annotator2, ...}`` as in PandaLM's test set (Wang
  et al. 2023): each annotator says 1, 2 or 0, a tie.
- custom: categories of the user's own in a YAML file.

Errors name the row's file and line.
"""

import dataclasses
import keyword
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf_jax import config_files
from rlhf_jax.data import formats, rows
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.files import read_source
from rlhf_jax.data.rows import Record
from rlhf_jax.errors import UserError

TIE = 0


class Annotated(NamedTuple):
    """Two responses, in the file's order, and what each annotator said: 1, 2 or 0, a tie."""

    pair: rows.Pair
    votes: tuple[int, ...]

    @property
    def majority(self) -> int | None:
        """What more annotators said than anything else; None where there is no such thing."""
        (first, most), *others = Counter(self.votes).most_common()
        return None if others and others[0][1] == most else first


@dataclasses.dataclass(frozen=True)
class CustomCategory:
    """A category of the user's own, judged by exactly one of patterns, keywords and score."""

    prompts: tuple[str, ...] = ()
    """Files of prompts; empty: those of --prompts."""
    patterns: tuple[str, ...] = ()
    """Regular expressions: the share of responses in which one is found, in any case of letters."""
    keywords: tuple[str, ...] = ()
    """Words or phrases: the share of responses in which one stands as whole words, in any case of letters."""
    score: str | None = None
    """FILE.py:FUNCTION or another SPEC of --reward: the mean score of the responses."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """What finds the patterns or keywords."""
        found = [f"(?:{pattern})" for pattern in self.patterns]
        found += [rf"(?<!\w){re.escape(keyword)}(?!\w)" for keyword in self.keywords]
        return re.compile("|".join(found), re.IGNORECASE)


def read_safety(paths: Sequence[str], template: ChatTemplate | None = None) -> formats.ReadResult[rows.Prompt]:
    """Prompts whose column ``label`` is safe or unsafe.

    Raises:
      UserError: a row without such a label; or as ``formats.read``.
    """
    result = formats.read("prompts", paths, template=template)
    for row in result.rows:
        if row.columns.get("label") not in ("safe", "unsafe"):
            found = row.columns.get("label")
            raise UserError(
                f"{row.source}: a prompt for --safety needs a key 'label' that is safe or unsafe, found "
                f"{'none' if found is None else repr(found)}"
            )
    return result


def answerable(row: rows.Prompt) -> bool | None:
    """The prompt's column ``answerable``; None where it has none.

    Raises:
      UserError: it is neither true nor false.
    """
    value = row.columns.get("answerable")
    known = {True: True, False: False, "true": True, "false": False, None: None, "": None}
    if isinstance(value, str):
        value = value.lower()
    if not isinstance(value, str | bool | None) or value not in known:
        raise UserError(f"{row.source}: 'answerable' must be true or false, found {rows.kind(value)}")
    return known[value]


def read_preferences(
    paths: Sequence[str], template: ChatTemplate | None = None
) -> tuple[formats.ReadResult[rows.Pair], dict[str, str]]:
    """Pairs of any preference format, and ``{row's source: its category}`` of those whose row has a ``category``.

    Raises:
      UserError: a category that is no text; or as ``formats.read``.
    """
    result = formats.read("pairs", paths, template=template)
    categories = {}
    for path in paths:
        for record in read_source(path).records:
            value = record.value.get("category")
            if value is not None and not isinstance(value, str):
                raise UserError(f"{record.source}: 'category' must be a string, found {rows.kind(value)}")
            if value:
                categories[record.source] = value
    return result, categories


def read_annotated(path: str) -> formats.ReadResult[Annotated]:
    """Pairs with the votes of at least one annotator. A response may be empty, as a model's may be.

    Raises:
      UserError: for whatever is wrong with the file or a row, with file and line.
    """
    source = read_source(path)
    found = [_annotated(record) for record in source.records]
    return formats.ReadResult(found, {}, {path: source.fingerprint})


def _annotated(record: Record) -> Annotated:
    row = rows.fields(record, "instruction, response1, response2, annotator1")
    rows.require(record, ("instruction", "response1", "response2", "annotator1"))
    texts: dict[str, str] = {}
    for key in ("instruction", "input", "response1", "response2"):
        value = "" if key == "input" and row.get(key) is None else row[key]
        if not isinstance(value, str):
            raise UserError(f"{record.source}: {key!r} must be a string, found {rows.kind(value)}")
        texts[key] = value
        rows.checked(record, repr(key), value or ("" if key == "instruction" else " "))
    votes = [_vote(record, key) for key in row if re.fullmatch("annotator[0-9]+", key)]
    prompt = texts["instruction"] + (f"\n\n{texts['input']}" if texts["input"] else "")
    return Annotated(rows.Pair(prompt, texts["response1"], texts["response2"], record.source), tuple(votes))


def _vote(record: Record, key: str) -> int:
    value: Any = record.value[key]
    if isinstance(value, bool) or str(value) not in ("0", "1", "2"):
        raise UserError(f"{record.source}: {key!r} must be 1, 2 or 0 for a tie, found {rows.kind(value)}")
    return int(value)


def read_categories(path: str) -> dict[str, CustomCategory]:
    """``{name: category}`` of a YAML file in which each category is a mapping under its name.

    Raises:
      UserError: no such file; a name, key or value that is not allowed, with its line; a category that is not judged by
        exactly one of patterns, keywords and score; a pattern that is no regular expression.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--categories {path}: no such file")
    try:
        content = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError:
        content = None  # said with its line below
    names = list(content) if isinstance(content, dict) and content else ["NAME"]
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise UserError(f"{path}: a category's name is made of letters, digits and _, found {name!r}")
    kind = dataclasses.make_dataclass("Categories", [(name, CustomCategory) for name in names])
    given = config.read(kind, file)
    found: dict[str, CustomCategory] = {}
    for name in names:
        values = {key.partition(".")[2]: value for key, value in given.items() if key.partition(".")[0] == name}
        category = CustomCategory(**{key: value for key, (value, _) in values.items()})
        line = min((line for _, line in values.values()), default=1)
        judges = [key for key in ("patterns", "keywords", "score") if getattr(category, key)]
        if len(judges) != 1:
            raise UserError(
                f"{path}, line {line}: {name} needs exactly one of patterns, keywords and score, found "
                f"{' and '.join(judges) or 'none'}"
            )
        if "" in (*category.patterns, *category.keywords):
            raise UserError(f"{path}, line {line}: {name}.{judges[0]} holds an empty text, which every response has")
        for pattern in category.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"{path}, line {line}: {name}.patterns holds {pattern!r}, which is no regular expression: {error}"
                ) from None
        found[name] = category
    return found
