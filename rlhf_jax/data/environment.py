"""Multi-turn rollouts: the policy responds, an environment replies, and the policy goes on, all in
one row.

An environment is a Python function ``fn(conversation, row)``: a tool, a user, a game.
``conversation`` is a list of messages {"role", "content"}: those of the prompt, or a plain prompt by
the "user", the policy's responses by the "assistant", and the replies. ``row`` has the other columns of the prompt's data
row. It returns

- None: the row is done;
- a text: what the policy reads next, as it stands;
- a message such as {"role": "tool", "content": "42"}: the same, in the chat template that renders
  the messages of data files (the tokenizer's own, or `chat.PLAIN`), up to the opening of the next
  assistant turn;
- a pair of one of these and a number, the reward of the last response.

It is called on the host, once after each response. A run is reproducible and resumes exactly if the
function depends on its two arguments alone.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import chat
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.rows import Message
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import spec
from rlhf_jax.runs import processes
from rlhf_jax.types import Rollout

Reply = Callable[[list[Message], dict[str, Any]], Any] | None
"""An environment's function; None: there is none."""
Source = Reply | str
"""The same, or FILE.py:FUNCTION."""

_OPEN, _DONE, _CUT = range(3)  # what has become of a row; _CUT: a limit ended it
_RESPONSE = "{response}"  # stands for the policy's response in a chat template


class Environment(NamedTuple):
    """An environment's function and what its conversations need."""

    fn: Callable[..., Any]
    tokenizer: Tokenizer
    chat_template: chat.ChatTemplate
    slots: int  # R, of all responses and replies of a row
    max_turns: int | None = None  # responses of a row at most


def function_of(source: Source, setting: str) -> Reply:
    """The function of a source; None for None.

    Raises:
        UserError: there is no such file, or no such function in it; it begins with the name of the
            setting.
    """
    if not isinstance(source, str):
        return source
    file, _, function = source.rpartition(":")
    return spec.load_function(f"{setting} {source}", Path(file), function, ())


def load_environment(
    fn: Reply, tokenizer: Tokenizer, slots: int, max_turns: int | None
) -> Environment | None:
    """The environment of a function; None for None. UserError for ``max_turns`` below 1 or without
    an environment.
    """
    if max_turns is not None and (fn is None or max_turns < 1):
        raise UserError(
            f"max_turns {max_turns}: conversations have an environment and at least 1 turn; give "
            "both"
        )
    return (
        None
        if fn is None
        else Environment(fn, tokenizer, chat.template_of(tokenizer), slots, max_turns)
    )


def converse(
    environment: Environment | None,
    respond: Callable[..., Rollout],
    encoded: EncodedPrompts,
    rows: np.ndarray,
) -> tuple[Rollout, dict[str, np.ndarray]]:
    """Responses and replies in turn, until the environment or a limit ends each row; without one a
    response each.

    Each turn reads the conversation anew, in one compiled program: for the sampler a conversation
    is a prompt of P + R columns, padded on the left. A token's randomness is that of its slot, as
    without turns.

    Args:
        respond: ``sampling.generate`` of tokens and attention mask [B, P + R], data rows [B] and
            ``used`` [B]; without an environment of [B, P], [B, P] and [B].
        rows: [B] the data row of each prompt; -1 is an absent row.

    Returns:
        A Rollout of NumPy arrays [B, P + R], and the rows' turns, whether a limit cut them, and the
        sums of their rewards, [B] each. The attention mask covers responses and replies, the
        response mask and the log-probs the responses alone; ``rewards`` are the environment's, on
        the last token of a response. Without an environment what ``respond`` returns, and nothing.

    Raises:
        UserError: the environment failed or returned something else than it may; it names the data
            row and the turn.
    """
    arrays: Any = [
        np.where(rows[:, None] < 0, 0, x[rows]) for x in (encoded.tokens, encoded.attention_mask)
    ]
    if environment is None:
        return respond(*arrays, rows.astype(np.int32)), {}
    tokenizer, slots, columns = (
        environment.tokenizer,
        environment.slots,
        ((0, 0), (0, environment.slots)),
    )
    arrays = [
        np.pad(x, columns, constant_values=x_id)
        for x, x_id in zip(arrays, (tokenizer.pad_id, 0), strict=True)
    ]
    zeros: Any = np.zeros((2, *arrays[1].shape), np.float32)
    batch: Any = Rollout(
        arrays[0], arrays[1], np.zeros_like(arrays[1]), zeros[0], jnp.int32(rows), rewards=zeros[1]
    )
    own_rows = [encoded.rows[row] for row in processes.own_rows(rows)]
    talks: list[list[Message]] = []
    for row in own_rows:
        asked = {"role": "user", "content": chat.shown(row, tokenizer)}
        talks.append(list(row.messages or [asked]))
    turns, status = np.zeros(len(rows), int), np.where(rows < 0, _DONE, _OPEN)

    def answer(batch: Any, sampled: Rollout, status: np.ndarray) -> tuple[Rollout, np.ndarray]:
        """This process's rows with the responses in the open ones, and the replies to them."""
        batch, status = jax.tree.map(
            np.array, (batch, status)
        )  # arrays of several processes cannot be written to
        for i in np.flatnonzero(status == _OPEN):
            start = np.flatnonzero(batch.attention_mask[i])[-1] + 1
            end = start + np.sum(sampled.response_mask[i])
            for name in ("tokens", "attention_mask", "response_mask", "log_probs"):
                getattr(batch, name)[i, start:end] = getattr(sampled, name)[i, -slots:][
                    : end - start
                ]
            talks[i].append(
                {"role": "assistant", "content": tokenizer.decode(batch.tokens[i, start:end])}
            )
            where = f"environment: {own_rows[i].source}, turn {turns.max()}"
            reply, batch.rewards[i, end - 1] = _ask(
                environment, talks[i], own_rows[i].columns, where
            )
            if reply is None:
                status[i] = _DONE
            elif turns.max() == environment.max_turns or end + len(reply) >= batch.tokens.shape[1]:
                status[i] = _CUT
            else:
                batch.tokens[i, end : end + len(reply)] = reply
                batch.attention_mask[i, end : end + len(reply)] = 1
        return batch, status

    while (is_open := status == _OPEN).any():
        turns += is_open
        moved = np.argsort(
            batch.attention_mask, axis=1, kind="stable"
        )  # a row's tokens to its last columns
        ids, mask = (
            np.take_along_axis(x, moved, axis=1) for x in (batch.tokens, batch.attention_mask)
        )
        used = np.sum(batch.attention_mask[:, -slots:], axis=1)
        sampled = processes.fetch(respond(ids, mask * is_open[:, None], batch.row_ids, used))
        own = processes.own_rows((batch, sampled, status))
        batch, status = processes.gather_rows(processes.agree(functools.partial(answer, *own)))
    return batch, {"turns": turns, "cut": status == _CUT, "reward": np.sum(batch.rewards, axis=1)}


def _ask(
    environment: Environment, talk: list[Message], row: Any, where: str
) -> tuple[list[int] | None, float]:
    """The ids of the reply to a conversation's last response, which joins the conversation, and
    that one's reward.
    """
    try:
        answer = environment.fn([dict(message) for message in talk], dict(row))
        reply, reward = answer if isinstance(answer, tuple) else (answer, 0.0)
        parts = (
            [reply.get("role"), reply.get("content")] if isinstance(reply, dict) else [reply or ""]
        )
        if not all(isinstance(part, str) for part in parts) or not np.isfinite(reward):
            raise TypeError(
                "expected None, a text or a message, or (one of these, a number), got "
                f"{answer!r:.80}"
            )
    except Exception as error:
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if reply is None:
        return None, reward
    text: Any = reply
    if isinstance(reply, dict):
        turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _RESPONSE},
            reply,
        ]
        text = environment.chat_template.prompt(turns, where, after=_RESPONSE)
    talk.append(reply if isinstance(reply, dict) else {"role": "user", "content": reply})
    ids = (
        environment.tokenizer.encode_batch([text], [where])[0]
        if isinstance(text, str)
        else list(text)
    )
    # Without the template's end of the assistant's turn, which the policy has said.
    return ids[1:] if ids[:1] and ids[0] in environment.tokenizer.eos_ids else ids, reward
