"""Where a text begins and ends in tokens, and where a prompt meets its response: BOS, the join of
both, the end of a turn, spelled special tokens, begun answers.
"""

import json

import chat_templates
import jinja2
import numpy as np
import pytest
import tokenizer_folders
import tokenizers as hf
import transformers
from builders import initial_params
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors, trainers

from rlhf_jax import config, models
from rlhf_jax.config import RunConfig
from rlhf_jax.data import chat, check, encoding, formats
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import load_tokenizer, train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import Generator, LanguageModel
from rlhf_jax.sampling import SamplingConfig

SAMPLING = SamplingConfig(5, eos_id=1, pad_id=0)
WORDS = ["x A: Paris. the capital is Paris"] * 4


def save(folder, backend, **named):
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def with_bos(folder, processed=True, **named):
    """A byte-level tokenizer whose plain texts begin with <s>."""
    backend = train_bpe(WORDS, 270).backend
    tokens = ("<s>", "</s>", "<pad>")
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    first = ("<s>", backend.token_to_id("<s>"))
    if processed:
        how = {"single": "<s> $A", "special_tokens": [first]}
        backend.post_processor = processors.TemplateProcessing(**how)
    return save(folder, backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **named)


def sentencepiece(folder):
    """As the tokenizers of Llama 2 and Mistral 7B: a space is put before each text."""
    backend = hf.Tokenizer(hf.models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", "<s>", "</s>"]
    of_bytes = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=names + of_bytes, show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = [part for part in parts["added_tokens"] if part["content"] in names]
    backend = hf.Tokenizer.from_str(json.dumps(parts))
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return save(folder, backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def whole(tokenizer, prompt, response, template="{prompt}"):
    row = Row(prompt, (response,), "")
    return encoding.encode_texts([row], tokenizer, template=template).tokens[0][0].tolist()


@pytest.mark.parametrize(
    ("named", "begins"),
    [({}, True), ({"add_bos_token": False}, True), ({"processed": False}, False)],
)
def test_a_plain_text_begins_as_transformers_begins_it(named, begins, tmp_path):
    tokenizer, theirs = with_bos(tmp_path, **named)
    prompt = theirs("the capital")["input_ids"]
    assert (prompt[0] == tokenizer.backend.token_to_id("<s>")) == begins
    assert whole(tokenizer, "the capital", " Paris") == [
        *prompt,
        *tokenizer.encode(" Paris"),
        tokenizer.eos_id,
    ]
    framed = theirs("Q: the capital")["input_ids"]
    rows = [Row("the capital", (), "")]
    assert encoding.prompt_ids(rows, tokenizer, "Q: {prompt}") == [framed]
    read = encoding.answered_ids([{"role": "user", "content": "x"}], "5", tokenizer, "")
    assert read == [*theirs("x")["input_ids"], *tokenizer.encode("5"), tokenizer.eos_id]
    [piece] = encoding.pieces([Row("", ("x",), "f")], tokenizer, 9)
    assert [*piece.prompt, *piece.responses[0]] == [*theirs("x")["input_ids"], tokenizer.eos_id]
    begin = "<s>" if begins else "no special token"
    assert chat.boundaries("auto", tokenizer) == f"turns end with </s>, texts begin with {begin}"


@pytest.mark.parametrize(
    ("template", "text", "plain"),
    [("Q: {prompt}", "Q: x", "Q: x"), ("{prompt}", "User:\nx\n\nAssistant:\n", "x")],
)
def test_chat_clients_of_a_saved_folder_read_the_beginning_once(template, text, plain, tmp_path):
    tokenizer, theirs = with_bos(tmp_path)
    chat.with_text_template(tokenizer, template).save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    asked = [{"role": "user", "content": "x"}]
    ids = saved.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert ids == theirs(text)["input_ids"]
    ours = load_tokenizer(tmp_path / "saved")
    assert chat.template_of(ours).source == chat.PLAIN
    rows = [Row("x", (), "")]
    assert encoding.prompt_ids(rows, ours, "auto") == [theirs(plain)["input_ids"]]


def test_a_long_prompt_keeps_its_beginning(tmp_path):
    tokenizer, theirs = with_bos(tmp_path)
    ids = theirs("the capital is Paris")["input_ids"]
    row = Row("the capital is Paris", (), "")
    cut = encoding.encode_prompts([row], tokenizer, length=4, too_long="truncate")
    assert cut.tokens.tolist() == [[ids[0], *ids[-3:]]]
    assert cut.counts == {encoding.PROMPT_CUT: 1}


@pytest.mark.parametrize(
    ("prompt", "response"), [("A:\n", "Paris."), ("x=", "5"), ("A: ", "Paris."), ("A:", " Paris.")]
)
def test_prompt_and_response_decode_to_their_join(prompt, response, tmp_path):
    tokenizer, theirs = sentencepiece(tmp_path)
    assert tokenizer.begins_with_space
    ids = whole(tokenizer, prompt, response)
    assert theirs.decode(ids) == prompt + response + "</s>"
    asked = theirs(prompt, add_special_tokens=False)["input_ids"]  # what sampling reads
    assert ids[: len(asked)] == asked
    joined = theirs(prompt + response, add_special_tokens=False)["input_ids"]
    if joined[: len(asked)] == asked:
        assert ids == [*joined, tokenizer.eos_id]
    else:  # one token holds the space and the word behind it
        assert prompt == "A: "


def test_a_base_model_learns_the_end_that_its_template_writes(tmp_path, write):
    """ChatML over a tokenizer that ends texts with <|endoftext|>."""
    chat_templates.write(tmp_path, "chatml")
    tokenizer = load_tokenizer(tmp_path)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.backend.token_to_id("<|endoftext|>") == tokenizer.eos_id != end
    ids = whole(tokenizer, "hello", "user", "auto")
    assert ids[-2:] == [end, *tokenizer.encode("\n")]
    line = "turns end with <|im_end|>, texts begin with no special token"
    assert chat.boundaries("auto", tokenizer) == line
    assert chat.boundaries("{prompt}", tokenizer).startswith("turns end with <|endoftext|>")

    config = models.GPT2Config(
        tokenizer.vocab_size, 64, 16, 1, 2, eos_token_id=tokenizer.eos_id, pad_token_id=0
    )
    model = models.build(config)
    models.save(tmp_path, model, initial_params(model))
    authors = {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "max_length": 20}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**authors, "eos_token_id": tokenizer.eos_id}))
    policy = LanguageModel.load(tmp_path)
    assert policy.tokenizer.eos_ids == (tokenizer.eos_id, end)
    assert Generator(tmp_path, max_new_tokens=4).config.eos_ids == (tokenizer.eos_id, end)
    policy.save(tmp_path / "sft", template="auto", config=None)
    del authors["max_length"]  # it would end every response
    ends = {"eos_token_id": [tokenizer.eos_id, end], "pad_token_id": tokenizer.pad_id}
    written = json.loads((tmp_path / "sft" / "generation_config.json").read_text())
    assert written == authors | ends
    policy.save(tmp_path / "rl", template="auto", config=SAMPLING)
    written = json.loads((tmp_path / "rl" / "generation_config.json").read_text())
    assert written == ends | {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def test_spelled_special_tokens_are_named_or_read(tmp_path, write):
    chat_templates.write(tmp_path, "qwen2.5")
    tokenizer = load_tokenizer(tmp_path)
    start, end = map(tokenizer.backend.token_to_id, ("<|im_start|>", "<|im_end|>"))
    asked = "<|im_start|>user\nHi<|im_end|>\n"
    row = {"prompt": asked, "response": "Hello.<|im_end|>"}
    rows = formats.read("demonstrations", write([row, row])).rows
    ids = whole(tokenizer, asked, "Hello.<|im_end|>")
    assert start not in ids
    assert ids.count(end) == 1
    said = encoding.spelled(rows, tokenizer)
    assert "'<|im_start|>' (2 rows: data.jsonl, line 1, line 2)" in said
    assert "as ordinary characters; text.special_tokens: tokens" in said
    assert encoding.spelled([Row("<|", ("hello",), "")], tokenizer) == ""
    reading = chat.reading(tokenizer, None, "tokens")
    ids = whole(reading, asked, "Hello.<|im_end|>")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ids == theirs(asked + "Hello.<|im_end|>")["input_ids"]
    assert whole(reading, asked, "Hello.") == ids
    # In the chat template they would end a turn.
    with pytest.raises(UserError, match="f: an assistant message spells the special token"):
        encoding.encode_texts([Row("Hi", ("Hello.<|im_end|>",), "f")], reading, template="auto")
    report = check.check([write([row])], tokenizer)
    assert report.num_problems == 1
    (tmp_path / "chat_template.jinja").unlink()
    report = check.check([write([row])], load_tokenizer(tmp_path))
    assert "warning: texts spell special tokens, '" in report.text
    assert "'<|im_start|>' (1 rows: " in report.text


def texts_of_messages(folder, name):
    """A tokenizer for which what messages spell is text, and transformers'."""
    if name == "sentencepiece":
        tokenizer, _ = sentencepiece(folder)
        (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant{% endif %}"
        )
    else:
        chat_templates.write(folder, name)
    tokenizer = chat.reading(load_tokenizer(folder), None, "text")
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["chatml", "qwen3", "gpt-oss", "phi4", "sentencepiece"])
def test_what_messages_spell_is_read_as_text_if_the_settings_say_so(name, tmp_path, write):
    """As by transformers' sanitize_control_tokens."""
    tokenizer, theirs = texts_of_messages(tmp_path, name)
    template = chat.template_of(tokenizer, "auto")
    special = tokenizer.special_tokens
    contents = [f"a{token}b {token}{token}" for token in special] + [
        special[-1],
        "\U0010fe41\U0010ff42 é",
    ]
    contents.append(f"\U0010fe41{special[0]}\U0010ffff")
    for content in contents:
        turns = [{"role": "user", "content": content}, said(f"x {content} y")]
        how = {"sanitize_control_tokens": True, "return_dict": False}
        expected = theirs.apply_chat_template(turns[:1], add_generation_prompt=True, **how)
        prompt = list(template.prompt(turns[:1], ""))
        whole = theirs.apply_chat_template(turns, **how)
        [row] = formats.read("demonstrations", write([{"messages": turns}]), template=template).rows
        ids = [*row.prompt, *row.responses[0]]
        if content[0] < "\U0010fe00":  # which transformers drops
            assert prompt == expected
            assert ids == whole
            assert template.answered(turns[:1], turns[1]["content"], "") == whole
        decoded = tokenizer.decode_raw(ids)
        assert decoded.count(content) >= 2
        response = tokenizer.decode_raw(row.responses[0])
        count = sum(ids.count(token) for token in tokenizer.special_ids)
        plain = [{"role": "user", "content": "a"}, said("x")]
        [row] = formats.read("demonstrations", write([{"messages": plain}]), template=template).rows
        begins = tokenizer.decode_raw(row.responses[0]).partition("x")[0]
        assert response.startswith(f"{begins}x {content} y")
        written = [*row.prompt, *row.responses[0]]
        assert count == sum(written.count(token) for token in tokenizer.special_ids)
    for other in (None, "tokens"):
        read = chat.template_of(chat.reading(tokenizer, None, other), "auto")
        with pytest.raises(UserError, match=r"f: a user message spells .*_tokens: text"):
            read.prompt([{"role": "user", "content": special[0]}], "f")


@pytest.mark.parametrize("text", ["a\U000f1234's", "\ue0a0's \U00100185'll"])
def test_icons_are_encoded_with_their_neighbours(text, tmp_path):
    vocabulary = train_bpe([f"{text} {text[:-2]} 's"] * 4, 400).backend
    source = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    ours, theirs = save(tmp_path, vocabulary, eos_token="<|endoftext|>", chat_template=source)
    turns = [{"role": "user", "content": text}]
    template = chat.template_of(ours, "auto")
    expected = theirs.apply_chat_template(turns, return_dict=False)
    assert list(template.prompt(turns, "")) == expected


def test_spelled_special_tokens_join_no_neighbour(tmp_path):
    """Each is encoded by itself, though the vocabulary has their join, as by transformers."""
    text = "a<|endoftext|><|endoftext|>b"
    backend = train_bpe([text] * 4, 400).backend
    source = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer, theirs = save(tmp_path, backend, eos_token="<|endoftext|>", chat_template=source)
    turns = [{"role": "user", "content": text}]
    expected = theirs.apply_chat_template(turns, sanitize_control_tokens=True, return_dict=False)
    template = chat.template_of(chat.reading(tokenizer, None, "text"), "auto")
    assert list(template.prompt(turns, "")) == expected
    assert tokenizer.encode(text) != expected[:-1]


@pytest.mark.parametrize("mark", ["", "?"])
def test_a_template_may_cut_what_spells_a_special_token(mark, tmp_path):
    backend = train_bpe(WORDS, 270).backend
    source = (
        f"{{% for m in messages %}}{{{{ m.content[:6] }}}}{mark}"
        "{% generation %}{{ m.content[6:] }}"
        "{% endgeneration %}{{ eos_token }}{% endfor %}"
    )
    tokenizer, _ = save(tmp_path, backend, eos_token="<|endoftext|>", chat_template=source)
    template = chat.template_of(chat.reading(tokenizer, None, "text"), "auto")
    [whole] = template.conversations((), [said("a<|endoftext|>b")], [0], "")
    assert tokenizer.decode_raw(whole.text) == f"a<|end{mark}oftext|>b<|endoftext|>"
    assert whole.text.count(tokenizer.eos_id) == 1
    learned = [id for id, is_learned in zip(whole.text, whole.learned, strict=True) if is_learned]
    assert tokenizer.decode_raw(learned) == ("oftext|>b" if mark else "<|endoftext|>b")


def test_tools_and_reasoning_that_spell_a_special_token_are_text_too(tmp_path, write):
    chat_templates.write(tmp_path, "qwen3")
    tokenizer = chat.reading(load_tokenizer(tmp_path), None, "text")
    template = chat.template_of(tokenizer, "auto")
    call = {"type": "function", "function": {"name": "sky", "arguments": '{"a": "<|im_end|>"}'}}
    turn = said("") | {"tool_calls": [call], "reasoning_content": "no <|im_end|>"}
    tools = [{"type": "function", "function": {"name": "<|im_start|>", "parameters": {}}}]
    tools[0]["function"]["parameters"]["<|im_start|>"] = {"role": "<|im_start|>"}
    record = {"messages": [{"role": "user", "content": "?"}, turn], "tools": tools}
    [row] = formats.read("demonstrations", write([record]), template=template).rows
    text = tokenizer.decode_raw([*row.prompt, *row.responses[0]])
    assert '"<|im_start|>"' in text
    assert "no <|im_end|>" in text
    assert '{"a": "<|im_end|>"}' in text
    start, end = map(tokenizer.backend.token_to_id, ("<|im_start|>", "<|im_end|>"))
    assert row.responses[0].count(end) == 1
    assert row.prompt.count(start) == 3  # system, user, assistant


def test_what_others_spell_leaves_nothing_in_a_template(tmp_path):
    """Whatever characters of private use they write, of which some stand for special tokens."""
    chat_templates.write(tmp_path, "qwen3")
    tokenizer = chat.reading(load_tokenizer(tmp_path), None, "text")
    template = chat.template_of(tokenizer, "auto")
    asks = [{"role": "user", "content": "<|im_start|> or \U00108000?"}]
    [alone] = [template.prompt(asks, "")]
    characters = "".join(map(chr, range(0x108000, 0x110000)))
    for variables in ({"enable_thinking": characters}, {"enable_thinking": "<|im_end|>"}):
        template.with_variables(variables, "")
        assert template.prompt(asks, "") == alone
    assert tokenizer.backend.decode(alone, skip_special_tokens=False).count("<|im_start|>") == 3
    everything = f"{characters}<|im_end|>{characters}<|im_start|><|im_end|>"
    ids = template.prompt([{"role": "user", "content": everything}], "")
    assert everything in tokenizer.backend.decode(ids, skip_special_tokens=False)
    special = [id for id in ids if id in tokenizer.special_ids]
    assert special == [id for id in alone if id in tokenizer.special_ids]


def test_variables_and_messages_that_spell_special_tokens_are_both_read(tmp_path):
    """What stands for the one does not stand for the other."""
    chat_templates.write(tmp_path, "qwen3")
    template = "{{ persona }}|{% for one in messages %}{{ one.content }}|{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = chat.reading(load_tokenizer(tmp_path), None, "text")
    variables = {"persona": "<|im_end|>"}
    read = chat.template_of(tokenizer, "auto").with_variables(variables, "")
    ids = read.prompt([{"role": "user", "content": "<|im_start|>"}], "")
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == "<|im_end|>|<|im_start|>|"
    assert not {tokenizer.backend.token_to_id(t) for t in ("<|im_end|>", "<|im_start|>")} & {*ids}
    again = read.with_variables({"other": "<|im_start|>"}, "")
    assert again.prompt([{"role": "user", "content": "<|im_start|>"}], "") == ids


def test_a_vocabulary_that_speaks_as_a_special_token_is_refused(tmp_path):
    """A Unigram vocabulary holds the control tokens."""
    folder = tokenizer_folders.write(tmp_path, "Unigram")
    tokenizer = load_tokenizer(folder)
    with pytest.raises(UserError, match="f: the tokenizer makes the special token '</s>'"):
        tokenizer.encode_batch(["hello", "the </s> world"], ["e", "f"])
    assert tokenizer.eos_id not in tokenizer.encode("the < /s> world")
    reading = chat.template_of(chat.reading(tokenizer, None, "text"), "auto")
    with pytest.raises(UserError, match=r"f: .*the special token '</s>'"):
        reading.prompt([{"role": "user", "content": "</s>"}], "f")


def test_an_answer_that_the_prompt_begins_is_continued(tmp_path, write):
    chat_templates.write(tmp_path, "chatml")
    tokenizer = load_tokenizer(tmp_path)
    template = chat.template_of(tokenizer, "auto")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    begun = [
        {"role": "user", "content": "Make 24."},
        {"role": "assistant", "content": "I think "},
    ]
    prompt = theirs.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    [row] = formats.read("prompts", write([{"prompt": begun}]), template=template).rows
    assert list(row.prompt) == prompt
    assert tokenizer.decode(prompt).endswith("I think ")
    end = tokenizer.backend.token_to_id("<|im_end|>")
    for answers in (("4*6", "4+6"), ([said("4*6")], [said("4+6")])):
        record = {"prompt": begun, "chosen": answers[0], "rejected": answers[1]}
        [row] = formats.read("pairs", write([record]), template=template).rows
        texts = encoding.encode_texts([row], tokenizer, template="auto")
        for [ids], text in zip(texts.tokens, ("4*6", "4+6"), strict=True):
            answered = theirs.apply_chat_template(
                [begun[0], said(f"I think {text}")], return_dict=False
            )
            assert ids.tolist() == answered[: answered.index(end, len(prompt)) + 1]
    assert tokenizer.backend.decode(row.prompt).endswith("I think ")
    assert "I think " in chat.plain(row.messages, "continue_final_message")


def said(text):
    return {"role": "assistant", "content": text}


def test_a_long_conversation_loses_its_earliest_turns_and_keeps_the_system(tmp_path, write):
    chat_templates.write(tmp_path, "chatml")
    tokenizer = load_tokenizer(tmp_path)
    template = chat.template_of(tokenizer, "auto")
    system = {"role": "system", "content": "Be kind."}
    turns = [{"role": "user", "content": "one"}, said("two"), {"role": "user", "content": "three"}]
    [row] = formats.read("prompts", write([{"prompt": [system, *turns]}]), template=template).rows
    short = template.prompt([system, turns[-1]], "")
    how = {"template": "auto", "too_long": "truncate"}
    cut = encoding.encode_prompts([row], tokenizer, length=len(row.prompt) - 1, **how)
    assert cut.tokens[0][cut.attention_mask[0] == 1].tolist() == list(short)
    assert cut.counts == {encoding.PROMPT_TURNS_CUT: 1}
    small = Row("hi", (), "")
    left = encoding.encode_prompts([row, small], tokenizer, length=len(short) - 1, **how)
    assert left.rows == [small]
    assert left.counts == {encoding.NO_TURN: 1}


def test_a_long_demonstration_is_cut_behind_a_whole_turn(tmp_path, write):
    chat_templates.write(tmp_path, "chatml")
    tokenizer = load_tokenizer(tmp_path)
    template = chat.template_of(tokenizer, "auto")
    user = {"role": "user", "content": "one"}
    record = {"messages": [user, said("two"), user, said("three three")]}
    [row] = formats.read("demonstrations", write([record]), template=template).rows
    full = [*row.prompt, *row.responses[0]]
    end = tokenizer.backend.token_to_id("<|im_end|>")
    first = full.index(end, len(row.prompt)) + 1
    how = {"template": "auto", "too_long": "truncate"}
    cut = encoding.encode_texts([row], tokenizer, max_length=len(full) - 3, **how)
    assert cut.tokens[0][0].tolist() == full[:first]
    assert cut.learned[0, 0].all()
    assert cut.counts == {encoding.TURNS_CUT: 1}
    inside = encoding.encode_texts([row], tokenizer, max_length=len(row.prompt) + 2, **how)
    assert inside.tokens[0][0].tolist() == full[: len(row.prompt) + 2]


def test_dropout_of_a_tokenizer_file_is_off(tmp_path):
    backend = train_bpe(WORDS, 300).backend
    parts = json.loads(backend.to_str())
    parts["model"]["dropout"] = 0.9
    backend = hf.Tokenizer.from_str(json.dumps(parts))
    tokenizer, _ = save(tmp_path, backend, eos_token="<|endoftext|>", pad_token="<|pad|>")
    found = {tuple(tokenizer.encode(WORDS[0])) for _ in range(20)}
    assert len(found) == 1


def test_prompts_that_differ_by_case_spaces_or_unicode_form_are_one_group():
    rows = [
        Row(text, (), "") for text in ("Caf\u00e9  au lait", "cafe\u0301 au LAIT ", "cafe au lait")
    ]
    first, second, third = map(encoding.group, rows)
    assert first == second != third
    assert encoding.group(Row((1, 2), (), "")) == (1, 2)


@pytest.mark.parametrize("flag", ['{"enable_thinking": false}', "null"])
def test_options_of_the_template(flag, tmp_path):
    chat_templates.write(tmp_path, "qwen3")
    flags = ["--text.template-options", flag]
    options = config.parse(RunConfig, flags, sections=("text",)).text.template_options
    given = tmp_path / "given.yaml"
    given.write_text(f"text: {{template_options: {flag}}}")
    read = config.parse(RunConfig, ["--config", str(given)])
    assert read.text.template_options == options
    tokenizer = chat.reading(load_tokenizer(tmp_path), options)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    asked = [{"role": "user", "content": "Hi"}]
    how = {"add_generation_prompt": True, "return_dict": False}
    expected = theirs.apply_chat_template(asked, **how, **(options or {}))
    assert list(chat.template_of(tokenizer).prompt(asked, "")) == expected
    # The saved folder has them as defaults, which whoever asks may override.
    chat.with_text_template(tokenizer, "auto").save(tmp_path / "saved")
    (tmp_path / "saved" / "chat_template.jinja").unlink(missing_ok=True)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.apply_chat_template(asked, **how) == expected
    thinks = saved.apply_chat_template(asked, **how, enable_thinking=True)
    assert thinks == theirs.apply_chat_template(asked, **how)


def test_an_option_that_the_template_does_not_read_is_refused(tmp_path):
    chat_templates.write(tmp_path, "qwen3")
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="reads no variable 'enable_thinkin'"):
        chat.reading(tokenizer, {"enable_thinkin": False})
    with pytest.raises(UserError, match="no chat template"):
        chat.reading(train_bpe(WORDS, 270), {"enable_thinking": False})
    value = [None, True, -1.5e-7, {"a": "x\"'\n{%é😀"}]
    read = chat.reading(tokenizer, {"enable_thinking": value}).config["chat_template"]
    line = read.splitlines()[0]
    written = jinja2.Template(line + "{{ enable_thinking | tojson }}").render()
    assert json.loads(written) == value
    assert read.removeprefix(line + "\n") == tokenizer.config["chat_template"]


@pytest.mark.parametrize(
    "flag",
    [
        "[1]",
        "{",
        '{"a": ' + "[" * 40 + "]" * 40 + "}",
        '{"a": ' + "[" * 100_000,
        '{"a": 99999999999999999999}',
        r'{"a": "\ud800"}',
    ],
)
def test_flags_of_json_are_objects_that_our_files_hold(flag, capsys):
    """What goes on later, such as a run, reads them again."""
    with pytest.raises(SystemExit, match="2"):
        config.parse(RunConfig, ["--text.template-options", flag], sections=("text",))
    assert "expected a JSON object" in capsys.readouterr().err


def test_null_is_no_object_of_options():
    null = config.parse(RunConfig, ["--text.template-options", "null"], sections=("text",))
    assert null.text.template_options is None
    np.testing.assert_equal(RunConfig().text.template_options, None)
