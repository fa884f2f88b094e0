"""The run's own programs, compiled for accelerators that are not here: they compile, they give the
state's memory back, attention is fused, and they do no more than goldens/accelerators.json says.

    pytest -m accelerator                 # .ci/run says which packages it needs
    python tests/test_accelerators.py     # writes the golden anew

The golden's figures are those of the jax version that it names; other versions may do a tenth more.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from builders import script, soak

from rlhf_jax.algorithms import grpo, ppo
from rlhf_jax.cli.planning import shapes
from rlhf_jax.config import (
    Compute,
    DPOStage,
    KTOStage,
    Mesh,
    Network,
    RewardModelStage,
    RLStage,
    RunConfig,
    SFTStage,
    Tokenizer,
)
from rlhf_jax.errors import UserError
from rlhf_jax.runs import devices
from rlhf_jax.training.common import memory

compile_for = script("benchmarks/accelerators.py").compile_for
hlo, targets = (script(f"benchmarks/{name}.py") for name in ("hlo", "targets"))
pytestmark = [pytest.mark.accelerator, pytest.mark.usefixtures("optimized")]

GOLDEN = Path(__file__).resolve().parent / "goldens" / "accelerators.json"
REWRITE = "REWRITE_GOLDENS" in os.environ
SLACK = 1.1
LAYERS = 2
# Columns of a text. From 512 on attention is fused, and no other axis is as long.
PROMPT = 576
RESPONSE = 64
LENGTH = PROMPT + RESPONSE
LAYOUTS = {1: Mesh(), 8: Mesh(data=2, fsdp=2, tensor=2)}
SAMPLE = "sample and score"
LEARN = "learn"
STAGES = ("sft", "reward_model", "dpo", "kto", "ppo", "grpo")
ON_GPU = [("h200x8", stage, LEARN) for stage in STAGES]
ON_GPU += [("h200x1", stage, LEARN) for stage in ("sft", "ppo", "grpo")]
BY_HAND = [("h200x1", stage, LEARN) for stage in ("reward_model", "dpo", "kto")]
# Answers of PPO have a prompt each, those of GRPO share it.
ON_GPU += [("h200x1", "ppo", SAMPLE), ("h200x8", "ppo", SAMPLE), ("h200x1", "grpo", SAMPLE)]
ON_TPU = [("v5e-8", "sft", LEARN), ("v5e-1", "grpo", SAMPLE)]
# What the compilers call fused attention of whole texts.
OF_TEXTS = {"gpu": "__cudnn$fmha", "tpu": "tpu_custom_call"}
# The same with a mask in memory, which rows of one text do not need.
WITH_MASK = {"gpu": "__cudnn$fmhaScaleBias", "tpu": "none has one"}
# cuDNN's attention of one query to a cache of keys, which it reads as the loop over tokens writes
# it: in their order, without a copy.
OF_A_TOKEN = re.compile(
    r"= \(bf16\[\d+,\d+,1,\d+\]\S*, \S+\) custom-call\(\S+ %\w*dynamic_update_slice\w*\.\d+, "
    r"%\w*dynamic_update_slice\w*\.\d+,.*__cudnn\$fmha"
)


def settings(devices):
    """A GPT-2 of width 128 in bfloat16, with 16 rows in each batch."""
    size = {"batch_size": 16}
    return RunConfig(
        reward=("length",),
        mesh=LAYOUTS[devices],
        tokenizer=Tokenizer(vocab_size=257),
        network=Network(hidden_size=128, num_layers=LAYERS, num_heads=2, max_length=LENGTH),
        compute=Compute(dtype="bfloat16", remat=False, scan_layers=False),
        sft=SFTStage(**size),
        reward_model=RewardModelStage(**size),
        dpo=DPOStage(**size),
        kto=KTOStage(**size),
        rl=RLStage(**size, max_prompt_length=PROMPT, max_new_tokens=RESPONSE),
        ppo=ppo.Config(num_epochs=1),
        grpo=grpo.Config(group_size=4),
    )


def attention_calls(text, backend, names):
    """How many custom calls of fused attention a program has."""
    found = hlo.custom_calls(text)
    return sum(count for name, count in found.items() if name.startswith(names[backend]))


def square_scores(text):
    """The float32 shapes that hold a score for each pair of tokens."""
    shapes = {
        tuple(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in hlo.SHAPE.findall(text)
        if dtype == "f32"
    }
    return {shape for shape in shapes if min(shape[-2:], default=0) >= PROMPT - 1 and shape[1:]}


def expected(case, measured):
    """The golden's figures of a case; where goldens are rewritten, ``measured`` is written
    first.
    """
    recorded = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {}
    if REWRITE:
        recorded |= {"jax": jax.__version__, case: measured}
        lines = [f"{json.dumps(key)}: {json.dumps(recorded[key])}" for key in sorted(recorded)]
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    return recorded[case]


@pytest.mark.parametrize(
    ("name", "stage", "phase"), [*ON_GPU, *ON_TPU, *(soak(*case) for case in BY_HAND)]
)
def test_a_program_for_an_accelerator(name, stage, phase):
    try:
        target = targets.find(name)
    except UserError as error:
        pytest.skip(str(error))
    config = settings(len(target.devices))
    _, programs, _ = shapes.shapes_of(config, stage, None, target.devices)
    program = programs[phase]
    compiled = compile_for(target, shapes.Case(config, stage, target.devices), phase, program)
    text = compiled.as_text()
    analysis = compiled.memory_analysis()

    assert attention_calls(text, target.backend, OF_TEXTS) >= LAYERS
    assert square_scores(text) == set()
    if phase == LEARN:
        assert attention_calls(text, target.backend, WITH_MASK) == 0
        _, state, *_ = program
        assert analysis.alias_size_in_bytes >= memory.on_device(state)
    elif stage == "ppo":
        assert len(OF_A_TOKEN.findall(text)) == LAYERS

    work = hlo.work(text, turns=RESPONSE if phase == SAMPLE else None)
    assert work.unknown == 0
    bounded = {
        "kernels": work.kernels,
        "kernels of a token": work.in_loop,
        "temporary MiB": round(analysis.temp_size_in_bytes / 2**20, 1),
        **dict(sorted(work.collectives.items())),
    }
    limits = Counter(expected(f"{name} {stage}: {phase}", bounded))
    over = {
        what: (figure, limits[what])
        for what, figure in bounded.items()
        if figure > SLACK * limits[what]
    }
    assert over == {}, "(measured, recorded)"


def scatters_of(text):
    """The sums that many threads add into one array."""
    return [line for line in text.splitlines() if " scatter(" in line]


@pytest.mark.parametrize("stage", ["sft", soak("reward_model"), "ppo", soak("grpo")])
def test_an_update_for_a_gpu_compiles_with_the_flags_of_deterministic(stage):
    """No two threads of it add into one place, and all products are of float32. DPO and KTO sum the
    log-probs that SFT sums.
    """
    try:
        target = targets.find("h200x1")
    except UserError as error:
        pytest.skip(str(error))
    config = settings(1)
    config = replace(config, compute=replace(config.compute, dtype="float32"))
    _, programs, _ = shapes.shapes_of(config, stage, None, target.devices)
    case = shapes.Case(config, stage, target.devices)
    flags = {name: json.loads(value) for name, value in devices.DETERMINISTIC.items()}
    with jax.default_matmul_precision("highest"):
        made = compile_for(target, case, LEARN, programs[LEARN], flags)
    text = made.as_text()
    scatters = scatters_of(text)
    assert scatters
    assert all("unique_indices=true" in line for line in scatters)
    precisions = re.findall(r'operand_precision"?[:=][[{]"?(\w+)"?,"?(\w+)', text)
    assert {name.lower() for pair in precisions for name in pair} == {"highest"}
    if stage == "sft":
        usual = compile_for(target, case, LEARN, programs[LEARN]).as_text()
        assert not all("unique_indices=true" in line for line in scatters_of(usual))


if __name__ == "__main__":
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "accelerator", __file__]
    sys.exit(subprocess.run(command, env={**os.environ, "REWRITE_GOLDENS": "1"}).returncode)
