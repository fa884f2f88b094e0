"""``rlhf-jax bench``: steps of every kind, timed on random tokens."""
