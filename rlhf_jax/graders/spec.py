"""The reward of a run, from the entries of ``--reward``, which docs/rewards.md lists.

Each entry is ``SPEC`` or ``SPEC*WEIGHT``; several are summed. Behind it ``else NUMBER`` says what
the score of a response is that the SPEC cannot score; without it such a response is unscored. A
SPEC is a reward model's folder or Hugging Face name, an ensemble of them (`rewards.ensemble`), a
count or an n-gram reward of `rewards`, a rule of `graders.verifiable`, the user's own function
(`rewards.from_text`), a server (`service.reward_service`), a judge (`service.RubricJudge`) or a
judge of pairs (`graders.pairs`). A folder with the name of one of these is given as ``./length``.
"""

import contextlib
import difflib
import hashlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import CodeType, MappingProxyType, ModuleType
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rlhf_jax.errors import UserError, check_pattern, did_you_mean, logger, read_file
from rlhf_jax.graders import pairs, service, verifiable
from rlhf_jax.graders.client import check_url, is_url
from rlhf_jax.graders.service import Services
from rlhf_jax.models.hf import model_folder
from rlhf_jax.rewards.functions import (
    EnsembleMethod,
    combined,
    deviation,
    ensemble,
    from_model,
    from_steps,
    length,
    token_count,
    weighted,
)
from rlhf_jax.rewards.host import (
    Columns,
    HostReward,
    HostScores,
    Score,
    Unscored,
    at_tokens,
    row_score,
    row_scores,
)
from rlhf_jax.rewards.ngrams import diversity, repetition
from rlhf_jax.rewards.texts import (
    ALIASES,
    TEXTS,
    Decoder,
    TextScorer,
    check_function,
    from_conversations,
    from_text,
)
from rlhf_jax.runs import processes
from rlhf_jax.types import Params, RewardFn, Rollout, ScoreFn

_PAIRS = "pairs:"
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_ENTRY = re.compile(rf"(?s)\A(.*?)(?:\*([-+]?{_NUMBER}))?(?: +else +([-+]?{_NUMBER}))?\Z")
_METHODS = get_args(EnsembleMethod)
_ENSEMBLE = re.compile(rf"({'|'.join(_METHODS)}):(?:(?<=uncertainty:)({_NUMBER}):)?")

# Rewards that a number of tokens may follow, and the least number.
_TERMS = {"length": (length, 0), "repetition": (repetition, 1), "diversity": (diversity, 1)}
_sources: dict[str, bytes] = {}  # {name of a user's module: what was run}
_WORDS = ("count", *_TERMS, "regex", "math", "gym", *_METHODS, "judge", "pairs")


class Reward(NamedTuple):
    """The reward of a run. One of ``fn`` and ``host`` is None."""

    fn: RewardFn | None = None  # traced into the iteration
    host: HostReward | None = None  # runs on the host between two jits
    # how many replies of judges had no score since the last call; None: there is no judge
    take_unparsed: Callable[[], int] | None = None
    is_pairs: bool = False  # whether responses are compared, at validations with the first policy's
    # of each part that an alert watches, {name of the part: a response of the last batch}
    examples: tuple[Mapping[str, str], ...] = ()
    weights: Mapping[str, float] = MappingProxyType({})  # of its entries, by their names
    reads: frozenset[str] = frozenset()  # the columns that it reads by their names


Part = tuple[Reward, float, float | None]
"""A reward of a sum, its weight, and what its absence is worth, if it says so."""


class RewardModel(NamedTuple):
    """A reward model as ``load`` returns it."""

    score_fn: ScoreFn
    params: Params
    fingerprint: str  # of its tokenizer
    score_texts: TextScorer | None = None  # for a policy of another tokenizer
    in_groups: Callable[..., ScoreFn] | None = None  # see ``rewards.from_model``
    ends: np.ndarray | None = None  # of a process reward model, see ``rewards.from_steps``


Load = Callable[[str], RewardModel]
"""Loads a reward model from a folder or Hugging Face name; UserError, naming it, if it cannot or
lacks a score head.
"""


class PolicyTokenizer(Decoder, Protocol):
    """What a reward reads of the policy's tokenizer."""

    @property
    def fingerprint(self) -> str: ...
    def encode(self, text: str, /) -> list[int]: ...
    def decode_raw(self, ids: list[int], /) -> str: ...


FunctionOfTexts = Callable[..., Any]
"""A function as ``rewards.from_text`` takes it."""


def given(reward: Any) -> Reward | FunctionOfTexts:
    """What Python gives as the reward of a run, by the parameters of the function: a ``Reward`` of
    a RewardFn, which has one, or of a HostReward, which has two; and a function of texts as it is.
    A ``Reward`` may be given too.

    Raises:
      UserError: it is none of these.
    """
    if isinstance(reward, Reward):
        return reward
    parameters: Mapping[str, inspect.Parameter] = {}
    with contextlib.suppress(TypeError, ValueError):
        parameters = inspect.signature(reward).parameters
    if any(name in (*TEXTS, *ALIASES) for name in parameters):
        function: FunctionOfTexts = reward
        return function
    needed = [each for each in parameters.values() if each.default is each.empty]
    positional = [each for each in needed if each.kind is each.POSITIONAL_OR_KEYWORD]
    if len(positional) == len(needed) == 1:
        return Reward(fn=reward if isinstance(reward, Partial) else Partial(reward))
    if len(positional) == len(needed) == 2:
        return Reward(host=reward, reads=frozenset(getattr(reward, "reads", ())))
    raise UserError(
        "reward: expected a function of a rollout, which is traced, of (rollout, columns), which "
        "runs on the host, or of texts, whose parameters are among "
        f"{', '.join(TEXTS)}; or a graders.spec.Reward; got {reward!r:.200}"
    )


def of_texts(
    where: str, function: FunctionOfTexts, tokenizer: PolicyTokenizer, columns: Collection[str]
) -> Reward:
    """The reward of a function of texts; errors as of ``check_function``."""
    own: Collection[str] = getattr(function, "reads", ())
    examples = getattr(function, "examples", None)
    return Reward(
        host=from_text(function, tokenizer, tokenizer.decode_raw),
        take_unparsed=getattr(function, "take_unparsed", None),
        examples=() if examples is None else (examples,),
        reads=check_function(where, function, columns).union(own),
    )


def build_reward(
    entries: Sequence[str],
    *,
    tokenizer: PolicyTokenizer,
    load: Load,
    columns: Collection[str],
    flag: str = "--reward",
    services: Services | None = None,
    mathematics: verifiable.Settings = verifiable.DEFAULT,
) -> Reward:
    """All entries as one reward, on the host if any of them is.

    Several entries, or one with a weight or a Python function, have parts with the entries' names.

    Args:
      tokenizer: the policy's. A reward model of another one reads texts, on the host.
      load: loads the reward models, one call for each.
      columns: names of the prompts' columns, which a Python function may have parameters for.
      flag: where the entries come from, such as ``--rl.judge``; each error begins with it.
      services: how servers are asked; None: by the defaults, and no judge can be.
      mathematics: how ``math`` reads answers.

    Raises:
      UserError: no entry, one that does not exist or does not fit, two of one name.
    """
    if not entries:
        raise UserError(
            f"no reward: give {flag} a reward model's folder, several as mean:A,B, min:A,B or "
            "uncertainty:A,B, or FILE.py:FUNCTION, http://HOST/PATH, judge:RUBRIC.yaml, "
            f"regex:PATTERN, math, gym:TASK, count:TEXT, {', '.join(_TERMS)}, as in {flag} count:e"
        )
    reader = _Reader(tokenizer, load, columns, services or Services(), mathematics)
    parts: dict[str, Part] = {}
    for entry in entries:
        spec, weight, instead = _split(entry)
        name, reward = reader.read(spec, f"{flag} {spec}")
        if name in parts:
            raise UserError(f"{flag} {entry}: another part is called {name} too; rename one")
        parts[name] = (reward, weight, instead)
    weights = {name: weight for name, (_, weight, _) in parts.items()}
    fns = {name: (part[0].fn, weights[name]) for name, part in parts.items() if part[0].fn}
    if len(fns) < len(parts):
        return _sum_on_host(parts)._replace(weights=weights)
    (fn, weight), *others = fns.values()
    return Reward(fn=weighted(fns) if others or weight != 1 else fn, weights=weights)


def named(
    entry: str,
) -> tuple[Literal["code", "address", "models", "places", "nothing"], list[str]]:
    """What an entry names outside this program, found without a look at the disk: a Python file, a
    URL, the models whose scores it is, or other places.
    """
    [(spec, _, _)] = _ENTRY.findall(entry)
    of_pair = spec.removeprefix(_PAIRS)
    kind, _, rest = of_pair.partition(":")
    file, _, _ = of_pair.rpartition(":")
    if Path(file).suffix == ".py":
        return "code", [file]
    if kind in ("count", "regex", "math", "gym", *_TERMS):
        return "nothing", []
    if is_url(of_pair) or is_url(rest):  # alone, or behind the KIND of an engine or a teacher
        return "address", [of_pair]
    if kind in ("judge", "stored"):
        return "places", [rest]
    return "models" if of_pair == spec else "places", _split_method(of_pair)[1]


def sources(entry: str) -> dict[str, Path]:
    """The folders and Python files that an entry reads, by the names that a manifest gives them."""
    kind, names = named(entry)
    paths = {name: Path(name) for name in map(model_folder, names) if kind != "address"}
    is_ensemble = bool(_ENSEMBLE.match(entry.removeprefix(_PAIRS)))
    return {name if is_ensemble else entry: path for name, path in paths.items() if path.exists()}


def verified(entries: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether the entries have ``math``, and their regular expressions."""
    specs = [_split(entry)[0] for entry in entries]
    patterns = [spec.removeprefix("regex:") for spec in specs if spec.startswith("regex:")]
    return "math" in specs, patterns


def members(folder: str | Path) -> list[Path]:
    """The folders member_0, member_1, ... of an ensemble's folder; an empty list for another
    folder.
    """
    count = sum(member.name[7:].isdecimal() for member in Path(folder).glob("member_*"))
    return [Path(folder) / f"member_{i}" for i in range(count)]


def as_host(reward: Reward) -> HostReward:
    """A reward that each process calls on the host, with its own rows; traced ones use devices."""
    if reward.host is not None:
        return reward.host
    on_devices = jax.jit(lambda fn, rollout: fn(rollout))
    is_cut = any(not getattr(x, "is_fully_addressable", 1) for x in jax.tree.leaves(reward.fn))

    def score(rollout: Rollout, columns: Columns) -> HostScores:
        if is_cut:  # one program of all processes, for the rows of all
            processes.agree(lambda: None)  # one that has failed would be waited for
            rollout = processes.gather_rows(rollout)
        scores = on_devices(reward.fn, rollout)
        return processes.own_rows(processes.fetch(scores)) if is_cut else jax.device_get(scores)

    return score


def _sum_on_host(parts: dict[str, Part]) -> Reward:
    """As ``weighted``. A row that a part with a weight cannot score, and that does not say what its
    absence is worth, is unscored.
    """
    rewards = [reward for reward, _, _ in parts.values()]
    hosts = {name: as_host(reward) for name, (reward, _, _) in parts.items()}
    counts = [reward.take_unparsed for reward in rewards if reward.take_unparsed]

    def score(rollout: Rollout, columns: Columns) -> HostScores:
        of_parts: dict[str, list[Score]] = {}
        components: dict[str, list[Score]] = {}
        for name, (_, weight, instead) in parts.items():
            scored = row_scores(hosts[name], rollout, columns, f"the reward {name}")
            components[name] = list(map(row_score, scored.scores))
            components |= {f"{name}/{part}": v for part, v in scored.components.items()}
            worth = instead if weight else 0.0
            of_parts[name] = [
                x if worth is None or not isinstance(x, Unscored) else worth for x in scored.scores
            ]
        sums: list[Score] = []
        for row, mask in enumerate(rollout.mask):
            said = {name: scores[row] for name, scores in of_parts.items()}
            missing = {name: x.reason for name, x in said.items() if isinstance(x, Unscored)}
            given = [(parts[n][1], x) for n, x in said.items() if not isinstance(x, Unscored)]
            is_dense = any(isinstance(x, np.ndarray) for _, x in given)
            if missing:
                reasons = [f"{name}: {reason}" for name, reason in missing.items()]
                sums.append(Unscored("; ".join(reasons), tuple(missing)))
            else:
                sums.append(sum(w * (at_tokens(x, mask) if is_dense else x) for w, x in given))
        return sums, components

    return Reward(
        host=score,
        take_unparsed=(lambda: sum(count() for count in counts)) if counts else None,
        examples=tuple(part for reward in rewards for part in reward.examples),
        is_pairs=any(reward.is_pairs for reward in rewards),
        reads=frozenset().union(*(reward.reads for reward in rewards)),
    )


def _split(entry: str) -> tuple[str, float, float | None]:
    """SPEC, with ``model/`` in place of a run's folder, WEIGHT, and NUMBER or None."""
    [(spec, weight, instead)] = _ENTRY.findall(entry)
    pairs = _PAIRS if spec.startswith(_PAIRS) else ""
    method, names = _split_method(spec.removeprefix(pairs))
    spec = pairs + method + ",".join(map(model_folder, names))
    return spec, float(weight or 1.0), float(instead) if instead else None


def _split_method(spec: str) -> tuple[str, list[str]]:
    """``uncertainty:0.5:A,B`` -> ``uncertainty:0.5:``, [A, B]; any other SPEC -> "", [SPEC]."""
    match = _ENSEMBLE.match(spec)
    if match is None:
        return "", [spec]
    return match[0], spec.removeprefix(match[0]).split(",")


class _Reader(NamedTuple):
    """Reads a SPEC, with the arguments of ``build_reward``. Its methods return the name and the
    reward; errors begin with ``where``.
    """

    tokenizer: PolicyTokenizer
    load: Load
    columns: Collection[str]
    services: Services
    mathematics: verifiable.Settings

    def read(self, spec: str, where: str) -> tuple[str, Reward]:
        """A reward of any kind."""
        kind, colon, rest = spec.partition(":")
        file, _, function = spec.rpartition(":")
        name = spec
        fn: FunctionOfTexts
        if kind == "count" and colon:
            ids = self.tokenizer.encode(rest)
            if len(ids) != 1:
                raise UserError(f"{where}: {rest!r} is {len(ids)} tokens of this tokenizer, not 1")
            return spec, Reward(fn=token_count(ids[0]))
        if kind in _TERMS:
            make, least = _TERMS[kind]
            is_number = re.fullmatch("[0-9]{1,9}", rest) and int(rest) >= least
            if colon and not is_number:
                raise UserError(
                    f"{where}: after `{kind}:` comes a whole number, at least {least}, of tokens; "
                    f"got {rest!r}"
                )
            return spec, Reward(fn=make(int(rest)) if colon else make())
        if kind == "pairs" and rest:
            name, judge = self.pair_judge(rest, where)
            fn = pairs.win_shares(judge)
            reward = of_texts(where, fn, self.tokenizer, self.columns)
            return name, reward._replace(is_pairs=True)
        if kind == "regex" and rest:
            check_pattern(f"{where}: {rest!r}", rest)
            fn = verifiable.regex(rest)
        elif spec == "math" or (kind == "gym" and rest):
            fn = self._verifier(rest, where)
        elif file.endswith(".py"):
            name = function
            fn = load_function(where, Path(file), function)
        elif is_url(spec):
            check_url(where, spec)
            name = rest.removeprefix("//").partition("?")[0]
            fn = service.reward_service(spec, self.services.judge)
        elif kind == "judge":
            name = Path(rest).stem
            fn = service.RubricJudge(self._rubric(Path(rest), where), self.services)
        else:
            return self._read_models(spec, where)
        return name, of_texts(where, fn, self.tokenizer, self.columns)

    def _verifier(self, task: str, where: str) -> FunctionOfTexts:
        """``math``, or ``gym:TASK``."""
        if task and "gym" not in self.columns:
            raise UserError(f"{where}: write the prompts with `rlhf-jax data gym {task}`")
        if not task and importlib.util.find_spec("math_verify") is None:
            raise UserError(
                f"{where}: the package math-verify is not installed; pip install 'rlhf-jax[math]'"
            )
        return verifiable.gym(task) if task else verifiable.mathematics(self.mathematics)

    def pair_judge(self, spec: str, where: str) -> tuple[str, pairs.PairJudge]:
        """The name and the judge of what stands behind ``pairs:``."""
        kind, _, rest = spec.partition(":")
        file, _, function = spec.rpartition(":")
        if kind == "judge":
            rubric = self._rubric(Path(rest), where)
            return Path(rest).stem, pairs.RubricPairs(rubric, self.services)
        if file.endswith(".py"):
            loaded = load_function(where, Path(file), function)
            return function, pairs.by_function(where, loaded, self.columns)
        model = self.load(spec)
        if model.score_texts is None:
            raise UserError(
                f"{where}: this reward model scores steps, or the mesh cuts it over processes; it "
                "cannot compare texts"
            )
        return _run_name(spec), pairs.by_model(model.score_texts)

    def _rubric(self, file: Path, where: str) -> service.Rubric:
        judge = self.services.judge
        if judge.url is None or judge.model is None:
            raise UserError(
                f"{where}: a judge is a model on a chat server: give --judge.url, such as "
                "http://localhost:8000/v1, and --judge.model"
            )
        rubric = service.read_rubric(file)
        missing = [name for name in rubric.columns if name not in self.columns]
        if missing:
            raise UserError(f"{where}: the prompts have no column {missing[0]}; {file} reads it")
        return rubric

    def _read_models(self, spec: str, where: str) -> tuple[str, Reward]:
        """A reward model or an ensemble of several."""
        method, names = _split_method(spec)
        if not method:
            self._refuse_other(spec, where)
            return _run_name(spec), self._model(spec, where)
        how: Any
        how, coef, *_ = method.split(":")
        paths = [path for name in names for path in [*map(str, members(name))] or [name]]
        if "" in paths or len(paths) < 2 or len(set(paths)) < len(paths):
            raise UserError(
                f"{where}: an ensemble has at least two different models, with commas between "
                f"them; got {', '.join(paths)}"
            )
        logger.info(f"{where}: {len(paths)} models")
        rewards = [self._model(path, f"{where}: {path}") for path in paths]
        weight = float(coef or 1.0)
        fns = [reward.fn for reward in rewards if reward.fn]
        name = method + ",".join(map(_run_name, names))
        if len(fns) == len(rewards):
            return name, Reward(fn=ensemble(fns, how, weight))
        return name, Reward(host=_ensemble_on_host(list(map(as_host, rewards)), how, weight))

    def _refuse_other(self, spec: str, where: str) -> None:
        """Raises UserError for what is no reward model."""
        kind, colon, rest = spec.partition(":")
        if spec.endswith(".py"):
            text = read_file(Path(spec)).decode("utf-8", "replace")
            names = re.findall(r"^def ([a-zA-Z]\w*)\(", text, re.MULTILINE)
            known = f"; it defines {', '.join(names)}" if names else ""
            raise UserError(
                f"{where}: name the function of the file too: "
                f"{spec}:{names[0] if names else 'FUNCTION'}{known}"
            )
        if members(spec):
            raise UserError(
                f"{where}: the models of an ensemble; say how their scores become one: "
                f"mean:{spec}, min:{spec} (the worst case) or uncertainty:{spec} (mean - variance)"
            )
        near = difflib.get_close_matches(kind, _WORDS, n=1, cutoff=0.7)
        if near and "/" not in spec and not Path(spec).exists():
            raise UserError(
                f"{where}: no such reward and no such folder; did you mean {near[0]}{colon}{rest}?"
            )

    def _model(self, name: str, where: str) -> Reward:
        model = self.load(name)
        if model.ends is not None:
            return Reward(fn=from_steps(model.score_fn, model.params, jnp.asarray(model.ends)))
        if model.fingerprint == self.tokenizer.fingerprint:
            return Reward(fn=from_model(model.score_fn, model.params, model.in_groups))
        if model.score_texts is None:
            raise UserError(f"{where}: the reward model's tokenizer is not the policy's")
        logger.info(f"{where}: another tokenizer than the policy's, so it reads texts on the host")
        return Reward(host=from_conversations(model.score_texts, self.tokenizer, where))


def _ensemble_on_host(
    rewards: Sequence[HostReward], how: EnsembleMethod, coef: float
) -> HostReward:
    """As ``ensemble``. A row that one member cannot score has no score."""

    def score(rollout: Rollout, columns: Columns) -> HostScores:
        of_members = [row_scores(reward, rollout, columns).scores for reward in rewards]
        by_row = list(zip(*of_members, strict=True))
        faults = [[x for x in of_row if isinstance(x, Unscored)] for of_row in by_row]
        given = np.array(
            [[0.0] * len(rewards) if bad else row for row, bad in zip(by_row, faults, strict=True)],
            np.float32,
        ).T
        mean = combined(how, jnp.asarray(given), coef)
        uncertainty = deviation(jnp.asarray(given))
        scores = [bad[0] if bad else x for x, bad in zip(mean.tolist(), faults, strict=True)]
        return scores, {"uncertainty": np.asarray(uncertainty)}

    return score


def _run_name(model: str) -> str:
    """The name of the run folder that holds a reward model; or the model's own name if no run
    folder does.
    """
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def load_function(where: str, file: Path, name: str) -> Callable[..., Any]:
    """The function of a user's file. UserError, beginning with ``where``, if there is none."""
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"{where}: no such file {file}; expected FILE.py:FUNCTION")
    try:
        with contextlib.chdir("."):  # the run has relative paths
            module = _module(file.resolve())
    except (SyntaxError, SystemExit, ImportError) as error:
        raise UserError(f"{where}: {file} cannot be run: {type(error).__name__}: {error}") from None
    functions = {key: value for key, value in vars(module).items() if callable(value)}
    if name not in functions:
        raise UserError(f"{where}: {file} has no function {name}{did_you_mean(name, functions)}")
    fn: Callable[..., Any] = functions[name]
    return fn


class _Source(importlib.machinery.SourceFileLoader):
    """Compiles the file each time: bytecode of the same second may be that of another text."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _module(file: Path) -> ModuleType:
    """The user's file as an imported module, read once, so that its functions and classes can be
    pickled. It has the file's own name if no other module has: spawned processes find it by that.
    """
    # So that it can import what lies beside it; last, so that a file there does not take the place
    # of a module of the same name.
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    name = file.stem
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.origin or Path(found.origin).resolve() != file:
        place = hashlib.sha256(str(file).encode()).hexdigest()
        name = f"{re.sub('[^a-zA-Z0-9]', '_', name)}_{place[:8]}"
    source = read_file(file)
    if name in sys.modules and _sources.setdefault(name, source) == source:
        return sys.modules[name]
    loader = _Source(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    _sources[name] = source  # a notebook may change the file before its next run
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
