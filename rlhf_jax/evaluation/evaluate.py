"""What a finished run can do: helpfulness, harmlessness, honesty, preferences, diversity, against
another run.

    result = evaluate.run("runs/ppo", evaluate.Config(prompts=("heldout.json",),
    reward_model="runs/rm")) print(result.value("helpfulness", "quality"))

The run's folder gets ``evaluation.json`` with every figure, its 95% interval and n, and
``evaluation_samples.jsonl`` with every response. Both are functions of the models, the data, the
settings and the seed.
"""

import dataclasses
import functools
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from rlhf_jax import generator, models, ops, rewards
from rlhf_jax.config import Compute, RLStage
from rlhf_jax.data import batches, chat, encoding, formats, rows
from rlhf_jax.data.environment import Environment, converse, function_of, load_environment
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.errors import TrainingFault, UserError, logger
from rlhf_jax.evaluation import data, measures, texts
from rlhf_jax.models import hf
from rlhf_jax.report import records
from rlhf_jax.rewards import spec
from rlhf_jax.rewards.service import Judge, Services
from rlhf_jax.runs import devices, manifest
from rlhf_jax.runs.folder import write_atomically
from rlhf_jax.runs.reading import settings_of
from rlhf_jax.training import initial, scoring, stage
from rlhf_jax.types import Comparisons, Params, Rollout

Categories = Mapping[str, data.CustomCategory]
Sets = Mapping[str, formats.ReadResult]
"""The data of prompts, safety, preferences, annotated and custom NAME."""
Encoded = Mapping[str, encoding.EncodedTexts]
"""The pairs of preferences and annotated."""

SAMPLES = "evaluation_samples.jsonl"
ORDER = (
    "helpfulness",
    "harmlessness",
    "honesty",
    "preferences",
    "agreement",
    "diversity",
    "win rate",
)  # then others
KINDS: dict[str, rows.Kind] = {
    "preferences": "pairs",
    "annotated": "annotated",
}  # of sets that are not prompts
BUCKET = 64  # tokens: texts to score are padded to a multiple, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is judged by. What is not given is named as not run."""

    prompts: tuple[str, ...] = ()
    """Held-out prompts, for helpfulness, uncertainty, diversity and the win rate."""
    safety: tuple[str, ...] = ()
    """Prompts with a key `label`, safe or unsafe, such as XSTest's CSV: which are refused?"""
    preferences: tuple[str, ...] = ()
    """Preference data of any format: do the reward model and the policy's log-probabilities agree
    with it?
    """
    annotated: str | None = None
    """Pairs of responses with several annotators' votes, as in PandaLM's test set."""
    reward_model: str | None = None
    """A reward model's run or model folder, or another SPEC of --reward such as mean:A,B."""
    against: str | None = None
    """Another run or model folder, for the win rate under the reward model."""
    categories: str | None = None
    """YAML file of categories of your own."""
    trust_config: bool = False
    """Run the Python files that this YAML file names, though they are not in the current folder."""
    template: str | None = None
    """What the models read for a prompt; null: the run's text.template (auto for a model's folder).
    """
    max_new_tokens: int | None = None
    """Response slots; null: the run's rl.max_new_tokens (32 for a model's folder)."""
    environment: str | None = None
    """FILE.py:FUNCTION, which replies to each response, as rl.environment does in a run."""
    max_turns: int | None = None
    """Responses of a row at most; null: the run's rl.max_turns."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the most likely token."""
    num_samples: int = 1
    """Responses to each prompt; with two or more, diversity within a prompt too."""
    batch_size: int = 64
    """Texts at once. Another one may round differently."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with a text that does not fit into the model. Truncated and dropped rows are
    counted and reported.
    """
    columns: tuple[str, ...] = ()
    """Keys of the data under other names, each OURS=THEIRS: prompt=question response=answer."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that cannot be used, such as one with an empty answer: error names all of them and
    stops; drop leaves them out and counts them."""
    judge_url: str | None = None
    """Of judge:RUBRIC.yaml as reward model, as judge.url in a run."""
    judge_model: str | None = None
    """The name of the judge's model there."""
    seed: int = 0
    """Root of the samples and of the intervals' draws."""
    device: Literal["cpu", "gpu", "cuda", "tpu"] | None = None
    """Where to run; null: JAX's choice."""
    output: str | None = None
    """Folder for evaluation.json; null: the run's."""

    def __post_init__(self) -> None:
        for name, least in {
            "num_samples": 1,
            "batch_size": 1,
            "max_new_tokens": 1,
            "temperature": 0,
        }.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.template not in (None, chat.AUTO) and "{prompt}" not in str(self.template):
            what = f"--template must be auto or contain {{prompt}}, got {self.template!r}"
            raise UserError(what)
        if self.against is not None and (self.reward_model is None or not self.prompts):
            raise UserError(
                "--against: a win rate needs --reward-model, which judges, and --prompts"
            )


class Result(NamedTuple):
    """The figures, and the file that holds them."""

    rows: list[measures.Figure]
    path: Path

    def value(self, category: str, metric: str) -> float | None:
        """A figure; None if it could not be measured. Raises KeyError if there is none of that
        name.
        """
        return {(row.category, row.metric): row.value for row in self.rows}[category, metric]


def run(folder: str | Path, config: Config) -> Result:
    """Evaluates the policy in a run's or model's folder and writes ``evaluation.json`` into it. A
    reward model, or an ensemble of them, is judged by preferences and annotated pairs alone.

    Raises:
        UserError: nothing to evaluate by, or whatever is wrong with a folder, a file or a row.
    """
    folder = str(folder)
    output = _output(folder, config)
    devices.choose(config.device)
    stage.enable_compilation_cache()
    policy = load(folder, config)
    _check_flags(policy, config)
    logger.info(chat.describe(policy.template, policy.tokenizer, folder))
    sets, categories = _read(config, chat.template_of(policy.tokenizer, policy.template))
    bench = open_bench(policy, config)
    pairs = {}
    answers = {}
    for name, read in sets.items():
        if name in KINDS:
            pairs[name] = _encoded_pairs(bench, read.rows)
        else:
            answers[name] = sample(bench, policy, name, read.rows)
    left_out = _left_out(sets, {**answers, **pairs})
    if config.against is not None:
        against = _against(bench, config.against, sets["prompts"].rows)
        if against.rows != answers["prompts"].rows:
            raise UserError(
                f"--against {config.against}: it leaves out other prompts that are too long; "
                "shorten them"
            )
        answers["prompts, against"] = against
    figures = [*_figures(bench, sets, categories, answers, pairs), *_not_run(policy, config)]
    place = {category: i for i, category in enumerate(ORDER)}
    figures.sort(key=lambda figure: place.get(figure.category.partition(":")[0], len(place)))

    content = {
        "settings": _settings(policy, config),
        "fingerprints": _fingerprints(folder, config, sets, categories),
        "left_out": left_out,
        "rows": [figure._asdict() for figure in figures],
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / records.EVALUATION
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n")
    lines = []
    for name, own in answers.items():
        for line in _samples(name, own, policy.tokenizer):
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomically(output / SAMPLES, "".join(lines))
    return Result(figures, path)


def _output(folder: str, config: Config) -> Path:
    """The folder to write into. UserError if it is missing, or nothing is given to evaluate by."""
    given = (
        config.prompts,
        config.safety,
        config.preferences,
        config.annotated,
        config.categories,
    )
    if not any(given):
        raise UserError(
            "nothing to evaluate by: give --prompts, --safety, --preferences, --annotated or "
            "--categories"
        )
    if config.output is not None:
        return Path(config.output)
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; for a model of the hub give --output FOLDER")
    return Path(folder)


def _encoded_pairs(bench: "Bench", pairs: Sequence[rows.Row]) -> encoding.EncodedTexts:
    policy = bench.policy
    return encoding.encode_texts(
        pairs,
        policy.tokenizer,
        template=policy.template,
        max_length=bench.positions,
        too_long=bench.config.too_long,
    )


def _left_out(
    sets: Sets, encoded: Mapping[str, "Answers | encoding.EncodedTexts"]
) -> dict[str, dict[str, int]]:
    """{set: {reason: rows}} of the rows that were left out or cut; prints them."""
    left_out = {}
    for name, read in sets.items():
        reasons = read.dropped | encoded[name].counts
        if reasons:
            counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            logger.info(f"{name}: {counted}")
            left_out[name] = reasons
    return left_out


def _settings(policy: "Policy", config: Config) -> dict[str, Any]:
    """The settings as evaluation.json has them."""
    settings = {"run": policy.folder} | dataclasses.asdict(config)
    del settings["output"], settings["device"]
    return settings | {"template": policy.template, "max_new_tokens": policy.max_new_tokens}


class Policy(NamedTuple):
    """A policy and what it was trained with; or a reward model (the first one of an ensemble),
    which writes no text.
    """

    folder: str
    model: models.Model
    params: Params
    tokenizer: Tokenizer
    template: str
    max_new_tokens: int
    is_judge: bool  # whether this is a reward model


class Bench(NamedTuple):
    """A policy and what it is judged with."""

    policy: Policy
    config: Config
    key: jax.Array
    reward: spec.Reward | None
    positions: int  # that the policy and the reward model both have
    environment: Environment | None


def load(folder: str, config: Config) -> Policy:
    """The policy in a run's or model's folder, or of a Hugging Face name."""
    settings = settings_of(folder)
    compute = Compute(dtype=settings.get("compute", {}).get("dtype", "float32"))
    source = hf.model_folder(folder)
    member = str(next(iter(spec.members(source)), source))
    model, params, tokenizer = initial.load_language_model(member, compute)
    template = config.template or settings.get("text", {}).get("template", chat.AUTO)
    usual = settings.get("rl", {}).get("max_new_tokens", RLStage().max_new_tokens)
    slots = config.max_new_tokens or usual
    return Policy(folder, model, params, tokenizer, template, slots, "score" in params)


def _check_flags(policy: Policy, config: Config) -> None:
    """Refuses what a reward model cannot be asked."""
    others = ("prompts", "safety", "categories", "against", "reward_model", "environment")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(config, name)]
    if policy.is_judge and given:
        judged = f"it is judged by --preferences and --annotated, not by {', '.join(given)}"
        advice = "or give a policy, and this as its --reward-model"
        raise UserError(
            f"{policy.folder}: this is a reward model, which writes no text: {judged}; {advice}"
        )


def open_bench(policy: Policy, config: Config) -> Bench:
    """The policy with the reward model of ``config.reward_model``, if it names one."""
    positions = policy.model.config.max_length
    reward = None
    given = policy.folder if policy.is_judge else config.reward_model
    if given is not None:
        entry = hf.model_folder(given)
        if policy.is_judge and spec.members(entry):
            entry = f"mean:{entry}"
        check_template(policy, given, config)
        reward = reward_of(entry, policy, (), "--reward-model", config)
        positions = min(positions, judge_positions(entry))
        if positions < policy.model.config.max_length:
            logger.info(
                f"{given}: reads {positions} tokens, fewer than the policy; prompt and response "
                "have to fit"
            )
    trained = settings_of(policy.folder).get("rl", {})
    turns = config.max_turns
    if turns is None and config.environment:
        turns = trained.get("max_turns")
    if trained.get("environment") and not config.environment:
        logger.info(
            f"{policy.folder} was trained with replies by {trained['environment']}; here is no "
            "--environment"
        )
    fn = function_of(config.environment, "--environment")
    environment = load_environment(fn, policy.tokenizer, policy.max_new_tokens, turns)
    key = stage.stream(config.seed, "evaluate", "eval")
    return Bench(policy, config, key, reward, positions, environment)


def judge_positions(entry: str) -> int:
    """Positions that all reward models of a --reward entry have; no limit without any."""
    positions = [sys.maxsize]
    for source in spec.sources(entry).values():
        for folder in spec.members(source) or [source]:
            if (folder / "config.json").is_file():
                positions.append(hf.read_config(folder).max_length)
    return min(positions)


def check_template(policy: Policy, folder: str, config: Config) -> None:
    """Refuses a run in ``folder`` that had another template, unless ``config`` chooses one."""
    given = settings_of(folder).get("text", {}).get("template")
    if given is None or config.template is not None:
        return
    model = hf.model_folder(folder)
    member = next(iter(spec.members(model)), model)
    tokenizer = load_tokenizer(member)
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
    entry: str, policy: Policy, columns: Collection[str], flag: str, config: Config
) -> spec.Reward:
    """The reward of one entry, as ``spec.build_reward`` reads it; ``flag`` names the setting in
    errors.
    """
    tokenizer = policy.tokenizer
    load = functools.partial(
        initial.load_reward_model, compute=Compute(), policy=tokenizer.fingerprint
    )
    judge = Judge(url=config.judge_url, model=config.judge_model)
    return spec.build_reward(
        (entry,),
        tokenizer=tokenizer,
        load=load,
        columns=columns,
        flag=flag,
        services=Services(judge, Path(config.output or policy.folder) / "judge"),
    )


_apply = jax.jit(lambda fn, rollout: fn(rollout)[0])


def score(
    reward: spec.Reward, rollout: Rollout, columns: Mapping[str, Sequence[Any]], batch_size: int
) -> np.ndarray:
    """[N] float64 of N responses, NaN where a function gave None. A Python function sees all rows
    at once.

    Raises:
        TrainingFault: a function gave a number that is not finite.
    """
    if reward.host is None:
        score_batch = functools.partial(_apply, reward.fn)
        return generator.in_batches(score_batch, batch_size, rollout).astype(np.float64)
    try:
        scored, _ = rewards.on_host(reward.host, rollout, columns)
    except FloatingPointError as error:
        raise TrainingFault(str(error)) from error
    is_scored = np.any(scored.response_mask, axis=1)
    return np.where(is_scored, np.asarray(scored.scores, np.float64), np.nan)


class Answers(NamedTuple):
    """A policy's responses to N prompts, S to each."""

    rows: list[rows.Row]  # [N]
    counts: dict[str, int]  # prompts that were too long, by what was done to them
    columns: dict[str, list[Any]]  # of the N * S rows of the rollout
    rollout: Rollout
    responses: measures.Responses
    talks: dict[str, np.ndarray]  # of each of the N * S conversations, as ``converse`` gives them


def sample(bench: Bench, policy: Policy, name: str, prompts: Sequence[rows.Row]) -> Answers:
    """Responses to a set of prompts. The key is that of the set's name, so that both runs of a win
    rate share it.
    """
    config = bench.config
    tokenizer = policy.tokenizer
    slots = policy.max_new_tokens
    encoded = encoding.encode_prompts(
        prompts,
        tokenizer,
        template=policy.template,
        too_long=config.too_long,
        max_positions=min(bench.positions, policy.model.config.max_length),
        max_new_tokens=slots,
    )
    settings = initial.sampling_config(RLStage(max_new_tokens=slots), tokenizer)
    settings = dataclasses.replace(settings, temperature=config.temperature)  # which may be 0
    shape = (len(encoded), config.num_samples)
    numbers = np.repeat(np.arange(shape[0]), shape[1])
    key = jax.random.fold_in(bench.key, zlib.crc32(name.encode()))
    model = generator.LanguageModel(policy.model, policy.params, tokenizer)

    def respond(
        tokens: np.ndarray, mask: np.ndarray, _: Any, used: np.ndarray | None = None
    ) -> Rollout:
        return model.sample(
            tokens, mask, key, config=settings, batch_size=config.batch_size, used=used
        )

    rollout, talks = converse(bench.environment, respond, encoded, numbers)
    shown = [chat.shown(row, tokenizer) for row in encoded.rows]
    said = np.array(generator.responses(rollout, tokenizer), dtype=object)
    columns = batches.columns_at(encoded, numbers)
    scores = None
    if bench.reward is not None:
        asked = {"messages": columns["messages"]}  # a policy's reward model reads no other column
        scores = score(bench.reward, rollout, asked, config.batch_size).reshape(shape)
    lengths = np.count_nonzero(rollout.response_mask, axis=1).reshape(shape)
    ended = generator.ended(rollout, settings.eos_ids).reshape(shape)
    texts_of = said.reshape(shape).tolist()
    responses = measures.Responses(shown, texts_of, lengths, ended, scores)
    return Answers(
        encoded.rows,
        encoded.counts,
        columns,
        rollout,
        responses,
        talks,
    )


def margins(bench: Bench, encoded: encoding.EncodedTexts) -> measures.Margins:
    """``{judge: [N]}`` score of answer 0 minus that of answer 1, by each judge there is, lengths
    among them.
    """
    log_probs = jax.jit(
        functools.partial(ops.response_log_probs, models.policy_fn(bench.policy.model))
    )
    judges: dict[str, Callable[[Comparisons], Any]] = {}
    if bench.reward is not None:
        judges["reward_model"] = functools.partial(_score_answers, bench.reward)
    if not bench.policy.is_judge:
        judges["log_prob"] = functools.partial(log_probs, bench.policy.params)
    lengths = encoded.response_lengths
    texts = list(itertools.chain(*encoded.tokens))  # [2 N]
    starts = encoded.starts.T.reshape(-1, 1)
    weight = np.ones(1, np.float32)
    single = dataclasses.replace(encoded, tokens=[texts], starts=starts, weight=weight)
    # Each text is scored once: the pairs of a ranking share theirs. By length, so that a batch is
    # padded little.
    keys = [(int(start), text.tobytes()) for (start,), text in zip(starts, texts, strict=True)]
    row_of = {key: row for row, key in enumerate(keys)}
    distinct = sorted(row_of, key=lambda key: len(key[1]))
    rows = np.array([row_of[key] for key in distinct])
    place_of = {key: place for place, key in enumerate(distinct)}
    places = np.reshape([place_of[key] for key in keys], (2, -1)).T
    scores = {}
    for name, judge in judges.items():
        by_row = scoring.score_rows(
            judge, single, rows, batch_size=bench.config.batch_size, bucket_multiple=BUCKET
        )
        scores[name] = by_row[places, 0]
    if "log_prob" in scores:
        scores["mean_log_prob"] = scores["log_prob"] / lengths
    scores["longer"] = lengths
    return {name: values[:, 0] - values[:, 1] for name, values in scores.items()}


def _score_answers(reward: spec.Reward, batch: Comparisons) -> np.ndarray:
    """[B, 1] float64 the reward of each text [B, 1, T], without columns."""
    tokens = batch.tokens[:, 0]
    no_log_probs = jnp.zeros(tokens.shape)
    rollout = Rollout(tokens, batch.attention_mask[:, 0], batch.response_mask[:, 0], no_log_probs)
    return score(reward, rollout, {}, len(tokens))[:, None]


def _read(config: Config, template: chat.ChatTemplate) -> tuple[Sets, Categories]:
    """All data, read before anything is computed, and the categories of the user's own."""
    categories = {}
    if config.categories:
        categories = data.read_categories(config.categories, config.trust_config)
    read = functools.partial(
        formats.read,
        template=template,
        columns=config.columns,
        shares_columns=True,
        on_bad_row=config.on_bad_row,
    )
    given: dict[str, Any] = {
        "prompts": config.prompts,
        "safety": config.safety,
        "preferences": config.preferences,
        "annotated": config.annotated,
    }
    for name, own in categories.items():
        given[f"custom {name}"] = own.prompts
    results = {}
    for name, paths in given.items():
        if paths:
            results[name] = read(KINDS.get(name, "prompts"), paths)
    for entry in config.columns:
        sentences = [result.unused_columns.get(entry) for result in results.values()]
        if sentences and all(sentences):
            raise UserError(str(sentences[0]))
    for name, category in categories.items():
        if category.texts:
            texts_read = [
                rows.Row(text, (), f"{config.categories}: {name}, prompt {i}")
                for i, text in enumerate(category.texts, 1)
            ]
            results[f"custom {name}"] = formats.ReadResult(texts_read)
        elif not (category.prompts or config.prompts):
            raise UserError(
                f"{config.categories}: {name} has no prompts of its own; add them or give --prompts"
            )
    data.check_safety(results["safety"].rows if config.safety else ())
    for name, result in results.items():
        logger.info(f"{name}: {result.describe()}")
    return results, categories


def _fingerprints(
    folder: str, config: Config, sets: Sets, categories: Categories
) -> dict[str, str]:
    """sha256 of every file and model that is read, by the name that the user gave it."""
    fingerprints: dict[str, str] = {}
    for result in sets.values():
        fingerprints |= result.fingerprints
    paths = {}
    for name in (folder, config.against, config.categories):
        if name:
            paths[name] = Path(hf.model_folder(name))
    reward_model = config.reward_model and hf.model_folder(config.reward_model)
    scores = [category.score for category in categories.values()]
    for entry in (config.environment, reward_model, *scores):
        if entry:
            paths |= spec.sources(entry)
    for name, path in paths.items():
        if path.exists():
            fingerprints[name] = manifest.fingerprint(path)
    return fingerprints


def _against(bench: Bench, folder: str, prompts: Sequence[rows.Row]) -> Answers:
    """The responses of the run of ``--against`` to the same prompts."""
    other = load(folder, bench.config)
    if other.is_judge:
        raise UserError(f"--against {folder}: this is a reward model, which writes no text")
    check_template(bench.policy, folder, bench.config)
    if other.tokenizer.fingerprint != bench.policy.tokenizer.fingerprint:
        raise UserError(
            f"--against {folder}: its tokenizer is another one, which the reward model cannot read"
        )
    other = other._replace(max_new_tokens=bench.policy.max_new_tokens)
    return sample(bench, other, "prompts", prompts)


def _figures(
    bench: Bench, sets: Sets, categories: Categories, answers: Mapping[str, Answers], pairs: Encoded
) -> Iterable[measures.Figure]:
    key = bench.key
    if "prompts" in answers:
        yield from _prompt_figures(answers["prompts"], key)
    if "safety" in answers:
        safety = answers["safety"]
        labels = [row.columns["label"] for row in safety.rows]
        yield from measures.harmlessness(safety.responses, labels, key)
    for name, encoded in pairs.items():
        by_source = {row.source: row for row in sets[name].rows}
        given = [by_source[source] for source in encoded.sources]
        judged = margins(bench, encoded)
        if name == "annotated":
            yield from measures.agreement(judged, given, key)
        else:
            _, _, pairs_of = scoring.pairs_of(encoded, np.arange(len(encoded)))
            parts = [row.category for row in given]
            yield from measures.preferences(judged, pairs_of, parts, key)
    if bench.config.against is not None:
        ours = np.asarray(answers["prompts"].responses.scores)
        theirs = np.asarray(answers["prompts, against"].responses.scores)
        yield from measures.win_rate(ours, theirs, key, bench.config.against)
    for name, category in categories.items():
        own = answers.get(f"custom {name}") or answers["prompts"]
        if category.texts:
            yield from measures.helpfulness(own.responses, key, name)
            continue
        responses = own.responses._replace(scores=None)
        if category.score is not None:
            where = f"{bench.config.categories}: {name}.score"
            judge = reward_of(category.score, bench.policy, own.columns, where, bench.config)
            scores = score(judge, own.rollout, own.columns, bench.config.batch_size)
            responses = responses._replace(scores=scores.reshape(responses.lengths.shape))
        yield measures.custom(name, category, responses, key)


def _prompt_figures(answers: Answers, key: jax.Array) -> Iterable[measures.Figure]:
    responses = answers.responses
    yield from measures.helpfulness(responses, key)
    answerable = [data.answerable(row) for row in answers.rows]
    yield from measures.uncertainty(responses, answerable, key)
    yield from measures.diversity(responses, key)
    for name, values in answers.talks.items():
        of_prompts = values.reshape(responses.lengths.shape)
        yield measures.mean("environment", name, of_prompts, key)


def _not_run(policy: Policy, config: Config) -> list[measures.Figure]:
    """A row without a value for what nothing was given for."""
    given = dataclasses.asdict(config)
    given["judge"] = config.reward_model or policy.is_judge or not config.preferences
    wanted = yaml.safe_load(Path(__file__).with_name("not_run.yaml").read_text("utf-8"))
    wanted = [row for row in wanted if not given[row[0]]]
    asked = [row for row in wanted if not policy.is_judge or row[1] in ("preferences", "agreement")]
    return [
        measures.Figure(place, metric, note=f"not run: give {flag}")
        for _, place, metric, flag in asked
    ]


def _samples(name: str, answers: Answers, tokenizer: Tokenizer) -> Iterable[dict[str, Any]]:
    """A line for each response: prompt, response, and the judgements by word patterns."""
    prompts, texts_of, *_, scores = answers.responses
    shown = generator.responses(answers.rollout, tokenizer, with_replies=True)
    numbered = np.ndenumerate(np.array(texts_of, dtype=object))
    for ((i, j), text), said in zip(numbered, shown, strict=True):
        line: dict[str, Any] = {
            "set": name,
            "source": answers.rows[i].source,
            "prompt": prompts[i],
            "response": said,
            "refusal": texts.is_refusal(text),
            "uncertainty": texts.expresses_uncertainty(text),
        }
        if scores is not None:
            line["score"] = None if np.isnan(scores[i, j]) else float(scores[i, j])
        yield line
