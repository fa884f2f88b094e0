"""Runs whose weights are cut over devices give what one device gives, and no device holds a whole
kernel.

The slow tests run every stage on eight fake devices, in one process: ``python tests/test_layouts.py
FOLDER``.
"""

import functools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from builders import UNASKED, Killed, initial_params, interrupt, perturbed, slow
from numpy.testing import assert_allclose, assert_array_equal
from programs import mesh_of, whole_on_a_device
from safetensors.numpy import load_file

from rlhf_jax import grpo, models, ppo, sampling, sharding, training
from rlhf_jax.cli.stages import STAGES
from rlhf_jax.config import (
    DPOStage,
    LoRA,
    Mesh,
    Network,
    Optimizer,
    RewardModelStage,
    RLStage,
    RunConfig,
    SFTStage,
    Text,
    Tokenizer,
    parse,
)
from rlhf_jax.data import demo
from rlhf_jax.data.tokenizers import train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.report import page
from rlhf_jax.sampling import sharded
from rlhf_jax.training.common import initial, setup
from rlhf_jax.training.common import layout as device_layout
from rlhf_jax.training.common.layout import Layout
from rlhf_jax.training.common.progress import Progress

LAYOUTS = {
    "one": Mesh(),
    "data 8": Mesh(8, 1, 1),
    "fsdp 8": Mesh(1, 8, 1),
    "tensor 2 x data 4": Mesh(4, 1, 2),
    "fsdp 2 x tensor 2 x data 2": Mesh(-1, 2, 2),
}
# Where a gradient is 0 but for rounding, Adam's first steps divide that rounding by itself, unless
# eps is larger.
STEADY = Optimizer(learning_rate=1e-3, eps=1e-3)


# Llamas with grouped queries
GROUPED = {"hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 32}
SMALL = models.LlamaConfig(vocab_size=40, max_length=16, num_layers=1, **GROUPED)


def base(folder, data):
    """A Llama with grouped queries and a reward model of the same tokenizer, both of random
    weights.
    """
    tokenizer = train_bpe(
        [path.read_text("utf-8") for path in sorted(Path(data).glob("*.json"))], 300
    )
    ids = {
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": tokenizer.eos_id,
    }
    sizes = GROUPED | {"num_layers": 1, "initializer_range": 0.2}
    model = models.build(models.LlamaConfig(tokenizer.vocab_size, 128, **sizes, **ids))
    key = jax.random.key(0)
    models.save(folder / "policy", model, params := initial_params(model))
    models.save(folder / "reward", model, models.add_head(key, params, "score"))
    for name in ("policy", "reward"):
        tokenizer.save(folder / name)


def config(folder, **sections):
    """Three steps of anything."""
    small = {
        "batch_size": 8,
        "optimizer": STEADY,
        "validation_fraction": 0.2,
        "validation_interval": 3,
    }
    sampled = {
        "max_new_tokens": 4,
        "validation_interval": 3,
        "validation_prompts": 8,
        "optimizer": STEADY,
    }
    common = RunConfig(
        data=(str(folder / "data"),),
        network=Network(hidden_size=16, num_layers=1, num_heads=2, max_length=128),
        tokenizer=Tokenizer(vocab_size=300),
        text=Text(bucket_multiple=128),
        sft=SFTStage(**small, **UNASKED),
        reward_model=RewardModelStage(**small, normalize_samples=8),
        dpo=DPOStage(**small),
        reward=(str(folder / "reward"),),
        rl=RLStage(num_iterations=3, batch_size=16, kl_coef=0.05, **sampled),
        ppo=ppo.Config(num_epochs=1, num_minibatches=2, shuffle_blocks=1),
        grpo=grpo.Config(group_size=4, num_epochs=1),
    )
    return replace(common, **sections)


def run_ppo(settings):
    return training.rl.run(settings, ppo)


def run_grpo(settings):
    return training.rl.run(settings, grpo)


def runs(folder):
    """{name: (stage, config)}."""
    policy = {"model": str(folder / "policy"), "tokenizer": Tokenizer()}
    members = replace(config(folder).reward_model, ensemble_size=2)
    return {
        "sft": (training.sft.run, config(folder)),
        "reward_model": (training.reward_model.run, config(folder, **policy)),
        "ensemble": (training.reward_model.run, config(folder, reward_model=members)),
        "dpo": (training.dpo.run, config(folder, **policy)),
        "ppo": (run_ppo, config(folder, **policy)),
        "grpo": (run_grpo, config(folder, **policy)),
        "ppo with LoRA": (run_ppo, config(folder, **policy, lora=LoRA(rank=2))),
    }


class Probe:
    """Watches a run: which arrays lie whole on a device, and what the update sends between
    devices.
    """

    def __init__(self, patch):
        self.whole = []
        self.collectives = {}
        self.laid_out = 0
        put = Layout.put
        result = Progress.result

        def laid_out(on, tree):
            self.whole += whole_on_a_device(done := put(on, tree))
            self.laid_out += 1
            return done

        def trained(progress):
            state, row = result(progress)
            self.whole += whole_on_a_device(state)
            return state, row

        patch.setattr(Layout, "put", laid_out)
        patch.setattr(Progress, "result", trained)
        jit_update = Layout.jit_update

        def jitted(on, *how):
            lazy = jit_update(on, *how)
            compiled = {}

            def call(*args, **options):
                if not compiled:
                    compiled["update"] = lazy.lower(*args, **options).compile()
                    self.collectives = count_collectives(compiled["update"].as_text())
                return compiled["update"](*args, **options)

            call.lower = lazy.lower  # for the check of memory
            return call

        patch.setattr(Layout, "jit_update", jitted)


def count_collectives(text):
    """How often each kind of communication stands in a program."""
    return dict(
        Counter(
            re.findall(
                r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)[-(]", text
            )
        )
    )


def main(folder, layout, names):
    """Each of the runs in a layout; "FOLDER/LAYOUT, RUN.json" says what was seen."""
    jax.config.update("jax_disable_most_optimizations", True)
    page.write = lambda runs, path: None
    if not (folder / "data").exists():
        demo.write(
            folder / "data",
            sizes={"sft_data.json": 32, "preference_data.json": 32, "prompts.json": 48},
        )
        base(folder, folder / "data")
    for name in names:
        run, settings = runs(folder)[name]
        with pytest.MonkeyPatch.context() as patch:
            probe = Probe(patch)
            if layout == "one":
                patch.setattr(device_layout, "mesh_of", lambda config: sharding.make_mesh(1))
            started = time.process_time()
            run(
                replace(
                    settings, mesh=LAYOUTS[layout], output_dir=str(folder / "runs" / layout / name)
                )
            )
        seconds = time.process_time() - started
        seen = {"whole": probe.whole, "collectives": probe.collectives, "seconds": seconds}
        (folder / f"{layout}, {name}.json").write_text(json.dumps(seen))


EVERY = ["sft", "reward_model", "ensemble", "dpo", "ppo", "grpo", "ppo with LoRA"]


# The rest takes minutes.
SLOW = {("fsdp 2 x tensor 2 x data 2", name) for name in ("sft", "ppo with LoRA")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """``(layout, run) -> what the probe saw`` and the folder of the runs, that on one device among
    them.
    """
    folder = tmp_path_factory.mktemp("layouts")

    def of(layout, name):
        wanted = [
            run for run in EVERY if ((layout, run) in SLOW) == ((layout, name) in SLOW)
        ]  # those of one tier
        for each in ("one", layout):
            if missing := [run for run in wanted if not (folder / f"{each}, {run}.json").exists()]:
                flags = (
                    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
                )
                environment = os.environ | {
                    "XLA_FLAGS": flags,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                }
                command = [sys.executable, __file__, folder, each, ",".join(missing)]
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads((folder / f"{layout}, {name}.json").read_text()), folder / "runs"

    return of


# How often the program of an update may send, in any of the runs: (all-gather, all-reduce,
# all-to-all).
MOST = {
    "data 8": (9, 14, 0),
    "fsdp 8": (60, 40, 0),
    "tensor 2 x data 4": (12, 30, 0),
    "fsdp 2 x tensor 2 x data 2": (42, 32, 0),
}


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        pytest.param(
            layout, name, marks=pytest.mark.slow if (layout, name) in SLOW else pytest.mark.soak
        )
        for layout in MOST
        for name in EVERY
    ],
)
def test_a_layout_gives_what_one_device_gives(layout, name, finished):
    """The same samples, parameters within 1e-5 after three steps, weights cut, and only weights and
    sums are sent.
    """
    seen, folder = finished(layout, name)
    one = folder / "one" / name
    other = folder / layout / name
    assert samples(other) == samples(one)
    differences = {}
    for file in sorted((one / "model").rglob("*.safetensors")):
        expected = load_file(file)
        weights = load_file(other / file.relative_to(one))
        for tensor in expected.keys() - {"score.weight"}:  # divided by the samples' spread
            differences[tensor] = float(np.max(np.abs(weights[tensor] - expected[tensor])))
    sent = seen["collectives"]
    print(
        f"\n| {layout} | {name} | {max(differences.values()):.1e} | {sent} | {seen['seconds']:.0f} "
        "CPU s |"
    )
    assert {
        tensor: difference for tensor, difference in differences.items() if not difference <= 1e-5
    } == {}
    assert (seen["whole"] == []) == (layout != "data 8")
    for kind, most in zip(("all-gather", "all-reduce", "all-to-all"), MOST[layout], strict=True):
        assert sent.get(kind, 0) <= most, kind


def samples(run):
    lines = map(json.loads, (run / "samples.jsonl").read_text("utf-8").splitlines())
    return [(row["step"], row.get("prompt"), row.get("response")) for row in lines]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Data, a policy and a reward model."""
    monkeypatch.setattr(page, "write", lambda runs, path: None)
    demo.write(
        tmp_path / "data",
        sizes={"sft_data.json": 16, "preference_data.json": 16, "prompts.json": 16},
    )
    base(tmp_path, tmp_path / "data")
    return tmp_path


@pytest.mark.slow
def test_a_run_cuts_its_weights(folder, monkeypatch, capsys):
    """PPO on two groups of two devices: nothing is whole anywhere, and an update sends weights and
    sums alone.
    """
    setup._say_once.cache_clear()
    probe = Probe(monkeypatch)
    mesh = Mesh(-1, 2, 2)
    steps = replace(config(folder).rl, num_iterations=1, validation_fraction=0.0, batch_size=4)
    settings = {
        "model": str(folder / "policy"),
        "tokenizer": Tokenizer(),
        "mesh": mesh,
        "rl": steps,
    }
    done = run_ppo(config(folder, **settings, output_dir=str(folder / "run"), reward=("length",)))
    assert probe.whole == []
    assert (
        probe.laid_out == 4
    )  # the reference, the reward, which has no arrays, the trained parameters, the state
    assert set(probe.collectives) == {"all-gather", "all-reduce", "collective-permute"}
    assert "4 x cpu, data 1 x fsdp 2 x tensor 2, float32" in capsys.readouterr().out
    assert models.load(done.model_folder)[1]["h_0"]["mlp"]["up_proj"]["kernel"].shape == (16, 32)


@pytest.mark.parametrize(
    ("mesh", "batch_size", "message"),
    [
        (
            Mesh(-1, 1, 4),
            8,
            "mesh.tensor 4 does not divide the key and value heads of .*policy, 2; use 1 or 2",
        ),
        (Mesh(1, 4, 1), 6, "sft.batch_size 6 does not divide by 4 devices; use 4 or 8"),
        (
            Mesh(1, 2, 1),
            8,
            "mesh: data 1 x fsdp 2 x tensor 1 uses 2 of 4 devices; set one of the sizes to -1",
        ),
        (
            Mesh(1, 3, -1),
            8,
            "mesh: data 1 x fsdp 3 x tensor -1 does not fit 4 devices; take sizes whose product "
            "divides that number",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_anything_is_read(
    mesh, batch_size, message, folder, monkeypatch
):
    monkeypatch.setattr(models.hf, "load", None)
    monkeypatch.setattr(initial, "stage_rows", None)
    settings = replace(config(folder).sft, batch_size=batch_size)
    with pytest.raises(UserError, match=message):
        training.sft.run(
            config(
                folder, model=str(folder / "policy"), tokenizer=Tokenizer(), mesh=mesh, sft=settings
            )
        )


def cut_shapes(model, mesh):
    """The shapes of a model's parameters, with their places on a mesh."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    places = device_layout.shardings(mesh, shapes)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "in_loop", "before"),
    [slow((1, 4, 1), {}, {"all-gather": 9}), ((1, 2, 2), {"all-reduce": 6}, {"all-gather": 9})],
)
def test_weights_are_gathered_once_before_the_first_token(sizes, in_loop, before):
    """Nine are cut. Under ``tensor`` each token needs two sums a block, one of the embedding, three
    of the logits.
    """
    model = models.build(SMALL)
    mesh = mesh_of(*sizes)
    params = cut_shapes(model, mesh)
    prompts = jax.ShapeDtypeStruct((8, 6), "int32", sharding=sharding.rows(mesh))
    how = {"config": sampling.SamplingConfig(5, eos_id=1, pad_id=2), "mesh": mesh}
    generate = jax.jit(functools.partial(sampling.generate, model, **how))
    text = generate.lower(params, prompts, prompts, jax.random.key(0)).compile().as_text()
    inside, outside = collectives_by_loop(text)
    assert inside == in_loop
    assert {kind: outside.get(kind, 0) for kind in before} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "kv_heads", "in_loop", "gathered"),
    [
        ((1, 2, 2), 4, {"all-reduce": 6}, 2),
        ((1, 4, 1), 2, {}, 9),
    ],
)
def test_large_layers_are_cut_by_heads_while_they_are_sampled(
    sizes, kv_heads, in_loop, gathered, monkeypatch
):
    """Before the first token prompts and their mask are gathered, and weights only where the mesh
    does not divide the heads.
    """
    monkeypatch.setattr(sharded, "LARGE_LAYER", 1)
    model = models.build(replace(SMALL, num_kv_heads=kv_heads))
    params = perturbed(initial_params(model))
    prompts = np.random.default_rng(0).integers(3, 40, (8, 6), dtype=np.int32)
    how = {"config": sampling.SamplingConfig(5, eos_id=1, pad_id=2)}
    inputs = (prompts, np.ones_like(prompts))
    expected = sampling.generate(model, params, *inputs, jax.random.key(0), **how)
    mesh = mesh_of(*sizes)
    placed = jax.device_put(params, device_layout.shardings(mesh, params))
    arguments = (placed, *sharding.shard_rows(mesh, inputs), jax.random.key(0))
    generate = jax.jit(functools.partial(sampling.generate, model, **how, mesh=mesh))
    compiled = generate.lower(*arguments).compile()
    inside, outside = collectives_by_loop(compiled.as_text())
    assert inside == in_loop
    assert outside["all-gather"] == gathered
    sampled = compiled(*arguments)
    assert_array_equal(sampled.tokens, expected.tokens)
    assert_allclose(sampled.log_probs, expected.log_probs, atol=1e-5)
    assert sampled.tokens.sharding.is_equivalent_to(sharding.rows(mesh), 2)


def sent_by(function, config, *sizes):
    """The communication of a function of parameters and of 8 rows of 16 tokens, on four devices."""
    model = models.build(config)
    mesh = mesh_of(*sizes)
    params = cut_shapes(model, mesh)
    rows = jax.ShapeDtypeStruct((8, 16), "int32", sharding=sharding.rows(mesh))
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(function, model)).lower(params, rows).compile()
    return count_collectives(program.as_text())


def test_hidden_states_are_never_sent_under_fsdp():
    """Rows stay on their devices through the blocks and back: weights are sent, and sums of
    gradients.
    """
    config = replace(SMALL, num_layers=1)

    def gradient(model, *args):
        return jax.grad(lambda *args: (model.hidden(*args) ** 2).mean())(*args)

    assert set(sent_by(gradient, config, 1, 4)) <= {"all-gather", "all-reduce"}


@pytest.mark.parametrize(
    ("config", "sent"),
    [
        (models.LlamaConfig(40, 16, 16, 1, 4, intermediate_size=32), {"all-reduce": 3}),
        slow(models.GPT2Config(40, 16, 16, 1, 4), {"all-reduce": 3}),
    ],
)
def test_what_a_block_sends_under_tensor(config, sent):
    """A sum over the table's parts and two of the block (Shoeybi et al. 2019)."""
    assert sent_by(lambda model, *args: model.hidden(*args), config, 2, 1, 2) == sent


def test_tensor_cuts_gpt2_s_fused_kernel_by_heads():
    """A device holds queries, keys and values of the same heads; forward and back, no states are
    sent but sums.
    """
    model = models.build(models.GPT2Config(40, 16, 16, 1, 4, initializer_range=0.3))
    mesh = sharding.make_mesh(2, fsdp=1, tensor=2)
    params = initial_params(model)
    tokens = jax.device_put(np.arange(128).reshape(8, 16) % 40, sharding.rows(mesh))
    placed = jax.device_put(params, places := device_layout.shardings(mesh, params))
    whole, kernel = (tree["h_0"]["attn"]["c_attn"]["kernel"] for tree in (params, placed))
    for shard in kernel.addressable_shards:
        heads = slice(0, 2) if shard.index[2].start in (None, 0) else slice(2, 4)
        assert_array_equal(shard.data, whole.reshape(16, 3, 4, 4)[:, :, heads].reshape(16, 3, 8))
    function = jax.value_and_grad(lambda *args: (model.hidden(*args) ** 2).mean())
    with jax.set_mesh(mesh):
        program = jax.jit(function, out_shardings=(None, places)).lower(placed, tokens).compile()
    assert set(count_collectives(program.as_text())) == {"all-reduce", "all-gather"}
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather", program.as_text())
    assert sorted(gathered) == [
        "3,16",
        "64",
    ]  # the gradients of biases, of which each device has a copy
    for found, expected in zip(
        *map(jax.tree.leaves, (program(placed, tokens), jax.jit(function)(params, tokens))),
        strict=True,
    ):
        assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_a_vocabulary_that_does_not_divide_is_padded():
    """41 rows on 2 devices: halves of the width are held, 21 rows multiplied; nothing else differs
    from one device.
    """
    model = models.build(
        models.LlamaConfig(41, 16, 16, 1, 4, intermediate_size=32, initializer_range=0.3)
    )
    mesh = sharding.make_mesh(1, fsdp=2, tensor=2)
    params = initial_params(model)
    placed = jax.device_put(params, places := device_layout.shardings(mesh, params))
    tokens = jax.device_put(np.arange(128).reshape(8, 16) % 41, sharding.rows(mesh))
    assert {
        x["embedding"].addressable_shards[0].data.shape for x in (placed["wte"], placed["lm_head"])
    } == {(41, 4)}

    def loss(params, tokens):
        logits = model.apply(params, tokens)
        return (jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]).sum(), logits

    function = jax.value_and_grad(loss, has_aux=True)
    with jax.set_mesh(mesh):
        program = jax.jit(function, out_shardings=(None, places)).lower(placed, tokens).compile()
    assert re.search(
        r"f32\[\d+,21\]\S* (dot|custom-call|fusion)", program.as_text()
    )  # logits of half of 42 rows
    expected = jax.jit(function)(params, tokens)
    found = program(placed, tokens)
    assert found[0][1].shape == (8, 16, 41)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_allclose(ours, theirs, rtol=1e-5, atol=3e-5)
    outside, _ = program(placed, jax.device_put(np.full((8, 16), 41), sharding.rows(mesh)))
    assert np.isnan(outside[1]).all()  # not the zeros that the table is padded with


def test_an_updated_state_lies_where_it_was():
    """Whatever the update made of it."""
    mesh = sharding.make_mesh(1, fsdp=2, tensor=2)
    own = Layout(mesh)
    whole = functools.partial(jax.lax.with_sharding_constraint, shardings=sharding.replicated(mesh))
    update = own.jit_update(
        lambda state: (whole(jax.tree.map(lambda x: x + 1, state)), {"x": 0.0}), 1
    )
    state, _ = update(own.copy({"mlp": {"up_proj": {"kernel": np.ones((4, 4))}}}))
    assert whole_on_a_device(state) == []


def collectives_by_loop(text):
    """``count_collectives`` of what a program repeats, and of the rest."""
    blocks = re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \(.*\{)", text)
    named = {
        found[1]: block
        for block in blocks
        if (found := re.match(r"\s*(?:ENTRY )?%?([\w.-]+) \(", block))
    }
    repeated = set()
    waiting = re.findall(r"body=%?([\w.-]+)", text)
    while waiting:
        repeated.add(name := waiting.pop())
        called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", named[name])
        waiting += [other for other in called if other not in repeated]
    inside, outside = (
        "\n".join(named[x] for x in named if (x in repeated) == which) for which in (True, False)
    )
    return count_collectives(inside), count_collectives(outside)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "tolerance"), [(Mesh(-1, 2, 2), 0), (Mesh(1, 4, 1), 1e-6)])
def test_a_run_goes_on_in_another_layout(mesh, tolerance, folder, monkeypatch, capsys):
    """Bit for bit in its own; the run says which layout it had. ``tensor`` does not divide the
    vocabulary.
    """
    tokenizer = Tokenizer(vocab_size=301)
    first = config(folder, mesh=Mesh(-1, 2, 2), checkpoint_interval=1, tokenizer=tokenizer)
    first = replace(first, output_dir=str(folder / "whole"))
    first = replace(first, sft=replace(first.sft, num_epochs=2))
    whole = training.sft.run(first)
    settings = replace(first, output_dir=str(folder / "stopped"))
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(Killed):
            training.sft.run(settings)
    stopped = training.sft.run(replace(settings, mesh=mesh, resume=True))
    expected, weights = (
        load_file(done.model_folder / "model.safetensors") for done in (whole, stopped)
    )
    assert expected["transformer.wte.weight"].shape == (301, 16)
    for name, value in expected.items():
        assert_allclose(weights[name], value, rtol=0, atol=tolerance, err_msg=name)
    assert ("no longer bit for bit" in capsys.readouterr().out) == bool(tolerance)


def test_every_command_takes_a_mesh():
    assert all("mesh" in command.reads for command in STAGES.values())
    argv = ["--mesh.data", "1", "--mesh.fsdp", "-1"]
    assert parse(RunConfig, argv, sections=STAGES["ppo"].reads).mesh == Mesh(1, -1, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","))
