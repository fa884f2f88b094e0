"""Configurations as YAML files, read against nested dataclasses: every complaint names file, line and key.

Field types may be bool, int, float, str, Path, Literal, ``X | None`` and other unions of these, tuple, list,
dict[str, X] and further dataclasses, which are the sections of the file.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from rlhf_jax.errors import UserError

Values = dict[str, tuple[Any, int]]  # {dotted key: (value, line)}


def read(config_class: type, file: Path) -> Values:
    """The values that ``file`` gives to fields of ``config_class``, converted to the fields' types.

    ``1e-5``, a string in YAML 1.1, counts as a number, an int as a float, and ``None`` as null.

    Raises:
      UserError: no such file, not UTF-8, not YAML, not a mapping; an unknown or repeated key; a value of another type.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file (given by --config)") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read (given by --config): {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: not UTF-8, which is expected; save the file in that encoding") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{file}, line {line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserError(f"{file}, line {line}: not valid YAML: character {error.character!r} is not allowed") from None
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF", which is no character
        raise UserError(f"{file}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{file}: not valid YAML: nested too deeply") from None
    if node is None:
        raise UserError(f"{file}: is empty; expected a mapping of keys, such as {fields(config_class)[0][0].name}: ...")
    values: Values = {}
    for key, value, line in _check_section(node, config_class, config_class, "", f"{file}"):
        values[key] = (value, line)
    return values


def _check_section(node: yaml.Node, cls: type, root: type, prefix: str, file: str) -> Iterator[tuple[str, Any, int]]:
    """Yields (dotted key, value, line) for every value below ``node``."""
    name = prefix.rstrip(".") or "the file"
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{_at(file, node)}: {name} must be a mapping of keys, found {_found(node)}")
    kinds = {field.name: kind for field, kind in fields(cls)}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else _found(key_node)
        line = key_node.start_mark.line + 1
        if key not in kinds:
            raise UserError(
                f"{_at(file, key_node)}: unknown key {prefix}{key}; {_suggestion(key, kinds, prefix, root)}"
            )
        if key in lines:
            raise UserError(f"{_at(file, key_node)}: key {prefix}{key} is given twice, first on line {lines[key]}")
        lines[key] = line
        if is_section(kinds[key]):
            yield from _check_section(value_node, kinds[key], root, f"{prefix}{key}.", file)
            continue
        try:
            value = _convert(value_node, kinds[key])
        except _MismatchError as error:
            culprit = error.node
            message = f"{prefix}{key} must be {_describe(kinds[key])}, found {_found(value_node)}"
            if culprit is not value_node:
                message += f" with {_found(culprit)} in it"
            raise UserError(f"{_at(file, culprit)}: {message}") from None
        yield prefix + key, value, line


class _MismatchError(Exception):
    def __init__(self, node: yaml.Node):
        self.node = node


def _convert(node: yaml.Node, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if (
            type(None) in arguments
            and isinstance(node, yaml.ScalarNode)
            and node.value == "None"
            and node.style is None
        ):
            return None  # as the command line spells it
        for argument in arguments:
            try:
                return _convert(node, argument)
            except _MismatchError as error:
                deepest = error
        raise deepest if len([a for a in arguments if a is not type(None)]) == 1 else _MismatchError(node)
    if origin in (tuple, list):
        if not isinstance(node, yaml.SequenceNode):
            raise _MismatchError(node)
        inner = arguments[:1] * len(node.value) if origin is list or arguments[1:] == (...,) else arguments
        if len(inner) != len(node.value):
            raise _MismatchError(node)
        return origin(_convert(item, argument) for item, argument in zip(node.value, inner, strict=True))
    if origin is dict:
        if not isinstance(node, yaml.MappingNode):
            raise _MismatchError(node)
        pairs = [(_convert(key, str), _convert(value, arguments[1])) for key, value in node.value]
        if len(dict(pairs)) < len(pairs):
            raise _MismatchError(node)
        return dict(pairs)
    if not isinstance(node, yaml.ScalarNode):
        raise _MismatchError(node)
    value = _scalar(node)
    if origin is Literal:
        # `value in arguments` alone would take True for 1 and 1.0 for 1.
        if any(type(choice) is type(value) and choice == value for choice in arguments):
            return value
    elif kind is float:
        # YAML 1.1 reads 1e-5 as a string; a string in quotes is meant to be one.
        if type(value) in (int, float) or (type(value) is str and node.style is None):
            with contextlib.suppress(ValueError, OverflowError):
                return float(value)
    elif kind is Path:
        if type(value) is str:
            return Path(value)
    elif type(value) is kind:
        return value
    raise _MismatchError(node)


def _scalar(node: yaml.ScalarNode) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node)
    except Exception:  # an unknown !tag, a date such as 2020-99-99; KeyError for !!bool maybe; and so on
        raise _MismatchError(node) from None


def _at(file: str, node: yaml.Node) -> str:
    return f"{file}, line {node.start_mark.line + 1}"


def _found(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    text = repr(node.value) if node.tag == "tag:yaml.org,2002:str" else node.value or "nothing"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else _describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return f"a list (each {_describe(arguments[0])})"
    if origin is tuple:
        return f"a list of {len(arguments)} ({', '.join(_describe(argument) for argument in arguments)})"
    if origin is dict:
        return f"a mapping (each value {_describe(arguments[1])})"
    return {bool: "true or false", int: "an int", float: "a float", str: "a string", Path: "a path"}[kind]


def _suggestion(key: str, kinds: dict[str, Any], prefix: str, root: type) -> str:
    if close := difflib.get_close_matches(key.replace("-", "_"), kinds, n=1):
        return f"did you mean {close[0]}?"
    dotted = [path for path in _paths(root) if path == key or path.rpartition(".")[2] == key]
    if dotted:
        section, _, name = dotted[0].rpartition(".")
        return f"{name} belongs {f'in the section {section}' if section else 'outside the sections'}"
    return f"the keys {f'of {prefix[:-1]} ' if prefix else ''}are {', '.join(kinds)}"


def _paths(cls: type, prefix: str = "") -> Iterator[str]:
    for field, kind in fields(cls):
        yield prefix + field.name
        if is_section(kind):
            yield from _paths(kind, f"{prefix}{field.name}.")


def to_yaml(config: Any) -> str:
    """All fields of ``config`` as YAML, in the order of the dataclasses; ``parse`` reads it back to an equal value."""
    return yaml.dump(
        _plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field, _ in fields(type(value))}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


class _Dumper(yaml.SafeDumper):
    """Lists on one line, and no anchors: equal values are written out each time."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unquoted, None would read as null; only double quotes keep line breaks and control characters as they are.
        style = "'" if data == "None" else None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_str)


def fields(cls: Any) -> list[tuple[dataclasses.Field, Any]]:
    """The fields that the constructor takes, with their types."""
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init]


def is_section(kind: Any) -> bool:
    """Whether a field's type is a dataclass."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)
