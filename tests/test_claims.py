"""Sentences of pages have the numbers of their results, and a page's differences hold together.

To hold a page's sentences, add the page and its claims to CLAIMS.
"""

from collections.abc import Iterable, Iterator

import pytest
from claims import BLOCK, DOCS, Claim, Difference, Results, check, not_held, read, shown_together

from rlhf_jax import ppo
from rlhf_jax.training.common import rates

# ---------------------------------------------------------------- docs/algorithms/ppo.md

CHOSEN, DEFAULT = "mean score", "mean score at 0.003"
PASSES = {1: "PPO, 1 pass", 4: "PPO, 4 passes"}
OTHERS = NO_CRITIC, BEFORE, RLOO, VPG = "no critic's", "PPO before's", "RLOO's", "VPG's"
TASKS = ("thrice", "dense", "long", "match", "sum", "rise", "sparse", "reward model")
EVIDENCE = ("thrice", "reward model")


def minus(r: Results, task: str, passes: int, other: str, rate: str = DEFAULT) -> Difference:
    return r.difference(f"{task}: {PASSES[passes]}", f"{rate} minus {other}")


def at_both(
    r: Results, others: Iterable[str], passes: Iterable[int], tasks: Iterable[str] = TASKS
) -> list[Difference]:
    """At the chosen rates and at the default one."""
    of = [(task, num, other) for task in tasks for num in passes for other in others]
    return [minus(r, *one, rate) for one in of for rate in (CHOSEN, DEFAULT)]


def num_around(found: Iterable[Difference], value: float = 0) -> int:
    return sum(low <= value <= high for _, low, high in found)


def more(r: Results, passes: int, other: str, rate: str = DEFAULT) -> list[str]:
    """The tasks on which PPO has more: the interval lies above 0."""
    return [task for task in TASKS if minus(r, task, passes, other, rate)[1] > 0]


def less(r: Results, passes: int, other: str, rate: str = DEFAULT) -> list[str]:
    return [task for task in TASKS if minus(r, task, passes, other, rate)[2] < 0]


def where_the_critic_helps(r: Results) -> Iterator[float | str]:
    """At the default rate and at the chosen ones, with one pass and with four."""
    assert more(r, 4, NO_CRITIC, CHOSEN) == ["dense"]
    for passes, rate, num in ((1, DEFAULT, 1), (1, CHOSEN, 1), (4, DEFAULT, 2)):
        tasks = more(r, passes, NO_CRITIC, rate)
        assert len(tasks) == num
        for task in tasks:
            yield f"*{task}*"
            yield from minus(r, task, passes, NO_CRITIC, rate)


def one_pass_and_vpg(r: Results) -> Iterator[float | str]:
    (task,) = more(r, 1, VPG)
    yield f"*{task}*"
    yield from minus(r, task, 1, VPG)
    yield num_around(at_both(r, [VPG], [1], set(TASKS) - {task})) / 2


def one_pass_and_before(r: Results) -> Iterator[float | str]:
    for task in (*less(r, 1, BEFORE), *more(r, 1, BEFORE)):
        yield f"*{task}*"
        yield minus(r, task, 1, BEFORE)[0]


def four_passes(r: Results) -> Iterator[float | str]:
    assert more(r, 4, VPG) == more(r, 4, RLOO)
    for other in (VPG, BEFORE):
        tasks = more(r, 4, other)
        yield len(tasks)
        yield from (f"*{task}*" for task in tasks)
    found = [minus(r, task, 4, other) for task in TASKS for other in (VPG, RLOO, BEFORE)]
    yield sum(high >= 0 for _, _, high in found)


def raw_returns(r: Results) -> Iterator[float | str]:
    """How much less they have than no critic, by rate."""
    yield len(r.by_rate("sum: PPO, 1 pass", CHOSEN))
    for task in ("thrice", "reward model", "sum", "rise"):
        raw = r.by_rate(f"{task}: PPO, 1 pass, raw returns", CHOSEN)
        none = r.by_rate(f"{task}: PPO, 1 pass, no critic", CHOSEN)
        yield from sorted(none[rate] - raw[rate] for rate in raw)[::3]  # of four
    yield r.mean("rise: PPO, 1 pass, raw returns", "explained variance")


PPO_PAGE = (
    Claim(
        "The last scores of the figure, on *dense*: four passes {}, the defaults before {}, four "
        "passes without a critic {}, RLOO {} and VPG {}.",
        "critic",
        lambda r: [
            r.mean(f"dense: {name}", "score")
            for name in (PASSES[4], "PPO before", f"{PASSES[4]}, no critic", "RLOO", "VPG")
        ],
    ),
    Claim(
        "so wide that all {} differences of these two tables hold together with 95% (Bonferroni)",
        "critic",
        lambda r: [r.num],
    ),
    Claim(
        "On *thrice* and *reward model* the {} intervals of its difference from no critic contain "
        "0. At the default rate the difference on *thrice* is {} ({} to {}) with one pass and {} "
        "({} to {}) with four, on *reward model* {} ({} to {}) and {} ({} to {}).",
        "critic",
        lambda r: [
            num_around(at_both(r, [NO_CRITIC], PASSES, EVIDENCE)),
            *(x for task in EVIDENCE for num in PASSES for x in minus(r, task, num, NO_CRITIC)),
        ],
    ),
    Claim(
        "better than none: with one pass on {} at the default rate, by {} ({} to {}), and on {} at "
        "the chosen rates, by {} ({} to {}); with four passes on {} at both, by {} ({} to {}) at "
        "the default one, and on {} at the default one, by {} ({} to {}).",
        "critic",
        where_the_critic_helps,
    ),
    Claim(
        "No interval of the {} lies below 0. Some are wide: on *long*, where the best score is 1, "
        "four passes with a critic may lose {} at the chosen rates.",
        "critic",
        lambda r: [
            sum(high >= 0 for _, _, high in at_both(r, [NO_CRITIC], PASSES)),
            -minus(r, "long", 4, NO_CRITIC, CHOSEN)[1],
        ],
    ),
    Claim(
        "On *sparse*, *rise* and *thrice* the explained variance is within {} of 0",
        "critic",
        lambda r: [
            max(
                abs(r.mean(f"{task}: {name}", "explained variance"))
                for task in ("sparse", "rise", "thrice")
                for name in PASSES.values()
            )
        ],
    ),
    Claim(
        "cannot be told apart from RLOO on any of the {} tasks, at either rate.",
        "critic",
        lambda r: [num_around(at_both(r, [RLOO], [1])) / 2],
    ),
    Claim(
        "It is better than VPG on {}, by {} ({} to {}) at the default rate, and cannot be told "
        "apart from VPG on the other {} tasks.",
        "critic",
        one_pass_and_vpg,
    ),
    Claim(
        "At the default rate it learns less than the defaults before with their four passes on {} "
        "({}), {} ({}) and {} ({}), and more on {} ({}).",
        "critic",
        one_pass_and_before,
    ),
    Claim(
        "all {} intervals on *thrice* and *reward model* contain 0.",
        "critic",
        lambda r: [num_around(at_both(r, OTHERS, [1], EVIDENCE))],
    ),
    Claim(
        "On *thrice* they learn more than VPG, by {} ({} to {}), RLOO, by {} ({} to {}), and the "
        "defaults before, by {} ({} to {}); on *reward model* they cannot be told apart from any "
        "of these {}.",
        "critic",
        lambda r: [
            *(x for other in (VPG, RLOO, BEFORE) for x in minus(r, "thrice", 4, other)),
            num_around(at_both(r, (VPG, RLOO, BEFORE), [4], ["reward model"])) / 2,
        ],
    ),
    Claim(
        "at the default rate they learn more than VPG and RLOO on {} tasks of eight ({}, {}, {}, "
        "{}, {}, {}), and more than the defaults before on {} ({}, {}, {}, {}); none of these {} "
        "intervals lies below 0.",
        "critic",
        four_passes,
    ),
    Claim(
        "At the chosen rates one interval lies below 0, that of the difference from {} on {}: {} "
        "({} to {}).",
        "critic",
        lambda r: [
            value
            for other in (VPG, RLOO, BEFORE)
            for task in less(r, 4, other, CHOSEN)
            for value in (
                other.removesuffix("'s"),
                f"*{task}*",
                *minus(r, task, 4, other, CHOSEN),
            )
        ],
    ),
    Claim(
        "its mean score on *sparse* is {} at the chosen rate, and that of four passes {}.",
        "critic",
        lambda r: [r.mean(f"sparse: {name}", CHOSEN) for name in PASSES.values()],
    ),
    Claim(
        "its mean score is higher than that of one pass on {} tasks of eight.",
        "critic",
        lambda r: [
            sum(
                r.mean(f"{task}: {PASSES[4]}", DEFAULT) > r.mean(f"{task}: {PASSES[1]}", DEFAULT)
                for task in TASKS
            )
        ],
    ),
    Claim(
        "have a lower mean score than no critic at each of the {} rates on *thrice* (by {} to {}), "
        "*reward model* ({} to {}), *sum* ({} to {}) and *rise* ({} to {}, with an explained "
        "variance of {}).",
        "critic",
        raw_returns,
    ),
    Claim(
        r"and $\lambda = 0.95$, the advantage of a token n places before the end has the share "
        "$0.95^n$ of what was paid, {} for n = 63,",
        "critic",
        lambda r: [0.95**63],
    ),
    Claim(
        r"At the default rate the mean score on *long* is {} with $\lambda = 0.95$ and {} with "
        r"$\lambda = 1$; on *dense*, with rewards at once, {} and {} at the chosen rates.",
        "critic",
        lambda r: [
            r.mean(f"{task}: PPO, 1 pass{end}", rate)
            for task, rate in (("long", DEFAULT), ("dense", CHOSEN))
            for end in (", lambda 0.95", "")
        ],
    ),
    Claim(
        "its mean score is {} on *long*, where a shared one has {}, and {} on *sum*, where a "
        "shared one has {}. On *reward model* a separate critic that starts from the reward model "
        "has {}, one that starts with a head of zeros {}.",
        "critic",
        lambda r: [
            r.mean(f"{task}: PPO, 4 passes{end}", CHOSEN)
            for task, end in (
                ("long", ", separate critic"),
                ("long", ""),
                ("sum", ", separate critic"),
                ("sum", ""),
                ("reward model", ", critic from the reward model"),
                ("reward model", ", separate critic"),
            )
        ],
    ),
    Claim("at a weight of 1; {} was then chosen.", "critic", lambda r: [ppo.Config().value_coef]),
)

# ---------------------------------------------------------------- docs/maze.md

METHODS = MAXRL, *RIVALS = "MaxRL", "GRPO", "RLOO", "PPO", "pass@8"
FEWER = "times fewer answers with MaxRL"


def changes(r: Results, methods: Iterable[str], other: str, *ks: int) -> list[Difference]:
    of = [(name, f"pass@{k} minus {other}'s") for name in methods for k in ks]
    return [r.difference(*one) for one in of]


def ends(r: Results, metric: str) -> list[tuple[str, float]]:
    """The methods with the highest and the lowest mean, with these."""
    found = sorted(((name, r.mean(name, metric)) for name in METHODS), key=lambda one: one[1])
    return [found[-1], found[0]]


def gains(r: Results) -> Iterator[float | str]:
    (most, high), (least, low) = ends(r, "pass@1")
    yield from (r.mean("SFT", "pass@1"), low, least, high, most)
    yield sum(low > 0 for _, low, _ in changes(r, METHODS, "SFT", 1))


def losses(r: Results) -> Iterator[float | str]:
    (most, high), (least, low) = ends(r, "pass@64")
    yield from (r.mean("SFT", "pass@64"), high, most, low, least)
    of_seeds = {name: r.seeds(name, "pass@64 minus SFT's") for name in METHODS}
    yield from (name for name, values in of_seeds.items() if max(values) < 0)
    yield len(of_seeds["PPO"])
    yield num_around(changes(r, METHODS, "SFT", 16, 64))
    yield from changes(r, ["PPO"], "SFT", 64)[0][1:]


def kept(r: Results) -> Iterator[float | str]:
    found = changes(r, RIVALS, MAXRL, 16, 64)
    yield len(found) - num_around(found)
    yield sum(r.mean(name, "pass@64") <= r.mean(MAXRL, "pass@64") for name in METHODS)
    yield from (-mean for mean, _, _ in changes(r, ["GRPO", "RLOO", "PPO"], MAXRL, 64))
    ((_, low, high),) = changes(r, ["PPO"], MAXRL, 64)
    yield from (-high, -low)


def gains_beside_maxrl(r: Results) -> Iterator[float | str]:
    found = dict(zip(RIVALS, changes(r, RIVALS, MAXRL, 1), strict=True))
    ((name, difference),) = [(name, of) for name, of in found.items() if of[1] > 0]
    yield from (name, *difference)
    ((name, (mean, low, high)),) = [(name, of) for name, of in found.items() if of[2] < 0]
    yield from (name, -mean, -high, -low)
    yield from (name for name, of in found.items() if num_around([of]))


MAZE_PAGE = (
    Claim("so wide that all {} hold together with 95% (Bonferroni)", "maze", lambda r: [r.num]),
    Claim(
        "It rises from {} to between {} ({}) and {} ({}), and each of the {} intervals of the gain "
        "excludes 0.",
        "maze",
        gains,
    ),
    Claim(
        "The mean of pass@64 falls from {} to between {} ({}) and {} ({}), and with {}, {}, {} and "
        "{} each of the {} seeds falls. But all {} intervals of the change contain 0; that of "
        "PPO's pass@64 is {} to {}.",
        "maze",
        losses,
    ),
    Claim(
        "At 16 and 64 answers {} method can be told apart from MaxRL. Its mean of pass@64 is the "
        "highest of the {}; it is above those of GRPO, RLOO and PPO by {}, {} and {}, and the last "
        "interval is {} to {}.",
        "maze",
        kept,
    ),
    Claim(
        "{} gains {} more ({} to {}), and {} {} less ({} to {}). {} and {} cannot be told apart "
        "from MaxRL.",
        "maze",
        gains_beside_maxrl,
    ),
    Claim(
        "here the means of MaxRL, GRPO and RLOO are {}, {} and {}.",
        "maze",
        lambda r: [r.mean(name, "pass@1") for name in METHODS[:3]],
    ),
    Claim(
        "What 64 answers of GRPO, RLOO, PPO and pass@8 solve, MaxRL solves with {}, {}, {} and {} "
        "times fewer in the mean, but all {} intervals contain 1",
        "maze",
        lambda r: [
            *(r.mean(name, FEWER) for name in RIVALS),
            num_around((r.difference(name, FEWER) for name in RIVALS), 1),
        ],
    ),
    Claim(
        "six take about {} times as long as one",
        "maze",
        lambda r: [r.mean(MAXRL, "all seeds over one seed")],
    ),
    Claim(
        "against MaxRL the intervals at 64 answers reach {} to {} to each side.",
        "maze",
        lambda r: sorted(high - mean for mean, _, high in changes(r, RIVALS, MAXRL, 64))[::3],
    ),
)

# ---------------------------------------------------------------- docs/rates.md

MEASURES = {
    "dpo": "score",
    "kto": "score",
    "rl": "score",
    "reward_model": "accuracy",
    "sft": "loss",
}
BOTH = ("reverse", "taste")


def by_rate(r: Results, metric: str, *part: str) -> dict[float, float]:
    """part: a stage, and where they are others a task, a size and "adapters"."""
    stage, task, size, what = (*part, *("reverse", "0.1 M", "full")[len(part) - 1 :])
    return r.by_rate(f"{stage}, {size}, {what}, {task}", metric)


def best(r: Results, *part: str) -> list[float]:
    """The rates with the highest mean, of losses the lowest, and this mean."""
    metric = MEASURES[part[0]]
    found = by_rate(r, metric, *part)
    top = (min if metric == "loss" else max)(found.values())
    return [*sorted(rate for rate, value in found.items() if value == top), top]


def default(stage: str, millions: float = 0.1, is_adapter: bool = False) -> float:
    return rates.default_rate(stage, rates.Size(round(1e6 * millions), is_adapter))


def keeping(r: Results, stage: str) -> float:
    """The rate before the first at which a tenth of the form is lost on one of both tasks."""
    forms = [by_rate(r, "form", stage, task) for task in BOTH]
    lost = [rate for form in forms for rate, share in form.items() if share < 0.9]
    return max(rate for rate in forms[0] if rate < min(lost))


def four_times(r: Results) -> Iterator[float | str]:
    found = {stage: by_rate(r, "score", stage, "reverse x 4") for stage in ("dpo", "rl", "sft")}
    of_default = [of[default(stage)] for stage, of in found.items()]
    yield from of_default
    yield max(
        max(of.values()) - value for of, value in zip(found.values(), of_default, strict=True)
    )
    for stage, of in found.items():
        yield of[max(rate for rate in of if rate < default(stage))]


def of_adapters(r: Results) -> Iterator[float | str]:
    ratios = []
    for stage in MEASURES:
        for size in ("0.1 M", "1 M"):
            rate, _ = best(r, stage, "reverse", size, "adapters")
            yield rate
            ratios += [rate / other for other in best(r, stage, "reverse", size)[:-1]]
    yield from (min(ratios), max(ratios), rates.OF_ADAPTERS)


def chat(r: Results, stage: str, metric: str, rate: float | str) -> float:
    when = rate if rate == "before" else f"at {rate:.1g}"
    return r.mean(f"{stage}, 135 M, adapters", f"{metric} {when}")


def lowest_losses(r: Results) -> Iterator[float | str]:
    stages = ("sft", "reward-model")
    found = [r.by_rate(f"{stage}, 135 M, adapters", "loss") for stage in stages]
    yield from (min(of.values()) for of in found)
    (rate,) = {min(of, key=of.__getitem__) for of in found}
    assert rate == default("sft", 135, is_adapter=True) == default("reward_model", 135, True)
    yield rate
    yield from (of[3e-3] for of in found)
    (accuracy,) = {chat(r, "reward-model", "accuracy", x) for x in (rate, 3e-3)}
    yield accuracy


RATES_PAGE = (
    Claim(
        "On *reverse* {} is the best rate ({}); the form falls to {} at 3e-3 and to {} at 1e-2.",
        "rates",
        lambda r: [*best(r, "dpo"), *(by_rate(r, "form", "dpo")[rate] for rate in (3e-3, 1e-2))],
    ),
    Claim(
        "{} is the best rate ({}), and {} of the answers lose the form at 3e-4. The default, {}, "
        "is the largest rate that was tried at which both tasks keep it ({} and {}); its score on "
        "*reverse* is {}.",
        "rates",
        lambda r: [
            *best(r, "dpo", "taste"),
            1 - by_rate(r, "form", "dpo", "taste")[3e-4],
            keeping(r, "dpo"),
            *(by_rate(r, "form", "dpo", task)[default("dpo")] for task in BOTH),
            by_rate(r, "score", "dpo")[default("dpo")],
        ],
    ),
    Claim(
        "At 1 million *taste* has {} at 3e-5 and {} at 1e-4, where the form goes; the default is "
        "{}.",
        "rates",
        lambda r: [
            *(by_rate(r, "score", "dpo", "taste", "1 M")[rate] for rate in (3e-5, 1e-4)),
            default("dpo", 1),
        ],
    ),
    Claim(
        "though its best rates are larger: {} on *reverse*, the largest that was tried ({}), and "
        "{} on *taste* ({}); the default has {} and {}. On *reverse* the form is kept by {} at the "
        "least. On *taste* {} of the answers lose it at 3e-4, and {} at 3e-3.",
        "rates",
        lambda r: [
            max(by_rate(r, "score", "kto")),
            best(r, "kto")[-1],
            *best(r, "kto", "taste"),
            *(by_rate(r, "score", "kto", task)[default("kto")] for task in BOTH),
            min(by_rate(r, "form", "kto").values()),
            *(1 - by_rate(r, "form", "kto", "taste")[rate] for rate in (3e-4, 3e-3)),
        ],
    ),
    Claim(
        "(RLOO, KL coefficient 0.05): {} is the best rate on both tasks ({} and {}); at 1e-2 the "
        "scores are {} and {}, and at 3e-2 nothing is left. At 1 million {} and {} are the best on "
        "*reverse* and {} on *taste*; at 1e-2 at most {} is left.",
        "rates",
        lambda r: [
            *best(r, "rl"),
            best(r, "rl", "taste")[-1],
            *(by_rate(r, "score", "rl", task)[1e-2] for task in BOTH),
            *best(r, "rl", "reverse", "1 M")[:-1],
            *best(r, "rl", "taste", "1 M")[:-1],
            max(by_rate(r, "score", "rl", task, "1 M")[1e-2] for task in BOTH),
        ],
    ),
    Claim(
        "the loss at the default, {}, is {} nats above that of the best rates on *reverse* ({} and "
        "{}) and {} on *taste* ({}); at 1 million {} and {} are the best.",
        "rates",
        lambda r: [
            default("sft"),
            by_rate(r, "loss", "sft")[default("sft")] - best(r, "sft")[-1],
            *best(r, "sft")[:-1],
            by_rate(r, "loss", "sft", "taste")[default("sft")] - best(r, "sft", "taste")[-1],
            *best(r, "sft", "taste")[:-1],
            *best(r, "sft", "reverse", "1 M")[:-1],
        ],
    ),
    Claim(
        "- **Reward models**: {} is the best rate on both tasks ({} and {}), {} at 1 million ({}).",
        "rates",
        lambda r: [
            *best(r, "reward_model"),
            best(r, "reward_model", "taste")[-1],
            *best(r, "reward_model", "reverse", "1 M"),
        ],
    ),
    Claim(
        "the score at the default rate is {} with DPO, {} with RL and {} with SFT, at most {} "
        "below that of the best rate; at a third of it {}, {} and {}.",
        "rates",
        four_times,
    ),
    Claim(
        "the best rates at 0.1 and 1 million are {} and {} with DPO, {} and {} with KTO, {} and {} "
        "with RL, {} and {} with reward models, {} and {} with SFT: {} to {} times the best rate "
        "of all weights, where the rule has {}.",
        "rates",
        of_adapters,
    ),
    Claim(
        "The form at 3e-2 is {} with DPO at 0.1 million, and {} and {} with RL at 0.1 and 1 "
        "million; at 1e-1 RL has {} at 0.1 million.",
        "rates",
        lambda r: [
            by_rate(r, "form", stage, "reverse", size, "adapters")[rate]
            for stage, size, rate in (
                ("dpo", "0.1 M", 3e-2),
                ("rl", "0.1 M", 3e-2),
                ("rl", "1 M", 3e-2),
                ("rl", "0.1 M", 1e-1),
            )
        ],
    ),
    Claim(
        "The losses of SFT ({}) and of the reward model ({}) are lowest at {}, their default; at "
        "3e-3 they are {} and {}, and the accuracy of the reward model is {} at both.",
        "rates_chat_model",
        lowest_losses,
    ),
    Claim(
        "DPO keeps the form of {} of the answers at 4e-5, of {} at 1e-4 and of {} at 4e-4; the "
        "shares of right answers are {}, {} and {}. Its default, {}, was not tried.",
        "rates_chat_model",
        lambda r: [
            *(chat(r, "dpo", what, x) for what in ("form", "right") for x in (4e-5, 1e-4, 4e-4)),
            default("dpo", 135, is_adapter=True),
        ],
    ),
    Claim(
        "RLOO begins at {} and has {} at {}, its default, {} at 3e-4 and {} at 1e-3.",
        "rates_chat_model",
        lambda r: [
            *(chat(r, "rloo", "score", rate) for rate in ("before", 1e-4)),
            default("rl", 135, is_adapter=True),
            *(chat(r, "rloo", "score", rate) for rate in (3e-4, 1e-3)),
        ],
    ),
    Claim(
        "a share of 128 has an interval of up to {} to either side",
        "rates_chat_model",
        lambda r: [1.96 * (0.25 / 128) ** 0.5],
    ),
)


# ---------------------------------------------------------------- docs/algorithms/dpo.md, kto.md


REACHED = (
    "on two small tasks the default reached a score of {} and {} in a hundred steps and a tenth of "
    "it {} and {}; at three times it {} of the answers to one task lost their form"
)


def reached(r: Results, stage: str) -> Iterator[float]:
    """The scores at the default rate and at a tenth of it, and how many lost the form."""
    for rate in (default(stage), float(f"{default(stage) / 10:.0e}")):
        yield from (by_rate(r, "score", stage, task)[rate] for task in BOTH)
    yield 1 - by_rate(r, "form", stage, "taste")[3e-4]


DPO_PAGE = (
    Claim(REACHED, "rates", lambda r: reached(r, "dpo")),
    Claim(
        "lost their form, at thirty times {} and {} of the answers",
        "rates",
        lambda r: [1 - by_rate(r, "form", "dpo", task)[3e-3] for task in BOTH],
    ),
)
KTO_PAGE = (Claim(REACHED, "rates", lambda r: reached(r, "kto")),)

CLAIMS = {
    "algorithms/dpo.md": DPO_PAGE,
    "algorithms/kto.md": KTO_PAGE,
    "algorithms/ppo.md": PPO_PAGE,
    "maze.md": MAZE_PAGE,
    "rates.md": RATES_PAGE,
}
TEXTS = {page: (DOCS / page).read_text("utf-8") for page in CLAIMS}
TOGETHER = [page for page, text in TEXTS.items() if shown_together(text)]


@pytest.mark.parametrize(
    ("page", "claim"), [(page, claim) for page, claims in CLAIMS.items() for claim in claims]
)
def test_a_sentence_has_the_numbers_of_its_file(page, claim):
    check(TEXTS[page], claim, read(claim.file, len(shown_together(TEXTS[page]))))


@pytest.mark.parametrize("page", CLAIMS)
def test_a_paragraph_with_a_claim_has_no_other_numbers(page):
    assert not not_held(TEXTS[page], CLAIMS[page])


@pytest.mark.parametrize("page", TOGETHER)
def test_the_differences_of_a_page_hold_together(page):
    """Each interval is one of as many as the page's tables have."""
    shown = shown_together(TEXTS[page])
    for file, variant, metric, *edges in shown:
        _, *expected = read(file, len(shown)).difference(variant, metric)
        assert edges == [f"{round(edge, 4):.3g}" for edge in expected], (variant, metric)
    others = [options for _, options, _ in BLOCK.findall(TEXTS[page]) if "together" not in options]
    assert not any(" minus " in options for options in others)


ROWS = [
    {"variant": "a", "seed": seed, "step": step, "metric": "m", "value": value}
    for seed, step, value in (("all", 5, 9.0), ("all", 9, 2.0), (0, 9, 1.0), (1, 9, 3.0))
]
PAGE = """
The mean of
*a* is {} ({} to {}), {}.

<!-- results x
columns: m
together: yes
-->

| variant | m | k |
| --- | --- | --- |
| a | 2 (1 to 3) | 4 |
| b |  | 2 (0 to 4) |

<!-- end -->

- No claim, 0.5.
"""
OF_A = Claim("mean of {} is {} ({} to {}), {}.", "x", lambda r: ["*a*", *r.difference("a", "m"), 2])
INTERVAL = ("*a*", "2.0", "-23.5", "27.5", "two")  # 2 +- 25.452 * 1, t of .9875 and one degree


@pytest.mark.parametrize(
    ("shown", "rows", "num"),
    [
        *(
            ((*INTERVAL[:i], other, *INTERVAL[i + 1 :]), ROWS, 2)
            for i, other in enumerate(("*b*", "2.1", "-23.4", "27.4", "three"))
        ),
        (INTERVAL, [*ROWS[:3], {**ROWS[3], "value": 3.1}], 2),
        (INTERVAL, [ROWS[0], {**ROWS[1], "value": 2.1}, *ROWS[2:]], 2),
        (INTERVAL, ROWS, 3),
    ],
)
def test_another_number_of_a_sentence_or_of_its_file_is_told(shown, rows, num):
    page = PAGE.replace("*a*", "{}")
    check(page.format(*INTERVAL), OF_A, Results(ROWS, 2))
    with pytest.raises(AssertionError, match="mean of"):
        check(page.format(*shown), OF_A, Results(rows, num))


@pytest.mark.parametrize("num", [0, 2])
def test_a_sentence_stands_on_its_page_once(num):
    with pytest.raises(AssertionError, match=f"{num} times on the page"):
        check("The mean of *a* is 2 (1 to 3), two." * num, OF_A, Results(ROWS, 2))


def test_what_a_page_shows_together_and_what_no_claim_holds():
    text = PAGE.replace("{}", "2")
    assert shown_together(text) == [("x", "a", "m", "1", "3"), ("x", "b", "k", "0", "4")]
    assert not shown_together(text.replace("together: yes\n", ""))
    claim = Claim("mean of *a* is {} ({} to {}), {}.", "x", lambda r: [])
    assert not_held(text, [claim]) == []
    assert not_held(text.replace("mean of\n", "mean of 0.3 and\n"), [claim]) == []  # no claim left
    assert not_held(text.replace("The mean", "Of 0.3 (0.1) the mean"), [claim]) == ["0.3", "(0.1)"]
