"""One conversation of a row, wherever its parts stand: prompts, questions, the system's message and
the variables of the chat template.
"""

import json
from types import SimpleNamespace

import pytest
import tokenizers
from public_forms import EXAMPLES, STAGES, W, parsed
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from rlhf_jax.data import chat, encoding, formats, forms
from rlhf_jax.data.rows import Record
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.generation import environment, generator


def user(text, **more):
    return {"role": "user", "content": text, **more}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


ASK, NO, YES = user("Is ice warm?"), says("No."), says("Yes.")
ASKED = "User:\nIs ice warm?\n\nAssistant:\n"
BRIEF = f"System:\nBe brief.\n\n{ASKED}"


def texts(kind, *records):
    found = parsed(kind, *records)
    assert not found.errors, found.errors
    return [row.texts for row in found.rows]


def fault(kind, record):
    [error] = parsed(kind, record).errors
    assert str(error).startswith(W)
    return str(error)


# The text of the prompt beside messages that hold it.
TOLD_TWICE = [
    "Is ice warm?",
    " Is ice warm?",
    "Is ice warm?\n",
    "Is  ice\nwarm?",
    [ASK],
    [user("Is ice warm? ")],
    [user("Is ice warm?", id=7)],
]


@pytest.mark.parametrize("prompt", TOLD_TWICE)
@pytest.mark.parametrize("asked", [ASK, user("Is ice warm?", id=7), user("Is ice warm? ")])
def test_a_prompt_beside_messages_is_asked_once(prompt, asked):
    no, yes = [asked, NO], [asked, YES]
    question = formats.parse_all(
        "prompts", [Record({"prompt": [asked]}, W)], chat.ChatTemplate(), "error"
    )
    expected = question.rows[0].prompt
    pair = {"prompt": prompt, "chosen": no, "rejected": yes}
    assert texts("pairs", pair, pair | {"messages": no}) == [(expected, "No.", "Yes.")] * 2
    assert texts("demonstrations", pair) == [(expected, "No.")]
    told = {"prompt": prompt, "messages": no}
    assert (
        texts("demonstrations", told, {"prompt": prompt, "completion": no})
        == [(expected, "No.")] * 2
    )
    assert texts("feedback", told | {"desirable": True}) == [(expected, "No.")]
    assert texts("prompts", told | {"answer": "no"}) == [(expected,)]
    assert texts("prompts", {"prompt": prompt, "messages": [asked], "answer": "no"}) == [
        (expected,)
    ]
    [[of_pair]] = texts("prompts", pair)
    assert of_pair.split() == expected.split()


def test_a_prompt_that_is_the_last_question_of_several():
    before = [user("Hi"), says("Hello")]
    whole = "User:\nHi\n\nAssistant:\nHello\n\n" + ASKED
    row = {"prompt": "Is ice warm?", "chosen": [*before, ASK, NO], "rejected": [*before, ASK, YES]}
    assert texts("pairs", row) == [(whole, "No.", "Yes.")]
    assert texts("prompts", row) == [(whole,)]
    told = {"prompt": "Is ice warm?", "messages": [*before, ASK, NO]}
    first = "User:\nHi\n\nAssistant:\n"
    assert texts("demonstrations", told) == [(first, "Hello"), (whole, "No.")]


def test_messages_that_continue_a_prompt():
    plain = {"prompt": "Is ice warm?", "chosen": [NO], "rejected": [YES]}
    assert texts("pairs", plain, plain | {"prompt": [ASK]}) == [(ASKED, "No.", "Yes.")] * 2
    assert texts("demonstrations", {"prompt": "Is ice warm?", "messages": [NO]}) == [(ASKED, "No.")]
    echo = {"prompt": [ASK], "completion": [says("Is ice warm?")]}
    assert texts("demonstrations", echo) == [(ASKED, "Is ice warm?")]
    later = {"prompt": [ASK, NO], "completion": [user("Sure?"), YES]}
    assert texts("demonstrations", later) == [
        (f"{ASKED}No.\n\nUser:\nSure?\n\nAssistant:\n", "Yes.")
    ]
    mixed = {"prompt": "Is ice warm?", "chosen": "No.", "rejected": [ASK, YES]}
    assert texts("pairs", mixed) == [(ASKED, "No.", "Yes.")]
    behind = {"prompt": [ASK], "chosen": [system("Be brief."), ASK, NO]}
    behind |= {"rejected": [system("Be  brief."), ASK, YES]}
    assert texts("demonstrations", {"prompt": [system("Be brief."), ASK], "completion": [NO]}) == [
        (BRIEF, "No.")
    ]
    assert texts("demonstrations", {"prompt": [ASK], "completion": behind["chosen"]}) == [
        (BRIEF, "No.")
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is snow warm?", "messages": [ASK, NO]},
        {"prompt": [user("Is snow warm?")], "chosen": [ASK, NO], "rejected": [ASK, YES]},
        {"prompt": [system("Be long."), ASK], "completion": [system("Be brief."), ASK, NO]},
        {"prompt": [ASK, NO, user("Sure?")], "completion": [ASK, YES]},
        {
            "prompt": "Is ice warm?",
            "messages": [user("Hi"), NO],
            "chosen": "No.",
            "rejected": "Yes.",
        },
        {"prompt": "Is snow warm?", "completion": [ASK, NO]},
        {"prompt": "Is ice warm?", "messages": [ASK, YES], "chosen": "No.", "rejected": "Yes."},
    ],
)
def test_a_prompt_that_contradicts_the_messages_is_refused(row):
    kind = "pairs" if "chosen" in row else "demonstrations"
    assert "leave one of the two out" in fault(kind, row) or "differ" in fault(kind, row)


def test_a_pair_whose_first_difference_is_a_question():
    row = {"chosen": [ASK, user("Sure?"), NO], "rejected": [ASK, YES]}
    assert texts("prompts", row) == [(ASKED,)]


def test_messages_that_are_the_prompt_of_a_pair():
    before = [user("Hi"), says("Hello"), ASK]
    row = {"prompt": "Is ice warm?", "messages": before, "chosen": "No.", "rejected": "Yes."}
    whole = "User:\nHi\n\nAssistant:\nHello\n\n" + ASKED
    assert texts("pairs", row) == [(whole, "No.", "Yes.")]
    assert texts("pairs", row | {"messages": [*before, NO]}) == [(whole, "No.", "Yes.")]
    turns = {"chosen": [NO], "rejected": [YES], "messages": [*before, NO], "prompt": before}
    assert texts("pairs", turns) == [(whole, "No.", "Yes.")]


def test_a_chosen_conversation_that_begins_the_rejected_one():
    row = {"chosen": [ASK, NO], "rejected": [ASK, NO, user("Sure?"), YES]}
    assert "beginning of the other" in fault("pairs", row)
    assert "beginning of the other" in fault(
        "pairs", {"chosen": row["rejected"], "rejected": row["chosen"]}
    )
    # Texts end with EOS.
    assert texts("pairs", {"prompt": "p", "chosen": "No", "rejected": "No, it is not."})


# --- The system's message


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_system_of_each_form_in_each_stage_stands_first(name, kind, key):
    """Or the row is refused: of texts that have no place for it."""
    row = dict(EXAMPLES[name])
    has_own = row.pop("system", None) or row.pop("system_prompt", None) or name == "conversation"
    without = parsed(kind, row)
    found = parsed(kind, row | {key: "Be brief."})
    assert [row.texts[1:] for row in found.rows] == [row.texts[1:] for row in without.rows]
    for read in found.rows:
        assert read.prompt.startswith("System:\nBe brief.\n\nUser:\n")
        assert kind != "prompts" or read.columns[key] == "Be brief."  # a reward may read it
    assert kind == "prompts" or key not in found.unread
    assert bool(found.errors) == bool(without.errors) or has_own


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstrations", {"messages": [ASK, NO]}),
        ("demonstrations", {"prompt": "Is ice warm?", "response": "No."}),
        ("demonstrations", {"prompt": "Is ice warm?", "completion": [NO]}),
        ("demonstrations", {"input": [ASK], "output": "No."}),
        ("pairs", {"prompt": "Is ice warm?", "chosen": "No.", "rejected": "Yes."}),
        ("pairs", {"chosen": [ASK, NO], "rejected": [ASK, YES]}),
        ("pairs", {"messages": [ASK, NO], "rejected_messages": [ASK, YES]}),
        ("pairs", {"prompt": "Is ice warm?", "responses": ["Yes.", "No."], "best": 1}),
        (
            "pairs",
            {
                "instruction": "Is ice warm?",
                "response1": "No.",
                "response2": "Yes.",
                "annotator1": 1,
            },
        ),
        ("feedback", {"messages": [ASK, NO], "desirable": 1}),
        ("prompts", {"prompt": "Is ice warm?", "answer": "no"}),
        ("prompts", {"prompt": [ASK]}),
        ("prompts", {"messages": [system(" Be brief."), ASK]}),
    ],
)
def test_a_system_beside_keys_of_ours(kind, row):
    for more in (
        {"system": "Be brief."},
        {"system_prompt": "Be brief."},
        {"system": "Be brief.", "system_prompt": "Be brief."},
    ):
        [read] = parsed(kind, row | more).rows
        assert read.prompt == BRIEF
        assert read.columns.keys() <= {"answer", "system", "system_prompt"}
    if "messages" not in row:
        [read] = parsed(kind, row | {"system": " \n", "system_prompt": ""}).rows
        assert read.prompt in (ASKED, "Is ice warm?")


@pytest.mark.parametrize(
    "row",
    [
        {"system": "a", "system_prompt": "b", "messages": [ASK, NO]},
        {"system": "a", "messages": [system("b"), ASK, NO]},
        {"system": ["a"], "prompt": "p", "response": "r"},
        {"system": 3, "prompt": "p", "response": "r"},
        {"system": "a", "prompt": [3, 4], "responses": ["r"], "targets": [1]},
        {
            "system": "a",
            "chosen": "\n\nHuman: p\n\nAssistant: a",
            "rejected": "\n\nHuman: p\n\nAssistant: b",
        },
    ],
)
def test_a_system_that_can_stand_nowhere_is_refused(row):
    assert "system" in fault("comparisons" if "messages" not in row else "demonstrations", row)


def test_history_stands_behind_the_system_and_before_the_question():
    row = {"prompt": "Is ice warm?", "history": [["Hi", "Hello"]], "system": "Be brief."}
    whole = "System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\nHello\n\n" + ASKED
    assert texts("prompts", row) == [(whole,)]
    assert texts("pairs", row | {"chosen": "No.", "rejected": "Yes."}) == [(whole, "No.", "Yes.")]
    first = "System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\n"
    assert texts("demonstrations", row | {"response": "No."}) == [(first, "Hello"), (whole, "No.")]
    told = row | {"response": "No.", "desirable": False}
    assert texts("feedback", told) == [(whole, "No.")]
    column = {"prompt": "p", "history": "of Rome"}
    assert parsed("prompts", column).rows[0].columns == {"history": "of Rome"}


# --- Nulls


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_null_column_is_not_there(name, kind):
    """Rows of a mixture have the columns of all its sources."""
    row = EXAMPLES[name]
    every = dict.fromkeys(key for other in EXAMPLES.values() for key in other)
    ours = dict.fromkeys(formats.KNOWN)
    alone, among = parsed(kind, row), parsed(kind, {**every, **ours, **row})
    assert [row.texts for row in among.rows] == [row.texts for row in alone.rows]
    assert [str(error) for error in among.errors] == [str(error) for error in alone.errors]
    assert among.unread == alone.unread
    assert among.forms == alone.forms


# --- Variables of the template

MODES = (
    "{% if mode is defined %}<|im_start|>system\n{{ mode }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if mode == 'off' %}<think></think>"
    "{% endif %}{% endif %}"
)
CHATML = MODES.replace(
    "{% if mode is defined %}<|im_start|>system\n{{ mode }}<|im_end|>\n{% endif %}", ""
)
LINE_ENDS = r" ?[^\s]+|\s*[\r\n]+|\s+(?!\S)|\s+"  # in a row are one word, as of Qwen and Llama 3


def byte_tokenizer(folder, template):
    """Bytes, two line ends as one token, and ChatML's special tokens."""
    folder.mkdir(exist_ok=True)
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    [(line_end, _)] = byte_level.pre_tokenize_str("\n")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet, line_end * 2])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(line_end, line_end)]))
    words = pre_tokenizers.Split(tokenizers.Regex(LINE_ENDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    backend.save(str(folder / "tokenizer.json"))
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    keys |= {"pad_token": "<pad>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    return load_tokenizer(folder)


@pytest.fixture
def read(tmp_path):
    """``read(kind, row, template=MODES)`` -> (tokenizer, rows, ReadResult)"""

    def read(kind, row, template=MODES):
        tokenizer = byte_tokenizer(tmp_path / "m", template)
        found = parsed(kind, row, template=chat.template_of(tokenizer, chat.AUTO))
        return tokenizer, encoding.as_read(found.rows, tokenizer, chat.AUTO), found

    return read


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstrations", {"messages": [ASK, NO]}),
        ("demonstrations", {"prompt": "Is ice warm?", "response": "No."}),
        ("pairs", {"prompt": [ASK], "chosen": [NO], "rejected": [YES]}),
        ("comparisons", {"prompt": "Is ice warm?", "responses": ["No."], "targets": [1]}),
        ("feedback", {"messages": [ASK, NO], "desirable": True}),
        ("prompts", {"messages": [ASK]}),
        ("prompts", {"prompt": "Is ice warm?"}),
    ],
)
@pytest.mark.parametrize("variables", [{"mode": "off", "tone": None}, '{"mode": "off"}'])
def test_variables_of_a_row_reach_its_template(read, kind, row, variables):
    tokenizer, [one, other], found = None, (None, None), None
    tokenizer, [one], found = read(kind, row | {"chat_template_kwargs": variables})
    text = tokenizer.decode_raw([*one.prompt, *(one.responses or ((),))[0]])
    opening = "<|im_start|>system\noff<|im_end|>\n<|im_start|>user\nIs ice warm?<|im_end|>\n"
    opening += "<|im_start|>assistant\n"
    assert text.startswith(opening)
    assert found.unwritten == {}
    if kind != "prompts":
        assert text.startswith(f"{opening}No.<|im_end|>")
        assert found.unread == {}
    else:
        assert text == f"{opening}<think></think>"
    _, [other], _ = read(kind, row)
    assert not tokenizer.decode_raw(other.prompt).startswith("<|im_start|>system")


def test_variables_of_a_row_go_before_those_of_the_run(tmp_path):
    tokenizer = chat.reading(byte_tokenizer(tmp_path / "m", MODES), {"mode": "on"})
    template = chat.template_of(tokenizer, chat.AUTO)
    rows = [{"messages": [ASK]}, {"messages": [ASK], "chat_template_kwargs": {"mode": "off"}}]
    shown = [
        tokenizer.decode_raw(row.prompt) for row in parsed("prompts", *rows, template=template).rows
    ]
    assert [text.split("<|im_end|>")[0] for text in shown] == [
        "<|im_start|>system\non",
        "<|im_start|>system\noff",
    ]


def test_variables_in_a_cut_prompt_a_call_and_a_reply_of_an_environment(read, tmp_path):
    variables = {"mode": "off", "tone": None}
    before = [user("Hi"), says("Hello"), ASK]
    row = {"prompt": before, "chat_template_kwargs": variables}
    tokenizer, rows, _ = read("prompts", row)
    told = tokenizer.decode_raw(rows[0].prompt)
    assert told.endswith("assistant\n<think></think>")
    cut = encoding.encode_prompts(
        rows, tokenizer, template=chat.AUTO, length=len(rows[0].prompt) - 1, too_long="truncate"
    )
    text = tokenizer.decode_raw(cut.tokens[0][cut.attention_mask[0] == 1])
    opening = "<|im_start|>system\noff<|im_end|>\n<|im_start|>user\nIs ice warm?"
    assert text.startswith(opening)
    assert text.endswith("assistant\n<think></think>")
    columns = {"chat_template_kwargs": {"mode": "off"}}
    policy = SimpleNamespace(template=chat.AUTO)
    asked = generator.Generator.row(policy, before, "here", columns, tokenizer)
    assert tokenizer.decode_raw(asked.prompt) == told
    template = chat.template_of(tokenizer, chat.AUTO)
    setting = environment.Environment(lambda *_: user("Sure?"), tokenizer, template, 9, None)
    for given, end in ((columns, "assistant\n<think></think>"), ({}, "assistant\n")):
        ids, *_ = environment._ask(setting, [ASK], given, "here", is_closed=True)
        assert tokenizer.decode_raw(ids).endswith(end)


def test_variables_that_no_template_reads_are_said(read):
    row = {"messages": [ASK, NO], "chat_template_kwargs": {"tone": "kind", "mode": "on"}}
    assert read("demonstrations", row)[2].unwritten == {"tone": 1}
    assert parsed("demonstrations", row).unwritten == {"tone": 1, "mode": 1}


@pytest.mark.parametrize(
    "variables",
    [
        [1],
        "mode",
        3,
        {"add_generation_prompt": True},
        {"messages": []},
        {"tools": []},
        {"chat_template": "x"},
        {"bos_token": "x"},
        {"mode": "<|im_end|>"},
        {"mode": ["a", {"b": "<|im_start|>"}]},
    ],
)
def test_what_is_no_variable_is_refused(read, variables):
    _, rows, found = read(
        "demonstrations", {"messages": [ASK, NO], "chat_template_kwargs": variables}
    )
    assert not rows
    assert "chat_template_kwargs" in str(found.errors[0])


# --- The boundary between a prompt and an answer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BROKEN = says("\nNo.")


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstrations", {"prompt": "Is ice warm?", "response": "\nNo."}),
        ("demonstrations", {"messages": [ASK, BROKEN]}),
        ("demonstrations", {"prompt": [ASK], "completion": [BROKEN]}),
        ("demonstrations", {"messages": [ASK, BROKEN, ASK, NO]}),
        ("pairs", {"prompt": "Is ice warm?", "chosen": "\nNo.", "rejected": "\n\nYes."}),
        ("pairs", {"chosen": [ASK, BROKEN], "rejected": [ASK, says("\nYes.")]}),
        ("comparisons", {"prompt": "Is ice warm?", "responses": ["\nNo.", "Yes."], "best": 0}),
        ("comparisons", {"prompt": "Is ice warm?", "responses": ["\nNo."], "targets": [1]}),
        ("feedback", {"messages": [ASK, BROKEN], "desirable": True}),
        ("feedback", {"prompt": "Is ice warm?", "response": "\nNo.", "desirable": False}),
    ],
)
def test_the_ids_of_a_prompt_are_those_that_sampling_reads(read, kind, row, template):
    tokenizer, rows, _ = read(kind, row, template)
    [asked] = encoding.as_read(
        parsed("prompts", {"prompt": "Is ice warm?"}).rows, tokenizer, chat.AUTO
    )
    assert rows
    for one in rows:
        for response in one.responses:
            ids = [*one.prompt, *response]
            assert ids[: len(asked.prompt)] == [*asked.prompt]
            line_end = tokenizer.encode("\n")
            assert asked.prompt[-1:] == (*line_end,)
    assert tokenizer.decode_raw(rows[0].prompt) == tokenizer.decode_raw(asked.prompt)
    assert tokenizer.decode_raw(rows[0].responses[0]).startswith("\nNo.<|im_end|>")


def test_each_learned_turn_begins_behind_its_opening(read):
    tokenizer, [row], _ = read("demonstrations", {"messages": [ASK, NO, ASK, BROKEN]}, CHATML)
    places = [n for n, learned in enumerate(row.learned[0]) if not learned]
    [line_end] = tokenizer.encode("\n")
    behind = row.responses[0][: max(places[:-1]) + 1]
    assert behind[-1] == line_end
    assert tokenizer.decode_raw(behind).endswith("<|im_start|>assistant\n")


def test_the_beginning_of_an_answer_is_read_alone(read):
    begun = {"prompt": [ASK, says("Well:\n")], "completion": [says("\nNo.")]}
    tokenizer, [row], _ = read("demonstrations", begun, CHATML)
    _, [asked], _ = read("prompts", {"prompt": begun["prompt"]}, CHATML)
    assert row.prompt == asked.prompt
    assert tokenizer.decode_raw(row.responses[0]).startswith("\nNo.<|im_end|>")


def test_a_reward_model_of_other_tokens_reads_the_same_boundary(read):
    tokenizer, [row], _ = read("demonstrations", {"messages": [ASK, BROKEN]}, CHATML)
    ids = encoding.answered_ids([ASK], "\nNo.", tokenizer, "here", ends=True)
    assert tuple(ids) == (*row.prompt, *row.responses[0][: len(ids) - len(row.prompt)])
    assert tokenizer.decode_raw(ids).endswith("\nNo.<|im_end|>")


# --- Forms that look alike


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "q", "solution": "long", "answer": "2"}, "long"),
        ({"answer": "2", "question": "q", "solution": "long", "id": 3}, "long"),
        ({"question": "q", "solution": None, "answer": "2"}, "2"),
        ({"problem": "q", "solution": "long", "answer": "2"}, "long"),
        ({"problem": "q", "generated_solution": "long", "expected_answer": "2"}, "long"),
        ({"query": "q", "response": "long", "answer": "2"}, "long"),
        ({"prompt": "q", "completion": "long", "answer": "2"}, "long"),
        ({"question": "q", "response": "long", "answer": "2"}, "long"),
        ({"question": "q", "answer": "2", "rationale": "long"}, None),
        ({"question": "q", "answer": "2", "explanation": "long"}, None),
        ({"question": "q", "answer": "2", "reasoning": "long"}, None),
        ({"question": "q", "answer": "2", "output": "long"}, None),
        ({"problem": "q", "answer": "2"}, None),
    ],
)
def test_a_bare_answer_beside_a_solution_is_not_learned(row, answer):
    found = parsed("demonstrations", row)
    assert [row.responses for row in found.rows] == ([] if answer is None else [(answer,)])
    assert len(found.errors) == (answer is None)


def talk(*pairs):
    return [turn for asked, answer in pairs for turn in (user(asked), says(answer))]


@pytest.mark.parametrize(
    ("turn", "prompt", "better"),
    [
        (1, "User:\na\n\nAssistant:\n", ("1", "x")),
        (3, "", None),
        (0, "", None),
        ("1", "User:\na\n\nAssistant:\n", ("1", "x")),
        (1.0, "User:\na\n\nAssistant:\n", ("1", "x")),
        (True, "", None),
        (1.5, "", None),
        ("one", "", None),
    ],
)
def test_a_vote_is_on_the_turn_that_was_judged(turn, prompt, better):
    row = {
        "conversation_a": talk(("a", "1"), ("b", "2")),
        "conversation_b": talk(("a", "x"), ("b", "y")),
    }
    found = parsed("pairs", row | {"winner": "model_a", "turn": turn})
    if better:
        assert [row.texts for row in found.rows] == [(prompt, *better)]
    else:
        assert "'turn' must be" in str(found.errors[0])
    same = {
        "conversation_a": talk(("a", "1"), ("b", "2")),
        "conversation_b": talk(("a", "1"), ("b", "y")),
    }
    whole = "User:\na\n\nAssistant:\n1\n\nUser:\nb\n\nAssistant:\n"
    for more in ({}, {"turn": 2}, {"turn": None}):
        read = parsed("pairs", same | {"winner": "model_b"} | more).rows
        assert [row.texts for row in read] == [(whole, "y", "2")]


@pytest.mark.parametrize(
    "winner", ["tie", "tie (bothbad)", "tie (inconsistent)", "both_bad", "bothbad"]
)
def test_a_tie_of_the_arena_is_left_out_by_count(winner):
    row = {"conversation_a": talk(("a", "1")), "conversation_b": talk(("a", "x")), "winner": winner}
    assert parsed("pairs", row).dropped == {forms.NO_WINNER: 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"instruction": "p", "completions": [{"response": "a", "overall_score": None}]},
            "'targets' must hold numbers, found",
        ),
        (
            {"instruction": "p", "completions": [{"response": "a", "overall_score": "N/A"}]},
            "'targets' must hold numbers, found",
        ),
        (
            {"prompt": '["p"]', "response_a": '["a", "b"]', "response_b": '["c"]'}
            | {"winner_model_a": 1, "winner_model_b": 0},
            "1 questions, and 'response_a' 2 answers",
        ),
        ({"input": "1 Step 1: 2 ки", "label": "1 Step 1: 2 ки"}, "each step"),
        ({"input": "1 Step 1: 2 ки more", "label": "1 Step 1: 2 + more"}, "each step"),
        ({"input": "1 Step 1: 2 ки", "label": "+"}, "each step"),
        ({"input": "1 Step 1: 2 ки", "label": "1 Step 1: 2 ?"}, "each step"),
        ({"input": "1 Step 1: 2 ки", "label": "1 Step 1: 2 + 3"}, "each step"),
        ({"problem": "p", "steps": ["a"], "label": 1}, "'label' must be -1"),
        ({"problem": "p", "steps": ["a"], "label": -2}, "'label' must be -1"),
        ({"problem": "p", "steps": ["a"], "label": 0.5}, "'label' must be -1"),
        ({"problem": "p", "steps": ["a"], "label": True}, "'label' must be -1"),
        ({"query": "q", "answers": "weather()", "tools": "[]"}, "not JSON"),
    ],
)
def test_values_that_a_form_cannot_have_get_a_sentence(row, said):
    for kind in (
        ("comparisons", "solutions") if "overall_score" not in str(row) else ("comparisons",)
    ):
        assert said in fault(kind, row)
    if "instruction" in row:
        assert texts("prompts", row) == [("p",)]


def test_labels_of_steps():
    one = {"text": "a", "rating": 1}
    place = {"completions": [one], "human_completion": None, "chosen_completion": 0}

    def rated(*steps):
        return {
            "question": {"problem": "p", "ground_truth_answer": "3"},
            "label": {"steps": [*steps]},
        }

    def labels(row):
        [read] = parsed("solutions", row).rows
        return read.steps, read.labels

    neutral = place | {"completions": [{"text": "b", "rating": 0}]}
    by_person = place | {
        "human_completion": {"text": "c", "rating": None},
        "chosen_completion": None,
    }
    unrated = place | {"completions": [{"text": "d", "rating": None}]}
    row = rated(place, neutral, by_person, unrated, place)
    assert labels(row) == (("a\n", "b\n", "c"), (True, True, True))
    assert parsed("solutions", rated(unrated)).dropped == {"no step has a rating": 1}
    assert parsed("prompts", row).rows[0].columns["answer"] == "3"
    judged = {"problem": "p", "steps": ["a", "b", "c"]}
    assert labels(judged | {"label": -1}) == (("a\n", "b\n", "c"), (True, True, True))
    assert labels(judged | {"label": 0}) == (("a",), (False,))


def test_calls_of_xlam_reach_the_template(read):
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]
    row = {"query": "q", "answers": json.dumps(calls), "tools": json.dumps([{"name": "f"}])}
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer, [one], _ = read("demonstrations", row, template)
    assert tokenizer.decode_raw(one.prompt).startswith("f;<|im_start|>user\nq<|im_end|>")
    assert tokenizer.decode_raw(one.responses[0]).startswith('f({"x": 1})g({})<|im_end|>')


@pytest.mark.parametrize(("score", "target"), [(4.5, 4.5), (0, 0.0), ("high", None), (True, None)])
def test_a_response_with_its_score(score, target):
    row = {"prompt": "p", "response": "r", "score": score}
    assert texts("demonstrations", row) == [("p", "r")]
    assert parsed("prompts", row).rows[0].columns["score"] == score
    assert parsed("demonstrations", row | {"level": 3}).unread == {"score": 1, "level": 1}
    found = parsed("comparisons", row)
    assert [one.targets for one in found.rows] == ([] if target is None else [(target,)])
    assert found.unread == {}
    marked = row | {"desirable": True}
    assert parsed("feedback", marked).rows[0].targets == (1.0,)


def test_a_magpie_row_whose_parts_differ_is_refused():
    row = EXAMPLES["Magpie"] | {"response": "Yes."}
    assert "fits Dolly and ShareGPT" in fault("demonstrations", row) or "fits" in fault(
        "demonstrations", row
    )


# --- What a review found


@pytest.mark.parametrize("other", ["Sure, here.", "No."])
def test_a_begun_answer_that_is_repeated_is_refused(other):
    begun = {"prompt": [ASK, says("Sure, ")]}
    assert "leave one of the two out" in fault(
        "demonstrations", begun | {"completion": [ASK, says(other)]}
    )
    pair = begun | {"chosen": [ASK, says(other)], "rejected": [ASK, YES]}
    assert "leave one of the two out" in fault("pairs", pair)


def test_rl_keeps_one_prompt_with_other_variables_or_tools(read):
    row = {"prompt": "Is ice warm?", "response": "No."}
    modes = [{"mode": "on"}, {"mode": "off"}, {"mode": "on"}]
    rows = [row | {"chat_template_kwargs": variables} for variables in modes]
    tools = [row | {"tools": [{"name": name}]} for name in "ab"]
    for more, count in ((rows, 2), (tools, 2)):
        found = parsed("prompts", *more)
        assert len(found.rows) == count
        assert found.dropped == ({formats.REPEATED: 1} if len(more) > count else {})


WORKED = ["cot", "chain_of_thought", "thinking", "Thought", "deepseek_reasoning", "generations"]
WORKED += ["solutions", "worked_solution", "r1_solution_1", "full_answer", "Rationale"]


@pytest.mark.parametrize(
    "key",
    WORKED,
)
def test_a_bare_answer_is_a_question_for_rl_alone(key):
    row = {"question": "q", "answer": "2", key: "1 + 1"}
    assert "expected keys" in fault("demonstrations", row)
    [read] = parsed("prompts", row | {"id": 7}).rows
    assert read.columns == {"answer": "2", key: "1 + 1", "id": 7}
    prose = {"question": "q", "answer": "2", "note": "one and one are two of them so it is"}
    assert "expected keys" in fault("demonstrations", prose)
    for short in (
        {"genre": "fiction"},
        {"agent": "x-1"},
        {"note": "easy"},
        {"id": "0b5ac2ad-8bd3-4a1c"},
        {key: "1"},
        {key: ["2"]},
    ):
        assert texts("demonstrations", {"question": "q", "answer": "2"} | short) == [("q", "2")]
    listed = {"question": "q", "answer": "2", "generations": ["1 + 1", "2"]}
    assert "expected keys" in fault("demonstrations", listed)


@pytest.mark.parametrize("key", ["system_message", "system_instruction"])
def test_other_names_of_the_system(key):
    assert (
        parsed("demonstrations", {key: "Be brief.", "messages": [ASK, NO]}).rows[0].prompt == BRIEF
    )
    alone = {key: "Be brief.", "response": [ASK, NO]}
    assert parsed("demonstrations", alone).rows[0].prompt == BRIEF


HISTORY = [["Hi", "Hello"]]


@pytest.mark.parametrize(
    "history",
    [
        HISTORY,
        json.dumps(HISTORY),
        [user("Hi"), says("Hello")],
        json.dumps([user("Hi"), says("Hello")]),
    ],
)
def test_every_spelling_of_history(history):
    first = "User:\nHi\n\nAssistant:\n"
    row = {"prompt": "Is ice warm?", "history": history}
    assert texts("prompts", row) == [(f"{first}Hello\n\n{ASKED}",)]
    expected = [(first, "Hello"), (f"{first}Hello\n\n{ASKED}", "No.")]
    for told in ({"response": "No."}, {"completion": [NO]}, {"prompt": [ASK], "response": [NO]}):
        assert texts("demonstrations", row | told) == expected
        assert parsed("demonstrations", row | told).unread == {}
    scored = row | {"response": "No.", "score": 3}
    assert texts("comparisons", scored) == [(f"{first}Hello\n\n{ASKED}", "No.")]
    assert parsed("prompts", row | {"response": "No."}).rows[0].columns["response"] == "No."


@pytest.mark.parametrize("history", [[["h"]], [["h", None]], [["a", "b", "c"]], [3], [{"q": "a"}]])
def test_what_is_no_history_is_refused(history):
    assert "'history' must be" in fault("prompts", {"prompt": "p", "history": history})


def test_unread_keys_of_conversations_are_named():
    row = {"messages": [ASK, NO], "response": "No.", "history": "of Rome", "level": 1, "system": ""}
    assert parsed("demonstrations", row).unread == {"history": 1, "level": 1}
    marked = row | {"desirable": True, "ranks": [0, 1]}
    assert parsed("feedback", marked).unread.keys() == {"response", "history", "level", "ranks"}
    assert parsed("demonstrations", {"text": "t", "system": "s"}).unread == {"system": 1}


def test_a_response_that_contradicts_the_messages_is_refused():
    row = {"messages": [ASK, NO], "response": "Yes."}
    assert "'response' is not the last answer" in fault("demonstrations", row)
    assert texts("demonstrations", row | {"response": " No."}) == [(ASKED, "No.")]
    assert parsed("prompts", row).rows[0].columns == {"response": "Yes."}


@pytest.mark.parametrize("prompt", ["", "  "])
def test_a_system_before_an_empty_prompt_is_refused(prompt):
    row = {"system": "Be brief.", "prompt": prompt, "response": "r"}
    assert "'prompt' is a string, and no" in fault("demonstrations", row)


def test_a_step_by_a_person_has_the_rating_that_it_was_given():
    place = {"completions": [], "human_completion": {"text": "c", "rating": -1}}
    row = {"question": {"problem": "p", "ground_truth_answer": None}, "label": {"steps": [place]}}
    assert parsed("solutions", row).rows[0].labels == (False,)


@pytest.mark.parametrize("text", ["false", "False", "true"])
def test_a_truth_that_is_text_is_no_variable(text):
    row = {"messages": [ASK, NO], "chat_template_kwargs": {"enable_thinking": text}}
    assert "enable_thinking must be true or false" in fault("demonstrations", row)


def test_rewards_find_the_columns_under_the_names_of_their_sender():
    for row in (
        {"question": "q", "solution": "long", "answer": "2"},
        {"problem": "q", "solution": "long", "answer": "2"},
    ):
        columns = parsed("prompts", row).rows[0].columns
        assert (columns["solution"], columns["answer"], columns["response"]) == (
            "long",
            "2",
            "long",
        )
        assert parsed("demonstrations", row).unread.keys() <= {"answer"}


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("comparisons", {"prompt": "p", "response": "r", "score": "4.5"}, ("p", "r")),
        ("comparisons", {"prompt": [ASK], "response": [NO], "score": 3}, (ASKED, "No.")),
        ("solutions", {"problem": "p", "steps": ["a", "b"], "label": "-1"}, ("p", "a\n", "b")),
        (
            "pairs",
            {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": "-2"},
            ("p", "a", "b"),
        ),
        ("demonstrations", EXAMPLES["s1K"] | {"text": "t"}, ("What is 1 + 2?", "<think>\nOne")),
        (
            "demonstrations",
            EXAMPLES["Magpie"] | {"conversations": [ASK, says("No. ")]},
            (ASKED, "No. "),
        ),
        ("prompts", {"data": ["x", "y"], "question": "q", "answer": "a"}, ("q",)),
        (
            "pairs",
            {"prompt": "p", "question": "p", "chosen": "a", "rejected": "b"},
            ("p", "a", "b"),
        ),
    ],
)
def test_spellings_of_published_rows(kind, row, expected):
    [found] = texts(kind, row)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


@pytest.mark.parametrize("steps", ["t1", '["t1"]', [], [3]])
def test_thoughts_that_are_no_list_of_texts_are_refused(steps):
    row = EXAMPLES["s1K"] | {"thinking_trajectories": steps}
    assert "expected keys" in fault("demonstrations", row)


def test_conversations_beside_plain_prompts_are_said_where_their_frames_differ():
    plain = {"prompt": "p", "response": "r"}
    rows = parsed("demonstrations", plain, plain | {"system": "Be brief."}).rows
    assert "a conversation" in formats.mixed(rows)
    assert formats.mixed(rows[:1]) == formats.mixed(rows[1:]) == formats.mixed([]) == ""
