"""What a base of few bits changes (``lora.base``): the bytes of the layers, and the KL divergence
of the next token from the original model's.

    python benchmarks/quantized.py MODEL FILE [FILE ...] [--tokens 1024]

MODEL is a model's folder; the FILEs are texts, of which the first tokens are read in rows of 256.
All products are in float32. The printed table is that of docs/lora.md.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from rlhf_jax import models
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.models import lora
from rlhf_jax.training.common import memory

WIDTH = 256
FORMS = ("bfloat16", "int8", "int4", "nf4")


@jax.jit
def differences(whole: Any, log_probs: Any) -> tuple[Any, Any]:
    """The KL divergence of each token in nats, and whether the most probable token is the same."""
    kl = jnp.sum(jnp.exp(whole) * (whole - log_probs), axis=-1)
    return kl, whole.argmax(-1) == log_probs.argmax(-1)


def layers_of(params: Any) -> list[Any]:
    """The arrays of all layers: no tables, and no last norm."""
    return [leaf for path, leaf in flatten_dict(params).items() if path[0].startswith("h")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    model, params = models.load(args.model, scan_layers=True)
    tokenizer = load_tokenizer(args.model)
    texts = "\n\n".join(path.read_text("utf-8") for path in args.files)
    rows = jnp.array(tokenizer.encode(texts)[: args.tokens // WIDTH * WIDTH]).reshape(-1, WIDTH)
    log_probs_of = jax.jit(lambda params: jax.nn.log_softmax(model.apply(params, rows)))
    quantized = jax.jit(lora.quantized, static_argnames="form")
    whole = log_probs_of(params)
    loss = -jnp.take_along_axis(whole[:, :-1], rows[:, 1:, None], axis=-1).mean()
    bytes_of_layers = memory.on_device(layers_of(params)) / 1e6
    print(f"{rows.size} tokens, {loss:.3f} nats a token")
    print("| `lora.base` | layers, MB | KL, nats a token | same most probable token |")
    print("|---|---|---|---|")
    print(f"| `null` | {bytes_of_layers:.1f} | 0 | 100% |")
    for form in FORMS:
        base = quantized(params, form=form)
        kl, is_same = differences(whole, log_probs_of(base))
        size = memory.on_device(layers_of(base)) / 1e6
        error = kl.std() / kl.size**0.5
        print(f"| `{form}` | {size:.1f} | {kl.mean():.4f} ± {error:.4f} | {is_same.mean():.1%} |")


if __name__ == "__main__":
    main()
