"""Public preferences where RLHF_JAX_DATA has them, and generated twins in which the better answer is the one that says
"yes": what is read, and what a reward model makes of it.
"""

import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax import training
from rlhf_jax.config import Network, Optimizer, RewardModelStage, RunConfig, Text, Tokenizer
from rlhf_jax.data import formats
from rlhf_jax.data.tokenizers import load_tokenizer, train_bpe

pytestmark = pytest.mark.usefixtures("no_pages")

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("RLHF_JAX_DATA")
real = pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
NAMES = ("dialogues", "rankings", "solutions")
SOURCES = {
    "dialogues": "hh_rlhf/harmless-base-test.dev.jsonl.gz",
    "rankings": "oasst/en_trees_first70.jsonl",
    "solutions": "gsm8k/example_model_solutions_first660.jsonl",
}
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
WORDS = ("no", "maybe", "the sky", "a red house", "well", "rather not")


def conversion(name):
    """A function of the documentation's page."""
    page = (ROOT / "docs" / "real-preferences.md").read_text("utf-8")
    scope = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], scope)
    return scope[name]


def said(number, better):
    """Text number ``number``; of two lengths, so that length does not tell which answer is better."""
    words = [WORDS[number % 6], WORDS[number // 6 % 6], WORDS[number // 36 % 6]]
    return " ".join([*words, "yes"] if better else words)


def dialogues(path, count=120):
    turn = "\n\nHuman: {}\n\nAssistant: {}".format
    lines = []
    for i in range(count):
        before = turn(said(7 * i, False), said(i, False)) + "\n\nHuman: and?\n\nAssistant: "
        lines.append({"chosen": before + said(3 * i, True), "rejected": before + said(5 * i + 1, False) + " or not"})
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))


def trees(path, count=60):
    def message(role, text, rank=None, replies=()):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    def replies(i):
        order = [(1, 0, 2), (0, 2, 1), (2, 1, 0)][i % 3]
        ends = ("yes yes", "yes or", "or not")
        return [message("assistant", f"{said(5 * i + rank, False)} {ends[rank]}", rank) for rank in order]

    lines = []
    for i in range(count):
        ranked = replies(i)
        ranked[0]["replies"] = [message("prompter", "and?", None, replies(2 * i + 1))]
        lines.append({"prompt": message("prompter", said(7 * i, False), None, ranked)})
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def solved(path, count=100):
    lines = []
    for i in range(count):
        labels = [i % 2 == 0, i % 3 == 0, True, i % 5 == 0]
        answers = [said(11 * i + k, label) + (" or" if (i + k) % 2 else "") for k, label in enumerate(labels)]
        solutions = {
            model: {"solution": answer, "is_correct": label}
            for model, answer, label in zip(MODELS, answers, labels, strict=True)
        }
        lines.append({"question": said(i, False) + "?"} | solutions)
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def gpt2_tokenizer(folder):
    """vocab.json and merges.txt, as GPT-2's."""
    folder.mkdir()
    text = " ".join(WORDS) + " yes or not\n\nHuman: and?\n\nAssistant:"
    train_bpe([text], 300).backend.model.save(str(folder))
    return str(folder)


def data_file(name, folder, source=None):
    """The rows to train on: the generated twin's, or those of the public file."""
    if name == "dialogues":
        path = source or folder / "dialogues.jsonl.gz"
        if source is None:
            dialogues(path)
        return str(path)
    raw, path = source or folder / "raw.jsonl", folder / "rows.jsonl"
    if source is None:
        {"rankings": trees, "solutions": solved}[name](raw)
    rows = conversion(name)(raw)
    conversion("save")(path, rows)
    return str(path)


def figures(folder, name):
    """First and last validation of a run, all of whose numbers are finite, with a sample of each validation."""
    metrics, samples = (
        [json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]
        for file in ("metrics.jsonl", "samples.jsonl")
    )
    validations = [row for row in metrics if "validation/loss" in row]
    for row in validations:
        assert all(math.isfinite(value) for key, value in row.items() if key.startswith("validation/"))
        assert ("validation/target_correlation" in row) == (name == "solutions")
    assert {row["step"] for row in samples} == {row["step"] for row in validations}
    last = [row for row in samples if row["step"] == metrics[-1]["step"]]
    assert "<|endoftext|>" not in json.dumps(last)
    if name == "dialogues":  # no weights, so the samples (all held-out pairs) give the same figures
        right = [row["score_chosen"] > row["score_rejected"] for row in last]
        longer = [row["length_chosen"] - row["length_rejected"] for row in last]
        assert validations[-1]["validation/accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
        assert validations[-1]["validation/length_accuracy"] == pytest.approx(np.mean(np.sign(longer) / 2 + 0.5))
    return validations[0], validations[-1]


def twin_config(name, folder, tokenizer):
    return RunConfig(
        data=(data_file(name, folder),),
        output_dir=str(folder / "run"),
        network=Network(hidden_size=16, num_layers=1, num_heads=2, max_length=128),
        tokenizer=Tokenizer(name=tokenizer),
        text=Text(bucket_multiple=128),
        reward_model=RewardModelStage(
            num_epochs=10 if name == "solutions" else 4,
            batch_size=16,
            optimizer=Optimizer(learning_rate=1e-2),
            validation_fraction=0.2,
            validation_interval=1000,
        ),
    )


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
    source = Path(DATA, SOURCES[name]) if public else None
    result = formats.read("comparisons", data_file(name, tmp_path, source), on_bad_row="drop")
    assert (result.kept, sum(result.dropped.values())) == (kept, dropped)
    if name == "dialogues":
        for row in result.rows:
            assert row.prompt.startswith("\n\nHuman:")
            assert row.prompt.endswith("\n\nAssistant:")
            assert row.weight is None
            assert row.chosen != row.rejected
    elif name == "rankings":  # the pairs of a prompt together count as one comparison
        totals = {}
        for row in result.rows:
            totals[row.source] = totals.get(row.source, 0) + (1 if row.weight is None else row.weight)
        assert len(totals) == (146 if public else 120)
        np.testing.assert_allclose(list(totals.values()), 1.0, rtol=1e-12)
    else:
        targets = np.array([row.targets for row in result.rows])
        assert targets.shape == (kept, 4)
        assert set(targets.flat) == {0.0, 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_generated_twins_are_learned(name, tmp_path):
    config = twin_config(name, tmp_path, gpt2_tokenizer(tmp_path / "gpt2"))
    result = training.reward_model.run(config)
    first, last = figures(result.folder, name)
    assert first["step"] == 0
    assert last["validation/accuracy"] > 0.8, last
    assert last["validation/accuracy"] > last["validation/length_accuracy"] + 0.2
    assert last["validation/loss"] < first["validation/loss"]
    assert load_tokenizer(result.model_folder).fingerprint == load_tokenizer(tmp_path / "gpt2").fingerprint


def test_a_model_brings_its_own_tokenizer():
    with pytest.raises(ValueError, match=r"tokenizer\.name t: the model m brings its own tokenizer"):
        RunConfig(model="m", tokenizer=Tokenizer(name="t"))


@pytest.mark.soak
@real
@pytest.mark.parametrize("name", NAMES)
def test_public_preferences(name, tmp_path):
    """With docs/real-preferences.md's settings: nothing is promised of the accuracy."""
    flags = {
        "--config": ROOT / "configs" / "preferences.yaml",
        "--tokenizer.name": Path(DATA, "gpt2"),
        "--data": data_file(name, tmp_path, Path(DATA, SOURCES[name])),
        "--output-dir": tmp_path / "run",
    }
    command = [sys.executable, ROOT / "experiments" / "reward_model.py", *itertools.chain(*flags.items())]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, last = figures(tmp_path / "run", name)
    assert first["step"] == 0 < last["step"]
    assert last["reward_model/loss"] < first["validation/loss"]
