"""``benchmarks/bench.py``: what it counts, and that both programs compute the same."""

import contextlib
import json
import runpy
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import ROOT, script, slow, soak

from rlhf_jax import models
from rlhf_jax.errors import UserError

bench, figures, opponent, steps = (
    script(f"benchmarks/{name}.py") for name in ("bench", "figures", "opponent", "steps")
)

KEYS = (
    "median_s",
    "min_s",
    "max_s",
    "tokens_per_s",
    "compile_cold_s",
    "compile_warm_s",
    "page_faults",
    "flops_share",
)


def test_operations_of_products_are_counted_through_loops_and_derivatives():
    x = jnp.ones((3, 5))
    assert figures.matmul_flops(jax.make_jaxpr(lambda x: x @ x.T)(x).jaxpr) == 2 * 3 * 5 * 3

    def loop(x):
        y, _ = jax.lax.scan(
            lambda carry, _: (jax.checkpoint(lambda c: c @ jnp.ones((5, 5)))(carry), None),
            x,
            length=7,
        )
        return jax.lax.while_loop(lambda c: jnp.sum(c) < 0, lambda c: c @ jnp.ones((5, 5)), y)

    product = 2 * 3 * 5 * 5
    assert (
        figures.matmul_flops(jax.make_jaxpr(jax.jit(loop))(x).jaxpr, trips=4) == (7 + 4) * product
    )


SMALL = steps.Preset(models.GPT2Config(11, 16, 8, 1, 2), batch=4, prompt=3, response=4)


@pytest.mark.parametrize(
    ("name", "passes", "columns"),
    [("sft", 3, 7), ("reward", 3, 0), ("dpo", 4, 7), ("grpo", 3, 4), ("vpg", 3, 4)],
)
def test_operations_of_a_network_by_hand(name, passes, columns):
    """12 x 8 x 8 weights in the block, 8 x 11 in the output layer, half of 7 x 7 pairs twice."""
    of_pass = 2 * 4 * (7 * 12 * 8 * 8 + columns * 8 * 11 + 8 * 7 * 7)
    assert figures.model_flops(name, SMALL) == passes * of_pass


def test_bytes_of_decoding_by_hand():
    """Weights of 93 numbers; keys and values of 4 rows and 3 + 4 / 2 columns on the mean."""
    policy = {"wte": {"embedding": jnp.zeros((11, 8))}, "ln_f": jnp.zeros(5)}
    read = 4 * (93 + 2 * 8 * 4 * 5) * 4
    assert figures.decode_bytes(policy, SMALL) == read
    apart = policy | {"lm_head": {"embedding": jnp.zeros((11, 8))}}
    assert figures.decode_bytes(apart, SMALL) == read
    short = SMALL._replace(model=replace(SMALL.model, compute_dtype="bfloat16"))
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), policy)
    assert figures.decode_bytes(halved, short) == read / 2


def test_published_peaks_are_those_of_the_card():
    h100, _ = figures.published("NVIDIA H100 80GB HBM3", "bfloat16")
    assert h100 == (989e12, 3.35232e12)
    assert figures.published("TPU v6 lite", "bfloat16")[0] == (918e12, 1.64e12)
    nothing, reason = figures.published("cpu", "bfloat16")
    assert nothing is None
    assert "peaks of cpu" in reason
    assert figures.published("NVIDIA H200", "float32") == (
        None,
        "the published peaks are those of --dtype bfloat16",
    )


def test_shares_of_both_peaks_or_the_reason(monkeypatch):
    monkeypatch.setattr(figures, "measured_peaks", lambda dtype: figures.Peaks(1e9, 1e6))
    policy = {"wte": {"embedding": jnp.zeros((11, 8))}, "ln_f": jnp.zeros(5)}
    work = figures.model_flops("sft", SMALL)
    line = figures.of_step("sft", SMALL, None, 0.5)
    assert line["mfu_measured"] == work / 0.5 / 1e9
    assert line["left_out"] == {"mfu": "the published peaks are those of --dtype bfloat16"}
    monkeypatch.setattr(figures, "published", lambda *_: (figures.Peaks(2e9, 4e6), ""))
    line = figures.of_step("sft", SMALL, None, 0.5)
    assert line["mfu"] == work / 0.5 / 2e9
    assert "left_out" not in line
    line = figures.of_step("rollout", SMALL, policy, 0.5)
    assert line["ms_per_token"] == 125
    assert line["bandwidth_share"] == figures.decode_bytes(policy, SMALL) / 0.5 / 1e6
    assert line["bandwidth_share_published"] == line["bandwidth_share"] / 4
    assert line["left_out"] == {"mfu": "a step of rollout is not passes of one network"}


def test_a_preset_has_the_published_size():
    """Each layer of 24 adds the same."""
    preset = steps.PRESETS["qwen2.5-0.5b"]
    one, two = (
        preset._replace(model=replace(preset.model, num_layers=number)).num_parameters
        for number in (1, 2)
    )
    assert one + (preset.model.num_layers - 1) * (two - one) == 494_032_768


def test_sizes_replace_those_of_the_preset():
    preset = steps.PRESETS["gpt2-tiny"]

    def sized(name, microbatches=1, **given):
        return bench.sized(name, preset, "bfloat16", given, microbatches)

    longer = sized("sft", 2, batch=6, prompt=1, response=1500)
    assert longer[1:] == (6, 1, 1500, 2)
    assert longer.model == replace(preset.model, compute_dtype="bfloat16", max_length=1501)
    assert sized("rollout", batch=3, prompt=None, response=2)[1:] == (3, 8, 2, 1)
    whole = steps.PRESETS["gpt2"]
    assert bench.sized("rollout", whole, "float32", {}, 1) == whole


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("sft", "--rows 0", "batch: must be at least 1"),
        ("sft", "--microbatches 0", "microbatches: must be at least 1"),
        ("dpo", "--microbatches 2", "dpo has none here; sft and grpo have"),
        ("dpo", "--rows 5", "--rows 5: dpo needs a multiple of 2"),
        ("grpo", "--rows 12 --microbatches 2", "--rows 12: grpo needs a multiple of 8"),
        ("sft", "--against trl --dtype bfloat16", "take --against hand or transformers"),
        ("sft", "--against trl --preset llama-1b-tiny", "GPT-2 in float32 on a CPU"),
    ],
)
def test_sizes_that_do_not_fit_are_a_sentence(name, flags, message):
    with pytest.raises(UserError, match=message):
        bench.main([name, "--preset", "gpt2-tiny", *flags.split()])


@pytest.mark.parametrize(
    ("backend", "kind", "message"),
    [("tpu", "hand", "not on a TPU"), ("gpu", "trl", "on a CPU"), ("gpu", "hand", None)],
)
def test_an_opponent_is_on_the_same_device(backend, kind, message, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    if message is None:
        opponent.check_kind(kind, SMALL)
        return
    with pytest.raises(UserError, match=message):
        opponent.check_kind(kind, SMALL)


def test_an_opponent_is_given_the_same_tokens(monkeypatch):
    started = []

    def start(command, **options):
        started.extend(command)
        return SimpleNamespace(communicate=lambda: None)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(opponent, "MOST_SHARED", 0)  # a slow test shares weights
    with contextlib.closing(opponent.Opponent("trl", "reward", SMALL, "shared")):
        _, file, shared, *words = started
        given = np.load(shared)
        key = jax.random.split(jax.random.key(0), 4)[1]
        tokens = jax.random.randint(key, (4, 7), 2, 11, jnp.int32)
        np.testing.assert_array_equal(given["tokens"], tokens)
        assert json.loads(str(given["config"]))["family"] == "GPT2Config"
    assert file == str(ROOT / "benchmarks" / "trl_steps.py")
    assert Path(file).is_file()
    assert words == ["--bench", "reward", "--kind", "trl", "--value", "shared"]


@pytest.mark.parametrize("name", ["blocks", "depth", "programs"])
def test_a_script_finds_what_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    assert "main" in runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "share"), [("reward", 32, "flops_share"), ("rollout", 16, "bandwidth_share")]
)
def test_one_line_of_json_has_what_was_measured(name, tokens, share, capsys):
    bench.main([name, "--preset", "char-nano"])
    line = json.loads(capsys.readouterr().out)
    assert all(line[key] >= 0 for key in KEYS)
    assert line["min_s"] <= line["median_s"] <= line["max_s"]
    assert line["tokens_per_s"] == pytest.approx(32 * tokens / line["median_s"])
    assert line[share] > 0
    assert line["planned_memory_mb"] > 0
    reason = line["left_out"]["mfu" if name == "reward" else "bandwidth_share_published"]
    assert reason == "the published peaks are those of --dtype bfloat16"


@pytest.mark.parametrize(
    ("argv", "message"), [(["--preset", "no"], "char-nano"), (["--calls", "4"], "at least 5")]
)
def test_wrong_flags_are_named(argv, message):
    with pytest.raises(UserError, match=message):
        bench.main(["sft", *argv])


WORK = [("hand", name, "shared") for name in ("sft", "reward", "dpo", "grpo", "vpg", "rollout")]
WORK += [("hand", "iteration", "shared"), soak("hand", "iteration", "separate")]
# Their losses are the code of "hand"; these three show what is the library's own.
WORK += [("transformers", name, "shared") for name in ("sft", "reward", "rollout")]
WORK += [("trl", name, "shared") for name in ("sft", "reward", "dpo", "grpo")] + [
    ("trl", "iteration", "separate")
]


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "name", "value"), WORK)
def test_torch_does_the_same_work(kind, name, value):
    if kind == "trl":
        pytest.importorskip("trl.experimental.ppo")  # of the TRL of the extra "benchmarks"
    other = opponent.Opponent(kind, name, steps.PRESETS["char-nano"], value)
    other.agree()
    other.turn()
    assert other.seconds[0] > 0
    other.close()


@pytest.mark.parity
def test_microbatches_of_torch_are_those_of_a_llama():
    preset = steps.PRESETS["llama-1b-tiny"]._replace(num_microbatches=2)
    other = opponent.Opponent("hand", "sft", preset, "shared")
    other.agree()
    other.close()


@pytest.mark.parity
def test_hand_written_torch_samples_by_the_softmax():
    import torch

    torch_steps = script("benchmarks/torch_steps.py")
    torch.manual_seed(0)
    sizes = {"vocab_size": 5, "max_length": 3, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    model = torch_steps.GPT2(sizes)
    prompt = torch.ones((20_000, 2), dtype=torch.long)
    tokens = model.generate(prompt, 1, greedy=False)
    counts = torch.bincount(tokens[:, 2], minlength=5)
    expected = model.logits(model.hidden(prompt[:1])[0, -1]).softmax(-1)
    assert torch.equal(tokens[:, :2], prompt)
    torch.testing.assert_close(counts / len(prompt), expected, atol=0.015, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_blocks"), [("rollout", 5), slow("sft", 2), slow("grpo", 2), slow("iteration", 2)]
)
def test_a_step_is_compiled_as_in_a_run(name, num_blocks, monkeypatch):
    """Under ``scan_layers``, where all but sampling has two blocks."""
    monkeypatch.setattr(
        steps.devices, "compiler_options", lambda num_blocks: {f"xla_of_{num_blocks}_blocks": True}
    )
    preset = steps.PRESETS["char-nano"]
    work = steps.work(
        name,
        preset._replace(model=replace(preset.model, num_layers=5, scan_layers=True)),
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"'xla_of_{num_blocks}_blocks'"):
        work.compile()


def test_exponents_are_slopes_and_one_size_is_changed():
    growth, table = (script(f"benchmarks/{name}.py") for name in ("growth", "table"))
    assert growth.exponent((1, 2, 4), (3.0, 12.0, 48.0)) == pytest.approx(2)
    small = steps.PRESETS["char-small"]
    for size, changed in {
        "batch": (96, 64, 48),
        "response": (64, 64, 96),
        "depth": (64, 64, 48),
    }.items():
        preset = growth.scaled(size, 96)
        assert preset[1:4] == changed
        assert preset.model.max_length == preset.prompt + preset.response
        assert preset.model.num_layers == (96 if size == "depth" else 4)
        assert preset.model.hidden_size == 128
    assert growth.scaled("vocabulary", 9).model == replace(small.model, vocab_size=9)
    names = {command.split()[0] for command, *_ in table.ROWS}
    assert names == {"rollout", "reward", "sft", "iteration", "dpo", "grpo", "vpg", "startup"}


def test_a_row_of_the_table(monkeypatch):
    table = script("benchmarks/table.py")
    line = {
        "bench": "sft",
        "others_cpu": 0.01,
        "median_s": 0.5,
        "against_median_s": 0.75,
        "ratio": 1.5,
        "flops_share": 0.4,
    }

    ran = []

    def said(**changed):
        done = subprocess.CompletedProcess([], 0, f"a warning\n{json.dumps(line | changed)}\n")
        monkeypatch.setattr(
            subprocess, "run", lambda command, **options: ran.append(command) or done
        )
        return table.row("sft --against trl", 2.0, 1.4)

    assert said() == "| `sft --against trl` | 0.500 s | 0.750 s | **1.50** | 2.0 | 1.4 | 40% |"
    assert "| refused, 0.500 s |" in said(others_cpu=0.03)
    _, file, *words = ran[0]
    assert file == str(ROOT / "benchmarks" / "bench.py")
    assert words == ["sft", "--against", "trl"]


@pytest.mark.slow
def test_a_separate_value_model_is_timed_as_a_run_trains_it():
    preset = steps.Preset(models.GPT2Config(11, 16, 16, 1, 2), batch=4, prompt=3, response=4)
    work = steps.work("iteration", preset, "separate")
    assert work.carry.train.opt_state.inner_states.keys() == {
        "policy",
        "value",
    }  # as training.critic makes them
    after, _ = jax.eval_shape(work.step, work.carry, work.data)
    assert jax.tree.structure(after) == jax.tree.structure(work.carry)


@pytest.mark.parametrize(("others", "code"), [(0.02, 0), (None, 0), (0.375, 1)])
def test_an_exit_code_of_1_says_why(others, code, capsys, monkeypatch):
    line = {"others_cpu": others}
    monkeypatch.setattr(bench.tyro, "cli", lambda function, args: line)
    assert bench.main(["sft"]) == code
    said = capsys.readouterr()
    assert json.loads(said.out) == line
    assert ("other programs used 38% of the machine" in said.err) == bool(code)
