"""What ``--model`` and ``--reward`` may name."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import yaml
from builders import run_ppo, save_base

from rlhf_jax import models, training
from rlhf_jax.config import (
    LoRA,
    Network,
    RunConfig,
    parse,
)
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.graders import spec
from rlhf_jax.training import pipeline
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.setup import set_up

RUNS = {"sft": training.sft.run, "dpo": training.dpo.run, "ppo": run_ppo}


@pytest.mark.parametrize("name", RUNS)
def test_a_reward_model_is_no_policy(name, config, data, tmp_path):
    base = save_base(tmp_path / "base", data)
    model, params = models.load(base)
    head = {name: np.float32(number) for name, number in (("bias", 0), ("gain", 1), ("shift", 0))}
    scored = params | {"score": head | {"kernel": np.ones(16, np.float32)}}
    models.save(tmp_path / "rm", model, scored)
    load_tokenizer(base).save(tmp_path / "rm")
    given = replace(config, model=str(tmp_path / "rm"))
    with pytest.raises(UserError, match="rm: this is a reward model, which writes no text"):
        RUNS[name](given)


def test_a_runs_folder_means_its_model(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    run = str(tmp_path / "run")
    inner = str(tmp_path / "run" / "model")
    assert set_up(RunConfig(model=run)).model == set_up(RunConfig(model=inner)).model == inner
    assert set_up(RunConfig(model="gpt2")).model == "gpt2"
    for entry in (run, f"{run}*2", f"mean:{run},other"):
        assert [str(path) for path in spec.sources(entry).values()] == [inner], entry
    loaded = []

    def load(name):
        loaded.append(name)
        raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        spec.build_reward([run], tokenizer=None, load=load, columns=())
    assert loaded == [inner]


@pytest.mark.slow
def test_the_preset_for_chat_models_trains_a_given_model(data, tmp_path):
    base = save_base(tmp_path / "base", data)
    places = ["--model", str(base), "--output-dir", str(tmp_path / "run"), "--data", data]
    parsed = parse(RunConfig, ["--config", "chat", *places, "--sft.num-epochs", "1"])
    assert training.sft.run(parsed).metrics["nonfinite"] == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text("utf-8"))
    assert saved["sft"]["optimizer"]["learning_rate"] == 1e-2  # the default, of small adapters
    assert saved["sft"]["optimizer"]["warmup_steps"] == 0.1


@pytest.mark.parametrize(
    ("prompts", "fraction", "sizes", "says"),
    [
        ("a", 0.1, (1, 0), "there is only one prompt, so none is held out"),
        ("aaa", 0.1, (3, 0), "there is only one prompt, so none is held out"),
        ("a", 0.0, (1, 0), ""),
        ("ab", 0.1, (1, 1), "prompts: 1 rows of 1 prompts held out\n"),
        ("aabbccccc", 0.2, (7, 2), "prompts: 2 rows of 1 prompts held out\n"),
    ],
)
def test_what_is_held_out_and_what_is_said_of_it(prompts, fraction, sizes, says, capsys):
    train, held_out = initial.hold_out("prompts", prompts, fraction, jax.random.key(0))
    assert (len(train), len(held_out)) == sizes
    assert not {prompts[row] for row in train} & {prompts[row] for row in held_out}
    said = capsys.readouterr().out
    assert says in said
    assert bool(said) == bool(says)
    with pytest.raises(UserError, match="give more data or a smaller validation_fraction"):
        initial.hold_out("prompts", "ab", 0.9, jax.random.key(0))


@pytest.mark.slow
def test_a_pipeline_of_one_row_each_runs(config, tmp_path):
    """The files of the original's README."""
    files = {
        "sft_data": {"prompt": "What is a cat?", "response": "An animal."},
        "preference_data": {
            "prompt": "What is a cat?",
            "chosen": "An animal.",
            "rejected": "A stone.",
        },
        "prompts": {"prompt": "What is a dog?"},
    }
    for name, row in files.items():
        (tmp_path / f"{name}.json").write_text(f"[{row}]".replace("'", '"'), "utf-8")
    result = pipeline.run(replace(config, data=(str(tmp_path),)))
    assert models.load(result.ppo.model_folder)


def test_the_dropout_of_a_model_is_its_folders_or_the_settings():
    """GPT-2's folders drop a tenth; 0 turns all three rates off. That of adapters is their own."""
    rates = ("embedding_dropout", "attention_dropout", "residual_dropout")
    sizes = {"vocab_size": 8, "max_length": 4, "hidden_size": 4, "num_layers": 1, "num_heads": 1}

    def dropping(model, rate, of_adapters=0.0):
        network = Network(dropout=rate)
        config = RunConfig(network=network, lora=LoRA(dropout=of_adapters))
        return initial._with_dropout(model, config.network, config.lora).config

    model = models.build(models.GPT2Config(**sizes, **dict.fromkeys(rates, 0.1)))
    for setting, rate in ((None, 0.1), (0.0, 0.0), (0.25, 0.25)):
        changed = dropping(model, setting, 0.05)
        assert [getattr(changed, name) for name in rates] == [rate] * 3
        assert changed.lora_dropout == 0.05
    llama = models.build(models.LlamaConfig(**sizes, intermediate_size=8))
    assert dropping(llama, 0.25).attention_dropout == 0.25
    assert dropping(llama, 0.25).lora_dropout == 0.0
    assert initial._with_dropout(llama, Network(), LoRA()) is llama
