"""Run folders for tests of what asks a model: random weights, large enough for texts to differ."""

import functools

import jax
import pytest
import yaml

from rlhf_jax import models, sampling
from rlhf_jax.data import tokenizers
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models import hf

NEW = 6
ALPHABET = "abcdefghijklmnopqrstuvwxyzUAS :\n"


def write(root, template="{prompt}:"):
    """The run of a policy and that of a reward model: root/policy and root/reward."""
    tokenizer = tokenizers.characters(ALPHABET)
    how = sampling.SamplingConfig(NEW, 0.7, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    for seed, (name, max_length) in enumerate({"policy": 90, "reward": 80}.items()):
        sizes = models.GPT2Config(tokenizer.vocab_size, max_length, 16, 1, 2, initializer_range=0.5)
        model = models.build(sizes)
        params = model.init(jax.random.key(seed))
        embedding = params["wte"]["embedding"]
        params["wte"]["embedding"] = embedding.at[tokenizer.eos_id].multiply(0.3)  # seldom said
        if name == "reward":
            params = models.add_head(jax.random.key(2), params, "score")
        folder = root / name / "model"
        LanguageModel(model, params, tokenizer).save(folder, template=template, config=how)
    settings = {
        "text": {"template": template},
        "rl": {"max_new_tokens": NEW, "temperature": 0.7, "top_k": 9, "top_p": None},
        "reward": ["reward"],  # from the folder of both
    }
    (root / "policy" / "config.yaml").write_text(yaml.safe_dump(settings))
    return root


_cached = functools.cache(models.build)


def _build(config):
    """Equal configs differ in the keys that change no logits, such as where a score stands."""
    return _cached(config)._replace(config=config)


@pytest.fixture(scope="module", autouse=True)
def build_once():
    """Models of one architecture are the same object: what an earlier test has compiled is not
    compiled again for another folder. Test files that name it use it in all their tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "build", _build)
        yield
