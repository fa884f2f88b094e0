"""Twelve chat templates: the ids of transformers, and what is learned of a conversation, written
out by hand.
"""

import contextlib
import json

import chat_templates
import pytest
import transformers
from chat_templates import (
    CALL,
    HELLO,
    HI,
    MORE,
    RESULT,
    SUNNY,
    SYSTEM,
    THOUGHT,
    TOOLS,
    WHERE,
    YES,
    encoded,
    rows_of,
    spans,
)

from rlhf_jax.data import chat
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError

DATE = {"date_string": "26 Jul 2024"}

TURNS = [HI, HELLO, MORE, YES]
CONVERSATIONS = {
    "single": [HI, HELLO],
    "turns": TURNS,
    "system": [SYSTEM, *TURNS],
    "tools": [WHERE, CALL, RESULT, SUNNY],
    "reasoning": [HI, HELLO | {"reasoning_content": "I greet."}, MORE, THOUGHT],
}
_CHATML = [["Hello!<|im_end|>", "Yes.<|im_end|>"]]
_QWEN_CALL = '<tool_call>\n{"name": "sky", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
_SMOL = [[f"<|im_start|>assistant\n{text}<|im_end|>\n" for text in ("Hello!", "Yes.")]]
_THINK = "<think>\n{}\n</think>\n\n{}<|im_end|>"
_FINAL = "<|channel|>final<|message|>{}<|return|>"
_ANALYSIS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
# What is learned: of each row, its spans. A conversation that is missing here is refused.
LEARNED = {
    "chatml": {"turns": _CHATML, "system": _CHATML},
    "llama3": {
        "turns": [["Hello!<|eot_id|>", "Yes.<|eot_id|>"]],
        "system": [["Hello!<|eot_id|>", "Yes.<|eot_id|>"]],
        "tools": [
            ['{"name": "sky", "parameters": {"city": "Paris"}}<|eot_id|>', "Sunny.<|eot_id|>"]
        ],
    },
    "qwen2.5": {
        "turns": _CHATML,
        "system": _CHATML,
        "tools": [[_QWEN_CALL, "Sunny.<|im_end|>"]],
    },
    "qwen3": {
        "turns": [[_THINK.format("", "Hello!")], [_THINK.format("", "Yes.")]],
        "system": [[_THINK.format("", "Hello!")], [_THINK.format("", "Yes.")]],
        "tools": [
            [_THINK.format("", "").replace("<|im_end|>", "\n" + _QWEN_CALL)],
            [_THINK.format("", "Sunny.")],
        ],
        "reasoning": [
            [_THINK.format("I greet.", "Hello!")],
            [_THINK.format("Two and two.", "Yes.")],
        ],
    },
    "gemma3": {
        "turns": [["Hello!<end_of_turn>", "Yes.<end_of_turn>"]],
        "system": [["Hello!<end_of_turn>", "Yes.<end_of_turn>"]],
    },
    "mistral": {
        "turns": [[" Hello!</s>", " Yes.</s>"]],
        "system": [[" Hello!</s>"], [" Yes.</s>"]],
        "tools": [
            ['[TOOL_CALLS] [{"name": "sky", "arguments": {"city": "Paris"}}]</s>', " Sunny.</s>"]
        ],
    },
    "phi4": {"turns": _CHATML, "system": _CHATML},
    "smollm3": {"turns": _SMOL, "system": _SMOL},
    "olmo": {
        "turns": [["Hello!<|endoftext|>", "Yes.<|endoftext|>"]],
        "system": [["Hello!<|endoftext|>", "Yes.<|endoftext|>"]],
    },
    "deepseek": {
        "turns": [["Hello!<|end_of_sentence|>", "Yes.<|end_of_sentence|>"]],
        "system": [["Hello!<|end_of_sentence|>", "Yes.<|end_of_sentence|>"]],
    },
    "gpt-oss": {
        "turns": [[_FINAL.format("Hello!")], [_FINAL.format("Yes.")]],
        "system": [[_FINAL.format("Hello!")], [_FINAL.format("Yes.")]],
        "tools": [
            [
                ' to=functions.sky<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
                _FINAL.format("Sunny."),
            ]
        ],
        "reasoning": [
            [_ANALYSIS.format("I greet.") + _FINAL.format("Hello!")],
            [_ANALYSIS.format("Two and two.") + _FINAL.format("Yes.")],
        ],
    },
    "plain": {"turns": [["Hello!</s>"], ["Yes.</s>"]], "system": [["Hello!</s>"], ["Yes.</s>"]]},
}


@pytest.fixture(scope="module", params=chat_templates.TEMPLATES)
def family(request, tmp_path_factory):
    """(name, our tokenizer, transformers')."""
    folder = tmp_path_factory.mktemp("families") / request.param
    chat_templates.write(folder, request.param)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return request.param, load_tokenizer(folder), theirs


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_ids_and_what_is_learned(family, kind, write):
    name, tokenizer, theirs = family
    messages = CONVERSATIONS[kind]
    tools = TOOLS if kind == "tools" else None
    record = {"messages": messages} | ({"tools": json.dumps(tools)} if tools else {})
    how = {"tools": tools, "return_dict": False, **DATE}
    whole = None
    with contextlib.suppress(Exception):
        whole = theirs.apply_chat_template(messages, **how)
    if whole is None:
        assert kind not in LEARNED[name]
        with pytest.raises(UserError, match="line 1: the chat template failed"):
            rows_of(tokenizer, write, record)
        return
    found = encoded(tokenizer, rows_of(tokenizer, write, record))
    shown = [spans(tokenizer, *row) for row in found]
    if kind in LEARNED[name]:
        assert shown == LEARNED[name][kind]
    if name == "plain":  # no token ends a turn, so that EOS does, behind one turn
        return
    if len(found) == 1:
        assert found[0][0] == whole
        assert_masks(theirs, messages, tools, found[0][1], name in ("phi4", "smollm3"))
    else:  # each turn as the model sees it then
        numbers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        if (name, kind) == ("mistral", "system"):  # which it writes for the last question alone
            until = [theirs.apply_chat_template(messages[:i], **how) for i in numbers]
            found = [(ids[: learned.index(True)], learned) for ids, learned in found]
        else:
            until = [theirs.apply_chat_template(messages[: i + 1], **how) for i in numbers]
        assert [ids for ids, _ in found] == until


def assert_masks(theirs, messages, tools, learned, is_marked):
    """What is learned is what transformers reads from {% generation %}."""
    if is_marked:
        how = {"return_assistant_tokens_mask": True, "return_dict": True}
        masked = theirs.apply_chat_template(messages, tools=tools, **how, **DATE)
        assert learned == list(map(bool, masked["assistant_masks"]))


def test_the_prompt_and_the_end_of_a_turn(family):
    name, tokenizer, theirs = family
    template = chat.template_of(tokenizer, "auto")
    how = {"add_generation_prompt": True, "return_dict": False, **DATE}
    expected = theirs.apply_chat_template(TURNS[:3], **how)
    assert list(template.prompt(TURNS[:3], "")) == expected
    begun = [HI, {"role": "assistant", "content": "Let me think."}]
    how = {"continue_final_message": True, "return_dict": False, **DATE}
    assert list(template.prompt(begun, "")) == theirs.apply_chat_template(begun, **how)
    ends = {"chatml": "<|im_end|>", "phi4": "<|im_end|>", "gemma3": "<end_of_turn>", "plain": None}
    end = ends.get(name, chat_templates.TEMPLATES[name][1])
    assert template.end_of_turn == (None if end is None else tokenizer.backend.token_to_id(end))
    is_end = {*map(tokenizer.backend.id_to_token, template.ends)}
    assert is_end == ({end, "<|call|>"} if name == "gpt-oss" else {end} - {None})
