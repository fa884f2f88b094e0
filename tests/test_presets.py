"""configs/algorithms and configs/gsm8k.yaml: each fits, starts, and says of the run what its paper
says.
"""

import ast
import importlib.util
import json
import operator
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import arithmetic
import forks
import numpy as np
import optax
import pytest
import sentiment
import yaml
from builders import ROOT, Checker, initial_params, metric_rows, soak

from rlhf_jax import models, sharding, training
from rlhf_jax.algorithms import grpo, ppo
from rlhf_jax.cli.stages import find_method
from rlhf_jax.config import ALGORITHMS, DPOStage, RunConfig, model_source, parse
from rlhf_jax.data import batches, encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import verifiable
from rlhf_jax.training.common.layout import Layout
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.supervised.job import Job
from rlhf_jax.training.tasks import TASKS

TINY_RUN = parse(RunConfig, ["--config", "tiny"])
ALGORITHMS_FOLDER = ROOT / "rlhf_jax" / "algorithms"
PRESETS = sorted(path.stem for path in (ROOT / "configs" / "algorithms").glob("*.yaml"))
# The section that a preset sets, and what it says of its method: settings, among them those that
# follow from others, and the learning rate and the KL coefficient of the reward that its file
# has. None: not in the file.
SAYS = {
    "apo_zero": "dpo kind=apo_zero beta=0.1 needs_reference=True rate=None",
    "bco": "kto kind=bco beta=0.1 desirable_weight=1.0 undesirable_weight=1.0 rate=5e-07",
    "cispo": "grpo surrogate=cispo clip_low=1.0 aggregate=token kl_in_loss=False"
    " rate=None kl_coef=None",
    "clip_cov": "clip_cov kind=clip share=0.0002 cov_low=1.0 cov_high=5.0 kl_in_loss=False"
    " rate=None kl_coef=None",
    "curriculum": "curriculum group_size=16 decay=0.7 exploration=0.05 kl_in_loss=False"
    " rate=None kl_coef=None",
    "dapo": "grpo clip_low=0.2 clip_high=0.28 aggregate=token kl_in_loss=False group_size=16"
    " rate=1e-06 kl_coef=None",
    "dpo": "dpo kind=sigmoid beta=0.1 needs_reference=True batch_size=64 rate=1e-06",
    "dpo_by_length": "dpo kind=sigmoid length_normalised=True beta=5.0 rate=5e-07",
    "dppo": "grpo gate=tv gate_limit=0.15 surrogate=clip clip_low=1.0 clip_high=inf"
    " aggregate=token kl_in_loss=False rate=None kl_coef=None",
    "dr_grpo": "grpo scale=False aggregate=fixed length=3000 kl_in_loss=False"
    " rate=1e-06 kl_coef=None",
    "flash_reinforce": "rloo baseline=batch group_size=1 num_epochs=1 num_minibatches=1"
    " aggregate=sequence kl_in_loss=False rate=1e-06 kl_coef=0.0",
    "gdpo": "gdpo group_size=4 num_minibatches=4 aggregate=token kl_in_loss=False scale=True"
    " rate=1e-06 kl_coef=0.0",
    "gmpo": "grpo surrogate=gmpo ratio=token clip_low=0.4 clip_high=0.4 aggregate=sequence"
    " kl_in_loss=False rate=None kl_coef=None",
    "grpo": "grpo group_size=64 kl_loss_coef=0.04 kl_loss_estimator=k3 aggregate=sequence"
    " rate=1e-06 kl_coef=None",
    "grpo_process": "grpo step_end=step_end group_size=64 kl_loss_coef=0.04 aggregate=sequence"
    " rate=1e-06 kl_coef=None",
    "grpo_wins": "grpo group_size=8 kl_loss_coef=0.04 rate=None kl_coef=0.0",
    "gspo": "grpo ratio=sequence clip_low=0.0003 clip_high=0.0004 num_minibatches=4"
    " rate=None kl_coef=None",
    "ipo": "dpo kind=ipo beta=0.1 rate=None",
    "kl_cov": "clip_cov kind=kl share=0.002 kl_cov_coef=1.0 clip_low=1.0 clip_high=inf"
    " kl_in_loss=False rate=None kl_coef=None",
    "kto": "kto beta=0.1 desirable_weight=None undesirable_weight=None batch_size=32 rate=5e-06",
    "luspo": "grpo ratio=sequence surrogate=clip aggregate=sum kl_in_loss=False"
    " rate=None kl_coef=None",
    "maxrl": "maxrl group_size=16 num_epochs=1 aggregate=token kl_in_loss=False"
    " rate=1e-06 kl_coef=0.0",
    "nash_md": "nash_md mixture=0.5 kl_loss_coef=0.1 kl_loss_estimator=k2 preference=wins"
    " group_size=2 aggregate=sum rate=5e-07 kl_coef=None",
    "online_dpo": "online_dpo kind=sigmoid beta=0.1 group_size=2 kl_in_loss=True"
    " rate=5e-07 kl_coef=None",
    "orpo": "dpo kind=orpo beta=0.1 needs_reference=False batch_size=32 rate=5e-06",
    "otb": "otb group_size=8 aggregate=token kl_in_loss=False rate=None kl_coef=None",
    "pass_at_k": "pass_at_k group_size=16 k=8 aggregate=sum kl_in_loss=False"
    " rate=1e-06 kl_coef=0.0",
    "ppo": "ppo num_epochs=4 value_clip=0.2 gae_lambda=0.95 whiten_rewards=True"
    " rate=1e-05 kl_coef=0.15",
    "process_reward": "reward_model steps=True num_epochs=3 rate=1e-05",
    "reinforce_pp": "rloo baseline=global group_size=1 num_minibatches=8 aggregate=sequence"
    " kl_in_loss=False rate=5e-07 kl_coef=0.0001",
    "reinforce_pp_baseline": "rloo baseline=both group_size=8 kl_loss_coef=0.001"
    " kl_loss_estimator=k2 rate=5e-07 kl_coef=0.0",
    "remax": "vpg baseline=greedy aggregate=token rate=1e-06 kl_coef=0.05",
    "replay": "replay surrogate=cispo clip_low=1.0 clip_high=1.0 group_size=8 kl_in_loss=False"
    " rate=None kl_coef=None",
    "rloo": "rloo group_size=4 baseline=group num_minibatches=2 aggregate=sum"
    " rate=1e-06 kl_coef=0.03",
    "safe_rlhf": "safe_rlhf group_size=4 limit=0.0 multiplier_rate=0.1 multiplier_max=5.0"
    " aggregate=token rate=1e-05 kl_coef=0.01",
    "sapo": "grpo surrogate=sapo ratio=token aggregate=sequence kl_in_loss=False"
    " rate=None kl_coef=None",
    "self_distill": "self_distill top_k=100 aggregate=token kl_in_loss=False rate=None kl_coef=0.0",
    "simpo": "dpo kind=simpo beta=2.0 gamma=1.0 needs_reference=False batch_size=128 rate=6e-07",
    "spo": "spo group_size=1 num_minibatches=8 clip_high=0.28 dual_clip=10.0 half_life=0.06"
    " exploration=0.05 rate=1e-06 kl_coef=0.0",
    "tr_dpo": "dpo kind=sigmoid beta=0.1 reference_ema=0.6 reference_refresh=None rate=None",
    "vapo": "ppo group_size=16 num_minibatches=16 clip_low=0.2 clip_high=0.28 aggregate=token"
    " gae_lambda=1.0 length_adaptive=0.05 positive_coef=0.1 normalize_returns=False value=separate"
    " value_warmup=50 value_learning_rate=2e-06 rate=1e-06 kl_coef=0.0",
    "vespo": "grpo surrogate=vespo ratio=product aggregate=token kl_in_loss=False"
    " rate=None kl_coef=None",
    "xpo": "xpo alpha=1e-05 kind=sigmoid beta=0.1 group_size=2 rate=5e-07 kl_coef=None",
}
SMALL = (
    "--network.hidden-size 8 --network.num-layers 1 --network.num-heads 1 --network.max-length 128 "
)
SMALL += (
    "--tokenizer.vocab-size 300 --text.bucket-multiple 128 --device None --rl.num-iterations 1 "
)
SMALL += "--rl.max-new-tokens 2 --rl.validation-fraction 0 --reward count:e"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_paper_and_combines_with_another_config(name):
    section, *said = SAYS[name].split()
    config = parse(RunConfig, ["--config", "tiny", name], algorithm=find_method(section))
    text = (ROOT / "configs" / "algorithms" / f"{name}.yaml").read_text("utf-8")
    given = yaml.safe_load(text)
    trained = given[section] if section in TASKS else given.get("rl", {})
    rates = {"rate": trained.get("optimizer", {}).get("learning_rate")}
    rates["kl_coef"] = trained.get("kl_coef")
    keys = [word.partition("=")[0] for word in said]
    settings = getattr(config, section, None) or config.own[section]
    values = [rates[key] if key in rates else getattr(settings, key) for key in keys]
    assert [f"{key}={value}" for key, value in zip(keys, values, strict=True)] == said
    assert (config.rl.dynamic_sampling > 0) == (name == "dapo")
    assert config.network == TINY_RUN.network
    comment = text.replace("\n# ", " ")
    assert re.search(r"arXiv \d{4}\.\d{5}", comment)
    stage = "reward-model" if section == "reward_model" else section
    command = "python told.py" if name == "self_distill" else f"rlhf-jax {stage}"
    assert f"{command} --config tiny {name}" in comment


def test_the_optimizers_of_the_authors():
    """lm-human-preferences clips no gradient; HALOs clips at 5 and decays weights."""
    settings = parse(RunConfig, ["--config", "tiny", "ppo", "kto"])
    ppo_optimizer = settings.rl.optimizer
    kto_optimizer = settings.kto.optimizer
    assert (ppo_optimizer.max_grad_norm, ppo_optimizer.schedule) == (None, "linear")
    assert (kto_optimizer.max_grad_norm, kto_optimizer.weight_decay) == (5.0, 0.01)


@pytest.mark.parametrize("kind", ["sigmoid", "simpo", None])
def test_a_run_scores_a_reference_where_the_loss_reads_one(kind):
    model = models.build(
        models.GPT2Config(vocab_size=3, max_length=4, hidden_size=2, num_layers=1, num_heads=1)
    )
    config = RunConfig(dpo=DPOStage(kind=kind or "sigmoid"))
    run = OpenRun("dpo", None, config, Layout(sharding.make_mesh(1)))
    none = np.zeros(0, int)
    job = Job(
        run=run,
        settings=config.dpo if kind else config.sft,
        source=model_source(config),
        language_model=LanguageModel(model, initial_params(model), None),
        rows=[],
        encoded=encoding.encode_texts([Row("a", ("b", ""), "file")], characters("ab")),
        train_rows=none,
        held_out=none,
        plan=batches.Plan(np.ones(4), 4, None),
        collate=None,
        bucket_multiple=16,
        num_steps=1,
        optimizer=optax.sgd(1.0),
    )
    task = training.dpo.TASK if kind else training.sft.TASK
    assert (task.prepare(job).reference is None) == (kind != "sigmoid")


# What the commands in the heads of files read, and how small their runs are made.
MADE = {
    "mine.py": "def prefer(prompts, first, second): return [0.5] * len(first)",
    "told.py": """
from rlhf_jax import cli, rewards
from rlhf_jax.algorithms import self_distill

reward = rewards.teacher_prompts(lambda topic: [4, 5], "topic")
cli.run_script(lambda: cli.train_algorithm(self_distill, reward=reward))
""",
    "solutions.jsonl": "\n".join(
        json.dumps({"prompt": f"Add {i}.", "steps": ["It is", f"{i}."], "labels": [True, i > 9]})
        for i in range(32)
    ),
}
FEW = "--rl.num-iterations 3 --rl.max-new-tokens 2 --rl.validation-prompts 4"
STEPS = {name: f"--{name.replace('_', '-')}.max-steps 2" for name in TASKS}
CONFIGS = ROOT / "configs"
HEADS = [
    path.relative_to(CONFIGS).as_posix()
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent != CONFIGS or path.stem == "tiny"
]


@pytest.mark.slow
@pytest.mark.parametrize("file", HEADS)
def test_the_commands_in_the_head_of_a_file_run(file, tmp_path):
    """As they are typed, with shorter answers and fewer steps."""
    for name, text in MADE.items():
        (tmp_path / name).write_text(text)
    text = (CONFIGS / file).read_text("utf-8")
    commands = re.findall(r"^#   (\S.*)$", re.split(r"\n(?!#)", text)[0], re.MULTILINE)
    assert commands
    if "runs/sft" in text:
        commands.insert(0, "rlhf-jax sft --config tiny --output-dir runs/sft")
    for command in commands:
        words = shlex.split(command.replace("--config configs/", f"--config {CONFIGS}/"))
        short = STEPS.get(words[1].replace("-", "_"), FEW).split()
        places = [] if "--output-dir" in words else ["--output-dir", "run"]
        done = forks.run([*words, *short, *places], tmp_path)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    rows = metric_rows(tmp_path / "run")
    last = [row for row in rows if "nonfinite" in row][-1]
    assert last["nonfinite"] == 0
    assert any(key.endswith("/loss") for key in last)
    assert ("objective/greedy_score" in last) == file.endswith("/remax.yaml")


def code_lines(path):
    """Lines without docstrings and blank lines."""
    source = path.read_text("utf-8")
    told = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            told |= {*range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and number not in told for number, line in lines)


def test_the_tables_of_methods_are_true():
    """Every method of docs/algorithms/index.md: its presets, its code, its lines, its tests."""
    page = (ROOT / "docs" / "algorithms" / "index.md").read_text("utf-8")
    head, commands = page.split("## Commands, code and known optima")
    about, rows = (
        [line[2:-2].split(" | ") for line in part.splitlines() if line.startswith("| ")][1:]
        for part in (head, commands)
    )
    assert [row[0] for row in about] == [row[0] for row in rows]
    for method, paper, here, *others in about:
        assert re.search(r"\w+ (et al\. |and \w+ )?(19|20)\d\d", paper), f"{method}: no paper"
        assert len(others) == 4
        if module := re.search(r"a module of (\d+) lines, `(\w+)`", here):
            assert int(module[1]) == code_lines(ALGORITHMS_FOLDER / f"{module[2]}.py") <= 60
    modules = {name for _, _, here, *_ in about for name in re.findall(r", `(\w+)`$", here)}
    files = {path.stem for path in ALGORITHMS_FOLDER.glob("*.py")}
    assert modules == {name for name in files if find_method(name)}
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = set()
    for method, how, code, test in rows:
        named |= set(re.findall(r"--config (\w+)", how))
        functions = re.findall(r"`(\w+)\.(\w+)`", code)
        assert functions, f"{method}: no code"
        for file, function in functions:
            sources = [p.read_text("utf-8") for p in (ROOT / "rlhf_jax").rglob(f"{file}.py")]
            is_there = any(re.search(rf"^(def )?{function}\b", x, re.MULTILINE) for x in sources)
            assert is_there, f"{file}.{function}"
        optima = re.findall(r"^`(\w+)`(?: \(([\w`, ]+)\))?$", test)
        assert optima, f"{method}: no known optimum"
        for function, cases in optima:
            assert f"def test_{function}(" in tests, method
            assert all(f'"{case}"' in tests for case in re.findall(r"`(\w+)`", cases)), method
    assert named == set(PRESETS)


REAL = Path(os.environ.get("RLHF_JAX_DATA", "none")) / "gsm8k" / "train_first2000.jsonl"
GOOD = "regex:####\\s*-?\\$?[\\d,.]*\\d\\s*$"


@pytest.mark.parametrize(
    ("response", "matches"),
    [
        ("so 5 + 2 = 7\n#### 7", 1),
        ("#### $1,000.50 ", 1),
        ("#### -3", 1),
        ("#### seven", 0),
        ("7", 0),
        ("#### 7!", 0),
    ],
)
def test_the_format_reward_of_gsm8k(response, matches):
    (_, entry) = parse(RunConfig, ["--config", "gsm8k"]).reward
    pattern = GOOD.removeprefix("regex:")
    assert entry == f"{GOOD}*0.1"
    assert verifiable.regex(pattern)([], [response]) == [matches]


@pytest.mark.slow
def test_the_gsm8k_recipe_starts(tmp_path, monkeypatch):
    """One iteration with a tiny random model in place of Qwen2.5-0.5B, and the same rewards and
    template; rows of GSM8K where they are, else made up."""
    rows = [
        {"question": f"What is {i} + 2?", "answer": f"It is {i + 2}.\n#### {i + 2}"}
        for i in range(16)
    ]
    if REAL.is_file():
        rows = [json.loads(line) for line in REAL.read_text("utf-8").splitlines()[:16]]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if importlib.util.find_spec("math_verify") is None:
        monkeypatch.setitem(sys.modules, "math_verify", Checker)
    small = SMALL.replace(
        "--reward count:e", "--network.max-length 900 --model None --compute.dtype float32"
    )
    small += " --rl.batch-size 16 --rl.max-prompt-length None --grpo.num-microbatches 1"
    places = ["--data", str(tmp_path / "train.jsonl"), "--output-dir", str(tmp_path / "run")]
    config = parse(RunConfig, ["--config", "gsm8k", *small.split(), *places])
    last = training.rl.run(config, grpo).metrics
    assert {"reward/math", f"reward/{GOOD}", "objective/score"} <= last.keys()
    assert (last["reward/unscored"], last["nonfinite"]) == (0, 0)


# The other recipes have tests of their own: calculator, gsm8k, quickstart, shakespeare, tiny.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "arithmetic",
        soak("assistant"),
        "gpt2_hh",
        soak("pipeline"),
        soak("preferences"),
        "sentiment",
    ],
)
def test_a_recipe_starts(name, data, tmp_path, monkeypatch):
    """A step of each stage with a tiny random model in place of its own, on rows that the package
    ships.
    """
    kind = sentiment.SentimentConfig if name == "sentiment" else RunConfig
    small = SMALL.replace(
        " --reward count:e", " --model None --rl.batch-size 16 --text.template {prompt}"
    )
    small += (
        " --sft.num-epochs 1 --reward-model.num-epochs 1 --rl.max-prompt-length None "
        "--compute.dtype float32"
    )
    small += (
        " --ppo.num-epochs 1 --ppo.num-minibatches 1 --ppo.num-microbatches 1 --grpo.group-size 4"
    )
    config = parse(
        kind,
        ["--config", name, *small.split(), "--data", data, "--output-dir", str(tmp_path / "run")],
    )
    if name == "arithmetic":
        monkeypatch.chdir(ROOT)  # where its reward lies
        arithmetic.write(tmp_path, num_prompts=32)
        results = [training.rl.run(replace(config, data=(str(tmp_path),)), grpo)]
    elif name == "sentiment":
        results = [training.rl.run(replace(config, reward=("count:e",)), ppo)]
    else:
        result = (
            training.reward_model.run(config)
            if name == "preferences"
            else training.pipeline.run(config)
        )
        results = [result] if name == "preferences" else list(result)
    assert [stage.metrics["nonfinite"] for stage in results] == [0] * len(results)


# --- The defaults of other libraries

# What each file says, and the sections that a command may read of it.
DEFAULTS = {
    "trl": "text.max_length=1024 sft.optimizer.schedule=linear sft.validation_fraction=0.0"
    " reward_model.normalize_samples=0 dpo.optimizer.warmup_steps=0.0 rl.num_epochs=3"
    " grpo.kl_loss_coef=0.0 grpo.aggregate=token dpo.optimizer.learning_rate=1e-06"
    " ppo.num_epochs=4 ppo.gae_lambda=0.95 ppo.value_clip=0.2 ppo.value_coef=0.1"
    " ppo.normalize_returns=False",
    "openrlhf": "text.max_length=2048 sft.optimizer.min_lr_ratio=0.1"
    " sft.optimizer.learning_rate=5e-06 reward_model.optimizer.learning_rate=9e-06"
    " rl.optimizer.b2=0.95"
    " rl.optimizer.schedule=cosine rl.score_clip=10.0 rl.kl_coef=0.01 ppo.gae_lambda=1.0"
    " ppo.value_clip=0.5 ppo.value_learning_rate=9e-06 ppo.num_epochs=1 ppo.value_coef=1.0"
    " ppo.normalize_returns=False",
    "verl": "rl.optimizer.schedule=constant rl.optimizer.weight_decay=0.01 rl.kl_coef=0.0"
    " rl.validation_temperature=0.0 ppo.dual_clip=3.0 ppo.gae_lambda=1.0 ppo.num_epochs=1"
    " grpo.aggregate=token grpo.kl_loss_coef=0.0 rl.num_epochs=30 ppo.value_coef=1.0"
    " ppo.normalize_returns=False",
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_of_another_library(name):
    """On top of a method's paper, and before one's own flags, for a pretrained model too."""
    rate = ["--rl.optimizer.learning-rate", "5e-7"]
    said = [word.partition("=") for word in DEFAULTS[name].split()]
    for paper in ([], ["ppo"]):
        files = ["--config", "tiny", *paper, name]
        config = parse(RunConfig, [*files, "--model", "gpt2", *rate])
        values = [operator.attrgetter(key)(config) for key, _, _ in said]
        assert [str(value) for value in values] == [value for _, _, value in said]
    assert config.rl.optimizer.learning_rate == 5e-7
    assert config.ppo.value == "separate"
    text = (ROOT / "configs" / "defaults" / f"{name}.yaml").read_text("utf-8")
    assert re.search("2026", text)
    assert re.search(r"1\.16|at commit [0-9a-f]{7}", text)
    assert sorted(path.stem for path in (ROOT / "configs" / "defaults").iterdir()) == sorted(
        DEFAULTS
    )


@pytest.mark.parametrize("stage", [*TASKS, *ALGORITHMS])
def test_the_length_that_is_typed_wins_over_a_preset(stage):
    """Also over the passes of the preset; and passes that are typed over its length."""
    is_rl = stage in ALGORITHMS
    section = "rl" if is_rl else stage
    key = "num_iterations" if is_rl else "max_steps"
    length, passes = (f"{section}.{name}" for name in (key, "num_epochs"))

    def typed(setting, *presets):
        flags = [f"--{setting}".replace("_", "-"), "2", "--config", "tiny", *presets]
        return getattr(parse(RunConfig, flags, sections=(length, passes)), section)

    for preset in ("trl", "openrlhf", "verl"):
        own = typed(length, preset)
        assert getattr(own, key) == 2
        assert not is_rl or own.num_epochs is None
    own = typed(passes, "verl")
    assert own.num_epochs == 2
    assert is_rl or own.max_steps is None
