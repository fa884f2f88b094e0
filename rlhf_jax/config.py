"""Everything that a run can be told: one ``RunConfig``, a section per stage, written in YAML or as dotted flags.

``parse`` reads it; ``configs/`` holds examples. A string below a field is its ``--help`` text.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_jax.algorithms.dpo import Config as DPOConfig
from rlhf_jax.algorithms.grpo import Config as GRPOConfig
from rlhf_jax.algorithms.ppo import Config as PPOConfig
from rlhf_jax.algorithms.reward_model import Config as RewardModelConfig
from rlhf_jax.algorithms.rloo import Config as RLOOConfig
from rlhf_jax.algorithms.sft import Config as SFTConfig
from rlhf_jax.algorithms.vpg import Config as VPGConfig
from rlhf_jax.flags import parse as parse
from rlhf_jax.flags import to_yaml as to_yaml
from rlhf_jax.runs import alerts


def _at_least(section: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _share(section: Any, name: str) -> None:
    if not 0 <= getattr(section, name) < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(section, name)}")


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
    """Standard deviation of the initial weights. GPT-2's 0.02 suits a width of some hundreds; 1/sqrt(hidden_size), 0.1
    for a width of 100, makes narrow networks learn what depends on several tokens in a tenth of the steps."""

    def __post_init__(self) -> None:
        if not self.initializer_range > 0:
            raise ValueError(f"initializer_range must be above 0, got {self.initializer_range}")


@dataclass(frozen=True)
class Compute:
    """How a model is run; changes speed and memory, not what is learnt."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the activations and matrix products; float16 is run as bfloat16. Trained parameters, log-probabilities
    and losses stay float32."""
    remat: bool = False
    """Gradient checkpointing: recompute each block in the backward pass instead of storing it."""
    scan_layers: bool = False
    """Compile one block and loop over depth: faster to compile for deep models."""


@dataclass(frozen=True)
class LoRA:
    """Train low-rank adapters beside the frozen weights of --model; the reference policy has the weights alone."""

    rank: int = 0
    """Rank r of the adapters; 0 trains every weight."""
    alpha: float | None = None
    """The adapters' term is multiplied by alpha / rank; null: 1."""
    match: str = "attn|mlp"
    """Regular expression of the layers that get one, searched in names such as h_0/attn/c_attn."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "rank")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match is no regular expression: {error}") from error


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model that starts from random weights; a ``model`` brings its own."""

    name: str | None = None
    """Folder or Hugging Face name of a tokenizer to take as it is; null: one is trained on the data."""
    kind: Literal["bpe", "characters"] = "bpe"
    """Byte-level BPE, or one token per character of the data."""
    vocab_size: int = 512
    """Entries of the BPE vocabulary, the two special tokens and 256 bytes included."""


@dataclass(frozen=True)
class Text:
    """How rows of data become tokens."""

    template: str = "{prompt}"
    """What the model reads for a prompt; the response follows directly."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with a text that does not fit. Truncated and dropped rows are counted and reported."""
    bucket_multiple: int = 16
    """Batches are padded to a multiple of this many tokens, so that few shapes are compiled."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "bucket_multiple")
        if "{prompt}" not in self.template:
            raise ValueError(f"template must contain {{prompt}}, got {self.template!r}")


@dataclass(frozen=True)
class Optimizer:
    """Adam or AdamW with clipping and a schedule (optax)."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "step", "plateau"] = "constant"
    """After the warm-up: linear and cosine decay from the peak to 0 over the run, step multiplies by decay_factor every
    decay_every optimizer steps, plateau after decay_patience validations in a row that bring no improvement."""
    decay_factor: float = 0.1
    """What the schedules step and plateau multiply the learning rate by."""
    decay_every: int | None = None
    """Optimizer steps between the decays of the schedule step."""
    decay_patience: int = 5
    """Validations without improvement that the schedule plateau waits for; the metric is that of keep_best, without it
    validation/score in RL and validation/loss elsewhere."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
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
        _at_least(self, 0, "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "eps")
        _at_least(self, 1, "decay_every", "decay_patience")
        if not 0 < self.decay_factor < 1:
            raise ValueError(f"decay_factor must be above 0 and below 1, got {self.decay_factor}")
        if (self.schedule == "step") != (self.decay_every is not None):
            raise ValueError("the schedule step needs decay_every, and decay_every the schedule step")
        _share(self, "b1")
        _share(self, "b2")


@dataclass(frozen=True)
class SFTStage(SFTConfig):
    """Supervised fine-tuning on demonstrations."""

    data: tuple[str, ...] = ()
    """Files of {prompt, response} rows; empty: the run's --data."""
    num_epochs: int = 1
    """Passes over the data."""
    batch_size: int = 32
    """Rows per optimizer step, over all devices."""
    optimizer: Optimizer = Optimizer()
    validation_fraction: float = 0.05
    """Share of the rows held out for validation."""
    validation_interval: int = 100
    """Optimizer steps between validations."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_epochs", "batch_size", "num_microbatches", "validation_interval")
        _share(self, "validation_fraction")


@dataclass(frozen=True)
class RewardModelStage(RewardModelConfig):
    """A reward model from human preferences."""

    data: tuple[str, ...] = ()
    """Files of {prompt, chosen, rejected} rows; empty: the run's --data."""
    num_epochs: int = 1
    """Passes over the data."""
    batch_size: int = 32
    """Comparisons per optimizer step, over all devices."""
    optimizer: Optimizer = Optimizer()
    validation_fraction: float = 0.1
    """Share of the rows held out for validation."""
    validation_interval: int = 100
    """Optimizer steps between validations."""
    normalize_samples: int = 256
    """After training, scores get mean 0 and variance 1 over this many samples of the policy in --model; 0: not."""
    ensemble_size: int = 1
    """Reward models that train at once, each from a score head of its own, without --model from a body of its own."""
    bootstrap: bool = True
    """Each model of an ensemble trains on its own draw of the rows, with replacement; false: all on the same rows."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_epochs", "batch_size", "num_microbatches", "validation_interval", "ensemble_size")
        _at_least(self, 0, "normalize_samples", "centering")
        _share(self, "validation_fraction")


@dataclass(frozen=True)
class DPOStage(DPOConfig):
    """Direct preference optimisation of the policy in --model, which is the reference too."""

    data: tuple[str, ...] = ()
    """Files of {prompt, chosen, rejected} rows or rankings; empty: the run's --data."""
    num_epochs: int = 1
    """Passes over the data."""
    batch_size: int = 32
    """Pairs per optimizer step, over all devices."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-6, schedule="linear")
    validation_fraction: float = 0.1
    """Share of the rows held out for validation."""
    validation_interval: int = 100
    """Optimizer steps between validations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "num_epochs", "batch_size", "num_microbatches", "validation_interval")
        _share(self, "validation_fraction")


@dataclass(frozen=True)
class RLStage:
    """What VPG, PPO, RLOO and GRPO share: prompts, sampling, KL, the optimizer."""

    data: tuple[str, ...] = ()
    """Files of prompts; empty: the run's --data."""
    num_iterations: int = 100
    """Collect, reward, learn: how many times."""
    num_episodes: int | None = None
    """The run's length in episodes, whole batches, rounded up; where given, num_iterations does not count."""
    batch_size: int = 64
    """Episodes per iteration, over all devices."""
    max_prompt_length: int | None = None
    """Prompt slots P; null: the longest prompt."""
    max_new_tokens: int = 32
    """Response slots R."""
    temperature: float = 1.0
    """Sampling temperature, used in every log-probability of the algorithm too."""
    top_k: int | None = None
    """Sample among the k likeliest tokens; null: all. Needs allow_truncated_sampling."""
    top_p: float | None = None
    """Sample from the smallest set of this probability; null: all. Needs allow_truncated_sampling."""
    allow_truncated_sampling: bool = False
    """Train on samples that do not come from the policy's full distribution: the KL estimate is then biased."""
    kl_coef: float | None = None
    """Weight of the KL penalty in the reward, the first value when it adapts; null: 0.05, but 0 for GRPO, whose loss
    has a KL term."""
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
    """Files of prompts to validate on; empty: a validation_fraction of the prompts, held out of the training."""
    validation_interval: int = 20
    """Iterations between validations."""
    validation_prompts: int = 64
    """At most this many prompts are sampled at a validation."""
    reference_refresh: int | None = None
    """Every so many iterations the policy becomes the reference of the KL; null: the reference stays --model."""
    judge: tuple[str, ...] = ()
    """A reward, as `reward`, that is not trained on: it scores the validations' samples too (validation/judge)."""
    show_examples: int = 0
    """Print so many examples (prompt, what was generated, reward) at each validation."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_iterations", "batch_size", "max_prompt_length", "max_new_tokens", "top_k", "kl_horizon")
        _at_least(self, 1, "num_episodes")
        _at_least(self, 1, "validation_interval", "validation_prompts", "reference_refresh")
        _at_least(self, 0, "temperature", "kl_coef", "show_examples")
        _share(self, "validation_fraction")
        if self.kl_target is not None and self.kl_target <= 0:
            raise ValueError(f"kl_target must be above 0, got {self.kl_target}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    @property
    def length(self) -> int:
        """Iterations of the run."""
        return self.num_iterations if self.num_episodes is None else -(-self.num_episodes // self.batch_size)


@dataclass(frozen=True)
class Safety:
    """What counts as unsafe in RL's prompts and responses, and what is done about it; nothing does by default."""

    words: tuple[str, ...] = ()
    """Files of words and phrases, one a line, found as whole words whatever their case."""
    patterns: tuple[str, ...] = ()
    """Regular expressions in Python's syntax, searched in the text as it is; (?i) ignores case."""
    classifier: str | None = None
    """One SPEC as in `reward` that scores responses; those with a score below `below` or above `above` are unsafe."""
    below: float | None = None
    """A response whose classifier score is lower is unsafe."""
    above: float | None = None
    """A response whose classifier score is higher is unsafe."""
    prompts: Literal["drop", "replace", "count"] = "drop"
    """What becomes of a prompt in which words or patterns are found: left out, replaced, or counted alone."""
    replacement: str | None = None
    """With prompts: replace, the text in place of an unsafe prompt."""
    responses: Literal["penalise", "replace", "mask", "count"] = "penalise"
    """What becomes of an unsafe response: `penalty` is subtracted from its score, `score` replaces it, it is absent
    from every statistic and loss, or it is counted alone."""
    penalty: float = 1.0
    """With responses: penalise, what is subtracted."""
    score: float | None = None
    """With responses: replace, the score in place of the response's own."""

    @property
    def on(self) -> bool:
        """Whether anything can count as unsafe."""
        return bool(self.words or self.patterns or self.classifier)

    def __post_init__(self) -> None:
        _at_least(self, 0, "penalty")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"patterns: {pattern!r} is no regular expression: {error}") from error
        if (self.classifier is None) != (self.below is None and self.above is None):
            raise ValueError("a classifier needs below or above, and they need a classifier")
        if self.prompts == "replace" and not self.replacement:
            raise ValueError("prompts: replace needs a replacement, the text in place of an unsafe prompt")
        if self.responses == "replace" and self.score is None:
            raise ValueError("responses: replace needs a score, which unsafe responses get")


@dataclass(frozen=True)
class RunConfig:
    """One run. Scripts read the sections that concern them."""

    data: tuple[str, ...] = ()
    """Data files of the stage, a folder with sft_data.json, preference_data.json and prompts.json, `demo` or
    `arithmetic`."""
    model: str | None = None
    """A Hugging Face folder (or name) to start from; null: random weights of `network`."""
    reward: tuple[str, ...] = ()
    """Reward models' folders (or Hugging Face names), several as mean:A,B, min:A,B or uncertainty:A,B,
    FILE.py:FUNCTION, count:TEXT, length, repetition, diversity; SPEC*WEIGHT weighs one of a sum."""
    output_dir: str | None = None
    """The run's folder; null: runs/SCRIPT."""
    seed: int = 0
    """Root of every random number."""
    device: Literal["cpu", "gpu", "cuda", "tpu", "mps"] | None = None
    """Where to run; null: JAX's choice. mps is refused with a word on Apple's GPUs."""
    processes: str | None = None
    """HOST:PORT,COUNT,NUMBER of this process where several share the run: where the first one listens, how many there
    are and which one this is, from 0; auto: as SLURM, a TPU pod, Open MPI or Kubernetes says."""
    resume: bool = False
    """Continue the run in output_dir, bit for bit."""
    overwrite: bool = False
    """Replace the run in output_dir."""
    allow_changed: tuple[str, ...] = ()
    """With --resume: settings that may differ from the run's, such as rl.num_iterations or data (its files too)."""
    checkpoint_interval: int = 50
    """Steps (supervised) or iterations (RL) between checkpoints."""
    checkpoint_async: bool = False
    """Go on training while a checkpoint is written; needs memory for a copy of the state on the host."""
    keep_last: int = 2
    """Checkpoints kept."""
    keep_best: str | None = None
    """max:METRIC or min:METRIC, a metric of the validations such as max:validation/score: each validation is then
    saved too, the best one is kept, and model/ is made from it."""
    early_stopping_patience: int | None = None
    """End after so many validations in a row without improvement of keep_best's metric, without it of validation/score
    in RL and validation/loss elsewhere; null: go on to the end."""
    track: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """Services that get metrics, samples and alerts too; WANDB_PROJECT names the project of the first two."""
    alerts: tuple[str, ...] = ()
    """Rules such as "objective/kl > 50 for 3: stop", added to the default ones; `none` turns those off."""
    network: Network = Network()
    compute: Compute = Compute()
    lora: LoRA = LoRA()
    tokenizer: Tokenizer = Tokenizer()
    text: Text = Text()
    sft: SFTStage = SFTStage()
    reward_model: RewardModelStage = RewardModelStage()
    dpo: DPOStage = DPOStage()
    rl: RLStage = RLStage()
    safety: Safety = Safety()
    vpg: VPGConfig = VPGConfig()
    ppo: PPOConfig = PPOConfig()
    rloo: RLOOConfig = RLOOConfig()
    grpo: GRPOConfig = GRPOConfig()

    def __post_init__(self) -> None:
        _at_least(self, 1, "checkpoint_interval", "keep_last", "early_stopping_patience")
        _at_least(self, 0, "seed")
        alerts.parse(self.alerts)
        if self.keep_best is not None and not re.fullmatch("(max|min):.+", self.keep_best):
            raise ValueError(f"keep_best must be max:METRIC or min:METRIC, got {self.keep_best!r}")
        if self.lora.rank and self.model is None:
            raise ValueError("lora.rank adapts a trained model: give --model, or leave it out to train every weight")
