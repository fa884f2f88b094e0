"""Public forms of records: each one in each stage, what becomes of its values, what is refused.

The examples are the table's own; what they must become is written out here.
"""

import functools
import itertools
import json
import math
import re

import chat_templates
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_forms import EXAMPLES, PAGE, STAGES, W, parsed

from rlhf_jax.algorithms import reward_model
from rlhf_jax.data import batches, encoding, forms
from rlhf_jax.data.chat import AUTO, template_of
from rlhf_jax.data.rows import Record
from rlhf_jax.data.tokenizers import characters, load_tokenizer
from rlhf_jax.errors import UserError


def chat(*texts, system=""):
    """Alternating turns in the plain template, with the opening of the next one."""
    shown = f"System:\n{system}\n\n" if system else ""
    for number, text in enumerate(texts):
        shown += f"{'Assistant' if number % 2 else 'User'}:\n{text}\n\n"
    return f"{shown}Assistant:\n"


ICE = "Is ice warm?"
ASKED = chat(ICE)
BRIEF = chat(ICE, system="Be brief.")
POST = "SUBREDDIT: r/pets\n\nTITLE: My cat\n\nPOST: It sleeps{}.\n\nTL;DR:"
ALL_DAY = POST.format(" all day")
CAT = " My cat sleeps."
# What the example of each form is: its prompt, its answers (the best one first) and their label.
TABLE = {
    "ShareGPT": (ASKED, ["No."], "demonstration"),
    "LIMA": (ASKED, ["No."], "demonstration"),
    "conversation": (BRIEF, ["No."], "demonstration"),
    "Alpaca": ("Add the numbers.\n\n1 2", ["3"], "demonstration"),
    "Dolly": ("Name the colour.\n\nThe sky is blue.", ["Blue."], "demonstration"),
    "OpenOrca": (BRIEF, ["No."], "demonstration"),
    "ms-swift": (BRIEF, ["No."], "demonstration"),
    "input and output": ("Translate into French: cheese", ["fromage"], "demonstration"),
    "TRL prompt and completion": ("The sky is", [" blue."], "demonstration"),
    "Magpie": (ASKED, ["No."], "demonstration"),
    "UltraChat": (ASKED, ["No."], "demonstration"),
    "OpenAI TL;DR": (POST.format(""), [CAT], "demonstration"),
    "GSM8K": ("What is 1 + 2?", ["One and two are 3.\n#### 3"], "demonstration"),
    "LIMO": ("What is 1 + 2?", ["One and two are 3."], "demonstration"),
    "s1K": ("What is 1 + 2?", ["<think>\nOne and two.\n</think>\n\nIt is 3."], "demonstration"),
    "OpenMathInstruct-2": ("What is 1 + 2?", ["One and two are 3."], "demonstration"),
    "MATH": ("What is $1 + 2$?", [r"It is $\boxed{3}$."], "demonstration"),
    "ShareGPT preferences": (ASKED, ["No.", "Yes."], "pair"),
    "Alpaca preferences": ("Add the numbers.\n\n1 2", ["3", "4"], "pair"),
    "Orca pairs": (BRIEF, ["No.", "Yes."], "pair"),
    "input and pairs": (BRIEF, ["No.", "Yes."], "pair"),
    "ms-swift preferences": (ICE, ["No.", "Yes."], "pair"),
    "ms-swift messages": (ASKED, ["No.", "Yes."], "pair"),
    "ms-swift conversations": (ASKED, ["No.", "Yes."], "pair"),
    "stack-exchange-paired": (ICE, ["No.", "Yes."], "pair"),
    "LLaMA-Factory messages": (chat("Hi"), ["Hi!", "No."], "pair"),
    "OpenAI preferences": (ASKED, ["No.", "Yes."], "pair"),
    "UltraFeedback, binarised": (ASKED, ["No.", "Yes."], "pair"),
    "SHP": (ICE, ["No.", "Yes."], "pair"),
    "OpenAI summaries, comparisons": (ALL_DAY, [CAT, " A dog barks."], "pair"),
    "PKU-SafeRLHF": (ICE, ["No.", "Yes."], "pair"),
    "HelpSteer preferences": (ICE, ["No.", "Yes."], "pair"),
    "HelpSteer3": (ASKED, ["No.", "Yes."], "pair"),
    "arena conversations": (ASKED, ["No.", "Yes."], "pair"),
    "arena votes": (ASKED, ["No.", "Yes."], "pair"),
    "lm-human-preferences": ("Is ice", [" cold?", " warm?"], "pair"),
    "query and responses": (ICE, ["No.", "Yes."], "pair"),
    "RewardBench 2": ("Name a prime.", ["Seven.", "Nine.", "One.", "Four."], "pair"),
    "WebGPT comparisons": (ICE, ["No.", "Yes."], "pair"),
    "Nectar": (f"\n\nHuman: {ICE}\n\nAssistant: ", ["No.", "Yes."], "pair"),
    "Open Assistant trees": (ASKED, ["No.", "Yes."], "pair"),
    "UltraFeedback": (ICE, ["No.", "Yes."], (8.0, 2.5)),
    "HelpSteer": (ICE, ["No."], (4.0,)),
    "prompt, response and score": (ICE, ["No."], (4.5,)),
    "OpenAI summaries, scores": (ALL_DAY, [CAT], (7.0,)),
    "TRL unpaired preferences": (ICE, ["No."], True),
    "messages with label": (ASKED, ["No."], True),
    "ShareGPT with label": (ASKED, ["No."], True),
    "ShareGPT with kto_tag": (ASKED, ["No."], True),
    "Alpaca with kto_tag": ("Add the numbers.\n\n1 2", ["3"], True),
    "ms-swift with label": (ICE, ["No."], True),
    "BeaverTails": (ICE, ["No."], True),
    "TRL stepwise": ("1 + 2 + 3 =", ["1 + 2 = 3.\n", "3 + 3 = 7."], (True, False)),
    "PRM800K": ("1 + 2 + 3 =", ["1 + 2 = 3.\n", "3 + 3 = 7."], (True, False)),
    "Math-Shepherd": ("1 + 2 + 3 =", ["Step 1: 1 + 2 = 3.\n", "Step 2: 3 + 3 = 7."], (True, False)),
    "ProcessBench": ("1 + 2 + 3 =", ["1 + 2 = 3.\n", "3 + 3 = 7."], (True, False)),
    "problems and answers": ("What is $1 + 2$?", [], "prompt"),
    "questions and answers": ("What is 1 + 2?", [], "prompt"),
    "MT-Bench": ("Name a prime.", [], "prompt"),
    "verl": (chat("What is 1 + 2?"), [], "prompt"),
}
REFUSED = {
    "xLAM": "the plain template writes no tool",
    "OpenAI functions": "the plain template writes no tool_calls",
    "Open Assistant messages": "is one message of a tree",
}


def outcome(kind, prompt, answers, label):
    """The texts and targets of the rows that a stage makes; None if it refuses the record."""
    first = (prompt, *answers[:1])
    pairs = [(prompt, answers[0], other) for other in answers[1:]]
    if kind == "prompts":
        return [(prompt,)]
    if label == (True, False):
        return [(prompt, *answers)] if kind == "solutions" else None
    if kind == "solutions":  # feedback of a text is one step
        return [first] if label is True and "Assistant:" not in prompt else None
    if label == "prompt" or (
        isinstance(label, tuple) and len(label) == 1 and kind != "comparisons"
    ):
        return None
    if kind == "demonstrations":
        return [first]
    if label is True or label == "demonstration":
        return [first] if kind == "feedback" and label != "demonstration" else None
    if kind == "feedback":
        return [(prompt, text) for _, *both in pairs for text in both]
    whole = [(prompt, *answers)]
    return whole if kind == "comparisons" else pairs


def test_the_table_has_every_form():
    names = [known.name for known in forms.FORMS]
    assert sorted(names) == sorted([*TABLE, *REFUSED])
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_each_form_in_each_stage(name, kind):
    found = parsed(kind, EXAMPLES[name])
    if name in REFUSED:
        [error] = found.errors
        assert REFUSED[name] in str(error) or kind not in ("demonstrations", "prompts")
        return
    expected = outcome(kind, *TABLE[name])
    if (name, kind) == ("prompt, response and score", "demonstrations"):
        expected = [(ICE, "No.")]  # the score is not read
    if expected is None:
        [error] = found.errors
        assert re.search("expected keys|holds targets|labels the steps", error.what)
        return
    assert not found.errors
    assert [row.texts for row in found.rows] == expected
    assert set(found.forms.values()) == {name}
    label = TABLE[name][2]
    if kind == "comparisons":
        assert found.rows[0].targets == (label if isinstance(label, tuple) else None)
    if kind == "feedback":
        marks = [True] if label is True else [True, False] * (len(found.rows) // 2)
        assert [row.targets for row in found.rows] == [(float(mark),) for mark in marks]


def converted(**row):
    [record] = forms.converted(Record(row, W), {})
    return record.value


HUMAN = {"from": "human", "value": "a"}
CALL = {"name": "f", "arguments": {"x": 1}}
CALLS = [{"type": "function", "function": CALL}]


def test_every_speaker_of_sharegpt_with_tools_and_weights():
    turns = [
        {"from": "system", "value": "s", "weight": None},
        HUMAN,
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "b", "weight": 0},
        {"from": "user", "value": "c", "weight": 0},
        {"from": "chatgpt", "value": "d", "weight": 1},
        {"from": "tool", "value": "e"},
        {"from": "assistant", "value": "f"},
    ]
    row = converted(conversations=turns, tools=json.dumps([CALL]), id="7")
    assert row == {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": CALLS},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "weight": 1},
            {"role": "tool", "content": "e"},
            {"role": "assistant", "content": "f"},
        ],
        "tools": CALLS,
        "id": "7",
    }
    with pytest.raises(UserError, match="line 1: a tool call is not JSON: 'f"):
        converted(conversations=[HUMAN, {"from": "function_call", "value": "f(1)"}])
    with pytest.raises(UserError, match=r"'weight' .* found 0\.5"):
        converted(conversations=[HUMAN, {"from": "gpt", "value": "b", "weight": 0.5}])
    with pytest.raises(UserError, match="'tools' must be a list"):
        converted(conversations=[HUMAN], tools={"name": "f"})
    assert converted(prompt="p", tools="hammer") == {"prompt": "p", "tools": "hammer"}


def test_parts_of_a_content_go_where_openai_has_them():
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "b"},
        {"type": "tool_call", "value": json.dumps(CALL)},
        {"type": "tool_call", "value": json.dumps(CALL)},
    ]
    user = {"role": "user", "content": [{"type": "text", "value": "a"}], "loss_weight": 0.0}
    row = converted(messages=[user, {"role": "assistant", "content": parts, "loss_weight": 1.0}])
    assert row["messages"] == [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "b",
            "reasoning_content": "hm",
            "tool_calls": CALLS * 2,
            "weight": 1,
        },
    ]
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert converted(messages=[{"role": "user", "content": two}])["messages"][0]["content"] == two


def test_functions_of_openai_are_tools():
    row = converted(**EXAMPLES["OpenAI functions"])
    assert row["messages"][1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    ]
    assert row["messages"][2]["role"] == "tool"
    assert row["tools"][0]["function"]["name"] == "f"
    assert "functions" not in row


def test_history_and_system_of_alpaca_are_turns():
    row = converted(
        instruction="c", input="", output="d", system="s", history=[["a", "b"]], text="c d"
    )
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [message["role"] for message in row.pop("messages")] == roles
    assert row == {"system": "s", "history": [["a", "b"]], "response": "d"}  # columns
    assert converted(instruction="c", output="d") == {"prompt": "c", "response": "d"}


def test_a_completion_of_messages_and_one_of_text():
    messages = [{"role": "user", "content": "a"}]
    answer = [{"role": "assistant", "content": "b"}]
    whole = {"prompt": messages, "response": answer}
    assert converted(prompt=messages, completion=answer) == whole
    assert converted(prompt="a", completion=answer) == whole | {"prompt": "a"}
    assert converted(prompt=messages, completion=answer, label=1) == whole | {"desirable": 1}


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("key", ["messages", "prompt", "chosen", "rejected", "completion"])
def test_messages_in_a_text_are_messages(key):
    spelled = json.dumps(TALK, indent=1)
    name = "response" if key == "completion" else key
    row = {"prompt": [TALK[0]], "completion": "c"} if key == "completion" else {}
    assert converted(**row | {key: spelled})[name] == TALK
    python = repr(TALK).replace(", {", " {")  # numpy writes no comma
    with pytest.raises(UserError, match=f"'{key}' holds messages as Python .* json.dumps"):
        converted(**row | {key: python})
    other = '[{"city": "Paris"}]'
    assert converted(**row | {key: other})[name] == other
    # The answer to a plain prompt may be any text.
    given = {"prompt": "Write messages.", "response": spelled}
    assert converted(**given) == given
    # So may its columns, and a prompt that goes on behind a list.
    for key, text in itertools.product(("context", "query", "conversation"), (spelled, python)):
        given = {"prompt": "a", key: text}
        assert converted(**given) == given
    assert converted(prompt=f"{python} How is it sorted?")["prompt"].endswith("sorted?")
    with pytest.raises(UserError, match="'conversations' holds messages as Python"):
        converted(conversations=repr([HUMAN]))
    assert converted(conversations=json.dumps([HUMAN]), system="s")["messages"][1] == TALK[0]


def test_a_part_of_a_content_that_is_no_text_is_refused():
    for part in ({"type": "text", "text": 5}, {"text": None}, 5, {"type": "image", "text": "x"}):
        for content in ([part], [part, part]):
            turns = [{"role": "user", "content": content}, TALK[1]]
            [error] = parsed("demonstrations", {"messages": turns}).errors
            assert str(error).startswith(f"{W}: the content of message 1 of 'messages' has a")
    broken = [{"from": "function_call"}, {"role": "user", "content": [{"type": "reasoning"}]}]
    for turn in broken:
        with pytest.raises(UserError, match=f"{W}: not in the form of OpenAI's messages"):
            converted(messages=[turn])


def test_conversations_of_texts_and_of_questions_with_answers():
    texts = list("abcd")
    roles = ["user", "assistant"] * 2
    expected = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    assert converted(conversations=texts) == {"messages": expected}
    for asked, answer in (("human", "assistant"), ("input", "output")):
        turns = [{asked: "a", answer: "b"}, {asked: "c", answer: "d"}]
        assert converted(conversation=turns, source=1) == {"messages": expected, "source": 1}
        [first, *_] = converted(conversation=turns, system="s")["messages"]
        assert first == {"role": "system", "content": "s"}
    assert converted(conversation=TALK, toxic=False) == {"messages": TALK, "toxic": False}


def test_strengths_of_preferences_say_the_better_answer():
    row = {"context": [TALK[0]], "response1": "x", "response2": "y"}
    for strength, best in ((-3, "x"), (-1.0, "x"), (1, "y"), (3, "y")):
        found = converted(**row, overall_preference=strength)
        assert found == {"prompt": [TALK[0]], "chosen": best, "rejected": "xy".replace(best, "")}
    found = parsed("pairs", row | {"overall_preference": 0})
    assert found.dropped == {forms.NO_WINNER: 1}
    numbers = {"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 1.0}
    assert converted(**numbers)["chosen"] == "y"  # pandas makes floats of numbers beside nulls


def test_labels_and_targets_stay_with_their_answers():
    """Before, a pair of the answers 1 and 0 had the targets of the answers 0 and 1."""
    answers = [{"response": "a", "overall_score": 2.0}, {"response": "b", "overall_score": 8.5}]
    row = {"instruction": "p", "completions": answers}
    [pair] = parsed("pairs", row).rows
    assert (pair.responses, pair.targets) == (("b", "a"), None)
    [best] = parsed("demonstrations", row).rows
    assert (best.responses, best.targets) == (("b",), None)
    [whole] = parsed("comparisons", row).rows
    assert (whole.responses, whole.targets) == (("a", "b"), (2.0, 8.5))
    assert [row.targets for row in parsed("feedback", row).rows] == [(1.0,), (0.0,)]


@pytest.mark.parametrize(
    ("row", "meant"),
    [
        ({"instruction": "a", "outptu": "b"}, "'output' by 'outptu'"),
        ({"conversatons": []}, "'conversations' by 'conversatons'"),
        ({"quesion": "a", "response_j": "b", "response_k": "c"}, "'question' by 'quesion'"),
    ],
)
def test_a_key_like_one_of_a_public_form_is_named(row, meant):
    with pytest.raises(UserError, match=f"{W}: has no known form; did you mean {meant}"):
        converted(**row)


def test_answers_of_the_data_are_columns_of_prompts():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "id": 3}
    [row] = parsed("prompts", pair).rows
    assert row.columns == {"chosen": "a", "rejected": "b", "id": 3}
    found = parsed("prompts", {"prompt": "p", "responses": ["a", "b"], "best": 1, "answer": "7"})
    assert found.rows[0].columns == {"best": 1, "answer": "7"}
    assert found.unread == {"best": 1, "answer": 1}
    talk = {"messages": TALK, "response": "r"}
    assert parsed("prompts", talk).rows[0].columns == {"response": "r"}


# Two answers that nobody preferred.
TIES = [
    {"history": "p", "human_ref_A": "a", "human_ref_B": "a", "labels": 0},
    {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 0},
    {"conversation_a": [], "conversation_b": [], "winner": "tie (bothbad)"},
    {
        "question": {"full_text": "q"},
        "answer_0": "a",
        "answer_1": "b",
        "score_0": 0.0,
        "score_1": 0.0,
    },
]


@pytest.mark.parametrize("row", TIES, ids=lambda row: next(iter(row)))
def test_ties_are_dropped_and_counted(row):
    found = parsed("pairs", row, {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert len(found.rows) == 1
    assert sum(found.dropped.values()) == 1
    assert not found.errors


# Values of a form that are not as it has them.
WRONG = [
    ({"conversation_a": [], "conversation_b": [], "winner": "a"}, "'winner' must be one of"),
    (
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 2},
        "the better one of two answers is 0 or 1, found 2",
    ),
    (
        {"info": {}, "summaries": [], "choice": 0},
        "not in the form of OpenAI summaries, comparisons",
    ),
    ({"prompt": "p", "response": "r", "images": ["a.png"]}, "has 'images', and no model here"),
    ({"messages": [], "audios": ["a.wav"]}, "has 'audios'"),
    (
        {"conversations": [HUMAN], "instruction": "a", "output": "b"},
        "fits ShareGPT and Alpaca; say by --columns OURS=THEIRS which keys count",
    ),
    ({"conversations": [HUMAN], "messages": []}, "fits ShareGPT and messages; say by --columns"),
    ({"prompt": "a", "instruction": "b", "output": "c"}, "fits Alpaca and prompt; say by"),
]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_what_a_form_cannot_have_is_refused(row, message):
    with pytest.raises(UserError, match=f"line 1: .*{message}"):
        converted(**row)


def test_columns_decide_between_two_forms():
    row = {"prompt": "a", "instruction": "b", "output": "c"}
    assert parsed("demonstrations", row, columns=["response=output"]).rows[0].texts == ("a", "c")
    both = {"conversations": [HUMAN], "messages": [], "instruction": "b", "output": "c"}
    columns = ["prompt=instruction", "response=output"]
    assert parsed("demonstrations", both, columns=columns).errors
    # Another key decides nothing; what it gives stands before what the form gives.
    [error] = parsed("demonstrations", row | {"id": "7"}, columns=["answer=id"]).errors
    assert "fits Alpaca and prompt" in str(error)
    task = {"prompt": "q", "reward_model": {"ground_truth": "3"}, "mine": "4"}
    [found] = parsed("prompts", task, columns=["answer=mine"]).rows
    assert found.columns == {"ground_truth": "3", "answer": "4"}
    scores = {"prompt": "a", "response": "b", "helpfulness": 4, "correctness": 2}
    found = parsed("comparisons", scores, columns=["targets=correctness"])
    assert found.rows[0].targets == (2.0,)
    safer = {
        "prompt": "p",
        "response_0": "a",
        "response_1": "b",
        "better_response_id": 1,
        "safer_response_id": 0,
    }
    assert parsed("pairs", safer).rows[0].responses == ("b", "a")
    [row] = parsed("pairs", safer, columns=["best=safer_response_id"]).rows
    assert row.responses == ("a", "b")
    # UltraFeedback's own scores, or others, decide the order as well.
    answers = [
        {"response": "a", "overall_score": 1, "fine": 9},
        {"response": "b", "overall_score": 2, "fine": 3},
    ]
    raw = {"instruction": "p", "completions": answers}
    assert parsed("pairs", raw).rows[0].responses == ("b", "a")
    [row] = parsed("pairs", raw, columns=["targets=completions.fine"]).rows
    assert row.responses == ("a", "b")


def test_known_answers_are_columns_of_prompts():
    [row] = parsed("prompts", {"question": "q", "answer": "1\n#### 2"}).rows
    assert row.columns == {"answer": "1\n#### 2", "response": "1\n#### 2"}
    [row] = parsed("prompts", {"problem": "q", "solution": "s", "answer": "2", "level": 1}).rows
    assert row.columns == {"answer": "2", "level": 1, "response": "s", "solution": "s"}
    truth = {"style": "rule", "ground_truth": "3"}
    prompt = [{"role": "user", "content": "q"}]
    [row] = parsed("prompts", {"prompt": prompt, "reward_model": truth, "ability": "math"}).rows
    assert row.columns == {"ability": "math", "ground_truth": "3", "answer": "3"}
    # Columns of prompts that have another meaning stay columns.
    plain = {"prompt": "p", "question": "q", "answer": "r", "input": "i"}
    assert parsed("prompts", plain).rows[0].columns == {
        "question": "q",
        "answer": "r",
        "input": "i",
    }


def test_an_answer_that_is_learned_is_not_called_unread():
    assert parsed("demonstrations", {"question": "q", "answer": "a"}).unread == {}
    assert parsed("demonstrations", {"question": "q", "answer": "a", "id": 3}).unread == {"id": 1}
    assert parsed("prompts", {"question": "q", "answer": "a"}).unread == {
        "response": 1,
        "answer": 1,
    }


LABELS = [
    (True, False),
    (1, 0),
    (1.0, 0.0),
    ("1.0", "0.0"),
    ("True", "False"),
    ("true", "false"),
    ("1", "0"),
]
NOT_LABELS = [2, 0.5, float("nan"), "yes", "", []]


@pytest.mark.parametrize("labels", LABELS)
def test_labels_of_feedback(labels):
    rows = [{"prompt": "p", "response": "r", "desirable": label} for label in labels]
    assert [row.targets for row in parsed("feedback", *rows).rows] == [(1.0,), (0.0,)]


@pytest.mark.parametrize("label", NOT_LABELS)
def test_what_is_no_label(label):
    [error] = parsed("feedback", {"prompt": "p", "response": "r", "desirable": label}).errors
    assert "'desirable' must be true or false, or 1 or 0, found" in str(error)
    [error] = parsed("feedback", {"prompt": "p", "response": "r", "desirable": None}).errors
    assert "expected keys desirable" in str(error)


def test_sft_learns_no_undesirable_row_unless_told():
    rows = [{"prompt": "p", "response": text, "desirable": text == "a"} for text in "ab"]
    found = parsed("demonstrations", *rows)
    assert [row.responses for row in found.rows] == [("a",)]
    assert "is marked as not desirable, and SFT would learn it" in str(found.errors[0])
    assert sum(parsed("demonstrations", *rows, drop="drop").dropped.values()) == 1


def test_margins_are_read_by_reward_models_alone():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}
    found = parsed("comparisons", pair, pair | {"margin": "0.5"}, pair | {"margin": None})
    assert [row.margin for row in found.rows] == [2.0, 0.5, 0.0]
    assert found.unread == {}
    assert parsed("pairs", pair).unread == {"margin": 1}
    for wrong in ("x", -1, float("nan"), [1]):
        [error] = parsed("comparisons", pair | {"margin": wrong}).errors
        assert "'margin' must be a number that is not negative" in str(error)


def no_scores(params, tokens, mask, key):
    return jnp.zeros(len(tokens))


def test_margins_reach_the_loss_of_a_reward_model():
    """Margins 2, .5 and 0; equal scores of 0 lose log(1 + e^margin)."""
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = parsed("comparisons", *(pair | {"margin": margin} for margin in (2, 0.5, 0))).rows
    encoded = encoding.encode_texts(rows, characters("abc"))
    numbers = np.array([2, 0, -1])
    batch = batches.comparison_batch(encoded, numbers, bucket_multiple=1)
    assert batch.margin.tolist() == [0, 2, 0]
    assert batches.packed_comparisons(encoded, np.arange(3), width=18).margin.tolist() == [
        [2, 0.5, 0]
    ]
    whole = batches.comparison_batch(encoded, np.arange(3), bucket_multiple=1)
    config = reward_model.Config()
    loss = jax.jit(functools.partial(reward_model.loss, score_fn=no_scores, config=config))
    mean, _ = loss(None, whole, None)
    expected = [math.log(1 + math.exp(margin)) for margin in (2, 0.5, 0)]
    assert float(mean.value) == pytest.approx(sum(expected) / 3, rel=1e-6)
    plain = parsed("comparisons", pair).rows
    encoded = encoding.encode_texts(plain, characters("abc"))
    assert batches.comparison_batch(encoded, np.arange(1)).margin is None


def test_a_row_of_too_many_answers_is_refused():
    answers = [str(number) for number in range(257)]
    row = {"prompt": "p", "responses": answers, "ranks": list(range(257))}
    [error] = parsed("pairs", row).errors
    assert "holds 257 responses, of which a row may have 256" in str(error)
    row = {"prompt": "p", "responses": answers[:256], "best": 0}
    assert len(parsed("pairs", row).rows) == 255


def test_the_page_shows_the_table(tmp_path):
    """For a template that writes tools and their calls."""
    chat_templates.write(tmp_path, "qwen2.5")
    writes_all = template_of(load_tokenizer(tmp_path), AUTO)
    lines = ["| form | keys | read by |", "|---|---|---|"]
    for form in forms.FORMS:
        example = EXAMPLES[form.name]
        assert set(form.keys) <= set(example)
        reads = [
            stage
            for kind, stage in STAGES.items()
            if parsed(kind, example, template=writes_all).rows
        ]
        keys = ", ".join(f"`{key}`" for key in form.keys)
        lines.append(f"| {form.name} | {keys} | {', '.join(reads) or 'refused'} |")
    assert "\n".join([*lines, "", "```text"]) in PAGE.read_text("utf-8")
