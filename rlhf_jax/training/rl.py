"""Reinforcement learning as a run: prompts, a policy and a reward in, a better policy out.

Its phases are pure functions in ``training.phases``.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import generator, models, ops, rewards, sharding
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import ALGORITHMS, RLStage, RunConfig, for_algorithm, section_name
from rlhf_jax.data import batches
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.environment import Environment, Reply, converse, function_of, load_environment
from rlhf_jax.data.rows import Row
from rlhf_jax.data.rows import texts as texts_of
from rlhf_jax.errors import TrainingFault, UserError, logger
from rlhf_jax.generator import LanguageModel
from rlhf_jax.rewards import filter as filters
from rlhf_jax.rewards import spec
from rlhf_jax.runs import devices, processes
from rlhf_jax.training import critic, initial, loop, memory, phases
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.stage import RunResult, Stage, divides, open_stage, set_up
from rlhf_jax.types import Algorithm, AlgorithmConfig, Metrics, Params, PolicyOutput, Rollout


def run(
    config: RunConfig,
    algorithm: Algorithm = ppo,
    algorithm_config: AlgorithmConfig | None = None,
    run_reward: spec.Reward | None = None,
) -> RunResult:
    """Trains the policy in ``config.model`` and saves ``model/`` in the run folder.

    Args:
        algorithm: the module ``vpg``, ``ppo``, ``rloo`` or ``grpo``, or one of your own
            (``types.Algorithm``); the run is named after it.
        algorithm_config: None: the algorithm's section of ``config``, or for one of your own its
            ``Config()``.
        run_reward: takes the place of ``config.reward``: any RewardFn or HostReward.

    Raises:
        UserError: for whatever is wrong with the data, the models' folders, the run folder or the
            settings.
        TrainingFault: a reward or an update that is not finite.
    """
    settings, name = config.rl, section_name(algorithm)
    config, algorithm_config = for_algorithm(config, algorithm, algorithm_config)
    given = {"algorithm": None if name in ALGORITHMS else algorithm, "reward": run_reward}
    if run_reward is not None:
        config = replace(config, reward=())
    config = set_up(config)
    initial.warn_of_rate(config, "rl", settings.optimizer)
    sizes = _sizes(name, settings, algorithm_config, sharding.num_parts(initial.mesh_of(config)))
    kl_coef = algorithm.kl_coef if settings.kl_coef is None else settings.kl_coef
    has_reference = bool(kl_coef or algorithm_config.kl_in_loss or settings.kl_target is not None)
    if settings.reference_refresh is not None and not has_reference:
        raise UserError(
            "rl.reference_refresh: no KL is used here; set rl.kl_coef above 0 or leave it out"
        )
    if settings.reference_refresh is not None and "reference" in config.compute.offload:
        raise UserError(
            "compute.offload: a reference that is refreshed stays on the devices; leave it out"
        )
    environment = function_of(settings.environment, "rl.environment")
    sources = (
        [settings.data, settings.validation_data] if settings.validation_data else [settings.data]
    )
    read = [initial.stage_rows(config, "prompts", names) for names in sources]
    fingerprints = {source: digest for data in read for source, digest in data.fingerprints.items()}
    with open_stage(config, name, fingerprints, sizes, _files(config), given) as stage:
        score_rows = memory.score_rows(config.compute, settings.batch_size, algorithm_config)
        parts = _parts(stage, [data.rows for data in read], run_reward, score_rows, environment)
        trainer = _Trainer(
            stage, parts, algorithm, algorithm_config, kl_coef if has_reference else None
        )
        state, row = loop.train(stage, trainer.first_state(), trainer.job)
        policy = {
            part: leaves
            for part, leaves in models.policy_params(state.train.params).items()
            if part != "value"
        }
        return stage.finish(parts.initial, trainer.start, {"": policy}, row)


class _Parts(NamedTuple):
    """What a run is made of."""

    initial: LanguageModel
    prompts: EncodedPrompts
    to_validate: EncodedPrompts  # the same, unless ``rl.validation_data`` is given
    reward: spec.Reward
    judge: spec.Reward | None
    enforce: Callable[..., Any] | None  # the filter of responses, after a reward on the host
    environment: Environment | None


def _parts(
    stage: Stage,
    rows: Sequence[Sequence[Row]],
    run_reward: spec.Reward | None,
    score_rows: int | None,
    talk: Reply,
) -> _Parts:
    """rows: the prompts to train on, and those to validate on if they have files of their own;
    talk: an environment.
    """
    config, settings, guard = (
        stage.config,
        stage.config.rl,
        filters.Guard.create(stage.config.safety),
    )
    texts = texts_of([row for part in rows for row in part])
    language_model = initial.language_model(config, texts, stage.key("init"))
    tokenizer = language_model.tokenizer
    encoded = [
        initial.prompts_for(config, language_model, guard.prompts(part, tokenizer), note)
        for part, note in zip(rows, ("", " (for validation)"), strict=False)
    ]
    prompts, to_validate = encoded[0], encoded[-1]
    if missing := ", ".join(
        column for column in prompts.columns if column not in to_validate.columns
    ):
        raise UserError(
            f"rl.validation_data: its rows have no {missing}, which training has and a reward may "
            "read"
        )
    length = max(part.tokens.shape[1] for part in encoded) + settings.max_new_tokens
    how: Any = {
        "compute": config.compute,
        "place": initial.placement(config),
        "score_rows": score_rows,
    }
    load = functools.partial(initial.load_reward_model, **how, length=length)
    build = functools.partial(spec.build_reward, tokenizer=tokenizer, load=load)
    judge = (
        build(settings.judge, columns=to_validate.columns, flag="--rl.judge")
        if settings.judge
        else None
    )
    environment = load_environment(talk, tokenizer, settings.max_new_tokens, settings.max_turns)
    if run_reward is None:
        run_reward = build(config.reward, columns=prompts.columns)
    enforce = None
    if config.safety.on:
        run_reward = spec.Reward(host=spec.as_host(run_reward))
        enforce = guard.for_responses(
            tokenizer=tokenizer, load=load, columns=prompts.columns
        ).enforce
    return _Parts(language_model, prompts, to_validate, run_reward, judge, enforce, environment)


def _files(config: RunConfig) -> dict[str, Path]:
    """What rewards, judge, filter and environment read, by the names that a manifest gives them."""
    sources = [spec.sources(entry) for entry in (*config.reward, *config.rl.judge)]
    rewards_read = {f"reward {name}": path for files in sources for name, path in files.items()}
    environment = (
        {"environment": Path(config.rl.environment.rpartition(":")[0])}
        if config.rl.environment
        else {}
    )
    return filters.rule_files(config.safety) | rewards_read | environment


def _sizes(
    name: str, settings: RLStage, config: AlgorithmConfig, num_devices: int
) -> dict[str, int]:
    """The settings that help when memory runs out.

    Raises:
        UserError: the batch does not divide by devices, groups, minibatches and microbatches; there
            are no groups to replace; the policy never learns.
    """
    if settings.dynamic_sampling and config.group_size == 1:
        raise UserError(
            f"rl.dynamic_sampling: {name} samples one answer to a prompt; there are no groups to "
            "replace"
        )
    if (warmup := critic.settings(config).value_warmup) >= settings.length:
        raise UserError(
            f"{name}.value_warmup {warmup}: of {settings.length} iterations none is left for the "
            "policy"
        )
    if settings.num_episodes is not None:
        episodes = (
            f"{settings.length} iterations with {settings.length * settings.batch_size} episodes"
        )
        logger.info(
            f"rl.num_episodes {settings.num_episodes}: {episodes}, whatever rl.num_iterations is"
        )
    minibatches = {f"{name}.num_minibatches": config.num_minibatches}
    divides(
        "rl.batch_size",
        settings.batch_size,
        {"devices": num_devices},
        {f"answers to one prompt ({name}.group_size)": config.group_size},
        minibatches
        | {f"{name}.shuffle_blocks": config.shuffle_blocks if config.num_minibatches > 1 else 1},
        minibatches | {f"{name}.num_microbatches": config.num_microbatches},
    )
    return {
        f"{name}.num_microbatches": config.num_microbatches,
        "rl.batch_size": settings.batch_size,
    }


class _Trainer:
    """The steps and validations of an open run."""

    def __init__(
        self,
        stage: Stage,
        parts: _Parts,
        algorithm: Algorithm,
        algorithm_config: AlgorithmConfig,
        kl_coef: float | None,
    ):
        """Puts models and rewards on the devices and splits the prompts. ``kl_coef`` None: there is
        no reference.
        """
        settings, (model, params, tokenizer) = stage.config.rl, parts.initial
        self.stage, self.parts, self.settings, self.group_size = (
            stage,
            parts,
            settings,
            algorithm_config.group_size,
        )
        self.samplings = 1 + settings.dynamic_sampling  # of a step, at most
        values = critic.settings(algorithm_config)
        start, self.whole = critic.start(
            stage, params, values.value if algorithm.needs_values else None
        )
        num_updates = algorithm_config.num_epochs * algorithm_config.num_minibatches
        optimizer = critic.make_optimizer(settings, values, num_updates, self.whole.params)
        samples = initial.sampling_config(settings, tokenizer)
        split_key, self.order_key = jax.random.split(stage.key("data"))
        fraction = 0.0 if settings.validation_data else settings.validation_fraction
        prompts = [row.prompt for row in parts.prompts.rows]
        self.train_rows, held_out = initial.hold_out("prompts", prompts, fraction, split_key)
        self.held_out = np.arange(len(parts.to_validate)) if settings.validation_data else held_out
        self._narrowed = functools.partial(
            batches.narrowed, multiple=stage.config.text.bucket_multiple
        )
        self.widest = self._narrowed(parts.prompts, self.train_rows)
        self.start, self.kl_coef, self.refreshes = (
            start,
            kl_coef or 0.0,
            settings.reference_refresh is not None,
        )
        score_rows = memory.score_rows(stage.config.compute, settings.batch_size, algorithm_config)

        def policy(
            params: Params, tokens: jax.Array, *more: Any
        ) -> PolicyOutput:  # of whole rollouts, however wide
            prompt_length = tokens.shape[1] - settings.max_new_tokens
            return models.policy_fn(model, settings.temperature, prompt_length)(
                params, tokens, *more
            )

        scored = ops.by_rows(policy, score_rows)
        if self.refreshes or kl_coef is None:
            memory.free(start.loaded)
        bind = start.bind if self.refreshes else functools.partial(stage.reference, start)
        self.reference: Any = None if kl_coef is None else bind(scored)
        if parts.reward.fn is not None:
            on_devices = stage.frozen("reward", jax.tree.map(jnp.asarray, parts.reward.fn))
            self.parts = parts = parts._replace(reward=spec.Reward(on_devices))
        # In several turns a response is written behind the slots of those before it.
        slots = settings.max_new_tokens * (2 if parts.environment else 1)
        rows, length = settings.batch_size // stage.num_devices, self.widest.tokens.shape[1] + slots
        frozen = {"frozen weights": start.base, "reference": None if start.base else self.reference}
        cache = jax.eval_shape(lambda: model.init_cache(rows, length))
        stage.hold(frozen | {"rewards": parts.reward.fn, "cache while it samples": cache})
        self.recipe = phases.Recipe(
            model, samples, algorithm, algorithm_config, optimizer, settings, stage.mesh, score_rows
        )

        def jitted(phase: Any, num_blocks: int = 0, **how: Any) -> Any:
            options = devices.compiler_options(num_blocks)
            return jax.jit(
                functools.partial(phase, recipe=self.recipe, **how), compiler_options=options
            )

        # A token goes through layer after layer, also where they are scanned.
        self._respond = jitted(phases.respond, model.config.num_layers)
        self._respond_greedily = jitted(phases.respond, model.config.num_layers, greedy=True)
        num_blocks, self._reward = model.config.num_blocks, jax.jit(phases.reward)
        self._rescored, self._with_greedy = (
            jitted(phases.rescored, num_blocks),
            jitted(phases.with_greedy),
        )
        self._num_equal, self._refill = jitted(phases.num_equal), jitted(phases.refill)
        self._learn = stage.jit_update(
            functools.partial(phases.learn, recipe=self.recipe), num_blocks
        )
        self._functions = functools.cache(self._functions_of)

    def _functions_of(self, columns: int) -> phases.Functions:
        """What re-scores rollouts of that many columns, and learns from them."""
        value_model = None if self.whole is self.start else self.recipe.model
        how = self.settings.temperature, columns - self.settings.max_new_tokens
        policy_fn = models.policy_fn(self.recipe.model, *how, value_model)
        return phases.Functions(self.whole.bind(policy_fn), ref_fn=self.reference)

    def first_state(self) -> phases.LoopState:
        """The state at step 0: called once, so that nobody keeps it beside the loop's."""
        create = functools.partial(
            self.recipe.algorithm.State.create, optimizer=self.recipe.optimizer
        )
        train = self.stage.take(create, self.whole.params)
        reference = self.stage.copy(models.policy_params(train.params)) if self.refreshes else None
        self.stage.hold({"refreshed reference": reference})
        return self.stage.lay_out(phases.LoopState.create(train, self.kl_coef, reference))

    @property
    def job(self) -> loop.Job:
        """What the loop runs."""
        return loop.Job(
            self.advance,
            self.settings.length,
            validate=self.validate if len(self.held_out) else None,
            validation_interval=self.settings.validation_interval,
            show=(
                "objective/score",
                "objective/kl",
                "kl/coef",
                "response/length",
                "validation/score",
            ),
            sources=lambda step: [
                self.parts.prompts.rows[row].source for row in self.rows_of(step).ravel()
            ],
            optimizer=self.settings.optimizer,
            judged_by="max:validation/score",
            attempt=self.attempt,
        )

    def rows_of(self, step: int) -> np.ndarray:
        """The rows of the prompts of a step, without their repetitions in groups: [samplings,
        prompts].

        Those after the first are for ``rl.dynamic_sampling``: the prompts of other steps, spread
        over the epoch.
        """
        n, count, samplings = (
            len(self.train_rows),
            self.settings.batch_size // self.group_size,
            self.samplings,
        )
        steps = step + max(n // count // samplings, 1) * np.arange(samplings)
        return self.train_rows[
            np.stack([batches.prompt_rows(n, count, self.order_key, int(i)) for i in steps])
        ]

    def advance(self, state: phases.LoopState, step: int) -> tuple[phases.LoopState, Metrics]:
        """One iteration."""
        refresh = self.settings.reference_refresh
        if refresh is not None and step and step % refresh == 0:
            memory.free(state.reference)
            state = replace(
                state, reference=self.stage.copy(models.policy_params(state.train.params))
            )
        update_key = jax.random.fold_in(self.stage.key("update"), step)
        rollout, metrics = self._rollout(state, step)
        state, learn_metrics = self._learn(
            state, rollout, update_key, self._functions(rollout.tokens.shape[1])
        )
        return state, metrics | learn_metrics

    def attempt(self, state: phases.LoopState) -> phases.LoopState:
        """One iteration for its memory alone, without what others wrote in Python: reward and
        environment, filter.
        """
        reward, environment, alone = self.parts.reward, self.parts.environment, copy.copy(self)
        unasked = spec.Reward(host=lambda rollout, columns: (np.zeros(len(rollout.tokens)), {}))
        silent = environment and environment._replace(fn=lambda conversation, row: None)
        own: Any = {
            "reward": reward if reward.host is None else unasked,
            "environment": silent,
            "enforce": None,
        }
        alone.parts = self.parts._replace(**own)
        rollout, _ = alone._sampled(state, self.widest, self.rows_of(0)[0], 0)
        functions = self._functions(rollout.tokens.shape[1])
        return memory.tried(
            lambda loop: self._learn(loop, rollout, self.stage.key("update"), functions), state
        )

    def _rollout(self, state: phases.LoopState, step: int) -> tuple[Rollout, Metrics]:
        """The scored responses of a step, by dynamic sampling (Yu et al. 2025, DAPO, section 3.2)
        if the run has it.

        Each round samples a whole batch, so that nothing is compiled anew, and takes what is needed
        of it. The metrics of scores and responses are those of the first sampling: of the policy,
        not of the groups that were chosen. All rounds are as wide as their longest prompt needs, on
        whichever device or process its row lies.
        """
        first, *others = rows = self.rows_of(step)
        prompts, number = self._narrowed(self.parts.prompts, rows.ravel()), step * self.samplings
        rollout, metrics = self._sampled(state, prompts, first, number)
        if not others:
            return rollout, metrics
        equal, rounds = [float(self._num_equal(rollout))], 0
        while rounds < len(others) and float(self._num_equal(rollout)):
            fresh, _ = self._sampled(state, prompts, others[rounds], number + 1 + rounds)
            equal.append(float(self._num_equal(fresh)))
            rollout, rounds = self._refill(rollout, fresh), rounds + 1
        found = {
            "sampling/rounds": rounds,
            "sampling/uninformative": sum(equal) / (len(equal) * len(first)),
        }
        return rollout, metrics | {name: jnp.float32(number) for name, number in found.items()}

    def _sampled(
        self, state: phases.LoopState, prompts: EncodedPrompts, rows: np.ndarray, number: int
    ) -> tuple[Rollout, Metrics]:
        """A group of scored responses to the prompt of each row; ``number`` is of the sampling in
        the run.
        """
        rows, key = (
            np.repeat(rows, self.group_size),
            jax.random.fold_in(self.stage.key("rollout"), number),
        )
        sampled, talked = self._responses(self._respond, state, prompts, rows, key)
        rollout, metrics = self._rescored(state, sampled, self._functions(sampled.tokens.shape[1]))
        rollout, reward_metrics, _ = self._score(self.parts.reward, rollout, prompts, rows)
        if self.recipe.algorithm_config.baseline == "greedy":
            greedy, _ = self._responses(self._respond_greedily, state, prompts, rows, key)
            greedy, of_greedy, _ = self._score(self.parts.reward, greedy, prompts, rows)
            rollout = self._with_greedy(rollout, greedy)
            metrics["objective/greedy_score"] = of_greedy["objective/score"]
        return rollout, metrics | talked | reward_metrics

    def validate(self, state: phases.LoopState) -> Validation:
        """Samples a response to each held-out prompt, always with the same key; the reward and the
        judge score it.

        It samples in batches of ``rl.batch_size``, which take the memory of a step's and, if as
        wide, its program.
        """
        rows, tokenizer = (
            self.held_out[: self.settings.validation_prompts],
            self.parts.initial.tokenizer,
        )
        encoded = self._narrowed(self.parts.to_validate, rows)
        rows = loop.pad_rows(rows, self.settings.batch_size)
        sampled, talked = self._responses(
            self._respond, state, encoded, rows, self.stage.key("eval")
        )
        judged: Metrics = {}
        if self.parts.judge is not None:
            _, metrics, _ = self._score(
                self.parts.judge, replace(sampled, rewards=None), encoded, rows
            )
            judged = {"validation/judge": metrics["objective/score"]}
        rollout, metrics, verdicts = self._score(self.parts.reward, sampled, encoded, rows)
        rollout, metrics = processes.fetch(rollout), metrics | talked
        samples: list[dict[str, Any]] = []
        texts = generator.responses(rollout, tokenizer, with_replies=True)
        scores = np.asarray(rollout.scores)
        for i in np.flatnonzero(np.any(rollout.response_mask, axis=1)):
            row = {
                "prompt": encoded.rows[rows[i]].prompt,
                "response": texts[i],
                "score": float(scores[i]),
            }
            row["length"] = int(np.sum(rollout.response_mask[i] != 0))
            samples.append(
                row if verdicts is None else row | {"unsafe": filters.sentence(verdicts[i])}
            )
        for shown in samples[: self.settings.show_examples]:
            logger.info(
                "Prompt:    {prompt}\nGenerated: {response}\nReward:    {score:.4g}\n".format(
                    **shown
                )
            )
        kinds = ("reward/", "safety/", "environment/")
        parts = {f"validation/{name}": x for name, x in metrics.items() if name.startswith(kinds)}
        values = {"validation/score": metrics["objective/score"]} | judged | parts
        return Validation({name: float(value) for name, value in values.items()}, samples)

    def _responses(
        self,
        sample: Any,
        state: phases.LoopState,
        encoded: EncodedPrompts,
        rows: np.ndarray,
        key: jax.Array,
    ) -> tuple[Rollout, Metrics]:
        """Responses of the jitted ``phases.respond`` with the sampler's log-probs,
        ``rl.batch_size`` at a time; under an environment in turns, and with its metrics."""
        policy = phases.sampler(state, self.start.base)

        def respond(places: Any, *prompts: Any) -> Rollout:
            return sample(
                policy, self.stage.shard(phases.Prompts(*prompts)._replace(places=places)), key
            )

        parts: list[Any] = []
        for places in np.arange(len(rows), dtype=np.int32).reshape(-1, self.settings.batch_size):
            own = functools.partial(respond, places)
            parts.append(converse(self.parts.environment, own, encoded, rows[places]))
        sampled, values = (
            parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        )
        means = {
            f"environment/{name}": jnp.float32(np.mean(x[rows >= 0])) for name, x in values.items()
        }
        return self.stage.shard(sampled), means

    def _score(
        self, run_reward: spec.Reward, rollout: Rollout, encoded: EncodedPrompts, rows: np.ndarray
    ) -> tuple[Rollout, Metrics, list[filters.Verdict] | None]:
        """The rollout with its scores, the reward's metrics, and the filter's verdicts if there is
        one.

        On the host each process scores its own rows; all filter all rows, so that they agree on
        what is absent.
        """
        if run_reward.host is None:
            return *self._reward(rollout, phases.Functions(None, run_reward.fn)), None
        rollout, own_columns = (
            processes.fetch(rollout),
            batches.columns_at(encoded, processes.own_rows(rows)),
        )
        verdicts, filtered_metrics = None, {}
        score_own = functools.partial(
            rewards.on_host, run_reward.host, processes.own_rows(rollout), own_columns
        )
        try:
            result, parts = processes.gather_rows(processes.agree(score_own))
            unscored = np.sum(np.any(rollout.response_mask, axis=1)) - np.sum(
                np.any(result.response_mask, axis=1)
            )
            if self.parts.enforce is not None and run_reward is self.parts.reward:
                columns = batches.columns_at(encoded, rows)
                result, filtered_metrics, verdicts = self.parts.enforce(rollout, result, columns)
        except FloatingPointError as error:
            raise TrainingFault(str(error)) from error
        named = {name: jnp.asarray(values) for name, values in parts.items()}
        result, metrics = phases.scored(result, jnp.asarray(result.scores), named)
        metrics |= {"reward/unscored": jnp.float32(unscored)} | filtered_metrics
        return self.stage.shard(jax.device_get(result)), metrics, verdicts
