"""Runs in this process, on four devices: exact resume, repetition, other device counts, faults."""

import dataclasses
import json
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import quickstart
import tokenizers as hf
from test_goldens import parse as parse_config

from rlhf_jax import Rollout, models, ppo, sharding, training, vpg
from rlhf_jax.config import (
    Compute,
    DPOStage,
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
from rlhf_jax.data.tokenizers import load_tokenizer, train_bpe
from rlhf_jax.errors import Stopped, TrainingFault, UserError
from rlhf_jax.runs import log as tracking
from rlhf_jax.training import initial, rl, stage, supervised

pytestmark = pytest.mark.usefixtures("no_pages")

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
FAST = Optimizer(learning_rate=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    demo.write(folder, num_demonstrations=72, num_pairs=72, num_prompts=48)
    return str(folder)


@pytest.fixture
def config(data, tmp_path):
    supervised = {"batch_size": 16, "optimizer": FAST, "validation_fraction": 0.2, "validation_interval": 2}
    return RunConfig(
        data=(data,),
        output_dir=str(tmp_path / "run"),
        checkpoint_interval=2,
        network=Network(hidden_size=16, num_layers=1, num_heads=2, max_length=128),
        tokenizer=Tokenizer(vocab_size=300),
        text=Text(bucket_multiple=128),
        sft=SFTStage(**supervised, num_epochs=2),
        reward_model=RewardModelStage(**supervised, num_epochs=2),
        dpo=DPOStage(**supervised, num_epochs=2),
        reward=("count:e",),
        rl=RLStage(
            num_iterations=7,
            batch_size=16,
            max_new_tokens=4,
            kl_target=0.01,
            optimizer=FAST,
            validation_interval=3,
            validation_prompts=4,
        ),
        ppo=ppo.Config(num_epochs=1, num_minibatches=2, shuffle_blocks=4),
    )


def save_base(folder, data, num_layers=1, dtype=np.float32):
    """A model with random weights and a tokenizer of the demo texts, as a folder for --model."""
    tokenizer = train_bpe([path.read_text("utf-8") for path in sorted(Path(data).glob("*.json"))], 300)
    special = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    sizes = {"vocab_size": tokenizer.vocab_size, "max_length": 128, "hidden_size": 16, "num_heads": 2}
    model = models.build(models.GPT2Config(num_layers=num_layers, **sizes, **special))
    models.save(folder, model, jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(jax.random.key(0))))
    tokenizer.save(folder)
    return str(folder)


def run_ppo(config):
    return training.rl.run(config, ppo)


def run_vpg(config):
    return training.rl.run(config, vpg)


def stages(*fast):
    """All stages as parameters; those that are not fast take long."""
    runs = {"sft": training.sft.run, "reward_model": training.reward_model.run, "dpo": training.dpo.run}
    runs |= {"vpg": run_vpg, "ppo": run_ppo}
    marks = {"dpo": pytest.mark.soak, "vpg": pytest.mark.soak}
    params = [
        pytest.param(run, id=name, marks=() if name in fast else marks.get(name, pytest.mark.slow))
        for name, run in runs.items()
    ]
    return pytest.mark.parametrize("run", params)


class Killed(BaseException):
    """Stands for the process's end: nothing catches it."""


def interrupt(monkeypatch, step):
    """Ends the run when it is about to log ``step``."""
    log = tracking.Tracker.log

    def dying(self, now, metrics):
        if now == step:
            raise Killed
        return log(self, now, metrics)

    monkeypatch.setattr(tracking.Tracker, "log", dying)


def outputs(folder):
    names = ["model/model.safetensors", "model/config.json", "metrics.jsonl", "samples.jsonl"]
    return {name: (folder / name).read_bytes() for name in names}


@stages("ppo")
def test_a_stopped_run_resumes_to_the_same_bytes(run, config, tmp_path, monkeypatch, capsys):
    straight = run(config)
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(Killed):
            run(again)
    stopped = run(dataclasses.replace(again, resume=True))
    assert "resumed from step 4 of" in capsys.readouterr().out
    assert outputs(stopped.folder) == outputs(straight.folder)
    steps = [json.loads(line)["step"] for line in (stopped.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps == list(range(len(steps)))
    assert steps[-1] >= 7
    other = run(dataclasses.replace(config, output_dir=str(tmp_path / "other"), seed=1))
    assert outputs(other.folder)["model/model.safetensors"] != outputs(straight.folder)["model/model.safetensors"]


def test_a_finished_run_says_so_and_another_config_is_refused(config, capsys):
    first = training.sft.run(config)
    before = outputs(first.folder)
    training.sft.run(dataclasses.replace(config, resume=True))
    assert "finished already" in capsys.readouterr().out
    assert outputs(first.folder) == before
    changed = dataclasses.replace(config, resume=True, sft=dataclasses.replace(config.sft, batch_size=24))
    with pytest.raises(UserError, match=r"sft\.batch_size was 16 and is now 24"):
        training.sft.run(changed)
    with pytest.raises(UserError, match="--overwrite"):
        training.sft.run(config)


@stages()
def test_one_device_and_four_agree(run, config, tmp_path, monkeypatch):
    """The same rows, samples and shuffles; numbers up to the order of summation."""
    # Where a gradient is 0 but for rounding, Adam's first steps divide that rounding by itself, unless eps is larger.
    steady = dataclasses.replace(config.reward_model, optimizer=dataclasses.replace(FAST, eps=1e-3))
    config = dataclasses.replace(config, reward_model=steady)
    four = run(config)
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda: make_mesh(1))
    one = run(dataclasses.replace(config, output_dir=str(tmp_path / "one")))
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [[json.loads(line) for line in (r.folder / name).read_text("utf-8").splitlines()] for r in (one, four)]
        for first, second in zip(*rows, strict=True):
            assert first.keys() == second.keys()
            for key, value in first.items():
                if key == "dpo/accuracy" and first["step"] == 1:
                    continue  # the policy is the reference still: the sign of a margin is rounding
                if isinstance(value, str):
                    assert value == second[key]
                else:
                    np.testing.assert_allclose(value, second[key], rtol=2e-3, atol=2e-3, err_msg=key)


def test_non_finite_numbers_stop_the_run_and_name_the_last_good_checkpoint(config):
    # The first update makes the parameters infinite, the second finds out.
    exploding = Optimizer(learning_rate=1e38, max_grad_norm=None)
    with pytest.raises(
        TrainingFault,
        match=r"not finite at step 2; .* checkpoint is step 0 .*rows of this batch: .*sft_data.json, \S+ \d+, ",
    ):
        training.sft.run(dataclasses.replace(config, sft=dataclasses.replace(config.sft, optimizer=exploding)))


@pytest.mark.slow
def test_reward_models_are_normalised_over_samples_of_the_base_policy(config, tmp_path, capsys):
    base = str(training.sft.run(config).model_folder)

    def train(name, samples):
        settings = dataclasses.replace(config.reward_model, normalize_samples=samples)
        own = dataclasses.replace(config, model=base, output_dir=str(tmp_path / name), reward_model=settings)
        return models.load(training.reward_model.run(own).model_folder)

    raw = train("raw", 0)
    capsys.readouterr()
    normalised = train("normalised", 32)
    said = re.search(r"normalised over 32 samples of the base policy: mean (\S+), std (\S+)", capsys.readouterr().out)
    mean, std = float(said[1]), float(said[2])
    tokens = jax.random.randint(jax.random.key(0), (5, 9), 2, 300)
    before, after = (
        models.score_fn(model)(params, tokens, np.ones((5, 9)), None) for model, params in (raw, normalised)
    )
    np.testing.assert_allclose(after, (before - mean) / std, atol=2e-3)
    assert abs(std - 1) > 0.01


def test_scores_get_mean_0_and_variance_1():
    """Raw scores 1, 3, 8 whatever gain and shift the head had: mean 4, variance 26 / 3."""
    raw = jax.numpy.array([[1.0], [3.0], [8.0]])

    def score(params, tokens, attention_mask):
        return params["score"]["gain"] * raw + params["score"]["shift"]

    params = {"score": {"gain": jax.numpy.float32(2.0), "shift": jax.numpy.float32(5.0)}}
    samples = Rollout(tokens=np.ones((3, 2)), attention_mask=np.ones((3, 2)), response_mask=None, log_probs=None)
    normalised = training.reward_model._normalized(score, params, samples)
    expected = (np.array([[1.0], [3.0], [8.0]]) - 4.0) / np.sqrt(26 / 3)
    np.testing.assert_allclose(score(normalised, None, None), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_a_signal_finishes_the_step_and_saves(number, config, tmp_path, monkeypatch):
    straight = run_vpg(config)
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"), checkpoint_interval=100)
    log = tracking.Tracker.log

    def signalling(self, now, metrics):
        if now == 3:
            signal.raise_signal(number)
        return log(self, now, metrics)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(tracking.Tracker, "log", signalling)
        with pytest.raises(Stopped, match=r"after step 3 of 7(.|\n)*--resume") as stopped:
            run_vpg(again)
    assert stopped.value.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert signal.getsignal(number) is before
    resumed = run_vpg(dataclasses.replace(again, resume=True))
    assert outputs(resumed.folder) == outputs(straight.folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ppo.num-minibatches", "5"], "rl.batch_size 32 does not divide by 5 ppo.num_minibatches"),
        (
            ["--ppo.num-microbatches", "3"],
            "rl.batch_size 32 does not divide by 2 ppo.num_minibatches x 3 ppo.num_microbatches; use 24",
        ),
        (["--ppo.kl-loss-estimator", "k1"], "ppo.kl_loss_estimator 'k1'"),
        (["--ppo.aggregate", "fixed"], "length: aggregate 'fixed' needs a length"),
        (["--rl.batch-size", "30"], "rl.batch_size 30 does not divide by 4 devices; use 28 or 32"),
        (["--rl.top-p", "0.9"], "allow-truncated-sampling"),
        (["--rl.num-iterations", "0"], "num_iterations must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_happens(flags, message, tmp_path):
    folder = tmp_path / "run"
    argv = ["--config", str(TINY), "--output-dir", str(folder), *flags]
    with pytest.raises(UserError) as refused:
        run_ppo(parse(RunConfig, argv))
    assert message in str(refused.value)
    assert not folder.exists()


def test_supervised_batches_divide_too(config, tmp_path):
    with pytest.raises(UserError, match=r"sft\.batch_size 16 does not divide by 3 sft\.num_microbatches; use 12 or 24"):
        training.sft.run(dataclasses.replace(config, sft=dataclasses.replace(config.sft, num_microbatches=3)))
    with pytest.raises(UserError, match="network: hidden_size 16 is not a multiple of num_heads 3"):
        training.sft.run(dataclasses.replace(config, network=dataclasses.replace(config.network, num_heads=3)))


def test_float16_is_answered_by_bfloat16(config, capsys):
    config = dataclasses.replace(config, compute=Compute(dtype="float16"))
    stage.set_up(config)
    assert "bfloat16 in place of float16" in capsys.readouterr().out
    made = initial.language_model(config, ["some text"], jax.random.key(0))
    assert made.model.config.compute_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {np.dtype("float32")}


def test_dpo_refuses_labels_that_are_no_pairs(config, tmp_path):
    file = tmp_path / "four.json"
    file.write_text(json.dumps([{"query": "q", **{f"sample{i}": f"a{i}" for i in range(4)}, "best": 2}]))
    with pytest.raises(UserError, match=r"four\.json.*: DPO takes pairs and rankings"):
        training.dpo.run(dataclasses.replace(config, data=(str(file),)))
    with pytest.raises(ValueError, match="label_smoothing"):
        DPOStage(kind="hinge", label_smoothing=0.1)


@pytest.mark.slow
def test_a_model_whose_tokenizer_has_no_pad_gains_one(config, data, tmp_path):
    """As GPT-2: end-of-text is the only special token, and the embedding has one row for each entry."""
    backend = hf.ByteLevelBPETokenizer()
    text, special = (Path(data) / "sft_data.json").read_text("utf-8"), ["<|endoftext|>"]
    backend.train_from_iterator([text], vocab_size=300, special_tokens=special, show_progress=False)
    size = backend.get_vocab_size()
    base = tmp_path / "base"
    model = models.build(models.GPT2Config(vocab_size=size, max_length=128, hidden_size=8, num_layers=1, num_heads=1))
    models.save(base, model, model.init(jax.random.key(0)))
    backend.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))

    trained = training.sft.run(dataclasses.replace(config, model=str(base)))
    grown, params = models.load(trained.model_folder)
    assert grown.config.vocab_size == size + 1
    assert params["wte"]["embedding"].shape == (size + 1, 8)
    tokenizer = load_tokenizer(trained.model_folder)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (size, size + 1)
    # What is saved can be trained on without growing again.
    again = training.rl.run(
        dataclasses.replace(config, model=str(trained.model_folder), output_dir=str(tmp_path / "rl")), vpg
    )
    assert models.load(again.model_folder)[0].config.vocab_size == size + 1


@pytest.mark.parametrize("file", sorted(TINY.parent.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_fits(file):
    config = parse_config(file)
    supervised._sizes("sft", config.sft, 1)
    supervised._sizes("reward_model", config.reward_model, 1)
    for name in ("vpg", "ppo", "rloo", "grpo"):
        rl._sizes(name, config.rl, getattr(config, name), 1)


def test_the_quickstart_refuses_data_of_ones_own(tmp_path):
    with pytest.raises(UserError, match="pipeline"):
        quickstart.run(quickstart.QuickstartConfig(data=("mine.json",), output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
