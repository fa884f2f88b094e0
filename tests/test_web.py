"""inference.web: which requests reach an application, and what it reads of them. The labelling
page's tests have the rest.
"""

import asyncio
import itertools

import pytest
from starlette.responses import PlainTextResponse

from rlhf_jax.inference import web

HOST = (b"host", b"localhost:8000")
JSON = b"application/json"
OURS = (b"origin", b"http://localhost:8000")
NO_HOSTS = (
    *(b"", b"[", b"[]", b"[127.0.0.1]", b"[localhost]", b"::1", b"[::1", b"[::1]x", b"[::1%lo]"),
    *(b"localhost:", b"localhost:x", b"localhost:80:80", b"localhost ", b" localhost", b":80"),
    *(b"127.0.0.1/health?", b"127.0.0.1?x", b"localhost#x", b"a@localhost", b"localhost/"),
    *(b"localhost\\x", b"localhost%00", b"http://localhost", b"localhost,localhost", b"\xb2"),
)
THEIRS = (b"origin", b"http://evil.example")


def asked(*headers, path="/", method="POST", events=(), heard=None, kind=JSON, **settings):
    """The reply's status and body to a request whose application reads two events."""
    given = itertools.chain(events, [{"type": "http.disconnect"}])
    sent = []

    async def application(scope, receive, send):
        if heard is not None:
            heard.extend([await receive(), await receive()])
        await PlainTextResponse("answered")(scope, receive, send)

    async def receive():
        return next(given)

    async def send(message):
        sent.append(message)

    guard = web.Guard(application, **{"names": (), "max_body": 4} | settings)
    headers = (*headers, (b"content-type", kind))
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    scope["query_string"] = b""
    asyncio.run(guard(scope, receive, send))
    names = {name for name, _ in sent[0]["headers"]}
    assert {name.encode() for name in web.HEADERS} <= names  # on every response
    return sent[0]["status"], sent[1]["body"]


def body(*parts):
    more = [part is not parts[-1] for part in parts]
    return [
        {"type": "http.request", "body": part, "more_body": is_more}
        for part, is_more in zip(parts, more, strict=True)
    ]


@pytest.mark.parametrize(
    ("headers", "needed", "not_needed"),
    [
        ([HOST], 403, 200),
        ([HOST, OURS], 200, 200),
        ([HOST, THEIRS], 403, 403),
        ([HOST, (b"origin", b"null")], 403, 403),
        ([HOST, (b"origin", b"")], 403, 403),
        ([HOST, (b"origin", b"http://[")], 400, 400),
        ([(b"host", b"evil.example"), (b"origin", b"http://evil.example")], 421, 421),
    ],
)
def test_a_change_may_have_to_say_where_it_comes_from(headers, needed, not_needed):
    events = body(b"")
    assert asked(*headers, events=events)[0] == needed
    assert asked(*headers, events=events, needs_origin=False)[0] == not_needed


def test_reading_says_no_origin():
    assert asked(HOST, method="GET")[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost", 200),
        (b"LOCALHOST:80", 200),
        (b"127.0.0.1:9", 200),
        (b"[::1]", 200),
        (b"Chat.Example.org", 200),
        (b"chat.example.org.evil.example", 421),
        *((host, 421) for host in NO_HOSTS),
    ],
)
def test_a_server_has_names(host, status):
    names = ("chat.EXAMPLE.org",)
    assert asked((b"host", host), method="GET", names=names)[0] == status


def test_the_application_reads_the_whole_body_and_then_what_comes_of_the_connection():
    heard = []
    assert asked(HOST, OURS, events=body(b"ab", b"cd"), heard=heard)[0] == 200
    assert [event["type"] for event in heard] == ["http.request", "http.disconnect"]
    assert (heard[0]["body"], heard[0]["more_body"]) == (b"abcd", False)


def test_a_large_body_is_not_read_to_its_end():
    heard = []
    events = iter(body(b"abcd", b"e", b"f"))
    assert asked(HOST, OURS, events=events, heard=heard) == (413, b"too large")
    assert heard == []
    assert [event["body"] for event in events] == [b"f"]


def test_a_refusal_of_ones_own():
    def limit(request):
        return None if request.scope["path"] == "/open" else (401, "no")

    def refusal(status, why):
        return PlainTextResponse(f"{why}!", status)

    how = {"limit": limit, "method": "GET"}
    assert asked(HOST, **how) == (401, b"no")
    assert asked(HOST, path="/open", **how) == (200, b"answered")
    assert asked(HOST, refusal=refusal, **how) == (401, b"no!")
    assert asked(refusal=refusal, **how)[0] == 421


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (JSON, 200),
        (b"Application/JSON", 200),
        (b"APPLICATION/json ; charset=utf-8", 200),
        (b"application/json2", 415),
        (b"application/jsonl", 415),
        (b"text/plain; application/json", 415),
        (b"text/plain", 415),
        (b"", 415),
    ],
)
def test_a_body_is_json_whose_media_type_has_no_case(kind, status):
    assert asked(HOST, OURS, kind=kind, events=body(b"{}"))[0] == status
    assert asked(HOST, kind=kind, method="GET")[0] == 200
