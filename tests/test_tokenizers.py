"""Tokenizers: ids, round trips, the saved folder as transformers reads it, and what is refused."""

import functools
import hashlib
import json
import os

import pytest
import tokenizer_folders
import transformers

from rlhf_jax.data import chat, encoding, formats, tokenizers
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError

# The spelling of a special token in a text is text.
TEXTS = [
    "the cat sat on the mat.",
    "the dog sat on the log, naïve and happy 🙂\n",
    "a <|endoftext|> <|pad|>",
] * 3
DATA = os.environ.get("RLHF_JAX_DATA")


@pytest.fixture(
    params=[lambda: tokenizers.train_bpe(TEXTS, 300), lambda: tokenizers.characters(TEXTS)]
)
def tokenizer(request):
    return request.param()


def test_round_trip_and_special_ids(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert min(ids) > 1
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.decode([0, 0, *ids, 1, 0]) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode("") == []


def test_save_is_what_transformers_loads(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    saved = (tmp_path / "tokenizer.json").read_bytes()
    assert tokenizer.fingerprint == hashlib.sha256(saved).hexdigest()
    loaded = tokenizers.load_tokenizer(tmp_path)
    assert (loaded.pad_id, loaded.eos_id, loaded.vocab_size) == (0, 1, tokenizer.vocab_size)
    assert loaded.fingerprint == tokenizer.fingerprint
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.padding_side) == (0, 1, "left")
    for text in TEXTS[:2]:
        assert theirs(text)["input_ids"] == loaded.encode(text) == tokenizer.encode(text)


def test_training_is_deterministic_and_keeps_to_the_size():
    first, second = (tokenizers.train_bpe(iter(TEXTS), 280) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 280
    assert len(first.encode("the cat")) < len("the cat")
    assert tokenizers.characters("cab").encode("abc") == [2, 3, 4]  # in the order of code points


@pytest.mark.parametrize("pad", [{}, {"pad_token": tokenizers.EOS}])
def test_a_pad_is_added_where_there_is_none_or_where_it_is_eos(tmp_path, pad):
    tokenizer = tokenizers.train_bpe(TEXTS, 280)
    tokenizer.save(tmp_path)
    # The pad of `train_bpe` gets another name, so that "<|pad|>" is free again.
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|pad|>", "<|other|>"))
    config = {
        "eos_token": {"__type": "AddedToken", "content": tokenizers.EOS},
        "chat_template": "kept",
        **pad,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink()
    loaded = tokenizers.load_tokenizer(tmp_path)
    assert (loaded.pad_id, loaded.eos_id, loaded.vocab_size) == (280, 1, 281)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    loaded.save(tmp_path / "again")
    again = tokenizers.load_tokenizer(tmp_path / "again")
    assert again.config["chat_template"] == "kept"
    assert (again.pad_id, again.vocab_size, again.fingerprint) == (280, 281, loaded.fingerprint)


def test_vocab_and_merges_as_gpt2_ships_them(tmp_path):
    trained = tokenizers.train_bpe(TEXTS, 300)
    trained.backend.model.save(str(tmp_path))
    loaded = tokenizers.load_tokenizer(tmp_path)
    ids = trained.encode(TEXTS[1])
    assert loaded.encode(TEXTS[1]) == ids
    assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (1, 0, trained.vocab_size)
    trained.backend.enable_truncation(2)
    trained.backend.enable_padding(length=50)
    trained.save(tmp_path)  # a tokenizer.json with settings that would shorten texts without a word
    assert tokenizers.load_tokenizer(tmp_path).encode(TEXTS[1]) == ids


def files(**contents):
    """A tokenizer's folder in which some files are changed: None deletes one."""

    def make(folder):
        tokenizers.characters("ab").save(folder)
        for name, content in contents.items():
            file = folder / f"{name}.json"
            file.unlink() if content is None else file.write_text(content)
        return tokenizers.load_tokenizer(folder)

    return make


GAPS = (
    '{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 1, "a": 2}, '
    '"unk_token": "a"}}'
)
UNNAMED = {"tokenizer_config": None, "special_tokens_map": None}


def test_eos_named_by_the_model_config_alone(tmp_path):
    assert files(**UNNAMED, config='{"eos_token_id": 1}')(tmp_path).eos_id == 1


REFUSALS = [
    (
        lambda _: tokenizers.characters("abcf").encode("café"),
        r"alphabet lacks 'é' \(U\+00E9\), found in 'café'",
    ),
    (lambda _: tokenizers.train_bpe(TEXTS, 100), "at least 258 ids, 100 asked for"),
    (lambda _: tokenizers.train_bpe([""], 300), "no text"),
    (lambda _: tokenizers.characters([""]), "no text"),
    (tokenizers.load_tokenizer, r"holds neither tokenizer\.json nor vocab\.json"),
    (
        files(**UNNAMED),
        "no end-of-text token .* set eos_token",
    ),
    (files(tokenizer="{"), "cannot read .*: Expecting property name"),
    (files(tokenizer=GAPS), "the ids of the vocabulary have gaps"),
    (
        files(tokenizer_config='{"chat_template": [{"template": "x"}]}'),
        "cannot read .*: 'name'",
    ),
    (files(tokenizer_config='{"chat_template": {"default": 3}}'), "a chat template is no text"),
    (files(tokenizer_config='{"chat_template": true}'), "a chat template is no text"),
    (files(tokenizer_config='{"fast_tokenizer_files": ["../tokenizer.4.json"]}'), "is not read"),
    (files(tokenizer_config='{"split_special_tokens": true}'), "has split_special_tokens"),
    (
        files(tokenizer_config='{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'),
        "names Python code",
    ),
    (files(tokenizer_config='{"tokenizer_class": "CTRLTokenizer"}'), "cannot read|is Python"),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS)
def test_refusals(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make(tmp_path)


def test_names_on_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    tokenizers.train_bpe(TEXTS, 280).save(tmp_path)
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.append((set(allow_patterns), ignore_patterns))
        if name != "org/name":
            raise OSError("offline")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    local = tokenizers.load_tokenizer(tmp_path)
    assert tokenizers.load_tokenizer("org/name").fingerprint == local.fingerprint
    assert asked == [  # not the weights
        ({"additional_chat_templates/*.jinja"}, []),
        (set(tokenizers.FILES), ["*/*"]),
    ]
    with pytest.raises(
        UserError,
        match=r"org/other: no such folder .*: off",
    ):
        tokenizers.load_tokenizer("org/other")


@pytest.mark.skipif(
    DATA is None, reason="needs RLHF_JAX_DATA, a folder with gpt2/vocab.json and gpt2/merges.txt"
)
def test_gpt2():
    tokenizer = tokenizers.load_tokenizer(os.path.join(DATA, "gpt2"))
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (50256, 50257, 50258)
    assert tokenizer.decode(tokenizer.encode("naïve 🙂\n\n")) == "naïve 🙂\n\n"


ASKED = [{"role": "user", "content": "the capital is"}]
TURNS = [*ASKED, {"role": "assistant", "content": "Paris"}, *ASKED]
TURNS += [{"role": "assistant", "content": "world"}]
TEXTS_OF_FOLDERS = [
    "hello world",
    "  the  capital\n\nis Paris",
    "naïve 日本 🙂",
    "a <b>c</b> <think>",
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Each folder is written and read once."""
    place = tmp_path_factory.mktemp("folders")

    @functools.cache
    def read(name):
        folder = tokenizer_folders.write(place / name.replace("/", " "), name)
        return tokenizers.load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(
            folder if name != "a billion layers" else _without_config(folder)
        )

    return read


def _without_config(folder):
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return folder


@pytest.mark.parametrize("name", tokenizer_folders.FOLDERS)
def test_a_folder_means_what_transformers_reads(name, folders, write, tmp_path):
    ours, theirs = folders(name)
    ours.save(tmp_path)
    again = tokenizers.load_tokenizer(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert (again.pad_id, again.eos_id) == (ours.pad_id, ours.eos_id)
    theirs.backend_tokenizer.no_truncation()
    if hasattr(theirs.backend_tokenizer.model, "dropout"):
        theirs.backend_tokenizer.model.dropout = None
    if theirs.eos_token_id is not None:
        assert ours.eos_id == theirs.eos_token_id
    how = {"add_special_tokens": False}
    for text in TEXTS_OF_FOLDERS:
        expected = theirs(text, **how)["input_ids"]
        for tokenizer in (ours, again):
            assert tokenizer.encode(text) == expected
        assert saved(text, **how)["input_ids"] == expected
        prompt = theirs(text)["input_ids"]
        [ids] = encoding.prompt_ids([Row(text, (), "")], ours, "{prompt}")
        assert ids == (prompt[:-1] if name == "vocab.txt" else prompt)
    if not theirs.chat_template:
        assert chat.template_of(ours).tokenizer is None
        return
    end = chat.template_of(ours).end_of_turn
    for tokenizer in (ours, again):
        template = chat.template_of(tokenizer, "auto")
        how = {"add_generation_prompt": True, "return_dict": False}
        assert list(template.prompt(TURNS[:3], "")) == theirs.apply_chat_template(TURNS[:3], **how)
        assert saved.apply_chat_template(TURNS[:3], **how) == [*template.prompt(TURNS[:3], "")]
        path = write([{"messages": TURNS}])
        [row] = formats.read("demonstrations", path, template=template).rows
        [[ids]] = encoding.encode_texts([row], tokenizer, template="auto").tokens
        assert ids.tolist() == theirs.apply_chat_template(TURNS, return_dict=False)
        learned = [i for i, said in zip(row.responses[0], row.learned[0], strict=True) if said]
        assert learned.count(end) == 2
        assert end not in tokenizer.encode(tokenizer.spelled([end]))  # in a text it is text


@pytest.mark.parametrize("token", ["<｜tool▁sep｜>", "<|tool_call_begin|>", "<think>"])
def test_a_message_may_write_the_tokens_of_calls_but_not_those_of_turns(token, tmp_path):
    source = tokenizer_folders.CHATML + "{% if tools %}" + token + "</think>{% endif %}"
    added = tokenizer_folders.adding(*tokenizer_folders.IM, token, "</think>", special=False)
    config = tokenizer_folders.config(chat_template=source)
    for name, content in {**tokenizer_folders.token_json(added), **config}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    turns = [{"role": "user", "content": "Paris"}, {"role": "assistant", "content": f"a{token}b"}]
    turns.append(turns[0])
    template = chat.template_of(tokenizers.load_tokenizer(tmp_path), "auto")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert theirs.convert_tokens_to_ids(token) in expected
    assert list(template.prompt(turns, "")) == expected
    with pytest.raises(UserError, match=r"spells the special token '<\|im_end\|>'"):
        template.prompt([{"role": "user", "content": "a<|im_end|>"}], "")


@pytest.mark.parametrize("file", ["tokenizer.model", "tiktoken.model", "spiece.model"])
def test_a_missing_package_is_named(file, tmp_path, monkeypatch):
    (tmp_path / file).write_bytes(b"\x00 no vocabulary")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(UserError, match=f"{tmp_path}: .*transformers"):
        tokenizers.load_tokenizer(tmp_path)
    monkeypatch.setattr("importlib.metadata.distributions", list)
    names = "protobuf, sentencepiece, tiktoken .pip install 'rlhf-jax.tokenizers.'"
    with pytest.raises(UserError, match=names):
        tokenizers.load_tokenizer(tmp_path)


def test_a_class_that_finds_no_vocabulary_is_refused(tmp_path):
    """transformers gives it one of three tokens."""
    tokenizers.train_bpe(TEXTS, 280).backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match="LlamaTokenizer finds no vocabulary"):
        tokenizers.load_tokenizer(tmp_path)


def test_no_key_leads_to_a_file_elsewhere(tmp_path):
    tokenizer_folders.write(tmp_path, "vocab.json of Qwen2")
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    fingerprint = tokenizers.load_tokenizer(tmp_path).fingerprint
    for key in ("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "gguf_file"):
        file.write_text(json.dumps(config | {key: "/nowhere", "init_inputs": ["/nowhere"]}))
        assert tokenizers.load_tokenizer(tmp_path).fingerprint == fingerprint


def test_what_a_folder_holds_is_neither_run_nor_sent(tmp_path, monkeypatch):
    """A vocabulary of more than 100,000 entries makes transformers ask whether it is Mistral's."""
    words = {f"w{i}": i for i in range(100_001)} | {"<unk>": 100_001, "</s>": 100_002}
    parts = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    space = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [], "model": parts, "pre_tokenizer": space})
    )
    named = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    named |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    (tmp_path / "config.json").write_text('{"model_type": "mistral", "auto_map": {}}')

    def refuse(*_, **__):
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    tokenizer = tokenizers.load_tokenizer(tmp_path)
    assert tokenizer.encode("w5 w100000 x") == [5, 100_000, 100_001]
