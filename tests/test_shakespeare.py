"""The Shakespeare job: its data by hand, its refusals, and the whole of it on generated text and on
the real one.
"""

import functools
import http.server
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shakespeare
from builders import ROOT, metric_rows, run_script, text_file

from rlhf_jax.config import parse
from rlhf_jax.data import encoding, formats, tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.runs.manifest import fingerprint

CONFIG = ROOT / "configs" / "shakespeare.yaml"
DATA = os.environ.get("RLHF_JAX_DATA")


def config_of(*flags):
    return parse(shakespeare.ShakespeareConfig, ["--config", str(CONFIG), *flags])


def test_chunks_by_hand():
    cut = functools.partial(shakespeare.chunks, "abcdefghij")
    assert cut(4) == ["abcd", "efgh", "ghij"]
    assert cut(4, 2) == ["abcd", "cdef", "efgh", "ghij"]
    assert cut(4, 3) == ["abcd", "bcde", "cdef", "defg", "efgh", "fghi", "ghij"]
    assert cut(10, 6) == ["abcdefghij"]


def test_a_limit_keeps_chunks_from_all_over_the_text():
    pieces = list("abcdefghij")
    assert shakespeare.spaced(pieces, 4) == ["a", "c", "f", "h"]
    assert shakespeare.spaced(pieces, 10) == shakespeare.spaced(pieces, None) == pieces


def test_counts_are_targets_up_to_100_and_one_piece_in_eight_ends_in_eos(tmp_path):
    pieces = ["hh", "ab", "  ", "hhhb", "h" * 99, "h" * 100, "bh" * 110, "ahha", "hb", "a\n"]
    tokenizer = tokenizers.characters("abh \n")
    path = tmp_path / "counts.jsonl"
    shakespeare.write_counts(path, pieces, "h", tokenizer)
    encoded = encoding.encode_texts(formats.read("comparisons", str(path)).rows, tokenizer)
    assert encoded.targets[:, 0].tolist() == [2, 0, 0, 3, 99, 100, 100, 2, 1, 0]
    for i, (piece, ids) in enumerate(zip(pieces, encoded.tokens[0], strict=True)):
        assert ids.tolist() == tokenizer.encode(piece) + ([tokenizer.eos_id] if i == 7 else [])


def test_rows_to_pretrain_on_are_the_text_without_any_eos(tmp_path):
    text = "To be, or not to be: that is"
    path = tmp_path / "pretrain.jsonl"
    shakespeare.write_demonstrations(path, text, 7)
    tokenizer = tokenizers.characters(text)
    demonstrations = formats.read("demonstrations", str(path)).rows
    encoded = encoding.encode_texts(demonstrations, tokenizer, max_length=7, too_long="truncate")
    assert [len(ids) for ids in encoded.tokens[0]] == [7] * 4
    assert encoded.starts.tolist() == [[1]] * 4  # every character but the first is learnt
    assert np.concatenate(encoded.tokens[0]).tolist() == tokenizer.encode(text)


def test_a_fetched_file_has_the_hash_that_was_asked_for(tmp_path):
    source = tmp_path / "source.txt"
    path = tmp_path / "data" / "input.txt"
    source.write_bytes(b"hear, hear")
    sha256 = fingerprint(source)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(
            UserError, match=rf"{sha256} was fetched, {'0' * 64} is expected; .* --data PATH"
        ):
            shakespeare.fetch(f"{url}/source.txt", "0" * 64, path)
        with pytest.raises(UserError, match=r"could not be fetched \(.*404.*give --data PATH"):
            shakespeare.fetch(f"{url}/missing.txt", sha256, path)
        assert not path.exists()
        shakespeare.fetch(f"{url}/source.txt", sha256, path)
        server.shutdown()
    assert path.read_bytes() == b"hear, hear"
    shakespeare.fetch(url, sha256, path)  # it is there: nothing is fetched
    path.unlink()
    with pytest.raises(
        UserError, match=r"could not be fetched \(.*refused.*download the file and give --data PATH"
    ):
        shakespeare.fetch(url, sha256, path)


def test_no_byte_order_mark_and_no_carriage_return_is_learnt(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfTo be,\r\nor not\rto be\n")
    assert shakespeare.read(path) == "To be,\nor not\nto be\n"


@pytest.fixture(scope="module")
def settings():
    return config_of()


def changed(config, key, value):
    """The config with another value of a dotted key."""
    name, _, rest = key.partition(".")
    return replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rl.batch_size", 100, "rl.batch_size must be a multiple of the 13 starters, got 100"),
        ("shakespeare.character", "th", "character must be a single one"),
        ("shakespeare.overlaps", (0, 0), "one number for each of the 5 chunk_sizes, got 2"),
        ("shakespeare.overlaps", (8, 0, 0, 0, 0), "overlaps must be below 8, got 8"),
        ("shakespeare.network.max_length", 256, "the longest chunk and its EOS are 257 tokens"),
        ("model", "gpt2", "--model gpt2: this job pretrains its own model"),
        ("reward", ("count:e",), "--reward count:e: this job's rewards are"),
        ("tokenizer.kind", "bpe", "set tokenizer.kind characters"),
        ("data", ("one.txt", "two.txt"), "give one text file"),
        ("data", ("missing.txt",), "missing.txt: cannot be read: No such file"),
        ("data", ("short.txt",), r"short\.txt: the text is shorter than a row of 256 characters"),
        ("data", ("latin.txt",), r"latin\.txt, line 1: byte 0xe9 is not UTF-8"),
    ],
)
def test_refusals(key, value, message, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    Path("latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(ValueError, match="^[^\n]*" + message):
        shakespeare.run(changed(replace(settings, output_dir="x"), key, value))


STARTERS = ("hat", "be", "the", "eat", "ah", "bat")
SMALL = (
    *("--network.hidden-size", 32, "--network.num-layers", 1, "--network.max-length", 16),
    *(
        "--shakespeare.chunk-sizes",
        4,
        8,
        "--shakespeare.overlaps",
        0,
        2,
        "--shakespeare.starters",
        *STARTERS,
    ),
    *("--shakespeare.network.num-layers", 1, "--shakespeare.network.max-length", 9),
    *("--rl.batch-size", 36, "--rl.max-new-tokens", 6, "--text.bucket-multiple", 16),
)


@pytest.mark.slow
def test_a_generated_text_is_answered_with_h_alone(tmp_path):
    text = text_file(tmp_path / "text.txt", 12000)
    folder = tmp_path / "run"
    given = ("--data", text, "--output-dir", folder, *SMALL, "--rl.optimizer.learning-rate", 0.003)
    done = run_script("shakespeare", *given)
    assert "Highest possible exact count: 6.500" in done.stdout
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["reward_model"]["chunks"] == {"4": 3000, "8": 2000}
    last = metric_rows(folder / "vpg_learned")[-1]
    assert last["validation/score"] == last["validation/reward/reward_model"]
    assert summary["vpg_learned"]["exact"]["last"] == round(last["validation/reward/count:h"], 6)
    assert summary["vpg_exact"]["first"] < 4
    assert summary["vpg_exact"]["last"] > 6
    exact = summary["vpg_learned"]["exact"]
    assert exact["last"] > 3 * exact["first"]  # how far it goes depends on the kind of CPU
    assert (
        summary["reward_model"]["mean_squared_error"]["last"]
        < summary["reward_model"]["target_variance"] / 4
    )
    done = run_script("shakespeare", *given, "--resume")
    assert done.stdout.count("finished already") == 4
    assert json.loads((folder / "summary.json").read_text("utf-8")) == summary


@pytest.mark.soak
@pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_real_text(seed, tmp_path):
    text = Path(str(DATA)) / "tinyshakespeare" / "input.txt"
    run_script("shakespeare", "--data", text, "--output-dir", tmp_path / "run", "--seed", seed)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["text"]["sha256"] == config_of().shakespeare.sha256
    assert summary["ceiling"] == pytest.approx(20 + 2 / 13, abs=1e-6)
    assert summary["vpg_exact"]["first"] < 3
    assert summary["vpg_exact"]["last"] > 20
    assert summary["reward_model"]["mean_squared_error"]["last"] < 1
    assert (
        summary["vpg_learned"]["learned"]["last"] > summary["vpg_learned"]["learned"]["first"] + 3
    )
