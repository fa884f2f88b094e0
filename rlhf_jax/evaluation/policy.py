"""A policy and its judges: models from folders, their responses to prompts, and margins between given answers."""

import dataclasses
import functools
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from rlhf_jax import generator, models, rewards, sampling
from rlhf_jax.algorithms import dpo
from rlhf_jax.config import Compute, RLStage
from rlhf_jax.data import batches, encoding, rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.measures import Responses
from rlhf_jax.models import hf
from rlhf_jax.rewards import spec
from rlhf_jax.training import initial, loop, stage
from rlhf_jax.types import Comparisons, Params, Rollout

BUCKET = 64  # tokens: texts to score are padded to a multiple, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is judged by. What is not given is named as not run."""

    prompts: tuple[str, ...] = ()
    """Held-out prompts, for helpfulness, uncertainty, diversity and the win rate."""
    safety: tuple[str, ...] = ()
    """Prompts with a key `label`, safe or unsafe, such as XSTest's CSV: which are refused?"""
    preferences: tuple[str, ...] = ()
    """Preference data of any format: do the reward model and the policy's log-probabilities agree with it?"""
    annotated: str | None = None
    """Pairs of responses with several annotators' votes, as in PandaLM's test set."""
    reward_model: str | None = None
    """A reward model's run or model folder, or another SPEC of --reward such as mean:A,B."""
    against: str | None = None
    """Another run or model folder, for the win rate under the reward model."""
    categories: str | None = None
    """YAML file of categories of your own."""
    template: str | None = None
    """What the models read for a prompt; null: the run's text.template ({prompt} for a model's folder)."""
    max_new_tokens: int | None = None
    """Response slots; null: the run's rl.max_new_tokens (32 for a model's folder)."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the most likely token."""
    num_samples: int = 1
    """Responses to each prompt; with two or more, diversity within a prompt too."""
    batch_size: int = 64
    """Texts at once. Another one may round differently."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with a text that does not fit into the model. Truncated and dropped rows are counted and reported."""
    seed: int = 0
    """Root of the samples and of the intervals' draws."""
    device: Literal["cpu", "gpu", "cuda", "tpu"] | None = None
    """Where to run; null: JAX's choice."""
    output: str | None = None
    """Folder for evaluation.json; null: the run's."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not self.temperature >= 0:
            raise UserError(f"--temperature must be at least 0, got {self.temperature}")
        if self.template is not None and "{prompt}" not in self.template:
            raise UserError(f"--template must contain {{prompt}}, got {self.template!r}")
        if self.against is not None and (self.reward_model is None or not self.prompts):
            raise UserError("--against: a win rate needs --reward-model, which judges, and --prompts")


class Policy(NamedTuple):
    """A policy and what it was trained with."""

    folder: str
    model: models.Model
    params: Params
    tokenizer: Tokenizer
    template: str
    max_new_tokens: int


class Bench(NamedTuple):
    """A policy and what it is judged with."""

    policy: Policy
    config: Config
    key: jax.Array
    reward: spec.Reward | None
    positions: int  # that the policy and the reward model both have


def load(folder: str, config: Config) -> Policy:
    """The policy in a run's or model's folder, or of a Hugging Face name."""
    settings = _settings(folder)
    dtype = settings.get("compute", {}).get("dtype", "float32")
    dtype = "bfloat16" if dtype == "float16" else dtype
    model, params, tokenizer = generator.load(model_folder(folder), compute_dtype=dtype)
    if "score" in params:
        raise UserError(f"{folder}: this is a reward model, which says nothing; give it as --reward-model")
    template = config.template or settings.get("text", {}).get("template", "{prompt}")
    slots = config.max_new_tokens or settings.get("rl", {}).get("max_new_tokens", RLStage().max_new_tokens)
    return Policy(folder, model, params, tokenizer, template, slots)


def model_folder(folder: str) -> str:
    """``model/`` of a run; any other folder or name is itself."""
    inner = Path(folder) / "model"
    return str(inner) if inner.is_dir() else folder


def _settings(folder: str) -> dict[str, Any]:
    """config.yaml of a run, also found from its ``model/``; empty for other models."""
    place = Path(folder)
    file = (place.parent if place.name == "model" and not (place / "config.yaml").is_file() else place) / "config.yaml"
    if not file.is_file():
        return {}
    try:
        settings = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    return settings if isinstance(settings, dict) else {}


def open_bench(policy: Policy, config: Config) -> Bench:
    """The policy with the reward model of ``config.reward_model``, if it names one."""
    positions, reward = policy.model.config.max_length, None
    if config.reward_model is not None:
        entry = model_folder(config.reward_model)
        check_template(policy, config.reward_model, config)
        reward = reward_of(entry, policy.tokenizer, (), "--reward-model")
        for source in spec.sources(entry).values():
            for folder in spec.members(source) or [source]:
                if (folder / "config.json").is_file():
                    positions = min(positions, hf.read_config(folder).max_length)
    return Bench(policy, config, stage.stream(config.seed, "evaluate", "eval"), reward, positions)


def check_template(policy: Policy, folder: str, config: Config) -> None:
    """Refuses a run in ``folder`` that had another template, unless ``config`` chooses one."""
    other = _settings(folder).get("text", {}).get("template", policy.template)
    if config.template is None and other != policy.template:
        raise UserError(
            f"{folder} was trained with the template {other!r}, {policy.folder} with {policy.template!r}; give the one "
            "to use for both as --template"
        )


def reward_of(entry: str, tokenizer: Tokenizer, columns: Collection[str], flag: str) -> spec.Reward:
    """The reward of one entry, as ``spec.build`` reads it; ``flag`` names the setting in errors."""
    load = functools.partial(initial.load_reward_model, compute=Compute())
    return spec.build((entry,), tokenizer=tokenizer, load=load, columns=columns, flag=flag)


def score(reward: spec.Reward, rollout: Rollout, columns: Mapping[str, Sequence[Any]], batch_size: int) -> np.ndarray:
    """[N] float64 of N responses, NaN where a function gave None."""
    if reward.host is not None:
        result = rewards.on_host(reward.host, rollout, columns).rollout
        scored = (result.response_mask != 0).any(axis=1)
        return np.where(scored, np.asarray(result.scores, np.float64), np.nan)
    apply = jax.jit(lambda fn, part: fn(part))
    scores = []
    for numbers in loop.in_order(np.arange(len(rollout.tokens)), batch_size):
        part = jax.tree.map(lambda x, numbers=numbers: x[numbers], rollout)
        row_scores, _ = apply(reward.fn, part)
        scores.append(np.asarray(row_scores, np.float64)[numbers >= 0])
    return np.concatenate(scores)


class Answers(NamedTuple):
    """A policy's responses to N prompts, S to each; ``counts`` says how many prompts were too long and what for."""

    rows: list[rows.Prompt]  # [N]
    columns: dict[str, list[Any]]  # of the N * S rows of the rollout
    rollout: Rollout
    responses: Responses
    counts: dict[str, int]


def sample(bench: Bench, policy: Policy, name: str, prompts: Sequence[rows.Prompt]) -> Answers:
    """Responses to a set of prompts. The key is that of the set's name, so that both runs of a win rate share it."""
    config, tokenizer, slots = bench.config, policy.tokenizer, policy.max_new_tokens
    encoded = _encode_prompts(policy, prompts, config.too_long)
    width = encoded.tokens.shape[1] + slots
    if bench.reward is not None and width > bench.positions:
        raise UserError(
            f"--reward-model {config.reward_model} has {bench.positions} positions, but prompts and responses take "
            f"{width}; give a smaller --max-new-tokens or shorter prompts"
        )
    sampling_config = sampling.SamplingConfig(
        max_new_tokens=slots, temperature=config.temperature, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
    repeats, shape = config.num_samples, (len(encoded), config.num_samples)
    tokens, attention_mask = (np.repeat(array, repeats, axis=0) for array in (encoded.tokens, encoded.attention_mask))
    key = jax.random.fold_in(bench.key, zlib.crc32(name.encode()))
    inputs = (policy.model, policy.params, tokens, attention_mask, key)
    rollout = generator.sample_in_batches(*inputs, config=sampling_config, batch_size=config.batch_size)
    present = np.asarray(rollout.response_mask) != 0
    ended = (present & (np.asarray(rollout.tokens) == tokenizer.eos_id)).any(axis=1)
    responses = Responses(
        prompts=[p.prompt if isinstance(p.prompt, str) else tokenizer.decode(p.prompt) for p in encoded.rows],
        texts=np.array(generator.responses(rollout, tokenizer), dtype=object).reshape(shape).tolist(),
        lengths=present.sum(axis=1).reshape(shape),
        ended=ended.reshape(shape),
        scores=None if bench.reward is None else score(bench.reward, rollout, {}, config.batch_size).reshape(shape),
    )
    columns = {column: [v for v in values for _ in range(repeats)] for column, values in encoded.columns.items()}
    return Answers(encoded.rows, columns, rollout, responses, encoded.counts)


def _encode_prompts(policy: Policy, prompts: Sequence[rows.Prompt], too_long: Any) -> encoding.EncodedPrompts:
    """Left-padded to the longest prompt, with room for the responses after it."""
    room = policy.model.config.max_length - policy.max_new_tokens
    if room < 1:
        raise UserError(f"--max-new-tokens {policy.max_new_tokens} leaves no room for a prompt in {policy.folder}")
    encoded = encoding.encode_prompts(prompts, policy.tokenizer, template=policy.template, too_long=too_long)
    if encoded.tokens.shape[1] <= room:
        return encoded
    return encoding.encode_prompts(prompts, policy.tokenizer, template=policy.template, length=room, too_long=too_long)


def encode_pairs(bench: Bench, pairs: Sequence[rows.Pair]) -> encoding.EncodedComparisons:
    """The pairs as tokens, at most as long as the policy and the reward model can read."""
    policy, most = bench.policy, bench.positions
    too_long = bench.config.too_long
    return encoding.encode_pairs(pairs, policy.tokenizer, template=policy.template, max_length=most, too_long=too_long)


def margins(bench: Bench, encoded: encoding.EncodedComparisons) -> dict[str, np.ndarray]:
    """``{judge: [N]}`` score of answer 0 minus that of answer 1, by each judge there is, lengths among them."""
    policy_fn = models.policy_fn(bench.policy.model)

    @jax.jit
    def log_probs(params: Params, batch: Comparisons) -> jax.Array | None:
        return dpo.with_reference(batch, jax.tree_util.Partial(policy_fn, params)).ref_log_probs

    lengths = np.stack([answer.lengths - np.array(answer.starts) for answer in encoded.answers], axis=1)
    sums, scores = np.zeros(lengths.shape), np.zeros(lengths.shape)
    by_length = np.argsort(encoded.lengths, kind="stable")  # so that a batch is padded little
    for numbers in loop.in_order(by_length, bench.config.batch_size):
        batch = batches.comparison_batch(encoded, numbers, BUCKET)
        present = numbers >= 0
        sums[numbers[present]] = np.asarray(log_probs(bench.policy.params, batch))[present]
        if bench.reward is not None:
            arrays = (batch.tokens, batch.attention_mask, batch.response_mask)
            tokens, mask, response = (x.reshape(-1, x.shape[-1]) for x in arrays)
            rollout = Rollout(tokens, mask, response, log_probs=jnp.zeros(tokens.shape))
            scores[numbers[present]] = score(bench.reward, rollout, {}, len(tokens)).reshape(-1, 2)[present]
    judged = {} if bench.reward is None else {"reward_model": scores}
    judged |= {"log_prob": sums, "mean_log_prob": sums / lengths, "longer": lengths}
    return {name: values[:, 0] - values[:, 1] for name, values in judged.items()}
