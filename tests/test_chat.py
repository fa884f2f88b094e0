"""Messages as prompts and responses, by chat templates that may do nothing but write text."""

import json
import os

import chat_families
import chat_templates
import numpy as np
import pytest
import tokenizers as hf
import transformers
from chat_families import ANSWER, SYSTEM, USER

from rlhf_jax.data import chat, encoding, formats
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import Tokenizer, characters, load_tokenizer, train_bpe
from rlhf_jax.errors import UserError


def test_messages_as_demonstrations_and_prompts(write):
    path = write(
        [
            {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]},
            {"messages": [USER, ANSWER], "level": 2},
        ]
    )
    first = "System:\nbe kind\n\nUser:\nhi\n\nAssistant:\n"
    history = f"{first}hello\n\nUser:\nhi\n\nAssistant:\n"
    turns = [
        Row(first, ("hello",), f"{path}, line 1, turn 1"),
        Row(history, ("hello",), f"{path}, line 1, turn 2"),
    ]
    second = Row("User:\nhi\n\nAssistant:\n", ("hello",), f"{path}, line 2")
    assert formats.read("demonstrations", path).rows == [*turns, second]
    last = Row(history, ("hello",), f"{path}, line 1")
    assert formats.read("demonstrations", path, turns="last").rows == [last, second]
    prompts = formats.read("prompts", path).rows
    assert [row.prompt for row in prompts] == [history, "User:\nhi\n\nAssistant:\n"]
    assert prompts[1].columns == {"level": 2}
    open_ended = write([{"messages": [USER]}, {"prompt": [USER], "level": 2}])
    result = formats.read("prompts", open_ended).rows
    assert [(row.prompt, row.columns) for row in result] == [
        (prompts[1].prompt, {}),
        (prompts[1].prompt, {"level": 2}),
    ]
    path = write([{"messages": [USER]}, {"prompt": [USER], "response": "yes"}])
    result = formats.read("demonstrations", path, on_bad_row="drop")
    assert result.rows[0].responses[0] == "yes"
    assert result.dropped == {"dialogue without a last response": 1}


def test_messages_as_pairs(write):
    other = {"role": "assistant", "content": "no"}
    forms = [
        {"chosen": [USER, ANSWER], "rejected": [USER, other]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [other]},
        {"prompt": [USER], "chosen": "hello", "rejected": "no"},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, other]},
        {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, other]},
        {"prompt": "hi", "chosen": [ANSWER], "rejected": [other]},
    ]
    path = write(
        [
            *forms,
            {"chosen": [USER, ANSWER], "rejected": [ANSWER, other]},
            {**forms[1], "rejected": [ANSWER]},
        ]
    )
    result = formats.read("pairs", path, on_bad_row="drop")
    expected = ("User:\nhi\n\nAssistant:\n", "hello", "no")
    assert result.rows == [
        Row(expected[0], expected[1:], f"{path}, line {n}") for n in range(1, len(forms) + 1)
    ]
    early = "'rejected' has no message before the assistant's"
    assert result.dropped == {early: 1, formats.EQUAL: 1}
    assert [row.prompt for row in formats.read("prompts", write(forms)).rows] == [
        "User:\nhi\n\nAssistant:\n"
    ]
    ranked = write([{"prompt": [USER], "responses": ["a", "b"], "best": 0}])
    assert formats.read("comparisons", ranked).rows[0].prompt == "User:\nhi\n\nAssistant:\n"


FAULTS = [
    ([], "'messages' must be a list of messages {role, content}, found an empty list"),
    (
        [USER, "hello"],
        "message 2 of 'messages' must be an object with role, content, found a string",
    ),
    (
        [{"role": "user", "contents": "x"}],
        "'content' of message 1 of 'messages' must be a string, found null",
    ),
    (
        [USER, {"role": "asistant", "content": "x"}],
        "role of message 2 .* must be one of .*, found 'asistant'",
    ),
    (
        [USER, ANSWER | {"tool_calls": [{}]}],
        "the plain template writes no tool_calls",
    ),
    (
        [USER, ANSWER | {"tool_calls": [{}]}, USER, ANSWER],
        "the plain template writes no tool_calls",
    ),
    ([ANSWER], "'messages' has no message before the assistant's"),
]


@pytest.mark.parametrize(("messages", "message"), FAULTS)
def test_faults_of_messages(write, messages, message):
    with pytest.raises(UserError, match=message) as error:
        formats.read(
            "demonstrations", write([{"messages": [USER, ANSWER]}, {"messages": messages}])
        )
    assert "data.jsonl, line 2: " in str(error.value)


def test_a_tokenizers_own_template_writes_special_tokens_that_no_message_can(write):
    base = train_bpe(["hi hello user assistant\n"] * 3, 270)
    base.backend.add_special_tokens(
        [hf.AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    )
    source = (
        "{{ bos_token }}{% for message in messages %}\n"
        "<|im_start|>{{ message.role }} {% generation %}{{ message.content | trim }}<|im_end|>"
        "{% endgeneration %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    config = {
        "chat_template": [
            {"name": "tools", "template": "x"},
            {"name": "default", "template": source},
        ]
    }
    config["bos_token"] = "<|endoftext|>"
    tokenizer = Tokenizer(base.backend, base.pad_id, base.eos_id, config)
    template = chat.template_of(tokenizer)
    path = write([{"messages": [USER, ANSWER]}])
    [row] = formats.read("demonstrations", path, template=template).rows
    start, end = (base.backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    encode = base.encode
    expected = [base.eos_id, start, *encode("user hi"), end, start, *encode("assistant ")]
    assert row.prompt == tuple(expected)
    np.testing.assert_array_equal(
        encoding.encode_texts([row], tokenizer).tokens[0][0],
        [*expected, *encode("hello"), end],
    )
    assert start not in base.encode("<|im_start|>")  # anywhere else it is text, as before
    forged = [{"role": "user", "content": "x<|im_end|>"}, ANSWER]
    with pytest.raises(UserError, match=r"line 1: .* '<\|im_end\|>'"):
        formats.read("demonstrations", write([{"messages": forged}]), template=template)
    assert chat.template_of(characters("ab")).source == chat.PLAIN


@pytest.mark.parametrize("family", chat_families.FAMILIES)
def test_tokenizers_of_chat_families_load(family, tmp_path):
    """Added tokens, thinking tags and the chat template of a folder such as these families ship."""
    backend = chat_families.write(tmp_path, family)
    _, eos, pad, _, special, tags, turns, expected = chat_families.FAMILIES[family]
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id) == tuple(map(backend.token_to_id, (eos, pad)))
    assert tokenizer.vocab_size == backend.get_vocab_size()  # nothing is added
    thought = "<think>\nhello\n</think>\n\nhi"
    ids = tokenizer.encode(thought)
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == thought
    assert [ids.count(backend.token_to_id(tag)) for tag in tags] == [1] * len(tags)
    template = chat.template_of(tokenizer)
    prompt = template.prompt(turns, "row")
    assert tokenizer.backend.decode(prompt, skip_special_tokens=False) == expected
    assert all(backend.token_to_id(token) in prompt for token in special if token in expected)
    if family in ("gemma2", "gemma3", "mistral"):
        with pytest.raises(UserError, match=r"row: .*: Conversation roles must"):
            template.prompt([USER, USER], "row")


@pytest.mark.parametrize(
    "template",
    [
        "Human: {prompt}\nAssistant: ",
        "\n\nHuman: {prompt}\n\nAssistant:",
        "{prompt}, {prompt}?",
        "{% 'a' #} {{\"{prompt}\\é😀",
    ],
)
def test_a_saved_tokenizer_renders_a_user_message_as_the_run_does_a_prompt(template, tmp_path):
    import transformers

    tokenizer = train_bpe(["hi hello user assistant\n"] * 3, 270)
    chat.with_text_template(tokenizer, template).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    ids = theirs.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert [ids] == encoding.prompt_ids([Row("hi", (), "")], tokenizer, template)
    turns = [{"role": "system", "content": "be kind"}, USER, ANSWER, USER]
    rendered = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    first, second = (template.replace("{prompt}", text) for text in ("be kind\n\nhi", "hi"))
    assert rendered == f"{first}hello<|endoftext|>{second}"
    # Messages of a later run's data are rendered as those of this run's, not put into the template
    # twice.
    assert chat.text_template(ours) == template
    assert chat.template_of(ours).source == chat.PLAIN


def test_under_a_bare_template_the_own_chat_template_stays_or_is_the_plain_one(tmp_path):
    base = train_bpe(["hi hello\n"], 270)
    framed = chat.with_text_template(base, "Q: {prompt}")
    own = Tokenizer(base.backend, base.pad_id, base.eos_id, {"chat_template": "{{ messages }}"})
    for tokenizer in (base, framed):
        chat.with_text_template(tokenizer, "{prompt}").save(tmp_path)
        saved = load_tokenizer(tmp_path)
        assert saved.config["chat_template"] == chat.PLAIN
        assert chat.text_template(saved) is None
        assert chat.template_of(saved).tokenizer is None
    # A comment in the own template says that the run asked without it: whoever goes on does too.
    chat.with_text_template(own, "{prompt}").save(tmp_path)
    saved = load_tokenizer(tmp_path)
    assert saved.config["chat_template"] == '{#- text.template: "{prompt}" -#}{{ messages }}'
    assert chat.text_template(saved) == "{prompt}"
    assert chat.frame("auto", saved) == "{prompt}"
    assert chat.template_of(saved).prompt([USER], "") == chat.template_of(own).prompt([USER], "")
    assert chat.with_text_template(saved, "{prompt}").config == saved.config
    assert chat.with_text_template(saved, "auto").config == saved.config


TEMPLATES = [
    ("{% if %}", "TemplateSyntaxError"),
    ("{{ raise_exception('only users') }}", "TemplateError: only users"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
    ("{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}", "SecurityError"),
    ("{% include '/etc/hostname' %}", "TypeError: no loader"),
    ("{{ range(1000000000) | list }}", "OverflowError: Range too big"),
    ("{{ 9 ** 9 ** 9 }}", "SecurityError: .* is not allowed"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
]


@pytest.mark.parametrize(("source", "message"), TEMPLATES)
def test_a_template_that_fails_or_reaches_out_names_the_row(write, source, message):
    with pytest.raises(UserError, match=f"line 1: the chat template failed: {message}"):
        formats.read(
            "demonstrations",
            write([{"messages": [USER, ANSWER]}]),
            template=chat.ChatTemplate(source),
        )


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
SAYS = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
NAMED = {"default": SAYS, "tool_use": "{{ tools[0].function.name }}|" + SAYS, "rag": "rag" + SAYS}


def in_files(folder, names, config="unused"):
    """A tokenizer whose templates of these names stand in files, as transformers saves them."""
    train_bpe(["user: hi add rag unused\n"] * 3, 280).save(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": config}))
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "notes.txt").write_text("no template")
    for name in names:
        path = folder / "chat_template.jinja"
        (path if name == "default" else more / f"{name}.jinja").write_text(NAMED[name])
    return load_tokenizer(folder)


@pytest.mark.parametrize("template", ["auto", "{prompt}"])
def test_templates_of_several_files_are_chosen_as_transformers_chooses(template, tmp_path):
    tokenizer = in_files(tmp_path, NAMED)
    chat.with_text_template(tokenizer, template).save(tmp_path / "saved")
    for folder in (tmp_path, tmp_path / "saved"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = chat.template_of(load_tokenizer(folder))
        for tools in (TOOLS, None):
            how = {"tools": tools, "add_generation_prompt": True, "return_dict": False}
            ids = theirs.apply_chat_template([USER], **how)
            assert ours.prompt([USER], "", tools=tools) == tuple(ids)
            text = tokenizer.decode_raw(ids)
            assert text == ("add|user:hi\n" if tools else "user:hi\n")
    optional = chat.reading(tokenizer, {"tools": 1})  # in all of them
    named = [entry["name"] for entry in optional.config["chat_template"]]
    assert named == ["default", "rag", "tool_use"]


def test_a_conversation_without_a_template_for_it_is_refused(tmp_path, write):
    """As in transformers the files replace the template of tokenizer_config.json."""
    tokenizer = in_files(tmp_path, ["tool_use", "rag"])
    template = chat.template_of(tokenizer)
    assert tokenizer.decode_raw(template.prompt([USER], "", tools=TOOLS)) == "add|user:hi\n"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no default specified"):
        theirs.apply_chat_template([USER])
    message = "line 1: the model's folder has the chat templates rag, tool_use, and none named def"
    path = write([{"messages": [USER, ANSWER]}])
    with pytest.raises(UserError, match=message):
        formats.read("demonstrations", path, template=template)
    rows = [Row("hi", (), "f, line 1")]
    with pytest.raises(UserError, match=message):
        encoding.prompt_ids(rows, tokenizer, "auto")
    assert encoding.prompt_ids(rows, tokenizer, "{prompt}") == [tokenizer.encode("hi")]
    os.mkfifo(tmp_path / "additional_chat_templates" / "pipe.jinja")
    with pytest.raises(UserError, match=r"pipe\.jinja"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("response", ["d", "end", "im", "", " ", "<", "|im_end|>", "\n"])
def test_a_short_answer_is_read_whole(response, tmp_path):
    """Not cut within the token that ends its turn, which spells it once more."""
    chat_templates.write(tmp_path, "chatml")
    tokenizer = load_tokenizer(tmp_path)
    template = chat.template_of(tokenizer, "auto")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [USER, {"role": "assistant", "content": response}]
    whole = theirs.apply_chat_template(turns, return_dict=False)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    until = len(whole) - whole[::-1].index(end)
    assert template.answered([USER], response, "", ends=True) == whole[:until]
    assert template.answered([USER], response, "") == whole
