"""Faults of training programs that people report in public, each tried on rows of their kind."""

import json

import chat_templates
import numpy as np
import pytest
import tokenizers as hf
import transformers
from chat_templates import HELLO, HI, MORE, SYSTEM, YES, encoded, rows_of, spans
from tokenizers import processors

from rlhf_jax.data import batches, chat, encoding, formats
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import load_tokenizer, train_bpe

WRITES_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def of_family(folder, name):
    chat_templates.write(folder, name)
    return load_tokenizer(folder)


def saved(folder, **config):
    """A tokenizer that begins plain texts with <s>, as Llama's does."""
    backend = train_bpe(["hello user assistant yes no\n"] * 3, 280).backend
    backend.add_special_tokens([hf.AddedToken(token, special=True) for token in ("<s>", "</s>")])
    first = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[first])
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    return load_tokenizer(folder)


def test_the_user_s_turns_are_not_learned_and_each_of_the_assistant_s_is(tmp_path, write):
    """ "Turns masked wrongly": the words of one role inside the text of another do not mislead."""
    tokenizer = of_family(tmp_path, "chatml")
    echo = {"role": "user", "content": "assistant\nHello!"}
    rows = rows_of(tokenizer, write, {"messages": [SYSTEM, echo, HELLO, echo, YES]})
    [learned] = [spans(tokenizer, *row) for row in encoded(tokenizer, rows)]
    assert learned == ["Hello!<|im_end|>", "Yes.<|im_end|>"]


def test_bos_stands_once_where_template_and_tokenizer_both_write_it(tmp_path, write):
    tokenizer = saved(tmp_path, chat_template=WRITES_BOS)
    bos = tokenizer.backend.token_to_id("<s>")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = rows_of(tokenizer, write, {"messages": [HI, HELLO]})
    [(ids, _)] = encoded(tokenizer, rows)
    assert ids == theirs.apply_chat_template([HI, HELLO], return_dict=False)
    texts = [("auto", "hello"), ("{prompt}", "hello"), ("<s>{prompt}", "hello")]
    for template, text in texts:
        reads = chat.reading(tokenizer, None, "tokens")
        [row] = encoding.prompt_ids([Row(text, (), "")], reads, template)
        assert row.count(bos) == 1
        assert row[0] == bos
    assert ids.count(bos) == 1


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma3", "mistral", "phi4", "deepseek"])
def test_the_token_that_ends_a_turn_is_learned_and_stops_sampling(name, tmp_path, write):
    """ "A stop token never learned", so that the trained model never stops."""
    tokenizer = of_family(tmp_path, name)
    template = chat.template_of(tokenizer, "auto")
    [(ids, learned)] = encoded(tokenizer, rows_of(tokenizer, write, {"messages": [HI, HELLO]}))
    last = [token for token, is_learned in zip(ids, learned, strict=True) if is_learned][-1]
    assert last == template.end_of_turn
    assert last in template.ends


def test_answers_that_are_equal_after_cutting_are_left_out_and_counted(write):
    """A pair that differs behind the limit alone has no preference left."""
    tokenizer = train_bpe(["abc "] * 3, 258)
    same = {"prompt": "a", "chosen": "b" * 9 + "c", "rejected": "b" * 9 + "a"}
    rows = formats.read("pairs", write([same, same | {"rejected": "c"}])).rows
    kept = encoding.encode_texts(rows, tokenizer, max_length=6, too_long="truncate")
    assert (len(kept), kept.counts[encoding.EQUAL_CUT]) == (1, 1)
    assert [source[-6:] for source in kept.sources] == ["line 2"]


def test_the_reasoning_of_each_turn_is_learned_where_the_template_strips_that_of_earlier_ones(
    tmp_path, write
):
    tokenizer = of_family(tmp_path, "qwen3")
    turns = [
        HI,
        HELLO | {"reasoning_content": "I greet."},
        MORE,
        YES | {"reasoning_content": "So."},
    ]
    rows = rows_of(tokenizer, write, {"messages": turns})
    learned = ["".join(spans(tokenizer, *row)) for row in encoded(tokenizer, rows)]
    assert len(learned) == 2
    for text, thought in zip(learned, ("I greet.", "So."), strict=True):
        assert thought in text
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    history = theirs.apply_chat_template(turns[:3], add_generation_prompt=True, tokenize=False)
    assert "I greet." not in history
    prompt = theirs(history, add_special_tokens=False)["input_ids"]
    assert [*rows[1].prompt][: len(prompt)] == prompt  # as the model sees it at that turn


@pytest.mark.parametrize("pad", [{"pad_token": "</s>"}, {}])
def test_eos_is_learned_where_the_tokenizer_pads_with_it(pad, tmp_path, write):
    tokenizer = saved(tmp_path, **pad)
    rows = [{"prompt": "hello", "response": text} for text in ("yes", "no no no no")]
    found = formats.read("demonstrations", write(rows)).rows
    data = encoding.encode_texts(found, tokenizer)
    batch = batches.demonstration_batch(data, np.arange(2), 16)
    assert tokenizer.pad_id != tokenizer.eos_id
    is_end = batch.tokens == tokenizer.eos_id
    assert is_end.sum(axis=1).tolist() == [1, 1]
    assert batch.response_mask[is_end].tolist() == [1, 1]
    assert (batch.tokens[batch.attention_mask == 0] == tokenizer.pad_id).all()


@pytest.mark.parametrize("kind", ["demonstrations", "prompts"])
def test_what_a_template_leaves_out_of_a_conversation_is_named(kind, tmp_path, write):
    """ChatML writes neither reasoning nor tools; Qwen3's template writes both."""
    thought = HELLO | {"reasoning_content": "I greet."}
    row = {"messages": [HI, thought, MORE, YES], "tools": [{"type": "function", "function": {}}]}
    if kind == "prompts":
        row["messages"] = row["messages"][:3]
    path = write([row, row | {"tools": None}, {"messages": [HI, HELLO, MORE, YES]}])
    said = {}
    for name in ("chatml", "qwen3"):
        template = chat.template_of(of_family(tmp_path / name, name), "auto")
        said[name] = formats.read(kind, path, template=template).describe_unread(kind)
    line = "the chat template leaves out: reasoning_content (2 rows), tools (1 rows)"
    assert line in said["chatml"]
    assert "leaves out" not in said["qwen3"]
