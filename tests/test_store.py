"""Many rows as ids: parts give what the whole gives, and the cache gives what was encoded."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.config import Text
from rlhf_jax.data import encoding, formats
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError, logger
from rlhf_jax.training.common import setup
from rlhf_jax.training.supervised import reading, store

TOKENIZER = characters("abcdefgh ")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache folder of the test; parts of three rows, and everything takes long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(store, "LONG", -1)
    return tmp_path / "cache" / "rlhf_jax" / "rows"


def assert_same(found, expected):
    for field in dataclasses.fields(encoding.EncodedTexts):
        ours, theirs = (getattr(encoded, field.name) for encoded in (found, expected))
        np.testing.assert_equal(ours, theirs, field.name)
        for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert getattr(leaf, "dtype", None) == getattr(other, "dtype", None)


def pairs(count):
    """Every third row is a ranking of three answers; the fifth is longer than the others."""
    rows = []
    for number in range(count):
        source = f"f, row {number}"
        letter = "abcdefgh"[number % 8]
        if number % 3 == 2:
            texts = [("a", "b"), ("b", "c"), ("a", "c")]
            rows += [Row(letter, both, source, weight=1 / 3) for both in texts]
        else:
            margin = float(number % 2)
            rows.append(Row(letter, ("a" * (1 + number % 5), "bb"), source, margin=margin))
    return rows


def choices(count):
    answers = [("a", "b"), ("a", "b", "c"), ("c", "b", "a", "d"), ("d", "c")]
    return [Row("h", answers[i % 4], f"f, row {i}", best=i % 2) for i in range(count)]


def scored(count):
    return [Row("h", ("a",), f"f, row {i}", targets=(float(i),)) for i in range(count)]


def marked(count):
    """Every second response has tokens that are not learned."""
    masks = ((True, False),), ()
    rows = [Row((2,), ((3, 4),), f"f, row {i}", learned=masks[i % 2]) for i in range(count)]
    return [*rows, Row((2,), ((3,), (3, 4, 5)), "g", learned=((True,), (False, True, True)))]


KINDS = [pairs(13), choices(11), scored(7), marked(6), pairs(3)]


@pytest.mark.parametrize("rows", KINDS, ids=len)
@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_parts_give_what_the_whole_gives(rows, too_long, monkeypatch):
    settings = {"max_length": 5, "too_long": too_long}
    found = encoding.encode_texts(rows, TOKENIZER, **settings)
    monkeypatch.setattr(encoding, "ROWS_AT_ONCE", 99)
    assert_same(found, encoding.encode_texts(rows, TOKENIZER, **settings))


def test_the_pairs_of_a_ranking_share_their_weight_across_parts():
    """The third pair is dropped: the others weigh 1/2."""
    texts = [("a", "b"), ("b", "c"), ("a" * 9, "c")]
    rows = [*scored(2), *(Row("h", both, "g", weight=1 / 3) for both in texts)]
    rows = [dataclasses.replace(row, targets=None) for row in rows]
    found = encoding.encode_texts(rows, TOKENIZER, max_length=5, too_long="drop")
    np.testing.assert_allclose(found.weight, [1, 1, 0.5, 0.5], rtol=1e-6)


def test_parts_of_which_nothing_is_left():
    """The first and the last parts are too long as a whole."""
    long = [Row("h" * 9, ("a",), f"f, row {i}") for i in range(4)]
    rows = [*long, *(Row("h", ("a",), f"f, row {i}") for i in range(4, 9)), *long]
    found = encoding.encode_texts(rows, TOKENIZER, max_length=5, too_long="drop")
    assert found.counts == {encoding.DROPPED: 8}
    assert found.sources == [f"f, row {i}" for i in range(4, 9)]
    with pytest.raises(UserError, match="none of 8 rows is left to encode"):
        encoding.encode_texts([*long, *long], TOKENIZER, max_length=5, too_long="drop")
    with pytest.raises(UserError, match="row 0: a prompt of 9"):
        encoding.encode_texts(rows, TOKENIZER, max_length=5)


@pytest.fixture
def encoded_with(monkeypatch):
    """What is encoded while the second argument is what may be encoded: nothing, or rows."""

    def encoded_with(rows, tokenizer=TOKENIZER, *, anew=True, **settings):
        calls = []

        def counted(*args, **options):
            calls.append(args)
            return encoding.encode_texts(*args, **options)

        monkeypatch.setattr(store, "encode_texts", counted)
        found = store.encode(rows, tokenizer, **settings)
        assert bool(calls) is anew
        return found

    return encoded_with


@pytest.mark.parametrize("rows", KINDS, ids=len)
def test_the_second_start_reads_the_ids_of_the_first(rows, encoded_with):
    expected = encoding.encode_texts(rows, TOKENIZER)
    assert_same(encoded_with(rows), expected)
    assert_same(encoded_with(rows, anew=False), expected)


def test_another_row_tokenizer_template_or_setting_is_encoded_anew(encoded_with):
    rows = pairs(8)
    encoded_with(rows)
    encoded_with([*rows[:-1], dataclasses.replace(rows[-1], margin=9.0)])
    encoded_with(rows, template="a{prompt}")
    encoded_with(rows, max_length=99)
    encoded_with(rows, characters("abcdefghi "))
    encoded_with(rows, dataclasses.replace(TOKENIZER, config={"chat_template": "{{ 1 }}"}))
    encoded_with(rows, dataclasses.replace(TOKENIZER, eos_id=3))


def flip(file, place):
    """Other bytes in a file: one bit of one of them."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_a_damaged_entry_is_encoded_anew(cache, encoded_with, monkeypatch, caplog):
    """Flipped bits at any place; a file that is cut, gone, a pipe or a link."""
    rows = pairs(8)
    expected = encoded_with(rows)
    [entry] = cache.iterdir()
    file = entry / store.FILE
    content = file.read_bytes()
    places = [0, 31, 32, 33, *range(40, len(content), len(content) // 16), -1]
    damages = [lambda place=place: flip(file, place) for place in places]
    for other in (b"", b"x", content[:31], content[:32], content[32:], content[:-1]):
        damages.append(lambda other=other: file.write_bytes(other))
    damages.append(file.unlink)
    damages.append(lambda: (file.unlink(), os.mkfifo(file)))
    damages.append(lambda: (file.unlink(), file.symlink_to("/dev/zero")))
    damages.append(lambda: (shutil.rmtree(entry), os.mkfifo(entry)))
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(store, "LONG", 1e9)  # what was kept is kept again, however fast it is
    for damage in damages:
        caplog.clear()
        damage()
        with caplog.at_level("INFO"):
            assert_same(encoded_with(rows), expected)
        assert f"{entry}: is damaged; the token ids are made anew" in caplog.text
        assert_same(encoded_with(rows, anew=False), expected)


@pytest.mark.parametrize("kind", ["no home", "no folder", "a link in a circle"])
def test_rows_are_encoded_and_programs_compiled_without_a_cache(
    tmp_path, encoded_with, monkeypatch, caplog, kind
):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if kind == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        place = {"no folder": "file/x", "a link in a circle": "circle"}[kind]
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    set_to = {}
    monkeypatch.setattr(setup.jax.config, "update", set_to.__setitem__)
    monkeypatch.setattr(logger, "propagate", True)
    setup._say_once.cache_clear()
    with caplog.at_level("INFO"):
        setup.enable_compilation_cache()
        for _ in range(2):
            encoded_with(pairs(8))
    assert "jax_compilation_cache_dir" not in set_to
    [line] = set(caplog.messages)
    assert line.startswith("no cache folder, so nothing is kept for later runs: ")


def test_the_cache_keeps_the_newest_entries(cache, encoded_with):
    for number in range(1, store.KEPT + 3):
        encoded_with(pairs(5 + number))
    assert len(list(cache.iterdir())) == store.KEPT
    encoded_with(pairs(5 + number), anew=False)


def test_few_rows_and_a_folder_that_cannot_be_written(cache, encoded_with, monkeypatch, caplog):
    monkeypatch.setattr(reading, "MANY", 2)
    for count in (2, 3):
        assert not cache.exists()
        found = reading.encode(Text(), scored(count), TOKENIZER, None, are_pieces=True)
        assert_same(found, encoding.encode_texts(scored(count), TOKENIZER))
    shutil.rmtree(cache.parent)
    cache.parent.mkdir(parents=True)
    cache.write_text("no folder")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("INFO"):
        encoded_with(pairs(8))
    assert "the token ids are not kept for the next run" in caplog.text


def test_progress_is_said(monkeypatch, caplog):
    monkeypatch.setattr(encoding, "_SAID_EVERY", -1)
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("INFO"):
        encoding.encode_texts(scored(7), TOKENIZER)
    assert "3 of 7 rows are token ids, after 0 s" in caplog.text
    assert "7 of 7 rows" in caplog.text


def test_rows_read_from_a_file_have_the_same_key_again(write):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": i} for i in range(3)]
    path = write(rows)
    keys = {store.key(formats.read("pairs", path).rows, TOKENIZER, {}) for _ in range(2)}
    assert len(keys) == 1
