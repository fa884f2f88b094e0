"""Damaged and hostile files: every reader and loader answers with a result or a UserError, soon and
in little memory.

Files are cut, bits are flipped, pieces are put in or repeated; headers and settings say what no
honest program writes. Few examples run in the fast tier, always the same; more in the slow one.
"""

import gzip
import json
import random
import resource
import struct
import tempfile
import time
import tracemalloc
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import get_args

import jax
import pytest
from accidents import ODD, hurt
from builders import ROOT, initial_params, slow, soak
from transformers import AutoTokenizer  # noqa: F401  its import is not the memory of a file

from rlhf_jax import config, models
from rlhf_jax.config import RunConfig
from rlhf_jax.data import chat, check, formats, tokenizers
from rlhf_jax.errors import UserError

MEMORY = (
    64 << 20
)  # bytes that Python and NumPy may take for a file of some kilobytes; JAX compiles in them too
SECONDS = 60

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [
    {"prompt": "a", "response": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "c", "topic": 3.5e-2},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"query": [3, 50259], "sample0": [4], "sample1": "\u00e9\ud83d", "best": 1},
    {"prompt": "a", "responses": ["b", "c", "c"], "ranking": [2, 0, 1]},
    {"prompt": MESSAGES[:1], "responses": ["b", "c"], "ranks": [1, 1.5]},
    {"prompt": "a", "responses": ["b"], "targets": [-1e30]},
    {"messages": MESSAGES, "level": None},
    {"prompt": "a", "chosen": MESSAGES, "rejected": [*MESSAGES, *MESSAGES]},
    {"instruction": "a", "response1": "b", "response2": "c", "annotator1": 2},
    {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {
        "prompt": {
            "text": "a",
            "role": "prompter",
            "replies": [{"text": "b", "role": "assistant", "rank": 0}] * 2,
        }
    },
]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
CSV = b'prompt,responses,best\na,"[""b"", ""c""]",1\n"x\ny","[""b"", ""c""]",0\n'
DATA = {
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "lines.jsonl": LINES,
    "lines.jsonl.gz": gzip.compress(LINES, mtime=0),
    "table.csv": CSV,
    "table.tsv.gz": gzip.compress(CSV.replace(b",", b"\t"), mtime=0),
    "text.txt": "a\n\u2028b\r\n\n".encode(),
}
SHAPES = [[], [0], [0, 2**31], [0, 2**62, 2], [1, 2, 4, 8], [2**31, 2**31], [2**63], [-1, -1]]
FIELDS = [
    *({"shape": shape} for shape in SHAPES),
    *({"shape": shape, "dtype": "F32", "data_offsets": [0, 0]} for shape in SHAPES),
    *(
        {"dtype": dtype}
        for dtype in ("F64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "BOOL", "U16", "x")
    ),
    *({"data_offsets": offsets} for offsets in ([], [0, 2**63], [8, 4], [-1, 4], [2**62, 2**62])),
]


@cache
def model_files():
    """name -> bytes of a tiny model with a score head, its tokenizer, and adapters for it; and its
    parameters.
    """
    model = models.build(models.LlamaConfig(4, 8, 4, 2, 2, 4, tie_embeddings=True))
    params = initial_params(model)
    with tempfile.TemporaryDirectory() as folder:
        with_head = models.add_head(jax.random.key(1), params, "score")
        models.save(folder, model, with_head)
        tokenizers.characters("ab").save(folder)
        adapters = models.lora.init(jax.random.key(2), params, 2)
        models.lora.save(folder, params, {**adapters, "score": with_head["score"]})
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}, params


def damaged(content, draw):
    """``content`` after up to four accidents."""
    for _ in range(draw.randrange(5)):
        content = hurt(content, draw)
    return content


def headers(content, draw):
    """A safetensors file whose header says something odd of one tensor, or of its own length."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    body = content[8 + size :]
    name = draw.choice(sorted(set(header) - {"__metadata__"}))
    header[name] |= draw.choice(FIELDS)
    header["__metadata__"] = {"reward_shift": draw.choice(["1", "x", "nan", "1e999", ""])}
    text = json.dumps(header).encode()
    lengths = [len(text)] * 6 + [0, 7, len(text) + len(body) + 1, 10**8, 2**63, 2**64 - 1]
    return struct.pack("<Q", draw.choice(lengths)) + text + body


def odd_settings(content, draw):
    """A JSON object with up to three odd values."""
    keys = json.loads(content)
    names = [*sorted(keys), "rope_parameters", "chat_template"]
    for key in draw.choices(names, k=draw.randrange(4)):
        keys[key] = draw.choice(ODD)
    return json.dumps(keys).encode()


def answers(read, content_size=0):
    """Calls ``read``; anything but a result or a UserError, and a large allocation, is a
    failure.
    """
    tracemalloc.start()
    try:
        with suppress(UserError):
            read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY + 100 * content_size


def read_data(name, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for kind in get_args(formats.Kind):
            answers(lambda kind=kind: formats.read(kind, path, on_bad_row="drop"), len(content))
        report = check.check([str(path)])  # which names every problem and raises none
        report.text.encode("utf-8")
        assert report.num_problems or " 0 rows" not in report.text


def read_yaml(name, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        answers(lambda: config.read(RunConfig, path), len(content))


@pytest.mark.parametrize("opening", [b"{a: ", b"- ", slow(b"[")])
def test_yaml_that_is_nested_too_deep(opening):
    read_yaml("tiny.yaml", opening * 300)


def read_model(name, content):
    """The model's folder with one file replaced: as a model, as adapters, as a tokenizer with its
    chat template.
    """
    files, params = model_files()
    with tempfile.TemporaryDirectory() as folder:
        for other, held in (files | {name: content}).items():
            (Path(folder) / other).write_bytes(held)
        if name.startswith("adapter"):
            answers(lambda: models.lora.load(folder, params))
        elif name in ("config.json", "model.safetensors"):
            answers(lambda: models.load(folder))
        if "token" in name or name == "config.json":
            answers(
                lambda: chat.template_of(tokenizers.load_tokenizer(folder)).prompt(MESSAGES, "row")
            )


def drawn(files, draw):
    """(name, damaged content) of one of the files; of a model's half say something odd instead."""
    name = draw.choice(sorted(files))
    odd = {"safetensors": headers, "json": odd_settings}.get(name.rpartition(".")[2], damaged)
    is_odd = name in WEIGHTS + TOKENIZERS and draw.randrange(2)
    return name, (odd if is_odd else damaged)(files[name], draw)


WEIGHTS = ("config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Which files are drawn, what reads them, and how many examples the fast and the slow tier take.
TARGETS = {
    "data": (lambda: DATA, read_data, 12, 300),
    "yaml": (
        lambda: {"tiny.yaml": (ROOT / "configs" / "tiny.yaml").read_bytes()},
        read_yaml,
        12,
        20,
    ),
    "weights": (lambda: {name: model_files()[0][name] for name in WEIGHTS}, read_model, 8, 80),
    "tokenizer": (
        lambda: {name: model_files()[0][name] for name in TOKENIZERS},
        read_model,
        6,
        50,
    ),
}


@pytest.mark.parametrize(
    ("target", "tier"),
    [
        *((target, "fast") for target in TARGETS),
        *(slow(target, "slow") for target in TARGETS if target != "yaml"),
        soak("yaml", "slow"),  # PyYAML takes seconds for some examples
    ],
)
def test_a_result_or_a_user_error(target, tier):
    files, read, few, many = TARGETS[target]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(few if tier == "fast" else many):
        started = time.perf_counter()
        try:
            read(*drawn(files(), random.Random(seed)))
        except BaseException as error:
            error.add_note(f"of seed {seed}")
            raise
        took = time.perf_counter() - started
        assert took < SECONDS or target == "yaml", seed  # PyYAML is quadratic in depth
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: a gibibyte
