"""Labels in lm-human-preferences' format: fetched from a server here, decoded, trained on, made ones and human ones."""

import hashlib
import http.server
import json
import os
import sys
import threading
from pathlib import Path

import labels
import numpy as np
import pytest
import reward_model

from rlhf_jax.data import columns, files, formats, tokenizers
from rlhf_jax.errors import UserError

DATA = os.environ.get("RLHF_JAX_DATA")
QUERY, RESPONSE = 64, 24  # tokens of each in the published sentiment labels


def padded(ids, length):
    return [*ids, *[labels.PAD_ID] * (length - len(ids))]


def made_labels(tokenizer, count=64, seed=0):
    """Rows in exactly the published format: the best sample opens with "good", the others with "bad"."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        query = tokenizer.encode("the film " * rng.integers(1, 5))
        best = int(rng.integers(4))
        ends = ["".join(rng.choice([" the", " film", " is"], rng.integers(2, 6))) for _ in range(4)]
        samples = [tokenizer.encode((" good" if i == best else " bad") * 3 + end) for i, end in enumerate(ends)]
        row = {"query": padded(query, QUERY)} | {f"sample{i}": padded(ids, RESPONSE) for i, ids in enumerate(samples)}
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
    """Serves ``content``; breaks off after ``breaks_after`` bytes, once; understands ranges unless told not to."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.breaks_after, self.ranges, self.asked = content, None, True, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/labels.json"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start and start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks_after])
        server.breaks_after = None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(content):
    with Server(content) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def test_a_set_is_fetched_whole_with_its_checksum_beside_it(few, server, content, tmp_path, capsys):
    labels.main(["download", "sentiment", str(tmp_path / "new"), "--url", server.url])
    file = tmp_path / "new" / "sentiment_offline_5k.json"
    assert file.read_bytes() == content
    digest = hashlib.sha256(content).hexdigest()
    assert (tmp_path / "new" / "sentiment_offline_5k.json.sha256").read_text() == f"{digest}  {file.name}\n"
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, f"{file.name}.sha256"]
    said = capsys.readouterr().out
    assert f"{file}: 64 rows, of which 0 have four equal samples" in said
    assert digest in said
    labels.main(["download", "sentiment", str(tmp_path / "new"), "--url", server.url])
    assert len(server.asked) == 1  # what is there is checked, not fetched again
    file.write_bytes(content.replace(b'"best": 0', b'"best": 1', 1))
    with pytest.raises(UserError, match="is not the file that was fetched"):
        labels.fetch_labels("sentiment", file.parent, server.url)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_gone_on_with(few, server, content, tmp_path, ranges):
    server.breaks_after, server.ranges = 1000, ranges
    with pytest.raises(UserError, match=rf"ended after 1000 of {len(content)} bytes\. The same command continues"):
        labels.fetch_labels("sentiment", tmp_path, server.url)
    assert [path.name for path in tmp_path.iterdir()] == ["sentiment_offline_5k.json.part"]
    found = labels.fetch_labels("sentiment", tmp_path, server.url)
    assert server.asked == [None, "bytes=1000-"]
    assert found == (tmp_path / "sentiment_offline_5k.json", 64, 0, hashlib.sha256(content).hexdigest())
    assert found.path.read_bytes() == content


def test_a_part_that_is_whole_is_checked_and_kept(few, server, content, tmp_path):
    (tmp_path / "sentiment_offline_5k.json.part").write_bytes(content)
    assert labels.fetch_labels("sentiment", tmp_path, server.url).path.read_bytes() == content
    assert server.asked == [f"bytes={len(content)}-"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:60], "holds 60 rows, and at least 64 are expected"),
        (
            lambda rows: [{k: v for k, v in row.items() if k != "sample3"} | {"best": 0} for row in rows],
            "row 1: expected the keys query, .*; sample3 missing",
        ),
        (lambda rows: [*rows, rows[0] | {"best": 4}], "row 65: 'best' must be the number of a response, 0 to 3"),
        (lambda rows: [*rows, rows[0] | {"query": [1, "x"]}], "'query' must hold token ids"),
        (lambda rows: "<html>Log in</html>", "expected a JSON list or JSON lines"),
    ],
)
def test_what_is_not_the_set_is_deleted(few, server, content, tmp_path, change, message):
    changed = change(json.loads(content))
    server.content = (changed if isinstance(changed, str) else json.dumps(changed)).encode()
    with pytest.raises(UserError, match=f"is not the label set sentiment, and was deleted: .*{message}"):
        labels.fetch_labels("sentiment", tmp_path, server.url)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_there_is_a_sentence(few, server, tmp_path):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(
        UserError, match=r"^http.*: could not be fetched: .*refused.* or bring the file from elsewhere as"
    ):
        labels.fetch_labels("sentiment", tmp_path, url)
    with pytest.raises(UserError, match=r"no label set 'sentimnt'; there are sentiment, .*; did you mean sentiment"):
        labels.fetch_labels("sentimnt", tmp_path)
    with pytest.raises(UserError, match="an address that begins with https://"):
        labels.fetch_labels("sentiment", tmp_path, "file:///etc/passwd")


def test_equal_samples_are_counted(few, server, content, tmp_path):
    rows = json.loads(content)
    server.content = json.dumps([rows[0] | {f"sample{i}": rows[0]["sample0"] for i in range(4)}, *rows]).encode()
    assert labels.fetch_labels("sentiment", tmp_path, server.url)[1:3] == (65, 1)


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
        f"wrote {output}: 2 rows, 1 dropped (all responses are identical); 1 texts hold a broken character, U+FFFD\n"
    )
    decoded = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert decoded[0]["best"] == rows[0]["best"]
    assert decoded[0]["query"].startswith("the film ")
    assert decoded[0][f"sample{rows[0]['best']}"].startswith(" good good good ")
    assert (decoded[1]["sample2"], decoded[1]["worker"]) == ("\ufffd", "x")
    for row, ids in zip(decoded, rows, strict=False):
        assert tokenizer.encode(row["query"]) == [i for i in ids["query"] if i != labels.PAD_ID]
    [row] = formats.read("comparisons", str(output)).rows[:1]
    assert row.responses == tuple(decoded[0][f"sample{i}"] for i in range(4))
    with pytest.raises(UserError, match="exists already"):
        labels.decode_labels(file, output, tokenizer)
    with pytest.raises(
        UserError, match=r"labels\.json, row 1: holds the token id \d+, but the tokenizer has ids up to 3"
    ):
        labels.decode_labels(file, tmp_path / "other", tokenizers.characters("ab"))


def train(monkeypatch, *argv):
    """experiments/reward_model.py in this process; returns the rows of its metrics."""
    monkeypatch.setattr(sys, "argv", ["reward_model.py", *map(str, argv)])
    reward_model.main()
    folder = Path(argv[argv.index("--output-dir") + 1])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


SMALL = (
    *("--network.hidden-size", "16", "--network.num-layers", "1", "--network.num-heads", "2"),
    *("--network.max-length", "96", "--text.bucket-multiple", "96", "--reward-model.batch-size", "16"),
    *("--reward-model.optimizer.learning-rate", "1e-2", "--reward-model.validation-fraction", "0.25"),
)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pages")
def test_a_reward_model_learns_from_labels_in_the_published_format(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "labels.json").write_text(json.dumps(made_labels(tokenizer, 128)))
    metrics = train(
        monkeypatch,
        *("--data", tmp_path / "labels.json", "--tokenizer.name", tmp_path / "tokenizer"),
        *("--output-dir", tmp_path / "run", "--reward-model.num-epochs", "8", *SMALL),
    )
    assert metrics[0]["validation/accuracy"] < 0.7  # one of four by chance
    assert metrics[-1]["validation/accuracy"] > 0.9


def best_of_four(path):
    """Open Assistant's ranked replies as rows {query, sample0 .. sample3, best}, where there are at least four.

    The file has them by rank, so the first four are put in another order, that of their texts.
    """
    rows = []
    for row in (record.value for record in columns.adapted(files.read_source(path).records)):
        if len(row["responses"]) >= 4:
            replies = sorted(zip(row["responses"], row["ranks"], strict=True))[:4]
            samples = {f"sample{i}": text for i, (text, _) in enumerate(replies)}
            query = "\n\n".join(turn["content"] for turn in row["prompt"])
            rows.append({"query": query} | samples | {"best": int(np.argmin([rank for _, rank in replies]))})
    return rows


@pytest.mark.slow
@pytest.mark.usefixtures("no_pages")
@pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
@pytest.mark.parametrize("form", ["texts", "token ids"])
def test_a_reward_model_trains_on_human_choices_among_four(tmp_path, monkeypatch, form):
    rows = best_of_four(Path(DATA) / "oasst" / "en_trees_first70.jsonl")
    assert len(rows) >= 20
    assert len({row["best"] for row in rows}) > 1
    gpt2 = tokenizers.load_tokenizer(Path(DATA) / "gpt2")
    ids = [
        {key: value if key == "best" else padded(gpt2.encode(value)[:QUERY], QUERY) for key, value in row.items()}
        for row in rows
    ]
    (tmp_path / "labels.json").write_text(json.dumps(rows if form == "texts" else ids))
    metrics = train(
        monkeypatch,
        *("--data", tmp_path / "labels.json", "--tokenizer.name", Path(DATA) / "gpt2"),
        *("--output-dir", tmp_path / "run", "--text.too-long", "truncate", *SMALL),
    )
    assert len(metrics) >= 2
    assert all(np.isfinite(row["validation/loss"]) for row in metrics)
    assert 0 <= metrics[-1]["validation/accuracy"] <= 1
    if form == "token ids":
        decoded = labels.decode_labels(tmp_path / "labels.json", tmp_path / "texts.jsonl", gpt2)
        assert decoded.num_rows == len(rows)
        first = json.loads((tmp_path / "texts.jsonl").read_text("utf-8").splitlines()[0])
        assert rows[0]["query"].startswith(first["query"].rstrip("\ufffd"))
