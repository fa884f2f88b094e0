"""Distillation as a run: its teacher, with and without a reward, under LoRA, repeated."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from builders import (
    goes_on_alike,
    initial_params,
    metric_rows,
    perturbed,
    save_base,
    slow,
    stopped_goes_on_alike,
    with_rl,
)
from numpy.testing import assert_allclose
from servers import VLLM

from rlhf_jax import models
from rlhf_jax.algorithms import distill
from rlhf_jax.cli import verify
from rlhf_jax.config import DistillStage, EngineServer, LoRA, Optimizer, Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.graders import client
from rlhf_jax.training import rl
from rlhf_jax.training.rl import teacher
from rlhf_jax.types import Rollout


def save_teacher(folder, data, **changes):
    """A folder with the tokenizer of ``save_base`` and weights that say something."""
    save_base(folder, data)
    model, params = models.load(folder)
    if changes:
        model = models.build(replace(model.config, **changes))
        params = initial_params(model)
    models.save(folder, model, perturbed(params))
    return str(folder)


@pytest.fixture(scope="module")
def folders(data, tmp_path_factory):
    """The folders of a policy of random weights and of its teacher."""
    root = tmp_path_factory.mktemp("models")
    return save_base(root / "base", data), save_teacher(root / "teacher", data)


@pytest.fixture
def short(config, folders):
    """Four iterations of a policy with a teacher, without a reward."""
    base, teacher = folders
    distill_stage = DistillStage(teacher=teacher)
    config = replace(config, model=base, distill=distill_stage, tokenizer=Tokenizer(), reward=())
    optimizer = Optimizer(learning_rate=5e-2)
    changes = {"num_iterations": 4, "validation_interval": 4, "kl_target": None}
    return with_rl(config, optimizer=optimizer, **changes)


def run(config):
    return rl.run(config, distill)


def with_distill(config, **changes):
    return replace(config, distill=replace(config.distill, **changes))


def of_steps(result, name):
    return [row[name] for row in metric_rows(result.folder) if name in row]


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "reverse_kl"},
        slow({"divergence": "jsd", "num_minibatches": 2}),
        slow({"divergence": "sampled", "clip_high": 5.0, "num_microbatches": 2}),
    ],
)
def test_a_policy_comes_nearer_to_its_teacher(settings, short):
    """Without a reward the score is minus the KL of whole responses."""
    if settings["divergence"] == "sampled":  # one number a token
        short = with_rl(short, num_iterations=40, validation_interval=40)
    result = run(with_distill(short, **settings))
    divergence = of_steps(result, "distill/divergence")
    assert divergence[-1] < 0.8 * divergence[0]
    before, after = of_steps(result, "validation/score")
    assert before < after < 0.1
    rows = metric_rows(result.folder)
    assert not any("reward/equal_share" in row for row in rows)  # nor an alert that reads it
    assert all(row.get("objective/reward", 0.0) == 0.0 for row in rows)
    manifest = json.loads((result.folder / "manifest.json").read_text("utf-8"))
    assert {"model", "teacher"} < manifest["data"].keys()


@pytest.mark.slow
def test_a_stopped_run_goes_on_alike_and_is_repeated(short):
    config = with_rl(short, num_iterations=5, validation_interval=3)
    result = run(config)
    goes_on_alike(run, config, result)
    audit = verify.verify(result.folder, trust_config=True)
    assert audit.differences == []


@pytest.mark.slow
def test_a_policy_that_is_its_teacher_learns_nothing(short):
    config = with_rl(replace(short, model=short.distill.teacher), num_iterations=1)
    result = run(config)
    assert_allclose(of_steps(result, "distill/divergence"), 0.0, atol=1e-6)
    assert_allclose(of_steps(result, "objective/score"), 0.0, atol=1e-4)


LETTERS = """
def letters(prompts, responses):
    return [len(set(response)) for response in responses]
"""


@pytest.mark.slow
@pytest.mark.parametrize("learns", [slow(False), True])
def test_a_reward_is_learned_from_beside_the_teacher(learns, short, tmp_path):
    """A teacher of weight 0 is measured alone."""
    (tmp_path / "reward.py").write_text(LETTERS)
    reward = (f"{tmp_path}/reward.py:letters",) if learns else ()
    config = with_rl(replace(short, reward=reward), num_iterations=2)
    result = run(with_distill(config, teacher_coef=0.0))
    scores = of_steps(result, "objective/score")
    assert (min(scores) > 0) == learns  # numbers of letters, or log-ratios
    _, before = models.load(short.model)
    _, after = models.load(result.model_folder)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    assert (max(jax.tree.leaves(moved)) > 0) == learns


@pytest.mark.slow
def test_under_lora_the_adapters_learn_from_the_teacher(short):
    result = run(replace(short, lora=LoRA(rank=4, alpha=8.0)))
    divergence = of_steps(result, "distill/divergence")
    assert divergence[-1] < divergence[0]


def test_what_is_no_teacher(short, data, tmp_path):
    short_one = save_teacher(tmp_path / "short", data, max_length=16)
    with pytest.raises(UserError, match=r"distill\.teacher .*short: it reads 16 tokens"):
        run(with_distill(short, teacher=short_one))
    with pytest.raises(UserError, match=r"no teacher: give --distill\.teacher"):
        run(with_distill(replace(short, overwrite=True), teacher=None))
    with pytest.raises(UserError, match="nowhere"):
        run(with_distill(replace(short, overwrite=True), teacher=str(tmp_path / "nowhere")))
    other = replace(short, model=None, tokenizer=Tokenizer(kind="characters"), overwrite=True)
    with pytest.raises(UserError, match=r"vocabulary .* \d+ of \d+ entries"):
        run(other)


def test_an_environment_pays_and_needs_a_reward_beside_it(short, tmp_path):
    (tmp_path / "talk.py").write_text("def talk(conversation, row):\n    return None\n")
    with pytest.raises(UserError, match="has a reward"):
        run(with_rl(short, environment=f"{tmp_path}/talk.py:talk"))


# --- A teacher on a server


@pytest.fixture
def server(short, monkeypatch):
    """The teacher of ``short``."""
    monkeypatch.setattr(client, "_SECONDS", 0.001)
    monkeypatch.setattr(client, "_ATTEMPTS", 2)
    started = VLLM(short.distill.teacher)
    yield started
    started.stop()


@pytest.fixture
def asking(short, server):
    """Two iterations that ask the server, at the temperature that it has."""
    config = with_rl(short, num_iterations=2, validation_interval=2, temperature=1.0)
    config = replace(config, checkpoint_interval=1)
    config = replace(config, engine=EngineServer(timeout=120.0))
    return with_distill(config, divergence="sampled", teacher=f"openai:{server.url}")


def scored_texts(server):
    return [tuple(body["prompt"]) for body in server.asked if body]


@pytest.mark.slow
def test_a_server_teaches_what_the_folder_of_its_model_does(asking, server, short, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", "sk-teacher")
    server.adapters["other"] = None
    asking = with_distill(asking, teacher_model=server.name)
    asked = run(asking)
    assert {body["model"] for body in server.asked if body} == {server.name}
    texts = scored_texts(server)
    assert len(set(texts)) == len(texts)
    assert set(server.keys) == {"Bearer sk-teacher"}
    for file in asked.folder.rglob("*"):
        assert not file.is_file() or b"sk-teacher" not in file.read_bytes()
    folder = replace(asking, output_dir=f"{asking.output_dir}-folder")
    read = run(with_distill(folder, teacher=short.distill.teacher, teacher_model=None))
    for name in ("objective/score", "validation/score", "policy/loss"):
        assert_allclose(of_steps(asked, name), of_steps(read, name), rtol=1e-3, atol=1e-4)
    _, ours = models.load(asked.model_folder)
    _, theirs = models.load(read.model_folder)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-3), ours, theirs)
    # Of the tokens drawn, and of whole distributions.
    estimates = of_steps(asked, "distill/divergence")
    assert_allclose(estimates, of_steps(read, "distill/divergence"), rtol=0.5)
    for row in metric_rows(asked.folder):
        assert row.get("objective/reward", 0.0) == 0.0
        assert "reward/equal_share" not in row


@pytest.mark.slow
def test_a_run_that_goes_on_finds_what_a_server_told(asking, server):
    result = run(asking)
    before = len(server.asked)
    stopped_goes_on_alike(run, asking, result, 2)
    more = scored_texts(server)[before:]
    assert len(set(more)) == len(more)
    asked_before = len(server.asked)
    assert verify.verify(result.folder, start=1, trust_config=True).differences == []
    assert len(server.asked) == asked_before


@pytest.mark.slow
def test_a_reward_is_learned_from_beside_a_server(asking, tmp_path):
    (tmp_path / "reward.py").write_text(LETTERS)
    config = replace(asking, reward=(f"{tmp_path}/reward.py:letters",))
    result = run(with_distill(config, teacher_coef=0.0))
    assert min(of_steps(result, "objective/score")) > 0
    assert len(of_steps(result, "distill/divergence")) == 2


def spoiled(change):
    """A server that changes the log-probabilities in its replies."""

    def spoil(path, body, reply):
        if reply is not None and body is not None:
            (choice,) = reply["choices"]
            choice["logprobs"] = change(choice["logprobs"], choice["logprobs"]["tokens"])
        return reply

    return spoil


WHOLE = "expected log-probabilities of 4 tokens and one more"
OTHERWISE = [
    (lambda told, tokens: None, "no log-probabilities of the prompt"),
    (lambda told, tokens: told | {"tokens": None}, "choices.0..logprobs.tokens"),
    (lambda told, tokens: told | {"token_logprobs": [None] * 5}, WHOLE),
    (lambda told, tokens: told | {"tokens": tokens[:-1]}, WHOLE),
    (lambda told, tokens: {"tokens": tokens[:3], "token_logprobs": [None, -1, -1]}, WHOLE),
    (lambda told, tokens: told | {"token_logprobs": [None, 0.5, -1, -1, -1]}, WHOLE),
    (
        lambda told, tokens: told | {"token_logprobs": [None, math.nan, -1, -1, -1]},
        r"token_logprobs.1.",
    ),
    (
        lambda told, tokens: told | {"tokens": [f"{text}~" for text in tokens]},
        r"vocabulary is another one: \d of 4 tokens",
    ),
]


def test_a_server_that_answers_otherwise_teaches_nothing(server, tmp_path):
    tokenizer = server.policy.tokenizer
    asked = teacher.Server(server.url, EngineServer(), tokenizer, tmp_path)
    ids = np.array([tokenizer.encode("What is ice?")[:4]] * 2)
    real = np.array([[1, 1, 1, 1], [0, 0, 0, 0]])
    rollout = Rollout(ids, real, real, np.zeros(ids.shape))
    for change, message in OTHERWISE:
        server.spoil = spoiled(change)
        with pytest.raises(UserError, match=message):
            asked.log_probs(rollout)
    assert list(tmp_path.iterdir()) == []
    server.spoil = lambda path, body, reply: reply
    log_probs = asked.log_probs(rollout)
    assert np.all(log_probs[0, 1:] < 0)
    assert not log_probs[1].any()
    assert log_probs[0, 0] == 0


def test_what_a_server_cannot_teach(asking, server):
    server.adapters["other"] = None
    with pytest.raises(UserError, match=r"it serves .*, other; choose one"):
        run(asking)
    asking = replace(asking, overwrite=True)
    with pytest.raises(UserError, match="temperature 1"):
        run(with_rl(asking, temperature=0.7))
    with pytest.raises(ValueError, match=r"reverse_kl .* whole vocabulary"):
        with_distill(asking, divergence="reverse_kl")
    with pytest.raises(ValueError, match="teacher must begin with http"):
        DistillStage(teacher="openai:host:8000", divergence="sampled")
    with pytest.raises(ValueError, match="teacher_model: only a server has several"):
        DistillStage(teacher="folder", teacher_model="x")
