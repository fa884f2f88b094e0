"""docs/assistant.md: its conversion of published files, and configs/assistant.yaml from them to the evaluation.

On made-up files in the published formats; by hand, with ``-m soak``, on the real ones.
"""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
from test_scripts import ROOT, rows, run
from test_sentiment import tiny_llama

from rlhf_jax.data import formats
from rlhf_jax.evaluation import evaluate

CONFIG = ROOT / "configs" / "assistant.yaml"
DATA = os.environ.get("RLHF_JAX_DATA")


def write(source, folder):
    """The function of the page."""
    page = (ROOT / "docs" / "assistant.md").read_text("utf-8")
    scope = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], scope)
    scope["write"](source, folder)


def published(folder, count):
    """Made-up files under the published names; ``count`` dialogues, each with a second one on the same question."""

    def save(name, values):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(value) + "\n" for value in values)

    letters = [chr(ord("a") + i % 26) for i in range(count)]
    instances = [{"input": "", "output": "b"}, {"input": "c", "output": "d\n"}]
    save("self_instruct/seed_tasks.jsonl", [{"instruction": f"{a} a", "instances": instances} for a in letters])
    save("gsm8k/train_first2000.jsonl", [{"question": f"{a} z", "answer": "e"} for a in letters])
    first = [f"\n\nHuman: {a} {i}\n\nAssistant:" for i, a in enumerate(letters)]
    second = [f"{frame} b\n\nHuman: c\n\nAssistant:" for frame in first]
    dialogues = [{"chosen": f"{frame} a", "rejected": f"{frame} b b"} for frame in first + second]
    dialogues += [{"chosen": f"{first[0]} a", "rejected": f"{first[0]} "}]  # an empty answer is no comparison
    save("hh_rlhf/harmless-base-test.dev.jsonl.gz", dialogues)
    answers = {"chosen": "a", "rejected": "b b"}
    save("hhh/hhh_alignment.dev.jsonl", [{"category": "helpful", "prompt": a, **answers} for a in letters[:8]])
    (folder / "xstest.csv").write_text("prompt,label\na b,safe\nc d,unsafe\n", "utf-8")


def test_the_published_files_become_the_pipelines(tmp_path):
    published(tmp_path / "published", 300)
    write(tmp_path / "published", tmp_path / "data")
    demonstrations = formats.read("demonstrations", str(tmp_path / "data" / "sft_data.json")).rows
    assert len(demonstrations) == 900
    assert [(row.prompt, row.response) for row in demonstrations[:2]] == [("a a", " b"), ("a a\nc", " d")]
    assert (demonstrations[600].prompt, demonstrations[600].response) == ("a z", " e")
    pairs = formats.read("pairs", str(tmp_path / "data" / "preference_data.json")).rows
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in (pairs[0], pairs[300])] == [
        ("a 0", " a", " b b"),
        ("a 0\n\nAssistant: b\n\nHuman: c", " a", " b b"),
    ]
    assert len(pairs) == 600
    train, heldout = (
        [row.prompt for row in formats.read("prompts", str(tmp_path / "data" / name)).rows]
        for name in ("prompts.json", "heldout_prompts.json")
    )
    assert (len(train), len(heldout), set(train) & set(heldout)) == (44, 256, set())


SMALL = (
    *("--text.bucket-multiple", 32, "--sft.num-epochs", 1, "--rl.num-iterations", 2, "--rl.batch-size", 16),
    *("--rl.max-prompt-length", 64, "--rl.max-new-tokens", 8, "--rl.validation-prompts", 8),
    *("--reward-model.num-epochs", 1, "--reward-model.normalize-samples", 16),
)


@pytest.mark.slow
def test_the_config_runs_from_published_files_to_the_evaluation(tmp_path):
    published(tmp_path, 300)
    write(tmp_path, tmp_path / "data")
    (tmp_path / "llama").mkdir()
    tiny_llama(tmp_path / "llama", length=128)
    run("stories260k", tmp_path / "llama", tmp_path / "stories")
    given = ("--model", tmp_path / "stories", "--data", tmp_path / "data", "--output-dir", tmp_path / "run", *SMALL)
    run("pipeline", "--config", CONFIG, *given)
    before, *_, after = rows(tmp_path / "run" / "sft")
    assert after["validation/loss"] < before["validation/loss"]
    assert rows(tmp_path / "run" / "reward_model")[-1]["validation/accuracy"] > 0.9  # all pairs have the same answers
    found = evaluate.run(
        tmp_path / "run" / "ppo",
        evaluate.Config(
            prompts=(str(tmp_path / "data" / "heldout_prompts.json"),),
            safety=(str(tmp_path / "xstest.csv"),),
            preferences=(str(tmp_path / "data" / "hhh.jsonl"),),
            reward_model=str(tmp_path / "run" / "reward_model"),
            against=str(tmp_path / "run" / "sft"),
        ),
    )
    assert found.value("preferences", "accuracy_reward_model") == 1.0
    assert 0 <= found.value("win rate", "win_rate") <= 1
    assert found.value("harmlessness", "over_refusal_of_safe") == 0


@pytest.mark.soak
@pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
def test_the_real_files(tmp_path):
    """As the page runs them: nothing is promised of the answers, but that the score rises at the KL asked for."""
    write(Path(DATA), tmp_path / "data")
    run("stories260k", Path(DATA, "stories260k"), tmp_path / "stories")
    given = ("--model", tmp_path / "stories", "--data", tmp_path / "data", "--output-dir", tmp_path / "run")
    run("pipeline", "--config", CONFIG, *given)
    first, *_, last = rows(tmp_path / "run" / "ppo")
    assert last["validation/score"] > first["validation/score"] + 0.5
    assert 4 < last["objective/kl"] < 9
