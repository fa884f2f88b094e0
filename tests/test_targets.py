"""What a compiled program does is read off its text as one counts it by hand; targets have
names.
"""

import collections
import json
import re

import jax
import jax.numpy as jnp
import pytest
from builders import script
from jax.sharding import PartitionSpec

from rlhf_jax.errors import UserError

accelerators, hlo, targets = (
    script(f"benchmarks/{name}.py") for name in ("accelerators", "hlo", "targets")
)

# A product of [4, 8] and [8, 2], twice in a loop of 3 turns, and a loop whose end XLA does not
# know.
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (param_0: f32[4,8], param_1: f32[1,8], param_2: s32[]) -> f32[4,8] {
  %param_0 = f32[4,8]{1,0} parameter(0)
  %param_1 = f32[1,8]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  ROOT %dus = f32[4,8]{1,0} dynamic-update-slice(%param_0, %param_1, %param_2, %param_2)
}

%sliced (param_0.1: bf16[16,8], param_1.1: s32[]) -> bf16[1,8] {
  %param_0.1 = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[] parameter(1)
  ROOT %slice = bf16[1,8]{1,0} dynamic-slice(%param_0.1, %param_1.1, %param_1.1)
}

%known (p: (f32[4,8], s32[])) -> (f32[4,8], s32[]) {
  %p = (f32[4,8]{1,0}, s32[]) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=0
  %i = s32[] get-tuple-element(%p), index=1
  %all-reduce = f32[4,8]{1,0} all-reduce(%x), replica_groups={}
  ROOT %t = (f32[4,8]{1,0}, s32[]) tuple(%all-reduce, %i)
}

%c (p.1: (f32[4,8], s32[])) -> pred[] {
  %p.1 = (f32[4,8]{1,0}, s32[]) parameter(0)
  %bound = s32[] constant(3)
  %i.1 = s32[] get-tuple-element(%p.1), index=1
  ROOT %less = pred[] fusion(%i.1, %bound), kind=kLoop, calls=%compared
}

%e (q.1: (f32[4,8], f32[1,8], s32[])) -> pred[] {
  %q.1 = (f32[4,8]{1,0}, f32[1,8]{1,0}, s32[]) parameter(0)
  %y.1 = f32[4,8]{1,0} get-tuple-element(%q.1), index=0
  %zero = f32[] constant(0)
  %sum = f32[] reduce(%y.1, %zero), dimensions={0,1}, to_apply=%add
  %nine = f32[] constant(9)
  ROOT %lt = pred[] compare(%sum, %nine), direction=LT
}

%until (q: (f32[4,8], f32[1,8], s32[])) -> (f32[4,8], f32[1,8], s32[]) {
  %q = (f32[4,8]{1,0}, f32[1,8]{1,0}, s32[]) parameter(0)
  %y = f32[4,8]{1,0} get-tuple-element(%q), index=0
  %row = f32[1,8]{1,0} get-tuple-element(%q), index=1
  %j = s32[] get-tuple-element(%q), index=2
  %table = bf16[16,8]{1,0} get-tuple-element(%q), index=3
  %set = f32[4,8]{1,0} fusion(%y, %row, %j), kind=kLoop, calls=%fused
  %cut = bf16[1,8]{1,0} fusion(%table, %j), kind=kLoop, calls=%sliced
  ROOT %u = (f32[4,8]{1,0}, f32[1,8]{1,0}, s32[]) tuple(%set, %row, %j)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = (f32[4,8]{1,0}, s32[]) while(%a), condition=%c, body=%known, \
backend_config={"known_trip_count":{"n":"3"}}
  %d = (f32[4,8]{1,0}, f32[1,8]{1,0}, s32[]) while(%b), condition=%e, body=%until
  ROOT %copy = f32[4,8]{1,0} copy(%a)
}
"""


def test_work_counts_kernels_bytes_and_collectives_in_loops():
    read = hlo.work(PROGRAM, turns=10)
    assert read.in_loop == 2
    assert read.kernels == 3 + 10 * 2 + 1
    assert read.collectives == collections.Counter({"all-reduce": 3})
    # The all-reduce reads and writes 128 bytes, and so does the copy. A turn of the second loop
    # reads a row (32 bytes) and its place (4) and writes the row there (32); then it reads the
    # place (4) and one row of a table (16), and writes that row (16).
    update = 32 + 4 + 32
    cut = 4 + 16 + 16
    assert read.bytes == 3 * 256 + 10 * (update + cut) + 256


# A loop as XLA:TPU writes it, whose turns stand in its condition: from 2 up to 13, by 3.
COUNTED = """HloModule jit_g, is_scheduled=true

%below (b: (bf16[8,128], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(13)
  %b = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%b), index=1
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

%turn (b.1: (bf16[8,128], s32[])) -> (bf16[8,128], s32[]) {
  %b.1 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %n.1 = s32[]{:T(128)} get-tuple-element(%b.1), index=1
  %copied = s32[]{:T(128)} copy(%n.1)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%b.1), index=0
  %more = s32[]{:T(128)} add(%copied, %three), backend_config={"flag_configs":[]}
  %twice = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} add(%x, %x)
  ROOT %both = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) tuple(%twice, %more)
}

ENTRY %main (a: bf16[8,128]) -> (bf16[8,128], s32[]) {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %begin = s32[]{:T(128)} copy(%two)
  %given = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) tuple(%a, %begin)
  ROOT %loop = (bf16[8,128]{1,0}, s32[]{:T(128)}) while(%given), condition=%below, body=%turn
}
"""


def test_turns_of_a_loop_are_those_of_its_counter():
    read = hlo.work(COUNTED, turns=None)
    assert read.unknown == 0
    of_a_turn = 3  # the copy of the counter and two sums
    assert read.kernels == 4 * of_a_turn + 1
    assert read.in_loop == 0


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("direction=LT", "direction=NE"),
        ("s32[]{:T(128)} constant(13)", "s32[]{:T(128)} get-tuple-element(%b), index=1"),
        ("s32[]{:T(128)} constant(2)", "s32[]{:T(128)} parameter(1)"),
        ("s32[]{:T(128)} constant(3)", "s32[]{:T(128)} get-tuple-element(%b.1), index=1"),
        ("add(%copied, %three)", "multiply(%copied, %three)"),
        ("copy(%n.1)", "add(%n.1, %three)"),
        ("tuple(%a, %begin)", "custom-call(%a, %begin)"),
    ],
)
def test_a_loop_that_does_not_count_is_of_unknown_length(text, other):
    assert text in COUNTED
    assert hlo.work(COUNTED.replace(text, other), turns=None).unknown == 1


def test_a_plan_says_what_it_could_not_count():
    read = hlo.work(PROGRAM, turns=None)
    assert read.kernels == 3 + 2 + 1
    said = accelerators.Figures(read, 1e12, 1.0, {}).lines("learn")
    assert said[-1] == "  these are lower bounds: 1 loop of unknown length is counted as one turn"


def test_custom_calls_are_counted_by_name():
    lines = [f'  %x = f32[2] custom-call(), custom_call_target="{name}"' for name in "aab"]
    assert hlo.custom_calls("\n".join(lines)) == {"a": 2, "b": 1}


def test_flops_are_those_of_the_products_times_the_turns_of_their_loops():
    weights = jnp.ones((8, 8))

    def step(x, _):
        return x @ weights, None

    def program(x):
        x, _ = jax.lax.scan(step, x, length=3)
        x = jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ weights, x)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ weights, x)

    traced = jax.make_jaxpr(program)(jnp.ones((4, 8)))
    product = 2 * 4 * 8 * 8
    assert hlo.flops(traced.jaxpr, turns=5) == (3 + 5 + 1) * product


def test_flops_under_shard_map_are_those_of_all_devices():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    rows = PartitionSpec("data")
    mapped = jax.shard_map(lambda x: x @ jnp.ones((8, 8)), mesh=mesh, in_specs=rows, out_specs=rows)
    traced = jax.make_jaxpr(mapped)(jnp.ones((4, 8)))
    assert hlo.flops(traced.jaxpr, turns=1) == 2 * 4 * 8 * 8


@pytest.mark.parametrize("name", ["h200", "b200x8", "v5e-3", "v7x-8", "x8"])
def test_a_target_that_nobody_knows(name):
    with pytest.raises(UserError, match=f"--target {name}: not known; there are h200x8"):
        targets.find(name)


@pytest.mark.parametrize(("name", "extra"), [("h200x8", "cuda12"), ("v5e-8", "tpu")])
def test_a_missing_compiler_is_named_with_what_installs_it(name, extra, monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=rf"pip install 'rlhf-jax\[{extra}\]' brings it"):
        targets.find(name)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("h200x8", {"platform": "cuda", "topology": "1x8x1"}),
        ("v5p-16", {"platform": "tpu", "topology_name": "v5p:2x2x2"}),
    ],
)
def test_a_target_has_the_figures_of_its_kind(name, call, monkeypatch):
    asked = {}

    class Topology:
        devices = jax.devices()

    def topology(**given):
        asked.update(given)
        return Topology

    monkeypatch.setattr(targets.topologies, "get_topology_desc", topology)
    target = targets.find(name)
    assert call.items() <= asked.items()
    kind = targets.FIGURES["gpus"]["h200"] if call["platform"] == "cuda" else None
    figures = kind or targets.FIGURES["tpus"]["v5p"]
    assert target.memory == figures["device_memory_size"]
    assert (target.flops, target.bandwidth) == (figures["flops"], figures["memory_bandwidth"])
    if kind:
        assert "core_count: 132" in asked["target_config"]


def test_one_chip_is_one_of_a_slice_that_is_there(monkeypatch):
    """XLA describes no slice of less than four chips."""
    asked = {}

    class Topology:
        devices = jax.devices()[:4]

    def topology(**given):
        asked.update(given)
        return Topology

    monkeypatch.setattr(targets.topologies, "get_topology_desc", topology)
    assert targets.find("v5e-1").devices == jax.devices()[:1]
    assert asked["topology_name"] == "v5e:2x2"


def fake_target(monkeypatch, memory):
    """This machine's devices under the name of an accelerator."""
    target = targets.Target("h200x8", "cpu", jax.devices()[:2], memory, 1e12, 1e9)
    monkeypatch.setattr(targets, "find", lambda name: target)


@pytest.mark.slow
def test_plan_for_a_target_prints_what_its_compiler_says(tmp_path, capsys, monkeypatch):
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    fake_target(monkeypatch, memory=2**30)
    flags = ["--model", str(tmp_path), "--rl.max-prompt-length", "8", "--rl.max-new-tokens", "4"]
    flags += ["--rl.batch-size", "4", "--rloo.group-size", "2", "--reward", "length"]
    flags += ["--mesh.fsdp", "2"]
    accelerators.main(["rloo", "--target", "h200x8", *flags])
    text = capsys.readouterr().out
    assert "rloo on h200x8, on each device: compiled by its compiler, not run" in text
    for phase in ("sample and score", "learn"):
        assert f"phase '{phase}': " in text
        assert re.search(rf"compiling the phase '{phase}' for h200x8\ncompiled in \d+ s\n", text)
    assert "of them for each token" in text
    assert "all-gather" in text
    assert "fits in 1.000 GiB" in text
