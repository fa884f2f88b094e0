"""PPO of TRL 1.12, the last one that has it (trl.experimental.ppo), on a reward model of ours.

usage: python experiments/preferences_trl.py SETTINGS.json OUT.json

SETTINGS.json has the fields of Settings in experiments/preferences_peer.py. OUT.json gets {asked,
iterations: [{step, seconds, kl, score, ended, ...}], answers: {step: {texts, ended, scores}},
peak_memory_mb, versions}. The seconds are those of an iteration without its evaluation. While it
runs, OUT.json.part has what there is so far.

The tokenizer is the reward model's, whose pad is no EOS. SmolLM2's own pad ends its turns; TRL
takes each pad of a prompt for padding, and would hide the ends of the turns from policy, reference,
critic and reward model. ``reward_shift`` of the reward model becomes a bias of its head, so that
scores are those of ``rlhf-jax``, read at the token that ends the turn.

What TRL computes otherwise than ``rlhf-jax ppo`` with ``preferences_peer.flags``:

- Of an answer that was cut at the limit the score is read at its last token; here behind it, at
  the end of the turn that it lacks, as the reward model was trained.
- The score of an answer that ended is paid one token after its EOS, at a state whose value is
  learned too; here it is paid at the EOS. With lambda 1 the advantages are the same, below it TRL's
  contain the value of that state.
- This state counts in the means of the value loss and of whitened rewards.
- The linear schedule falls once an iteration, here at each optimizer step.
- Whitening divides by n - 1, and adds 1e-8 to the variance.
- The old log-probabilities are the sampler's, here those of the update's own forward pass.
- With microbatches the loss is the mean of their means, here that of all tokens; and in the last
  batch of a pass over the prompts, where accelerate accumulates nothing, each of them is a step.
- An answer in which the pad is sampled ends there.

The form of all else is the same: KL k1 in the reward, the clipped losses, means over the tokens of
a minibatch, minibatches drawn again in each pass, Adam (eps 1e-8, no decay), the first adapters.
TRL clips no gradient (it does not read max_grad_norm), and the flags tell ours not to.

The critic: TRL trains whatever weights the value model has, and peft_config is the policy's alone.
Here the value model gets adapters of the same form beside its head. The reference is the policy
with its adapters off, or a copy.
"""

import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
import transformers
from datasets import Dataset

AT_ONCE = 64  # held-out prompts
LOGGED = {  # TRL's name: ours
    "objective/kl": "kl",
    "objective/scores": "score",
    "objective/rlhf_reward": "reward",
    "objective/entropy": "entropy",
    "policy/clipfrac_avg": "clip_fraction",
    "loss/policy_avg": "policy_loss",
    "loss/value_avg": "value_loss",
    "lr": "learning_rate",
}


def adapters(asked, task):
    """The form of the adapters of a policy or a value model."""
    return peft.LoraConfig(
        r=asked.rank, lora_alpha=asked.alpha, target_modules="all-linear", task_type=task
    )


def scorer(folder, pad_id):
    """A reward model of ours, whose head has the bias that config.json has beside it."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )
    model.config.pad_token_id = pad_id
    head = torch.nn.Linear(model.score.in_features, 1)
    head.weight.data = model.score.weight.data
    head.bias.data.fill_(getattr(model.config, "reward_shift", 0.0))
    model.score = head
    return model


def critic(asked, pad_id):
    """A value model: the reward model with its head, or the policy with a head of zeros."""
    model = scorer(asked.reward_model if asked.value_from == "reward" else asked.model, pad_id)
    if asked.value_from == "policy":
        torch.nn.init.zeros_(model.score.weight)
    if asked.rank:
        peft.inject_adapter_in_model(adapters(asked, "SEQ_CLS"), model)
        model.score.requires_grad_(True)
    return model


def prompt_ids(tokenizer, prompts):
    """The tokens of each prompt in the chat template, up to where the answer begins.

    Raises:
        ValueError: a prompt has the pad, which TRL would hide.
    """
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    ids = asked["input_ids"]
    if any(tokenizer.pad_token_id in row for row in ids):
        raise ValueError(f"a prompt has the pad, {tokenizer.pad_token!r}; it must be another token")
    return ids


class Watch(transformers.TrainerCallback):
    """The seconds and metrics of each iteration, and answers to the held-out prompts."""

    def __init__(self, asked, out, answers):
        self.asked = asked
        self.out = out
        self.answers = answers  # of the present policy
        self.found = {"asked": vars(asked), "iterations": [], "answers": {}}

    def on_train_begin(self, args, state, control, **more):
        self.found["answers"][0] = self.answers(0)
        self.write()
        self.began = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **more):
        row = {name: logs[key] for key, name in LOGGED.items()}
        row["ended"] = logs["val/num_eos_tokens"] / self.asked.batch
        self.found["iterations"].append({"step": state.global_step, **row})

    def on_step_end(self, args, state, control, **more):
        row = self.found["iterations"][-1]
        row["seconds"] = time.perf_counter() - self.began
        print(
            f"{row['step']}/{state.max_steps}  score {row['score']:.3f}  kl {row['kl']:.3f}  "
            f"{row['seconds']:.1f} s",
            flush=True,
        )
        if state.global_step % self.asked.eval_interval == 0 or row["step"] == state.max_steps:
            self.found["answers"][row["step"]] = self.answers(row["step"])
            self.write()
        self.began = time.perf_counter()

    def write(self):
        """Writes what there is so far."""
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.found["peak_memory_mb"] = kilobytes / 1024
        self.out.write_text(json.dumps(self.found), "utf-8")


def trainer(asked, out):
    """TRL's trainer, and what watches it."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.utils import get_reward

    transformers.set_seed(asked.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.reward_model, padding_side="left")
    pad_id = tokenizer.pad_token_id
    policy = transformers.AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    policy.generation_config.pad_token_id = pad_id  # TRL counts the EOS of answers
    reward_model = scorer(asked.reward_model, pad_id)
    reward_model.requires_grad_(False)
    prompts = Dataset.from_dict({"input_ids": prompt_ids(tokenizer, asked.prompts)})
    held_out = prompt_ids(tokenizer, asked.held_out)
    args = PPOConfig(
        output_dir=str(out.with_suffix(".trl")),
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        num_sample_generations=0,
        seed=asked.seed,
        total_episodes=asked.iterations * asked.batch,
        per_device_train_batch_size=asked.batch // asked.microbatches,
        gradient_accumulation_steps=asked.microbatches,
        local_rollout_forward_batch_size=asked.batch,
        num_mini_batches=asked.minibatches,
        num_ppo_epochs=asked.passes,
        response_length=asked.new_tokens,
        stop_token="eos",
        missing_eos_penalty=asked.missing_eos_penalty,
        temperature=1.0,
        learning_rate=asked.learning_rate,
        lr_scheduler_type=asked.schedule,
        kl_coef=asked.kl_coef,
        cliprange=asked.clip,
        cliprange_value=asked.value_clip,
        vf_coef=asked.value_coef,
        gamma=asked.gamma,
        lam=asked.lam,
        whiten_rewards=asked.whiten_rewards,
    )
    found = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=critic(asked, pad_id),
        train_dataset=prompts,
        eval_dataset=prompts.select([0]),  # not used
        peft_config=adapters(asked, "CAUSAL_LM") if asked.rank else None,
    )
    found.remove_callback(transformers.PrinterCallback)

    def answers(step):
        """One sampled to each held-out prompt, by numbers that the training does not use."""
        texts, ended, scores = [], [], []
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1_000_003 * (asked.seed + 1) + step)
            for start in range(0, len(held_out), AT_ONCE):
                part = tokenizer.pad(
                    {"input_ids": held_out[start : start + AT_ONCE]}, return_tensors="pt"
                )
                width = part["input_ids"].shape[1]
                whole = found.model.policy.generate(
                    **part, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=asked.new_tokens
                )
                answer = whole[:, width:]
                texts += tokenizer.batch_decode(answer, skip_special_tokens=True)
                ended += (answer == tokenizer.eos_token_id).any(1).tolist()
                scores += get_reward(reward_model, whole, pad_id, width)[1].tolist()
        gc.collect()
        return {"texts": texts, "ended": ended, "scores": scores}

    watch = Watch(asked, out.with_name(out.name + ".part"), answers)
    modules = (trl, torch, transformers, peft)
    watch.found["versions"] = {module.__name__: module.__version__ for module in modules}
    found.add_callback(watch)
    return found, watch


def main():
    """Trains, and writes."""
    settings, out = map(Path, sys.argv[1:])
    asked = SimpleNamespace(**json.loads(settings.read_text("utf-8")))
    train, watch = trainer(asked, out)
    train.train()
    watch.write()
    watch.out.replace(out)


if __name__ == "__main__":
    main()
