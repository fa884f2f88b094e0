"""What --reward may say, and runs whose reward is the user's own Python function."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import config, data  # noqa: F401 (fixtures)

from rlhf_jax import models, training, vpg
from rlhf_jax.config import Compute, Tokenizer
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.rewards import spec
from rlhf_jax.training import initial
from rlhf_jax.types import Rollout

pytestmark = pytest.mark.usefixtures("no_pages")

TOKENIZER = tokenizers.characters("abcdefghij ")
FUNCTIONS = """
def letters(prompts, responses, **columns):
    return [float(min((p + r).count("e"), 100)) for p, r in zip(prompts, responses)]

def length(prompts, responses, topic, unit="x"):
    scores = [None if t == "skip" else len(r) + (unit != "x") for r, t in zip(responses, topic)]
    return scores, {"twice": [None if score is None else 2 * score for score in scores]}

def nan(prompts, responses):
    return [float("nan")] * len(prompts)

constant = 3
"""


@pytest.fixture
def functions(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    return file


def load(path):
    """A reward model: its number, the last character of the folder's name, times the sum of a row's tokens."""
    if "no/such" in path:
        raise UserError(f"{path}: no such folder")
    fingerprint = "another" if "other" in path else TOKENIZER.fingerprint
    return spec.RewardModel(
        lambda params, tokens, attention_mask, key: params * tokens.sum(axis=1), jnp.float32(path[-1]), fingerprint
    )


def build(*entries, columns=("topic", "other"), **options):
    return spec.build(entries, tokenizer=TOKENIZER, load=load, columns=columns, **options)


def rollout():
    """Two prompts "ab" with the responses "ea" and "e"."""
    a, b, e = (TOKENIZER.encode(letter)[0] for letter in "abe")
    tokens = np.array([[a, b, e, a], [a, b, e, TOKENIZER.pad_id]], np.int32)
    attention_mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    response_mask = np.array([[0, 0, 1, 1], [0, 0, 1, 0]])
    return Rollout(tokens, attention_mask, response_mask, np.zeros((2, 4), np.float32))


def test_a_sum_of_traced_terms_and_a_function(functions):
    reward = build("count:a*0.5", f"{functions}:length*-2", "length:1*-0.25")
    assert reward.fn is None
    scores, parts = reward.host(rollout(), {"topic": ["x", "y"], "other": [1, 2]})
    assert scores == [0.5 * 2 - 2 * 2 - 0.25, 0.5 * 1 - 2 * 1]
    assert parts == {"count:a": [2, 1], "length": [2, 1], "length/twice": [4, 2], "length:1": [1, 0]}
    scores, _ = build("count:a", f"{functions}:length").host(rollout(), {"topic": ["x", "skip"], "other": [1, 2]})
    assert scores == [4.0, None]  # what one part cannot score has no sum


def test_a_traced_reward_on_the_host():
    assert build("count:a").host is None
    scores, parts = spec.as_host(build("count:a*3"))(rollout(), {})
    assert scores == [6.0, 3.0]
    np.testing.assert_array_equal(parts["count:a"], [2.0, 1.0])
    dense = spec.Reward(fn=jax.tree_util.Partial(lambda rollout: (rollout.log_probs, {})))
    with pytest.raises(ValueError, match=r"one score for each response, \[2\], got \(2, 4\)"):
        spec.as_host(dense)(rollout(), {})


def test_terms_of_length_repetition_and_diversity_by_hand():
    """Responses "ababa" and "ab" to the prompt "c": bigrams ab, ba, ab, ba and ab; trigrams aba, bab, aba."""
    a, b, c = (TOKENIZER.encode(letter)[0] for letter in "abc")
    tokens = np.array([[c, a, b, a, b, a], [c, a, b, 0, 0, 0]], np.int32)
    real = (tokens != 0).astype(np.int32)
    batch = Rollout(tokens, real, real * (np.arange(6) > 0), np.zeros((2, 6), np.float32))
    expected = {"length": [5, 2], "length:3": [2, 0], "repetition": [1 / 3, 0], "repetition:2": [1 / 2, 0]}
    # ba is the first one's alone
    expected |= {"diversity": [1 / 2, 0], "diversity:3": [1, 0], "count:a": [3, 1]}
    scores, parts = build("length:3").fn(batch)
    assert (scores.tolist(), parts) == (expected["length:3"], {})  # alone, without parts
    total, parts = jax.jit(build(*(f"{name}*-0.5" for name in expected)).fn)(batch)
    np.testing.assert_allclose(total, -0.5 * np.sum(list(expected.values()), axis=0), rtol=1e-6)
    assert parts.keys() == expected.keys()
    for name, scores in expected.items():
        np.testing.assert_allclose(parts[name], scores, rtol=1e-6)


@pytest.fixture
def pair(tmp_path):
    """The folder of a run that trained an ensemble of two, models 0 and 1."""
    for i in range(2):
        (tmp_path / "pair" / "model" / f"member_{i}").mkdir(parents=True)
    return tmp_path / "pair" / "model"


def test_several_reward_models_by_hand(pair):
    """A run's folder means its members; mean, worst case, mean - coef * variance; weights outside."""
    batch = rollout()
    sums = batch.tokens.sum(axis=1)
    three, two = np.outer([0, 1, 5], sums), np.outer([0, 1], sums)
    one_model, parts = build("runs/rm5/model5").fn(batch)
    assert (one_model.tolist(), parts) == ((5 * sums).tolist(), {})
    expected = {
        f"mean:{pair},x/5": three.mean(axis=0),
        f"min:x/5,{pair}": three.min(axis=0),
        f"uncertainty:{pair},x/5": three.mean(axis=0) - three.var(axis=0),
        f"uncertainty:0.5:{pair}": two.mean(axis=0) - 0.5 * two.var(axis=0),
    }
    total, parts = build(*(f"{entry}*2" for entry in expected)).fn(batch)
    names = ["mean:pair,5", "min:5,pair", "uncertainty:pair,5", "uncertainty:0.5:pair"]
    assert parts.keys() == {*names, *(f"{name}/uncertainty" for name in names)}
    for name, scores in zip(names, expected.values(), strict=True):
        np.testing.assert_allclose(parts[name], scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, 2 * np.sum([*expected.values()], axis=0), rtol=1e-5)
    np.testing.assert_allclose(parts["min:5,pair/uncertainty"], three.std(axis=0), rtol=1e-4)
    np.testing.assert_allclose(parts["uncertainty:0.5:pair/uncertainty"], two.std(axis=0), rtol=1e-4)
    _, alone = build(f"mean:{pair}").fn(batch)
    assert alone.keys() == {"uncertainty"}


def test_mistakes_are_named(functions, pair, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "length").mkdir()
    build("length")  # a term wins over a folder of its name
    no_columns = {"columns": ()}
    for entries, options, message in [
        ([], {}, "no reward: give --reward a reward model's folder"),
        (["count:ab"], {}, "--reward count:ab: 'ab' is 2 tokens"),
        ([f"{tmp_path}/other.py:f"], {}, "no such file"),
        ([f"{tmp_path}/broken.py:f"], {}, "broken.py, line 1: "),
        ([f"{functions}:lettres"], {}, "no function lettres; did you mean letters"),
        ([f"{functions}:constant"], {}, "no function constant"),
        ([f"{functions}:length"], no_columns, "asks for topic, but the prompts' columns are none"),
        (["count:a", "count:a*2"], {}, r"--reward count:a\*2: another part is called count:a"),
        (["no/such/model"], {}, "^no/such/model: no such folder"),
        (["length:-1"], {}, r"--reward length:-1: after `length:` comes a whole number, at least 0, .* got '-1'"),
        (["repetition:0*-1"], {}, r"--reward repetition:0: .* at least 1, .* got '0'"),
        (["diversity:"], {"flag": "--rl.judge"}, r"^--rl\.judge diversity:: "),
        ([f"{pair}"], {}, rf"2 models of an ensemble.* mean:{pair}, min:{pair} .* uncertainty:{pair} "),
        (["min:x/5"], {}, "at least two different models, here are x/5"),
        (["mean:x/5,x/5"], {}, "at least two different models"),
        (["mean:x/5,"], {}, "after `mean:` come reward models' folders, with commas between"),
        (["uncertainty:"], {}, "after `uncertainty:` come reward models' folders"),
        ([f"uncertainty:-1:{pair}"], {}, r"coefficient, a number of at least 0; got '-1'"),
        (["mean:0.5:no/such,x/5"], {}, r"^0\.5:no/such: no such folder"),  # only uncertainty has a coefficient
        (["other5"], {}, "^--reward other5: the reward model's tokenizer is not the policy's"),
        ([f"min:{pair},other5"], {}, "model,other5: other5: the reward model's tokenizer is not the policy's"),
    ]:
        with pytest.raises(UserError, match=message):
            build(*entries, **options)


def test_the_files_behind_a_reward(pair, functions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    single = tmp_path / "length"
    single.mkdir()
    for entry, expected in {
        "count:e": {},
        "length*-1": {},
        "./length": {"./length": single},
        "openai-community/gpt2": {},
        f"{single}*0.5": {f"{single}*0.5": single},
        f"{functions}:letters*2": {f"{functions}:letters*2": functions},
        f"uncertainty:0.5:{pair},{single}*2": {f"{pair}": pair, f"{single}": single},
    }.items():
        assert {name: path.resolve() for name, path in spec.sources(entry).items()} == expected


def test_a_model_is_loaded_with_its_score_head(tmp_path):
    model = models.build(models.GPT2Config(vocab_size=20, max_length=8, hidden_size=8, num_layers=1, num_heads=1))
    params = model.init(jax.random.key(0))
    models.save(tmp_path, model, params)
    TOKENIZER.save(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: this model has no score head"):
        initial.load_reward_model(str(tmp_path), Compute())
    params = models.add_head(jax.random.key(1), params, "score")
    models.save(tmp_path, model, params)
    load = partial(initial.load_reward_model, compute=Compute())
    scores, _ = spec.build((str(tmp_path),), tokenizer=TOKENIZER, load=load, columns=()).fn(rollout())
    expected = models.score_fn(model)(params, rollout().tokens, rollout().attention_mask, None)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_function_on_the_host_and_the_same_reward_in_the_jit_train_identically(config, functions, tmp_path):  # noqa: F811
    config = dataclasses.replace(config, tokenizer=Tokenizer(kind="characters"))  # a token is then a letter
    inside = training.rl.run(config, vpg)
    outside = training.rl.run(
        dataclasses.replace(config, output_dir=str(tmp_path / "host"), reward=(f"{functions}:letters",)), vpg
    )
    weights = [(run.model_folder / "model.safetensors").read_bytes() for run in (inside, outside)]
    assert weights[0] == weights[1]
    rows = [json.loads(line) for line in (outside.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert all(row["reward/unscored"] == 0 and row["reward/letters"] == row["objective/score"] for row in rows[1:])
    manifest = json.loads((outside.folder / "manifest.json").read_text("utf-8"))
    assert f"reward {functions}:letters" in manifest["data"]


def test_a_nan_reward_stops_the_run_and_names_its_prompt(config, functions):  # noqa: F811
    config = dataclasses.replace(config, reward=(f"{functions}:nan",))
    with pytest.raises(TrainingFault, match="row 0, prompt"):
        training.rl.run(config, vpg)
