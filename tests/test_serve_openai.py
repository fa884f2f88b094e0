"""OpenAI's own client asks the server."""

import openai
import pytest
from serving import chat_model, running

HI = [{"role": "user", "content": "hello"}]
SKY = {"name": "sky", "description": "weather", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A chat model with random weights, behind a token."""
    folder = chat_model(tmp_path_factory.mktemp("chat"))
    with running(folder, max_new_tokens=12, token=True) as (address, served):
        yield f"{address}/v1", served.token, str(folder)


@pytest.fixture(scope="module")
def client(server):
    address, token, _ = server
    return openai.OpenAI(base_url=address, api_key=token, max_retries=0)


@pytest.fixture(scope="module")
def ask(client, server):
    def ask(**given):
        how = {"model": server[2], "messages": HI, "seed": 1, "extra_body": {"ignore_eos": True}}
        return client.chat.completions.create(**how | given)

    return ask


def test_models_are_listed(client, server):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.kind) == (server[2], "model", "policy")
    assert client.models.retrieve(server[2]) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_stream_says_what_the_whole_answer_says(ask):
    whole = ask(n=3, logprobs=True, top_logprobs=2)
    parts = list(
        ask(n=3, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True})
    )
    assert whole.object == "chat.completion"
    assert {part.object for part in parts} == {"chat.completion.chunk"}
    assert len({part.id for part in parts}) == 1
    assert parts[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 3 * 12
    for choice in whole.choices:
        pieces = [c for part in parts for c in part.choices if c.index == choice.index]
        assert [piece.delta.role for piece in pieces if piece.delta.role] == ["assistant"]
        assert "".join(piece.delta.content for piece in pieces) == choice.message.content
        told = [one for piece in pieces for one in piece.logprobs.content]
        assert [one.token for one in told] == [one.token for one in choice.logprobs.content]
        assert len(pieces) > 3
        assert [piece.finish_reason for piece in pieces[-2:]] == [None, "length"]
    assert len({choice.message.content for choice in whole.choices}) == 3


def test_log_probs_are_of_the_tokens_and_their_rivals(ask):
    told = ask(logprobs=True, top_logprobs=5).choices[0].logprobs.content
    assert len(told) == 12
    for one in told:
        ranked = [rival.logprob for rival in one.top_logprobs]
        assert len(ranked) == 5
        assert ranked == sorted(ranked, reverse=True)
        assert one.logprob <= ranked[0] < 0
        # Some bytes make no character of their own.
        assert one.bytes == (None if "\ufffd" in one.token else list(one.token.encode()))
    assert {len(one.top_logprobs) for one in ask(logprobs=True).choices[0].logprobs.content} == {0}
    greedy = ask(logprobs=True, top_logprobs=1, temperature=0).choices[0].logprobs.content
    assert all(one.logprob == one.top_logprobs[0].logprob for one in greedy)


def test_a_stop_string_ends_the_answer(ask):
    text = ask().choices[0].message.content
    stop = text[4:6]
    assert text.index(stop) == 4
    for stops in (stop, ["never said", stop]):
        choice = ask(stop=stops).choices[0]
        assert (choice.message.content, choice.finish_reason) == (text[:4], "stop")
        parts = list(ask(stop=stops, stream=True))
        assert "".join(part.choices[0].delta.content for part in parts) == text[:4]


def test_a_seed_repeats_an_answer(ask):
    one, again, other = (ask(seed=seed).choices[0].message.content for seed in (5, 5, 6))
    assert one == again != other


def test_tools_reach_the_template_and_an_answer_can_be_sent_back(ask):
    def prompt(messages=HI, **given):
        given["extra_body"] = {"return_token_ids": True}
        return ask(messages=messages, max_tokens=1, **given).prompt_text

    tools = [{"type": "function", "function": SKY | {"strict": True}}]
    assert '"sky"' in prompt(tools=tools)
    assert '"sky"' in prompt(tools=tools, tool_choice="auto", parallel_tool_calls=True)
    assert prompt(tools=tools, tool_choice="none") == prompt()
    answer = ask().choices[0].message
    call = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": "{}"}}
    turns = [
        *(*HI, answer, HI[0]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "city"}]},
    ]
    said = prompt(turns, tools=tools)
    assert answer.content in said
    assert '<tool_call>\n{"name": "sky"' in said
    assert "<tool_response>\ncity" in said


def test_texts_without_a_template(client, server):
    how = {"model": server[2], "prompt": ["hello", "tool"], "seed": 1, "max_tokens": 6}
    how["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**how, n=2, echo=True, logprobs=1)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.text[:4] for choice in whole.choices] == ["hell", "hell", "tool", "tool"]
    for choice in whole.choices:
        told = choice.logprobs
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        at = [choice.text[start : start + 1] for start in told.text_offset[:2]]
        assert at == [token[:1] for token in told.tokens[:2]]
        assert all(
            known <= max(rivals.values())
            for known, rivals in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True)
        )
    parts = [
        choice for part in client.completions.create(**how, stream=True) for choice in part.choices
    ]
    for number, choice in enumerate(client.completions.create(**how).choices):
        assert "".join(part.text for part in parts if part.index == number) == choice.text
        assert "".join(whole.choices[2 * number].text).endswith(choice.text)


def test_refusals_are_the_clients_errors(ask, client, server):
    for kind, given in (
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"logit_bias": {"5": 100}}),
        (openai.BadRequestError, {"extra_body": {"unheard_of": 1}}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"max_tokens": 10**6}),
        (openai.NotFoundError, {"model": "gpt-4"}),
    ):
        with pytest.raises(kind) as told:
            ask(**given)
        assert told.value.type == "invalid_request_error"
        assert told.value.body["message"]
    assert told.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=server[2], input="hello")
