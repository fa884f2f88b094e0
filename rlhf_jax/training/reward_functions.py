"""The reward of a run, from what ``--reward`` says.

Each entry is ``SPEC`` or ``SPEC*WEIGHT``; several are summed. A SPEC is

- a reward model's folder or Hugging Face name,
- ``mean:A,B,...``, ``min:A,B,...`` or ``uncertainty:A,B,...``, an ensemble of reward models (`rewards.ensemble`);
  ``uncertainty:COEF:A,B,...`` gives the variance another weight than 1. The folder of an ensemble that was trained at
  once stands for its members,
- ``count:TEXT``, which counts one token of the vocabulary in prompt and response (`rewards.token_count`),
- ``length``, response tokens, or ``length:N``, those beyond N (`rewards.length`),
- ``repetition`` or ``repetition:N``, the share of a response's n-grams that it has said before (`rewards.repetition`),
- ``diversity`` or ``diversity:N``, the share that no other response of the batch says (`rewards.diversity`),
- ``FILE.py:FUNCTION``, the user's own ``fn(prompts, responses, **columns) -> list[float | None]``: prompts as the model
  reads them, the columns of the prompts' data rows by name, None for what cannot be scored.

A folder that is called as one of these is given as ``./length``.
"""

import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax

from rlhf_jax import models, rewards
from rlhf_jax.config import Compute
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.filter import Verdict
from rlhf_jax.training import ensembles, setup
from rlhf_jax.types import Metrics, RewardFn, Rollout

_NUMBER = r"(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
_WEIGHT = re.compile(rf"(?P<spec>.+)\*(?P<weight>[-+]?{_NUMBER})", re.IGNORECASE)

# The terms that may be followed by a number, and the least one.
_TERMS: dict[str, tuple[Callable[..., RewardFn], int]] = {
    "length": (rewards.length, 0),
    "repetition": (rewards.repetition, 1),
    "diversity": (rewards.diversity, 1),
}


Enforce = Callable[[Rollout, Rollout, Mapping[str, Sequence[Any]]], tuple[Rollout, Metrics, list[Verdict]]]
"""(sampled, scored, columns) -> the scored rollout after a filter of responses, its metrics, what it found in each."""


class RunReward(NamedTuple):
    """One of the two: a reward that is traced into the iteration, or one that runs on the host between two jits."""

    fn: RewardFn | None = None
    host: rewards.HostReward | None = None
    enforce: Enforce | None = None  # after a host reward, see training.safety


class _Ensemble(NamedTuple):
    how: rewards.EnsembleMethod
    coef: float
    models: list[str]  # folders or names


class _Part(NamedTuple):
    weight: float
    fn: RewardFn | None = None
    host: rewards.HostReward | None = None


def build(specs: Sequence[str], tokenizer: Tokenizer, compute: Compute, columns: Collection[str]) -> RunReward:
    """All entries as one reward, on the host if any of them is a Python function; several have metrics ``reward/NAME``.

    columns: names of the prompts' columns, which a Python function may ask for.

    Raises:
        UserError: no entry, one that does not exist or does not fit, two of one name, a reward model with another
            tokenizer than the policy's.
    """
    if not specs:
        raise UserError(
            "no reward: give --reward a reward model's folder, several as mean:A,B, min:A,B or uncertainty:A,B, "
            "FILE.py:FUNCTION, count:TEXT, length, repetition or diversity, such as --reward count:e"
        )
    parts: dict[str, _Part] = {}
    for entry in specs:
        spec, weight = _weighed(entry)
        name, part = _part(spec, weight, tokenizer, compute, columns)
        if name in parts:
            raise UserError(f"--reward {entry}: another part is called {name} too; rename one of them")
        parts[name] = part
    if any(part.host is not None for part in parts.values()):
        return RunReward(host=_host_sum(parts))
    fns = {name: (part.fn, part.weight) for name, part in parts.items() if part.fn is not None}
    if [weight for _, weight in fns.values()] == [1.0]:
        return RunReward(fn=next(iter(fns.values()))[0])
    return RunReward(fn=rewards.weighted(fns))


def sources(entry: str) -> dict[str, Path]:
    """The folders and Python files that an entry reads, by what a manifest calls them."""
    spec, _ = _weighed(entry)
    if spec.startswith("count:") or spec.partition(":")[0] in _TERMS:
        return {}
    chosen = _ensemble(spec)
    if chosen is not None:
        return {name: Path(name) for name in chosen.models if Path(name).exists()}
    file, colon, _ = spec.rpartition(":")
    path = Path(file if colon and file.endswith(".py") else spec)
    return {entry: path} if path.exists() else {}


def _weighed(entry: str) -> tuple[str, float]:
    match = _WEIGHT.fullmatch(entry)
    return (match["spec"], float(match["weight"])) if match else (entry, 1.0)


def _part(
    spec: str, weight: float, tokenizer: Tokenizer, compute: Compute, columns: Collection[str]
) -> tuple[str, _Part]:
    if spec.startswith("count:"):
        text = spec.removeprefix("count:")
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            raise UserError(
                f"--reward {spec}: {text!r} is {len(ids)} tokens of this tokenizer, and exactly 1 is counted"
            )
        return spec, _Part(weight, fn=rewards.token_count(ids[0]))
    term, colon, n = spec.partition(":")
    if term in _TERMS:
        return spec, _Part(weight, fn=_term(spec, term, n if colon else None))
    file, colon, function = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return function, _Part(
            weight, host=rewards.from_text(_function(spec, Path(file), function, columns), tokenizer)
        )
    chosen = _ensemble(spec)
    if chosen is not None:
        paths = [path for name in chosen.models for path in [*map(str, ensembles.folders(name))] or [name]]
        if len(paths) < 2 or len(set(paths)) < len(paths):
            raise UserError(
                f"--reward {spec}: an ensemble has at least two different models, here are {', '.join(paths)}"
            )
        print(f"reward {spec}: {len(paths)} models", flush=True)
        fns = [_reward_model(spec, path, tokenizer, compute) for path in paths]
        name = spec.removesuffix(",".join(chosen.models)) + ",".join(map(_name, chosen.models))
        return name, _Part(weight, fn=rewards.ensemble(fns, chosen.how, chosen.coef))
    if members := ensembles.folders(spec):
        raise UserError(
            f"--reward {spec}: here are the {len(members)} models of an ensemble; say how their scores become one: "
            f"mean:{spec}, min:{spec} (the worst case) or uncertainty:{spec} (mean - variance)"
        )
    return _name(spec), _Part(weight, fn=_reward_model(spec, spec, tokenizer, compute))


def _reward_model(spec: str, path: str, tokenizer: Tokenizer, compute: Compute) -> RewardFn:
    where = f"--reward {spec}" if spec == path else f"--reward {spec}: {path}"
    model, params, reward_tokenizer = setup.load_language_model(path, compute)
    if "score" not in params:
        raise UserError(f"{where}: this model has no score head; train one with experiments/reward_model.py")
    if reward_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{where}: the reward model's tokenizer is not the policy's; train the reward model from the same "
            "starting model"
        )
    return rewards.from_model(models.score_fn(model), params)


def _name(model: str) -> str:
    """The run that a reward model comes from, or its own name."""
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _ensemble(spec: str) -> _Ensemble | None:
    how, colon, listed = spec.partition(":")
    if not colon or how not in get_args(rewards.EnsembleMethod):
        return None
    coef = 1.0
    if how == "uncertainty" and ":" in listed:
        text, _, listed = listed.partition(":")
        if not re.fullmatch(_NUMBER, text, re.IGNORECASE):
            raise UserError(
                f"--reward {spec}: between the colons stands the variance's coefficient, a number of at least 0; "
                f"got {text!r}"
            )
        coef = float(text)
    names = listed.split(",")
    if not all(names):
        raise UserError(f"--reward {spec}: after `{how}:` come reward models' folders, with commas between them")
    return _Ensemble(how, coef, names)  # type: ignore[arg-type]


def _term(spec: str, term: str, n: str | None) -> RewardFn:
    make, least = _TERMS[term]
    if n is None:
        return make()
    if not re.fullmatch("[0-9]{1,9}", n) or int(n) < least:
        raise UserError(
            f"--reward {spec}: after `{term}:` comes a whole number, at least {least}, of tokens; got {n!r}"
        )
    return make(int(n))


def _function(spec: str, file: Path, name: str, columns: Collection[str]) -> Callable[..., Any]:
    """The function, called with those columns alone that it has parameters for."""
    if not file.is_file():
        raise UserError(f"--reward {spec}: no such file {file}")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"--reward {spec}: {error.filename}, line {error.lineno}: {error.msg}") from None
    fn = getattr(module, name, None)
    if not callable(fn):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=1)
        raise UserError(
            f"--reward {spec}: {file} has no function {name}" + (f"; did you mean {near[0]}?" if near else "")
        )
    parameters = list(inspect.signature(fn).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return fn
    wanted = [parameter for parameter in parameters[2:] if parameter.kind is not parameter.VAR_POSITIONAL]
    missing = [p.name for p in wanted if p.default is p.empty and p.name not in columns]
    if missing:
        raise UserError(
            f"--reward {spec}: {name} asks for {', '.join(missing)}, but the prompts' columns are "
            f"{', '.join(columns) or 'none'}"
        )
    names = [parameter.name for parameter in wanted if parameter.name in columns]

    def with_its_columns(prompts: list[str], responses: list[str], **given: list[Any]) -> Any:
        return fn(prompts, responses, **{key: given[key] for key in names})

    return with_its_columns


def as_host(reward: RunReward) -> rewards.HostReward:
    """A reward that runs on the host; one that can be traced runs on the devices.

    Raises:
        ValueError: when called, of a dense reward [B, T].
    """
    if reward.host is not None:
        return reward.host
    on_devices = jax.jit(lambda fn, rollout: fn(rollout))

    def score(rollout: Rollout, columns: Mapping[str, Sequence[Any]]) -> Any:
        result = jax.device_get(on_devices(reward.fn, rollout))
        scores, parts = result if isinstance(result, tuple) else (result, {})
        if scores.ndim != 1:
            raise ValueError(f"expected one score a response, [{len(rollout.tokens)}], got {scores.shape}")
        return scores.tolist(), parts

    return score


def _host_sum(parts: Mapping[str, _Part]) -> rewards.HostReward:
    """The weighted sum of parts, of which those that can be traced run on the devices."""
    hosts = {name: as_host(RunReward(part.fn, part.host)) for name, part in parts.items()}

    def score(rollout: Rollout, columns: Mapping[str, Sequence[Any]]) -> tuple[list[float | None], dict[str, Any]]:
        named: dict[str, Any] = {}
        totals: list[float | None] = [0.0] * len(rollout.tokens)
        for name, part in parts.items():
            result = hosts[name](rollout, columns)
            scores, inner = result if isinstance(result, tuple) else (result, {})
            scores = list(scores)
            named |= {name: scores} | {f"{name}/{key}": values for key, values in inner.items()}
            # What one part cannot score has no sum.
            totals = [
                None if total is None or value is None else total + part.weight * value
                for total, value in zip(totals, scores, strict=True)
            ]
        return totals, named

    return score
