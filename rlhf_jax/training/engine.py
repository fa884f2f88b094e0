"""Samples of an engine (``rl.engine``) as rollouts: what is asked, what is checked, what is kept.

Samples lie in ``engine/`` of the run's folder, in a file for each policy that sampled. Its name is
the policy's number of optimizer steps and a checksum of its weights. A run that goes on from a
checkpoint, or is repeated, reads them there and asks only for what is missing.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models, ops, rollout
from rlhf_jax.config import RunConfig
from rlhf_jax.engines import Engine, Request, Sample, Weights, decoded, encoded, question
from rlhf_jax.errors import ServiceError
from rlhf_jax.generator import LanguageModel
from rlhf_jax.rewards.service import Replies, ask_each
from rlhf_jax.runs import processes
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training.initial import Trainable
from rlhf_jax.training.phases import LoopState, Prompts
from rlhf_jax.training.steps import Rescorer, Respond, Responder
from rlhf_jax.types import Metrics, Params, Rollout

MOST_APART = 0.2
"""Nats by which the log-probabilities of engine and policy may differ in the mean over a rollout's
tokens. Rounding in bfloat16 parts them by about 0.02."""
ALWAYS_ALLOWED = 0.02
"""Such a difference may grow in a run from any smaller one."""
MOST_GROWTH = 10.0
"""A larger difference may be so many times that of the first rollout: rounding stays as it is, and
weights that the engine did not load are further from the policy's in each step."""


class Client:
    """What a run asks of its engine; the first process asks, and all get the samples.

    Args:
        folder: where samples are kept.
        begun, start: the policy before training, and its parts.
    """

    def __init__(
        self,
        engine: Engine,
        config: RunConfig,
        folder: Path,
        begun: LanguageModel,
        start: Trainable,
    ):
        self._engine = engine
        self._config = config
        self._folder = folder
        self._begun = begun
        self._start = start
        self._version = ""  # of the samples in _kept
        self._kept = Replies(None)
        self._loaded = ""  # the version that the engine has
        self._name = ""  # and how the engine names it
        self._first_gap: float | None = None  # the mean over the first rollout

    def responder(self, how: SamplingConfig) -> Responder:
        """The engine's responses, in place of ``steps.on_devices``."""

        def at(state: LoopState) -> Respond:
            policy = models.policy_params(state.train.params)
            version = f"{int(state.train.step)}-{int(_checksum(policy)):08x}"

            def respond(prompts: Prompts, key: jax.Array) -> Rollout:
                groups = _groups(prompts)
                seeds = np.asarray(_seeds(key, prompts.places, _used(prompts)))
                requests = []
                for rows in groups:
                    first = rows[0]
                    ids = prompts.tokens[first][prompts.attention_mask[first] != 0]
                    room = how.max_new_tokens - int(_used(prompts)[first])
                    request = Request(
                        version, ids.tolist(), len(rows), room, int(seeds[first]), how
                    )
                    requests.append(request)
                samples = self._ask(policy, requests)
                return self._rollout(prompts, how, groups, requests, samples)

            return respond

        return at

    def watched(self, rescore: Rescorer) -> Rescorer:
        """The rescorer, which also compares the log-probs of engine and policy.

        Raises:
            ServiceError: they are further apart than rounding explains, where the engine should
                have the policy's weights.
        """
        compares = not self._config.rl.allow_truncated_sampling

        def rescore_watched(state: LoopState, sampled: Rollout) -> tuple[Rollout, Metrics]:
            rescored, metrics = rescore(state, sampled)
            gaps = jnp.abs(sampled.log_probs - rescored.log_probs)
            gap = ops.masked_mean(gaps, sampled.response_mask)
            # Later, an update lies between the policy and the one that sampled ahead.
            is_current = self._engine.follows and state.behind is None
            has_weights = is_current or int(state.train.step) == 0
            if compares and has_weights:
                self._check_gap(float(gap))
            return rescored, metrics | {"policy/sampler_gap_mean": gap}

        return rescore_watched

    def _check_gap(self, gap: float) -> None:
        """Raises ServiceError if engine and policy differ by more than rounding explains."""
        if self._first_gap is None:
            self._first_gap = gap
        limit = min(MOST_APART, max(ALWAYS_ALLOWED, MOST_GROWTH * self._first_gap))
        if not gap <= limit:
            raise ServiceError(
                f"{self._engine.place}: its log-probabilities differ from the policy's by "
                f"{gap:.3g} nats in the mean, after {self._first_gap:.3g} in the first rollout: it "
                "samples with other weights or did not load all, or gives log-probabilities of "
                "another temperature (vllm serve --logprobs-mode processed_logprobs)"
            )

    def _ask(self, policy: Params, requests: Sequence[Request]) -> list[list[Sample]]:
        """The samples of each request, those that were kept or new ones."""
        version = requests[0].version
        missing = processes.in_first(lambda: self._missing(requests))
        if missing and self._loaded != version:
            weights = self._weights(policy)
            self._name = processes.in_first(lambda: self._engine.load(version, weights))
            self._loaded = version
        processes.in_first(lambda: self._fetch([requests[i] for i in missing]))
        texts = processes.in_first(lambda: [self._kept[question(request)] for request in requests])
        return [decoded(text, version) for text in texts]

    def _missing(self, requests: Sequence[Request]) -> list[int]:
        """The numbers of the requests whose samples are not kept."""
        version = requests[0].version
        if version != self._version:
            steps, _, _ = version.partition("-")
            for file in self._folder.glob(f"{steps}-*.jsonl"):
                if not file.name.startswith(f"{version}_"):
                    file.unlink()  # of other weights after as many steps, before settings changed
            self._kept = Replies(self._folder, version)
            self._version = version
        return [i for i, request in enumerate(requests) if question(request) not in self._kept]

    def _weights(self, policy: Params) -> Weights:
        """The weights for the engine; every process calls it."""
        trained = {name: part for name, part in policy.items() if name != "value"}
        base = self._start.base
        if base is None:
            params = processes.fetch(trained) if self._engine.follows else trained
            model = self._begun.model
            # A server may hold a packed copy of the output table, and packs it again only when it
            # reads a tensor of that name (vLLM on a CPU).
            return Weights(
                False, lambda folder: models.save(folder, model, params, both_tables=True)
            )
        base, adapters = processes.fetch((base, trained))
        name = self._config.model
        return Weights(
            True, lambda folder: models.lora.save(folder, base, adapters, base_model=name)
        )

    def _fetch(self, requests: Sequence[Request]) -> None:
        """Asks for samples and keeps them, so many requests at once as the settings say."""
        ask_each(self._sample, requests, self._config.engine)

    def _sample(self, request: Request) -> None:
        samples = self._engine.sample(request)
        self._check(request, samples)
        self._kept.add(question(request), encoded(samples))

    def _check(self, request: Request, samples: Sequence[Sample]) -> None:
        """Raises ServiceError unless the samples are what was asked for."""
        fault = ""
        if len(samples) != request.number:
            fault = f"{len(samples)} responses to a prompt, {request.number} were asked for"
        for sample in samples:
            fault = fault or self._fault(request, sample)
        try:
            if not fault:
                _as_rollout(self._begun, [request], [samples])
        except ValueError as error:
            fault = str(error)
        if fault:
            raise ServiceError(f"{self._engine.place}: {fault}; nothing was learned from it")

    def _fault(self, request: Request, sample: Sample) -> str:
        """What is wrong with a sample, "" if nothing."""
        tokens = sample.tokens
        if sample.version != self._name:
            return (
                f"a sample of the weights {sample.version!r} in place of {self._name!r}: give each "
                "run a server of its own"
            )
        if not isinstance(tokens, list) or not tokens:
            return f"a response must be a list of token ids, got {tokens!r:.80}"
        if len(tokens) > request.max_tokens:
            return (
                f"a response of {len(tokens)} tokens, at most {request.max_tokens} were asked for"
            )
        ends = tokens[-1] in request.how.eos_ids
        if sample.finished and not ends:
            return (
                f"a response ended with the token {tokens[-1]!r}, which is no end token of the "
                f"policy ({', '.join(map(str, request.how.eos_ids))})"
            )
        if not ends and len(tokens) < request.max_tokens:
            return (
                f"a response was cut at {len(tokens)} of {request.max_tokens} tokens: the server "
                "reads shorter texts; start it with more (vllm serve --max-model-len)"
            )
        return ""

    def _rollout(
        self,
        prompts: Prompts,
        how: SamplingConfig,
        groups: Sequence[Sequence[int]],
        requests: Sequence[Request],
        samples: Sequence[Sequence[Sample]],
    ) -> Rollout:
        """Rows [B, P + R], NumPy arrays; absent rows are 0."""
        num_rows, width = prompts.tokens.shape
        rows = np.concatenate(groups)
        sizes = {"prompt_length": width, "response_length": how.max_new_tokens}
        made = _as_rollout(self._begun, requests, samples, **sizes)

        def spread(part: Any) -> np.ndarray:
            whole = np.zeros((num_rows, *part.shape[1:]), part.dtype)
            whole[rows] = part
            return whole

        return replace(jax.tree.map(spread, made), row_ids=np.asarray(prompts.row_ids))


def _as_rollout(
    begun: LanguageModel,
    requests: Sequence[Request],
    samples: Sequence[Sequence[Sample]],
    **sizes: Any,
) -> Rollout:
    prompts = []
    for request in requests:
        prompts += [request.prompt] * request.number
    responses = list(itertools.chain(*samples))
    return rollout.from_text(
        prompts,
        [sample.tokens for sample in responses],
        begun.tokenizer,
        log_probs=[sample.log_probs for sample in responses],
        **sizes,
    )


@jax.jit
def _checksum(params: Params) -> jax.Array:
    """[] uint32. A sum of integers, so that it is the same on any number of devices."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(params):
        words = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        total = total * jnp.uint32(31) + jnp.sum(words * (words | 1))
    return total


@jax.jit
def _seeds(key: jax.Array, places: jax.Array, used: jax.Array) -> jax.Array:
    """[B] seeds of 31 bits, by the rows' places and the slots that earlier turns took."""

    def seed(place: jax.Array, used: jax.Array) -> jax.Array:
        of_row = jax.random.fold_in(jax.random.fold_in(key, place), used)
        return jax.random.bits(of_row) >> 1

    return jax.vmap(seed)(places, used)


def _used(prompts: Prompts) -> Any:
    """[B] slots of a row's responses that earlier turns took."""
    return np.zeros(len(prompts.tokens), np.int32) if prompts.used is None else prompts.used


def _groups(prompts: Prompts) -> list[list[int]]:
    """The rows that are present, those of equal prompts that follow one another together."""
    present = np.flatnonzero(np.any(prompts.attention_mask, axis=1)).tolist()
    used = _used(prompts)

    def asked(row: int) -> Any:
        ids = prompts.tokens[row][prompts.attention_mask[row] != 0]
        return ids.tobytes(), int(used[row])

    return [list(rows) for _, rows in itertools.groupby(present, asked)]


def silent(program: Callable[..., Rollout]) -> Callable[..., Rollout]:
    """``program`` as a check of memory calls it: zeros of the shapes that it would return."""

    def zeros(*args: Any) -> Rollout:
        shapes = jax.eval_shape(program, *args)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    return zeros
