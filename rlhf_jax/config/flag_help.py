"""``--help`` of settings: those that matter first, then all others by sections, a sentence each."""

import inspect
import json
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from tyro.constructors import ConstructorRegistry, StructTypeInfo

from rlhf_jax.config.settings import Switch
from rlhf_jax.config.yaml_files import subsections, types_of

INDENT = 34
FOOT = (
    "In brackets: the value in force, and the words that may stand there instead. What is on or "
    "off has no value: --deterministic, --no-deterministic; in a section --text.pack, "
    "--text.no-pack. --help-verbose prints the whole texts and the types."
)


class Flag(NamedTuple):
    """A setting: the title of its section, its dotted key, its text and its value in force."""

    title: str
    key: str
    text: str


def flags_of(section: Any, name: str = "") -> Iterator[Flag]:
    """The settings of a section with a dotted name, after them those of the sections in it."""
    cls: Any = type(section)
    info = StructTypeInfo.make(cls, section, in_union_context=False)
    spec: Any = ConstructorRegistry().get_struct_spec(info)
    title = f"{name}: {_sentence(inspect.getdoc(cls))}" if name else "The run"
    kinds = types_of(cls)
    inside = subsections(cls)
    for field in spec.fields:
        if field.name in kinds.keys() - inside.keys():
            text = field.helptext() if callable(field.helptext) else field.helptext
            value = _value(getattr(section, field.name), kinds[field.name])
            key = f"{name}.{field.name}".lstrip(".")
            yield Flag(title, key, f"{_sentence(text)} [{value}]".lstrip())
    for inner in inside:
        yield from flags_of(getattr(section, inner), f"{name}.{inner}".lstrip("."))


def layout(flags: Sequence[Flag], first: Sequence[str]) -> str:
    """A line or more for each flag; those of the keys ``first`` come before all."""
    by_key = {flag.key: flag for flag in flags}
    groups = {"The flags that matter most": [by_key.pop(key) for key in first if key in by_key]}
    for flag in by_key.values():
        groups.setdefault(flag.title, []).append(flag)
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    lines = []
    for title, group in groups.items():
        lines += ["", *textwrap.wrap(title, width)] if group else []
        for flag in group:
            name = f"  --{flag.key.replace('_', '-')} "
            lines += textwrap.wrap(
                flag.text,
                width,
                initial_indent=name.ljust(INDENT),
                subsequent_indent=" " * INDENT,
                break_on_hyphens=False,
            )
    return "\n".join([*lines, "", *textwrap.wrap(FOOT, width, break_on_hyphens=False)])


def _sentence(text: str | None) -> str:
    """The first sentence of a text."""
    words = " ".join((text or "").replace("``", "`").split())
    return re.split(r"(?<=\.)(?<!Dr\.) ", words, maxsplit=1)[0]


def _value(value: Any, kind: Any) -> str:
    """A value in force as it is typed, with the words that may replace it; of a switch: on, off."""
    if kind is bool:
        return "on" if value else "off"
    if isinstance(value, tuple):
        said = " ".join(map(str, value)) or "none"
    elif isinstance(value, str):
        said = value if value.isprintable() and value else json.dumps(value)
    else:
        said = json.dumps(value)
    words = ["true", "false", "auto"] if kind == Switch else _words(kind)
    others = [word for word in words if word != said]
    return f"{said}; or {', '.join(others)}" if others else said


def _words(kind: Any) -> list[str]:
    """The words among which a type lets choose."""
    if typing.get_origin(kind) is Literal:
        return [word for word in typing.get_args(kind) if isinstance(word, str)]
    return [word for part in typing.get_args(kind) for word in _words(part)]
