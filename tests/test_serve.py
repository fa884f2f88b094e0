"""What the server answers: the tokens of ``generate``, whatever else is asked; samples of a run;
scores; judgements.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import numpy as np
import pytest
from builders import initial_params, metric_rows
from serving import running

from rlhf_jax import grpo, models
from rlhf_jax.config import EngineServer, Optimizer, RLStage, RunConfig, Text
from rlhf_jax.data import formats
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import Generator, LanguageModel
from rlhf_jax.graders.service import Judge, reward_service
from rlhf_jax.inference.labelling import summary
from rlhf_jax.inference.serving import serve
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training import rl

TOKENIZER = characters("abcdefgh say")
LETTERS = "abcdefgh"


def network(**more):
    size = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 40}
    return models.GPT2Config(vocab_size=TOKENIZER.vocab_size, **size, initializer_range=0.3, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy with random weights, which samples twelve tokens."""
    folder = tmp_path_factory.mktemp("policy")
    model = models.build(network())
    how = SamplingConfig(12, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id)
    LanguageModel(model, initial_params(model, 7), TOKENIZER).save(
        folder, template="{prompt}", config=how
    )
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, max_new_tokens=12) as (address, served):
        yield httpx.Client(base_url=address, timeout=120), served


def ask(client, path="/v1/completions", **body):
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def texts(reply):
    return [choice["text"] for choice in reply["choices"]]


def test_an_answer_is_the_one_of_generate(folder, server):
    client, _ = server
    generator = Generator(folder, max_new_tokens=12, template="{prompt}")
    want = generator(["say a", "say b"], seed=3, num_samples=2)
    for row, prompt in enumerate(["say a", "say b"]):
        reply = ask(client, prompt=prompt, seed=3, n=2, logprobs=0)
        assert texts(reply) == want.texts[2 * row : 2 * row + 2]
        for choice, log_probs in zip(
            reply["choices"], want.token_log_probs[2 * row :], strict=False
        ):
            np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], log_probs, atol=1e-5)


def test_an_answer_does_not_depend_on_the_others(server):
    """Fifty requests of other prompts, lengths and settings at once, and each one alone."""
    client, served = server
    rng = np.random.default_rng(0)
    bodies = [
        {
            "prompt": "say " + "".join(rng.choice(list(LETTERS), rng.integers(1, 9))),
            "seed": int(rng.integers(1000)),
            "max_tokens": int(rng.integers(1, 13)),
            "temperature": float(rng.choice([0.0, 0.7, 1.0, 1.5])),
            "top_k": int(rng.choice([0, 5])),
            "n": int(rng.integers(1, 3)),
            "logprobs": 2,
            "return_token_ids": True,
        }
        for _ in range(50)
    ]
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(lambda body: ask(client, **body)["choices"], bodies))
    assert served.policies[next(iter(served.policies))].worker.is_idle
    for body, choices in zip(bodies, together, strict=True):
        alone = ask(client, **body)["choices"]
        assert [one["token_ids"] for one in alone] == [one["token_ids"] for one in choices]
        for one, other in zip(alone, choices, strict=True):
            np.testing.assert_allclose(
                one["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"], atol=1e-5
            )


def test_the_log_probs_of_a_prompt_are_the_models(server):
    client, served = server
    policy = next(iter(served.policies.values()))
    ids = TOKENIZER.encode("say abc")
    reply = ask(client, prompt=ids, echo=True, max_tokens=1, logprobs=3, temperature=0)
    told = reply["choices"][0]["logprobs"]
    model, params = policy.generator.model, policy.generator.params
    tokens = np.array([ids])
    hidden = model.hidden(params, tokens, np.ones_like(tokens))
    want = np.asarray(jax.nn.log_softmax(model.unembed(params, hidden)))[0]
    assert told["token_logprobs"][0] is None
    assert len(told["token_logprobs"]) == len(ids) + 1
    np.testing.assert_allclose(
        told["token_logprobs"][1:-1], [want[t, i] for t, i in enumerate(ids[1:])], atol=1e-5
    )
    for t, best in enumerate(told["top_logprobs"][1:]):
        assert max(best.values()) == pytest.approx(want[t].max(), abs=1e-5)
    # lm-eval compares these two exactly.
    assert told["token_logprobs"][-1] == max(told["top_logprobs"][-1].values())
    assert reply["choices"][0]["text"].startswith("say abc")


def test_a_run_may_sample_here(folder, tmp_path):
    """With weights that are not updated it is the run that samples itself."""
    rows = [{"prompt": f"say {letter}"} for letter in LETTERS]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    found = {}
    with running(folder, max_new_tokens=12) as (address, _):
        for engine in (f"openai:{address}", None):
            stage = RLStage(
                num_iterations=2,
                batch_size=8,
                max_new_tokens=6,
                validation_fraction=0.25,
                optimizer=Optimizer(learning_rate=0.0, schedule="constant"),
                engine=engine,
            )
            out = tmp_path / f"run_{engine is None}"
            config = RunConfig(
                data=(str(tmp_path / "prompts.json"),),
                model=str(folder),
                output_dir=str(out),
                text=Text(bucket_multiple=8),
                reward=("count:a",),
                rl=stage,
                engine=EngineServer(timeout=120.0),
            )
            rl.run(config, grpo, grpo.Config(group_size=4))
            found[engine is None] = metric_rows(out)
    for own, served in zip(found[True], found[False], strict=True):
        assert own == pytest.approx({name: served[name] for name in own}, abs=1e-5)
    assert found[False][1]["policy/sampler_gap"] < 1e-5


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model with random weights."""
    folder = tmp_path_factory.mktemp("judge")
    model = models.build(network())
    params = models.add_head(jax.random.key(1), initial_params(model, 5), "score")
    LanguageModel(model, params, TOKENIZER).save(folder, template="{prompt}")
    return folder


def test_scores_in_all_the_forms_that_trainers_send(judge):
    prompts, answers = ["say a", "say b"], ["bad bay", "gas"]
    talks = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    ended = [
        f"{prompt}{answer}<|endoftext|>" for prompt, answer in zip(prompts, answers, strict=True)
    ]
    want = LanguageModel.load(judge).score_texts([talk[:1] for talk in talks], answers)
    assert abs(want[0] - want[1]) > 0.1
    with running(reward=(str(judge),)) as (address, _):
        client = httpx.Client(base_url=address, timeout=120)
        for body in (
            {"messages": talks},
            {"prompts": prompts, "responses": answers},
            {"prompts": [talk[:1] for talk in talks], "responses": [talk[1:] for talk in talks]},
            {"query": ended, "prompts": prompts, "labels": [None, None]},
        ):
            reply = ask(client, "/v1/score", **body)
            np.testing.assert_allclose(reply["scores"], want, atol=1e-5)
            assert reply["rewards"] == reply["scores"]
        told = [[{"role": "user", "content": "say b"}], None]
        service = reward_service(f"{address}/score", Judge())
        scores = service(["of a template", "say b"], [answers[1]] * 2, messages=told)
        np.testing.assert_allclose(scores, want[[1, 1]], atol=1e-5)
        for body in ({"messages": talks[1]}, {"prompt": "say b", "response": answers[1]}):
            assert ask(client, "/score", **body)["score"] == pytest.approx(want[1], abs=1e-5)
        for body in ({}, {"messages": talks[0][:1]}, {"prompts": ["say a"], "responses": []}):
            assert client.post("/score", json=body).status_code == 400
        unserved = client.post("/v1/completions", json={"prompt": "say a"})
        assert unserved.status_code == 404


def test_a_judgement_is_a_row_to_train_on(folder, tmp_path):
    out = tmp_path / "labels.jsonl"
    turns = [{"role": "user", "content": "say a"}]
    judged = {"messages": turns, "answers": ["a", "b"], "seconds": 2.0}
    for choice in ("b", "a"):  # two starts of one server
        with running(folder, labels=str(out)) as (address, _):
            client = httpx.Client(base_url=address, timeout=120)
            assert ask(client, "/judgement", **judged, choice=choice)["kept"]
            assert client.get("/v1/models").json()["judgements"] == str(out)
            equal = judged | {"answers": ["a", "a"], "choice": "a"}
            assert client.post("/judgement", json=equal).status_code == 400
    rows = formats.read("comparisons", [str(out)], seed=0).rows
    assert [row.responses for row in rows] == [("b", "a"), ("a", "b")]
    assert [given.choice for given in summary.read(out)] == ["b", "a"]


@pytest.mark.parametrize(
    ("host", "asked", "variable", "expected"),
    [
        ("127.0.0.1", False, "", None),
        ("localhost", False, "", None),
        ("::1", False, "", None),
        ("127.0.0.1", True, "", "new"),
        ("0.0.0.0", False, "", "new"),
        ("192.168.1.2", False, "", "new"),
        ("models.example.org", False, "", "new"),
        ("127.0.0.1", False, "mine", "mine"),
        ("0.0.0.0", True, "mine", "mine"),
    ],
)
def test_who_needs_a_token(judge, monkeypatch, host, asked, variable, expected):
    monkeypatch.setenv("SERVE_TOKEN", variable)
    config = serve.Config(reward=(str(judge),), host=host, token=asked)
    with serve.opened([], config) as served, serve.opened([], config) as again:
        if expected == "new":
            assert len(served.token) >= 43
            assert served.token != again.token
        else:
            assert served.token == expected


def test_each_folder_is_given_once(folder):
    for folders in ([], [str(folder)] * 2):
        with pytest.raises(UserError, match="each once"), serve.opened(folders, serve.Config()):
            pass
