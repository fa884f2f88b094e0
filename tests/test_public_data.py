"""The readers on public files in the folder RLHF_JAX_DATA, each beside a generated twin of the same shape."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import oasst
import pytest

from rlhf_jax.data import batches, encoding, readers
from rlhf_jax.data.tokenizers import train_bpe

DATA = os.environ.get("RLHF_JAX_DATA")
real = pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")


@pytest.fixture
def write(tmp_path):
    def save(content, name="data.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return save


def generated_trees(path):
    """Two of Open Assistant's trees in shape: replies ranked 1, 0, 2 and a follow-up with a tie-free pair."""

    def message(role, text, rank=None, replies=()):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    follow_up = message("prompter", "and?", 0, [message("assistant", "x", 0), message("assistant", "y", 1)])
    ranked = [message("assistant", text, rank) for text, rank in zip("abc", (1, 0, 2), strict=True)]
    ranked[0]["replies"] = [follow_up]
    trees = [
        message("prompter", "hello", None, ranked),
        message("prompter", "alone", None, [message("assistant", "z")]),
    ]
    path.write_text("\n".join(json.dumps({"prompt": tree}) for tree in trees), encoding="utf-8")
    return 2, 4  # ranked nodes, ordered pairs


@pytest.mark.parametrize("source", ["generated", pytest.param("real", marks=real)])
def test_ranked_replies(source, write, tmp_path):
    if source == "generated":
        path = tmp_path / "trees.jsonl"
        num_rankings, num_pairs = generated_trees(path)
    else:
        path = Path(DATA, "oasst", "en_trees_first70.jsonl")
        num_rankings, num_pairs = 146, 507
    ranked = oasst.rankings(path)
    assert len(ranked) == num_rankings
    result = readers.read_comparisons(write(ranked))
    assert (result.kept, result.dropped) == (num_pairs, {})
    # The pairs of a prompt together count as one comparison.
    totals = {}
    for row in result.rows:
        totals[row.source] = totals.get(row.source, 0) + (1 if row.weight is None else row.weight)
    assert len(totals) == num_rankings
    np.testing.assert_allclose(list(totals.values()), 1.0, rtol=1e-12)
    if source == "generated":
        data = encoding.encode_comparisons(result.rows, train_bpe(["hello"], 258))
        weight = batches.comparison_batch(data, np.array([0, -1, 3])).weight
        np.testing.assert_allclose(weight, [1 / 3, 0, 1], rtol=1e-6)


@pytest.mark.parametrize("source", ["generated", pytest.param("real", marks=real)])
def test_solutions_with_a_label_each(source, write):
    names = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    if source == "generated":
        labels = [[True, False, False, True], [False] * 4]
        lines = [
            {"question": "1 + 1?"}
            | {
                name: {"solution": f"{i}", "is_correct": label}
                for i, (name, label) in enumerate(zip(names, row, strict=True))
            }
            for row in labels
        ]
    else:
        text = Path(DATA, "gsm8k", "example_model_solutions_first660.jsonl").read_text("utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
    solved = [
        {
            "prompt": line["question"],
            "responses": [line[name]["solution"] for name in names],
            "targets": [float(line[name]["is_correct"]) for name in names],
        }
        for line in lines
    ]
    result = readers.read_comparisons(write(solved))
    assert (result.kept, result.dropped) == (len(lines), {})
    targets = np.array([row.targets for row in result.rows])
    assert targets.shape == (len(lines), 4)
    assert set(targets.flat) == {0.0, 1.0}
    if source == "generated":
        np.testing.assert_array_equal(targets, labels)


@pytest.mark.parametrize("source", ["generated", pytest.param("real", marks=real)])
def test_dialogues_of_hh_rlhf(source, write):
    if source == "generated":
        turn = "\n\nHuman: {}\n\nAssistant:{}".format
        lines = [
            {"chosen": turn("a", " b") + turn("c", " d"), "rejected": turn("a", " b") + turn("c", " e")},
            {"chosen": turn("a", " b"), "rejected": turn("a", "")},
        ]
        text = "\n".join(map(json.dumps, lines))
        path, kept, dropped = write(gzip.compress(text.encode()), "dialogues.jsonl.gz"), 1, 1
    else:
        path, kept, dropped = Path(DATA, "hh_rlhf", "harmless-base-test.dev.jsonl.gz"), 1160, 3
    result = readers.read_comparisons(path)
    assert (result.kept, sum(result.dropped.values())) == (kept, dropped)
    for row in result.rows:
        assert row.prompt.startswith("\n\nHuman:")
        assert row.prompt.endswith("\n\nAssistant:")
        assert row.weight is None
        assert row.chosen != row.rejected
