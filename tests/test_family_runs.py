"""A tiny run of each stage from a folder of a family whose layers are not Llama's: Pythia's, and a
mixture of experts.
"""

from dataclasses import replace

import numpy as np
import pytest
from builders import EXPERTS, initial_params, metric_rows

from rlhf_jax import grpo, models, training
from rlhf_jax.config import (
    DPOStage,
    LoRA,
    Optimizer,
    RewardModelStage,
    RLStage,
    RunConfig,
    SFTStage,
    Text,
    Tokenizer,
)
from rlhf_jax.data import demo
from rlhf_jax.data.tokenizers import train_bpe

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "initializer_range": 0.2}


def networks(vocab_size, **ids):
    """Small networks of the two families."""
    sizes = {"vocab_size": vocab_size, "max_length": 128, **SIZES, **ids, "intermediate_size": 24}
    return {
        "gpt_neox": models.GPTNeoXConfig(**sizes, rotary_fraction=0.5),
        "qwen3_moe": models.Qwen3MoeConfig(
            **sizes, **EXPERTS, num_kv_heads=1, head_dim=8, expert_size=8, dense_layers=(0,)
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3_moe"])
def test_each_stage_trains_and_its_model_loads(family, tmp_path):
    """SFT, a reward model from it, DPO, and GRPO with LoRA on that reward model, two steps each."""
    data = tmp_path / "data"
    sizes = {"sft_data.json": 32, "preference_data.json": 32, "prompts.json": 32}
    demo.write(data, sizes=sizes)
    texts = [path.read_text("utf-8") for path in sorted(data.glob("*.json"))]
    tokenizer = train_bpe(texts, 300)
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    model = models.build(networks(tokenizer.vocab_size, **ids)[family])
    params = initial_params(model)
    models.save(tmp_path / "base", model, params)
    tokenizer.save(tmp_path / "base")
    stage = {
        "batch_size": 8,
        "validation_fraction": 0.2,
        "validation_interval": 2,
        "optimizer": Optimizer(learning_rate=1e-2),
    }
    sampled = {"max_new_tokens": 4, "validation_interval": 2, "validation_prompts": 8}
    base = RunConfig(
        model=str(tmp_path / "base"),
        data=(str(data),),
        tokenizer=Tokenizer(),
        text=Text(bucket_multiple=128),
        sft=SFTStage(**stage),
        reward_model=RewardModelStage(**stage, normalize_samples=8),
        dpo=DPOStage(**stage),
        rl=RLStage(num_iterations=2, batch_size=8, optimizer=stage["optimizer"], **sampled),
        grpo=grpo.Config(group_size=4, num_epochs=1),
    )

    def run(stage, name, **changes):
        config = replace(base, output_dir=str(tmp_path / name), **changes)
        return stage(config)

    tuned = run(training.sft.run, "sft")
    rewarded = run(training.reward_model.run, "reward", model=str(tuned.folder))
    preferred = run(training.dpo.run, "dpo", model=str(tuned.folder))
    learned = run(
        lambda config: training.rl.run(config, grpo),
        "grpo",
        model=str(tuned.folder),
        reward=(str(rewarded.folder),),
        lora=LoRA(rank=2),
    )
    for result in (tuned, rewarded, preferred, learned):
        for row in metric_rows(result.folder):
            assert np.isfinite([value for value in row.values() if value is not None]).all()
        again, trained = models.load(result.model_folder)
        assert replace(again.config, other_keys={}) == model.config
        changed = trained["h_1"]["attn"]["o_proj"]["kernel"]
        assert np.abs(changed - params["h_1"]["attn"]["o_proj"]["kernel"]).max() > 1e-4
    assert models.lora.load(learned.folder / "adapter", trained)["h_1"]["attn"]
