"""Which turns of a conversation are learned, in demonstrations and preferences, and the forms that
a message has.
"""

import json

import chat_templates
import jax
import numpy as np
import pytest
import transformers
from builders import slow
from chat_templates import HELLO, HI, MORE, SYSTEM, YES, encoded, rows_of, spans

from rlhf_jax import kto
from rlhf_jax.data import batches, chat, encoding, formats
from rlhf_jax.data.tokenizers import load_tokenizer, train_bpe
from rlhf_jax.errors import UserError

NO = {"role": "assistant", "content": "No."}
END = "<|im_end|>"


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatml")
    chat_templates.write(folder, "chatml")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    chat_templates.write(folder, "qwen3")
    return load_tokenizer(folder)


def learned(tokenizer, write, record, **options):
    """The learned texts of each row."""
    rows = rows_of(tokenizer, write, record, **options)
    return [spans(tokenizer, *row) for row in encoded(tokenizer, rows)]


def test_turns_of_weight_0_and_all_but_the_last_are_left_out(chatml, qwen3, write):
    talk = {"messages": [HI, HELLO | {"weight": 0}, MORE, YES | {"weight": 1}]}
    assert learned(chatml, write, talk) == [[f"Yes.{END}"]]
    assert learned(chatml, write, {"messages": [HI, HELLO, MORE, YES | {"weight": 0}]}) == [
        [f"Hello!{END}"]
    ]
    both = {"messages": [HI, HELLO, MORE, YES]}
    assert learned(chatml, write, both) == [[f"Hello!{END}", f"Yes.{END}"]]
    assert learned(chatml, write, both, turns="last") == [[f"Yes.{END}"]]
    [row] = rows_of(qwen3, write, both, turns="last")
    assert row.source == "data.jsonl, line 1"
    turns = rows_of(qwen3, write, both)
    assert [row.source[-6:] for row in turns] == ["turn 1", "turn 2"]
    assert [len(row.messages) for row in turns] == [1, 3]
    assert encoding.group(turns[0]) == encoding.group(turns[1])  # one side of a split
    with pytest.raises(UserError, match="line 1: no turn of the assistant is learned"):
        learned(chatml, write, {"messages": [HI, HELLO | {"weight": 0}]})
    with pytest.raises(UserError, match=r"'weight' of a message must be 0 or 1, .* found"):
        learned(chatml, write, {"messages": [HI, HELLO | {"weight": 0.5}]})


def test_a_prompt_is_given_and_its_own_turns_are_not_learned(chatml, write):
    record = {"prompt": [HI, HELLO, MORE], "response": "Yes."}
    assert learned(chatml, write, record) == [[f"Yes.{END}"]]
    record = {"prompt": [HI], "response": [HELLO, MORE, YES]}
    assert learned(chatml, write, record) == [[f"Hello!{END}", f"Yes.{END}"]]


def test_a_preference_counts_what_differs(chatml, qwen3, write):
    record = {"chosen": [SYSTEM, HI, HELLO, MORE, YES], "rejected": [SYSTEM, HI, NO, MORE, NO]}
    template = chat.template_of(chatml, "auto")
    [row] = formats.read("pairs", write([record]), template=template).rows
    data = encoding.encode_texts([row], chatml, template="auto")
    batch = batches.comparison_batch(data, np.array([0]), 1)
    for answer, said in enumerate((["Hello!", "Yes."], ["No.", "No."])):
        mask = batch.response_mask[0, answer]
        real = batch.attention_mask[0, answer] == 1
        shown = spans(chatml, batch.tokens[0, answer][real].tolist(), mask[real].tolist())
        assert shown == [f"{text}{END}" for text in said]
        assert mask[real][-1] == 1  # the score stands at the end of the turn
    assert data.starts[0].tolist() == [len(row.prompt)] * 2


def test_a_beginning_that_both_answers_share_is_context(chatml, write):
    record = {"chosen": [SYSTEM, HI, HELLO, MORE, YES], "rejected": [SYSTEM, HI, HELLO, MORE, NO]}
    template = chat.template_of(chatml, "auto")
    [row] = formats.read("pairs", write([record]), template=template).rows
    assert row.messages == [SYSTEM, HI, HELLO, MORE]
    assert not row.learned
    [row] = formats.read("demonstrations", write([record]), template=template).rows
    assert [spans(chatml, *text) for text in encoded(chatml, [row])] == [[f"Yes.{END}"]]
    liked, disliked = formats.read("feedback", write([record]), template=template).rows
    assert (liked.targets, disliked.targets) == ((1.0,), (0.0,))
    assert chatml.decode(disliked.responses[0]) == f"No.{END}"


def test_feedback_learns_what_a_demonstration_learns(chatml, qwen3, write):
    talk = {"messages": [HI, HELLO, MORE, YES]}
    for tokenizer in (chatml, qwen3):
        assert feedback(tokenizer, write, talk) == learned(tokenizer, write, talk)
    assert feedback(chatml, write, talk) == [[f"Hello!{END}", f"Yes.{END}"]]
    assert feedback(chatml, write, talk, turns="last") == [[f"Yes.{END}"]]
    first = {"messages": [HI, HELLO, MORE, YES | {"weight": 0}]}
    assert feedback(chatml, write, first) == [[f"Hello!{END}"]]
    given = {"prompt": [HI, HELLO, MORE], "response": [YES, MORE, NO]}
    assert feedback(chatml, write, given) == [[f"Yes.{END}", f"No.{END}"]]
    with pytest.raises(UserError, match="line 1: no turn of the assistant is learned"):
        feedback(chatml, write, {"messages": [HI, HELLO | {"weight": 0}]})
    plain = formats.read("feedback", write([talk | {"desirable": False}])).rows
    assert [row.responses for row in plain] == [("Hello!",), ("Yes.",)]
    assert [row.targets for row in plain] == [(0.0,), (0.0,)]


def feedback(tokenizer, write, record, **options):
    """The learned texts of each row of KTO, all of which are called desirable."""
    template = chat.template_of(tokenizer, "auto")
    options |= {"template": template}
    rows = formats.read("feedback", write([record | {"desirable": 1}]), **options).rows
    assert {row.targets for row in rows} == {(1.0,)}
    return [spans(tokenizer, *row) for row in encoded(tokenizer, rows)]


def test_the_two_sides_of_a_preference_are_feedback_on_all_of_their_turns(chatml, qwen3, write):
    record = {"chosen": [HI, HELLO, MORE, YES], "rejected": [HI, NO, MORE, NO]}
    path = write([record])
    rows = formats.read("feedback", path, template=chat.template_of(chatml, "auto")).rows
    shown = [spans(chatml, *row) for row in encoded(chatml, rows)]
    assert shown == [[f"Hello!{END}", f"Yes.{END}"], [f"No.{END}"] * 2]
    assert [row.targets for row in rows] == [(1.0,), (0.0,)]
    rows = formats.read("feedback", path, template=chat.template_of(qwen3, "auto")).rows
    assert [row.targets for row in rows] == [(1.0,), (1.0,), (0.0,), (0.0,)]


def test_a_mismatched_row_keeps_the_holes_of_the_answer(chatml, write):
    """The reference point of KTO: the turn of the user in an answer is read, and not learned."""
    talk = {"messages": [HI, HELLO, MORE, YES], "desirable": True}
    other = {"messages": [SYSTEM, MORE, NO], "desirable": False}
    template = chat.template_of(chatml, "auto")
    rows = formats.read("feedback", write([talk, other]), template=template).rows
    data = encoding.encode_texts(rows, chatml, template="auto")
    mixed = jax.jit(kto.mismatched)(batches.feedback_batch(data, np.arange(2), 1))
    shown = [spans(chatml, mixed.tokens[i], mixed.response_mask[i]) for i in (0, 1)]
    assert shown == [[f"No.{END}"], [f"Hello!{END}", f"Yes.{END}"]]
    real = np.asarray(mixed.attention_mask[1] == 1)
    ids = np.asarray(mixed.tokens[1])[real].tolist()
    assert ids == [*rows[1].prompt, *rows[0].responses[0]]


def test_a_score_stands_at_the_end_of_the_turn_whatever_is_learned_behind_it(tmp_path, write):
    """SmolLM3's template marks the line end behind <|im_end|> too."""
    chat_templates.write(tmp_path, "smollm3")
    tokenizer = load_tokenizer(tmp_path)
    template = chat.template_of(tokenizer, "auto")
    record = {"prompt": [HI], "chosen": "Yes.", "rejected": "No."}
    [row] = formats.read("pairs", write([record]), template=template).rows
    end = tokenizer.backend.token_to_id(END)
    assert [response[-1] for response in row.responses] == [end, end]
    said = feedback(tokenizer, write, {"messages": [HI, HELLO, MORE, YES]})
    assert [turns[-1][-len(END) :] for turns in said] == [END] * len(said)


def test_preferences_without_a_single_text_are_refused(qwen3, write):
    record = {"chosen": [HI, HELLO, MORE, YES], "rejected": [HI, NO, MORE, NO]}
    with pytest.raises(UserError, match="line 1: the chat template"):
        formats.read("pairs", write([record]), template=chat.template_of(qwen3, "auto"))
    with pytest.raises(UserError, match=r"line 1: answers .* need a chat template"):
        formats.read("pairs", write([record]))
    with pytest.raises(UserError, match="line 1: dialogues differ"):
        formats.read("pairs", write([{"chosen": [HI, HELLO], "rejected": [MORE, YES]}]))


def test_packed_and_flat_rows_have_the_same_learned_tokens(chatml, write):
    talk = {"messages": [HI, HELLO, MORE, YES]}
    other = {"messages": [MORE, NO]}
    template = chat.template_of(chatml, "auto")
    rows = formats.read("demonstrations", write([talk, other]), template=template).rows
    data = encoding.encode_texts(rows, chatml, template="auto")
    flat = batches.demonstration_batch(data, np.arange(2), 1)
    width = int(data.lengths.sum())
    packed = batches.packed_batch(data, np.arange(2), width=width)
    expected = [spans(chatml, flat.tokens[i], flat.response_mask[i]) for i in (0, 1)]
    assert expected == [[f"Hello!{END}", f"Yes.{END}"], [f"No.{END}"]]
    assert spans(chatml, packed.tokens[0], packed.response_mask[0]) == [*expected[0], *expected[1]]


PARTS = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]


def test_forms_of_a_message(chatml, qwen3, write):
    parts = {"messages": [HI | {"content": PARTS}, HELLO]}
    for tokenizer, shown in ((chatml, "Hi there"), (qwen3, "Hi\n there")):
        [row] = rows_of(tokenizer, write, parts)  # a template that reads texts alone gets one text
        assert f"user\n{shown}" in tokenizer.backend.decode(row.prompt)
    assert formats.read("demonstrations", write([parts])).rows[0].prompt == (
        "User:\nHi\n there\n\nAssistant:\n"
    )
    thought = HELLO | {"reasoning_content": "I greet."}
    assert learned(qwen3, write, {"messages": [HI, thought]}) == [
        [f"<think>\nI greet.\n</think>\n\nHello!{END}"]
    ]
    faults = [
        ({"messages": [HI | {"content": [{"type": "image"}]}, HELLO]}, "a part of type 'image'"),
        ({"messages": [HI | {"content": None}, HELLO]}, "'content' of message 1 .* found null"),
        ({"messages": [HI, HELLO | {"tool_calls": "x"}]}, "'tool_calls' of message 2 .* a list"),
        ({"messages": [HI | {"name": END}, HELLO]}, "a user message spells the special token"),
        ({"messages": [HI, HELLO], "tools": "[{"}, "'tools' is not JSON"),
        ({"messages": [HI, HELLO], "tools": {"a": 1}}, "'tools' must be a list"),
        (
            {"messages": [HI, HELLO], "tools": [{"name": END}]},
            "the tools spells? the special token",
        ),
    ]
    for record, message in faults:
        with pytest.raises(UserError, match=f"line 1: .*{message}"):
            rows_of(qwen3, write, record)
    for record, key in (
        ({"messages": [HI, thought]}, "reasoning_content"),
        ({"messages": [HI, HELLO], "tools": [{"name": "sky"}]}, "tools"),
    ):
        with pytest.raises(UserError, match=f"the plain template writes no {key}"):
            formats.read("demonstrations", write([record]))


@pytest.mark.parametrize("label", [True, False])
def test_the_label_of_a_completion_is_not_that_of_its_prompt(label, chatml, write):
    """Above all no right answer of the prompt gets a label of false."""
    before = [SYSTEM, HI, HELLO, MORE]
    history = {"history": [["Hi", "Hello!"]]}
    rows = [
        {"prompt": before, "completion": [NO], "label": label},
        {"prompt": before, "completion": [*before, NO], "label": label},
        {"instruction": "More?", "output": "No.", "kto_tag": label} | history,
        {"query": "More?", "response": "No.", "label": label} | history,
    ]
    template = chat.template_of(chatml, "auto")
    read = formats.read("feedback", write(rows), template=template).rows
    assert [row.targets for row in read] == [(float(label),)] * 4
    shown = [spans(chatml, *row) for row in encoded(chatml, read)]
    assert shown == [[f"No.{END}"]] * 4


def test_of_a_prompt_and_a_completion_the_completion_is_learned(chatml, write):
    before = [SYSTEM, HI, HELLO, MORE]
    for completion in ([NO], [*before, NO]):
        row = {"prompt": before, "completion": completion}
        assert learned(chatml, write, row) == [[f"No.{END}"]]
        [read] = formats.read("prompts", write([row])).rows
        assert read.messages == before
    begun = {"prompt": [HI, HELLO | {"content": "Hel"}], "completion": [HELLO | {"content": "lo!"}]}
    assert learned(chatml, write, begun) == [[f"lo!{END}"]]
    begun["completion"] += [MORE, NO]
    assert learned(chatml, write, begun) == [[f"lo!{END}", f"No.{END}"]]
    row = {"prompt": "Hi", "completion": [HELLO, MORE, NO]}
    assert learned(chatml, write, row) == [[f"Hello!{END}", f"No.{END}"]]


def test_of_a_begun_answer_that_a_template_marks_the_end_is_learned(tmp_path, write):
    chat_templates.write(tmp_path, "phi4")  # with {% generation %}
    begun = {"prompt": [HI, HELLO | {"content": "Hel"}], "completion": [HELLO | {"content": "lo!"}]}
    assert learned(load_tokenizer(tmp_path), write, begun) == [[f"lo!{END}"]]


@pytest.mark.parametrize("end", ["{{ eos_token }}", ";"])
def test_an_opening_and_an_answer_share_no_token(end, tmp_path, write):
    """The opening is read alone, as in sampling."""
    train_bpe(["AYes"] * 9, 270).save(tmp_path)
    source = "{% for m in messages %}{{ 'Q' if m.role == 'user' else 'A' }}{{ m.content }}"
    source += f"{end}{{% endfor %}}{{% if add_generation_prompt %}}A{{% endif %}}"
    (tmp_path / "chat_template.jinja").write_text(source)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("AYes")) == 1
    assert learned(tokenizer, write, {"messages": [HI, YES]}) == [["Yes.<|endoftext|>"]]


FLAGS = [{"loss": False}, {"train": False}, {"training": False}, {"loss_weight": 0.0}]


@pytest.mark.parametrize("flag", [*FLAGS, {"trainable": 0}, {"weight": 1, "train": False}])
def test_a_turn_that_its_data_says_is_not_learned(flag, chatml, write):
    [key] = [key for key, value in flag.items() if not value]
    kept = YES | {key: True}
    talk = [HI | {key: True}, HELLO | flag, MORE | {key: False}, kept]
    assert learned(chatml, write, {"messages": talk}) == [[f"Yes.{END}"]]
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"} | flag]
    turns += [turns[0], {"from": "gpt", "value": "b", key: None}]
    assert learned(chatml, write, {"conversations": turns}) == [[f"b{END}"]]
    with pytest.raises(UserError, match=f"line 1: '{key}' of a message"):
        learned(chatml, write, {"messages": [HI, HELLO | {key: "false"}]})


def test_keys_of_messages_that_the_template_does_not_write_are_named(chatml, write):
    turn = HELLO | {"mask": 1, "id": 7, "r.le": 1, "empty": "", "name": "Al"}
    path = write([{"messages": [HI, turn]}])
    found = formats.read("demonstrations", path, template=chat.template_of(chatml))
    assert found.unwritten == {"mask": 1, "id": 1, "r.le": 1}


def with_template(folder, source):
    """Our tokenizer of ChatML's tokens with this template, and transformers'."""
    chat_templates.write(folder, "chatml")
    (folder / "chat_template.jinja").write_text(source)
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


# Generation prompts that go on behind the opening of a turn, and the end of a turn.
OPENINGS = {
    "r1": ("<|im_start|>", "<think>\n", END),
    "no token opens a turn": ("Assistant: ", "<think>\n", END),
    "a word": ("<|im_start|>assistant\n", "Answer: ", END),
    "no token at all": ("\n### A:\n", "<think>\n\n</think>", "\n"),
}


@pytest.mark.parametrize("is_marked", [False, True])
@pytest.mark.parametrize("form", OPENINGS)
def test_an_answer_is_learned_from_its_first_character(form, is_marked, tmp_path, write):
    opening, goes_on, end = OPENINGS[form]
    said = "{{ m.content.split('</think>')[-1] }}" + end
    if is_marked:
        said = "{% generation %}" + said + "{% endgeneration %}"
    source = "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}{% else %}"
    source += f"{opening}{said}{{% endif %}}{{% endfor %}}"
    source += f"{{% if add_generation_prompt %}}{opening}{goes_on}{{% endif %}}"
    tokenizer, _ = with_template(tmp_path, source)
    last = "<|endoftext|>" if end == "\n" and not is_marked else end
    for text in ("<answer>4</answer>", "And 4", "<thought>4", "4"):
        turn = {"role": "assistant", "content": text}
        assert learned(tokenizer, write, {"messages": [HI, turn]}) == [[text + last]]
        record = {
            "prompt": [HI],
            "chosen": [turn],
            "rejected": [turn | {"content": text[:1] + "z"}],
        }
        template = chat.template_of(tokenizer, "auto")
        [row] = formats.read("pairs", write([record]), template=template).rows
        data = encoding.encode_texts([row], tokenizer, template="auto")
        batch = batches.comparison_batch(data, np.array([0]), 1)
        for answer, content in enumerate((text, text[:1] + "z")):
            shown = spans(tokenizer, batch.tokens[0, answer], batch.response_mask[0, answer])
            assert shown == [content + last]


@pytest.mark.parametrize(("tag", "end"), [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_reasoning_that_a_template_cuts_out_of_an_answer_is_named(tag, end, tmp_path, write):
    source = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content.split('END')[-1] }}"
    source += "<|im_end|>{% endfor %}"
    said = f"{tag}two twos{end}4"
    rows = [
        {"messages": [HI, HELLO | {"content": said}]},
        {"prompt": [HI], "response": said},
        {"prompt": "hi", "response": said},
        {"messages": [HI | {"content": said}, HELLO]},
        {"messages": [HI, HELLO | {"content": "<b>4</b>"}]},
    ]
    path = write(rows)
    for cuts, expected in ((end, {"reasoning in content": 3}), ("none", {})):
        tokenizer, _ = with_template(tmp_path, source.replace("END", cuts))
        template = chat.template_of(tokenizer, "auto")
        found = formats.read("demonstrations", path, template=template)
        assert found.unwritten == expected
        assert ("leaves out: reasoning in content" in found.describe_unread("")) == bool(expected)
    tokenizer, _ = with_template(tmp_path, source.replace("END", end))
    framed = chat.template_of(tokenizer, "Q: {prompt}")
    read = formats.read("demonstrations", path, template=framed)
    assert read.unwritten == {"reasoning in content": 2}  # of messages, not of the framed prompt
    ranked = [{"prompt": [HI], "responses": [said, "5"], "best": 1}]
    read = formats.read("comparisons", write(ranked), template=template)
    assert read.unwritten == {}
    read = formats.read("comparisons", write(ranked), template=framed)
    assert read.unwritten == {"reasoning in content": 1}
    pair = [{"prompt": "hi", "chosen": said, "rejected": "5"}]
    read = formats.read("pairs", write(pair), template=chat.template_of(tokenizer, "auto"))
    assert read.unwritten == {"reasoning in content": 1}


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ('{"city": "Paris", "n": 1}', {"city": "Paris", "n": 1}),
        ("{}", {}),
        ({"city": "Paris"}, {"city": "Paris"}),
        ("Paris", "Paris"),
        ("[1]", "[1]"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_arguments_of_a_call_as_json_text_are_an_object(given, written, nested, tmp_path, write):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% for c in m.tool_calls"
    )
    source += (
        " or [] %}{{ (c.function or c).arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    )
    if nested:  # a template that a short conversation cannot try
        source += "{% if messages[0].content != 'Hi' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer, _ = with_template(tmp_path, source)
    call = {"name": "sky", "arguments": given}
    call = {"type": "function", "function": call} if nested else call
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    [[text]] = learned(tokenizer, write, {"messages": [HI, turn]})
    assert text.removesuffix(END).endswith(json.dumps(written))
    assert call == ({"type": "function", "function": call["function"]} if nested else call)


@pytest.mark.parametrize("text", ['{"city":"Paris"}', '{"n": 1.50}', "{}"])
def test_arguments_stay_text_for_a_template_that_joins_them_to_text(text, tmp_path, write):
    """As that of DeepSeek-V3 and R1."""
    source = "{% for m in messages %}<|im_start|>{{ m.role + m.content }}{% for c in m.tool_calls"
    source += " or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}<|im_end|>"
    tokenizer, theirs = with_template(tmp_path, source + "{% endfor %}")
    call = {"type": "function", "function": {"name": "sky", "arguments": text}}
    turns = [HI, {"role": "assistant", "content": "", "tool_calls": [call]}]
    [[learns]] = learned(tokenizer, write, {"messages": turns})
    assert learns.endswith(f"sky{text}{END}")
    template = chat.template_of(tokenizer, "auto")
    expected = theirs.apply_chat_template([*turns, MORE], return_dict=False)
    assert list(template.prompt([*turns, MORE], "")) == expected
    assert template.ends == [tokenizer.backend.token_to_id(END)]


@pytest.mark.parametrize("count", [6_000, slow(20_000)])
def test_a_conversation_of_too_many_turns_is_refused_before_it_is_rendered(chatml, write, count):
    talk = {"messages": [HI, HELLO] * (count // 2)}
    for tokenizer in (chatml, None):
        template = chat.template_of(tokenizer, "auto")
        message = f"line 1: {count // 2} turns of {count} messages would be learned"
        with pytest.raises(UserError, match=message):
            formats.read("demonstrations", write([talk]), template=template)
