"""The flags of a command, read by tyro, and the types that tyro does not know."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from rlhf_jax.config.settings import Json, Switch
from rlhf_jax.errors import UserError
from rlhf_jax.runs import reading

_SWITCHES: dict[str, Switch] = {"auto": "auto", "true": True, "false": False}


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are UserErrors, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        """Raises the UserError."""
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` shows the flags")


def call(function: Callable[..., Any], argv: Sequence[str], prog: str) -> Any:
    """What the function returns with the arguments of a command line.

    Raises:
        SystemExit: code 0 after ``--help``, 2 after an error that tyro printed: a flag is unknown,
            or a value is missing or wrong.
    """
    style = (tyro.conf.PositionalMetavarFromFieldName,)
    return tyro.cli(function, args=argv, prog=prog, config=style, registry=registry())


def registry() -> ConstructorRegistry:
    """How flags of the types Switch and Json are read, and null."""
    rules = ConstructorRegistry()
    rules.primitive_rule(_null)
    rules.primitive_rule(_switches)
    rules.primitive_rule(_objects)
    return rules


def _null(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type is not type(None):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{null}",
        choices=("null", "None"),  # as in YAML, and in Python
        instance_from_str=lambda words: None,
        is_instance=lambda value: value is None,
        str_from_instance=lambda value: ["null"],
    )


def _switches(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type != Switch:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[auto|true|false]",
        instance_from_str=_switch,
        is_instance=lambda value: value in _SWITCHES.values(),
        str_from_instance=lambda value: [str(value).lower()],
    )


def _objects(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type != Json | None:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: _json_object(words[0]),
        is_instance=lambda value: isinstance(value, dict | None),
        str_from_instance=lambda value: [json.dumps(value)],
    )


def _switch(words: list[str]) -> Switch:
    """The value of a switch; a flag without a value turns it on."""
    word = " ".join(words).lower() or "true"
    if word not in _SWITCHES:
        raise ValueError(f"expected auto, true, false or nothing, got {word}")
    return _SWITCHES[word]


def _json_object(word: str) -> Json | None:
    """The object that a flag gives as JSON, such as our files hold; None for null."""
    if word in ("None", "null"):
        return None
    value: Json = reading.parse_json(word, Json, f"expected a JSON object, got {word:.200}")
    return value
