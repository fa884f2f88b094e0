"""A policy with the models that judge it: its responses, their scores, the margins of pairs."""

import dataclasses
import functools
import itertools
import sys
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import models, ops, rewards
from rlhf_jax.config import Compute, RLStage, recorded
from rlhf_jax.data import batches, chat, encoding, rows
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.errors import TrainingFault, UserError, logger
from rlhf_jax.evaluation import measures
from rlhf_jax.evaluation.settings import Config
from rlhf_jax.generation import generator
from rlhf_jax.generation.environment import Environment, function_of, load_environment
from rlhf_jax.graders import spec
from rlhf_jax.graders.service import Judge, Services
from rlhf_jax.models import hf
from rlhf_jax.training.common import initial, reward_models
from rlhf_jax.training.common.opening import stream_key
from rlhf_jax.training.supervised import scoring
from rlhf_jax.types import Comparisons, Params, Rollout

BUCKET = 64  # tokens: texts to score are padded to a multiple, so that few shapes are compiled


class Policy(NamedTuple):
    """A policy and the settings that it was trained with; or a reward model (the first one of an
    ensemble), which writes no text.
    """

    folder: str
    model: models.Model
    params: Params
    tokenizer: Tokenizer
    template: str
    max_new_tokens: int
    is_judge: bool  # whether it is a reward model
    stop: tuple[str, ...] = ()  # the run's rl.stop


class Bench(NamedTuple):
    """A policy and what it is judged with."""

    policy: Policy
    config: Config
    key: Array
    reward: spec.Reward | None
    positions: int  # the context length that the policy and the reward model both have
    environment: Environment | None


def load(folder: str, config: Config) -> Policy:
    """The policy in a run's or model's folder, or of a Hugging Face name."""
    trained = recorded(folder)
    source = hf.model_folder(folder)
    member = str(next(iter(spec.members(source)), source))
    compute = Compute(dtype=trained.get("compute.dtype", "float32"))
    loaded = initial.load_language_model(member, compute)
    spelling = trained.get("text.special_tokens")
    model, params, tokenizer = loaded.reading(config.template_options, spelling)
    template = config.template or trained.get("text.template", chat.AUTO)
    slots = trained.get("rl.max_new_tokens", generator.default_slots(model.config.max_length))
    slots = config.max_new_tokens or slots
    stop = tuple(trained.get("rl.stop", ()))
    return Policy(folder, model, params, tokenizer, template, slots, "score" in params, stop)


def open_bench(
    policy: Policy, config: Config, columns: Collection[str] = (), scores: Sequence[str] = ()
) -> Bench:
    """The policy with the reward model of ``config.reward_model``, if it names one, and with the
    environment of ``config.environment``.

    columns: those of all prompts, which a Python function in place of a reward model may read.
    scores: entries that judge the same answers, each for a category.
    """
    positions = min([policy.model.config.max_length, *map(judge_positions, scores)])
    reward = None
    judge = policy.folder if policy.is_judge else config.reward_model
    if judge is not None:
        entry = hf.model_folder(judge)
        if policy.is_judge and spec.members(entry):
            entry = f"mean:{entry}"
        check_template(policy, judge, config)
        limit = judge_positions(entry)
        if limit < positions:
            positions = limit
            logger.info(
                f"{judge}: reads {positions} tokens, fewer than the policy; prompt and response "
                "have to fit"
            )
        reward = reward_of(entry, policy, columns, "--reward-model", config, positions)
    trained = recorded(policy.folder)
    turns = config.max_turns
    if config.environment and turns is None:
        turns = trained.get("rl.max_turns")
    if trained.get("rl.environment") and not config.environment:
        logger.info(
            f"{policy.folder} was trained with replies by {trained['rl.environment']}; this "
            "evaluation has no --environment"
        )
    fn = function_of(config.environment, "--environment")
    environment = load_environment(fn, policy.tokenizer, policy.max_new_tokens, turns)
    key = stream_key(config.seed, "evaluate", "eval")
    return Bench(policy, config, key, reward, positions, environment)


def judge_positions(entry: str) -> int:
    """The context length that all reward models of a --reward entry have; no limit without any."""
    positions = [sys.maxsize]
    for source in spec.sources(entry).values():
        for folder in spec.members(source) or [source]:
            if (folder / "config.json").is_file():
                config = hf.read_config(folder)
                reads = generator.closing(config, load_tokenizer(folder), in_chat=True)
                positions.append(config.max_length - len(reads))
    return min(positions)


def check_template(policy: Policy, folder: str, config: Config) -> None:
    """Refuses a run in ``folder`` that had another template, unless ``config`` chooses one."""
    given = recorded(folder).get("text.template")
    if given is None or config.template is not None:
        return
    model = hf.model_folder(folder)
    tokenizer = load_tokenizer(next(iter(spec.members(model)), model))
    if tokenizer.fingerprint != policy.tokenizer.fingerprint:
        return  # it reads texts, by its own template
    other = chat.in_force(given, tokenizer)
    own = chat.in_force(policy.template, policy.tokenizer)
    if other != own:
        raise UserError(
            f"{folder} was trained with the template {other!r:.80}, {policy.folder} with "
            f"{own!r:.80}; give the one to use for both as --template"
        )


def reward_of(
    entry: str, policy: Policy, columns: Collection[str], flag: str, config: Config, length: int
) -> spec.Reward:
    """The reward of one entry for texts of at most ``length`` tokens, see ``spec.build_reward``;
    errors name the setting ``flag``.
    """
    judge = Judge(url=config.judge_url, model=config.judge_model)
    return spec.build_reward(
        (entry,),
        tokenizer=policy.tokenizer,
        load=reward_models.for_texts_of(policy.tokenizer, policy.template, length),
        columns=columns,
        flag=flag,
        services=Services(judge, Path(config.output or policy.folder) / "judge"),
    )


_apply = jax.jit(lambda fn, rollout: fn(rollout)[0])


def score(
    reward: spec.Reward, rollout: Rollout, columns: Mapping[str, Sequence[Any]], batch_size: int
) -> np.ndarray:
    """[N] float64 scores of N responses, NaN where a function gave None. A Python function is
    called once, with all rows.

    Raises:
        TrainingFault: a function gave a number that is not finite.
    """
    if reward.host is None:
        score_batch = lambda rows: jax.device_get(_apply(reward.fn, rows))  # noqa: E731
        scores = generator.in_batches(score_batch, batch_size, rollout).astype(np.float64)
        return scores.sum(axis=1) if scores.ndim == 2 else scores  # of steps
    try:
        scored, _ = rewards.on_host(reward.host, rollout, columns)
    except FloatingPointError as error:
        raise TrainingFault(str(error)) from error
    is_scored = np.any(scored.response_mask, axis=1)
    scores = np.asarray(scored.scores, np.float64)
    if scores.ndim == 2:
        scores = scores.sum(axis=1)
    return np.where(is_scored, scores, np.nan)


class Answers(NamedTuple):
    """A policy's responses to N prompts, S to each."""

    rows: list[rows.Row]  # [N]
    counts: dict[str, int]  # prompts that were too long, by what was done to them
    columns: dict[str, list[Any]]  # of the N * S rows of the rollout
    rollout: Rollout
    responses: measures.Responses
    talks: dict[str, np.ndarray]  # of each of the N * S conversations, as ``converse`` gives them


def sample(bench: Bench, policy: Policy, name: str, prompts: Sequence[rows.Row]) -> Answers:
    """Responses to a set of prompts. The set's name determines the key, so that both runs of a win
    rate have the same one.
    """
    config = bench.config
    tokenizer = policy.tokenizer
    encoded = encoding.encode_prompts(
        prompts,
        tokenizer,
        template=policy.template,
        too_long=config.too_long,
        # With the response it fits into the reward model too.
        max_positions=min(bench.positions, policy.model.config.max_length),
        max_new_tokens=policy.max_new_tokens,
    )
    settings = initial.sampling_config(RLStage(max_new_tokens=policy.max_new_tokens), tokenizer)
    settings = dataclasses.replace(settings, temperature=config.temperature)  # which may be 0
    shape = (len(encoded), config.num_samples)
    numbers = np.repeat(np.arange(shape[0]), shape[1])
    key = jax.random.fold_in(bench.key, zlib.crc32(name.encode()))
    model = generator.LanguageModel(policy.model, policy.params, tokenizer)
    rollout, talks = model.respond(
        encoded,
        key,
        config=settings,
        numbers=numbers,
        batch_size=config.batch_size,
        stop=policy.stop,
        environment=bench.environment,
    )
    columns = batches.columns_at(encoded, numbers)
    scores = None
    if bench.reward is not None:
        scores = score(bench.reward, rollout, columns, config.batch_size).reshape(shape)
    texts = np.array(generator.responses(rollout, tokenizer), dtype=object)
    responses = measures.Responses(
        prompts=[chat.shown(row, tokenizer) for row in encoded.rows],
        texts=texts.reshape(shape).tolist(),
        lengths=np.count_nonzero(rollout.response_mask, axis=1).reshape(shape),
        ended=generator.ended(rollout, settings.eos_ids).reshape(shape),
        scores=scores,
    )
    return Answers(encoded.rows, encoded.counts, columns, rollout, responses, talks)


def margins(bench: Bench, encoded: encoding.EncodedTexts) -> measures.Margins:
    """``{judge: [N]}`` score of answer 0 minus that of answer 1, by each judge there is, lengths
    among them.
    """
    policy_fn = models.policy_fn(bench.policy.model)
    log_probs = jax.jit(functools.partial(ops.response_log_probs, policy_fn))
    judges: dict[str, Callable[[Comparisons], Any]] = {}
    if bench.reward is not None:
        judges["reward_model"] = functools.partial(_score_answers, bench.reward)
    if not bench.policy.is_judge:
        judges["log_prob"] = functools.partial(log_probs, bench.policy.params)
    single, rows, places = _distinct_texts(encoded)
    scores = {}
    for name, judge in judges.items():
        by_row = scoring.score_rows(
            judge, single, rows, batch_size=bench.config.batch_size, bucket_multiple=BUCKET
        )
        scores[name] = by_row[places, 0]
    lengths = encoded.response_lengths
    if "log_prob" in scores:
        scores["mean_log_prob"] = scores["log_prob"] / lengths
    scores["longer"] = lengths
    return {name: values[:, 0] - values[:, 1] for name, values in scores.items()}


def _distinct_texts(
    encoded: encoding.EncodedTexts,
) -> tuple[encoding.EncodedTexts, np.ndarray, np.ndarray]:
    """The texts of N pairs as rows of one answer each, so that each is scored once although the
    pairs of a ranking share theirs.

    Returns:
        The 2 N texts, the rows of the M different ones, the shortest first, so that a batch is
        padded little; and [N, 2] the place of each text among these M.
    """
    texts = list(itertools.chain(*encoded.tokens))  # [2 N]
    starts = encoded.starts.T.reshape(-1, 1)
    weight = np.ones(1, np.float32)
    num_rows = len(encoded)
    learned = {(0, k * num_rows + row): mask for (k, row), mask in encoded.learned.items()}
    single = dataclasses.replace(
        encoded, tokens=[texts], starts=starts, weight=weight, learned=learned
    )
    keys = [
        (start, learned.get((0, row), starts[:0]).tobytes(), text.tobytes())
        for row, (start, text) in enumerate(zip(starts[:, 0].tolist(), texts, strict=True))
    ]
    row_of = {key: row for row, key in enumerate(keys)}
    distinct = sorted(row_of, key=lambda key: len(key[2]))
    place_of = {key: place for place, key in enumerate(distinct)}
    rows = np.array([row_of[key] for key in distinct])
    places = np.array([place_of[key] for key in keys])
    return single, rows, places.reshape(2, -1).T


def _score_answers(reward: spec.Reward, batch: Comparisons) -> np.ndarray:
    """[B, 1] float64 the reward of each text [B, 1, T], without columns."""
    tokens = batch.tokens[:, 0]
    no_log_probs = jnp.zeros(tokens.shape)
    rollout = Rollout(tokens, batch.attention_mask[:, 0], batch.response_mask[:, 0], no_log_probs)
    return score(reward, rollout, {}, len(tokens))[:, None]


def against(bench: Bench, folder: str, prompts: Sequence[rows.Row]) -> Answers:
    """The responses of the run of ``--against`` to the same prompts."""
    policy = bench.policy
    other = load(folder, bench.config)
    if other.is_judge:
        raise UserError(f"--against {folder}: this is a reward model, which writes no text")
    check_template(policy, folder, bench.config)
    if other.tokenizer.fingerprint != policy.tokenizer.fingerprint:
        raise UserError(
            f"--against {folder}: its tokenizer is another one, which the reward model cannot read"
        )
    other = other._replace(max_new_tokens=policy.max_new_tokens)
    return sample(bench, other, "prompts", prompts)


def encode_pairs(bench: Bench, pairs: Sequence[rows.Row]) -> encoding.EncodedTexts:
    """The pairs as the policy and the reward model read them."""
    policy = bench.policy
    return encoding.encode_texts(
        pairs,
        policy.tokenizer,
        template=policy.template,
        max_length=bench.positions,
        too_long=bench.config.too_long,
    )
