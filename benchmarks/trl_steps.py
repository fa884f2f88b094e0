"""The work of ``bench.py`` by TRL's trainers, one process that takes its turns over standard
input.

TRL 1.12.0, the last one with PPO: ``trl.experimental.ppo``, which knows a value model of its own
alone. Each trainer runs its own ``train()`` on the rows of ``shared.npz``, tokenized beforehand. A
callback makes a step wait for a line of standard input and answers when TRL logs it, so a step is
all that a user waits for: fetching the batch, the update, the numbers of the log. Gradient
checkpointing, saving and reports are off.

GRPO takes steps on one rollout, which the first step makes from the given tokens
(``rollout_func``).
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch_steps import CLIP, EPOCHS, GAE_LAMBDA, GROUP, KL, LEARNING_RATE, load

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
warnings.simplefilter("ignore")
MANY = 200  # steps that the data last for
SPECIAL = ("<pad>", "<end>")  # beyond the model's vocabulary, as no row is padded or ends early


class Turns(transformers.TrainerCallback):
    """Answers each line of standard input with the loss, the gradient norm and the seconds of a
    step.
    """

    def __init__(self, loss):
        self.loss = loss

    def wait(self):
        if not (line := sys.stdin.readline()):
            sys.exit()
        self.greedy = line.strip() == "check"
        self.started = time.perf_counter()

    def on_train_begin(self, args, state, control, **more):
        self.wait()

    def on_log(self, args, state, control, logs=None, **more):
        if (loss := self.loss(logs)) is None:
            return
        seconds = time.perf_counter() - self.started
        print(json.dumps({"result": [loss, logs.get("grad_norm")], "seconds": seconds}), flush=True)
        self.wait()


def tokenizer(size):
    """Of ``size`` words, and SPECIAL."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(size)} | {word: size + i for i, word in enumerate(SPECIAL)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[1]
    )


def classifier(lm, score):
    """A sequence classifier on the body of ``lm``, with this [1, D] head."""
    settings = transformers.GPT2Config(**lm.config.to_dict() | {"num_labels": 1})
    model = transformers.GPT2ForSequenceClassification(settings)
    model.transformer.load_state_dict(lm.transformer.state_dict())
    model.score.weight.data.copy_(score)
    return model


def settings(rows, folder):
    """What all trainers are told."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 1e-4,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1e9,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": rows,
        "seed": 0,
    }


def supervised(name, trl, lm, reference, score, rows, prompt, common):
    """A trainer of SFT, reward model or DPO; each batch holds the same rows."""
    common |= {"max_steps": MANY, "max_length": None}
    options = {"processing_class": tokenizer(lm.config.vocab_size)}
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    if name == "sft":
        labels = [[-100] * prompt + row[prompt:] for row in rows]
        data = {"input_ids": rows, "labels": labels}
        trainer = trl.SFTTrainer(lm, trl.SFTConfig(**common), train_dataset=many(data), **options)
    elif name == "reward":
        data = {"chosen_ids": [a for a, _ in pairs], "rejected_ids": [b for _, b in pairs]}
        common["per_device_train_batch_size"] //= 2
        model = classifier(lm, score)
        trainer = trl.RewardTrainer(
            model, trl.RewardConfig(**common), train_dataset=many(data), **options
        )
    else:
        data = {
            "prompt_ids": [a[:prompt] for a, _ in pairs],
            "chosen_ids": [a[prompt:] for a, _ in pairs],
        }
        data["rejected_ids"] = [b[prompt:] for _, b in pairs]
        common["per_device_train_batch_size"] //= 2
        given = type(
            "Given", (trl.DPOTrainer,), {"_prepare_dataset": lambda self, rows, *more: rows}
        )  # tokens already
        trainer = given(
            lm,
            reference,
            args=trl.DPOConfig(beta=0.1, **common),
            train_dataset=many(data),
            **options,
        )
        # The two rows of a pair have prompts of their own here, for which TRL's rows have no place.
        collate = trainer.data_collator
        tokens = torch.tensor([a for a, _ in pairs] + [b for _, b in pairs])
        trainer.data_collator = lambda examples: collate(examples) | {"input_ids": tokens}
    trainer._get_train_sampler = lambda *arguments: torch.utils.data.SequentialSampler(
        trainer.train_dataset
    )
    return trainer, lambda logs: logs.get("loss")


def many(columns):
    return Dataset.from_dict({name: column * MANY for name, column in columns.items()})


def grpo(trl, lm, rows, prompt, common, folder):
    """A GRPOTrainer that goes on learning from one rollout, the given rows."""
    lm.save_pretrained(folder)  # TRL reads the reference from the model's path
    lm = transformers.GPT2LMHeadModel.from_pretrained(folder)
    common |= {
        "max_steps": MANY,
        "beta": KL,
        "epsilon": CLIP,
        "loss_type": "grpo",
        "num_generations": GROUP,
    }
    common |= {
        "num_iterations": MANY,
        "steps_per_generation": 1,
        "max_completion_length": len(rows[0]) - prompt,
    }
    rollout = {
        "prompt_ids": [row[:prompt] for row in rows],
        "completion_ids": [row[prompt:] for row in rows],
    }
    rollout["logprobs"] = [[0.0] * (len(row) - prompt) for row in rows]
    trainer = trl.GRPOTrainer(
        lm,
        reward_funcs=lambda completions, **more: torch.linspace(-1, 1, len(rows)).tolist(),
        args=trl.GRPOConfig(shuffle_dataset=False, **common),
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * (len(rows) // GROUP)}),
        processing_class=tokenizer(lm.config.vocab_size),
        rollout_func=lambda prompts, trainer: dict(rollout),
    )
    return trainer, lambda logs: logs.get("loss")


def ppo(lm, reference, score, rows, prompt, common, turns):
    """A PPOTrainer; the first iteration samples greedily, so that it can be compared."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    generation = ppo_trainer.batch_generation

    def sample(model, queries, size, pad, how):
        how.do_sample = not turns().greedy
        return generation(model, queries, size, pad, how)

    ppo_trainer.batch_generation = sample
    new = len(rows[0]) - prompt
    common |= {
        "response_length": new,
        "temperature": 1.0,
        "num_ppo_epochs": EPOCHS,
        "num_mini_batches": 1,
    }
    common |= {
        "kl_coef": KL,
        "cliprange": CLIP,
        "cliprange_value": CLIP,
        "vf_coef": 0.1,
        "lam": GAE_LAMBDA,
    }
    common |= {
        "gamma": 1.0,
        "total_episodes": MANY * len(rows),
        "local_rollout_forward_batch_size": len(rows),
    }
    common |= {"num_sample_generations": 0, "stop_token_id": None, "missing_eos_penalty": None}
    trainer = PPOTrainer(
        args=PPOConfig(**common),
        processing_class=tokenizer(lm.config.vocab_size),
        model=lm,
        ref_model=reference,
        reward_model=classifier(reference, score),
        value_model=classifier(lm, torch.zeros_like(score)),
        train_dataset=Dataset.from_dict({"input_ids": [row[:prompt] for row in rows]}),
        eval_dataset=Dataset.from_dict({"input_ids": [rows[0][:prompt]]}),
    )
    return trainer, lambda logs: logs["loss/policy_avg"] + 0.1 * logs["loss/value_avg"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", help="shared.npz: weights, tokens, config")
    parser.add_argument("--bench", required=True)
    parser.add_argument("--kind", choices=("trl",), default="trl")
    parser.add_argument("--value", choices=("shared", "separate"), default="shared")
    args = parser.parse_args()
    if args.bench in ("rollout", "vpg") or (args.bench == "iteration" and args.value == "shared"):
        sys.exit(
            "TRL has no such work: it samples by transformers, PPO has a separate value model, VPG "
            "is not there"
        )
    shared = dict(np.load(args.shared, allow_pickle=False))
    config = json.loads(str(shared.pop("config")))
    prompt = int(shared.pop("prompt"))
    rows = shared.pop("tokens").tolist()
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    import trl

    model, other = (load("transformers", config, dict(shared)) for _ in range(2))
    score = model.score.weight.detach()
    turns = None
    with tempfile.TemporaryDirectory() as folder:
        common = settings(len(rows), folder)
        if args.bench == "iteration":
            trainer, loss = ppo(model.lm, other.lm, score, rows, prompt, common, lambda: turns)
        elif args.bench == "grpo":
            trainer, loss = grpo(trl, model.lm, rows, prompt, common, folder)
        else:
            trainer, loss = supervised(
                args.bench, trl, model.lm, other.lm, score, rows, prompt, common
            )
        trainer.remove_callback(transformers.PrinterCallback)
        turns = Turns(loss)
        trainer.add_callback(turns)
        trainer.train()


if __name__ == "__main__":
    main()
