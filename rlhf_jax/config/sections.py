"""The section of an algorithm in the settings of a run, also of the user's own algorithm."""

import dataclasses
import functools
import typing
from typing import Any, TypeVar

from rlhf_jax.config.settings import ALGORITHMS, RunConfig
from rlhf_jax.errors import UserError, logger
from rlhf_jax.runs import manifest
from rlhf_jax.types import Algorithm, AlgorithmConfig

C = TypeVar("C")


def with_section(kind: type[C], algorithm: Algorithm) -> type[C]:
    """The settings ``kind``, with a section for the user's own algorithm: the ``Config`` of its
    module, under the module's name.

    Raises:
      UserError: the module has the name of another setting.
    """
    name = section_name(algorithm)
    section = typing.get_type_hints(kind).get(name)
    if section is None:
        return _extended(kind, name, algorithm.Config)
    if not (isinstance(section, type) and issubclass(section, algorithm.Config)):
        raise UserError(
            f"the algorithm {algorithm.__name__}: {name} is a setting of every run; give its "
            "module another name"
        )
    return kind


def section_name(algorithm: Algorithm) -> str:
    """The name of an algorithm's section and run: the name of its module."""
    return algorithm.__name__.rpartition(".")[2]


def _extended(kind: type[C], name: str, section: type) -> type[C]:
    field = (name, section, dataclasses.field(default_factory=section))
    return dataclasses.make_dataclass(kind.__name__, [field], bases=(kind,), frozen=True)


def for_algorithm(
    config: RunConfig,
    algorithm: Algorithm,
    section: Any = None,
) -> tuple[RunConfig, Any]:
    """The settings of a run of this algorithm, and its own section among them, which has all that
    ``AlgorithmConfig`` names. Names in a line the values of other algorithms' sections, which your
    own one does not read.

    Args:
      section: replaces the section of ``config``; None: that of ``config``, or the module's
        ``Config()`` if it has none.

    Raises:
      UserError: the section is no frozen dataclass.
    """
    name = section_name(algorithm)
    kind = with_section(type(config), algorithm)
    if name not in ALGORITHMS:
        _say_unread(config, name)
    if section is None:
        section = vars(config).get(name) or algorithm.Config()
    elif name in ALGORITHMS:
        _say_unused(name, vars(config)[name], section)
    section = _with_defaults(section, name)
    _check_counts(section, name)
    usual = typing.get_type_hints(kind)[name]
    if issubclass(usual, type(section)):
        section = usual(**vars(section))
    else:
        kind = _extended(kind, name, type(section))
    return kind(**vars(config) | {name: section}), section


def _say_unused(name: str, own: Any, given: Any) -> None:
    """Names the values of a section that do not count, since Python gives its settings."""
    default = vars(type(own)())
    unused = [
        f"{name}.{key} {value}"
        for key, value in vars(own).items()
        if value not in (default[key], vars(given).get(key))
    ]
    if unused:
        logger.info(
            f"the settings of {name} are those that Python gives; not used: {', '.join(unused)}"
        )


def _say_unread(config: RunConfig, name: str) -> None:
    """Names the values of this package's algorithms that differ from their defaults, which your own
    algorithm of that name does not read. A file that several stages share may have them.
    """
    before = manifest.dotted(dataclasses.asdict(type(config)()))
    values = manifest.dotted(dataclasses.asdict(config))
    unread = [
        f"{key} {value}"
        for key, value in values.items()
        if key.partition(".")[0] in ALGORITHMS and value != before[key]
    ]
    if unread:
        logger.info(f"the algorithm {name} does not read: {', '.join(unread)}")


def _with_defaults(section: Any, name: str) -> AlgorithmConfig:
    """The section with what a run reads of it and it does not have.

    Raises:
      UserError: it is no frozen dataclass.
    """
    if isinstance(section, AlgorithmConfig):
        return section
    kind: type = type(section)
    settings = getattr(kind, "__dataclass_params__", None)
    if settings is None or not settings.frozen:
        raise UserError(
            f"the algorithm {name}: its Config must be a frozen dataclass, @dataclass(frozen=True)"
        )
    completed: AlgorithmConfig = _completed(kind)(**vars(section))
    return completed


def _check_counts(section: AlgorithmConfig, name: str) -> None:
    """Raises UserError for a count that is no whole number, or too small."""
    counts = dict.fromkeys(
        ("group_size", "num_epochs", "num_minibatches", "num_microbatches", "shuffle_blocks"), 1
    )
    for key, least in {**counts, "value_warmup": 0}.items():
        value = getattr(section, key)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or value < least:
            raise UserError(
                f"{name}.{key} must be a whole number of at least {least}, got {value!r}"
            )


@functools.cache
def _completed(kind: type) -> type[Any]:
    """The dataclass with the names of ``AlgorithmConfig`` that it lacks. One class for each, since
    programs are compiled once for equal settings.
    """
    bases = (kind, AlgorithmConfig)
    return dataclasses.make_dataclass(kind.__name__, [], bases=bases, frozen=True)
