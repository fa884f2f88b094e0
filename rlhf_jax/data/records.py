"""Records, each a value and its place, of JSON lists, JSON lines and plain text, with physical line numbers."""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf_jax.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")
Fault = Callable[[UserError], None]  # told of what is wrong in a row; reading goes on after it where that is possible


class Record(NamedTuple):
    """One JSON value and its place: ``FILE, line N`` or ``DATASET, row N``, both counted from 1."""

    value: Any
    source: str


def throw(error: UserError) -> None:
    """The `Fault` that stops at the first one."""
    raise error


def read_text(text: str, name: str) -> list[Record]:
    """A string per line; lines without a character but spaces are no rows."""
    lines = [(line.removesuffix("\r"), number) for number, line in enumerate(text.split("\n"), 1)]
    return [Record(line, f"{name}, line {number}") for line, number in lines if line.strip()]


def is_list(text: str) -> bool:
    """Whether JSON text is one list, rather than one value on each line."""
    return text.startswith("[", _skip_space(text, 0))


def read_lines(text: str, name: str, fault: Fault) -> list[Record]:
    """JSON lines; a line that is not JSON is told to ``fault``."""
    # Only \n ends a line: str.splitlines would also cut inside strings, at U+2028.
    lines = text.split("\n")
    filled = [number for number, line in enumerate(lines, 1) if line.strip()]
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        source = f"{name}, line {number}"
        try:
            records.append(Record(_decoder(source, fault).decode(line), source))
        except json.JSONDecodeError as error:
            if number == filled[0] and line.lstrip()[0] not in '{"':
                fault(UserError(f"{source}: expected a JSON list or JSON lines, found {line.strip()[:20]!r}"))
                continue
            cut = number == filled[-1] and number > 1 and _cut_off(line, error)
            hint = "; the file seems cut off" if cut else "; in JSON lines each row is one line" if number == 1 else ""
            fault(UserError(f"{source}: not valid JSON, {_syntax(error)}{hint}"))
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            fault(UserError(f"{source}: not valid JSON, {_limit(error)}"))
    return records


def read_list(text: str, name: str, fault: Fault) -> list[Record]:
    """The elements of a JSON list, decoded one by one to know on which line each starts.

    After wrong syntax nothing more can be read: it is told to ``fault``, and what came before is returned.
    """
    records: list[Record] = []
    line, counted, before = 1, 0, 0
    position = _skip_space(text, _skip_space(text, 0) + 1)
    while True:
        line, counted = line + text.count("\n", counted, position), position
        source = f"{name}, line {line}"
        if text[position : position + 1] == "]" and not records:
            break
        try:
            value, position = _decoder(source, fault).raw_decode(text, position)
        except json.JSONDecodeError as error:
            if _cut_off(text, error):
                fault(UserError(f"{source}: the file is cut off inside the row that starts here"))
            else:
                fault(UserError(f"{name}, line {error.lineno}: not valid JSON, {_syntax(error)}"))
            return records
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            fault(UserError(f"{source}: not valid JSON, {_limit(error)}"))
            return records
        # json.dump writes all rows on one line; rows must not share a name, which tells a ranking's pairs from others.
        records.append(Record(value, f"{source}, row {len(records) + 1}" if line == before else source))
        before = line
        position = _skip_space(text, position)
        after = text[position : position + 1]
        if after == "]":
            break
        if after != ",":
            line += text.count("\n", counted, position)
            found = f"expected ',' or ']' after a row, found {after!r}" if after else "the file is cut off: no ']'"
            fault(UserError(f"{name}, line {line}: {found}"))
            return records
        position = _skip_space(text, position + 1)
    end = _skip_space(text, position + 1)
    if end < len(text):
        fault(UserError(f"{name}, line {text.count(chr(10), 0, end) + 1}: text after the end of the JSON list"))
    return records


def _decoder(source: str, fault: Fault) -> json.JSONDecoder:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            fault(UserError(f"{source}: the key {twice!r} stands twice in one object"))
        return row

    return json.JSONDecoder(object_pairs_hook=unique)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _cut_off(text: str, error: json.JSONDecodeError) -> bool:
    at_end = error.pos >= len(text.rstrip())
    return at_end or (error.msg.startswith("Unterminated string") and '"' not in text[error.pos + 1 :])


def _limit(error: ValueError | RecursionError) -> str:
    """What Python's JSON refuses beside wrong syntax."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has thousands of digits"


def _syntax(error: json.JSONDecodeError) -> str:
    return f"{error.msg[0].lower()}{error.msg[1:]} at column {error.colno}"
