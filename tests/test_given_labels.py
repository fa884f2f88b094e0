"""Labels in lm-human-preferences' format: fetched from a server here, decoded, trained on, made
ones and human ones.
"""

import hashlib
import http.server
import json
import threading

import labels
import numpy as np
import pytest
from builders import json_lines

from rlhf_jax.data import formats, tokenizers
from rlhf_jax.errors import UserError

# tokens of each in the published sentiment labels
QUERY = 64
RESPONSE = 24


def padded(ids, length):
    return [*ids, *[labels.PAD_ID] * (length - len(ids))]


def made_labels(tokenizer, count=64, seed=0):
    """Rows in exactly the published format: the best sample opens with "good", the others with
    "bad".
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        query = tokenizer.encode("the film " * rng.integers(1, 5))
        best = int(rng.integers(4))
        ends = ["".join(rng.choice([" the", " film", " is"], rng.integers(2, 6))) for _ in range(4)]
        samples = [
            tokenizer.encode((" good" if i == best else " bad") * 3 + end)
            for i, end in enumerate(ends)
        ]
        row = {"query": padded(query, QUERY)} | {
            f"sample{i}": padded(ids, RESPONSE) for i, ids in enumerate(samples)
        }
        rows.append(row | {"best": best})
    return rows


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train_bpe(["the film is bad good " * 20], 300)


@pytest.fixture(scope="module")
def content(tokenizer):
    return json.dumps(made_labels(tokenizer)).encode()  # one line, as json.dump writes it


@pytest.fixture
def few(monkeypatch):
    """The set "sentiment" with fewer rows than were published."""
    monkeypatch.setitem(labels.LABEL_SETS, "sentiment", ("sentiment/offline_5k.json", 64))


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; breaks off after ``breaks_after`` bytes."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.breaks_after = None
        self.answers = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/labels.json"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.answers += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.breaks_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(content):
    with Server(content) as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        yield server
        server.shutdown()


def test_a_set_is_fetched_whole_with_its_checksum_beside_it(few, server, content, tmp_path, capsys):
    rows = json.loads(content)
    rows[0] |= {f"sample{i}": rows[0]["sample0"] for i in range(4)}
    server.content = json.dumps(rows).encode()
    argv = ["download", "sentiment", str(tmp_path / "new"), "--url", server.url]
    labels.main(argv)
    file = tmp_path / "new" / "sentiment_offline_5k.json"
    digest = hashlib.sha256(server.content).hexdigest()
    checksum = file.with_name(f"{file.name}.sha256")
    assert {path: path.read_bytes() for path in file.parent.iterdir()} == {
        file: server.content,
        checksum: f"{digest}  {file.name}\n".encode(),
    }
    said = capsys.readouterr().out
    assert f"{file}: 64 rows, of which 1 have four equal samples" in said
    assert digest in said
    labels.main(argv)
    assert server.answers == 1  # what is there is checked, not fetched again
    file.write_bytes(content)
    with pytest.raises(UserError, match="is not the file that was fetched"):
        labels.fetch_labels("sentiment", file.parent, server.url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:60], "holds 60 rows, and at least 64 are expected"),
        (lambda rows: [dict(list(row.items())[:4], best=0) for row in rows], "sample3 missing"),
        (
            lambda rows: [*rows, rows[0] | {"best": 4}],
            "row 65: 'best' must be the number of a response, 0 to 3",
        ),
        (lambda rows: "<html>Log in</html>", "expected a JSON list or JSON lines"),
    ],
)
def test_what_is_not_the_set_is_deleted(few, server, content, tmp_path, change, message):
    changed = change(json.loads(content))
    server.content = (changed if isinstance(changed, str) else json.dumps(changed)).encode()
    with pytest.raises(UserError, match=f"sentiment, and was deleted: .*{message}"):
        labels.fetch_labels("sentiment", tmp_path, server.url)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_connection_and_none_are_sentences(few, server, tmp_path):
    url = server.url
    server.breaks_after = 1000
    with pytest.raises(UserError, match=r"IncompleteRead.* Run the command again"):
        labels.fetch_labels("sentiment", tmp_path, url)
    assert list(tmp_path.iterdir()) == []
    server.shutdown()
    server.server_close()
    for name, address, message in (
        (
            "sentiment",
            url,
            r"^http.*: could not be fetched: .*refused.* or bring the file from elsewhere as",
        ),
        (
            "sentimnt",
            None,
            "no label set 'sentimnt'; there are sentiment, .*; did you mean sentiment",
        ),
        ("sentiment", "file:///etc/passwd", "an address that begins with https://"),
    ):
        with pytest.raises(UserError, match=message):
            labels.fetch_labels(name, tmp_path, address)


def test_token_ids_become_texts(tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    rows = made_labels(tokenizer, 3)
    half = tokenizer.encode("é")[:1]  # the first of its two bytes
    rows[1] |= {"sample2": padded(half, RESPONSE), "worker": "x"}
    rows[2] |= {f"sample{i}": [5] for i in range(4)}
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(rows))
    labels.main(["decode", str(file), "--tokenizer", str(tmp_path / "tokenizer")])
    output = tmp_path / "labels.decoded.jsonl"
    assert capsys.readouterr().out == (
        f"wrote {output}: 2 rows, 1 dropped (all responses are identical); 1 texts hold a broken "
        "character, U+FFFD\n"
    )
    decoded = json_lines(output)
    assert decoded[0]["best"] == rows[0]["best"]
    assert decoded[0]["query"].startswith("the film ")
    assert decoded[0][f"sample{rows[0]['best']}"].startswith(" good good good ")
    assert decoded[1]["sample2"] == "\ufffd"
    assert decoded[1]["worker"] == "x"
    for row, ids in zip(decoded, rows, strict=False):
        assert tokenizer.encode(row["query"]) == [i for i in ids["query"] if i != labels.PAD_ID]
    [row] = formats.read("comparisons", str(output)).rows[:1]
    assert row.responses == tuple(decoded[0][f"sample{i}"] for i in range(4))
    with pytest.raises(UserError, match="exists already"):
        labels.decode_labels(file, output, tokenizer)
    with pytest.raises(UserError, match=r"labels\.json, row 1: .* id \d+, .* up to 3"):
        labels.decode_labels(file, tmp_path / "other", tokenizers.characters("ab"))
