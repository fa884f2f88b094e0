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

from rlhf_jax.config import check_trusted, recorded
from rlhf_jax.data import chat, encoding
from rlhf_jax.data.rows import Message, Row, Text
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import bench
from rlhf_jax.generation import stops
from rlhf_jax.generation.generator import Generator
from rlhf_jax.graders import spec
from rlhf_jax.inference import asking
from rlhf_jax.runs.reading import settings_file
from rlhf_jax.types import Rollout

HELP = """\
/reset           forget the conversation
/temperature X   0 takes the most likely token
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
    """A model, its history of the conversation, and its last answer while it is sampled and
    afterwards.
    """

    label: str
    folder: str
    policy: Generator
    system: list[Message]
    template: chat.ChatTemplate | None
    """Renders the conversation; None: each line is a prompt by itself."""
    turns: list[tuple[Message, Message]] = dataclasses.field(default_factory=list)
    messages: list[Message] = dataclasses.field(default_factory=list)  # that were answered last
    prompt: list[int] = dataclasses.field(default_factory=list)  # the same as the model reads them
    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""

    def ask(self, line: str, note: Callable[[str], None]) -> tuple[list[Message], list[int]]:
        """The conversation with a line, as messages and as the model reads it. Drops the oldest
        turns until it fits.

        Raises:
            UserError: the line does not fit, or spells a special token.
        """
        policy = self.policy
        where = "your line"
        for num_dropped in range(len(self.turns) + 1):
            kept = self.turns[num_dropped:]
            before = [message for turn in kept for message in turn]
            messages = [*self.system, *before, Message(role="user", content=line)]
            prompt: Text = line
            if self.template is not None:
                prompt = self.template.prompt(messages, where)
            [ids] = encoding.prompt_ids([Row(prompt, (), where)], policy.tokenizer, policy.template)
            if len(ids) <= policy.room:
                break
        else:
            raise UserError(
                f"your line makes a prompt of {len(ids)} tokens, and {policy.room} fit beside "
                f"{policy.config.max_new_tokens} for the answer"
            )
        if num_dropped:
            turns = "turn is" if num_dropped == 1 else f"{num_dropped} turns are"
            note(f"(the oldest {turns} dropped: {policy.room} tokens fit)")
        self.turns = kept
        return messages, ids

    def answer(self, messages: list[Message], prompt: list[int], seed: int) -> Iterator[str]:
        """The pieces of the answer as they come."""
        self.messages = messages
        self.prompt = prompt
        self.ids = []
        self.text = ""

        def sampled() -> Iterator[int]:
            for token in self.policy.stream(self.prompt, seed):
                self.ids.append(token)
                yield token

        decoded = self.policy.tokenizer.decode_stream(sampled())
        for piece in stops.until(decoded, self.policy.stop):
            self.text += piece
            yield piece

    def remember(self) -> None:
        """Adds the answer, whole or stopped, to the conversation."""
        if self.template is not None:
            said = Message(role="assistant", content=self.text)
            self.turns.append((self.messages[-1], said))


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
    """The reward of the run's config.yaml; none if it names code or a URL that may be another's."""
    entries = tuple(recorded(folder).get("reward", ()))
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
            self._answer_side_by_side(line, self.console.columns)
        elif command:
            for speaker in self.speakers:
                self._answer(speaker, line)

    def _answer(self, speaker: Speaker, line: str) -> None:
        """Shows the answer as it comes, and remembers it. Ctrl-C ends it."""
        asked = speaker.ask(line, self.console.note)
        self.console.say(f"{speaker.label}: " if len(self.speakers) > 1 else "")
        try:
            for piece in speaker.answer(*asked, self.seed):
                self.console.say(piece)
        except KeyboardInterrupt:
            self.console.note("\n(stopped)")
        self.console.say("\n")
        speaker.remember()

    def _answer_side_by_side(self, line: str, columns: Callable[[Sequence[str]], Columns]) -> None:
        """The same with all speakers, who sample a token each in turn. Ctrl-C ends all answers."""
        asked = [speaker.ask(line, self.console.note) for speaker in self.speakers]
        labels = [f"{speaker.label}: {speaker.folder}" for speaker in self.speakers]
        answers = [
            speaker.answer(*own, self.seed)
            for speaker, own in zip(self.speakers, asked, strict=True)
        ]
        try:
            with columns(labels) as show:
                for _ in itertools.zip_longest(*answers):
                    show([speaker.text for speaker in self.speakers])
        except KeyboardInterrupt:
            self.console.note("(stopped)")
        for speaker in self.speakers:
            speaker.remember()

    def _do(self, command: str, words: list[str]) -> None:
        if command == "/reset":
            for speaker in self.speakers:
                speaker.turns.clear()
                speaker.messages.clear()
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
            if not speaker.messages:
                raise UserError("/score: nothing has been answered yet")
            tokenizer = speaker.policy.tokenizer
            known = tokenizer.fingerprint
            if known not in self.rewards:
                self.rewards[known] = asking.reward_of(self.entries, speaker.policy, ())
            ids = [*speaker.prompt, *speaker.ids]
            width = -(-len(ids) // _BUCKET) * _BUCKET
            tokens, mask = encoding.left_padded([ids], width=width, pad_id=tokenizer.pad_id)
            in_response = np.arange(width)[None] >= width - len(speaker.ids)
            none = np.zeros(tokens.shape, np.float32)
            arrays: Any = (tokens, mask, in_response.astype(np.int32), none)
            columns = {"messages": [speaker.messages]}
            [score] = bench.score(self.rewards[known], Rollout(*arrays), columns, 1)
            name = f"{speaker.label}: " if len(self.speakers) > 1 else ""
            self.console.say(f"{name}score {score:.3f}\n")


def _number(command: str, words: list[str], kind: type) -> float:
    """The number after a command."""
    try:
        [word] = words
        return kind(word)
    except ValueError:
        raise UserError(f"{command}: expected one number, got {' '.join(words)!r}") from None
