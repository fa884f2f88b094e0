"""What is a label worth? Every label of a reward model left out, and turned round, exactly.

    python experiments/label_value.py --data FOLDER --out label_value.json

FOLDER has sentences of film reviews (Pang and Lee 2005), rt-polarity.pos.txt and .neg.txt. A
comparison is a positive and a negative sentence; its label says that the positive one is better,
and some labels are wrong. A reward model is a pure function of first weights and labels, so each
edit of a label is a member of one program, without noise. Beside the true effects stand predictions
by influence functions (arXiv 2501.05790), and policies after PPO on some members.
"""

import collections
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
import tyro
from jax import Array

from rlhf_jax import cli, metrics, models, ops, ppo, reward_model, rewards, rollout, sampling, sft
from rlhf_jax.errors import logger
from rlhf_jax.types import Comparisons, Demonstrations, Params, Rollout, TrainState

PAD, UNKNOWN, END = range(3)  # a mask is the sign of the tokens
WORDS = 2000  # that have a token, the commonest
SHORTEST, LENGTH, PROMPT = 8, 24, 4  # words at least; tokens with the end; words to go on from
MODEL = models.build(models.GPT2Config(3 + WORDS, LENGTH, 32, num_layers=1, num_heads=2))
SCORE_FN = models.score_fn(MODEL)
POLICY_FN = models.policy_fn(MODEL, prompt_length=PROMPT)
SAMPLER = sampling.SamplingConfig(LENGTH - PROMPT, eos_id=END, pad_id=PAD)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3, eps=1e-6))
EPOCHS, BATCH, MEMBERS = 3, 32, 64  # of reward models and SFT; reward models at once
HELD_OUT, MEASURED = 1000, 500  # pairs, and beginnings of them that policies go on with
ANSWERS, KEYS = 64, 3  # of a step; further ones, of policies of no edit
Member = tuple[Params, Array, Array]  # a reward model, its held-out loss and accuracy
Found = dict[str, dict[str, Any]]  # numbers by variant and metric


class Sizes(NamedTuple):
    """How much is trained."""

    seeds: int = 4
    labels: int = 255  # with a member of no edit for each kind of edit, eight times MEMBERS
    wrong: int = 26  # of the labels
    steps: int = 60  # of PPO
    chosen: int = 10  # labels by their effect, and as many at random


FULL = Sizes()


def read(folder: Path) -> np.ndarray:
    """Tokens [2, N, LENGTH] of the positive, and of the negative sentences of a fitting length."""
    sides = []
    for path in (folder / f"rt-polarity.{name}.txt" for name in ("pos", "neg")):
        lines = map(str.split, path.read_text("utf-8").splitlines())
        sides.append([words for words in lines if SHORTEST <= len(words) < LENGTH])
    counts = collections.Counter(word for side in sides for words in side for word in words)
    numbers = {word: number for number, (word, _) in enumerate(counts.most_common(WORDS), END + 1)}
    tokens = np.full((2, min(map(len, sides)), LENGTH), PAD, np.int32)
    for rows, side in zip(tokens, sides, strict=True):
        for row, words in zip(rows, side, strict=False):  # one side has more
            row[: len(words) + 1] = [*(numbers.get(word, UNKNOWN) for word in words), END]
    return tokens


def edits(num: int, num_wrong: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights [2 + 2 N, N]: no edit, each left out; no edit, each turned round."""
    one = np.eye(1 + num, num, -1, np.int32)
    best = np.concatenate([0 * one, one]) ^ (np.arange(num) < num_wrong)
    return best, np.float32(1 - np.concatenate([one, 0 * one]))


def score(params: Params, tokens: Array) -> Array:
    return SCORE_FN(params, tokens, jnp.sign(tokens), None)


def margins(params: Params, pairs: Array) -> Array:
    """Scores of the first minus those of the second sentences of pairs [N]."""
    return -jnp.diff(score(params, pairs.reshape(-1, LENGTH)).reshape(-1, 2))[:, 0]


def fit(key: Array, params: Params, num: int, update: Any) -> Params:
    """Parameters after ``update(state, rows)`` on batches of ``num`` rows."""
    rows = jnp.tile(jnp.arange(num), (EPOCHS, 1))
    order = jax.random.permutation(key, rows, axis=1, independent=True).reshape(-1)
    batches = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    state = TrainState.create(params, OPTIMIZER)
    return jax.lax.scan(lambda *now: (update(*now)[0], None), state, batches)[0].params


def member(key: Array, pairs: Array, held_out: Array, best: Array, weight: Array) -> Member:
    """From pairs [N] with labels [N], of which one of weight 0 is left out."""
    init_key, head_key, order_key = jax.random.split(key, 3)

    def update(state: TrainState, rows: Array) -> Any:
        tokens, mask = pairs[rows], jnp.sign(pairs[rows])
        batch = Comparisons(tokens, mask, mask, best[rows], weight=weight[rows])
        given = {"score_fn": SCORE_FN, "optimizer": OPTIMIZER, "config": reward_model.Config()}
        return reward_model.update(state, batch, None, **given)

    params = models.add_head(head_key, MODEL.init(init_key), "score")
    params["score"]["kernel"] *= 0.1  # larger first scores stay in the margins, and the loss high
    params = fit(order_key, params, len(pairs), update)
    margin = margins(params, held_out)
    return params, jnp.mean(jax.nn.softplus(-margin)), jnp.mean(margin > 0)


ONE, AT_ONCE = jax.jit(member), jax.jit(jax.vmap(member, (None, None, None, 0, 0)))
IN_TURN = jax.jit(lambda *of: jax.lax.map(lambda edit: member(*of[:3], *edit), of[3:]))


@jax.jit
def slopes(params: Params, pairs: Array, held_out: Array) -> tuple[Array, Params, Params]:
    """The margins [N], and the gradients of each and of the held-out loss."""
    one = jax.value_and_grad(lambda params, pair: margins(params, pair[None])[0])
    loss = jax.grad(lambda params: jnp.mean(jax.nn.softplus(-margins(params, held_out))))
    return *jax.vmap(one, (None, 0))(params, pairs), loss(params)


def influence(margin: Array, jacobian: Params, target: Params, best: Array) -> dict[str, Any]:
    """By method, what leaving out and turning round each label [2, N] is predicted to add to a loss
    of gradient ``target``, from ``slopes`` of the pairs.

    A label's loss falls with the margin m that it asks for, by s. With the inverse curvature C a
    label that is turned round adds -target C dm / N, and one that is left out s times that. DataInf
    (arXiv 2310.00902, with its damping) has in each array of parameters the mean over labels
    of (damping + g g')^-1, g being a label's gradient; Gauss-Newton is one damped inverse of all.
    """
    num, sign = len(margin), 1 - 2 * best
    slope = 1 / (1 + np.exp(sign * margin))
    dot, closed, flat, kernel = np.zeros(num), np.zeros(num), np.zeros(num), np.zeros((num, num))
    for slab, aim in zip(jax.tree.leaves(jacobian), jax.tree.leaves(target), strict=True):
        rows = sign[:, None] * np.float64(slab).reshape(num, -1)
        damping = max(0.1 * np.mean((slope[:, None] * rows) ** 2), 1e-30)  # some arrays have none
        product, gram = rows @ np.float64(aim).reshape(-1), rows @ rows.T / damping
        dot += product
        flat += product / damping
        shares = slope**2 * product / damping / (1 + slope**2 * np.diag(gram))
        closed += product / damping - gram @ shares / num
        kernel += gram
    root = np.sqrt(slope * (1 - slope) / num)  # Woodbury, over all arrays at once
    inner = np.linalg.solve(np.eye(num) + root[:, None] * kernel * root, root * flat)
    along = {"Gauss-Newton": flat - kernel @ (root * inner), "DataInf": closed, "gradients": dot}
    found = {name: -np.stack([slope * x, x]) / num for name, x in along.items()}
    return found | {"own loss": np.tile(np.log(1 - slope), (2, 1))}


@jax.jit
def policies(key: Array, judge: Params, held_out: Array, others: Array, lanes: Any) -> Any:
    """Policies [1 + L] measured by their answers: the first one, learned from other sentences by
    SFT, and then by PPO with a KL penalty from the reward models [L] and keys [L, steps] of lanes.
    """
    given = {"policy_fn": POLICY_FN, "optimizer": OPTIMIZER}

    def imitate(state: TrainState, rows: Array) -> Any:
        mask = jnp.sign(others[rows])
        batch = Demonstrations(others[rows], mask, mask.at[:, :PROMPT].set(0))
        return sft.update(state, batch, None, config=sft.Config(), **given)

    def answers(params: Params, prompts: Array, key: Array) -> Rollout:
        inputs = (MODEL, params, prompts, jnp.ones_like(prompts), key)
        reference = jax.tree_util.Partial(POLICY_FN, start)
        return rollout.collect(*inputs, sampling=SAMPLER, policy_fn=POLICY_FN, ref_fn=reference)

    def train(lane: tuple[Params, Array]) -> Params:
        def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
            row_key, sample_key, update_key = jax.random.split(key, 3)
            rows = jax.random.randint(row_key, (ANSWERS,), 0, len(others))
            batch = answers(state.params, others[rows, :PROMPT], sample_key)
            batch = batch.replace(scores=score(lane[0], batch.tokens))
            batch = batch.replace(rewards=rewards.kl_shaped(batch, kl_coef=0.05))
            return ppo.update(state, batch, update_key, config=ppo.Config(), **given)[0], None

        state = TrainState.create(start, OPTIMIZER)
        return jax.lax.scan(step, state, lane[1])[0].params

    def measure(params: Params) -> dict[str, Array]:
        batch = answers(params, held_out[:MEASURED, :PROMPT], key)
        no_edit = ops.evaluate(POLICY_FN, jax.tree.map(lambda x: x[1], every), batch).log_probs
        found = {"judged": score(judge, batch.tokens)}
        for name, other in (("KL", batch.ref_log_probs), ("KL from no edit", no_edit)):
            found[name] = jnp.mean(ops.response_sums(ops.kl(batch.log_probs, other, "k3"), batch))
        return found

    start = models.add_head(key, fit(key, MODEL.init(key), len(others), imitate), "value")
    trained = jax.lax.map(train, lanes, batch_size=6)
    every = jax.tree.map(lambda x, many: jnp.concatenate([x[None], many]), start, trained)
    return jax.lax.map(measure, every)


def of_labels(loss: Any, accuracy: Any, predicted: Any, seed: int, num_wrong: int) -> Found:
    """What edits [2, N] add to the held-out loss and accuracy, and how well that is predicted."""
    found: Found = collections.defaultdict(dict)
    parts = {"right": slice(num_wrong, None), "wrong": slice(num_wrong)}
    for number, kind in enumerate(("left out", "turned round")):
        for name, rows in parts.items():
            nats, points = 1000 * loss[number, rows], 100 * accuracy[number, rows]
            found[f"a {name} label {kind}"] = {
                "loss added, 1e-3 nats": nats.mean(),
                "its standard deviation": nats.std(),
                "accuracy added, points": points.mean(),
                "largest change of accuracy, points": np.abs(points).max(),
            }
        for name, guess in ({"the truth": loss} | predicted).items():
            wrong, right = -guess[number, :num_wrong, None], -guess[number, num_wrong:]
            found[name][f"AUROC of wrong labels, {kind}"] = metrics.win_rate(wrong, against=right)

            def rank(times: Any, x: Any = guess[number], y: Any = loss[number]) -> float:
                return metrics.spearman(np.repeat(x, times), np.repeat(y, times))

            ones = np.ones(loss.shape[1], int)
            edges = metrics.bootstrap_interval(rank, jax.random.key(seed), weights=ones)
            for edge, value in results.with_edges(rank(ones), edges).items():
                found[name][f"rank correlation, {kind}{edge}"] = value
    return found


def of_policies(measured: dict[str, np.ndarray], effect: np.ndarray) -> Found:
    """Of policies [2 + N + KEYS]; N labels, the first half chosen, add ``effect`` to the loss."""
    judged = measured.pop("judged")
    measured["preferred"] = np.mean(1 / (1 + np.exp(judged[1] - judged)), axis=1)
    measured["preferred, from a half"] = np.abs(measured["preferred"] - 0.5)
    names = ("the first", "no edit", "largest effects", "labels at random", "other keys")
    ends = [1, 2, 2 + len(effect) // 2, 2 + len(effect)]
    found: Found = collections.defaultdict(dict)
    for metric, values in measured.items():
        for name, part in zip(names, np.split(values, ends), strict=True):
            found[f"policy: {name}"][metric] = part.mean()
        ranks = found["policy: rank correlation of labels"]
        ranks[f"effect and {metric}"] = metrics.spearman(effect, values[2 : ends[-1]])
        ranks[f"size and {metric}"] = metrics.spearman(np.abs(effect), values[2 : ends[-1]])
    return found


def timed(program: Any, *inputs: Any) -> tuple[Member, float]:
    started = time.monotonic()
    return jax.device_get(program(*inputs)), time.monotonic() - started


def of_seed(tokens: np.ndarray, seed: int, sizes: Sizes) -> Found:
    """All that is found with one draw of pairs and of first weights."""
    generator, num = np.random.default_rng(seed), sizes.labels
    pairs = np.stack([generator.permutation(side) for side in tokens], axis=1)
    learned, held_out, others = np.split(pairs, [num, num + HELD_OUT])
    member_key, judge_key, policy_key = jax.random.split(jax.random.key(seed), 3)
    best, weight = edits(num, sizes.wrong)
    inputs, some = (member_key, learned, held_out), np.r_[:2, 1 + num : 3 + num, 2 : MEMBERS - 2]
    params, loss, accuracy = jax.device_get(IN_TURN(*inputs, best, weight))
    together = [timed(AT_ONCE, *inputs, best[some], weight[some]) for _ in range(2)]
    alone = [timed(ONE, *inputs, best[row], weight[row]) for row in some[:4]]
    at_once, one = (min(took for _, took in ran[1:]) for ran in (together, alone))  # compiled
    found: Found = {"no edit": {"loss": loss[0], "accuracy": accuracy[0]}}
    timing = {"seconds of one": one, f"seconds of {MEMBERS} at once": at_once}
    found["programs"] = timing | {"ratio": at_once / one}
    lone = jax.tree.leaves(jax.tree.map(lambda *x: np.stack(x), *(ran[0][0] for ran in alone)))
    for name, of, rows in (("in turn", params, some[:4]), ("at once", together[0][0][0], slice(4))):
        gaps = [abs(x[rows] - y).max() for x, y in zip(jax.tree.leaves(of), lone, strict=True)]
        found["programs"][f"largest difference of parameters {name}, 1e-6"] = 1e6 * max(gaps)
    predicted = influence(*jax.device_get(slopes(alone[0][0][0], learned, held_out)), best[0])
    added = np.reshape([loss, accuracy], (2, 2, -1))
    effect, effect_on_accuracy = added[..., 1:] - added[..., :1]
    largest, rest = np.split(np.argsort(-np.abs(effect[1])), [sizes.chosen])
    labels = np.concatenate([largest, generator.permutation(rest)[: sizes.chosen]])
    rows = np.r_[0, 2 + num + labels, [0] * KEYS]
    keys = jax.random.split(policy_key, (1 + KEYS, sizes.steps))
    lanes = jax.tree.map(lambda x: x[rows], params), keys[np.r_[[0] * len(labels), : 1 + KEYS]]
    right = np.zeros(len(others), np.int32)
    judge, *how = ONE(judge_key, others, held_out, right, 1.0 - right)
    found["judge"] = dict(zip(("loss", "accuracy"), how, strict=True))
    measured = policies(policy_key, judge, *map(np.concatenate, (held_out, others)), lanes)
    found |= of_labels(effect, effect_on_accuracy, predicted, seed, sizes.wrong)
    return found | of_policies(jax.device_get(measured), effect[1, labels])


def main(data: Path, out: Path, sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL) -> None:
    """Edits each label, and writes what came out.

    Args:
        data: the folder of the sentences.
        out: the file of the results, a table.
    """
    started, tokens, rows = time.monotonic(), read(data), []
    for seed in range(4, 4 + sizes.seeds):  # 0 to 3 chose the settings
        for variant, values in of_seed(tokens, seed, sizes).items():
            logger.info(f"{seed} {variant}: { {name: f'{x:.3g}' for name, x in values.items()} }")
            rows += [results.row(variant, seed, 0, name, value) for name, value in values.items()]
    command = "python experiments/label_value.py --data sentence_polarity --out label_value.json"
    seconds = time.monotonic() - started
    results.write(out, command, seconds, [*results.over_seeds(rows), *rows], sizes=sizes._asdict())


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main))
