"""Out of memory is answered with what lies on each device and what would help, whenever it
comes.
"""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import initial_params, slow
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import models, ops, rollout, training, types
from rlhf_jax.algorithms import kto, ppo, sft
from rlhf_jax.config import (
    Compute,
    KTOStage,
    LoRA,
    Network,
    RLStage,
    RunConfig,
    SFTStage,
    Tokenizer,
)
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.runs import allocator, devices, writing
from rlhf_jax.training.common import initial, memory
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.opening import open_run
from rlhf_jax.training.common.progress import Progress

SIZES = {"ppo.num_microbatches": 1, "rl.batch_size": 64}


def run_out(config, error, **held):
    def fail():
        with open_run(config, "ppo", {}, SIZES) as run:
            run.held.update(held)
            raise error

    with pytest.raises(TrainingFault) as fault:
        fail()
    return str(fault.value)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, ["--lora.rank 8", "--compute.remat"]),
        ({"compute": Compute(remat=True)}, ["--lora.rank 8"]),
        (
            {"model": "m", "compute": Compute(remat=True, scan_layers=False), "lora": LoRA(rank=8)},
            [],
        ),
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
    error = jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore"
    )
    text = run_out(config, error, **held)
    lies = (
        "0.2 MiB of trained parameters, 1.0 MiB of rewards, 2.0 MiB of cache while it samples; "
        "activations"
    )
    assert text.startswith(f"ppo: out of memory. Each device holds {lies}")
    assert text.endswith(
        "XLA said: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."
    )
    assert "more --ppo.num-microbatches (now 1), a smaller --rl.batch-size (now 64)" in text
    assert [flag for flag in ("--lora.rank 8", "--compute.remat") if flag in text] == advice


def test_the_sentence_is_the_same_while_models_are_placed_and_for_what_xla_really_raises(tmp_path):
    error = ValueError("RESOURCE_EXHAUSTED: no\nmore")
    placing = run_out(RunConfig(output_dir=str(tmp_path / "a")), error)
    assert placing.startswith("ppo: out of memory. What helps most: more --ppo.num-microbatches")
    config = RunConfig(output_dir=str(tmp_path / "b"))
    with pytest.raises(TrainingFault, match="of memory"), open_run(config, "ppo", {}):
        jax.block_until_ready(jax.jit(lambda x: jnp.ones(1 << 46) * x)(2.0))


@pytest.mark.parametrize("run", [slow(training.sft.run), training.rl.run], ids=["sft", "ppo"])
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
    with pytest.raises(
        TrainingFault, match=r"out of memory\. What helps most: (.|\n)*RESOURCE_EXHAUSTED"
    ):
        run(config)


TINY = {
    "network": Network(max_length=32, hidden_size=8, num_heads=1, num_layers=1),
    "reward": ("length",),
}
TINY["tokenizer"] = Tokenizer(kind="characters")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_run_that_does_not_fit_says_so_before_step_0(name, tmp_path, monkeypatch):
    """The batch that does not fit is one of ten; neither reward nor environment is asked before."""
    texts = [
        {"prompt": "ab", "response": "a" * n, "desirable": True} for n in (20, *[1, 2, 3, 4] * 9)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(texts), "utf-8")
    never = "def environment(conversation, row): raise AssertionError"
    reward = never.replace("environment(conversation, row)", "reward(responses)")
    (tmp_path / "never.py").write_text(f"{never}\n{reward}", "utf-8")
    algorithm = {"sft": sft, "kto": kto, "ppo": ppo}[name]
    widths = []
    update = algorithm.update

    def limited(state, batch, *args, **options):
        widths.append(batch.tokens.shape[1])
        if widths[-1] > 20:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."
            )
        return update(state, batch, *args, **options)

    monkeypatch.setattr(algorithm, "update", limited)
    short = {"batch_size": 4, "validation_fraction": 0.0}
    config = RunConfig(
        data=(str(tmp_path / "rows.json"),),
        output_dir=str(tmp_path / "run"),
        sft=SFTStage(**short),
        kto=KTOStage(**short),
        rl=RLStage(
            num_iterations=1,
            max_new_tokens=24,
            environment=f"{tmp_path / 'never.py'}:environment",
            **short,
        ),
        **TINY | {"reward": (f"{tmp_path / 'never.py'}:reward",)},
    )
    with pytest.raises(
        TrainingFault, match=rf"{name}: out of memory\. Each device holds .* MiB of trained"
    ):
        training.rl.run(config, ppo) if name == "ppo" else getattr(training, name).run(config)
    assert len(widths) == 1
    assert not any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_program_is_refused_if_it_needs_more_than_is_free(monkeypatch):
    """What it needs is what comes on top of its arguments; a donated one is used again."""

    def fn(state, batch, *, scale):
        return state * scale, jnp.sort(batch * scale, axis=1).sum(axis=1)

    program = functools.partial(jax.jit(fn, donate_argnums=0), scale=2.0)
    arguments = (jnp.zeros((1024, 1024)), jnp.zeros((512, 1024)))
    needed = memory.needed(memory.check("learn", program, *arguments))
    assert 2 << 20 <= needed < 3 << 20
    for free in (0, needed):  # of 0 nobody knows
        monkeypatch.setattr(devices, "free_memory", lambda free=free: free)
        memory.check("learn", program, *arguments)
    monkeypatch.setattr(devices, "free_memory", lambda: needed - 1)
    with pytest.raises(
        memory.TooLarge,
        match=r"the phase 'learn' needs 2\.\d+ MiB more .*, and 2\.\d+ MiB are free",
    ):
        memory.check("learn", program, *arguments)
    assert not arguments[0].is_deleted()
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    memory.check("learn", program, *arguments)


def a_run(name, tmp_path, **options):
    """Runs ``name``, all rows of which are of one width."""
    rows = [{"prompt": "ab", "response": "a" * (1 + n % 4), "desirable": True} for n in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    settings = {"batch_size": 4, "validation_fraction": 0.0}
    if name == "environment":
        source = "def environment(conversation, row): return None"
        (tmp_path / "own.py").write_text(source, "utf-8")
        settings["environment"] = f"{tmp_path / 'own.py'}:environment"
    config = RunConfig(
        data=(str(tmp_path / "rows.json"),),
        output_dir=str(tmp_path / "run"),
        sft=SFTStage(batch_size=4, validation_fraction=0.0),
        kto=KTOStage(batch_size=4, validation_fraction=0.0),
        rl=RLStage(num_iterations=2, max_new_tokens=4, **settings),
        **TINY,
        **options,
    )
    if name in ("sft", "kto"):
        return getattr(training, name).run(config)
    return training.rl.run(config, ppo)


@pytest.fixture
def compiled():
    """The names of the programs that are compiled."""
    names = []

    def note(event, seconds, fun_name="", **more):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_memory_is_checked_and_given_back_before_the_first_step_and_before_saving(
    tmp_path, monkeypatch, compiled
):
    """The first step finds the program that was compiled for the check."""
    events = []

    def before(event, module, name):
        called = getattr(module, name)
        noted = lambda *args, **more: events.append(event) or called(*args, **more)  # noqa: E731
        monkeypatch.setattr(module, name, noted)

    monkeypatch.setattr(devices, "free_memory", lambda: 0)
    monkeypatch.setattr(allocator, "give_back", lambda: events.append("given back"))
    before("saved", writing, "replacing")
    before("step", Progress, "record")
    before("checked", memory, "check")
    a_run("sft", tmp_path)
    assert sorted(events[:2]) == ["checked", "given back"]
    assert events[2:] == [*["step"] * 3, "given back", "saved"]
    assert compiled.count("jit(update_in_place)") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "ppo", "environment"])
def test_a_run_compiles_what_it_checks_once(name, tmp_path, compiled):
    a_run(name, tmp_path)
    programs = ["jit(update_in_place)"]
    if name != "kto":
        programs += ["jit(respond)", "jit(rescored)", "jit(reward)"]
    assert {program: compiled.count(program) for program in programs} == dict.fromkeys(programs, 1)


@pytest.mark.parametrize(("name", "phase"), [slow("kto", "learn"), ("ppo", "respond")])
def test_a_run_that_needs_more_than_is_free_ends_before_its_first_step(
    name, phase, tmp_path, monkeypatch
):
    monkeypatch.setattr(devices, "free_memory", lambda: 1)
    with pytest.raises(TrainingFault) as fault:
        a_run(name, tmp_path)
    text = str(fault.value)
    assert text.startswith(
        f"{name}: out of memory before the first step: the phase '{phase}' needs"
    )
    assert "and 0.000 MiB are free. Each device holds" in text
    assert f"What helps most: more --{name}.num-microbatches (now 1), a smaller" in text
    assert text.endswith(f"rlhf-jax plan {name} computes what other settings need.")
    assert not any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("INTERNAL"), ValueError("x"), KeyError("y")]
)
def test_other_errors_pass_through(tmp_path, error):
    with pytest.raises(type(error)), open_run(RunConfig(output_dir=str(tmp_path)), "ppo", {}):
        raise error


@pytest.mark.parametrize(
    ("score_rows", "parts", "expected"),
    [
        (None, {}, None),
        (None, {"num_microbatches": 2}, 8),
        (None, {"num_microbatches": 2, "num_minibatches": 4}, 2),
        (3, {"num_microbatches": 2}, 3),
    ],
)
def test_rows_are_scored_as_many_at_once_as_an_update_takes(score_rows, parts, expected):
    assert memory.score_rows(Compute(score_rows=score_rows), 16, ppo.Config(**parts)) == expected
    assert memory.score_rows(Compute(score_rows=score_rows), 16, sft.Config()) == score_rows


@pytest.mark.parametrize(("rows", "size"), [(None, 12), (8, 6), (5, 4), (1, 1)])
def test_rows_in_parts_score_as_all_at_once(rows, size):
    """12 rows; the parts are equal and at most so many rows long; every output keeps its row."""
    tokens = jnp.arange(24).reshape(12, 2)
    sizes = []

    def fn(params, tokens, attention_mask, key):
        assert key is None
        sizes.append(tokens.shape[0])
        return types.PolicyOutput(params * tokens + attention_mask, tokens[:, 0], None)

    output = ops.by_rows(fn, rows)(2, tokens, tokens * 100, None)
    assert_array_equal(output.log_probs, 102 * tokens)
    assert_array_equal(output.entropy, tokens[:, 0])
    assert output.values is None
    assert set(sizes) == {size}


def test_what_is_offloaded_lies_with_the_host_and_computes_the_same(tmp_path, monkeypatch):
    config = RunConfig(output_dir=str(tmp_path / "run"), compute=Compute(offload=("reference",)))
    tokens = jnp.arange(4)
    loaded = {"table": jnp.arange(8.0)}
    expected = loaded["table"][tokens] * 2

    def fn(params, tokens):
        return params["table"][tokens] * 2

    with open_run(config, "ppo", {}) as run:
        of_run = (run.layout, config.compute)
        other = jax.tree_util.Partial(fn, {"table": jnp.zeros(8)})
        other = initial.frozen(run.layout, other, is_offloaded=False)
        assert memory.on_device(other) == 32
        reference = initial.reference_of(*of_run, Trainable({}, None, loaded), fn)
        with pytest.raises(UserError, match="under LoRA the reference is the frozen weights"):
            initial.reference_of(*of_run, Trainable({}, {"table": tokens}), fn)
    assert loaded["table"].is_deleted()
    assert memory.on_device(reference) == 0
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(reference)} == {memory.HOST}
    program = jax.jit(lambda fn, tokens: fn(tokens))
    assert_array_equal(program(reference, tokens), expected)
    assert_array_equal(jax.jit(lambda fn: fn(tokens=tokens))(reference), expected)
    for platform in ("tpu", "cuda"):  # tried on none, but lowers
        text = program.trace(reference, tokens).lower(lowering_platforms=(platform,)).as_text()
        assert 'memory_kind = "pinned_host"' in text
        assert "annotate_device_placement" in text
    refreshed = {"rl": RLStage(reference_refresh=1), "output_dir": str(tmp_path / "refreshed")}
    with pytest.raises(UserError, match="a reference that moves stays on the devices"):
        training.rl.run(RunConfig(compute=config.compute, reward=("length",), **refreshed))
    monkeypatch.setattr(memory, "HOST", "nowhere")
    with pytest.raises(UserError, match="cpu devices have no nowhere memory"):
        memory.offloaded(other)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_scoring_takes_less_memory_with_more_microbatches():
    """And gives the same numbers: policy, values and reference of 16 rows of 64 tokens."""
    model = models.build(models.GPT2Config(13, 64, 32, 2, 2))
    params = models.add_head(jax.random.key(0), initial_params(model, 1), "value")
    policy_fn = models.policy_fn(model)
    tokens = jax.random.randint(jax.random.key(2), (16, 64), 2, 13)
    given = types.Rollout(
        tokens, jnp.ones_like(tokens), jnp.ones_like(tokens), jnp.zeros(tokens.shape)
    )

    def program(parts):
        scored_fn = ops.by_rows(
            policy_fn, memory.score_rows(Compute(), 16, ppo.Config(num_microbatches=parts))
        )
        ref_fn = jax.tree_util.Partial(scored_fn, params)
        return jax.jit(
            lambda params: rollout.rescore(given, params, policy_fn=scored_fn, ref_fn=ref_fn)
        )

    compiled = [program(parts).lower(params).compile() for parts in (1, 4, 16)]
    used = [each.memory_analysis().temp_size_in_bytes for each in compiled]
    assert used[1] < 0.4 * used[0]
    assert used[2] < 0.4 * used[1]
    whole, *others = (each(params) for each in compiled)
    for other, name in itertools.product(others, ("log_probs", "values", "ref_log_probs")):
        assert_allclose(getattr(other, name), getattr(whole, name), atol=2e-6)


def test_a_rehearsal_takes_arguments_by_name():
    program = jax.jit(lambda x, *, by: {"sum": x + by})
    rehearse = memory.rehearsed("join", program)
    found = rehearse(jnp.ones((4, 2)), by=jnp.ones((4, 2)))
    assert found["sum"].shape == (4, 2)
    assert not np.any(found["sum"])
