"""The ``rlhf-jax`` command, and the start of every script.

A command's modules are imported when it runs, so that ``rlhf-jax --help`` waits neither for them
nor for JAX.
"""

import contextlib
import dataclasses
import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import tyro

import rlhf_jax
from rlhf_jax.data.rows import Kind, OnBadRow
from rlhf_jax.errors import (
    Stopped,
    TrainingFault,
    UserError,
    did_you_mean,
    escaped,
    file_errors,
    logger,
)
from rlhf_jax.graders import verifiable
from rlhf_jax.runs import allocator

if TYPE_CHECKING:  # it needs JAX
    from rlhf_jax.types import Algorithm

Positional = tyro.conf.Positional[str]
Files = tyro.conf.Positional[tuple[str, ...]]


class _Console(logging.Handler):
    """Prints messages as they are, to ``file`` (None: stdout)."""

    file: TextIO | None = None

    def emit(self, record: logging.LogRecord) -> None:
        _print(record.getMessage(), file=self.file, flush=True)


def _print(text: object, **how: Any) -> None:
    """Prints texts of data, files and settings without control characters."""
    print(escaped(str(text)), **how)


CONSOLE = _Console()


def attach_console() -> None:
    """Prints the messages of the logger ``rlhf_jax``, with which the package reports, to stdout."""
    logger.setLevel(logging.INFO)
    logger.addHandler(CONSOLE)
    # A library that configures the root logger would print each message again.
    logger.propagate = False


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's ``main`` and exits with its code (None: 0). On Linux the script may start
    anew first, with other settings of the allocator: see ``runs.allocator.keep_memory``.

    Errors that are printed without a traceback: a :class:`UserError`, which exits with 2; a
    :class:`TrainingFault`, with 1; a :class:`Stopped`, with 130 (Ctrl-C), 143 (SIGTERM) or 3 (an
    alert whose action is stop). Ctrl-C outside a training loop exits with 130 too, and a closed
    pipe, as of ``| head``, with 141 and no message. Any other exception passes through: Python
    prints its traceback and exits with 1.
    """
    allocator.keep_memory()  # first: it may start the process anew
    attach_console()
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **how: escaped(format_warning(*args, **how))
    # Modules and traces are many objects that stay: by default, half a second of each start.
    gc.set_threshold(100_000)
    try:
        code = main() or 0
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # of `| head`: nobody reads what is left in the buffer
        os._exit(141)
    except (UserError, TrainingFault, Stopped) as end:
        _print(end if isinstance(end, Stopped) else f"error: {end}", file=sys.stderr)
        sys.exit(end.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


MODEL = ("network", "compute", "mesh", "lora", "tokenizer", "text")
SAMPLES = ("rl.max_prompt_length", "rl.max_new_tokens", "rl.temperature")
RL = (*MODEL, "rl", "safety", "judge", "engine")
REWARD = (*RL, "reward")
# {command: (what it does, what it reads of a RunConfig beside the section of its own name)}
STAGES = {
    "sft": ("Fine-tune a language model on demonstrations {prompt, response}.", MODEL),
    "reward-model": ("Train a reward model on preferences.", (*MODEL, *SAMPLES)),
    "ppo": ("Train a policy by PPO with a KL penalty, on prompts and a reward.", REWARD),
    "vpg": ("Train a policy by REINFORCE with a running-mean baseline.", REWARD),
    "rloo": (
        "Train a policy by RLOO: several answers to a prompt, each against the others.",
        REWARD,
    ),
    "grpo": (
        "Train a policy by GRPO: rewards normalised among several answers to a prompt.",
        REWARD,
    ),
    "distill": (
        "Train a policy to say on its own samples what a teacher says.",
        REWARD,
    ),
    "dpo": (
        "Train a policy on preferences, without a reward model and without samples.",
        MODEL,
    ),
    "kto": (
        "Train a policy on single answers called desirable or not, without samples.",
        MODEL,
    ),
    "pipeline": (
        "Run SFT, a reward model and PPO, one after the other.",
        (*RL, "sft", "reward_model", "ppo"),
    ),
}


def train(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the stage of that name with the settings of a command line (``sys.argv[1:]`` by
    default).
    """
    from rlhf_jax import config, training
    from rlhf_jax.report import verdict

    description, reads = STAGES[name]
    kind = name.replace("-", "_")
    settings = config.parse(
        config.RunConfig, argv, prog=prog, description=description, sections=(*reads, kind)
    )
    result: Any
    if name in config.ALGORITHMS:
        kind = "policy"
        result = training.rl.run(settings, importlib.import_module(f"rlhf_jax.algorithms.{name}"))
    else:
        result = importlib.import_module(f"rlhf_jax.training.{kind}").run(settings)
    if name == "pipeline":
        kind = "policy"
        result = result.ppo
    commands = verdict.next_commands(kind, result.folder)
    logger.info("\n    ".join(["Next, for example:", *commands]))


def train_algorithm(
    algorithm: "Algorithm", argv: Sequence[str] | None = None, **parts: Any
) -> None:
    """Runs your own algorithm, a module, with the settings of a command line: those of any RL
    stage, and its ``Config`` as flags (``--vapo.alpha 0.1``) or as a section of a YAML file.

    Args:
        argv: ``sys.argv[1:]`` by default.
        parts: what else ``training.rl.run`` takes, such as ``run_reward``.
    """
    from rlhf_jax import config, training

    settings = config.parse(
        config.RunConfig,
        argv,
        description=_summary(algorithm),
        sections=(*REWARD, config.section_name(algorithm)),
        algorithm=algorithm,
    )
    training.rl.run(settings, algorithm, **parts)


def script(folder: str, name: str) -> ModuleType:
    """A script that comes with the package, as a module."""
    places = [place / folder for place in Path(__file__).parents[:2]]  # of a wheel, of a checkout
    sys.path.insert(0, str(next(place for place in places if place.is_dir())))
    return importlib.import_module(name)


def list_configs() -> None:
    """List the settings that come with the package: each NAME is for `--config NAME`."""
    from rlhf_jax import config

    for name, path in config.shipped().items():
        comment = path.read_text("utf-8").partition("\n#\n")[0].replace("\n#", "")
        print(f"{name:<12} {comment.removeprefix('# ')}")


def examine() -> int:
    """Print versions and devices, and try one step of every phase. Exits with 1 if anything is
    wrong.
    """
    import rich.table

    from rlhf_jax.training import doctor

    steps = script("benchmarks", "steps")
    checks = [*doctor.machine(), *doctor.self_test(lambda name: steps.work(name, steps.TINY))]
    table = rich.table.Table(show_header=False)
    for check in checks:
        table.add_row("ok" if check.passed else "FAIL", check.name, check.detail)
    rich.print(table)
    return 0 if all(check.passed for check in checks) else 1


def export_run(run: Positional, folder: Positional) -> None:
    """Copy a run's model to a Hugging Face folder with its tokenizer and a model card.

    Args:
        run: the folder of a finished run.
        folder: the new folder.
    """
    from rlhf_jax.report import export

    _print(f"wrote {export.export(run, folder)}")


def _config_of(module: str) -> Any:
    """For flags that are the ``Config`` of a module, which is imported when they are read."""
    return tyro.conf.arg(
        constructor_factory=lambda: importlib.import_module(f"rlhf_jax.{module}").Config
    )


def evaluate_run(
    run: Positional,
    config: tyro.conf.OmitArgPrefixes[Annotated[Any, _config_of("evaluation.evaluate")]],
) -> None:
    """Judge a run's policy by data: helpfulness, harmlessness, honesty, preferences, diversity,
    against another run.

    Writes evaluation.json and evaluation_samples.jsonl into the run's folder and draws its report
    again.

    Args:
        run: the folder of a finished run, or of a model.
        config: what it is judged by.
    """
    from rlhf_jax.evaluation import evaluate
    from rlhf_jax.report import page

    result = evaluate.run(run, config)
    rows = []
    for row in result.rows:
        interval = "" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
        value = "–" if row.value is None else f"{row.value:.3f}"
        count = f"{row.n} {row.unit}" if row.unit else ""
        rows.append((row.category, row.metric, value, interval, count, row.note))
    _print_table(("category", "metric", "value", "95% interval", "n", ""), rows)
    _print(f"wrote {result.path}")
    if (Path(run) / "manifest.json").is_file() and result.path.parent == Path(run):
        page.write([run], page.default_path([run]))


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints texts in columns under these labels."""
    from rich import console, table, text

    shown = table.Table(*columns, box=None)
    for row in rows:
        # Text: brackets in the name of a category are no markup.
        shown.add_row(*(text.Text(escaped(cell)) for cell in row))
    console.Console(width=1000).print(shown)  # a terminal's own width would cut texts


def chat_with(
    run: Positional,
    config: tyro.conf.OmitArgPrefixes[Annotated[Any, _config_of("inference.chat")]],
) -> None:
    """Talk with a model in the terminal; lines from a pipe are answered one by one.

    The answers go to stdout and all else to stderr. /help lists the commands.

    Args:
        run: the folder of a finished run, or of a model.
        config: who answers, and how.
    """
    from rlhf_jax.inference import chat

    CONSOLE.file = sys.stderr
    try:
        chat.run(run, config, _typed_lines(), _console())
    finally:
        CONSOLE.file = None


def label_pairs(
    run: Positional,
    config: tyro.conf.OmitArgPrefixes[Annotated[Any, _config_of("inference.label")]],
) -> None:
    """Compare pairs of answers in the terminal: rows that reward-model, dpo and kto train on.

    Who wrote which answer is not shown. The same command goes on where it was left.

    Args:
        run: the folder of a finished run, or of a model.
        config: which answers are compared.
    """
    from rlhf_jax.inference import label

    _print(label.run(run, config, _typed_lines(), _console()))


def _console() -> Any:
    from rlhf_jax.inference import chat

    return chat.Console(
        say=lambda text: _print(text, end="", flush=True),
        note=lambda text: _print(text, file=sys.stderr, flush=True),
        is_terminal=sys.stdin.isatty(),
        columns=_columns if sys.stdout.isatty() else None,
    )


@contextlib.contextmanager
def _columns(labels: Sequence[str]) -> Iterator[Callable[[Sequence[str]], None]]:
    """Shows texts in columns under these labels, anew at each call."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    with Live(auto_refresh=False) as live:

        def show(texts: Sequence[str]) -> None:
            table = Table(*labels, expand=True)
            for column in table.columns:
                column.ratio = 1
            table.add_row(*(Text(escaped(text)) for text in texts))
            live.update(table, refresh=True)

        yield show


def _typed_lines() -> Iterator[str]:
    """The lines of stdin; on a terminal after a mark, and with its line editor."""
    if not sys.stdin.isatty():
        with file_errors("stdin"):
            yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # which `input` then uses
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def generate_answers(
    run: Positional,
    config: tyro.conf.OmitArgPrefixes[Annotated[Any, _config_of("inference.generate")]],
) -> None:
    """Write a model's answers to prompts from files, as JSON lines {prompt, response}.

    The same command completes a file that was interrupted.

    Args:
        run: the folder of a finished run, or of a model.
        config: which prompts, and how they are asked.
    """
    from rlhf_jax.inference import generate

    _print(f"wrote {generate.run(run, config)} responses to {config.out}")


def verify_run(
    run: Positional,
    start: Annotated[int | None, tyro.conf.arg(name="from")] = None,
    steps: int | None = None,
    from_scratch: Annotated[bool, tyro.conf.arg(name="all")] = False,
    data: tuple[str, ...] = (),
    model: str | None = None,
    reward: tuple[str, ...] = (),
    trust_config: bool = False,
) -> int:
    """Repeat a part of a run from its own checkpoint, and compare metrics, samples and state byte
    by byte.

    Writes nothing into the run's folder, which may be somebody else's. Exits with 1 if anything
    differs, after a table of what differs first.

    Args:
        run: the folder of a run of one stage.
        start: the step of a checkpoint to begin at; by default the last but one.
        steps: how many steps; by default all to the run's last one.
        from_scratch: begin at the seed.
        data: where the run's data files are here, if not where they were.
        model: where its --model is here.
        reward: where its --reward is here.
        trust_config: run the Python files that its config names.
    """
    from rlhf_jax.training import verify

    audit = verify.verify(
        run,
        start=start,
        num_steps=steps,
        from_scratch=from_scratch,
        data=data,
        model=model,
        reward=reward,
        trust_config=trust_config,
    )
    _print(audit.compared)
    for sentence in audit.unsure:
        _print(f"not sure to repeat: {sentence}")
    for sentence in audit.machine:
        _print(f"this machine differs: {sentence}")
    if not audit.differences:
        _print("the same bytes")
        return 0
    rows = [["" if step is None else str(step), *texts] for step, *texts in audit.differences]
    _print_table(("step", "file", "where", "recorded", "repeated"), rows)
    return 1


def report_runs(runs: Files, output: str | None = None, png: str | None = None) -> None:
    """Draw what runs did as one HTML page: curves, samples before and after, settings, commands.

    Runs that differ only in the seed are drawn as a mean with a band; a pipeline's folder stands
    for its stages.

    Args:
        runs: folders of runs, finished or not.
        output: the page; by default report.html in the run's folder (stages.html in a folder of
            runs), or report.html here for several.
        png: a folder for the page's figures as PNG files too, called by their titles.
    """
    from rlhf_jax.report import page

    path = page.default_path(runs) if output is None else output
    page.write(runs, path)
    _print(path)
    if png is not None:
        _print(f"{len(page.write_png(runs, png))} figures in {png}")


def write_demo(folder: Positional, seed: int = 0, shuffle_labels: bool = False) -> None:
    """Write the generated assistant corpus: sft_data.json, preference_data.json, prompts.json and
    held-out files.

    Args:
        folder: where to write; made if missing.
        seed: the same seed gives the same files.
        shuffle_labels: preferences by coin flip, as a negative control.
    """
    from rlhf_jax.data import demo

    demo.write(folder, seed=seed, shuffle_labels=shuffle_labels)
    _print(f"wrote the demo corpus to {folder}")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How data files are read."""

    tokenizer: str | None = None
    """Folder or name; lengths are then in its tokens, and its chat template renders messages."""
    kind: Kind | None = None
    """What the rows should be; by default what most of them are."""
    columns: tuple[str, ...] = ()
    """Keys of the data under other names, each OURS=THEIRS: prompt=question response=answer."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of the functions of ``data.check``."""
        from rlhf_jax.data import tokenizers

        return vars(self) | {
            "tokenizer": self.tokenizer and tokenizers.load_tokenizer(self.tokenizer)
        }


def check_data(
    files: Files,
    reading: tyro.conf.OmitArgPrefixes[Reading],
    on_bad_row: OnBadRow = "error",
    reward: tuple[str, ...] = (),
    math: verifiable.Settings = verifiable.DEFAULT,
) -> int:
    """Read data files to their end: format, counts, lengths, duplicates, what they share, and every
    problem.

    Exits with 2 if a run could not read one of them.

    Args:
        files: JSON, JSON lines, CSV, Parquet or text files, or names of Hugging Face datasets.
        reading: how they are read.
        on_bad_row: error: rows that a stage cannot use are problems; drop: they are left out and
            counted.
        reward: math, regex:PATTERN or FILE.py:FUNCTION, tried on the rows: does a row's own answer
            score, and the prompt itself, an empty response and another row's answer not?
        math: how math reads answers.
    """
    from rlhf_jax.data import check

    tried: Any = {"reward": reward, "math": math}
    report = check.check(files, **reading.arguments(), on_bad_row=on_bad_row, **tried)
    _print(report.text)
    return 2 if report.num_problems else 0


def preview_data(
    file: Positional, reading: tyro.conf.OmitArgPrefixes[Reading], count: int = 3
) -> None:
    """Print the first rows of a data file as a run reads them.

    Args:
        file: a data file or the name of a Hugging Face dataset.
        reading: how it is read.
        count: rows to print.
    """
    from rlhf_jax.data import check

    _print(check.preview(file, count=count, **reading.arguments()))


SCRIPTS = {
    "quickstart": (
        "Generate a small corpus and train on it: SFT, a reward model and PPO in minutes, with a "
        "report.",
        "experiments/quickstart",
    ),
    "plan": (
        "Say what a stage would take on each device: `rlhf-jax plan ppo --config FILE --devices 8 "
        "--memory 80GB`.",
        "experiments/plan",
    ),
    "bench": (
        "Time a kind of step on random tokens and print one line of JSON.",
        "benchmarks/measure",
    ),
}
COMMANDS: dict[str, Callable[..., int | None]] = {
    "configs": list_configs,
    "doctor": examine,
    "evaluate": evaluate_run,
    "generate": generate_answers,
    "verify": verify_run,
    "chat": chat_with,
    "label": label_pairs,
    "report": report_runs,
    "export": export_run,
    "data check": check_data,
    "data preview": preview_data,
    "data demo": write_demo,
}


def run(argv: list[str]) -> int | None:
    """Runs one command line, without the program's name; returns the exit code (None: 0).

    Raises:
        UserError: there is no such command.
        SystemExit: after ``--help``, or code 2 for wrong flags.
    """
    attach_console()
    words = 2 if argv[:1] == ["data"] else 1
    name = " ".join(argv[:words])
    rest = argv[words:]
    prog = f"rlhf-jax {name}"
    if name == "--version":
        print(rlhf_jax.__version__)
        return 0
    if name in STAGES:
        train(name, rest, prog)
        return 0
    if name in SCRIPTS:
        folder, _, module = SCRIPTS[name][1].partition("/")
        return script(folder, module).main(rest)
    if name in COMMANDS:
        style = (tyro.conf.PositionalMetavarFromFieldName,)
        return tyro.cli(COMMANDS[name], prog=prog, args=rest, config=style)
    descriptions = {command: text for command, (text, _) in (STAGES | SCRIPTS).items()}
    for command, function in COMMANDS.items():
        descriptions[command] = " ".join(_summary(function).split())
    last_word = [*argv, "--help"][words - 1]
    if last_word not in ("-h", "--help"):
        hint = did_you_mean(name, descriptions)
        raise UserError(
            f"rlhf-jax: no command {name!r}{hint}\nThere are: {', '.join(descriptions)}"
        )
    print(
        "Reinforcement learning from human feedback. `rlhf-jax COMMAND --help` says more of a "
        "command:\n"
    )
    for command, description in descriptions.items():
        print(f"  rlhf-jax {command:<14} {description}")
    return 0


def _summary(documented: object) -> str:
    """The first paragraph of a docstring."""
    return (documented.__doc__ or "").partition("\n\n")[0]


def main() -> None:
    """Entry point of the installed command, and of ``python -m rlhf_jax``."""
    sys.argv[0] = "rlhf-jax"  # as manifests and messages name it
    run_script(lambda: run(sys.argv[1:]))
