"""What a finished run can do: helpfulness, harmlessness, honesty, preferences, diversity, against another run.

    result = evaluate.run("runs/ppo", evaluate.Config(prompts=("heldout.json",), reward_model="runs/rm"))
    print(result.value("helpfulness", "quality"))

The run's folder gets ``evaluation.json`` with every figure, its 95% interval and n, and ``evaluation_samples.jsonl``
with every response. Both are functions of the models, the data, the settings and the seed.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config import Compute
from rlhf_jax.data import chat, encoding, formats, rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import bench as evaluation_bench
from rlhf_jax.evaluation import data as evaluation_rows
from rlhf_jax.evaluation.bench import Bench, Config, Said
from rlhf_jax.evaluation.data import Row, not_run
from rlhf_jax.evaluation.texts import expresses_uncertainty, is_refusal
from rlhf_jax.report import records
from rlhf_jax.runs import devices, manifest
from rlhf_jax.runs import folder as runs
from rlhf_jax.training import bench as benchmarks
from rlhf_jax.training import reward_functions, setup

__all__ = ["Config", "Result", "run"]

SAMPLES = "evaluation_samples.jsonl"
ORDER = ("helpfulness", "harmlessness", "honesty", "preferences", "agreement", "diversity", "win rate")  # others behind


class Result(NamedTuple):
    """The figures, and the file that holds them."""

    rows: list[Row]
    path: Path

    def value(self, category: str, metric: str) -> float | None:
        """A figure; None where it could not be had. Raises KeyError where there is none of that name."""
        found = {(row.category, row.metric): row.value for row in self.rows}
        return found[category, metric]


def run(folder: str | Path, config: Config) -> Result:
    """Evaluates the policy in a run's or model's folder and writes ``evaluation.json`` into it.

    Raises:
        UserError: nothing to evaluate by, or whatever is wrong with a folder, a file or a row.
    """
    folder = str(folder)
    evaluation_bench.check(config)
    output = Path(folder if config.output is None else config.output)
    if config.output is None and not output.is_dir():
        raise UserError(f"{folder}: no such folder; for a model of the hub give --output FOLDER")
    devices.choose(config.device)
    setup.enable_compilation_cache()
    policy = evaluation_bench.load(folder, config)
    data = _read(config, policy.tokenizer)
    found = _evaluate(evaluation_bench.open_bench(policy, config), data)
    resolved = {"template": policy.template, "max_new_tokens": policy.max_new_tokens}
    settings = {"run": folder, **dataclasses.asdict(config), **resolved}
    content = {
        "settings": {name: value for name, value in settings.items() if name not in ("output", "device")},
        "fingerprints": _fingerprints(folder, config, data),
        "left_out": found.counts,
        "rows": [row._asdict() for row in found.rows],
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / records.EVALUATION
    runs.write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in found.samples]
    runs.write_atomically(output / SAMPLES, "".join(lines))
    return Result(found.rows, path)


def _fingerprints(folder: str, config: Config, data: "_Data") -> dict[str, str]:
    """sha256 of every file and model that is read, by the name that the user gave it."""
    paths = {name: Path(evaluation_bench.model_folder(name)) for name in (folder, config.against) if name is not None}
    scores = [category.score for category in data.categories.values()]
    for spec in (config.reward_model and evaluation_bench.model_folder(config.reward_model), *scores):
        paths |= reward_functions.sources(spec) if spec else {}
    if config.categories is not None:
        paths[config.categories] = Path(config.categories)
    return data.fingerprints | {name: manifest.fingerprint(path) for name, path in paths.items() if path.exists()}


class _Data(NamedTuple):
    """All rows, read before anything is computed."""

    prompts: list[rows.Prompt]
    safety: list[rows.Prompt]
    preferences: list[rows.Pair]
    parts: dict[str, str]  # {source: category} of preferences
    annotated: list[benchmarks.Annotated]
    categories: dict[str, benchmarks.CustomCategory]
    custom: dict[str, list[rows.Prompt]]  # of the categories that have their own
    dropped: dict[str, dict[str, int]]
    fingerprints: dict[str, str]


def _read(config: Config, tokenizer: Tokenizer) -> _Data:
    template = chat.template_of(tokenizer)
    categories = benchmarks.read_categories(config.categories) if config.categories else {}
    for name, category in categories.items():
        if not category.prompts and not config.prompts:
            raise UserError(f"{config.categories}: {name} has no prompts of its own; add them or give --prompts")
    results: dict[str, formats.ReadResult[Any]] = {}
    parts: dict[str, str] = {}
    if config.prompts:
        results["prompts"] = formats.read("prompts", config.prompts, template=template)
    if config.safety:
        results["safety"] = benchmarks.read_safety(config.safety, template)
    if config.preferences:
        results["preferences"], parts = benchmarks.read_preferences(config.preferences, template)
    if config.annotated:
        results["annotated"] = benchmarks.read_annotated(config.annotated)
    own = {f"custom {name}": category.prompts for name, category in categories.items() if category.prompts}
    results |= {name: formats.read("prompts", paths, template=template) for name, paths in own.items()}
    for name, result in results.items():
        print(f"{name}: {result.describe()}", flush=True)
    read = {name: result.rows for name, result in results.items()}
    return _Data(
        **{name: read.get(name, []) for name in ("prompts", "safety", "preferences", "annotated")},
        parts=parts,
        categories=categories,
        custom={name.removeprefix("custom "): read[name] for name in own},
        dropped={name: result.dropped for name, result in results.items() if result.dropped},
        fingerprints={path: digest for result in results.values() for path, digest in result.fingerprints.items()},
    )


class _Found(NamedTuple):
    rows: list[Row]
    counts: dict[str, dict[str, int]]  # {data: {why rows were left out or texts cut: how many}}
    samples: list[dict[str, Any]]


def _evaluate(bench: Bench, data: _Data) -> _Found:
    config, key = bench.config, bench.key
    place = {category: i for i, category in enumerate(ORDER)}
    prompt_sets = {"prompts": data.prompts, "safety": data.safety}
    prompt_sets |= {f"custom {name}": some for name, some in data.custom.items()}
    said = {
        name: evaluation_bench.sample(bench, bench.policy, name, some) for name, some in prompt_sets.items() if some
    }
    found: list[Row] = []
    if "prompts" in said:
        responses, answerable = said["prompts"].responses, list(map(benchmarks.answerable, said["prompts"].rows))
        found += evaluation_rows.helpfulness(responses, key)
        found += evaluation_rows.uncertainty(responses, answerable, key)
        found += evaluation_rows.diversity(responses, key)
    else:
        places = (("helpfulness", "all"), ("honesty", "uncertainty"), ("diversity", "all"))
        found += [not_run(category, metric, "--prompts FILE") for category, metric in places]
    if bench.reward is None:
        found.append(not_run("helpfulness", "quality", "--reward-model FOLDER"))
    if "safety" in said:
        labels = [row.columns["label"] for row in said["safety"].rows]
        found += evaluation_rows.harmlessness(said["safety"].responses, labels, key)
    else:
        found.append(not_run("harmlessness", "all", "--safety FILE"))
    left_out = data.dropped | {name: data.dropped.get(name, {}) | some.counts for name, some in said.items()}
    if data.preferences:
        encoded = evaluation_bench.encode(bench, data.preferences)
        left_out["preferences"] = data.dropped.get("preferences", {}) | encoded.counts
        found += _preferences(bench, encoded, data.parts)
    else:
        found.append(not_run("preferences", "all", "--preferences FILE"))
        found.append(not_run("honesty", "calibration", "--preferences FILE"))
    if data.annotated:
        encoded = evaluation_bench.encode(bench, [row.pair for row in data.annotated])
        left_out["annotated"] = encoded.counts
        by_source = {row.pair.source: row for row in data.annotated}
        kept = [by_source[source] for source in encoded.chosen.sources]
        found += evaluation_rows.agreement(evaluation_bench.margins(bench, encoded), kept, key)
    else:
        found.append(not_run("agreement", "all", "--annotated FILE"))
    if config.against is not None:
        other = evaluation_bench.load(config.against, config)
        evaluation_bench.same_template(bench.policy, config.against, config)
        if other.tokenizer.fingerprint != bench.policy.tokenizer.fingerprint:
            raise UserError(
                f"--against {config.against}: its tokenizer is another one, which the reward model cannot read"
            )
        theirs = evaluation_bench.sample(
            bench, other._replace(max_new_tokens=bench.policy.max_new_tokens), "prompts", data.prompts
        )
        if theirs.rows != said["prompts"].rows:
            raise UserError(f"--against {config.against}: it leaves out other prompts that are too long; shorten them")
        said["prompts, against"] = theirs
        scores = said["prompts"].responses.scores, theirs.responses.scores
        found += evaluation_rows.win_rate(*scores, key, config.against)  # type: ignore[arg-type]
    else:
        found.append(not_run("win rate", "all", "--against RUN with --reward-model and --prompts"))
    for name, category in data.categories.items():
        some = said.get(f"custom {name}", said.get("prompts"))
        assert some is not None
        responses = some.responses._replace(scores=None)
        if category.score is not None:
            try:
                judge = reward_functions.build((category.score,), bench.policy.tokenizer, Compute(), some.columns)
            except UserError as error:
                where = f"{config.categories}: {name}.score "
                raise UserError(str(error).replace("--reward ", where, 1)) from None
            given = evaluation_bench.score(judge, some.rollout, some.columns, config.batch_size)
            responses = responses._replace(scores=given.reshape(some.responses.lengths.shape))
        found.append(evaluation_rows.custom(name, category, responses, key))
    if not data.categories:
        found.append(not_run("custom", "all", "--categories FILE.yaml"))
    found.sort(key=lambda row: place.get(row.category.partition(":")[0], len(place)))
    left_out = {name: counts for name, counts in left_out.items() if counts}
    for name, reasons in left_out.items():
        print(f"{name}: {', '.join(f'{count} {reason}' for reason, count in reasons.items())}", flush=True)
    return _Found(found, left_out, [line for name, some in said.items() for line in _samples(name, some)])


def _preferences(bench: Bench, encoded: encoding.EncodedComparisons, parts: Mapping[str, str]) -> Iterable[Row]:
    margins, sources = evaluation_bench.margins(bench, encoded), encoded.chosen.sources
    weights = np.ones(len(encoded)) if encoded.weight is None else encoded.weight.astype(np.float64)
    yield from evaluation_rows.preferences(margins, weights, sources, bench.key)
    if bench.reward is None:
        yield not_run("preferences", "reward_model", "--reward-model FOLDER")
    named = np.array([parts.get(source, "") for source in sources])
    for name in sorted(set(parts.values())):
        chosen = named == name
        if chosen.any():
            some = {judge: margin[chosen] for judge, margin in margins.items()}
            kept = [source for source, keep in zip(sources, chosen, strict=True) if keep]
            yield from evaluation_rows.preferences(some, weights[chosen], kept, bench.key, name)


def _samples(name: str, said: Said) -> Iterable[dict[str, Any]]:
    """A line for each response: what was asked and said, and the judgements by word patterns."""
    scores = said.responses.scores
    for i, (row, texts) in enumerate(zip(said.rows, said.responses.texts, strict=True)):
        for j, text in enumerate(texts):
            line = {"set": name, "source": row.source, "prompt": said.responses.prompts[i], "response": text}
            judged = {"refusal": is_refusal(text), "uncertainty": expresses_uncertainty(text)}
            score = {} if scores is None else {"score": None if np.isnan(scores[i, j]) else float(scores[i, j])}
            yield line | judged | score
