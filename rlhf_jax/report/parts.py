"""The parts of a page: gates, facts, tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.report import figures


class Gates(NamedTuple):
    """The checks of a run: ``{name: (passed, numbers and thresholds)}``."""

    results: Mapping[str, tuple[bool, str]]


class Facts(NamedTuple):
    """``{label: value}``: numbers and settings. Lists are joined with commas."""

    title: str
    values: Mapping[str, Any]


class Table(NamedTuple):
    """Rows of texts and numbers. Columns of numbers are aligned right. Text keeps its line breaks
    and is wrapped.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Mapping[str, str] = {}
    """``{column: format specification}`` of numbers, such as ``.2f``. By default a number has four
    significant digits.
    """
    note: str = ""
    """A sentence above the rows."""


class Figures(NamedTuple):
    """Figures side by side where there is room."""

    title: str
    figures: Sequence[figures.Plot]


Part = Gates | Facts | Table | Figures
