"""The bytes that final weights are known to have, by kind of machine (goldens/digests.json)."""

import hashlib
import json
import os
from pathlib import Path

import jaxlib

from rlhf_jax.runs import devices

GOLDENS = Path(__file__).resolve().parent / "goldens"
REWRITE = "REWRITE_GOLDENS" in os.environ
ADD_DIGESTS = "ADD_DIGESTS" in os.environ


def check_digest(run, weights, layout):
    """Final weights have the same bytes on each machine of a kind, with the same ``layout``. A kind
    that digests.json does not hold is not compared; goldens that are written anew are true of this
    kind alone.
    """
    path = GOLDENS / "digests.json"
    kind = f"{devices.cpu()}, jaxlib {jaxlib.__version__}, {layout}"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    known = json.loads(path.read_text("utf-8"))
    if REWRITE:
        known = {kind: known.get(kind, {})}
    if REWRITE or ADD_DIGESTS:
        known.setdefault(kind, {})[run] = digest
        path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", "utf-8")
    assert known.get(kind, {}).get(run, digest) == digest, kind
