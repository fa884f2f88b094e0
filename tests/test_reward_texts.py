"""Reward models of another tokenizer than the policy's: they read texts, by their own template."""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import chat_families
import jax
import numpy as np
import pytest
from builders import initial_params
from chat_families import ANSWER, SYSTEM, USER
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import models, rewards, rollout, vpg
from rlhf_jax.config import Compute
from rlhf_jax.data import chat, encoding, formats
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters, load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import bench, evaluate
from rlhf_jax.generation import generator
from rlhf_jax.generation.generator import Generator, LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.inference import asking
from rlhf_jax.models import hf
from rlhf_jax.parallel import sharding
from rlhf_jax.training import rl
from rlhf_jax.training.common import reward_models
from rlhf_jax.types import Rollout

POLICY = characters("abcdefghijklmnopqrstuvwxyz <|_>")
SAID = ["hello", "no", "a longer answer than the others"]
ASKED = [[USER], [SYSTEM, USER], [USER, ANSWER, USER]]


def save_judge(folder, family="qwen2.5", max_length=256, seed=0):
    """A small reward model whose tokenizer is the family's; its folder as a text."""
    chat_families.write(folder, family)
    tokenizer = load_tokenizer(folder)
    config = models.GPT2Config(
        vocab_size=tokenizer.vocab_size,
        max_length=max_length,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        pad_token_id=tokenizer.pad_id,
    )
    model = models.build(config)
    params = models.add_head(jax.random.key(seed), initial_params(model, seed), "score")
    models.save(folder, model, jax.tree.map(lambda x: 4 * x if x.ndim == 2 else x, params))
    return str(folder)


def as_of_others(folder):
    """The reward model without our mark of where its score stands."""
    file = Path(folder, "config.json")
    keys = json.loads(file.read_text())
    del keys["score_position"], keys["reward_shift"]
    file.write_text(json.dumps(keys))


def judge_alone(folder, messages, response):
    """The score of one text, without padding on its left."""
    judge = LanguageModel.load(folder)
    ids = encoding.answered_ids(messages, response, judge.tokenizer, "", ends=True)
    tokens = np.full((1, 96), judge.tokenizer.pad_id)
    tokens[0, : len(ids)] = ids
    score = scorer(models.build(judge.model.config))
    return float(score(judge.params, tokens, np.arange(96)[None] < len(ids), None)[0])


@cache
def scorer(model):
    return jax.jit(models.score_fn(model))


def sampled(prompts, said):
    """Responses that ended, of the policy's tokenizer."""
    ids = [[*POLICY.encode(text), POLICY.eos_id] for text in said]
    log_probs = [[0.0] * len(response) for response in ids]
    made = rollout.from_text(prompts, ids, POLICY, log_probs=log_probs)
    return jax.tree.map(np.array, made)


load = partial(reward_models.load_reward_model, compute=Compute(), policy=POLICY.fingerprint)


def build(*entries):
    return spec.build_reward(entries, tokenizer=POLICY, load=load, columns=())


def theirs(folder, messages):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("family", ["qwen2.5", "llama3", "gemma2", "mistral"])
def test_a_whole_conversation_has_the_ids_of_transformers(family, tmp_path):
    chat_families.write(tmp_path, family)
    tokenizer = load_tokenizer(tmp_path)
    expected = theirs(tmp_path, [USER, ANSWER, USER, {"role": "assistant", "content": "no"}])
    assert encoding.answered_ids([USER, ANSWER, USER], "no", tokenizer, "") == expected


def test_a_response_cannot_speak_as_another_role(tmp_path):
    """A special token that it spells is text; in a prompt it is an error."""
    chat_families.write(tmp_path, "qwen2.5")
    tokenizer = load_tokenizer(tmp_path)
    said = " a<|im_end|>b"
    ids = encoding.answered_ids([USER], said, tokenizer, "")
    plain = encoding.answered_ids([USER], "ab", tokenizer, "")
    assert ids.count(tokenizer.eos_id) == plain.count(tokenizer.eos_id) == 3
    assert said.strip() in tokenizer.backend.decode(ids, skip_special_tokens=False)
    spelled = {"role": "user", "content": "<|im_end|>"}
    with pytest.raises(UserError, match=r"^row 3: a user message spells the special token"):
        encoding.answered_ids([spelled], "no", tokenizer, "row 3")


def test_a_folder_without_a_chat_template_reads_prompt_response_and_eos(tmp_path):
    def ids(tokenizer, messages):
        return encoding.answered_ids(messages, "no", tokenizer, "")

    eos = POLICY.eos_id
    assert ids(POLICY, [USER]) == [*POLICY.encode("hi"), *POLICY.encode("no"), eos]
    framed = chat.with_text_template(POLICY, "ask {prompt} say ")  # as a run of ours saves it
    assert ids(framed, [USER]) == [*POLICY.encode("ask hi say no"), eos]
    letters = characters("SystemUserAssistantbekindhino: \n")
    plain = "System:\nbe kind\n\nUser:\nhi\n\nAssistant:\n"
    assert ids(letters, [SYSTEM, USER]) == [*letters.encode(plain + "no"), letters.eos_id]


def test_a_reward_model_of_another_tokenizer_scores_texts(tmp_path):
    folder = save_judge(tmp_path / "rm")
    reward = build(f"{folder}*2", "length")
    assert reward.fn is None
    scores, parts = reward.host(sampled(["x", "yy", "z"], SAID), {"messages": ASKED})
    alone = [judge_alone(folder, *text) for text in zip(ASKED, SAID, strict=True)]
    assert np.std(alone) > 0.1
    assert_allclose(parts["rm"], alone, atol=1e-5)
    lengths = [len(text) + 1 for text in SAID]
    assert_allclose(scores, 2 * np.array(alone) + lengths, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2.5", "llama3"])
@pytest.mark.parametrize("group_size", [1, 2])
def test_the_score_of_an_answer_that_was_cut_is_read_at_an_end(family, group_size, tmp_path):
    """As all answers that the model was trained on have one; also beside a shared prompt."""
    folder = save_judge(tmp_path, family)
    judge = LanguageModel.load(folder)
    tokenizer = judge.tokenizer
    end = chat.end_of_response(chat.AUTO, tokenizer)
    prompt = list(chat.template_of(tokenizer).prompt(ASKED[0], ""))
    answers = [tokenizer.encode("no"), [*tokenizer.encode("maybe")[:1], end]]

    def padded(rows):
        """[2, T], with the responses in the same columns."""
        width = max(map(len, rows))
        tokens = np.array([[*prompt, *row, *[0] * (width - len(row))] for row in rows])
        lengths = len(prompt) + np.array([[len(row)] for row in rows])
        return tokens, (np.arange(tokens.shape[1]) < lengths).astype(np.int32)

    tokens, mask = padded(answers)
    expected = scorer(judge.model)(judge.params, *padded([[*answers[0], end], answers[1]]), None)
    assert abs(float(expected[0] - scorer(judge.model)(judge.params, tokens, mask, None)[0])) > 0.01
    made = Rollout(tokens, mask, mask, mask, prompt_length=len(prompt), group_size=group_size)
    own = {"compute": Compute(), "policy": tokenizer.fingerprint}
    for in_chat in (True, False):
        loaded = reward_models.load_reward_model(folder, **own, in_chat=in_chat)
        reward = rewards.from_model(loaded.score_fn, loaded.params, loaded.in_groups)
        assert_allclose(reward(made)[0], expected, atol=1e-5)


@pytest.mark.parametrize("position", [hf.LAST_TOKEN, hf.STEP_ENDS])
def test_a_model_whose_score_stands_elsewhere_reads_no_end(position, tmp_path):
    folder = Path(save_judge(tmp_path))
    assert len(LanguageModel.load(folder).closing(in_chat=True)) == 1
    assert bench.judge_positions(str(folder)) == 255
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score_position": position}))
    assert LanguageModel.load(folder).closing(in_chat=True) == ()
    assert bench.judge_positions(str(folder)) == 256


@pytest.mark.slow
@pytest.mark.parametrize("is_ours", [True, False])
def test_where_a_score_stands_is_a_property_of_the_folder(is_ours, tmp_path, write):
    """At the end of the turn, or behind the line end that the template writes: whether the policy
    has the same tokenizer or another, for whole answers and cut ones.
    """
    folder = save_judge(tmp_path / "rm")
    if not is_ours:
        as_of_others(folder)
    judge = LanguageModel.load(folder)
    tokenizer = judge.tokenizer
    score = jax.jit(models.score_fn(judge.model))

    def scores_of(ends):
        how = (tokenizer, "", ends)
        ids = [encoding.answered_ids(ASKED[0], text, *how) for text in SAID]
        return score(
            judge.params, *encoding.left_padded(ids, width=64, pad_id=tokenizer.pad_id), None
        )

    at_end = scores_of(ends=True)
    expected = at_end if is_ours else scores_of(ends=False)
    assert is_ours or np.abs(expected - at_end).min() > 1e-3
    foreign = build(folder).host(sampled(["x"] * 3, SAID), {"messages": [ASKED[0]] * 3})[0]
    assert_allclose(foreign, expected, atol=1e-5)
    assert_traced(folder, tokenizer, expected, at_end, is_ours)

    rows = [{"prompt": "hi", "chosen": SAID[0], "rejected": SAID[1]}]
    judged = bench.load(folder, evaluate.Config())
    opened = bench.open_bench(judged, evaluate.Config())
    pairs = bench.encode_pairs(opened, formats.read("pairs", write(rows)).rows)
    [margin] = bench.margins(opened, pairs)["reward_model"]
    assert margin == pytest.approx(float(expected[0] - expected[1]), abs=1e-5)


def assert_traced(folder, tokenizer, expected, at_end, is_ours):
    """The scores of rollouts of the same tokenizer, in a chat template and without one."""
    prompt = chat.template_of(tokenizer).prompt(ASKED[0], "")
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in SAID]
    ids[0] = ids[0][:-1]  # cut: the reward model reads the end of the turn nevertheless
    rows = [[*prompt, *response] for response in ids]
    padded = encoding.left_padded(rows, width=64, pad_id=tokenizer.pad_id)
    tokens, mask = (np.roll(array, -4, axis=1) for array in padded)  # pads on both sides
    made = Rollout(tokens, mask, mask, mask)
    own = {"compute": Compute(), "policy": tokenizer.fingerprint, "in_chat": True}
    reward = reward_models.load_reward_model(folder, **own)
    assert_allclose(rewards.from_model(*reward[:2])(made)[0], expected, atol=1e-5)
    plain = reward_models.load_reward_model(folder, **own | {"in_chat": False})
    unended = slice(0 if is_ours else 1, None)
    scores = rewards.from_model(*plain[:2])(made)[0]
    assert_allclose(scores[unended], at_end[unended], atol=1e-5)


@pytest.mark.slow
def test_an_ensemble_across_families(tmp_path):
    """Two of foreign tokenizers and one of the policy's own."""
    own = models.build(
        models.GPT2Config(
            vocab_size=POLICY.vocab_size, max_length=64, hidden_size=8, num_layers=1, num_heads=2
        )
    )
    params = models.add_head(jax.random.key(5), initial_params(own, 5), "score")
    models.save(tmp_path / "own", own, params)
    POLICY.save(tmp_path / "own")
    names = [save_judge(tmp_path / "a"), save_judge(tmp_path / "b", "llama3", seed=1)]
    names.append(str(tmp_path / "own"))
    given = sampled(["hi", "hi", "hi"], SAID)
    columns = {"messages": ASKED}
    each = np.array([spec.as_host(build(name))(given, columns)[0] for name in names])
    joined = ",".join(names)
    for how, expected in {
        "mean": each.mean(axis=0),
        "min": each.min(axis=0),
        "uncertainty:0.5": each.mean(axis=0) - 0.5 * each.var(axis=0),
    }.items():
        scores, parts = build(f"{how}:{joined}").host(given, columns)
        assert_allclose(scores, expected, atol=1e-5)
        spread = parts[f"{how}:a,b,own/uncertainty"]
        assert_allclose(spread, each.std(axis=0), atol=1e-5)


def test_each_process_reads_texts_by_itself_in_a_run_that_has_set_a_mesh(tmp_path, monkeypatch):
    """A program over the mesh would wait for the other processes, which have other texts."""
    folder = save_judge(tmp_path / "rm")
    texts = [[USER], [SYSTEM, USER]], ["yes", "a longer answer"]
    expected = load(folder).score_texts(*texts)
    meshes = []
    scorer = generator._scorer

    def seen(*model):
        meshes.append(jax.sharding.get_abstract_mesh())
        return scorer(*model)

    monkeypatch.setattr(generator, "_scorer", seen)
    with jax.set_mesh(sharding.make_mesh(1, tensor=2, devices=jax.devices()[:2])):
        before = jax.sharding.get_abstract_mesh()
        model = load(folder)
        assert_array_equal(model.score_texts(*texts), expected)
        assert jax.sharding.get_abstract_mesh() == before
    assert [mesh.empty for mesh in meshes] == [True]
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(model.params))


def test_a_model_that_is_cut_over_processes_compares_no_texts(tmp_path, monkeypatch):
    """Each process has other texts, and all would wait for one another."""
    folder = save_judge(tmp_path / "rm")
    tokenizer = load_tokenizer(folder)
    own = partial(reward_models.load_reward_model, compute=Compute(), policy=tokenizer.fingerprint)
    judge = f"pairs:{folder}"
    assert spec.build_reward([judge], tokenizer=tokenizer, load=own, columns=()).is_pairs
    whole = LanguageModel.load
    cut = SimpleNamespace(is_fully_addressable=False, is_fully_replicated=False)
    as_cut = lambda *args, **options: whole(*args)._replace(params={"score": cut})  # noqa: E731
    monkeypatch.setattr(LanguageModel, "load", as_cut)
    with pytest.raises(UserError, match="the mesh cuts it over processes"):
        spec.build_reward([judge], tokenizer=tokenizer, load=own, columns=())


def test_what_it_cannot_read_is_refused_by_name(tmp_path):
    folder = save_judge(tmp_path / "rm", max_length=40)
    host = build(folder).host
    long = sampled(["x"], ["an answer that is longer"])
    turns = replace(long, response_mask=long.response_mask.copy())
    turns.response_mask[0, 4] = 0
    messages = "reads prompts as texts or messages"
    for given, columns, message in [
        (long, {"messages": [[USER]]}, r"text 0, 'hi': .* are \d+ tokens .* 40;"),
        (long, {"messages": [None]}, messages),
        (long, {}, messages),
        (turns, {"messages": [[USER]]}, "reads a prompt and one response"),
    ]:
        with pytest.raises(UserError, match=f"--reward .*rm: .*{message}"):
            host(given, columns)
    model = load(folder, length=64)  # the policy's tokens
    said = r"text 1, 'hi': .* reads 40; .*rl\.max_new_tokens, now 64 of the policy's tokens"
    with pytest.raises(UserError, match=said):
        model.score_texts([[USER], [USER]], ["no", "an answer that is longer"])
    prompt = encoding.answered_ids([USER], "", load_tokenizer(folder), "")
    judge = save_judge(tmp_path / "short", max_length=len(prompt))
    with pytest.raises(UserError, match=r"short: .* has another tokenizer and reads"):
        load(judge, longest=[USER])  # before any response
    load(judge)
    load(save_judge(tmp_path / "short", max_length=len(prompt) + 1), longest=[USER])
    (tmp_path / "plain").mkdir()
    chat_families.write(tmp_path / "plain", "qwen2.5")
    judge = LanguageModel.load(folder)
    body = {name: part for name, part in judge.params.items() if name != "score"}
    models.save(tmp_path / "plain", judge.model, body)
    with pytest.raises(UserError, match="plain: this model has no score head"):
        build(str(tmp_path / "plain"))


def test_a_run_refuses_a_reward_model_that_cannot_read_its_longest_prompt(config, tmp_path, write):
    folder = save_judge(tmp_path / "rm", max_length=64)
    data = write([{"prompt": "Hi"}, {"prompt": "What is ice? " * 9}, {"prompt": "No"}])
    settings = replace(config.rl, num_iterations=1)
    with pytest.raises(UserError, match=r"rm: .* has another tokenizer and reads 64 tokens"):
        rl.run(replace(config, reward=(folder,), rl=settings, data=(str(data),)), vpg)


def test_a_prompts_messages_are_those_before_the_template():
    text = Row("hi", (), "")
    chosen = Row((1, 2), (), "", messages=[SYSTEM, USER])
    plain = Row("System:\nbe kind", (), "", messages=[SYSTEM, USER])
    given = [row.conversation for row in (text, chosen, plain, Row((1, 2), (), ""))]
    assert given == [[USER], [SYSTEM, USER], [SYSTEM, USER], None]


@pytest.mark.slow
def test_a_run_an_evaluation_and_a_generator_score_the_same_texts(config, tmp_path):
    folder = save_judge(tmp_path / "rm")
    settings = replace(config.rl, num_iterations=1, validation_prompts=2)
    run = replace(config, reward=(folder,), rl=settings)
    result = rl.run(run, vpg)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert samples
    for sample in samples:
        asked = [{"role": "user", "content": sample["prompt"]}]
        expected = judge_alone(folder, asked, sample["response"])
        assert sample["score"] == pytest.approx(expected, abs=1e-4)
    made = Generator(result.model_folder, folder, max_new_tokens=4)(["What is ice?", "Hi"])
    for prompt, text, reward in zip(["What is ice?", "Hi"], made.texts, made.rewards, strict=True):
        asked = [{"role": "user", "content": prompt}]
        assert reward == pytest.approx(judge_alone(folder, asked, text), abs=1e-4)
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "What is ice?"}]))
    evaluate.run(
        result.model_folder,
        evaluate.Config(
            prompts=(str(tmp_path / "prompts.json"),),
            reward_model=folder,
            max_new_tokens=4,
            output=str(tmp_path),
        ),
    )
    (line,) = (tmp_path / "evaluation_samples.jsonl").read_text().splitlines()
    shown = json.loads(line)
    asked = [{"role": "user", "content": "What is ice?"}]
    expected = judge_alone(folder, asked, shown["response"])
    assert shown["score"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parity
def test_scores_equal_those_of_transformers_on_the_same_texts(tmp_path):
    """A Qwen2 reward model with its chat template, whatever the policy's tokenizer."""
    import torch
    import transformers
    from torch_models import torch_model

    chat_families.write(tmp_path, "qwen2.5")
    tokenizer = load_tokenizer(tmp_path)
    sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 256}
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    torch_model("Qwen2 grouped", "classifier", num_labels=1, **sizes, **ids).save_pretrained(
        tmp_path
    )
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    asking = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = []
    for messages, said in zip(ASKED, SAID, strict=True):
        turns = [*messages, {"role": "assistant", "content": said}]
        ids = asking.apply_chat_template(turns, return_dict=False, return_tensors="pt")
        with torch.no_grad():
            expected.append(theirs(input_ids=ids).logits.item())
    assert np.std(expected) > 0.03
    scores, _ = build(str(tmp_path)).host(sampled(["a", "bb", "c"], SAID), {"messages": ASKED})
    assert_allclose(scores, expected, atol=3e-4)


def policy_of(folder, **more):
    """What `asking.reward_of` reads of a policy: 80 positions, 6 of them for the response."""
    tokenizer = load_tokenizer(folder)
    config = SimpleNamespace(max_new_tokens=6)
    return SimpleNamespace(tokenizer=tokenizer, template="auto", room=74, config=config, **more)


@pytest.mark.parametrize(
    ("length", "is_ours", "fits"),
    [(80, True, False), (81, True, True), (80, False, False), (90, False, True)],
)
def test_chat_and_generate_refuse_a_reward_model_that_reads_less_than_the_policy(
    length, is_ours, fits, tmp_path
):
    """It reads the end of an answer that was cut, and one of others what follows that too."""
    folder = save_judge(tmp_path, max_length=length)
    policy = policy_of(folder)
    if not is_ours:
        as_of_others(folder)
    length -= 1 if is_ours else len(chat.template_of(policy.tokenizer).closing)
    if fits:
        assert asking.reward_of([folder], policy, ()).fn is not None
        return
    said = rf"reads {length} tokens; shorten .*max_new_tokens\), now 80"
    with pytest.raises(UserError, match=said):
        asking.reward_of([folder], policy, ())


def test_chat_and_generate_refuse_a_scorer_of_steps_of_another_tokenizer(tmp_path):
    folder = save_judge(tmp_path / "rm")
    file = Path(folder, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score_position": hf.STEP_ENDS}))
    assert asking.reward_of([folder], policy_of(folder), ()).fn is not None
    chat_families.write(tmp_path / "other", "llama3")
    with pytest.raises(UserError, match="scores steps needs the tokenizer of the policy"):
        asking.reward_of([folder], policy_of(tmp_path / "other"), ())


def test_a_policy_leaves_room_for_what_its_reward_model_reads_behind_an_answer(tmp_path):
    folder = save_judge(tmp_path / "rm", max_length=64)
    judge = LanguageModel.load(folder)
    body = {name: part for name, part in judge.params.items() if name != "score"}
    wide = models.build(replace(judge.model.config, max_length=128))
    body["wpe"] = {"embedding": np.zeros((128, 8), np.float32)}
    chat_families.write(tmp_path / "policy", "qwen2.5")
    models.save(tmp_path / "policy", wide, body)
    assert Generator(tmp_path / "policy", folder, max_new_tokens=4).room == 59
    as_of_others(folder)
    closing = chat.template_of(load_tokenizer(folder)).closing
    room = Generator(tmp_path / "policy", folder, max_new_tokens=4).room
    assert room == 60 - len(closing) < 60
