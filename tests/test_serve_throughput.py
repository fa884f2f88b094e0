"""The comparison of servers: what it asks, what it refuses, and which number is published."""

import contextlib
import json

import httpx
import pytest
import serve_throughput
import smollm2
from servers import Server

from rlhf_jax.errors import UserError


@pytest.fixture
def server():
    """``server(length)``: a client of one whose answers have this length, and it."""
    servers = []

    def server(length):
        usage = {"prompt_tokens": 9, "completion_tokens": length}
        servers.append(Server(lambda number, body: {"usage": usage}))
        return httpx.Client(base_url=servers[-1].url.removesuffix("/v1")), servers[-1]

    yield server
    for one in servers:
        one.stop()


def test_all_clients_ask_at_once_and_answers_of_other_lengths_are_no_result(server):
    client, asked = server(4)
    body = {"max_tokens": 4}
    speed, prompts = serve_throughput.rate(client, body, 16)
    assert speed > 0
    assert prompts == [9] * 16
    assert sorted(one["messages"][0]["content"] for one in asked.asked) == sorted(
        serve_throughput.CHATS
    )
    with pytest.raises(UserError, match="other lengths"):
        serve_throughput.rate(client, {"max_tokens": 5}, 2)
    asked.answer = lambda number, body: (400, b"no")
    with pytest.raises(UserError, match="status 400"):
        serve_throughput.rate(client, body, 1)


def test_the_median_of_the_warm_rounds_is_published(tmp_path, monkeypatch):
    def rate(client, body, clients):
        names.append((client, clients, "ignore_eos" in body))
        is_ours = client == "ours"
        speeds = [100.0, 3.0, 1.0, 2.0] if is_ours else [100.0, 6.0, 4.0, 5.0]
        return speeds[(len(names) - 1) // 4] * clients, [7]

    names = []
    clients = iter(["ours", "theirs"])
    monkeypatch.setattr(smollm2, "write_model", lambda folder: None)
    monkeypatch.setattr(
        serve_throughput, "started", lambda *_: contextlib.nullcontext(next(clients))
    )
    monkeypatch.setattr(serve_throughput, "rate", rate)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    out = tmp_path / "out.json"
    serve_throughput.main(tmp_path, out, tokens=4, rounds=3)
    rows = json.loads(out.read_text())["rows"]
    found = {(row["variant"], row["metric"]): row["value"] for row in rows}
    for clients in (1, 16):
        metric = f"tokens a second, clients: {clients}"
        for name, want in {"rlhf_jax": (2, 1, 3), "transformers serve": (5, 4, 6)}.items():
            got = [found[name, f"{metric}{edge}"] for edge in ("", " low", " high")]
            assert got == [value * clients for value in want]
    assert names[:4] == [
        (name, clients, name == "ours") for clients in (1, 16) for name in ("ours", "theirs")
    ]
