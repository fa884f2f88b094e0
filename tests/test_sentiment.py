"""The sentiment job: its reward by hand, the optimum in closed form, refusals, a tiny Llama, and
the real one.
"""

import json
import math
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sentiment
from builders import ROOT, initial_params, metric_rows, run_script, write_stories
from numpy.testing import assert_allclose

from rlhf_jax import models, sampling
from rlhf_jax.config import parse
from rlhf_jax.data import formats
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.types import Rollout

CONFIG = ROOT / "configs" / "sentiment.yaml"
DATA = os.environ.get("RLHF_JAX_DATA")

LEXICON = "glad\t2.0\t0.6\t[2, 2]\nhappy\t3.0\nSAD\t-9\nsad\t-2.0\ndon't\t-1\nmade-up\t1\n:)\t2.0\n"


def test_the_reward_by_hand(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text(LEXICON, "utf-8")
    lexicon = sentiment.read_lexicon(path)
    texts = [
        "Glad!",
        "sad, SAD",
        "happy sad",
        "",
        "gladly :) unhappy",
        "she don't; a made-up 'glad' day",
        "happy" * 2,
    ]
    sums = [2.0, -4.0, 1.0, 0.0, 0.0, 2.0, 0.0]
    expected = [s / math.sqrt(s**2 + 15) for s in sums]
    assert [sentiment.valence(lexicon, text) for text in texts] == pytest.approx(expected)
    assert sentiment.valence(lexicon, "glad") == pytest.approx(0.458831, abs=1e-6)  # 2 / sqrt(19)
    assert sentiment.valence(lexicon, "happy " * 100) < 1.0


def test_the_optimum_of_two_answers_in_closed_form():
    """Half of the samples score 1, half 0: the best policy says the first with p, KL ln 2 -
    entropy(p).
    """
    kls, scores = sentiment.optimum(np.tile([0.0, 1.0], (3, 8)))
    assert (kls[0], scores[0]) == (0.0, 0.5)
    assert len(kls) > 40
    p = np.array(scores[1:])
    entropy = -scipy.special.xlogy(p, p) - scipy.special.xlogy(1 - p, 1 - p)
    assert_allclose(kls[1:], np.log(2) - entropy, atol=1e-9)
    assert p.max() > 0.999
    kls, _ = sentiment.optimum(
        np.linspace(0, 1, 16)[None]
    )  # 16 samples of one prompt cannot reach ln 16
    assert 1.2 < max(kls) <= math.log(16) / 2


@pytest.fixture
def one_token():
    """(bench, base, a policy far from it, log-probs of both after the two prompts): one token, no
    EOS among the three that can be said.
    """
    tokenizer = characters("abc")  # ids 2, 3, 4
    tokens = np.array([[2, 3], [4, 4]] * 64, np.int32)
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 1}
    model = models.build(models.GPT2Config(vocab_size=5, max_length=4, **sizes))
    base = initial_params(model)
    policy = {**base, "wte": {"embedding": base["wte"]["embedding"] * 40}}
    config = sampling.SamplingConfig(1, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)

    def score(rollout):
        return np.asarray(rollout.tokens)[:, -1].astype(np.float32)

    inputs = (tokens, np.ones_like(tokens), config, jax.random.key(1), score)
    bench = sentiment.Bench(LanguageModel(model, base, tokenizer), *inputs, samples=32)
    logits = (model.apply(params, jnp.asarray(tokens[:2]))[:, -1] for params in (policy, base))
    return bench, base, policy, [np.asarray(jax.nn.log_softmax(rows)) for rows in logits]


@pytest.mark.slow
def test_a_policy_is_measured_against_enumeration(one_token):
    """KL, scores and best-of-n from the probabilities."""
    bench, base, policy, (log_p, log_q) = one_token
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    assert kl > 0.1
    measure = sentiment.measurement(bench)
    at_base = measure(base, "base")
    moved = measure(policy, "policy", "x")
    assert (at_base.kl, at_base.length) == (pytest.approx(0, abs=1e-6), 1.0)
    assert moved.kl == pytest.approx(kl, abs=4 * moved.kl_error)
    assert 0 < moved.kl_error < 0.05
    expected = (np.exp(log_p) * np.arange(5)).sum(axis=1).mean()
    assert moved.score == pytest.approx(expected, abs=4 * moved.score_error)
    best, scores = sentiment.best_of_n(bench, 4)
    assert [(p.setting, p.kl) for p in best] == [(f"{n}", sampling.best_of_n_kl(n)) for n in (2, 4)]
    drawn = sentiment.plot(at_base, [moved], best, sentiment.optimum(scores))
    assert list(drawn.series) == ["policy", "best of n", "optimum"]
    assert list(drawn.series["best of n"].x) == [0.0, best[0].kl, best[1].kl]


def test_repeated_words_and_the_error_over_prompts():
    tokenizer = characters("ab ")
    tokens = np.array(
        [tokenizer.encode(text) for text in ("aa a a", "aa b a", "aab ab", "abbbbb")], np.int32
    )
    mask = np.array([[0, 1, 1, 1, 1, 1]] * 4)
    scores = np.array([1.0, 0.0, 0.5, 0.5], np.float32)

    bench = sentiment.Bench(
        LanguageModel(None, None, tokenizer), tokens[:2, :1], mask[:2, :1], None, None, None, 2
    )
    rollout = Rollout(tokens, mask, mask, np.zeros(mask.shape), scores=scores)
    point = sentiment.point(bench, "m", "s", rollout, 1.0, None)
    assert point.repeated == pytest.approx((2 / 3 + 1 / 3 + 1 / 2 + 0) / 4)
    assert (point.score, point.score_error) == (0.5, 0.0)  # both prompts' means are 0.5
    assert (point.texts, point.scores) == (["a a a", "ab ab"], [1.0, 0.5])


def test_each_run_turns_the_strength_of_its_method_alone():
    config = parse(sentiment.SentimentConfig, ["--config", str(CONFIG)])
    planned = [
        (
            method,
            strength,
            own["rl"].kl_coef,
            own["rl"].kl_target,
            own["grpo"].kl_loss_coef,
            own["dpo"].beta,
        )
        for method, strength, own in sentiment.plan(config, Path("data"))
    ]
    grpo = config.grpo.kl_loss_coef
    beta = config.dpo.beta
    policies = [
        ("ppo_fixed", 0.5, 0.5, None),
        ("ppo_adaptive", 1.5, 0.2, 1.5),
        ("rloo", 0.5, 0.5, None),
    ]
    others = [("grpo", 1.0, 0.0, None, 1.0, beta), ("dpo", 0.5, 0.2, None, grpo, 0.5)]
    assert planned[::3] == [*((*policy, grpo, beta) for policy in policies), *others]


COMPLETE = "--model no/such/folder --lexicon lexicon.txt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "lexicon", "message"),
    [
        ("", LEXICON, "no model: give --model"),
        ("--model x --reward count:e", LEXICON, "leave them out"),
        ("--model x --data demo", LEXICON, "leave them out"),
        ("--model x", LEXICON, "no reward: give --lexicon"),
        ("--sentiment.best-of 6", LEXICON, "best_of must be a power of 2, got 6"),
        ("--sentiment.longest-prompt 7", LEXICON, "longest_prompt must be at least 8, got 7"),
        (COMPLETE, LEXICON, "no/such/folder"),
        (
            COMPLETE,
            "good\t1\nbad\n",
            "lexicon.txt, line 2: expected a word, a tab and a number, found 'bad'",
        ),
        (COMPLETE, "good\tvery", "lexicon.txt, line 1: expected a word, a tab and a number"),
        (COMPLETE, "\n", "lexicon.txt: the lexicon is empty"),
        (COMPLETE, None, "lexicon.txt: cannot be read: No such file"),
    ],
)
def test_refusals(given, lexicon, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if lexicon is not None:
        Path("lexicon.txt").write_text(lexicon, "utf-8")
    with pytest.raises(UserError, match="^[^\n]*" + re.escape(message)):
        sentiment.run(
            parse(
                sentiment.SentimentConfig,
                ["--config", str(CONFIG), "--output-dir", "x", *given.split()],
            )
        )


SMALL = (
    *("--sentiment.num-prompts", 16, "--sentiment.num-heldout", 8, "--sentiment.best-of", 4),
    *("--sentiment.shortest-prompt", 2, "--sentiment.longest-prompt", 3, "--sentiment.samples", 4),
    *("--sentiment.kl-coefs", 0.01, "--sentiment.kl-targets", 1, "--sentiment.grpo-kl-coefs", 0.01),
    *(
        "--sentiment.dpo-betas",
        0.1,
        "--rl.num-iterations",
        12,
        "--rl.batch-size",
        64,
        "--rl.max-new-tokens",
        6,
    ),
    *(
        "--rl.optimizer.learning-rate",
        0.03,
        "--dpo.batch-size",
        16,
        "--dpo.optimizer.learning-rate",
        0.03,
    ),
    *("--rl.validation-interval", 6, "--rl.validation-prompts", 8, "--text.bucket-multiple", 10),
)


@pytest.fixture(scope="module")
def tiny_job(tmp_path_factory):
    """The folder of the whole job on a tiny Llama whose words are letters."""
    place = tmp_path_factory.mktemp("sentiment")
    letters = "abcdefghijklmnopqrstuvwxyz"
    sizes = {"width": 16, "inner": 24, "layers": 1, "heads": 2, "kv_heads": 1, "length": 32}
    write_stories(place, {f" {letter}".encode(): 0.0 for letter in letters}, scale=0.3, **sizes)
    lines = [f"{letter}\t{3 if letter < 'n' else -3}\n" for letter in letters]
    (place / "lexicon.txt").write_text("".join(lines), "utf-8")
    given = ("--model", place, "--lexicon", place / "lexicon.txt")
    run_script("sentiment", *given, "--output-dir", place / "run", *SMALL)
    return place / "run"


@pytest.mark.soak
def test_every_algorithm_runs_on_a_tiny_llama_and_is_measured(tiny_job):
    folder = tiny_job
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    base, *points = summary["points"]
    titles = [
        "base",
        "PPO, fixed KL",
        "PPO, adaptive KL",
        "RLOO",
        "GRPO",
        "DPO",
        "best of n",
        "best of n",
    ]
    assert [point["method"] for point in summary["points"]] == titles
    assert all(point["KL"] > 0 for point in points)
    assert {point["method"] for point in points if point["score"] > base["score"] + 0.1} >= {
        "RLOO",
        "PPO, fixed KL",
    }
    files = [folder / "data" / name for name in ("train.jsonl", "heldout.jsonl")]
    train, heldout = (
        {row.prompt for row in formats.read("prompts", str(path)).rows} for path in files
    )
    assert (len(train), len(heldout), train & heldout) == (16, 8, set())
    assert {prompt[0] for prompt in train | heldout} == {1}
    assert {len(prompt) for prompt in train | heldout} == {3, 4}
    fixed, adaptive = (
        [row["kl/coef"] for row in metric_rows(folder / name) if "kl/coef" in row]
        for name in ("ppo_fixed_0.01", "ppo_adaptive_1")
    )
    assert fixed == pytest.approx([0.01] * 12)
    assert len(set(adaptive)) > 1
    assert ET.parse(folder / "score_kl.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    html = (folder / "report.html").read_text("utf-8")
    assert all(point["method"] in html for point in summary["points"])


@pytest.mark.soak
@pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
def test_the_real_model_and_lexicon(tmp_path):
    data = Path(str(DATA))
    folder = tmp_path / "run"
    given = (
        "--model",
        data / "stories260k",
        "--lexicon",
        data / "vader" / "vader_lexicon.txt",
        "--output-dir",
        folder,
    )
    run_script("sentiment", *given)
    text = (folder / "summary.json").read_text("utf-8")
    points = json.loads(text)["points"]
    base = points[0]
    for method in {point["method"] for point in points[1:]}:
        ordered = sorted(
            (p for p in points if p["method"] == method), key=lambda point: point["KL"]
        )
        assert ordered[0]["score"] > base["score"]
        assert ordered[-1]["score"] > ordered[0]["score"]
    done = run_script("sentiment", *given, "--resume")
    assert done.stdout.count("finished already") == 15
    assert (folder / "summary.json").read_text("utf-8") == text
