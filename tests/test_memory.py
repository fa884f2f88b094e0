"""Out of memory is answered with what is held and what would help."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import TrainState
from rlhf_jax.config import Compute, LoRA, RunConfig
from rlhf_jax.errors import TrainingFault
from rlhf_jax.training import checks, stage
from rlhf_jax.training.phases import LoopState


@pytest.mark.parametrize(
    ("config", "name", "advice"),
    [
        (RunConfig(), "sft", ("--sft.num-microbatches (now 1)", "--sft.batch-size (now 32)", "--compute.remat")),
        (RunConfig(), "ppo", ("--ppo.num-microbatches (now 1)", "--rl.batch-size (now 64)", "--compute.remat")),
        (RunConfig(compute=Compute(remat=True)), "sft", ("--lora.rank 8",)),
        (RunConfig(model="m", compute=Compute(remat=True), lora=LoRA(rank=8)), "sft", ("shorter texts",)),
    ],
)
def test_out_of_memory_names_what_is_held_and_what_helps(config, name, advice):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    weights = jax.device_put(jnp.zeros((1024, 256)), spread)  # 1 MiB over 4 devices
    state = TrainState.create({"w": weights}, optax.adam(1e-3))
    state = state.replace(opt_state=jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), state.opt_state))
    if name == "ppo":
        state = LoopState.create(state, 0.1, reference={"w": weights})
    weights.delete()  # as an update that has failed leaves a donated one
    cache = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    beside = {"rewards": jax.tree_util.Partial(len, np.zeros((256, 1024), np.float32)), "frozen weights": None}
    with pytest.raises(TrainingFault) as said, checks.explains_memory(config, name, state, beside, cache):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")
    text = str(said.value)
    assert text.startswith(
        f"{name}: out of memory. On each device lie 0.2 MiB of trained parameters and 2.0 MiB of opt"
    )
    assert text.endswith("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    assert ("0.2 MiB of refreshed reference" in text) == (name == "ppo")
    assert "1.0 MiB of rewards, while it samples 2.0 MiB of cache too, in the update 0.2 MiB of gradients" in text
    assert "frozen" not in text
    for setting in advice:
        assert setting in text
    with (
        pytest.raises(TrainingFault, match="of memory"),
        checks.explains_memory(config, name, state),
    ):  # what XLA really says
        jax.block_until_ready(jax.jit(lambda x: jnp.ones(1 << 46) * x)(2.0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), checks.explains_memory(config, name, state):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_model_that_does_not_fit_is_said_before_the_first_step(tmp_path):
    with (
        pytest.raises(TrainingFault, match=r"^out of memory outside of the steps.*XLA said: RESOURCE_EXHAUSTED: no$"),
        stage.open_stage(RunConfig(output_dir=str(tmp_path / "run")), "sft", {}),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no\nmore")
