"""What a compiled program computes and what the devices hold."""

import re

import jax

from rlhf_jax.parallel import sharding


def mesh_of(data, fsdp=1, tensor=1):
    return sharding.make_mesh(data, fsdp=fsdp, tensor=tensor)


def array_sizes(jaxpr):
    """Sizes of all arrays computed, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


def whole_on_a_device(tree):
    """Paths of the blocks' kernels and the token tables of which a device holds all."""
    leaves = {
        jax.tree_util.keystr(path, simple=True): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    cut = re.compile("(attn|mlp).*kernel$|(wte|lm_head).*embedding$")
    return [
        name
        for name, x in leaves.items()
        if cut.search(name) and x.addressable_shards[0].data.size == x.size
    ]


def largest_constant(jitted, *args):
    """An upper bound, in characters, on the constants in the program text of a jitted function."""
    return max(len(line) for line in jitted.lower(*args).as_text().splitlines())
