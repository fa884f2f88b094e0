"""What ``--model`` and ``--reward`` may name, and at which rate given weights are trained."""

import dataclasses
from pathlib import Path

import jax
import pytest
from test_training import config, data, run_ppo, save_base  # noqa: F401 (fixtures)

from rlhf_jax import models, training
from rlhf_jax.config import LoRA, Optimizer, RunConfig, to_yaml
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import spec
from rlhf_jax.training import initial, pipeline, stage

RUNS = {"sft": training.sft.run, "dpo": training.dpo.run, "ppo": run_ppo}


@pytest.mark.parametrize("name", RUNS)
def test_a_reward_model_is_no_policy(name, config, data, tmp_path):  # noqa: F811
    base = save_base(tmp_path / "base", data)
    model, params = models.load(base)
    models.save(tmp_path / "rm", model, models.add_head(jax.random.key(0), params, "score"))
    load_tokenizer(base).save(tmp_path / "rm")
    given = dataclasses.replace(config, model=str(tmp_path / "rm"))
    with pytest.raises(UserError, match="rm: this is a reward model, which writes no text"):
        RUNS[name](given)


def test_a_runs_folder_means_its_model(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    run, inner = str(tmp_path / "run"), str(tmp_path / "run" / "model")
    assert (
        stage.set_up(RunConfig(model=run)).model
        == stage.set_up(RunConfig(model=inner)).model
        == inner
    )
    assert stage.set_up(RunConfig(model="gpt2")).model == "gpt2"
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
    if above != "none":
        started = RunConfig(model=None if above == "random" else "gpt2")
        (tmp_path / "config.yaml").write_text(to_yaml(started), "utf-8")
    given = RunConfig(model=str(tmp_path / "model"), lora=LoRA(rank=rank))
    initial.warn_of_rate(given, "sft", Optimizer(learning_rate=rate))
    said = (
        f"warning: sft.optimizer.learning_rate {rate:g} is high for the pretrained weights of "
        f"{Path(given.model)}"
    )
    assert (said in capsys.readouterr().out) == warns


@pytest.mark.parametrize(
    ("prompts", "fraction", "sizes", "says"),
    [
        ("a", 0.1, (1, 0), "one prompt in all, so none is held out"),
        ("aaa", 0.1, (3, 0), "one prompt in all, so none is held out"),
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
@pytest.mark.usefixtures("no_pages")
def test_a_pipeline_of_one_row_each_runs(config, tmp_path):  # noqa: F811
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
    result = pipeline.run(dataclasses.replace(config, data=(str(tmp_path),)))
    assert models.load(result.ppo.model_folder)
