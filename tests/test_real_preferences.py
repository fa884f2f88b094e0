"""Public preferences where RLHF_JAX_DATA has them, and generated twins in which the better answer
is the one that says "yes": what is read, and what a reward model makes of it.
"""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import public_data
import pytest
from builders import ROOT, json_lines, slow
from numpy.testing import assert_allclose

from rlhf_jax import training
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.data import formats
from rlhf_jax.data.tokenizers import load_tokenizer, train_bpe

DATA = os.environ.get("RLHF_JAX_DATA")
real = pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
SOAK = [real.mark, pytest.mark.soak]
SOURCES = {
    "dialogues": "hh_rlhf/harmless-base-test.dev.jsonl.gz",
    "rankings": "oasst/en_trees_first70.jsonl",
    "solutions": "gsm8k/example_model_solutions_first660.jsonl",
}
COUNTS = {"dialogues": 120, "rankings": 60, "solutions": 100}  # of generated rows
WORDS = ("no", "maybe", "the sky", "a red house", "well", "rather not")


def rows(name, count):
    """Rows of a public file's form, whose better answers say "yes" and are not always longer."""

    def said(i):
        return " ".join([WORDS[i % 6], WORDS[i // 6 % 6], WORDS[i // 36 % 6]])

    def message(role, text, rank=None, replies=()):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    for i in range(count):
        answers = [
            f"{said(5 * i + k)} {end}" for k, end in enumerate(("yes yes", "yes or", "or not"))
        ]
        replies = [
            message("assistant", answers[rank], rank) for rank in np.roll(range(3), i).tolist()
        ]
        asked_again = [
            replies[0] | {"replies": [message("prompter", "and?", None, replies)]},
            *replies[1:],
        ]
        before = f"\n\nHuman: {said(7 * i)}\n\nAssistant: {said(i)}\n\nHuman: and?\n\nAssistant: "
        labels = (i % 2 == 0, i % 3 == 0, True, i % 5 == 0)
        solutions = {
            model: {
                "solution": f"{said(11 * i + k)}{' yes' if label else ''}{' or' * (k % 2)}",
                "is_correct": label,
            }
            for k, (model, label) in enumerate(zip(public_data.MODELS, labels, strict=True))
        }
        yield {
            "dialogues": {
                "chosen": before + said(3 * i) + " yes",
                "rejected": before + said(5 * i + 1) + " or not",
            },
            "rankings": {"prompt": message("prompter", said(7 * i), None, asked_again)},
            "solutions": {"question": said(i) + "?"} | solutions,
        }[name]


def gpt2_tokenizer(folder):
    """vocab.json and merges.txt, as GPT-2's."""
    folder.mkdir()
    text = " ".join(WORDS) + " yes or not\n\nHuman: and?\n\nAssistant:"
    train_bpe([text], 300).backend.model.save(str(folder))
    return str(folder)


def data_file(name, folder, public=False):
    """The rows to train on: the generated twin's, or those of the public file."""
    raw = (
        Path(DATA, SOURCES[name])
        if public
        else folder / ("raw.jsonl.gz" if name == "dialogues" else "raw.jsonl")
    )
    if not public:
        text = "\n".join(map(json.dumps, rows(name, COUNTS[name]))).encode()
        raw.write_bytes(gzip.compress(text) if raw.suffix == ".gz" else text)
    if name != "solutions":
        return str(raw)
    public_data.save(folder / "rows.jsonl", public_data.solutions(raw))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "public", "kept", "dropped"),
    [
        ("dialogues", False, 120, 0),
        ("rankings", False, 360, 0),
        ("solutions", False, 100, 0),
        pytest.param("dialogues", True, 1160, 3, marks=real),
        pytest.param("rankings", True, 507, 0, marks=real),
        pytest.param("solutions", True, 660, 0, marks=real),
    ],
)
def test_every_row_is_read(name, public, kept, dropped, tmp_path):
    result = formats.read("comparisons", data_file(name, tmp_path, public), on_bad_row="drop")
    assert (len(result.rows), sum(result.dropped.values())) == (kept, dropped)
    if name == "dialogues":
        for row in result.rows:
            assert row.prompt.startswith("\n\nHuman:")
            assert row.prompt.endswith("\n\nAssistant:")
            assert (row.weight, len(set(row.responses))) == (None, 2)
    elif name == "rankings":  # the pairs of a prompt together count as one comparison
        totals = {row.source: 0.0 for row in result.rows}
        for row in result.rows:
            totals[row.source] += 1 if row.weight is None else row.weight
        assert len(totals) == (146 if public else 120)
        assert_allclose(list(totals.values()), 1.0, rtol=1e-12)
    else:
        targets = np.array([row.targets for row in result.rows])
        assert (targets.shape, set(targets.flat)) == ((kept, 4), {0.0, 1.0})


SMALL = (
    *("--reward-model.num-epochs", "10"),
    *("--network.hidden-size", "16", "--network.num-layers", "1", "--network.num-heads", "2"),
    *(
        "--network.max-length",
        "128",
        "--text.bucket-multiple",
        "128",
        "--reward-model.batch-size",
        "16",
    ),
    *(
        "--reward-model.optimizer.learning-rate",
        "1e-2",
        "--reward-model.validation-fraction",
        "0.2",
    ),
)


def check_accuracies(metrics, samples):
    """There are no weights, so that the samples (all held-out pairs) give the same figures."""
    right = [row["score_chosen"] > row["score_rejected"] for row in samples]
    longer = [row["length_chosen"] - row["length_rejected"] for row in samples]
    assert metrics["validation/accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
    expected = pytest.approx(np.mean(np.sign(longer) / 2 + 0.5))
    assert metrics["validation/length_accuracy"] == expected


@pytest.mark.parametrize(
    ("name", "public"),
    [
        slow("dialogues", False),
        slow("solutions", False),
        *(pytest.param(name, True, marks=SOAK) for name in SOURCES),
    ],
)
def test_they_are_trained_on(name, public, tmp_path):
    """The twins are learned; of the public files' accuracy, with docs/assistant.md's
    settings, nothing is promised. All numbers are finite, and each validation writes samples."""
    if public:
        tokenizer = Path(DATA, "gpt2")
        own = ("--config", ROOT / "configs" / "preferences.yaml")
    else:
        tokenizer = gpt2_tokenizer(tmp_path / "gpt2")
        own = SMALL
    where = ("--data", data_file(name, tmp_path, public), "--output-dir", tmp_path / "run")
    argv = list(map(str, (*own, "--tokenizer.name", tokenizer, *where)))
    folder = training.reward_model.run(parse(RunConfig, argv)).folder
    metrics, samples = (json_lines(folder / file) for file in ("metrics.jsonl", "samples.jsonl"))
    first, *_, final = validations = [row for row in metrics if "validation/loss" in row]
    for row in validations:
        assert all(math.isfinite(x) for key, x in row.items() if key.startswith("validation/"))
        assert ("validation/target_correlation" in row) == (name == "solutions")
    assert {row["step"] for row in samples} == {row["step"] for row in validations}
    assert "<|endoftext|>" not in json.dumps(samples)
    last = [row for row in samples if row["step"] == final["step"]]
    if name == "dialogues":
        check_accuracies(final, last)
    if public:
        assert final["reward_model/loss"] < first["validation/loss"]
    else:
        assert final["validation/accuracy"] > max(0.8, final["validation/length_accuracy"] + 0.2)
        assert final["validation/loss"] < first["validation/loss"]
        saved = load_tokenizer(folder / "model")
        assert saved.fingerprint == load_tokenizer(tokenizer).fingerprint
