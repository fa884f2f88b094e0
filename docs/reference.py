"""The settings of a run as tables, from the settings themselves: their keys, their defaults and the
texts below their fields, which are those of ``--help``.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from typing import Any, Literal, NamedTuple

import yaml


class Setting(NamedTuple):
    key: str
    default: str
    text: str


class Table(NamedTuple):
    """A section of the settings; the first one, without a name, has those of no section."""

    name: str
    text: str
    rows: list[Setting]


def texts_of(section: type) -> dict[str, str]:
    """{field: the text below it} of a class of settings and of those that it extends."""
    texts: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                texts[ast.unparse(field.target)] = " ".join(text.split())
    return texts


def choices(kind: Any) -> list[str]:
    """The words among which a type lets choose."""
    if typing.get_origin(kind) is Literal:
        return [choice for choice in typing.get_args(kind) if isinstance(choice, str)]
    return [choice for part in typing.get_args(kind) for choice in choices(part)]


def rows_of(section: Any, defaults: dict[str, Any], prefix: str) -> list[Setting]:
    """A row for each field of a section, those of the sections in it too.

    Args:
        section: the section with its default values.
        defaults: the same as YAML writes them.
        prefix: the section's key with a dot behind it.
    """
    texts = texts_of(type(section))
    kinds = typing.get_type_hints(type(section))
    rows = []
    for key, value in defaults.items():
        inner = getattr(section, key)
        if dataclasses.is_dataclass(inner):
            rows += rows_of(inner, value, f"{prefix}{key}.")
        else:
            as_yaml = yaml.safe_dump(value, default_flow_style=True)
            shown = value if isinstance(value, str) else as_yaml.partition("\n")[0]
            text = texts.get(key, "")
            words = choices(kinds[key])
            named = re.findall(r"\w+", text)
            if sum(word not in named for word in [*words, shown]) > 1:  # the default counts twice
                text += f" One of {', '.join(words)}."
            rows.append(Setting(f"{prefix}{key}", shown, text))
    return rows


def tables() -> list[Table]:
    """All settings of a run, a table for each section."""
    from rlhf_jax import config

    run = config.RunConfig()
    defaults = yaml.safe_load(config.to_yaml(run))
    names = [key for key in defaults if dataclasses.is_dataclass(getattr(run, key))]
    plain = {key: value for key, value in defaults.items() if key not in names}
    found = [Table("", "", rows_of(run, plain, ""))]
    for name in names:
        section = getattr(run, name)
        text = inspect.getdoc(type(section)) or ""
        rows = rows_of(section, defaults[name], f"{name}.")
        found.append(Table(name, " ".join(text.split()), rows))
    return found


def other_names() -> list[tuple[str, str]]:
    """The names of other libraries that errors know, of each setting here: (theirs, here)."""
    from rlhf_jax.config import yaml_files

    names: dict[str, list[str]] = {}
    for theirs, entry in yaml_files.other_keys().items():
        names.setdefault(entry, []).append(theirs)
    rows = []
    for entry, alike in names.items():
        key, _, note = entry.partition(" - ")
        rows.append((", ".join(alike), f"{key}: {note}" if note else key))
    return rows
