"""Precedence of flag, file and default; every mistake named with file, line and key; YAML that reads back equal; the
rules of the sections."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import config
from rlhf_jax.config import Optimizer, RunConfig, SFTStage, parse, to_yaml
from rlhf_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Base:
    clip_low: float = 0.2
    """Lower side of the clip."""
    num_epochs: int = 4

    def __post_init__(self):
        if self.clip_low > 1:
            raise ValueError(f"clip_low must be at most 1, got {self.clip_low}")


@dataclasses.dataclass(frozen=True)
class Stage(Base):
    """A stage."""

    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    """Which loss."""
    top_k: int | None = None
    max_norm: float | None = 1.0
    data: tuple[str, ...] = ()
    sizes: tuple[float, ...] = (1.0, 2.0)
    shuffle: bool = True


@dataclasses.dataclass(frozen=True)
class Settings:
    model: str | None = None
    seed: int = 0
    """Root of every random number."""
    ppo: Stage = Stage(clip_low=0.3)
    """The update."""
    batch_size: int = 64

    def __post_init__(self):
        if self.batch_size % self.ppo.num_epochs:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of {self.ppo.num_epochs}")


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> list[str]:
        Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", "c.yaml"]

    return write


def test_flag_goes_before_file_before_default(write):
    file = write("ppo:\n  clip_low: 0.1\n  num_epochs: 2\nseed: 7\n")
    config = parse(Settings, [*file, "--ppo.clip-low", "0.05"])
    assert config == Settings(seed=7, ppo=Stage(clip_low=0.05, num_epochs=2))
    # The order on the command line does not matter, and a section's own default survives.
    assert parse(Settings, ["--ppo.clip-low", "0.05", *file]) == config
    assert parse(Settings, []) == Settings()
    # The last of several counts.
    Path("d.yaml").write_text("seed: 2\n")
    assert parse(Settings, ["--config", "c.yaml", "--config=d.yaml"]).seed == 2
    assert parse(Settings, ["--config=d.yaml", "--config", "c.yaml"]).seed == 7
    assert parse(Settings, ["--seed", "3", "--seed", "4"]).seed == 4


def test_a_value_of_one_section_does_not_reach_another_with_the_same_default(write):
    config = parse(RunConfig, write("sft: {optimizer: {eps: 1e-3}}"))
    assert config == RunConfig(sft=SFTStage(optimizer=Optimizer(eps=1e-3)))
    assert config.reward_model.optimizer == Optimizer()


def test_a_config_that_comes_with_the_package_is_called_by_its_name(tmp_path, monkeypatch):
    here = parse(RunConfig, ["--config", str(ROOT / "configs" / "tiny.yaml")])
    monkeypatch.chdir(tmp_path)
    assert parse(RunConfig, ["--config", "tiny"]) == here
    monkeypatch.setattr(config, "__file__", str(tmp_path / "config.py"))  # as a wheel has it
    Path("configs").mkdir()
    Path("configs/tiny.yaml").write_text("seed: 5")
    assert parse(RunConfig, ["--config", "tiny"]).seed == 5


def test_values_of_every_type(write):
    text = """
model: null
ppo:
  clip_low: 1e-5
  kind: ipo
  top_k: 0
  max_norm: 1
  data: [a.json, '-b']
  sizes: [1e-2, 2]
  shuffle: no
"""
    stage = parse(Settings, write(text)).ppo
    assert stage == Stage(1e-5, 4, "ipo", 0, 1.0, ("a.json", "-b"), (0.01, 2.0), False)
    assert isinstance(stage.max_norm, float)
    assert isinstance(stage.sizes[1], float)
    assert parse(Settings, write("ppo: {sizes: []}")).ppo.sizes == ()
    flags = "--ppo.top-k None --ppo.data x y --ppo.no-shuffle --ppo.max-norm 1e-5 --ppo.kind ipo --model m --ppo.sizes"
    config = parse(Settings, flags.split())
    assert config == Settings("m", 0, Stage(0.3, 4, "ipo", None, 1e-5, ("x", "y"), (), False))


def test_null_and_the_words_for_it(write):
    assert parse(Settings, write("model: ~\nppo: {max_norm: null}")) == Settings(ppo=Stage(0.3, max_norm=None))
    assert parse(Settings, write("model: None\n")).model is None
    assert parse(Settings, write("model: 'None'\n")).model == "None"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppo:\n  clip_lo: 1", "c.yaml, line 2: unknown key ppo.clip_lo; did you mean clip_low?"),
        ("ppo:\n  clip-low: 1", "c.yaml, line 2: unknown key ppo.clip-low; did you mean clip_low?"),
        ("seed: 1\nclip_low: 1", "c.yaml, line 2: unknown key clip_low; clip_low is a key of ppo"),
        ("ppo.clip_low: 1", "c.yaml, line 1: unknown key ppo.clip_low; clip_low is a key of ppo"),
        ("ppo:\n  seed: 1", "c.yaml, line 2: unknown key ppo.seed; seed is a key of the top level"),
        ("ppo: {zzz: 1}", "c.yaml, line 1: unknown key ppo.zzz; the keys of ppo are clip_low, num_epochs, kind, "),
        ("? [a]\n: 1", "c.yaml, line 1: unknown key a list of 1; "),
        ("ppo:\n  clip_low: abc", "c.yaml, line 2: ppo.clip_low must be a float, found 'abc'"),
        ("ppo:\n  clip_low: '0.5'", "c.yaml, line 2: ppo.clip_low must be a float, found '0.5'"),
        ("ppo:\n  clip_low:", "c.yaml, line 2: ppo.clip_low must be a float, found nothing"),
        ("ppo:\n  clip_low: " + "9" * 400, "c.yaml, line 2: ppo.clip_low must be a float, found 99"),
        ("seed: " + "9" * 5000, "c.yaml, line 1: seed must be an int, found 99"),
        ("seed: 1.0", "c.yaml, line 1: seed must be an int, found 1.0"),
        ("seed: true", "c.yaml, line 1: seed must be an int, found true"),
        ("model: 5", "c.yaml, line 1: model must be a string or null, found 5"),
        ("model: [a]", "c.yaml, line 1: model must be a string or null, found a list of 1"),
        ("ppo:\n  top_k: 1.5", "c.yaml, line 2: ppo.top_k must be an int or null, found 1.5"),
        ("ppo:\n  kind: hinge", "c.yaml, line 2: ppo.kind must be one of 'sigmoid', 'ipo', found 'hinge'"),
        ("ppo:\n  shuffle: 1", "c.yaml, line 2: ppo.shuffle must be true or false, found 1"),
        ("ppo:\n  data: x", "c.yaml, line 2: ppo.data must be a list, found 'x'"),
        ("ppo:\n  data: [a,\n    3]", "c.yaml, line 3: each of ppo.data must be a string, found 3"),
        ("ppo:\nseed: 1", "c.yaml, line 1: ppo must be a mapping of keys, found nothing"),
        ("seed: 1\nseed: 2", "c.yaml, line 2: key seed is given twice, first on line 1"),
        ("- seed", "c.yaml, line 1: the file must be a mapping of keys, found a list of 1"),
        ("", "c.yaml: is empty"),
        ("seed: 1\nppo: [", "c.yaml, line 2: not valid YAML: "),
        ("seed: 1\n---\nseed: 2", "c.yaml, line 2: not valid YAML: "),
        ("seed: 1\nmodel: \x01", "c.yaml, line 2: not valid YAML: unacceptable character #x0001"),
        ("model: " + "[" * 5000, "c.yaml: not valid YAML: maximum recursion depth"),
        (b"seed: 1\nmodel: \xe4", "c.yaml, line 2: not UTF-8"),
        ("seed: 1\nppo:\n  clip_low: 3", "c.yaml, line 3: ppo.clip_low must be at most 1, got 3.0"),
        ("ppo:\n  num_epochs: 3\nbatch_size: 4", "c.yaml, line 3: batch_size 4 must be a multiple of 3"),
    ],
)
def test_a_mistake_in_the_file_is_named(write, text, message):
    with pytest.raises(UserError) as caught:
        parse(Settings, write(text))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 250


def test_files_that_cannot_be_read(tmp_path, write):
    with pytest.raises(UserError, match=r"none.yaml: cannot be read \(given by --config\): No such file"):
        parse(Settings, ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(UserError, match="cannot be read"):
        parse(Settings, ["--config", str(tmp_path)])
    assert parse(Settings, write(b"\xef\xbb\xbfseed: 3")).seed == 3  # a byte order mark is ignored


def test_checks_run_on_the_final_values(write):
    """What the file gets wrong a flag may put right, and the other way round the file's line is not blamed."""
    file = write("ppo:\n  clip_low: 3\n")
    assert parse(Settings, [*file, "--ppo.clip-low", "0.5"]).ppo.clip_low == 0.5
    with pytest.raises(UserError, match=r"^ppo\.clip_low must be at most 1, got 4\.0"):
        parse(Settings, [*file, "--ppo.clip-low", "4"])
    with pytest.raises(UserError, match=r"^batch_size 7 must be a multiple of 4"):
        parse(Settings, ["--batch-size", "7"])


@pytest.mark.parametrize("argv", [["--nope"], ["--seed", "x"], ["--ppo.kind", "hinge"], ["--config"], ["--seed"]])
def test_wrong_flags_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Settings, argv)
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_shows_texts_and_values_in_force(write, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as caught:
        parse(Settings, [*write("seed: 31\n"), "--help"], description="Trains things.")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Trains things." in text
    assert "Root of every random number. (default: 31)" in text
    assert "--ppo.clip-low FLOAT" in text
    assert "Lower side of the clip. (default: 0.3)" in text
    assert "Which loss. (default: sigmoid)" in text
    assert "--config FILE" in text


floats = st.floats(allow_nan=False, max_value=1.0)
texts = st.text(st.characters(exclude_categories=["Cs"]))
stages = st.builds(
    Stage,
    clip_low=floats,
    num_epochs=st.just(1),
    kind=st.sampled_from(["sigmoid", "ipo"]),
    top_k=st.none() | st.integers(),
    max_norm=st.none() | floats,
    data=st.lists(texts).map(tuple),
    sizes=st.lists(floats).map(tuple),
    shuffle=st.booleans(),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.builds(Settings, model=st.none() | texts | st.sampled_from(["None", "null", "1e5", "on", "~"]), ppo=stages))
def test_yaml_reads_back_equal(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("yaml") / "c.yaml"
    text = to_yaml(config)
    file.write_text(text, encoding="utf-8")
    read = parse(Settings, ["--config", str(file)])
    assert read == config
    assert to_yaml(read) == text


def test_yaml_holds_every_field_in_order():
    stage = "clip_low: 0.2|num_epochs: 4|kind: sigmoid|top_k: null|max_norm: 1.0|data: [a, b]|sizes: []|shuffle: true"
    expected = f"model: null|seed: 0|ppo:|  {stage.replace('|', '|  ')}|batch_size: 64|"
    assert to_yaml(Settings(ppo=Stage(data=("a", "b"), sizes=()))) == expected.replace("|", "\n")


NOT_1 = "must be at least 1, got 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoint_interval: 0", f"line 1: checkpoint_interval {NOT_1}"),
        ("early_stopping_patience: 0", f"line 1: early_stopping_patience {NOT_1}"),
        ("seed: -1", "line 1: seed must be at least 0, got -1"),
        ("keep_best: loss", "line 1: keep_best must be max:METRIC or min:METRIC, got 'loss'"),
        ("alerts: [oops]", "line 1: alerts: 'oops'"),
        ("lora:\n  rank: 2", "line 2: lora.rank adapts a trained model: give --model"),
        ("model: m\ntokenizer: {name: t}", "line 2: tokenizer.name t: the model m brings its own tokenizer"),
        ("network: {initializer_range: 0}", "line 1: network.initializer_range must be above 0, got 0.0"),
        ("text: {bucket_multiple: 0}", f"line 1: text.bucket_multiple {NOT_1}"),
        ("text: {template: x}", "line 1: text.template must contain {prompt}"),
        ("sft: {num_microbatches: 0}", f"line 1: sft.num_microbatches {NOT_1}"),
        ("sft: {optimizer: {b1: 1}}", "line 1: sft.optimizer.b1 must be at least 0 and below 1, got 1.0"),
        ("rl: {optimizer:\n  {decay_every: 3}}", "line 2: rl.optimizer.schedule: the schedule step needs decay_every"),
        ("reward_model: {ensemble_size: 0}", f"line 1: reward_model.ensemble_size {NOT_1}"),
        ("reward_model: {normalize_samples: -1}", "line 1: reward_model.normalize_samples must be at least 0, got -1"),
        ("dpo: {validation_fraction: 1}", "line 1: dpo.validation_fraction must be at least 0 and below 1, got 1.0"),
        ("dpo: {validation_interval: 0}", f"line 1: dpo.validation_interval {NOT_1}"),
        ("dpo: {beta: 0}", "line 1: dpo.beta must be above 0"),
        ("rl: {kl_horizon: 0}", f"line 1: rl.kl_horizon {NOT_1}"),
        ("rl: {kl_coef: -1}", "line 1: rl.kl_coef must be at least 0, got -1.0"),
        ("rl: {kl_target: 0}", "line 1: rl.kl_target must be above 0, got 0.0"),
        ("rl: {temperature: 0}", "line 1: rl.temperature must be above 0, got 0.0"),
        ("rl: {top_p: 1.5, allow_truncated_sampling: true}", "line 1: rl.top_p must be above 0 and at most 1, got 1.5"),
        ("rl: {\ntop_k: 5}", "line 2: rl.top_k and top_p: the update uses log-probabilities of the whole distribution"),
        (
            "rl: {missing_eos_penalty: 1, missing_eos_score: 0}",
            "line 1: rl.missing_eos_penalty and missing_eos_score: ",
        ),
        ("safety: {patterns: ['(']}", "line 1: safety.patterns: '(' is no regular expression"),
        ("safety: {above: 1}", "line 1: safety.classifier needs below or above"),
    ],
)
def test_rules_of_the_sections(write, text, message):
    with pytest.raises(UserError) as caught:
        parse(RunConfig, write(text))
    assert str(caught.value).startswith(f"c.yaml, {message}")


def test_settings_that_the_rules_allow():
    rl = config.RLStage(top_p=1.0, kl_target=None, kl_coef=0.0, missing_eos_score=-1.0)
    allowed = config.RLStage(top_k=5, allow_truncated_sampling=True)
    assert (rl.length, config.RLStage(num_episodes=65, batch_size=64).length) == (100, 2)
    assert RunConfig(model="m", lora=config.LoRA(rank=2), rl=allowed) != RunConfig(model="m", rl=rl)
