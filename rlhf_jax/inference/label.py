"""``rlhf-jax label``: people choose the better of two answers to a prompt, without knowing which
model wrote which answer; one of them in the terminal, or several on a page (`labelling.serve`).

OUT has rows of preferences that ``reward-model``, ``dpo`` and ``kto`` read. The judgements are kept
in OUT.session.sqlite, and OUT follows it. The same command continues after the last one.
"""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import metrics
from rlhf_jax.data.conversation import text_of
from rlhf_jax.errors import UserError, file_errors, logger, warn_once
from rlhf_jax.inference import asking
from rlhf_jax.inference.chat import Console
from rlhf_jax.inference.labelling import pairs, summary
from rlhf_jax.inference.labelling.settings import Config
from rlhf_jax.inference.labelling.store import Store, Task, file_of, is_new, rows
from rlhf_jax.runs import reading
from rlhf_jax.runs.writing import one_writer, refuse_links, write_atomically

WRITE_EVERY = 2.0  # seconds between two writings of OUT, or ten times as long as one takes

KEYS = {"a": "a", "b": "b", "t": "tie", "s": "skip", "u": "undo", "q": "quit"}
QUESTION = "a, b, t(ie), s(kip), u(ndo), q(uit)?"


@contextlib.contextmanager
def opened(
    config: Config, open_source: Callable[[], pairs.Source]
) -> Iterator[tuple[Store, pairs.Source]]:
    """The store of OUT, and the pairs that go into it. OUT is written at the start, every
    ``WRITE_EVERY`` seconds if the store has changed, and at the end.

    Raises:
        UserError: another process writes OUT, or it was begun with other settings; the store is
            damaged, or lacks judgements; a folder, file or row is wrong; OUT cannot be written.
    """
    out = Path(config.out)
    path = file_of(out)
    beside = session_file(out)
    refuse_links([path, beside, *(Path(f"{path}-{kind}") for kind in ("wal", "shm", "journal"))])
    with one_writer(out):
        source = open_source()
        if is_new(path) and (out.exists() or beside.exists()):
            raise UserError(
                f"{out}: exists already, and {path.name} is missing or empty: it was begun by "
                "another command or version, or its store was lost. Put the store back, or choose "
                "another --out"
            )
        with contextlib.closing(Store(path, config)) as store:
            begin(store, source, config)
            with _followed(store, out):
                yield store, source


@contextlib.contextmanager
def _followed(store: Store, out: Path) -> Iterator[None]:
    """OUT follows the store while the block is open. SIGTERM and SIGHUP end it as Ctrl-C does."""
    write(store, out)
    is_main = threading.current_thread() is threading.main_thread()
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if is_main and signal.getsignal(number) is not signal.SIG_IGN  # as of nohup
    }
    ended = threading.Event()

    def follow() -> None:
        written, pause = -1, WRITE_EVERY
        while not ended.wait(pause):
            since, now = time.monotonic(), store.num_changes()
            try:
                if now != written:
                    write(store, out)
                    written = now
            except UserError as error:  # a full disk: the store has what it confirmed
                warn_once(str(error))  # of each number of judgements
            pause = max(WRITE_EVERY, 10 * (time.monotonic() - since))

    writer = threading.Thread(target=follow, name="labels", daemon=True)
    writer.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ended.set()
        writer.join()
        write(store, out)


def begin(store: Store, source: pairs.Source, config: Config) -> None:
    """Checks that the store was begun with these settings and is whole, or begins it."""
    out = Path(config.out)
    now = source.settings | {"again": config.again, "per_pair": config.per_pair}
    now["annotators"] = config.people
    num_given = len(store.judgements())
    beside = session_file(out)
    if beside.exists():
        keys = ("shown", "judgements")
        written = reading.read_json(beside, dict[str, int | list[Any] | dict[str, Any]], keys)
        # Earlier versions listed the judgements.
        held = [x if isinstance(x, int) else len(x) for x in map(written.get, keys)]
        if [store.num_shown(), num_given] < held:
            raise UserError(
                f"{store.path}: lacks judgements that {beside.name} has. Put the whole store "
                "back, with its -wal file, or choose another --out"
            )
    before = store.settings()
    if before is not None:
        asking.check_unchanged(out, before, now | {"annotators": before["annotators"]})
        missing = [name for name in before["annotators"] if name not in config.people]
        if missing:
            raise UserError(f"{out}: --annotators lacks {', '.join(missing)}, who began to label")
        logger.info(f"{out}: {num_given} judgements so far; it continues")
    store.begin(now)


def session_file(out: Path) -> Path:
    """Says how much the store must hold: a store that lost judgements is not continued."""
    return out.with_name(f"{out.name}.session.json")


def write(store: Store, out: Path) -> None:
    """Writes OUT, the rows of what the store holds, and OUT.session.json, how much that is."""
    num_shown = store.num_shown()  # first: it grows when a judgement is taken back meanwhile
    judgements = store.judgements()
    session = {"shown": num_shown, "judgements": len(judgements)}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(judgements)]
    with file_errors(f"{out} ({len(judgements)} judgements are in {store.path.name})", "written"):
        write_atomically(session_file(out), json.dumps(session) + "\n")
        write_atomically(out, "".join(lines))


def conclude(store: Store, source: pairs.Source, folder: str | None, config: Config) -> str:
    """The summary of what is labelled, how much is left, and what OUT is for."""
    judgements = store.judgements()
    progress = store.progress("", source.num_pairs)
    lines = [
        summary.text(judgements),
        f"{progress.given} of {progress.needed} judgements that are needed; {store.num_useless()} "
        "pairs with equal or empty answers are not shown",
    ]
    if config.against is not None:
        choices = [given for given in judgements if given.choice in ("a", "b") and not given.again]
        wins: dict[int, list[bool]] = {}
        for given in choices:
            wins.setdefault(given.pair, []).append(given.verdict == 0)
        won = sum(map(sum, wins.values()))
        line = f"{folder} was preferred {won} times of {len(choices)}"
        if wins:
            low, high = metrics.share_interval(np.array([np.mean(own) for own in wins.values()]))
            line += f", which speaks for {low:.0%} to {high:.0%} (95%, over pairs)"
        lines.append(line)
    num_rows = len(list(rows(judgements)))
    return "\n".join([*lines, f"{config.out}: {num_rows} rows for reward-model, dpo and kto"])


def run(folder: str | None, config: Config, lines: Iterator[str], console: Console) -> str:
    """Asks until all pairs are judged, the lines end or a line is quit; returns a summary.

    Raises:
        UserError: as ``opened``; a line is no choice, unless it comes from a terminal.
    """
    [person] = config.people
    with opened(config, lambda: pairs.open_source(folder, config)) as (store, source):
        coming = source.batches(store.num_pairs())
        is_complete = False
        while True:
            task = store.next(person, is_complete=is_complete)
            if task is None and is_complete:
                break
            if task is None:
                added = next(coming, None)
                is_complete = added is None
                store.add(added or ())
                continue
            console.say(_shown(task, source.num_pairs))
            since = time.monotonic()
            choice = _choice(lines, console)
            if choice == "quit":
                break
            if choice != "undo":
                seconds = time.monotonic() - since
                store.judge(person, task.id, choice, seconds=seconds)
            elif (last := store.last(person)) is not None:
                store.undo(person, last)
            else:
                console.note("nothing to undo")
        return conclude(store, source, folder, config)


def _shown(task: Task, num_pairs: int) -> str:
    number = "once more" if task.again else f"{task.pair + 1} of {num_pairs}"
    prompt = task.prompt
    if isinstance(prompt, list):
        prompt = "\n".join(f"{message['role']}: {text_of(message)}" for message in prompt)
    first, second = task.answers
    return f"\n[{number}] {prompt}\n\na: {first}\n\nb: {second}\n\n{QUESTION}\n"


def _choice(lines: Iterator[str], console: Console) -> str:
    """The choice of the next line; quit at the end of the lines."""
    for line in lines:
        word = line.strip().lower()
        choice = KEYS.get(word[:1], "")
        if word and choice.startswith(word):
            return choice
        if not console.is_terminal:
            raise UserError(f"{line!r} is none of {QUESTION}")
        console.note(QUESTION)
    return "quit"
