"""Settings as YAML: reading a file with the line of each value, and writing one."""

import contextlib
import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf_jax.config.settings import Json, Switch
from rlhf_jax.errors import UserError, read_file
from rlhf_jax.runs import objects, reading

_FEW = 12  # keys that an error lists
Values = dict[str, tuple[Any, str]]  # {dotted key: (value, "FILE, line N")}


def read(config_class: type, file: Path) -> Values:
    """The values that a YAML file gives to fields of ``config_class``: {dotted key: (value, "FILE,
    line N")}.

    A field's type is bool, int, float, str, Json, a Literal of strings, a tuple of any of these,
    one of these or None, or a dataclass, which is a section. ``1e-5``, a string in YAML 1.1, is
    read as a number, and ``None`` as null.

    Raises:
      UserError: no such file, not UTF-8, not YAML, not a mapping; an unknown or repeated key; a
        value of another type.
    """
    node = _compose(file)
    if node is None:
        raise UserError(f"{file}: is empty; expected a mapping of keys to values")
    values: Values = {}
    problems: list[str] = []

    def collect(node: yaml.Node, cls: type, prefix: str) -> None:
        """Puts every value below ``node`` into ``values``, and mistakes into ``problems``."""
        if not isinstance(node, yaml.MappingNode):
            name = prefix[:-1] or "the file"
            problems.append(
                f"{_line(node)}: {name} must be a mapping of keys, found {_text_of(node)}"
            )
            return
        kinds = types_of(cls)
        lines: dict[str, str] = {}
        for key_node, value_node in node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else _text_of(key_node)
            key = prefix + name
            line = _line(key_node)
            if name not in kinds:
                problems.append(f"{line}: unknown key {key}; {hint(key, config_class)}")
            elif name in lines:
                problems.append(f"{line}: key {key} is given twice, first on {lines[name]}")
            elif dataclasses.is_dataclass(kinds[name]):
                collect(value_node, kinds[name], f"{key}.")
            else:
                try:
                    values[key] = (_value(value_node, kinds[name], key), f"{file}, {line}")
                except ValueError as error:
                    problems.append(str(error))
            lines.setdefault(name, line)

    collect(node, config_class, "")
    if problems:
        raise UserError("\n".join(f"{file}, {problem}" for problem in problems))
    return values


def _compose(file: Path) -> yaml.Node | None:
    """The root of a YAML file; None if the file is empty."""
    try:
        text = read_file(file)
    except UserError as error:
        raise UserError(
            f"{error} (given by --config); `rlhf-jax configs` lists those that come with the "
            "package"
        ) from None
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        place = f"{file}"
        reason = str(error)[:100]
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            place = f"{file}, line {error.problem_mark.line + 1}"
            reason = error.problem or reason
        if isinstance(error, yaml.reader.ReaderError):
            lines_before = text[: error.position].count(b"\n")
            place = f"{file}, line {lines_before + 1}"
            reason = error.reason
        raise UserError(f"{place}: not valid YAML in UTF-8: {reason}") from None


def _value(node: yaml.Node, kind: Any, key: str) -> Any:
    """The value of a node as its type has it; ValueError, beginning with the line, if it is of
    another one.
    """
    is_switch = kind == Switch
    if is_switch:
        kind = Literal["auto"] if node.value == "auto" else bool
    optional = type(None) in typing.get_args(kind)
    inner = typing.get_args(kind)[0] if optional else kind
    if inner == Json and isinstance(node, yaml.MappingNode):
        return _json(node, key)
    choices = typing.get_args(inner)
    is_list = typing.get_origin(inner) is tuple
    if is_list and isinstance(node, yaml.SequenceNode):
        return tuple(_value(item, choices[0], f"each of {key}") for item in node.value)
    if isinstance(node, yaml.ScalarNode) and not is_list:
        is_plain = node.style is None
        # an unknown !tag, a date such as 2020-99-99, an int of 5,000 digits
        with contextlib.suppress(Exception):
            value = yaml.SafeLoader("").construct_object(node)
            found = type(value)
            if optional and (value is None or (is_plain and value == "None")):
                return None
            if found is inner or (found is str and value in choices):
                return value
            if inner is float and found in (int, str) and is_plain:
                return float(value)
    names: dict[Any, str] = {
        Json: "a mapping",
        bool: "true or false",
        int: "an int",
        float: "a float",
        str: "a string",
    }
    expected = names.get(inner, "given in Python")
    if choices and inner != Json:
        expected = "a list" if is_list else f"one of {', '.join(map(repr, choices))}"
    or_null = " or auto" if is_switch else " or null" if optional else ""
    raise ValueError(f"{_line(node)}: {key} must be {expected}{or_null}, found {_text_of(node)}")


def _json(node: yaml.Node, key: str) -> Json:
    """The value of a mapping that JSON can write."""
    try:
        value: Json = yaml.SafeLoader("").construct_document(node)
        if not reading.is_plain(value):  # such as aliases of aliases, which JSON writes out
            raise ValueError("it is nested too deeply or too large")
        json.dumps(value, allow_nan=False)
    except Exception as error:  # a date, an unknown tag, a list as a key
        what = f"{key} must be an object that JSON can write"
        raise ValueError(f"{_line(node)}: {what}: {error}") from None
    return {str(name): inner for name, inner in value.items()}


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _text_of(node: yaml.Node) -> str:
    """What a message calls a node."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    is_text = node.tag == "tag:yaml.org,2002:str"
    text = repr(node.value) if is_text else node.value or "nothing"
    return text if len(text) <= 60 else f"{text[:60]}..."


def hint(
    key: str,
    root: type,
    flags: bool = False,
    is_read: Callable[[str], bool] = lambda key: True,
) -> str:
    """The keys that may have been meant: ours for a key of another library, those like it in its
    section, those of its name in other sections, or else all of its section, if they are few.

    is_read: whether the command reads a key; others are proposed only if it reads none there.
    """
    section, _, name = key.rpartition(".")
    prefix = f"{section}." if section else ""
    keys = dotted_keys(root)
    read = [known for known in keys if is_read(known)]
    inside = _names_in(section, read) or _names_in(section, keys)
    same = [known for known in read if known.rpartition(".")[2] == name]
    elsewhere = same or [known for known in keys if known.rpartition(".")[2] == name]
    theirs = other_keys().get(name.replace("-", "_"))
    if theirs:
        return _ours(theirs, flags, read)
    close = difflib.get_close_matches(name.replace("-", "_"), inside, n=1)
    close = close or [k for k in inside if k.startswith(name[:4])]
    meant = [prefix + k for k in close] or elsewhere[:3]
    if flags:
        meant = ["--" + k.replace("_", "-") for k in meant]
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    if not inside:  # the section is unknown or has no keys
        return hint(section, root, flags, is_read)
    place = f"of {section} " if section else ""
    if len(inside) > _FEW:
        return "`rlhf-jax STAGE --help` shows the keys"
    return f"the keys {place}are {', '.join(inside)}"


def _names_in(section: str, keys: Sequence[str]) -> list[str]:
    return [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section]


@functools.cache
def other_keys() -> dict[str, str]:
    """{key of another library: our keys and a note}."""
    text = Path(__file__).with_name("other_keys.yaml").read_text("utf-8")
    keys: dict[str, str] = yaml.safe_load(text)
    return keys


def _ours(entry: str, flags: bool, read: Sequence[str]) -> str:
    """A sentence of an entry of `other_keys`.

    read: the keys that the command reads.
    """
    key, _, note = entry.partition(" - ")
    about = f": {note}" if note else ""
    if key == "none":
        return f"there is no such setting here{about}"
    section, _, name = key.partition(".")
    here = [known for known in read if known.partition(".")[2] == name]
    of_any = section == "SECTION"
    others = ", or the same of another stage" if of_any and len(here) != 1 else ""
    if here and (of_any or key not in read):
        key = here[0]
    shown = key.replace("SECTION", "sft")
    shown = "--" + shown.replace("_", "-") if flags else shown
    return f"here it is {shown}{others}{about}"


def types_of(cls: type) -> dict[str, Any]:
    """{field: its type} of a class of settings."""
    kinds = typing.get_type_hints(cls)
    return {field.name: kinds[field.name] for field in dataclasses.fields(cls)}


def dotted_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key, sections too."""
    keys = [prefix + name for name in types_of(cls)]
    for name, kind in subsections(cls).items():
        keys += dotted_keys(kind, f"{prefix}{name}.")
    return keys


def subsections(cls: type) -> dict[str, Any]:
    """The fields that are dataclasses, with their classes."""
    kinds = types_of(cls)
    return {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}


# --- Writing


def to_yaml(config: Any) -> str:
    """All fields of ``config`` as YAML, in the order of the dataclasses; ``parse`` reads it back to
    an equal value.
    """
    return dumped(dataclasses.asdict(config))


def dumped(values: Mapping[str, Any]) -> str:
    """Settings as plain values in YAML, in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Lists on one line, and texts in the quotes that keep them as they are."""


def _text(dumper: _Dumper, data: str) -> yaml.Node:
    style = None
    if data == "None":  # without quotes it would be read as null
        style = "'"
    elif not data.isprintable():  # only double quotes keep line breaks and control characters
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(
    tuple, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True)
)
_Dumper.add_representer(str, _text)
# Functions and arrays in the Config of an algorithm of one's own.
_Dumper.add_multi_representer(
    object, lambda dumper, value: dumper.represent_data(objects.describe(value))
)
