"""Twelve chat templates, from the published behaviour of their families: who may speak, what frames
a turn, how tools, calls and reasoning are written, and what is left out of the history.
"""

import itertools
import json

import tokenizers as hf

from rlhf_jax.data import chat, encoding, formats
from rlhf_jax.data.tokenizers import train_bpe

SYSTEM = {"role": "system", "content": "Be kind."}
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello!"}
MORE = {"role": "user", "content": "More?"}
YES = {"role": "assistant", "content": "Yes."}
WHERE = {"role": "user", "content": "Paris?"}
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]
FUNCTION = {"name": "sky", "arguments": {"city": "Paris"}}
CALL = {"role": "assistant", "content": None}
CALL["tool_calls"] = [{"id": "call00001", "type": "function", "function": FUNCTION}]
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "call00001"}
SUNNY = {"role": "assistant", "content": "Sunny."}
THOUGHT = YES | {"reasoning_content": "Two and two."}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) + "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls|length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_QWEN_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
"""
_QWEN_CALLS = """
    {%- for call in message.tool_calls %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
    {%- endfor %}
"""
_QWEN_RESULT = """
    {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
        {{- '<|im_start|>user' }}
    {%- endif %}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
"""
QWEN25 = (
    _QWEN_TOOLS
    + """{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first)
           or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}"""
    + _QWEN_CALLS
    + """{{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}"""
    + _QWEN_RESULT
    + """{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
)
QWEN3 = (
    _QWEN_TOOLS
    + """{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}{%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}"""
    + _QWEN_CALLS
    + """{{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}"""
    + _QWEN_RESULT
    + """{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set ns = namespace(index=0) %}
{%- set asked = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- for m in loop_messages %}
    {%- if m.role == "user" or (m.role == "assistant" and m.tool_calls is not defined) %}
        {%- if (m.role == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Conversation roles must alternate user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in loop_messages %}
    {%- if m.role == "user" %}
        {%- if tools is not none and m == asked[-1] %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + m.content + "[/INST]" }}
        {%- else %}{{- "[INST] " + m.content + "[/INST]" }}{%- endif %}
    {%- elif m.tool_calls is defined %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in m.tool_calls %}
            {%- if not call.id is defined or call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should have length 9!") }}
            {%- endif %}
            {{- call.function | tojson }}{{- "]" + eos_token if loop.last else ", " }}
        {%- endfor %}
    {%- elif m.role == "assistant" %}{{- " " + m.content|trim + eos_token }}
    {%- elif m.role == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content|tojson + '}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
PHI4 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<|im_start|>system<|im_sep|>' + m['content'] + '<|im_end|>' }}"
    "{% elif m['role'] == 'user' %}"
    "{{ '<|im_start|>user<|im_sep|>' + m['content'] + '<|im_end|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant<|im_sep|>' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
SMOLLM3 = """{%- if enable_thinking is not defined -%}
    {%- set enable_thinking = true -%}
{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{{- "<|im_start|>system\\nReasoning Mode: " + mode + "\\n" -}}
{%- if messages[0].role == "system" -%}{{- messages[0].content -}}{%- endif -%}
{%- if tools -%}
    {%- for tool in tools -%}{{- "\\n" + tool | string -}}{%- endfor -%}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if mode == "/think" -%}
            {{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" + content + "<|im_end|>\\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- elif message.role == "tool" -%}
        {{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if mode == "/think" -%}{{ "<|im_start|>assistant\\n" }}
    {%- else -%}{{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" }}{%- endif -%}
{%- endif -%}
"""
OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<|system|>\\n' + m['content'] + '\\n' }}{% elif m['role'] == 'user' %}"
    "{{ '<|user|>\\n' + m['content'] + '\\n' }}{% elif m['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\\n' + m['content'] + eos_token + '\\n' }}"
    "{% else %}{{ '<|assistant|>\\n' + m['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{% set ns = namespace(system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{%- elif m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + '<|end_of_sentence|>' }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
GPT_OSS = """{{- "<|start|>system<|message|>Reasoning: medium<|end|>" }}
{%- for message in messages %}
    {%- if message.role == "system" or message.role == "developer" %}
        {{- "<|start|>developer<|message|># Instructions\\n\\n" + message.content + "<|end|>" }}
    {%- elif message.role == "assistant" %}
        {%- if message.tool_calls is defined %}
            {%- if message.thinking %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking }}
                {{- "<|end|>" }}
            {%- endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json" }}
            {{- "<|message|>" + call.arguments | tojson + "<|call|>" }}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if message.thinking %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking }}
                {{- "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
        {%- endif %}
    {%- elif message.role == "tool" %}
        {{- "<|start|>functions to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson + "<|end|>" }}
    {%- elif message.role == "user" %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif %}
"""
ROLES = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
INST = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>")
# Template, EOS, BOS, other special tokens. The EOS of the ChatML model is the one of a base model,
# which its template never writes.
TEMPLATES = {
    "chatml": (CHATML, "<|endoftext|>", None, IM),
    "llama3": (LLAMA3, "<|eot_id|>", "<|begin_of_text|>", HEADERS),
    "qwen2.5": (QWEN25, "<|im_end|>", None, IM),
    "qwen3": (QWEN3, "<|im_end|>", None, IM),
    "gemma3": (GEMMA3, "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": (MISTRAL, "</s>", "<s>", (*INST, "[TOOL_RESULTS]", "[/TOOL_RESULTS]")),
    "phi4": (PHI4, "<|endoftext|>", None, (*IM, "<|im_sep|>")),
    "smollm3": (SMOLLM3, "<|im_end|>", None, IM),
    "olmo": (OLMO, "<|endoftext|>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>")),
    "deepseek": (DEEPSEEK, "<|end_of_sentence|>", "<|begin|>", ("<|User|>", "<|Assistant|>")),
    "gpt-oss": (GPT_OSS, "<|return|>", None, HARMONY),
    "plain": (ROLES, "</s>", None, ()),
}


def write(folder, name):
    """The files of a tokenizer with this chat template."""
    source, eos, bos, special = TEMPLATES[name]
    backend = train_bpe(["hello user assistant system think tool name city\n"] * 3, 300).backend
    names = [token for token in (eos, bos, "<pad>", *special) if token is not None]
    backend.add_special_tokens([hf.AddedToken(token, special=True) for token in names])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": eos, "pad_token": "<pad>", "bos_token": bos}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(source)


def rows_of(tokenizer, write, record, **options):
    template = chat.template_of(tokenizer, "auto")
    return formats.read("demonstrations", write([record]), template=template, **options).rows


def encoded(tokenizer, rows):
    """(ids, learned) of each row."""
    texts = encoding.encode_texts(rows, tokenizer, template="auto")
    found = []
    for number, ids in enumerate(texts.tokens[0]):
        start = texts.starts[number, 0]
        learned = texts.learned.get((0, number), [True] * (len(ids) - start))
        found.append((ids.tolist(), [False] * start + list(map(bool, learned))))
    return found


def spans(tokenizer, ids, learned):
    """The texts of the learned parts."""
    parts = itertools.groupby(zip(ids, learned, strict=True), lambda pair: pair[1])
    decode = tokenizer.backend.decode
    return [
        decode([token for token, _ in part], skip_special_tokens=False)
        for is_learned, part in parts
        if is_learned
    ]
