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
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config import check_trusted, recorded
from rlhf_jax.data import chat, encoding
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError, file_errors, is_hub_name, logger, no_folder
from rlhf_jax.evaluation import bench, data, measures, texts
from rlhf_jax.evaluation.bench import Answers, Bench, Policy
from rlhf_jax.evaluation.settings import Config
from rlhf_jax.generation import generator
from rlhf_jax.graders import spec
from rlhf_jax.models import hf
from rlhf_jax.report import records
from rlhf_jax.runs import devices, manifest, writing
from rlhf_jax.runs.reading import settings_file
from rlhf_jax.training.common.setup import enable_compilation_cache
from rlhf_jax.training.supervised import scoring

SAMPLES = "evaluation_samples.jsonl"
# The categories in the order of the page; the user's own come after these.
ORDER = (
    "helpfulness",
    "harmlessness",
    "honesty",
    "preferences",
    "agreement",
    "diversity",
    "win rate",
)
# What is listed without a value where nothing was given for it: setting, category, metric, flag.
NEEDS = (
    ("prompts", "helpfulness", "all", "--prompts FILE"),
    ("reward_model", "helpfulness", "quality", "--reward-model FOLDER"),
    ("safety", "harmlessness", "all", "--safety FILE"),
    ("prompts", "honesty", "uncertainty", "--prompts FILE"),
    ("preferences", "honesty", "calibration", "--preferences FILE"),
    ("preferences", "preferences", "all", "--preferences FILE"),
    ("judge", "preferences", "reward_model", "--reward-model FOLDER"),
    ("annotated", "agreement", "all", "--annotated FILE"),
    ("prompts", "diversity", "all", "--prompts FILE"),
    ("against", "win rate", "all", "--against RUN with --reward-model and --prompts"),
    ("categories", "custom", "all", "--categories FILE.yaml"),
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
    files = (config.prompts, config.safety, config.preferences, config.annotated)
    if not any((*files, config.categories)):
        raise UserError(
            "nothing to evaluate by: give --prompts, --safety, --preferences, --annotated or "
            "--categories"
        )
    if config.output is None and not Path(folder).is_dir():
        if not is_hub_name(folder):
            raise no_folder(folder)
        raise UserError(f"{folder}: no such folder; for a model of the hub give --output FOLDER")
    output = Path(config.output or folder)
    writing.check_writable(output)
    devices.choose(config.device)
    enable_compilation_cache()
    policy = bench.load(folder, config)
    config = _with_judge(policy, config)
    logger.info(chat.describe(policy.template, policy.tokenizer, folder))
    sets, categories = data.read(config, chat.template_of(policy.tokenizer, policy.template))
    # Those that each set has. Rows of given answers, which are scored too, have none.
    columns = [{name for row in read.rows for name in row.columns} for read in sets.values()]
    in_all = set.intersection(*columns) if columns else set()
    scores = [custom.score for custom in categories.values() if custom.score]
    opened = bench.open_bench(policy, config, in_all, scores)
    pairs = {}
    answers = {}
    left_out = {}
    for name, read in sets.items():
        encoded: Answers | encoding.EncodedTexts
        if name in data.KINDS:
            encoded = pairs[name] = bench.encode_pairs(opened, read.rows)
        else:
            encoded = answers[name] = bench.sample(opened, policy, name, read.rows)
        reasons = read.dropped | encoded.counts
        if reasons:
            counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            logger.info(f"{name}: {counted}")
            left_out[name] = reasons
    if config.against is not None:
        theirs = bench.against(opened, config.against, sets["prompts"].rows)
        if theirs.rows != answers["prompts"].rows:
            raise UserError(
                f"--against {config.against}: it leaves out other prompts that are too long; "
                "shorten them"
            )
        answers["prompts, against"] = theirs
    figures = [*_figures(opened, sets, categories, answers, pairs)]
    given = dataclasses.asdict(config)
    given["judge"] = config.reward_model or policy.is_judge or not config.preferences
    for setting, category, metric, flag in NEEDS:
        of_judges = category in ("preferences", "agreement")
        if not given[setting] and (of_judges or not policy.is_judge):
            figures.append(measures.Figure(category, metric, note=f"not run: give {flag}"))
    places = {name: place for place, name in enumerate(ORDER)}
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


def _with_judge(policy: Policy, config: Config) -> Config:
    """The settings; if they name no reward model, with the run's own, if it had no other reward."""
    others = ("prompts", "safety", "categories", "against", "reward_model", "environment")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(config, name)]
    if policy.is_judge and given:
        raise UserError(
            f"{policy.folder}: this is a reward model, which writes no text: it is judged by "
            f"--preferences and --annotated, not by {', '.join(given)}; or give a policy, and this "
            "as its --reward-model"
        )
    entries = recorded(policy.folder).get("reward", [])
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


def _fingerprints(
    folder: str, config: Config, sets: data.Sets, categories: data.Categories
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


def _figures(
    opened: Bench,
    sets: data.Sets,
    categories: data.Categories,
    answers: Mapping[str, Answers],
    pairs: Mapping[str, encoding.EncodedTexts],
) -> Iterator[measures.Figure]:
    """The figures of each set."""
    config = opened.config
    if "prompts" in answers:
        own = answers["prompts"]
        known = {True: "answerable", False: "unanswerable", None: ""}
        labels = [known[data.answerable(row)] for row in own.rows]
        said = own.responses._replace(labels=labels)
        for category in ("helpfulness", "honesty", "diversity"):
            yield from measures.of_responses(said, category)
        for name, values in own.talks.items():
            yield measures.mean("environment", name, values.reshape(said.lengths.shape))
    if "safety" in answers:
        labels = [row.columns["label"] for row in answers["safety"].rows]
        said = answers["safety"].responses._replace(labels=labels)
        yield from measures.of_responses(said, "harmlessness")
    for name, encoded in pairs.items():
        by_source = {row.source: row for row in sets[name].rows}
        rows = [by_source[source] for source in encoded.sources]
        margins = bench.margins(opened, encoded)
        if name == "annotated":
            yield from measures.agreement(margins, rows, opened.key)
        else:
            _, _, of_rows = scoring.pairs_of(encoded, np.arange(len(encoded)))
            parts = [row.category for row in rows]
            yield from measures.preferences(margins, of_rows, parts)
    if config.against is not None:
        scores = answers["prompts, against"].responses.scores
        said = answers["prompts"].responses._replace(against=scores)
        note = f"against {config.against}"
        yield from measures.of_responses(said, "win rate", note=note)
    for name, custom in categories.items():
        own = answers.get(f"custom {name}") or answers["prompts"]
        if custom.texts:
            yield from measures.of_responses(own.responses, "helpfulness", name=name)
        elif custom.score is not None:
            flag = f"{config.categories}: {name}.score"
            asked = (custom.score, opened.policy, own.columns, flag, config, opened.positions)
            judge = bench.reward_of(*asked)
            by_row = bench.score(judge, own.rollout, own.columns, config.batch_size)
            values = by_row.reshape(own.responses.lengths.shape)
            yield measures.mean(name, "score", values, note=custom.score)
        else:
            metric = "patterns" if custom.patterns else "keywords"
            found = [
                [custom.pattern.search(text) is not None for text in row]
                for row in own.responses.texts
            ]
            yield measures.mean(name, metric, found)


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
