"""Labels of several people: statistics by hand, rows that stages read, which pairs, the store."""

import contextlib
import errno
import html
import json
import math
import os
import re
import signal
import sqlite3
import stat
import threading
import time

import numpy as np
import pytest
from builders import json_lines, write_run

from rlhf_jax import cli
from rlhf_jax.data import files, formats
from rlhf_jax.errors import UserError
from rlhf_jax.inference import label
from rlhf_jax.inference.labelling import markup, pairs, serve, store, summary
from rlhf_jax.inference.labelling.settings import Config
from rlhf_jax.inference.labelling.store import Judgement
from rlhf_jax.report import figures
from rlhf_jax.runs import reading


def config(tmp_path, **given):
    how = {"serve": True, "answers": "a.json", "annotators": ("ana,ben",), "again": 0.0}
    return Config(out=str(tmp_path / "prefs.jsonl"), **how | given)


def pair(number, first="yes", second="no", **given):
    return store.Pair(number, f"prompt {number}", [first, second], **given)


@pytest.fixture
def opened(tmp_path):
    """``open(num_pairs, **settings)``: a store with pairs."""
    stores = []

    def open_(num_pairs=3, **given):
        how = config(tmp_path, **given)
        opened = store.Store(store.file_of(tmp_path / "prefs.jsonl"), how)
        stores.append(opened)
        opened.add(pair(number) for number in range(opened.num_pairs(), num_pairs))
        return opened

    yield open_
    for opened in stores:
        opened.close()


def judge(opened, name, choice, **given):
    task = opened.next(name, is_complete=True)
    assert opened.judge(name, task.id, choice, seconds=0, **given)
    return task


def judged(number, choice, name, order=(0, 1), again=False, **given):
    texts = [f"long answer {number}", "short"]
    return Judgement(number, f"p{number}", texts, list(order), choice, again, name, **given)


def test_krippendorffs_alpha_of_his_own_example():
    """Krippendorff (2011), Computing Krippendorff's Alpha-Reliability: nominal data, any number of
    observers, missing values: alpha = 0.743.
    """
    observers = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3"]
    observers += [". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]
    columns = zip(*map(str.split, observers), strict=True)
    units = [[value for value in column if value != "."] for column in columns]
    assert summary.krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert summary.krippendorff_alpha([[0, 0], [1, 1]]) == 1
    # Both disagree: 2 labels 0 and 2 labels 1; observed 1, by chance 2 / 3.
    assert summary.krippendorff_alpha([[0, 1], [1, 0]]) == pytest.approx(-0.5)
    assert math.isnan(summary.krippendorff_alpha([[0, 0], [0], []]))


def test_cohens_kappa():
    """The table [[20, 5], [10, 15]]: 35 of 50 the same, 25 by chance; (35 - 25) / (50 - 25)."""
    both = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert summary.cohen_kappa(both) == pytest.approx(0.4)
    assert math.isnan(summary.cohen_kappa([(0, 0)]))
    assert math.isnan(summary.cohen_kappa([]))


def test_agreement_counts_all_pairs_of_labels():
    assert summary.agreement([[0, 0, 1], [1], [1, 1]]) == (2, 4)


def test_the_best_accuracy_lies_between_its_bounds():
    """People who are right with 0.8 agree with 0.8^2 + 0.2^2 = 0.68: the upper bound is theirs. If
    they all agree on 36% of the pairs and toss a coin on the others, they agree with 0.68 too, and
    the model is right with 0.36 + 0.64 / 2: the lower bound.
    """
    assert summary.best_accuracy(0.68) == pytest.approx((0.68, 0.8))
    assert summary.best_accuracy(1.0) == (1, 1)
    assert summary.best_accuracy(0.3) == (0.5, 0.5)
    rng = np.random.default_rng(0)
    right = rng.uniform(0.5, 1, 1000)
    low, high = summary.best_accuracy((right**2 + (1 - right) ** 2).mean())
    assert low < right.mean() < high


def test_pairs_that_many_judge_are_the_rows_of_the_best_accuracy():
    """Two pairs with twenty equal labels each are two rows, not 380 agreements."""
    given = [judged(pair, "a", f"p{i}") for pair in range(2) for i in range(20)]
    facts, _, _ = summary.summarize(given)
    assert facts["two annotators prefer the same answer"] == "380 of 380"
    assert facts["best accuracy of a reward model on such judgements"] == "0.50 to 1.00"


def test_a_summary_by_hand():
    given = [
        judged(0, "a", "ana", seconds=2.0),
        judged(1, "b", "ana", order=(1, 0), seconds=4.0),
        judged(2, "tie", "ana", seconds=9.0),
        judged(3, "skip", "ana", seconds=100.0),
        judged(0, "b", "ana", order=(1, 0), again=True, seconds=3.0),
        judged(1, "a", "ana", order=(0, 1), again=True, seconds=3.0),
        judged(0, "a", "ben", order=(1, 0), seconds=1.0),
        judged(1, "a", "ben", seconds=1.0),
        judged(2, "bad", "ben", seconds=1.0),
    ]
    facts, people, both = summary.summarize(given)
    ana, ben = ([*row.values()] for row in people)
    assert ana == ["ana", "3", "1", "1", "1 of 2", "2 of 2", "2 of 2", "3.0"]
    assert ben == ["ben", "3", "1", "0", "2 of 2", "1 of 2", "0 of 0", "1.0"]
    assert facts == {
        "judgements": "6 of 3 pairs",
        # Labels 0 1 | 0 0 | tie tie: 3 x 0, 1 x 1, 2 x tie; 1 - 5 * 2 / (36 - 14)
        "Krippendorff's alpha": f"{1 - 10 / 22:.2f}",
        # Pair 0: 0 and 1, pair 1: 0 and 0; ties are no choices.
        "two annotators prefer the same answer": "1 of 2",
        "an annotator prefers the same answer again": "2 of 2",
        # One pair of two: Wilson's interval is .0945 to .9055, whose best ones are .5 and .95.
        "best accuracy of a reward model on such judgements": "0.50 to 0.95",
    }
    # The same 2 of 3; by chance 2 * 1 + 1 * 1 of 9: (6 - 3) / (9 - 3)
    assert [*both[0].values()] == ["ana", "ben", "0.50", "2 of 3"]
    text = summary.text(given).splitlines()
    assert text[0] == "judgements: 6 of 3 pairs"
    assert "ben: judgements 3, ties, both bad 1, skipped 0, first shown chosen 2 of 2" in text[-2]
    assert text[-1] == "ana and ben: kappa 0.50, the same 2 of 3"


def test_rows_of_one_judgement_and_votes_of_several(tmp_path):
    given = [
        judged(1, "b", "ana", order=(0, 1), seconds=1.5, strength="clear"),
        judged(0, "tie", "ana", seconds=1.0),
        judged(2, "a", "ana", seconds=1.0),
        judged(2, "a", "ben", order=(1, 0), seconds=2.0),
        judged(2, "bad", "cy", seconds=3.0, reason="why"),
        judged(2, "a", "dan", seconds=4.0),
        judged(3, "skip", "ana"),
        judged(1, "a", "ana", order=(1, 0), again=True),
        judged(4, "bad", "ben"),
        judged(5, "b", "ben", order=(1, 0)),
    ]
    first, second, votes, bad, last = store.rows(given)
    # B was the first answer, and the row has it first too: what was shown first was rejected.
    assert (last["chosen"], last["order"]) == ("long answer 5", [1, 0])
    assert first == {
        "prompt": "p0",
        "responses": ["long answer 0", "short"],
        "ranks": [0, 0],
        "annotator": "ana",
        "seconds": 1.0,
        "order": [0, 1],
        "chosen_by": "random",
    }
    # B was chosen, which was the second answer and is now the first of the row.
    assert (second["chosen"], second["rejected"]) == ("short", "long answer 1")
    assert second["order"] == [1, 0]
    assert second["strength"] == "clear"
    assert [votes[f"annotator{i}"] for i in range(1, 5)] == [1, 2, 0, 1]
    assert votes["annotators"] == ["ana", "ben", "cy", "dan"]
    assert votes["order"][1] == [1, 0]
    assert votes["reason"] == [None, None, "why", None]
    assert bad["both_bad"] is True
    file = tmp_path / "prefs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (first, second, votes, bad)))
    read = formats.read("pairs", str(file))
    assert [row.responses for row in read.rows] == [
        ("short", "long answer 1"),
        ("long answer 2", "short"),
    ]
    assert read.dropped == {"all responses are ranked equal": 2}


def test_votes_on_messages_are_read(tmp_path):
    """The prompt of a conversation stays messages."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    given = [judged(0, "a", name)._replace(prompt=messages) for name in ("ana", "ben")]
    file = tmp_path / "prefs.jsonl"
    file.write_text(json.dumps(*store.rows(given)) + "\n")
    (row,) = formats.read("pairs", str(file)).rows
    assert list(row.messages) == messages
    assert row.responses == ("long answer 0", "short")
    assert "Be brief." in row.prompt


def test_nothing_of_a_text_is_a_tag():
    attack = '<script>alert(1)</script> & "x" `<b>` **<i>** [a](javascript:b)'
    assert markup.render(attack) == (
        "<p>&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;x&quot; <code>&lt;b&gt;</code> "
        "<strong>&lt;i&gt;</strong> [a](javascript:b)</p>"
    )
    code = "See:\n\n```python\nif a < b:\n\n    **x**\n```\nend"
    assert markup.render(code) == (
        '<p>See:</p><pre tabindex="0"><code>python\nif a &lt; b:\n\n    **x**</code></pre>'
        "<p>end</p>"
    )
    assert markup.render("a\r\nb\n\n```\n<x>") == (
        '<p>a<br>b</p><pre tabindex="0"><code>&lt;x&gt;</code></pre>'
    )
    assert markup.render("\x1b\u202e") == "<p>\u241b⟨U+202E⟩</p>"
    shown = markup.conversation([{"role": "<user>", "content": "<hi>"}])
    assert shown == '<div class="turn"><h3>&lt;user&gt;</h3><p>&lt;hi&gt;</p></div>'


@pytest.mark.parametrize(
    "text",
    [
        "```hidden",
        "a\n   ```not hidden",
        "```\nx\n```hidden",
        "```the answer\nis 4\n```",
        "``` 4\n```",
    ],
)
def test_nothing_of_an_answer_is_hidden(text):
    shown = html.unescape(re.sub(r"<[^>]*>", "", markup.render(text)))
    assert re.findall(r"\w", shown) == re.findall(r"\w", text)


def test_powers_are_not_bold():
    assert markup.render("x**2 + y**2, f(a)**2 * b**(-1), 2**3**2") == (
        "<p>x**2 + y**2, f(a)**2 * b**(-1), 2**3**2</p>"
    )
    assert markup.render("(**a b**): **c**") == (
        "<p>(<strong>a b</strong>): <strong>c</strong></p>"
    )


@pytest.mark.parametrize(
    "opening", ["**x ", "** x", "**x**", "**`x", "`x\n", "```x\n", "\n ", "***"]
)
def test_the_time_of_a_text_is_linear(opening):
    """Many openings of each kind, of which a quadratic pattern takes minutes."""
    start = time.process_time()
    markup.render(opening * 20_000 + "x")
    assert time.process_time() - start < 3


def test_each_pair_goes_to_as_many_as_asked(opened):
    kept = opened(4, annotators=("ana,ben,cy",), per_pair=2)
    prompts = {name: [] for name in ("ana", "ben", "cy")}
    for name in ("ana", "ben", "cy", "ana", "cy", "ben", "cy", "ana"):
        prompts[name].append(judge(kept, name, "a").prompt[-1])
    assert prompts == {"ana": [*"013"], "ben": [*"02"], "cy": [*"123"]}
    assert all(kept.next(name, is_complete=True) is None for name in prompts)
    assert kept.progress("ana") == (3, 8, 8)


def test_the_total_counts_what_can_still_be_judged(opened):
    kept = opened(3, annotators=("ana,ben",), per_pair=2)
    assert kept.progress("ana") == (0, 0, 6)
    assert kept.progress("ana", 5) == (0, 0, 10)  # two pairs are to come
    assert kept.progress("ana", 2) == (0, 0, 6)
    kept.add([store.Pair(3, "p", ["same", "same"])])
    assert kept.progress("ana", 5) == (0, 0, 8)  # one of the two was useless
    judge(kept, "ana", "skip")  # ben alone can judge it
    assert kept.progress("ana", 5) == (1, 0, 7)
    judge(kept, "ana", "a")
    judge(kept, "ana", "tie")
    assert kept.progress("ana") == (3, 2, 5)
    judge(kept, "ben", "bad")
    judge(kept, "ben", "skip")
    assert kept.progress("ben") == (2, 3, 4)
    judge(kept, "ben", "b")
    assert kept.progress("ben") == (3, 4, 4)


def test_more_judgements_than_a_pair_needs_do_not_stand_for_others(opened, monkeypatch):
    kept = opened(2, annotators=("ana,ben",))
    first = kept.next("ana", is_complete=True)
    monkeypatch.setattr(store, "LEASE", -1.0)  # ana's time is over, and ben gets the pair
    judge(kept, "ben", "a")
    assert kept.judge("ana", first.id, "a", seconds=0)
    assert kept.progress("ana") == (1, 1, 2)


def test_pairs_that_everybody_skipped_are_done(opened):
    kept = opened(1, annotators=("ana,ben",))
    judge(kept, "ana", "skip")
    assert kept.progress("ana") == (1, 0, 1)
    judge(kept, "ben", "skip")
    assert kept.progress("ben") == (1, 0, 0)


def test_a_file_says_how_its_pairs_were_chosen(tmp_path):
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": "p", "responses": ["a", "b"], "chosen_by": "close"}
    file.write_text(json.dumps(row) + "\n")
    source = pairs.open_source(None, config(tmp_path, answers=str(file)))
    assert next(source.batches(0))[0].chosen_by == "close"
    file.write_text(json.dumps(row | {"chosen_by": 3}) + "\n")
    with pytest.raises(UserError, match="'chosen_by' must be a string"):
        pairs.open_source(None, config(tmp_path, answers=str(file)))


def test_a_pair_stays_until_it_is_judged_and_is_lent_again(opened, monkeypatch):
    kept = opened(1)
    task = kept.next("ana", is_complete=True)
    assert kept.next("ana", is_complete=True) == task
    assert kept.next("ben", is_complete=True) is None
    monkeypatch.setattr(store, "LEASE", -1.0)
    assert kept.next("ben", is_complete=True).prompt == task.prompt
    assert kept.judge("ana", task.id, "b", seconds=0)  # nothing that somebody says is lost


def test_a_skipped_pair_goes_to_somebody_else(opened):
    kept = opened(1)
    judge(kept, "ana", "skip")
    assert kept.next("ana", is_complete=True) is None
    judge(kept, "ben", "a")
    assert [given.choice for given in kept.judgements()] == ["skip", "a"]


def test_the_order_is_drawn_for_each_annotator_from_the_seed(opened):
    kept = opened(24, per_pair=2)
    chosen = [judge(kept, name, "a").answers[0] for _ in range(24) for name in ("ana", "ben")]
    drawn = {"ana": [], "ben": []}
    for given in kept.judgements():
        drawn[given.annotator].append(given.order[0])
    assert all(6 <= sum(order) <= 18 for order in drawn.values())
    assert drawn["ana"] != drawn["ben"]
    for given, text in zip(kept.judgements(), chosen, strict=True):
        assert given.verdict == given.order[0]
        assert given.answers[given.verdict] == text  # what was shown first


def test_pairs_come_again_in_the_other_order_when_all_are_there(opened):
    kept = opened(4, again=0.5)
    firsts = {}
    for _ in range(4):
        task = judge(kept, "ana", "a")
        firsts[task.prompt] = task.answers
    assert kept.next("ana", is_complete=False) is None
    again = [judge(kept, "ana", "b") for _ in range(2)]
    assert all(task.again and task.answers == firsts[task.prompt][::-1] for task in again)
    assert kept.next("ana", is_complete=True) is None
    assert [given.again for given in kept.judgements()] == [False] * 4 + [True] * 2


def test_a_judgement_counts_once(opened):
    kept = opened(2)
    task = kept.next("ana", is_complete=True)
    assert not kept.judge("ben", task.id, "a", seconds=0)  # not hers
    assert kept.judge("ana", task.id, "a", seconds=1e6)
    assert not kept.judge("ana", task.id, "b", seconds=0)  # sent twice
    (given,) = kept.judgements()
    assert given.choice == "a"
    assert given.seconds < 60  # not longer than it was shown


def test_undo_takes_the_last_one_back(opened):
    kept = opened(3)
    first = judge(kept, "ana", "a")
    second = judge(kept, "ana", "b", strength="strong")
    judge(kept, "ben", "a")
    kept.next("ana", is_complete=True)
    assert not kept.undo("ana", first.id)  # only the last
    assert kept.last("ana") == second.id
    assert kept.undo("ana", second.id)
    assert not kept.undo("ana", second.id)  # pressed twice
    asked = kept.next("ana", is_complete=True)
    assert asked == second._replace(id=asked.id)
    assert [(given.annotator, given.choice) for given in kept.judgements()] == [
        ("ana", "a"),
        ("ben", "a"),
    ]
    assert kept.judge("ana", asked.id, "tie", seconds=0)
    assert kept.judgements()[-1].strength is None


def test_what_was_sent_before_an_undo_counts_no_more(opened):
    """A number is used once, also after it was taken back, again and again, or by somebody else."""
    kept = opened(1, annotators=("ana,ben",))
    used = []
    for _ in range(3):
        used.append(judge(kept, "ana", "a").id)
        assert kept.undo("ana", used[-1])
        for number in used:
            assert not kept.judge("ana", number, "b", seconds=0)
            assert not kept.undo("ana", number)
    used.append(kept.next("ana", is_complete=True).id)
    assert kept.judge("ana", used[-1], "skip", seconds=0)
    assert judge(kept, "ben", "a").id not in used
    assert len(set(used)) == 4


def test_equal_and_empty_answers_are_never_shown(opened):
    kept = opened(0)
    kept.add([pair(0, "x", "x"), pair(1, " ", "x"), pair(2)])
    assert kept.next("ana", is_complete=True).prompt == "prompt 2"
    assert kept.next("ben", is_complete=True) is None
    assert kept.num_waiting() == 0


def test_a_full_disk_loses_nothing(opened, tmp_path):
    kept = opened(2)
    judge(kept, "ana", "a")
    task = kept.next("ana", is_complete=True)
    pages = kept._db.execute("PRAGMA page_count").fetchone()[0]
    kept._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(UserError, match=r"sqlite: .* is full"):
        kept.judge("ana", task.id, "b", seconds=0, reason="x" * 100_000)
    assert [given.choice for given in store.read(kept.path)] == ["a"]
    assert kept.judge("ana", task.id, "b", seconds=0)  # as soon as there is room


@contextlib.contextmanager
def labelled(tmp_path):
    """The store of an OUT, into which judgements are recorded."""
    how = config(tmp_path)
    with label.opened(how, lambda: pairs.Source({}, 0, None)) as (kept, _):
        yield kept, tmp_path / "prefs.jsonl"


def record(kept, number, choice="a"):
    kept.record("ana", f"prompt {number}", ["yes", f"no {number}"], choice, 1.0)


def wait_until(holds):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_store_opens_again_however_much_it_holds(tmp_path, monkeypatch):
    """What grows with the judgements is read without a limit of its parts."""
    monkeypatch.setattr(reading, "_MAX_PARTS", 40)
    with labelled(tmp_path) as (kept, out):
        for number in range(50):
            record(kept, number)
    size = label.session_file(out).stat().st_size
    with labelled(tmp_path) as (kept, _):
        assert len(kept.judgements()) == 50
        record(kept, 50)
    assert label.session_file(out).stat().st_size == size


def full_disk(path, content):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_the_file_follows_the_store_and_a_full_disk(tmp_path, monkeypatch, caplog):
    """What is confirmed while the file cannot be written is in it, once, as soon as it can be."""
    monkeypatch.setattr(label, "WRITE_EVERY", 0.01)
    with labelled(tmp_path) as (kept, out):
        record(kept, 0)
        wait_until(lambda: len(json_lines(out)) == 1)
        with monkeypatch.context() as patch:
            patch.setattr(label, "write_atomically", full_disk)
            for number in (1, 2):
                record(kept, number)
                said = (
                    f"({number + 1} judgements are in {kept.path.name}): cannot be written: No sp"
                )
                wait_until(lambda said=said: said in caplog.text)
            time.sleep(0.2)  # it tries again, and says nothing
            assert caplog.text.count("No space left") == 2
            assert len(json_lines(out)) == 1
        wait_until(lambda: len(json_lines(out)) == 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_writes_the_file_as_ctrl_c_does(tmp_path, monkeypatch, number):
    """SIGHUP: of a terminal that was closed."""
    monkeypatch.setattr(label, "WRITE_EVERY", 100.0)

    def until_a_signal():
        with labelled(tmp_path) as (kept, _):
            record(kept, 0)
            signal.raise_signal(number)

    before = signal.signal(number, lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt):
            until_a_signal()
        assert len(json_lines(tmp_path / "prefs.jsonl")) == 1
        signal.raise_signal(number)  # as before
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        with labelled(tmp_path):
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


def test_a_file_is_written_once_for_what_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(label, "WRITE_EVERY", 0.001)
    with labelled(tmp_path) as (kept, _), monkeypatch.context() as patch:
        written = []
        patch.setattr(label, "write_atomically", lambda path, _: written.append(path.name))
        time.sleep(0.2)
        written.clear()
        record(kept, 0)
        time.sleep(0.2)
        assert written == ["prefs.jsonl.session.json", "prefs.jsonl"]


def test_a_session_file_that_lists_the_judgements_is_read(tmp_path):
    """As earlier versions wrote it."""
    with labelled(tmp_path) as (kept, out):
        record(kept, 0)
    for number, said in ((1, None), (2, "lacks judgements")):
        listed = {"settings": {}, "shown": 1, "judgements": [{"pair": 0}] * number}
        label.session_file(out).write_text(json.dumps(listed))
        expected = pytest.raises(UserError, match=said) if said else contextlib.nullcontext()
        with expected, labelled(tmp_path):
            pass


def test_a_store_that_lost_its_last_judgement_is_refused(tmp_path):
    """Also where no pair was shown after it."""
    with labelled(tmp_path) as (kept, out):
        record(kept, 0)
    with contextlib.closing(sqlite3.connect(store.file_of(out))) as db, db:
        db.create_function("checksum", -1, store._checksum)
        db.execute("UPDATE judgements SET choice = NULL")
    with pytest.raises(UserError, match="lacks judgements"), labelled(tmp_path):
        pass


def test_a_disk_that_stays_full_ends_with_an_error_and_nothing_is_lost(tmp_path, monkeypatch):
    def until_the_disk_is_full(patch):
        with labelled(tmp_path) as (kept, _):
            record(kept, 0)
            patch.setattr(label, "write_atomically", full_disk)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"session\.sqlite\): cannot be written: No sp") as caught,
    ):
        until_the_disk_is_full(patch)
    assert caught.value.__cause__.errno == errno.ENOSPC
    with labelled(tmp_path) as (_, out):
        assert [row["chosen"] for row in json_lines(out)] == ["yes"]


def test_a_slow_disk_is_written_less_often(tmp_path, monkeypatch):
    """At most a tenth of the time goes into writing the file, however long it is."""
    monkeypatch.setattr(label, "WRITE_EVERY", 0.001)
    times = []

    def slowly(path, content):
        times.append(time.monotonic())
        time.sleep(0.02)

    with labelled(tmp_path) as (kept, _):
        monkeypatch.setattr(label, "write_atomically", slowly)
        for number in range(2):
            record(kept, number)
            wait_until(lambda number=number: len(times) == 2 * number + 2)
        assert times[2] - times[1] > 0.3
        monkeypatch.undo()


def test_what_was_kept_is_there_without_a_close(opened):
    """As after kill -9: another connection sees what was confirmed."""
    kept = opened(2)
    judge(kept, "ana", "b")
    task = kept.next("ana", is_complete=True)
    later = opened(2)
    assert [given.choice for given in later.judgements()] == ["b"]
    assert later.next("ana", is_complete=True) == task
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600
    mode = (
        kept._db.execute("PRAGMA journal_mode").fetchone()
        + kept._db.execute("PRAGMA synchronous").fetchone()
    )
    assert mode == ("wal", 2)


def test_a_file_that_is_no_store_is_named(tmp_path):
    file = store.file_of(tmp_path / "prefs.jsonl")
    file.write_text("no database at all, but a text" * 50)
    for use in (lambda: store.Store(file, config(tmp_path)), lambda: store.read(file)):
        with pytest.raises(UserError, match=r"session.sqlite: cannot be read"):
            use()
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="other tables"):
        store.read(tmp_path / "other")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="is no file"):
            store.read(place)
        with pytest.raises(UserError, match="is no file"):
            store.Store(place, config(tmp_path))


def test_a_damaged_store_is_refused_and_stays(opened, tmp_path):
    """A flipped bit of an answer, a choice, a setting, an index or the schema; cut, and empty."""
    kept = opened(3)
    kept.begin({"annotators": ["ana"]})
    for choice in ("a", "bad", "tie"):
        judge(kept, "ana", choice, reason="because")
    kept.close()
    whole = kept.path.read_bytes()
    damaged = [whole[: len(whole) // 2], whole[:5000], whole[:4096] + bytes(len(whole) - 4096), b""]
    for text in (b"prompt 1", b'["yes", "no"]', b"tie", b"because", b"annotators", b"CREATE INDEX"):
        for found in re.finditer(re.escape(text), whole):
            place = found.start()
            damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert len(damaged) > 12
    for content in damaged:
        kept.path.write_bytes(content)
        with pytest.raises(UserError, match=r"session.sqlite: cannot be read.*nothing"):
            store.read(kept.path)
        if content:
            with pytest.raises(UserError, match=r"Put a copy of it back, or choose another --out"):
                store.Store(kept.path, config(tmp_path))
        assert kept.path.read_bytes() == content
    kept.path.write_bytes(whole)
    assert [given.choice for given in store.read(kept.path)] == ["a", "bad", "tie"]


def test_tokens_are_long_secret_and_stay(tmp_path):
    out = tmp_path / "prefs.jsonl"
    first = serve.tokens(out, ["ana", "ben"])
    assert len(set(first.values())) == 2
    assert min(map(len, first.values())) >= 43
    file = tmp_path / "prefs.jsonl.session.tokens.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    later = serve.tokens(out, ["ana", "ben", "cy"])
    assert first.items() <= later.items()
    assert len(later) == 3
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        serve.tokens(out, ["ana"])
    file.chmod(0o600)
    for text, said in (
        ('{"ana": "short"}', "ana: Expected `str` of length >= 32"),
        ("[" * 100_000, "JSON"),
        ("\xff", "JSON"),
        ("[]", "mapping"),
    ):
        file.write_text(text, "latin-1")
        with pytest.raises(UserError, match=rf"tokens\.json: .*{said}"):
            serve.tokens(out, ["ana"])
    for make, said in (
        (lambda: file.mkdir(0o700), "Is a directory"),
        (lambda: os.mkfifo(file, 0o600), "is no file$"),
        (lambda: file.symlink_to(tmp_path / "nowhere"), "cannot be followed"),
    ):
        file.rmdir() if file.is_dir() else file.unlink()
        make()
        with pytest.raises(UserError, match=said):
            serve.tokens(out, ["ana"])


def test_which_pairs_are_chosen():
    pool = [pair(number) for number in range(10)]
    # Two models; they disagree most about pairs 3 and 7, whose scores are closest too.
    margins = np.full((2, 10), 2.0)
    margins[:, 3] = [4, -4]
    margins[:, 7] = [1, -1]
    how = {"count": 2, "random_share": 0.0, "seed": 0}
    for choose in ("disagreement", "close"):
        kept = pairs.chosen_by_margins(pool, margins, choose, **how)
        assert {one.prompt for one in kept} == {"prompt 3", "prompt 7"}
        assert {one.number for one in kept} == {3, 7}
        assert {one.chosen_by for one in kept} == {choose}
    margins[:, 5] = [0.5, 0.5]  # close, and they agree
    kept = pairs.chosen_by_margins(pool, margins, "disagreement", **how)
    assert "prompt 5" not in {one.prompt for one in kept}
    how |= {"count": 6, "random_share": 0.5}
    kept = pairs.chosen_by_margins(pool, margins, "close", **how)
    assert sorted(one.chosen_by for one in kept) == ["close"] * 3 + ["random"] * 3
    assert len({one.prompt for one in kept}) == 6


SYSTEM = {"role": "system", "content": "s"}
ASKS = {"role": "user", "content": "q"}
PAIR = {"chosen": "c", "rejected": "d"}


def test_pairs_of_a_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"prompt": "p", "responses": ["a", "b"]}\n'
        + json.dumps({"prompt": [SYSTEM, ASKS], **PAIR})
    )
    source = pairs.open_source(None, config(tmp_path, answers=str(file)))
    assert source.num_pairs == 2
    first, second = (one for batch in source.batches(0) for one in batch)
    assert first == (0, "p", ["a", "b"], "random")
    assert second.answers == ["c", "d"]
    assert second.prompt == [SYSTEM, ASKS]
    assert source.settings["answers"] == files.read_source(str(file)).fingerprint
    assert [*source.batches(1)] == [[second]]
    with pytest.raises(UserError, match="leave run out"):
        pairs.open_source("run", config(tmp_path, answers=str(file)))
    with pytest.raises(UserError, match="demo: no such file"):
        pairs.open_source(None, config(tmp_path, answers="demo"))
    for row, said in (
        ({"prompt": "p", "responses": ["a"]}, "line 1: expected two texts"),
        ({"prompt": "p", "chosen": "a"}, "expected keys prompt, chosen, rejected"),
        ({"responses": ["a", "b"]}, "expected keys prompt"),
        ({"prompt": [SYSTEM], **PAIR}, "line 1: .*system's message al"),
        ({"prompt": [ASKS | {"weight": "x"}], **PAIR}, "line 1: 'weight' of a message must be"),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=said):
            pairs.open_source(None, config(tmp_path, answers=str(file)))


def test_a_server_that_ends_waits_for_no_batch_and_adds_nothing(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "_PATIENCE", 0.01)
    kept = opened(0)
    sampling = threading.Event()
    ended = threading.Event()

    def slow(number):
        sampling.set()
        ended.wait()
        return pair(number)

    source = pairs.Source({}, 1, lambda start: ([slow(number)] for number in range(start, 1)))
    feeder = serve.Feeder(source, kept, 32, ended.set)
    feeder.start()
    sampling.wait()
    feeder.stop()
    assert feeder.is_alive()
    ended.set()
    feeder.join()
    assert kept.num_pairs() == 0
    assert not feeder.is_complete


def test_pairs_wait_for_room_on_a_full_disk(opened, caplog):
    """The server goes on, and adds each of them once."""
    kept = opened(0)
    source = pairs.Source({}, 3, lambda start: ([pair(i, "x" * 50_000)] for i in range(start, 3)))
    kept._value(f"PRAGMA max_page_count = {kept._value('PRAGMA page_count')}")
    ended = threading.Event()
    feeder = serve.Feeder(source, kept, 32, ended.set)
    feeder.start()
    wait_until(lambda: "is full" in caplog.text)
    assert not ended.wait(0.1)
    kept._value("PRAGMA max_page_count = 1000000")
    feeder.join(10)
    assert feeder.is_complete
    assert kept.num_pairs() == 3


def test_pairs_are_sampled_ahead_and_not_further(opened, tmp_path):
    kept = opened(0)
    asked = []

    def sampled(number):
        asked.append(number)
        return pair(number)

    ended = threading.Event()
    source = pairs.Source({}, 10, lambda start: ([sampled(i)] for i in range(start, 10)))
    feeder = serve.Feeder(source, kept, 4, ended.set)
    feeder.start()
    while kept.num_waiting() < 4:
        pass
    judge(kept, "ana", "a")
    while len(asked) < 5:
        pass
    feeder.stop()
    assert asked == [0, 1, 2, 3, 4]
    assert not feeder.is_complete
    later = serve.Feeder(source, kept, 99, ended.set)
    later.run()
    assert asked == [*range(10)]
    assert later.is_complete
    assert not ended.is_set()
    broken = pairs.Source({}, 11, lambda start: (1 / 0 for _ in range(start, 11)))
    later = serve.Feeder(broken, kept, 99, ended.set)
    later.run()
    assert ended.is_set()
    assert isinstance(later.error, ZeroDivisionError)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"annotators": ()}, "--annotators must name people"),
        ({"annotators": ("ana", "ana")}, "each once"),
        ({"annotators": ("a/b",)}, "'a/b' is no name"),
        ({"per_pair": 3}, "--per-pair 3 needs as many --annotators, got 2"),
        ({"serve": False}, "several need --serve"),
        ({"serve": False, "annotators": (), "port": 1}, "--port needs --serve"),
        ({"prompts": ("p",)}, "not both"),
        ({"answers": None}, "give --prompts"),
        ({"choose": "disagreement", "reward": ("a",)}, "needs 2 reward models"),
        ({"reward": ("a",)}, "--reward needs --choose"),
        ({"random_share": 2.0}, "--random-share must be from 0 to 1"),
        ({"html": "x"}, "--html needs --summary"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        config(tmp_path, **given)


def test_the_summary_command_reads_the_store_and_writes_a_page(opened, tmp_path, capsys):
    kept = opened(2, per_pair=2)
    for name in ("ana", "ben"):
        for _ in range(2):
            judge(kept, name, "tie")
    page = tmp_path / "summary.html"
    cli.run(["label", "--summary", str(tmp_path / "prefs.jsonl"), "--html", str(page)])
    said = capsys.readouterr().out
    assert "judgements: 4 of 2 pairs" in said
    assert "Krippendorff's alpha: unknown" in said
    assert "ana and ben: kappa unknown, the same 2 of 2" in said
    assert "Krippendorff" in page.read_text("utf-8")
    with pytest.raises(UserError, match=r"no other.jsonl.session.sqlite"):
        cli.run(["label", "--summary", str(tmp_path / "other.jsonl")])


def test_a_report_ends_with_what_its_labels_say(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "element", lambda plot, salt: "<svg/>")
    kept = opened(2)
    for _ in range(2):
        judge(kept, "ana", "a")
    write_run(tmp_path / "run", metrics={"reward_model/loss": [0.7, 0.6]}, stage="reward_model")
    labels = str(tmp_path / "prefs.jsonl")
    cli.run(["report", str(tmp_path / "run"), "--labels", labels, labels])
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "4 of 4 pairs" in page  # two files, whose pairs are different ones
    assert "Annotators" in page
    cli.run(["report", str(tmp_path / "run")])
    assert "Annotators" not in (tmp_path / "run" / "report.html").read_text("utf-8")
