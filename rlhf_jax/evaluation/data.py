"""Reads the data of an evaluation from files.

- prompts: whatever `formats.read` reads; a column ``answerable`` (true or false) says whether a
  model can know the answer.
- safety: prompts with a column ``label``, safe or unsafe, as the CSV of XSTest (Röttger et al.
  2024) has it.
- preferences: pairs and rankings, whatever `formats.read` reads; a key ``category`` or ``subset``
  splits them, as in the HHH alignment data (Askell et al. 2021).
- annotated: ``{instruction, input, response1, response2, annotator1, annotator2, ...}`` as in
  PandaLM's test set (Wang et al. 2023): each annotator says 1, 2 or 0, a tie.
- custom NAME: the prompts of a category of the user's own, in a YAML file.

Errors name the row's file and line.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf_jax import config
from rlhf_jax.data import chat, formats, rows
from rlhf_jax.errors import UserError, check_pattern, logger
from rlhf_jax.evaluation.settings import Config

# The kinds of the sets that are not prompts.
KINDS: dict[str, rows.Kind] = {"preferences": "pairs", "annotated": "annotated"}
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


Categories = Mapping[str, CustomCategory]
Sets = Mapping[str, formats.ReadResult]


def read(settings: Config, template: chat.ChatTemplate) -> tuple[Sets, Categories]:
    """``{set: its rows}`` of all data, and the user's own categories.

    Raises:
        UserError: a file or row that cannot be used, a column that no set has, a category without
            prompts.
    """
    categories = {}
    if settings.categories:
        categories = read_categories(settings.categories, settings.trust_config)
    given: dict[str, Any] = {
        name: getattr(settings, name) for name in ("prompts", "safety", "preferences", "annotated")
    }
    given |= {f"custom {name}": category.prompts for name, category in categories.items()}
    sets = {
        name: formats.read(
            KINDS.get(name, "prompts"),
            files,
            template=template,
            columns=settings.columns,
            shares_columns=True,
            on_bad_row=settings.on_bad_row,
        )
        for name, files in given.items()
        if files
    }
    for entry in settings.columns:
        sentences = [result.unused_columns.get(entry) for result in sets.values()]
        if sentences and all(sentences):
            raise UserError(str(sentences[0]))
    for name, category in categories.items():
        place = f"{settings.categories}: {name}"
        if category.texts:
            sets[f"custom {name}"] = formats.ReadResult(
                [
                    rows.Row(text, (), f"{place}, prompt {number}")
                    for number, text in enumerate(category.texts, 1)
                ]
            )
        elif not (category.prompts or settings.prompts):
            raise UserError(f"{place} has no prompts of its own; add them or give --prompts")
    for row in sets["safety"].rows if settings.safety else ():
        label = row.columns.get("label")
        if label not in ("safe", "unsafe"):
            raise UserError(
                f"{row.source}: a prompt for --safety needs a key 'label', safe or unsafe, found "
                f"{label!r}"
            )
    for name, result in sets.items():
        logger.info(f"{name}: {result.describe()}")
    return sets, categories


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
    kinds: dict[str, Any] = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(
                f"{path}: a category's name is made of letters, digits and _, found {name!r}"
            )
        kinds[name] = tuple[str, ...] if isinstance(value, list) else CustomCategory
    keys = ", ".join(field.name for field in dataclasses.fields(CustomCategory)[:-1])
    values = config.read(
        CustomCategory, file, kinds, lambda key: f"the keys of a category are {keys}"
    )
    if not kinds:
        raise UserError(f"{path}: names no category; a category is a mapping under its name")
    if not trust:
        outside = (".score", ".prompts")  # all other values are texts
        config.check_trusted({key: values[key] for key in values if key.endswith(outside)})
    categories = {}
    for name in kinds:
        own = {key: given for key, given in values.items() if key.split(".")[0] == name}
        fields = {key.partition(".")[2] or "texts": value for key, (value, _) in own.items()}
        category = categories[name] = CustomCategory(**fields)
        where = f"{next((place for _, place in own.values()), f'{path}, line 1')}: {name}"
        judges = [key for key in ("patterns", "keywords", "score", "texts") if fields.get(key)]
        if len(judges) != 1:
            raise UserError(
                f"{where} needs exactly one of patterns, keywords, score (or is a list of "
                f"prompts), found {' and '.join(judges) or 'none'}"
            )
        if "" in (*category.patterns, *category.keywords, *category.texts):
            raise UserError(f"{where}.{judges[0]} holds an empty text")
        for pattern in category.patterns:
            check_pattern(f"{where}.patterns holds {pattern!r}, which", pattern)
    return categories
