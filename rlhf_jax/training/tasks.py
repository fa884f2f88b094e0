"""The stages that learn from labelled texts, by their names."""

from rlhf_jax.training.supervised import dpo, kto, reward_model, sft

TASKS = {task.section: task for task in (sft.TASK, reward_model.TASK, dpo.TASK, kto.TASK)}
