"""The rehearsal of ``benchmarks/card.py``, tiny, on a CPU, beside PyTorch.

``doctor`` has tests of its own.
"""

import json
import sys

import pytest
from builders import script


@pytest.mark.parity
def test_the_parts_are_rehearsed(tmp_path, monkeypatch):
    card = script("benchmarks/card.py")
    out = tmp_path / "card.json"
    flags = ["--rehearse", "--seconds", "4000", "--only", "peaks,right,again,blocks,bench"]
    monkeypatch.setattr(sys, "argv", ["card.py", *flags, "--out", str(out)])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    card.main()
    found = {}
    for row in json.loads(out.read_text())["rows"]:
        of = row["variant"] if row["variant"].startswith("same") else row["variant"].split()[0]
        found.setdefault(of, {})[row["metric"]] = row["value"]
    assert found["same bytes"]["same"] == 1
    microbatches = found["same bytes, microbatches 1 and 4"]
    assert 0 < microbatches["equal_rows"] <= microbatches["rows"]
    for metric, value in found["right"].items():  # a CPU beside itself
        assert value == (1 if metric.endswith("equal") else 0)
    assert found["peaks"].keys() == {"bf16_tflops", "copy_gb_s"}
    assert found["rollout"].keys() >= {"ms_per_token", "bandwidth_share", "ratio"}
    assert found["sft"].keys() >= {"mfu_measured", "planned_memory_mb", "ratio"}
    assert found["grpo"]["mfu_measured"] > 0
