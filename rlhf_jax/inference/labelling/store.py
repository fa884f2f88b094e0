"""The pairs and the judgements of ``rlhf-jax label`` in SQLite: one commit a judgement, in WAL,
synced to the disk. A kill at any moment loses no judgement that was confirmed. And the rows of
preferences that follow from them.

SQLite keeps no checksums: a flipped bit in a row would be another answer. So each row has one.
"""

import collections
import contextlib
import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import UserError, is_there
from rlhf_jax.inference.labelling.settings import Config

LEASE = 900.0
"""Seconds after which a pair that was shown and not judged may be shown to somebody else."""
# AUTOINCREMENT: the id of a judgement that was taken back is never given again.
_TABLES = """
CREATE TABLE settings (one INTEGER PRIMARY KEY CHECK (one = 1), content TEXT, checksum INTEGER);
CREATE TABLE pairs (
    number INTEGER PRIMARY KEY, prompt TEXT, answers TEXT, chosen_by TEXT, useless INTEGER,
    checksum INTEGER);
CREATE TABLE judgements (
    id INTEGER PRIMARY KEY AUTOINCREMENT, pair INTEGER, annotator TEXT, again INTEGER,
    first INTEGER, shown_at REAL, choice TEXT, seconds REAL, strength TEXT, reason TEXT,
    place INTEGER, checksum INTEGER, UNIQUE (annotator, pair, again));
CREATE INDEX judgements_by_pair ON judgements (pair);
"""
_CHECKED = {
    "settings": "one, content",
    "pairs": "number, prompt, answers, chosen_by, useless",
    "judgements": "id, pair, annotator, again, first, shown_at, choice, seconds, strength, reason, "
    "place",
}
for _table, _columns in _CHECKED.items():
    for _event in ("INSERT", f"UPDATE OF {_columns}"):
        _TABLES += f"""
CREATE TRIGGER {_table}_{_event[:6]} AFTER {_event} ON {_table} BEGIN
    UPDATE {_table} SET checksum = checksum({_columns}) WHERE rowid = NEW.rowid;
END;"""
# The first pair that somebody has not seen, and that not enough others have judged or look at.
_FREE = """
SELECT number FROM pairs WHERE NOT useless
AND NOT EXISTS (SELECT 1 FROM judgements WHERE pair = number AND annotator = :annotator)
AND (SELECT COUNT(*) FROM judgements WHERE pair = number AND NOT again
     AND (choice != 'skip' OR (choice IS NULL AND shown_at > :since))) < :per_pair
ORDER BY number LIMIT 1
"""
_GIVEN = "choice IN ('a', 'b', 'tie', 'bad')"
# The judgements that count, and those that there can be: who has skipped a pair does not judge it.
_PROGRESS = f"""
SELECT SUM(MIN(given, :per_pair)), SUM(MIN(MAX(given, :people - skipped), :per_pair)) FROM (
    SELECT number, IFNULL(SUM({_GIVEN}), 0) AS given, IFNULL(SUM(choice = 'skip'), 0) AS skipped
    FROM pairs LEFT JOIN judgements ON pair = number AND NOT again
    WHERE NOT useless GROUP BY number)
"""
_NUM_WAITING = """
SELECT COUNT(*) FROM pairs
WHERE NOT useless AND NOT EXISTS (SELECT 1 FROM judgements WHERE pair = number)
"""
_LAST = """
SELECT id FROM judgements WHERE annotator = ? AND choice IS NOT NULL ORDER BY place DESC LIMIT 1
"""
_JUDGE = """
UPDATE judgements SET choice = ?, strength = ?, reason = ?,
    seconds = ROUND(MAX(0, MIN(?, ? - shown_at)), 1),
    place = (SELECT IFNULL(MAX(place), 0) + 1 FROM judgements)
WHERE id = ? AND annotator = ? AND choice IS NULL
"""
_ADD = "INSERT INTO pairs (number, prompt, answers, chosen_by, useless)"
_JUDGEMENTS = """
SELECT pair, prompt, answers, first, choice, again, annotator, seconds, strength, reason, chosen_by
FROM judgements JOIN pairs ON pair = pairs.number WHERE choice IS NOT NULL ORDER BY place
"""


class Pair(NamedTuple):
    """Two answers to a prompt."""

    number: int
    prompt: Any  # text or messages
    answers: list[str]  # with --against: of RUN, and of the other run
    chosen_by: str = "random"

    @property
    def is_useless(self) -> bool:
        """Whether a choice teaches nothing: the answers are equal, or one is empty."""
        first, second = (text.strip() for text in self.answers)
        return self.answers[0] == self.answers[1] or not first or not second


class Task(NamedTuple):
    """A pair as it is shown to somebody."""

    id: int
    pair: int
    prompt: Any
    answers: list[str]  # in the order in which they are shown
    again: bool


class Judgement(NamedTuple):
    """What somebody said about a pair."""

    pair: int
    prompt: Any
    answers: list[str]
    order: list[int]  # in which the answers were shown
    choice: str  # a, b, tie, bad (both), or skip
    again: bool  # whether this annotator was asked for the second time
    annotator: str
    seconds: float | None = None  # that the pair was looked at
    strength: str | None = None  # of the preference: slight, clear or strong
    reason: str | None = None
    chosen_by: str = "random"  # how the pair was chosen: --choose

    @property
    def verdict(self) -> int | str:
        """The better answer's number, or tie, bad, skip."""
        place = {"a": 0, "b": 1}.get(self.choice)
        return self.choice if place is None else self.order[place]

    @property
    def is_given(self) -> bool:
        """Whether it compares the answers."""
        return self.choice != "skip"


class Progress(NamedTuple):
    """How far the labelling is."""

    own: int  # pairs that this annotator has judged, and skipped
    given: int  # judgements of all annotators; those that a pair did not need are left out
    needed: int  # judgements of all annotators at the end


class Store:
    """The file of pairs and judgements. One process has it open; its threads may share it.

    Raises:
        UserError: the file is no store, is damaged, or cannot be written (as on a full disk). A
            judgement that raised is not kept; those before it are.
    """

    def __init__(self, path: Path, config: Config):
        self.path = path
        self.config = config
        self._lock = threading.Lock()
        begins = is_new(path)
        if not begins:
            with _undamaged(path):
                pass
        with self._errors():
            self._db = sqlite3.connect(path, check_same_thread=False)
            self._db.create_function("checksum", -1, _checksum)
            os.chmod(path, 0o600)
            if begins:
                self._db.executescript(f"BEGIN; {_TABLES} COMMIT;")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        """Closes the file; WAL is written back into it."""
        self._db.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path}: cannot be used: {error}. Judgements that were confirmed are kept"
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of its changes, or none."""
        with self._errors(), self._lock, self._db:
            yield self._db

    def _value(self, query: str, *values: object) -> Any:
        with self._transaction() as db:
            found = db.execute(query, values).fetchone()
        return None if found is None else found[0]

    def settings(self) -> dict[str, Any] | None:
        """The settings that the store was begun with; None: it is new."""
        content = self._value("SELECT content FROM settings")
        return None if content is None else json.loads(content)

    def begin(self, settings: dict[str, Any]) -> None:
        """Keeps the settings of a new store, or the later annotators of an old one."""
        into = "INSERT OR REPLACE INTO settings (one, content) VALUES (1, ?)"
        with self._transaction() as db:
            db.execute(into, [json.dumps(settings)])

    def add(self, pairs: Iterable[Pair]) -> None:
        """Adds pairs, or none of them. Those whose answers are equal or empty are never shown."""
        rows = [
            (pair.number, *map(json.dumps, pair[1:3]), pair.chosen_by, pair.is_useless)
            for pair in pairs
        ]
        with self._transaction() as db:
            db.executemany(f"{_ADD} VALUES (?, ?, ?, ?, ?)", rows)

    def num_pairs(self) -> int:
        """The pairs that were added."""
        return int(self._value("SELECT COUNT(*) FROM pairs"))

    def num_useless(self) -> int:
        """Those of which a choice teaches nothing."""
        return int(self._value("SELECT COUNT(*) FROM pairs WHERE useless"))

    def num_waiting(self) -> int:
        """The pairs that nobody has been shown."""
        return int(self._value(_NUM_WAITING))

    def num_shown(self) -> int:
        """The pairs that were shown so far, also those whose judgements were taken back."""
        return self._value("SELECT seq FROM sqlite_sequence") or 0

    def num_changes(self) -> int:
        """Grows with each change of the file by this process."""
        return self._db.total_changes

    def last(self, annotator: str) -> int | None:
        """The number of the annotator's last judgement, which can be undone."""
        found: int | None = self._value(_LAST, annotator)
        return found

    def judgements(self) -> list[Judgement]:
        """All judgements in the order in which they were given."""
        with self._transaction() as db:
            found = db.execute(_JUDGEMENTS).fetchall()
        return _judgements(found)

    def next(self, annotator: str, *, is_complete: bool) -> Task | None:
        """The pair that the annotator is to judge; the same one until it is judged.

        Args:
            is_complete: whether no pairs will be added; only then pairs are asked again.
        """
        with self._transaction() as db:
            is_open = "annotator = ? AND choice IS NULL"
            query = f"SELECT id FROM judgements WHERE {is_open}"
            if db.execute(query, [annotator]).fetchone() is None:
                self._assign(db, annotator, is_complete)
            joined = f"judgements JOIN pairs ON pair = pairs.number WHERE {is_open}"
            columns = f"SELECT id, pair, prompt, answers, first, again FROM {joined}"
            found = db.execute(columns, [annotator]).fetchone()
        if found is None:
            return None
        number, pair, prompt, answers, first, again = found
        texts = json.loads(answers)
        shown = [texts[first], texts[1 - first]]
        return Task(number, pair, json.loads(prompt), shown, bool(again))

    def _assign(self, db: sqlite3.Connection, annotator: str, is_complete: bool) -> None:
        """Gives the annotator a pair, if there is one: a judgement without a choice."""
        config = self.config
        person = [config.seed, zlib.crc32(annotator.encode())]
        names = {"annotator": annotator, "per_pair": config.per_pair}
        free = db.execute(_FREE, names | {"since": time.time() - LEASE}).fetchone()
        if free is not None:
            first = np.random.default_rng([*person, free[0]]).integers(2)
            chosen = (free[0], annotator, False, int(first))
        elif is_complete:
            # A share of the judged pairs, drawn from the seed, in the other order.
            whose = f"SELECT pair, first FROM judgements WHERE annotator = ? AND {_GIVEN}"
            firsts = db.execute(f"{whose} AND NOT again ORDER BY pair", [annotator]).fetchall()
            asked = "SELECT pair FROM judgements WHERE annotator = ? AND again"
            done = {pair for (pair,) in db.execute(asked, [annotator])}
            count = round(config.again * len(firsts))
            if config.again and len(firsts) > 1:
                count = max(count, 1)
            drawn = np.random.default_rng(person).permutation(len(firsts))[:count]
            left = [firsts[i] for i in drawn if firsts[i][0] not in done]
            if not left:
                return
            chosen = (left[0][0], annotator, True, 1 - left[0][1])
        else:
            return
        into = "INSERT INTO judgements (pair, annotator, again, first, shown_at)"
        db.execute(f"{into} VALUES (?, ?, ?, ?, ?)", (*chosen, time.time()))

    def judge(
        self,
        annotator: str,
        number: int,
        choice: str,
        *,
        seconds: float,
        strength: str | None = None,
        reason: str | None = None,
    ) -> bool:
        """Keeps a judgement; False if this one was kept before, or is not the annotator's.

        Args:
            number: the task's.
            choice: a, b, tie, bad or skip, of the answers as they were shown.
            seconds: as the page measured them. They are at most those since the pair was shown.
        """
        said = (choice, strength, reason, seconds, time.time(), number, annotator)
        with self._transaction() as db:
            return db.execute(_JUDGE, said).rowcount == 1

    def record(
        self, annotator: str, prompt: Any, answers: Sequence[str], choice: str, seconds: float
    ) -> None:
        """Adds a pair that was shown elsewhere, in this order, and the judgement of it. Its answers
        differ, and none is empty.
        """
        with self._transaction() as db:
            [number] = db.execute("SELECT COUNT(*) FROM pairs").fetchone()
            pair = (number, json.dumps(prompt), json.dumps(answers), "random", False)
            db.execute(f"{_ADD} VALUES (?, ?, ?, ?, ?)", pair)
            into = "INSERT INTO judgements (pair, annotator, again, first, shown_at, choice"
            last = "(SELECT IFNULL(MAX(place), 0) + 1 FROM judgements)"
            given = (number, annotator, time.time() - seconds, choice, round(seconds, 1))
            db.execute(f"{into}, seconds, place) VALUES (?, ?, 0, 0, ?, ?, ?, {last})", given)

    def undo(self, annotator: str, number: int) -> bool:
        """Takes the annotator's last judgement back; its pair is the next one, under another
        number. False if the number is another's.
        """
        with self._transaction() as db:
            if db.execute(_LAST, [annotator]).fetchone() != (number,):
                return False
            unseen = "DELETE FROM judgements WHERE annotator = ? AND choice IS NULL"
            db.execute(unseen, [annotator])
            # In place of the old row, with a new number: what was sent for the old one is late.
            into = "INSERT OR REPLACE INTO judgements (pair, annotator, again, first, shown_at)"
            emptied = "SELECT pair, annotator, again, first, ? FROM judgements WHERE id = ?"
            db.execute(f"{into} {emptied}", (time.time(), number))
            return True

    def progress(self, annotator: str, num_pairs: int = 0) -> Progress:
        """How far the annotator and all of them are.

        Args:
            num_pairs: how many there will be; those that are not there yet count as useful.
        """
        own = "SELECT COUNT(*) FROM judgements WHERE annotator = ? AND choice IS NOT NULL"
        per_pair = self.config.per_pair
        sizes = {"per_pair": per_pair, "people": len(self.config.people)}
        with self._transaction() as db:
            num_own = db.execute(own, [annotator]).fetchone()[0]
            num_given, num_needed = db.execute(_PROGRESS, sizes).fetchone()
            num_there = db.execute("SELECT COUNT(*) FROM pairs").fetchone()[0]
        num_coming = max(num_pairs - num_there, 0)
        return Progress(num_own, num_given or 0, (num_needed or 0) + num_coming * per_pair)


def file_of(out: Path) -> Path:
    """The store of a file of preferences."""
    return out.with_name(f"{out.name}.session.sqlite")


def is_new(path: Path) -> bool:
    """Whether nothing was kept in a store's file yet."""
    return not is_there(path) or (path.is_file() and not path.stat().st_size)


def read(path: Path) -> list[Judgement]:
    """The judgements of a store, also while a page is open.

    Raises:
        UserError: the file is no store, or is damaged.
    """
    with _undamaged(path) as db:
        return _judgements(db.execute(_JUDGEMENTS))


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[sqlite3.Connection]:
    """A store, open to be read, after SQLite's structures and the rows' checksums were compared."""
    if not path.is_file():
        raise UserError(f"{path}: is no file")
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        db.create_function("checksum", -1, _checksum)
        with contextlib.closing(sqlite3.connect(":memory:")) as new:
            new.executescript(_TABLES)
            schema = "SELECT name, sql FROM sqlite_master ORDER BY name"
            if db.execute(schema).fetchall() != new.execute(schema).fetchall():
                raise sqlite3.DatabaseError("it has other tables than a store of this version")
        (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found.splitlines()[-1])
        for table, columns in _CHECKED.items():
            wrong = f"SELECT rowid FROM {table} WHERE checksum IS NOT checksum({columns})"
            if (row := db.execute(wrong).fetchone()) is not None:
                raise sqlite3.DatabaseError(f"row {row[0]} of {table} is not as it was written")
        yield db
    except (sqlite3.Error, UnicodeError) as error:
        raise UserError(
            f"{path}: cannot be read: {error}. It is damaged, or no store; nothing was written. "
            "Put a copy of it back, or choose another --out"
        ) from None
    finally:
        db.close()


def _checksum(*values: object) -> int:
    return zlib.crc32(repr(values).encode("utf-8", "surrogatepass"))


def _judgements(values: Iterable[tuple[Any, ...]]) -> list[Judgement]:
    found = []
    for pair, prompt, answers, first, choice, again, *others in values:
        shown = json.loads(prompt), json.loads(answers), [first, 1 - first]
        found.append(Judgement(pair, *shown, choice, bool(again), *others))
    return found


def rows(judgements: Iterable[Judgement]) -> Iterator[dict[str, Any]]:
    """A row for each pair that was judged, by its number; repeated judgements are left out.

    One judgement is {prompt, chosen, rejected}, or {prompt, responses, ranks} for a tie; several
    are {instruction, response1, response2, annotator1, ...} with a vote each. ``order`` is that of
    the shown answers: of [chosen, rejected] or of the responses.
    """
    by_pair = collections.defaultdict(list)
    for given in judgements:
        if given.is_given and not given.again:
            by_pair[given.pair].append(given)
    for pair in sorted(by_pair):
        of_pair = by_pair[pair]
        one, *others = of_pair
        notes: dict[str, list[Any]] = {
            name: [getattr(given, name) for given in of_pair]
            for name in ("annotator", "seconds", "order", "strength", "reason")
        }
        notes["both_bad"] = [given.choice == "bad" for given in of_pair]
        for name in ("strength", "reason", "both_bad"):
            if not any(notes[name]):
                del notes[name]
        row: dict[str, Any] = {"prompt": one.prompt}
        if others:
            texts = {"response1": one.answers[0], "response2": one.answers[1]}
            row = {"instruction": one.prompt, **texts}
            for number, given in enumerate(of_pair, 1):  # 1 or 2, or 0 for a tie
                vote = given.verdict
                row[f"annotator{number}"] = vote + 1 if isinstance(vote, int) else 0
            row["annotators"] = notes.pop("annotator")
        elif isinstance(one.verdict, int):
            row["chosen"] = one.answers[one.verdict]
            row["rejected"] = one.answers[1 - one.verdict]
            if one.verdict == 1:  # the row has the second answer first
                notes["order"] = [one.order[::-1]]
        else:
            row["responses"] = one.answers
            row["ranks"] = [0, 0]
        row |= notes if others else {name: values[0] for name, values in notes.items()}
        yield row | {"chosen_by": one.chosen_by}
