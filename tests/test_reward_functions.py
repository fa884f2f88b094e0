"""What --reward may say, and runs whose reward is the user's own Python function."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from test_training import config, data  # noqa: F401 (fixtures)

from rlhf_jax import models, training, vpg
from rlhf_jax.config import Compute, Tokenizer
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.training import reward_functions
from rlhf_jax.types import Rollout

pytestmark = pytest.mark.usefixtures("no_pages")

TOKENIZER = tokenizers.characters("abcdefghij ")
FUNCTIONS = """
def letters(prompts, responses, **columns):
    return [float(min((p + r).count("e"), 100)) for p, r in zip(prompts, responses)]

def length(prompts, responses, topic, unit="x"):
    return [None if t == "skip" else len(r) + (unit != "x") for r, t in zip(responses, topic)]

def nan(prompts, responses):
    return [float("nan")] * len(prompts)

constant = 3
"""


@pytest.fixture
def functions(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    return file


def build(*specs, columns=("topic", "other")):
    return reward_functions.build(specs, TOKENIZER, Compute(), columns)


def rollout():
    """Two prompts "ab" with the responses "ea" and "e"."""
    a, b, e = (TOKENIZER.encode(letter)[0] for letter in "abe")
    tokens = np.array([[a, b, e, a], [a, b, e, TOKENIZER.pad_id]], np.int32)
    attention_mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    response_mask = np.array([[0, 0, 1, 1], [0, 0, 1, 0]])
    return Rollout(tokens, attention_mask, response_mask, np.zeros((2, 4), np.float32))


def test_a_sum_of_a_count_and_a_function(functions):
    reward = build("count:a*0.5", f"{functions}:length*-2")
    assert reward.fn is None
    scores, parts = reward.host(rollout(), {"topic": ["x", "y"], "other": [1, 2]})
    assert scores == [0.5 * 2 - 2 * 2, 0.5 * 1 - 2 * 1]
    assert parts == {"count:a": [2.0, 1.0], "length": [2, 1]}


def test_what_one_part_cannot_score_has_no_sum(functions):
    reward = build("count:a", f"{functions}:length")
    scores, _ = reward.host(rollout(), {"topic": ["x", "skip"], "other": [1, 2]})
    assert scores == [4.0, None]


def test_counts_alone_are_traced():
    assert build("count:a").host is None
    np.testing.assert_array_equal(build("count:a").fn(rollout()), [2.0, 1.0])
    scores, parts = build("count:a", "count:e*3").fn(rollout())
    np.testing.assert_array_equal(scores, [5.0, 4.0])
    assert parts.keys() == {"count:a", "count:e"}


def test_terms_of_length_repetition_and_diversity_by_hand():
    """Responses "ababa" and "ab" to the prompt "c": bigrams ab, ba, ab, ba and ab; trigrams aba, bab, aba."""
    a, b, c = (TOKENIZER.encode(letter)[0] for letter in "abc")
    tokens = np.array([[c, a, b, a, b, a], [c, a, b, 0, 0, 0]], np.int32)
    said = np.array([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]])
    batch = Rollout(tokens, (tokens != 0).astype(np.int32), said, np.zeros((2, 6), np.float32))
    expected = {
        "length": [5, 2],
        "length:3": [2, 0],
        "length:0": [5, 2],
        "repetition": [1 / 3, 0],
        "repetition:2": [1 / 2, 0],
        "diversity": [1 / 2, 0],  # ba is the first one's alone
        "diversity:3": [1, 0],
        "diversity:1": [0, 0],
    }
    np.testing.assert_array_equal(build("length:3").fn(batch), expected["length:3"])  # alone, without parts
    total, parts = jax.jit(build(*(f"{name}*-0.5" for name in expected)).fn)(batch)
    np.testing.assert_allclose(total, -0.5 * np.sum(list(expected.values()), axis=0), rtol=1e-6)
    assert parts.keys() == expected.keys()
    for name, scores in expected.items():
        np.testing.assert_allclose(parts[name], scores, rtol=1e-6)


def test_a_term_beside_a_function(functions):
    reward = build(f"{functions}:letters", "length:1*-0.25", "count:a")
    scores, parts = reward.host(rollout(), {"topic": ["x", "y"], "other": [1, 2]})
    assert scores == [1 - 0.25 + 2, 1 + 1]
    assert parts == {"letters": [1.0, 1.0], "length:1": [1.0, 0.0], "count:a": [2.0, 1.0]}


def test_a_term_wins_over_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "length").mkdir()
    np.testing.assert_array_equal(build("length").fn(rollout()), [2.0, 1.0])
    with pytest.raises(UserError, match=r"length/config.json: no such file"):
        build("./length")


def test_mistakes_are_named(functions, tmp_path):
    for specs, message in [
        ([], "no reward"),
        (["count:ab"], "'ab' is 2 tokens"),
        ([f"{tmp_path}/other.py:f"], "no such file"),
        ([f"{functions}:lettres"], "no function lettres; did you mean letters"),
        ([f"{functions}:constant"], "no function constant"),
        (["count:a", "count:a*2"], "another part is called count:a"),
        (["no/such/model"], "no/such/model"),
        (["length*2", "length"], "another part is called length"),
        (["length:-1"], r"--reward length:-1: after `length:` comes a whole number, at least 0, .* got '-1'"),
        (["repetition:0*-1"], r"--reward repetition:0: .* at least 1, .* got '0'"),
        (["diversity:two"], r"--reward diversity:two: .* got 'two'"),
        (["diversity:"], r"--reward diversity:: .* got ''"),
    ]:
        with pytest.raises(UserError, match=message):
            build(*specs)
    with pytest.raises(UserError, match="asks for topic, but the prompts' columns are none"):
        build(f"{functions}:length", columns=())


def test_a_model_without_a_score_head_or_with_another_tokenizer_is_refused(tmp_path):
    folder = tmp_path / "policy"
    model = models.build(models.GPT2Config(vocab_size=20, max_length=8, hidden_size=8, num_layers=1, num_heads=1))
    params = model.init(training.setup.stream(0, "x", "init"))
    models.save(folder, model, params)
    TOKENIZER.save(folder)
    with pytest.raises(UserError, match="no score head"):
        build(str(folder))
    models.save(folder, model, models.add_head(training.setup.stream(0, "x", "eval"), params, "score"))
    assert build(str(folder)).fn is not None
    tokenizers.characters("xyz").save(folder)
    with pytest.raises(UserError, match="tokenizer is not the policy's"):
        build(str(folder))


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Folders of three reward models: two members of a run called ``pair``, and one of another architecture."""
    folder = tmp_path_factory.mktemp("models")
    folders = [folder / "pair" / "model" / "member_0", folder / "pair" / "model" / "member_1", folder / "single"]
    for i, path in enumerate(folders):
        sizes = {"hidden_size": 8 * (1 + i // 2), "num_layers": 1, "num_heads": 1}
        model = models.build(models.GPT2Config(vocab_size=TOKENIZER.vocab_size, max_length=8, **sizes))
        params = models.add_head(jax.random.key(10 + i), model.init(jax.random.key(i)), "score")
        models.save(path, model, params)
        TOKENIZER.save(path)
    return folders


def test_several_reward_models_by_hand(ensemble, monkeypatch):
    """A run's folder stands for its members; mean, worst case, mean - coef * variance; weights outside."""

    def first_weight(model):  # compiles nothing
        return lambda params, tokens, attention_mask, key: params["score"]["kernel"][0] * tokens.sum(axis=1)

    monkeypatch.setattr(reward_functions.models, "score_fn", first_weight)
    pair, single = ensemble[0].parent, ensemble[2]
    batch = rollout()
    each = np.stack([build(str(folder)).fn(batch) for folder in ensemble])  # [3, B]
    assert np.ptp(each, axis=0).min() > 0.1
    expected = {
        f"mean:{pair},{single}": each.mean(axis=0),
        f"min:{single},{pair}": each.min(axis=0),
        f"uncertainty:{pair},{single}": each.mean(axis=0) - each.var(axis=0),
        f"uncertainty:0.5:{pair}": each[:2].mean(axis=0) - 0.5 * each[:2].var(axis=0),
    }
    total, parts = build(*(f"{spec}*2" for spec in expected)).fn(batch)
    names = ["mean:pair,single", "min:single,pair", "uncertainty:pair,single", "uncertainty:0.5:pair"]
    assert parts.keys() == {*names, *(f"{name}/uncertainty" for name in names)}
    for name, scores in zip(names, expected.values(), strict=True):
        np.testing.assert_allclose(parts[name], scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, 2 * np.sum([*expected.values()], axis=0), rtol=1e-5)
    np.testing.assert_allclose(parts["min:single,pair/uncertainty"], each.std(axis=0), rtol=1e-4)
    np.testing.assert_allclose(parts["uncertainty:0.5:pair/uncertainty"], each[:2].std(axis=0), rtol=1e-4)
    _, alone = build(f"mean:{pair}").fn(batch)
    assert alone.keys() == {"uncertainty"}


def test_mistakes_about_several_reward_models_are_named(ensemble, tmp_path):
    pair, single = ensemble[0].parent, ensemble[2]
    for spec, message in [
        (f"{pair}", rf"2 models of an ensemble.* mean:{pair}, min:{pair} .* uncertainty:{pair} "),
        (f"min:{single}", f"at least two different models, here are {single}"),
        (f"mean:{single},{single}", "at least two different models"),
        (f"mean:{single},", "after `mean:` come reward models' folders, with commas between"),
        ("uncertainty:", "after `uncertainty:` come reward models' folders"),
        (f"uncertainty:-1:{pair}", r"coefficient, a number of at least 0; got '-1'"),
        (f"uncertainty:half:{pair}", "got 'half'"),
        (f"min:{pair},no/such/model", "no/such/model: no such folder"),
    ]:
        with pytest.raises(UserError, match=message):
            build(spec)
    other = tmp_path / "other"
    shutil.copytree(single, other)
    tokenizers.characters("xyz").save(other)
    with pytest.raises(UserError, match=f"{other}: the reward model's tokenizer is not the policy's"):
        build(f"min:{single},{other}")


def test_the_files_behind_a_reward(ensemble, functions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "length").mkdir()
    pair, single = ensemble[0].parent, ensemble[2]
    for entry, expected in {
        "count:e": {},
        "length*-1": {},
        "./length": {"./length": tmp_path / "length"},
        "openai-community/gpt2": {},
        f"{single}*0.5": {f"{single}*0.5": single},
        f"{functions}:letters*2": {f"{functions}:letters*2": functions},
        f"uncertainty:0.5:{pair},{single}*2": {f"{pair}": pair, f"{single}": single},
    }.items():
        found = reward_functions.sources(entry)
        assert {name: path.resolve() for name, path in found.items()} == expected


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
