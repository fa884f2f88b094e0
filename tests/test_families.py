"""What each family has beside its parity with transformers: heads, weights cut over a mesh, and no
more to compute.
"""

import re
from collections import Counter

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
from numpy.testing import assert_allclose
from programs import whole_on_a_device

from rlhf_jax import models, sharding
from rlhf_jax.cli import commands
from rlhf_jax.cli.benchmark import figures
from rlhf_jax.models.families import FAMILIES, differences

families = script("benchmarks/families.py")
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


MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def outputs_of(model):
    """``params -> (hidden states, log-probs, entropy, values, scores)``, compiled."""
    tokens = some_tokens(2, 6)

    def outputs(params):
        hidden = model.hidden(params, tokens, MASK)
        policy = models.policy_fn(model)(params, tokens, MASK, None)
        scores = models.score_fn(model)(params, tokens, MASK, None)
        return hidden, policy.log_probs, policy.entropy, policy.values, scores

    return jax.jit(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_heads_and_weights_cut_over_a_mesh(family):
    """Values one column early and scores of the last token, by hand; all of it the same in parts on
    2 x 2 devices.
    """
    model = models.build(TINY[family])
    params = with_heads(TINY[family])
    hidden, *_, values, scores = whole = outputs_of(model)(params)
    by_hand = hidden[:, :-1] @ params["value"]["kernel"] + 0.5
    assert_allclose(np.where(MASK[:, 1:] * MASK[:, :-1], values[:, 1:] - by_hand, 0), 0, atol=1e-5)
    assert_allclose(scores, 2 * (hidden[[0, 1], [5, 4]] @ params["score"]["kernel"]) - 1, atol=1e-5)
    mesh = sharding.make_mesh(1, fsdp=2, tensor=2)
    cut = jax.device_put(params, sharding.by_path(params, models.SHARDING, mesh))
    assert whole_on_a_device(cut) == []
    with jax.set_mesh(mesh):
        parts = outputs_of(model)(cut)
    for one, other in zip(whole, parts, strict=True):
        real = MASK == 1 if one.ndim > 1 else slice(None)
        assert_allclose(np.asarray(other)[real], np.asarray(one)[real], atol=2e-5)


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


LISTS = ("each_family", "CLASSIFIERS")


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


def test_the_cells_of_the_tables_of_families_are_tests():
    """docs/notes/families.md: each case stands in the file of its column's cases, in the list if
    the test takes some alone.
    """
    parity, lora, files, chats = (
        (ROOT / "tests" / f"{name}.py").read_text("utf-8")
        for name in ("test_models_parity", "test_lora_parity", "test_model_files", "chat_families")
    )
    some, classifiers = (
        re.search(rf"^{name} = .*?\n[)\]]", parity, re.DOTALL | re.M)[0] for name in LISTS
    )
    parity += (ROOT / "tests" / "torch_models.py").read_text("utf-8")
    files += (ROOT / "tests" / "builders.py").read_text("utf-8")
    lines = (ROOT / "docs" / "notes" / "families.md").read_text("utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    here = "".join(f'"{family}"' for family in TINY) + '"User:" "Assistant:"'
    for columns in ([parity, some, some, lora, classifiers], [files, here, chats + here]):
        table = {
            row[0]: row[1:]
            for row in rows
            if row[0] in TINY and len(row) == len(columns) + 1 and "`" in row[1]
        }
        assert set(table) == set(TINY)
        for family, cells in table.items():
            for cell, source in zip(cells, columns, strict=True):
                cases = re.findall("`([^`]+)`", cell)
                assert cases or "none" in cell, (family, cell)
                assert [
                    case for case in cases if not re.search(f'"{case}"|def {case}[(]', source)
                ] == [], family
