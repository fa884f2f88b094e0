"""What no run may write and the package may not call: what SECURITY.md says of secrets and of data
that is run.
"""

import ast
import functools
import json
import re
import sys
from pathlib import Path

import pytest
from source import parse

from rlhf_jax.config import RunConfig
from rlhf_jax.training.common.opening import open_run

PACKAGE = Path(__file__).resolve().parent.parent / "rlhf_jax"
# Read as a whole, the environment's secrets could reach a file. Pickles, eval and yaml.load run
# what they read.
KNOWN = "JAX_COMPILATION_CACHE_DIR|XDG_CACHE_HOME|JAX_PLATFORMS|TRANSFORMERS_NO_ADVISORY_WARNINGS"
KNOWN += "|WANDB_PROJECT|WANDB_NAME|WANDB_INIT_TIMEOUT|WANDB_FINISH_TIMEOUT"
KNOWN += "|WANDB_X_GRAPHQL_RETRY_MAX|XLA_FLAGS|NPROC|RLHF_JAX_KEEP_MEMORY|GLIBC_TUNABLES"
KNOWN += "|XLA_PYTHON_CLIENT_PREALLOCATE|SERVE_TOKEN"
KEYS = r"os\.environ\.get\(variable\)"  # of services that the user names: graders/client.py
ACCELERATORS = "ALLOW_MULTIPLE_LIBTPU_LOAD|TPU_[A-Z_]+"
BANNED = {
    "the environment": rf"^(?!.*('({KNOWN}|{ACCELERATORS})'|{KEYS})).*os\.(environ|getenv)"
    "|import (environ|getenv)",
    "what runs data": r"(?<!def )(?<![\w.])(eval|exec|compile|__import__)\("
    r"|\b(yaml\.(unsafe_)?load|np\.load|numpy\.load)\(",
    "remote code": r"trust_remote_code(?!=False)"
    r"|AutoTokenizer\.from_pretrained\((?!.*trust_remote_code)",
    # Two numbers of the module of sockets are no connection: inference/web.py.
    "modules": r"^(?!from socket import SO_SNDBUF, SOL_SOCKET$)"
    r"\s*(import|from) (pickle|marshal|shelve|dill|joblib|requests|socket)\b"
    r"|^\s*(import|from) (urllib|http)\b",
}


def test_secrets_of_the_environment_reach_no_file_and_no_line(tmp_path, monkeypatch, capsys):
    secret = "canary-7f3a"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setattr(sys, "argv", ["rlhf-jax", "sft", "--data", "demo"])
    config = RunConfig(output_dir=str(tmp_path / "run"))
    with open_run(config, "sft", {"data.json": "0"}) as run:
        assert (
            json.loads(run.folder.manifest.read_text("utf-8"))["command"]
            == "rlhf-jax sft --data demo"
        )
    written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(written) >= 2
    assert not any(secret.encode() in content for content in written)
    assert secret not in "".join(capsys.readouterr())


# A word of each line that is banned: files without it need no closer look.
WORDS = {
    "the environment": "environ|getenv",
    "what runs data": r"\b(eval|exec|compile|__import__|unsafe_load|load)\b",
    "remote code": "trust_remote_code|AutoTokenizer",
    "modules": r"\b(pickle|marshal|shelve|dill|joblib|requests|socket|urllib|http)\b",
}


@functools.cache
def plain_lines(path):
    """The lines of a file without comments, each statement on one line."""
    return ast.unparse(parse(path.read_text("utf-8"))).splitlines()


def files_with(word):
    return [path for path in PACKAGE.rglob("*.py") if re.search(word, path.read_text("utf-8"))]


@pytest.mark.parametrize("what", BANNED)
def test_the_package_reads_named_variables_alone_and_calls_nothing_that_runs_data(what):
    for path in files_with(WORDS[what]):
        for line in plain_lines(path):
            assert not re.search(BANNED[what], line), f"{path}: {line}"


def test_one_file_opens_connections_and_reads_their_keys():
    for path in files_with("httpx|environ"):
        text = "\n".join(plain_lines(path))
        if path != PACKAGE / "graders" / "client.py":
            assert not re.search(rf"import httpx|{KEYS}", text), path
