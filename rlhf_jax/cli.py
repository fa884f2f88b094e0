"""The ``rlhf-jax`` command: what surrounds a run."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import rich.console
import rich.table
import tyro

from rlhf_jax.data import check as data_check
from rlhf_jax.data import demo, formats, labels, tokenizers
from rlhf_jax.errors import Stopped, TrainingFault, UserError
from rlhf_jax.evaluation import evaluate
from rlhf_jax.report import export, page
from rlhf_jax.training import doctor

Positional = tyro.conf.Positional[str]


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's ``main`` and exits with its code (None: 0).

    What is printed without a traceback: a :class:`UserError`, which exits with 2; a :class:`TrainingFault`, with 1; a
    :class:`Stopped`, with 130 (Ctrl-C), 143 (SIGTERM) or 3 (an alert whose action is stop). Ctrl-C outside a training
    loop exits with 130 too. Any other exception passes through: Python prints its traceback and exits with 1.
    """
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except TrainingFault as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        code = stopped.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def examine() -> int:
    """Print versions and devices, and try one step of every phase. Exits with 1 if anything is wrong."""
    checks = [*doctor.machine(), *doctor.self_test()]
    table = rich.table.Table(show_header=False)
    for check in checks:
        table.add_row("ok" if check.passed else "FAIL", check.name, check.detail)
    rich.console.Console().print(table)
    return 0 if all(check.passed for check in checks) else 1


def export_run(run: Positional, folder: Positional) -> None:
    """Copy a run's model to a Hugging Face folder with its tokenizer and a model card.

    Args:
        run: the folder of a finished run.
        folder: the new folder.
    """
    print(f"wrote {export.export(run, folder)}")


def evaluate_run(run: Positional, config: tyro.conf.OmitArgPrefixes[evaluate.Config]) -> None:
    """Judge a run's policy by data: helpfulness, harmlessness, honesty, preferences, diversity, against another run.

    Writes evaluation.json and evaluation_samples.jsonl into the run's folder and draws its report again.

    Args:
        run: the folder of a finished run, or of a model.
        config: what it is judged by.
    """
    result = evaluate.run(run, config)
    table = rich.table.Table(box=None)
    for name in ("category", "metric", "value", "95% interval", "n", ""):
        table.add_column(name, no_wrap=True)
    for row in result.rows:
        interval = "" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
        value = "–" if row.value is None else f"{row.value:.3f}"
        table.add_row(row.category, row.metric, value, interval, f"{row.n} {row.unit}" if row.unit else "", row.note)
    console = rich.console.Console()
    needed = console.measure(table, options=console.options.update(width=1000)).maximum  # else texts would be cut
    rich.console.Console(width=max(console.width, needed)).print(table)
    print(f"wrote {result.path}")
    if (Path(run) / "manifest.json").is_file() and result.path.parent == Path(run):
        page.write([run], page.default_path([run]))


def report_runs(runs: tyro.conf.Positional[tuple[str, ...]], output: str | None = None, png: str | None = None) -> None:
    """Draw what runs did as one HTML page: curves, samples before and after, settings, commands.

    Runs that differ only in the seed are drawn as a mean with a band; a pipeline's folder stands for its stages.

    Args:
        runs: folders of runs, finished or not.
        output: the page; by default report.html in the run's folder (stages.html in a folder of runs), or report.html
            here for several.
        png: a folder for the page's figures as PNG files too, called by their titles.
    """
    path = page.default_path(runs) if output is None else output
    page.write(runs, path)
    print(path)
    if png is not None:
        print(f"{len(page.write_png(runs, png))} figures in {png}")


def write_demo(folder: Positional, seed: int = 0, shuffle_labels: bool = False) -> None:
    """Write the generated assistant corpus: sft_data.json, preference_data.json, prompts.json and held-out files.

    Args:
        folder: where to write; made if missing.
        seed: the same seed gives the same files.
        shuffle_labels: preferences by coin flip, as a negative control.
    """
    demo.write(folder, seed=seed, shuffle_labels=shuffle_labels)
    print(f"wrote the demo corpus to {folder}")


def check_data(
    files: tyro.conf.Positional[tuple[str, ...]], tokenizer: str | None = None, kind: formats.Kind | None = None
) -> int:
    """Read data files to their end: format, counts, lengths, duplicates, what they share, and every problem.

    Exits with 2 if a run could not read one of them.

    Args:
        files: JSON, JSON lines, CSV, Parquet or text files, or names of Hugging Face datasets.
        tokenizer: folder or name; lengths are then in its tokens, and its chat template renders messages.
        kind: what the rows should be; by default what most of them are.
    """
    loaded = tokenizers.load_tokenizer(tokenizer) if tokenizer is not None else None
    report = data_check.check(files, loaded, kind)
    print(report.text)
    return 2 if report.num_problems else 0


def preview_data(
    file: Positional, count: int = 3, tokenizer: str | None = None, kind: formats.Kind | None = None
) -> None:
    """Print the first rows of a data file as a run reads them.

    Args:
        file: a data file or the name of a Hugging Face dataset.
        count: rows to print.
        tokenizer: folder or name; its chat template then renders messages.
        kind: what the rows should be; by default what most of them are.
    """
    loaded = tokenizers.load_tokenizer(tokenizer) if tokenizer is not None else None
    print(data_check.preview(file, loaded, kind, count))


def download_labels(name: Positional, folder: Positional, url: str | None = None) -> None:
    """Fetch a label set that lm-human-preferences published, check every row, and write its sha256 beside it.

    Args:
        name: sentiment, descriptiveness, cnndm-offline, cnndm-online, tldr-offline or tldr-online.
        folder: where to write; made if missing.
        url: another place that has the file.
    """
    found = labels.download(name, folder, url)
    print(f"{found.path}: {found.num_rows} rows, of which {found.num_equal} have four equal samples")
    print(f"sha256 {found.sha256}: of what came; no published one is known to compare it with")


def decode_labels(file: Positional, tokenizer: str, output: str | None = None) -> None:
    """Write a label file with texts in place of token ids, as JSON lines.

    Args:
        file: rows {query, sample0, ..., best}; the padding id 50259 is removed.
        tokenizer: folder or name of the tokenizer that made the ids; of the published labels, GPT-2's.
        output: the new file; by default FILE with the ending .decoded.jsonl.
    """
    path = str(Path(file).with_suffix(".decoded.jsonl")) if output is None else output
    done = labels.decode(file, path, tokenizers.load_tokenizer(tokenizer))
    dropped = "".join(f", {count} dropped ({reason})" for reason, count in done.dropped.items())
    print(f"wrote {path}: {done.num_rows} rows{dropped}; {done.num_broken} texts hold a broken character, U+FFFD")


COMMANDS: dict[str, dict[str, Callable[..., Any]]] = {
    "": {"doctor": examine, "evaluate": evaluate_run, "report": report_runs, "export": export_run},
    "data": {
        "check": check_data,
        "preview": preview_data,
        "demo": write_demo,
        "download": download_labels,
        "decode": decode_labels,
    },
}


def run(argv: list[str]) -> int | None:
    """Runs one command line, without the program's name; returns the exit code (None: 0).

    Raises:
        UserError: there is no such command.
        SystemExit: after ``--help``, or code 2 for wrong flags.
    """
    group = argv[0] if argv and argv[0] in COMMANDS else ""
    words = argv[1:] if group else argv
    names = [f"{name} {command}".strip() for name, commands in COMMANDS.items() for command in commands]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n\n" + "\n".join(f"    rlhf-jax {name} --help" for name in names))
        return 0
    if words and not words[0].startswith("-") and words[0] not in COMMANDS[group]:
        raise UserError(f"rlhf-jax: no command {' '.join([group, words[0]]).strip()!r}; there are: {', '.join(names)}")
    return tyro.extras.subcommand_cli_from_dict(COMMANDS[group], prog=f"rlhf-jax {group}".strip(), args=words)


def main() -> None:
    """Entry point of the installed command."""
    run_script(lambda: run(sys.argv[1:]))
