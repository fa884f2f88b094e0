"""Adapters of a reward model on a published base whose padding token is EOS, loaded by PEFT."""

import re

import chat_families
import numpy as np
import pytest
import transformers
from torch_models import torch_model

from rlhf_jax.config import LoRA, RewardModelStage, RunConfig
from rlhf_jax.data import encoding
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.training.supervised import reward_model

pytestmark = pytest.mark.parity


def test_the_plain_loading_fails_loudly_and_the_card_s_gives_the_score(tmp_path, write):
    import peft

    base = tmp_path / "base"
    chat_families.write(base, "smollm2")
    tokenizer = load_tokenizer(base)
    ids = {"pad_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    torch_model(
        "Llama", vocab_size=tokenizer.vocab_size, max_position_embeddings=128, **ids
    ).save_pretrained(base)
    rows = [{"prompt": "hi", "chosen": "hello", "rejected": f"no {i}"} for i in range(4)]
    settings = RewardModelStage(batch_size=4, validation_fraction=0.0, normalize_samples=0)
    config = RunConfig(
        model=str(base),
        data=(write(rows),),
        output_dir=str(tmp_path / "run"),
        lora=LoRA(rank=2),
        reward_model=settings,
    )
    done = reward_model.run(config)
    adapter = done.folder / "adapter"
    with pytest.raises((OSError, TypeError, ValueError)):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        peft.PeftModel.from_pretrained(plain, adapter)

    card = (adapter / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    scope = {}
    exec(code.replace('"adapter"', repr(str(adapter))), scope)
    loaded = scope["model"].eval()
    assert_scores(done.model_folder, adapter, loaded)


def assert_scores(model_folder, adapter, loaded):
    """Those of the merged folder."""
    import torch

    asked = [{"role": "user", "content": "hi"}]
    for text in ("hello", "no 1"):
        judge = LanguageModel.load(model_folder)
        expected = judge.score_texts([asked], [text])
        tokens = encoding.answered_ids(asked, text, judge.tokenizer, "", ends=True)
        with torch.no_grad():
            [[logit]] = loaded(input_ids=torch.tensor([tokens])).logits
        shift = judge.model.config.other_keys["reward_shift"]
        np.testing.assert_allclose(logit + shift, expected[0], atol=1e-4)
    theirs = transformers.AutoTokenizer.from_pretrained(adapter)
    turns = [*asked, {"role": "assistant", "content": "no 1"}]
    assert theirs.apply_chat_template(turns, return_dict=False)[: len(tokens)] == tokens
