"""Functions and objects that Python gives to a run, as JSON values that can be saved and compared.

    describe(functools.partial(letters, sign=-1))
    # {"def": "rewards.letters", "source sha256": "1f3c09ab77d2", "sign": -1}

A function is described by its name, the hash of its source, its arguments (defaults and those of
``functools.partial``), the values in its closure, and the constants, functions and classes of its
own module that it reads; an object by its class and fields; an array by the hash of its bytes. Code
of Python itself, or of a package whose version the manifest records (``PACKAGES``), is described by
its name alone.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import math
import pathlib
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from rlhf_jax.runs.reading import Row

UNKNOWN = "cannot be fingerprinted"
PACKAGES = ("rlhf_jax", "jax", "jaxlib", "flax", "optax", "orbax", "numpy", "transformers")
MOST_PARTS = 5_000  # of one description


def describe(value: Any) -> Any:
    """A JSON value that differs if the described values differ. A part that cannot be compared
    becomes a text that begins with ``UNKNOWN``.
    """
    return _Description().of(value)


def qualified_name(value: Any) -> str:
    """``module.function`` or ``module.Class`` of a function, class or other callable."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return f"{_module_of(value)}.{name or type(value).__qualname__}"


class _Description:
    """One description while it is made."""

    def __init__(self) -> None:
        self.num_parts = 0
        self.open: list[int] = []  # ids of the values around the present one

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else repr(value)
        if id(value) in self.open:
            return "itself"
        self.num_parts += 1
        if self.num_parts > MOST_PARTS:
            return f"{UNKNOWN}: it has more than {MOST_PARTS} parts"
        self.open.append(id(value))
        description = self.of_object(value)
        self.open.pop()
        return description

    def of_parts(self, parts: Mapping[str, Any]) -> Row:
        return {name: self.of(part) for name, part in parts.items()}

    def of_object(self, value: Any) -> Any:  # noqa: PLR0912
        own = getattr(value, "fingerprint", None)  # as tokenizers have
        if isinstance(own, str):
            return {"class": qualified_name(type(value)), "fingerprint": own}
        match value:
            case bytes():
                return _digest(value)
            case np.ndarray() | np.generic() | jax.Array():
                return _of_array(value)
            case re.Pattern():
                return f"{value.pattern!r}, flags {value.flags}"
            case pathlib.PurePath() | enum.Enum() | range() | np.dtype():
                return repr(value)
            case Mapping():
                return self.of_parts({str(key): part for key, part in value.items()})
            case set() | frozenset():
                return sorted(str(self.of(part)) for part in value)
            case list() | tuple() if not hasattr(value, "_fields"):
                described = [self.of(part) for part in value]
                if any(isinstance(part, dict | list) for part in described):
                    return {str(i): part for i, part in enumerate(described)}
                return described
            case types.ModuleType():
                return self.of_module(value)
            case type():
                return {"class": qualified_name(value), **_source(value)}
            case functools.partial():
                arguments = {str(i): argument for i, argument in enumerate(value.args)}
                return self.named(value.func) | self.of_parts(arguments | value.keywords)
            case types.MethodType():
                return self.named(value.__func__) | {"self": self.of(value.__self__)}
            case types.FunctionType():
                parts = self.of_parts(_values_in(value))
                return {"def": qualified_name(value), **_source(value), **parts}
        if callable(value) and not dataclasses.is_dataclass(value):
            if hasattr(value, "__wrapped__"):  # such as jax.jit(function)
                return self.of(value.__wrapped__)
            if isinstance(value, types.BuiltinFunctionType | np.ufunc):
                return {"def": qualified_name(value)}
        return self.of_instance(value)

    def of_module(self, module: types.ModuleType) -> Any:
        """A module by its source, or by its functions and classes if it has none."""
        source = _source(module)
        members = {}
        if not source and not _is_versioned(module.__name__):
            members = {
                name: member
                for name, member in vars(module).items()
                if callable(member) and _module_of(member) == module.__name__
            }
        return {"import": module.__name__, **source, **self.of_parts(members)}

    def named(self, function: Any) -> Row:
        description = self.of(function)
        return description if isinstance(description, dict) else {"def": description}

    def of_instance(self, value: Any) -> Any:
        """An object by its class and fields, or attributes if the class is the user's own."""
        kind = type(value)
        package = kind.__module__.partition(".")[0]
        is_foreign = package in sys.stdlib_module_names or _is_installed(kind)
        is_open = package in PACKAGES or kind is types.SimpleNamespace or not is_foreign
        if isinstance(value, tuple):
            fields = value._asdict()  # type: ignore[attr-defined]
        elif dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        elif is_open and hasattr(value, "__dict__"):
            fields = vars(value)
        else:
            return f"{UNKNOWN}: {qualified_name(kind)}"
        return {"class": qualified_name(kind), **_source(kind), **self.of_parts(fields)}


def _values_in(function: types.FunctionType) -> Row:
    """The defaults of a function, the variables that it reads from the functions around it and, if
    it is the user's own, the constants, functions and classes that it reads from its module.
    """
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    values = {part.name: part.default for part in parameters if part.default is not part.empty}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    not_assigned = types.CellType()
    values |= {name: cell.cell_contents for name, cell in cells if cell != not_assigned}
    if _is_versioned(function.__module__) or _is_installed(function):
        return values
    read = {name for code in _codes(function.__code__) for name in code.co_names}
    for name in sorted(read & function.__globals__.keys()):
        value = function.__globals__[name]
        is_recorded = callable(value) and _is_versioned(_module_of(value))
        if not is_recorded and not isinstance(value, types.ModuleType):
            values[name] = value
    return values


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _source(value: Any) -> dict[str, str]:
    """{"source sha256": ...}, of code without source its hash; empty for a package's code."""
    name = value.__name__ if isinstance(value, types.ModuleType) else _module_of(value)
    if _is_versioned(name):
        return {}
    try:
        return {"source sha256": _digest(inspect.getsource(value).encode())}
    except (OSError, TypeError):
        if not isinstance(value, types.FunctionType):
            return {}
    texts = []
    for code in _codes(value.__code__):
        constants: list[Any] = []
        for constant in code.co_consts:
            if isinstance(constant, frozenset):  # whose order differs between processes
                constants.append(sorted(map(repr, constant)))
            elif not isinstance(constant, types.CodeType):
                constants.append(constant)
        texts.append(f"{code.co_code.hex()} {code.co_names} {constants}")
    return {"source sha256": _digest("\n".join(texts).encode())}


def _of_array(array: Any) -> str:
    if isinstance(array, jax.Array):
        if not array.is_fully_addressable:
            return f"{UNKNOWN}: an array of several processes"
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
    values = np.asarray(array)
    digest = _digest(values.tobytes())
    return f"{values.dtype}{list(values.shape)} {digest}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _module_of(value: Any) -> str:
    return getattr(value, "__module__", None) or type(value).__module__


def _is_versioned(module: str) -> bool:
    """Whether a module belongs to Python, or to a package whose version the manifest records."""
    package = module.partition(".")[0]
    return package in PACKAGES or package in sys.stdlib_module_names


def _is_installed(value: Any) -> bool:
    """Whether a function or class belongs to an installed package."""
    module = sys.modules.get(_module_of(value))
    file = getattr(module, "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file
