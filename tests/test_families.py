"""What each family has beside its parity with transformers: heads, weights cut over a mesh, and no
more to compute.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    CONFIG,
    GEMMA,
    LLAMA,
    MISTRAL,
    MORE,
    QWEN2,
    QWEN3,
    ROOT,
    script,
    some_params,
    some_tokens,
)
from jax.extend.core import jaxprs_in_params
from programs import mesh_of, whole_on_a_device

from rlhf_jax import models, sharding
from rlhf_jax.cli import commands
from rlhf_jax.cli.planning import shapes
from rlhf_jax.config import Mesh, RunConfig, SFTStage
from rlhf_jax.models.families import FAMILIES, differences
from rlhf_jax.training.common import memory

families, figures = (script(f"benchmarks/{name}.py") for name in ("families", "figures"))
TINY = {
    "GPT-2": CONFIG,
    "Llama": LLAMA,
    "Qwen2": QWEN2,
    "Qwen3": QWEN3,
    "Mistral": MISTRAL,
    "Gemma 3": GEMMA,
    **{FAMILIES[name].title: config for name, config in MORE.items()},
}


def with_heads(config):
    """Parameters with a value head and a score head that say something."""
    key = jax.random.key(0)
    params = models.add_head(key, models.add_head(key, some_params(config), "value"), "score")
    params["value"] = {"kernel": jnp.linspace(-1.0, 1.0, 8), "bias": jnp.float32(0.5)}
    params["score"] |= {"gain": jnp.float32(2.0), "shift": jnp.float32(-1.0)}
    return params


# Eight rows, the first two with pads.
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], *[[1] * 6] * 6])
LAST = [5, 4, *[5] * 6]  # columns of the last real tokens
# Sizes of data, fsdp and tensor
LAYOUTS = {
    "fsdp 8": (1, 8, 1),
    "tensor 2 x data 4": (4, 1, 2),
    "fsdp 2 x tensor 2 x data 2": (2, 2, 2),
}


TOKENS = some_tokens(*MASK.shape)


def gap_of_heads(model, params, hidden):
    """How far values and scores are from those by hand."""

    @jax.jit
    def heads(params):
        values = models.policy_fn(model)(params, TOKENS, MASK, None).values
        return values, models.score_fn(model)(params, TOKENS, MASK, None)

    values, scores = map(np.asarray, heads(params))
    by_hand = hidden[:, :-1] @ np.asarray(params["value"]["kernel"]) + 0.5
    off = np.abs(values[:, 1:] - by_hand)[MASK[:, 1:] * MASK[:, :-1] == 1]
    score = hidden[np.arange(8), LAST] @ np.asarray(params["score"]["kernel"])
    return float(max(off.max(), np.abs(scores - 2 * score + 1).max()))


def planned_bytes(folder, model, params, sizes):
    """What a plan of SFT says that a device holds of the parameters."""
    models.save(folder, model, params)
    config = RunConfig(model=str(folder), mesh=Mesh(*sizes), sft=SFTStage(batch_size=8))
    return memory.on_device(shapes.shapes_of(config, "sft").held["parameters"])


def on_eight_devices(family, folder):
    """{part, layout or plan: what is wrong with it}: heads on one device, logits in each layout,
    and the memory that ``rlhf-jax plan`` finds for the last of them.
    """
    model = models.build(TINY[family])
    params = with_heads(TINY[family])

    @jax.jit
    def states_and_logits(params):
        hidden = model.hidden(params, TOKENS, MASK)
        return hidden, model.unembed(params, hidden)

    wrong = {}
    hidden, expected = map(np.asarray, states_and_logits(params))
    off = gap_of_heads(model, params, hidden)
    if not off < 1e-5:
        wrong["heads"] = f"values or scores differ by {off}"
    for layout, sizes in LAYOUTS.items():
        mesh = mesh_of(*sizes)
        cut = jax.device_put(params, sharding.by_path(params, models.SHARDING, mesh))
        with jax.set_mesh(mesh):
            _, logits = states_and_logits(cut)
        far = np.abs(np.asarray(logits) - expected)[MASK == 1].max()
        # Over "tensor" alone neither routers are cut, nor sizes that it does not divide.
        whole = whole_on_a_device(cut) if mesh.shape["fsdp"] > 1 else []
        if whole or not far < 2e-5:
            wrong[layout] = f"logits differ by {far}; whole on a device: {whole}"
    planned = planned_bytes(folder, model, params, sizes)
    held = memory.on_device({name: cut[name] for name in cut if name not in models.HEADS})
    if planned != held:
        wrong["plan"] = f"a device holds {held} bytes, planned are {planned}"
    return wrong


@pytest.mark.slow
def test_heads_layouts_and_plans_on_eight_devices(tmp_path):
    """Values one column early and scores of the last token, by hand; logits in parts on 8 fake
    devices, and what they hold. In a process of its own: ``python tests/test_families.py FOLDER``.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "wrong.json").read_text("utf-8"))
    assert found == {family: {} for family in TINY}


def equations(jaxpr):
    """Names of a program's operations, those of inner programs too."""
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        yield from [equation.primitive.name] * (not inner)
        for part in inner:
            yield from equations(part)


def test_a_family_computes_what_llama_does_and_its_own_norms_and_biases():
    """At one shape: as many operations in matrix products, and no more others than the norms and
    biases need.
    """

    def program(config):
        model = models.build(config)
        tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0))
        jaxpr = jax.make_jaxpr(model.apply)(params, tokens).jaxpr
        return figures.matmul_flops(jaxpr), Counter(equations(jaxpr))

    layers = families.SIZES["num_layers"]
    flops, llama = program(families.CONFIGS["Llama"])
    assert llama["rsqrt"] == 2 * layers + 1
    # What Llama's layer has not: norms, and other operations: biases of q, k, v; norms of q and k;
    # norms after a part, a mask and a rotation more.
    for family, norms, others in (
        ("Qwen2", 0, 6),
        ("Qwen3", 2, 24),
        ("Mistral", 0, 0),
        ("Gemma 3", 4, 57),
    ):
        own_flops, own = program(families.CONFIGS[family])
        assert own_flops == flops, family
        assert own["rsqrt"] - llama["rsqrt"] == norms * layers, family
        assert own["dot_general"] == llama["dot_general"], family
        assert own.total() - llama.total() <= others * layers, family
    # GPT-2: each head has keys and values of its own, 2 * 2 * 32 columns more for 64 tokens of
    # width 128; its norms, two in a layer and one at the end, take two means each, which are
    # products with two columns.
    wider = layers * 2 * 64 * 128 * 128 + (2 * layers + 1) * 2 * 64 * 128 * 2 * 2
    assert program(families.CONFIGS["GPT-2"])[0] - flops == wider


def test_the_page_of_models_lists_what_the_command_lists(capsys):
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    assert set(TINY) == {family.title for family in FAMILIES.values()}
    rows = []
    for name, family in FAMILIES.items():
        words = "; ".join(differences(family)) or "what the others are compared with"
        rows.append(f"| {family.title} | `{name}` | {family.covers} | {words} |")
    assert "\n".join(rows) in page
    commands.run(["models"])
    shown = capsys.readouterr().out
    for name, family in FAMILIES.items():
        assert f"{family.title} ({name}): {family.covers}" in shown
        assert "; ".join(differences(family)) in shown


def main(folder):
    """Writes what is wrong with each family to a file in the folder."""
    jax.config.update("jax_num_cpu_devices", 8)
    wrong = {family: on_eight_devices(family, folder / family) for family in TINY}
    (folder / "wrong.json").write_text(json.dumps(wrong), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
