"""Rows of messages as rows of ids, by a chat template: one text for the prompt and each response,
and which of its tokens are learned.
"""

from collections.abc import Sequence
from dataclasses import replace

from rlhf_jax.data import conversation
from rlhf_jax.data.chat import ChatTemplate, Encoded
from rlhf_jax.data.rows import BadRow, Messages, Row, common_length

_REWRITTEN = (
    "the chat template writes earlier turns otherwise once another follows, so that an answer of "
    "several turns has no single text; keep the turns before the last one equal in all answers"
)
_SEVERAL = (
    "answers of several turns need a chat template with a token that ends a turn; name a model "
    "that has one"
)

_MOST = 2 * 10**9  # characters that are rendered for one row; about ten seconds
_OF_A_MESSAGE = 2500  # characters that take as long as a message itself


def rendered(
    row: Row, template: ChatTemplate, last: bool = False, is_feedback: bool = False
) -> list[Row]:
    """The row with its messages as texts or token ids: one row, or one for each learned turn if a
    demonstration or feedback has no single text.

    Args:
      row: has ``messages``. A response that is a text is the assistant's next turn; one of token
        ids stays.
      last: only the last turn of each answer is learned.
      is_feedback: the target of the one answer belongs to each of its turns.

    Raises:
      BadRow: no turn is learned, the template fails, or a preference has no single text.
    """
    if not all(isinstance(response, str) for response in row.responses) or not row.responses:
        prompt = template.prompt(row.messages, row.source, tools=row.tools)
        return [replace(row, prompt=prompt)]
    answers = row.answers or [
        [{"role": "assistant", "content": response}] for response in row.responses
    ]
    row = replace(row, answers=tuple(answers))
    learns = [_learned(row, answer, last) for answer in answers]
    may_part = len(answers) == 1 and (row.targets is None or is_feedback)
    if template.tokenizer is None:
        return _as_texts(row, template, answers, learns, may_part)
    sides = [
        template.conversations(row.messages, answer, own, row.source, row.tools)
        for answer, own in zip(answers, learns, strict=True)
    ]
    is_demonstration = len(sides) == 1 and row.targets is None
    if not is_demonstration:
        end = template.end_of_turn
        sides = [[_ended(text, end) for text in texts] for texts in sides]
    if may_part:
        return _of_turns(row, answers[0], learns[0], sides[0])
    if any(len(texts) > 1 for texts in sides):
        raise BadRow(row.source, _REWRITTEN)
    return [_split(row, [text for [text] in sides])]


def _learned(row: Row, answer: Messages, last: bool) -> list[int]:
    whole = [*row.messages, *answer]
    learned = conversation.learned_turns(whole, len(row.messages), last)
    if not learned:
        raise BadRow(row.source, "no turn of the assistant is learned: each is empty or weighs 0")
    size = sum(_OF_A_MESSAGE + len(conversation.text_of(message)) for message in whole)
    if len(learned) * size > _MOST:
        what = f"{len(learned)} turns of {len(whole)} messages would be learned"
        how = "split the conversation, or learn its last turn alone (sft.turns: last)"
        raise BadRow(row.source, f"{what}, and each is rendered with all before it; {how}")
    return learned


def _as_texts(
    row: Row,
    template: ChatTemplate,
    answers: Sequence[Messages],
    learns: Sequence[list[int]],
    may_part: bool,
) -> list[Row]:
    """One row for each learned turn if it may be parted: no token of `chat.PLAIN` ends a turn."""
    if may_part:
        whole = [*row.messages, *answers[0]]
        turned = []
        for number in learns[0]:
            before = whole[:number]
            turn = whole[number : number + 1]
            prompt, text = template.answers(before, turn, row.source, row.tools)
            turned.append(replace(row, prompt=prompt, responses=(text,), messages=before))
        return _numbered(turned)
    if any(len(answer) > 1 for answer in answers):
        raise BadRow(row.source, _SEVERAL)
    texts = [template.answers(row.messages, answer, row.source, row.tools) for answer in answers]
    return [replace(row, prompt=texts[0][0], responses=tuple(text for _, text in texts))]


def _of_turns(row: Row, answer: Messages, learned: list[int], texts: list[Encoded]) -> list[Row]:
    """The row of a demonstration or feedback, or one for each turn if each has its own text."""
    if len(texts) == 1:
        return [_split(row, texts)]
    turned = []
    for number, text in zip(learned, texts, strict=True):
        if any(text.learned):
            before = [*row.messages, *answer][:number]
            turned.append(replace(_split(row, [text]), messages=before))
    return _numbered(turned)


def _numbered(turned: list[Row]) -> list[Row]:
    """Rows of the turns of a conversation; the source of each names its turn if there are
    several.
    """
    if len(turned) == 1:
        return turned
    first = turned[0].messages
    return [
        replace(row, source=f"{row.source}, turn {number}", first=first)
        for number, row in enumerate(turned, 1)
    ]


def _ended(text: Encoded, end_of_turn: int | None) -> Encoded:
    """The text up to the token that ends its last learned turn, where a score stands."""
    if not any(text.learned):
        return text
    end = len(text.learned) - text.learned[::-1].index(True)
    if end_of_turn in text.ids[:end]:
        end -= text.ids[:end][::-1].index(end_of_turn)
    return Encoded(text.ids[:end], text.learned[:end])


def _split(row: Row, texts: Sequence[Encoded]) -> Row:
    """The row with the ids that all texts begin with, up to the first that is learned, as its
    prompt, and the others as responses.
    """
    start = min(text.learned.index(True) for text in texts)
    if len(texts) > 1:
        start = min(start, common_length(*(text.ids for text in texts)))
    masks = tuple(tuple(text.learned[start:]) for text in texts)
    return replace(
        row,
        prompt=tuple(texts[0].ids[:start]),
        responses=tuple(tuple(text.ids[start:]) for text in texts),
        learned=() if all(map(all, masks)) else masks,
    )
