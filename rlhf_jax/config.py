"""All settings of a run: one ``RunConfig`` with a section per stage, read from YAML and dotted
flags by ``parse``.

    config = parse(RunConfig)     # script.py --config FILE.yaml --ppo.clip-low 0.1

``configs/`` holds examples. The text below a field is its ``--help`` text. Each class checks its
own rules in ``__post_init__`` and raises ValueError with the field's name first; ``parse`` adds the
section, the file and the line.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from rlhf_jax.algorithms import dpo, kto, ppo, reward_model, sft
from rlhf_jax.algorithms.grpo import Config as GRPOConfig
from rlhf_jax.algorithms.rloo import Config as RLOOConfig
from rlhf_jax.algorithms.vpg import Config as VPGConfig
from rlhf_jax.errors import UserError, check_pattern, logger
from rlhf_jax.ops import check_number
from rlhf_jax.runs import alerts, manifest, objects
from rlhf_jax.runs.reading import SETTINGS, read_yaml
from rlhf_jax.types import Algorithm

C = TypeVar("C")
Words = Sequence[str]
Values = dict[str, tuple[Any, str]]  # {dotted key: (value, "FILE, line N")}
Switch = bool | Literal["auto"]
ALGORITHMS = ("vpg", "ppo", "rloo", "grpo")  # the sections of those of this package


def _check(section: Any, *names: str, **bounds: float) -> None:
    """Raises ValueError for the first of these fields that is neither None nor within the bounds."""
    for name in names:
        check_number(name, getattr(section, name), **bounds)


@dataclass(frozen=True)
class Network:
    """The GPT-2 that is started from random weights when no ``model`` is given."""

    hidden_size: int = 128
    """Width D of the residual stream."""
    num_layers: int = 2
    """Number of blocks L."""
    num_heads: int = 4
    """Attention heads per block; divides hidden_size."""
    max_length: int = 128
    """Longest text, prompt and response together, in tokens."""
    dropout: float = 0.0
    """Dropout rate in supervised stages; RL and scoring never drop."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights. GPT-2's 0.02 suits a width of some hundreds;
    1/sqrt(hidden_size), 0.1 for a width of 100, makes narrow networks learn what depends on several
    tokens in a tenth of the steps."""

    def __post_init__(self) -> None:
        _check(self, "initializer_range", above=0)


@dataclass(frozen=True)
class Compute:
    """How a model is run; changes speed and memory, not what is learnt."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the activations and matrix products; float16 is run as bfloat16. Trained parameters,
    log-probabilities and losses stay float32."""
    remat: Switch = "auto"
    """Gradient checkpointing: recompute each block in the backward pass instead of storing it.
    auto: in models of eight layers and more whose update would store more than a quarter of the
    device's memory."""
    scan_layers: Switch = "auto"
    """Compile one block for all layers but the last, and loop over depth: faster to compile for
    deep models. auto: from eight layers on.
    """
    score_rows: int | None = None
    """Rows that policy, reference and reward models score at once, over all devices; null: where
    num_microbatches is above 1 those of a microbatch, else the whole batch."""
    offload: tuple[Literal["reference", "reward"], ...] = ()
    """Frozen models that lie in the host's memory while they do not score: reference, reward."""
    attention: Literal["auto", "xla", "cudnn", "splash", "blockwise"] = "auto"
    """How attention is computed. xla holds all scores of a text; blockwise those of a block of
    queries, on any device; cudnn (bfloat16 on a GPU) and splash (one TPU) are fused kernels. auto:
    xla below 512 tokens, else what fits."""

    def __post_init__(self) -> None:
        _check(self, "score_rows", at_least=1)


@dataclass(frozen=True)
class Mesh:
    """How the devices share the work; a batch is cut over data x fsdp, weights and their optimizer
    over fsdp x tensor.

    At most one size is -1: as many as the others leave of the devices."""

    data: int = -1
    """Groups that each hold all the weights and a part of every batch."""
    fsdp: int = 1
    """Devices of a group that each hold a part of the weights, and send it to the others when it is
    needed.
    """
    tensor: int = 1
    """Devices that share each matrix product: a part of the heads, of the mlp's width and of the
    vocabulary.
    """

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(
                f"data, fsdp and tensor must be at least 1, one of them may be -1, got {sizes}"
            )


@dataclass(frozen=True)
class LoRA:
    """Train low-rank adapters beside the frozen weights of --model; the reference policy has the
    weights alone.
    """

    rank: int = 0
    """Rank r of the adapters; 0 trains every weight."""
    alpha: float | None = None
    """The adapters' term is multiplied by alpha / rank; null: 1."""
    match: str = "attn|mlp"
    """Regular expression of the layers that get one, searched in names such as h_0/attn/c_attn."""

    def __post_init__(self) -> None:
        _check(self, "rank", at_least=0)
        _check(self, "alpha", above=0)
        check_pattern("match", self.match)


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model that starts from random weights; a ``model`` brings its own."""

    name: str | None = None
    """Folder or Hugging Face name of a tokenizer to take as it is; null: one is trained on the
    data.
    """
    kind: Literal["bpe", "characters"] = "bpe"
    """Byte-level BPE, or one token per character of the data."""
    vocab_size: int = 512
    """Entries of the BPE vocabulary, the two special tokens and 256 bytes included."""


@dataclass(frozen=True)
class Text:
    """How rows of data become tokens."""

    template: str = "auto"
    """What the model reads for a prompt: a text with {prompt} in it, which the response follows
    directly. auto: a user's message in the chat template of the model's folder, or the template of
    the run that left the folder, or {prompt} if it has neither."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with a text that does not fit. Truncated and dropped rows are counted and
    reported.
    """
    bucket_multiple: int = 16
    """Batches are padded to a multiple of this many tokens, so that few shapes are compiled; RL's
    prompts to it, twice, four times, ... that."""
    pack: bool = False
    """Put several demonstrations or comparisons of a batch into one row, as long as the longest of
    all, instead of padding each: SFT, reward models and DPO."""

    def __post_init__(self) -> None:
        _check(self, "bucket_multiple", at_least=1)
        if self.template != "auto" and "{prompt}" not in self.template:
            raise ValueError(f"template must be auto or contain {{prompt}}, got {self.template!r}")


@dataclass(frozen=True)
class Optimizer:
    """Adam or AdamW with clipping and a schedule (optax)."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "step", "plateau"] = "constant"
    """After the warm-up: linear and cosine decay from the peak to 0 over the run, step multiplies
    by decay_factor every decay_every optimizer steps, plateau after decay_patience validations in a
    row that bring no improvement."""
    decay_factor: float = 0.1
    """What the schedules step and plateau multiply the learning rate by."""
    decay_every: int | None = None
    """Optimizer steps between the decays of the schedule step."""
    decay_patience: int = 5
    """Validations without improvement that the schedule plateau waits for; the metric is that of
    keep_best, without it validation/score in RL and validation/loss elsewhere."""
    warmup_steps: float = 0
    """Optimizer steps of linear warm-up; below 1 a share of the run's steps, rounded up."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases, norms and the heads' gain and shift are never decayed."""
    max_grad_norm: float | None = 1.0
    """Clip gradients to this global norm; null does not clip."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.999
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""

    def __post_init__(self) -> None:
        _check(
            self,
            "learning_rate",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "eps",
            at_least=0,
        )
        _check(self, "decay_every", "decay_patience", at_least=1)
        _check(self, "decay_factor", above=0, below=1)
        if (self.schedule == "step") != (self.decay_every is not None):
            raise ValueError(
                "schedule: the schedule step needs decay_every, and decay_every the schedule step"
            )
        _check(self, "b1", "b2", at_least=0, below=1)


@dataclass(frozen=True)
class Supervised:
    """What SFT, reward models, DPO and KTO share: rows of data, passes over them, the optimizer,
    validations.
    """

    data: tuple[str, ...] = ()
    """Files of the stage's rows; empty: the run's --data."""
    num_epochs: int = 1
    """Passes over the data."""
    batch_size: int = 32
    """Rows (comparisons, pairs) per optimizer step, over all devices."""
    optimizer: Optimizer = Optimizer()
    validation_fraction: float = 0.1
    """Share of the rows held out for validation; rows with equal prompts stay together."""
    validation_data: tuple[str, ...] = ()
    """Files of rows to validate on; empty: a validation_fraction of the rows, held out of the
    training.
    """
    validation_interval: int = 100
    """Optimizer steps between validations."""

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()  # the rules of the algorithm's own Config
        _check(
            self, "num_epochs", "batch_size", "num_microbatches", "validation_interval", at_least=1
        )
        _check(self, "validation_fraction", at_least=0, below=1)


@dataclass(frozen=True)
class SFTStage(Supervised, sft.Config):
    """Supervised fine-tuning on demonstrations {prompt, response}."""

    validation_fraction: float = 0.05
    """Share of the rows held out for validation."""


@dataclass(frozen=True)
class RewardModelStage(Supervised, reward_model.Config):
    """A reward model from human preferences {prompt, chosen, rejected}."""

    normalize_samples: int = 256
    """After training, scores get mean 0 and variance 1 over this many samples of the policy in
    --model; 0: not.
    """
    ensemble_size: int = 1
    """Reward models that train at once, each on its own draw of the rows with replacement and from
    a score head of its own, without --model from a body of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "ensemble_size", at_least=1)
        _check(self, "normalize_samples", "centering", at_least=0)


@dataclass(frozen=True)
class DPOStage(Supervised, dpo.Config):
    """Direct preference optimisation of the policy in --model, which is the reference too, from
    pairs or rankings.
    """

    optimizer: Optimizer = Optimizer(learning_rate=1e-6, schedule="linear")


@dataclass(frozen=True)
class KTOStage(Supervised, kto.Config):
    """Kahneman-Tversky optimisation of the policy in --model, which is the reference too, from
    {prompt, response, desirable}; of preferences, the chosen answer is desirable and the rejected
    one is not."""

    optimizer: Optimizer = Optimizer(learning_rate=5e-7, schedule="linear")


@dataclass(frozen=True)
class RLStage:
    """What VPG, PPO, RLOO and GRPO share: prompts, sampling, KL, the optimizer."""

    data: tuple[str, ...] = ()
    """Files of prompts; empty: the run's --data."""
    num_iterations: int = 100
    """Collect, reward, learn: how many times."""
    num_episodes: int | None = None
    """The run's length in episodes, whole batches, rounded up; where given, num_iterations does not
    count.
    """
    batch_size: int = 64
    """Episodes per iteration, over all devices."""
    max_prompt_length: int | None = None
    """Most tokens of a prompt; null: the longest prompt's. A batch has as many slots as its own
    prompts need.
    """
    max_new_tokens: int = 32
    """Response slots R."""
    environment: str | None = None
    """FILE.py:FUNCTION, called after each response as function(conversation, row): the policy reads
    what it returns and responds again, all in one row, until it returns None."""
    max_turns: int | None = None
    """Most responses of a row; null: until the environment ends it or max_new_tokens, which then
    hold responses and replies, are full."""
    temperature: float = 1.0
    """Sampling temperature, used in every log-probability of the algorithm too."""
    top_k: int | None = None
    """Sample among the k likeliest tokens; null: all. Needs allow_truncated_sampling."""
    top_p: float | None = None
    """Sample from the smallest set of this probability; null: all. Needs allow_truncated_sampling.
    """
    allow_truncated_sampling: bool = False
    """Train on samples that do not come from the policy's full distribution: the KL estimate is
    then biased.
    """
    kl_coef: float | None = None
    """Weight of the KL penalty in the reward, the first value when it adapts; null: the algorithm's
    own, 0.05 for VPG, PPO and RLOO, 0 for GRPO, whose loss has a KL term."""
    kl_target: float | None = None
    """Adapt the coefficient to this KL, in nats per response; null: fixed."""
    kl_horizon: int | None = None
    """Episodes over which the coefficient adapts; null: 10 iterations' worth."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a response that did not end."""
    missing_eos_score: float | None = None
    """Replaces the score of a response that did not end."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-5, schedule="linear", eps=1e-5)
    validation_fraction: float = 0.1
    """Share of the prompts held out for validation."""
    validation_data: tuple[str, ...] = ()
    """Files of prompts to validate on; empty: a validation_fraction of the prompts, held out of the
    training.
    """
    validation_interval: int = 20
    """Iterations between validations."""
    validation_prompts: int = 64
    """At most this many prompts are sampled at a validation, batch_size at a time."""
    reference_refresh: int | None = None
    """Every so many iterations the policy becomes the reference of the KL; null: the reference
    stays --model.
    """
    dynamic_sampling: int = 0
    """At most so many times in an iteration, groups whose answers all score alike are replaced by
    groups of fresh prompts; those left after that stay in the batch. 0: never."""
    mask_truncated: bool = False
    """Responses that did not end are absent from the loss and from the statistics of their group.
    """
    overlong_buffer: int | None = None
    """The last tokens of max_new_tokens, over which a longer response loses ever more of its score;
    null: no rule.
    """
    overlong_penalty: float = 1.0
    """What a response of max_new_tokens loses at the end of overlong_buffer."""
    judge: tuple[str, ...] = ()
    """A reward, as `reward`, that is not trained on: it scores the validations' samples too
    (validation/judge).
    """
    show_examples: int = 0
    """Print so many examples (prompt, what was generated, reward) at each validation."""

    def __post_init__(self) -> None:
        _check(
            self, "num_iterations", "num_episodes", "batch_size", "top_k", "kl_horizon", at_least=1
        )
        _check(
            self,
            "max_prompt_length",
            "max_new_tokens",
            "max_turns",
            "reference_refresh",
            at_least=1,
        )
        _check(self, "validation_interval", "validation_prompts", at_least=1)
        _check(self, "kl_coef", "show_examples", "dynamic_sampling", "overlong_penalty", at_least=0)
        _check(self, "overlong_buffer", at_least=1, at_most=self.max_new_tokens)
        _check(self, "temperature", "kl_target", above=0)
        _check(self, "validation_fraction", at_least=0, below=1)
        _check(self, "top_p", above=0, at_most=1)
        truncated = self.top_k is not None or (self.top_p is not None and self.top_p < 1)
        if truncated and not self.allow_truncated_sampling:
            fault = (
                "the update uses log-probabilities of the whole distribution, from which such "
                "samples do not come"
            )
            raise ValueError(
                f"top_k and top_p: {fault}; --rl.allow-truncated-sampling trains on them anyway"
            )
        ends = (self.missing_eos_penalty, self.missing_eos_score, self.overlong_buffer)
        if self.environment is not None and ends != (None, None, None):
            raise ValueError(
                "missing_eos_penalty, missing_eos_score, overlong_buffer: an environment pays "
                "itself"
            )
        if self.max_turns is not None and self.environment is None:
            raise ValueError(
                "max_turns: conversations have an environment, which replies; give it too"
            )
        has_penalty = self.missing_eos_penalty is not None
        has_score = self.missing_eos_score is not None
        if has_penalty + has_score + self.mask_truncated > 1:
            raise ValueError(
                "missing_eos_penalty and missing_eos_score judge what mask_truncated leaves out: "
                "give one"
            )

    @property
    def length(self) -> int:
        """Iterations of the run."""
        if self.num_episodes is None:
            return self.num_iterations
        return math.ceil(self.num_episodes / self.batch_size)


@dataclass(frozen=True)
class PPOStage(ppo.Config):
    """Proximal policy optimisation, and the value function of its runs."""

    value: Literal["shared", "separate"] = "shared"
    """shared: a head on the policy's body; separate: a model of its own, which starts as the policy
    with a head.
    """
    value_learning_rate: float | None = None
    """Peak learning rate of what belongs to the value function alone; null: that of rl.optimizer.
    """
    value_warmup: int = 0
    """Iterations at the start in which nothing else learns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "value_learning_rate", "value_warmup", at_least=0)


@dataclass(frozen=True)
class Safety:
    """What counts as unsafe in RL's prompts and responses, and what is done about it; nothing does
    by default.
    """

    words: tuple[str, ...] = ()
    """Files of words and phrases, one a line, found as whole words whatever their case."""
    patterns: tuple[str, ...] = ()
    """Regular expressions in Python's syntax, searched in the text as it is; (?i) ignores case."""
    classifier: str | None = None
    """One SPEC as in `reward` that scores responses; those with a score below `below` or above
    `above` are unsafe.
    """
    below: float | None = None
    """A response whose classifier score is lower is unsafe."""
    above: float | None = None
    """A response whose classifier score is higher is unsafe."""
    prompts: Literal["drop", "replace", "count"] = "drop"
    """What becomes of a prompt in which words or patterns are found: left out, replaced, or counted
    alone.
    """
    replacement: str | None = None
    """With prompts: replace, the text in place of an unsafe prompt."""
    responses: Literal["penalise", "replace", "mask", "count"] = "penalise"
    """What becomes of an unsafe response: `penalty` is subtracted from its score, `score` replaces
    it, it is absent from every statistic and loss, or it is counted alone."""
    penalty: float = 1.0
    """With responses: penalise, what is subtracted."""
    score: float | None = None
    """With responses: replace, the score in place of the response's own."""

    @property
    def on(self) -> bool:
        """Whether anything can count as unsafe."""
        return bool(self.words or self.patterns or self.classifier)

    def __post_init__(self) -> None:
        _check(self, "penalty", at_least=0)
        for pattern in self.patterns:
            check_pattern(f"patterns: {pattern!r}", pattern)
        if (self.classifier is None) != (self.below is None and self.above is None):
            raise ValueError("classifier needs below or above, and they need a classifier")
        if self.prompts == "replace" and not self.replacement:
            raise ValueError(
                "prompts: replace needs a replacement, the text in place of an unsafe prompt"
            )
        if self.responses == "replace" and self.score is None:
            raise ValueError("responses: replace needs a score, which unsafe responses get")


@dataclass(frozen=True)
class RunConfig:
    """One run. Scripts read the sections that concern them."""

    data: tuple[str, ...] = ()
    """Data files of the stage, a folder with sft_data.json, preference_data.json and prompts.json,
    `demo` or `arithmetic`."""
    columns: tuple[str, ...] = ()
    """Keys of the data under other names, each OURS=THEIRS: prompt=question response=answer."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that the stage cannot use, such as one with an empty answer: error names all of them
    and stops; drop leaves them out and counts them."""
    model: str | None = None
    """A Hugging Face folder (or name), or a run's folder, to start from; null: random weights of
    `network`.
    """
    reward: tuple[str, ...] = ()
    """Reward models' folders (or Hugging Face names), or those of their runs, several as mean:A,B,
    min:A,B or uncertainty:A,B, FILE.py:FUNCTION, count:TEXT, length, repetition, diversity,
    regex:PATTERN, math; SPEC*WEIGHT weighs one of a sum."""
    output_dir: str | None = None
    """The run's folder; null: runs/SCRIPT."""
    seed: int = 0
    """Root of every random number."""
    device: Literal["cpu", "gpu", "cuda", "tpu", "mps"] | None = None
    """Where to run; null: JAX's choice. mps is refused with a message about Apple's GPUs."""
    processes: str | None = None
    """HOST:PORT,COUNT,NUMBER of this process where several share the run: where the first one
    listens, how many there are and which one this is, from 0; auto: as SLURM, a TPU pod, Open MPI
    or Kubernetes says."""
    resume: bool = False
    """Continue the run in output_dir, bit for bit."""
    overwrite: bool = False
    """Replace the run in output_dir."""
    allow_changed: tuple[str, ...] = ()
    """With --resume: settings that may differ from the run's, such as rl.num_iterations or data
    (its files too).
    """
    checkpoint_interval: int = 50
    """Steps (supervised) or iterations (RL) between checkpoints."""
    checkpoint_async: bool = False
    """Go on training while a checkpoint is written; needs memory for a copy of the state on the
    host.
    """
    keep_last: int = 2
    """Checkpoints kept."""
    keep_best: str | None = None
    """max:METRIC or min:METRIC, a metric of the validations such as max:validation/score: each
    validation is then saved too, the best one is kept, and model/ is made from it."""
    early_stopping_patience: int | None = None
    """End after so many validations in a row without improvement of keep_best's metric, without it
    of validation/score in RL and validation/loss elsewhere; null: go on to the end."""
    track: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """Services that get metrics, samples and alerts too; WANDB_PROJECT names the project of the
    first two.
    """
    alerts: tuple[str, ...] = ()
    """Rules such as "objective/kl > 50 for 3: stop", added to the default ones; `none` turns those
    off.
    """
    network: Network = Network()
    compute: Compute = Compute()
    mesh: Mesh = Mesh()
    lora: LoRA = LoRA()
    tokenizer: Tokenizer = Tokenizer()
    text: Text = Text()
    sft: SFTStage = SFTStage()
    reward_model: RewardModelStage = RewardModelStage()
    dpo: DPOStage = DPOStage()
    kto: KTOStage = KTOStage()
    rl: RLStage = RLStage()
    safety: Safety = Safety()
    vpg: VPGConfig = VPGConfig()
    ppo: PPOStage = PPOStage()
    rloo: RLOOConfig = RLOOConfig()
    grpo: GRPOConfig = GRPOConfig()

    def __post_init__(self) -> None:
        _check(self, "checkpoint_interval", "keep_last", "early_stopping_patience", at_least=1)
        _check(self, "seed", at_least=0)
        alerts.parse(self.alerts)
        if self.keep_best is not None and not re.fullmatch("(max|min):.+", self.keep_best):
            raise ValueError(f"keep_best must be max:METRIC or min:METRIC, got {self.keep_best!r}")
        if self.lora.rank and self.model is None:
            raise ValueError(
                "lora.rank adapts a trained model: give --model, or leave it out to train every "
                "weight"
            )
        if self.tokenizer.name is not None and self.model is not None:
            raise ValueError(
                f"tokenizer.name {self.tokenizer.name}: the model {self.model} brings its own "
                "tokenizer"
            )


# --- An algorithm's section


def with_section(kind: type[C], algorithm: Algorithm) -> type[C]:
    """The settings ``kind``, with a section for an algorithm of one's own: the ``Config`` of its
    module, under the module's name.

    Raises:
      UserError: the module has the name of another setting.
    """
    name = section_name(algorithm)
    section = typing.get_type_hints(kind).get(name)
    if section is None:
        return _extended(kind, name, algorithm.Config)
    if not (isinstance(section, type) and issubclass(section, algorithm.Config)):
        raise UserError(
            f"the algorithm {algorithm.__name__}: {name} is a setting of every run; give its "
            "module another name"
        )
    return kind


def section_name(algorithm: Algorithm) -> str:
    """The name of an algorithm's section and run: that of its module."""
    return algorithm.__name__.rpartition(".")[2]


def _extended(kind: type[C], name: str, section: type) -> type[C]:
    field = (name, section, dataclasses.field(default_factory=section))
    return dataclasses.make_dataclass(kind.__name__, [field], bases=(kind,), frozen=True)


def for_algorithm(
    config: RunConfig, algorithm: Algorithm, section: Any = None
) -> tuple[RunConfig, Any]:
    """The settings of a run of this algorithm, and its own section among them.

    Args:
      section: takes the place of the section; None: that of ``config``, or the module's
        ``Config()`` if it has none.

    Raises:
      UserError: ``config`` sets what another algorithm reads and this one, of one's own, does not.
    """
    name = section_name(algorithm)
    kind = with_section(type(config), algorithm)
    if name not in ALGORITHMS:
        _check_others_unset(config, algorithm)
    if section is None:
        section = vars(config).get(name) or algorithm.Config()
    elif name in ALGORITHMS:
        _say_unused(name, vars(config)[name], section)
    usual = typing.get_type_hints(kind)[name]
    if issubclass(usual, type(section)):
        section = usual(**vars(section))
    else:
        kind = _extended(kind, name, type(section))
    return kind(**vars(config) | {name: section}), section


def _say_unused(name: str, own: Any, given: Any) -> None:
    """Names the values of a section that do not count, since Python gives its settings."""
    default = vars(type(own)())
    changed = {key: value for key, value in vars(own).items() if value != default[key]}
    unused = [
        f"{name}.{key} {changed[key]}" for key in changed if changed[key] != vars(given).get(key)
    ]
    if unused:
        listed = ", ".join(unused)
        logger.info(f"the settings of {name} are those that Python gives; not used: {listed}")


def _check_others_unset(config: RunConfig, algorithm: Algorithm) -> None:
    before = manifest.dotted(dataclasses.asdict(type(config)()))
    values = manifest.dotted(dataclasses.asdict(config))
    unread = [
        key
        for key, value in values.items()
        if key.partition(".")[0] in ALGORITHMS and value != before[key]
    ]
    if unread:
        name = section_name(algorithm)
        raise UserError(
            f"{', '.join(unread)}: the algorithm {name} does not read them; leave them out. "
            f"Its own settings are the section {name}, for which config.parse takes algorithm={name}"
        )


# --- Reading: YAML files, then flags


def parse(
    kind: type[C],
    argv: Words | None = None,
    *,
    prog: str | None = None,
    description: str = "",
    sections: Words = (),
    algorithm: Algorithm | None = None,
) -> C:
    """Reads ``--config FILE ...`` and dotted flags (``sys.argv[1:]`` by default) into a config of
    this kind.

    A flag goes before the files, a later file before an earlier one, the files before the class's
    default. ``--help`` shows the values in force, ``--help-verbose`` the text of each setting too.
    Rules between values are checked once, on the final values. A file that names Python files of
    somebody else needs ``--trust-config``, see ``check_trust``.

    Args:
      sections: the sections (``rl``) and keys of sections (``rl.top_k``) that have flags, beside
        the settings at the top; none given: all. A file may hold keys of the others too, since
        several stages share it.
      algorithm: one of your own: its ``Config`` is a section under the module's name, and the
        sections of the algorithms of this package have no flags and keep their defaults.

    Raises:
      UserError: a file is missing, broken or does not fit, a flag is unknown, or a
        ``__post_init__`` refused the values (ValueError). All mistakes of the files, or all of the
        values, are in one message, a line each.
      SystemExit: code 0 after ``--help``; code 2 after a message on stderr about a flag's wrong
        value.
    """
    finder = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", metavar="FILE", nargs="+", action="extend", default=[])
    finder.add_argument("--trust-config", action="store_true")
    options, flags = finder.parse_known_args(argv)
    unread: Words = ()
    if algorithm is not None:
        kind = with_section(kind, algorithm)
        unread = [name for name in ALGORITHMS if name != section_name(algorithm)]
        sections = sections or [name for name in typing.get_type_hints(kind) if name not in unread]
    given = _given(kind, options.config, unread)
    defaults = _with_values(kind(), given)
    about = (
        f"{description}\n\n--config FILE ...: YAML with values for these options; flags go "
        "before them. --trust-config: run the Python files that such a FILE names, though they are "
        "not yours."
    )
    how: Any = {
        "prog": prog,
        "description": about,
        "return_unknown_args": True,
        "compact_help": True,
    }
    parsed: Any = tyro.cli(
        kind, args=flags, default=defaults, registry=_flags_of(kind, sections), **how
    )
    values, unknown = parsed
    if unknown:
        raise UserError(_unknown_flag(unknown[0].partition("=")[0], kind))
    typed = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags}
    if isinstance(defaults, RunConfig):
        filled = _fill_pretrained(values, typed | given.keys())
        read_here = [key for key in filled if _is_read(key, kind, sections)]
        if read_here:
            listed = ", ".join(f"{key} {filled[key]}" for key in read_here)
            model = values["model"]
            logger.info(f"defaults for the pretrained {model}: {listed}")
    problems: list[str] = []
    config = _build(kind, values, defaults, "", given, problems)
    if problems:
        raise UserError("\n".join(problems))
    if not options.trust_config:
        check_trusted({key: value for key, value in given.items() if key not in typed})
    return config


# Defaults where --model names pretrained weights: {key: (all weights trained, LoRA)}. Those of the
# classes suit small networks that start from random weights. docs/runs.md cites the sources.
PRETRAINED: dict[str, tuple[Any, Any]] = {
    "sft.optimizer.learning_rate": (2e-5, 2e-4),
    "sft.optimizer.schedule": ("cosine", "cosine"),
    "sft.optimizer.warmup_steps": (0.1, 0.1),
    "reward_model.optimizer.learning_rate": (1e-5, 1e-4),
    "reward_model.optimizer.schedule": ("cosine", "cosine"),
    "reward_model.optimizer.warmup_steps": (0.1, 0.1),
    "dpo.batch_size": (64, 32),
    "dpo.optimizer.learning_rate": (1e-6, 1e-5),
    "dpo.optimizer.warmup_steps": (0.1, 0.1),
    "kto.optimizer.learning_rate": (1e-6, 1e-5),
    "kto.optimizer.warmup_steps": (0.1, 0.1),
    "rl.optimizer.learning_rate": (1e-6, 1e-5),
}


def _fill_pretrained(values: dict[str, Any], chosen: Collection[str]) -> dict[str, Any]:
    """Puts the defaults for pretrained weights into the parsed ``values`` if the model has such;
    returns them by key. What was ``chosen``, by a flag or a file, stays."""
    if values["model"] is None or not is_pretrained(values["model"]):
        return {}
    column = 1 if values["lora"]["rank"] else 0
    filled = {key: both[column] for key, both in PRETRAINED.items() if key not in chosen}
    for key, value in filled.items():
        section = values
        *path, name = key.split(".")
        for inner in path:
            section = section.setdefault(inner, {})
        section[name] = value
    return filled


def is_pretrained(model: str) -> bool:
    """Whether the weights of ``--model`` are from elsewhere: False if a run wrote them, and it, or
    a run before it, started from random weights.
    """
    seen: list[str] = []
    above: Any = model
    while isinstance(above, str) and above not in seen:
        seen.append(above)
        folder = Path(above)
        if not folder.is_dir():  # a Hugging Face name, or a run that has gone
            return True
        own = folder / "config.yaml"  # of a run's folder; else the folder is the run's model/
        try:
            file = own if own.is_file() else folder.parent / "config.yaml"
            above = read_yaml(file, SETTINGS)["model"]
        except (UserError, KeyError):
            return True
    return above is not None


def check_trusted(given: Values) -> None:
    """Raises UserError for values of a file that name a Python file which is not the user's own:
    one outside the current folder or in the run's folder that the YAML file lies in, or any at all
    where that run's folder is outside the current one. Configs of this package are trusted.
    """
    here = Path.cwd().resolve()
    problems = []
    for key, (value, place) in given.items():
        config = Path(place.rpartition(", line ")[0]).resolve()
        if config in [path.resolve() for path in shipped().values()]:
            continue
        run = config.parent if (config.parent / "manifest.json").is_file() else None
        for text in value if isinstance(value, tuple) else (value,):
            match = re.match(r"(.*\.py):", text, re.DOTALL) if isinstance(text, str) else None
            if match is None:
                continue
            file = Path(match[1]).resolve()
            is_own = file.is_relative_to(here)
            if run is not None:
                is_own = is_own and run.is_relative_to(here) and not file.is_relative_to(run)
            if not is_own:
                problems.append(f"{place}: {key} {text} runs the Python code of {file}")
    if problems:
        listed = "\n".join(problems)
        raise UserError(
            f"{listed}\nIt may be somebody else's, and runs with your rights: read it, then give "
            "--trust-config"
        )


def _given(kind: type, names: Words, unread: Words) -> Values:
    """The values of all files, a later one before an earlier one."""
    given: Values = {}
    problems = []
    for name in names:
        try:
            given |= read(kind, shipped().get(name, Path(name)))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return {key: value for key, value in given.items() if key.partition(".")[0] not in unread}


def _with_values(default: C, given: Values) -> C:
    """A copy with these values, set without a look at the rules, which hold for the final ones."""
    config = copy.copy(default)
    for key, (value, _) in given.items():
        section: Any = config
        *path, name = key.split(".")
        for inner in path:
            own = copy.copy(vars(section)[inner])  # sections may share one default
            vars(section)[inner] = own
            section = own
        vars(section)[name] = value
    return config


def _unknown_flag(flag: str, root: type) -> str:
    key = flag.lstrip("-").replace("-", "_")
    if not flag.startswith("--"):
        switch = "a switch stands alone: --text.pack, or --text.no-pack to turn it off"
        return f"unexpected {flag!r}; flags begin with --; {switch}"
    if key in _keys(root):
        return f"{flag} is a setting that this command does not read"
    return f"unknown flag {flag}; {_hint(key, root, flags=True)}"


def shipped() -> dict[str, Path]:
    """The configs that come with the package, such as ``tiny`` and ``dapo``, by their names."""
    paths: dict[str, Path] = {}
    for place in Path(__file__).parents[:2]:  # of a wheel, of a checkout
        paths |= {path.stem: path for path in (place / "configs").rglob("*.yaml")}
    return dict(sorted(paths.items()))


def _flags_of(root: type, sections: Words) -> tyro.constructors.ConstructorRegistry:
    """How tyro reads a config: each dataclass as a dict, so that no ``__post_init__`` runs before
    all values are known, and of its fields those that ``sections`` leaves."""
    registry = tyro.constructors.ConstructorRegistry()
    prefixes = {kind: f"{name}." for name, kind in _sections(root).items()} | {root: ""}
    inside = False

    @registry.primitive_rule
    def switch(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type != Switch:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="[auto|true|false]",
            instance_from_str=_switch,
            is_instance=lambda value: value in (True, False, "auto"),
            str_from_instance=lambda value: [str(value).lower()],
        )

    @registry.struct_rule
    def rule(
        info: tyro.constructors.StructTypeInfo,
    ) -> tyro.constructors.StructConstructorSpec | None:
        nonlocal inside
        if inside or not dataclasses.is_dataclass(info.type):
            return None  # and tyro goes on to its own rules, which know defaults and help texts
        inside = True
        spec: Any = registry.get_struct_spec(info)
        inside = False
        prefix = prefixes.get(info.type)
        fields = [
            field
            for field in spec.fields
            if prefix is None or _is_read(prefix + field.name, root, sections)
        ]
        return dataclasses.replace(spec, instantiate=dict, fields=tuple(fields))

    return registry


def _switch(words: list[str]) -> Switch:
    """The value of a flag that may stand alone, which turns it on."""
    values: dict[str, Switch] = {"auto": "auto", "true": True, "false": False}
    word = " ".join(words).lower() or "true"
    if word not in values:
        raise ValueError(f"expected auto, true, false or nothing, got {word}")
    return values[word]


def _is_read(key: str, root: type, sections: Words) -> bool:
    """Whether ``key`` is in one of these sections, or holds it; settings at the top are, save the
    reward.
    """
    if not sections or ("." not in key and key not in _sections(root) and key != "reward"):
        return True
    return any(f"{key}.".startswith(f"{part}.") or part.startswith(f"{key}.") for part in sections)


def _build(
    cls: type[C],
    values: dict[str, Any],
    default: C,
    prefix: str,
    given: Values,
    problems: list[str],
) -> C:
    """An instance of ``cls``, inner sections first; what their rules refuse is added to ``problems``
    with section, file and line, and has its default in the instance.
    """
    values = vars(default) | values
    for name, kind in _sections(cls).items():
        inner = values[name] if isinstance(values[name], dict) else {}
        section = vars(default)[name]
        values[name] = _build(kind, inner, section, f"{prefix}{name}.", given, problems)
    refused: set[str] = set()
    while True:
        try:
            return cls(**values)
        except ValueError as error:
            message = str(error)
        name = re.findall(r"\w+", message)[0]
        is_new = name in values and name not in refused
        if is_new or not refused:
            problems.append(_problem(message, values, prefix, given))
        if not is_new:
            return cls()
        refused.add(name)
        values[name] = vars(cls())[name]


def _problem(message: str, values: dict[str, Any], prefix: str, given: Values) -> str:
    """What a rule of a section says, after the place of the first setting that it names and whose
    value no flag has changed.
    """
    words = re.findall(r"\w+(?:\.\w+)*", message)
    section = types.SimpleNamespace(**values)
    text = f"{prefix[:-1]}: {message}".removeprefix(": ")
    if words[0] in values:
        text = f"{prefix}{message}"
    for word in words:
        value, place = given.get(prefix + word, (None, ""))
        if place and operator.attrgetter(word)(section) == value:
            return f"{place}: {text}"
    return text


def read(config_class: type, file: Path) -> Values:
    """The values that a YAML file gives to fields of ``config_class``: {dotted key: (value, "FILE,
    line N")}.

    A field's type is bool, int, float, str, a Literal of strings, a tuple of any number of these,
    one of these or None, or a dataclass, which is a section. ``1e-5``, a string in YAML 1.1, is
    read as a number, and ``None`` as null.

    Raises:
      UserError: no such file, not UTF-8, not YAML, not a mapping; an unknown or repeated key; a
        value of another type.
    """
    text = b""
    try:
        text = file.read_bytes()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        hint = f"{error.strerror}; `rlhf-jax configs` lists those that come with the package"
        raise UserError(f"{file}: cannot be read (given by --config): {hint}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        position = getattr(error, "position", None)
        line = mark.line if mark else text[:position].count(b"\n") if position else -1
        place = f"{file}, line {line + 1}" if line >= 0 else f"{file}"
        reason = (
            getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)[:100]
        )
        raise UserError(f"{place}: not valid YAML in UTF-8: {reason}") from None
    if node is None:
        raise UserError(f"{file}: is empty; expected a mapping of keys to values")
    problems: list[str] = []
    values = dict(_values(node, config_class, "", config_class, file, problems))
    if problems:
        raise UserError("\n".join(problems))
    return values


def _values(
    node: yaml.Node, cls: type, prefix: str, root: type, file: Path, problems: list[str]
) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yields (dotted key, (value, its place)) for every value below ``node``; mistakes are added to
    ``problems``.
    """
    if not isinstance(node, yaml.MappingNode):
        name = prefix[:-1] or "the file"
        problems.append(
            f"{_at(file, node)}: {name} must be a mapping of keys, found {_found(node)}"
        )
        return
    kinds = typing.get_type_hints(cls)
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else _found(key_node)
        key = prefix + name
        place = _at(file, key_node)
        if name not in kinds:
            problems.append(f"{place}: unknown key {key}; {_hint(key, root)}")
        elif name in lines:
            problems.append(f"{place}: key {key} is given twice, first on line {lines[name]}")
        elif dataclasses.is_dataclass(kinds[name]):
            yield from _values(value_node, kinds[name], f"{key}.", root, file, problems)
        else:
            try:
                yield key, (_value(value_node, kinds[name], key), place)
            except ValueError as error:
                problems.append(f"{file}, {error}")
        lines.setdefault(name, key_node.start_mark.line + 1)


def _value(node: yaml.Node, kind: Any, key: str) -> Any:
    """The value of a node as its type has it; ValueError, beginning with the line, if it is of
    another one.
    """
    is_switch = kind == Switch
    if is_switch:
        kind = Literal["auto"] if node.value == "auto" else bool
    optional = type(None) in typing.get_args(kind)
    inner = typing.get_args(kind)[0] if optional else kind
    choices = typing.get_args(inner)
    is_list = typing.get_origin(inner) is tuple
    if is_list and isinstance(node, yaml.SequenceNode):
        return tuple(_value(item, choices[0], f"each of {key}") for item in node.value)
    if isinstance(node, yaml.ScalarNode) and not is_list:
        is_plain = node.style is None
        # an unknown !tag, a date such as 2020-99-99, an int of 5,000 digits
        with contextlib.suppress(Exception):
            value = yaml.SafeLoader("").construct_object(node)
            if optional and (value is None or (is_plain and value == "None")):
                return None
            if type(value) is inner or (type(value) is str and value in choices):
                return value
            if inner is float and type(value) in (int, str) and is_plain:
                return float(value)
    names = {bool: "true or false", int: "an int", float: "a float", str: "a string"}
    expected = names.get(inner, "given in Python")
    if choices:
        expected = "a list" if is_list else f"one of {', '.join(map(repr, choices))}"
    or_null = " or null" if optional else " or auto" if is_switch else ""
    line = node.start_mark.line + 1
    raise ValueError(f"line {line}: {key} must be {expected}{or_null}, found {_found(node)}")


def _at(file: Path, node: yaml.Node) -> str:
    return f"{file}, line {node.start_mark.line + 1}"


def _found(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    text = node.value or "nothing"
    if node.tag == "tag:yaml.org,2002:str":
        text = repr(node.value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _hint(key: str, root: type, flags: bool = False) -> str:
    """The keys that may have been meant: alike in its section, of its name elsewhere, else all of
    the section.
    """
    section, _, name = key.rpartition(".")
    keys = _keys(root)
    prefix = f"{section}." if section else ""
    in_section = [k.removeprefix(prefix) for k in keys if k.startswith(prefix)]
    inside = [k for k in in_section if "." not in k]
    close = difflib.get_close_matches(name.replace("-", "_"), inside, n=1)
    close = close or [k for k in inside if k[:4] == name[:4]]
    meant = [prefix + k for k in close]
    meant = meant or [k for k in keys if k.rpartition(".")[2] == name][:3]
    if meant and flags:
        meant = ["--" + k.replace("_", "-") for k in meant]
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    if not inside:  # the section has no keys, or there is none: what stands before the dot is meant
        return _hint(section, root, flags)
    place = f"of {section} " if section else ""
    return f"the keys {place}are {', '.join(inside)}"


def _keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key, sections too."""
    keys = [prefix + name for name in typing.get_type_hints(cls)]
    for name, kind in _sections(cls).items():
        keys += _keys(kind, f"{prefix}{name}.")
    return keys


def _sections(cls: type) -> dict[str, Any]:
    """The fields that are dataclasses, with these."""
    return {
        name: kind
        for name, kind in typing.get_type_hints(cls).items()
        if dataclasses.is_dataclass(kind)
    }


# --- Writing


def to_yaml(config: Any) -> str:
    """All fields of ``config`` as YAML, in the order of the dataclasses; ``parse`` reads it back to
    an equal value.
    """
    return yaml.dump(
        dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
    )


class _Dumper(yaml.SafeDumper):
    """Lists on one line, and texts in the quotes that keep them as they are."""


def _text(dumper: _Dumper, data: str) -> yaml.Node:
    style = None
    if data == "None":  # without quotes it would be read as null
        style = "'"
    elif not data.isprintable():  # only double quotes keep line breaks and control characters
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(
    tuple, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True)
)
_Dumper.add_representer(str, _text)
# Functions and arrays in the Config of an algorithm of one's own.
_Dumper.add_multi_representer(
    object, lambda dumper, value: dumper.represent_data(objects.describe(value))
)
