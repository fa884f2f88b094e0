"""Reads the data of an evaluation from files.

- prompts: whatever `formats.read` reads; a column ``answerable`` (true or false) says whether a
  model can know the answer.
- safety: prompts with a column ``label``, safe or unsafe, as the CSV of XSTest (Röttger et al.
  2024) has it.
- preferences: pairs and rankings, whatever `formats.read` reads; a key ``category`` or ``subset``
  splits them, as in the HHH alignment data (Askell et al. 2021).
- annotated: ``{instruction, input, response1, response2, annotator1, annotator2, ...}`` as in
  PandaLM's test set (Wang et al. 2023): each annotator says 1, 2 or 0, a tie.
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
from rlhf_jax.data import rows
from rlhf_jax.errors import UserError, check_pattern

TIE = 0
ANSWERABLE = {"true": True, "false": False, "none": None, "": None}


@dataclasses.dataclass(frozen=True)
class CustomCategory:
    """A category of the user's own. Exactly one of patterns, keywords and score judges it, or the
    measures of helpfulness.
    """

    prompts: tuple[str, ...] = ()
    """Files of prompts; empty: those of --prompts."""
    patterns: tuple[str, ...] = ()
    """Regular expressions: the share of responses in which one is found, in any case of letters."""
    keywords: tuple[str, ...] = ()
    """Words or phrases: the share of responses in which one stands as whole words, in any case of
    letters.
    """
    score: str | None = None
    """FILE.py:FUNCTION or another SPEC of --reward: the mean score of the responses."""

    texts: tuple[str, ...] = ()
    """The prompts themselves, of a category that is a list of them: judged as helpfulness is."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """One expression for all patterns or keywords."""
        either = [f"(?:{pattern})" for pattern in self.patterns]
        either += [rf"(?<!\w){re.escape(keyword)}(?!\w)" for keyword in self.keywords]
        return re.compile("|".join(either), re.IGNORECASE)


def check_safety(prompts: Sequence[rows.Row]) -> None:
    """Raises UserError for a prompt without a column ``label``, safe or unsafe."""
    for row in prompts:
        label = row.columns.get("label")
        if label not in ("safe", "unsafe"):
            raise UserError(
                f"{row.source}: a prompt for --safety needs a key 'label', safe or unsafe, found "
                f"{label!r}"
            )


def answerable(row: rows.Row) -> bool | None:
    """The prompt's column ``answerable``; None if it has none."""
    value = row.columns.get("answerable")
    word = str(value).lower()
    if word not in ANSWERABLE:
        raise UserError(
            f"{row.source}: 'answerable' must be true or false, found {rows.kind(value)}"
        )
    return ANSWERABLE[word]


def read_categories(path: str, trust: bool = False) -> dict[str, CustomCategory]:
    """``{name: category}`` of a YAML file in which each category is a mapping under its name, or a
    list of prompts. Without ``trust``, ``config.check_trusted`` says what it may name.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--categories {path}: no such file")
    try:
        content = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError:
        content = None  # config.read says where
    names = content if isinstance(content, dict) and content else {"NAME": None}
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise UserError(
                f"{path}: a category's name is made of letters, digits and _, found {name!r}"
            )
    kinds = [
        (name, tuple[str, ...] if isinstance(value, list) else CustomCategory)
        for name, value in names.items()
    ]
    settings = config.read(dataclasses.make_dataclass("_", kinds), file)
    if not trust:
        outside = (".score", ".prompts")  # all other values are texts
        config.check_trusted({key: settings[key] for key in settings if key.endswith(outside)})
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    places: dict[str, str] = {}
    for key, (value, place) in settings.items():
        name, _, field = key.partition(".")
        given[name][field or "texts"] = value
        places.setdefault(name, place)
    categories = {name: CustomCategory(**fields) for name, fields in given.items()}
    for name, category in categories.items():
        _check_category(category, f"{places.get(name, f'{path}, line 1')}: {name}")
    return categories


def _check_category(category: CustomCategory, where: str) -> None:
    names = ("patterns", "keywords", "score", "texts")
    judges = [name for name in names if getattr(category, name)]
    if len(judges) != 1:
        raise UserError(
            f"{where} needs exactly one of {', '.join(names)} (or is a list of prompts), found "
            f"{' and '.join(judges) or 'none'}"
        )
    if "" in (*category.patterns, *category.keywords, *category.texts):
        raise UserError(f"{where}.{judges[0]} holds an empty text")
    for pattern in category.patterns:
        check_pattern(f"{where}.patterns holds {pattern!r}, which", pattern)
