"""Multi-turn rollouts: the policy responds, an environment replies, and the policy goes on, all in
one row.

An environment is a Python function ``fn(conversation, row)``: a tool, a user, a game.
``conversation`` is a list of messages {"role", "content"}: the messages of the prompt (a plain
prompt is one message of the "user"), the policy's responses as "assistant", and the replies.
``row`` has the other columns of the prompt's data row. The function returns

- None: the row is done;
- a text, which is added to the row unchanged;
- a message such as {"role": "tool", "content": "42"}: the same, in the chat template that renders
  the messages of data files (the tokenizer's own, or `chat.PLAIN`), up to the opening of the next
  assistant turn;
- a pair of one of these and a number, the reward of the last response;
- these two and {name: number}, which stand in ``rollout.extras`` at the last token of the response,
  for an algorithm that reads them.

It is called on the host, once after each response. A run is reproducible and resumes exactly if the
function depends only on its two arguments.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import chat
from rlhf_jax.data.conversation import written
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.rows import Fields, Message, Record, Rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.host import called
from rlhf_jax.runs import processes
from rlhf_jax.types import Rollout

Reply = Callable[[list[Message], Fields], Any] | None
"""An environment's function, or None."""
Source = Reply | str
"""The same, or FILE.py:FUNCTION."""

_OPEN, _DONE, _CUT = range(3)  # the status of a row; _CUT: a limit ended it
_RESPONSE = "{response}"  # the place of the policy's response in a chat template


class Environment(NamedTuple):
    """An environment's function and what its conversations need."""

    fn: Callable[..., Any]
    tokenizer: Tokenizer
    chat_template: chat.ChatTemplate
    slots: int  # R, tokens of all responses and replies of a row
    max_turns: int | None = None  # the largest number of responses in a row


def function_of(source: Source, setting: str) -> Reply:
    """The function of a source; None if there is none.

    Raises:
        UserError: the file or the function in it does not exist; the message begins with the name
            of the setting.
    """
    if not isinstance(source, str):
        return source
    from rlhf_jax.graders import spec

    file, _, function = source.rpartition(":")
    return spec.load_function(f"{setting} {source}", Path(file), function)


def load_environment(
    fn: Reply, tokenizer: Tokenizer, slots: int, max_turns: int | None
) -> Environment | None:
    """The environment of a function; None if there is no function. UserError for ``max_turns``
    below 1 or without an environment.
    """
    if max_turns is not None and (fn is None or max_turns < 1):
        raise UserError(
            f"max_turns {max_turns}: conversations have an environment and at least 1 turn; give "
            "both"
        )
    if fn is None:
        return None
    return Environment(fn, tokenizer, chat.template_of(tokenizer), slots, max_turns)


def converse(
    environment: Environment | None,
    respond: Callable[..., Rollout],
    encoded: EncodedPrompts,
    rows: np.ndarray,
) -> tuple[Rollout, dict[str, np.ndarray]]:
    """Alternating responses and replies, until the environment or a limit ends each row. Without an
    environment each row has one response.

    Each turn reads the whole conversation again, in one compiled program: the sampler treats a
    conversation as a prompt of P + R columns, padded on the left. A token's randomness depends on
    its slot, as it does without turns.

    Args:
        respond: ``sampling.generate`` of tokens and attention mask [B, P + R], data rows [B] and
            ``used`` [B]; without an environment of [B, P], [B, P] and [B]. It may cut what it
            samples at stop strings (``generation.stops``), which end a response as EOS does.
        rows: [B] the data row of each prompt; -1 is a missing row.

    Returns:
        A Rollout of NumPy arrays [B, P + R], and a dict with the turns of each row, whether a limit
        cut it, and the sum of its rewards, [B] each. The attention mask covers responses and
        replies, the response mask and the log-probs only responses; ``rewards`` are the
        environment's, on the last token of a response, and so are its ``extras``. Without an
        environment: the result of ``respond`` and an empty dict.

    Raises:
        UserError: the environment failed or returned a value of a wrong type; it names the data row
            and the turn.
    """
    present = rows[:, None] >= 0
    tokens = np.where(present, encoded.tokens[rows], 0)
    attention_mask = np.where(present, encoded.attention_mask[rows], 0)
    if environment is None:
        inputs: Any = (tokens, attention_mask, rows.astype(np.int32))
        return respond(*inputs), {}
    slots = environment.slots
    empty = ((0, 0), (0, slots))
    tokens = np.pad(tokens, empty, constant_values=environment.tokenizer.pad_id)
    attention_mask = np.pad(attention_mask, empty)
    make: Any = Rollout  # of NumPy arrays
    batch = make(
        tokens,
        attention_mask,
        response_mask=np.zeros_like(attention_mask),
        log_probs=np.zeros(tokens.shape, np.float32),
        rewards=np.zeros(tokens.shape, np.float32),
        stopped=np.zeros(len(rows), bool),
        row_ids=jnp.int32(rows),
        extras={},
        prompt_length=tokens.shape[1] - slots,
    )
    own_data = [encoded.rows[row] for row in processes.own_rows(rows)]
    # A text is one message by the user.
    talks = [
        list(row.messages or [{"role": "user", "content": chat.shown(row, environment.tokenizer)}])
        for row in own_data
    ]
    turns = np.zeros(len(rows), int)
    status = np.where(rows < 0, _DONE, _OPEN)

    is_open = status == _OPEN
    while is_open.any():
        turns += is_open
        # The open conversations as prompts, padded on the left; the others are missing rows.
        padding_first = np.argsort(batch.attention_mask, axis=1, kind="stable")
        ids = np.take_along_axis(batch.tokens, padding_first, axis=1)
        mask = np.take_along_axis(batch.attention_mask, padding_first, axis=1)
        used = np.sum(batch.attention_mask[:, -slots:], axis=1)
        sampled = processes.fetch(respond(ids, mask * is_open[:, None], batch.row_ids, used))
        own = processes.own_rows((batch, sampled, status))
        answer = partial(_answer, environment, talks, own_data, turns.max(), *own)
        answered: tuple[Any, np.ndarray] = processes.agree(answer)
        own_batch, own_status = answered
        # Each process knows the names in its own replies.
        of_processes: list[list[str]] = processes.gather(partial(list, own_batch.extras))
        names = sorted(set(itertools.chain(*of_processes)))
        none = np.zeros(own_batch.tokens.shape, np.float32)
        extras = {name: own_batch.extras.get(name, none) for name in names}
        batch, status = processes.gather_rows((own_batch.replace(extras=extras), own_status))
        is_open = status == _OPEN
    batch = batch.replace(extras=batch.extras or None)
    return batch, {"turns": turns, "cut": status == _CUT, "reward": np.sum(batch.rewards, axis=1)}


def _answer(
    environment: Environment,
    talks: Sequence[list[Message]],
    data: Rows,
    turn: int,
    batch: Any,
    sampled: Rollout,
    status: np.ndarray,
) -> tuple[Rollout, np.ndarray]:
    """Puts this process's responses, and the replies to them, into its open rows; the batch and the
    status of each row.

    talks, data: of these rows; each message is added to its talk.
    """
    batch = batch.replace(truncated=sampled.truncated)
    names = ["tokens", "attention_mask", "response_mask", "log_probs"]
    if sampled.support is not None:
        names.append("support")
        if batch.support is None:
            shape = (*batch.tokens.shape, sampled.support.shape[-1])
            batch = batch.replace(support=np.full(shape, -1, np.int32))
    # Copies, because the arrays of several processes are read-only.
    batch, status = jax.tree.map(np.array, (batch, status))
    for i in np.flatnonzero(status == _OPEN).tolist():
        start = np.flatnonzero(batch.attention_mask[i])[-1] + 1
        length = np.sum(sampled.response_mask[i])
        end = start + length
        for name in names:
            own = getattr(sampled, name)[i, -environment.slots :][:length]
            getattr(batch, name)[i, start:end] = own
        response = batch.tokens[i, start:end]
        if sampled.stopped is not None:
            batch.stopped[i] = sampled.stopped[i]
        content = environment.tokenizer.decode(response)
        talks[i].append({"role": "assistant", "content": content})
        where = f"environment: {data[i].source}, turn {turn}"
        is_closed = not {*response[-1:].tolist()}.isdisjoint(environment.tokenizer.eos_ids)
        reply, reward, extras = _ask(environment, talks[i], data[i].columns, where, is_closed)
        batch.rewards[i, end - 1] = reward
        for name, number in extras.items():
            column = batch.extras.setdefault(name, np.zeros(batch.tokens.shape, np.float32))
            column[i, end - 1] = number
        if reply is None:
            status[i] = _DONE
            continue
        reply_end = end + len(reply)
        if turn == environment.max_turns or reply_end >= batch.tokens.shape[1]:
            status[i] = _CUT
            continue
        batch.tokens[i, end:reply_end] = reply
        batch.attention_mask[i, end:reply_end] = 1
    return batch, status


def _ask(
    environment: Environment, talk: list[Message], row: Fields, where: str, is_closed: bool
) -> tuple[list[int] | None, float, dict[str, float]]:
    """The ids of the reply to a conversation's last response, and the reward and the extras of that
    response. The reply is added to the conversation.

    is_closed: whether the response ends with an EOS id.
    """
    try:
        answer = called(where, environment.fn, copy.deepcopy(talk), copy.deepcopy(dict(row)))
        parts = answer if isinstance(answer, tuple) else (answer, 0.0)
        reply, reward, extras = parts if len(parts) != 2 else (*parts, {})
        message = reply if isinstance(reply, dict) else {"role": "user", "content": reply or ""}
        is_text = all(isinstance(message.get(part), str) for part in ("role", "content"))
        is_right = is_text and isinstance(extras, dict)
        if not is_right or not np.all(np.isfinite([reward, *extras.values()])):
            expected = "None, a text or a message, or (one of these, a number[, {name: number}])"
            raise TypeError(f"expected {expected}, got {answer!r:.80}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if reply is None:
        return None, reward, extras
    talk.append(copy.deepcopy(message))
    text = reply
    if isinstance(reply, dict):
        response = {"role": "assistant", "content": _RESPONSE}
        turns = [{"role": "user", "content": "?"}, response, reply]
        template = environment.chat_template
        own = template.with_variables(written(Record(row, where))["variables"], where)
        text = own.prompt(turns, where, after=_RESPONSE)
    if isinstance(text, str):
        [text] = environment.tokenizer.encode_batch([text], [where])
    # Where the policy has sampled the end of its turn, the template's is left out. A string of
    # rl.stop does not close a turn.
    is_end = is_closed and text[:1] and text[0] in environment.tokenizer.eos_ids
    return list(text[1:] if is_end else text), reward, extras
