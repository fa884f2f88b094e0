"""A language model gets better at what people prefer, in about three minutes on two CPU
cores.

    rlhf-jax quickstart

SFT, a reward model and PPO on a generated assistant corpus; prints a table and writes
runs/quickstart/. A rubric that training never sees judges greedy answers to held-out prompts. Exits
with 1 if a check of the result fails, as it must with --shuffle-labels.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.table

from rlhf_jax import metrics, models, sampling
from rlhf_jax.cli.console import show
from rlhf_jax.cli.stages import STAGES
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.data import demo, encoding, formats
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import rubric
from rlhf_jax.generation import generator
from rlhf_jax.report import figures, page, records
from rlhf_jax.report.plots import reward_against_kl
from rlhf_jax.runs.writing import copy_files, replacing, write_atomically
from rlhf_jax.training import pipeline
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.opening import stream_key
from rlhf_jax.training.common.setup import set_up
from rlhf_jax.training.supervised.scoring import answer_scorer, report, score_rows
from rlhf_jax.types import Params, Rollout

LAST_ITERATIONS = 10
MIN_ACCURACY = 0.85
MIN_WIN_RATE = 0.75
KL_BAND = 1.5
MIN_KL_COEF_CHANGE = 1.1
NEXT = """
The report: {folder}/report.html
Next: a conversation, all curves on one page, the policy on held-out pairs, your own files:
    rlhf-jax chat {folder}/ppo --compare {folder}/sft --temperature 0
    rlhf-jax report {folder}
    rlhf-jax evaluate {folder}/ppo --preferences {folder}/data/heldout_preference_data.json
    rlhf-jax pipeline --config pipeline --data FOLDER"""


@dataclasses.dataclass(frozen=True)
class QuickstartConfig(RunConfig):
    """The pipeline's settings and the negative control."""

    shuffle_labels: bool = False
    """Choose the preferred answer of every pair by coin flip: the checks must then fail."""


class Answers(NamedTuple):
    """Greedy responses to the held-out prompts, with the rubric's scores [N]."""

    texts: list[str]
    scores: np.ndarray
    rollout: Rollout


def run(config: QuickstartConfig) -> dict[str, Any]:
    """Writes ``data/``, the stages' runs, ``model/``, ``summary.json`` and ``report.html``; prints
    a table.

    Returns the summary.
    """
    if config.data:
        raise UserError(
            "--data: the quickstart generates its own data; for yours use `rlhf-jax pipeline`"
        )
    if config.reward_model.ensemble_size > 1:
        raise UserError(
            "reward_model.ensemble_size: one reward model is judged here; an ensemble is trained "
            "by `rlhf-jax pipeline`"
        )
    folder = Path(config.output_dir or "runs/quickstart")
    pipeline.check_folder(folder, config)
    data = folder / "data"
    set_up(config, [folder / name for name in pipeline.STAGES])
    show(
        "Three stages, from nothing to a policy: about three minutes on two CPU cores.", flush=True
    )
    demo.write(data, seed=config.seed, shuffle_labels=config.shuffle_labels)
    stages = pipeline.run_stages(dataclasses.replace(config, data=(str(data),)), folder)
    prompts = formats.read("prompts", str(data / "heldout_prompts.json")).rows
    policies = [
        initial.load_language_model(str(of.model_folder), config.compute)
        for of in (stages.sft, stages.ppo)
    ]
    sft, ppo = (
        answer(policies[0].model, params, tokenizer, prompts, config)
        for _, params, tokenizer in policies
    )
    preference, learned_scores = judge(
        str(stages.reward_model.model_folder), data, ppo.rollout, config
    )
    summary = summarize(config, sft, ppo, preference, learned_scores, folder)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    with replacing(folder / "model") as new:
        copy_files(stages.ppo.model_folder.rglob("*"), stages.ppo.model_folder, new)
    shown = [i for category in demo.TOPICS for i in of_category(prompts, category)[:3]]
    examples = [
        (prompts[i].prompt, sft.texts[i], sft.scores[i], ppo.texts[i], ppo.scores[i]) for i in shown
    ]
    write_report(folder, summary, examples)
    print_summary(folder, summary, examples)
    return summary


def of_category(prompts: Sequence[Row], category: str) -> list[int]:
    """Numbers of the prompts of a category."""
    return [i for i, row in enumerate(prompts) if row.columns["category"] == category]


def answer(
    model: models.Model, params: Params, tokenizer: Tokenizer, prompts: list[Row], config: RunConfig
) -> Answers:
    """The greedy answers of a stage's parameters to the prompts, judged by the rubric."""
    encoded = encoding.encode_prompts(prompts, tokenizer, template=config.text.template)
    greedy = sampling.SamplingConfig(
        max_new_tokens=config.rl.max_new_tokens,
        temperature=0.0,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    key = stream_key(config.seed, "quickstart", "eval")
    policy = generator.LanguageModel(model, params, tokenizer)
    rollout, _ = policy.respond(encoded, key, config=greedy)
    texts = generator.responses(rollout, tokenizer)
    scores = [rubric.score(row.columns, text) for row, text in zip(prompts, texts, strict=True)]
    return Answers(texts, np.array(scores), rollout)


def judge(
    model_folder: str, data: Path, rollout: Rollout, config: RunConfig
) -> tuple[dict[str, float], np.ndarray]:
    """The reward model's metrics on noise-free held-out pairs, and its scores [N] of a rollout."""
    model, params, tokenizer = initial.load_language_model(model_folder, config.compute)
    rows = formats.read("pairs", str(data / "heldout_preference_data.json")).rows
    pairs = encoding.encode_texts(rows, tokenizer, template=config.text.template)
    sizes: dict[str, Any] = {
        "batch_size": config.reward_model.batch_size,
        "bucket_multiple": config.text.bucket_multiple,
    }
    numbers = np.arange(len(pairs))
    learned = score_rows(
        partial(answer_scorer(models.score_fn(model)), params), pairs, numbers, **sizes
    )
    preference = report(pairs, numbers, learned)
    scores = jax.jit(models.score_fn(model))(params, rollout.tokens, rollout.attention_mask, None)
    return preference, np.asarray(scores)


def summarize(
    config: QuickstartConfig,
    sft: Answers,
    ppo: Answers,
    preference: dict[str, float],
    learned: np.ndarray,
    folder: Path,
) -> dict[str, Any]:
    """The numbers of ``summary.json``, and whether each check was passed."""
    rows = records.read_rows(folder / "ppo" / "metrics.jsonl")
    names = ("objective/kl", "kl/coef", "value/explained_variance", "policy/ratio_max")
    kls, coefs, explained, ratios = (records.series(rows, name)[1] for name in names)
    critic = {"lowest_explained_variance_of_last_half": min(explained[len(explained) // 2 :])}
    lengths = np.asarray(ppo.rollout.response_mask).sum(axis=1)
    summary = {
        "seed": config.seed,
        "shuffled_labels": config.shuffle_labels,
        "heldout_prompts": len(sft.texts),
        "reward_model": rounded(preference),
        "rubric": rounded({"sft": float(sft.scores.mean()), "ppo": float(ppo.scores.mean())}),
        "win_rate": round(metrics.win_rate(ppo.scores, against=sft.scores), 6),
        "kl": {
            "target": config.rl.kl_target or 0.0,
            "last_iterations": [round(kl, 6) for kl in kls[-LAST_ITERATIONS:]],
        },
        "critic": rounded(critic | {"largest_ratio": max(ratios)}),
        "kl_coef": rounded({"lowest": min(coefs), "highest": max(coefs)}),
        "score_length_correlation": round(metrics.spearman(learned, lengths), 6),
    }
    return summary | {"checks": {name: passed for name, (passed, _) in checks(summary).items()}}


def checks(summary: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """``{check: (passed, what was measured and what was asked for)}``."""
    accuracy = summary["reward_model"]["accuracy"]
    win_rate = summary["win_rate"]
    coef = summary["kl_coef"]
    target = summary["kl"]["target"]
    last = summary["kl"]["last_iterations"]
    low = target / KL_BAND
    high = target * KL_BAND
    lowest = coef["lowest"]
    highest = coef["highest"]
    pairs = f"{accuracy:.3f} on noise-free held-out pairs, at least {MIN_ACCURACY}"
    wins = (
        f"{win_rate:.1%} of {summary['heldout_prompts']} held-out prompts (ties half), at least "
        f"{MIN_WIN_RATE:.0%}"
    )
    kls = f"{min(last):.2f} to {max(last):.2f} nats in the last {len(last)} iterations"
    kls += f", between {low:.2f} and {high:.2f}"
    coefs = f"between {lowest:.3f} and {highest:.3f}, by a factor of at least {MIN_KL_COEF_CHANGE}"
    return {
        "reward_model_accuracy": (accuracy >= MIN_ACCURACY, pairs),
        "ppo_beats_sft": (win_rate >= MIN_WIN_RATE, wins),
        "kl_in_band": (low <= min(last) <= max(last) <= high, kls),
        "kl_coef_moved": (highest / lowest >= MIN_KL_COEF_CHANGE, coefs),
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    """The values with six decimals."""
    return {name: round(value, 6) for name, value in values.items()}


def write_report(folder: Path, summary: dict[str, Any], examples: Sequence[Sequence[Any]]) -> None:
    """``report.html``: checks, numbers, answers before and after, curves of the three stages."""
    pairs = summary["reward_model"]
    mean = summary["rubric"]
    facts = {
        "Seed": summary["seed"],
        "Preference labels": "shuffled (negative control)"
        if summary["shuffled_labels"]
        else "10% noise",
        "Held-out prompts": summary["heldout_prompts"],
        "Rubric, SFT (mean)": mean["sft"],
        "Rubric, PPO (mean)": mean["ppo"],
        "PPO beats SFT (ties half)": f"{summary['win_rate']:.1%}",
        "Reward-model accuracy": pairs["accuracy"],
        "Reward-model loss": pairs["loss"],
        "Reward-model calibration error": pairs["ece"],
        "Score/length correlation, pairs": pairs["length_correlation"],
        "Score/length correlation, PPO": summary["score_length_correlation"],
        "KL target": summary["kl"]["target"],
    }
    columns = ("Prompt", "SFT", "SFT score", "PPO", "PPO score")
    title = "Held-out prompts, greedy answers, the rubric's scores"
    report = page.render(
        "Quickstart: SFT, a reward model and PPO",
        [
            page.Gates(checks(summary)),
            page.Facts("Figures", facts),
            page.Table(title, columns, examples, formats={"SFT score": ".2f", "PPO score": ".2f"}),
            page.Figures("Curves", plots(folder, summary["kl"]["target"])),
        ],
        summary="A small language model, trained from random weights on a generated assistant "
        "corpus: SFT on demonstrations of mixed quality, a reward model on preference pairs, PPO "
        "against that reward model. A rubric that training never sees judges greedy answers to "
        "held-out prompts.",
    )
    write_atomically(folder / "report.html", report)


def plots(folder: Path, kl_target: float) -> list[figures.Plot]:
    """The curves of the three stages."""
    accuracy, loss = ({"lines": {"chance": level}} for level in (0.5, math.log(2)))
    kl_band = {"band": (kl_target / KL_BAND, kl_target * KL_BAND, "target band")}
    curves: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
        ("sft", "SFT: loss", "nats per token", "sft/loss validation/loss", {}),
        (
            "reward_model",
            "Reward model: loss",
            "nats per pair",
            "reward_model/loss validation/loss",
            loss,
        ),
        (
            "reward_model",
            "Reward model: accuracy",
            "share",
            "reward_model/accuracy validation/accuracy",
            accuracy,
        ),
        ("ppo", "PPO: reward-model score", "score", "objective/score validation/score", {}),
        ("ppo", "PPO: KL from the SFT policy", "nats", "objective/kl", kl_band),
        ("ppo", "PPO: KL coefficient", "kl/coef", "kl/coef", {}),
        ("ppo", "PPO: response length", "tokens", "response/length", {}),
        ("ppo", "PPO: explained variance of the returns", "share", "value/explained_variance", {}),
    )
    rows = {name: records.read_rows(folder / name / "metrics.jsonl") for name in pipeline.STAGES}
    drawn = []
    for run_name, title, y, names, more in curves:
        series = {name: records.series(rows[run_name], name) for name in names.split()}
        drawn.append(
            figures.Plot(title, "iteration" if run_name == "ppo" else "step", y, series, **more)
        )
    frontier = reward_against_kl(records.groups(records.find([folder / "ppo"])))
    assert frontier is not None  # this job's PPO always measures its KL
    return [*drawn, dataclasses.replace(frontier, title="PPO: reward against KL")]


def print_summary(folder: Path, summary: dict[str, Any], examples: Sequence[Sequence[Any]]) -> None:
    """A table of answers, the means, one line for each check, and what to look at next."""
    console = rich.console.Console()
    table = rich.table.Table(
        title="Held-out prompts, greedy answers; score: the rubric, SFT -> PPO", show_lines=True
    )
    for name in ("prompt", "SFT", "PPO", "score"):
        table.add_column(name, min_width=9)
    for prompt, sft_text, sft_score, ppo_text, ppo_score in examples:
        table.add_row(str(prompt), sft_text, ppo_text, f"{sft_score:.2f} -> {ppo_score:.2f}")
    console.print(table)
    mean = summary["rubric"]
    checked = checks(summary)
    lines = [
        f"rubric, mean over {summary['heldout_prompts']} prompts: "
        f"SFT {mean['sft']:.3f}, PPO {mean['ppo']:.3f}",
        f"score/length correlation of PPO's answers: {summary['score_length_correlation']:.3f}",
        *(
            f"{'pass' if ok else 'FAIL'}  {name.replace('_', ' ')}: {text}"
            for name, (ok, text) in checked.items()
        ),
        NEXT.format(folder=folder),
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    argv = ["--config", "quickstart", *(sys.argv[1:] if argv is None else argv)]
    config = parse(
        QuickstartConfig,
        argv,
        prog="rlhf-jax quickstart",
        description=__doc__,
        first=("output_dir", "seed", "device", "overwrite", "shuffle_labels"),
        sections=STAGES["pipeline"].reads,
    )
    return 0 if all(run(config)["checks"].values()) else 1
