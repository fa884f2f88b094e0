"""The data that a run is judged by, read from files.

- prompts: whatever `formats.read` reads; a column ``answerable`` (true or false) says whether a model can know
  the answer.
- safety: prompts with a column ``label``, safe or unsafe, as the CSV of XSTest (Röttger et al. 2024) has it.
- preferences: pairs and rankings, whatever `formats.read` reads; a column ``category`` splits them, as in the HHH
  alignment data (Askell et al. 2021).
- annotated: ``{instruction, input, response1, response2, annotator1, annotator2, ...}`` as in PandaLM's test set (Wang
  et al. 2023): each annotator says 1, 2 or 0, a tie.
- custom: categories of the user's own in a YAML file.

Errors name the row's file and line.
"""

import dataclasses
import keyword
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_jax import config
from rlhf_jax.data import formats, rows
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.columns import adapted
from rlhf_jax.data.files import read_source
from rlhf_jax.errors import UserError

TIE = 0
ANSWERABLE = {True: True, False: False, "true": True, "false": False, None: None, "": None}


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
        """One expression for all patterns or keywords."""
        either = [f"(?:{pattern})" for pattern in self.patterns]
        either += [rf"(?<!\w){re.escape(keyword)}(?!\w)" for keyword in self.keywords]
        return re.compile("|".join(either), re.IGNORECASE)


def read_safety(
    paths: Sequence[str], template: ChatTemplate | None = None, **how: Any
) -> formats.ReadResult[rows.Prompt]:
    """Prompts whose column ``label`` is safe or unsafe; ``how``: ``columns`` and ``on_bad_row`` of `formats.read`."""
    result = formats.read("prompts", paths, template=template, **how)
    for row in result.rows:
        label = row.columns.get("label")
        if label not in ("safe", "unsafe"):
            found = "none" if label is None else repr(label)
            raise UserError(f"{row.source}: a prompt for --safety needs a key 'label', safe or unsafe, found {found}")
    return result


def answerable(row: rows.Prompt) -> bool | None:
    """The prompt's column ``answerable``; None if it has none."""
    value = row.columns.get("answerable")
    value = value.lower() if isinstance(value, str) else value
    if not isinstance(value, str | bool | None) or value not in ANSWERABLE:
        raise UserError(f"{row.source}: 'answerable' must be true or false, found {rows.kind(value)}")
    return ANSWERABLE[value]


def read_preferences(
    paths: Sequence[str], template: ChatTemplate | None = None, columns: Sequence[str] = (), **how: Any
) -> tuple[formats.ReadResult[rows.Pair], dict[str, str]]:
    """Pairs of any preference format, and ``{row's source: its category}`` of those whose row has a ``category``."""
    result = formats.read("pairs", paths, template=template, columns=columns, **how)
    records = [record for path in paths for record in read_source(path).records]
    categories = {}
    for record in adapted(records, columns):
        value = record.value.get("category") if isinstance(record.value, dict) else None
        if value is not None and not isinstance(value, str):
            raise UserError(f"{record.source}: 'category' must be a string, found {rows.kind(value)}")
        if value:
            categories[record.source] = value
    return result, categories


def read_annotated(path: str, **how: Any) -> formats.ReadResult[rows.Annotated]:
    """Pairs with the votes of at least one annotator; ``how`` as `read_safety`."""
    return formats.read("annotated", path, **how)


def read_categories(path: str) -> dict[str, CustomCategory]:
    """``{name: category}`` of a YAML file in which each category is a mapping under its name."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--categories {path}: no such file")
    try:
        content = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError:
        content = None  # config.read says where
    names = list(content) if isinstance(content, dict) and content else ["NAME"]
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise UserError(f"{path}: a category's name is made of letters, digits and _, found {name!r}")
    settings = config.read(dataclasses.make_dataclass("_", [(name, CustomCategory) for name in names]), file)
    categories = {}
    for name in names:
        given = {key.partition(".")[2]: item for key, item in settings.items() if key.partition(".")[0] == name}
        categories[name] = CustomCategory(**{key: value for key, (value, _) in given.items()})
        line = min((line for _, line in given.values()), default=1)
        _check_category(categories[name], f"{path}, line {line}: {name}")
    return categories


def _check_category(category: CustomCategory, where: str) -> None:
    judges = [key for key in ("patterns", "keywords", "score") if getattr(category, key)]
    if len(judges) != 1:
        listed = " and ".join(judges) or "none"
        raise UserError(f"{where} needs exactly one of patterns, keywords and score, found {listed}")
    if "" in (*category.patterns, *category.keywords):
        raise UserError(f"{where}.{judges[0]} holds an empty text, which every response has")
    for pattern in category.patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{where}.patterns holds {pattern!r}, which is no regular expression: {error}") from None
