"""What a finished run can do: ``rlhf-jax evaluate``."""
