"""``rl.stop``: a response ends where its text has a stop string, for all that reads it."""

from dataclasses import replace
from types import SimpleNamespace

import asked_runs
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from builders import json_lines
from numpy.testing import assert_array_equal
from recorded import STOP, ppo_run, rl_job, vpg_run

from rlhf_jax import iteration, rewards
from rlhf_jax.config import RLStage
from rlhf_jax.data import tokenizers
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.evaluation import evaluate
from rlhf_jax.generation import generator, stops
from rlhf_jax.generation.generator import Generator
from rlhf_jax.inference import asking
from rlhf_jax.iteration import LoopState
from rlhf_jax.training.rl.sample import sample
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.types import Rollout, TrainState

ALPHABET = tokenizers.characters("abcde")
PAD, EOS, A, B, C, D, E = range(7)


def a_rollout(*responses):
    """Responses of up to five tokens behind a prompt of one, with log-probs of -1, -2, ..."""
    columns = np.arange(6)
    lengths = np.array([len(response) for response in responses])
    tokens = np.full((len(responses), 6), PAD)
    for i, response in enumerate(responses):
        tokens[i, 1 : 1 + len(response)] = response
    attention_mask = (columns <= lengths[:, None]).astype(np.int32)
    response_mask = np.where(columns > 0, attention_mask, 0)
    return Rollout(tokens, attention_mask, response_mask, -response_mask * columns * 1.0)


def test_the_cut_by_hand():
    """After the token that completes the string; a text that is over when it has one counts too."""
    rollout = a_rollout(
        [A, B, C, D, E],
        [C, A, EOS],
        [D, A, B],
        [A, C, D],
        [B, B, C, B, C],
    )
    cut = stops.cut(rollout, ("ab", "bc"), ALPHABET)
    length = np.array([2, 3, 3, 3, 3])
    assert_array_equal(cut.stopped, [True, False, True, False, True])
    assert_array_equal(cut.response_mask.sum(axis=1), length)
    # Behind the first two tokens: "ab" of the first row does not count, nor half of a text.
    later = stops.cut(rollout, ("ab", "bc"), ALPHABET, after=2)
    assert_array_equal(later.response_mask.sum(axis=1), [5, 3, 3, 3, 5])
    assert_array_equal(later.stopped, [False, False, False, False, True])
    kept = np.arange(6) <= length[:, None]
    for name, padding in (("tokens", PAD), ("attention_mask", 0), ("log_probs", 0.0)):
        assert_array_equal(getattr(cut, name), np.where(kept, getattr(rollout, name), padding))


def test_a_response_ends_where_its_mask_does():
    """Whatever stands in other columns: the pad may be EOS."""
    rollout = a_rollout([A, EOS], [A, B, C], [])
    for other in (PAD, EOS):
        said = np.where(rollout.response_mask, rollout.tokens, other)
        padded = rollout.replace(tokens=said)
        assert generator.responses(padded, ALPHABET) == ["a", "abc", ""]
        assert_array_equal(generator.ended(padded, (EOS,)), [True, False, False])
        scores = rewards.missing_eos(padded, jnp.ones(3), EOS, score=-1.0)
        assert_array_equal(scores, [1, -1, 1])
        whole = iteration.mask_truncated(EOS)(padded).response_mask
        assert_array_equal(whole.sum(axis=1), [2, 0, 0])
        cut = stops.cut(padded, ("b",), ALPHABET)
        assert_array_equal(cut.response_mask.sum(axis=1), [2, 2, 0])
        assert_array_equal(generator.ended(cut, (EOS,)), [True, True, False])


def test_a_run_looks_for_stop_texts_behind_the_tokens_that_it_is_told():
    settings = RLStage(stop=("ab",), stop_after=2, batch_size=2)
    ones = np.ones((2, 1), np.int32)
    batch = Batch(EncodedPrompts(ones, ones, (), (), {}), np.arange(2), None)
    job = rl_job(
        settings=settings,
        inputs={"initial": SimpleNamespace(tokenizer=ALPHABET)},
        programs={"respond": lambda *prompts: a_rollout([A, B, C, D, E], [C, D, A, B, E])},
    )
    cut, _ = sample(job, LoopState(TrainState(0, {}, ()), 0.0), batch)
    assert_array_equal(cut.response_mask.sum(axis=1), [5, 4])
    with pytest.raises(ValueError, match="stop_after: there is no text"):
        replace(settings, stop=())


def test_a_string_inside_a_token_ends_the_response_with_that_token():
    tokenizer = tokenizers.train_bpe(["yes no\n\nHuman: hi"] * 20, 300)
    [ids] = tokenizer.encode_batch(["no\n\nHuman: hi yes"], ["here"])
    rollout = a_rollout(ids[:5])
    whole = tokenizer.decode(ids[:5])
    for stop in ("\nH", "o", whole[-1]):
        cut = stops.cut(rollout, (stop,), tokenizer)
        count = int(cut.response_mask.sum())
        assert stop in tokenizer.decode(ids[:count])
        assert stop not in tokenizer.decode(ids[: count - 1])
        assert cut.stopped.tolist() == [True]


def test_a_row_that_a_string_ended_is_no_truncated_row():
    cut = stops.cut(a_rollout([A, B, C], [A, EOS], [A, C, D]), ("b",), ALPHABET)
    rule = iteration.missing_eos(EOS, penalty=5.0, score=None)
    scored = replace(cut, scores=jnp.ones(3))
    assert rule(scored).scores.tolist() == [1.0, 1.0, -4.0]
    assert iteration.mask_truncated(EOS)(scored).present.tolist() == [True, True, False]
    assert rewards.missing_eos(replace(cut, stopped=None), jnp.ones(3), EOS, 5.0)[0] == -4.0


def num_stops(text):
    return sum(stop in text for stop in STOP)


def test_what_a_run_learns_from_ends_at_the_string():
    """Scores are lengths of the texts that the reward was given."""
    run = ppo_run()
    tokenizer = tokenizers.load_tokenizer(str(run.result.model_folder))
    num_stopped = 0
    for _, _, row, rollout in run.steps:
        mask = np.asarray(rollout.mask)
        tokens = np.asarray(rollout.tokens)
        texts = [tokenizer.decode(ids[own].tolist()) for ids, own in zip(tokens, mask, strict=True)]
        assert rollout.scores.tolist() == list(map(len, texts))
        assert not any(num_stops(text[:-1]) for text in texts)
        is_stopped = np.array([num_stops(text) > 0 for text in texts])
        assert_array_equal(rollout.stopped, is_stopped)
        num_stopped += np.sum(is_stopped)
        assert not np.any(rollout.log_probs[~mask])
        assert row["response/length"] == pytest.approx(np.sum(mask) / 12)
        ended = is_stopped | np.any(mask & (tokens == tokenizer.eos_id), axis=1)
        assert row["response/eos_fraction"] == pytest.approx(np.mean(ended))
        judged = np.where(ended, rollout.scores, -9.0)
        assert row["objective/reward"] == pytest.approx(np.mean(judged), abs=1e-4)
    assert 0 < num_stopped < 24


def test_samples_of_validations_end_at_the_string():
    samples = json_lines(ppo_run().result.folder / "samples.jsonl")
    assert samples
    responses = [row["response"] for row in samples]
    assert [row["score"] for row in samples] == list(map(len, responses))
    assert not any(num_stops(response[:-1]) for response in responses)
    assert any(map(num_stops, responses))


def test_a_greedy_baseline_ends_at_the_string_too():
    joined = vpg_run().called("with_greedy")
    assert [greedy.stopped is None for _, greedy in joined] == [False] * 3


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A folder with a policy that was trained with stop strings."""
    folder = asked_runs.write(tmp_path_factory.mktemp("asked"))
    file = folder / "policy" / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["rl"]["stop"] = ["e", "a"]
    file.write_text(yaml.safe_dump(settings))
    return folder


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop: expected texts that are not empty"):
        RLStage(stop=("a", ""))


@pytest.mark.slow
def test_who_asks_a_run_uses_its_stop_strings(asked, tmp_path):
    folder = asked / "policy"
    assert asking.open_policy(str(folder), asking.Settings()).stop == ("e", "a")
    assert asking.open_policy(str(folder), asking.Settings(stop=("b",))).stop == ("b",)
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["ab", "cd"]')
    config = evaluate.Config(prompts=(str(prompts),), num_samples=8, output=str(tmp_path))
    evaluate.run(folder, config)
    responses = [row["response"] for row in json_lines(tmp_path / evaluate.SAMPLES)]
    assert not {"e", "a"} & set("".join(response[:-1] for response in responses))
    assert {"e", "a"} & {response[-1:] for response in responses}


@pytest.mark.slow
def test_a_stop_string_ends_each_response_of_a_conversation(asked):
    heard = []

    def environment(conversation, row):
        heard.append(conversation[-1]["content"])
        return "b" if heard[-1].endswith(("e", "a")) else None

    folder = asked / "policy" / "model"
    generator = Generator(folder, max_new_tokens=30, environment=environment, stop=["e", "a"])
    said = generator(["ab", "cd"], num_samples=8)
    assert not {"e", "a"} & set("".join(response[:-1] for response in heard))
    assert len(heard) > len(said.texts)
