"""Validations of an RL run: prompts of their own, a metric for each part of the reward, examples,
samples.jsonl.
"""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import Killed, json_lines, metric_rows
from recorded import rl_job

from rlhf_jax import grpo, rewards, rloo, training, vpg
from rlhf_jax.config import Judge, Network, RLStage, RunConfig, Safety, Tokenizer
from rlhf_jax.data import tokenizers
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError
from rlhf_jax.graders import spec, verifiable
from rlhf_jax.metrics import share_interval, student
from rlhf_jax.report import plots
from rlhf_jax.runs import folder
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.opening import open_run
from rlhf_jax.training.common.progress import Progress
from rlhf_jax.training.rl import validation
from rlhf_jax.training.rl.inputs import files
from rlhf_jax.training.rl.job import sources_of
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.types import Rollout

PROMPTS = [
    {"prompt": f"say {word}", "topic": word} for word in ("ape", "bee", "cat", "dog", "eel", "fox")
]
OTHERS = [
    {"prompt": "tell fable", "topic": "fox"},
    {"prompt": "x", "topic": "dog"},
    {"prompt": "bees", "topic": "bee"},
]


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return (str(path),)


@pytest.fixture
def config(tmp_path):
    others = {"validation_data": write(tmp_path / "others.json", OTHERS), "show_examples": 2}
    return RunConfig(
        data=write(tmp_path / "prompts.json", PROMPTS),
        output_dir=str(tmp_path / "run"),
        network=Network(hidden_size=8, num_layers=1, num_heads=1, max_length=16),
        tokenizer=Tokenizer(kind="characters"),
        reward=("count:e*2", "count:f*0"),
        rl=RLStage(num_iterations=1, batch_size=8, max_new_tokens=4, kl_coef=0.0, **others),
    )


@pytest.mark.slow
def test_every_prompt_is_sampled_scored_and_shown(config, capsys):
    path = training.rl.run(config, vpg).folder
    # By prompt, not by order: the characters f and b are in this file alone, and the tokenizer has
    # them.
    samples = json_lines(path / "samples.jsonl")
    metrics = metric_rows(path)
    for step in (0, 1):
        rows = [row for row in samples if row["step"] == step]
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in OTHERS]
        texts = [row["prompt"] + row["response"] for row in rows]
        for row, text in zip(rows, texts, strict=True):
            # EOS counts as a token and is no character.
            assert 1 <= row["length"] <= 4
            assert row["length"] - len(row["response"]) in (0, 1)
            assert row["score"] == 2 * text.count("e")
        count = {letter: np.mean([text.count(letter) for text in texts]) for letter in "ef"}
        found = [
            metrics[step][f"validation/{name}"]
            for name in ("score", "reward/count:e", "reward/count:f")
        ]
        assert found == pytest.approx([2 * count["e"], count["e"], count["f"]], rel=1e-6)
    shown = re.findall(r"Prompt:    (.*)\nGenerated: .*\nReward:    ", capsys.readouterr().out)
    assert shown == [row["prompt"] for row in OTHERS[:2]] * 2


@pytest.fixture
def validated(config, monkeypatch):
    """The first validation of a run with other settings of ``rl``, which ends behind it."""

    def begin(progress, adopt):
        raise Killed(progress.validate(progress.state))

    def run(own=config, **settings):
        with pytest.raises(Killed) as killed:
            training.rl.run(replace(own, rl=replace(own.rl, **settings)), vpg)
        return killed.value.args[0]

    monkeypatch.setattr(Progress, "begin", begin)
    monkeypatch.setattr(Progress, "has_steps", False)  # whose memory would be checked
    return run


def test_greedy_validations_of_a_run_as_long_as_a_pass(config, validated, tmp_path, capsys):
    """Nine prompts are a pass of two batches of eight. The likeliest answer to a prompt is one,
    wherever it stands; samples differ."""
    write(tmp_path / "prompts.json", [{"prompt": f"say {c}", "topic": c} for c in "abcdefghi"])
    twice = write(tmp_path / "others.json", [{"prompt": "x", "topic": c} for c in "ab"])
    found = validated(validation_data=twice, num_epochs=1, validation_temperature=0.0)
    said = "2 iterations of 8 prompts x 1 answers: 1.78 passes over 9 prompts\n"
    assert said in capsys.readouterr().out
    first, second = (row["response"] for row in found.samples)
    assert first == second
    assert not [name for name in found.metrics if "@" in name]
    assert "num_epochs: 1" in (tmp_path / "run" / "config.yaml").read_text()
    own = replace(config.rl, temperature=0.5)
    characters = tokenizers.characters(["ab"])
    assert initial.validation_config(own, characters).temperature == 0.5
    own = replace(own, validation_temperature=0.0)
    assert initial.sampling_config(own, characters).temperature == 0.5


def test_several_samples_of_a_validation_are_of_one_prompt_and_differ(config, validated, tmp_path):
    """Three prompts x 4 samples are two batches of eight; the metric is the mean of all twelve. Two
    of the prompts are equal, and stay two."""
    write(tmp_path / "others.json", [OTHERS[0], OTHERS[2], OTHERS[2]])
    found = validated(validation_samples=4, show_examples=0)
    rows = found.samples
    assert [row["prompt"] for row in rows] == ["tell fable"] * 4 + ["bees"] * 8
    assert len({row["response"] for row in rows[:4]}) > 1
    scores = np.array([row["score"] for row in rows]).reshape(3, 4)
    assert found.metrics["validation/score"] == pytest.approx(scores.mean(), rel=1e-6)
    pairs = [np.maximum(scores[:, i], scores[:, j]) for i, j in itertools.combinations(range(4), 2)]
    best = {1: scores.mean(axis=1), 2: np.mean(pairs, axis=0), 4: scores.max(axis=1)}
    for k, of_prompts in best.items():
        numbers = np.array([of_prompts.mean(), *student(of_prompts)])
        got = [found.metrics[f"validation/best@{k}{edge}"] for edge in ("", "_low", "_high")]
        assert got == pytest.approx(numbers, rel=1e-6)
    assert {name for name in found.metrics if "@" in name} == {
        f"validation/best@{k}{edge}" for k in best for edge in ("", "_low", "_high")
    }
    with pytest.raises(ValueError, match="validation_samples: with validation_temperature 0"):
        replace(config.rl, validation_samples=4, validation_temperature=0.0)


def test_a_verified_answer_is_voted_for(config, validated, tmp_path):
    """Whichever answers there are: those of one majority are right, and few of the others."""
    for name, rows in {"prompts": PROMPTS, "others": OTHERS}.items():
        write(tmp_path / f"{name}.json", [row | {"answer": "7"} for row in rows])
    found = validated(replace(config, reward=("math",)), validation_samples=3, show_examples=0)
    assert {f"validation/{name}@3" for name in ("best", "pass", "maj")} <= found.metrics.keys()
    assert "validation/maj@2" not in found.metrics


def sampled_answers(texts, numbers, scores, components=None):
    """A rollout of these texts, and its batch; of number -1 a padded row, without a text one that
    has no score.
    """
    tokenizer = tokenizers.characters(["0123456789 ?."])
    tokens = np.full((len(texts), 8), tokenizer.pad_id)
    mask = np.zeros((len(texts), 8), int)
    for i, text in enumerate(texts):
        tokens[i, : 2 + len(text)] = tokenizer.encode("? " + text)
        mask[i, 2 : 2 + len(text)] = 1
    rollout = Rollout(tokens, 1 * (tokens > 0), mask, 0.0 * mask)
    rollout = rollout.replace(scores=np.float32(scores), extras=components)
    rows = [Row("?", (), "", columns={"answer": "7"}) for _ in range(3)]
    prompts = SimpleNamespace(rows=rows, columns=("answer",))
    batch = Batch(prompts, np.array(numbers), jax.random.key(0))
    job = rl_job(
        settings=RLStage(validation_samples=3),
        inputs={"initial": SimpleNamespace(tokenizer=tokenizer)},
        run=SimpleNamespace(config=RunConfig()),
    )
    return validation.of_several(job, rollout, rollout, batch)


def test_several_answers_by_hand():
    """Prompts 0 and 2, of which the second is equal to the first: 7, 7 and 8; 9, 9.0 and none that
    has a score. A padded row and its score count nowhere."""
    texts = ["7", "7", "8", "9", "9.0", "", "7"]
    scores = [1, 1, 0, 0, 0, 1, 1]
    right = np.array([1, 1, 0, 0, 0, 1, 1])
    found = sampled_answers(texts, [0, 0, 0, 2, 2, 2, -1], scores, {"math": right})
    assert found["validation/pass@1"] == pytest.approx(1 / 3)
    assert found["validation/pass@2"] == pytest.approx(1 / 2)
    assert found["validation/pass@3"] == found["validation/maj@3"] == 1  # of the first prompt alone
    low, high = share_interval(np.array([1.0, 0.0]))
    assert found["validation/best@2_low"] == found["validation/pass@2_low"] == pytest.approx(low)
    assert found["validation/pass@2_high"] == pytest.approx(high)
    assert found["validation/maj@3_low"] == pytest.approx(share_interval(np.ones(1))[0])
    assert not {"validation/maj@1", "validation/maj@2"} & found.keys()
    assert all(map(plots.meaning, found))  # in the report


@pytest.mark.parametrize(
    ("texts", "right", "expected"),
    [
        (["7", "8", "9"], [1, 0, 0], 1 / 3),
        (["7", "8", "8"], [1, 0, 0], 0),
        (["7", "8.0", "8"], [1, 0, 0], 0),  # as numbers they are one
        (["7", "3 4", "8"], [1, 1, 0], 1),  # so are all that the reward calls right
    ],
)
def test_a_majority_is_of_equal_answers(texts, right, expected):
    right = np.float32(right)
    found = sampled_answers(texts, [0, 0, 0], right, {"math": right})
    assert found["validation/maj@3"] == pytest.approx(expected)


def test_scores_that_are_no_shares_are_no_passes():
    found = sampled_answers(["1", "2", "3"], [0, 0, 0], [0.5, 2.0, 1.0])
    assert found["validation/best@3"] == 2
    assert found["validation/best@2"] == pytest.approx((2 + 2 + 1) / 3)
    assert not [name for name in found if name[:15] in ("validation/pass", "validation/maj@")]
    assert "validation/best@3_low" not in found  # one prompt has no interval


def test_training_samples_have_the_score_of_their_own_text():
    """Of the first two groups with a score, in which prompts stand in any order, as after dynamic
    sampling: the reward counts an e.
    """
    tokenizer = tokenizers.characters(["abcdef?"])
    texts = ["", "", "e", "ee", "", "f", "eee", "e"]  # no text: without a score
    numbers = np.array([3, 3, 0, 0, 2, 2, 1, 1])
    asked = [Row(f"{c}?", (), "") for c in "abcd"]
    tokens = np.full((8, 5), tokenizer.pad_id)
    mask = np.zeros((8, 5), int)
    for i, text in enumerate(texts):
        tokens[i, : 2 + len(text)] = tokenizer.encode(asked[numbers[i]].prompt + text)
        mask[i, 2 : 2 + len(text)] = 1
    scores = np.float32([text.count("e") for text in texts])
    part = np.where(scores > 1, scores / 2, np.nan)
    own = {"scores": scores, "extras": {"half": part}}
    rollout = Rollout(tokens, 1.0 * (tokens > 0), mask, 0.0 * mask, numbers, **own)
    job = rl_job(
        own=grpo.Config(group_size=2),
        inputs={"initial": SimpleNamespace(tokenizer=tokenizer)},
        schedule=SimpleNamespace(prompts=SimpleNamespace(rows=asked)),
    )
    rows = validation.training_samples(job, jax.tree.map(jnp.asarray, rollout))
    assert [(row["prompt"], row["response"], row["score"], row["length"]) for row in rows] == [
        ("a?", "e", 1.0, 1),
        ("a?", "ee", 2.0, 2),
        ("c?", "f", 0.0, 1),
    ]
    assert [row["reward/half"] for row in rows] == [None, 1.0, None]
    assert {row["split"] for row in rows} == {"train"}
    job.method = job.method._replace(algorithm_config=vpg.Config())
    assert len(validation.training_samples(job, rollout)) == 5  # at most eight, each a prompt


def test_the_interval_of_a_win_rate_is_one_over_prompts():
    """Two prompts with four equal samples each are two observations, not eight."""
    ones = np.ones((8, 2), np.int32)
    scores = np.repeat(np.float32([0.0, 1.0]), 4)
    scored = Rollout(ones, ones, ones, 0.0 * ones, scores=scores)
    by_prompt = validation.win_rate(scored, np.repeat([5, 9], 4))
    apart = validation.win_rate(scored, np.arange(8))
    assert by_prompt["validation/win_rate"] == apart["validation/win_rate"] == 0.5
    low, high = share_interval(np.float32([0.0, 1.0]))
    assert (
        by_prompt["validation/win_rate_low"] == np.float32(low) < apart["validation/win_rate_low"]
    )
    assert by_prompt["validation/win_rate_high"] == np.float32(high)


SCORERS = """
def reads(prompts, responses, topic=None): pass
def takes(prompts, responses, **columns): pass
def pair(first, second, topic): pass
"""


@pytest.mark.parametrize(
    ("place", "entries", "is_read"),
    [
        ("reward", ["mine.py:takes"], False),
        ("reward", ["mine.py:reads"], True),
        ("reward", ["count:e", "mine.py:reads*0"], True),
        ("reward", ["pairs:mine.py:pair"], True),
        ("reward", ["judge:topic.yaml else 0"], True),
        ("reward", ["judge:plain.yaml"], False),
        ("judge", ["mine.py:takes"], False),
        ("judge", ["mine.py:reads"], True),
        ("judge", ["pairs:judge:plain.yaml"], False),
        ("judge", ["pairs:judge:topic.yaml"], True),
        ("classifier", "mine.py:takes", False),
        ("classifier", "mine.py:reads", True),
    ],
)
def test_a_column_that_validation_lacks_is_refused_if_a_scorer_reads_it(
    place, entries, is_read, config, tmp_path, monkeypatch
):
    """By its name. The run is built, and ends before its first step."""
    write(tmp_path / "others.json", [{"prompt": "x", "level": 1}])
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SCORERS)
    Path("plain.yaml").write_text("criteria: kind")
    Path("topic.yaml").write_text("criteria: kind\ncolumns: [topic]")
    ends_before_its_first_step(monkeypatch)
    given = {
        "reward": lambda: replace(config, reward=tuple(entries)),
        "judge": lambda: replace(config, rl=replace(config.rl, judge=tuple(entries))),
        "classifier": lambda: replace(config, safety=Safety(classifier=entries, below=0.0)),
    }[place]()
    given = replace(given, judge=Judge(url="http://localhost/v1", model="m"))
    refused = pytest.raises(UserError, match=r"rl\.validation_data: its rows have no topic, ")
    with refused if is_read else pytest.raises(Killed):
        training.rl.run(given, rloo, rloo.Config(group_size=2))
    assert not is_read or folder.is_unused(tmp_path / "run")


def test_what_is_read_of_the_rows_is_known_of_every_reward(monkeypatch):
    monkeypatch.setattr(verifiable, "gym_rows", lambda task: [])

    def reads(*entries):
        how = {"tokenizer": tokenizers.characters("abc"), "load": pytest.fail}
        columns = ("answer", "gym", "topic")
        return spec.build_reward(entries, columns=columns, **how).reads

    assert reads("math") == {"answer"}
    assert reads("gym:leg_counting", "length", "regex:a*2") == {"gym"}
    assert reads("http://localhost/score", "count:a") == set()
    told = spec.given(rewards.teacher_prompts(lambda text: [1], "topic"))
    assert told.reads == {"topic"}


def ends_before_its_first_step(monkeypatch):
    def begin(progress, adopt):
        raise Killed

    monkeypatch.setattr(Progress, "begin", begin)
    monkeypatch.setattr(Progress, "has_steps", False)  # whose memory would be checked


def test_prompts_are_validated_without_the_answers_of_training(config, tmp_path, monkeypatch):
    """Which rewards and judges may read. The run is built, and ends before its first step."""
    pairs = [row | {"chosen": "c", "rejected": "r"} for row in PROMPTS]
    write(tmp_path / "prompts.json", [*pairs, {"prompt": "x", "topic": "fox", "response": "y"}])
    (tmp_path / "mine.py").write_text("def score(prompts, responses, chosen, response): pass")
    scorer = (f"{tmp_path / 'mine.py'}:score",)
    ends_before_its_first_step(monkeypatch)
    judged = replace(config, reward=scorer, rl=replace(config.rl, judge=scorer))
    with pytest.raises(Killed):
        training.rl.run(judged, vpg)


def test_the_judge_may_read_a_column_that_only_validation_has(config, tmp_path, monkeypatch):
    """The run is built, and ends before its first step."""
    write(tmp_path / "others.json", [{"prompt": "x", "topic": "fox", "answer": "y"}])
    (tmp_path / "judge.py").write_text("def judge(prompts, responses, answer): return [0.0]")
    judged = replace(config.rl, judge=(f"{tmp_path / 'judge.py'}:judge",))
    ends_before_its_first_step(monkeypatch)
    with pytest.raises(Killed):
        training.rl.run(replace(config, rl=judged), vpg)


def test_another_reward_file_is_another_run(config, tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("score = len")
    config = replace(config, reward=(f"{file}:score",))
    read = files(sources_of(config), config.rl, config.vpg)
    with open_run(config, "vpg", {}, files=read) as run:
        (run.folder.checkpoints / "0").mkdir(parents=True)
    file.write_text("score = max")
    with pytest.raises(UserError, match=r"sha256 of reward \S+ was '\w{12}' and is now '\w{12}'"):
        training.rl.run(replace(config, resume=True), vpg)
