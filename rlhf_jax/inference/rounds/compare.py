"""The pairs of a round, and who is better in each: sampled from the policy, chosen, compared."""

import functools
import json
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config import Compute, Judge, RLStage, Rounds, Text
from rlhf_jax.data import chat, files
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import Stopped, UserError, file_errors, logger
from rlhf_jax.graders import pairs as judges
from rlhf_jax.graders import spec
from rlhf_jax.graders.service import Services
from rlhf_jax.inference import asking, label
from rlhf_jax.inference.label import Judgement
from rlhf_jax.inference.labelling import pairs, rows, settings, store
from rlhf_jax.inference.labelling.store import Pair
from rlhf_jax.runs.writing import write_atomically
from rlhf_jax.training.common import reward_models, signals


class Prompts(NamedTuple):
    """The prompts of all rounds, in the order of the data, and what reads them."""

    rows: list[Row]
    tokenizer: Tokenizer  # the policy's
    template: str


class Asked(NamedTuple):
    """How the pairs of a round are sampled and chosen."""

    sampling: asking.Settings
    batch_size: int
    rounds: Rounds
    seed: int  # of the round


def prompts_of_round(prompts: Prompts, number: int, how: Rounds, seed: int) -> list[int]:
    """The numbers of the prompts of a round: the next ones of an order drawn from the seed, so that
    no prompt comes again before all have been asked.

    Raises:
        UserError: a round asks more prompts than there are.
    """
    count = how.prompts or how.pairs
    total = len(prompts.rows)
    if count > total:
        raise UserError(
            f"rounds.prompts: a round asks {count} prompts, and the data has {total}; lower "
            "rounds.prompts and rounds.pairs, or give more"
        )
    order = np.random.default_rng(seed).permutation(total)
    places = np.arange((number - 1) * count, number * count) % total
    return [int(order[place]) for place in places]


def sample(
    policy: str, prompts: Prompts, numbers: Sequence[int], members: Sequence[str], asked: Asked
) -> list[dict[str, Any]]:
    """The pairs to compare, as rows: {prompt, responses, chosen_by, row}, where row is the number
    of the prompt.

    Args:
        policy: the folder of the model that answers each prompt twice.
        members: folders of the reward models that choose; none: the first useful pairs.

    Raises:
        UserError: a prompt is too long; all pairs have equal or empty answers.
    """
    generator = asking.open_policy(policy, asked.sampling, batch_size=asked.batch_size)
    questions = generator.ask([prompts.rows[number] for number in numbers], 2)
    texts, _ = generator.sample(questions, asked.seed)
    pool = [
        Pair(place, asking.as_given(row, prompts.tokenizer), texts[2 * place : 2 * place + 2])
        for place, row in enumerate(questions.rows)
    ]
    kept = _chosen(pool, members, asked)
    if not kept:
        raise UserError(
            f"{policy}: both answers to each of {len(pool)} prompts are equal, or one is empty: "
            "there is nothing to compare; raise rl.temperature, or train the policy further"
        )
    wanted = asked.rounds.pairs
    if len(kept) < wanted:
        logger.info(
            f"{len(kept)} pairs instead of {wanted}: the others have equal or empty "
            "answers; a larger rounds.prompts leaves enough"
        )
    return [
        {
            "prompt": pair.prompt,
            "responses": pair.answers,
            "chosen_by": pair.chosen_by,
            "row": numbers[pair.number],
        }
        for pair in kept
    ]


def sampling(settings: RLStage, text: Text, dtype: str) -> asking.Settings:
    """The policy samples as in RL; ``dtype``: of the section ``compute``."""
    return asking.Settings(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        stop=settings.stop,
        template=text.template,
        template_options=text.template_options,
        dtype="float32" if dtype == "float32" else "bfloat16",
    )


def _chosen(pool: list[Pair], members: Sequence[str], asked: Asked) -> list[Pair]:
    how = asked.rounds
    if not members:
        useful = [pair for pair in pool if not label.is_useless(pair.answers)]
        return useful[: how.pairs]
    choice = pairs.Choice(
        choose=how.choose,
        reward=members,
        random_share=how.random_share,
        count=how.pairs,
        seed=asked.seed,
    )
    return pairs.choose(pool, choice)


def by_judge(
    compared: Sequence[Mapping[str, Any]],
    prompts: Prompts,
    judge: str,
    compute: Compute,
    service: Judge,
    replies: Path,
) -> list[dict[str, Any]]:
    """The rows of preferences by ``rounds.judge``, which sees each pair in both orders. A pair that
    it does not decide has no row.

    Args:
        judge: ``rounds.judge``.
        compute: how a reward model that judges computes.
        service: how a judge on a server is asked.
        replies: the folder that keeps those of a judge on a server.
    """
    asked = [prompts.rows[row["row"]] for row in compared]
    columns = sorted({name for row in prompts.rows for name in row.columns})
    tokenizer = prompts.tokenizer
    in_chat = chat.frame(prompts.template, tokenizer) is None
    load = functools.partial(
        reward_models.load_reward_model,
        compute=compute,
        policy=tokenizer.fingerprint,
        in_chat=in_chat,
    )
    name, compares = spec.build_pair_judge(
        judge,
        tokenizer=tokenizer,
        load=load,
        columns=columns,
        flag="--rounds.judge",
        services=Services(service, replies),
    )
    shown: dict[str, list[Any]] = {
        column: [row.columns.get(column) for row in asked] for column in columns
    }
    shown["prompts"] = [chat.shown(row, tokenizer) for row in asked]
    shown["messages"] = [row.conversation for row in asked]
    both = [judges.Pair(number, *row["responses"]) for number, row in enumerate(compared)]
    shares = judges.in_both_orders(compares, both, shown)
    given = _judgements(compared, shares, name)
    if len(given) < len(compared):
        logger.info(f"{name} decided {len(given)} of {len(compared)} pairs")
    return list(rows.rows(given))


def _judgements(
    compared: Sequence[Mapping[str, Any]], shares: judges.Shares, name: str
) -> list[Judgement]:
    """As people would have given them, from how sure the judge is that the first is better."""
    given = []
    for number, (row, share) in enumerate(zip(compared, shares, strict=True)):
        if share is None:
            continue
        choice = "tie" if share == 0.5 else "a" if share > 0.5 else "b"
        judgement = Judgement(number, row["prompt"], row["responses"], [0, 1], choice, False)
        given.append(judgement._replace(annotator=name, chosen_by=row["chosen_by"]))
    return given


def page_of(compared: Path, labels: Path, how: Rounds, seed: int) -> settings.Config:
    """The settings of the page on which people compare the pairs of a file."""
    return settings.Config(
        serve=True,
        answers=str(compared),
        out=str(labels),
        annotators=how.annotators,
        per_pair=how.per_pair,
        host=how.host,
        port=how.port,
        again=0.0,
        seed=seed,
    )


def by_people(page: settings.Config, tokens_of: Path) -> list[dict[str, Any]]:
    """The rows of preferences by people on the page, which ends when all pairs are judged.

    tokens_of: the file beside which their addresses are kept.

    Raises:
        Stopped: a signal ended the page before.
    """
    from rlhf_jax.inference.labelling import serve

    said = serve.run(None, page, serve.Job(ends_when_done=True, tokens_of=tokens_of))
    file = label.store_file(Path(page.out))
    judged = store.Store(file, page)
    try:
        is_done = judged.is_done()
        progress = judged.progress("")
    finally:
        judged.close()
    if not is_done:
        raise Stopped(
            f"{file}: {progress.given} of {progress.needed} judgements so far; go on with\n"
            f"    {signals.resume_command()}",
            signal.SIGINT,
        )
    logger.info(said)
    return list(rows.rows(store.read(file)))


def write_rows(path: Path, written: Iterable[Mapping[str, Any]]) -> None:
    """Writes a whole file of JSON lines, or nothing."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in written]
    with file_errors(path, "written"):
        write_atomically(path, "".join(lines))


def read_pairs(path: Path, prompts: Prompts) -> list[dict[str, Any]]:
    """The rows that ``sample`` made.

    Raises:
        UserError: a row is none of them.
    """
    found = []
    for record in files.read_source(str(path)).records:
        row = record.fields("prompt, responses, chosen_by, row")
        record.require(("prompt", "responses", "chosen_by", "row"))
        number = row["row"]
        is_number = type(number) is int and 0 <= number < len(prompts.rows)
        record.expect(is_number, "'row' must be the number of a prompt", number)
        found.append(row)
    return found
