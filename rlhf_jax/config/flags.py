"""Reading settings: YAML files, then dotted flags."""

import copy
import dataclasses
import functools
import operator
import os
import re
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from rlhf_jax.config import command_line
from rlhf_jax.config.pretrained import pretrained_defaults
from rlhf_jax.config.sections import section_name, with_section
from rlhf_jax.config.settings import ALGORITHMS, RunConfig
from rlhf_jax.config.yaml_files import Values, dotted_keys, hint, read, subsections
from rlhf_jax.errors import UserError, logger
from rlhf_jax.graders import spec
from rlhf_jax.runs import keeping
from rlhf_jax.runs.reading import Row
from rlhf_jax.types import Algorithm

C = TypeVar("C")
R = TypeVar("R", bound=RunConfig)
Words = Sequence[str]
_ABOUT_FILES = (
    "--config FILE ...: YAML with values for these options; flags go before them. --trust-config: "
    "use the Python files, servers and places that such a FILE names, though it may not be yours."
)
# Settings that are texts, and name nothing outside the program.
_TEXTS = {"columns", "alerts", "keep_best", "template", "stop", "patterns", "replacement", "match"}
_TEXTS |= {"frozen", "teacher_model"}
_REWARDS = {"reward", "judge", "classifier", "gold", "score"}  # a path is a part of the text


def parse(
    kind: type[C],
    argv: Words | None = None,
    *,
    prog: str | None = None,
    description: str = "",
    sections: Words = (),
    algorithm: Algorithm | None = None,
    replaced: Words = (),
) -> C:
    """Reads ``--config FILE ...`` and dotted flags (``sys.argv[1:]`` by default) into a config of
    this kind.

    A flag overrides the files, a later file an earlier one, and the files the defaults of the
    class. ``--help`` shows the values in force, ``--help-verbose`` the text of each setting too.
    Rules are checked once, on the final values. A file that names somebody else's Python files
    needs ``--trust-config``, see ``check_trusted``.

    Args:
      sections: the sections (``rl``) and keys of sections (``rl.top_k``) that have flags, beside
        the settings at the top; empty: all. A file may hold keys of other sections too, since
        several stages share it.
      algorithm: your own one: its ``Config`` is a section under the module's name. The sections of
        this package's algorithms have no flags then and keep their defaults.
      replaced: settings that the caller replaces afterwards: the files' values need no trust.

    Raises:
      UserError: a file is missing, broken or of another kind, a flag is unknown or its value of
        another type, or a value breaks a rule. All mistakes of the files, or of the values, are in
        one message, a line each.
      SystemExit: code 0 after ``--help``.
    """
    finder = command_line.Parser(prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", metavar="FILE", nargs="+", action="extend", default=[])
    finder.add_argument("--trust-config", action="store_true")
    options, flags = finder.parse_known_args(argv)
    unread: Words = ()
    if algorithm is not None:
        kind = with_section(kind, algorithm)
        unread = [name for name in ALGORITHMS if name != section_name(algorithm)]
        sections = sections or [name for name in typing.get_type_hints(kind) if name not in unread]
    given = _given(kind, options.config, unread)
    words = (flag.partition("=")[0] for flag in flags if flag.startswith("--"))
    typed = {word.removeprefix("--").replace("-", "_") for word in words}
    if not options.trust_config:  # before anything that a file names is looked at
        asked = given.keys() - typed - {*replaced}
        check_trusted({key: given[key] for key in given if key in asked})
    config = _with_values(kind(), {key: value for key, (value, _) in given.items()})
    about = {"prog": prog, "description": f"{description}\n\n{_ABOUT_FILES}"}
    if flags:  # else there is nothing to wait for: tyro takes half a second
        config = _with_flags(config, flags, sections, about)
    if isinstance(config, RunConfig):
        _check_network(config, typed)
        config = _with_pretrained(config, typed | given.keys(), sections)
    problems: list[str] = []
    config = _checked(config, "", given, problems)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _check_network(config: RunConfig, typed: Collection[str]) -> None:
    """Refuses sizes of a network that are typed beside a model. In a file they stay for the stages
    that start from random weights.
    """
    unread = [key for key in typed if key.startswith("network.") and key != "network.dropout"]
    if config.model is None or not unread:
        return
    flags = ", ".join("--" + key.replace("_", "-") for key in sorted(unread))
    raise UserError(
        f"{flags}: the model {config.model} has its own sizes, so this would change nothing; leave "
        "it out. Texts are limited by --text.max-length, --rl.max-prompt-length and "
        "--rl.max-new-tokens"
    )


def check_trusted(given: Values, run: Path | None = None) -> None:
    """Refuses values of somebody else's file that would run Python code, send texts and keys to a
    server, or read and write elsewhere on this machine.

    Configs of this package are trusted, and so are values whose YAML file and Python file are in
    the current folder. A file in the folder of a run may be somebody else's wherever it is: what it
    names is never trusted, except files and folders below the current folder or of that run.

    Args:
        run: the folder that the files belong to, if it was given as that of a run.

    Raises:
        UserError: lists these values.
    """
    own = [_real(path) for path in shipped().values()]
    problems = []
    for key, (value, place) in given.items():
        config = Path(re.sub(r", line \d+$", "", place)).absolute()
        if _real(config) in own:
            continue
        for text in value if isinstance(value, tuple) else (value,):
            around = run or _run_around(config)
            harm = _harm(key, text, config, around)
            if harm:
                of_run = f" (a config of the run {around})" if around else ""
                problems.append(f"{place}: {key} {text} {harm}{of_run}")
    if problems:
        listed = "\n".join(problems)
        raise UserError(
            f"{listed}\nThis acts with your rights, and the file may be somebody else's. What you "
            "type as flags needs no trust; if the file is yours, or you have read it, give "
            "--trust-config"
        )


def _harm(key: str, value: Any, config: Path, run: Path | None) -> str:
    """What a value of somebody else's YAML file, of this run, could do; "" for nothing."""
    name = key.rpartition(".")[2]
    if not value or not isinstance(value, str | bool) or name in _TEXTS:
        return ""
    here = _real(".")
    if run and key in ("resume", "overwrite", "allow_changed"):
        return "changes another run, and no run has it in its own config"
    if isinstance(value, bool):
        return ""
    kind, names = spec.named(value)
    if kind == "code":
        file = _real(names[0])
        return f"runs the Python code of {file}" if run or not file.is_relative_to(here) else ""
    harmless = {"judge.url": "", "processes": "auto", "rounds.host": "127.0.0.1"}
    is_host = kind == "address" or value != harmless.get(key, value)
    if is_host and (run or not _real(config).is_relative_to(here)):
        return "gets the texts of the run, and your API key"
    if run and key == "track" and value != "tensorboard":
        return "gets the metrics and texts of the run"
    if run is None:
        return ""
    for place in names if name in _REWARDS else (value, *names):
        path = _real(place)
        is_below = path.is_relative_to(here) and not os.path.isabs(place)
        if not is_below and not path.is_relative_to(_real(run)):
            return "is an absolute path, or leads out of the current folder"
    return ""


def _real(path: str | Path) -> Path:
    """The absolute path without links. Unlike ``Path.resolve`` it raises nothing."""
    return Path(os.path.realpath(str(path).replace("\0", "")))


def _run_around(file: Path) -> Path | None:
    """The folder of the run in which a file lies, or lies behind a link; None outside of runs."""
    for folder in (*file.parents, *_real(file).parents):
        # Either is enough for --resume.
        for mark in (folder / "manifest.json", folder / keeping.START):
            if os.path.lexists(mark):
                return folder
    return None


def _given(kind: type, names: Words, unread: Words) -> Values:
    """The values of all files; a later file overrides an earlier one."""
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


def _with_values(config: C, values: Row) -> C:
    """A copy with these values, which may break rules until ``_checked`` sees all of them."""
    config = copy.copy(config)
    for key, value in values.items():
        section: Any = config
        *path, name = key.split(".")
        for inner in path:
            own = copy.copy(vars(section)[inner])  # sections may share one default
            vars(section)[inner] = own
            section = own
        vars(section)[name] = value
    return config


def _with_flags(config: C, flags: Words, sections: Words, about: Row) -> C:
    """The config with the values of these flags, not checked yet.

    about: what ``--help`` says of the program.
    """
    kind = type(config)
    parsed: tuple[C, list[str]] = command_line.read(
        kind,
        flags,
        default=config,
        return_unknown_args=True,
        compact_help=True,
        registry=_flags_of(kind, sections),
        **about,
    )
    values, unknown = parsed
    if unknown:
        raise UserError(_unknown_flag(unknown[0].partition("=")[0], kind, sections))
    return values


def _with_pretrained(config: R, chosen: Collection[str], sections: Words) -> R:
    """The config with the defaults for pretrained weights, if its model has such. What was
    ``chosen``, by a flag or a file, stays. Prints those that the command reads.
    """
    filled = pretrained_defaults(config, chosen)
    listed = [f"{key} {filled[key]}" for key in filled if _is_read(key, type(config), sections)]
    if listed:
        logger.info(f"defaults for the pretrained {config.model}: {', '.join(listed)}")
    return _with_values(config, filled)


def _unknown_flag(flag: str, root: type, sections: Words) -> str:
    key = flag.lstrip("-").replace("-", "_")
    if not flag.startswith("--"):
        switch = "a switch takes no value: --text.pack, or --text.no-pack to turn it off"
        return f"unexpected {flag!r}; flags begin with --; {switch}"
    if key in dotted_keys(root):
        return f"{flag} is a setting that this command does not read"
    read_here = functools.partial(_is_read, root=root, sections=sections)
    return f"unknown flag {flag}; {hint(key, root, flags=True, is_read=read_here)}"


def shipped() -> dict[str, Path]:
    """The configs that come with the package, such as ``tiny`` and ``dapo``, by their names."""
    paths: dict[str, Path] = {}
    for place in Path(__file__).parents[1:3]:  # of a wheel, of a checkout
        paths |= {path.stem: path for path in (place / "configs").rglob("*.yaml")}
    return dict(sorted(paths.items()))


def _flags_of(root: type, sections: Words) -> ConstructorRegistry:
    """How tyro reads a config: of each dataclass it sees the fields that ``sections`` leaves, and
    puts their values into a copy of the default, so that no rule is checked before all values are
    known.
    """
    registry = command_line.registry()
    prefixes = {kind: f"{name}." for name, kind in subsections(root).items()} | {root: ""}
    inside = False

    @registry.struct_rule
    def struct(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal inside
        if inside or not dataclasses.is_dataclass(info.type):
            return None  # tyro's own rules, which know defaults and help texts
        inside = True
        spec: Any = registry.get_struct_spec(info)
        inside = False

        def with_flags(**values: Any) -> Any:
            return _with_values(info.default, values)

        prefix = prefixes.get(info.type)
        fields = [
            field
            for field in spec.fields
            if prefix is None or _is_read(prefix + field.name, root, sections)
        ]
        return dataclasses.replace(spec, instantiate=with_flags, fields=tuple(fields))

    return registry


def _is_read(key: str, root: type, sections: Words) -> bool:
    """Whether a command with these sections has flags for ``key``, a setting or a section. Settings
    at the top always have, except the reward.
    """
    if not sections or ("." not in key and key not in subsections(root) and key != "reward"):
        return True
    return any(f"{key}.".startswith(f"{part}.") or part.startswith(f"{key}.") for part in sections)


def _checked(section: C, prefix: str, given: Values, problems: list[str]) -> C:
    """The section, created again so that its rules are checked, inner sections first. A value that
    breaks a rule is replaced by the default, and the message goes to ``problems`` with section,
    file and line.
    """
    cls = type(section)
    values = dict(vars(section))
    for name in subsections(cls):
        values[name] = _checked(values[name], f"{prefix}{name}.", given, problems)
    refused: set[str] = set()
    while True:
        try:
            return cls(**values)
        except ValueError as error:
            message = str(error)
        name = re.findall(r"\w+", message)[0]
        if name not in refused:
            problems.append(_problem(message, values, prefix, given))
        if name in refused or name not in values:
            return cls()
        refused.add(name)
        values[name] = vars(cls())[name]


def _problem(message: str, values: Row, prefix: str, given: Values) -> str:
    """The message of a rule, after the file and line of the first setting that it names and that no
    flag has changed.
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
