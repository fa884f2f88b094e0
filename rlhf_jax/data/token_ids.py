"""Token ids of prompts and responses: texts are tokenised, token ids are taken as they are."""

import functools
from collections.abc import Sequence

from rlhf_jax.data.rows import Comparison, Demonstration, Pair, Prompt, Text
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError


def prompt_ids(
    rows: Sequence[Demonstration | Pair | Comparison | Prompt], tokenizer: Tokenizer, template: str
) -> list[list[int]]:
    """Ids of each prompt in the template, whose text stands around prompts of token ids too.

    Raises:
      UserError: for a template without ``{prompt}``; naming the row, for a prompt without any token, for a character
        that the tokenizer lacks and for a token id that it does not have.
    """
    if "{prompt}" not in template:
        raise UserError(f"the template {template!r} has no {{prompt}} in it")
    texts = [row.prompt if isinstance(row.prompt, tuple) else template.replace("{prompt}", row.prompt) for row in rows]
    encoded = _ids(texts, tokenizer, [row.source for row in rows])
    around = [tokenizer.encode(part) for part in template.split("{prompt}")]
    for i, row in enumerate(rows):
        if isinstance(row.prompt, tuple):
            encoded[i] = functools.reduce(lambda before, after: [*before, *row.prompt, *after], around)
        if not encoded[i]:
            raise UserError(f"{row.source}: the tokenizer makes no token of the prompt {row.prompt!r}")
    return encoded


def response_ids(responses: Sequence[Text], tokenizer: Tokenizer, sources: Sequence[str]) -> list[list[int]]:
    """Ids of each response, with EOS after those that were text. Raises as `prompt_ids`."""
    encoded = _ids(responses, tokenizer, sources)
    return [
        ids if isinstance(response, tuple) else [*ids, tokenizer.eos_id]
        for response, ids in zip(responses, encoded, strict=True)
    ]


def _ids(texts: Sequence[Text], tokenizer: Tokenizer, sources: Sequence[str]) -> list[list[int]]:
    strings = [text for text in texts if isinstance(text, str)]
    try:
        encoded = iter(tokenizer.encode_batch(strings))
    except UserError as error:
        raise _naming_row(error, texts, tokenizer, sources) from error
    result = []
    for text, source in zip(texts, sources, strict=True):
        if isinstance(text, tuple) and max(text) >= tokenizer.vocab_size:
            raise UserError(
                f"{source}: holds the token id {max(text)}, but the tokenizer has ids up to {tokenizer.vocab_size - 1} "
                "only; use the tokenizer that made the ids"
            )
        result.append(next(encoded) if isinstance(text, str) else list(text))
    return result


def _naming_row(error: UserError, texts: Sequence[Text], tokenizer: Tokenizer, sources: Sequence[str]) -> UserError:
    """The error of a batch as that of its first text that raises it alone."""
    for text, source in zip(texts, sources, strict=True):
        try:
            tokenizer.encode(text if isinstance(text, str) else "")
        except UserError as its_own:
            return UserError(f"{source}: {its_own}")
    return error
