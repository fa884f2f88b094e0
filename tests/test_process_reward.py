"""Process reward models: labels of steps as data, their loss, the stage, dense rewards of steps in
RL, and the advantages of steps in GRPO.
"""

import functools
import json
from dataclasses import replace

import chat_templates
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from builders import (
    LETTERS,
    goes_on_alike,
    initial_params,
    json_lines,
    letters_run,
    metric_rows,
    perturbed,
    with_rl,
)
from numpy.testing import assert_allclose, assert_array_equal
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from rlhf_jax import TrainState, gradient_step, grpo, models, reward_model, rewards, training
from rlhf_jax.cli.stages import find_algorithm
from rlhf_jax.config import Compute, RewardModelStage
from rlhf_jax.data import batches, encoding, formats
from rlhf_jax.data.tokenizers import characters, load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import bench
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.models import hf
from rlhf_jax.training.common import reward_models
from rlhf_jax.types import Comparisons, Demonstrations, Rollout

SUM = {"prompt": "1+2?", "completions": ["a=1", "a+2=3", "3"], "labels": [True, False, 1]}


# --- Data


def solutions(write, *rows, tokenizer, **settings):
    found = formats.read("solutions", write(list(rows)))
    return encoding.encode_texts(found.rows, tokenizer, **settings)


def marked(tokenizer, encoded, row=0):
    """(the text up to the token, its mark) of each token of a row that has one."""
    batch = batches.demonstration_batch(encoded, np.array([row]), 1)
    [tokens], [marks] = np.asarray(batch.tokens), np.asarray(batch.response_mask)
    return [(tokenizer.decode(tokens[: i + 1].tolist()), marks[i]) for i in np.flatnonzero(marks)]


def merging(folder, text):
    """A tokenizer with tokens across newlines, as it has no words."""
    backend = Backend(BPE())
    backend.decoder = Fuse()
    special = ["<|endoftext|>"]
    backend.train_from_iterator([text] * 9, BpeTrainer(vocab_size=40, special_tokens=special))
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def test_a_label_stands_where_its_step_ends(tmp_path, write):
    """Also with a tokenizer that has tokens across the ends of steps."""
    text = "one.\ntwo.\nthree."
    tokenizer = merging(tmp_path, f"count:{text}")
    assert any("\n" in tokenizer.decode([i])[:-1] for i in tokenizer.encode(text))
    row = {"prompt": "count", "steps": text.split("\n"), "labels": ["true", 0, "1"]}
    other = {"prompt": "count", "steps": ["two."], "labels": [False]}
    encoded = solutions(write, row, other, tokenizer=tokenizer, template="{prompt}:")
    ends = [("count:one.\n", 2), ("count:one.\ntwo.\n", 1), (f"count:{text}", 2)]
    assert marked(tokenizer, encoded) == ends
    assert marked(tokenizer, encoded, 1) == [("count:two.", 1)]
    assert encoded.tokens[0][0][-1] == tokenizer.eos_id
    packed = batches.packed_batch(encoded, np.array([1, 0]), width=40)
    for document, row in enumerate([0, 1], 1):  # the longest first
        alone = batches.demonstration_batch(encoded, np.array([row]), 1)
        place = packed.attention_mask == document
        assert_array_equal(packed.tokens[place], alone.tokens[0])
        assert_array_equal(packed.response_mask[place], alone.response_mask[0])


def test_in_a_chat_template_the_last_step_ends_with_the_turn(tmp_path, write):
    chat_templates.write(tmp_path, "chatml")
    tokenizer = load_tokenizer(tmp_path)
    encoded = solutions(write, SUM, tokenizer=tokenizer, template="auto")
    batch = batches.demonstration_batch(encoded, np.array([0]), 1)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert batch.tokens[0, -1] == end != tokenizer.eos_id
    assert batch.response_mask[0, -1] == 2
    whole = tokenizer.backend.decode(batch.tokens[0].tolist(), skip_special_tokens=False)
    assert whole.endswith("<|im_start|>assistant\na=1\na+2=3\n3<|im_end|>")


def test_an_answer_with_one_label_is_one_step(write):
    tokenizer = characters("abcdefgh 123+=?\n")
    row = {"prompt": "1+2?", "completion": "a=1\n3", "label": False}
    encoded = solutions(write, row, tokenizer=tokenizer)
    assert marked(tokenizer, encoded) == [("1+2?a=1\n3", 1)]


def test_steps_that_do_not_fit_are_cut_whole(write):
    tokenizer = characters("abcdefgh 123+=?\n")
    with pytest.raises(UserError, match="line 1: a prompt of 4 and a response of 12 tokens"):
        solutions(write, SUM, tokenizer=tokenizer, max_length=15)
    encoded = solutions(write, SUM, tokenizer=tokenizer, max_length=15, too_long="truncate")
    assert marked(tokenizer, encoded) == [("1+2?a=1\n", 2), ("1+2?a=1\na+2=3\n", 1)]
    assert encoded.counts == {encoding.STEPS_CUT: 1}
    short = {"prompt": "b", "steps": ["c"], "labels": [0]}
    encoded = solutions(write, SUM, short, tokenizer=tokenizer, max_length=7, too_long="truncate")
    assert encoded.counts == {encoding.NO_ROOM: 1}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"labels": [True, False]}, "has 3 steps and 2 labels"),
        ({"completions": [], "labels": []}, "'steps' must be a list, found an empty list"),
        ({"completions": "a=1"}, "'steps' must be a list, found a string"),
        ({"labels": True}, "'labels' must be a list, found true or false"),
        ({"labels": [True, None, True]}, "label 1 must be true or false, or 1 or 0, found null"),
        ({"labels": [1, 2, 1]}, "label 1 must be true or false, or 1 or 0, found the number 2"),
        ({"completions": ["a", 1, "b"]}, "step 1 must be a text, found the number 1"),
        ({"completions": ["a", " ", "b"]}, "step 1 must be a text"),
        ({"completions": ["a", "\ud83d", "b"]}, "step 1 holds half of a surrogate pair"),
    ],
)
def test_a_row_that_is_no_solution_is_named(changes, what, write):
    with pytest.raises(UserError, match=f"line 1: {what}"):
        formats.read("solutions", write([SUM | changes]))


def test_a_prompt_of_messages_and_of_rl(write):
    asked = [{"role": "user", "content": "1+2?"}]
    [row] = formats.read("solutions", write([SUM | {"prompt": asked}])).rows
    assert row.messages == asked
    assert row.steps == ("a=1\n", "a+2=3\n", "3")
    assert row.labels == (True, False, True)
    [row] = formats.read("prompts", write([SUM])).rows
    assert (row.prompt, row.columns["labels"]) == ("1+2?", SUM["labels"])


@pytest.mark.parametrize("kind", ["demonstrations", "comparisons", "pairs", "feedback"])
def test_other_stages_name_the_setting(kind, write):
    with pytest.raises(UserError, match=r"reward_model\.steps"):
        formats.read(kind, write([SUM]))


# --- Loss


def loss_of(scores, marks):
    batch = Demonstrations(jnp.zeros_like(marks), jnp.ones_like(marks), marks)
    return reward_model.loss(
        scores, batch, None, score_fn=lambda params, *_: params, config=reward_model.Config()
    )


def test_loss_gradient_and_accuracy_are_those_of_trl():
    """TRL 1.13's PRMTrainer (the last that had it) on a LlamaForTokenClassification with random
    weights, of SUM and {prompt: "b?", completions: ["b"], labels: [false]}: loss =
    trainer.compute_loss(model, batch), logits.grad[..., 1] and trainer.compute_metrics. Its two
    labels' softmax is the sigmoid of the difference of the logits, which is our score.
    """
    scores = np.zeros((2, 16), np.float32)
    marks = np.zeros((2, 16), np.int32)
    places = ([0, 0, 0, 1], [7, 13, 15, 15])
    scores[places] = [2.4093924, 3.0165546, 3.2187829, -1.651996]
    marks[places] = [2, 1, 2, 1]
    gradients, (mean, metrics) = jax.grad(
        lambda scores: (loss_of(scores, marks)[0].value, loss_of(scores, marks)), has_aux=True
    )(jnp.asarray(scores))
    assert mean.value == pytest.approx(0.8412497043609619, abs=1e-6)
    assert metrics["reward_model/loss"].value == mean.value
    assert metrics["reward_model/accuracy"].value == 0.75
    expected = np.zeros_like(scores)
    expected[places] = [-0.0206148177, 0.2383291125, -0.0096162558, 0.0402098410]
    assert_allclose(gradients, expected, atol=1e-6)


def test_only_ends_count_and_microbatches_change_nothing():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 6))
    marks = rng.integers(0, 3, (4, 6))
    marks[3] = 0  # a missing row
    right = 1 / (1 + np.exp(-scores))
    each = -np.where(marks == 2, np.log(right), np.log(1 - right))[marks != 0]
    spoilt = np.where(marks == 0, np.nan, scores)
    assert loss_of(jnp.asarray(spoilt), marks)[0].value == pytest.approx(each.mean(), abs=1e-6)
    gradients = jax.grad(lambda scores: loss_of(scores, marks)[0].value)(jnp.asarray(spoilt))
    assert_array_equal(gradients[marks == 0], 0)
    assert loss_of(jnp.zeros((4, 6)), marks)[1]["reward_model/accuracy"].value == 0.5
    batch = Demonstrations(jnp.arange(24).reshape(4, 6), jnp.ones((4, 6)), jnp.asarray(marks))
    optimizer = optax.sgd(1.0)
    state = TrainState.create(jnp.asarray(scores).reshape(-1), optimizer)
    how = {"score_fn": lambda params, tokens, *_: params[tokens], "optimizer": optimizer}
    for parts in (1, 4):
        config = reward_model.Config(num_microbatches=parts)
        after, metrics = reward_model.update(state, batch, None, config=config, **how)
        assert metrics["loss"] == pytest.approx(each.mean(), abs=1e-6)
        expected = np.where(marks == 2, right - 1, right) * (marks != 0) / len(each)
        assert_allclose(scores - after.params.reshape(4, 6), expected, atol=1e-6)


def test_the_mask_of_sft_marks_no_steps():
    """Each token of a response, where only the last of each step is one. A step may have one token:
    what one response of several shows is no mask of SFT.
    """
    with pytest.raises(ValueError, match=r"response_mask marks whole responses.*2 if .*right"):
        loss_of(jnp.zeros((2, 4)), np.array([[0, 1, 1, 1], [0, 0, 1, 1]]))
    right = [[0, 1, 1, 2], [0, 0, 1, 1]]
    one_token = [[0, 1, 1, 0], [1, 0, 1, 0]]
    one_step = [[0, 0, 1, 0], [0, 0, 0, 1]]
    for marks in ([[0, 1, 0, 1], [0, 0, 1, 0]], right, one_token, one_step, [[0] * 4] * 2):
        loss_of(jnp.zeros((2, 4)), np.array(marks))
    with pytest.raises(ValueError, match=r"response_mask marks whole responses"):
        loss_of(jnp.zeros((2, 4)), np.array([[0, 1, 1, 1], [0, 0, 1, 0]]))


@pytest.mark.parametrize("at_tokens", [False, True])
def test_steps_are_scored_at_their_tokens_and_answers_are_not(at_tokens):
    marks = np.array([[0, 0, 2, 0], [0, 1, 0, 1]])
    steps = Demonstrations(marks, np.ones_like(marks), marks)
    answers = Comparisons(*(jnp.stack([x, x], axis=1) for x in vars(steps).values()))
    model = small()
    params = models.add_head(jax.random.key(1), initial_params(model), "score")
    score_fn = models.score_fn(model, at_tokens=at_tokens)
    for batch, is_right in ((steps, at_tokens), (answers, not at_tokens)):
        score = functools.partial(reward_model.answer_scores, score_fn, params, batch)
        if is_right:
            assert jax.eval_shape(score).shape == ((2, 4) if at_tokens else (2, 2))
        else:
            with pytest.raises(ValueError, match=r"Demonstrations .* at_tokens=True.*Comparisons"):
                jax.eval_shape(score)


def small(vocab_size=32):
    return models.build(models.GPT2Config(vocab_size, 16, 8, 1, 2))


def scores_up_to(columns, model, params, tokens, mask):
    """The scores of the texts that end with each of these columns."""
    score = jax.jit(models.score_fn(model))
    masks = [np.where(np.arange(mask.shape[1]) <= last, mask, 0) for last in columns]
    return np.stack([score(params, tokens, part) for part in masks])


def test_the_score_of_a_token_is_that_of_the_text_up_to_it():
    model = small()
    params = models.add_head(jax.random.key(1), perturbed(initial_params(model)), "score")
    params["score"] |= {"gain": jnp.float32(2.0), "shift": jnp.float32(-0.5)}
    tokens = np.random.default_rng(0).integers(0, 32, (2, 7))
    mask = np.ones_like(tokens)
    mask[1, :2] = 0
    at_tokens = jax.jit(models.score_fn(model, at_tokens=True))
    of_tokens = at_tokens(params, tokens, mask)
    assert_array_equal(of_tokens[1, :2], 0)
    alone = scores_up_to(range(2, 7), model, params, tokens, mask)
    assert_allclose(of_tokens[:, 2:].T, alone, atol=1e-5)
    documents = np.where(np.arange(7) < 3, 1, 2)
    packed = at_tokens(params, tokens, np.stack([documents] * 2))
    second = at_tokens(params, np.roll(tokens, -3, axis=1), np.stack([documents[::-1] == 2] * 2))
    assert_allclose(packed[:, 3:], second[:, :4], atol=1e-5)


@pytest.mark.parity
def test_every_gradient_is_that_of_torch(tmp_path):
    """A classifier of transformers whose head reads every token."""
    import torch
    from torch_models import assert_gradients_equal, torch_model

    theirs = torch_model("Llama", "classifier", num_labels=1)
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 20, (3, 9))
    marks = rng.integers(0, 3, (3, 9))
    logits = theirs.score(theirs.model(torch.tensor(tokens)).last_hidden_state)[..., 0]
    ends, right = torch.tensor(marks != 0), torch.tensor(marks == 2)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = cross_entropy(logits[ends], right[ends].float())
    expected.backward()
    batch = Demonstrations(jnp.asarray(tokens), jnp.ones((3, 9)), jnp.asarray(marks))
    how = {"score_fn": models.score_fn(model, at_tokens=True), "config": reward_model.Config()}
    mean, gradients = jax.value_and_grad(
        lambda params: reward_model.loss(params, batch, None, **how)[0].value
    )(params)
    assert mean == pytest.approx(expected.item(), abs=1e-6)
    assert_gradients_equal(model, gradients, theirs)


# --- Rewards of steps


def sampled(*rows, width):
    """Responses of these tokens behind a prompt of one."""
    tokens = np.zeros((len(rows), 1 + width), np.int32)
    mask = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, 1 : 1 + len(row)] = row
        mask[i, 1 : 1 + len(row)] = 1
    whole = mask.copy()
    whole[:, 0] = 1
    return Rollout(*map(jnp.asarray, (tokens, whole, mask, np.zeros(tokens.shape, np.float32))))


def test_a_step_has_the_probability_of_its_end_as_reward():
    """Token 2 is a newline, 3 a token with one in it, 1 ends a response."""
    batch = sampled([5, 2, 6, 3, 2, 7, 1], [5, 6, 2, 1], [2, 5], [], width=7)
    ends = jnp.isin(jnp.arange(9), jnp.array([1, 2, 3]))
    table = np.linspace(-2, 2, 9).astype(np.float32)
    fn = rewards.from_steps(lambda params, tokens, *_: params[tokens], jnp.asarray(table), ends)
    dense, parts = jax.jit(lambda fn, batch: fn(batch))(fn, batch)
    places = ([0, 0, 0, 1, 2, 2], [2, 5, 7, 4, 1, 2])
    expected = np.zeros((4, 8))
    expected[places] = 1
    assert_array_equal(parts["step_end"], expected)
    expected[places] = 1 / (1 + np.exp(-table[[2, 2, 1, 1, 2, 5]]))
    assert_allclose(dense, expected, atol=1e-6)
    other = rewards.from_steps(lambda params, tokens, *_: -params[tokens], jnp.asarray(table), ends)
    lowest, _ = rewards.ensemble([fn, other], "min")(batch)
    assert_allclose(lowest[places], np.minimum(expected, 1 - expected)[places], atol=1e-6)
    _, parts = rewards.weighted({"prm": (fn, 2.0), "length": (rewards.length(), 1.0)})(batch)
    assert_array_equal(parts["prm/step_end"], fn(batch)[1]["step_end"])


def write_policy(folder):
    """A policy that often writes newlines."""
    tokenizer = characters("yesno \n" + LETTERS)
    sizes = models.GPT2Config(tokenizer.vocab_size, 16, 8, 1, 1, initializer_range=0.5)
    model = models.build(sizes)
    LanguageModel(model, model.init(jax.random.key(0)), tokenizer).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The settings of a process reward model of a policy, whose steps "no" are wrong, and its
    run.
    """
    folder = tmp_path_factory.mktemp("stage")
    steps = [["yes", "no"], ["no"], ["yes"], ["no", "yes"]]
    rows = [{"prompt": f"say {c}", "steps": steps[i % 4]} for i, c in enumerate(LETTERS)]
    rows = [row | {"labels": [step == "yes" for step in row["steps"]]} for row in rows]
    (folder / "steps.json").write_text(json.dumps(rows))
    config = letters_run(folder)
    settings = replace(
        config.reward_model, data=(str(folder / "steps.json"),), steps=True, num_epochs=4
    )
    optimizer = replace(settings.optimizer, learning_rate=3e-2)
    config = replace(
        config,
        model=write_policy(folder / "policy"),
        reward=(),
        checkpoint_interval=4,
        reward_model=replace(settings, optimizer=optimizer, validation_interval=4),
    )
    return config, training.reward_model.run(config)


def test_the_stage_learns_the_labels_and_says_what_it_scores(stage):
    _, result = stage
    rows = metric_rows(result.folder)
    last = rows[-1]
    assert last["reward_model/accuracy"] == 1
    samples = json_lines(result.folder / "samples.jsonl")[-4:]
    signed = []
    for sample in samples:
        assert sample["labels"] == [step == "yes" for step in sample["response"].split("\n")]
        assert sample["target"] == all(sample["labels"])
        logits = np.array(sample["scores"])
        assert sample["score"] == pytest.approx(np.prod(1 / (1 + np.exp(-logits))), rel=1e-5)
        signed += np.where(sample["labels"], logits, -logits).tolist()
    assert last["validation/loss"] == pytest.approx(np.log1p(np.exp(-np.array(signed))).mean())
    assert last["validation/accuracy"] == pytest.approx(np.mean(np.array(signed) > 0))
    share = np.mean([label for sample in samples for label in sample["labels"]])
    assert last["validation/majority_accuracy"] == pytest.approx(max(share, 1 - share))
    read = json.loads((result.model_folder / "config.json").read_text("utf-8"))
    assert read["score_position"] == hf.STEP_ENDS


def test_its_folder_is_a_reward_of_steps(stage):
    _, result = stage
    model, params, tokenizer = LanguageModel.load(result.model_folder)
    load = {"source": str(result.model_folder), "compute": Compute()}
    loaded = reward_models.load_reward_model(**load, policy=tokenizer.fingerprint)
    newline = tokenizer.encode("\n")[0]
    assert np.flatnonzero(loaded.ends).tolist() == sorted([newline, tokenizer.eos_id])
    batch = sampled([*tokenizer.encode("yes\nno"), tokenizer.eos_id], width=8)
    fn = rewards.from_steps(*loaded[:2], jnp.asarray(loaded.ends))
    dense, _ = jax.jit(lambda fn, batch: fn(batch))(fn, batch)
    scores = scores_up_to((4, 7), model, params, batch.tokens, batch.attention_mask)
    assert_allclose(dense[:, [4, 7]].T, jax.nn.sigmoid(scores), atol=1e-5)
    assert dense.sum() == pytest.approx(float(dense[0, 4] + dense[0, 7]))
    assert_allclose(bench.score(spec.Reward(fn=fn), batch, {}, 1), dense.sum(axis=1))
    with pytest.raises(UserError, match="needs the tokenizer of the policy"):
        reward_models.load_reward_model(**load, policy="another")


def test_the_position_of_a_folder_is_one_that_is_known(stage, tmp_path):
    model, params, tokenizer = LanguageModel.load(stage[1].model_folder)
    LanguageModel(model, params, tokenizer).save(tmp_path)  # trained on as another reward model
    file = tmp_path / "config.json"
    keys = json.loads(file.read_text("utf-8"))
    assert keys["score_position"] == hf.END_OF_TURN
    file.write_text(json.dumps(keys | {"score_position": "anywhere"}))
    with pytest.raises(UserError, match="score_position is 'anywhere', expected one of"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("name", ["centering", "sft_coef", "ensemble_size"])
def test_settings_of_comparisons_are_refused(name):
    with pytest.raises(ValueError, match=r"^steps: leave out"):
        RewardModelStage(steps=True, **{name: 2})


@pytest.mark.slow
def test_the_stage_resumes_to_the_same_bytes(stage):
    goes_on_alike(training.reward_model.run, *stage)


def rl_config(stage, folder):
    config, result = stage
    config = with_rl(config, num_iterations=4, max_new_tokens=8, validation_interval=9)
    return replace(
        config,
        reward=(str(result.model_folder),),
        output_dir=str(folder / "run"),
        checkpoint_interval=2,
        grpo=grpo.Config(group_size=2, step_end="step_end", kl_loss_coef=0.0),
    )


def test_a_run_of_grpo_reads_the_rewards_of_steps(stage, tmp_path):
    seen = []
    config = with_rl(rl_config(stage, tmp_path), num_iterations=1)
    own = config.grpo
    training.rl.run(
        config, grpo, on_step=lambda step, state, row, batch: seen.append(jax.device_get(batch))
    )
    [batch] = seen
    ends = batch.extras["step_end"]
    assert ends.sum(axis=1).max() > 1  # several steps
    assert_array_equal(ends != 0, batch.rewards != 0)
    assert np.all((batch.rewards[ends != 0] > 0) & (batch.rewards[ends != 0] < 1))
    assert_allclose(
        grpo.prepare(batch, config=own).advantages, advantages_of(batch, own), atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_runs_with_rewards_of_steps_resume_to_the_same_bytes(name, stage, tmp_path):
    config = rl_config(stage, tmp_path)

    def run(config):
        return training.rl.run(config, find_algorithm(name))

    goes_on_alike(run, config, run(config))


# --- Advantages of steps


def advantages_of(batch, config):
    """As section 4.1.3 of Shao et al. (2024) says it: loops over groups, steps and tokens."""
    mask = np.asarray(batch.response_mask) != 0
    given = np.asarray(batch.rewards, np.float64)
    ends = np.asarray(batch.extras[config.step_end]) != 0
    advantages = np.zeros(mask.shape)
    for start in range(0, len(mask), config.group_size):
        group = range(start, start + config.group_size)
        steps = []  # (row, last column, reward)
        for row in group:
            sum_of_step = 0.0
            columns = np.flatnonzero(mask[row])
            for column in columns:
                sum_of_step += given[row, column]
                if ends[row, column] or column == columns[-1]:
                    steps.append((row, column, sum_of_step))
                    sum_of_step = 0.0
        found = np.array([reward for _, _, reward in steps])
        if len(found) < 2:
            continue
        std = found.std(ddof=1) + config.eps if config.scale else 1.0
        for row, last, reward in steps:
            for column in np.flatnonzero(mask[row]):
                if column <= last:
                    advantages[row, column] += (reward - found.mean()) / std
    return advantages


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_of_steps(scale):
    rng = np.random.default_rng(1)
    batch = sampled(*([4] * length for length in (7, 4, 5, 1, 3, 0)), width=7)
    shape = batch.tokens.shape
    step_end = rng.integers(0, 2, shape).astype(np.float32)
    batch = replace(
        batch,
        rewards=jnp.asarray(rng.normal(size=shape), jnp.float32),  # also where no step ends
        extras={"prm/step_end": jnp.asarray(step_end)},
        dense=True,
    )
    config = grpo.Config(group_size=3, step_end="prm/step_end", scale=scale)
    assert config.extras == {"prm/step_end": "token"}
    assert grpo.Config().extras == {}
    prepared = grpo.prepare(batch, config=config)
    assert_allclose(prepared.advantages, advantages_of(batch, config), atol=2e-5)
    one = replace(batch, rewards=batch.rewards.at[:3].set(0.5 * step_end[:3] * batch.mask[:3]))
    at_ends = replace(one, extras={"prm/step_end": one.extras["prm/step_end"] * (one.rewards != 0)})
    assert_allclose(
        grpo.prepare(at_ends, config=config).advantages, advantages_of(at_ends, config), atol=2e-5
    )
    with pytest.raises(ValueError, match=r"prm/step_end.*is needed"):
        grpo.prepare(replace(batch, extras=None), config=config)
    with pytest.raises(ValueError, match="advantages is given"):
        grpo.prepare(prepared, config=config)


def test_an_update_learns_from_the_advantages_of_steps():
    """Its step is that of the token losses with the advantages of the loops."""
    batch = tabular.in_groups(tabular.rollout(0, (4, 2, 3, 4)), 2)
    unset = dict.fromkeys(("scores", "advantages", "returns", "importance_weights"))
    ends = np.random.default_rng(0).integers(0, 2, batch.tokens.shape)
    batch = replace(batch, extras={"step_end": jnp.asarray(ends, jnp.float32)}, dense=True, **unset)
    config = grpo.Config(group_size=2, step_end="step_end", kl_loss_coef=0.0)
    optimizer = optax.sgd(1.0)
    state = TrainState.create(tabular.policy_params(0), optimizer)
    how = {"policy_fn": tabular.policy_fn, "config": config}
    after, _ = grpo.update(state, batch, jax.random.key(0), optimizer=optimizer, **how)
    ready = replace(batch, advantages=jnp.asarray(advantages_of(batch, config), jnp.float32))
    expected, _ = gradient_step(
        lambda params, part, key: grpo.loss(params, part, key, **how),
        state,
        optimizer,
        batch=ready,
        key=jax.random.key(0),
    )
    assert float(jnp.abs(expected.params["logits"] - state.params["logits"]).max()) > 1e-3
    assert_allclose(after.params["logits"], expected.params["logits"], atol=1e-6)
