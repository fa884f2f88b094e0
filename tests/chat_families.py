"""Tokenizers' folders as families of chat models ship them, with shortened chat templates."""

import json

import tokenizers as hf
from builders import initial_params

from rlhf_jax import models
from rlhf_jax.data.tokenizers import load_tokenizer, train_bpe

SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}

# The constructs of these families' own templates, shortened: what each turn is framed by, and who
# may speak.
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n') %}
        {%- set reasoning = reasoning.split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- set reasoning = reasoning.strip('\\n') %}
            {%- set content = '<think>\\n' + reasoning + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- endif %}
    {%- if message.role != "system" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {{ raise_exception("no images here") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}"""
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = "
    "bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% "
    "endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 "
    "% 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a model<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As it stands in SmolLM2's folder: a system message by default, pad is EOS.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = """{%- if tools %}
    {{- raise_exception('no tools here') }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user")
        or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA31 = """{{- bos_token }}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
TURNS = [SYSTEM, USER, ANSWER, USER]
CHATML = "user\nhi<|im_end|>\n<|im_start|>assistant\n"
CHATML = f"{CHATML}hello<|im_end|>\n<|im_start|>{CHATML}"
# Template, EOS, pad, BOS, other special tokens, other added tokens; a conversation and what is made
# of it.
FAMILIES = {
    "smollm2": (
        *(SMOLLM2, "<|im_end|>", "<|endoftext|>", "<|im_start|>", (), (), TURNS),
        f"<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>{CHATML}",
    ),
    "qwen2.5": (
        *(QWEN25, "<|im_end|>", "<|endoftext|>", None, ("<|im_start|>",), (), TURNS[1:]),
        f"<|im_start|>system\nYou are Qwen<|im_end|>\n<|im_start|>{CHATML}",
    ),
    "llama3.1": (
        *(LLAMA31, "<|eot_id|>", "<|pad|>", "<|begin|>"),
        *(("<|start_header_id|>", "<|end_header_id|>"), (), TURNS[:2]),
        "<|begin|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nbe kind"
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma2": (
        *(GEMMA2, "<eos>", "<pad>", "<bos>", ("<start_of_turn>", "<end_of_turn>"), (), TURNS[1:2]),
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    ),
    "llama3": (
        *(
            LLAMA3,
            "<|eot_id|>",
            "<|pad|>",
            "<|begin|>",
            ("<|start_header_id|>", "<|end_header_id|>"),
            (),
            TURNS,
        ),
        "<|begin|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        *(MISTRAL, "</s>", "<pad>", "<s>", ("[INST]", "[/INST]"), (), TURNS[1:]),
        "<s>[INST] hi [/INST] hello</s>[INST] hi [/INST]",
    ),
    "qwen2": (
        *(QWEN2, "<|im_end|>", "<|endoftext|>", None, ("<|im_start|>",), (), TURNS[1:]),
        f"<|im_start|>system\nYou are a model<|im_end|>\n<|im_start|>{CHATML}",
    ),
    "qwen3": (
        *(
            QWEN3,
            "<|im_end|>",
            "<|endoftext|>",
            None,
            ("<|im_start|>",),
            ("<think>", "</think>"),
            TURNS,
        ),
        f"<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>{CHATML}",
    ),
    "gemma3": (
        *(GEMMA3, "<eos>", "<pad>", "<bos>", ("<start_of_turn>", "<end_of_turn>"), (), TURNS),
        "<bos><start_of_turn>user\nbe "
        "kind\n\nhi<end_of_turn>\n<start_of_turn>model\nhello<end_of_turn>\n"
        "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    ),
}


def write(folder, family):
    """The files of a family's tokenizer; returns its backend. SmolLM2's pad is EOS, as in its own
    folder, and its unknown token another.
    """
    source, eos, pad, bos, special, tags, *_ = FAMILIES[family]
    words = ["hi hello think user assistant model system\n"] * 3
    backend = train_bpe(words, 280).backend
    names = [token for token in (eos, pad, bos, *special) if token is not None]
    backend.add_special_tokens(
        [hf.AddedToken(token, special=True, normalized=False) for token in names]
    )
    backend.add_tokens([hf.AddedToken(token, special=False, normalized=False) for token in tags])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": eos, "pad_token": pad, "bos_token": bos}
    if family == "smollm2":
        config |= {"pad_token": eos, "unk_token": pad}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(source)
    return backend


def write_model(folder, max_length=128):
    """A chat model with random weights: SmolLM2's template, pad is EOS. Returns its folder."""
    write(folder, "smollm2")
    tokenizer = load_tokenizer(folder)
    end = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    sizes = (tokenizer.vocab_size, max_length, 16, 1, 2)
    model = models.build(models.GPT2Config(*sizes, initializer_range=0.5, **end))
    models.save(folder, model, initial_params(model))
    return folder
