"""The reward of a run, from the entries of ``--reward``.

Each entry is ``SPEC`` or ``SPEC*WEIGHT``; several are summed. A SPEC is

- a reward model's folder or Hugging Face name; if its tokenizer is not the policy's, it reads the
  texts in its own chat template,
- ``mean:A,B,...``, ``min:A,B,...`` or ``uncertainty:A,B,...``, an ensemble of reward models
  (`rewards.ensemble`); ``uncertainty:COEF:A,B,...`` gives the variance another weight than 1. The
  folder of a run that trained an ensemble stands for all its members,
- ``count:TEXT``, which counts one token of the vocabulary in prompt and response
  (`rewards.token_count`),
- ``length``, response tokens, or ``length:N``, those beyond N (`rewards.length`),
- ``repetition`` or ``repetition:N``, the share of a response's n-grams that occurred before
  (`rewards.repetition`),
- ``diversity`` or ``diversity:N``, the share that no other response of the batch has
  (`rewards.diversity`),
- ``regex:PATTERN``, 1 for a response in which the regular expression is found
  (`rewards.verifiable`),
- ``math``, 1 for a response whose answer equals that in the column ``answer`` of the prompt's data
  row,
- ``FILE.py:FUNCTION``, the user's own ``fn(prompts, responses, **columns) -> list[float | None]``:
  prompts as the model reads them, the columns of the prompts' data rows by name, None for a
  response that cannot be scored,
- ``http://HOST/PATH`` or ``https://...``, a server that is asked for the same
  (`service.reward_service`),
- ``judge:RUBRIC.yaml``, a chat server that scores by a rubric (`service.RubricJudge`).

A folder with the name of one of these is given as ``./length``.
"""

import difflib
import functools
import importlib.util
import inspect
import math
import re
import runpy
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError, check_pattern, did_you_mean, logger
from rlhf_jax.models.hf import model_folder
from rlhf_jax.rewards import service, verifiable
from rlhf_jax.rewards.functions import (
    ENSEMBLES,
    EnsembleMethod,
    ensemble,
    from_model,
    length,
    token_count,
    weighted,
)
from rlhf_jax.rewards.host import (
    Columns,
    Decoder,
    HostReward,
    HostScores,
    TextScorer,
    from_conversations,
    from_text,
)
from rlhf_jax.rewards.ngrams import diversity, repetition
from rlhf_jax.rewards.service import Services
from rlhf_jax.types import Params, RewardFn, Rollout, ScoreFn

_NUMBER = r"(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
_WEIGHTED = re.compile(rf"(?P<spec>.+)\*(?P<weight>[-+]?{_NUMBER})", re.IGNORECASE)
_HOW = "|".join(get_args(EnsembleMethod))
_ENSEMBLE = re.compile(
    rf"(?P<how>{_HOW}):(?:(?<=uncertainty:)(?P<coef>[^:]*):)?(?P<names>.*)", re.DOTALL
)

# What may be followed by a number, and the least number.
_TERMS = {"length": (length, 0), "repetition": (repetition, 1), "diversity": (diversity, 1)}
_WORDS = ("count", *_TERMS, "regex", "math", "mean", "min", "uncertainty", "judge")
_URLS = ("http://", "https://")


class Reward(NamedTuple):
    """The reward of a run. One of ``fn`` and ``host`` is None."""

    fn: RewardFn | None = None  # traced into the iteration
    host: HostReward | None = None  # runs on the host between two jits
    # how many replies of judges had no score since the last call; None: there is no judge
    take_unparsed: Callable[[], int] | None = None


class RewardModel(NamedTuple):
    """A reward model as ``load`` returns it."""

    score_fn: ScoreFn
    params: Params
    fingerprint: str  # of its tokenizer
    score_texts: TextScorer | None = None  # for a policy of another tokenizer


Load = Callable[[str], RewardModel]
"""Loads a reward model from a folder or Hugging Face name; UserError, naming it, if it cannot or
lacks a score head.
"""


class PolicyTokenizer(Decoder, Protocol):
    """What a reward reads of the policy's tokenizer."""

    @property
    def fingerprint(self) -> str: ...
    def encode(self, text: str, /) -> list[int]: ...


def build_reward(
    entries: Sequence[str],
    *,
    tokenizer: PolicyTokenizer,
    load: Load,
    columns: Collection[str],
    flag: str = "--reward",
    services: Services | None = None,
) -> Reward:
    """All entries as one reward, on the host if any of them is.

    Several entries, or one with a weight or a Python function, have parts with the entries' names.

    Args:
      tokenizer: the policy's. A reward model of another one reads texts, on the host.
      load: loads the reward models, one call for each.
      columns: names of the prompts' columns, which a Python function may have parameters for.
      flag: where the entries come from, such as ``--rl.judge``; each error begins with it.
      services: how servers are asked; None: by the defaults, and no judge can be.

    Raises:
      UserError: no entry, one that does not exist or does not fit, two of one name.
    """
    if not entries:
        kinds = "a reward model's folder, several as mean:A,B, min:A,B or uncertainty:A,B, or "
        kinds += "FILE.py:FUNCTION, http://HOST/PATH, judge:RUBRIC.yaml, regex:PATTERN, math, "
        kinds += f"count:TEXT, {', '.join(_TERMS)}"
        raise UserError(f"no reward: give {flag} {kinds}, as in {flag} count:e")
    parts: dict[str, tuple[Reward, float]] = {}
    for entry in entries:
        spec, weight = _split_weight(entry)
        place = f"{flag} {spec}"
        served = _served(spec, place, tokenizer, columns, services or Services())
        name, reward = served or _read(spec, place, tokenizer, load, columns)
        if name in parts:
            raise UserError(
                f"{flag} {entry}: another part is called {name} too; rename one of them"
            )
        parts[name] = reward, weight
    if any(reward.host is not None for reward, _ in parts.values()):
        summed = _sum_on_host(
            {name: (as_host(reward), weight) for name, (reward, weight) in parts.items()}
        )
        counts = [reward.take_unparsed for reward, _ in parts.values() if reward.take_unparsed]
        return Reward(
            host=summed,
            take_unparsed=(lambda: sum(count() for count in counts)) if counts else None,
        )
    fns = {
        name: (reward.fn, weight)
        for name, (reward, weight) in parts.items()
        if reward.fn is not None
    }
    (fn, weight), *others = fns.values()
    return Reward(fn=weighted(fns) if others or weight != 1 else fn)


def sources(entry: str) -> dict[str, Path]:
    """The folders and Python files that an entry reads, by the names that a manifest gives them."""
    spec, _ = _split_weight(entry)
    if spec.startswith(("count:", "regex:", *_URLS)) or spec.partition(":")[0] in (*_TERMS, "math"):
        return {}
    if match := _ENSEMBLE.fullmatch(spec):
        return {name: Path(name) for name in match["names"].split(",") if Path(name).exists()}
    file, _, _ = spec.rpartition(":")
    path = Path(file if file.endswith(".py") else spec.removeprefix("judge:"))
    return {entry: path} if path.exists() else {}


def members(folder: str | Path) -> list[Path]:
    """The folders member_0, member_1, ... of an ensemble's folder; an empty list for another
    folder.
    """
    count = sum(member.name[7:].isdecimal() for member in Path(folder).glob("member_*"))
    return [Path(folder) / f"member_{i}" for i in range(count)]


def as_host(reward: Reward) -> HostReward:
    """A reward that is called on the host; a traced one runs on the devices, and must have one
    score for each row.
    """
    if reward.host is not None:
        return reward.host
    on_devices = jax.jit(lambda fn, rollout: fn(rollout))

    def score(rollout: Rollout, columns: Columns) -> tuple[HostScores, dict[str, HostScores]]:
        scores, parts = jax.device_get(on_devices(reward.fn, rollout))
        if scores.ndim != 1:
            raise ValueError(
                f"expected one score for each response, [{len(rollout.tokens)}], got {scores.shape}"
            )
        return scores.tolist(), parts

    return score


def _sum_on_host(parts: dict[str, tuple[HostReward, float]]) -> HostReward:
    """As ``weighted``. A row that one part cannot score has no sum."""

    def score(rollout: Rollout, columns: Columns) -> tuple[HostScores, dict[str, HostScores]]:
        reported: dict[str, HostScores] = {}
        totals: list[float | None] = [0.0] * len(rollout.tokens)
        for name, (reward, weight) in parts.items():
            scores, inner = reward(rollout, columns)
            reported |= {name: scores} | {
                f"{name}/{part}": values for part, values in inner.items()
            }
            pairs = zip(totals, scores, strict=True)
            totals = [
                None if None in (total, value) else total + weight * value for total, value in pairs
            ]
        return totals, reported

    return score


def _split_weight(entry: str) -> tuple[str, float]:
    """SPEC, with ``model/`` in place of a run's folder, and WEIGHT."""
    match = _WEIGHTED.fullmatch(entry)
    spec, weight = (match["spec"], float(match["weight"])) if match else (entry, 1.0)
    several = _ENSEMBLE.fullmatch(spec)
    names = several["names"] if several else spec
    return spec.removesuffix(names) + ",".join(
        map(model_folder, names.split(",") if several else [names])
    ), weight


def _read(
    spec: str, where: str, tokenizer: PolicyTokenizer, load: Load, columns: Collection[str]
) -> tuple[str, Reward]:
    """The name and the reward of one SPEC; errors begin with ``where``."""
    term, colon, rest = spec.partition(":")
    if term == "count" and colon:
        ids = tokenizer.encode(rest)
        if len(ids) != 1:
            raise UserError(
                f"{where}: {rest!r} is {len(ids)} tokens of this tokenizer, and exactly 1 is "
                "counted"
            )
        return spec, Reward(fn=token_count(ids[0]))
    if term in _TERMS:
        make, least = _TERMS[term]
        if colon and not (re.fullmatch("[0-9]{1,9}", rest) and int(rest) >= least):
            raise UserError(
                f"{where}: after `{term}:` comes a whole number, at least {least}, of tokens; got "
                f"{rest!r}"
            )
        return spec, Reward(fn=make(int(rest)) if colon else make())
    if term == "regex" and colon:
        check_pattern(f"{where}: {rest!r}", rest)
        return spec, Reward(host=from_text(verifiable.regex(rest), tokenizer))
    if term == "math" and not rest:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                f"{where}: the package math-verify is not installed; pip install 'rlhf-jax[math]'"
            )
        return term, Reward(
            host=from_text(_of_columns(f"{where}: math", verifiable.math, columns), tokenizer)
        )
    file, _, function = spec.rpartition(":")
    if file.endswith(".py"):
        return function, Reward(
            host=from_text(load_function(where, Path(file), function, columns), tokenizer)
        )

    return _of_models(spec, where, tokenizer, load)


def _of_models(spec: str, where: str, tokenizer: PolicyTokenizer, load: Load) -> tuple[str, Reward]:
    """The name and the reward of a SPEC that names a reward model, or several."""

    def model_reward(name: str) -> Reward:
        model = load(name)
        if model.fingerprint == tokenizer.fingerprint:
            return Reward(fn=from_model(model.score_fn, model.params))
        place = where if name == spec else f"{where}: {name}"
        if model.score_texts is None:
            raise UserError(f"{place}: the reward model's tokenizer is not the policy's")
        logger.info(f"{place}: another tokenizer than the policy's, so it reads texts on the host")
        return Reward(host=from_conversations(model.score_texts, tokenizer, place))

    if match := _ENSEMBLE.fullmatch(spec):
        names = match["names"].split(",")
        name = spec.removesuffix(match["names"]) + ",".join(map(_run_name, names))
        return name, _ensemble(match["how"], match["coef"], names, where, model_reward)
    if folders := members(spec):
        ways = f"mean:{spec}, min:{spec} (the worst case) or uncertainty:{spec} (mean - variance)"
        raise UserError(
            f"{where}: the {len(folders)} models of an ensemble; say how their scores become one: "
            f"{ways}"
        )
    _check_spelling(spec, where)
    return _run_name(spec), model_reward(spec)


def _check_spelling(spec: str, where: str) -> None:
    """Raises UserError if the SPEC of a reward model looks like the name of another reward."""
    term, colon, rest = spec.partition(":")
    near = difflib.get_close_matches(term, _WORDS, n=1, cutoff=0.7)
    if near and "/" not in spec and not Path(spec).exists():
        raise UserError(
            f"{where}: no such reward and no such folder; did you mean {near[0]}{colon}{rest}?"
        )


def _served(
    spec: str,
    where: str,
    tokenizer: PolicyTokenizer,
    columns: Collection[str],
    services: Services,
) -> tuple[str, Reward] | None:
    """The name and the reward of a SPEC that a server answers; None for any other SPEC."""
    if spec.startswith(_URLS):
        try:
            service.check_url(where, spec)
        except ValueError as error:
            raise UserError(str(error)) from None
        name = spec.partition("://")[2].partition("?")[0]
        asked = service.reward_service(spec, services.judge)
        return name, Reward(host=from_text(asked, tokenizer))
    kind, colon, file = spec.partition(":")
    if kind != "judge" or not colon:
        return None
    if services.judge.url is None or services.judge.model is None:
        raise UserError(
            f"{where}: a judge is a model on a chat server: give --judge.url, such as "
            "http://localhost:8000/v1, and --judge.model"
        )
    rubric = service.read_rubric(Path(file))
    missing = [name for name in rubric.columns if name not in columns]
    if missing:
        there = ", ".join(columns) or "none"
        raise UserError(
            f"{where}: the rubric asks for {', '.join(missing)}, but the prompts' columns are "
            f"{there}"
        )
    judge = service.RubricJudge(rubric, services)
    host = from_text(judge, tokenizer)
    return Path(file).stem, Reward(host=host, take_unparsed=judge.take_unparsed)


def _ensemble(
    how: Any,
    coef: str | None,
    names: Sequence[str],
    where: str,
    model_reward: Callable[[str], Reward],
) -> Reward:
    if coef is not None and not re.fullmatch(_NUMBER, coef, re.IGNORECASE):
        raise UserError(
            f"{where}: between the colons stands a coefficient, a number of at least 0; got "
            f"{coef!r}"
        )
    if not all(names):
        raise UserError(
            f"{where}: after `{how}:` come reward models' folders, with commas between them"
        )
    paths = [path for name in names for path in [*map(str, members(name))] or [name]]
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise UserError(
            f"{where}: an ensemble has at least two different models, here are {', '.join(paths)}"
        )
    logger.info(f"{where}: {len(paths)} models")
    weight = 1.0 if coef is None else float(coef)
    rewards = [model_reward(path) for path in paths]
    fns = [reward.fn for reward in rewards if reward.fn is not None]
    if len(fns) == len(rewards):
        return Reward(fn=ensemble(fns, how, weight))
    return Reward(host=_ensemble_on_host(list(map(as_host, rewards)), how, weight))


def _ensemble_on_host(
    rewards: Sequence[HostReward], how: EnsembleMethod, coef: float
) -> HostReward:
    """As ``ensemble``. A row that one member cannot score has no score."""

    def score(rollout: Rollout, columns: Columns) -> tuple[HostScores, dict[str, HostScores]]:
        given = [reward(rollout, columns)[0] for reward in rewards]
        scores = np.array(given, np.float32)  # [members, B], NaN for None
        combined = np.asarray(ENSEMBLES[how](jnp.asarray(scores), coef))
        spread = np.std(scores, axis=0)

        def numbers(values: np.ndarray) -> list[float | None]:
            return [None if math.isnan(value) else value for value in values.tolist()]

        return numbers(combined), {"uncertainty": numbers(spread)}

    return score


def _run_name(model: str) -> str:
    """The name of the run folder that holds a reward model; or the model's own name if no run
    folder does.
    """
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def load_function(
    where: str, file: Path, name: str, columns: Collection[str]
) -> Callable[..., Any]:
    """The user's function, as ``_of_columns``.

    Raises:
      UserError: it begins with ``where``; there is no such file or function, or it asks for other
        columns.
    """
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"{where}: no such file {file}; expected FILE.py:FUNCTION")
    try:
        module = runpy.run_path(str(file))
    except SyntaxError as error:
        raise UserError(f"{where}: {error.filename}, line {error.lineno}: {error.msg}") from None
    except SystemExit as error:
        raise UserError(
            f"{where}: {file} calls sys.exit({error.code!r}) when it is read; call it only under "
            "`if __name__ == '__main__':`"
        ) from None
    fn = module.get(name)
    if not callable(fn):
        hint = did_you_mean(name, [key for key, value in module.items() if callable(value)])
        raise UserError(f"{where}: {file} has no function {name}{hint}")
    return _of_columns(f"{where}: {name}", fn, columns)


def _of_columns(where: str, fn: Callable[..., Any], columns: Collection[str]) -> Callable[..., Any]:
    """A reward function, called with only those columns that it has parameters for."""
    parameters = list(inspect.signature(fn).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return fn
    wanted = [
        parameter for parameter in parameters[2:] if parameter.kind is not parameter.VAR_POSITIONAL
    ]
    offered = [*columns, "messages"]
    missing = [p.name for p in wanted if p.default is p.empty and p.name not in offered]
    if missing:
        there = ", ".join(columns) or "none"
        raise UserError(
            f"{where} asks for {', '.join(missing)}, but the prompts' columns are {there}"
        )
    names = [parameter.name for parameter in wanted if parameter.name in offered]

    @functools.wraps(fn)
    def with_its_columns(prompts: list[str], responses: list[str], **given: Any) -> Any:
        return fn(prompts, responses, **{name: given[name] for name in names})

    return with_its_columns
