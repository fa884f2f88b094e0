"""Reading settings: YAML files, then dotted flags."""

import argparse
import copy
import dataclasses
import operator
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from rlhf_jax.config.pretrained import fill_pretrained
from rlhf_jax.config.sections import section_name, with_section
from rlhf_jax.config.settings import ALGORITHMS, RunConfig, Switch
from rlhf_jax.config.yaml_files import Values, dotted_keys, hint, read, subsections
from rlhf_jax.errors import UserError, logger
from rlhf_jax.types import Algorithm

C = TypeVar("C")
Words = Sequence[str]


def parse(
    kind: type[C],
    argv: Words | None = None,
    *,
    prog: str | None = None,
    description: str = "",
    sections: Words = (),
    algorithm: Algorithm | None = None,
) -> C:
    """Reads ``--config FILE ...`` and dotted flags (``sys.argv[1:]`` by default) into a config of
    this kind.

    A flag goes before the files, a later file before an earlier one, the files before the class's
    default. ``--help`` shows the values in force, ``--help-verbose`` the text of each setting too.
    Rules between values are checked once, on the final values. A file that names Python files of
    somebody else needs ``--trust-config``, see ``check_trust``.

    Args:
      sections: the sections (``rl``) and keys of sections (``rl.top_k``) that have flags, beside
        the settings at the top; none given: all. A file may hold keys of the others too, since
        several stages share it.
      algorithm: one of your own: its ``Config`` is a section under the module's name, and the
        sections of the algorithms of this package have no flags and keep their defaults.

    Raises:
      UserError: a file is missing, broken or does not fit, a flag is unknown, or a
        ``__post_init__`` refused the values (ValueError). All mistakes of the files, or all of the
        values, are in one message, a line each.
      SystemExit: code 0 after ``--help``; code 2 after a message on stderr about a flag's wrong
        value.
    """
    finder = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", metavar="FILE", nargs="+", action="extend", default=[])
    finder.add_argument("--trust-config", action="store_true")
    options, flags = finder.parse_known_args(argv)
    unread: Words = ()
    if algorithm is not None:
        kind = with_section(kind, algorithm)
        unread = [name for name in ALGORITHMS if name != section_name(algorithm)]
        sections = sections or [name for name in typing.get_type_hints(kind) if name not in unread]
    given = _given(kind, options.config, unread)
    defaults = _with_values(kind(), given)
    about = (
        f"{description}\n\n--config FILE ...: YAML with values for these options; flags go "
        "before them. --trust-config: run the Python files that such a FILE names, though they are "
        "not yours."
    )
    how: Any = {
        "prog": prog,
        "description": about,
        "return_unknown_args": True,
        "compact_help": True,
    }
    parsed: Any = tyro.cli(
        kind, args=flags, default=defaults, registry=_flags_of(kind, sections), **how
    )
    values, unknown = parsed
    if unknown:
        raise UserError(_unknown_flag(unknown[0].partition("=")[0], kind))
    typed = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags}
    if isinstance(defaults, RunConfig):
        filled = fill_pretrained(values, typed | given.keys())
        read_here = [key for key in filled if _is_read(key, kind, sections)]
        if read_here:
            listed = ", ".join(f"{key} {filled[key]}" for key in read_here)
            model = values["model"]
            logger.info(f"defaults for the pretrained {model}: {listed}")
    problems: list[str] = []
    config = _build(kind, values, defaults, "", given, problems)
    if problems:
        raise UserError("\n".join(problems))
    if not options.trust_config:
        check_trusted({key: value for key, value in given.items() if key not in typed})
    return config


def check_trusted(given: Values) -> None:
    """Refuses values of somebody else's file that would run Python code or send texts and keys to a
    server.

    Configs of this package are trusted, and values whose YAML file and Python file the user has in
    the current folder. A run's folder may be somebody else's wherever it lies.

    Raises:
        UserError: a value names a Python file outside the current folder or in the run's folder
            that the YAML file lies in, or any at all where that run's folder is outside the current
            one; or a URL where the YAML file is in a run's folder or outside the current folder.
    """
    here = Path.cwd().resolve()
    problems = []
    for key, (value, place) in given.items():
        config = Path(re.sub(r", line \d+$", "", place)).resolve()
        if config in [path.resolve() for path in shipped().values()]:
            continue
        run = config.parent if (config.parent / "manifest.json").is_file() else None
        texts = value if isinstance(value, tuple) else (value,)
        for text in filter(lambda text: isinstance(text, str), texts):
            code = re.match(r"(.*\.py):", text, re.DOTALL)
            if code is not None:
                file = Path(code[1]).resolve()
                is_own = file.is_relative_to(here)
                if run is not None:
                    is_own = is_own and run.is_relative_to(here) and not file.is_relative_to(run)
                if not is_own:
                    problems.append(f"{place}: {key} {text} runs the Python code of {file}")
            elif re.match(r"(\w+:)?https?://", text) and (run or not config.is_relative_to(here)):
                problems.append(
                    f"{place}: {key} {text} gets the texts of the run, and your API key"
                )
    if problems:
        listed = "\n".join(problems)
        raise UserError(
            f"{listed}\nIt may be somebody else's, and runs with your rights: read it, then give "
            "--trust-config"
        )


def _given(kind: type, names: Words, unread: Words) -> Values:
    """The values of all files, a later one before an earlier one."""
    given: Values = {}
    problems = []
    for name in names:
        try:
            given |= read(kind, shipped().get(name, Path(name)))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return {key: value for key, value in given.items() if key.partition(".")[0] not in unread}


def _with_values(default: C, given: Values) -> C:
    """A copy with these values, set without a look at the rules, which hold for the final ones."""
    config = copy.copy(default)
    for key, (value, _) in given.items():
        section: Any = config
        *path, name = key.split(".")
        for inner in path:
            own = copy.copy(vars(section)[inner])  # sections may share one default
            vars(section)[inner] = own
            section = own
        vars(section)[name] = value
    return config


def _unknown_flag(flag: str, root: type) -> str:
    key = flag.lstrip("-").replace("-", "_")
    if not flag.startswith("--"):
        switch = "a switch takes no value: --text.pack, or --text.no-pack to turn it off"
        return f"unexpected {flag!r}; flags begin with --; {switch}"
    if key in dotted_keys(root):
        return f"{flag} is a setting that this command does not read"
    return f"unknown flag {flag}; {hint(key, root, flags=True)}"


def shipped() -> dict[str, Path]:
    """The configs that come with the package, such as ``tiny`` and ``dapo``, by their names."""
    paths: dict[str, Path] = {}
    for place in Path(__file__).parents[1:3]:  # of a wheel, of a checkout
        paths |= {path.stem: path for path in (place / "configs").rglob("*.yaml")}
    return dict(sorted(paths.items()))


def _flags_of(root: type, sections: Words) -> tyro.constructors.ConstructorRegistry:
    """How tyro reads a config: each dataclass as a dict, so that no ``__post_init__`` runs before
    all values are known, and of its fields those that ``sections`` leaves."""
    registry = tyro.constructors.ConstructorRegistry()
    prefixes = {root: ""}
    for name, kind in subsections(root).items():
        prefixes[kind] = f"{name}."
    inside = False

    @registry.primitive_rule
    def switch(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type != Switch:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="[auto|true|false]",
            instance_from_str=_switch,
            is_instance=lambda value: value in (True, False, "auto"),
            str_from_instance=lambda value: [str(value).lower()],
        )

    @registry.struct_rule
    def rule(
        info: tyro.constructors.StructTypeInfo,
    ) -> tyro.constructors.StructConstructorSpec | None:
        nonlocal inside
        if inside or not dataclasses.is_dataclass(info.type):
            return None  # and tyro goes on to its own rules, which know defaults and help texts
        inside = True
        spec: Any = registry.get_struct_spec(info)
        inside = False
        prefix = prefixes.get(info.type)
        fields = [
            field
            for field in spec.fields
            if prefix is None or _is_read(prefix + field.name, root, sections)
        ]
        return dataclasses.replace(spec, instantiate=dict, fields=tuple(fields))

    return registry


def _switch(words: list[str]) -> Switch:
    """The value of a flag that may have no value, which turns it on."""
    values: dict[str, Switch] = {"auto": "auto", "true": True, "false": False}
    word = " ".join(words).lower() or "true"
    if word not in values:
        raise ValueError(f"expected auto, true, false or nothing, got {word}")
    return values[word]


def _is_read(key: str, root: type, sections: Words) -> bool:
    """Whether ``key`` is in one of these sections, or holds it; settings at the top are, save the
    reward.
    """
    if not sections or ("." not in key and key not in subsections(root) and key != "reward"):
        return True
    for part in sections:
        is_inside = f"{key}.".startswith(f"{part}.")
        if is_inside or part.startswith(f"{key}."):
            return True
    return False


def _build(
    cls: type[C],
    values: dict[str, Any],
    default: C,
    prefix: str,
    given: Values,
    problems: list[str],
) -> C:
    """An instance of ``cls``, inner sections first. What their rules refuse goes to ``problems``
    with section, file and line, and has its default in the instance.
    """
    values = vars(default) | values
    for name, kind in subsections(cls).items():
        inner = values[name] if isinstance(values[name], dict) else {}
        section = vars(default)[name]
        values[name] = _build(kind, inner, section, f"{prefix}{name}.", given, problems)
    refused: set[str] = set()
    while True:
        try:
            return cls(**values)
        except ValueError as error:
            message = str(error)
        name = re.findall(r"\w+", message)[0]
        is_new = name in values and name not in refused
        if is_new or not refused:
            problems.append(_problem(message, values, prefix, given))
        if not is_new:
            return cls()
        refused.add(name)
        values[name] = vars(cls())[name]


def _problem(
    message: str,
    values: dict[str, Any],
    prefix: str,
    given: Values,
) -> str:
    """What a rule of a section says, after the place of the first setting that it names and whose
    value no flag has changed.
    """
    words = re.findall(r"\w+(?:\.\w+)*", message)
    section = types.SimpleNamespace(**values)
    text = f"{prefix[:-1]}: {message}".removeprefix(": ")
    if words[0] in values:
        text = f"{prefix}{message}"
    for word in words:
        value, place = given.get(prefix + word, (None, ""))
        if place and operator.attrgetter(word)(section) == value:
            return f"{place}: {text}"
    return text
