r"""Where an answer stands in a text, and what it is.

A gold answer, the one of the data row, is read in the form in which its data set writes it: after
``####`` (GSM8K), in ``\boxed{}`` (MATH), in ``<answer>`` tags, in dollars, or bare. It is a number,
a choice, a ratio or time, words, or another expression. The answer of a response is looked for in
the light of the gold answer, by one rule (`find`).
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from rlhf_jax.graders import literals
from rlhf_jax.graders.literals import FUNCTION_NAMES, Number

Kind = Literal["number", "choice", "ratio", "words", "expression"]
Form = Literal["number", "expression"]
Place = Literal["auto", "boxed", "tags", "hashes", "last"]

KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_WORDS = 100  # characters of an answer in words
MOST_SEARCHED = 4_000  # last characters of a response, where its last expression is looked for

_MARKS = {"after ####": "hashes", "in \\boxed{}": "boxed", "in <answer> tags": "tags"}
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}\\]|[{}]")
_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?")
_LETTERED = re.compile(r"\(([A-J])\)\s*\S.*")
_SEVERAL = re.compile(r"\b[A-J]\b\s*(?:,|/|and|or)\s*\b[A-J]\b")
_RATIO = re.compile(r"(\d+(?:\s*:\s*\d+)+)\s*([ap]\.?\s?m\.?)?", re.IGNORECASE)
_RUN = re.compile(r"(?<![\\\w^{])[^\W\d_]{2,}(?:['’-][^\W\d_]+)*(?![\w^(])")
_OPERATORS = re.compile(r"[-+*/^=<>|\\\d(){}\[\]_]")
_EQUALS = re.compile(r"(?<![<>!:])=(?!=)|\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])")
# What parts one expression from the next in running text.
_BREAK = re.compile(
    r"\\(?:begin|end)\{[a-z*]+\}|(?P<word>(?<![\\\w])(?:[^\W\d_]+['’][^\W\d_]+|[^\W\d_]{2,}))"
    r"|(?P<stop>[.?;](?=\s|$)|(?<![\d)])!(?=\s|$)|:(?=\s|$)|\n|(?<!\S)[aAI](?=\s+[A-Za-z0-9$]))"
)
# 144\pi \text{ cubic inches}, but not \text{June 20} or x = 1 \text{ or } ...
_WITH_UNIT = re.compile(
    r"((?:(?!\\text|\\mbox|\\mathrm)\D)*\d(?:(?!\\text|\\mbox|\\mathrm).)*)"
    r"\\(?:text|textrm|mathrm|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?",
    re.DOTALL,
)
_RELATION = re.compile(r"[<>≤≥∈]|\\(?:leq?|geq?|in)(?![A-Za-z])")
_NO_LOOK = re.compile(r"\s|\$|\\[,;:()\[\]]")
_UNIT_AT_DIGIT = re.compile(r"(?<=\d)(?=[^\W\d_]{2})")
_DIGIT = re.compile(r"\d")
_SYMBOL = re.compile(r"[A-Za-z\d]")
_NO_BREAKS = FUNCTION_NAMES - {"or", "and"}
_LIST = re.compile(r"([(\[]).*,.*([)\]])", re.DOTALL)
_EXCLAMATION = re.compile(r"!(?=\s|$)")
_SAID = re.compile(r"\banswer(?:\s+is)?\s*[:=-]?\s*(?:is\b)?", re.IGNORECASE)
_EDGES_BUT_POINT = " \t\r,;:*_`\"'|#>"
_EDGES = _EDGES_BUT_POINT + "."


class Value(NamedTuple):
    """One answer: its kind, its text, and the number that it is."""

    kind: Kind
    text: str
    number: Number | None = None


class Gold(NamedTuple):
    """The answers that a row allows, and how its data set marks them."""

    values: tuple[Value, ...]  # none: no response can be scored
    mark: str = "bare"
    fault: str = ""  # why it cannot be read; "": it can be, or there is no answer


class Found(NamedTuple):
    """The answer of a response: its text, and whether a mark or tag stands around it."""

    text: str
    is_marked: bool


@dataclass(frozen=True)
class Column:
    """What the golds of a column are, in numbers of rows; decided once, before the run."""

    num_missing: int
    marks: Counter[str]
    kinds: Counter[Kind]

    @property
    def form(self) -> Form:
        """``number`` if most of the golds are numbers: an answer to one must then be worked out."""
        is_most = 2 * self.kinds["number"] > self.kinds.total()
        return "number" if is_most else "expression"

    def describe(self, form: Form) -> str:
        """One line for a log."""
        marks = [f"{count} {mark}" for mark, count in self.marks.most_common()]
        kinds = [f"{name}: {count}" for name, count in self.kinds.most_common()]
        parts = [
            f"{self.kinds.total()} answers",
            *marks,
            *kinds,
            f"math.form {form}",
        ]
        if self.num_missing:
            parts.append(f"{self.num_missing} rows without an answer")
        return ", ".join(parts)


def column(golds: Iterable[Gold]) -> Column:
    """The counts of all golds."""
    num_missing = 0
    marks = Counter[str]()
    kinds = Counter[Kind]()
    for one in golds:
        if one.values:
            marks[one.mark] += 1
            kinds[one.values[0].kind] += 1
        elif not one.fault:
            num_missing += 1
    return Column(num_missing, marks, kinds)


def gold(entry: Any) -> Gold:
    """The gold of a data row: a text, a JSON number, true or false, a list of allowed answers, or
    null if the row has none.
    """
    if entry is None or entry == "":
        return Gold(())
    entries = entry if isinstance(entry, list | tuple) else [entry]
    if not entries:
        return Gold((), fault="the list of answers is empty")
    read = [_gold(one) for one in entries]
    faults = [one.fault for one in read if one.fault]
    if faults:
        return Gold((), fault=faults[0])
    values = [value for one in read for value in one.values]
    return Gold(tuple(values), read[0].mark)


def _gold(entry: Any) -> Gold:
    if isinstance(entry, bool):
        return Gold((Value("words", str(entry).lower()),))
    if isinstance(entry, int | float):
        try:
            text = repr(entry)
        except ValueError:  # Python writes no integer of more than 4,300 digits
            return Gold((), fault="the answer has too many digits")
        read = literals.number(text)
        if read is None:
            return Gold((), fault=f"the answer {text:.40} is no number that can be compared")
        return Gold((Value("number", text, read),))
    if not isinstance(entry, str):
        return Gold((), fault=f"the answer is of type {type(entry).__name__}, not a text or number")
    mark, text = _unmarked(entry)
    value = value_of(text)
    if not value.text:
        return Gold((), mark, fault="the answer is empty")
    is_text = value.kind == "words" and ("\n" in text.strip() or len(text) > MOST_WORDS)
    if is_text:
        return Gold((), mark, fault="the answer is a whole text; mark its end by #### or \\boxed{}")
    return Gold((value,), mark)


def _unmarked(text: str) -> tuple[str, str]:
    """How a data set marks its answers, and the answer."""
    for mark, place in _MARKS.items():
        found = _marked(text, place)
        if found is not None:
            return mark, found
    bare = text.strip()
    mark = "in $...$" if re.fullmatch(r"\$.+\$", bare, re.DOTALL) else "bare"
    return mark, bare


def value_of(text: str) -> Value:
    """What a text is that holds an answer and nothing else."""
    shown = literals.trimmed(literals.plain(text))
    left, right = _split(shown)
    named = right if re.fullmatch(r"\s*[A-Za-z]\s*", left) else text  # x = 5
    read = literals.number(named)
    if read is not None:
        return Value("number", named.strip(), read)
    choice = _CHOICE.fullmatch(shown) or _LETTERED.fullmatch(shown)
    if choice:
        return Value("choice", choice[1])
    ratio = _RATIO.fullmatch(shown)
    if ratio:
        return Value("ratio", _ratio(ratio))
    with_unit = _WITH_UNIT.fullmatch(text.strip())
    if with_unit:
        return value_of(with_unit[1])
    if _is_words(shown):
        return Value("words", words(shown))
    return Value("expression", text.strip())


def _is_words(shown: str) -> bool:
    """Whether a text is words rather than mathematics: ``silent`` but not ``sin x``, ``xy = 3`` or
    ``x and y``.
    """
    has_runs = False
    for run in _RUN.findall(shown):
        if run.casefold() in FUNCTION_NAMES:
            continue
        has_runs = True
        if len(run) > 3 or not run.isascii() or run.istitle():
            return True
    return has_runs and not _OPERATORS.search(shown)


def words(text: str) -> str:
    """A text in words as it is compared: without case, punctuation at its ends and LaTeX."""
    shown = literals.trimmed(literals.plain(text))
    return shown.strip(_EDGES + "!?()").casefold()


def _ratio(match: re.Match[str]) -> str:
    """``07:30 a.m.`` is ``7:30am``."""
    numbers = map(int, match[1].split(":"))
    half = match[2] or ""
    for sign in (".", " "):
        half = half.replace(sign, "")
    return ":".join(map(str, numbers)) + half.lower()


# --- Responses


def after_thoughts(response: str, prompt: str = "") -> str:
    """The response behind its thoughts: what a model writes between ``<think>`` and ``</think>`` is
    no answer, and neither are thoughts that do not end.
    """
    _, end, after = response.rpartition("</think>")
    if end:
        return after_thoughts(after) if "<think>" in after else after
    if prompt.rstrip().endswith("<think>"):
        return ""
    return response.partition("<think>")[0]


def find(text: str, kind: Kind, place: Place) -> Found | None:
    r"""The answer of a response without its thoughts: in the last ``\boxed{}``, else in the last
    ``<answer>`` tags, else in the last line with ``####`` that holds an answer, else the last
    expression (of words the last line). Another ``place`` than auto is the only one where it is
    looked for. None: there is none.
    """
    places = ("boxed", "tags", "hashes") if place == "auto" else (place,)
    for one in places:
        if one == "last":
            continue
        for found in _all_marked(text, one):
            if one == "hashes" and not _holds(found, kind):
                continue  # a heading of Markdown
            return Found(found, is_marked=True)
    if place not in ("auto", "last"):
        return None
    end = text[-MOST_SEARCHED:]
    last = _last_line(end) if kind in ("choice", "words", "ratio") else last_expression(end, kind)
    return Found(last, is_marked=False) if last else None


def _all_marked(text: str, place: str) -> Iterator[str]:
    """The marked texts, the last one first."""
    if place == "hashes":
        for line in reversed(text.splitlines()):
            if "####" in line:
                yield line.rpartition("####")[2].strip()
        return
    found = _marked(text, place)
    if found is not None:
        yield found


def _marked(text: str, place: str) -> str | None:
    """The last text that is marked so."""
    if place == "hashes":
        _, mark, after = text.rpartition("####")
        return after.strip() if mark else None
    if place == "tags":
        tagged = _TAGGED.findall(text)
        return tagged[-1].strip() if tagged else None
    return _last_box(text)


def _last_box(text: str) -> str | None:
    r"""What is in the last ``\boxed{...}``, with braces inside it; None if it does not end."""
    opened: list[int | None] = []  # where the content of a box begins; None: other braces
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match[0].startswith("\\") and len(match[0]) == 2:
            continue
        if match[0] != "}":
            opened.append(match.end() if len(match[0]) > 1 else None)
        elif opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
    return text[last[0] : last[1]].strip() if last else None


def _holds(text: str, kind: Kind) -> bool:
    if kind == "choice":
        return choice_of(text) is not None
    if kind == "ratio":
        return _RATIO.search(text) is not None
    if kind == "words":
        return bool(text)
    return bool(last_expression(text, kind))


def last_expression(text: str, kind: Kind) -> str:
    """The last part of a running text that holds a digit, or for an expression a letter or command;
    of a number with the unit behind it. "": there is none.
    """
    shown = literals.plain(text)
    if kind == "number":
        shown = _EXCLAMATION.sub(".", shown)  # no factorial: "It is 5!"
        shown = _UNIT_AT_DIGIT.sub(" ", shown)
    holds = _DIGIT if kind == "number" else _SYMBOL
    for start, end in reversed(_parts(shown)):
        if holds.search(shown, start, end):
            part = _without_edges(_without_edges(shown[start:end]).removeprefix("- "))
            return _without_stray_brackets(part) + _unit_behind(shown[end:])
    return ""


def _parts(shown: str) -> list[tuple[int, int]]:
    """The places between words and between sentences."""
    parts = []
    start = 0
    for match in _BREAK.finditer(shown):
        is_word = match["word"] and match["word"].casefold() not in _NO_BREAKS
        if is_word or match["stop"]:
            parts.append((start, match.start()))
            start = match.end()
    return [*parts, (start, len(shown))]


def _unit_behind(text: str) -> str:
    """`` cm`` if the words that follow a number begin with a unit that is known."""
    match = re.match(r"\s*((?:square|sq\.?|cubic)\s+)?([A-Za-z]+)(\^\{?[23]\}?)?", text)
    if match is None:
        return ""
    unit = literals.number(f"1 {match[0].strip()}")
    is_known = unit and (unit.unit or unit.is_percent or unit.value > 1)
    return f" {match[0].strip()}" if is_known else ""


def _without_edges(text: str) -> str:
    """Without spaces and punctuation around it; ``.5`` keeps its point."""
    text = text.rstrip(_EDGES + "-/")
    text = text.lstrip(_EDGES_BUT_POINT)
    is_decimal = re.match(r"\.\d", text)
    return text if is_decimal else text.lstrip(_EDGES)


def _without_stray_brackets(text: str) -> str:
    """Without a bracket that a word before or behind it opened or closed."""
    opened = len(re.findall(r"[(\[]", text))
    closed = len(re.findall(r"[)\]]", text))
    if closed > opened and text[-1:] in (")", "]"):
        return _without_edges(text[:-1])
    if opened > closed and text[:1] in ("(", "["):
        return _without_edges(text[1:])
    if opened > closed and text[-1:] in ("(", "["):
        return _without_edges(text[:-1])
    return text


def _last_line(text: str) -> str:
    last = ""
    for line in text.splitlines():
        if line.strip(_EDGES):
            last = line.strip()
    return last


# --- The values of what was found


def number_of(found: Found) -> Number | None:
    """The number; of equations in a row what stands behind the last sign of equality."""
    text = found.text
    if found.is_marked:
        whole = literals.number(text)
        if whole is not None:
            return whole
        shown = literals.plain(text)
        parts = [shown[start:end] for start, end in _parts(shown)]
        if sum(bool(re.search(r"\d", part)) for part in parts) != 1:
            return None  # two numbers are no answer
        text = last_expression(text, "number")
    _, right = _split(literals.plain(text))
    return literals.number(right)


def _split(text: str) -> tuple[str, str]:
    """What stands before the last sign of equality, and what stands behind it."""
    last = None
    for match in _EQUALS.finditer(text):
        last = match
    if last is None:
        return "", text
    left = text[: last.start()]
    right = text[last.end() :]
    return left, right


def choice_of(text: str) -> str | None:
    """The letter of a choice; None if there is none, or if several are marked as the answer."""
    line = literals.trimmed(literals.plain(text))
    whole = _CHOICE.fullmatch(line)
    if whole:
        return whole[1]
    said = [match.end() for match in _SAID.finditer(line)]
    behind = line[said[-1] :].strip(_EDGES) if said else line
    begin = re.match(r"\(?([A-J])(?:[).:]|\s*$)", behind)
    bracketed = set(re.findall(r"\(([A-J])\)", behind))
    if len(bracketed) > 1 or _SEVERAL.search(behind):
        return None
    if begin:
        return begin[1]
    if bracketed:
        return bracketed.pop()
    letters = set(re.findall(r"(?<![A-Za-z'’])([B-H]|A(?!\s+[a-z]))(?![A-Za-z'’])", behind))
    return letters.pop() if len(letters) == 1 else None


def ratio_of(text: str) -> str | None:
    """The last ratio or time of a text, as it is compared."""
    shown = literals.plain(text)
    found = [*_RATIO.finditer(shown)]
    return _ratio(found[-1]) if found else None


def said_words(text: str) -> set[str]:
    """The words of a line, and what stands there behind ``answer is`` or ``answer:``."""
    line = text.replace("*", "")
    line = line.replace("`", "")
    found = {words(line)}
    said = [*_SAID.finditer(line)]
    if said:
        behind = line[said[-1].end() :]
        found.add(words(behind))
    return found


def same_brackets(expected: str, answer: str) -> bool:
    """Whether the brackets around two lists are the same: a point, an interval and a set with the
    same numbers are different. A set may be written without its braces, an interval as a relation.
    """
    if _RELATION.search(expected) or _RELATION.search(answer):
        return True
    return _brackets(expected) == _brackets(answer)


def _brackets(text: str) -> str:
    """``(]`` of a half-open interval; "" of what is no list in round or square brackets."""
    _, right = _split(text)
    shown = literals.trimmed(literals.plain(right))
    match = _LIST.fullmatch(shown)
    return match[1] + match[2] if match else ""


# --- Repetition


def compact(text: str) -> str:
    """A text without spaces and marks of LaTeX's look, to compare it with another one."""
    shown = _NO_LOOK.sub("", literals.plain(text))
    return shown.strip(".,;:*_`")


@functools.lru_cache(maxsize=1024)  # prompts are asked for again and again
def squeezed(text: str) -> str:
    """As ``compact``, without case and the sign of a question, to find it in another one."""
    folded = compact(text).casefold()
    return folded.strip(".,;:=?!*_`")


def repeats(response: str, found: Found | None, golds: Sequence[Value], prompt: str) -> bool:
    """Whether the response is the prompt, or at least half of it, or its answer an expression that
    stands there. What the gold itself says, a number, a letter or words repeat nothing.
    """
    question = squeezed(prompt)
    whole = squeezed(response)
    allowed = {squeezed(value.text) for value in golds}
    if whole in allowed or not question:
        return False
    is_half = 2 * len(whole) >= len(question)
    if whole and is_half and whole in question:
        return True
    if found is None or golds[0].kind not in ("number", "expression"):
        return False
    answer = squeezed(found.text)
    read = literals.number(found.text)
    is_number = read is not None and read.is_worked_out
    if is_number or len(answer) < 2 or answer in allowed:
        return False
    return answer in question
