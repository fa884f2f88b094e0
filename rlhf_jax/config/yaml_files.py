"""Settings as YAML: reading a file with the line of each value, and writing one."""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
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


def read(
    config_class: type,
    file: Path,
    own: Mapping[str, type] = {},
    suggest: Callable[[str], str] | None = None,
    ignored: Sequence[str] = (),
) -> Values:
    """The values that a YAML file gives to fields of ``config_class``: {dotted key: (value, "FILE,
    line N")}.

    A field's type is bool, int, float, str, Json, a Literal of strings, a tuple of any of these,
    one of these or None, or a dataclass, which is a section. ``1e-5``, a string in YAML 1.1, is
    read as a number, and ``None`` as null.

    Args:
      own: {name: class} of sections beside those of ``config_class``.
      suggest: what to say of an unknown key; None: which one of ``config_class`` may be meant.
      ignored: keys at the top that are not read.

    Raises:
      UserError: no such file, not UTF-8, not YAML, not a mapping; an unknown or repeated key; a
        value of another type.
    """
    node = _compose(file)
    if node is None:
        raise UserError(f"{file}: is empty; expected a mapping of keys to values")
    if suggest is None:
        keys = dotted_keys(config_class)
        suggest = functools.partial(hint, keys=keys, reads=keys)
    values: Values = {}
    problems: list[str] = []

    def collect(node: yaml.Node, kinds: Mapping[str, Any], prefix: str) -> None:
        """Puts every value below ``node`` into ``values``, and mistakes into ``problems``."""
        if not isinstance(node, yaml.MappingNode):
            name = prefix[:-1] or "the file"
            meant = f"; of another library: {suggest(name)}" if name in other_keys() else ""
            problems.append(
                f"{_line(node)}: {name} must be a mapping of keys, found {_text_of(node)}{meant}"
            )
            return
        lines: dict[str, str] = {}
        for key_node, value_node in node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else _text_of(key_node)
            key = prefix + name
            line = _line(key_node)
            if key in ignored:
                continue
            if name not in kinds:
                problems.append(f"{line}: unknown key {key}; {suggest(key)}")
            elif name in lines:
                problems.append(f"{line}: key {key} is given twice, first on {lines[name]}")
            elif dataclasses.is_dataclass(kinds[name]):
                collect(value_node, types_of(kinds[name]), f"{key}.")
            else:
                try:
                    values[key] = (_value(value_node, kinds[name], key), f"{file}, {line}")
                except ValueError as error:
                    problems.append(str(error))
            lines.setdefault(name, line)

    collect(node, {**types_of(config_class), **own}, "")
    if problems:
        lines = [f"{file}, {problem}" for problem in problems]
        with contextlib.suppress(UserError):  # no manifest: the file is of no run
            lines.append(f"{file} is of a run of {reading.revision(file.parent)}, which reads it")
        raise UserError("\n".join(lines))
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


def hint(key: str, keys: Sequence[str], reads: Sequence[str], flags: bool = False) -> str:
    """The keys that may have been meant: ours for a key of another library, those of its name or of
    the nearest one, or else all of its section, if they are few.

    keys: all keys. reads: those that the command reads, which are named first; others are no flags.
    """
    section, _, name = key.replace("-", "_").rpartition(".")
    if name in other_keys():
        return _ours(other_keys()[name], flags, reads)
    if name.isidentifier() and importlib.util.find_spec(f"rlhf_jax.algorithms.{name}"):
        return f"these are settings of `rlhf-jax {name}`, which alone reads them"
    choice = reads if flags else keys  # a file may have sections of other stages
    inside = [one for one in choice if section and one.startswith(f"{section}.")]
    meant = _nearest(name, inside, reads) or _nearest(name, inside, choice)
    if meant:
        return f"did you mean {' or '.join(_flag(key) if flags else key for key in meant)}?"
    names = [one.rpartition(".")[2] for one in keys if one.rpartition(".")[0] == section]
    if not names:
        return hint(section, keys, reads, flags)
    if len(names) > _FEW:
        return "`rlhf-jax STAGE --help` shows the keys"
    return f"the keys {f'of {section} ' if section else ''}are {', '.join(names)}"


def _nearest(name: str, inside: Sequence[str], keys: Sequence[str]) -> list[str]:
    """At most three keys with this name, or else with the nearest one; those ``inside`` the section
    first.
    """
    for among, cutoff in ((inside, 1.0), (keys, 1.0), (inside, 0.6), (keys, 0.75)):
        names = {key: key.rpartition(".")[2] for key in among}
        near = difflib.get_close_matches(name, list(names.values()), n=1, cutoff=cutoff)
        if near:
            return [key for key in among if names[key] == near[0]][:3]
    return [key for key in inside if key.rpartition(".")[2].startswith(name[:4])]


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


@functools.cache
def other_keys() -> dict[str, str]:
    """{key of another library: our keys and a note}."""
    text = Path(__file__).with_name("other_keys.yaml").read_text("utf-8")
    names: dict[str, str] = yaml.safe_load(text)
    return {theirs: entry for entry, several in names.items() for theirs in several.split()}


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
    return f"here it is {_flag(shown) if flags else shown}{others}{about}"


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """{field: its type} of a class of settings, without ``own``, which is not written as one."""
    kinds = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls) if "sections" not in field.metadata]
    return {name: kinds[name] for name in fields}


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
    return dumped(to_dict(config))


def to_dict(config: Any) -> dict[str, Any]:
    """All fields of ``config`` as plain values; those of ``own`` stand at the top."""
    values = dataclasses.asdict(config)
    own = values.pop("own", {})
    return {**values, **own}


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
