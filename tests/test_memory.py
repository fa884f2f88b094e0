"""Out of memory is answered with what lies on each device and what would help, whenever it comes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import training
from rlhf_jax.config import Compute, LoRA, Network, RunConfig, Tokenizer
from rlhf_jax.errors import TrainingFault
from rlhf_jax.training.stage import open_stage

SIZES = {"ppo.num_microbatches": 1, "rl.batch_size": 64}


def run_out(config, error, **held):
    def fail():
        with open_stage(config, "ppo", {}, SIZES) as stage:
            stage.held.update(held)
            raise error

    with pytest.raises(TrainingFault) as fault:
        fail()
    return str(fault.value)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, ["--lora.rank 8", "--compute.remat"]),
        ({"compute": Compute(remat=True)}, ["--lora.rank 8"]),
        ({"model": "m", "compute": Compute(remat=True), "lora": LoRA(rank=8)}, []),
    ],
)
def test_out_of_memory_names_what_is_held_and_what_helps(tmp_path, options, advice):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    weights = jax.device_put(jnp.zeros((1024, 256)), spread)  # 1 MiB over 4 devices
    weights.delete()  # as an update that has failed leaves a donated one
    held = {
        "trained parameters": weights,
        "frozen weights": None,
        "rewards": jax.tree_util.Partial(len, np.zeros((256, 1024), np.float32)),
        "cache while it samples": jax.ShapeDtypeStruct((512, 1024), jnp.float32),
    }
    config = RunConfig(output_dir=str(tmp_path / "run"), **options)
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")
    text = run_out(config, error, **held)
    lies = "0.2 MiB of trained parameters, 1.0 MiB of rewards, 2.0 MiB of cache while it samples; activations"
    assert text.startswith(f"ppo: out of memory. On each device lie {lies}")
    assert text.endswith("XLA said: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    assert "more --ppo.num-microbatches (now 1), a smaller --rl.batch-size (now 64)" in text
    assert [flag for flag in ("--lora.rank 8", "--compute.remat") if flag in text] == advice


def test_the_sentence_is_the_same_while_models_are_placed_and_for_what_xla_really_raises(tmp_path):
    placing = run_out(RunConfig(output_dir=str(tmp_path / "a")), ValueError("RESOURCE_EXHAUSTED: no\nmore"))
    assert placing.startswith("ppo: out of memory. What helps most: more --ppo.num-microbatches")
    config = RunConfig(output_dir=str(tmp_path / "b"))
    with pytest.raises(TrainingFault, match="of memory"), open_stage(config, "ppo", {}):
        jax.block_until_ready(jax.jit(lambda x: jnp.ones(1 << 46) * x)(2.0))


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("run", [training.sft.run, training.rl.run], ids=["sft", "ppo"])
def test_a_model_that_cannot_be_placed_is_the_same_sentence(run, tmp_path):
    """JAX's own error, for 200 TB of random weights."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"prompt": p, "response": p} for p in ("ab", "ba", "aa")]), "utf-8")
    config = RunConfig(
        data=(str(rows),),
        output_dir=str(tmp_path / "run"),
        network=Network(hidden_size=1 << 22, num_heads=1, num_layers=1),
        tokenizer=Tokenizer(kind="characters"),
        reward=("count:a",),
    )
    with pytest.raises(TrainingFault, match=r"out of memory\. What helps most: (.|\n)*RESOURCE_EXHAUSTED"):
        run(config)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL"), ValueError("x"), PermissionError(13, "")])
def test_other_errors_pass_through(tmp_path, error):
    with pytest.raises(type(error)), open_stage(RunConfig(output_dir=str(tmp_path)), "ppo", {}):
        raise error
