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
    respond: Callable[..., Rollout], tokenizer: Tokenizer, stop: Sequence[str], after: int = 0
) -> Callable[..., Rollout]:
    """``respond`` with responses that are ``cut`` after sampling. Environments, rewards and updates
    get the cut responses. Every process cuts all rows.
    """
    if not stop:
        return respond

    def respond_until(*inputs: Any) -> Rollout:
        return cut(processes.fetch(respond(*inputs)), stop, tokenizer, after)

    return respond_until


def cut(rollout: Rollout, stop: Sequence[str], tokenizer: Tokenizer, after: int = 0) -> Rollout:
    """A Rollout of NumPy arrays whose responses end with the token that completes a stop string
    behind the text of their first ``after`` tokens; what follows is padding, as after EOS.
    ``stopped`` says which rows have one.
    """
    host: Any = jax.tree.map(np.array, rollout)
    stopped = np.zeros(len(host.tokens), bool)
    for i, mask in enumerate(host.response_mask != 0):
        columns = np.flatnonzero(mask)
        length = _length(host.tokens[i, columns].tolist(), stop, tokenizer, after)
        if length is not None:
            stopped[i] = True
            behind = columns[length:]
            host.tokens[i, behind] = tokenizer.pad_id
            for array in (host.attention_mask, host.response_mask, host.log_probs):
                array[i, behind] = 0
            if host.support is not None:
                host.support[i, behind] = -1
    return host.replace(stopped=stopped)


def _length(
    ids: Sequence[int], stop: Sequence[str], tokenizer: Tokenizer, after: int
) -> int | None:
    """The least number of ids whose text has a stop string behind that of the first ``after``."""
    begin = len(tokenizer.decode(ids[:after]))

    def ends(count: int) -> bool:
        text = tokenizer.decode(ids[:count])
        return any(word in text[begin:] for word in stop)

    if not ends(len(ids)):
        return None
    return bisect.bisect_left(range(len(ids)), True, key=ends)


def before(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string, or all of it."""
    places = [text.find(word) for word in stop if word in text]
    return text[: min(places)] if places else text


def sure(text: str, stop: Sequence[str]) -> int:
    """How much of a text without a stop string stays whatever follows: a stop string may have begun
    at its end.
    """
    begun = [n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])]
    return len(text) - max(begun, default=0)


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces of a text `before` the first stop string. Its possible beginning is held back."""
    text = ""
    num_shown = 0
    for piece in pieces:
        text += piece
        whole = before(text, stop)
        if whole != text:
            yield whole[num_shown:]
            return
        end = sure(text, stop)
        if end > num_shown:
            yield text[num_shown:end]
            num_shown = end
    if text[num_shown:]:
        yield text[num_shown:]
