"""Each stage at the sizes that people use: the vocabulary and the widths of SmolLM2-135M (two of
its layers), 512 new tokens or texts of as many, adapters, shared prompts and microbatches; and the
same step in one part.
"""

import json

import forks
import jax
import numpy as np
import pytest
from builders import metric_rows
from numpy.testing import assert_allclose
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as vocabularies

from rlhf_jax import models

SIZES = {"hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536}
CONFIG = models.LlamaConfig(49152, 2048, num_layers=2, **SIZES, eos_token_id=0, pad_token_id=1)
STOP = ("777", "404")  # in one number of 170: answers end after one to 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a teacher and rows of each kind; words are numbers."""
    place = tmp_path_factory.mktemp("real")
    random = np.random.default_rng(0)
    vocabulary = {"<end>": 0, "<pad>": 1} | {str(n): n for n in range(2, CONFIG.vocab_size)}
    tokenizer = Tokenizer(vocabularies.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, seed in (("model", 0), ("teacher", 1)):
        model = models.build(CONFIG)
        models.save(place / name, model, jax.jit(model.init)(jax.random.key(seed)))
        tokenizer.save(str(place / name / "tokenizer.json"))
        special = {"eos_token": "<end>", "pad_token": "<pad>"}
        (place / name / "tokenizer_config.json").write_text(json.dumps(special))

    def words(least, most):
        size = int(random.integers(least, most))
        return " ".join(map(str, random.integers(2, CONFIG.vocab_size, size)))

    pairs = [
        {"prompt": words(20, 60), "chosen": words(9, 512), "rejected": words(9, 512)}
        for _ in range(16)
    ]
    texts = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs]
    labels = [row | {"desirable": i % 2 == 0} for i, row in enumerate(texts)]
    prompts = [{"prompt": row["prompt"]} for row in pairs]
    rows = {"pairs": pairs, "texts": texts, "labels": labels, "prompts": prompts}
    for name, of in rows.items():
        (place / f"{name}.json").write_text(json.dumps(of))
    return place


DATA = {"sft": "texts", "reward-model": "pairs", "dpo": "pairs", "kto": "labels"}
FLAGS = {
    "ppo": "--ppo.group-size 2 --compute.share-prompts true",
    "vpg": "",
    "rloo": "--rloo.group-size 2 --compute.share-prompts true",
    "grpo": "--grpo.group-size 2 --compute.share-prompts true",
    "distill": "--distill.group-size 2 --compute.share-prompts true --distill.teacher TEACHER",
    "sft": "--sft.validation-prompts 0",
    "reward-model": "--compute.share-prompts true",
    "dpo": "--dpo.validation-prompts 0 --compute.share-prompts true",
    "kto": "--kto.validation-prompts 0",
}


def rows_of_run(folder, place, stage, steps, microbatches):
    """The metrics of each step. In a process of its own, on one device and as a user's."""
    data = DATA.get(stage, "prompts")
    how = f"--model {folder}/model --data {folder}/{data}.json --output-dir {place} --lora.rank 4"
    how += f" --{stage}.num-microbatches {microbatches} {FLAGS[stage]}"
    section = stage if stage in DATA else "rl"
    how += f" --{section}.batch-size 4 --{section}.validation-fraction 0"
    how += f" --{section}.optimizer.learning-rate 1e-2"
    if stage in DATA:
        how += f" --{stage}.max-steps {steps}"
    else:
        how += f" --rl.num-iterations {steps} --rl.max-new-tokens 512 --rl.stop {' '.join(STOP)}"
        how += "" if stage == "distill" else " --reward length"
    words = how.replace("TEACHER", f"{folder}/teacher").split()
    optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = forks.run(["rlhf-jax", stage, *words], folder, **optimized)
    assert done.returncode == 0, done.stdout + done.stderr
    return [row for row in metric_rows(place) if row["step"]]


# The log-probs of a text of 512 such tokens add up to 5,000 nats, which float32 rounds by 5e-4.
TOLERANCE = {"dpo": 2e-5}


@pytest.mark.slow
@pytest.mark.parametrize("stage", FLAGS)
def test_two_steps_and_the_first_of_them_in_one_part(stage, folder, tmp_path):
    first, second = rows_of_run(folder, tmp_path / "parts", stage, 2, 2)
    (whole,) = rows_of_run(folder, tmp_path / "whole", stage, 1, 1)
    assert first["nonfinite"] == second["nonfinite"] == 0
    assert first["grad_norm"] > 0 < second["grad_norm"]
    if stage not in DATA:
        assert 50 < first["response/length"] < 400  # some parts are cut
    most = TOLERANCE.get(stage, 1e-6)
    assert_allclose(first["loss"], whole["loss"], rtol=most, atol=most)
    assert_allclose(first["grad_norm"], whole["grad_norm"], rtol=1e-4)
