"""Tokenizers' folders as many programs write them: tokens added in each place, vocabularies of each
kind, chat templates in each file.
"""

import functools
import json

import tokenizers as hf
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

WORDS = ["hello world user assistant the capital is Paris naïve 日本\n"] * 4
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
IM = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NAMED = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
BYTES = [f"<0x{i:02X}>" for i in range(256)]


@functools.cache
def trained(kind, special=SPECIAL):
    """The file of a tokenizer of this kind."""
    how = {"special_tokens": [*special], "show_progress": False}
    if kind == "bytes":
        backend = hf.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, **how)
    elif kind == "unigram":
        backend = hf.Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **how)
    elif kind == "wordpiece":
        backend = hf.Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=80, **how)
    else:  # SentencePiece's BPE, whose unknown characters are bytes
        backend = hf.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        how["special_tokens"] += BYTES
        trainer = trainers.BpeTrainer(vocab_size=330, **how)
    backend.train_from_iterator(WORDS, trainer)
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = [part for part in parts["added_tokens"] if part["content"] in special]
    return json.dumps(parts)


def with_bos(parts):
    backend = hf.Tokenizer.from_str(json.dumps(parts))
    first = [("<s>", backend.token_to_id("<s>"))]
    post = processors.TemplateProcessing(single="<s> $A", special_tokens=first)
    backend.post_processor = post
    return json.loads(backend.to_str())


def metaspace(scheme, split=True):
    part = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}

    def change(parts):
        return {**parts, "pre_tokenizer": part}

    return change


def prepend(parts):
    """The normalizer of Llama 2."""
    steps = [{"type": "Prepend", "prepend": "▁"}]
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    normalizer = {"type": "Sequence", "normalizers": steps}
    return {**parts, "normalizer": normalizer, "pre_tokenizer": None}


def adding(*tokens, special=True):
    def change(parts):
        backend = hf.Tokenizer.from_str(json.dumps(parts))
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(t, normalized=False) if isinstance(t, str) else t for t in tokens])
        return json.loads(backend.to_str())

    return change


def limits(parts):
    parts["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst"}
    parts["truncation"]["stride"] = 0
    return {**parts, "model": {**parts["model"], "dropout": 0.5}}


def lowercase(parts):
    return {**parts, "normalizer": {"type": "Lowercase"}}


def decoder_of(first, tokens, **flags):
    """``added_tokens_decoder`` of tokenizer_config.json."""
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {
        str(first + number): {"content": token, **usual, "special": True, **flags}
        for number, token in enumerate(tokens)
    }


def vocabulary(kind="bytes"):
    """vocab.json and merges.txt of a tokenizer."""
    model = json.loads(trained(kind))["model"]
    merges = "\n".join(["#version: 0.2", *map(" ".join, model["merges"])])
    return {"vocab.json": json.dumps(model["vocab"]), "merges.txt": merges}


def vocab_txt():
    vocab = json.loads(trained("wordpiece", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")))
    tokens = vocab["model"]["vocab"]
    return {"vocab.txt": "\n".join(sorted(tokens, key=tokens.get)) + "\n"}


def token_json(*changes, kind="bytes", special=SPECIAL):
    parts = json.loads(trained(kind, special))
    for change in changes:
        parts = change(parts)
    return {"tokenizer.json": json.dumps(parts)}


def config(**keys):
    return {"tokenizer_config.json": json.dumps({**GENERIC, **NAMED, **keys})}


SIZE = 290  # of the tokenizers of bytes
CHAT = {"chat_template": CHATML}
LSTRIP = AddedToken("<|im_start|>", lstrip=True, normalized=False)
RSTRIP = AddedToken("<|im_end|>", rstrip=True, normalized=False)
WORD = AddedToken("Paris", single_word=True, normalized=False)
LOUD = AddedToken("<|LOUD|>", normalized=True)
SPM = {"kind": "sentencepiece"}
NO_IM = token_json()
WITH_IM = token_json(adding(*IM))
LLAMA = {"config.json": '{"model_type": "llama"}'}
QWEN = decoder_of(SIZE, ["<|endoftext|>", *IM])
FOLDERS = {
    "tokenizer.json": {**WITH_IM, **config(**CHAT)},
    "added_tokens.json": {
        **NO_IM,
        **config(**CHAT),
        "added_tokens.json": json.dumps({token: SIZE + i for i, token in enumerate(IM)}),
    },
    "special_tokens_map": {
        **NO_IM,
        **config(**CHAT),
        "special_tokens_map.json": json.dumps({"extra_special_tokens": IM}),
    },
    "special_tokens_map of objects": {
        **NO_IM,
        "tokenizer_config.json": json.dumps({**GENERIC, **CHAT}),
        "special_tokens_map.json": json.dumps(
            {
                "eos_token": {"content": "<|im_end|>", "rstrip": True, "normalized": False},
                "pad_token": "<pad>",
                "extra_special_tokens": ["<|im_start|>"],
            }
        ),
    },
    "added_tokens_decoder": {**NO_IM, **config(**CHAT, added_tokens_decoder=decoder_of(SIZE, IM))},
    "added_tokens_decoder, not special": {
        **NO_IM,
        **config(
            **CHAT,
            added_tokens_decoder=decoder_of(SIZE, [*IM, "<think>", "</think>"], special=False),
        ),
    },
    "additional_special_tokens": {**NO_IM, **config(**CHAT, additional_special_tokens=IM)},
    "extra_special_tokens": {**NO_IM, **config(**CHAT, extra_special_tokens=IM)},
    "extra_special_tokens by name": {
        **NO_IM,
        **config(
            chat_template=CHATML.replace("<|im_end|>", "{{ turn_token }}"),
            extra_special_tokens={"turn_token": "<|turn|>", "start": "<|im_start|>"},
        ),
    },
    "a token of a name of its own": {
        **NO_IM,
        **config(
            chat_template=CHATML.replace("<|im_end|>", "{{ turn_token }}"), turn_token="<|turn|>"
        ),
    },
    "eos that the vocabulary lacks": {**WITH_IM, **config(**CHAT, eos_token="<|done|>")},
    "Prepend": {**token_json(prepend, with_bos, **SPM), **config(chat_template=INST)},
    "Metaspace always": {
        **token_json(metaspace("always"), with_bos, **SPM),
        **config(chat_template=INST),
    },
    "Metaspace first": {
        **token_json(metaspace("first", split=False), with_bos, **SPM),
        **config(chat_template=INST),
    },
    "Metaspace never": {
        **token_json(metaspace("never"), with_bos, **SPM),
        **config(chat_template=INST),
    },
    "Unigram": {**token_json(adding(*IM), kind="unigram"), **config(**CHAT)},
    "LlamaTokenizer": {
        **token_json(prepend, with_bos, **SPM),
        **LLAMA,
        **config(chat_template=INST, tokenizer_class="LlamaTokenizer", legacy=True),
    },
    "LlamaTokenizerFast of bytes": {
        **WITH_IM,
        **LLAMA,
        **config(**CHAT, tokenizer_class="LlamaTokenizerFast"),
    },
    "GemmaTokenizer": {
        **token_json(adding("<start_of_turn>", "<end_of_turn>"), **SPM),
        "config.json": '{"model_type": "gemma"}',
        **config(
            chat_template=CHATML.replace("<|im_start|>", "<start_of_turn>").replace(
                "<|im_end|>", "<end_of_turn>"
            ),
            tokenizer_class="GemmaTokenizer",
        ),
    },
    "vocab.txt": {**vocab_txt(), **config(tokenizer_class="BertTokenizer", eos_token="[SEP]")},
    "WordPiece": {**token_json(adding(*IM), kind="wordpiece"), **config(**CHAT)},
    "vocab.json of GPT-2": {
        **vocabulary(),
        "config.json": '{"model_type": "gpt2"}',
        "tokenizer_config.json": json.dumps({"eos_token": "</s>"}),
    },
    "vocab.json with added_tokens.json": {
        **vocabulary(),
        **config(**CHAT, tokenizer_class="GPT2Tokenizer"),
        "added_tokens.json": json.dumps({token: SIZE + i for i, token in enumerate(IM)}),
    },
    "vocab.json of Qwen2": {
        **vocabulary(),
        "config.json": '{"model_type": "qwen2"}',
        **config(
            **CHAT,
            tokenizer_class="Qwen2Tokenizer",
            added_tokens_decoder=QWEN,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
        ),
    },
    "add_bos_token": {
        **vocabulary(),
        **config(
            **CHAT,
            tokenizer_class="GPT2Tokenizer",
            add_bos_token=True,
            added_tokens_decoder=decoder_of(SIZE, IM),
        ),
    },
    "add_bos_token beside a file": {**WITH_IM, **config(**CHAT, add_bos_token=True)},
    "post_processor": {**token_json(adding(*IM), with_bos), **config(**CHAT)},
    "lstrip, rstrip, single_word": {
        **token_json(adding(LSTRIP, RSTRIP), adding(WORD, special=False)),
        **config(**CHAT),
    },
    "normalized": {**token_json(adding(*IM, LOUD), lowercase), **config(**CHAT)},
    "tags that are not special": {
        **token_json(adding(*IM), adding("<think>", "</think>", "<|x|>", special=False)),
        **config(**CHAT),
    },
    "pad is eos": {**WITH_IM, **config(**CHAT, pad_token="</s>")},
    "no pad": {**WITH_IM, **config(**CHAT, pad_token=None)},
    "unk as pad": {**WITH_IM, **config(**CHAT, pad_token=None, unk_token="<unk>")},
    "eos in config.json": {
        **WITH_IM,
        "config.json": json.dumps({"model_type": "my_own", "eos_token_id": SIZE + 1}),
        **config(**CHAT, eos_token=None),
    },
    "gaps": {**NO_IM, **config(**CHAT, added_tokens_decoder=decoder_of(SIZE + 10, IM))},
    "limits in the file": {**token_json(adding(*IM), limits), **config(**CHAT)},
    "several templates": {
        **WITH_IM,
        **config(
            chat_template=[
                {"name": "default", "template": CHATML},
                {"name": "tool_use", "template": "{{ tools }}"},
            ]
        ),
    },
    "chat_template.jinja": {**WITH_IM, **config(chat_template="no"), "chat_template.jinja": CHATML},
    "additional_chat_templates": {
        **WITH_IM,
        **config(),
        "chat_template.jinja": CHATML,
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    },
    "a billion layers": {
        **WITH_IM,
        **config(**CHAT),
        "config.json": '{"model_type": "qwen3", "num_hidden_layers": 1000000000}',
    },
}


def write(folder, name):
    for file, content in FOLDERS[name].items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder
