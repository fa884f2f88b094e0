"""The section of an algorithm in the settings of a run, also of the user's own algorithm."""

from dataclasses import replace
from typing import Any

from rlhf_jax.config.settings import ALGORITHMS, RunConfig
from rlhf_jax.config.yaml_files import to_dict, types_of
from rlhf_jax.errors import UserError, logger
from rlhf_jax.runs import manifest
from rlhf_jax.types import Algorithm, AlgorithmConfig, complete


def own_section(algorithm: Algorithm) -> dict[str, type]:
    """{name: class} of the section of the user's own algorithm, the ``Config`` of its module; empty
    for an algorithm of this package.

    Raises:
      UserError: the module has the name of another setting.
    """
    name = section_name(algorithm)
    section = types_of(RunConfig).get(name)
    if section is None:
        return {name: algorithm.Config}
    if not (isinstance(section, type) and issubclass(section, algorithm.Config)):
        raise UserError(
            f"the algorithm {algorithm.__name__}: {name} is a setting of every run; give its "
            "module another name"
        )
    return {}


def section_name(algorithm: Algorithm) -> str:
    """The name of an algorithm's section and run: the name of its module."""
    return algorithm.__name__.rpartition(".")[2]


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
    is_own = bool(own_section(algorithm))
    if is_own:
        _say_unread(config, name)
        section = section or config.own.get(name) or algorithm.Config()
    elif section is None:
        section = vars(config)[name]
    else:
        _say_unused(name, vars(config)[name], section)
    complete(section, f"the algorithm {name}")
    _check_counts(section, name)
    if is_own:
        return replace(config, own={**config.own, name: section}), section
    usual = type(vars(config)[name])
    if issubclass(usual, type(section)):
        section = usual(**vars(section))
    return replace(config, **{name: section}), section


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
    before = manifest.dotted(to_dict(type(config)()))
    values = manifest.dotted(to_dict(config))
    unread = [
        f"{key} {value}"
        for key, value in values.items()
        if key.partition(".")[0] in ALGORITHMS and value != before[key]
    ]
    if unread:
        logger.info(f"the algorithm {name} does not read: {', '.join(unread)}")


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
