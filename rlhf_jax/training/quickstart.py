"""The quickstart: the whole pipeline on the generated demo corpus, judged by a rubric that training never sees."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.table

from rlhf_jax import generator, metrics, models, sampling
from rlhf_jax.config import RunConfig
from rlhf_jax.data import demo, encoding, formats, rows, rubric
from rlhf_jax.errors import UserError
from rlhf_jax.report import figures, html, plots, records
from rlhf_jax.runs import folder as runs
from rlhf_jax.training import pipeline, setup
from rlhf_jax.training.reward_model import evaluate, pair_scorer
from rlhf_jax.training.stage import start

LAST_ITERATIONS = 10
MIN_ACCURACY, MIN_WIN_RATE, KL_BAND, MIN_KL_COEF_CHANGE = 0.85, 0.75, 1.5, 1.1


@dataclasses.dataclass(frozen=True)
class QuickstartConfig(RunConfig):
    """The pipeline's settings and the negative control."""

    shuffle_labels: bool = False
    """Choose the preferred answer of every pair by coin flip: the gates must then fail."""


class QuickstartResult(NamedTuple):
    """The summary that was written, and whether every gate was passed."""

    folder: Path
    summary: dict[str, Any]
    passed: bool


class Answers(NamedTuple):
    """Greedy responses to the held-out prompts, with the rubric's scores [N]."""

    texts: list[str]
    scores: np.ndarray
    rollout: Any


def run(config: QuickstartConfig) -> QuickstartResult:
    """Writes ``data/``, the stages' runs, ``model/``, ``summary.json`` and ``report.html``; prints a table.

    Raises:
        UserError: the folder is used, data is given, or a setting does not fit.
    """
    if config.data:
        raise UserError("--data: the quickstart generates its own data; for yours use experiments/pipeline.py")
    if config.reward_model.ensemble_size > 1:
        raise UserError(
            "reward_model.ensemble_size: the quickstart judges one reward model; use experiments/pipeline.py"
        )
    folder = Path(config.output_dir or "runs/quickstart")
    pipeline.check_folder(folder, config)
    data = folder / "data"
    start(config)
    demo.write(data, seed=config.seed, shuffle_labels=config.shuffle_labels)
    result = pipeline.run_stages(dataclasses.replace(config, data=(str(data),)), folder)
    prompts = formats.read("prompts", data / "heldout_prompts.json").rows
    sft_answers = _answers(str(result.sft.model_folder), prompts, config)
    ppo_answers = _answers(str(result.ppo.model_folder), prompts, config)
    summary = _summary(config, result, data, prompts, sft_answers, ppo_answers)
    runs.write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    shutil.copytree(result.ppo.model_folder, folder / "model", dirs_exist_ok=True)
    _report(folder, summary, prompts, sft_answers, ppo_answers)
    _print(prompts, sft_answers, ppo_answers, summary)
    return QuickstartResult(folder, summary, all(summary["gates"].values()))


def _answers(model_folder: str, prompts: list[rows.Prompt], config: RunConfig) -> Answers:
    model, params, tokenizer = setup.load_language_model(model_folder, config.compute)
    encoded = encoding.encode_prompts(prompts, tokenizer, template=config.text.template)
    greedy = sampling.SamplingConfig(
        max_new_tokens=config.rl.max_new_tokens, temperature=0.0, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
    key = setup.stream(config.seed, "quickstart", "eval")
    rollout = generator.generate(model, params, encoded.tokens, encoded.attention_mask, key, greedy)
    texts = generator.responses(rollout, tokenizer)
    scores = [rubric.score(row.columns, text) for row, text in zip(prompts, texts, strict=True)]
    return Answers(texts, np.array(scores), rollout)


def _summary(
    config: QuickstartConfig,
    result: pipeline.PipelineResult,
    data: Path,
    prompts: list[rows.Prompt],
    sft_answers: Answers,
    ppo_answers: Answers,
) -> dict[str, Any]:
    model, params, tokenizer = setup.load_language_model(str(result.reward_model.model_folder), config.compute)
    pairs = encoding.encode_pairs(
        formats.read("pairs", data / "heldout_preference_data.json").rows, tokenizer, template=config.text.template
    )
    preference = evaluate(
        pair_scorer(model),
        params,
        pairs,
        np.arange(len(pairs)),
        batch_size=config.reward_model.batch_size,
        bucket_multiple=config.text.bucket_multiple,
    )
    rollout = ppo_answers.rollout
    learned = np.asarray(jax.jit(models.score_fn(model))(params, rollout.tokens, rollout.attention_mask, None))
    rows = [json.loads(line) for line in (result.ppo.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    kls = [row["objective/kl"] for row in rows if "objective/kl" in row]
    coefs = [row["kl/coef"] for row in rows if "kl/coef" in row]
    last, target = kls[-LAST_ITERATIONS:], config.rl.kl_target or 0.0
    win_rate = metrics.win_rate(ppo_answers.scores, sft_answers.scores)
    rounded = functools.partial(round, ndigits=6)
    return {
        "seed": config.seed,
        "shuffled_labels": config.shuffle_labels,
        "heldout_prompts": len(prompts),
        "reward_model": {name: rounded(value) for name, value in preference.items()},
        "rubric": {"sft": rounded(float(sft_answers.scores.mean())), "ppo": rounded(float(ppo_answers.scores.mean()))},
        "win_rate": rounded(win_rate),
        "kl": {"target": target, "last_iterations": [rounded(kl) for kl in last]},
        "kl_coef": {
            "first": rounded(coefs[0]),
            "last": rounded(coefs[-1]),
            "lowest": rounded(min(coefs)),
            "highest": rounded(max(coefs)),
        },
        "score_length_correlation": rounded(metrics.spearman(learned, rollout.response_mask.sum(axis=1))),
        "gates": {
            "reward_model_accuracy": preference["accuracy"] >= MIN_ACCURACY,
            "ppo_beats_sft": win_rate >= MIN_WIN_RATE,
            "kl_in_band": all(target / KL_BAND <= kl <= target * KL_BAND for kl in last),
            "kl_coef_moved": max(coefs) / min(coefs) >= MIN_KL_COEF_CHANGE,
        },
    }


def _report(
    folder: Path,
    summary: dict[str, Any],
    prompts: list[rows.Prompt],
    sft_answers: Answers,
    ppo_answers: Answers,
) -> None:
    pairs, kl, mean = (summary[name] for name in ("reward_model", "kl", "rubric"))
    details = _gate_details(summary)
    facts = {
        "Seed": summary["seed"],
        "Preference labels": "shuffled (negative control)" if summary["shuffled_labels"] else "10% noise",
        "Held-out prompts": summary["heldout_prompts"],
        "Rubric, SFT (mean)": mean["sft"],
        "Rubric, PPO (mean)": mean["ppo"],
        "PPO beats SFT (ties half)": f"{summary['win_rate']:.1%}",
        "Reward-model accuracy": pairs["accuracy"],
        "Reward-model loss": pairs["loss"],
        "Reward-model calibration error": pairs["ece"],
        "Score/length correlation, pairs": pairs["length_correlation"],
        "Score/length correlation, PPO": summary["score_length_correlation"],
        "KL target": kl["target"],
    }
    examples = [
        (prompts[i].prompt, sft_answers.texts[i], sft_answers.scores[i], ppo_answers.texts[i], ppo_answers.scores[i])
        for i in _shown(prompts)
    ]
    columns = ("Prompt", "SFT", "SFT score", "PPO", "PPO score")
    answers = html.Table(
        "Held-out prompts, greedy answers, the rubric's scores",
        columns,
        examples,
        formats={"SFT score": ".2f", "PPO score": ".2f"},
    )
    text = html.render(
        "Quickstart: SFT, a reward model and PPO",
        [
            html.Gates({name: (passed, details[name]) for name, passed in summary["gates"].items()}),
            html.Facts("Figures", facts),
            answers,
            html.Figures("Curves", _plots(folder, kl["target"] / KL_BAND, kl["target"] * KL_BAND)),
        ],
        summary="A small language model, trained from nothing on a generated assistant corpus: SFT on demonstrations "
        "of mixed quality, a reward model on preference pairs, PPO against that reward model. A rubric that training "
        "never sees judges greedy answers to held-out prompts.",
    )
    runs.write_atomically(folder / "report.html", text)


def _plots(folder: Path, low: float, high: float) -> list[figures.Plot]:
    sft, pairs, ppo = (records.read_rows(folder / stage / "metrics.jsonl") for stage in pipeline.STAGES)

    def ppo_plot(title: str, y_label: str, *names: str, **more: Any) -> figures.Plot:
        return figures.Plot(title, "iteration", y_label, {name: records.series(ppo, name) for name in names}, **more)

    frontier = plots.reward_against_kl(records.groups(records.find([folder / "ppo"])))
    assert frontier is not None  # PPO always measures its KL here
    return [
        figures.Plot(
            "SFT: loss",
            "step",
            "nats per token",
            {"train": records.series(sft, "sft/loss"), "validation": records.series(sft, "validation/loss")},
        ),
        figures.Plot(
            "Reward model: loss",
            "step",
            "nats per pair",
            {
                "train": records.series(pairs, "reward_model/loss"),
                "validation": records.series(pairs, "validation/loss"),
            },
            lines={"chance": math.log(2)},
        ),
        figures.Plot(
            "Reward model: accuracy",
            "step",
            "share of pairs",
            {
                "train": records.series(pairs, "reward_model/accuracy"),
                "validation": records.series(pairs, "validation/accuracy"),
            },
            lines={"chance": 0.5},
        ),
        ppo_plot("PPO: reward-model score", "score", "objective/score", "validation/score"),
        ppo_plot("PPO: KL from the SFT policy", "nats", "objective/kl", band=(low, high, "target band")),
        ppo_plot("PPO: KL coefficient", "kl/coef", "kl/coef"),
        ppo_plot("PPO: response length", "response/length (tokens)", "response/length"),
        ppo_plot("PPO: explained variance of the returns", "value/explained_variance", "value/explained_variance"),
        frontier,
    ]


def _print(prompts: list[rows.Prompt], sft_answers: Answers, ppo_answers: Answers, summary: dict[str, Any]) -> None:
    console = rich.console.Console()
    table = rich.table.Table(title="Held-out prompts, greedy answers; score: the rubric, SFT -> PPO", show_lines=True)
    for name in ("prompt", "SFT", "PPO", "score"):
        table.add_column(name, min_width=9)
    for i in _shown(prompts):
        change = f"{sft_answers.scores[i]:.2f} -> {ppo_answers.scores[i]:.2f}"
        table.add_row(str(prompts[i].prompt), sft_answers.texts[i], ppo_answers.texts[i], change)
    console.print(table)
    mean = summary["rubric"]
    console.print(
        f"rubric, mean over {summary['heldout_prompts']} prompts: SFT {mean['sft']:.3f}, PPO {mean['ppo']:.3f}\n"
        f"score/length correlation of PPO's answers: {summary['score_length_correlation']:.3f}",
        highlight=False,
    )
    details = _gate_details(summary)
    for name, passed in summary["gates"].items():
        console.print(
            f"{'pass' if passed else 'FAIL'}  {name}: {details[name]}", markup=False, highlight=False, soft_wrap=True
        )


def _gate_details(summary: dict[str, Any]) -> dict[str, str]:
    """What was measured and what was asked for, gate by gate."""
    kl, coef = summary["kl"], summary["kl_coef"]
    last, target = kl["last_iterations"], kl["target"]
    return {
        "reward_model_accuracy": f"{summary['reward_model']['accuracy']:.3f} on noise-free held-out pairs, at least "
        f"{MIN_ACCURACY}",
        "ppo_beats_sft": f"{summary['win_rate']:.1%} of {summary['heldout_prompts']} held-out prompts (ties half), at "
        f"least {MIN_WIN_RATE:.0%}",
        "kl_in_band": f"{min(last):.2f} to {max(last):.2f} nats in the last {len(last)} iterations, between "
        f"{target / KL_BAND:.2f} and {target * KL_BAND:.2f}",
        "kl_coef_moved": f"between {coef['lowest']:.3f} and {coef['highest']:.3f}, by a factor of at least "
        f"{MIN_KL_COEF_CHANGE}",
    }


def _shown(prompts: list[rows.Prompt]) -> list[int]:
    """The first three prompts of each category."""
    numbers: dict[str, list[int]] = {category: [] for category in demo.TOPICS}
    for i, row in enumerate(prompts):
        numbers[row.columns["category"]].append(i)
    return [i for together in numbers.values() for i in together[:3]]
