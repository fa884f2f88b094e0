"""The teacher of a distillation run: a model of the policy's vocabulary, in a folder or on a
server.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models, ops
from rlhf_jax.config import EngineServer, RLStage
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.engines.openai import Completions
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders.client import TEACHER_KEY, ask_each
from rlhf_jax.graders.replies import Replies
from rlhf_jax.models.hf import model_folder
from rlhf_jax.runs import processes
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.rl.method import Method
from rlhf_jax.types import AlgorithmConfig, Params, Rollout, Scores

MOST_FOREIGN = 0.1
"""Share of tokens that a server of the same vocabulary may spell in another way."""


def load(
    run: OpenRun, method_config: AlgorithmConfig, policy: LanguageModel, length: int
) -> LanguageModel | None:
    """The model of the settings' ``teacher``, on the devices; None if it is on a server.

    Args:
        length: of the longest prompt with its response, in tokens.

    Raises:
        UserError: none is given, the folder cannot be read, the vocabulary is another one, or the
            model reads shorter texts.
    """
    source = method_config.teacher
    if source is None:
        raise UserError("no teacher: give --distill.teacher the folder of a model, or of its run")
    if method_config.teacher_server is not None:
        return None
    source = model_folder(source)
    loaded = initial.load_language_model(source, run.config.compute, run.layout.placement)
    _check_vocabulary(source, loaded, policy)
    if "score" in loaded.params:
        raise UserError(f"distill.teacher {source}: a reward model has no probabilities of tokens")
    initial.check_positions(f"distill.teacher {source}: it", loaded.model, length)
    return loaded._replace(params=run.layout.put(loaded.params))


def _check_vocabulary(source: str, teacher: LanguageModel, policy: LanguageModel) -> None:
    """Raises UserError unless each id is the same text for both."""
    theirs = teacher.tokenizer.backend.get_vocab()
    ours = policy.tokenizer.backend.get_vocab()
    if theirs == ours:
        return
    other = [text for text, number in ours.items() if theirs.get(text) != number]
    other += [text for text in theirs if text not in ours]
    raise UserError(
        f"distill.teacher {source}: its vocabulary is another one: {len(other)} of "
        f"{len(theirs.keys() | ours.keys())} entries differ, such as {other[0]!r}. Probabilities "
        "of the next token are compared, so policy and teacher need the same tokens"
    )


def log_ratio(
    teacher: LanguageModel | None, settings: RLStage, score_rows: int | None
) -> jax.tree_util.Partial:
    """A RewardFn for runs without a reward: ``log q - log p`` of each response, q the teacher and p
    the policy. Its mean is minus the KL of responses from the teacher, at most 0 but for noise.

    Args:
        teacher: None: it is on a server, and rollouts have ``teacher_log_probs``.
        score_rows: rows that the teacher scores at once, see ``ops.by_rows``.
    """

    def score(params: Params, rollout: Rollout) -> Scores:
        log_probs = rollout.teacher_log_probs
        if teacher is not None:
            policy_fn = models.policy_fn(teacher.model, settings.temperature, one_text=True)
            by_rows = ops.by_rows(policy_fn, score_rows)
            log_probs = ops.evaluate(by_rows, params, rollout).log_probs
        assert log_probs is not None
        gap = jnp.where(rollout.mask, log_probs - rollout.log_probs, 0.0)
        return jnp.sum(gap, axis=1), {}

    return jax.tree_util.Partial(score, None if teacher is None else teacher.params)


# --- On a server


class Server:
    """A teacher on a server with OpenAI's protocol, which returns the log-probabilities of given
    tokens.

    Args:
        url: of the server.
        asked: how it is asked, and the name of its model; None: the only one.
        folder: where its replies are kept, so that a run that goes on asks nothing twice.
    """

    def __init__(self, url: str, asked: EngineServer, tokenizer: Tokenizer, folder: Path):
        self._url = url
        self._asked = asked
        self._tokenizer = tokenizer
        self._replies = Replies(folder, "teacher")
        self._is_checked = False  # whether its vocabulary is known to be the policy's

    @functools.cached_property
    def api(self) -> Completions:
        """The connection. It is made when it is first needed, because a run may find all replies in
        its folder.

        Raises:
            UserError: the server has several models, and none of them was chosen.
            ServiceError: the server does not reply.
        """
        api = Completions(self._url, self._asked, TEACHER_KEY)
        if self._asked.model is None and len(api.models) > 1:
            raise UserError(
                f"distill.teacher {self._url}: it serves {', '.join(api.models)}; choose one with "
                "--distill.teacher-model"
            )
        return api

    def log_probs(self, rollout: Rollout) -> np.ndarray:
        """[B, T] log-probabilities of the rows' tokens, each given those before it; 0 for pads.

        Args:
            rollout: NumPy arrays.

        Raises:
            ServiceError: there is no reply, or it is not as the protocol says.
            UserError: the server's tokens have other texts than the policy's.
        """
        is_real = rollout.attention_mask != 0
        rows = np.flatnonzero(is_real.any(axis=1)).tolist()
        questions = []
        for row in rows:
            ids = rollout.tokens[row, is_real[row]].tolist()
            questions.append(json.dumps([self._url, self._asked.model, ids]))
        answers = processes.in_first(lambda: self._answers(questions))
        log_probs = np.zeros(rollout.tokens.shape, np.float32)
        for row, answer in zip(rows, answers, strict=True):
            log_probs[row, is_real[row]] = answer
        return log_probs

    def _answers(self, questions: Sequence[str]) -> list[list[float]]:
        """The log-probabilities of each question's tokens, those that were kept or new ones."""
        missing = [*dict.fromkeys(text for text in questions if text not in self._replies)]
        if missing and not self._is_checked:
            self._ask(missing.pop(0))
        ask_each(self._ask, missing, self._asked)
        return [json.loads(self._replies[text]) for text in questions]

    def _ask(self, question: str) -> None:
        _, _, ids = json.loads(question)
        texts, log_probs = self.api.score(ids)
        if not self._is_checked:
            self._check_vocabulary(ids, texts)
        self._replies.add(question, json.dumps(log_probs))

    def _check_vocabulary(self, ids: list[int], texts: list[str]) -> None:
        """Raises UserError if the server spells whole, ordinary tokens in another way."""
        others = []
        for number, theirs in zip(ids, texts, strict=True):
            ours = self._tokenizer.decode([number]).strip()
            is_text = ours and ours.isprintable() and number not in self._tokenizer.special_ids
            if is_text and "\ufffd" not in ours and theirs.strip() != ours:
                others.append((ours, theirs))
        if len(others) > MOST_FOREIGN * len(ids):
            ours, theirs = others[0]
            raise UserError(
                f"distill.teacher {self._url}: its vocabulary is another one: {len(others)} "
                f"of {len(ids)} tokens have another text, such as {theirs!r} in place of {ours!r}. "
                "Policy and teacher need the same tokens"
            )
        self._is_checked = True


def connect(run: OpenRun, method: Method, policy: LanguageModel) -> Server | None:
    """The teacher on a server; None if it is in a folder. The method's config names its model.

    Raises:
        UserError: the run samples at another temperature than 1 or from a truncated distribution,
            or as ``Server.api``.
        ServiceError: the server does not reply.
    """
    method_config = method.algorithm_config
    if method_config.teacher_server is None:
        return None
    settings = method.settings
    if settings.temperature != 1.0:
        raise UserError(
            f"distill.teacher {method_config.teacher}: the log-probabilities of a server are those "
            f"of temperature 1; leave rl.temperature {settings.temperature:g} out"
        )
    if settings.truncates:
        raise UserError(
            f"distill.teacher {method_config.teacher}: the log-probabilities of a server are those "
            "of its whole vocabulary; leave rl.top_k, rl.top_p, rl.min_p and rl.min_new_tokens out"
        )
    asked = replace(run.config.engine, model=method_config.teacher_model)
    server = Server(method_config.teacher_server, asked, policy.tokenizer, run.folder.judge)
    if not run.folder.judge.is_dir():
        processes.in_first(lambda: server.api.model)
    return server
