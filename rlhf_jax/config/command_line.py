"""The flags of a command, read by tyro: its help as plain lines, its errors as a UserError."""

import argparse
import contextlib
import functools
import io
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from rlhf_jax.config.settings import Json, Switch
from rlhf_jax.errors import UserError, did_you_mean

_STYLE = (tyro.conf.PositionalMetavarFromFieldName,)
_SWITCHES: dict[str, Switch] = {"auto": "auto", "true": True, "false": False}
# What tyro and Python say of a wrong value, and what a user reads.
_WORDS = (
    (r"Error parsing (\S+): ", r"\1: "),
    (r"invalid literal for int\(\) with base 10:", "expected an int, got"),
    (r"could not convert string to float:", "expected a float, got"),
    (r"no type matching .* could be instantiated from .*: (expected an? \w+), (got .*)$",
     r"\1 or null, \2"),
    (r"invalid choice (.*?) for argument '(.*?)'\. Expected one of \((.*?),?\)\.$",
     r"\2: expected one of \3, got \1"),
    (r"Missing value for argument '(.*?)'\. Expected .*$", r"\1: its value is missing"),
    (r"Missing from (.*?): (\S+) (.*?)\.? ?\(required\)$", r"\1: \2 is missing: \3"),
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are UserErrors, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        """Raises the UserError."""
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` shows the flags")


def bound(function: Callable[..., Any], argv: Sequence[str], prog: str) -> Callable[[], Any]:
    """The function with the arguments of a command line, which are checked; it has not run yet.

    Raises:
        UserError: a flag is unknown, or a value is missing or wrong.
        SystemExit: code 0 after ``--help``.
    """

    @functools.wraps(function)
    def partial(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(function, *args, **kwargs)

    call: Callable[[], Any] = read(partial, argv, prog, config=_STYLE, registry=registry())
    return call


def read(kind: Any, argv: Sequence[str], prog: str | None, **how: Any) -> Any:
    """What ``tyro.cli`` makes of a command line; raises as ``bound``.

    how: other arguments of ``tyro.cli``.
    """
    # tyro draws no boxes into a stream without an encoding.
    written = io.StringIO()
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=argv, prog=prog, **how)
    except SystemExit as end:
        code = end.code
    name = prog or Path(sys.argv[0]).name
    if code:
        words = [word.partition("=")[0] for word in argv if word.startswith("--")]
        raise UserError(_mistake(errors.getvalue(), words, kind, name, how))
    width = shutil.get_terminal_size().columns
    for line in _plain(written.getvalue()).splitlines():
        # tyro does not wrap what it says of the program.
        shown = line if line.startswith(" ") else textwrap.fill(line, width)
        sys.stdout.write(f"{shown}\n")
    if how.get("compact_help") and not {"-H", "--help-verbose"} & {*argv}:
        sys.stdout.write(f"\n{name} --help-verbose says what each flag does.\n")
    sys.exit(0)


def _mistake(text: str, flags: Sequence[str], kind: Any, name: str, how: dict[str, Any]) -> str:
    """The sentence for an error of tyro: an unknown flag if there is one, which tyro may blame on
    something else.
    """
    unknown = [] if how.get("return_unknown_args") else [*flags]
    if unknown:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            tyro.cli(kind, args=["--help"], prog=name, **how)
        known = set(re.findall(r"--[\w.-]+", shown.getvalue()))
        unknown = [flag for flag in flags if flag not in known]
    if unknown:
        others = f"; `{name} --help` shows the flags"
        return f"unknown flag {unknown[0]}{did_you_mean(unknown[0], known) or others}"
    _, _, below = _plain(text, rules="\0").partition("\n")
    sentence = " ".join(below.partition("\0")[0].split())
    for theirs, ours in _WORDS:
        sentence = re.sub(theirs, ours, sentence)
    return f"{sentence}; `{name} --help` shows the flags"


def _plain(text: str, rules: str = "") -> str:
    """tyro's text with its titles as headings and without, or with other, ruled lines."""
    text = re.sub(r"(?m) +$", "", text)
    text = re.sub(r"(?m)^ (\S.*)\n -+$", r"\1:", text)
    text = re.sub(r"(?m)^  -+\n", rules, text)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


# --- Types that tyro does not know


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
    """The object that a flag gives as JSON; None for null."""
    try:
        value = None if word == "None" else json.loads(word)
    except ValueError as error:
        raise ValueError(f"expected a JSON object, got {word}: {error}") from None
    if not isinstance(value, dict | None):
        raise ValueError(f"expected a JSON object, got {word}")
    return value
