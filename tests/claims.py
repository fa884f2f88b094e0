"""Sentences of pages beside the results that they speak of."""

import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import scipy.stats
from builders import ROOT

DOCS = ROOT / "docs"
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BLOCK = re.compile(r"<!-- results (\S+)\n(.*?)-->\n(.*?)<!-- end -->", re.DOTALL)
CELL = re.compile(r"\S+ \((\S+) to (\S+)\)")
Difference = tuple[float, float, float]  # a mean, and the ends of its interval


class Results:
    """A file of results, for a page that shows ``num`` differences."""

    def __init__(self, rows: Iterable[dict], num: int) -> None:
        self.num = num
        self.values: dict[tuple[str, str], dict[int | str, float]] = {}
        for row in sorted(rows, key=lambda row: row["step"]):  # the last step's stays
            of_seeds = self.values.setdefault((row["variant"], row["metric"]), {})
            of_seeds[row["seed"]] = row["value"]

    def mean(self, variant: str, metric: str) -> float:
        """Over the seeds; in a file of one seed its number."""
        of_seeds = self.values[variant, metric]
        return of_seeds["all"] if "all" in of_seeds else next(iter(of_seeds.values()))

    def seeds(self, variant: str, metric: str) -> np.ndarray:
        of_seeds = self.values[variant, metric]
        return np.array([value for seed, value in of_seeds.items() if seed != "all"])

    def difference(self, variant: str, metric: str) -> Difference:
        """With Student's interval, of which all ``num`` hold together with 95% (Bonferroni)."""
        values = self.seeds(variant, metric)
        error = values.std(ddof=1) / len(values) ** 0.5
        far = scipy.stats.t.ppf(1 - 0.05 / self.num / 2, len(values) - 1) * error
        return self.mean(variant, metric), values.mean() - far, values.mean() + far

    def by_rate(self, variant: str, metric: str) -> dict[float, float]:
        """{learning rate: mean} of a metric that is measured at several."""
        start = f"{metric} at "
        names = [name for of, name in self.values if of == variant and name.startswith(start)]
        ends = [name.removeprefix(start) for name in names if re.search(r"\d$", name)]
        return {float(end): self.mean(variant, start + end) for end in ends}


class Claim(NamedTuple):
    """A sentence with ``{}`` for each number or name, the file in docs/results/, and a function of
    the file that gives what stands there.
    """

    sentence: str
    file: str
    values: Callable[[Results], Iterable[float | str]]


@functools.cache
def read(name: str, num: int) -> Results:
    """The file, for a page with so many differences."""
    return Results(json.loads((DOCS / "results" / f"{name}.json").read_text("utf-8"))["rows"], num)


def check(text: str, claim: Claim, results: Results) -> None:
    """Raises an AssertionError unless the sentence is on the page once, with these values."""
    found = list(re.finditer(_pattern(claim.sentence), one_line(text)))
    assert len(found) == 1, f"{len(found)} times on the page: {claim.sentence}"
    printed = found[0].groups()
    values = zip(claim.values(results), printed, strict=True)
    expected = tuple(_as_printed(*both) for both in values)
    assert printed == expected, f"{claim.sentence}: {printed}, but the file has {expected}"


def _pattern(sentence: str) -> str:
    return re.escape(one_line(sentence)).replace(r"\{\}", r"([-@\w.*]+)")


def _as_printed(value: float | str, like: str) -> str:
    """The value with the digits, or as the word, of what a page prints."""
    if isinstance(value, str):
        return value
    if like.isalpha():
        return WORDS[round(value)]
    if "e" in like:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.{len(like.partition('.')[2])}f}"


def shown_together(text: str) -> list[tuple[str, str, str, str, str]]:
    """(file, variant, metric, low, high) of the intervals in blocks with ``together``."""
    found = []
    for name, options, content in BLOCK.findall(text):
        if "together: yes\n" in options:
            lines = [line.strip("| ").split(" | ") for line in content.splitlines() if "|" in line]
            for variant, *cells in lines[2:]:
                for metric, cell in zip(lines[0][1:], cells, strict=False):
                    if match := CELL.fullmatch(cell.strip()):
                        found.append((name, variant, metric, *match.groups()))
    return found


def not_held(text: str, claims: Iterable[Claim]) -> list[str]:
    """Numbers with a point in paragraphs that have a claim, outside of all claims."""
    text = re.sub(r"^```.*?^```$", "", BLOCK.sub("", text), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
    found = []
    for part in re.split(r"\n\s*\n|\n(?=- )", text):
        rest = one_line(part)
        for claim in claims:
            rest = re.sub(_pattern(claim.sentence), "", rest)
        if rest != one_line(part):
            found += re.findall(r"\S*\.\d\S*", rest)
    return found


def one_line(text: str) -> str:
    return " ".join(text.split())
