"""What ``--model`` and ``--reward`` may name, and at which rate given weights are trained."""

import operator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from builders import run_ppo, save_base, slow

from rlhf_jax import models, training
from rlhf_jax.config import (
    PRETRAINED,
    LoRA,
    Network,
    Optimizer,
    RunConfig,
    model_source,
    parse,
    to_yaml,
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


@pytest.mark.parametrize(
    ("above", "rate", "rank", "warns"),
    [
        ("none", 1e-4, 0, True),  # a folder from elsewhere
        ("none", 9e-5, 0, False),
        ("none", 1e-3, 8, False),
        ("random", 1e-3, 0, False),  # a run of ours, from random weights
        ("gpt2", 1e-3, 0, True),  # one from given weights
    ],
)
def test_a_rate_that_suits_random_weights_warns_with_pretrained_ones(
    above, rate, rank, warns, tmp_path, capsys
):
    (tmp_path / "model").mkdir()
    if above != "none":
        started = RunConfig(model=None if above == "random" else "gpt2")
        (tmp_path / "config.yaml").write_text(to_yaml(started), "utf-8")
    given = RunConfig(model=str(tmp_path / "model"), lora=LoRA(rank=rank))
    initial.warn_of_rate(model_source(given), "sft", Optimizer(learning_rate=rate))
    said = (
        f"warning: sft.optimizer.learning_rate {rate:g} is high for the pretrained weights of "
        f"{Path(given.model)}"
    )
    assert (said in capsys.readouterr().out) == warns


SFT = [key for key in PRETRAINED if key.startswith("sft")]


def values_of(parsed, keys):
    return {key: operator.attrgetter(key)(parsed) for key in keys}


@pytest.mark.parametrize(("rank", "column"), [(0, 0), (8, 1)])
def test_pretrained_weights_have_defaults_of_their_own(rank, column, capsys):
    parsed = parse(
        RunConfig, ["--model", "gpt2", "--lora.rank", str(rank)], sections=("sft", "lora")
    )
    assert values_of(parsed, PRETRAINED) == {key: both[column] for key, both in PRETRAINED.items()}
    listed = ", ".join(f"{key} {PRETRAINED[key][column]}" for key in SFT)
    said = f"defaults for the pretrained gpt2: {listed}\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("flag", ["--sft.optimizer.learning-rate=1e-3", "--config"])
def test_what_was_given_wins_and_is_not_named(flag, tmp_path, capsys):
    """Also where it is the class's default."""
    (tmp_path / "own.yaml").write_text("sft: {optimizer: {learning_rate: 1.0e-3}}")
    argv = ["--model", "gpt2", flag, *[str(tmp_path / "own.yaml")] * (flag == "--config")]
    parsed = parse(RunConfig, argv)
    assert parsed.sft.optimizer.learning_rate == 1e-3
    assert parsed.sft.optimizer.warmup_steps == 0.1
    assert "sft.optimizer.learning_rate" not in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(to_yaml(parsed), "utf-8")
    assert parse(RunConfig, ["--config", str(tmp_path / "config.yaml")]) == parsed
    assert capsys.readouterr().out == ""  # everything is given


@pytest.mark.parametrize("name", [slow("run"), "run/model"])
def test_a_model_that_a_run_of_ours_trained_from_random_weights_keeps_the_defaults(name, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "second" / "model").mkdir(parents=True)
    above = {"run": None, "second": str(tmp_path / name)}
    for folder, model in above.items():
        (tmp_path / folder / "config.yaml").write_text(to_yaml(RunConfig(model=model)), "utf-8")
    for model in (name, "second"):
        parsed = parse(RunConfig, ["--model", str(tmp_path / model)])
        assert parsed == RunConfig(model=str(tmp_path / model))
    # That of a run from given weights, and one that names itself.
    for model in ("gpt2", str(tmp_path / name)):
        (tmp_path / "run" / "config.yaml").write_text(to_yaml(RunConfig(model=model)), "utf-8")
        assert parse(RunConfig, ["--model", str(tmp_path / "second")]).dpo.batch_size == 64


def test_a_small_network_from_random_weights_keeps_the_defaults(capsys):
    assert parse(RunConfig, []) == RunConfig()
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_preset_for_chat_models_trains_a_given_model(data, tmp_path):
    base = save_base(tmp_path / "base", data)
    places = ["--model", str(base), "--output-dir", str(tmp_path / "run"), "--data", data]
    parsed = parse(RunConfig, ["--config", "chat", *places, "--sft.num-epochs", "1"])
    assert training.sft.run(parsed).metrics["nonfinite"] == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text("utf-8"))
    assert saved["sft"]["optimizer"]["learning_rate"] == 2e-4
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
