"""A tiny run of each stage from a folder of a family whose layers are not Llama's: Pythia's, and a
mixture of experts.
"""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from builders import EXPERTS, UNASKED, initial_params, metric_rows
from numpy.testing import assert_allclose

from rlhf_jax import grpo, models, training
from rlhf_jax.config import (
    DPOStage,
    LoRA,
    Mesh,
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


def base_folder(family, folder):
    """A model of the family with random weights and a tokenizer, and data beside it. Returns the
    model and its parameters.
    """
    sizes = {"sft_data.json": 32, "preference_data.json": 32, "prompts.json": 32}
    demo.write(folder / "data", sizes=sizes)
    texts = [path.read_text("utf-8") for path in sorted((folder / "data").glob("*.json"))]
    tokenizer = train_bpe(texts, 300)
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    model = models.build(networks(tokenizer.vocab_size, **ids)[family])
    params = initial_params(model)
    models.save(folder / "base", model, params)
    tokenizer.save(folder / "base")
    return model, params


def settings(folder):
    """A few steps of each stage."""
    optimizer = Optimizer(learning_rate=1e-2)
    stage = {
        "batch_size": 8,
        "validation_fraction": 0.2,
        "validation_interval": 2,
        "optimizer": optimizer,
    }
    sampled = {"max_new_tokens": 4, "validation_interval": 2, "validation_prompts": 8}
    return RunConfig(
        data=(str(folder / "data"),),
        tokenizer=Tokenizer(),
        text=Text(bucket_multiple=128),
        sft=SFTStage(**stage, **UNASKED),
        reward_model=RewardModelStage(**stage, normalize_samples=8),
        dpo=DPOStage(**stage, **UNASKED),
        rl=RLStage(num_iterations=2, batch_size=8, optimizer=optimizer, **sampled),
        grpo=grpo.Config(group_size=4, num_epochs=1),
    )


def run_grpo(config):
    return training.rl.run(config, grpo)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3_moe"])
def test_each_stage_trains_and_its_model_loads(family, tmp_path):
    """SFT, a reward model from it, DPO, and GRPO with LoRA on that reward model."""
    model, params = base_folder(family, tmp_path)
    base = settings(tmp_path)

    def run(stage, name, start, **changes):
        places = {"output_dir": str(tmp_path / name), "model": str(start)}
        return stage(replace(base, **places, **changes))

    tuned = run(training.sft.run, "sft", tmp_path / "base")
    rewarded = run(training.reward_model.run, "reward", tuned.folder)
    preferred = run(training.dpo.run, "dpo", tuned.folder)
    lora = LoRA(rank=2, base="int8" if family == "gpt_neox" else None)
    rl = replace(base.rl, expert_gap=family == "qwen3_moe")
    more = {"reward": (str(rewarded.folder),), "lora": lora, "rl": rl}
    learned = run(run_grpo, "grpo", tuned.folder, **more)
    for result in (tuned, rewarded, preferred, learned):
        for row in metric_rows(result.folder):
            assert np.isfinite([value for value in row.values() if value is not None]).all()
        again, trained = models.load(result.model_folder)
        assert replace(again.config, other_keys={}) == model.config
        changed = trained["h_1"]["attn"]["o_proj"]["kernel"]
        assert np.abs(changed - params["h_1"]["attn"]["o_proj"]["kernel"]).max() > 1e-4
    assert models.lora.load(learned.folder / "adapter", trained)["h_1"]["attn"]
    gaps = {row.get("policy/expert_gap") for row in metric_rows(learned.folder)}
    assert gaps == ({0.0, None} if rl.expert_gap else {None})


@pytest.mark.slow
def test_experts_train_on_a_mesh_of_2_2(tmp_path):
    """SFT with the loss that balances them is the same as with rows cut over 4 devices alone; GRPO
    trains adapters of experts beside a base of 4 bits, which its saved model holds.
    """
    base_folder("qwen3_moe", tmp_path)
    base = replace(settings(tmp_path), model=str(tmp_path / "base"))
    sft = replace(base.sft, max_steps=3, router_aux_coef=0.1, validation_fraction=0.0)
    rows = []
    for name, mesh in (("rows", Mesh(data=4)), ("cut", Mesh(data=2, fsdp=2))):
        config = replace(base, sft=sft, mesh=mesh, output_dir=str(tmp_path / name))
        rows.append(metric_rows(training.sft.run(config).folder))
    for whole, cut in zip(*rows, strict=True):
        assert cut.keys() == whole.keys()
        for key in cut.keys() & {"loss", "sft/loss", "router/aux_loss", "router/max_load"}:
            assert_allclose(cut[key], whole[key], rtol=1e-3)
    balances = [row["router/aux_loss"] for row in rows[0] if "router/aux_loss" in row]
    assert len(balances) == 3
    assert min(balances) >= 1.9  # 2 experts of each token, nearly balanced

    lora = LoRA(rank=2, match="attn|experts", base="nf4")
    places = {"mesh": mesh, "output_dir": str(tmp_path / "grpo"), "reward": ("length",)}
    learned = run_grpo(replace(base, lora=lora, **places))
    _, trained = models.load(learned.model_folder)
    start = models.load(tmp_path / "base")[1]
    adapters = models.lora.load(learned.folder / "adapter", start)
    assert "lora_b" in adapters["h_1"]["mlp"]["experts"]["down_proj"]
    expected = models.lora.merge(models.lora.quantized(start, "nf4"), adapters)
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-6), trained, expected)
