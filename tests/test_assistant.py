"""docs/assistant.md: the conversion of published files, and configs/assistant.yaml from them to the
evaluation.

On made-up files in the published formats; by hand, with ``-m soak``, on the real ones.
"""

import gzip
import json
import os
from pathlib import Path

import public_data
import pytest
from builders import ROOT, metric_rows, run_script

from rlhf_jax.data import formats

CONFIG = ROOT / "configs" / "assistant.yaml"
DATA = os.environ.get("RLHF_JAX_DATA")


def published(folder, count):
    """Made-up files under the published names; ``count`` dialogues, each with a second one on the
    same question.
    """

    def save(name, values):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(value) + "\n" for value in values)

    letters = [chr(ord("a") + i % 26) for i in range(count)]
    instances = [{"input": "", "output": "b"}, {"input": "c", "output": "d\n"}]
    save(
        "self_instruct/seed_tasks.jsonl",
        [{"instruction": f"{a} a", "instances": instances} for a in letters],
    )
    save("gsm8k/train_first2000.jsonl", [{"question": f"{a} z", "answer": "e"} for a in letters])
    first = [f"\n\nHuman: {a} {i}\n\nAssistant:" for i, a in enumerate(letters)]
    second = [f"{frame} b\n\nHuman: c\n\nAssistant:" for frame in first]
    dialogues = [{"chosen": f"{frame} a", "rejected": f"{frame} b b"} for frame in first + second]
    dialogues += [
        {"chosen": f"{first[0]} a", "rejected": f"{first[0]} "}
    ]  # an empty answer is no comparison
    save("hh_rlhf/harmless-base-test.dev.jsonl.gz", dialogues)
    answers = {"category": "helpful", "chosen": "a", "rejected": "b b"}
    save("hhh/hhh_alignment.dev.jsonl", [{"prompt": a} | answers for a in letters[:8]])


def test_the_published_files_become_the_pipelines(tmp_path):
    published(tmp_path / "published", 300)
    public_data.write(tmp_path / "published", tmp_path / "data")

    def read(kind, name):
        return [row.texts for row in formats.read(kind, str(tmp_path / "data" / name)).rows]

    demonstrations = read("demonstrations", "sft_data.json")
    pairs = read("pairs", "preference_data.json")
    assert [demonstrations[i] for i in (0, 1, 600)] == [
        ("a a", " b"),
        ("a a\nc", " d"),
        ("a z", " e"),
    ]
    assert pairs[0] == ("a 0", " a", " b b")
    assert pairs[300] == ("a 0\n\nAssistant: b\n\nHuman: c", " a", " b b")
    train, heldout = (
        set(read("prompts", name)) for name in ("prompts.json", "heldout_prompts.json")
    )
    assert len(demonstrations) == 900
    assert len(pairs) == 600
    assert len(train) == 44
    assert len(heldout) == 256
    assert train & heldout == set()


@pytest.mark.soak
@pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
def test_the_real_files(tmp_path):
    """As the page runs them: nothing is promised of the answers, but that the score rises at the KL
    asked for.
    """
    public_data.write(Path(DATA), tmp_path / "data")
    run_script("stories260k", Path(DATA, "stories260k"), tmp_path / "stories")
    given = (
        "--model",
        tmp_path / "stories",
        "--data",
        tmp_path / "data",
        "--output-dir",
        tmp_path / "run",
    )
    run_script("pipeline", "--config", CONFIG, *given)
    first, *_, last = metric_rows(tmp_path / "run" / "ppo")
    assert last["validation/score"] > first["validation/score"] + 0.5
    assert 4 < last["objective/kl"] < 9
