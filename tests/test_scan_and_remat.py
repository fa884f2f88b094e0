"""``compute.scan_layers`` and ``compute.remat``: auto by depth and memory, recorded, kept by
--resume.
"""

import dataclasses
import json
import types
from dataclasses import replace

import jax
import numpy as np
import pytest

from rlhf_jax import models, training
from rlhf_jax.config import (
    Compute,
    Network,
    RewardModelStage,
    RunConfig,
    Text,
    Tokenizer,
    to_yaml,
)
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.runs import devices
from rlhf_jax.training.common import initial, layout, memory, opening, remat
from rlhf_jax.training.common.layout import layout_of
from rlhf_jax.training.supervised import scoring


def a_run(tmp_path, resumed=False, text=""):
    (tmp_path / "config.yaml").write_text(text)
    return types.SimpleNamespace(
        resumed=resumed,
        path=tmp_path,
        config=tmp_path / "config.yaml",
        checkpoints=tmp_path / "checkpoints",
    )


def of_depth(layers, **compute):
    return RunConfig(network=Network(num_layers=layers), compute=Compute(**compute))


@pytest.mark.parametrize(
    ("layers", "given", "chosen"),
    [(7, "auto", False), (8, "auto", True), (8, False, False), (7, True, True)],
)
def test_layers_are_scanned_by_depth_unless_it_is_said(tmp_path, layers, given, chosen):
    config = opening._decided(of_depth(layers, scan_layers=given), "ppo", a_run(tmp_path))
    assert config.compute == Compute(scan_layers=chosen)
    assert initial.compute_options(config.compute, 2)["scan_layers"] is chosen
    assert initial.compute_options(Compute(scan_layers=given), layers)["scan_layers"] is chosen


def test_a_resumed_run_keeps_what_is_recorded_where_nothing_is_said(tmp_path):
    text = to_yaml(of_depth(8, scan_layers=False, remat=True))
    run = a_run(tmp_path, True, text)
    assert opening._decided(of_depth(8), "ppo", run).compute == Compute(
        scan_layers=False, remat=True
    )
    said = of_depth(8, scan_layers=True, remat=False)
    assert opening._decided(said, "ppo", run).compute == said.compute
    undecided = a_run(tmp_path, True, to_yaml(of_depth(8)))
    assert opening._decided(of_depth(8), "ppo", undecided).compute == Compute(scan_layers=True)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "compute: 3",
        "compute: {remat: maybe}",
        ": [",
        "rl: {optimizer: {learning_rate: .nan}}",
        "rl: {optimizer: {learning_rate: -1.0}}",
        "rl: {optimizer: {learning_rate: high}}",
    ],
)
def test_a_damaged_record_is_left_to_who_compares_it(tmp_path, text):
    decided = opening._decided(of_depth(8), "ppo", a_run(tmp_path, True, text))
    assert decided.compute == Compute(scan_layers=True)
    assert decided.rl == RunConfig().rl


@pytest.mark.parametrize(
    ("layers", "share", "given", "chosen"),
    [
        (8, 1.1, "auto", True),
        (8, 1.12, "auto", False),
        (7, 1.1, "auto", False),
        (8, 1.12, True, True),
        (8, 1.1, False, False),
    ],
)
def test_remat_by_depth_and_memory_is_recorded(
    tmp_path, monkeypatch, capsys, layers, share, given, chosen
):
    network = models.GPT2Config(64, 32, 8, layers, 2, remat=given is True)
    begun = LanguageModel(models.build(network), {}, None)
    stored = remat.stored(network, 4, 32)
    monkeypatch.setattr(devices, "free_memory", lambda: share * stored)
    monkeypatch.setattr(remat, "temporaries", lambda *inputs: stored)
    config = of_depth(layers, remat=given, scan_layers=True)
    own = opening.OpenRun("sft", a_run(tmp_path), config, layout_of(config))
    own, begun = remat.choose(own, begun, 4 * own.layout.num_parts, 32)
    compute = own.config.compute
    assert compute.remat is chosen
    assert begun.model.config.remat is chosen
    recorded = (tmp_path / "config.yaml").read_text()
    assert recorded == (to_yaml(replace(config, compute=compute)) if given == "auto" else "")
    lines = [line for line in capsys.readouterr().out.splitlines() if "remat" in line]
    is_said = given == "auto" and layers == 8
    assert [line.partition(" (")[0] for line in lines] == is_said * [
        f"compute: scan_layers true, remat {chosen}".lower()
    ]


def test_the_memory_of_a_device_decides_nothing_with_blocks(tmp_path, monkeypatch):
    """On another device the bits would be others."""
    network = models.GPT2Config(64, 32, 8, 8, 2)
    begun = LanguageModel(models.build(network), {}, None)
    monkeypatch.setattr(devices, "free_memory", lambda: 1)
    config = of_depth(8, blocks=8)
    own = opening.OpenRun("sft", a_run(tmp_path), config, layout_of(config))
    own, _ = remat.choose(own, begun, 32, 32)
    assert own.config.compute.remat is False


@pytest.mark.parametrize(
    ("layers", "longest", "steps", "given", "multiple"),
    [
        (7, 200, 20, 16, 16),
        (8, 200, 20, 16, 40),  # five widths: four would end at 224
        (8, 512, 0, 16, 128),
        (8, 512, 64, 16, 64),  # eight
        (8, 512, 2000, 16, 16),
        (8, 512, 20, 300, 300),
    ],
)
def test_a_deep_model_has_few_widths(layers, longest, steps, given, multiple):
    text = Text(bucket_multiple=given)
    assert (
        initial.bucket_multiple(text, layers=layers, longest=longest, num_steps=steps) == multiple
    )


@pytest.mark.slow
def test_batches_of_a_deep_model_are_of_few_widths(tmp_path, monkeypatch):
    """What a stage trains on, and what a reward model validates on, is padded alike."""
    rows = [{"prompt": "a" * n, "chosen": "bc", "rejected": "b"} for n in range(1, 99)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    widths = set()

    def score_rows(score, comparisons, rows, *, bucket_multiple, **options):
        widths.add(bucket_multiple)
        return np.zeros((len(rows), 2))

    def jit_update(self, update, num_blocks):
        def record(state, batch, key, **functions):
            widths.add(batch.tokens.shape[-1])
            return state, {"nonfinite": 0.0}

        return record

    monkeypatch.setattr(scoring, "score_rows", score_rows)
    monkeypatch.setattr(memory, "check", lambda *args: None)
    monkeypatch.setattr(layout.Layout, "jit_update", jit_update)
    config = RunConfig(
        data=(str(tmp_path / "rows.json"),),
        output_dir=str(tmp_path / "run"),
        network=Network(max_length=128, hidden_size=8, num_heads=1, num_layers=8),
        tokenizer=Tokenizer(kind="characters"),
        reward_model=RewardModelStage(batch_size=4, num_epochs=1),
    )
    training.reward_model.run(config)
    assert widths == {24, 48, 72, 96, 120}


def test_what_an_update_stores():
    network = models.GPT2Config(64, 32, 8, 3, 2)
    assert remat.stored(network, 5, 32) == 3 * 5 * 32 * (80 + 4 * 32 + 2 * 2 * 32) * 4


ROOM = remat.Room(free=100.0, to_come=50.0)  # a tenth stays free: 40 are left


@pytest.mark.parametrize(
    ("room", "stored", "compiled", "expected"),
    [
        (ROOM, 20, None, False),
        (ROOM, 80, None, True),
        (ROOM, 39, 41, True),  # within a quarter: the compiled program decides
        (ROOM, 41, 40, False),
        (ROOM, 32.1, 90, True),
        (ROOM, 31.9, None, False),
        (ROOM._replace(to_come=95.0), 1, None, True),
        (remat.Room(0, 50.0), 1e9, None, False),
    ],
)
def test_recomputing_is_chosen_by_what_fits(room, stored, compiled, expected):
    asked = []

    def of_program():
        asked.append(compiled)
        return compiled

    assert remat.wants_remat(room, stored, of_program) is expected
    assert asked == ([] if compiled is None else [compiled])


@pytest.mark.parametrize(
    ("stored", "rows", "factor"), [(40, 8, 1), (41, 8, 2), (300, 8, 8), (300, 4, None)]
)
def test_the_microbatches_that_need_no_recomputing(stored, rows, factor):
    assert remat.more_microbatches(ROOM, stored, rows) == factor
    said = remat.reason(ROOM, stored, rows, remat=True)
    assert (f"with {factor} times as many microbatches" in said) == (factor is not None)
    assert "saves a quarter" in remat.reason(ROOM, stored, rows, remat=False)


def test_a_model_of_135_million_parameters_recomputes_nothing_with_24_gb():
    """SmolLM2-135M as a reward model of 16 pairs of 112 tokens: 5.6 GiB stored, 2.5 of arrays."""
    network = models.LlamaConfig(
        49152, 8192, 576, 30, num_heads=9, num_kv_heads=3, intermediate_size=1536
    )
    stored = remat.stored(network, 32, 112)
    assert stored == 30 * 32 * 112 * (10 * 576 + 4 * 1536 + 2 * 9 * 112) * 4
    room = remat.Room(20e9, remat.COPIES * 4 * 134_515_008)
    assert not remat.wants_remat(room, stored, None)
    assert remat.wants_remat(room._replace(free=6e9), stored, None)


@pytest.mark.slow
def test_a_compiled_gradient_takes_less_where_it_recomputes():
    network = models.GPT2Config(64, 32, 32, 8, 2, scan_layers=True)
    model = models.build(network)
    params = jax.eval_shape(model.init, jax.random.key(0))
    recomputing = models.build(dataclasses.replace(network, remat=True))
    inputs = (params, 16, 32, None)
    stores = remat.temporaries(model, *inputs)
    assert stores > 2 * remat.temporaries(recomputing, *inputs)
    assert stores == pytest.approx(remat.stored(network, 16, 32), rel=0.4)


def test_the_memory_of_this_machine():
    total = devices.memory_limit()
    assert 0 < devices.free_memory() < total < 2**50


@pytest.mark.parametrize(
    ("available", "limit", "free"),
    [(64, "max", 64), (64, "32768", 20), (8, "32768", 8), (64, "4096", 1 / 1024), (None, None, 0)],
)
def test_memory_is_free_as_system_and_container_say(tmp_path, monkeypatch, available, limit, free):
    """In KiB. Of 16 that the container uses 4 are pages of files, and a 32nd of what is free
    stays.
    """
    monkeypatch.setattr(devices, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    if available is not None:
        lines = f"MemTotal: 128 kB\nMemFree: 1 kB\nMemAvailable:   {available} kB\n"
        (tmp_path / "meminfo").write_text(lines)
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(str(16 * 1024))
        stat = "file 9999\nactive_file 1024\ninactive_file 3072\ninactive_file_x 5\n"
        (tmp_path / "memory.stat").write_text(stat)
    share = free * 1024 * 31 / 32
    assert devices.free_memory() == int(share) // jax.local_device_count()
