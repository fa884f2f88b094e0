"""What a reward function is given and may return, where its rewards stand, and which rows it
scored: from the function to the advantages.
"""

import copy
import functools
import importlib
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import letters_run, metric_rows, slow, with_rl
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal
from recorded import rl_job

from rlhf_jax import Rollout, TrainState, grpo, rewards, rloo, training, vpg
from rlhf_jax.algorithms import safe_rlhf, spo
from rlhf_jax.config import RLStage
from rlhf_jax.data import batches
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters, train_bpe
from rlhf_jax.errors import TrainingFault, UserError, logger
from rlhf_jax.graders import pairs, spec
from rlhf_jax.iteration import LoopState
from rlhf_jax.rewards.texts import check_function, on_texts
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.training.rl.score import score, unfit_scores
from rlhf_jax.training.rl.validation import _samples, validate

loop = importlib.import_module("rlhf_jax.training.rl.run")  # ``rl.run`` is its function
TOKENIZER = characters("abcdefghij ")


def rollout(tokenizer=TOKENIZER, texts=("ea", "e"), end=True):
    """Prompts "ab" with these responses, which end with EOS."""
    prompt = tokenizer.encode("ab")
    said = [tokenizer.encode(text) + [tokenizer.eos_id] * end for text in texts]
    width = len(prompt) + max(map(len, said))
    tokens = np.full((len(texts), width), tokenizer.pad_id, np.int32)
    mask = np.zeros_like(tokens)
    for row, ids in enumerate(said):
        tokens[row, : len(prompt) + len(ids)] = [*prompt, *ids]
        mask[row, len(prompt) : len(prompt) + len(ids)] = 1
    real = np.maximum(mask, np.arange(width) < len(prompt))
    return Rollout(tokens, real, mask, np.zeros(tokens.shape, np.float32))


def called(fn, columns=None, tokenizer=TOKENIZER, **how):
    reward = rewards.from_text(fn, tokenizer, tokenizer.decode_raw)
    return rewards.on_host(reward, rollout(tokenizer, **how), columns or {})


# --- Rows that are scored, and rows that are not


def build(folder, text, *entries, columns=("task",)):
    file = folder / "mine.py"
    file.write_text(text)
    is_own = [f"def {re.split('[^a-z]', entry)[0]}(" in text for entry in entries]
    specs = [f"{file}:{x}" if own else x for x, own in zip(entries, is_own, strict=True)]
    return spec.build_reward(specs, tokenizer=TOKENIZER, load=pytest.fail, columns=columns)


TASKS = """
from rlhf_jax.rewards import Unscored

def maths(prompts, responses, task):
    return [2.0 if t == "math" else Unscored("no maths") for t in task]

def code(prompts, responses, task):
    return [3.0 if t == "code" else None for t in task]
"""


POLICY = SimpleNamespace(tokenizer=TOKENIZER)


def batch_of(rows, numbers, *columns):
    blank = np.ones((len(rows), 1))
    prompts = EncodedPrompts(blank, blank, rows, columns, {})
    return Batch(prompts, np.array(numbers), jax.random.key(0))


@pytest.fixture
def of_tasks(tmp_path):
    """Three sampled rows of two tasks and of none, and the job of two rewards."""
    reward = build(tmp_path, TASKS, "maths", "code")
    rows = [Row("ab", (), "", columns={"task": task}) for task in ("math", "code", "other")]
    sampled = jax.tree.map(jnp.asarray, rollout(texts=("e", "e", "e")))
    return sampled, batch_of(rows, range(3), "task"), rl_job(inputs={"reward": reward})


def test_an_answer_that_a_part_cannot_score_is_counted_by_part(of_tasks, tmp_path):
    sampled, batch, job = of_tasks
    scored = score(job, sampled, batch)
    assert not scored.rollout.present.any()
    metrics = {name: float(value) for name, value in scored.metrics.items()}
    assert metrics["reward/unscored"] == 3
    assert (metrics["reward/unscored/maths"], metrics["reward/unscored/code"]) == (2, 2)
    alone = score(job, sampled, batch, build(tmp_path, TASKS, "maths"))
    assert alone.metrics["reward/unscored"] == 2
    assert "reward/unscored/maths" not in alone.metrics  # there is no other part


def test_a_sum_has_what_an_absent_score_is_worth_and_a_metric_its_own_rows(of_tasks, tmp_path):
    """Also where a judge scores."""
    sampled, batch, job = of_tasks
    judge = build(tmp_path, TASKS, "maths else 0", "code*2 else -0.5")
    scored = score(job, sampled, batch, judge)
    assert scored.rollout.scores.tolist() == [2 - 1, 6, -1]
    assert scored.rollout.present.all()
    assert_array_equal(scored.rollout.extras["maths"], [2, math.nan, math.nan])
    assert_array_equal(scored.rollout.extras["code"], [math.nan, 3, math.nan])
    metrics = {name: float(value) for name, value in scored.metrics.items()}
    assert (metrics["reward/maths"], metrics["reward/code"]) == (2, 3)
    assert (metrics["reward/rows/maths"], metrics["reward/rows/code"]) == (1, 1)
    assert (metrics["reward/unscored"], metrics["objective/score"]) == (0, 2)
    assert metrics["reward/unscored/maths"] == metrics["reward/unscored/code"] == 0


def test_an_ungraded_answer_wins_against_no_graded_one(tmp_path):
    """A judge of harm with weight -1: what it did not read is not harmless."""
    text = """
def kind(responses):
    return [8.0] * len(responses)
def harm(responses):
    return [0.1, 0.2, None][: len(responses)]
"""
    how = {"texts": ("e", "e", "e")}
    reward = build(tmp_path, text, "kind", "harm*-1")
    scored, _ = rewards.on_host(reward.host, rollout(**how), {})
    assert_allclose(scored.scores, [7.9, 7.8, 0])
    assert scored.present.tolist() == [True, True, False]


def test_why_a_row_has_no_score_is_said_once_and_kept_in_its_sample(of_tasks, tmp_path, caplog):
    sampled, batch, job = of_tasks
    reward = build(tmp_path, TASKS, "maths", "code*0")
    job.inputs = job.inputs._replace(reward=reward)
    with caplog.at_level(logging.INFO, logger=logger.name):
        scored = score(job, sampled, batch)
        score(job, sampled, batch)
    assert list(scored.reasons) == [None, *["maths: no maths"] * 2]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["reward: no score for 2 of 3 responses: maths: no maths (said once)"]
    assert set(scored.metrics) >= {"reward/unscored/maths", "reward/rows/code"}
    assert "reward/unscored/code" not in scored.metrics  # nothing depends on it
    samples = _samples(POLICY, sampled, scored, batch, None)
    assert [row["score"] for row in samples] == [2, None, None]
    assert [row["reward/maths"] for row in samples] == [2, None, None]
    assert samples[2]["unscored"] == scored.reasons[2]


def test_weights_and_rewards_at_tokens_are_summed_at_their_places(tmp_path):
    text = "def dense(completion_ids):\n    return [[1.0] * len(ids) for ids in completion_ids]\n"
    reward = build(tmp_path, text, "dense*2", "length*-0.5")
    scored, components = rewards.on_host(reward.host, rollout(), {})
    assert_allclose(scored.scores, [[0, 0, 2, 2, 2 - 1.5], [0, 0, 2, 2 - 1.0, 0]])
    assert_array_equal(components["dense"], [3, 2])
    assert_array_equal(components["length"], [3, 2])
    traced = rewards.weighted(
        {"dense": (lambda r: (r.mask * 1.0, {}), 2.0), "length": (rewards.length(), -0.5)}
    )
    scores, components = jax.jit(traced)(rollout())
    assert_allclose(scores, scored.scores)
    assert_array_equal(components["dense"], [3, 2])


@pytest.mark.parametrize("entry", ["some*2", "some*2 else 3"])
def test_absent_rewards_at_tokens_are_a_number_at_the_last_one(entry, tmp_path):
    """Of two parts at tokens one lacks a row: that is unscored, or has 3 at the end, times 2."""
    text = """
def every(completion_ids):
    return [[1.0] * len(ids) for ids in completion_ids]
def some(completion_ids):
    return [[1.0] * len(ids) if len(ids) > 2 else None for ids in completion_ids]
"""
    reward = build(tmp_path, text, "every", entry)
    scored, _ = rewards.on_host(reward.host, rollout(), {})
    assert_allclose(scored.scores[0], [0, 0, 3, 3, 3])
    second = [0, 0, 1, 1 + 2 * 3, 0] if "else" in entry else [0] * 5
    assert_allclose(scored.scores[1], second)
    assert scored.present.tolist() == [True, "else" in entry]


def test_scores_of_other_rows_are_refused():
    given = rollout().replace(row_ids=np.array([4, 5]))
    said = rewards.host.row_scores(lambda rollout, columns: ([1, 2], {}), given, {})
    with pytest.raises(ValueError, match="those of other rows"):
        rewards.host.with_scores(given.replace(row_ids=np.array([5, 4])), said)


# --- What a function is given


def shown_to(fn, **how):
    """The arguments with which a function is called."""
    seen = {}

    def record(**given):
        seen.update(given)
        return [0.0, 0.0]

    names = {"record": record}
    exec(f"def fn({fn}): return record(**{{k: v for k, v in locals().items()}})", names)
    called(names["fn"], **how)
    return seen


COLUMNS = {
    "messages": [[{"role": "user", "content": "hi"}]] * 2,
    "task": [1, 2],
    batches.IS_CHAT: [True, True],
}


def test_a_function_takes_what_it_names():
    assert shown_to("responses", columns=COLUMNS) == {"responses": ["ea", "e"]}
    assert shown_to("task, outputs, prompt", columns=COLUMNS) == {
        "task": [1, 2],
        "outputs": ["ea", "e"],
        "prompt": ["ab"] * 2,
    }
    assert shown_to("prompts, responses, **more", columns=COLUMNS)["more"] == {
        "messages": COLUMNS["messages"],
        "task": [1, 2],
    }
    eos = TOKENIZER.eos_id
    ids = [[*TOKENIZER.encode(text), eos] for text in ("ea", "e")]
    assert shown_to("completion_ids, x=3", columns=COLUMNS) == {"completion_ids": ids, "x": 3}


ANSWERS = ["ea", "e"]
ROWS = {"answer": ["x", "y"], "label": [3, 4], "data_source": ["s", "s"]}
ROWS |= {"ground_truth": ["x", "y"], "extra_info": [{"i": 0}, {"i": 1}], "score": [7, 8]}
SIGNATURES = {
    "outputs, answer": {"outputs": ANSWERS, "answer": ["x", "y"]},
    "response, prompt": {"response": ANSWERS, "prompt": ["ab"] * 2},
    "completion, label": {"completion": ANSWERS, "label": [3, 4]},
    "answer, /, texts": {"answer": ["x", "y"], "texts": ANSWERS},
    "prompt, /, *, generations": {"prompt": ["ab"] * 2, "generations": ANSWERS},
    "predictions, score": {"predictions": ANSWERS, "score": [7, 8]},
    "responses, output=5": {"responses": ANSWERS, "output": 5},
    "responses, label=None, output=None": {"responses": ANSWERS, "label": [3, 4], "output": None},
    "responses, labels=None, prompt=None": {
        "responses": ANSWERS,
        "labels": [3, 4],
        "prompt": ["ab"] * 2,
    },
    "x=1, answer=2, /, *, text": {"x": 1, "answer": ["x", "y"], "text": ANSWERS},
    "queries, prompts, labels": {
        "queries": ["abea", "abe"],
        "prompts": ["ab"] * 2,
        "labels": [3, 4],
    },
    "data_sources, solution_strs, ground_truths, extra_infos": {
        "data_sources": ["s", "s"],
        "solution_strs": ANSWERS,
        "ground_truths": ["x", "y"],
        "extra_infos": ROWS["extra_info"],
    },
}


@pytest.mark.parametrize("parameters", SIGNATURES)
def test_parameters_are_told_by_their_names(parameters):
    assert shown_to(parameters, columns=ROWS) == SIGNATURES[parameters]


def test_a_column_comes_before_another_name_of_a_text():
    given = ROWS | {"output": ["c", "d"], "labels": [5, 6]}
    assert shown_to("output, labels, completions", columns=given) == {
        "output": ["c", "d"],
        "labels": [5, 6],
        "completions": ANSWERS,
    }
    with pytest.raises(UserError, match="gets the responses; output is a column of the prompts"):
        shown_to("output, prompt", columns=given)


GOLD = ROWS | {"response": ["c", "d"]}


@pytest.mark.parametrize("more", ["", ", **columns", ", *, key=1"])
@pytest.mark.parametrize(
    ("parameters", "columns", "said"),
    [
        ("response, answer", GOLD, "no parameter gets the responses; response is a column"),
        ("prompts, response", GOLD, "no parameter gets the responses; response is a column"),
        ("response, output", GOLD, "output get the responses; response is a column"),
        ("completions, completion", ROWS, "completions and completion get the responses"),
        ("completion, output", ROWS, "completion and output get the responses"),
        ("responses, prediction", GOLD, "responses and prediction get the responses"),
    ],
)
def test_what_may_be_the_response_or_the_gold_answer_is_refused(parameters, columns, said, more):
    with pytest.raises(UserError, match=said):
        shown_to(parameters + more, columns=columns)


def test_a_response_of_the_data_beside_those_of_the_policy():
    for name in ("responses", "completions"):
        given = shown_to(f"{name}, response", columns=GOLD)
        assert given == {name: ANSWERS, "response": ["c", "d"]}


def test_settings_of_a_partial_and_of_verl_are_no_columns():
    seen = []

    def exact(responses, answer, tone=None):
        seen.append((answer, tone))
        return [0.0] * len(responses)

    columns = {"answer": ["x", "y"], "tone": ["a", "b"], "score": [7, 8], "ground_truth": [1, 2]}
    on_texts(functools.partial(exact, answer="42"), ["p", "q"], ["r", "s"], columns)
    assert seen == [("42", ["a", "b"])]

    def compute_score(solution_str, ground_truth, method="strict", score=1.0):
        return score if ground_truth else 0.0

    assert on_texts(compute_score, ["p", "q"], ["r", "s"], columns)[0] == [1.0, 1.0]


def test_a_class_is_no_reward():
    class Reward:
        def __init__(self, args=None, **kwargs): ...

        def __call__(self, completions, **kwargs):
            return [0.0] * len(completions)

    with pytest.raises(UserError, match="here: a class is no reward"):
        check_function("here", Reward, ())
    check_function("here", Reward(), ())


REFUSED = {
    "first, second": "first; the prompts' columns are answer, .* parameters are prompts, .* text",
    "prompts, reply": "reply;",
    "*texts": "texts;",
    "responses, *, gold": "gold;",
    "query, response": "query;",
    "prompts, answer": "no parameter gets the responses",
    "answer": "no parameter gets the responses",
    "prompts, output=None": "no parameter gets the responses",
    "": "no parameter gets the responses",
    "a, /, response": "a;",
    "outputs, answers": "answers;",
    "first, prompts": "no parameter gets the responses",
}


@pytest.mark.parametrize("parameters", REFUSED)
def test_what_nothing_fills_is_refused_before_the_run(parameters, tmp_path):
    text = f"def f({parameters}):\n    return [0.0, 0.0]\n"
    columns = [*ROWS, "first"] if "first, prompts" in parameters else [*ROWS]
    with pytest.raises(UserError, match=rf"mine\.py:f: .*{REFUSED[parameters]}.*mine\.py:1\)"):
        build(tmp_path, text, "f", columns=columns)


def test_a_function_of_c_gets_prompts_and_responses():
    with pytest.raises(UserError, match="got str: 'ea'"):  # the later of both lists
        called(max)


def test_a_function_of_verl_is_called_for_each_row():
    seen = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
        seen.append((data_source, solution_str, ground_truth, extra_info, kwargs["answer"]))
        return {"score": len(solution_str), "acc": ground_truth == "y", "pred": solution_str}

    scored, parts = called(compute_score, ROWS)
    assert seen == [("s", "ea", "x", {"i": 0}, "x"), ("s", "e", "y", {"i": 1}, "y")]
    assert scored.scores.tolist() == [2, 1]
    assert {name: values.tolist() for name, values in parts.items()} == {"acc": [0, 1]}
    plain, parts = called(lambda solution_str, ground_truth: solution_str == "e", ROWS)
    assert (plain.scores.tolist(), parts) == ([0, 1], {})

    async def later(solution_str, extra_info):
        return None if extra_info["i"] else {"score": np.float32(3), "part": np.int64(4)}

    scored, parts = called(later, ROWS)
    assert scored.present.tolist() == [True, False]
    assert_array_equal(parts["part"], [4, math.nan])
    batched, parts = called(lambda solution_strs: [{"score": 1, "n": 2}, {"score": 3}], ROWS)
    assert batched.scores.tolist() == [1, 3]
    assert_array_equal(parts["n"], [2, math.nan])
    columns = ROWS | {"solution_str": ["c", "d"]}  # then it is none of verl's
    given = shown_to("responses, solution_str", columns=columns)
    assert given == {"responses": ANSWERS, "solution_str": ["c", "d"]}


def test_a_function_of_openrlhf_returns_a_tensor_or_a_dict():
    def reward_func(queries, prompts, labels, **kwargs):
        said = [len(query.removeprefix("ab")) for query in queries]
        return {
            "rewards": jnp.float32(said),
            "scores": np.array(labels) / 10,
            "extra_logs": {"length": jnp.int32(said)},
        }

    scored, parts = called(reward_func, ROWS)
    assert scored.scores.tolist() == [2, 1]
    assert_allclose(parts["scores"], [0.3, 0.4])
    assert parts["length"].tolist() == [2, 1]
    alone, parts = called(lambda queries: {"rewards": np.array([[5.0], [6.0]])[:, 0]})
    assert (alone.scores.tolist(), parts) == ([5, 6], {})
    chat = shown_to("queries, prompts", columns=COLUMNS)
    assert chat == {"queries": ["abea", "abe"], "prompts": ["ab"] * 2}


def test_python_gives_functions_of_other_names_as_texts():
    for parameters in ("prompt, response", "output", "solution_str, ground_truth", "queries"):
        fn = eval(f"lambda {parameters}: []")
        assert spec.given(fn) is fn


def test_a_function_may_change_what_it_gets():
    """No row of the same prompt, other reward or later call reads it."""
    tests = ["x", ["y"]]
    columns = {"tests": [tests] * 2, "messages": [COLUMNS["messages"][0]] * 2}
    before = copy.deepcopy(columns)

    def pops(responses, tests):
        return [len(row) + len(row.pop()) for row in tests]

    def appends(prompts, responses, messages, **columns):
        prompts.clear()
        return [len(row.append("answer") or row) for row in messages]

    def on_host(rollout, columns):
        return [len(row.pop(0)) + len(columns.popitem()) for row in columns["tests"]], {}

    assert [called(pops, columns)[0].scores.tolist() for _ in range(2)] == [[3, 3]] * 2
    assert [called(appends, columns)[0].scores.tolist() for _ in range(2)] == [[2, 2]] * 2
    score = spec.given(on_host).host
    assert rewards.on_host(score, rollout(), columns)[0].scores.tolist() == [3, 3]
    assert on_texts(pops, ["p"] * 2, ["r"] * 2, columns) == ([3, 3], {})
    longer = pairs.by_function(
        "--reward pairs:f", lambda first, tests: [0.5 * len(x.pop()) for x in tests], ["tests"]
    )
    assert longer([pairs.Pair(0, "a", "b")] * 2, columns) == [0.5, 0.5]
    assert columns == before


def test_a_function_may_not_move_or_end_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "moves.py").write_text("import os\nos.chdir('below')\nf = os.getcwd\n")
    assert spec.load_function("--reward", Path("moves.py"), "f")() == str(tmp_path)

    async def later(responses):
        return moves(responses)

    def moves(responses):
        os.chdir("below")
        return [1, 1]

    def on_host(rollout, columns):
        return moves([]), {}

    async def ends(responses):
        sys.exit(0)

    for fn in (later, moves):
        assert called(fn)[0].scores.tolist() == [1, 1]
        assert Path.cwd() == tmp_path
    rewards.on_host(on_host, rollout(), {})
    assert Path.cwd() == tmp_path
    with pytest.raises(UserError, match=r"ends called sys\.exit\(0\)"):
        called(ends)


def test_a_column_with_the_name_of_a_text_of_the_run_is_refused():
    for name in ("responses", "prompts", "completions", "completion_ids"):
        fn = eval(f"lambda {name}, answer=None, **rest: []")
        with pytest.raises(UserError, match=f"here: {name} is a column .* rename"):
            check_function("here", fn, [name])
        check_function("here", fn, ["response", "chosen", "rejected", "messages"])
    check_function("here", lambda prompts, output: [], ["responses"])
    check_function("here", lambda responses, messages: [], ["messages"])
    check_function("here", lambda responses, **columns: [], ["completions"])
    given = {"response": [1, 2], "chosen": ["c", "d"], "rejected": [None, "r"]}
    assert shown_to("responses, response, chosen, rejected", columns=given) == {
        "responses": ["ea", "e"],
        **given,
    }


def test_numbers_of_other_kinds_are_scores():
    for one, two in ((Decimal("0.5"), Fraction(1, 2)), (np.float16(0.5), np.bool_(True))):
        assert called(lambda responses, given=(one, two): list(given))[0].scores[0] == 0.5
    for bad in (Decimal("NaN"), Decimal("sNaN"), Decimal("1e400"), -(10**400), 1e39, math.nan):
        with pytest.raises(FloatingPointError, match=r"row 0, prompt 'ab', .*: (nan|inf|-inf)"):
            called(lambda responses, bad=bad: [bad, 1])


def test_a_file_is_an_imported_module_that_can_be_pickled(tmp_path):
    """Run once; two files of one name are two modules; a spawned process finds it by its name."""
    text = "import os\nruns = []\nruns.append(1)\nclass Case: pass\n"
    text += "def one(text): return len(text), os.getpid()\ndef count(responses): return runs\n"
    loaded = {}
    for folder in ("a", "b"):
        for name in ("pickled_reward.py", "odd name.v2.py"):
            file = tmp_path / folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text + f"where = lambda: '{folder}'\n")
            for function in ("count", "one", "Case", "where"):
                fn = spec.load_function("--reward", file, function)
                loaded[folder, name, function] = fn
                if function != "where":
                    assert pickle.loads(pickle.dumps(fn)) is fn
            assert loaded[folder, name, "count"]([]) == [1]
            assert loaded[folder, name, "where"]() == folder
    for (_, _, function), fn in loaded.items():
        assert function == "where" or pickle.loads(pickle.dumps(fn)) is fn
    one = loaded["a", "pickled_reward.py", "one"]
    assert one.__module__ == "pickled_reward"
    file.write_text("def one(text): return 7\n")
    changed = spec.load_function("--reward", file, "one")
    assert changed("") == 7
    assert spec.load_function("--reward", file, "one") is changed
    file.write_text("raise KeyError('early')\n")
    with pytest.raises(KeyError):
        spec.load_function("--reward", file, "one")


def test_what_python_gives_as_a_reward_is_told_from_its_parameters():
    def traced(rollout):
        return rollout.log_probs, {}

    def scaled(scale, rollout):
        return scale, {}

    def on_host(rollout, columns, weight=1.0):
        return [weight], {}

    def texts(completions, **columns):
        return [0.0]

    assert spec.given(traced).fn.func is traced
    partial = Partial(scaled, jnp.ones(2))
    assert spec.given(partial).fn is partial
    assert spec.given(on_host) == spec.Reward(host=on_host)
    assert spec.given(texts) is texts
    assert spec.given(spec.Reward(fn=traced)) == spec.Reward(fn=traced)
    for wrong in (lambda: None, lambda x, y, z: None, lambda *, rollout: None, max, "math", None):
        with pytest.raises(UserError, match="reward: expected a function of a rollout"):
            spec.given(wrong)
    reward = spec.of_texts("reward", texts, TOKENIZER, ())
    assert reward.host is not None
    assert reward.examples == ()


def test_a_function_of_trl_gets_texts_or_messages_as_the_data_has_them():
    chat = [[{"role": "assistant", "content": text}] for text in ("ea", "e")]
    given = shown_to("completions, **kwargs", columns=COLUMNS)
    assert given["completions"] == chat
    assert given["kwargs"]["prompts"] == COLUMNS["messages"]
    assert given["kwargs"]["task"] == [1, 2]
    assert len(given["kwargs"]["completion_ids"]) == 2
    plain = {**COLUMNS, batches.IS_CHAT: [False, False]}
    given = shown_to("prompts, completions", columns=plain)
    assert given == {"prompts": ["ab"] * 2, "completions": ["ea", "e"]}
    assert shown_to("**kwargs", columns=plain)["kwargs"]["completions"] == ["ea", "e"]


def test_prompts_have_the_tokens_that_end_turns():
    ended = rollout()
    ended.tokens[:, 0] = TOKENIZER.eos_id
    seen = []

    def score(prompts, responses):
        seen.extend(prompts)
        return [0, 0]

    rewards.on_host(rewards.from_text(score, TOKENIZER, TOKENIZER.decode_raw), ended, {})
    assert seen == ["<|endoftext|>b"] * 2


def test_async_functions_are_awaited_and_tensors_are_scores():
    async def later(responses):
        return [float(len(response)) for response in responses]

    class Tensor:
        shape = (2,)

        def __array__(self):
            raise RuntimeError("it has a gradient")

        def tolist(self):
            return [2.0, 1.0]

    for fn in (later, lambda responses: Tensor(), lambda responses: jnp.array([2.0, 1.0])):
        scored, _ = called(fn)
        assert scored.scores.tolist() == [2, 1]


def test_a_fault_has_the_line_of_the_function(tmp_path):
    text = "def f(responses):\n    return [g(r) for r in responses]\n\ndef g(r):\n    return r.no\n"
    text += (
        "\ndef short(responses):\n    return [1]\n\ndef what(responses, subject):\n    return 1\n"
    )
    text += "\nasync def later(responses):\n    return 1 / 0\n"
    file = tmp_path / "mine.py"
    for name, place in {
        "f": rf"AttributeError: .* \({file}:5: return r\.no\)",
        "short": rf"expected a list.* of 2 scores.*\({file}:7\)",
        "later": rf"ZeroDivisionError: .* \({file}:14: return 1 / 0\)",
    }.items():
        reward = build(tmp_path, text, name)
        with pytest.raises(UserError, match=f"^the reward function {name}: {place}"):
            rewards.on_host(reward.host, rollout(), {})
    with pytest.raises(UserError, match=rf"subject; the prompts' columns are task, .*{file}:10"):
        build(tmp_path, text, "what")


# --- Rewards at tokens


def test_pairs_stand_at_the_token_that_completes_their_character():
    """A byte-level tokenizer: é and the emoji are several tokens."""
    tokenizer = train_bpe(["ab"], 258)
    text = "aé🙂b"
    ids = tokenizer.encode(text)
    assert len(ids) == 1 + 2 + 4 + 1

    def score(responses):
        assert responses == [text, "b"]
        return [[(0, 1.0), (1, 2.0), (2, 4.0), (3, 8.0), (3, 0.5)], 3.0]

    scored, _ = called(score, tokenizer=tokenizer, texts=(text, "b"))
    expected = np.zeros((2, 11))
    expected[0, [2, 4, 8, 9]] = [1, 2, 4, 8.5]
    expected[1, 3] = 3
    assert_array_equal(scored.scores, expected)


WRONG = {
    "2 numbers for a response of 3 tokens, its end token included": [[1, 2], 0],
    "stands at a character from 0 to 1 of the response, got int: 2": [[(2, 1.0)], 0],
    "stands at a character from 0 to 1 of the response, got float: 0.5": [[(0.5, 1.0)], 0],
    "a reward at a token is a number, got None": [[1, None, 2], 0],
    "expected a number or None, got str: 'x'": [[(0, "x")], 0],
}


@pytest.mark.parametrize("message", WRONG)
def test_rewards_that_do_not_fit_their_response_are_refused(message):
    with pytest.raises(
        UserError, match=rf"row 0, prompt 'ab', response .*: .*{message}.*\(.*\.py:\d+\)"
    ):
        called(lambda responses: WRONG[message])


def test_a_dense_reward_that_is_not_finite_stops():
    with pytest.raises(FloatingPointError, match="row 0"):
        called(lambda responses: [[1, math.nan, 0], 0])


DENSE = np.array([[9.0, 1, 0, 2], [9, 0, 3, 9], [9, 4, 0, 0], [9, 9, 9, 9]], np.float32)
SAID = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]])


def dense_rollout(dense=DENSE, said=SAID):
    return Rollout(said, said, said, 0.0 * said, rewards=jnp.asarray(dense), dense=True)


@functools.cache
def prepared_by(module, config):
    return jax.jit(functools.partial(module.prepare, config=config))


def advantages(rollout, module, **settings):
    return prepared_by(module, module.Config(**settings))(rollout).advantages


def test_dense_rewards_keep_their_places_by_hand():
    """Rewards to go 3 2 2; 3 3; 4 0 (over a hole); the fourth row is missing. At the third place
    the second and the third row have ended: their last rewards, 3 and 0, stay."""
    expected = [
        [0, 3 - 3.5, 2 - 1.5, 2 - 1.5],
        [0, 3 - 3.5, 3 - 1.0, 0],
        [0, 4 - 3.0, 0, 0 - 2.5],
        [0, 0, 0, 0],
    ]
    given = dense_rollout()
    assert_allclose(advantages(given, rloo, group_size=4), expected, atol=1e-6)
    centred = advantages(given, grpo, group_size=4, scale=False)
    assert_allclose(centred, np.array(expected) * 2 / 3, atol=1e-6)
    to_go = [[0, 3, 2, 2], [0, 3, 3, 0], [0, 4, 0, 0], [0, 0, 0, 0]]
    assert_allclose(advantages(given, vpg, baseline="none"), to_go, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_reward_at_the_last_token_alone_has_the_advantages_of_a_score(seed):
    rng = np.random.default_rng(seed)
    said = rng.integers(0, 2, (4, 4))
    scores = rng.integers(-3, 4, 4).astype(np.float32)
    plain = Rollout(said, said, said, 0.0 * said, scores=jnp.asarray(scores))
    at_end = np.zeros((4, 4), np.float32)
    for row in np.flatnonzero(said.any(axis=1)):
        at_end[row, np.flatnonzero(said[row])[-1]] = scores[row]
    for module, how in (
        (rloo, {"group_size": 2}),
        (rloo, {"group_size": 2, "baseline": "both"}),
        (grpo, {"group_size": 4}),
        (vpg, {"baseline": "none"}),
    ):
        dense = advantages(dense_rollout(at_end, said), module, **how)
        assert_allclose(dense, advantages(plain, module, **how), atol=1e-5)


def test_the_gradient_of_dense_rewards_is_unbiased():
    """Two responses of two tokens, each 0 or 1 with probability 1/2: the mean advantage of a token
    that is 1, less that of one that is 0, is the difference of the rewards that follow."""
    tokens = np.array(np.meshgrid(*[[0, 1]] * 4, indexing="ij")).reshape(4, -1).T
    groups = tokens.reshape(-1, 2)  # 16 groups of two responses: all outcomes
    dense = np.stack([groups[:, 0] * 3.0, groups[:, 0] * groups[:, 1] * 2.0], axis=1)
    said = np.ones_like(groups)
    given = Rollout(groups, said, said, 0.0 * said, rewards=jnp.asarray(dense), dense=True)
    found = advantages(given, rloo, group_size=2)
    gradient = np.mean(np.asarray(found) * (groups - 0.5) * 4, axis=0)
    assert_allclose(gradient, [2 * (3 + 1) / 2 * 1.0, 2 * 1 / 2 * 1.0], atol=1e-6)


# --- Extras of an algorithm


class Watched:
    """GRPO, which notes the extras that it is given."""

    __name__ = "watched"
    State = grpo.State
    needs_values = False
    kl_coef = 0.0

    class Config(grpo.Config):
        extras = {"count:e": "row", "sampler_log_probs": "token"}  # noqa: RUF012

    def __init__(self):
        self.seen = []

    def update(self, state, rollout, key, **options):
        self.seen.append({name: x.ndim for name, x in rollout.extras.items()})
        assert rollout.group_ids.shape == rollout.scores.shape
        return grpo.update(state, rollout, key, **options)


def test_an_algorithm_gets_the_extras_that_it_declares():
    rows, tokens = np.zeros(1), np.zeros((1, 2))
    given = {"count:e": rows, "other": rows, "sampler_log_probs": tokens}
    rollout = Rollout(*[tokens] * 4, extras=given, group_ids=rows)
    read, key, _ = loop._update_arguments(rl_job(own=grpo.Config()), "key", rollout)
    assert (read.extras, read.group_ids, key) == (None, None, "key")  # see iteration.learn
    watched = rl_job(own=Watched.Config())
    read, _, _ = loop._update_arguments(watched, "key", rollout)
    assert sorted(read.extras) == ["count:e", "sampler_log_probs"]
    for others in ({"other": rows}, {**given, "count:e": tokens}):
        with pytest.raises(UserError, match=r"reads count:e of each row.*there are "):
            loop._update_arguments(watched, "key", replace(rollout, extras=others))


@pytest.mark.slow
def test_a_run_gives_its_algorithm_the_extras(tmp_path):
    config = letters_run(tmp_path)
    config = with_rl(config, num_iterations=1, validation_interval=9)
    config = replace(config, reward=("count:e", "length*-0.1"))
    algorithm = Watched()
    folder = training.rl.run(config, algorithm, Watched.Config(group_size=2)).folder
    assert algorithm.seen[-1] == {"count:e": 1, "sampler_log_probs": 2}
    assert "reward/count:e" in metric_rows(folder)[-1]
    line = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    assert line["score"] == pytest.approx(line["reward/count:e"] - 0.1 * line["reward/length"])


# --- Judges of pairs


def longer(prompts, first, second):
    """Sure of the longer one, and it likes the first."""
    both = zip(first, second, strict=True)
    return [min(1.0, 0.5 + 0.1 + 0.2 * (len(a) - len(b))) for a, b in both]


def test_a_judge_of_pairs_is_a_reward_over_the_group_in_both_orders():
    judge = pairs.by_function("--reward pairs:mine.py:longer", longer, ())
    shares = pairs.win_shares(judge)
    none = [None] * 4
    said = shares(["p", "p", "p", "p"], ["aaa", "a", "b", "a"], none, none, [0, 0, 1, 0])
    # Against "a" twice, both orders: (1 + 1 - .2) / 2; equal responses tie.
    assert said[:2] == [pytest.approx(0.9), pytest.approx((0.1 + 0.5) / 2)]
    assert said[2] == pairs.ALONE
    assert said[3] == said[1]
    against = shares(["p"] * 2, ["aa", "b"], none, ["a", "b"], [0, 0])
    assert against == [pytest.approx((0.8 + 1 - 0.4) / 2), 0.5]
    undecided = pairs.win_shares(lambda pairs, shown: [None] * len(pairs))
    assert undecided(["p"] * 2, ["a", "b"], none, none, [0, 0]) == [pairs.UNDECIDED] * 2


def test_a_reward_model_judges_by_bradley_and_terry():
    judge = pairs.by_model(lambda messages, texts: np.array([len(text) for text in texts]))
    (said, _) = pairs.win_shares(judge)(["p"] * 2, ["aaa", "a"], ["m"] * 2, [None] * 2, [3] * 2)
    assert said == pytest.approx(1 / (1 + math.exp(-2)))


def test_what_a_judge_of_pairs_may_return():
    shown = {"prompts": ["p"], "messages": [None]}
    for result, message in (([2.0], "from 0 to 1, got float: 2.0"), ([], "expected 1 numbers")):
        judge = pairs.by_function("x", lambda first, second, result=result: result, ())
        with pytest.raises(UserError, match=f"^x: .*{message}"):
            judge([pairs.Pair(0, "a", "b")], shown)
    for lacks in (lambda prompts: [], lambda prompts, messages=None: []):
        with pytest.raises(
            UserError, match=r"^x: no parameter gets the responses; .* first, second"
        ):
            pairs.by_function("x", lacks, ("responses",))
    with pytest.raises(UserError, match=r"^x: nothing fills .*topic; .* are prompts, first"):
        pairs.by_function("x", lambda first, topic: [], ())


def test_a_judge_of_pairs_gets_what_it_names():
    seen = []
    shown = {"prompts": ["p"], "messages": [None], "letter": ["c"]}
    for parameters, expected in {
        "second, /, prompt, x=1": {"second": ["b"], "prompt": ["p"], "x": 1},
        "*, letter, first": {"letter": ["c"], "first": ["a"]},
        "first, **rest": {"first": ["a"], "rest": shown | {"second": ["b"]}},
    }.items():
        fn = eval(f"lambda {parameters}: seen.append(locals()) or [0.5]", {"seen": seen})
        judge = pairs.by_function("x", fn, ["letter"])
        assert judge([pairs.Pair(0, "a", "b")], shown) == [0.5]
        assert seen.pop() == expected


def later_letter(first, second):
    return [float(a > b) for a, b in zip(first, second, strict=True)]


def pairs_validator(folder):
    """Validates two responses; the third row is missing."""
    batch = batch_of([Row("ab", (), ""), Row("ba", (), "")], [1, 0, -1])
    shares = pairs.win_shares(pairs.by_function("x", later_letter, ()))
    reward = spec.Reward(host=rewards.from_text(shares, TOKENIZER), is_pairs=True)

    def respond(policy, prompts, key):
        made = rollout(texts=(*policy, "j"))
        made.response_mask[2] = 0
        return jax.tree.map(jnp.asarray, made)

    job = rl_job(
        settings=RLStage(batch_size=3),
        inputs={"initial": POLICY, "reward": reward},
        programs={"respond_to_each": respond},
        folder=folder,
        held_out=batch,
    )

    def of_texts(texts):
        state = LoopState(TrainState(0, texts, ()), 0.0)
        return validate(job, state)

    return of_texts


def test_a_validation_compares_with_the_first_one_also_after_a_resume(tmp_path):
    validate = pairs_validator(tmp_path)
    first = validate(("b", "c"))
    assert first.metrics["validation/win_rate"] == 0.5
    assert validate(("c", "d")).metrics["validation/win_rate"] == 1.0
    metrics = validate(("c", "a")).metrics
    assert metrics["validation/win_rate"] == metrics["validation/score"] == 0.5
    assert metrics["validation/win_rate_low"] < 0.5 < metrics["validation/win_rate_high"]
    lines = [json.dumps({"step": 0} | row) for row in first.samples]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    resumed = pairs_validator(tmp_path)
    assert resumed(("c", "d")).metrics["validation/win_rate"] == 1.0


@pytest.mark.slow
def test_a_run_of_pairs_compares_validations_with_the_first_policy(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def longer(first, second):\n"
        "    return [float(a.count('e') > b.count('e')) for a, b in zip(first, second)]\n"
    )
    config = letters_run(tmp_path)
    config = with_rl(config, num_iterations=2, validation_interval=1, batch_size=8)
    config = replace(config, reward=(f"pairs:{tmp_path}/mine.py:longer",), checkpoint_interval=1)
    groups = grpo.Config(group_size=4)
    whole = training.rl.run(replace(config, output_dir=str(tmp_path / "whole")), grpo, groups)
    training.rl.run(config, grpo, groups, on_step=lambda step, *others: step == 1)
    folder = training.rl.run(replace(config, resume=True), grpo, groups).folder
    rows = metric_rows(folder)
    assert rows == metric_rows(whole.folder)
    assert rows[0]["validation/win_rate"] == 0.5  # against itself
    for row in rows:
        low = row["validation/win_rate_low"]
        high = row["validation/win_rate_high"]
        assert low <= row["validation/win_rate"] == row["validation/score"] <= high
        if row["step"]:
            assert row["objective/score"] == pytest.approx(0.5)  # of a group's shares


# --- Hostile rewards

OF_ONE_SIZE = ["vpg", "ppo", "spo", "nash_md", "online_dpo", "xpo"]
GROUPED = ["rloo", "grpo", "clip_cov", "curriculum", "maxrl", "otb", "replay", "safe_rlhf"]
METHODS = {name: {} for name in OF_ONE_SIZE} | {name: {"group_size": 2} for name in GROUPED}
METHODS["pass_at_k"] = {"group_size": 2, "k": 2}
METHODS["gdpo"] = {"group_size": 2, "components": ("cost",), "weights": (1.0,)}


def run_with(name, folder, reward):
    """The parameters after each of five steps, in the last of which the reward raises."""
    folder.mkdir()
    module = importlib.import_module(f"rlhf_jax.algorithms.{name}")
    config = with_rl(letters_run(folder), batch_size=8, num_iterations=5, validation_interval=9)
    seen = []
    calls = itertools.count()  # the first is a validation

    def score(responses, letter):
        return reward(next(calls), responses, letter)

    with pytest.raises(UserError, match=r"(?s)RuntimeError: it broke .*Step 4 of 5 is saved"):
        training.rl.run(
            config,
            module,
            module.Config(**METHODS[name]),
            reward=score,
            on_step=lambda step, state, *more: seen.append(jax.device_get(state.train.params)),
        )
    assert len(seen) == 4
    return seen


def friendly(call, responses, letter):
    scores = [float((i + call) % 2) for i in range(len(responses))]
    if call == 5:
        raise RuntimeError("it broke")
    if call == 2:
        scores[0] = None
    if call == 4:
        scores = [None] * len(scores)
    costs = [None if score is None else i % 3 / 4 for i, score in enumerate(scores)]
    return scores, {"cost": costs}


def hostile(call, responses, letter):
    """The same, in other types, with other components, and with changes of what is not its own."""
    kinds = (np.float16, Decimal, np.bool_, np.array, Fraction, np.int8, jnp.float32, np.longdouble)
    scores, parts = friendly(call, responses, letter)
    if call == 1:
        scores = [kind(score) for kind, score in zip(itertools.cycle(kinds), scores)]
    if call in (2, 3):
        parts |= {f"part of {call}": [1.0] * len(scores)}
    if call == 3:
        responses.clear()
        letter.clear()
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
    return scores, parts


@pytest.mark.parametrize("name", [x if x == "rloo" else slow(x) for x in METHODS])
def test_what_a_hostile_reward_says_and_does_moves_no_bit(name, tmp_path):
    expected = run_with(name, tmp_path / "friendly", friendly)
    for step, params in enumerate(run_with(name, tmp_path / "hostile", hostile)):
        jax.tree.map(assert_array_equal, params, expected[step])
    assert any(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, *expected[:2]))))


@pytest.mark.parametrize(
    ("name", "scores", "said"),
    [
        (
            "curriculum",
            (2.0, 0.5),
            r"4 of 8 scores are outside of 0 to 1, .* curriculum .* 2\.0 for",
        ),
        slow("spo", (-1.0, 0.0), r"4 of 8 scores are outside of 0 to 1, .* spo .* -1\.0 for"),
        slow("ppo", (1e20, 0.0), r"4 of 8 scores are outside of -1e\+15 to 1e\+15, .* 1e\+20 for"),
        slow("rloo", (0.0, -1e20), r"4 of 8 scores are .* -1e\+20 for .*prompts\.json, row"),
        slow("maxrl", (0.0, -2.0), r"4 of 8 scores are outside of 0 to 1e\+15, .* -2\.0 for"),
        slow("nash_md", (3.0, -1.0), r"8 of 8 scores are outside of 0 to 1, .* nash_md needs"),
    ],
)
def test_scores_that_a_method_cannot_read_are_named_and_not_the_rate(name, scores, said, tmp_path):
    module = importlib.import_module(f"rlhf_jax.algorithms.{name}")
    config = with_rl(letters_run(tmp_path), batch_size=8, num_iterations=2)
    with pytest.raises(TrainingFault, match=f"not finite at step 1.*{said}") as fault:
        training.rl.run(
            config,
            module,
            module.Config(**METHODS[name]),
            reward=lambda responses: [scores[i % 2] for i in range(len(responses))],
        )
    assert "rate" not in str(fault.value)


def test_scores_that_a_method_reads_are_no_cause():
    rows = [Row("ab", (), f"file, line {i}") for i in range(3)]
    prompts = EncodedPrompts(None, None, rows, (), {})
    cost = safe_rlhf.Config(group_size=3)
    for own, scores, costs, said in (
        (spo.Config(), [0.0, 1.0, 0.5], [2e15] * 3, ""),
        (
            spo.Config(),
            [0.0, -0.25, 2.0],
            [0.0] * 3,
            "2 of 3 scores .* spo .* -0.25 for file, line 0",
        ),
        (grpo.Config(), [-1e15, 2.0, 1e15], [2e15] * 3, ""),
        (grpo.Config(), [0.0, 0.0, 2e15], [0.0] * 3, r"1 of 3 .*: 2e\+15 for file, line 1"),
        (cost, [0.0] * 3, [math.nan, 0.0, 0.0], ""),
        (cost, [0.0] * 3, [-2e15, math.nan, 0.0], r"1 of 3 cost .*: -2e\+15 for file, line 2"),
    ):
        job = rl_job(own=own, inputs={"prompts": prompts}, run=SimpleNamespace(name="spo"))
        extras = {"cost": jnp.array(costs)}
        scored = rollout(texts="eee").replace(
            scores=jnp.array(scores), row_ids=np.array([2, 0, 1]), extras=extras
        )
        found = unfit_scores(job, scored)()
        assert re.search(said, found)
        assert bool(found) == bool(said)
