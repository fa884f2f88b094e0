"""The flags of ``rlhf-jax label``: in the terminal, on the page, and of the summary."""

import dataclasses
import re
from typing import Literal

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.settings import check_at_least
from rlhf_jax.inference import label

_NAME = re.compile(r"[\w.-]{1,40}")
# What only the page reads.
_OF_PAGE = (
    *("host", "port", "names", "annotators", "per_pair", "reasons", "answers", "ahead"),
    *("choose", "random_share", "reward"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(label.Config):
    """Which answers are compared, and where."""

    prompts: tuple[str, ...] = ()
    """Files of prompts in any format of data/, or `demo`."""
    out: str = ""
    """The file of preferences, JSON lines. If it was begun with these settings, it is continued."""
    serve: bool = False
    """Serve a web page for several people instead of asking in the terminal."""
    annotators: tuple[str, ...] = ()
    """Who labels on the page, as ana,ben: each gets an address of their own. Names can be added
    later."""
    per_pair: int = 1
    """Annotators that judge each pair."""
    host: str = "127.0.0.1"
    """Where the page listens; 0.0.0.0 lets other machines in, which needs TLS in front."""
    port: int = 8765
    """0: any free port."""
    names: tuple[str, ...] = ()
    """Host names under which the page is reached, besides localhost and IP addresses."""
    reasons: bool = False
    """Ask on the page also for the strength of a preference and for a reason; both are optional."""
    answers: str | None = None
    """A file whose rows have two answers, as `responses` or as `chosen` and `rejected`: the page
    shows these, without a run or prompts."""
    ahead: int = 32
    """Pairs that are sampled before anybody asks for them."""
    choose: Literal["random", "disagreement", "close"] = "random"
    """Which pairs of all prompts are labelled: the first `--count`; those on which the `--reward`
    models disagree most; or those whose two scores are closest."""
    reward: tuple[str, ...] = ()
    """Folders of reward models, for `--choose`."""
    random_share: float = 0.2
    """Share of the chosen pairs that is random, for an honest accuracy of reward models."""
    summary: str | None = None
    """Print the agreement, bias and speed of what was labelled in this file, and nothing else."""
    html: str | None = None
    """Write the summary as a page into this file too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.summary is not None:
            return
        if self.html is not None:
            raise UserError("--html needs --summary FILE")
        if not self.out:
            raise UserError("give --out FILE, where the preferences are written")
        if bool(self.prompts) == (self.answers is not None):
            raise UserError("give --prompts FILE, or on the page --answers FILE, not both")
        if self.serve:
            self._check_page()
            return
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _OF_PAGE:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"--{name.replace('_', '-')} needs --serve")

    def _check_page(self) -> None:
        check_at_least(self, per_pair=1, ahead=1, port=0)
        people = self.people
        for name in people:
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"--annotators: {name!r} is no name of letters, digits, '.', '_' and '-'"
                )
        if not people or len(set(people)) < len(people):
            raise UserError("--annotators must name people, each once, as ana,ben")
        if self.per_pair > len(people):
            raise UserError(
                f"--per-pair {self.per_pair} needs as many --annotators, got {len(people)}"
            )
        if not 0 <= self.random_share <= 1:
            raise UserError(f"--random-share must be from 0 to 1, got {self.random_share}")
        if self.answers is not None and self.against is not None:
            raise UserError("--answers has both answers of a pair; leave --against out")
        self._check_choice()

    def _check_choice(self) -> None:
        at_least = {"random": 0, "disagreement": 2, "close": 1}[self.choose]
        if len(self.reward) < at_least:
            raise UserError(f"--choose {self.choose} needs {at_least} reward models: --reward")
        if self.reward and not at_least:
            raise UserError("--reward needs --choose disagreement or close")

    @property
    def people(self) -> list[str]:
        """The annotators' names."""
        return [name for names in self.annotators for name in names.split(",") if name]
