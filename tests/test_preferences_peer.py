"""PPO of TRL beside ours, experiments/preferences_peer.py and preferences_trl.py."""

import json
import re
import subprocess
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import preferences
import preferences_peer
import pytest
from numpy.testing import assert_allclose
from preferences_peer import Settings

from rlhf_jax import models
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.data.tokenizers import train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import Generator, LanguageModel

PROMPTS = [f"What is {number}?" for number in range(8)]
ASKED = Settings(
    model="model",
    reward_model="rm",
    prompts=PROMPTS,
    held_out=["Why?", "Who is it?"],
    iterations=3,
    batch=4,
    new_tokens=6,
    eval_interval=2,
    seed=5,
    learning_rate=0.01,
)


def test_our_flags_are_the_settings_of_trl():
    odd = replace(
        ASKED,
        schedule="constant",
        rank=2,
        alpha=3.0,
        passes=2,
        minibatches=4,
        kl_coef=0.25,
        gamma=0.75,
        lam=0.5,
        clip=0.125,
        value_clip=0.375,
        value_coef=0.625,
        whiten_rewards=False,
        missing_eos_penalty=1.5,
    )
    config = parse(RunConfig, preferences_peer.flags(odd))
    rl, ppo, adam = config.rl, config.ppo, config.rl.optimizer
    assert (config.seed, config.lora.rank, config.lora.alpha) == (5, 2, 3.0)
    assert (rl.num_iterations, rl.num_epochs, rl.batch_size, rl.max_new_tokens) == (3, None, 4, 6)
    assert (rl.validation_interval, rl.kl_coef, rl.missing_eos_penalty) == (2, 0.25, 1.5)
    assert (rl.temperature, rl.top_k) == (1, None)
    assert (adam.learning_rate, adam.schedule, adam.max_grad_norm) == (0.01, "constant", None)
    assert (adam.b1, adam.b2, adam.eps, adam.weight_decay) == (0.9, 0.999, 1e-8, 0)
    assert (ppo.num_epochs, ppo.num_minibatches, ppo.gamma, ppo.gae_lambda) == (2, 4, 0.75, 0.5)
    assert (ppo.clip_low, ppo.clip_high, ppo.value_clip) == (0.125, 0.125, 0.375)
    assert (ppo.value, ppo.value_from, ppo.value_coef) == ("separate", "reward", 0.625)
    assert ppo.num_microbatches == 1
    assert not ppo.normalize_returns
    assert not ppo.whiten_rewards
    assert parse(RunConfig, preferences_peer.flags(replace(odd, rank=0))).lora.rank == 0
    more = replace(odd, whiten_rewards=True, batch=8, minibatches=1, microbatches=2)
    ppo = parse(RunConfig, preferences_peer.flags(more)).ppo
    assert (ppo.whiten_rewards, ppo.num_minibatches, ppo.num_microbatches) == (True, 1, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 9}, "8 prompts: a batch has 9"),
        ({"minibatches": 3}, "4 is no multiple of minibatches 3"),
        ({"microbatches": 3}, "4 is no multiple of microbatches 3"),
        ({"minibatches": 2, "microbatches": 2}, "one step a pass"),
        ({"whiten_rewards": True}, "whiten_rewards: .* 8 answers"),
        ({"whiten_rewards": True, "batch": 8, "minibatches": 2}, "whiten_rewards: .* 8 answers"),
    ],
)
def test_what_trl_would_refuse_is_refused_first(wrong, message):
    with pytest.raises(UserError, match=message):
        replace(ASKED, **wrong)


def test_trl_reads_every_setting_and_no_other():
    read = set(re.findall(r"\basked\.(\w+)", preferences_peer.TRL.read_text("utf-8")))
    assert read == {field.name for field in fields(Settings)}


def test_trl_runs_once_for_the_same_settings(tmp_path, monkeypatch):
    started = []

    def run(words, **how):
        started.append(words)
        settings = json.loads((tmp_path / "trl.asked.json").read_text("utf-8"))
        (tmp_path / "trl.json").write_text(json.dumps({"asked": settings, "iterations": []}))

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "trl.json"
    for _ in range(2):
        assert preferences_peer.theirs(ASKED, out, "its-python")["iterations"] == []
    assert started == [
        ["its-python", str(preferences_peer.TRL), str(tmp_path / "trl.asked.json"), str(out)]
    ]
    with pytest.raises(UserError, match=r"trl.json: .*other settings \(lam, seed\)"):
        preferences_peer.theirs(replace(ASKED, lam=1.0, seed=6), out)


class Lengths:
    """A reward model that likes long answers."""

    def score_texts(self, conversations, responses):
        return np.array([float(len(text)) for text in responses])


def test_both_are_judged_alike(tmp_path, monkeypatch):
    """Ours by the samples of its validations, TRL's by its answers; costs stand at the end."""
    runs = tmp_path / "brief" / "seed-2"
    runs.mkdir(parents=True)
    texts = {
        "Why do people like chess?": ["No", "No."],
        "Tell me about jazz.": ["It is", "It is me."],
    }
    for part in ("train", "held_out"):
        rows = [{"prompt": text} for text in (PROMPTS * 4 if part == "train" else texts)]
        (tmp_path / f"prompts_{part}.json").write_text(json.dumps(rows))
    ends = {
        step: dict(zip(texts, said, strict=True))
        for step, said in enumerate(zip(*texts.values(), strict=True))
    }
    asked = []

    def finish(run, words):
        asked.append(words)
        run.mkdir()
        samples = [
            {"step": step, "prompt": prompt, "response": text, "score": float(len(text))}
            for step, said in ends.items()
            for prompt, text in said.items()
        ]
        steps = [{"step": 0}, {"step": 1, "objective/kl": 0.25}]
        times = [{"timing/validation": 9.0}, {"timing/step": 11.0}, {"timing/step": 3.0}]
        for name, rows in {"samples": samples, "metrics": steps, "timing": times}.items():
            (run / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def theirs(settings, out, python):
        asked.append((settings, out.name, python))
        answers = {str(step): {"texts": [*said.values()]} for step, said in ends.items()}
        row = {"step": 1, "seconds": 6.0, "kl": 0.25}
        return {"answers": answers, "iterations": [row], "peak_memory_mb": 2048.0}

    judge = preferences.Judge("brief", texts, Lengths())
    monkeypatch.setattr(preferences, "judge_of", lambda *of: judge)
    monkeypatch.setattr(preferences, "finish", finish)
    monkeypatch.setattr(preferences_peer, "theirs", theirs)
    out = tmp_path / "out.json"
    preferences_peer.main(tmp_path, out, iterations=1, every=1, python="its")
    words, (settings, name, python) = asked
    config = parse(RunConfig, words[1:])
    assert (
        (config.model, config.seed)
        == (settings.model, settings.seed)
        == (str(tmp_path / "model"), 2)
    )
    assert config.data == (str(tmp_path / "prompts_train.json"),)
    assert settings.prompts == PROMPTS * 4
    assert config.rl.validation_data == (str(tmp_path / "prompts_held_out.json"),)
    assert settings.held_out == [*texts]
    assert config.reward == (str(runs / "reward-model"),)
    assert settings.reward_model == str(runs / "reward-model" / "model")
    assert (name, python) == ("out.trl.json", "its")
    rows = json.loads(out.read_text())["rows"]
    found = {(row["variant"], row["step"], row["metric"]): row["value"] for row in rows}
    for library, seconds in (("rlhf_jax", 3.0), ("TRL 1.12", 6.0)):
        assert (found[library, 0, "gold"], found[library, 1, "gold"]) == (0.5, 1.0)
        assert (found[library, 0, "score"], found[library, 1, "score"]) == (3.5, 6.0)
        assert found[library, 1, "KL"] == 0.25
        assert found[library, 1, "seconds an iteration"] == seconds
    assert found["TRL 1.12", 1, "GB at most"] == 2
    assert found["rlhf_jax", 1, "GB at most"] > 0


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy whose pad ends its turns, as SmolLM2's, and a reward model as we write it."""
    import torch
    import transformers

    policy, reward = (tmp_path_factory.mktemp("peer") / name for name in ("policy", "reward"))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = train_bpe([" ".join(PROMPTS) + " user\n assistant\n"] * 3, 290).backend
    backend.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=special[0], eos_token=special[2], pad_token=special[2]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(policy)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, max_position_embeddings=128, **sizes, **ids
    )
    transformers.LlamaForCausalLM(config).save_pretrained(policy)
    judge = LanguageModel.load(policy)
    score = models.add_head(jax.random.key(1), judge.params, "score")["score"]
    score |= {"gain": jnp.float32(8), "bias": jnp.float32(0.5), "shift": jnp.float32(-1.25)}
    judge._replace(params={**judge.params, "score": score}).save(reward)
    return str(policy), str(reward)


@pytest.fixture(scope="module")
def trl_script():
    pytest.importorskip("trl.experimental.ppo")  # of the TRL of the extra "benchmarks"
    import preferences_trl
    import torch

    torch.set_num_threads(1)  # threads that wait for each other are slow where tests share a core
    return preferences_trl


@pytest.mark.parity
def test_trl_reads_the_same_prompts_and_scores(folders, trl_script):
    """Of answers that ended, and of those that were cut at the limit with an end behind them."""
    import torch
    import transformers
    from trl.experimental.utils import get_reward

    policy, reward = folders
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward, padding_side="left")
    generator = Generator(policy, reward_model=reward, max_new_tokens=60, batch_size=8)
    rows = [
        generator.row(prompt, "prompt", {}, generator.tokenizer) for prompt in ["Why?", *PROMPTS]
    ]
    prompts = trl_script.prompt_ids(tokenizer, ["Why?", *PROMPTS])
    ours = generator(["Why?", *PROMPTS], seed=1, num_samples=4)
    _, rollout = generator.sample(generator.ask(rows, 4), 1)
    columns = rollout.prompt_length
    for ids, tokens, real in zip(
        prompts, rollout.tokens[::4], rollout.attention_mask[::4], strict=True
    ):
        assert tokens[:columns][real[:columns] != 0].tolist() == ids
    assert {True, False} == set(ours.finished.tolist())
    model = trl_script.scorer(reward, tokenizer.pad_token_id)
    for number, (tokens, real) in enumerate(
        zip(rollout.tokens, rollout.attention_mask, strict=True)
    ):
        ids = np.asarray(tokens)[np.asarray(real) != 0]
        if tokenizer.pad_token_id in ids:  # for TRL such an answer ends there
            continue
        if not ours.finished[number]:
            ids = np.append(ids, tokenizer.eos_token_id)
        prompt = len(prompts[number // 4])
        pads = (3, 2 * ours.finished[number])  # a whole answer has no pad behind it
        padded = np.pad(ids, pads, constant_values=tokenizer.pad_token_id)[None]
        with torch.no_grad():
            _, score, _ = get_reward(
                model, torch.tensor(padded), tokenizer.pad_token_id, 3 + prompt
            )
        assert_allclose(score.item(), ours.rewards[number], atol=1e-4)


@pytest.mark.parity
def test_a_pad_that_ends_turns_is_refused(folders, trl_script):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[0])
    with pytest.raises(ValueError, match="pad"):
        trl_script.prompt_ids(tokenizer, ["Why?"])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("rank", "value_from", "minibatches", "microbatches"),
    [(2, "reward", 2, 1), (0, "policy", 1, 2)],
)
def test_trl_trains_policy_and_critic(
    rank, value_from, minibatches, microbatches, folders, trl_script, tmp_path
):
    from types import SimpleNamespace

    policy, reward = folders
    cut = {"passes": 2, "minibatches": minibatches, "microbatches": microbatches}
    how = {"rank": rank, "value_from": value_from, **cut}
    asked = replace(ASKED, model=policy, reward_model=reward, **how)
    train, watch = trl_script.trainer(SimpleNamespace(**vars(asked)), tmp_path / "out.json")
    before = {name: x.detach().clone() for name, x in train.model.named_parameters()}
    head = before["value_model.score.weight"]
    assert bool((head == 0).all()) == (value_from == "policy")
    steps = []
    train.optimizer.optimizer.register_step_post_hook(lambda *of: steps.append(1))
    train.train()
    # 3 iterations of 2 passes; accelerate accumulates nothing in the last batch of the prompts.
    assert len(steps) == (12 if minibatches == 2 else 2 + 4 + 2)
    after = dict(train.model.named_parameters())
    changed = {name for name in after if not after[name].equal(before[name])}
    trained = {name for name in after if "lora_" in name or ".score." in name} if rank else {*after}
    assert changed == trained
    found = json.loads(watch.out.read_text("utf-8"))
    assert found["asked"] == vars(asked)
    assert list(found["answers"]) == ["0", "2", "3"]
    assert all(len(at["texts"]) == 2 for at in found["answers"].values())
    rows = found["iterations"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[2]["kl"])
    rates = [row["learning_rate"] for row in rows]
    assert_allclose(rates, [0.01, 0.02 / 3, 0.01 / 3])
    assert all(row["seconds"] > 0 and 0 <= row["ended"] <= 1 for row in rows)
    assert 10 < found["peak_memory_mb"] < 20_000
