"""Evaluates a finished run: helpfulness, harmlessness, honesty, preferences, diversity, against
another run.

    config = evaluate.Config(prompts=("heldout.json",), reward_model="runs/rm")
    result = evaluate.run("runs/ppo", config)
    print(result.value("helpfulness", "quality"))

The run's folder gets ``evaluation.json`` with every figure, its 95% interval and n, and
``evaluation_samples.jsonl`` with every response. Both are functions of the models, the data, the
settings and the seed.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jax import Array

from rlhf_jax.config import check_trusted
from rlhf_jax.data import chat, encoding, formats, rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError, file_errors, logger
from rlhf_jax.evaluation import bench, data, measures, texts
from rlhf_jax.evaluation.bench import Answers, Bench, Policy
from rlhf_jax.evaluation.settings import Config
from rlhf_jax.generation import generator
from rlhf_jax.graders import spec
from rlhf_jax.models import hf
from rlhf_jax.report import records
from rlhf_jax.runs import devices, manifest, writing
from rlhf_jax.runs.reading import settings_file, settings_of
from rlhf_jax.training.common.setup import enable_compilation_cache
from rlhf_jax.training.supervised import scoring

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
)
# The kinds of the sets that are not prompts.
KINDS: dict[str, rows.Kind] = {"preferences": "pairs", "annotated": "annotated"}


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
    enable_compilation_cache()
    policy = bench.load(folder, config)
    _check_flags(policy, config)
    config = _with_own_reward_model(policy, config)
    logger.info(chat.describe(policy.template, policy.tokenizer, folder))
    sets, categories = _read(config, chat.template_of(policy.tokenizer, policy.template))
    # Those that each set has. Rows of given answers, which are scored too, have none.
    columns = [{name for row in read.rows for name in row.columns} for read in sets.values()]
    shared = set.intersection(*columns) if columns else set()
    opened = bench.open_bench(policy, config, shared)
    pairs = {}
    answers = {}
    for name, read in sets.items():
        if name in KINDS:
            pairs[name] = bench.encode_pairs(opened, read.rows)
        else:
            answers[name] = bench.sample(opened, policy, name, read.rows)
    left_out = _left_out(sets, {**answers, **pairs})
    if config.against is not None:
        theirs = bench.against(opened, config.against, sets["prompts"].rows)
        if theirs.rows != answers["prompts"].rows:
            raise UserError(
                f"--against {config.against}: it leaves out other prompts that are too long; "
                "shorten them"
            )
        answers["prompts, against"] = theirs
    figures = [*_figures(opened, sets, categories, answers, pairs), *_not_run(policy, config)]
    places = {name: place for place, name in enumerate(ORDER)}  # the user's own come after these
    figures.sort(key=lambda figure: places.get(figure.category.partition(":")[0], len(ORDER)))
    settings = {"run": policy.folder, **dataclasses.asdict(config)}
    del settings["output"], settings["device"]
    settings["template"] = policy.template
    settings["max_new_tokens"] = policy.max_new_tokens
    settings["stop"] = list(policy.stop)
    content = {
        "settings": settings,
        "fingerprints": _fingerprints(folder, config, sets, categories),
        "left_out": left_out,
        "rows": [figure._asdict() for figure in figures],
    }
    path = output / records.EVALUATION
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    samples = [
        json.dumps(sample, ensure_ascii=False) + "\n"
        for name, own in answers.items()
        for sample in _samples(name, own, policy.tokenizer)
    ]
    with file_errors(path, "written"):
        output.mkdir(parents=True, exist_ok=True)
        writing.write_together({output / SAMPLES: "".join(samples), path: f"{text}\n"})
    return Result(figures, path)


def _with_own_reward_model(policy: Policy, config: Config) -> Config:
    """The settings with the reward model that the run was trained with, if it had one, and only
    one reward, and the settings name none.

    Raises:
        UserError: a win rate is asked for, and nothing judges.
    """
    entries = settings_of(policy.folder).get("reward", [])
    if config.reward_model is None and len(entries) == 1 and not policy.is_judge:
        kind, names = spec.named(entries[0])
        models = map(Path, map(hf.model_folder, names))
        are_models = all(spec.members(model) or (model / hf.CONFIG).is_file() for model in models)
        if kind == "models" and are_models:
            if not config.trust_config:
                file = settings_file(policy.folder)
                check_trusted({"reward": (entries[0], str(file))}, file.parent)
            logger.info(f"reward model: {entries[0]}, the run's own; --reward-model takes another")
            config = dataclasses.replace(config, reward_model=entries[0])
    if config.against is not None and config.reward_model is None:
        raise UserError("--against: a win rate needs --reward-model, which judges")
    return config


def _output(folder: str, config: Config) -> Path:
    """The folder to write into.

    Raises:
        UserError: the folder is missing or cannot be written, or the settings name no data to
            evaluate by.
    """
    sets = (config.prompts, config.safety, config.preferences, config.annotated)
    if not any((*sets, config.categories)):
        raise UserError(
            "nothing to evaluate by: give --prompts, --safety, --preferences, --annotated or "
            "--categories"
        )
    if config.output is None and not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; for a model of the hub give --output FOLDER")
    output = Path(config.output or folder)
    writing.check_writable(output)
    return output


def _left_out(
    sets: Sets, encoded: Mapping[str, Answers | encoding.EncodedTexts]
) -> dict[str, dict[str, int]]:
    """{set: {reason: number of rows}} of the rows that were left out or cut; logs them."""
    left_out = {}
    for name, read in sets.items():
        reasons = read.dropped | encoded[name].counts
        if reasons:
            counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            logger.info(f"{name}: {counted}")
            left_out[name] = reasons
    return left_out


def _check_flags(policy: Policy, config: Config) -> None:
    """Refuses flags that ask a reward model for texts."""
    others = ("prompts", "safety", "categories", "against", "reward_model", "environment")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(config, name)]
    if policy.is_judge and given:
        raise UserError(
            f"{policy.folder}: this is a reward model, which writes no text: it is judged by "
            f"--preferences and --annotated, not by {', '.join(given)}; or give a policy, and this "
            "as its --reward-model"
        )


def _read(config: Config, template: chat.ChatTemplate) -> tuple[Sets, Categories]:
    """All data, and the user's own categories. They are read before anything is computed."""
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
    given |= {f"custom {name}": category.prompts for name, category in categories.items()}
    results = {
        name: read(KINDS.get(name, "prompts"), paths) for name, paths in given.items() if paths
    }
    for entry in config.columns:
        sentences = [result.unused_columns.get(entry) for result in results.values()]
        if sentences and all(sentences):
            raise UserError(str(sentences[0]))
    for name, category in categories.items():
        place = f"{config.categories}: {name}"
        prompts = [
            rows.Row(text, (), f"{place}, prompt {number}")
            for number, text in enumerate(category.texts, 1)
        ]
        if prompts:
            results[f"custom {name}"] = formats.ReadResult(prompts)
        elif not (category.prompts or config.prompts):
            raise UserError(f"{place} has no prompts of its own; add them or give --prompts")
    if config.safety:
        data.check_safety(results["safety"].rows)
    for name, result in results.items():
        logger.info(f"{name}: {result.describe()}")
    return results, categories


def _fingerprints(
    folder: str, config: Config, sets: Sets, categories: Categories
) -> dict[str, str]:
    """{name that the user gave: sha256} of every file and model that the evaluation reads."""
    fingerprints: dict[str, str] = {}
    for result in sets.values():
        fingerprints |= result.fingerprints
    models = filter(None, (folder, config.against, config.categories))
    paths = {name: Path(hf.model_folder(name)) for name in models}
    reward_model = config.reward_model and hf.model_folder(config.reward_model)
    scores = [category.score for category in categories.values()]
    for entry in filter(None, (config.environment, reward_model, *scores)):
        paths |= spec.sources(entry)
    return fingerprints | {
        name: manifest.fingerprint(path) for name, path in paths.items() if path.exists()
    }


# --- Figures


def _figures(
    opened: Bench,
    sets: Sets,
    categories: Categories,
    answers: Mapping[str, Answers],
    pairs: Encoded,
) -> Iterator[measures.Figure]:
    key = opened.key
    if "prompts" in answers:
        yield from _prompt_figures(answers["prompts"], key)
    if "safety" in answers:
        safety = answers["safety"]
        labels = [row.columns["label"] for row in safety.rows]
        yield from measures.harmlessness(safety.responses, labels, key)
    for name, encoded in pairs.items():
        yield from _pair_figures(opened, name, encoded, sets[name].rows)
    against = opened.config.against
    if against is not None:
        ours = np.asarray(answers["prompts"].responses.scores)
        theirs = np.asarray(answers["prompts, against"].responses.scores)
        yield from measures.win_rate(ours, against=theirs, key=key, name=against)
    for name, category in categories.items():
        own = answers.get(f"custom {name}") or answers["prompts"]
        if category.texts:
            yield from measures.helpfulness(own.responses, key, name)
        else:
            yield _category_figure(opened, name, category, own)


def _prompt_figures(answers: Answers, key: Array) -> Iterator[measures.Figure]:
    responses = answers.responses
    yield from measures.helpfulness(responses, key)
    answerable = [data.answerable(row) for row in answers.rows]
    yield from measures.uncertainty(responses, answerable, key)
    yield from measures.diversity(responses, key)
    for name, values in answers.talks.items():
        of_prompts = values.reshape(responses.lengths.shape)
        yield measures.mean("environment", name, of_prompts, key)


def _pair_figures(
    opened: Bench, name: str, encoded: encoding.EncodedTexts, read: Iterable[rows.Row]
) -> Iterable[measures.Figure]:
    """The figures of the set ``name``: preferences or annotated."""
    by_source = {row.source: row for row in read}
    given = [by_source[source] for source in encoded.sources]
    margins = bench.margins(opened, encoded)
    if name == "annotated":
        return measures.agreement(margins, given, opened.key)
    _, _, pairs = scoring.pairs_of(encoded, np.arange(len(encoded)))
    parts = [row.category for row in given]
    return measures.preferences(margins, pairs, parts, opened.key)


def _category_figure(
    opened: Bench, name: str, category: data.CustomCategory, own: Answers
) -> measures.Figure:
    """The figure of a category of the user's own."""
    config = opened.config
    scores = None
    if category.score is not None:
        flag = f"{config.categories}: {name}.score"
        judge = bench.reward_of(category.score, opened.policy, own.columns, flag, config)
        by_row = bench.score(judge, own.rollout, own.columns, config.batch_size)
        scores = by_row.reshape(own.responses.lengths.shape)
    return measures.custom(name, category, own.responses._replace(scores=scores), opened.key)


def _not_run(policy: Policy, config: Config) -> list[measures.Figure]:
    """A figure without a value for each setting that is not given."""
    given = dataclasses.asdict(config)
    given["judge"] = config.reward_model or policy.is_judge or not config.preferences
    figures = []
    table = yaml.safe_load(Path(__file__).with_name("not_run.yaml").read_text("utf-8"))
    for setting, category, metric, flag in table:
        of_judges = category in ("preferences", "agreement")
        if not given[setting] and (of_judges or not policy.is_judge):
            figures.append(measures.Figure(category, metric, note=f"not run: give {flag}"))
    return figures


# --- Samples


def _samples(name: str, answers: Answers, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """A row of evaluation_samples.jsonl for each response, with judgements by word patterns."""
    responses = answers.responses
    shown = generator.responses(answers.rollout, tokenizer, with_replies=True)
    places = np.ndindex(responses.lengths.shape)
    for (i, j), response in zip(places, shown, strict=True):
        text = responses.texts[i][j]
        sample: dict[str, Any] = {
            "set": name,
            "source": answers.rows[i].source,
            "prompt": responses.prompts[i],
            "response": response,
            "refusal": texts.is_refusal(text),
            "uncertainty": texts.expresses_uncertainty(text),
        }
        if responses.scores is not None:
            score = float(responses.scores[i, j])
            sample["score"] = None if np.isnan(score) else score
        yield sample
