"""generator.Generator: what it returns, and that a response depends on seed, prompt and sample
number alone.
"""

import json
import shutil

import asked_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from rlhf_jax import models, sampling
from rlhf_jax.config import RLStage
from rlhf_jax.data import tokenizers
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError
from rlhf_jax.generation import generator as module
from rlhf_jax.generation.generator import Generator, LanguageModel
from rlhf_jax.parallel import sharding
from rlhf_jax.training.common import initial

PROMPTS = ["abc", "d", "a much longer prompt", "abcd efgh", "hi"]
NEW = 6
WIDEST = 16  # columns of the first prompts with their responses


build_once = asked_runs.build_once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy and a reward model with random weights that are large enough for texts to differ;
    the second has those of the first and a head.
    """
    root = tmp_path_factory.mktemp("models")
    tokenizer = tokenizers.characters("abcdefghijklmnopqrstuvwxyz :")
    for name, max_length in {"policy": 48, "reward": 40}.items():
        model = models.build(
            models.GPT2Config(tokenizer.vocab_size, max_length, 16, 1, 2, initializer_range=0.5)
        )
        if name == "policy":
            params = model.init(jax.random.key(0))
        else:
            places = params["wpe"]["embedding"][:max_length]
            params = params | {"wpe": {"embedding": places}}
            params = models.add_head(jax.random.key(2), params, "score")
        how = sampling.SamplingConfig(
            NEW, 0.7, top_p=0.9, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
        )
        LanguageModel(model, params, tokenizer).save(root / name, template="{prompt}:", config=how)
    return root


@pytest.fixture(scope="module")
def generator(folders):
    return Generator(
        folders / "policy", folders / "reward", max_new_tokens=NEW
    )  # the folder knows the template


@pytest.fixture(scope="module")
def generations(generator):
    return generator(PROMPTS, seed=3, num_samples=2)


def assert_alike(some, others, places):
    """The first ones are those at the given places of the others."""
    assert some.texts == [others.texts[i] for i in places]
    np.testing.assert_allclose(some.log_probs, others.log_probs[places], atol=1e-4)
    np.testing.assert_allclose(some.rewards, others.rewards[places], atol=1e-4)
    np.testing.assert_array_equal(some.finished, others.finished[places])


@pytest.fixture
def several(folders, tmp_path):
    """(a copy of the policy, ids of e and a, the ids of its generation_config.json)."""
    shutil.copytree(folders / "policy", tmp_path / "policy")
    tokenizer = tokenizers.load_tokenizer(folders / "policy")
    how = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
    assert how["eos_token_id"] == 1
    return tmp_path / "policy", [tokenizer.encode(letter)[0] for letter in "ea"], how


def check_eos_ids(folder, others):
    """Sampler, tokenizer and what is saved name 1, the tokenizer's own, and the others."""
    policy = LanguageModel.load(folder)
    drawn = {
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "min_p": 0.1,
    }
    settings = RLStage(**drawn)
    sampled = initial.sampling_config(settings, policy.tokenizer)
    eos_ids = (1, *others)
    assert sampled == sampling.SamplingConfig(**drawn, eos_id=policy.tokenizer.eos_ids, pad_id=0)
    assert policy.tokenizer.eos_ids == sampled.eos_ids == eos_ids
    again = folder.parent / "again"
    policy.save(again, template="{prompt}", config=sampled)
    written = json.loads((again / "generation_config.json").read_text())["eos_token_id"]
    assert written == (list(eos_ids) if others else 1)
    assert LanguageModel.load(again).tokenizer.eos_ids == eos_ids


def test_a_folder_may_name_several_eos_ids(several, generations):
    """generation_config.json, or else config.json, says which."""
    folder, (e, a), how = several
    named = folder / "generation_config.json"
    for eos_ids, others in (([e, 1, a, 10**6, -1], (e, a)), (a, (a,))):  # some cannot be said
        named.write_text(json.dumps(how | {"eos_token_id": eos_ids}))
        check_eos_ids(folder, others)
    named.write_text("{}")
    check_eos_ids(folder, ())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [1, e]}))
    check_eos_ids(folder, (e,))
    ended = Generator(folder, max_new_tokens=NEW)(PROMPTS, seed=3, num_samples=2)
    assert ended.texts == [text.partition("e")[0] for text in generations.texts]
    expected = [
        whole or "e" in text
        for text, whole in zip(generations.texts, generations.finished, strict=True)
    ]
    assert list(ended.finished) == expected
    assert any("e" in text for text in generations.texts)


def test_texts_log_probs_and_rewards_are_those_of_a_full_forward_pass(folders, generations):
    model, params, tokenizer = LanguageModel.load(folders / "policy")
    judge, judge_params, _ = LanguageModel.load(folders / "reward")
    found = generations.texts, generations.log_probs, generations.rewards
    assert set(map(len, found)) == {2 * len(PROMPTS)}
    assert len(set(generations.texts)) > 7
    apply = jax.jit(model.apply)
    score = jax.jit(models.score_fn(judge))
    for i in range(4):
        prompt = tokenizer.encode(PROMPTS[i // 2] + ":")
        answer = tokenizer.encode(generations.texts[i])
        answer += [tokenizer.eos_id] * bool(generations.finished[i])
        length = len(prompt) + len(answer)
        tokens = np.array([prompt + answer + [tokenizer.pad_id] * (WIDEST - length)])
        mask = (np.arange(WIDEST) < length)[None]
        log_probs = jax.nn.log_softmax(apply(params, tokens, mask))[0, len(prompt) - 1 :]
        expected = [log_probs[t, token] for t, token in enumerate(answer)]
        np.testing.assert_allclose(generations.token_log_probs[i], expected, atol=1e-4)
        assert generations.log_probs[i] == pytest.approx(float(sum(expected)), abs=1e-4)
        if not generations.finished[i]:  # the reward model reads the end that was cut
            tokens[0, length], mask[0, length] = tokenizer.eos_id, True
        rewarded = float(score(judge_params, tokens, mask, None)[0])
        assert generations.rewards[i] == pytest.approx(rewarded, abs=1e-4)
    lengths = np.array([len(log_probs) for log_probs in generations.token_log_probs])
    assert (lengths[~generations.finished] == NEW).all()


@pytest.mark.slow
def test_neighbours_order_and_batches_change_nothing(folders, generator, generations):
    assert_alike(generator(["hi", "abc"], seed=3), generations, [8, 0])
    small = Generator(
        folders / "policy",
        folders / "reward",
        max_new_tokens=NEW,
        template="{prompt}:",
        batch_size=2,
    )
    assert_alike(small(PROMPTS, seed=3, num_samples=2), generations, range(10))


def test_short_prompts_do_not_wait_for_long_ones(generator, generations, monkeypatch):
    widths = []
    sampler = module._sampler
    scorer = module._scorer

    def watched(num_layers):
        return lambda *args, **how: (
            widths.append((*args[2].shape, how["group_size"])),
            sampler(num_layers)(*args, **how),
        )[1]

    monkeypatch.setattr(module, "_sampler", watched)

    def watched_scorer(model, *closing):
        return lambda *args: (widths.append(args[1].shape), scorer(model, *closing)(*args))[1]

    monkeypatch.setattr(module, "_scorer", watched_scorer)
    monkeypatch.setattr(generator, "batch_size", 4)
    assert_alike(generator(PROMPTS, seed=3, num_samples=2), generations, range(10))
    # Tokens: 2, 2, 3, 3 | 4, 4, 10, 10 | 21, 21 of at most 32; then with their responses, of 38.
    # Two samples of a prompt compute it once.
    assert widths == [(4, 16, 2), (4, 16, 2), (4, 32, 2), (4, 16), (4, 16), (4, 38)]


def test_several_devices_share_the_rows_of_a_batch(folders):
    """Three rows on two devices: a fourth one is missing."""
    policy = LanguageModel.load(folders / "policy")
    ids = policy.tokenizer.encode_batch(["ab", "how are you", "x"], ["here"] * 3)
    prompts = module.pad_prompts(ids, 16, policy.tokenizer.pad_id)
    how = sampling.SamplingConfig(NEW, eos_id=policy.tokenizer.eos_id, pad_id=0)
    meshes = (None, sharding.make_mesh(data=2))
    one, two = (
        policy.respond(prompts, jax.random.key(1), config=how, batch_size=3, mesh=mesh)[0]
        for mesh in meshes
    )
    assert (two.tokens.shape, two.prompt_length) == ((3, 16 + NEW), 16)
    np.testing.assert_array_equal(two.tokens, one.tokens)
    np.testing.assert_allclose(two.log_probs, one.log_probs, atol=1e-5)


def test_its_sampler_is_compiled_as_a_runs_is(generator, monkeypatch):
    monkeypatch.setattr(
        module.devices, "compiler_options", lambda num_layers: {f"xla_of_{num_layers}_layer": True}
    )
    module._sampler.cache_clear()
    with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_of_1_layer'"):
        generator(PROMPTS)
    module._sampler.cache_clear()


def test_another_seed_gives_other_samples_and_a_repeated_prompt_its_next_ones(
    generator, generations
):
    assert generations.texts[0] != generations.texts[1]
    assert generator(PROMPTS, seed=4, num_samples=2).texts != generations.texts
    again = [PROMPTS[i] for i in (0, 1, 0, 1, 3, 3, 2, 2, 4, 4)]  # as many rows
    assert_alike(generator(again, seed=3), generations, [0, 2, 1, 3, 6, 7, 4, 5, 8, 9])


def test_greedy_takes_the_likeliest_token_and_no_reward_model_gives_no_rewards(folders):
    generator = Generator(
        folders / "policy",
        max_new_tokens=2,
        temperature=0,
        template="{prompt}",
    )
    greedy = generator(["abc"], seed=0)
    assert greedy.rewards is None
    assert greedy.texts == generator(["abc"], seed=1).texts
    model, params, tokenizer = LanguageModel.load(folders / "policy")
    logits = jax.jit(model.apply)(params, jnp.array([tokenizer.encode("abc")]))[0, -1]
    assert greedy.token_log_probs[0][0] == pytest.approx(
        float(jax.nn.log_softmax(logits).max()), abs=1e-4
    )
    assert generator([]).texts == []


def test_a_prompt_may_fill_the_room_and_not_a_token_more(generator):
    room = 40 - NEW - len(":") - 1  # of the reward model, the shorter one, which reads an end
    assert len(generator.ask([Row("a" * room, (), "")]).ids[0]) == generator.room
    with pytest.raises(
        UserError, match=rf"prompts\[1\], 'aaa.*': has {room + 2} tokens, and {room + 1} are"
    ):
        generator(["a", "a" * (room + 1)])


def test_transformers_samples_as_the_run_did(folders):
    import transformers

    said = transformers.GenerationConfig.from_pretrained(folders / "policy")
    expected = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9}
    # lm-eval and vLLM would cut their responses at a maximum length.
    expected |= {"max_new_tokens": None, "eos_token_id": 1, "pad_token_id": 0}
    assert {name: getattr(said, name) for name in expected} == expected
    assert not (folders / "reward" / "generation_config.json").exists()


def test_what_does_not_fit_is_refused_by_name(folders, generator, tmp_path):
    judge, params, _ = LanguageModel.load(folders / "reward")
    models.save(tmp_path / "other", judge, params)
    tokenizers.characters("abc").save(tmp_path / "other")
    policy = folders / "policy"
    for message, refused in (
        ("expected a list of prompts, got one text", lambda: generator("abc")),
        (
            r"prompts\[1\]: expected a text or a list of messages, got int",
            lambda: generator(["a", 3]),
        ),
        (r"prompts\[2\]: the tokenizer's alphabet lacks '\?'", lambda: generator(["a", "b", "?"])),
        ("policy: this model has no score head", lambda: Generator(policy, policy)),
        ("reward: this is a reward model", lambda: Generator(folders / "reward")),
        (
            "max_new_tokens 48 leaves no room for a prompt in 48",
            lambda: Generator(policy, max_new_tokens=48),
        ),
        (
            "other: a reward model of another tokenizer reads a prompt and one response",
            lambda: Generator(policy, tmp_path / "other", environment=lambda talk, row: None),
        ),
        ("batch_size must be at least 1", lambda: Generator(policy, batch_size=0)),
        ("temperature must be 0 .* or at least", lambda: Generator(policy, temperature=1e-7)),
        ("top_p must be at most 1", lambda: Generator(policy, top_p=2.0)),
    ):
        with pytest.raises(UserError, match=message):
            refused()


def test_a_stop_string_ends_a_response_where_its_text_does(folders, generator, generations):
    """The tokens up to the end of the string count; what follows is as after EOS."""
    text = next(text for text in generations.texts if len(text) > 4)
    stop = (text[1:3], "zzz")
    stopped = Generator(
        folders / "policy",
        folders / "reward",
        max_new_tokens=NEW,
        stop=stop,
    )
    given = stopped(PROMPTS, seed=3, num_samples=2)
    num_stopped = 0
    for i, whole in enumerate(generations.texts):
        before, found, _ = whole.partition(stop[0])
        num_tokens = len(before) + 2 if found else len(generations.token_log_probs[i])
        assert given.texts[i] == before
        assert given.finished[i] == (bool(found) or generations.finished[i])
        log_probs = generations.token_log_probs[i][:num_tokens]
        np.testing.assert_allclose(given.token_log_probs[i], log_probs, atol=1e-5)
        num_stopped += bool(found)
    assert 0 < num_stopped < 10
    first = generations.texts.index(text)
    assert given.rewards[first] != pytest.approx(generations.rewards[first], abs=1e-3)
    for wrong in ("ab", [""]):
        with pytest.raises(UserError, match="stop: expected a list of texts"):
            Generator(folders / "policy", stop=wrong)


def test_rows_are_in_batches_of_the_columns_that_they_have():
    """Prompts of 30, 1 and 2 tokens in batches of two, in multiples of 16 columns: the short ones
    need 16 of 48, and the last batch is completed.
    """
    mask = np.arange(48) >= 48 - np.array([[30], [1], [2]])
    tokens = np.where(mask, np.arange(1, 49), 0)
    shapes = []

    def respond(tokens, mask, ids):
        shapes.append(tokens.shape)
        return {"tokens": jnp.where(mask, tokens * 2, 0), "ids": jnp.asarray(ids)}

    found = module._by_length(respond, 2, tokens, mask, np.array([5, 6, 7]))
    assert shapes == [(2, 16), (2, 32)]
    assert_array_equal(found["tokens"], tokens * 2)
    assert_array_equal(found["ids"], [5, 6, 7])
    assert_array_equal(module.in_batches(lambda x: x * 2, 2, np.arange(3)), [0, 2, 4])
