"""Greedy answers to held-out prompts at the validations of SFT, DPO and KTO."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import LETTERS, initial_params, json_lines, letters_run, perturbed, save_base

from rlhf_jax import models, training
from rlhf_jax.config import Answering, LoRA, Optimizer
from rlhf_jax.data import encoding, tokenizers
from rlhf_jax.data.rows import Row
from rlhf_jax.generation import generator
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.references import Followed
from rlhf_jax.training.supervised import samples
from rlhf_jax.types import PolicyOutput, TrainState

TOKENIZER = tokenizers.characters("abcdefgh? ")
MOST = Answering(validation_prompts=9, max_new_tokens=3)


def encode(rows):
    return encoding.encode_texts(rows, TOKENIZER)


def shown(encoded, settings=MOST, room=4, held_out=None, **options):
    if held_out is None:
        held_out = np.arange(len(encoded))
    asked = samples.questions(encoded, held_out, TOKENIZER, settings, room, **options)
    assert [TOKENIZER.decode(question.ids) for question in asked] == [
        question.shown["prompt"] for question in asked
    ]
    return [tuple(question.shown.values())[1:] for question in asked], [
        question.shown["prompt"] for question in asked
    ]


def test_the_chosen_answers_of_different_prompts_that_leave_room():
    pairs = [("a?", "b", "c"), ("a?", "d", "e"), ("abcd?", "b", "c"), ("d?", "f", "g")]
    pairs += [("e?", "f", "g"), ("f?", "h", "g")]
    rows = [Row(p, (bad, good), f"line {i}", best=1) for i, (p, good, bad) in enumerate(pairs)]
    encoded = encode(rows)
    # The second "a?" is no other prompt; "abcd?" has 5 tokens, and the room is of 4.
    answers = [("b",), ("f",), ("f",), ("h",)]
    assert shown(encoded) == (answers, ["a?", "d?", "e?", "f?"])
    few = replace(MOST, validation_prompts=2)
    assert shown(encoded, few) == ([("b",), ("h",)], ["a?", "f?"])  # evenly spread
    assert shown(encoded, held_out=np.array([1, 4])) == ([("d",), ("f",)], ["a?", "e?"])
    assert shown(encoded, replace(MOST, validation_prompts=0)) == ([], [])


def test_a_prompt_without_room_is_said(capsys):
    encoded = encode([Row("abc", ("d",), "line 1")])
    assert shown(encoded, room=2) == ([], [])
    assert "no prompt of at most 2 tokens" in capsys.readouterr().out


def test_feedback_says_whether_its_answer_is_desirable():
    rows = [Row(f"{c}?", ("a",), c, targets=(target,)) for c, target in (("b", 1.0), ("c", 0.0))]
    assert shown(encode(rows))[0] == [("a", True), ("a", False)]


def test_a_conversation_is_asked_for_its_first_learned_turn():
    ids = tuple(TOKENIZER.encode("abcdefgh"))
    learned = (tuple(c in "cdg" for c in "cdefgh"),)
    encoded = encode([Row(ids[:2], (ids[2:],), "line 1", learned=learned)])
    assert shown(encoded) == ([("cd",)], ["ab"])
    learned = (tuple(c in "gh" for c in "cdefgh"),)  # the prompt has the turns before
    encoded = encode([Row(ids[:2], (ids[2:],), "line 1", learned=learned)])
    assert shown(encoded, room=6) == ([("gh",)], ["abcdef"])


def test_a_plain_text_is_asked_to_go_on_behind_its_first_tokens():
    ids = tuple(TOKENIZER.encode(40 * "a" + "bcdefgh"))
    encoded = encode([Row(ids[:1], (ids[1:],), "piece 1"), Row(ids[40:41], (ids[41:],), "2")])
    answers, prompts = shown(encoded, room=16, are_pieces=True)
    assert (answers, prompts) == ([("aaa",), ("efg",)], [16 * "a", "bcd"])


def test_the_log_ratio_by_hand():
    """The policy gives each token its parameter times the number of its document, the reference
    another parameter times it.
    """
    mask = np.array([[0, 1, 0, 0], [0, 0, 1, 1]])  # the response of a row, and its prompt:
    attended = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    begun = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(num_layers=1)))

    def policy_fn(params, tokens, attention_mask, key):
        return PolicyOutput(params["w"] * attention_mask, None)

    def ratios(state, reference, num_answers):
        policy = samples.Policy(begun, Trainable(state.params), policy_fn, reference, num_answers)
        return samples.compile_log_ratios(LAYOUT, policy)(state, (mask, attended, mask)).tolist()

    fixed = jax.tree_util.Partial(policy_fn, {"w": 1.0})
    state = TrainState(jnp.int32(0), {"w": 3.0}, ())
    assert ratios(state, fixed, 0) == [2.0, 4.0]
    assert ratios(state, fixed, 2) == [4.0, 8.0]  # a response is its prompt's second document
    followed = Followed(jnp.int32(0), {"w": 3.0}, (), {"w": 2.5})
    assert ratios(followed, jax.tree_util.Partial(policy_fn), 0) == [0.5, 1.0]
    nothing = samples.Policy(begun, Trainable(state.params), policy_fn, None, num_answers=2)
    assert samples.compile_log_ratios(LAYOUT, nothing) is None


ASKED = ("ab", "cd", "ef")
PAIRS = sharding.make_mesh(data=2)
LAYOUT = SimpleNamespace(
    num_parts=2,  # three rows do not divide: a fourth one is missing
    shard=lambda rows: sharding.shard_rows(PAIRS, rows),
    jit=lambda program, num_blocks=0: jax.jit(program),
    row_mesh=None,
)
RUN = SimpleNamespace(layout=LAYOUT, key=lambda stream: jax.random.key(0))


def network():
    """A random network with random adapters: model, base, adapters."""
    special = {"pad_token_id": TOKENIZER.pad_id, "eos_token_id": TOKENIZER.eos_id}
    sizes = {"max_length": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = models.build(models.GPT2Config(12, **sizes, **special))
    base = jax.tree.map(lambda leaf: 9 * np.asarray(leaf), initial_params(model))
    return model, base, perturbed(models.lora.init(jax.random.key(5), base, 2))


def test_the_answers_are_greedy_and_compared_with_the_reference():
    """Each token is the likeliest one behind those before; the log-ratio is that of one forward
    pass of each network.
    """
    model, base, adapters = network()
    policy_fn = models.policy_fn(model)
    reference = jax.tree_util.Partial(policy_fn, base)
    begun = LanguageModel(model, base, TOKENIZER)
    policy = samples.Policy(begun, Trainable(adapters, base), policy_fn, reference, num_answers=0)
    asked = [samples.Question(TOKENIZER.encode(text), {"prompt": text}) for text in ASKED]
    rows = samples.answerer(RUN, MOST, asked, policy)(TrainState(jnp.int32(0), adapters, ()))
    assert [row["prompt"] for row in rows] == list(ASKED)
    said = [TOKENIZER.encode(row["response"]) for row in rows]
    ids = jnp.array([question.ids + own for question, own in zip(asked, said, strict=True)])
    merged = models.lora.merge(base, adapters)
    logits = jax.jit(model.apply)(merged, ids)
    assert len({row["response"] for row in rows}) > 1
    assert jnp.argmax(logits, axis=-1)[:, 1:-1].tolist() == said
    judged = jax.jit(policy_fn)
    log_probs, of_base = (
        judged(params, ids, jnp.ones_like(ids)).log_probs for params in (merged, base)
    )
    expected = np.sum(log_probs - of_base, axis=1, where=np.arange(5) > 1)
    assert np.abs(expected).min() > 0.1
    np.testing.assert_allclose([row["log_ratio"] for row in rows], expected, atol=1e-3)


def greedy(policy, texts):
    """Four tokens of each answer at most."""
    prompts = [Row(text, (), "p") for text in texts]
    encoded = encoding.encode_prompts(prompts, policy.tokenizer, template="{prompt}")
    ends = {"eos_id": policy.tokenizer.eos_ids, "pad_id": policy.tokenizer.pad_id}
    how = SamplingConfig(max_new_tokens=4, temperature=0.0, **ends)
    rollout, _ = policy.respond(encoded, jax.random.key(0), config=how)
    return rollout


@pytest.mark.slow
def test_a_run_writes_what_its_models_say(config, data, tmp_path):
    """DPO with adapters, whose batches share prompts: the rows of the last step are the greedy
    answers of the saved model, with the log-ratio of both models.
    """
    base = save_base(tmp_path / "base", data)
    how = {"validation_prompts": 3, "max_new_tokens": 4, "max_steps": 3, "validation_interval": 3}
    stage = replace(config.dpo, **how, optimizer=Optimizer(learning_rate=0.1))
    config = replace(config, model=str(base), dpo=stage, lora=LoRA(rank=2))
    straight = training.dpo.run(config)
    rows = json_lines(straight.folder / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 0, 3, 3, 3]
    assert [row["log_ratio"] for row in rows[:3]] == [0.0, 0.0, 0.0]
    begun, done = (LanguageModel.load(path) for path in (base, straight.model_folder))
    said = greedy(done, [row["prompt"] for row in rows[3:]])
    assert [row["response"] for row in rows[3:]] == generator.responses(said, done.tokenizer)
    text = (said.tokens, said.attention_mask, None)
    policy, reference = (
        models.policy_fn(of.model)(of.params, *text).log_probs for of in (done, begun)
    )
    expected = np.sum(np.where(said.mask, policy - reference, 0.0), axis=1)
    assert np.abs(expected).min() > 0.01
    np.testing.assert_allclose([row["log_ratio"] for row in rows[3:]], expected, atol=1e-3)


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_training_prompts_are_shown_if_nothing_is_held_out(stage, tmp_path):
    config = letters_run(tmp_path)
    own = {"validation_fraction": 0.0, "validation_interval": 1, "max_steps": 2}
    own |= {"max_new_tokens": 2, "validation_prompts": 3} if stage == "sft" else {}
    file = {"sft": "texts", "reward_model": "pairs"}[stage]
    section = replace(getattr(config, stage), **own)
    config = replace(config, data=(str(tmp_path / f"{file}.json"),), **{stage: section})
    rows = json_lines(getattr(training, stage).run(config).folder / "samples.jsonl")
    number = 3 if stage == "sft" else 16
    assert [row["step"] for row in rows] == [0] * number + [2] * number
    assert {row["split"] for row in rows} == {"train"}
    shown = ["say a", "say i", "say p"] if stage == "sft" else [f"say {c}" for c in LETTERS]
    assert [row["prompt"].strip() for row in rows] == shown * 2
    if stage == "sft":
        assert {row["answer"] for row in rows} == {"yes"}
        assert {len(row["response"]) for row in rows} <= {0, 1, 2}
    else:
        assert rows[0]["score_chosen"] != rows[number]["score_chosen"]
