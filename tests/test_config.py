"""Precedence of flag, file and default; every mistake named with file, line and key; YAML that
reads back equal; the rules of the sections."""

import contextlib
import dataclasses
import logging
import math
import operator
import os
import random
import re
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
import yaml
from builders import ROOT

import rlhf_jax
from rlhf_jax import config, ppo
from rlhf_jax.cli.stages import STAGES
from rlhf_jax.config import (
    Compute,
    LoRA,
    Network,
    Optimizer,
    RLStage,
    RunConfig,
    Safety,
    SFTStage,
    Tokenizer,
    check_trusted,
    flag_help,
    parse,
    to_yaml,
    yaml_files,
)
from rlhf_jax.config.settings import RIVALS
from rlhf_jax.errors import UserError
from rlhf_jax.training.common.optimizer import make_optimizer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text):
    Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--config", "c.yaml"]


def test_flag_goes_before_file_before_default():
    file = write("sft: {optimizer: {eps: 1e-3, b1: 0.5}}\nseed: 7\n")
    # Other sections keep their values, though their default is the same object.
    adam = replace(RunConfig().sft.optimizer, eps=1e-3, b1=0.25)
    expected = RunConfig(seed=7, sft=SFTStage(optimizer=adam))
    for argv in ([*file, "--sft.optimizer.b1", "0.25"], ["--sft.optimizer.b1", "0.25", *file]):
        assert parse(RunConfig, argv, sections=("sft.optimizer",)) == expected
    # Of several files each setting counts where it is given last.
    Path("d.yaml").write_text("b1: 0.5\n")
    Path("e.yaml").write_text("b2: 0.5\nb1: 0.75\n\neps: -1.0")
    for argv in (["--config", "e.yaml", "d.yaml"], ["--config", "e.yaml", "--config=d.yaml"]):
        merged = parse(Optimizer, [*argv, "--eps", "1e-3"])
        assert merged.b1 == 0.5
        assert merged.b2 == 0.5
        assert merged.eps == 1e-3
    with pytest.raises(UserError, match=r"^e\.yaml, line 4: eps must be at least 0"):
        parse(Optimizer, ["--config", "e.yaml", "d.yaml"])
    assert parse(Optimizer, ["--b1", "0.25", "--config", "d.yaml", "--b1", "0.75"]).b1 == 0.75


def test_a_config_that_comes_with_the_package_is_called_by_its_name(tmp_path, monkeypatch):
    here = parse(RunConfig, ["--config", str(ROOT / "configs" / "tiny.yaml")])
    assert parse(RunConfig, ["--config", "tiny"]) == here
    monkeypatch.setattr(
        config.trust, "__file__", str(tmp_path / "config" / "trust.py")
    )  # as a wheel has it
    Path("configs").mkdir()
    Path("configs/tiny.yaml").write_text("b1: 0.5")
    assert parse(Optimizer, ["--config", "tiny"]).b1 == 0.5


def test_values_of_every_type():
    text = """
classifier: null
words: [a.txt, '-b']
penalty: 1e-5
above: 1
below: ~
replacement: 'None'
prompts: count
score: 2
"""
    flags = ["--classifier", "count:a"]
    safety = parse(Safety, [*write(text), *flags])
    expected = Safety(
        ("a.txt", "-b"), (), "count:a", None, 1.0, "count", "None", penalty=1e-5, score=2.0
    )
    assert safety == expected
    assert isinstance(safety.above, float)
    flags += [
        "--words",
        "x",
        "y",
        "--below",
        "null",
        "--score",
        "None",
        "--penalty",
        "1e-2",
        "--patterns",
        "--prompts",
        "drop",
    ]
    expected = replace(expected, words=("x", "y"), penalty=0.01, prompts="drop", score=None)
    assert parse(Safety, [*write(text), *flags]) == expected
    assert parse(Safety, write("words: []\nreplacement: None")) == Safety()
    compute = parse(Compute, [*write("remat: yes\nscan_layers: true"), "--scan-layers", "false"])
    assert compute == Compute(remat=True, scan_layers=False)
    compute = parse(Compute, [*write("remat: auto\nscan_layers: no"), "--scan-layers"])
    assert compute == Compute(remat="auto", scan_layers=True)
    assert parse(Compute, []) == Compute(remat="auto", scan_layers="auto")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ppo:\n  clip_lo: 1", "line 2: .* ppo.clip_lo; .* ppo.clip_low"),
        ("ppo:\n  clip-low: 1", "line 2: .* ppo.clip-low; .* ppo.clip_low"),
        ("seed: 1\nbeta: 1", "line 2: .* beta; .* dpo.beta or kto.beta or distill.beta"),
        ("ppo:\n  seed: 1", "line 2: .* ppo.seed; .* seed"),
        ("lora: {zzz: 1}", "line 1: .* lora.zzz; .* rank, alpha, dropout, match"),
        ("? [a]\n: 1", "line 1: .* a list of 1; "),
        ("ppo:\n  clip_low: '0.5'", "line 2: ppo.clip_low .* a float, found '0.5'"),
        ("ppo:\n  clip_low:", "line 2: ppo.clip_low .* a float, found nothing"),
        ("seed: " + "9" * 5000, "line 1: seed .* an int, found 99"),
        ("seed: true", "line 1: seed .* an int, found true"),
        ("model: [a]", "line 1: model .* a string or null, found a list of 1"),
        ("tokenizer:\n  kind: x", "line 2: tokenizer.kind .* 'bpe', 'characters', found 'x'"),
        ("resume: 1", "line 1: resume .* true or false, found 1"),
        ("compute: {remat: 1}", "line 1: compute.remat .* true or false or auto, found 1"),
        ("data: x", "line 1: data .* a list, found 'x'"),
        ("data: [a,\n    3]", "line 2: each of data .* a string, found 3"),
        ("seed: 1\nseed: 2", "line 2: key seed .* twice, .* line 1"),
        ("- seed", "line 1: .* a mapping .*, found a list of 1"),
        ("", "is empty"),
        ("seed: 1\nppo: [", "line 2: .* YAML"),
        ("seed: 1\nmodel: \x01", "line 2: .* YAML .* special characters"),
        ("model: " + "[" * 1000, ".* YAML .* recursion depth"),
        (b"seed: 1\nmodel: \xe4", "line 2: .* UTF-8: unexpected end of data"),
        ("lora: {alpha: 1,\n rank: -1}", "line 2: lora.rank must be at least 0, got -1"),
        ("keep_last: 1\nlora:\n  rank: 2", "line 3: lora.rank .* --model"),
    ],
)
def test_a_mistake_in_the_file_is_named(text, said):
    with pytest.raises(UserError) as caught:
        parse(RunConfig, write(text))
    assert re.match(f"c.yaml(, |: ){said}", str(caught.value))
    assert len(str(caught.value)) < 430


def test_all_mistakes_of_the_files_are_named_at_once():
    Path("d.yaml").write_text("zzz: 1")
    file = write("seed: x\nrl:\n  temprature: 1\n  top_k: a\nlora: 3\nseed: 1\nseed: 2")
    with pytest.raises(UserError) as caught:
        parse(RunConfig, [*file, "d.yaml"])
    starts = [
        "c.yaml, line 1: seed .* an int",
        "c.yaml, line 3: .* rl.temprature; .* rl.temperature",
        "c.yaml, line 4: rl.top_k .* an int or null",
        "c.yaml, line 5: lora .* a mapping",
        "c.yaml, line 6: key seed .* twice, .* line 1",
        "c.yaml, line 7: key seed .* twice, .* line 1",
        "d.yaml, line 1: .* zzz; .* --help",
    ]
    lines = str(caught.value).splitlines()
    assert all(re.match(start, line) for start, line in zip(starts, lines, strict=True))


def test_all_unknown_keys_and_flags_are_named_at_once_each_with_one_that_the_command_reads():
    file = write("batch_sise: 8\nrl: {temprature: 1}\nsft: {num_epoch: 1}\nclip_lo: 1")
    typed = "--batch-sise 8 --rl.lerning-rate=1 --ppo.no-whiten-advantage --seed 1 --sft.batch-size"
    with pytest.raises(UserError) as caught:
        parse(RunConfig, [*file, *typed.split()], sections=(*STAGES["ppo"].reads, "ppo"))
    assert str(caught.value).splitlines() == [
        "c.yaml, line 1: unknown key batch_sise; did you mean rl.batch_size?",
        "c.yaml, line 2: unknown key rl.temprature; did you mean rl.temperature?",
        "c.yaml, line 3: unknown key sft.num_epoch; did you mean sft.num_epochs?",
        "c.yaml, line 4: unknown key clip_lo; did you mean ppo.clip_low?",
        "unknown flag --batch-sise; did you mean --rl.batch-size?",
        "unknown flag --rl.lerning-rate; did you mean --rl.optimizer.learning-rate?",
        "unknown flag --ppo.no-whiten-advantage; did you mean --ppo.whiten-advantages?",
        "--sft.batch-size is a setting that this command does not read",
    ]


# A file of another library, and what each of its keys is told.
THEIRS = {
    "model_name_or_path": "here it is model",
    "dataset_name": "here it is data: org/name:split",
    "learning_rate": "here it is sft.optimizer.learning_rate, or the same of another stage",
    "per_device_train_batch_size": "here it is sft.batch_size, or the same of another stage: of ",
    "max_length": "here it is text.max_length: text.too_long says what becomes of longer texts",
    "load_in_4bit": "here it is lora.base: nf4 or int4, with lora.rank",
    "num_generations": "here it is grpo.group_size",
    "save_strategy": "here it is checkpoint_interval: in steps; ",
    "reward_weights": "here it is reward: the weight behind each, as 'mine.py:score*0.5'",
    "push_to_hub": "there is no such setting here: `rlhf-jax export RUN FOLDER` makes the folder",
    "log_completions": "there is no such setting here: every run writes responses into samples",
    "metric_for_best_model": "here it is keep_best: max:METRIC or min:METRIC",
    "eos_tokens_id": "`rlhf-jax STAGE --help` shows the keys",
}


def test_each_key_of_another_library_gets_a_line_with_ours(tmp_path):
    file = tmp_path / "trl.yaml"
    file.write_text("\n".join(f"{key}: 1" for key in THEIRS))
    with pytest.raises(UserError) as caught:
        parse(RunConfig, ["--config", str(file)])
    lines = str(caught.value).split("\n")
    assert len(lines) == len(THEIRS)
    for number, (line, (key, said)) in enumerate(zip(lines, THEIRS.items(), strict=True), 1):
        assert line.startswith(f"{file}, line {number}: unknown key {key}; {said}")
        assert len(line.removeprefix(str(file))) < 170
    with pytest.raises(UserError, match=r"--num-train-epochs; here it is --sft\.num-epochs, or"):
        parse(RunConfig, ["--num-train-epochs", "3"], sections=("sft.num_epochs", "kto.num_epochs"))


# Fields of TRL 1.12's PPOConfig: what the answer to each as a flag of `rlhf-jax ppo` names, "none"
# where there is no such setting here.
OF_PPO = {
    "dataset_num_proc": "none",
    "num_mini_batches": "ppo.num-minibatches",
    "total_episodes": "rl.num-iterations",
    "local_rollout_forward_batch_size": "compute.score-rows",
    "num_sample_generations": "rl.validation-interval",
    "response_length": "rl.max-new-tokens",
    "stop_token": "none",
    "stop_token_id": "none",
    "temperature": "rl.temperature",
    "missing_eos_penalty": "rl.missing-eos-penalty",
    "sft_model_path": "model",
    "world_size": "none",
    "num_total_batches": "rl.num-iterations",
    "micro_batch_size": "rl.batch-size",
    "local_batch_size": "rl.batch-size",
    "batch_size": "rl.batch-size",
    "local_mini_batch_size": "ppo.num-minibatches",
    "mini_batch_size": "ppo.num-minibatches",
    "reward_model_path": "reward",
    "model_adapter_name": "none",
    "ref_adapter_name": "none",
    "num_ppo_epochs": "ppo.num-epochs",
    "whiten_rewards": "ppo.whiten-rewards",
    "kl_coef": "rl.kl-coef",
    "kl_estimator": "none",
    "cliprange": "ppo.clip-low",
    "vf_coef": "ppo.value-coef",
    "cliprange_value": "ppo.value-clip",
    "gamma": "ppo.gamma",
    "lam": "ppo.gae-lambda",
    "ds3_gather_for_generation": "mesh.fsdp",
    "learning_rate": "rl.optimizer.learning-rate",
    "push_to_hub": "none",
}
# The same of its RewardConfig, for `rlhf-jax reward-model`.
OF_REWARD_MODELS = {
    "model_init_kwargs": "compute.dtype",
    "trust_remote_code": "none",
    "chat_template_path": "none",
    "disable_dropout": "network.dropout",
    "dataset_num_proc": "none",
    "eos_token": "none",
    "max_length": "text.max-length",
    "pad_to_multiple_of": "text.bucket-multiple",
    "center_rewards_coefficient": "reward-model.centering",
    "activation_offloading": "compute.remat",
    "pad_token": "none",
    "learning_rate": "reward-model.optimizer.learning-rate",
}
# What both have of transformers' TrainingArguments 5.24; seed and output_dir are ours too.
OF_TRAINERS = """
accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2
adam_epsilon auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16
bf16_full_eval data_seed dataloader_drop_last dataloader_in_order
dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed
disable_tqdm do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay
eval_do_concat_batches eval_on_start eval_steps eval_strategy eval_use_gather_object fp16
fp16_full_eval fsdp fsdp_config full_determinism gradient_accumulation_steps gradient_checkpointing
gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo
hub_revision hub_strategy hub_token ignore_data_skip include_for_metrics
include_num_input_tokens_seen label_names label_smoothing_factor length_column_name
liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica log_on_each_node
logging_first_step logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs
lr_scheduler_type max_grad_norm max_steps metric_for_best_model neftune_noise_alpha
num_train_epochs optim optim_args optim_target_modules parallelism_config
per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project
remove_unused_columns report_to restore_callback_states_from_checkpoint resume_from_checkpoint
run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit
skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode
torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
train_sampling_strategy use_cache use_cpu use_liger_kernel warmup_steps weight_decay
"""


def answer(stage, flag):
    """What is said of an unknown flag of a command: our setting, without its dashes, or none."""
    sections = (*STAGES[stage].reads, stage.replace("-", "_"))
    with pytest.raises(UserError) as caught:
        parse(RunConfig, [f"--{flag}", "1"], sections=sections)
    said = str(caught.value).removeprefix(f"unknown flag --{flag}; ")
    found = re.match(
        r"(?:here it is|did you mean) --([\w.-]+)|there is no such setting here: .", said
    )
    assert found, caught.value
    return found[1] or "none"


@pytest.mark.parametrize(("stage", "fields"), [("ppo", OF_PPO), ("reward-model", OF_REWARD_MODELS)])
def test_each_flag_of_ppo_and_reward_models_of_trl_is_answered(stage, fields):
    assert {flag: answer(stage, flag) for flag in fields} == fields


def test_each_flag_that_all_trainers_of_trl_have_is_answered():
    other = set(OF_TRAINERS.split()) - {*yaml_files.other_keys()}
    assert {flag: answer("ppo", flag) for flag in other} == {"fsdp": "mesh.fsdp"}


@pytest.mark.parity
def test_these_are_the_fields_of_ppo_and_reward_models_of_trl():
    ppo = pytest.importorskip("trl.experimental.ppo")  # of the TRL of the extra "benchmarks"
    import transformers
    import trl

    general = {*transformers.TrainingArguments.__dataclass_fields__}
    assert {*OF_TRAINERS.split(), *OF_PPO, "seed", "output_dir"} >= general
    assert {*ppo.PPOConfig.__dataclass_fields__} - general <= {*OF_PPO}
    assert {*trl.RewardConfig.__dataclass_fields__} - general <= {*OF_REWARD_MODELS}


def test_no_name_of_another_library_has_two_answers():
    text = Path(yaml_files.__file__).with_name("other_keys.yaml").read_text("utf-8")
    names = " ".join(yaml.safe_load(text).values()).split()
    assert len(names) == len(set(names)) == len(yaml_files.other_keys())


def test_the_keys_of_other_libraries_lead_to_settings_that_exist():
    known = yaml_files.dotted_keys(config.RunConfig)
    last = {key.rpartition(".")[2] for key in known}
    entries = yaml_files.other_keys()
    assert len(entries) > 100
    for theirs, entry in entries.items():
        key, _, note = entry.partition(" - ")
        if theirs == "reward_model":  # theirs is a folder, ours a section
            continue
        assert theirs not in known
        assert key == "none" or key.replace("SECTION", "sft") in known
        assert note or key != "none"
        # Where ours has this name too, it means the same or the note says more.
        assert theirs not in last or key.endswith(theirs) or theirs == "max_length"


def test_a_section_that_is_a_value_of_another_library():
    with pytest.raises(UserError) as caught:
        parse(RunConfig, write("reward_model: saves/rm"))
    found = "reward_model must be a mapping of keys, found 'saves/rm'"
    assert f"{found}; of another library: here it is reward: " in str(caught.value)
    with pytest.raises(UserError) as caught:
        parse(RunConfig, write("rl: saves/rl"))
    assert str(caught.value).endswith("rl must be a mapping of keys, found 'saves/rl'")


def test_all_values_that_break_a_rule_are_named_at_once():
    file = write(
        "rl:\n  temperature: 0\n  max_turns: 2\n  batch_size: 0\nlora: {rank: -1}\nseed: -1"
    )
    with pytest.raises(UserError) as caught:
        parse(RunConfig, [*file, "--rl.top-p", "2"], sections=("rl.top_p",))
    lines = str(caught.value).splitlines()
    starts = [
        "c.yaml, line 5: lora.rank ",
        "c.yaml, line 4: rl.batch_size ",
        "c.yaml, line 2: rl.temperature ",
        "rl.top_p ",
        "c.yaml, line 3: rl.max_turns: ",
        "c.yaml, line 6: seed ",
    ]
    assert all(line.startswith(start) for start, line in zip(starts, lines, strict=True))
    # A rule between two values that no default can satisfy is named once.
    with pytest.raises(UserError) as caught:
        parse(RunConfig, write("mesh: {data: 0, fsdp: 0}"))
    assert str(caught.value).count("at least 1") == 1


SCORE = "score = len"


@pytest.fixture
def project():
    """The current folder within others: beside it a run of somebody else, in it one's own."""
    for name in ("mine/runs/ppo", "mine/lib", "theirs/run"):
        Path(name).mkdir(parents=True)
    for name in ("mine/score.py", "mine/runs/ppo/score.py", "theirs/run/score.py"):
        Path(name).write_text(SCORE)
    for name in ("mine/runs/ppo", "theirs/run"):
        Path(name, "manifest.json").write_text("{}")
    os.chdir("mine")


@pytest.mark.parametrize(
    ("place", "text", "flags", "refused"),
    [
        ("c.yaml", "reward: ['score.py:score']", "", False),
        ("c.yaml", "reward: [length, 'lib/../score.py:score*0.5']", "", False),
        ("../c.yaml", "reward: ['score.py:score']", "", False),
        ("runs/ppo/config.yaml", "reward: ['score.py:score']", "", True),
        ("c.yaml", "reward: [length, '../theirs/run/score.py:score*2']", "", True),
        ("c.yaml", "rl: {judge: ['../theirs/run/score.py:score']}", "", True),
        ("c.yaml", "rl: {environment: '../theirs/run/score.py:score'}", "", True),
        ("c.yaml", "safety: {classifier: '../theirs/run/score.py:score', above: 1.0}", "", True),
        ("../theirs/run/config.yaml", "reward: ['score.py:score']", "", True),
        ("runs/ppo/config.yaml", "reward: ['runs/ppo/score.py:score']", "", True),
        ("c.yaml", "reward: ['../theirs/run/score.py:score']", "--trust-config", False),
        ("c.yaml", "reward: ['../theirs/run/score.py:score']", "--reward length", False),
        ("c.yaml", "seed: 1", "--reward ../theirs/run/score.py:score", False),
        ("c.yaml", "reward: ['link.py:score']", "", True),
    ],
)
def test_a_config_that_runs_the_python_of_others_needs_trust(project, place, text, flags, refused):
    Path("link.py").symlink_to("../theirs/run/score.py")
    Path(place).write_text(text)
    argv = ["--config", place, *flags.split()]
    if not refused:
        assert parse(RunConfig, argv, sections=("reward",))
        return
    with pytest.raises(UserError) as caught:
        parse(RunConfig, argv)
    run, advice = str(caught.value).splitlines()
    assert run.startswith(f"{place}, line 1: ")
    assert re.search(
        r"score\S* runs the Python code of /.*/score\.py($| \(a config of the run /)", run
    )
    assert advice.endswith("you have read it, give --trust-config")


@pytest.mark.parametrize(
    ("place", "flags", "refused"),
    [
        ("c.yaml", "", False),
        ("../c.yaml", "", True),
        ("../theirs/run/config.yaml", "", True),
        ("runs/ppo/config.yaml", "", True),
        ("../c.yaml", "--trust-config", False),
        ("../c.yaml", "--reward length", False),
    ],
)
def test_a_config_of_others_that_sends_texts_away_needs_trust(project, place, flags, refused):
    Path(place).write_text("reward: ['http://their.host/score']")
    argv = ["--config", place, *flags.split()]
    if not refused:
        assert parse(RunConfig, argv, sections=("reward",)).reward
        return
    with pytest.raises(UserError, match=r"reward http://their\.host/score "):
        parse(RunConfig, argv)


@pytest.mark.parametrize(
    "text",
    [
        "judge: {url: 'HTTP://h/v1', model: m}",
        "rl: {engine: 'vllm:hTTp://h:1'}",
        "distill: {divergence: sampled, teacher: 'openai:HTTPS://h'}",
        "reward: [length, 'HTTPS://h/score*2']",
        "processes: 'h:8000,2,1'",
        "track: [tensorboard, wandb]",
        "reward: ['pairs:regex:score.py:score']",  # a file of this name
        "reward: ['loop.py:score']",
        'reward: ["\\0.py:score"]',
        "rl: {engine: 'stored:http://h'}",
        "judge: {url: 'http://h ', model: m}",
        "rl: {environment: 'score.py/.:score'}",  # which pathlib calls score.py
        "data: [demo, /dev/zero]",
        "data: ['../theirs/data.json']",
        "sft: {validation_data: [linked/data.json]}",
        "data: ['count:/../../theirs']",  # a reward's form: no path there, but one of data
        "data: ['own*1']",
        "model: 'math:/../..'",
        "model: /etc",
        "tokenizer: {name: /etc}",
        'model: "../a\\0b"',
        "reward: ['uncertainty:.5:runs/rm,/etc']",
        "reward: ['pairs:judge:/etc/rubric.yaml*.5']",
        "rl: {engine: 'stored:/etc'}",
        "engine: {weights: /etc}",
        "ppo: {value: separate, value_from: /etc}",
        "safety: {words: [/etc/passwd]}",
        "output_dir: ..",
        "resume: true",
        "overwrite: true",
        "allow_changed: [data]",
    ],
)
def test_what_the_config_of_a_run_names_needs_trust(project, text):
    for name in ("linked", "own*1"):
        Path(name).symlink_to("../theirs/run")
    Path("loop.py").symlink_to("loop.py")
    file = Path("runs/ppo/config.yaml")
    file.write_text(f"seed: 1\n{text}")
    with pytest.raises(UserError, match=r"^runs/ppo/config\.yaml, line 2: .*\n.*--trust-config$"):
        parse(RunConfig, ["--config", str(file)])
    assert parse(RunConfig, ["--config", str(file), "--trust-config"])
    file.rename("mine.yaml")  # in the current folder, and of no run
    assert parse(RunConfig, ["--config", "mine.yaml"])


def test_what_the_config_of_a_run_may_name(project):
    """Its own texts, and files and folders below the current folder or in the run's own."""
    here = Path.cwd()
    Path("runs/ppo/config.yaml").write_text(
        f"output_dir: {here}/runs/ppo\ndata: [demo, data/own.json]\nmodel: org/name\n"
        "reward: [length, 'regex:/|http://', 'count:/', 'min:runs/a,runs/b', 'judge:r.yaml']\n"
        "text: {template: 'http://{prompt}', template_options: {a: /b}}\n"
        "rl: {stop: [/], engine: 'stored:runs/ppo/engine'}\nalerts: ['/a > 1: log']\n"
        "safety: {patterns: ['/etc']}\ntrack: [tensorboard]\nprocesses: auto\n"
    )
    assert parse(RunConfig, ["--config", "runs/ppo/config.yaml"]).rl.engine


def test_the_run_of_a_config_is_found_by_any_path(project):
    run = Path("runs/ppo")
    (run / "deep").mkdir()
    Path("score.yaml").write_text("reward: ['score.py:score']")
    for place in ("config.yaml", "deep/other.yaml"):
        (run / place).write_text("reward: ['score.py:score']")
    (run / "link.yaml").symlink_to(Path("score.yaml").absolute())
    Path("out.yaml").symlink_to(run / "config.yaml")
    Path("folder").symlink_to(run)
    paths = [run / "config.yaml", run / "deep/other.yaml", run / "link.yaml"]
    paths += [Path("out.yaml"), Path("folder/config.yaml"), run / "../ppo/config.yaml"]
    (run / "checkpoints").mkdir()
    for mark in ("manifest.json", "checkpoints/start.json"):  # what --resume needs
        for path in paths:
            with pytest.raises(UserError, match="--trust-config"):
                parse(RunConfig, ["--config", str(path)])
        (run / "manifest.json").rename(run / "checkpoints/start.json") if mark[0] == "m" else None
    assert parse(RunConfig, ["--config", "score.yaml"]).reward
    typed = ["--config", str(paths[0]), "--reward", "score.py:score"]
    assert parse(RunConfig, typed, sections=("reward",)).reward
    with pytest.raises(UserError, match="--trust-config"):  # a value is no flag
        parse(RunConfig, ["--config", str(paths[0]), "--output-dir", "reward"])


# Settings that are texts, or numbers in words.
TEXTS = {"columns", "alerts", "keep_best", "template", "stop", "patterns", "replacement", "match"}
TEXTS |= {"frozen", "teacher_model"}


def test_every_setting_that_is_a_text_may_name_a_place_unless_it_is_known_not_to(project):
    asked = set()
    for key, kind in typed_keys(RunConfig):
        kinds = {kind, *typing.get_args(kind)}
        if not kinds & {str, tuple[str, ...]} or key == "allow_changed":
            continue
        name = key.rpartition(".")[2]
        given = {key: (("/dev/zero",), "runs/ppo/config.yaml, line 3")}
        with contextlib.suppress(UserError):
            check_trusted(given)
            assert name in TEXTS, key
            continue
        asked.add(name)
    assert asked.isdisjoint(TEXTS)
    assert {"data", "model", "reward", "classifier", "value_from", "weights"} <= asked


def typed_keys(cls, prefix=""):
    for name, kind in yaml_files.types_of(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from typed_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def test_every_setting_is_of_its_type_so_that_it_reads_back_as_it_was_written():
    """Such as 0.0 for a float: a run compares its config.yaml with what is read from it."""
    written = to_yaml(RunConfig())
    assert to_yaml(parse(RunConfig, write(written))) == written


def test_a_config_that_is_no_file_or_a_bomb_is_refused_at_once(tmp_path):
    os.mkfifo("pipe.yaml")
    with pytest.raises(UserError, match=r"pipe\.yaml: is no file"):
        parse(RunConfig, ["--config", "pipe.yaml"])
    levels = "".join(f", l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 8))
    with pytest.raises(UserError, match=r"line 1: text\.template_options must be .* too large"):
        parse(RunConfig, write(f"text: {{template_options: {{l0: &l0 [x]{levels}}}}}"))


def test_configs_of_the_package_are_trusted(tmp_path, monkeypatch):
    """They name files of a checkout, wherever the user stands in it."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own.yaml").write_text(f"reward: ['{tmp_path.parent}/score.py:score']")
    with pytest.raises(UserError, match="--trust-config"):
        parse(RunConfig, ["--config", "configs/own.yaml"])
    monkeypatch.setattr(config.trust, "__file__", str(tmp_path / "config" / "trust.py"))
    assert parse(RunConfig, ["--config", "own"]).reward


@dataclasses.dataclass(frozen=True)
class OwnConfig:
    """Of an algorithm of one's own."""

    alpha: float = 0.5
    """Weight of the second term."""
    rule: object = len

    def __post_init__(self):
        if self.alpha < 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}")


OWN = types.SimpleNamespace(__name__="mine.vapo", Config=OwnConfig)


def test_an_algorithm_of_one_s_own_has_a_section(capsys):
    file = write("vapo: {alpha: 0.25}\nppo: {value: separate}\nrl: {top_k: null}")
    assert parse(RunConfig, file, algorithm=OWN).own == {"vapo": OwnConfig(0.25)}
    own = parse(RunConfig, [*file, "--vapo.alpha", "0.1"], algorithm=OWN, sections=("vapo",))
    assert own.own == {"vapo": OwnConfig(0.1)}
    assert type(own) is RunConfig
    assert to_yaml(replace(own, own={"vapo": OwnConfig(0.1, rule=3)})) == (
        to_yaml(RunConfig()) + "vapo:\n  alpha: 0.1\n  rule: 3\n"
    )
    assert own.ppo == RunConfig().ppo  # of a file that stages share
    assert parse(RunConfig, [], algorithm=rlhf_jax.ppo) == RunConfig()
    for wrong, said in [
        (["--ppo.value", "separate"], "--ppo.value is a setting that this command does not read"),
        (["--vapo.alhpa", "1"], "unknown flag --vapo.alhpa; did you mean --vapo.alpha?"),
        ("vapo: {alpha: -1}", "c.yaml, line 1: vapo.alpha must be at least 0, got -1.0"),
        ("vapo: {aplha: 1}", "c.yaml, line 1: unknown key vapo.aplha; did you mean vapo.a"),
        ("vapo: {rule: 1}", "c.yaml, line 1: vapo.rule must be given in Python, found 1"),
    ]:
        argv = wrong if isinstance(wrong, list) else write(wrong)
        with pytest.raises(UserError, match=f"^{re.escape(said)}"):
            parse(RunConfig, argv, algorithm=OWN, sections=("vapo",))
    with pytest.raises(SystemExit, match="0"):
        parse(RunConfig, ["--help-verbose"], algorithm=OWN)
    shown = words(capsys.readouterr().out)
    assert "Weight of the second term. (default: 0.5)" in shown
    assert "--ppo" not in shown
    with pytest.raises(UserError, match=r"the algorithm mine\.rl: rl is a setting"):
        parse(RunConfig, [], algorithm=types.SimpleNamespace(__name__="mine.rl", Config=OwnConfig))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: cannot be read: No such file .*--config"):
        parse(RunConfig, ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(UserError, match="cannot be read"):
        parse(RunConfig, ["--config", str(tmp_path)])
    assert parse(Optimizer, write(b"\xef\xbb\xbfeps: 3")).eps == 3  # a byte order mark is ignored


def test_checks_run_on_the_final_values():
    """What the file gets wrong a flag may put right, and the other way round the file's line is not
    blamed.
    """
    file = write("lora:\n  alpha: -3\n")
    right = parse(RunConfig, [*file, "--lora.alpha", "0.5"], sections=("lora.alpha",))
    assert right.lora.alpha == 0.5
    with pytest.raises(UserError, match=r"^lora\.alpha must be above 0, got -4\.0"):
        parse(RunConfig, [*file, "--lora.alpha", "-4"], sections=("lora.alpha",))


def words(text):
    """What tyro prints, without its boxes and line breaks."""
    return " ".join(re.sub("[│─╭╮╰╯]", " ", text).split())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--b1", "x"], "Error parsing --b1: .* 'x'"),
        (["--schedule", "hinge"], "invalid choice 'hinge' for argument '--schedule'"),
        (["--b1"], "Missing value for argument '--b1'"),
        (["--b1", "0.5", "True"], "Unrecognized options: True"),
    ],
)
def test_wrong_values_of_flags_are_named(argv, said, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(Optimizer, argv)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(said, words(shown.err))
    with pytest.raises(UserError, match="--config: name a file"):
        parse(Optimizer, ["--config", *argv])


SECTIONS = ("ppo", "sft.optimizer.b1", "rl.top_k")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            "--ppo.cliprange-policy 3",
            "--ppo.cliprange-policy; .* --ppo.clip-low or --ppo.clip-high",
        ),
        ("--ppo.cliprange 3", "--ppo.cliprange; here it is --ppo.clip-low"),
        ("--ppo.num-epoch=3", "--ppo.num-epoch; .* --ppo.num-epochs"),
        ("--top-k 3", "--top-k; .* --rl.top-k"),
        ("--lora.zzz", "--lora.zzz; .* rank, alpha, dropout, match"),
        ("--data.train", "--data.train; .* --data"),
        ("--zzz.yyy", "--zzz.yyy; .* --help"),
        ("--sft.num-epochs 1", "--sft.num-epochs .* does not read"),
        ("--kto.desirable-wieght 1", "--kto.desirable-wieght; .* --help"),
        ("--reward length", "--reward .* does not read"),
    ],
)
def test_an_unknown_flag_is_answered_by_those_there_are(argv, said):
    with pytest.raises(UserError, match=f"^(unknown flag |){said}"):
        parse(RunConfig, argv.split(), sections=SECTIONS)


def test_a_name_like_no_other_is_answered_by_all_if_they_are_few():
    said = "^unknown flag --zzz; the keys are rank, alpha, dropout, match, base$"
    with pytest.raises(UserError, match=said):
        parse(LoRA, ["--zzz", "1"])


def test_a_command_has_the_flags_of_its_sections_alone(capsys):
    flags = ["--ppo.clip-low", "0.1", "--sft.optimizer.b1", "0.5", "--seed", "3", "--rl.top-k", "5"]
    file = write("rl: {temperature: 2.0}\ngrpo: {clip_low: 0.3}")  # shared by stages
    given = parse(RunConfig, [*file, *flags], sections=SECTIONS)
    assert given.seed == 3
    assert given.ppo.clip_low == 0.1
    assert given.sft.optimizer.b1 == 0.5
    assert given.rl.top_k == 5
    assert given.rl.temperature == 2.0
    assert given.grpo.clip_low == 0.3
    with pytest.raises(UserError, match=r"c.yaml, line 1: dpo\.beta must be above 0"):
        parse(RunConfig, write("dpo: {beta: 0}"), sections=SECTIONS)
    with pytest.raises(SystemExit, match="0"):
        parse(RunConfig, ["--help"], sections=SECTIONS)
    shown = set(re.findall(r"--([\w.-]+)", capsys.readouterr().out))
    assert {"seed", "ppo.clip-low", "sft.optimizer.b1", "rl.top-k"} < shown
    assert not {"sft.num-epochs", "rl.top-p", "reward", "grpo.clip-low", "lora.rank"} & shown


def test_help_shows_values_in_force_and_sentences_and_on_demand_texts(capsys):
    for flag, parts in {
        "-h": ["Trains things.", "For example rlhf-jax x --b1 0.5 The flags that matter most"],
        "--help": [
            "--b1 Adam's decay of the first moment. [0.31]",
            "--max-grad-norm Clip gradients to this global norm; null does not clip. [1.0]",
            "[constant; or linear, cosine, plateau]",
            "the four lowest layers. [null]",
            "--trust-config Use the Python files",
            "--help-verbose prints the whole texts",
        ],
        "--help-verbose": [
            "Adam's decay of the first moment. (default: 0.31)",
            "YAML files with values for these options",
        ],
    }.items():
        about = {"description": "Trains things.", "examples": ["rlhf-jax x --b1 0.5"]}
        with pytest.raises(SystemExit, match="0"):
            parse(Optimizer, [*write("b1: 0.31\n"), flag], first=("b2", "eps"), **about)
        text = words(capsys.readouterr().out)
        assert [part for part in parts if part not in text] == []


def test_help_names_each_flag_once_those_that_matter_first(capsys):
    with mock.patch.dict(os.environ, COLUMNS="80"), pytest.raises(SystemExit, match="0"):
        parse(RunConfig, ["--help"], first=("data", "ppo.clip_low"), sections=("ppo", "rl.top_k"))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert flags[:3] == ["--config", "--data", "--ppo.clip-low"]
    assert len(flags) == len(set(flags))
    assert {"--seed", "--rl.top-k", "--ppo.value", "--trust-config"} < {*flags}
    assert "--rl.top-p" not in flags
    assert [line for line in lines if line.startswith("ppo: ")]
    at = lines.index(next(line for line in lines if line.startswith("  --ppo.num-epochs ")))
    assert (
        " ".join(lines[at].split()[1:]) == f"Passes over each rollout. [{ppo.Config().num_epochs}]"
    )


def test_help_cuts_a_text_after_its_first_sentence():
    @dataclasses.dataclass(frozen=True)
    class Own:
        scale: bool = True
        """As FILE.py:f of Dr. GRPO says. It is
        more."""
        names: tuple[str, ...] = ("a", "b")
        text: str = "a\n"
        rule: Literal["x", "y"] | None = None
        """Two
        lines."""

    texts = {flag.key: flag.text for flag in flag_help.flags_of(Own(), "own")}
    assert texts == {
        "own.scale": "As FILE.py:f of Dr. GRPO says. [on]",
        "own.names": "[a b]",
        "own.text": '["a\\n"]',
        "own.rule": "Two lines. [null; or x, y]",
    }


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ("--deterministic maybe", "maybe"),
        ("--deterministic=true --seed 3", "true"),
        ("--no-deterministic 1", "1"),
    ],
)
def test_what_is_on_or_off_takes_no_value(argv, value):
    flag = re.split("[ =]", argv)[0]
    turns = "--deterministic turns it on, --no-deterministic off"
    with pytest.raises(UserError, match=f"^{flag} takes no value, got {value}: {turns}$"):
        parse(RunConfig, argv.split())
    right = parse(RunConfig, ["--compute.remat", "true", "--text.no-pack"])
    assert right.compute.remat is True
    fast = dataclasses.make_dataclass("Fast", [("fast", bool, False)], frozen=True)
    own = types.SimpleNamespace(__name__="vapo", Config=fast)
    with pytest.raises(
        UserError, match=r"^--vapo\.fast takes no value, got no: --vapo\.fast turns"
    ):
        parse(RunConfig, ["--vapo.fast", "no"], algorithm=own)
    with pytest.raises(SystemExit, match=r"^0$"):
        parse(RunConfig, ["--deterministic", "-h"])


def nested(key, value):
    """A value as the YAML text of its dotted key."""
    *path, name = key.split(".")
    opening = "".join(f"{part}: {{" for part in path)
    return f"{opening}{name}: {value}{'}' * len(path)}"


RIVAL_VALUES = {
    "resume": "true",
    "overwrite": "true",
    "model": "m",
    "tokenizer.name": "t",
    "tokenizer.kind": "characters",
    "tokenizer.vocab_size": "300",
    "data": "[a.json]",
    "rl.num_iterations": "3",
    "rl.num_epochs": "2",
    "rl.missing_eos_penalty": "1.5",
    "rl.missing_eos_score": "0.5",
    "rl.mask_truncated": "true",
    **{f"{stage}.data": "[b.json]" for stage in ("sft", "reward_model", "dpo", "kto", "rl")},
    **{f"{stage}.validation_data": "[v.json]" for stage in ("sft", "reward_model", "dpo")},
    "kto.validation_data": "[v.json]",
    "rl.validation_data": "[v.json]",
    **{f"{stage}.validation_fraction": "0.0" for stage in ("sft", "reward_model", "dpo")},
    "kto.validation_fraction": "0.0",
    "rl.validation_fraction": "0.0",
    **{f"{stage}.num_epochs": "2" for stage in ("sft", "reward_model", "dpo", "kto")},
    **{f"{stage}.max_steps": "5" for stage in ("sft", "reward_model", "dpo", "kto")},
}
PAIRS = [(key, rival) for key, rivals in RIVALS.items() for rival in rivals]


def test_every_setting_that_has_a_rival_is_tried():
    assert {*RIVAL_VALUES} == {key for pair in PAIRS for key in pair}
    assert {*RIVAL_VALUES} <= {*yaml_files.dotted_keys(RunConfig)}


@pytest.mark.parametrize(("key", "rival"), PAIRS)
def test_what_is_given_later_goes_before_what_says_the_same_thing_earlier(key, rival, caplog):
    """A flag before a file, a later file before an earlier one; in one file both stay."""
    caplog.set_level(logging.INFO)
    value = RIVAL_VALUES[key]
    earlier = write(nested(rival, RIVAL_VALUES[rival]))
    words = [] if value == "true" else re.findall(r"[\w.]+", value)
    default, rival_of = (operator.attrgetter(key)(RunConfig()), operator.attrgetter(rival))
    Path("later.yaml").write_text(nested(key, value))
    for argv in ([*earlier, "--" + key.replace("_", "-"), *words], [*earlier, "later.yaml"]):
        caplog.clear()
        config = parse(RunConfig, argv, sections=(key, rival))
        assert rival_of(config) == rival_of(RunConfig())
        assert operator.attrgetter(key)(config) != default
        assert f"c.yaml, line 1: {rival} " in caplog.text
        assert f" is not used, since {key} " in caplog.text
    if default in (None, False, ()):
        off = {None: "null", False: "false", (): "[]"}[default]
        Path("later.yaml").write_text(nested(key, off))
        assert rival_of(parse(RunConfig, [*earlier, "later.yaml"])) != rival_of(RunConfig())


def test_two_settings_that_say_one_thing_stay_where_both_are_given_at_once(caplog):
    caplog.set_level(logging.INFO)
    file = write("rl: {num_iterations: 5, num_epochs: 2}")
    typed = ["--rl.num-iterations", "7", "--rl.num-epochs", "3"]
    for argv, epochs in ((file, 2), (typed, 3), ([*file, *typed], 3)):
        assert (
            parse(RunConfig, argv, sections=("rl.num_iterations", "rl.num_epochs")).rl.num_epochs
            == epochs
        )
    assert "is not used" not in caplog.text
    both = ["--rl.missing-eos-score", "0", "--rl.missing-eos-penalty", "1"]
    with pytest.raises(UserError, match="give one"):
        parse(RunConfig, both, sections=("rl.missing_eos_score", "rl.missing_eos_penalty"))


def test_iterations_that_are_typed_are_the_length_of_a_run_by_the_defaults_of_trl():
    flags = ["--config", "tiny", "trl", "--rl.num-iterations", "3"]
    given = parse(RunConfig, flags, sections=(*STAGES["grpo"].reads, "grpo")).rl
    assert (given.num_iterations, given.num_epochs) == (3, None)
    assert given.lasting(prompts=640, group_size=4).num_iterations == 3


def test_a_file_keeps_what_the_command_does_not_read():
    """Such as the data of SFT, where PPO's is typed."""
    flags = [*write("sft: {data: [a.json]}"), "--data", "b.json"]
    assert parse(RunConfig, flags, sections=("rl", "ppo")).sft.data == ("a.json",)


SIGNS = "aé0 \n\t:#'\"{}[]-?!&*%@`|>~,.\x00\x1f\x7f\x85\xa0\u2028\ufeff\ufffe😀"
WORDS = ["None", "null", "1e5", "on", "~", "", "0x1", "2020-01-01", "1_0", "=", "<<"]


def some_text(draw):
    word = "".join(draw.choices(SIGNS, k=draw.randrange(8)))
    return draw.choice([*WORDS, word, word, word + chr(draw.randrange(0xE000, 0x110000))])


def test_yaml_reads_back_equal():
    for seed in range(30):
        draw = random.Random(seed)
        config = Safety(
            words=tuple(some_text(draw) for _ in range(draw.randrange(4))),
            replacement=draw.choice([None, some_text(draw)]),
            responses=draw.choice(["mask", "count"]),
            score=draw.choice([None, 0.0, -0.0, math.inf, 1e-320, draw.gauss(0, 1e9)]),
        )
        text = to_yaml(config)
        read = parse(Safety, write(text))
        assert read == config, seed
        assert to_yaml(read) == text, seed


def test_yaml_holds_every_field_in_order():
    lines = to_yaml(RunConfig(data=("a", "b"), lora=LoRA(2), model="m")).splitlines()
    assert [line.partition(":")[0] for line in lines if line[0] != " "] == [
        name for name in vars(RunConfig()) if name != "own"
    ]
    assert {"data: [a, b]", "model: m", "reward: []", "output_dir: null", "seed: 0"} <= set(lines)
    assert (
        "lora:/  rank: 2/  alpha: null/  dropout: 0.0/  match: attn|mlp/  base: null/tokenizer:"
        in "/".join(lines)
    )


@pytest.mark.parametrize(
    ("cls", "values", "rule"),
    [
        (RunConfig, "checkpoint_interval=0 keep_last=0 early_stopping_patience=0", "at least 1"),
        (RunConfig, "seed=-1", "at least 0"),
        (Network, "initializer_range=0", "above 0"),
        (LoRA, "alpha=0", "above 0"),
        (config.Text, "bucket_multiple=0", "at least 1"),
        (
            Optimizer,
            "learning_rate=-1 warmup_steps=-1 weight_decay=-1 max_grad_norm=-1 eps=-1",
            "at least 0",
        ),
        (Optimizer, "b1=1 b2=1", "below 1"),
        (Optimizer, "b1=-1 b2=-1", "at least 0"),
        (
            SFTStage,
            "num_epochs=0 batch_size=0 num_microbatches=0 validation_interval=0",
            "at least 1",
        ),
        (config.DPOStage, "validation_fraction=-1", "at least 0"),
        (config.DPOStage, "validation_fraction=1", "below 1"),
        (config.DPOStage, "beta=0", "above 0"),
        (config.RewardModelStage, "ensemble_size=0", "at least 1"),
        (config.RewardModelStage, "normalize_samples=-1 centering=-1", "at least 0"),
        (
            RLStage,
            "num_iterations=0 num_epochs=0 batch_size=0 top_k=0 kl_horizon=0",
            "at least 1",
        ),
        (
            RLStage,
            "max_prompt_length=0 max_new_tokens=0 validation_prompts=0 reference_refresh=0",
            "at least 1",
        ),
        (RLStage, "kl_coef=-1 show_examples=-1", "at least 0"),
        (RLStage, "kl_target=0", "above 0"),
        (RLStage, "temperature=0", "at least 1e-06"),
        (RLStage, "validation_temperature=-1", "at least 0"),
        (RLStage, "validation_fraction=-1", "at least 0"),
        (RLStage, "validation_fraction=1", "below 1"),
        (RLStage, "top_p=0", "above 0"),
        (RLStage, "top_p=2", "at most 1"),
        (RLStage, "overlong_buffer=33", "at most 32"),
        (Safety, "penalty=-1", "at least 0"),
    ],
)
def test_bounds_of_the_sections(cls, values, rule):
    for name, value in (setting.split("=") for setting in values.split()):
        with pytest.raises(ValueError, match=f"^{name} must be {rule}, got {value}$"):
            cls(**{name: int(value)})


@pytest.mark.parametrize("value", [9e-7, 1e-45, 1e-300, math.inf, math.nan])
@pytest.mark.parametrize("name", ["temperature", "validation_temperature"])
def test_temperatures_of_a_run_are_those_that_float32_has_log_probs_of(name, value):
    with pytest.raises(
        ValueError, match=rf"^{name} must be .*(at least 1e-06|below inf|at least 0)"
    ):
        RLStage(**{name: value})
    RLStage(**{name: 1e-6})
    RLStage(validation_temperature=0)


TRUNCATED = "engine: only a vllm server says among which tokens top_k let it sample"
VLLM = "vllm:http://x"


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (
            RunConfig,
            {"keep_best": "loss"},
            "keep_best must be max:METRIC or min:METRIC, got 'loss'",
        ),
        (RunConfig, {"alerts": ("oops",)}, "alerts: 'oops'"),
        (
            RunConfig,
            {"model": "m", "tokenizer": Tokenizer("t")},
            "tokenizer.name t: the model m brings its own",
        ),
        (config.Text, {"template": "x"}, "template must be auto or contain {prompt}"),
        (LoRA, {"match": "("}, "match is no regular expression"),
        (RLStage, {"top_k": 5, "engine": "openai:http://x"}, TRUNCATED),
        (RLStage, {"top_p": 0.5, "engine": "openai:http://x"}, TRUNCATED),
        (RLStage, {"min_p": 0.1, "engine": "openai:http://x"}, TRUNCATED),
        (RLStage, {"top_p": 0.5, "engine": VLLM}, TRUNCATED),
        (RLStage, {"min_new_tokens": 2, "engine": VLLM}, TRUNCATED),
        (RLStage, {"top_k": 5, "min_new_tokens": 2, "engine": VLLM}, TRUNCATED),
        (RLStage, {"top_k": 5, "validation_temperature": 0.0, "engine": VLLM}, TRUNCATED),
        (
            RLStage,
            {"missing_eos_penalty": 1.0, "missing_eos_score": 0.0},
            "missing_eos_penalty and missing_eos_score",
        ),
        (
            RLStage,
            {"overlong_penalty": 2.0},
            "overlong_penalty: nothing is subtracted without an overlong_buffer",
        ),
        (RLStage, {"max_turns": 2}, "max_turns: conversations have an environment"),
        (Safety, {"patterns": ("(",)}, "patterns: '(' is no regular expression"),
        (Safety, {"above": 1.0}, "classifier needs below or above"),
        (Safety, {"classifier": "length"}, "classifier needs below or above"),
        (Safety, {"prompts": "replace"}, "prompts: replace needs a replacement"),
        (Safety, {"responses": "replace"}, "responses: replace needs a score"),
    ],
)
def test_rules_between_settings(cls, values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        cls(**values)
    RLStage(top_k=5, top_p=1.0, kl_coef=0.0, missing_eos_score=-1.0)
    RLStage(top_p=1.0, min_p=0.0, engine="openai:http://x")


def test_sizes_of_a_network_are_refused_beside_a_model():
    flags = ["--model", "gpt2", "--network.max-length", "64"]
    for wrong in (flags, ["--model", "gpt2", "--tokenizer.vocab_size=300"]):
        said = rf"^{wrong[2].partition('=')[0]}: .* gpt2 has its own sizes and tokenizer"
        with pytest.raises(UserError, match=said):
            parse(RunConfig, wrong, sections=("network", "tokenizer"))
    shared = parse(RunConfig, write("model: gpt2\nnetwork: {max_length: 64}"))
    assert shared.network.max_length == 64
    flags[2:] = ["--network.dropout", "0.0"]
    dropped = parse(RunConfig, flags, sections=("network",))
    assert dropped.network.dropout == 0.0
    assert RunConfig().network.dropout is None


def test_counts_are_numbers_that_a_program_can_count_to():
    for wrong in (2**31, 10**12, 10**20):
        with pytest.raises(ValueError, match="batch_size must be at most 2147483647"):
            RLStage(batch_size=wrong)
    assert RLStage(batch_size=2**31 - 1).batch_size == 2147483647
    with pytest.raises(UserError, match="optimizer steps are more than can be counted"):
        make_optimizer(Optimizer(1e-3), 2**31)
