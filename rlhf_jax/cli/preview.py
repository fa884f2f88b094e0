"""``rlhf-jax data preview``: rows as they are read, or as a stage learns them."""

import logging
import sys
from collections.abc import Sequence

import tyro

from rlhf_jax import config
from rlhf_jax.cli.console import show
from rlhf_jax.cli.data import Positional, Reading
from rlhf_jax.cli.stages import STAGES
from rlhf_jax.config import command_line
from rlhf_jax.data import check
from rlhf_jax.errors import UserError, did_you_mean, logger
from rlhf_jax.training import preview

PROGRAM = "rlhf-jax data preview"


def main(argv: Sequence[str]) -> None:
    """Prints the first rows of a file; with ``--for`` as that stage learns them."""
    if any(word.partition("=")[0] == "--for" for word in argv):
        preview_stage(argv)
    else:
        command_line.call(preview_data, argv, PROGRAM)


def preview_data(
    file: Positional, reading: tyro.conf.OmitArgPrefixes[Reading], count: int = 3
) -> None:
    """Print the first rows of a data file: as they are read, or as a stage learns them.

    ``rlhf-jax data preview FILE --for STAGE --model FOLDER`` shows the tokens of a stage (sft,
    reward-model, dpo, kto, ppo, ...): special tokens spelled out, and what is learned in green, or
    in [[ ]] where there are no colours. It takes ``--count``, ``--json`` for a line of JSON for
    each row, and every flag of the stage, such as ``--text.too-long truncate``.

    Args:
        file: a data file or the name of a Hugging Face dataset.
        reading: how it is read.
        count: rows to print.
    """
    tokenizer = reading.load_tokenizer()
    shown = check.preview(file, tokenizer, count, kind=reading.kind, columns=reading.columns)
    show(shown)


def preview_stage(argv: Sequence[str]) -> None:
    """Prints the first rows of a file as a stage learns them, by the settings of its flags."""
    parser = command_line.Parser(PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--for", dest="stage", required=True)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(argv)
    name = options.stage.replace("_", "-")
    if name not in STAGES:
        raise UserError(f"--for {name}: there is no such stage{did_you_mean(name, STAGES)}")
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-h", "--help")):
        usage = f"{PROGRAM} FILE --for {name} --model FOLDER"
        raise UserError(f"{PROGRAM}: name the file first: {usage}")
    stage = name.replace("-", "_")
    sections = (*STAGES[name].reads, stage)
    level = logger.level
    logger.setLevel(logging.WARNING)  # what a run says of its settings is no line of JSON
    try:
        flags = ["--data", *rest]
        settings = config.parse(config.RunConfig, flags, prog=PROGRAM, sections=sections)
    finally:
        logger.setLevel(level)
    shown = preview.rows(stage, config.data_source(settings), settings.rl, options.count)
    if not options.json:
        show(f"{shown.found.describe()}\n{shown.template}\n")
    for row in shown.rows:
        if options.json:
            show(preview.to_json(row, shown.tokenizer))
            for note in row.notes:
                show(f"{row.source}: {note}", file=sys.stderr)
        else:
            text = preview.to_text(row, shown.tokenizer, sys.stdout.isatty())
            print(text, end="\n\n", file=sys.stdout)  # with the colours, of a text without others
