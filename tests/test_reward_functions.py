"""What --reward may say, and runs whose reward is the user's own Python function."""

import importlib.util
import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import initial_params
from numpy.testing import assert_allclose, assert_array_equal
from recorded import rl_job

from rlhf_jax import models, rewards
from rlhf_jax.config import Compute
from rlhf_jax.data import tokenizers
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.evaluation import bench
from rlhf_jax.graders import spec
from rlhf_jax.training.common import reward_models
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.training.rl.score import score as score_rollout
from rlhf_jax.types import Rollout

TOKENIZER = tokenizers.characters("abcdefghij ")
FUNCTIONS = """
def letters(prompts, responses, **columns):
    return [float(min((p + r).count("e"), 100)) for p, r in zip(prompts, responses)]

def length(prompts, responses, topic, unit="x"):
    scores = [None if t == "skip" else len(r) + (unit != "x") for r, t in zip(responses, topic)]
    return scores, {"twice": [None if score is None else 2 * score for score in scores]}

def leaves(prompts, responses):
    raise SystemExit(0)

def nan(prompts, responses):
    return [float("nan")] * len(prompts)

def missing(prompts, responses, subject):
    return [0.0] * len(prompts)

constant = 3
"""


@pytest.fixture
def functions(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    return file


def score(params, tokens, attention_mask, key):
    return params * tokens.sum(axis=1)


def load(path):
    """A reward model: its number, the last digit in the folder's name, times the sum of a row's
    tokens.
    """
    if "no/such" in path:
        raise UserError(f"{path}: no such folder")
    number = [character for character in path if character.isdigit()][-1]
    return spec.RewardModel(
        score, jnp.float32(number), "another" if "other" in path else TOKENIZER.fingerprint
    )


def build(*entries, columns=("topic", "other"), load=load):
    return spec.build_reward(entries, tokenizer=TOKENIZER, load=load, columns=columns)


def rollout():
    """Two prompts "ab" with the responses "ea" and "e"."""
    tokens = np.array(
        [TOKENIZER.encode("abea"), [*TOKENIZER.encode("abe"), TOKENIZER.pad_id]], np.int32
    )
    real = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    return Rollout(tokens, real, real * (np.arange(4) > 1), np.zeros((2, 4), np.float32))


def test_a_sum_of_traced_terms_and_a_function(functions):
    reward = build("count:a*0.5", f"{functions}:length*-2", "length:1*-0.25")
    assert reward.fn is None
    scores, parts = reward.host(rollout(), {"topic": ["x", "y"], "other": [1, 2]})
    parts = {name: list(values) for name, values in parts.items()}
    assert scores == [0.5 * 2 - 2 * 2 - 0.25, 0.5 * 1 - 2 * 1]
    assert parts == {
        "count:a": [2, 1],
        "length": [2, 1],
        "length/twice": [4, 2],
        "length:1": [1, 0],
    }
    skipped = {"topic": ["x", "skip"], "other": [1, 2]}
    scores, parts = build("count:a", f"{functions}:length").host(rollout(), skipped)
    assert scores == [4.0, rewards.Unscored("length: the reward is None", ("length",))]
    assert parts["length"] == [2.0, rewards.host.NO_REASON]
    # Without a weight it is not learned from; or it says what its absence is worth.
    for entry, second in (("*0", 1.0), (" else -1.5", -0.5), ("*-2 else 3", 1 - 2 * 3)):
        scores, parts = build("count:a", f"{functions}:length{entry}").host(rollout(), skipped)
        assert scores[1] == second
        assert parts["length"][1] == rewards.host.NO_REASON


def test_a_traced_reward_on_the_host():
    assert build("count:a").host is None
    scores, parts = spec.as_host(build("count:a*3"))(rollout(), {})
    assert (scores.tolist(), parts["count:a"].tolist()) == ([6.0, 3.0], [2.0, 1.0])
    dense = spec.Reward(fn=jax.tree_util.Partial(lambda rollout: (rollout.log_probs, {})))
    scored, _ = rewards.on_host(
        spec.as_host(dense), rollout().replace(log_probs=np.ones((2, 4))), {}
    )
    assert_array_equal(scored.scores, [[0, 0, 1, 1], [0, 0, 1, 0]])


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("mine.py:f", ("mine.py:f", 1.0, None)),
        ("mine.py:f*-.5 else 0", ("mine.py:f", -0.5, 0.0)),
        ("judge:kind.yaml else -1e-1", ("judge:kind.yaml", 1.0, -0.1)),
        ("regex:a*2*1", ("regex:a*2", 1.0, None)),
        ("regex:if .* else x", ("regex:if .* else x", 1.0, None)),
        ("regex:x else 1*2", ("regex:x else 1", 2.0, None)),
        ("regex:a\nb*2", ("regex:a\nb", 2.0, None)),
        ("", ("", 1.0, None)),
    ],
)
def test_an_entry_is_a_spec_a_weight_and_what_its_absence_is_worth(entry, parts):
    assert spec._split(entry) == parts
    if entry.startswith(("mine", "judge")):
        assert spec.named(entry) == spec.named(parts[0])


@pytest.fixture
def pair(tmp_path):
    """The folder of a run that trained an ensemble of two, models 0 and 1."""
    for i in range(2):
        (tmp_path / "pair" / "model" / f"member_{i}").mkdir(parents=True)
    return tmp_path / "pair" / "model"


def test_what_entries_mean(pair):
    """Terms, reward models and their ensembles: the folder of a run means its members."""
    zero, one, five = (rewards.from_model(score, jnp.float32(number)) for number in (0, 1, 5))
    expected = {
        "length": rewards.length(0),
        "length:3": rewards.length(3),
        "repetition": rewards.repetition(3),
        "repetition:1": rewards.repetition(1),
        "diversity": rewards.diversity(2),
        "diversity:3": rewards.diversity(3),
        "count:a": rewards.token_count(*TOKENIZER.encode("a")),
        "x/5": five,
        f"mean:{pair},x/5": rewards.ensemble([zero, one, five], "mean"),
        f"uncertainty:{pair},x/5": rewards.ensemble([zero, one, five], "uncertainty"),
        f"min:x/5,{pair}": rewards.ensemble([five, zero, one], "min"),
        f"uncertainty:0.5:{pair}": rewards.ensemble([zero, one], "uncertainty", 0.5),
    }
    # Functions and their numbers
    built = {entry: str(jax.tree.flatten(build(entry).fn)) for entry in expected}
    assert built == {entry: str(jax.tree.flatten(fn)) for entry, fn in expected.items()}
    assert len(set(built.values())) == len(expected)


def test_the_parts_of_several_entries_have_their_names(pair):
    reward = build("length", "runs/rm5/model", f"min:x/5,{pair}", f"uncertainty:0.5:{pair}*2")
    total, parts = jax.jit(lambda rollout: reward.fn(rollout))(rollout())
    ensembles = {"min:5,pair", "uncertainty:0.5:pair"}
    assert parts.keys() == {
        "length",
        "rm5",
        *ensembles,
        *(f"{name}/uncertainty" for name in ensembles),
    }
    assert_allclose(
        total,
        sum(parts[name] for name in ("length", "rm5", *ensembles)) + parts["uncertainty:0.5:pair"],
    )


def test_an_ensemble_of_two_tokenizers():
    """A row that one model cannot score has no score; a score that is not finite is an error."""

    def load(path):
        fingerprint = "another" if path == "other" else TOKENIZER.fingerprint
        number = jnp.float32(path.replace("other", "0"))
        return spec.RewardModel(score, number, fingerprint, lambda *texts: [2.0, None])

    columns = {"messages": [[{"role": "user", "content": "hi"}]] * 2}
    first = float(rollout().tokens[0].sum())
    for how, expected in {"mean": first / 2 + 1, "min": 2.0, "uncertainty": 1 + first / 2}.items():
        host = build(f"{how}:1,other", load=load).host
        scored, parts = rewards.on_host(host, rollout(), columns)
        deviation = (first - 2) / 2
        expected -= deviation**2 if how == "uncertainty" else 0
        assert_allclose(scored.scores, [expected, 0], rtol=1e-5)
        assert_allclose(parts[f"{how}:1,other/uncertainty"], [deviation, math.nan], rtol=1e-5)
        assert scored.present.tolist() == [True, False]
    with pytest.raises(FloatingPointError, match=r"is not finite \(row 0: nan"):
        rewards.on_host(build("mean:nan,other", load=load).host, rollout(), columns)


def test_answers_that_a_rule_verifies(monkeypatch):
    """Responses "ea" and "e"."""
    matched = build("regex:^.a$*2", "regex:e")
    scores, parts = matched.host(rollout(), {})
    assert scores == [3.0, 1.0]
    assert parts == {"regex:^.a$": [1, 0], "regex:e": [1, 1]}
    with monkeypatch.context() as missing:
        missing.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"--reward math: .* math-verify .* pip install"):
            build("math", columns=("answer",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(
        UserError,
        match=r"math: .* answer; .* columns are topic",
    ):
        build("math", columns=("topic",))
    assert build("math", columns=("answer",)).host is not None


def test_a_file_imports_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_rewards.py").write_text("VALUE = 3.0")
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    (tmp_path / "wave.py").write_text("raise RuntimeError('not the library')")
    (tmp_path / "mine.py").write_text(
        "import wave\nimport beside_rewards\n"
        "def f(prompts, responses):\n"
        "    return [beside_rewards.VALUE for _ in responses]\n"
    )
    file = f"{tmp_path}/mine.py"
    function = spec.load_function("--reward", Path(file), "f")
    assert function(["a"], ["b"]) == [3.0]


MISTAKES = {
    "regex:(": "--reward regex:\\(: '\\(' is no regular expression",
    "maths": "no such reward and no such folder; did you mean math\\?",
    "": "no reward: give --reward a reward model's folder",
    "count:ab": "--reward count:ab: 'ab' is 2 tokens",
    "{tmp}/other.py:f": "no such file",
    "{tmp}/broken.py:f": r"broken.py cannot be run: SyntaxError: .* \(broken\.py, line 1\)",
    "{tmp}/leaves.py:f": "leaves.py cannot be run: SystemExit: 0",
    "{tmp}/lacks.py:f": "lacks.py cannot be run: ModuleNotFoundError: No module named 'nosuch_p",
    "{mine}": r"name the function of the file too: .*mine\.py:letters; it defines letters, ",
    "{tmp}/other.py": "other.py: cannot be read: No such file",
    "{mine}:lettres": "no function lettres; did you mean letters",
    "{mine}:constant": "no function constant",
    "{mine}:missing": "missing: .* subject; the prompts' columns are topic",
    "count:a count:a*2": r"--reward count:a\*2: another part is called count:a",
    "no/such/model": "^no/such/model: no such folder",
    "length:-1": r"--reward length:-1: after `length:` comes a whole number, at least 0, .*'-1'",
    "repetition:0*-1": r"--reward repetition:0: .* at least 1, .* got '0'",
    "{pair}": r"models of an ensemble.* mean:{pair}, min:{pair} .* uncertainty:{pair} ",
    "min:x/5": "at least two different models, .* got x/5",
    "mean:x/5,x/5": "at least two different models",
    "mean:x/5,": "at least two different models, .* got x/5, $",
    "uncertainty:-1:{pair}": "at least two different models, .* got -1:{pair}",
    "mean:0.5:no/such,x/5": r"^0\.5:no/such: no such folder",  # only uncertainty has a coefficient
    "other5": "^--reward other5: the reward model's tokenizer is not the policy's",
    "min:{pair},other5": "model,other5: other5: the reward model's tokenizer is not the policy's",
}


@pytest.mark.parametrize("entries", MISTAKES)
def test_mistakes_are_named(entries, functions, pair, tmp_path):
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)")
    (tmp_path / "lacks.py").write_text("import nosuch_package")
    places = {"tmp": tmp_path, "mine": functions, "pair": pair}
    with pytest.raises(UserError, match=MISTAKES[entries].format(**places)):
        build(*entries.format(**places).split())


def test_the_files_behind_a_reward(pair, functions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    single = tmp_path / "length"
    single.mkdir()
    build("length")  # a term wins over a folder of its name
    files = {
        "count:e": {},
        "regex:a/b.py:c": {},
        "math": {},
        "length*-1": {},
        "./length": {"./length": single},
        "openai-community/gpt2": {},
    }
    files |= {
        f"{single}*0.5": {f"{single}*0.5": single},
        f"{functions}:letters*2": {f"{functions}:letters*2": functions},
    }
    files[f"uncertainty:0.5:{pair},{single}*2"] = {f"{pair}": pair, f"{single}": single}
    for entry, expected in files.items():
        assert {name: path.resolve() for name, path in spec.sources(entry).items()} == expected


@pytest.mark.slow
def test_a_model_is_loaded_with_its_score_head(tmp_path):
    sizes = {"vocab_size": 20, "max_length": 8, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
    model = models.build(models.GPT2Config(**sizes))
    params = initial_params(model)
    load = partial(reward_models.load_reward_model, compute=Compute())
    TOKENIZER.save(tmp_path)
    models.save(tmp_path, model, params)
    with pytest.raises(UserError, match=f"{tmp_path}: this model has no score head"):
        load(str(tmp_path))
    params = models.add_head(jax.random.key(1), params, "score")
    models.save(tmp_path, model, params)
    with pytest.raises(
        UserError, match=f"{tmp_path}: this reward model reads 7 tokens; .*, now 8$"
    ):
        load(str(tmp_path), length=8)
    ends = [[*TOKENIZER.encode(text), *TOKENIZER.eos_ids] for text in ("abea", "abe")]
    tokens = np.array([ends[0], [*ends[1], TOKENIZER.pad_id]])  # each answer with an end behind it
    real = np.array([[1] * 5, [1, 1, 1, 1, 0]])
    expected = models.score_fn(model)(params, tokens, real, None)
    scores, _ = build(str(tmp_path), load=load).fn(rollout())
    assert_allclose(scores, expected, rtol=1e-5)


def test_a_nan_reward_stops_the_run_and_names_its_prompt(functions):
    prompts = EncodedPrompts(None, None, [Row("ab", (), "")], (), {})
    job = rl_job(inputs={"reward": build(f"{functions}:nan")})
    with pytest.raises(TrainingFault, match="row 0, prompt"):
        score_rollout(job, rollout(), Batch(prompts, np.array([0, 0]), None))


def test_an_evaluation_reads_scores_by_the_same_rules(functions):
    def scored(name):
        columns = {"topic": ["x", "skip"]}
        return bench.score(build(f"{functions}:{name}"), rollout(), columns, 2)

    assert_array_equal(scored("length"), [2, np.nan])
    with pytest.raises(TrainingFault, match="row 0, prompt 'ab'"):
        scored("nan")
    with pytest.raises(UserError, match=r"the reward function leaves called sys\.exit\(0\)"):
        scored("leaves")
