"""What a finished run can do: helpfulness, harmlessness, honesty, preferences, diversity, against another run.

    result = evaluate.run("runs/ppo", evaluate.Config(prompts=("heldout.json",), reward_model="runs/rm"))
    print(result.value("helpfulness", "quality"))

The run's folder gets ``evaluation.json`` with every figure, its 95% interval and n, and ``evaluation_samples.jsonl``
with every response. Both are functions of the models, the data, the settings and the seed.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import chat, encoding, formats, rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import data, measures, texts
from rlhf_jax.evaluation.measures import Figure
from rlhf_jax.evaluation.policy import (
    Answers,
    Bench,
    Config,
    check_template,
    encode_pairs,
    load,
    margins,
    model_folder,
    open_bench,
    reward_of,
    sample,
    score,
)
from rlhf_jax.report import records
from rlhf_jax.rewards import spec
from rlhf_jax.runs import devices, manifest
from rlhf_jax.runs.folder import write_atomically
from rlhf_jax.training import stage

__all__ = ["Config", "Result", "run"]

SAMPLES = "evaluation_samples.jsonl"
ORDER = ("helpfulness", "harmlessness", "honesty", "preferences", "agreement", "diversity", "win rate")  # then others
GIVEN = ("preferences", "annotated")  # data with answers; the other sets are prompts


class Result(NamedTuple):
    """The figures, and the file that holds them."""

    rows: list[Figure]
    path: Path

    def value(self, category: str, metric: str) -> float | None:
        """A figure; None if it could not be measured. Raises KeyError if there is none of that name."""
        return {(row.category, row.metric): row.value for row in self.rows}[category, metric]


def run(folder: str | Path, config: Config) -> Result:
    """Evaluates the policy in a run's or model's folder and writes ``evaluation.json`` into it.

    Raises:
        UserError: nothing to evaluate by, or whatever is wrong with a folder, a file or a row.
    """
    folder = str(folder)
    if not any((config.prompts, config.safety, config.preferences, config.annotated, config.categories)):
        raise UserError("nothing to evaluate by: give --prompts, --safety, --preferences, --annotated or --categories")
    output = Path(folder if config.output is None else config.output)
    if config.output is None and not output.is_dir():
        raise UserError(f"{folder}: no such folder; for a model of the hub give --output FOLDER")
    devices.choose(config.device)
    stage.enable_compilation_cache()
    policy = load(folder, config)
    sets = _read(config, policy.tokenizer)
    bench = open_bench(policy, config)
    answers = {name: sample(bench, policy, name, read.rows) for name, read in sets.results.items() if name not in GIVEN}
    pairs = {name: encode_pairs(bench, rows) for name, rows in sets.pairs().items()}
    cut = {name: given.counts for name, given in answers.items()} | {
        name: given.counts for name, given in pairs.items()
    }
    left_out = {name: read.dropped | cut[name] for name, read in sets.results.items() if read.dropped or cut[name]}
    for name, reasons in left_out.items():
        print(f"{name}: {', '.join(f'{count} {reason}' for reason, count in reasons.items())}", flush=True)
    if config.against is not None:
        answers["prompts, against"] = _against(bench, config.against, sets.results["prompts"].rows)
        if answers["prompts, against"].rows != answers["prompts"].rows:
            raise UserError(f"--against {config.against}: it leaves out other prompts that are too long; shorten them")
    figures = [*_figures(bench, sets, answers, pairs), *_not_run(config)]
    place = {category: i for i, category in enumerate(ORDER)}
    figures.sort(key=lambda figure: place.get(figure.category.partition(":")[0], len(place)))
    settings = {"run": folder, **dataclasses.asdict(config)}
    settings |= {"template": policy.template, "max_new_tokens": policy.max_new_tokens}
    content = {
        "settings": {name: value for name, value in settings.items() if name not in ("output", "device")},
        "fingerprints": _fingerprints(folder, config, sets),
        "left_out": left_out,
        "rows": [figure._asdict() for figure in figures],
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / records.EVALUATION
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for name in answers for line in _samples(name, answers[name])]
    write_atomically(output / SAMPLES, "".join(lines))
    return Result(figures, path)


class _Sets(NamedTuple):
    """All data, read before anything is computed."""

    results: dict[str, formats.ReadResult[Any]]  # prompts, safety, preferences, annotated, custom NAME
    parts: dict[str, str]  # {source: category} of preferences
    categories: dict[str, data.CustomCategory]

    def pairs(self) -> dict[str, list[rows.Pair]]:
        """The pairs of the sets that have answers."""
        pairs = {name: self.results[name].rows for name in GIVEN if name in self.results}
        return {name: [getattr(row, "pair", row) for row in some] for name, some in pairs.items()}


def _read(config: Config, tokenizer: Tokenizer) -> _Sets:
    template, parts = chat.template_of(tokenizer), dict[str, str]()
    categories = data.read_categories(config.categories) if config.categories else {}
    results: dict[str, formats.ReadResult[Any]] = {}
    if config.prompts:
        results["prompts"] = formats.read("prompts", config.prompts, template=template)
    if config.safety:
        results["safety"] = data.read_safety(config.safety, template)
    if config.preferences:
        results["preferences"], parts = data.read_preferences(config.preferences, template)
    if config.annotated:
        results["annotated"] = data.read_annotated(config.annotated)
    for name, category in categories.items():
        if category.prompts:
            results[f"custom {name}"] = formats.read("prompts", category.prompts, template=template)
        elif not config.prompts:
            raise UserError(f"{config.categories}: {name} has no prompts of its own; add them or give --prompts")
    for name, result in results.items():
        print(f"{name}: {result.describe()}", flush=True)
    return _Sets(results, parts, categories)


def _fingerprints(folder: str, config: Config, sets: _Sets) -> dict[str, str]:
    """sha256 of every file and model that is read, by the name that the user gave it."""
    paths = {name: Path(model_folder(name)) for name in (folder, config.against) if name is not None}
    judges = [config.reward_model and model_folder(config.reward_model)]
    for entry in filter(None, [*judges, *(category.score for category in sets.categories.values())]):
        paths |= spec.sources(entry)
    if config.categories is not None:
        paths[config.categories] = Path(config.categories)
    of_data = {path: digest for result in sets.results.values() for path, digest in result.fingerprints.items()}
    return of_data | {name: manifest.fingerprint(path) for name, path in paths.items() if path.exists()}


def _against(bench: Bench, folder: str, prompts: Sequence[rows.Prompt]) -> Answers:
    """The responses of the run of ``--against`` to the same prompts."""
    other = load(folder, bench.config)
    check_template(bench.policy, folder, bench.config)
    if other.tokenizer.fingerprint != bench.policy.tokenizer.fingerprint:
        raise UserError(f"--against {folder}: its tokenizer is another one, which the reward model cannot read")
    return sample(bench, other._replace(max_new_tokens=bench.policy.max_new_tokens), "prompts", prompts)


def _figures(
    bench: Bench,
    sets: _Sets,
    answers: Mapping[str, Answers],
    pairs: Mapping[str, encoding.EncodedComparisons],
) -> Iterable[Figure]:
    key = bench.key
    if "prompts" in answers:
        responses = answers["prompts"].responses
        yield from measures.helpfulness(responses, key)
        yield from measures.uncertainty(responses, list(map(data.answerable, answers["prompts"].rows)), key)
        yield from measures.diversity(responses, key)
    if "safety" in answers:
        labels = [row.columns["label"] for row in answers["safety"].rows]
        yield from measures.harmlessness(answers["safety"].responses, labels, key)
    if "preferences" in pairs:
        yield from _preferences(bench, pairs["preferences"], sets.parts)
    if "annotated" in pairs:
        by_source = {row.pair.source: row for row in sets.results["annotated"].rows}
        kept = [by_source[source] for source in pairs["annotated"].chosen.sources]
        yield from measures.agreement(margins(bench, pairs["annotated"]), kept, key)
    if bench.config.against is not None:
        ours, theirs = (np.asarray(answers[name].responses.scores) for name in ("prompts", "prompts, against"))
        yield from measures.win_rate(ours, theirs, key, bench.config.against)
    for name, category in sets.categories.items():
        own = answers.get(f"custom {name}") or answers["prompts"]
        responses = own.responses._replace(scores=None)
        if category.score is not None:
            where = f"{bench.config.categories}: {name}.score "
            judge = reward_of(category.score, bench.policy.tokenizer, own.columns, where)
            scores = score(judge, own.rollout, own.columns, bench.config.batch_size)
            responses = responses._replace(scores=scores.reshape(responses.lengths.shape))
        yield measures.custom(name, category, responses, key)


def _preferences(bench: Bench, encoded: encoding.EncodedComparisons, parts: Mapping[str, str]) -> Iterable[Figure]:
    """Of all pairs, and of those of each category."""
    differences, sources = margins(bench, encoded), np.array(encoded.chosen.sources)
    weights = np.ones(len(encoded)) if encoded.weight is None else encoded.weight.astype(np.float64)
    yield from measures.preferences(differences, weights, sources, bench.key)
    named = np.array([parts.get(source, "") for source in sources])
    for name in sorted(set(named.tolist()) - {""}):
        chosen = named == name
        own = {judge: margin[chosen] for judge, margin in differences.items()}
        yield from measures.preferences(own, weights[chosen], sources[chosen], bench.key, name)


def _not_run(config: Config) -> list[Figure]:
    """A row without a value for what nothing was given for."""
    pairs, judge, no_judge = config.preferences, config.reward_model, "--reward-model FOLDER"
    wanted = [
        (config.prompts, "helpfulness", "all", "--prompts FILE"),
        (judge, "helpfulness", "quality", no_judge),
        (config.safety, "harmlessness", "all", "--safety FILE"),
        (config.prompts, "honesty", "uncertainty", "--prompts FILE"),
        (pairs, "honesty", "calibration", "--preferences FILE"),
        (pairs, "preferences", "all", "--preferences FILE"),
        (judge or not pairs, "preferences", "reward_model", no_judge),
        (config.annotated, "agreement", "all", "--annotated FILE"),
        (config.prompts, "diversity", "all", "--prompts FILE"),
        (config.against, "win rate", "all", "--against RUN with --reward-model and --prompts"),
        (config.categories, "custom", "all", "--categories FILE.yaml"),
    ]
    return [
        Figure(category, metric, None, None, None, 0, "", f"not run: give {flag}")
        for given, category, metric, flag in wanted
        if not given
    ]


def _samples(name: str, answers: Answers) -> Iterable[dict[str, Any]]:
    """A line for each response: prompt, response, and the judgements by word patterns."""
    scores = answers.responses.scores
    for i, (row, responses) in enumerate(zip(answers.rows, answers.responses.texts, strict=True)):
        for j, text in enumerate(responses):
            line = {"set": name, "source": row.source, "prompt": answers.responses.prompts[i], "response": text}
            judged = {"refusal": texts.is_refusal(text), "uncertainty": texts.expresses_uncertainty(text)}
            score = {} if scores is None else {"score": None if np.isnan(scores[i, j]) else float(scores[i, j])}
            yield line | judged | score
