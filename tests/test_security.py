"""What no run may write and the package may not call: what SECURITY.md says of secrets and of data that is run."""

import ast
import json
import sys
from pathlib import Path

from rlhf_jax.config import RunConfig
from rlhf_jax.training import stage

ROOT = Path(__file__).resolve().parent.parent


def test_secrets_of_the_environment_reach_no_file_and_no_line(tmp_path, monkeypatch, capsys):
    secret = "canary-7f3a"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setattr(sys, "argv", ["experiments/sft.py", "--data", "demo"])
    config = RunConfig(output_dir=str(tmp_path / "run"))
    with stage.open_stage(config, "sft", {"data.json": "0"}) as opened:
        assert json.loads(opened.run.manifest.read_text("utf-8"))["command"] == "python experiments/sft.py --data demo"
    written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(written) >= 2
    assert not any(secret.encode() in content for content in written)
    assert secret not in "".join(capsys.readouterr())


def test_the_package_reads_named_variables_alone_and_calls_nothing_that_runs_data():
    """Read as a whole, the environment's secrets could reach a file. Pickles, eval and yaml.load run what they read."""
    known = {"JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "JAX_PLATFORMS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    known |= {"WANDB_PROJECT", "WANDB_NAME", "WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"}
    known |= {"WANDB_X_GRAPHQL_RETRY_MAX"}
    for path in (ROOT / "rlhf_jax").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                around = parents[node]
                around = parents[around] if isinstance(around, ast.Attribute) else around
                named = {part.value for part in ast.walk(around) if isinstance(part, ast.Constant)}
                assert named & known, f"{path}, line {node.lineno}: reads the environment"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load"), path
                trusts = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
                assert all(isinstance(value, ast.Constant) and value.value is False for value in trusts), path
                assert trusts or not called.endswith("AutoTokenizer.from_pretrained"), path
                assert not called.endswith(("np.load", "numpy.load")), path
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                banned = {"pickle", "marshal", "shelve", "dill", "joblib", "requests", "socket"}
                if path.name not in ("shakespeare.py", "labels.py"):  # fetch public files and look at what they got
                    banned.add("urllib")
                assert not banned & {name.split(".")[0] for name in imported}, path
