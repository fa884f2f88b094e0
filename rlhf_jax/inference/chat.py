"""``rlhf-jax chat``: a conversation with a model, or with two at once.

Each turn the whole conversation is rendered by the model's chat template, and the answer comes
token by token. An answer is a function of the seed and of the conversation: it is the one that
`generate` writes for the same messages.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config import check_trusted
from rlhf_jax.data import chat, encoding
from rlhf_jax.data.rows import Message, Row, Text
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import bench
from rlhf_jax.generation import stops
from rlhf_jax.generation.generator import Generator
from rlhf_jax.graders import spec
from rlhf_jax.inference import asking
from rlhf_jax.runs.reading import settings_file, settings_of
from rlhf_jax.types import Rollout

HELP = """\
/reset           forget the conversation
/temperature X   0 takes the most likely token; the next answer waits for a new program
/seed N          other answers
/score           the reward of the last answer
/help            these lines
/quit            or the end of the input"""
_BUCKET = 64  # tokens: texts to score are padded to a multiple, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Config(asking.Settings):
    """The models that answer, and how they sample."""

    compare: str | None = None
    """Another run or model folder, which answers too: the answers are labelled A and B, and stand
    side by side on a terminal."""
    reward: tuple[str, ...] = ()
    """What /score says, SPECs as --reward of a training run has them; by default the run's own."""
    system: str | None = None
    """A system message before the conversation."""


Columns = contextlib.AbstractContextManager[Callable[[Sequence[str]], None]]
"""A context whose function is called with all texts whenever one of them has grown."""


class Console(NamedTuple):
    """Where the conversation is shown."""

    say: Callable[[str], None]  # a piece of an answer
    note: Callable[[str], None]  # a line about the conversation
    is_terminal: bool  # else lines come from a pipe, and the first mistake ends the command
    columns: Callable[[Sequence[str]], Columns] | None = None
    """Shows texts side by side, under these labels; None: they are shown one after the other."""


@dataclasses.dataclass
class Speaker:
    """A model and its history of the conversation."""

    label: str
    folder: str
    policy: Generator
    system: list[Message]
    template: chat.ChatTemplate | None
    """Renders the conversation; None: each line is a prompt by itself."""
    turns: list[tuple[Message, Message]] = dataclasses.field(default_factory=list)
    last: "Answer | None" = None

    def begin(self, line: str, note: Callable[[str], None]) -> "Answer":
        """Begins an answer to a line; nothing is sampled yet. Drops the oldest turns until the
        conversation fits.

        Raises:
            UserError: the line does not fit, or spells a special token.
        """
        room = self.policy.room
        for num_dropped in range(len(self.turns) + 1):
            kept = self.turns[num_dropped:]
            before = [message for turn in kept for message in turn]
            messages = [*self.system, *before, Message(role="user", content=line)]
            ids = self._ids(messages)
            if len(ids) <= room:
                break
        else:
            raise UserError(
                f"your line makes a prompt of {len(ids)} tokens, and {room} fit beside "
                f"{self.policy.config.max_new_tokens} for the answer"
            )
        if num_dropped:
            turns = "turn is" if num_dropped == 1 else f"{num_dropped} turns are"
            note(f"(the oldest {turns} dropped: {room} tokens fit)")
        self.turns = kept
        return Answer(self, messages, ids)

    def _ids(self, messages: list[Message]) -> list[int]:
        where = "your line"
        prompt: Text = messages[-1]["content"]
        if self.template is not None:
            prompt = self.template.prompt(messages, where)
        row = Row(prompt, (), where)
        [ids] = encoding.prompt_ids([row], self.policy.tokenizer, self.policy.template)
        return ids

    def remember(self, answer: "Answer") -> None:
        """Adds an answer, whole or stopped, to the conversation."""
        self.last = answer
        if self.template is not None:
            said = Message(role="assistant", content=answer.text)
            self.turns.append((answer.messages[-1], said))


@dataclasses.dataclass
class Answer:
    """An answer, while it is sampled and afterwards."""

    speaker: Speaker
    messages: list[Message]  # the prompt as messages
    prompt: list[int]
    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""

    def pieces(self, seed: int) -> Iterator[str]:
        """The pieces of the text as they come."""
        policy = self.speaker.policy
        decoded = policy.tokenizer.decode_stream(self._sampled(seed))
        for piece in stops.until(decoded, policy.stop):
            self.text += piece
            yield piece

    def _sampled(self, seed: int) -> Iterator[int]:
        for token in self.speaker.policy.stream(self.prompt, seed):
            self.ids.append(token)
            yield token


def run(folder: str, config: Config, lines: Iterable[str], console: Console) -> None:
    """Answers each of the lines until they end, or one of them is /quit.

    Raises:
        UserError: whatever is wrong with a folder; unless on a terminal, with a line.
    """
    asking.start(config)
    reward = config.reward or _own_reward(folder, console)
    folders = filter(None, (folder, config.compare))
    speakers = [
        _speaker(label, name, config, reward, console)
        for label, name in zip("AB", folders, strict=False)
    ]
    if config.compare is not None:
        console.note(f"A is {folder}, B is {config.compare}")
    talk = _Talk(speakers, reward, config.seed, console)
    for line in lines:
        if line.strip() == "/quit":
            return
        try:
            talk.take(line)
        except UserError as error:
            if not console.is_terminal:
                raise
            console.note(str(error))


def _own_reward(folder: str, console: Console) -> tuple[str, ...]:
    """The reward of the run's config.yaml; none if that is somebody else's and names code or a URL,
    which only ``--reward`` may.
    """
    entries = tuple(settings_of(folder).get("reward", ()))
    file = settings_file(folder)
    try:
        check_trusted({"reward": (entries, str(file))}, file.parent)
    except UserError as error:
        named, *_ = str(error).splitlines()
        console.note(f"{named}; it may be somebody else's: /score needs --reward")
        return ()
    return entries


def _speaker(
    label: str, folder: str, config: Config, reward: tuple[str, ...], console: Console
) -> Speaker:
    # A model's folder says how its run asked, for conversations too.
    asked = dataclasses.replace(config, template=config.template or chat.AUTO)
    policy = asking.open_policy(folder, asked, reward=reward)
    own = chat.template_of(policy.tokenizer, policy.template)
    if config.template is None and own.tokenizer is not None:
        system = [] if config.system is None else [Message(role="system", content=config.system)]
        return Speaker(label, folder, policy, system, own)
    around = chat.frame(policy.template, policy.tokenizer)
    why = "" if config.template else ": it has no chat template"
    console.note(f"{folder} gets each line without the earlier ones, as {around!r}{why}")
    if config.system is not None:
        raise UserError(f"--system: {folder} has no chat template, which would render it")
    return Speaker(label, folder, policy, [], None)


@dataclasses.dataclass
class _Talk:
    """A conversation, and what its commands change."""

    speakers: list[Speaker]
    entries: tuple[str, ...]
    seed: int
    console: Console
    rewards: dict[str, spec.Reward] = dataclasses.field(default_factory=dict)
    """By the fingerprint of a tokenizer."""

    def take(self, line: str) -> None:
        """Carries out a command, answers any other line."""
        command, *words = line.split() or [""]
        if command.startswith("/"):
            self._do(command, words)
        elif command and len(self.speakers) > 1 and self.console.columns is not None:
            self._answer_side_by_side(line)
        elif command:
            for speaker in self.speakers:
                self._answer(speaker, line)

    def _answer(self, speaker: Speaker, line: str) -> None:
        """Shows the answer as it comes, and remembers it. Ctrl-C ends it."""
        answer = speaker.begin(line, self.console.note)
        self.console.say(f"{speaker.label}: " if len(self.speakers) > 1 else "")
        try:
            for piece in answer.pieces(self.seed):
                self.console.say(piece)
        except KeyboardInterrupt:
            self.console.note("\n(stopped)")
        self.console.say("\n")
        speaker.remember(answer)

    def _answer_side_by_side(self, line: str) -> None:
        """The same with all speakers, who sample a token each in turn. Ctrl-C ends all answers."""
        assert self.console.columns is not None
        answers = [speaker.begin(line, self.console.note) for speaker in self.speakers]
        labels = [f"{speaker.label}: {speaker.folder}" for speaker in self.speakers]
        try:
            with self.console.columns(labels) as show:
                for _ in itertools.zip_longest(*(answer.pieces(self.seed) for answer in answers)):
                    show([answer.text for answer in answers])
        except KeyboardInterrupt:
            self.console.note("(stopped)")
        for answer in answers:
            answer.speaker.remember(answer)

    def _do(self, command: str, words: list[str]) -> None:
        if command == "/reset":
            for speaker in self.speakers:
                speaker.turns.clear()
                speaker.last = None
        elif command == "/seed":
            self.seed = int(_number(command, words, int))
        elif command == "/temperature":
            temperature = _number(command, words, float)
            for speaker in self.speakers:
                policy = speaker.policy
                try:
                    policy.config = dataclasses.replace(policy.config, temperature=temperature)
                except ValueError as error:
                    raise UserError(f"{command}: {error}") from error
        elif command == "/score":
            self._score()
        elif command == "/help":
            self.console.note(HELP)
        else:
            raise UserError(f"no command {command}; there are\n{HELP}")

    def _score(self) -> None:
        if not self.entries:
            raise UserError("/score: the run names no reward; give --reward, such as runs/rm")
        for speaker in self.speakers:
            answer = speaker.last
            if answer is None:
                raise UserError("/score: nothing has been answered yet")
            tokenizer = speaker.policy.tokenizer
            known = tokenizer.fingerprint
            if known not in self.rewards:
                self.rewards[known] = asking.reward_of(self.entries, speaker.policy, ())
            columns = {"messages": [answer.messages]}
            rollout = _rollout(answer, tokenizer.pad_id)
            [score] = bench.score(self.rewards[known], rollout, columns, 1)
            name = f"{speaker.label}: " if len(self.speakers) > 1 else ""
            self.console.say(f"{name}score {score:.3f}\n")


def _rollout(answer: Answer, pad_id: int) -> Rollout:
    """The prompt and the response as a batch of one row."""
    ids = [*answer.prompt, *answer.ids]
    width = -(-len(ids) // _BUCKET) * _BUCKET
    tokens, mask = encoding.left_padded([ids], width=width, pad_id=pad_id)
    in_response = np.arange(width)[None] >= width - len(answer.ids)
    arrays: Any = (tokens, mask, in_response.astype(np.int32), np.zeros(tokens.shape, np.float32))
    return Rollout(*arrays)


def _number(command: str, words: list[str], kind: type) -> float:
    """The number after a command."""
    try:
        [word] = words
        return kind(word)
    except ValueError:
        raise UserError(f"{command}: expected one number, got {' '.join(words)!r}") from None
