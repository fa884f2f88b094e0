"""How many copies of the weights lie on a device while a stage trains: counted in the arrays that
live there.
"""

import functools
import gc
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest
from builders import initial_params, slow, soak

from rlhf_jax import models, training
from rlhf_jax.algorithms import grpo, ppo
from rlhf_jax.cli.planning import shapes
from rlhf_jax.config import Compute, DPOStage, LoRA, RewardModelStage, RLStage, RunConfig, SFTStage
from rlhf_jax.data import tokenizers
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training.common import initial, memory
from rlhf_jax.training.common.opening import open_run
from rlhf_jax.training.common.progress import Progress
from rlhf_jax.types import TrainState

RL = RLStage(num_iterations=2, batch_size=8, max_new_tokens=4, validation_fraction=0.0)
SHORT = {"batch_size": 4, "validation_fraction": 0.0}


def live_bytes(device) -> int:
    """Bytes of all arrays on a device, each buffer once, without those in the host's memory."""
    gc.collect()
    arrays = [array for array in jax.live_arrays() if array.sharding.memory_kind != memory.HOST]
    shards = [
        shard.data
        for array in arrays
        for shard in array.addressable_shards
        if shard.device == device
    ]
    return sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())


@pytest.fixture
def after_steps(monkeypatch):
    """The most bytes on any device after each step, beyond those before the run."""
    before = {device: live_bytes(device) for device in jax.devices()}
    seen = []
    record = Progress.record

    def counted(self, *given, **more):
        record(self, *given, **more)
        seen.append(max(live_bytes(device) - before[device] for device in jax.devices()))

    monkeypatch.setattr(Progress, "record", counted)
    return seen


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with models and data, and the bytes of the model in float32."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tokenizers.characters(["abcdefgh"])
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    model = models.build(models.GPT2Config(tokenizer.vocab_size, 16, 256, 1, 2, **ids))
    params = initial_params(model)
    kinds = {
        dtype: jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), params)
        for dtype in ("float32", "bfloat16")
    }
    kinds["reward"] = models.add_head(jax.random.key(1), params, "score")
    for name, weights in kinds.items():
        how = SamplingConfig(4, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        LanguageModel(model, weights, tokenizer).save(
            folder / name, template="{prompt}", config=how
        )
    texts = ["ab", "ba", "cd", "dc", "ef", "fe", "gh", "hg"]
    rows = [{"prompt": t, "response": t, "chosen": t, "rejected": t[::-1]} for t in texts]
    (folder / "sft.json").write_text(
        json.dumps([{key: row[key] for key in ("prompt", "response")} for row in rows])
    )
    pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def world_metrics():
    """The metrics of runs that must be alike, by what they have in common."""
    return {}


REFRESHED = {"rl": replace(RL, reference_refresh=1)}
# (stage, the model's dtype, settings): parameters and two moments of Adam are 3, a reference 1 or
# in bfloat16 0.5
CASES = {
    ("sft", "bfloat16"): ({}, 3),
    ("reward_model", "float32"): ({}, 3),
    ("dpo", "bfloat16"): ({}, 3.5),
    (ppo, "float32"): ({}, 4),
    (ppo, "bfloat16"): ({"reward": ("reward",)}, 4.5),
    (ppo, "bfloat16", "offload"): (
        {"reward": ("reward",), "compute": Compute(offload=("reference", "reward"))},
        3,
    ),
    (ppo, "bfloat16", "lora"): ({"lora": LoRA(rank=1)}, 0.5),
    (grpo, "bfloat16"): (REFRESHED, 4),
}

# What others hold too: the SFT of a reward model's pairs, PPO without a reward model.
FURTHER = (("sft", "bfloat16"), (ppo, "float32"))


def config_of(case, folder, output_dir):
    stage, dtype = case[:2]
    options, _ = CASES[case]
    rewards = tuple(str(folder / name) for name in options.get("reward", ())) or ("length",)
    return RunConfig(
        data=(str(folder / ("pairs.json" if stage in ("dpo", "reward_model") else "sft.json")),),
        model=str(folder / dtype),
        output_dir=str(output_dir),
        sft=SFTStage(**SHORT),
        dpo=DPOStage(**SHORT),
        reward_model=RewardModelStage(**SHORT, normalize_samples=8),
        **{"rl": RL} | options | {"reward": rewards},
    )


def planned_bytes(case, folder):
    name = case[0] if isinstance(case[0], str) else case[0].__name__.rpartition(".")[2]
    config = config_of(case, folder, "run")
    held, _, _ = shapes.shapes_of(config, name, length=2)
    stays = [tree for part, tree in held.items() if part.split()[0] not in config.compute.offload]
    return sum(memory.on_device(tree) for tree in stays)


@pytest.mark.parametrize("case", [slow(c) if c in FURTHER else c for c in CASES], ids=str)
def test_a_plan_counts_what_a_stage_holds(case, world):
    folder, size = world
    assert planned_bytes(case, folder) / size == pytest.approx(CASES[case][1], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("case", [soak(c) if c in FURTHER else c for c in CASES], ids=str)
def test_a_stage_keeps_no_second_copy_of_the_weights(
    case, world, tmp_path, after_steps, world_metrics
):
    """And no more than its plan says, but for the batch and the numbers of a step."""
    folder, _ = world
    config = config_of(case, world[0], tmp_path / "run")
    if isinstance(case[0], str):
        getattr(training, case[0]).run(config)
    else:
        training.rl.run(config, case[0])
    assert 0 <= max(after_steps) - planned_bytes(case, folder) < 20_000
    alike = str(
        (case[0], case[1], config.lora, config.reward)
    )  # what is offloaded changes no number
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8")
    assert world_metrics.setdefault(alike, metrics) == metrics


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_trained_has_arrays_of_its_own_and_the_reference_those_that_were_loaded(
    rank, tmp_path, caplog
):
    config = RunConfig(output_dir=str(tmp_path / "run"), model=str(tmp_path), lora=LoRA(rank=rank))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 8, "n_layer": 1}')
    body = {
        "h_0": {"attn": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}},
        "ln_f": {"scale": jnp.ones(2)},
    }
    params = models.add_head(jax.random.key(0), body, "value")
    with open_run(config, "ppo", {}) as run:
        start = initial.trainable(config.lora, params, jax.random.key(1)).put(run.layout)
        reference = initial.reference_of(
            run.layout, config.compute, start, lambda params: params["h_0"]["attn"]["kernel"].dtype
        )
        assert reference() == jnp.bfloat16
        with jax.log_compiles():
            state = run.layout.create(
                functools.partial(TrainState.create, optimizer=optax.adam(0.1)), start.params
            ).params
        assert re.findall(r"XLA compilation of (\S+)", caplog.text) == [
            "jit(create)"
        ]  # not one for each operation
        moved = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
        assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype("float32")}
        assert all(
            leaf.sharding.is_fully_replicated and len(leaf.devices()) == 4
            for leaf in jax.tree.leaves(moved)
        )
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, reference.bound)))
