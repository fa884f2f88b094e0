"""Samples of an engine (``rl.engine``) as rollouts: what is asked, what is checked, what is kept.

Samples lie in ``engine/`` of the run's folder, in a file for each policy that sampled. Its name is
the policy's number of optimizer steps and a checksum of its weights. A run that goes on from a
checkpoint, or is repeated, reads them there and asks only for what is missing.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import models, ops
from rlhf_jax.config import RLStage
from rlhf_jax.engines import Engine, Request, Sample, Writer, decoded, encoded, question
from rlhf_jax.errors import ServiceError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders.client import ask_each
from rlhf_jax.graders.replies import Replies
from rlhf_jax.iteration import LoopState, Prompts
from rlhf_jax.runs import processes
from rlhf_jax.sampling import SamplingConfig, rollout
from rlhf_jax.training.common.initial import Trainable, sampling_config, validation_config
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.rl.sample import Kind, Respond
from rlhf_jax.types import Metrics, Params, Rollout

MOST_APART = 0.2
"""Nats by which the log-probabilities of engine and policy may differ in the mean over a rollout's
tokens. Rounding in bfloat16 makes a difference of about 0.02."""
ALWAYS_ALLOWED = 0.02
"""A difference up to this is allowed, whatever it was in the first rollout."""
MOST_GROWTH = 10.0
"""A larger difference may be this many times that of the first rollout: rounding errors stay the
same, but weights that the engine did not load differ more from the policy's with each step."""
MOST_TIES = 64
"""Ids beyond top_k in a support: vLLM may keep all that tie with the last one."""
NO_MASK = (
    "no sampling_mask, which top_k, top_p and min_p need: leave them out, or train full weights "
    "(no --lora.rank) and start vLLM 0.28 or later with vllm serve --return-sampling-mask "
    "--logprobs-mode processed_logprobs"
)


@dataclass(eq=False)
class Client:
    """What a run asks of its engine; the first process asks, and all get the samples."""

    engine: Engine
    run: OpenRun
    settings: RLStage
    policy: LanguageModel  # the policy before training
    start: Trainable  # and its parts

    _kept: Replies = field(default_factory=lambda: Replies(None))
    _version: str = ""  # of the samples in _kept
    _loaded: str = ""  # the version that the engine has
    _name: str = ""  # and how the engine names it
    _first_gap: float | None = None  # the mean over the first rollout

    def responder(self, state: LoopState, kind: Kind) -> Respond:
        """Responses of the engine by the policy of a state."""
        how = sampling_config(self.settings, self.policy.tokenizer)
        if kind == "respond_to_each":
            how = validation_config(self.settings, self.policy.tokenizer)
        elif kind == "respond_greedily":
            how = replace(how, temperature=0.0)
        policy = models.policy_params(state.train.params)
        version = f"{int(state.train.step)}-{int(_checksum(policy)):08x}"

        def respond(prompts: Prompts, key: Array) -> Rollout:
            groups, requests = _requests(prompts, version, how, key)
            samples = self._ask(policy, requests)
            num_rows, width = prompts.tokens.shape
            made = _as_rollout(self.policy, requests, samples, width, how.max_new_tokens)
            spread = functools.partial(_spread, np.concatenate(groups), num_rows)
            return replace(jax.tree.map(spread, made), row_ids=np.asarray(prompts.row_ids))

        return respond

    def compare(self, state: LoopState, sampled: Rollout, rescored: Rollout) -> Metrics:
        """The mean difference of the log-probs of engine and policy.

        Raises:
            ServiceError: they are further apart than rounding explains, where the engine should
                have the policy's weights.
        """
        gaps = jnp.abs(sampled.log_probs - rescored.log_probs)
        gap = ops.masked_mean(gaps, sampled.response_mask)
        # Later, an update lies between the policy and the one that sampled ahead.
        is_current = self.engine.follows and state.behind is None
        has_weights = is_current or int(state.train.step) == 0
        if self.settings.engine_check and has_weights:
            found = float(gap)
            if self._first_gap is None:
                self._first_gap = found
            limit = min(MOST_APART, max(ALWAYS_ALLOWED, MOST_GROWTH * self._first_gap))
            if not found <= limit:
                raise ServiceError(
                    f"{self.engine.place}: its log-probabilities differ from the policy's by "
                    f"{found:.3g} nats in the mean, after {self._first_gap:.3g} in the first "
                    "rollout: it samples with other weights or did not load all, or gives "
                    "log-probabilities of another temperature (vllm serve --logprobs-mode "
                    "processed_logprobs); --rl.no-engine-check trains on its samples anyway"
                )
        return {"policy/sampler_gap_mean": gap}

    def _ask(self, policy: Params, requests: Sequence[Request]) -> list[list[Sample]]:
        """The samples of each request, kept ones or new ones. Every process calls it."""
        version = requests[0].version
        write = None
        is_missing = processes.in_first(lambda: self._lacks_samples(requests))
        if is_missing and self._loaded != version:
            write = self._writer(policy)
            self._loaded = version
        texts = processes.in_first(lambda: self._answers(requests, write))
        return [decoded(text, version) for text in texts]

    def _lacks_samples(self, requests: Sequence[Request]) -> bool:
        """Whether the engine must be asked. Reads the samples that were kept of this version, and
        deletes those of other weights after as many steps, from before the settings changed.
        """
        version = requests[0].version
        if version != self._version:
            steps, _, _ = version.partition("-")
            for file in self.run.folder.engine.glob(f"{steps}-*.jsonl"):
                if not file.name.startswith(f"{version}_"):
                    file.unlink()
            self._kept = Replies(self.run.folder.engine, version)
            self._version = version
        return any(question(request) not in self._kept for request in requests)

    def _answers(self, requests: Sequence[Request], write: Writer | None) -> list[str]:
        """The samples as JSON. The engine first loads the weights that ``write`` writes."""
        if write is not None:
            self._name = self.engine.load(requests[0].version, write)
        missing = [request for request in requests if question(request) not in self._kept]
        ask_each(self._sample, missing, self.run.config.engine)
        return [self._kept[question(request)] for request in requests]

    def _writer(self, policy: Params) -> Writer:
        """What writes the weights for the engine; every process calls it."""
        trained = {name: part for name, part in policy.items() if name != "value"}
        base = self.start.base
        if base is not None:
            base, adapters = processes.fetch((base, trained))
            name = self.run.config.model
            return lambda folder: models.lora.save(folder, base, adapters, base_model=name)
        params = processes.fetch(trained) if self.engine.follows else trained
        model = self.policy.model
        # A server may hold a packed copy of the output table, and packs it again only when it
        # reads a tensor of that name (vLLM on a CPU).
        return lambda folder: models.save(folder, model, params, both_tables=True)

    def _sample(self, request: Request) -> None:
        """Asks for samples, checks and keeps them."""
        samples = self.engine.sample(request)
        try:
            if len(samples) != request.number:
                raise ValueError(
                    f"{len(samples)} responses to a prompt, {request.number} were asked for"
                )
            _as_rollout(self.policy, [request], [samples], None, request.max_tokens)
            for sample in samples:
                self._check(request, sample)
        except ValueError as error:
            raise ServiceError(
                f"{self.engine.place}: {error}; nothing was learned from it"
            ) from error
        self._kept.add(question(request), encoded(samples))

    def _check(self, request: Request, sample: Sample) -> None:
        """Raises ValueError unless the weights and the end of the sample are what was asked for."""
        if sample.version != self._name:
            raise ValueError(
                f"a sample of the weights {sample.version!r} in place of {self._name!r}: give each "
                "run a server of its own"
            )
        last = sample.tokens[-1]
        ends = last in request.how.eos_ids
        if sample.finished and not ends:
            raise ValueError(f"a response ended with the token {last}, which is no end token")
        if not ends and len(sample.tokens) < request.max_tokens:
            raise ValueError(
                f"a response was cut at {len(sample.tokens)} of {request.max_tokens} tokens: the "
                "server reads shorter texts; start it with more (vllm serve --max-model-len)"
            )


def _spread(rows: np.ndarray, num_rows: int, part: Any) -> np.ndarray:
    """Puts [N, ...] of the given rows into [B, ...]; missing rows are empty."""
    fill = -1 if part.ndim == 3 else 0  # no id in the support
    whole = np.full((num_rows, *part.shape[1:]), fill, part.dtype)
    whole[rows] = part
    return whole


def _as_rollout(
    policy: LanguageModel,
    requests: Sequence[Request],
    samples: Sequence[Sequence[Sample]],
    prompt_length: int | None = None,
    response_length: int | None = None,
) -> Rollout:
    """Raises ValueError for samples that cannot be read."""
    prompts = []
    for request in requests:
        prompts += [request.prompt] * request.number
    responses = list(itertools.chain(*samples))
    how = requests[0].how
    made = rollout.from_text(
        prompts,
        [sample.tokens for sample in responses],
        policy.tokenizer,
        log_probs=[sample.log_probs for sample in responses],
        prompt_length=prompt_length,
        response_length=response_length,
        temperature=how.temperature,
    )
    if not how.truncates:
        return made
    support = np.full((*made.tokens.shape, (how.top_k or 0) + MOST_TIES), -1, np.int32)
    for row, sample in zip(support[:, made.prompt_length :], responses, strict=True):
        if sample.support is None:
            raise ValueError(NO_MASK)
        slots = row[: len(sample.tokens)]
        for slot, token, ids in zip(slots, sample.tokens, sample.support, strict=True):
            if token not in ids or max(ids) >= policy.tokenizer.vocab_size or len(ids) > len(slot):
                raise ValueError(
                    f"the sampling mask of a token {token} lacks it, has ids outside the "
                    f"vocabulary or more than {len(slot)}: {len(ids)} ids, {ids[:9]} ..."
                )
            slot[: len(ids)] = ids
    return replace(made, support=jnp.asarray(support), truncated=True)


@jax.jit
def _checksum(params: Params) -> Array:
    """[] uint32. A sum of integers, so that it is the same on any number of devices."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(params):
        words = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        total = total * jnp.uint32(31) + jnp.sum(words * (words | 1))
    return total


@jax.jit
def _seeds(key: Array, places: Any, used: Any) -> Array:
    """[B] seeds of 31 bits, by the rows' places and the slots that earlier turns took."""

    def seed(place: Array, used: Array) -> Array:
        of_row = jax.random.fold_in(jax.random.fold_in(key, place), used)
        return jax.random.bits(of_row) >> 1

    return jax.vmap(seed)(places, used)


@jax.jit
def _row_keys(key: Array, places: Any) -> Array:
    """[B, words] the key data of the rows, as `sampling.generate` makes them."""
    return jax.random.key_data(jax.vmap(functools.partial(jax.random.fold_in, key))(places))


def _requests(
    prompts: Prompts, version: str, how: SamplingConfig, key: Array
) -> tuple[list[list[int]], list[Request]]:
    """Groups of adjacent equal prompts and a request for each; empty prompts are in none."""
    used = np.zeros(len(prompts.tokens), np.int32) if prompts.used is None else prompts.used
    slots = np.asarray(used).tolist()
    row_keys = np.asarray(_row_keys(key, prompts.places)).tolist()
    seeds = np.asarray(_seeds(key, prompts.places, used)).tolist()
    is_real = np.asarray(prompts.attention_mask) != 0
    present = np.flatnonzero(is_real.any(axis=1)).tolist()

    def asked(row: int) -> tuple[list[int], int]:
        return prompts.tokens[row][is_real[row]].tolist(), slots[row]

    groups = []
    requests = []
    for (ids, taken), group in itertools.groupby(present, asked):
        rows = list(group)
        room = how.max_new_tokens - taken
        keys = [row_keys[row] for row in rows]
        requests.append(Request(version, ids, len(rows), room, seeds[rows[0]], how, keys, taken))
        groups.append(rows)
    return groups, requests
