"""What no test runs at its own sizes is traced at them: every config that the package ships, every
training command that pages print, and each stage over a grid of microbatches, lengths of prompts
and responses, adapters and meshes. There are shapes and no arrays; what would end a run before its
first step, an error of shapes, of a gradient rule or of a mesh, ends the trace.

The programs are those that ``rlhf-jax plan`` composes with a run's own builders. Networks have the
widths of the model that is named, and one layer, since the others are like it.
"""

import contextlib
import functools
import re
import shlex
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from builders import ROOT
from page_commands import PAGES, commands
from sentiment import SentimentConfig
from shakespeare import ShakespeareConfig

from rlhf_jax import models
from rlhf_jax.cli.planning import shapes
from rlhf_jax.cli.quickstart import QuickstartConfig
from rlhf_jax.cli.stages import STAGES, find_method, method_names
from rlhf_jax.config import ALGORITHMS, LoRA, Mesh, Optimizer, RunConfig, parse
from rlhf_jax.parallel import sharding
from rlhf_jax.training.rl import critic
from rlhf_jax.training.rl.method import completed
from rlhf_jax.training.tasks import TASKS

# The widths of the models that configs and pages name. SmolLM2-135M's stand for any other name.
QWEN = {"num_heads": 14, "num_kv_heads": 2, "intermediate_size": 4864}
SMOL = {"num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536}
MODELS = {
    "gpt2": models.GPT2Config(50257, 1024, 768, num_layers=1, num_heads=12),
    "Qwen": models.Qwen2Config(151936, 32768, 896, num_layers=1, **QWEN),
    "": models.LlamaConfig(49152, 8192, 576, num_layers=1, **SMOL),
}
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PRESETS = [path for path in CONFIGS if path.parent.name != "configs"]


def model_of(source):
    return next(config for name, config in MODELS.items() if name in str(source))


class Traced(shapes.Case):
    """A stage on devices that are not there."""

    sizes = (1, 1, 1)

    @functools.cached_property
    def mesh(self):
        kinds = (jax.sharding.AxisType.Auto,) * 3
        return jax.sharding.AbstractMesh(self.sizes, ("data", "fsdp", "tensor"), kinds)

    @property
    def own(self):
        return self.config.own.get(self.name) or getattr(self.config, self.name)

    def in_mesh(self):
        is_set = sharding.is_cut(self.mesh)
        return jax.sharding.use_abstract_mesh(self.mesh) if is_set else contextlib.nullcontext()


@pytest.fixture
def trace(monkeypatch):
    """``trace(config, stage, length)`` traces what a stage samples and learns by; ``length`` as in
    ``shapes.shapes_of``.
    """
    monkeypatch.setattr(shapes, "Case", Traced)
    monkeypatch.setattr(shapes.hf, "model_folder", str)
    monkeypatch.setattr(shapes.hf, "find_folder", Path)
    monkeypatch.setattr(shapes.hf, "read_config", model_of)
    monkeypatch.setattr(shapes.hf, "read_json", lambda path: {"dtype": "bfloat16"})
    source_of = critic.source_of
    monkeypatch.setattr(
        critic, "source_of", lambda reward, own: source_of(["."], own) and reward[0]
    )

    def traced(config, stage, length, sizes=(1, 1, 1)):
        monkeypatch.setattr(Traced, "sizes", sizes)
        if found := find_method(stage):
            # Its answers may be sampled by pairs of policies, which no plan has.
            monkeypatch.setitem(shapes.RL, stage, replace(completed(found), respond=None))
        case = Traced(config, stage)
        fn, *arguments = shapes.shapes_of(config, stage, length).programs["learn"]
        with case.in_mesh():
            jax.eval_shape(fn, *case.inputs(arguments))

    return traced


# --- What the package ships, and what its pages print

KINDS = {
    "quickstart": QuickstartConfig,
    "shakespeare": ShakespeareConfig,
    "sentiment": SentimentConfig,
}
NEEDED = {  # by a config alone
    "gdpo": "--gdpo.components length --gdpo.weights 1",
    "openrlhf": "--reward RM --ppo.value-from reward",
}
# The reader's own files, what is shown to be refused, and what is cut short.
NOT_TRACED = ("mine.yaml", "run.yaml", "llama3_lora_ppo.yaml", "--num_gener", "--help", "...", "|")


def of_config(path):
    """[(stage, its settings)] of the sections of a config."""
    sections = re.findall(r"^([a-z_]+):", path.read_text("utf-8"), re.MULTILINE)
    flags = ["--config", path.stem, *NEEDED.get(path.stem, "").split()]
    found = []
    for name in sections:
        if name in TASKS or name in ALGORITHMS or find_method(name):
            how = {"algorithm": find_method(name)} if find_method(name) else {}
            found.append((name, parse(KINDS.get(path.stem, RunConfig), flags, **how)))
    return found


@functools.cache
def printed():
    """{command: the file that prints it} of the training commands in pages and heads of configs.
    Left out are those of a config alone, which is traced anyway, and those that ``test_docs`` and
    ``test_presets`` run as they stand.
    """
    names = "|".join(sorted((*STAGES, *method_names()), key=len, reverse=True))
    pattern = re.compile(rf"rlhf-jax (?:{names.replace('_', '[_-]')}) --[^`\n#]*")
    config_alone = re.compile(r"rlhf-jax \S+ --config \S+")
    heads = "".join(path.read_text("utf-8") for path in PRESETS)
    run = {line.removeprefix("#   ") for line in heads.splitlines()}
    run |= {command for page in PAGES for command in commands(page)}
    found = {}
    for path in (*PAGES, *CONFIGS):
        text = re.sub(r" *\\\n *", " ", path.read_text("utf-8"))
        text = re.sub(r"\n    (?=--)", " ", text)  # the public jobs of docs/comparison.md
        for command in map(str.strip, pattern.findall(text)):
            is_known = command in run or config_alone.fullmatch(command)
            if not is_known and not any(word in command for word in NOT_TRACED):
                found.setdefault(command, path)
    return found


def of_command(command):
    """[(stage, its settings)] of a command; a pipeline has three."""
    _, name, *flags = shlex.split(command)
    stage = name.replace("-", "_")
    if found := find_method(name):
        return [(stage, parse(RunConfig, flags, algorithm=found))]
    config = parse(RunConfig, flags, sections=(*STAGES[name].reads, stage))
    stages = ("sft", "reward_model", "ppo") if name == "pipeline" else (stage,)
    return [(each, config) for each in stages]


def length_of(config, stage):
    """Columns of a prompt, or of a row of texts, as long as is said, else as the demo's."""
    most = model_of(config.model).max_length if config.model else config.network.max_length
    if stage in TASKS:
        return min(config.text.max_length or 256, most)
    prompt = config.rl.max_prompt_length or 40
    return max(min(prompt, most - config.rl.max_new_tokens), 1)


def has_other_sizes(config, stage):
    """Than runs of other tests, which are those of small networks with short answers."""
    own = config.own.get(stage) or getattr(config, stage)
    is_long = stage not in TASKS and config.rl.max_new_tokens >= 128
    return bool(config.model or own.num_microbatches > 1 or is_long)


DONE = set()  # what this process has traced: many pages have the same run


def trace_once(trace, config, stage):
    """At the sizes of the settings, but for what no plan composes and other tests run."""
    sizes = tuple(max(size, 1) for size in config.mesh.axes.values())
    compute = replace(config.compute, blocks=None)
    reward = tuple(entry for entry in config.reward if not entry.startswith("gym:"))  # a package
    config = replace(config, compute=compute, mesh=Mesh(), reward=reward or ("length",))
    if stage == "reward_model":
        own = replace(config.reward_model, ensemble_size=1, steps=False)
        config = replace(config, reward_model=own)
    own = config.own.get(stage) or getattr(config, stage)
    network = model_of(config.model) if config.model else config.network
    length = length_of(config, stage)
    said = [stage, network, config.compute, sizes, config.lora.rank > 0, length]
    if stage in TASKS:
        said.append(replace(own, optimizer=Optimizer()))
    else:
        rl = config.rl
        said += [own, rl.batch_size, rl.max_new_tokens, rl.top_k, rl.top_p, rl.min_p, rl.kl_target]
        said += [rl.mask_truncated, rl.reference_moves, rl.missing_eos_penalty, rl.kl_coef == 0]
    # Numbers that are no sizes: 0 leaves a term out, and others are alike.
    key = re.sub(r"\b(?!0\.0\b)\d+\.\d+|\b\d+e-\d+", "x", repr(said))
    if key not in DONE:
        trace(config, stage, length, sizes)
        DONE.add(key)


def test_there_are_commands_to_trace():
    assert len(printed()) > 50


@pytest.mark.parametrize("path", [*CONFIGS, *PAGES], ids=lambda path: path.stem)
def test_configs_and_commands_are_traced_at_their_own_sizes(path, trace):
    for stage, config in of_config(path) if path in CONFIGS else ():
        trace_once(trace, config, stage)
    for command, place in printed().items():
        for stage, config in of_command(command) if place == path else ():
            if has_other_sizes(config, stage):
                trace_once(trace, config, stage)


# --- Each stage over a grid

SMALL = models.LlamaConfig(
    64, 8192, hidden_size=64, num_layers=1, num_heads=8, num_kv_heads=8, intermediate_size=64
)
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8)}
SHARED = {"ppo": {"value": "separate"}, "grpo": {"group_size": 4}, "distill": {"teacher": "T"}}
STAGES_OF_GRID = ("sft", "reward_model", "dpo", "kto", "ppo", "grpo", "vpg", "rloo", "distill")


def grid():
    """(stage, mesh, response slots or tokens of a row, whether prompts are longer, microbatches,
    rank of adapters): an orthogonal array of 16, each of ppo or grpo; four of each other stage;
    and of each stage adapters in microbatches on devices that share the rows, which once failed.
    """
    for number, stage in enumerate(STAGES_OF_GRID):
        yield stage, "data", 128, 0, 8, 4
        for mesh in range(4):
            for size in range(4):
                is_own = size == (mesh + number) % 4
                if size % 2 == number % 2 if stage in ("ppo", "grpo") else is_own:
                    bits = mesh % 2 ^ size % 2, mesh // 2 ^ size // 2, mesh % 2 ^ size // 2
                    longer, is_cut, has_adapters = bits
                    places = [*MESHES][mesh], (16, 128, 512, 2048)[size]
                    yield stage, *places, longer, 1 + 7 * is_cut, 4 * has_adapters


@pytest.mark.parametrize("case", [*grid()], ids=lambda case: "-".join(map(str, case)))
def test_each_stage_is_traced_over_a_grid(case, trace, monkeypatch):
    stage, mesh, size, longer, microbatches, rank = case
    monkeypatch.setattr(shapes.hf, "read_config", lambda source: SMALL)
    config = RunConfig(model="M", reward=("length",), lora=LoRA(rank=rank))
    own = replace(getattr(config, stage), num_microbatches=microbatches, **SHARED.get(stage, {}))
    if stage in TASKS:
        own = replace(own, batch_size=64)
        length = size
        share = bool(longer) if stage in ("dpo", "reward_model") else "auto"
        config = replace(config, compute=replace(config.compute, share_prompts=share))
    else:
        length = 2 * size if longer else size // 4
        config = replace(config, rl=replace(config.rl, batch_size=256, max_new_tokens=size))
    trace(replace(config, **{stage: own}), stage, length, MESHES[mesh])
