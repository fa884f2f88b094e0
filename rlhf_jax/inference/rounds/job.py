"""The job of all rounds: which part of which round is next, and the settings of its runs.

A part is complete when its file or its run's model is there; each is written whole. So the state of
the job is its folder.
"""

import gc
import importlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config import Rounds, RunConfig, to_dict
from rlhf_jax.data import chat, formats
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError, file_errors, logger
from rlhf_jax.evaluation import evaluate
from rlhf_jax.graders import spec
from rlhf_jax.inference.rounds import compare, page
from rlhf_jax.inference.rounds.folders import Round
from rlhf_jax.models import hf
from rlhf_jax.report import records
from rlhf_jax.runs import manifest, reading
from rlhf_jax.runs.writing import one_writer, refuse_links, write_atomically
from rlhf_jax.training import rl
from rlhf_jax.training.common.opening import MAY_CHANGE
from rlhf_jax.training.common.setup import set_up
from rlhf_jax.training.pipeline import stage_config
from rlhf_jax.training.supervised import reward_model

STATE = "rounds.json"
TOKENS = "annotators"  # beside it the secret addresses, which are the same in all rounds
# What may change between the starts of one job.
_FREE = (*MAY_CHANGE, "rounds.number", "rounds.annotators", "rounds.host", "rounds.port")


class Result(NamedTuple):
    """A finished job."""

    folder: Path
    rounds: list[Round]
    figures: list[dict[str, Any]]  # of the page, one row for each round

    @property
    def model_folder(self) -> Path:
        """The last policy."""
        return self.rounds[-1].rl / "model"


class _Job(NamedTuple):
    """What the parts of all rounds need."""

    config: RunConfig  # with the folder of the first policy as its model
    folder: Path
    prompts: compare.Prompts

    def round(self, number: int) -> Round:
        return Round(number, self.folder)

    def of_round(self, number: int) -> RunConfig:
        """The settings with the round's own seed."""
        drawn = np.random.default_rng([self.config.seed, number]).integers(1 << 31)
        return replace(self.config, seed=int(drawn))

    def policy(self, number: int) -> str:
        """The folder of the policy after a round."""
        if not number:
            return str(self.config.model)
        return str(self.round(number).rl / "model")


def run(config: RunConfig) -> Result:
    """Runs ``config.rounds.number`` rounds in the folders ``round-1``, ``round-2``, ... of
    ``config.output_dir``, from the policy in ``config.model``.

    ``resume`` continues with the part that was not complete; the result is the same, byte for byte.

    Raises:
        UserError: for whatever is wrong with the settings, the data, a folder or a run.
        Stopped: a signal ended a run, or the page while people label.
    """
    folder = Path(config.output_dir or "runs/rounds")
    _check(config)
    _check_folder(folder, config)
    numbers = range(1, config.rounds.number + 1)
    begun = [Round(number, folder) for number in numbers]
    refuse_links(path for own in begun for path in (own.folder, own.pairs, own.prefs))
    config = set_up(config, [path for own in begun for path in (own.reward_model, own.rl)])
    prompts, fingerprints = _read_prompts(config)
    with file_errors(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder / STATE):
        _begin(folder, config, fingerprints)
        job = _Job(config, folder, prompts)
        if config.rounds.gold is not None:
            _evaluate(job, 0)
        figures: list[dict[str, Any]] = []
        for own in begun:
            logger.info(f"round {own.number} of {len(begun)}")
            own.folder.mkdir(exist_ok=True)
            _advance(job, own.number)
            figures = page.write(begun[: own.number], config.rounds)
        return Result(folder, begun, figures)


def _advance(job: _Job, number: int) -> None:
    """Completes a round."""
    own = job.round(number)
    config = job.of_round(number)
    policy = job.policy(number - 1)
    numbers = compare.prompts_of_round(job.prompts, number, config.rounds, job.config.seed)
    if not own.pairs.exists():
        members = _members(job, number - 1)
        how = compare.sampling(config.rl, config.text, config.compute.dtype)
        asked = compare.Asked(how, config.rl.batch_size, config.rounds, config.seed)
        sampled = compare.sample(policy, job.prompts, numbers, members, asked)
        compare.write_rows(own.pairs, sampled)
    if not own.prefs.exists():
        compare.write_rows(own.prefs, _compared(job, number))
    if not _is_finished(own.reward_model):
        reward_model.run(_of_reward_model(job, number))
    gc.collect()  # objects of the reward model's run still hold its weights
    if not _is_finished(own.rl):
        algorithm = importlib.import_module(f"rlhf_jax.algorithms.{config.rounds.method}")
        rl.run(_of_rl(job, number), algorithm)
    _evaluate(job, number)


def _compared(job: _Job, number: int) -> list[dict[str, Any]]:
    """The rows of preferences of a round."""
    own = job.round(number)
    config = job.of_round(number)
    pairs = compare.read_pairs(own.pairs, job.prompts)
    logger.info(f"{own.pairs}: {len(pairs)} pairs to compare")
    judge = config.rounds.judge
    if judge is None:
        page_of_round = compare.page_of(own.pairs, own.labels, config.rounds, config.seed)
        return compare.by_people(page_of_round, job.folder / TOKENS)
    return compare.by_judge(
        pairs, job.prompts, judge, config.compute, config.judge, own.folder / "judge"
    )


def _of_reward_model(job: _Job, number: int) -> RunConfig:
    """It starts from the first policy each time, and learns from the rows of all rounds so far."""
    config = job.of_round(number)
    rows = [str(job.round(before).prefs) for before in range(1, number + 1)]
    section = replace(config.reward_model, data=(*config.reward_model.data, *rows))
    own = job.round(number).reward_model
    changes: dict[str, Any] = {"reward_model": section, "columns": (), "rounds": Rounds()}
    return stage_config(config, own, config.model, **changes)


def _of_rl(job: _Job, number: int) -> RunConfig:
    """It starts from the policy of the round before, which is its reference too."""
    config = job.of_round(number)
    own = job.round(number).rl
    changes: dict[str, Any] = {"reward": (_reward(job, number),), "rounds": Rounds()}
    return stage_config(config, own, job.policy(number - 1), **changes)


def _reward(job: _Job, number: int) -> str:
    """The reward model of a round, or the mean of its ensemble."""
    ensemble = "mean:" if job.config.reward_model.ensemble_size > 1 else ""
    return f"{ensemble}{job.round(number).reward_model / 'model'}"


def _members(job: _Job, number: int) -> list[str]:
    """The reward models that choose pairs after a round; none where pairs are random."""
    if not number or job.config.rounds.choose == "random":
        return []
    folder = job.round(number).reward_model / "model"
    return [str(member) for member in spec.members(folder) or [folder]]


def _evaluate(job: _Job, number: int) -> None:
    """Compares the policy of a round with the first one on held-out prompts."""
    config = job.config
    own = job.round(number)
    if (own.evaluation / records.EVALUATION).exists():
        return
    how = evaluate.Config(
        prompts=config.rounds.held_out or config.rl.validation_data,
        reward_model=config.rounds.gold or _reward(job, number),
        against=job.policy(0) if number else None,
        template=config.text.template,
        template_options=config.text.template_options,
        max_new_tokens=config.rl.max_new_tokens,
        temperature=config.rl.temperature,
        batch_size=config.rl.batch_size,
        columns=config.columns,
        on_bad_row=config.on_bad_row,
        too_long=config.text.too_long,
        judge_url=config.judge.url,
        judge_model=config.judge.model,
        seed=config.seed,
        device=config.device if config.device != "mps" else None,
        output=str(own.evaluation),
    )
    evaluate.run(job.policy(number), how)


def _is_finished(run: Path) -> bool:
    """Whether a run has saved its model and drawn its page, the last things that it does."""
    return records.model_config(run) is not None and (run / "report.html").exists()


def _check(config: RunConfig) -> None:
    how = config.rounds
    if config.model is None:
        raise UserError("rounds start from a policy: give --model, such as runs/quickstart/sft")
    if how.judge is None and not how.annotators:
        raise UserError(
            "nobody compares the answers: give --rounds.annotators ana,ben for people, or "
            "--rounds.judge FILE.py:FUNCTION, judge:RUBRIC.yaml or a reward model"
        )
    if how.judge is None:
        if importlib.util.find_spec("uvicorn") is None:
            raise UserError("people compare on a page: pip install 'rlhf-jax[label]'")
        compare.page_of(Path("pairs"), Path("labels"), how, config.seed)  # checks its settings
    if how.choose == "disagreement" and config.reward_model.ensemble_size < 2:
        raise UserError(
            "--rounds.choose disagreement: one reward model cannot disagree; give "
            "--reward-model.ensemble-size 3"
        )
    if not (how.held_out or config.rl.validation_data):
        raise UserError("give --rounds.held-out FILE, prompts on which the rounds are compared")
    if config.rl.environment is not None:
        raise UserError("--rl.environment: rounds compare single answers; leave it out")
    if config.processes is not None:
        raise UserError("--processes: rounds run in one process")
    if config.reward:
        logger.info("`reward` is not used: each round's reward model rewards its policy")


def _check_folder(folder: Path, config: RunConfig) -> None:
    """Refuses a folder that holds other files, or rounds that are not to be continued."""
    is_begun = (folder / STATE).exists()
    if config.overwrite:
        raise UserError(
            "--overwrite: a folder of rounds holds people's judgements, which no command deletes; "
            "delete it yourself, or choose another --output-dir"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --output-dir needs a folder")
    if config.resume and not folder.is_dir():
        raise UserError(f"--resume: {folder} does not exist; leave out --resume to begin there")
    if is_begun and not config.resume:
        raise UserError(
            f"{folder} holds rounds already; give --resume to continue them, or choose another "
            "--output-dir"
        )
    if not is_begun and folder.is_dir():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise UserError(f"{folder} holds {others[0]} already; choose another --output-dir")


def _read_prompts(config: RunConfig) -> tuple[compare.Prompts, dict[str, str]]:
    """The prompts that RL trains on, and {name: sha256} of all that the rounds begin with."""
    tokenizer = load_tokenizer(hf.model_folder(str(config.model)))
    read = formats.read(
        "prompts",
        config.rl.data or config.data,
        seed=config.seed,
        template=chat.template_of(tokenizer, config.text.template),
        columns=config.columns,
        on_bad_row=config.on_bad_row,
    )
    logger.info(f"prompts: {read.describe()}")
    fingerprints = read.fingerprints
    paths = {"model": hf.find_folder(str(config.model))}
    for entry in (config.rounds.gold, config.rounds.judge and f"pairs:{config.rounds.judge}"):
        paths |= spec.sources(entry) if entry else {}
    for name, path in paths.items():
        fingerprints = fingerprints | {name: manifest.fingerprint(path)}
    return compare.Prompts(read.rows, tokenizer, config.text.template), fingerprints


def _begin(folder: Path, config: RunConfig, fingerprints: dict[str, str]) -> None:
    """Keeps the settings of a new job, or checks that one that goes on has them still."""
    settings: dict[str, Any] = json.loads(json.dumps(to_dict(config)))
    dotted = manifest.dotted(settings)
    kept = {key: value for key, value in dotted.items() if not manifest.within(key, _FREE)}
    now = {"settings": kept, "files": fingerprints}
    path = folder / STATE
    if path.exists():
        shape = {"settings": {str: object}, "files": {str: str}}
        before = reading.read_json(path, shape, ["settings", "files"])
        changed = _changed(before, now)
        if changed:
            raise UserError(
                f"--resume: {folder} was begun with other settings or data: {'; '.join(changed)}. "
                "Undo this, or choose another --output-dir"
            )
        return
    with file_errors(path, "written"):
        write_atomically(path, json.dumps(now, indent=1, ensure_ascii=False) + "\n")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> Sequence[str]:
    parts = ("settings", "files")
    return [
        text for part in parts for text in manifest.differences(before[part], now[part]).values()
    ]
