"""The flags of ``rlhf-jax label``: in the terminal, on the page, and of the summary."""

import dataclasses
import re
from typing import Literal

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.settings import check_at_least
from rlhf_jax.inference import asking

ALONE = "you"  # who labels in the terminal, unless --annotators gives a name
_NAME = re.compile(r"[\w.-]{1,40}")
_OF_PAGE = ("host", "port", "names", "per_pair", "reasons", "ahead")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(asking.FromFiles):
    """Which answers are compared, and where."""

    prompts: tuple[str, ...] = ()
    """Files of prompts in any format of data/, or `demo`."""
    answers: str | None = None
    """A file whose rows have two answers, as `responses` or as `chosen` and `rejected`: these are
    compared, without a run or prompts."""
    out: str = ""
    """The file of preferences, JSON lines. If it was begun with these settings, it is continued."""
    against: str | None = None
    """Another run or model folder, which gives the second answer; null: the run gives both."""
    count: int | None = None
    """Pairs to compare, of the first prompts; null: one for each prompt."""
    again: float = 0.1
    """Share of the pairs that are asked a second time at the end, in the other order."""
    batch_size: int = 8
    """Prompts that are answered at once, before the first question."""
    choose: Literal["random", "disagreement", "close"] = "random"
    """Which pairs of all prompts are labelled: the first `--count`; those on which the `--reward`
    models disagree most; or those whose two scores are closest."""
    reward: tuple[str, ...] = ()
    """Folders of reward models, for `--choose`."""
    random_share: float = 0.2
    """Share of the chosen pairs that is random, for an honest accuracy of reward models."""
    annotators: tuple[str, ...] = ()
    """Who labels, as ana,ben: on the page each gets an address of their own. Names can be added
    later."""
    serve: bool = False
    """Serve a web page for several people instead of asking in the terminal."""
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
    ahead: int = 32
    """Pairs that are sampled before anybody on the page asks for them."""
    summary: str | None = None
    """Print the agreement, bias and speed of what was labelled in this file, and nothing else."""
    html: str | None = None
    """Write the summary as a page into this file too."""

    def __post_init__(self) -> None:
        if self.summary is not None:
            return
        check_at_least(self, count=1, batch_size=1, per_pair=1, ahead=1, port=0)
        if self.html is not None:
            raise UserError("--html needs --summary FILE")
        if not self.out:
            raise UserError("give --out FILE, where the preferences are written")
        if bool(self.prompts) == (self.answers is not None):
            raise UserError("give --prompts FILE, or --answers FILE, not both")
        if self.answers is not None and self.against is not None:
            raise UserError("--answers has both answers of a pair; leave --against out")
        for field in dataclasses.fields(self):
            is_given = getattr(self, field.name) != field.default
            if field.name in _OF_PAGE and is_given and not self.serve:
                raise UserError(f"--{field.name.replace('_', '-')} needs --serve")
        for name, share in {"again": self.again, "random-share": self.random_share}.items():
            if not 0 <= share <= 1:
                raise UserError(f"--{name} must be from 0 to 1, got {share}")
        at_least = {"random": 0, "disagreement": 2, "close": 1}[self.choose]
        if len(self.reward) < at_least:
            raise UserError(f"--choose {self.choose} needs {at_least} reward models: --reward")
        if self.reward and not at_least:
            raise UserError("--reward needs --choose disagreement or close")
        self._check_people()

    def _check_people(self) -> None:
        for name in self.people:
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"--annotators: {name!r} is no name of letters, digits, '.', '_' and '-'"
                )
        if not self.people or len(set(self.people)) < len(self.people):
            raise UserError("--annotators must name people, each once, as ana,ben")
        if len(self.people) > 1 and not self.serve:
            raise UserError("--annotators: the terminal asks one; several need --serve")
        if self.per_pair > len(self.people):
            raise UserError(
                f"--per-pair {self.per_pair} needs as many --annotators, got {len(self.people)}"
            )

    @property
    def people(self) -> list[str]:
        """The annotators' names."""
        if not self.annotators and not self.serve:
            return [ALONE]
        return [name for names in self.annotators for name in names.split(",") if name]
