r"""Where an answer stands in a text, and what it is.

A gold answer, the one of the data row, is read in the form in which its data set writes it: after
``####`` (GSM8K), in ``\boxed{}`` (MATH), in ``<answer>`` tags, in dollars, or bare. It is a number,
a choice, a ratio or time, words, or another expression. The answer of a response is looked for in
the light of the gold answer, by one rule (`find`).
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from rlhf_jax.graders import literals
from rlhf_jax.graders.literals import FUNCTION_NAMES, Number

Kind = Literal["number", "choice", "ratio", "words", "expression"]
Form = Literal["number", "expression"]
Place = Literal["auto", "boxed", "tags", "hashes", "last"]

MOST_WORDS = 100  # characters of an answer in words
MOST_SEARCHED = 4_000  # last characters of a response, where its last expression is looked for

_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_BRACES = re.compile(r"\\[{}\\]|(?P<box>\\(?:boxed|fbox)\s*\{)|[{}]")
_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?")
_LETTERED = re.compile(r"\(([A-J])\)\s*\S.*")
_SEVERAL = re.compile(r"\b[A-J]\b\s*(?:,|/|and|or)\s*\b[A-J]\b")
_RATIO = re.compile(r"(\d+(?:\s*:\s*\d+)+)\s*([ap]\.?\s?m\.?)?", re.IGNORECASE)
_RUN = re.compile(r"(?<![\\\w^{])[^\W\d_]{2,}(?:['’-][^\W\d_]+)*(?![\w^(])")
_OPERATORS = re.compile(r"[-+*/^=<>|\\\d(){}\[\]_]")
_LEFT_SIDE = re.compile(r"(.*)(?:(?<![<>!:])=(?!=)|\\(?:approx|equiv)(?![A-Za-z]))", re.DOTALL)
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
_UNIT_BEHIND = re.compile(r"\s*((?:square|sq\.?|cubic)\s+)?([A-Za-z]+)(\^\{?[23]\}?)?")
_RELATION = re.compile(r"[<>≤≥∈]|\\(?:leq?|geq?|in)(?![A-Za-z])")
_NO_LOOK = re.compile(r"\s|\$|\\[,;:()\[\]]")
_LIST = re.compile(r"([(\[]).*,.*([)\]])", re.DOTALL)
_SAID = re.compile(r".*\banswer(?:\s+is)?\s*[:=-]?\s*(?:is\b)?", re.IGNORECASE | re.DOTALL)
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


def gold(entry: Any) -> Gold:
    """The gold of a data row: a text, a JSON number, true or false, a list of allowed answers, or
    null if the row has none.
    """
    if entry is None or entry == "":
        return Gold(())
    entries = entry if isinstance(entry, list | tuple) else [entry]
    read = list(map(_gold, entries)) or [Gold((), fault="the list of answers is empty")]
    fault = next((one.fault for one in read if one.fault), "")
    values = () if fault else tuple(value for one in read for value in one.values)
    return Gold(values, read[0].mark, fault)


def _gold(entry: Any) -> Gold:
    if isinstance(entry, bool):
        return Gold((Value("words", str(entry).lower()),))
    if isinstance(entry, int | float):
        try:
            text = repr(entry)
        except ValueError:  # Python writes no integer of more than 4,300 digits
            return Gold((), fault="the answer has too many digits")
        number = literals.number(text)
        if number is None:
            return Gold((), fault=f"the answer {text:.40} is no number that can be compared")
        return Gold((Value("number", text, number),))
    if not isinstance(entry, str):
        return Gold((), fault=f"the answer is of type {type(entry).__name__}, not a text or number")
    text = entry.strip()
    mark = "in $...$" if re.fullmatch(r"\$.+\$", text, re.DOTALL) else "bare"
    for place, name in _MARKS.items():
        marked = _marked(entry, place)
        if marked:
            mark = name
            text = entry.rpartition("####")[2].strip() if place == "hashes" else marked[0]
            break
    value = value_of(text)
    if not value.text:
        return Gold((), mark, "the answer is empty")
    if value.kind == "words" and ("\n" in text or len(text) > MOST_WORDS):
        return Gold((), mark, "the answer is a whole text; mark its end by #### or \\boxed{}")
    return Gold((value,), mark)


_MARKS = {"hashes": "after ####", "boxed": "in \\boxed{}", "tags": "in <answer> tags"}


def value_of(text: str) -> Value:
    """What a text is that holds an answer and nothing else."""
    shown = literals.trimmed(literals.plain(text))
    left, right = _sides(shown)
    named = right if re.fullmatch(r"\s*[A-Za-z]\s*", left) else text  # x = 5
    number = literals.number(named)
    if number is not None:
        return Value("number", named.strip(), number)
    choice = _CHOICE.fullmatch(shown) or _LETTERED.fullmatch(shown)
    if choice:
        return Value("choice", choice[1])
    if _RATIO.fullmatch(shown):
        return Value("ratio", ratio_of(shown) or "")
    with_unit = _WITH_UNIT.fullmatch(text.strip())
    if with_unit:
        return value_of(with_unit[1])
    # ``silent`` is words, but ``sin x``, ``xy = 3`` and ``x and y`` are mathematics.
    runs = [run for run in _RUN.findall(shown) if run.casefold() not in FUNCTION_NAMES]
    are_words = any(len(run) > 3 or not run.isascii() or run.istitle() for run in runs)
    if are_words or (runs and not _OPERATORS.search(shown)):
        return Value("words", words(shown))
    return Value("expression", text.strip())


# --- Responses


def after_thoughts(response: str, prompt: str = "") -> str:
    """The response behind its thoughts: what a model writes between ``<think>`` and ``</think>`` is
    no answer, and neither are thoughts that do not end.
    """
    _, end, after = response.rpartition("</think>")
    if not end and prompt.rstrip().endswith("<think>"):
        return ""
    return after.partition("<think>")[0]


def find(text: str, kind: Kind, place: Place) -> Found | None:
    r"""The answer of a response without its thoughts: in the last ``\boxed{}``, else in the last
    ``<answer>`` tags, else in the last line with ``####`` that holds an answer, else the last
    expression (of words the last line). Another ``place`` than auto is the only one where it is
    looked for. None: there is none.
    """
    for one in ("boxed", "tags", "hashes") if place == "auto" else (place,):
        for marked in _marked(text, one):
            if one != "hashes" or _holds(marked, kind):  # else it is a heading of Markdown
                return Found(marked, is_marked=True)
    if place not in ("auto", "last"):
        return None
    end = text[-MOST_SEARCHED:]
    if kind in ("number", "expression"):
        last = last_expression(end, kind)
    else:
        last = next((line.strip() for line in end.splitlines()[::-1] if line.strip(_EDGES)), "")
    return Found(last, is_marked=False) if last else None


def _marked(text: str, place: str) -> list[str]:
    """The texts that are marked so, the last one first."""
    if place == "hashes":
        lines = [line.rpartition("####")[2].strip() for line in text.splitlines() if "####" in line]
        return lines[::-1]
    if place == "tags":
        return [tagged.strip() for tagged in _TAGGED.findall(text)[::-1]]
    if place == "last":
        return []
    begun: list[int | None] = []  # where the content of a box begins; None: other braces
    boxes = []
    for match in _BRACES.finditer(text):
        if match["box"] or match[0] == "{":
            begun.append(match.end() if match["box"] else None)
        elif match[0] == "}" and begun:
            start = begun.pop()
            if start is not None:
                boxes.append((start, match.start()))
    return [text[start:end].strip() for start, end in sorted(boxes, reverse=True)]


def _holds(text: str, kind: Kind) -> bool:
    if kind == "choice":
        return choice_of(text) is not None
    if kind == "ratio":
        return ratio_of(text) is not None
    return bool(text if kind == "words" else last_expression(text, kind))


def last_expression(text: str, kind: Kind) -> str:
    """The last part of a running text that holds a digit, or for an expression a letter or command;
    of a number with the unit behind it. "": there is none.
    """
    shown = literals.plain(text)
    if kind == "number":
        shown = re.sub(r"!(?=\s|$)", ".", shown)  # no factorial: "It is 5!"
        shown = re.sub(r"(?<=\d)(?=[^\W\d_]{2})", " ", shown)
    holds = re.compile(r"\d" if kind == "number" else r"[A-Za-z\d]")
    for start, end in reversed(_parts(shown)):
        if holds.search(shown, start, end):
            part = _without_edges(_without_edges(shown[start:end]).removeprefix("- "))
            # Without a bracket that a word before or behind it opened or closed.
            unclosed = len(re.findall(r"[(\[]", part)) - len(re.findall(r"[)\]]", part))
            if unclosed > 0 and part[:1] in ("(", "["):
                part = _without_edges(part[1:])
            elif unclosed and part[-1:] in (("(", "[") if unclosed > 0 else (")", "]")):
                part = _without_edges(part[:-1])
            unit = _UNIT_BEHIND.match(shown, end)
            known = literals.number(f"1 {unit[0].strip()}") if unit else None
            if unit and known and (known.unit or known.is_percent or known.value > 1):
                part += f" {unit[0].strip()}"
            return part
    return ""


def _parts(shown: str) -> list[tuple[int, int]]:
    """The places between words and between sentences."""
    parts = []
    start = 0
    for match in _BREAK.finditer(shown):
        is_word = match["word"] and match["word"].casefold() not in FUNCTION_NAMES - {"or", "and"}
        if is_word or match["stop"]:
            parts.append((start, match.start()))
            start = match.end()
    return [*parts, (start, len(shown))]


def _without_edges(text: str) -> str:
    """Without spaces and punctuation around it; ``.5`` keeps its point."""
    text = text.rstrip(_EDGES + "-/").lstrip(_EDGES_BUT_POINT)
    return text if re.match(r"\.\d", text) else text.lstrip(_EDGES)


def _sides(text: str) -> tuple[str, str]:
    """What stands before the last sign of equality, and what stands behind it."""
    left = _LEFT_SIDE.match(text)
    return (left[1], text[left.end() :]) if left else ("", text)


def vote(entry: Any, response: str, place: Place) -> str:
    """The answer of a response to a row with the answer ``entry``, as a majority counts it: equal
    numbers are one; "": there is none.
    """
    found = find(after_thoughts(response), gold(entry).values[0].kind, place)
    number = number_of(found) if found else None
    return str(number[:3]) if number else squeezed(found.text) if found else ""


# --- The values of what was found


def number_of(found: Found) -> Number | None:
    """The number; of equations in a row what stands behind the last sign of equality."""
    text = found.text
    if found.is_marked:
        whole = literals.number(text)
        if whole is not None:
            return whole
        shown = literals.plain(text)
        if sum(bool(re.search(r"\d", shown[start:end])) for start, end in _parts(shown)) != 1:
            return None  # two numbers are no answer
        text = last_expression(text, "number")
    return literals.number(_sides(literals.plain(text))[1])


def choice_of(text: str) -> str | None:
    """The letter of a choice; None if there is none, or if several are marked as the answer."""
    line = literals.trimmed(literals.plain(text))
    whole = _CHOICE.fullmatch(line)
    if whole:
        return whole[1]
    said = _SAID.match(line)
    behind = line[said.end() :].strip(_EDGES) if said else line
    begin = re.match(r"\(?([A-J])(?:[).:]|\s*$)", behind)
    bracketed = set(re.findall(r"\(([A-J])\)", behind))
    if len(bracketed) > 1 or _SEVERAL.search(behind):
        return None
    if begin:
        return begin[1]
    alone = re.findall(r"(?<![A-Za-z'’])([B-H]|A(?!\s+[a-z]))(?![A-Za-z'’])", behind)
    letters = bracketed or set(alone)
    return letters.pop() if len(letters) == 1 else None


def ratio_of(text: str) -> str | None:
    """The last ratio or time of a text, as it is compared: ``07:30 a.m.`` is ``7:30am``."""
    found = _RATIO.findall(literals.plain(text))
    if not found:
        return None
    numbers, half = found[-1]
    return (
        ":".join(str(int(part)) for part in numbers.split(":")) + re.sub("[. ]", "", half).lower()
    )


def words(text: str) -> str:
    """A text in words as it is compared: without case, punctuation at its ends and LaTeX."""
    shown = literals.trimmed(literals.plain(text))
    return shown.strip(_EDGES + "!?()").casefold()


def said_words(text: str) -> set[str]:
    """The words of a line, and what stands there behind ``answer is`` or ``answer:``."""
    line = re.sub("[*`]", "", text)
    said = _SAID.match(line)
    return {words(line), words(line[said.end() :] if said else line)}


def same_brackets(expected: str, answer: str) -> bool:
    """Whether the brackets around two lists are the same: a point, an interval and a set with the
    same numbers are different. A set may be written without its braces, an interval as a relation.
    """
    if _RELATION.search(expected) or _RELATION.search(answer):
        return True
    brackets = []
    for text in (expected, answer):
        shown = literals.trimmed(literals.plain(_sides(text)[1]))
        match = _LIST.fullmatch(shown)
        brackets.append(match and match.groups())
    return brackets[0] == brackets[1]


# --- Repetition


def compact(text: str) -> str:
    """A text without spaces and marks of LaTeX's look, to compare it with another one."""
    return _NO_LOOK.sub("", literals.plain(text)).strip(".,;:*_`")


@functools.lru_cache(maxsize=1024)  # prompts are asked for again and again
def squeezed(text: str) -> str:
    """As ``compact``, without case and the sign of a question, to find it in another one."""
    return compact(text).casefold().strip(".,;:=?!*_`")


def repeats(response: str, found: Found | None, golds: Sequence[Value], prompt: str) -> bool:
    """Whether the response is the prompt, or at least half of it, or its answer an expression that
    stands there. What the gold itself says, a number, a letter or words repeat nothing.
    """
    question = squeezed(prompt)
    whole = squeezed(response)
    allowed = {squeezed(value.text) for value in golds}
    if whole in allowed or not question:
        return False
    if whole in question and 2 * len(whole) >= len(question):
        return True
    if found is None or golds[0].kind not in ("number", "expression"):
        return False
    answer = squeezed(found.text)
    number = literals.number(found.text)
    is_number = number is not None and number.is_worked_out
    if is_number or len(answer) < 2 or answer in allowed:
        return False
    return answer in question
