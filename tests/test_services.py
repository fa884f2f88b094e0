"""Rewards and judges on a server: the protocol, keys, replies that are kept, and servers that
misbehave.
"""

import json
import math
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from builders import metric_rows, save_base, with_rl
from servers import Server

from rlhf_jax import vpg
from rlhf_jax.config import Judge
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import ServiceError, UserError
from rlhf_jax.evaluation import evaluate
from rlhf_jax.graders import client, pairs, service, spec
from rlhf_jax.graders.replies import Replies
from rlhf_jax.graders.service import RubricJudge, Services
from rlhf_jax.rewards import Unscored
from rlhf_jax.runs import processes
from rlhf_jax.training import rl

KEY = "sk-secret-4711"
TOKENIZER = characters("abcdefghij ")
ASKED = {"prompts": ["a", "b"], "responses": ["yes", "no"], "columns": {"topic": [1, 2]}}


@pytest.fixture
def serve(monkeypatch):
    """Starts servers, and makes retries quick."""
    monkeypatch.setattr(client, "_SECONDS", 0.001)
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def ask(server, **settings):
    return service.reward_service(server.url, Judge(**settings))(
        ASKED["prompts"], ASKED["responses"], **ASKED["columns"]
    )


def test_a_reward_service_is_sent_texts_and_columns(serve, monkeypatch):
    server = serve(lambda number, body: {"rewards": [0.5, None]})
    assert ask(server) == [0.5, None]
    monkeypatch.setenv("REWARD_API_KEY", KEY)
    assert ask(server) == [0.5, None]
    assert server.asked == [{"ids": [0, 1]} | ASKED] * 2
    assert server.keys == [None, f"Bearer {KEY}"]


def test_a_busy_service_is_asked_five_times(serve):
    def busy(times):
        return serve(lambda number, body: (503, b"busy") if number < times else {"rewards": [1, 2]})

    assert ask(busy(4)) == [1, 2]
    with pytest.raises(ServiceError, match=r"\(attempt 5\)"):
        ask(busy(5))


def test_rewards_with_ids_find_their_responses(serve):
    assert ask(serve(lambda number, body: {"rewards": [5, 6], "ids": [1, 0]})) == [6, 5]
    for ids in ([0, 0], [0, 2]):
        server = serve(lambda number, body, ids=ids: {"rewards": [5, 6], "ids": ids})
        with pytest.raises(ServiceError, match="its ids are not those that were sent"):
            ask(server)


OK = {"rewards": [1, 2]}
NOT_OF_THE_PROTOCOL = {
    'missing required field `rewards`; got {"scores': {"scores": [1, 2]},
    "Expected `object`, got `array`; got [1, 2]": [1, 2],
    "got `str` - at `$.rewards[1]`; got": {"rewards": [1, "2"]},
    "Expected `float` > -1e+300 - at `$.rewards[0]`; got": {"rewards": [math.nan, 1]},
    "out of range - at `$.rewards[1]`; got": {"rewards": [1, 10**400]},
    'expected {"rewards": [...]}, a finite number or null for each of 2 responses, got 1': {
        "rewards": [1]
    },
    "its ids are not those that were sent: []": {"rewards": [1, 2], "ids": []},
    "at `$.ids[0]`": {"rewards": [1, 2], "ids": [True, 1]},
}


def test_a_reply_that_is_not_the_protocols_is_an_error_at_once(serve):
    for expected, reply in NOT_OF_THE_PROTOCOL.items():
        server = serve(lambda number, body, reply=reply: reply)
        with pytest.raises(ServiceError, match=f"{server.url}: .*{re.escape(expected)}"):
            ask(server)
        assert len(server.asked) == 1


# --- A judge


RUBRIC = "criteria: how kind the answer is\nscale: [1, 5]\n"


def chat(text, finish_reason=None):
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": finish_reason}]}


def judged_letters(number, body):
    """Scores an answer by its length."""
    said = json.loads(body["messages"][1]["content"])
    return chat(f"It has letters.\n\nScore: {min(len(said['answer']), 5)}")


def rubric_judge(server, folder, text=RUBRIC, **settings):
    file = folder / "kind.yaml"
    file.write_text(text)
    settings = Judge(url=server.url, model="a-judge", **settings)
    return RubricJudge(service.read_rubric(file), Services(settings, folder / "judge"))


def test_a_judge_reads_rubric_conversation_answer_and_columns(serve, tmp_path, monkeypatch):
    server = serve(judged_letters)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    text = f"{RUBRIC}columns: [answer_key]\n"
    judge = rubric_judge(server, tmp_path, text, max_tokens=7, temperature=None)
    talk = [{"role": "user", "content": "hi"}]
    columns = {"answer_key": ["x", "y"], "other": [1, 2]}
    assert judge(["p", "q"], ["ab", "abc"], messages=[talk, None], **columns) == [2, 3]
    first, second = sorted(
        server.asked, key=lambda body: len(json.loads(body["messages"][1]["content"])["answer"])
    )
    assert first["model"] == "a-judge"
    assert first["max_tokens"] == 7
    assert "temperature" not in first
    system, user = first["messages"]
    assert "how kind the answer is" in system["content"]
    assert "from 1 (worst) to 5 (best)" in system["content"]
    assert json.loads(user["content"]) == {
        "answer_key": "x",
        "conversation": talk,
        "answer": "ab",
    }
    assert json.loads(second["messages"][1]["content"])["conversation"] == "q"
    assert set(server.keys) == {f"Bearer {KEY}"}


SCORES = {
    "Score: 4": 4,
    "**Score:** 3.5": 3.5,
    "score = 2/5": 2,
    "Score: 1 would be mean.\nScore: **5**": 5,
    "Score: 6": None,  # off the scale
    "Score: -3": None,
    "I cannot say": None,
    "": None,
    None: None,
}


def test_what_a_reply_scores(serve, tmp_path):
    replies = iter(list(SCORES))
    server = serve(lambda number, body: chat(next(replies)))
    judge = rubric_judge(server, tmp_path, concurrency=1)
    answers = [str(i) for i in range(len(SCORES))]
    scores = judge([""] * 6, answers[:6]) + judge([""] * 3, answers[6:])
    none = Unscored("the judge's reply has no score from 1 to 5")
    assert scores == [none if score is None else score for score in SCORES.values()]
    assert judge.take_unparsed() == 5
    assert judge.take_unparsed() == 0


NUMBERS = {  # on a scale from -20 to 20
    "Score: .8": 0.8,
    "Score: 1e-1": 0.1,
    "Score: 5E-1.": 0.5,
    "Score: \N{MINUS SIGN}3": -3,
    "Score: \N{EN DASH}3": -3,
    "Score: -.5": -0.5,
    "Score: +3": 3,
    "Score: 8.": 8,
    "**Score:** `8`": 8,
    '{"score": 8.25, "why": "kind"}': 8.25,
    '{"score": "7"}': 7,
    "Rating\n\nScore:\n\n**7**\n9 was too much": 7,
    "Score: [[7]]": 7,
    "Score: 7 (mostly kind)": 7,
    "Score: 7 points": 7,
    "Score: 17/20": 17,
    "Score: **17**/20": 17,
    "Score: 17 out of 20": 17,
    "Score: 17 (out of 20)": 17,
    "Sub-score: 3, total score: 4": 4,
    "Score: 8,5": None,
    "Score: 1,000": None,
    "Score: 1.2.3": None,
    "Score: 8-9": None,
    "Score: 8 \N{EN DASH} 9": None,
    "Score: 8 to 9": None,
    "Score: 8 or **9**": None,
    "Score: 3 1/2": None,
    "Score: 8\N{VULGAR FRACTION ONE HALF}": None,
    "Score: 8 and a half": None,
    "Score: 7/10": None,  # of another scale
    "Score: 7 out of 10": None,
    "Score: 80%": None,
    "Score: 8th": None,
    "Score: 0x8": None,
    "Score: 1e": None,
    "Score: 1e400": None,
    "Score: ~8": None,
    "Score: - 3": None,
    "Score: not 8": None,
    "underscore: 8": None,
    "Score: 3\nScore: none": None,
    "Score 8": None,
    "<think>Score: 9</think>Score: 2": 2,
    "<think>Score: 9</think>": None,
    "<think>Score: 9": None,
    "Score: 9?</think>Score: 2": 2,
    "Score: 9</think>\nI cannot say": None,
    "Score: 2\n<think>Score: 9": 2,
    # Numbers of something else, and of another scale.
    '{"score": 8, "max_score": 10}': None,
    '{"overall_score": 8, "helpfulness_score": 2}': None,
    '{"overall_score": 8}': 8,
    "Score: 8\nMax score: 10": 8,
    "Score: 8 (previous score: 3)": None,
    "Helpfulness score: 3\nOverall: 8": None,
    "Score: 8\n\nScore: 1 (worst) to 10 (best)": None,
    **dict.fromkeys(
        f"Score: {said}"
        for said in (
            *(
                "4 stars out of 5",
                "4 on a scale of 5",
                "4 (scale 1-5)",
                "4 points (max 5)",
                "4 von 5",
            ),
            *("4/ five", "4\n/5", "4\nout of 5", "8\N{FULLWIDTH PERCENT SIGN}", "8 percent", "8?"),
            *("8 million", "8 vs 9", "8 point five", "9... actually 8", "9, no, 8", "9 minus 1"),
            *("5 x 2", "1_000", "1. Helpfulness: 8", "\n1. helpfulness 9\n2. harm 3"),
            "1=bad, 10=good",
        )
    ),
    # Spellings
    "Score\N{FULLWIDTH COLON} \N{FULLWIDTH DIGIT EIGHT}": 8,
    "Score: $8$": 8,
    "Final score: \\boxed{8}": 8,
    "Clear and kind. Score: 8": 8,
    "- **Overall score**: 8 \N{EM DASH} clear": 8,
    "Score: 8 of 20": 8,
    "Score: 8 because it is kind": 8,
    "Score: 8 \N{WHITE HEAVY CHECK MARK}": 8,
    **{f"{tag}Score: 9": None for tag in ("<thinking>", "<Think>", "[THINK]", "<reasoning>")},
    "<reasoning>Score: 9</reasoning>Score: 2": 2,
}


@pytest.mark.parametrize("reply", NUMBERS)
def test_a_score_is_the_number_as_it_is_written_or_none(reply):
    judge = RubricJudge(service.Rubric("kind", (-20, 20)), Services(Judge(url="http://a")))
    assert judge._score(reply) == NUMBERS[reply]


def test_a_long_reply_is_read_in_linear_time():
    judge = RubricJudge(service.Rubric("kind", (-20, 20)), Services(Judge(url="http://a")))
    long = ["score" * 40_000, "score: " * 40_000, "score" + " *" * 100_000, "score: 1" * 40_000]
    started = time.perf_counter()
    assert [judge._score(text) for text in [*long, "score: " + "1" * 200_000]] == [None] * 5
    assert time.perf_counter() - started < 5


CUT = {  # {what the server says: what a judge of (answer, max_tokens) reads, how often it asks}
    "again": ([("Score: 8", "length"), ("Score: 3", "stop")], 3, [7, 28]),
    "twice cut": ([("Score: 8", "length"), ("Score: 9", "length")], None, [7, 28]),
    "whole": ([("Score: 8", "stop")], 8, [7]),
    "thoughts": ([("<think>Score: 9? It", "length"), ("Score: 2", None)], 2, [7, 28]),
    "its own limit": ([("Score: 8", "length")], None, [None]),
    "too many": ([("Score: 8", "length"), (400, b"at most 20 tokens")], None, [7, 28]),
    "filtered": ([("", "content_filter")], None, [7]),
}


@pytest.mark.parametrize("case", CUT)
def test_a_reply_that_was_cut_is_asked_for_once_more_with_more_room(case, serve, tmp_path):
    said, expected, limits = CUT[case]
    server = serve(lambda n, body: said[n] if said[n][0] == 400 else chat(*said[n]))
    judge = rubric_judge(server, tmp_path, RUBRIC.replace("5", "10"), max_tokens=limits[0])
    [score] = judge(["p"], ["a"])
    assert (None if isinstance(score, Unscored) else score) == expected
    assert [body.get("max_tokens") for body in server.asked] == limits
    assert judge.take_unparsed() == (expected is None)


@pytest.mark.parametrize("reply", [None, "", " ", "I cannot say", "Score: 6", "Score: 8-9"])
def test_only_verdicts_are_kept(reply, serve, tmp_path):
    """What has none is asked again, but once in a call; also what another version has kept."""
    server = serve(lambda number, body: chat(reply if number < 2 else "Score: 4"))
    judge = rubric_judge(server, tmp_path)
    for asked in (1, 2):
        assert all(isinstance(score, Unscored) for score in judge(["p"] * 3, ["a"] * 3))
        assert len(server.asked) == asked
    kept = Replies(tmp_path / "judge")
    question = judge._question({"conversation": "p", "answer": "a"})
    assert question not in kept
    kept.add(question, reply or "")
    for _ in range(2):
        assert rubric_judge(server, tmp_path)(["p"], ["a"]) == [4]
    assert len(server.asked) == 3
    assert Replies(tmp_path / "judge")[question] == "Score: 4"


WINNERS = {
    "Winner: A": 1.0,
    "Winner: b": 0.0,
    "Winner: tie": 0.5,
    "Winner: a tie": 0.5,
    "Winner: A tie.": 0.5,
    "Winner: **A draw**": 0.5,
    "Winner: tie between A and B": 0.5,
    "**Winner:** **B**": 0.0,
    "Winner: [[A]]": 1.0,
    '{"winner": "B"}': 0.0,
    "Winner: Answer A": 1.0,
    "Winner: the response B.": 0.0,
    "Winner: A (because B is rude)": 1.0,
    "Winner: A (a kinder one)": 1.0,
    "Winner: B, but only just": 0.0,
    "Winner: A \N{EN DASH} it is kinder": 1.0,
    "Winner: A because B is rude": 1.0,
    "Winner: B\nA is worse": 0.0,
    "Winner: A would be odd.\nWinner: B": 0.0,
    "<think>Winner: A</think>Winner: B": 0.0,
    "Winner: A or B": None,
    "Winner: a, b": None,
    "Winner: A/B": None,
    "Winner: A, B": None,
    "Winner: A (or B)": None,
    "Winner: A and B": None,
    "Winner: A & B": None,
    "Winner: A, and answer B": None,
    "Winner: A (tie)": None,
    "Winner: A close call": None,
    "Winner: a better answer is B": None,
    "Winner: A?": None,
    "Winner: AB": None,
    "Winner: not A": None,
    "Winner: neither": None,
    "Winner: both": None,
    "Winner: equal": None,
    "Winner: A\nWinner: unclear": None,
    "co-winners: A": None,
    "<think>Winner: A": None,
    "A": None,
    "": None,
    **dict.fromkeys(
        f"Winner: {said}"
        for said in (
            *("A, but it's a tie", "A (almost a tie)", "A: 3/10, B: 8/10", "A (3), B (8)", "A?"),
            *("\nA: 3\nB: 5", "A, or maybe B", "A. Wait, B is better.", "A... no, B", "b, a"),
            *("A: loses to B", "A\nor B", "tie (lean A)", "A, or Winner: B, or Winner: tie."),
        )
    ),
    "Not the winner: A": None,
    "Winner: B\nRunner-up winner: A": 0.0,
    "Winner: A\nWinner (final): B": 0.0,
    "Winner\N{FULLWIDTH COLON} **A** \N{WHITE HEAVY CHECK MARK}": 1.0,
    "Winner: Model A": 1.0,
    "Winner: \\boxed{B}": 0.0,
    "Winner: B. It is a kind one": 0.0,
}


@pytest.mark.parametrize("reply", WINNERS)
def test_a_winner_is_a_letter_or_a_tie_and_never_the_wrong_letter(reply):
    assert pairs._winner(reply) == WINNERS[reply]


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "abort", "error", "MAX_TOKENS"])
def test_a_reply_that_the_model_did_not_end_is_no_verdict(reason, serve, tmp_path):
    said = [("Score: 2", reason), ("Score: 4", "stop")]
    server = serve(lambda number, body: chat(*said[number]))
    judge = rubric_judge(server, tmp_path)
    assert isinstance(judge(["p"], ["a"])[0], Unscored)
    assert judge.take_unparsed() == 1
    assert judge(["p"], ["a"]) == [4]  # asked again
    assert judge(["p"], ["a"]) == [4]
    assert len(server.asked) == 2


def test_a_judge_of_pairs_asks_again_for_what_was_cut(serve, tmp_path):
    said = [("Winner: A", "length"), ("Winner: B", "stop"), ("Winner: a tie", "stop")]
    server = serve(lambda number, body: chat(*said[number]))
    services = Services(Judge(url=server.url, model="m", concurrency=1), tmp_path)
    judge = pairs.RubricPairs(service.Rubric("kind"), services)
    shown = {"prompts": ["p"], "messages": [None]}
    for _ in range(2):  # then from what is kept
        assert pairs.in_both_orders(judge, [pairs.Pair(0, "x", "y")], shown) == [0.25]
    assert len(server.asked) == 3


def test_no_question_is_asked_twice_but_one_whose_reply_a_kill_cut_off(serve, tmp_path):
    server = serve(judged_letters)
    judge = rubric_judge(server, tmp_path, concurrency=1)
    assert judge(["p"] * 3, ["ab", "ab", "c"]) == [2, 2, 1]
    assert len(server.asked) == 2
    assert rubric_judge(server, tmp_path)(["p"] * 2, ["c", "ab"]) == [1, 2]
    assert len(server.asked) == 2
    (file,) = (tmp_path / "judge").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    for _ in range(2):
        assert rubric_judge(server, tmp_path)(["p"] * 3, ["ab", "c", "abcd"]) == [2, 1, 4]
        assert len(server.asked) == 4
    rubric_judge(server, tmp_path, RUBRIC.replace("kind", "short"))(["p"], ["c"])
    rubric_judge(server, tmp_path, temperature=1.0)(["p"], ["c"])
    assert len(server.asked) == 6


def test_at_most_so_many_are_asked_at_once(serve, tmp_path):
    def slowly(number, body):
        time.sleep(0.05)
        return judged_letters(number, body)

    server = serve(slowly)
    rubric_judge(server, tmp_path, concurrency=3)(["p"] * 12, [str(i) for i in range(12)])
    assert server.most_at_once == 3


def test_replies_before_a_failure_are_kept(serve, tmp_path):
    def fails(number, body):
        return judged_letters(number, body) if number < 2 else {"error": "no model"}

    server = serve(fails)
    judge = rubric_judge(server, tmp_path, concurrency=1)
    with pytest.raises(ServiceError, match=r"missing .*`choices`; got {\"error\""):
        judge(["p"] * 3, ["a", "bb", "ccc"])
    server.stop()
    assert rubric_judge(server, tmp_path)(["p"] * 2, ["a", "bb"]) == [1, 2]


OTHER_FORMS = [b"5", b"[]", b'{"a":1}', b'{"sha256": 1, "reply": "x"}', b'{"sha256": "a"}', b"null"]
OTHER_FORMS += [
    b'{"sha256": "a", "reply": 5}',
    b"\xff\x00",
    b'{"sha256": "a", "rep',
    b"[" * 5_000,
    b"",
]


def test_kept_replies_of_another_form_are_left_out_with_a_line(tmp_path, caplog):
    kept = Replies(tmp_path)
    kept.add("q", "r")
    file = tmp_path / "replies_0.jsonl"
    for number, line in enumerate(OTHER_FORMS):
        file.with_name(f"replies_{number + 1}.jsonl").write_bytes(line + b"\n" + file.read_bytes())
        caplog.clear()
        assert Replies(tmp_path)["q"] == "r"
        assert f"replies_{number + 1}.jsonl: 1 lines are no replies" in caplog.text
    os.mkfifo(tmp_path / "replies_99.jsonl")
    with pytest.raises(UserError, match=r"replies_99\.jsonl: is no file"):
        Replies(tmp_path)


REPLIES = {
    "[]": "Expected `object`",
    "5": "Expected `object`",
    '{"choices": []}': "no choice",
    '{"choices": [5]}': r"Expected `object`, got `int` - at `\$.choices\[0\]`",
    '{"choices": [{"message": {"content": [1]}}]}': r"message.content`; got",
    '{"choices": [{"message": null}]}': r"got `null` - at `\$.choices\[0\].message`",
}


def test_replies_of_another_form_are_a_sentence(serve, tmp_path):
    for reply, message in REPLIES.items():
        server = serve(lambda number, body, reply=reply: (200, reply.encode()))
        with pytest.raises(ServiceError, match=message):
            rubric_judge(server, tmp_path)(["p"], ["a"])
    server = serve(lambda number, body: (200, b'{"choices": [{"message": {"content": null}}]}'))
    [score] = rubric_judge(server, tmp_path)(["p"], ["a"])
    assert isinstance(score, Unscored)


RUBRICS = ["", "criteria: a\nscales: [1, 2]", "scale: [1, 2]", "criteria: ' '"]
RUBRICS += ["criteria: a\nscale: [2, 1]", "criteria: a\nscale: 3", "criteria: a\ncolumns: b"]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 8)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 8)
)
RUBRICS += ["criteria: [", "criteria: !!int ''", "[" * 400, BOMB, MERGES, "\xff: a", "- a"]
RUBRICS += ["criteria: a\nscale: [.nan, 2]", "criteria: a\ncolumns: [1]", "criteria: 2020-99-99"]


@pytest.mark.parametrize("text", RUBRICS)
def test_a_wrong_rubric_names_its_file(text, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(text, "latin-1")
    started = time.perf_counter()
    with pytest.raises(UserError, match=rf"(?s)^{file}: .*a rubric has criteria"):
        service.read_rubric(file)
    assert time.perf_counter() - started < 60


def test_a_rubric_has_a_scale_and_columns_by_default(tmp_path):
    (tmp_path / "r.yaml").write_text("criteria: ' a '")
    assert service.read_rubric(tmp_path / "r.yaml") == service.Rubric("a", (1, 10), [])


def build(*entries, services=None, columns=()):
    return spec.build_reward(
        entries, tokenizer=TOKENIZER, load=pytest.fail, columns=columns, services=services
    )


def test_what_cannot_be_asked_is_refused_at_once(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(f"{RUBRIC}columns: [answer]")
    able = Services(Judge(url="http://a/v1", model="m"))
    with pytest.raises(UserError, match=r"give --judge.url, .* and --judge.model"):
        build(f"judge:{file}")
    with pytest.raises(UserError, match="the prompts have no column answer"):
        build(f"judge:{file}", services=able, columns=["topic"])
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        build("judge:none.yaml", services=able)
    with pytest.raises(UserError, match=r"--reward http://me:word@a/ "):
        build("http://me:word@a/")
    with pytest.raises(UserError, match="must begin with http://HOST"):
        build("http:///a")
    with pytest.raises(ValueError, match="url must begin with"):
        Judge(url="localhost:8000")
    assert spec.sources(f"judge:{file}*2") == {f"judge:{file}*2": file}
    assert spec.sources("http://a/b") == {}


def test_a_reward_of_a_judge_of_pairs_says_so_and_counts_what_was_not_decided(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(RUBRIC)
    able = Services(Judge(url="http://a/v1", model="m"))
    for reward in (
        build(f"pairs:judge:{file}", services=able),
        build(f"pairs:judge:{file}*2", services=able),
    ):
        assert reward.is_pairs
        assert reward.take_unparsed() == 0
    assert not build(f"judge:{file}", services=able).is_pairs


# --- Runs


def of_letters(number, body):
    return {"rewards": [float(text.count("e")) for text in body["responses"]]}


def rows_of(config):
    return metric_rows(Path(config.output_dir))


@pytest.mark.slow
def test_a_run_whose_server_dies_goes_on_where_it_was(config, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_ATTEMPTS", 1)
    failing = set()

    def dying(number, body):
        return (503, b"gone") if number in failing else of_letters(number, body)

    server = serve(dying)
    config = with_rl(config, num_iterations=4, validation_interval=10)
    config = replace(config, checkpoint_interval=10)
    config = replace(config, reward=(f"{server.url}*2",))
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    rl.run(whole, vpg)
    assert f"reward/{server.url.partition('//')[2]}" in rows_of(whole)[1]
    assert set(server.asked[0]["columns"]) >= {"messages", "category"}
    failing.add(len(server.asked) + 3)
    with pytest.raises(ServiceError, match=r"(?s)HTTP 503 .*Step 2 of 4 is saved\. .*--resume"):
        rl.run(config, vpg)
    assert [row["step"] for row in rows_of(config)] == [0, 1, 2]
    rl.run(replace(config, resume=True), vpg)
    assert rows_of(config) == rows_of(whole)


def by_vowels(number, body):
    said = json.loads(body["messages"][1]["content"])["answer"]
    return chat(f"Score: {1 + said.count('e') % 5}" if "a" in said else "well")


@pytest.fixture
def judged(config, serve, tmp_path, monkeypatch):
    """The settings of a run whose judge gives no score to answers without an a, and its server."""
    server = serve(by_vowels)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "kind.yaml").write_text(RUBRIC)
    config = with_rl(config, num_iterations=2, validation_interval=10)
    reward = (f"judge:{tmp_path / 'kind.yaml'}",)
    judge = Judge(url=server.url, model="m")
    return replace(config, reward=reward, judge=judge), server


@pytest.mark.slow
def test_a_judged_run_counts_what_has_no_score_and_writes_no_key(judged):
    config, _ = judged
    rl.run(config, vpg)
    rows = rows_of(config)[1:]
    assert all(row["reward/unparsed"] == row["reward/unscored"] for row in rows)
    assert sum(row["reward/unparsed"] for row in rows) > 0
    assert all(1 <= row["reward/kind"] <= 5 for row in rows)
    run = Path(config.output_dir)
    manifest = json.loads((run / "manifest.json").read_text())
    assert any("kind.yaml" in name for name in manifest["data"])
    for file in run.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_run_with_the_replies_of_another_asks_what_had_no_verdict(judged, tmp_path):
    config, server = judged
    rl.run(config, vpg)
    asked = len(server.asked)
    again = replace(config, output_dir=str(tmp_path / "again"), resume=True)
    shutil.copytree(Path(config.output_dir) / "judge", tmp_path / "again" / "judge")
    rl.run(again, vpg)
    again_asked = [json.loads(x["messages"][1]["content"]) for x in server.asked[asked:]]
    assert 0 < len(again_asked) < asked
    assert not any("a" in material["answer"] for material in again_asked)
    assert rows_of(again) == rows_of(config)


def test_a_service_that_fails_in_one_process_fails_as_such_in_all(monkeypatch):
    assert next(iter(processes._KINDS.values())) is ServiceError
    assert issubclass(ServiceError, UserError)


def test_an_evaluation_asks_a_judge(serve, data, tmp_path):
    server = serve(judged_letters)
    (tmp_path / "kind.yaml").write_text(RUBRIC)
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "What is ice?"}]))
    evaluate.run(
        save_base(tmp_path / "policy", data),
        evaluate.Config(
            prompts=(str(tmp_path / "prompts.json"),),
            reward_model=f"judge:{tmp_path / 'kind.yaml'}",
            judge_url=server.url,
            judge_model="m",
            max_new_tokens=4,
            output=str(tmp_path),
        ),
    )
    said = json.loads(server.asked[0]["messages"][1]["content"])
    assert said["conversation"] == [{"role": "user", "content": "What is ice?"}]
    (line,) = (tmp_path / "evaluation_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["score"] == min(len(said["answer"]), 5)
    assert (tmp_path / "judge").is_dir()
