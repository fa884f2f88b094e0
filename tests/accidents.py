"""Accidents to files, drawn by a ``random.Random``: cuts, flipped bits, pieces and values that no
honest program writes.
"""

import json

import yaml

NAN = float("nan")
INF = float("inf")
ODD = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 10**400, 0.0, 1e308, -1e308, 5e-324, NAN, INF]
ODD += ["", "2", "NaN", "{prompt", "\x1b[2J", "\ud83d"]
ODD += [[], [0], [[]], {}, {"a": {"b": [None]}}, {"": ""}]
DEEP = [b"[" * 1500, b'{"a":' * 1500, b"[" * 400 + b"]" * 400, b"- " * 500]
BOMB = b"a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + b"".join(
    b"%c: &%c [%s]\n" % (now, now, b", ".join([b"*%c" % (now - 1)] * 9)) for now in range(98, 108)
)
LOOP = b"a: &a {b: *a}\nc: &c [*c]\n"
PIECES = rb"""
"|\|\ud83d|[|]|{|}|,|:|null|NaN|-1|1e999|!!bool x|!!timestamp x|!!timestamp 2020-99-99|!!int ''
"\UFFFFFFFF"|&a [*a]|*a|<<: *a|? |? [1]|%YAML 9.9|---|...|!<|!!python/object/apply:os.getcwd []
2020-01-01: 2020-01-01|{"step": 1e5}|{"step": 99999999999999999999}|PAR1
"""
PIECES = PIECES.replace(b"\n", b"|").strip(b"|").split(b"|")
PIECES += [b"", b"\0", b"\n", b"\r", b"\t", b"|\n"]
PIECES += [b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b", b"sample" + b"7" * 4500, b"9" * 5000]
PIECES += [*DEEP, BOMB, LOOP]


def hurt(data, draw):
    """The bytes after one accident."""
    at = draw.randrange(len(data) + 1)
    to = min(len(data), at + draw.randrange(1000))
    piece = draw.choice(PIECES)
    match draw.choice(["cut", "flip", "put", "replace", "drop", "repeat"]):
        case "cut":
            return data[:at]
        case "flip":
            flipped = bytes(byte ^ 1 << draw.randrange(8) for byte in data[at : at + 1])
            return data[:at] + flipped + data[at + 1 :]
        case "put":
            return data[:at] + piece + data[at:]
        case "replace":
            return data[:at] + piece + data[to:]
        case "drop":
            return data[:at] + data[to:]
    return data[:to] + data[at:]


def with_odd_value(content, name, draw):
    """The JSON or YAML with one value, wherever in it, of another kind."""
    lines = content.decode().splitlines() if name.endswith(".jsonl") else [content.decode()]
    at = draw.randrange(len(lines))
    value = yaml.safe_load(lines[at]) if name.endswith(".yaml") else json.loads(lines[at])
    inner = value
    while isinstance(inner, dict | list) and inner:
        key = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not inner[key] or not isinstance(inner[key], dict | list) or draw.random() < 0.4:
            inner[key] = draw.choice(ODD)
            break
        inner = inner[key]
    lines[at] = json.dumps(value, default=str)
    return "\n".join(lines).encode() + b"\n"
