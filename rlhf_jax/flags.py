"""Configurations from YAML and the command line: nested frozen dataclasses, checked before anything runs.

    config = flags.parse(RunConfig)     # script.py --config FILE.yaml --ppo.clip-low 0.1

A value given as a flag goes before one from the file, and that before the dataclass's default. The file is checked
against the dataclass first (``config_files``), so that a mistake is named with its file, line and key. A string below
a field is its ``--help`` text.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from rlhf_jax.config_files import Values, fields, is_section, read, to_yaml
from rlhf_jax.errors import UserError

__all__ = ["parse", "to_yaml"]

C = TypeVar("C")


def parse(
    config_class: type[C], argv: Sequence[str] | None = None, *, prog: str | None = None, description: str = ""
) -> C:
    """Reads ``--config FILE`` and dotted flags (``sys.argv[1:]`` by default) into a ``config_class``.

    Of several ``--config`` the last one counts. ``--help`` shows the values in force: the file's, else the defaults.

    Raises:
      UserError: the file is missing, broken or does not fit; or a ``__post_init__`` refused the values (ValueError).
      SystemExit: code 0 after ``--help``; code 2 for an unknown flag or a flag's wrong value, said on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    file = _config_argument(argv)
    given = read(config_class, file) if file is not None else {}
    defaults = _assemble(config_class, "", {key: value for key, (value, _) in given.items()})
    config = tyro.cli(
        config_class,
        args=argv,
        prog=prog,
        description=description,
        default=defaults,
        registry=_unchecked_construction(config_class),
    )
    return _construct(config, "", given, file)


def _config_argument(argv: Sequence[str]) -> Path | None:
    file = None
    for index, flag in enumerate(argv):
        if flag == "--config" and index + 1 < len(argv):
            file = Path(argv[index + 1])
        elif flag.startswith("--config="):
            file = Path(flag.removeprefix("--config="))
    return file


def _unchecked_construction(config_class: type) -> tyro.constructors.ConstructorRegistry:
    """Makes tyro assemble dataclasses without their ``__post_init__``, and adds ``--config`` to the outermost one.

    The checks run once, on the final values, and report as UserErrors: tyro would run them on its own terms and exit.
    """
    registry = tyro.constructors.ConstructorRegistry()
    inside = False

    @registry.struct_rule
    def _(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        nonlocal inside
        if inside or not dataclasses.is_dataclass(info.type):
            return None
        inside = True  # the rules that come with tyro know defaults and help texts
        try:
            spec = registry.get_struct_spec(info)
        finally:
            inside = False
        assert isinstance(spec, tyro.constructors.StructConstructorSpec)
        options = spec.fields
        if info.type is config_class:
            text = "YAML file with values for the options below; options given here go before the file's."
            kind = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
            options = (tyro.constructors.StructFieldSpec("config", kind, None, text), *options)  # type: ignore[arg-type]

        def instantiate(**values: Any) -> Any:
            return _instance(info.type, values)

        return tyro.constructors.StructConstructorSpec(instantiate, options)

    return registry


def _instance(cls: type[C], values: dict[str, Any]) -> C:
    instance = object.__new__(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            object.__setattr__(instance, field.name, values[field.name])
    return instance


def _assemble(cls: type[C], prefix: str, given: dict[str, Any]) -> C:
    """An unchecked instance of the class's defaults overlaid with ``given``: {dotted key: value}."""
    values: dict[str, Any] = {}
    for field, kind in fields(cls):
        key = prefix + field.name
        if key in given:
            values[field.name] = given[key]
            continue
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if is_section(kind):
            inner = _flatten(default, key + ".") if default is not dataclasses.MISSING else {}
            values[field.name] = _assemble(kind, key + ".", inner | given)
        else:
            values[field.name] = tyro.MISSING if default is dataclasses.MISSING else default
    return _instance(cls, values)


def _flatten(config: Any, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field, kind in fields(type(config)):
        value = getattr(config, field.name)
        flat |= _flatten(value, f"{prefix}{field.name}.") if is_section(kind) else {prefix + field.name: value}
    return flat


def _construct(raw: C, prefix: str, given: Values, file: Path | None) -> C:
    """Runs the constructors, innermost first; their ValueErrors become UserErrors that say where."""
    values = {}
    for field, kind in fields(type(raw)):
        value = getattr(raw, field.name)
        values[field.name] = _construct(value, f"{prefix}{field.name}.", given, file) if is_section(kind) else value
    try:
        return type(raw)(**values)
    except ValueError as error:
        message = str(error)
        section = prefix.rstrip(".")
        if section and not message.startswith(section):
            message = f"{section}: {message}"
        # The line is that of a field which the message names and no flag has changed.
        for name, value in values.items():
            if prefix + name in given and re.search(rf"\b{re.escape(name)}\b", str(error)):
                written, line = given[prefix + name]
                if written == value:
                    message = f"{file}, line {line}: {message}"
                    break
        raise UserError(message) from error
