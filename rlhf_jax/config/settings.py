"""The settings of a run: one ``RunConfig`` with a section per stage.

The text below a field is its ``--help`` text, and its type has the bounds of its values. Rules
between fields are in ``__post_init__``. Both raise ValueError with the field's name first;
``parse`` adds the section, the file and the line.
"""

import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from rlhf_jax.algorithms import distill, dpo, kto, ppo, reward_model, sft
from rlhf_jax.algorithms.grpo import Config as GRPOConfig
from rlhf_jax.algorithms.rloo import Config as RLOOConfig
from rlhf_jax.algorithms.vpg import Config as VPGConfig
from rlhf_jax.errors import check_pattern
from rlhf_jax.graders import verifiable
from rlhf_jax.graders.client import Requests, check_url
from rlhf_jax.graders.service import Judge
from rlhf_jax.losses import ImportanceSampling
from rlhf_jax.ops import check_number, check_temperature
from rlhf_jax.runs import alerts

Texts = tuple[str, ...]
Json = dict[str, Any]
"""An object of JSON. A flag gives it as text."""
Switch = bool | Literal["auto"]
ALGORITHMS = ("vpg", "ppo", "rloo", "grpo", "distill")  # those of this package, by their sections

# Numbers with bounds. None passes where a field allows it. Counts are int32 in the programs.
MOST = 2**31 - 1
Count = Annotated[int, partial(check_number, at_least=1, at_most=MOST)]
CountOrZero = Annotated[int, partial(check_number, at_least=0, at_most=MOST)]
Positive = Annotated[float, partial(check_number, above=0)]
NonNegative = Annotated[float, partial(check_number, at_least=0)]
Share = Annotated[float, partial(check_number, at_least=0, at_most=1)]
ShareBelow1 = Annotated[float, partial(check_number, at_least=0, below=1)]
ShareAbove0 = Annotated[float, partial(check_number, above=0, at_most=1)]


def _bounds(section: type) -> dict[str, Callable[[str, Any], None]]:
    """{field: the check of its bounds} of a class of settings."""
    checks = {}
    for name, kind in typing.get_type_hints(section, include_extras=True).items():
        for part in (kind, *typing.get_args(kind)):  # the type itself, or its part beside None
            for check in getattr(part, "__metadata__", ()):
                checks[name] = check
    return checks


@dataclass(frozen=True)
class Section:
    """Checks the bounds of its fields, after the rules of the ``Config`` that a section extends."""

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()
        for name, check in _bounds(type(self)).items():
            check(name, getattr(self, name))


@dataclass(frozen=True)
class Network(Section):
    """The GPT-2 that is started from random weights when no ``model`` is given."""

    hidden_size: int = 128
    """Width D of the residual stream."""
    num_layers: int = 2
    """Number of blocks L."""
    num_heads: int = 4
    """Attention heads per block; divides hidden_size."""
    max_length: int = 128
    """Longest text, prompt and response together, in tokens."""
    dropout: ShareBelow1 | None = None
    """Dropout rate in supervised stages, of --model too; null: that of the model's folder, and 0
    for random weights. RL and scoring never drop."""
    initializer_range: Positive = 0.02
    """Standard deviation of the initial weights. GPT-2's 0.02 suits a width of some hundreds;
    1/sqrt(hidden_size), 0.1 for a width of 100, makes narrow networks learn what depends on several
    tokens in a tenth of the steps."""


@dataclass(frozen=True)
class Compute(Section):
    """How a model is computed; changes speed and memory, not what is learnt."""

    blocks: Count | None = None
    """Parts of each batch, a power of two, such as 8, that the data devices divide: final weights,
    metrics and samples are then the same bytes on any number of devices and processes. null: sums
    are in the order of the devices, and another number of them gives other rounding."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the activations and matrix products; float16 is run as bfloat16. Trained parameters,
    log-probabilities and losses stay float32."""
    save_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in model/ at the end of a run; checkpoints are float32. auto: that of the
    folder of --model if all weights are trained, float32 where adapters are merged and for random
    weights. A change below a bfloat16's half step, 1/512 of a weight, is rounded away."""
    remat: Switch = "auto"
    """Gradient checkpointing: recompute each block in the backward pass instead of storing it.
    auto: in models of eight layers and more whose update does not fit without it."""
    scan_layers: Switch = "auto"
    """Compile one block for all layers but the last, and loop over depth: faster to compile for
    deep models. auto: from eight layers on.
    """
    share_prompts: Switch = "auto"
    """Compute a prompt once for all its answers, in RL and for comparisons. auto: where that saves
    a tenth of the token passes and the batch divides into groups."""
    score_rows: Count | None = None
    """Rows that policy, reference and reward models score at once, over all devices; null: where
    num_microbatches is above 1 those of a microbatch, else the whole batch."""
    offload: tuple[Literal["reference", "reward"], ...] = ()
    """Frozen models that are kept in the host's memory while they do not score: reference, reward.
    """
    attention: Literal["auto", "xla", "cudnn", "splash", "blockwise"] = "auto"
    """How attention is computed. xla holds all scores of a text; blockwise those of a block of
    queries, on any device; cudnn (bfloat16 on a GPU) and splash (one TPU) are fused kernels. auto:
    xla below 512 tokens, else what fits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and self.blocks & (self.blocks - 1):
            raise ValueError(f"blocks must be a power of two, such as 8, got {self.blocks}")


@dataclass(frozen=True)
class Mesh(Section):
    """How the devices share the work: a batch is cut over data x fsdp, weights and their optimizer
    state over fsdp x tensor.

    At most one size is -1, which stands for the rest of the devices.
    """

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
    sampling: CountOrZero = 0
    """Devices, the last ones, that sample the next rollout while the others learn; each holds all
    weights. It needs rl.rollouts_ahead, and other stages leave these devices idle. 0: none.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(
                f"data, fsdp and tensor must be at least 1, one of them may be -1, got {sizes}"
            )

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of the axes of the mesh that learns."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}


@dataclass(frozen=True)
class LoRA(Section):
    """Train low-rank adapters beside the frozen weights of --model; the reference policy has these
    weights without adapters.
    """

    rank: CountOrZero = 0
    """Rank r of the adapters; 0 trains every weight."""
    alpha: Positive | None = None
    """The adapters' term is multiplied by alpha / rank; null: 1."""
    dropout: ShareBelow1 = 0.0
    """Dropout rate of the adapters' inputs in SFT and reward models. DPO, KTO and RL never drop."""
    match: str = "attn|mlp"
    """Regular expression for the layers that get an adapter, searched in names such as
    h_0/attn/c_attn; experts get adapters only if it names them: attn|experts."""
    base: Literal["bfloat16", "int8", "int4", "nf4"] | None = None
    """Hold the frozen weights of the layers in fewer bits: 8 (int8), 4.5 (int4 and nf4, their
    scales included) or 16 (bfloat16); null: as they are in the model's files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern("match", self.match)
        if self.base is not None and not self.rank:
            raise ValueError(f"base {self.base}: all weights are trained; give a rank")


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model that starts from random weights; a ``model`` brings its own."""

    name: str | None = None
    """Folder or Hugging Face name of a tokenizer; null: one is trained on the data."""
    kind: Literal["bpe", "characters"] = "bpe"
    """Byte-level BPE, or one token per character of the data."""
    vocab_size: int = 512
    """Entries of the BPE vocabulary, the two special tokens and 256 bytes included."""


@dataclass(frozen=True)
class Text(Section):
    """How rows of data become tokens."""

    template: str = "auto"
    """What the model reads for a prompt: a text with {prompt} in it, which the response follows
    directly. auto: a user's message in the chat template of the model's folder, or the template of
    the run that left the folder, or {prompt} if it has neither."""
    template_options: Json | None = None
    """Variables of the chat template as a JSON object, such as {"enable_thinking": false};
    chat_template_kwargs of other programs. They are the template's defaults in the saved folder."""
    special_tokens: Literal["text", "tokens"] | None = None
    """What the spelling of a special token in data is: text, or in plain prompts and responses that
    token, for data that carry their markup. null: text there, with a warning, and refused in
    messages, as tokens are."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with a text that does not fit. Truncated and dropped rows are counted and
    reported.
    """
    max_length: Count | None = None
    """Longest text of SFT, reward models, DPO and KTO, prompt, response and EOS together, in
    tokens; too_long acts on longer ones. null: the model's positions."""
    bucket_multiple: Count = 16
    """Batches are padded to a multiple of this many tokens, so that few shapes are compiled; RL's
    prompts to this number times a power of two."""
    pack: bool = False
    """Put several demonstrations or comparisons of a batch into one row, as long as the longest of
    all, instead of padding each: SFT, reward models and DPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template != "auto" and "{prompt}" not in self.template:
            raise ValueError(f"template must be auto or contain {{prompt}}, got {self.template!r}")


@dataclass(frozen=True)
class Optimizer(Section):
    """Adam or AdamW with clipping and a schedule (optax)."""

    learning_rate: NonNegative | None = None
    """Peak learning rate; null: by the size of what is trained, printed at the start of a run."""
    schedule: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    """After the warm-up: linear and cosine decay from the peak to 0 over the run; plateau divides
    the rate by ten after 5 validations in a row without improvement of keep_best's metric, without
    it of validation/score in RL and validation/loss elsewhere."""
    min_lr_ratio: ShareBelow1 = 0.0
    """Where linear and cosine end, as a share of the peak, in place of 0."""
    warmup_steps: NonNegative = 0.0
    """Optimizer steps of linear warm-up; below 1 a share of the run's steps, rounded up."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; biases, norms and the heads' gain and shift are never decayed."""
    max_grad_norm: NonNegative | None = 1.0
    """Clip gradients to this global norm; null does not clip."""
    b1: ShareBelow1 = 0.9
    """Adam's decay of the first moment."""
    b2: ShareBelow1 = 0.999
    """Adam's decay of the second moment."""
    eps: NonNegative = 1e-8
    """Adam's epsilon."""
    frozen: str | None = None
    """Regular expression for the parameters that keep their values, searched in names such as
    wte/embedding and h_0/attn/c_attn/kernel: "wte|wpe|h_[0-3]/" freezes the tables and the four
    lowest layers. null: none."""

    @property
    def counts_steps(self) -> bool:
        """Whether the learning rate depends on the number of optimizer steps of the whole run."""
        return self.schedule in ("linear", "cosine") or 0 < self.warmup_steps < 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen is not None:
            check_pattern("frozen", self.frozen)
        if self.min_lr_ratio and self.schedule not in ("linear", "cosine"):
            raise ValueError(
                f"min_lr_ratio: the schedule {self.schedule} has no end; only linear and cosine do"
            )


@dataclass(frozen=True)
class Supervised(Section):
    """What SFT, reward models, DPO and KTO share: rows of data, passes over them, the optimizer,
    validations.
    """

    data: Texts = ()
    """Files of the stage's rows; empty: the run's --data."""
    max_rows: Count | None = None
    """Use at most so many rows, drawn by the seed; null: all. A ranking is one row."""
    without_rows: Texts = ()
    """Rows left out of their batches, N or FILE:N. The others stay where they are; N is the number
    of the row in its file."""
    num_epochs: Count = 1
    """Passes over the data."""
    max_steps: Count | None = None
    """The run's length in optimizer steps, which replaces num_epochs; null: that of num_epochs."""
    batch_size: Count = 32
    """Rows (comparisons, pairs) per optimizer step, over all devices."""
    optimizer: Optimizer = Optimizer(schedule="cosine", warmup_steps=0.1)
    validation_fraction: ShareBelow1 = 0.1
    """Share of the rows held out for validation; rows with equal prompts stay together."""
    validation_data: Texts = ()
    """Files of rows to validate on; empty: a validation_fraction of the rows, which are not trained
    on."""
    validation_interval: Count = 100
    """Optimizer steps between validations."""
    num_microbatches: Count = 1
    """Parts of a batch that are run one after the other to save memory; the gradient does not
    change.
    """


@dataclass(frozen=True)
class Answering(Supervised):
    """What SFT, DPO and KTO share: a policy, which answers prompts at validations."""

    validation_prompts: CountOrZero = 16
    """Held-out prompts, at most, that the policy answers greedily at validations, for samples.jsonl
    and the report; 0: none. If nothing is held out, training prompts before and after training.
    Metrics are of all held-out rows."""
    max_new_tokens: Count = 32
    """Most tokens of these answers."""


@dataclass(frozen=True)
class SFTStage(Answering, sft.Config):
    """Supervised fine-tuning on demonstrations {prompt, response}."""

    validation_fraction: ShareBelow1 = 0.05
    """Share of the rows held out for validation."""
    turns: Literal["all", "last"] = "all"
    """Which turns of the assistant in a conversation are learned, except those of weight 0."""


@dataclass(frozen=True)
class RewardModelStage(Supervised, reward_model.Config):
    """A reward model from human preferences {prompt, chosen, rejected}."""

    normalize_samples: CountOrZero = 256
    """After training, scores get mean 0 and variance 1 over this many samples of the policy in
    --model; 0: scores stay as they are.
    """
    ensemble_size: Count = 1
    """Reward models that are trained together. Each has its own rows, drawn with replacement, and
    its own initial score head; without --model also its own initial body."""
    steps: bool = False
    """A process reward model, of rows {prompt, steps, labels}. Its scores are not normalised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps and (self.ensemble_size > 1 or self.centering or self.sft_coef):
            raise ValueError("steps: leave out ensemble_size, centering and sft_coef")


@dataclass(frozen=True)
class Reference(Section):
    """How the reference policy changes; by default it stays --model."""

    reference_refresh: Count | None = None
    """The policy becomes the reference every so many iterations, or optimizer steps of DPO; null:
    never."""
    reference_ema: Share | None = None
    """The reference becomes ema * policy + (1 - ema) * reference instead, after each step or every
    reference_refresh steps; null: no average is taken."""

    @property
    def reference_moves(self) -> bool:
        """Whether the weights of the reference are part of the state."""
        return self.reference_refresh is not None or self.reference_ema is not None


@dataclass(frozen=True)
class DPOStage(Answering, Reference, dpo.Config):
    """Direct preference optimisation of the policy in --model, which is the reference too, from
    pairs or rankings.
    """

    optimizer: Optimizer = Optimizer(schedule="linear", warmup_steps=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_moves and not self.needs_reference:
            raise ValueError(
                f"reference_refresh, reference_ema: the kind {self.kind} has no reference; leave "
                "them out"
            )


@dataclass(frozen=True)
class KTOStage(Answering, kto.Config):
    """Kahneman-Tversky optimisation of the policy in --model, which is the reference too, from
    {prompt, response, desirable}; of preferences, the chosen answer is desirable and the rejected
    one is not."""

    desirable_weight: NonNegative | None = None  # type: ignore[assignment]
    """Weight lambda of desirable answers. null, if the other is null too: so large that the
    desirable rows to train on weigh 1.5 times as much in all, and at least 1; else 1."""
    undesirable_weight: NonNegative | None = None  # type: ignore[assignment]
    """Weight lambda of undesirable answers; null: 1."""
    optimizer: Optimizer = Optimizer(schedule="linear", warmup_steps=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2:
            raise ValueError(
                "batch_size must be at least 2, got 1: the reference point joins each prompt with "
                "another row's response"
            )


def _check_engine(engine: str) -> None:
    """Raises ValueError unless it is KIND:PLACE; ``engines.opened`` knows the kinds."""
    kind, _, place = engine.partition(":")
    if not kind.isidentifier() or not place or kind in ("http", "https"):
        raise ValueError(
            f"engine must be vllm:http://HOST:PORT, openai:http://HOST:PORT or stored:FOLDER, got "
            f"{engine!r}"
        )
    if kind != "stored":
        check_url("engine", place)


@dataclass(frozen=True)
class RLStage(Reference):
    """What VPG, PPO, RLOO, GRPO and distillation share: prompts, sampling, KL, the optimizer."""

    data: Texts = ()
    """Files of prompts; empty: the run's --data."""
    num_iterations: Count = 100
    """The run's length: how many times it samples a batch, scores it and learns."""
    num_epochs: Count | None = None
    """The run's length in passes over the prompts that are trained on, rounded up to whole batches;
    it replaces num_iterations."""
    batch_size: Count = 64
    """Episodes per iteration, over all devices."""
    max_prompt_length: Count | None = None
    """Most tokens of a prompt; null: those of the longest prompt. A batch has as many slots as its
    own prompts need.
    """
    max_new_tokens: Count = 32
    """Response slots R."""
    min_new_tokens: CountOrZero = 0
    """Fewest tokens of a response, before which no EOS is sampled. Needs top_k where the model has
    more than 1024 tokens."""
    environment: str | None = None
    """FILE.py:FUNCTION, called after each response as function(conversation, row): the policy reads
    what it returns and responds again, all in one row, until it returns None."""
    max_turns: Count | None = None
    """Most responses of a row; null: as many as the environment asks for and max_new_tokens, which
    then hold responses and replies, have room for."""
    stop: Texts = ()
    """Texts such as "\\n\\nHuman:" that end a response: what is sampled after one is masked."""
    stop_after: CountOrZero = 0
    """Tokens at the beginning of a response in which no text of `stop` ends it."""
    temperature: Annotated[float, partial(check_number, at_least=1e-6, below=math.inf)] = 1.0
    """Sampling temperature, used in every log-probability of the algorithm too."""
    top_k: Count | None = None
    """Sample among the k likeliest tokens; null: all. Every log-probability of the algorithm is
    then one among the tokens that top_k, top_p and min_p left, at most 1024."""
    top_p: ShareAbove0 | None = None
    """Sample from the smallest set of this probability; null: all. Needs top_k where the model has
    more than 1024 tokens."""
    min_p: Share | None = None
    """Sample among the tokens at least so likely, as a share of the likeliest; null: all. Needs
    top_k where the model has more than 1024 tokens."""
    kl_coef: NonNegative | None = None
    """Weight of the KL penalty in the reward, the first value when it adapts; null: the algorithm's
    own, 0.05 for VPG, PPO and RLOO, 0 for GRPO, whose loss has a KL term."""
    kl_target: Positive | None = None
    """Adapt the coefficient to this KL, in nats per response; null: fixed."""
    kl_horizon: Count | None = None
    """Episodes over which the coefficient adapts; null: 10 iterations' worth."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a response that did not end."""
    missing_eos_score: float | None = None
    """Replaces the score of a response that did not end."""
    score_clip: Positive | None = None
    """Scores are clipped to this distance from 0, before any penalty; null: not clipped."""
    optimizer: Optimizer = Optimizer(schedule="linear")
    train_routers: bool = False
    """Train the routers of a mixture of experts too. By default RL leaves them as they are: what a
    token's experts are then changes with its state alone."""
    expert_gap: bool = False
    """Measure in each iteration how often sampling and learning send a token to other experts
    (policy/expert_gap). The samples are decoded again, which takes as long as to sample them."""
    validation_fraction: ShareBelow1 = 0.1
    """Share of the prompts held out for validation."""
    validation_data: Texts = ()
    """Files of prompts to validate on; empty: a validation_fraction of the prompts, which are not
    trained on."""
    validation_interval: Count = 20
    """Iterations between validations."""
    validation_prompts: Count = 64
    """At most this many prompts are sampled at a validation, batch_size at a time."""
    validation_temperature: Annotated[float, check_temperature] | None = None
    """Sampling temperature of validations, 0: the likeliest tokens; null: temperature."""
    validation_samples: Count = 1
    """Responses to each prompt of a validation; its metrics are means over all of them. Several
    have best@k, pass@k and maj@k too."""
    dynamic_sampling: CountOrZero = 0
    """At most so many times in an iteration, groups that teach nothing, whose answers all have one
    score for example, are replaced by groups of new prompts; such groups that are left then stay in
    the batch. A KL penalty in the reward does not count. 0: never."""
    mask_truncated: bool = False
    """Leave responses that did not end out of the loss and of the statistics of their group."""
    overlong_buffer: Count | None = None
    """Number of last tokens of max_new_tokens over which the penalty of a long response grows from
    0 to overlong_penalty; null: no penalty.
    """
    overlong_penalty: NonNegative = 1.0
    """Subtracted from the score of a response of max_new_tokens."""
    judge: Texts = ()
    """A reward, written as `reward` is, that is not trained on: it scores the samples of the
    validations too (validation/judge).
    """
    show_examples: CountOrZero = 0
    """Print so many examples (prompt, what was generated, reward) at each validation."""
    engine: str | None = None
    """A server that samples in place of the run's own programs: vllm:http://HOST:PORT, which gets
    the policy's weights before each rollout; openai:http://HOST:PORT, whose weights stay those of
    --model; stored:FOLDER, the samples that another run kept. null: none."""
    engine_importance: Literal[ImportanceSampling, "off"] = "token_truncate"
    """What corrects the log-probabilities of an engine, or of rollouts_ahead: each token's loss is
    multiplied by the ratio of the policy's own probability to that of the sampler. token, sequence,
    geometric: the ratio of the token, of its whole response, or the geometric mean over it;
    truncate: a ratio outside [engine_floor, engine_cap] becomes the nearer bound; mask: it becomes
    0. tv_mask, kl_mask: the token's ratio becomes 0 where the total variation, or KL, of its
    probability is above engine_cap. off: no correction."""
    engine_cap: Positive | None = 2.0
    """The largest such ratio, or divergence of tv_mask and kl_mask; null: no bound."""
    engine_floor: NonNegative = 0.0
    """The least such ratio; tv_mask and kl_mask have none."""
    engine_check: bool = True
    """Stop the run when the log-probabilities of an engine differ from the policy's by more than
    rounding explains; false: train on its samples anyway."""
    rollouts_ahead: Annotated[int, partial(check_number, at_least=0, at_most=1)] = 0
    """1: an iteration samples with the weights before the last update, so that an engine samples
    while the devices learn. It takes a copy of the trained weights. 0: with the current weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("overlong_buffer", self.overlong_buffer, at_most=self.max_new_tokens)
        if self.overlong_penalty != 1 and self.overlong_buffer is None:
            raise ValueError("overlong_penalty: nothing is subtracted without an overlong_buffer")
        check_number("engine_floor", self.engine_floor, at_most=self.engine_cap or math.inf)
        check_number("min_new_tokens", self.min_new_tokens, at_most=self.max_new_tokens)
        if self.min_new_tokens and self.environment is not None:
            raise ValueError(
                "min_new_tokens: it counts the tokens of one response, and an environment asks for "
                "several; leave it out"
            )
        if self.rollouts_ahead and self.dynamic_sampling:
            raise ValueError(
                "rollouts_ahead, dynamic_sampling: the groups to replace are known only when the "
                "rollout is scored; give one"
            )
        if self.truncates and self.engine is not None:
            says = self.top_k and self.validation_temperature != 0 and not self.min_new_tokens
            if not says or self.engine.startswith("openai:"):
                raise ValueError(
                    "engine: only a vllm server says among which tokens top_k let it sample, which "
                    "an update must know, and only with top_k (top_p and min_p beside it), without "
                    "min_new_tokens and validation_temperature 0"
                )
        if self.validation_samples > 1 and self.validation_temperature == 0:
            raise ValueError(
                "validation_samples: with validation_temperature 0 all samples of a prompt are the "
                "same one; leave it out"
            )
        if self.stop_after and not self.stop:
            raise ValueError("stop_after: there is no text that ends a response; give stop too")
        if not all(self.stop):
            raise ValueError(f"stop: expected texts that are not empty, got {[*self.stop]}")
        names = ("missing_eos_penalty", "missing_eos_score", "overlong_buffer", "score_clip")
        if self.environment is not None and any(getattr(self, n) is not None for n in names):
            raise ValueError(f"{', '.join(names)}: an environment pays itself")
        if self.engine is not None:
            _check_engine(self.engine)
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
    def truncates(self) -> bool:
        """Whether some tokens cannot be sampled, by top_k, top_p, min_p or min_new_tokens."""
        limits = self.top_k is not None or self.top_p not in (None, 1) or bool(self.min_p)
        return limits or self.min_new_tokens > 0

    def lasting(self, *, prompts: int, group_size: int) -> "RLStage":
        """The settings with num_iterations as num_epochs says: ``prompts`` are trained on, each
        with ``group_size`` answers."""
        if self.num_epochs is None:
            return self
        iterations = math.ceil(self.num_epochs * prompts * group_size / self.batch_size)
        return replace(self, num_iterations=iterations)


@dataclass(frozen=True)
class PPOStage(Section, ppo.Config):
    """Proximal policy optimisation, and the value function of its runs."""

    value: Literal["shared", "separate"] = "shared"
    """shared: a head on the policy's body; separate: another model, which starts as the policy with
    a head, or as value_from says.
    """
    value_from: str = "policy"
    """With separate, what the value model starts from: the policy; reward, the run's only reward
    model, whose score head becomes that of the values; or a folder (or Hugging Face name), of a
    reward model or a language model with the policy's tokenizer."""
    value_learning_rate: NonNegative | None = None
    """Peak learning rate of the weights that only the value function has; null: that of
    rl.optimizer.
    """
    value_warmup: CountOrZero = 0
    """Iterations at the start in which only the value function learns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_from != "policy" and self.value != "separate":
            raise ValueError(
                f"value_from {self.value_from}: a shared value function has the policy's body; "
                "give value: separate too"
            )


@dataclass(frozen=True)
class DistillStage(distill.Config):
    """Distillation on the policy's own samples, and the teacher of its runs."""

    teacher: str | None = None
    """The model to learn from, of the policy's vocabulary: a Hugging Face folder (or name), a run's
    folder, or with divergence: sampled a server, openai:http://HOST:PORT, asked as `engine` says
    and with the key TEACHER_API_KEY of the environment."""
    teacher_model: str | None = None
    """The name of the model on the teacher's server; null: the only one that it lists."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_server is None:
            if self.teacher_model is not None:
                raise ValueError("teacher_model: only a server has several; leave it out")
            return
        check_url("teacher", self.teacher_server)
        if self.divergence != "sampled":
            raise ValueError(
                f"teacher {self.teacher}: a server gives the probabilities of the sampled tokens "
                f"alone, and {self.divergence} needs those of the whole vocabulary; use "
                "divergence: sampled"
            )

    @property
    def teacher_server(self) -> str | None:
        """The URL of the teacher's server; None: the teacher is a folder."""
        kind, _, url = (self.teacher or "").partition(":")
        return url if kind == "openai" else None


@dataclass(frozen=True)
class EngineServer(Requests):
    """How the server of `rl.engine` is asked, and that of a teacher; the engine's key is the
    variable ENGINE_API_KEY of the environment.
    """

    concurrency: int = 64
    """Requests that are sent at once; one holds all responses to a prompt."""
    timeout: float = 600.0
    """Seconds from the connection to the last byte after which a request counts as failed."""
    model: str | None = None
    """The name of the model there; null: the first that it lists."""
    weights: str | None = None
    """Folder for the weights that the server loads, which it sees at the same place; null: a hidden
    one in the run's folder."""

    section = "engine"
    most_bytes = 1 << 28


@dataclass(frozen=True)
class Safety(Section):
    """What counts as unsafe in RL's prompts and responses, by default nothing, and what is done
    about it.
    """

    words: Texts = ()
    """Files of words and phrases, one a line, found as whole words whatever their case."""
    patterns: Texts = ()
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
    """What happens to a prompt in which words or patterns are found: it is left out, replaced, or
    only counted.
    """
    replacement: str | None = None
    """With prompts: replace, the text that replaces an unsafe prompt."""
    responses: Literal["penalise", "replace", "mask", "count"] = "penalise"
    """What happens to an unsafe response: `penalty` is subtracted from its score, `score` replaces
    its score, it is left out of every statistic and loss, or it is only counted."""
    penalty: NonNegative = 1.0
    """With responses: penalise, what is subtracted."""
    score: float | None = None
    """With responses: replace, the score that replaces the response's own."""

    @property
    def on(self) -> bool:
        """Whether anything can count as unsafe."""
        return bool(self.words or self.patterns or self.classifier)

    def __post_init__(self) -> None:
        super().__post_init__()
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
class RunConfig(Section):
    """One run. Scripts read the sections that concern them."""

    data: Texts = ()
    """Data files of the stage, a folder with sft_data.json, preference_data.json and prompts.json,
    or `demo`."""
    columns: Texts = ()
    """Keys of the data under other names, each OURS=THEIRS: prompt=question response=answer."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that the stage cannot use, such as one with an empty answer: error names all of them
    and stops; drop leaves them out and counts them."""
    model: str | None = None
    """A Hugging Face folder (or name), or a run's folder, to start from; null: random weights of
    `network`.
    """
    reward: Texts = ()
    """Reward models' folders (or Hugging Face names), or those of their runs, several as mean:A,B,
    min:A,B or uncertainty:A,B, FILE.py:FUNCTION, count:TEXT, length, repetition, diversity,
    regex:PATTERN, math, gym:TASK, http://HOST/PATH, judge:RUBRIC.yaml; SPEC*WEIGHT weighs one
    of a sum, and `else NUMBER` behind it is its score where it has none."""
    output_dir: str | None = None
    """The run's folder; null: runs/STAGE."""
    seed: CountOrZero = 0
    """Root of every random number."""
    device: Literal["cpu", "gpu", "cuda", "tpu", "mps"] | None = None
    """Where to run; null: JAX's choice. mps is refused with a message about Apple's GPUs."""
    deterministic: bool = False
    """On a GPU, the same bits from run to run: sums in a fixed order, programs that are not chosen
    by timing, matrix products in full float32. Slower; has no effect on a CPU.
    """
    processes: str | None = None
    """HOST:PORT,COUNT,NUMBER of this process where several share the run: where the first one
    listens, how many there are and which one this is, from 0; auto: as SLURM, a TPU pod, Open MPI
    or Kubernetes says."""
    resume: bool = False
    """Continue the run in output_dir, bit for bit."""
    overwrite: bool = False
    """Replace the run in output_dir."""
    allow_changed: Texts = ()
    """With --resume: settings that may differ from the run's, such as rl.num_iterations or data
    (its files too).
    """
    checkpoint_interval: Count = 50
    """Steps (supervised) or iterations (RL) between checkpoints."""
    checkpoint_async: bool = False
    """Go on training while a checkpoint is written; needs memory for a copy of the state on the
    host.
    """
    keep_last: Count = 2
    """Checkpoints kept."""
    keep_best: str | None = None
    """max:METRIC or min:METRIC, a metric of the validations such as max:validation/score: each
    validation is then saved too, the best one is kept, and model/ is made from it."""
    early_stopping_patience: Count | None = None
    """End after so many validations in a row without improvement of keep_best's metric, without it
    of validation/score in RL and validation/loss elsewhere; null: go on to the end."""
    track: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """Services that get metrics, samples and alerts too; WANDB_PROJECT names the project of the
    first two.
    """
    alerts: Texts = ()
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
    judge: Judge = Judge()
    math: verifiable.Settings = verifiable.Settings()
    engine: EngineServer = EngineServer()
    vpg: VPGConfig = VPGConfig()
    ppo: PPOStage = PPOStage()
    rloo: RLOOConfig = RLOOConfig()
    grpo: GRPOConfig = GRPOConfig()
    distill: DistillStage = DistillStage()
    own: dict[str, Any] = field(default_factory=dict, hash=False, metadata={"sections": True})
    """{name: section} of algorithms of the user's own; in YAML each is a section beside these."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alerts.parse(self.alerts)
        if self.keep_best is not None and not re.fullmatch("(max|min):.+", self.keep_best):
            raise ValueError(f"keep_best must be max:METRIC or min:METRIC, got {self.keep_best!r}")
        if self.mesh.sampling and (not self.rl.rollouts_ahead or self.compute.blocks):
            raise ValueError(
                "mesh.sampling: devices that sample alone need rl.rollouts_ahead 1, and no "
                "compute.blocks"
            )
        if self.mesh.sampling and self.rl.engine is not None:
            raise ValueError("mesh.sampling, rl.engine: either samples; give one")
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


_SUPERVISED = ("sft", "reward_model", "dpo", "kto")
RIVALS: dict[str, tuple[str, ...]] = {
    "resume": ("overwrite",),
    "overwrite": ("resume",),
    "model": ("tokenizer.name",),
    "tokenizer.kind": ("tokenizer.name",),
    "tokenizer.vocab_size": ("tokenizer.name",),
    "data": tuple(f"{stage}.data" for stage in (*_SUPERVISED, "rl")),
    "rl.num_iterations": ("rl.num_epochs",),
    "rl.missing_eos_penalty": ("rl.missing_eos_score", "rl.mask_truncated"),
    "rl.missing_eos_score": ("rl.missing_eos_penalty", "rl.mask_truncated"),
    "rl.mask_truncated": ("rl.missing_eos_penalty", "rl.missing_eos_score"),
    **{f"{stage}.num_epochs": (f"{stage}.max_steps",) for stage in _SUPERVISED},
    **{
        f"{stage}.validation_fraction": (f"{stage}.validation_data",)
        for stage in (*_SUPERVISED, "rl")
    },
}
"""{setting: those that say the same thing in another way, and would go before it}. A flag, or a
later file, turns off those of an earlier file."""
