"""What became of the rows of a run's data: counted by reason, and kept in manifest.json."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from recorded import grpo_run

from rlhf_jax.data import encoding, formats
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.data.rows import Row
from rlhf_jax.training.rl import job

EMPTY = "'response' is empty"


def rows(count):
    return [Row("p", ("r",), f"f, line {i}") for i in range(count)]


def test_rows_are_counted_by_reason():
    """Seven of both parts, with three that were not drawn: of these ten and the two empty ones,
    three are too long. A prompt that is read once is not lost.
    """
    trained = ReadResult(rows(5), {EMPTY: ["f"], "repeated prompt": ["f"] * 9}, not_drawn=3)
    validated = ReadResult(rows(2), {EMPTY: ["g"]})
    counts = {encoding.DROPPED: 2, encoding.CUT: 4, encoding.NO_ROOM: 1}
    dropped, cut = encoding.dropped_and_cut(counts)
    assert cut == {encoding.CUT: 4}
    found = formats.account([trained, validated], dropped, cut)
    no_room = "the prompt leaves no room for a response"
    expected = {"read": 12, "dropped": {"too long": 2, no_room: 1, EMPTY: 2}, "cut": cut}
    assert found == expected
    assert trained.places["repeated prompt"] == ["f"] * 9  # as they were


def test_rare_reasons_are_counted_together():
    places = {f"reason {i}": ["f"] * (30 - i) for i in range(22)}
    found = formats.account([ReadResult(rows(1), places)], {}, {})
    assert found["read"] == 1 + sum(range(9, 31))
    assert len(found["dropped"]) == 21
    assert found["dropped"]["reason 19"] == 11
    assert found["dropped"]["other reasons"] == 10 + 9


def test_prompts_that_the_filter_drops_are_unsafe():
    """Of six, one is too long and one cut; the filter has dropped two."""
    counts = {encoding.DROPPED: 1, encoding.PROMPT_CUT: 1}
    encoded = encoding.EncodedPrompts(None, None, rows(3), (), counts)
    none = replace(encoded, rows=rows(2), counts={})
    inputs = SimpleNamespace(prompts=encoded, to_validate=none)
    cut = {encoding.PROMPT_CUT: 1}
    dropped = {"unsafe": 2, "too long": 1}
    own = job._account([ReadResult(rows(6)), ReadResult(rows(2))], inputs)
    assert own == {"read": 8, "dropped": dropped, "cut": cut}
    alone = job._account([ReadResult(rows(6))], inputs)
    assert alone == {"read": 6, "dropped": dropped, "cut": cut}


@pytest.mark.parametrize("name", ["manifest.json", "checkpoints/start.json"])
def test_the_manifest_of_a_run_has_the_counts(name):
    """16 prompts to train on and 5 to validate on. The copy is what --resume restores."""
    content = json.loads((grpo_run().result.folder / name).read_text())
    if "files" in content:
        content = json.loads(content["files"]["manifest.json"])
    assert content["rows"] == {"read": 21, "dropped": {}, "cut": {}}
