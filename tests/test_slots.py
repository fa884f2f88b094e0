"""generation.slots: a sample gets what ``sampling.generate`` samples for it, whoever else is there
and whenever they come and go.
"""

import functools
from dataclasses import replace
from types import MappingProxyType

import jax
import numpy as np
import pytest
from builders import CONFIG, GEMMA, LLAMA, MISTRAL, MORE, slow, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from rlhf_jax import sampling
from rlhf_jax.data import encoding
from rlhf_jax.generation import slots
from rlhf_jax.models import lora
from rlhf_jax.sampling import SamplingConfig

KEY = jax.random.key(5)
TINY = replace(CONFIG, max_length=48, num_layers=1)
R = 12  # tokens of a response
WIDTH = 20  # columns of the reference's prompts
ALL = {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4}
SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "greedy, penalised": {"temperature": 0.0, "repetition_penalty": 1.8},
    "warm": {"temperature": 2.5},
    "top_k": {"top_k": 3},
    "top_k of all": {"top_k": 99},
    "top_p": {"top_p": 0.4},
    "min_p": {"min_p": 0.3},
    "penalised": {"repetition_penalty": 3.0},
    "all": ALL,
}
NONE = MappingProxyType({})
generate = jax.jit(sampling.generate, static_argnames=("model", "config"))


def prompts(number, longest=WIDTH, seed=0):
    """Of 1 to ``longest`` tokens."""
    random = np.random.default_rng(seed)
    lengths = random.permutation(np.linspace(1, longest, number).astype(int))
    return [random.integers(0, 13, length).tolist() for length in lengths]


def how(**given):
    return SamplingConfig(R, **given, eos_id=None, pad_id=0)


def expected(asked, given=NONE, of=None, **more):
    """[N] responses [R] to prompts by ``generate``, number i at place i, and their log-probs;
    ``of`` a model and its parameters.
    """
    inputs = encoding.left_padded(asked, width=WIDTH, pad_id=0)
    model, params = of or tiny(TINY)
    made = generate(model, params, *inputs, KEY, config=how(**given), **more)
    return np.asarray(made.tokens)[:, WIDTH:], np.asarray(made.log_probs)[:, WIDTH:]


@functools.cache
def batch_of(config):
    return slots.Batch(*tiny(config), pad_id=0, positions=config.max_length)


@pytest.fixture
def batch():
    yield batch_of(TINY)
    batch_of(TINY).clear()


def sample(place, given=NONE, **more):
    """What ``generate`` samples at a place."""
    own = slots.How.of(how(**given))
    return slots.Sample(jax.random.fold_in(KEY, place), own, **more)


def run(batch, asked, joins=None, lengths=None):
    """The tokens of samples, ``asked`` [(prompt, sample)], that join before a step and leave after
    their length.
    """
    joins = joins or [0] * len(asked)
    lengths = lengths or [R] * len(asked)
    left = {one: length for (_, one), length in zip(asked, lengths, strict=True)}
    got = {one: [] for one in left}
    time = 0
    while left:
        for (ids, one), join in zip(asked, joins, strict=True):
            if join == time:
                batch.add(ids, [one], R)
        here = {one for (_, one), join in zip(asked, joins, strict=True) if join <= time}
        given = list(batch.step())
        assert {one for one, _ in given} == here & set(left)
        assert len(given) == len(here & set(left))
        for one, token in given:
            got[one].append(token)
            if len(got[one]) == left[one]:
                del left[one]
                batch.remove(one)
        time += 1
    assert list(batch.step()) == []
    return [got[one] for _, one in asked]


def assert_same(tokens, ids, log_probs, tolerance=1e-5):
    """The first tokens of a response."""
    number = len(tokens)
    assert [token.id for token in tokens] == ids[:number].tolist()
    np.testing.assert_allclose(
        [token.log_prob for token in tokens], log_probs[:number], rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_of_generate(batch, name):
    asked = prompts(4)
    given = SETTINGS[name]
    got = run(batch, [(ids, sample(i, given)) for i, ids in enumerate(asked)])
    for tokens, *of_generate in zip(got, *expected(asked, given), strict=True):
        assert_same(tokens, *of_generate)


@pytest.mark.parametrize("temperature", [1e-4, 1e-9, 1e-20, 1e-30])
@pytest.mark.parametrize("more", [{}, {"top_p": 1e-300, "min_p": 1e-40}])
def test_a_low_temperature_takes_the_likeliest_token_for_certain(batch, temperature, more):
    asked = prompts(2)
    samples = [sample(i, more, likeliest=3) for i in range(2)]
    samples = [replace(one, how=one.how._replace(temperature=temperature)) for one in samples]
    got = run(batch, list(zip(asked, samples, strict=True)))
    greedy, _ = expected(asked, {"temperature": 0.0})
    for tokens, ids in zip(got, greedy, strict=True):
        assert [token[:2] for token in tokens] == [(id, 0.0) for id in ids]
        for token in tokens:
            (first, sure), *others = token.likeliest
            assert (first, sure) == token[:2]
            assert all(log_prob < -1 for _, log_prob in others)


@pytest.mark.parametrize("top_p", [1e-37, 1e-39, 1e-300])
def test_a_small_nucleus_has_the_likeliest_token(batch, top_p):
    asked = prompts(3)
    got = run(batch, [(ids, sample(i, {"top_p": top_p})) for i, ids in enumerate(asked)])
    for tokens, *of_greedy in zip(got, *expected(asked, {"temperature": 0.0}), strict=True):
        assert_same(tokens, *of_greedy)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_small_penalty_repeats_the_likeliest_token_for_ever(temperature, top_p):
    logits = np.array([[5.0, 2.0, 3.0, -1.0], [0.0, -1.0, -2.0, -3.0]], np.float32)
    own = (temperature, 0, top_p, 0.0, 1e-30)
    own = slots.How(*(np.full(2, value, np.float32) for value in own))
    tokens = np.array([[1, 2], [2, 3]])
    keys = jax.random.split(KEY, 2)
    drawn, log_probs = slots._draw(logits, keys, tokens, np.ones((2, 2), bool), own)
    assert drawn[0] == 2
    assert drawn[1] in (0, 2, 3)
    assert not np.isnan(log_probs).any()


def test_each_sample_has_settings_of_its_own(batch):
    asked = prompts(4)
    mixed = [SETTINGS[name] for name in ("plain", "greedy, penalised", "all")]
    owners = [(ids, sample(i, own)) for own in mixed for i, ids in enumerate(asked)]
    got = iter(run(batch, owners))
    for own in mixed:
        for ids, log_probs in zip(*expected(asked, own), strict=True):
            assert_same(next(got), ids, log_probs)


FAMILIES = {"gpt2": CONFIG, "llama": LLAMA, "mistral": MISTRAL, "gemma3": GEMMA, **MORE}


LONG = {name: replace(config, max_length=48) for name, config in FAMILIES.items()}


@pytest.mark.parametrize(
    "name", ["mistral", *(slow(name) for name in FAMILIES if name != "mistral")]
)
def test_families(name):
    """With rotary positions, windows whose caches are rings, experts; and with all settings."""
    check(*tiny(LONG[name]))


@pytest.mark.slow
def test_stacked_layers():
    check(*tiny(replace(LONG["llama"], num_layers=3), scan_layers=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, "int8"])
def test_adapters(form):
    model, params = tiny(LONG["llama"])
    adapters = jax.tree.map(lambda leaf: leaf + 0.2, lora.init(jax.random.key(1), params, 2))
    base = params if form is None else lora.quantized(params, form)
    check(model, lora.attach(base, adapters))


@pytest.mark.slow
def test_bfloat16():
    """``generate`` differs as much from itself in batches of other shapes."""
    check(*tiny(LONG["llama"], compute_dtype="bfloat16"), tolerance=0.05)


def check(model, params, tolerance=1e-5):
    """Samples of three prompts, two of them longer than the windows, that join two steps apart."""
    asked = prompts(3, longest=16)
    batch = slots.Batch(model, params, pad_id=0, positions=48)
    got = run(batch, [(ids, sample(i, ALL)) for i, ids in enumerate(asked)], joins=[0, 2, 4])
    for tokens, *of_generate in zip(got, *expected(asked, ALL, (model, params)), strict=True):
        assert_same(tokens, *of_generate, tolerance)


POOL = prompts(8, seed=3)


@functools.cache
def of_pool(name):
    return expected(POOL, SETTINGS[name])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_whoever_comes_and_goes(data):
    batch = batch_of(TINY)
    asked, joins, lengths, references = [], [], [], []
    for i in data.draw(st.lists(st.sampled_from(range(8)), min_size=1, unique=True)):
        name = data.draw(st.sampled_from(["plain", "all"]))
        asked.append((POOL[i], sample(i, SETTINGS[name])))
        joins.append(data.draw(st.integers(0, R)))
        lengths.append(data.draw(st.integers(1, R)))
        references.append([part[i] for part in of_pool(name)])
    got = run(batch, asked, joins, lengths)
    for tokens, length, reference in zip(got, lengths, references, strict=True):
        assert len(tokens) == length
        assert_same(tokens, *reference)


def test_the_same_alone_and_among_fifty(batch):
    """Of one prompt, which is read once; the slots grow for them, and shrink when they leave."""
    ids = POOL[0]
    owners = [sample(i) for i in range(51)]
    batch.add(ids, owners[1:30], R)
    batch.add(ids, [owners[0]], R)
    batch.add(ids, owners[30:], R)
    together = {one: [] for one in owners}
    sizes = []
    for t in range(R):
        for one, token in batch.step():
            together[one].append(token)
        [group] = batch._groups.values()
        sizes.append(len(group.samples))
        for one in owners[1 + 5 * t : 6 + 5 * t]:
            batch.remove(one)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64 > sizes[-1]
    batch.clear()
    [alone] = run(batch, [(ids, owners[0])])
    assert [token.id for token in alone] == [token.id for token in together[owners[0]]]
    references = zip(owners, *expected([ids] * 51), strict=True)
    for one, *of_generate in references:
        assert_same(together[one], *of_generate)
    assert_same(alone, *(part[0] for part in expected([ids] * 51)))


def test_a_prompt_of_several_samples_is_read_once(batch, monkeypatch):
    begin = batch._begin
    read = []
    monkeypatch.setattr(
        batch, "_begin", lambda *given, **how: read.append(given) or begin(*given, **how)
    )
    batch.add(POOL[1], [sample(i) for i in range(5)], R)
    assert len(read) == 1


def test_groups_of_other_lengths(batch, monkeypatch):
    """One is left while the tokens of another are read."""
    monkeypatch.setattr(slots, "_SHORTEST", 16)
    monkeypatch.setattr(slots, "_NARROWEST", 4)
    asked = [(ids, sample(i)) for i, ids in enumerate(POOL)]
    for ids, one in asked:
        batch.add(ids, [one], R)
    assert sorted(batch._groups) == [16, 32, 48]
    got = {one: [] for _, one in asked}
    for _ in range(R):
        for one, token in batch.step():
            got[one].append(token)
    for (_, one), *of_generate in zip(asked, *of_pool("plain"), strict=True):
        assert_same(got[one], *of_generate)


def test_who_comes_or_goes_within_a_step(batch, monkeypatch):
    """Who goes gets the token that was sampled already, and no further one; who comes waits."""
    monkeypatch.setattr(slots, "_SHORTEST", 16)
    first, second, other, new = (sample(i) for i in range(4))
    batch.add(POOL[0][:2], [first, second], 2)
    batch.add([1] * 20, [other], 2)
    step = batch.step()
    owners = [next(step)[0]]
    batch.add(POOL[0][:2], [new], 2)
    batch.remove(second)
    batch.remove(other)
    owners += [one for one, _ in step]
    assert owners == [first, second, other]
    assert {one for one, _ in batch.step()} == {first, new}


def test_a_batch_can_be_cleared_and_used_again(batch):
    batch.add(POOL[0], [sample(0), sample(1)], R)
    assert len(list(batch.step())) == 2
    batch.clear()
    assert list(batch.step()) == []
    batch.remove(sample(0))  # nothing, as who has left already
    [tokens] = run(batch, [(POOL[0], sample(0))])
    assert_same(tokens, *(part[0] for part in of_pool("plain")))


def test_the_likeliest_tokens_are_those_of_the_whole_softmax(batch):
    """At the temperature, whatever the limits and the penalty; at 1 if it is 0."""
    model, params = tiny(TINY)
    asked = [
        (POOL[0], sample(0, ALL, likeliest=3)),
        (POOL[1], sample(1, likeliest=0)),
        (POOL[2], sample(2, SETTINGS["greedy"], likeliest=20)),
    ]
    temperatures = [1.3, 1.0, 1.0]
    numbers = [3, 0, 13]  # the model has 13 tokens
    got = run(batch, asked)
    for (ids, _), tokens, temperature, number in zip(
        asked, got, temperatures, numbers, strict=True
    ):
        whole = np.array([[*ids, *(token.id for token in tokens)]])
        logits = np.asarray(model.apply(params, whole), np.float64)[0, len(ids) - 1 : -1]
        for token, log_probs in zip(
            tokens, log_softmax(logits / temperature, axis=-1), strict=True
        ):
            best = np.argsort(-log_probs)[:number]
            assert [id for id, _ in token.likeliest] == best.tolist()
            found = [log_prob for _, log_prob in token.likeliest]
            np.testing.assert_allclose(found, log_probs[best], atol=1e-5)
            assert token.log_prob == pytest.approx(log_probs[token.id], abs=1e-5)


def test_a_conversation_goes_on_at_its_slot(batch):
    """As ``generate`` does with ``used``: turns of 3, 4 and 5 tokens, and a reply between them."""
    whole = [1, 2, 3]
    used = 0
    for length in (3, 4, 5):
        [tokens] = run(batch, [(whole, sample(7, ALL, first_slot=used))], lengths=[length])
        inputs = {"places": np.array([7]), "used": np.array([used], np.int32)}
        for_one = [part[0] for part in expected([whole], ALL, **inputs)]
        assert_same(tokens, *for_one)
        whole = [*whole, *(token.id for token in tokens), 9]
        used += length
