"""Estimates of KL beside a published table (Schulman 2020)."""

# --- 1
import jax
import jax.numpy as jnp

from rlhf_jax import ops

PUBLISHED = {
    0.1: {"k1": (0, 20), "k2": (0.002, 1.42), "k3": (0, 1.42)},
    1.0: {"k1": (0, 2), "k2": (0.25, 1.73), "k3": (0, 1.7)},
}
samples = jax.random.normal(jax.random.key(0), (10_000_000,))
log_q = -jnp.square(samples) / 2
for mean, table in PUBLISHED.items():
    log_p = -jnp.square(samples - mean) / 2
    true = mean**2 / 2
    for name, (bias, deviation) in table.items():
        found = ops.kl(log_q, log_p, name)
        ours = found.mean() / true - 1, found.std() / true
        print(f"p = N({mean}, 1), {name}: bias {ours[0]:6.3f}, deviation {ours[1]:5.2f}")
        noise = 3 * deviation / len(samples) ** 0.5
        assert abs(ours[0] - bias) < 0.001 + noise
        assert abs(ours[1] - deviation) < 0.01 * deviation

# --- end
