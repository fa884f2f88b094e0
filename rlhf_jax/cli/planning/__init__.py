"""``rlhf-jax plan``: memory and time of a run, from its compiled programs."""
