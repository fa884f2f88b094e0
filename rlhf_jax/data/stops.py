"""Stop strings: a response ends where its decoded text has one of them.

The compiled sampling loop knows only ids, and a stop string may begin inside a token. So the text
is searched after sampling, on the host, and the tokens after the one that completes a stop string
are masked. This is exact, but the masked tokens cost sampling time.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.runs import processes
from rlhf_jax.types import Rollout


def stopping(
    respond: Callable[..., Rollout], tokenizer: Tokenizer, stop: Sequence[str]
) -> Callable[..., Rollout]:
    """``respond`` with responses that are ``cut`` after sampling. Environments, rewards and updates
    get the cut responses. Every process cuts all rows.
    """
    if not stop:
        return respond

    def respond_until(*inputs: Any) -> Rollout:
        return cut(processes.fetch(respond(*inputs)), stop, tokenizer)

    return respond_until


def cut(rollout: Rollout, stop: Sequence[str], tokenizer: Tokenizer) -> Rollout:
    """A Rollout of NumPy arrays whose responses end with the token that completes a stop string;
    what follows is padding, as after EOS. ``stopped`` says which rows have one.
    """
    host: Any = jax.tree.map(np.array, rollout)
    stopped = np.zeros(len(host.tokens), bool)
    for i, mask in enumerate(host.response_mask != 0):
        columns = np.flatnonzero(mask)
        ids = host.tokens[i, columns].tolist()

        def ends(count: int, ids: list[int] = ids) -> bool:
            text = tokenizer.decode(ids[:count])
            return before(text, stop) != text

        stopped[i] = ends(len(ids))
        if stopped[i]:
            count = bisect.bisect_left(range(len(ids)), True, key=ends)
            after = columns[count:]
            host.tokens[i, after] = tokenizer.pad_id
            host.attention_mask[i, after] = 0
            host.response_mask[i, after] = 0
            host.log_probs[i, after] = 0.0
    return host.replace(stopped=stopped)


def before(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string, or all of it."""
    places = [text.find(word) for word in stop if word in text]
    return text[: min(places)] if places else text


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces of a text `before` the first stop string. What may be its beginning waits."""
    text = ""
    num_shown = 0
    for piece in pieces:
        text += piece
        whole = before(text, stop)
        if whole != text:
            yield whole[num_shown:]
            return
        beginnings = [word[:length] for word in stop for length in range(1, len(word))]
        waiting = max((len(part) for part in beginnings if text.endswith(part)), default=0)
        sure = len(text) - waiting
        if sure > num_shown:
            yield text[num_shown:sure]
            num_shown = sure
    if len(text) > num_shown:
        yield text[num_shown:]
