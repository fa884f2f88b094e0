"""Reading settings: YAML files, then dotted flags."""

import copy
import dataclasses
import functools
import itertools
import operator
import re
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from rlhf_jax.config import command_line, flag_help
from rlhf_jax.config.sections import own_section, section_name
from rlhf_jax.config.settings import ALGORITHMS, RIVALS, RunConfig
from rlhf_jax.config.trust import check_trusted, shipped
from rlhf_jax.config.yaml_files import Values, dotted_keys, hint, read, subsections, types_of
from rlhf_jax.errors import UserError, escaped, logger
from rlhf_jax.runs.reading import Row
from rlhf_jax.types import Algorithm

C = TypeVar("C")
Words = Sequence[str]


@dataclass(frozen=True)
class Files:
    """The files that hold settings."""

    config: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """YAML files with values for these options, or names that `rlhf-jax configs` lists. A later
    file goes before an earlier one, and flags go before all."""
    trust_config: bool = False
    """Use the Python files, servers and places that such a file names, though it may not be yours.
    """


def parse(
    kind: type[C],
    argv: Words | None = None,
    *,
    prog: str | None = None,
    description: str = "",
    examples: Words = (),
    first: Words = (),
    sections: Words = (),
    algorithm: Algorithm | None = None,
    replaced: Words = (),
    ignored: Words = (),
) -> C:
    """Reads ``--config FILE ...`` and dotted flags (``sys.argv[1:]`` by default) into a config of
    this kind.

    A flag overrides the files, a later file an earlier one, and the files the defaults of the
    class; also where they say the same thing by another setting, see ``RIVALS``. ``--help`` shows
    the values in force and a sentence for each setting, ``--help-verbose`` the whole texts. Rules
    are checked once, on the final values. A file that names somebody else's Python files needs
    ``--trust-config``, see ``check_trusted``.

    Args:
      examples: command lines for ``--help``.
      first: the keys with which ``--help`` begins, after ``--config``.
      sections: the sections (``rl``) and keys of sections (``rl.top_k``) that have flags, beside
        the settings at the top; empty: all. A file may hold keys of other sections too, since
        several stages share it.
      algorithm: your own one: its ``Config`` is a section under the module's name, in ``own``. The
        sections of this package's algorithms have no flags then and keep their defaults.
      replaced: settings that the caller replaces afterwards: the files' values need no trust.
      ignored: keys at the top of a file that are no settings, such as those of a script.

    Raises:
      UserError: a file is missing, broken or of another kind, a key or a flag is unknown, or a
        value breaks a rule. All unknown ones, and all mistakes of the files, are in one message, a
        line each; so are all values that break rules.
      SystemExit: code 0 after ``--help``, 2 after an error that tyro printed: a flag without a
        value, or with one of another type.
    """
    files, flags = tyro.cli(Files, args=argv, prog=prog, add_help=False, return_unknown_args=True)
    own = {} if algorithm is None else own_section(algorithm)
    unread = [] if algorithm is None else [n for n in ALGORITHMS if n != section_name(algorithm)]
    keys = dotted_keys(kind)
    keys += [key for name in own for key in (name, *dotted_keys(own[name], f"{name}."))]
    reads = _keys_read(kind, keys, own, sections, unread)
    typed = {_key(word, keys): word for word in flags if word.startswith("--")}
    given, problems = _read_files(kind, own, files.config, keys, reads, ignored)
    problems += _unknown_flags(typed, keys, reads)
    switches = switches_of(kind).union(*(switches_of(own[name], f"{name}.") for name in own))
    problems += _valued_switches(flags, keys, switches)
    if problems:
        raise UserError("\n".join(problems))
    given = {key: value for key, value in given.items() if key.partition(".")[0] not in unread}
    if not files.trust_config:  # before anything that a file names is looked at
        asked = given.keys() - typed - {*replaced}
        check_trusted({key: given[key] for key in given if key in asked})

    config = kind()
    vars(config).update({name: section() for name, section in own.items()})  # until it is checked
    config = _with_values(config, {key: value for key, (value, _) in given.items()})
    if {"-h", "--help"} & {*flags}:
        inside = {"": config, **{name: vars(config)[name] for name in own}}
        known = [flag for name in inside for flag in flag_help.flags_of(inside[name], name)]
        shown = [*flag_help.flags_of(Files()), *(flag for flag in known if flag.key in reads)]
        text = flag_help.layout(shown, ("config", *first) if first else ())
        lines = [f"usage: {prog or Path(sys.argv[0]).name} [FLAGS]", "", description.strip()]
        lines += ["", "For example", *(f"  {line}" for line in examples)] if examples else []
        print(escaped("\n".join([*lines, text])), file=sys.stdout)
        raise SystemExit(0)
    if flags:  # else there is nothing to wait for: tyro takes half a second
        config = _with_flags(config, own, flags, reads, prog, description)
    values = {key: operator.attrgetter(key)(config) for key in typed}
    left = _without_rivals(given, values, reads)
    defaults = kind()
    lost = {key: operator.attrgetter(key)(defaults) for key in given if key not in left}
    config = _with_values(config, lost)
    if isinstance(config, RunConfig):
        _check_unread(config, typed)
    if own:
        vars(config)["own"] = {
            name: _checked(vars(config).pop(name), f"{name}.", left, problems) for name in own
        }
    config = _checked(config, "", left, problems)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _keys_read(
    kind: type, keys: Words, own: Mapping[str, type], sections: Words, unread: Words
) -> list[str]:
    """The settings and sections that a command has flags for, among all ``keys``: those at the top,
    except the reward, those of ``own``, and what ``sections`` names; if it is empty, all but the
    sections ``unread``.
    """
    if not sections:
        return [key for key in keys if key.partition(".")[0] not in unread]
    at_top = {*types_of(kind)} - {*subsections(kind), "reward"}
    parts = [f"{part}." for part in (*sections, *own)]
    return [
        key
        for key in keys
        if key in at_top
        or any(f"{key}.".startswith(part) or part.startswith(f"{key}.") for part in parts)
    ]


def _key(word: str, keys: Words) -> str:
    """The setting of a flag such as ``--text.no-pack`` or ``--rl.batch-size=8``."""
    key = word.partition("=")[0].removeprefix("--").replace("-", "_")
    section, dot, name = key.rpartition(".")
    turned_off = f"{section}{dot}{name.removeprefix('no_')}"
    return turned_off if turned_off in keys else key


def switches_of(kind: type, prefix: str = "") -> set[str]:
    """The keys that the flag's name alone turns on or off."""
    keys = {prefix + name for name, inner in types_of(kind).items() if inner is bool}
    inside = [switches_of(inner, f"{prefix}{name}.") for name, inner in subsections(kind).items()]
    return keys.union(*inside)


def _valued_switches(flags: Words, keys: Words, switches: set[str]) -> list[str]:
    """A sentence for each value behind a flag that takes none."""
    problems = []
    for word, after in itertools.pairwise([*flags, "--"]):
        key = _key(word, keys)
        value = word.partition("=")[2] or ("" if after.startswith("-") else after)
        if word.startswith("--") and key in switches and value:
            section, dot, name = key.replace("_", "-").rpartition(".")
            turns = f"--{section}{dot}{name} turns it on, --{section}{dot}no-{name} off"
            problems.append(f"{word.partition('=')[0]} takes no value, got {value}: {turns}")
    return problems


def _unknown_flags(typed: Mapping[str, str], keys: Words, reads: Words) -> list[str]:
    """A sentence for each flag that the command does not have."""
    problems = []
    for key, word in typed.items():
        flag = word.partition("=")[0]
        if key in (*reads, "help", "help_verbose"):
            continue
        if key in keys:
            problems.append(f"{flag} is a setting that this command does not read")
        else:
            problems.append(f"unknown flag {flag}; {hint(key, keys, reads, flags=True)}")
    return problems


def _read_files(
    kind: type,
    own: Mapping[str, type],
    groups: Sequence[Words],
    keys: Words,
    reads: Words,
    ignored: Words,
) -> tuple[Values, list[str]]:
    """The values of all files, later ones before earlier ones, and a sentence for each mistake."""
    given: Values = {}
    problems = [] if all(groups) else ["--config: name a file"]
    suggest = functools.partial(hint, keys=keys, reads=reads)
    for name in (name for group in groups for name in group):
        try:
            later = read(kind, shipped().get(name, Path(name)), own, suggest, ignored)
        except UserError as error:
            problems.append(str(error))
            continue
        values = {key: value for key, (value, _) in later.items()}
        given = _without_rivals(given, values, reads) | later
    return given, problems


def _without_rivals(given: Values, later: Row, reads: Words) -> Values:
    """``given`` without what ``RIVALS`` replaces by ``later`` settings, and a line for each."""
    left = dict(given)
    for key, value in later.items():
        for rival in RIVALS.get(key, ()):
            if rival not in left or rival not in reads or rival in later or _is_off(value):
                continue
            old, place = left.pop(rival)
            if not _is_off(old):
                logger.info(f"{place}: {rival} {old} is not used, since {key} {value} is given")
    return left


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == ()


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


def _with_flags(
    config: C,
    own: Mapping[str, type],
    flags: Words,
    reads: Words,
    prog: str | None,
    description: str,
) -> C:
    """The config with the values of these flags, not checked yet."""
    kinds = {"": type(config), **own}
    sections = [Annotated[kind, tyro.conf.arg(name=name)] for name, kind in kinds.items()]
    files = Annotated[Files, tyro.conf.arg(name="")]  # for --help
    everything: Any = types.GenericAlias(tuple, (files, *sections))
    _, config, *parsed = tyro.cli(
        everything,
        args=flags,
        default=(Files(), config, *(vars(config)[name] for name in own)),
        prog=prog,
        description=description,
        compact_help=True,
        registry=_unchecked(kinds, reads),
    )
    return _with_values(config, dict(zip(own, parsed, strict=True)))


def _unchecked(kinds: Mapping[str, type], reads: Words) -> ConstructorRegistry:
    """How tyro reads dataclasses of settings, {section: kind}: those that ``reads`` names have
    flags, and their values are put into a copy of the default, so that no rule is checked before
    all values are known.
    """
    registry = command_line.registry()
    prefixes = {kind: f"{name}." for name, kind in subsections(kinds[""]).items()}
    prefixes |= {kind: f"{name}.".removeprefix(".") for name, kind in kinds.items()}
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
        shown = [field for field in spec.fields if prefix is None or prefix + field.name in reads]
        return dataclasses.replace(spec, instantiate=with_flags, fields=tuple(shown))

    return registry


def _check_unread(config: RunConfig, typed: Mapping[str, str]) -> None:
    """Refuses sizes of a network and kinds of a tokenizer that are typed beside a model. In a file
    they stay for the stages that start from random weights.
    """
    read_with_model = ("network.dropout", "tokenizer.name")  # the second has a rule of its own
    unread = [
        word.partition("=")[0]
        for key, word in typed.items()
        if key.startswith(("network.", "tokenizer.")) and key not in read_with_model
    ]
    if config.model is None or not unread:
        return
    raise UserError(
        f"{', '.join(sorted(unread))}: the model {config.model} has its own sizes and tokenizer, "
        "so this would change nothing; leave it out. Texts are limited by --text.max-length, "
        "--rl.max-prompt-length and --rl.max-new-tokens"
    )


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
    """The message of a rule, after the place of the first setting it names that no flag changed."""
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
