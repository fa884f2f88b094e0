"""No key of a run is used twice: every key that random bits are drawn from is recorded while a run
of each stage goes on one device.
"""

import collections
import dataclasses
import inspect
import itertools

import jax
import numpy as np
import pytest
from builders import letters_stage, run_stage, soak

from rlhf_jax import sharding
from rlhf_jax.cli.stages import find_algorithm
from rlhf_jax.data import batches
from rlhf_jax.training.common import layout
from rlhf_jax.training.common.progress import Progress

PRNG = inspect.getmodule(type(jax.random.key(0).dtype))  # private, elsewhere in each version
SLOW = ("reward_model", "dpo", "kto", "vpg", "ppo", "rloo", "grpo")
DROPPING = ("sft", "reward_model")  # the losses of DPO and KTO draw nothing


@pytest.fixture
def recorded(monkeypatch):
    """{"training", "order" of an epoch, or number of a validation: the keys that were drawn
    from}.
    """
    keys = collections.defaultdict(list)
    phases = ["training"]
    draw = PRNG.random_bits
    create = Progress.__init__
    order = batches._permutation

    def note(data):
        keys[phases[-1]].append(tuple(np.asarray(data).tolist()))

    def noted(key, *args, **options):
        jax.debug.callback(note, jax.random.key_data(key))
        return draw(key, *args, **options)

    def during(phase, function, *args):
        jax.effects_barrier()
        phases.append(phase)
        result = function(*args)
        jax.effects_barrier()
        phases.pop()
        return result

    def tracked(progress, *inputs, validate, **options):
        numbers = itertools.count()

        def validate_noted(state):
            return during(next(numbers), validate, state)

        create(progress, *inputs, validate=validate_noted, **options)

    jax.clear_caches()
    monkeypatch.setattr(PRNG, "random_bits", noted)
    monkeypatch.setattr(Progress, "__init__", tracked)
    # The check of memory draws by the first step's keys; what it draws is thrown away.
    monkeypatch.setattr(Progress, "has_steps", False)
    # The order of an epoch is drawn again by each step that needs it: the same draw.
    monkeypatch.setattr(batches, "_permutation", lambda *args: during("order", order, *args))
    monkeypatch.setattr(layout, "mesh_of", lambda config: sharding.make_mesh(1))
    yield keys
    jax.clear_caches()  # of programs that record


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", *SLOW])
def test_no_key_of_a_run_is_drawn_from_twice(name, recorded, tmp_path):
    """The keys of stream, step, microbatch, minibatch, row and position; those of the validations
    are the same in each, and no others are.
    """
    config = letters_stage(tmp_path, name)
    if name in DROPPING:
        config = dataclasses.replace(
            config, network=dataclasses.replace(config.network, dropout=0.1)
        )
    run_stage(config, name)
    jax.effects_barrier()
    # key(0) gives the constants of a hash of responses, see ``iteration``.
    training = [key for key in recorded.pop("training") if key != (0, 0)]
    orders = set(recorded.pop("order"))
    assert orders
    assert not orders & set(training)
    assert len(training) == len(set(training))
    validations = [sorted(keys) for keys in recorded.values()]
    drawn = {key for keys in validations for key in keys}
    assert not drawn & (set(training) | orders)
    assert all(keys == validations[0] for keys in validations)
    assert all(len(keys) == len(set(keys)) for keys in validations)
    steps = 0 if name in ("dpo", "kto") else 3 if find_algorithm(name) else 6
    assert len(training) > 2 * steps  # draws of each step, and the weights'
    if find_algorithm(name):
        assert len(validations) >= 2
        assert drawn


@pytest.mark.parametrize(
    "name", ["sft", "reward_model", "ppo", "grpo", *map(soak, ("dpo", "kto", "vpg", "rloo"))]
)
@pytest.mark.slow
def test_jax_finds_no_key_used_twice(name, tmp_path, monkeypatch):
    """By its own check, which is static inside a program; the test above has all stages."""
    monkeypatch.setattr(layout, "mesh_of", lambda config: sharding.make_mesh(1))
    jax.clear_caches()
    with jax.debug_key_reuse(True):
        run_stage(letters_stage(tmp_path, name), name)
    jax.clear_caches()
