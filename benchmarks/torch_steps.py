"""The work of ``rlhf-jax bench`` in PyTorch, one process that takes its turns over standard input.

Two kinds of model: ``hand`` is a GPT-2 written out with fused attention and a KV cache, as a good
PyTorch programmer would write this job; ``transformers`` is the library's own GPT-2 with its
``generate``. Weights and tokens come from ``shared.npz``, which the command writes, so that both
sides can be compared before they are timed.

For each line ``check`` or ``step`` on standard input one line of JSON goes to standard output.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F

LEARNING_RATE = 1e-5
GROUP = 4
KL = 0.05
GAE_LAMBDA = 0.95
CLIP = 0.2
EPOCHS = 4
BASELINE_STEP = 0.1


class Block(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1 = torch.nn.LayerNorm(width)
        self.ln_2 = torch.nn.LayerNorm(width)
        self.c_attn = torch.nn.Linear(width, 3 * width)
        self.attn_proj = torch.nn.Linear(width, width)
        self.c_fc = torch.nn.Linear(width, 4 * width)
        self.c_proj = torch.nn.Linear(4 * width, width)

    def forward(self, x, cache=None, index=0):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(width, dim=2)
        )
        if cache is not None:
            cache[0][:, :, index : index + length] = k
            cache[1][:, :, index : index + length] = v
            k = cache[0][:, :, : index + length]
            v = cache[1][:, :, : index + length]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.attn_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(torch.nn.Module):
    """No padding: every row of the benchmark is full."""

    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        self.config = config
        self.wte = torch.nn.Embedding(config["vocab_size"], width)
        self.wpe = torch.nn.Embedding(config["max_length"], width)
        self.h = torch.nn.ModuleList(
            Block(width, config["num_heads"]) for _ in range(config["num_layers"])
        )
        self.ln_f = torch.nn.LayerNorm(width)
        self.value = torch.nn.Linear(width, 1)
        self.score = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.value.weight), torch.nn.init.zeros_(self.value.bias)

    def hidden(self, tokens, cache=None, index=0):
        places = torch.arange(index, index + tokens.shape[1])
        x = self.wte(tokens) + self.wpe(places)
        for layer, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[layer], index)
        return self.ln_f(x)

    def logits(self, hidden):
        return hidden @ self.wte.weight.T

    @torch.no_grad()
    def generate(self, prompt, new, greedy):
        config = self.config
        batch, length = prompt.shape
        shape = (
            batch,
            config["num_heads"],
            length + new,
            config["hidden_size"] // config["num_heads"],
        )
        cache = [(torch.empty(shape), torch.empty(shape)) for _ in self.h]
        tokens = torch.empty((batch, length + new), dtype=prompt.dtype)
        tokens[:, :length] = prompt
        start = 0
        for end in range(length, length + new):
            hidden = self.hidden(tokens[:, start:end], cache, start)
            logits = self.logits(hidden[:, -1])
            if not greedy:
                # Gumbel noise: the logarithm of an exponential, without softmax and multinomial.
                logits -= torch.empty_like(logits).exponential_().log_()
            tokens[:, end] = logits.argmax(-1)
            start = end
        return tokens


class Library(torch.nn.Module):
    """transformers' GPT-2 with the same three methods."""

    def __init__(self, config):
        super().__init__()
        import transformers

        settings = transformers.GPT2Config(
            vocab_size=config["vocab_size"],
            n_positions=config["max_length"],
            n_embd=config["hidden_size"],
            n_layer=config["num_layers"],
            n_head=config["num_heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.lm = transformers.GPT2LMHeadModel(settings)
        self.value = torch.nn.Linear(config["hidden_size"], 1)
        self.score = torch.nn.Linear(config["hidden_size"], 1)
        torch.nn.init.zeros_(self.value.weight), torch.nn.init.zeros_(self.value.bias)

    def hidden(self, tokens):
        return self.lm.transformer(tokens, use_cache=False).last_hidden_state

    def logits(self, hidden):
        return self.lm.lm_head(hidden)

    @torch.no_grad()
    def generate(self, prompt, new, greedy):
        mask = torch.ones_like(prompt)
        options = {
            "max_new_tokens": new,
            "min_new_tokens": new,
            "do_sample": not greedy,
            "pad_token_id": 0,
        }
        return self.lm.generate(prompt, attention_mask=mask, top_k=0, **options)


def load(kind, config, arrays):
    """A model with the shared weights; kernels of rlhf_jax are [in, out]."""
    model = (GPT2 if kind == "hand" else Library)(config)
    names = {
        "attn/c_attn": "c_attn",
        "attn/c_proj": "attn_proj",
        "mlp/c_fc": "c_fc",
        "mlp/c_proj": "c_proj",
    }
    state = {}
    for path, array in arrays.items():
        tensor = torch.from_numpy(
            array.reshape(*array.shape[:-2], -1) if "c_attn" in path else array
        )
        where, _, leaf = path.rpartition("/")
        if leaf == "kernel" and kind == "hand" and tensor.ndim == 2:
            tensor = tensor.T
        leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
        layer, _, rest = where.partition("/")
        if layer.startswith("h_"):
            rest = names.get(rest, rest) if kind == "hand" else rest.replace("/", ".")
            where = f"h.{layer[2:]}.{rest}"
        if where == "score":
            state[f"score.{leaf}"] = (
                tensor.reshape(1, -1) if leaf == "weight" else tensor.reshape(1)
            )
        else:
            state[("" if kind == "hand" else "lm.transformer.") + f"{where}.{leaf}"] = tensor
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing
    return model


def log_probs(model, hidden, tokens, start):
    """Of the columns from ``start`` on, [B, T - start]."""
    logits = model.logits(hidden[:, start - 1 : -1])
    return logits.gather(-1, tokens[:, start:, None])[..., 0] - logits.logsumexp(-1)


class Work:
    """One kind of work: ``step()`` returns (loss, gradient norm), or tokens for a rollout."""

    def __init__(self, bench, model, other, critic, tokens, prompt):
        self.bench = bench
        self.model = model
        self.other = other
        self.critic = critic
        self.tokens = tokens
        self.prompt = prompt
        parameters = list(model.parameters())
        if critic is not None:
            parameters += list(critic.parameters())
        self.optimizer = torch.optim.AdamW(
            parameters, lr=LEARNING_RATE, weight_decay=1e-4, fused=True
        )
        self.collected = self.collect(tokens) if bench in ("grpo", "vpg") else None

    def descend(self, loss):
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [
            p.grad
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.optimizer.step()
        return loss.item(), norm.item()

    def step(self, greedy=False):
        return getattr(self, self.bench)(greedy)

    def rollout(self, greedy):
        new = self.tokens.shape[1] - self.prompt
        return (
            self.model.generate(self.tokens[:, : self.prompt], new, greedy).tolist()
            if greedy
            else (self.model.generate(self.tokens[:, : self.prompt], new, False).sum().item())
        )

    def sft(self, greedy):
        chosen = log_probs(self.model, self.model.hidden(self.tokens), self.tokens, 1)
        return self.descend(-chosen[:, self.prompt - 1 :].mean())

    def reward(self, greedy):
        scores = self.model.score(self.model.hidden(self.tokens)[:, -1])[:, 0].view(-1, 2)
        return self.descend(-F.logsigmoid(scores[:, 0] - scores[:, 1]).mean())

    def dpo(self, greedy):
        with torch.no_grad():
            reference = log_probs(self.other, self.other.hidden(self.tokens), self.tokens, 1)
        chosen = log_probs(self.model, self.model.hidden(self.tokens), self.tokens, 1)
        margins = (chosen - reference)[:, self.prompt - 1 :].sum(1).view(-1, 2)
        return self.descend(-F.logsigmoid(0.1 * (margins[:, 0] - margins[:, 1])).mean())

    @torch.no_grad()
    def collect(self, tokens):
        hidden = self.model.hidden(tokens)
        old = log_probs(self.model, hidden, tokens, self.prompt)
        reference = log_probs(self.other, self.other.hidden(tokens), tokens, self.prompt)
        values = self.values(tokens, hidden)
        return tokens, old, reference, values

    def values(self, tokens, hidden):
        if self.critic is not None:
            return self.critic.value(self.critic.hidden(tokens)[:, self.prompt - 1 : -1])[..., 0]
        return self.model.value(hidden[:, self.prompt - 1 : -1])[..., 0]

    def grpo(self, greedy):
        tokens, old, reference, _ = self.collected
        scores = torch.linspace(-1, 1, len(tokens)).view(-1, GROUP)
        advantage = (
            (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
        ).view(-1, 1)
        chosen = log_probs(self.model, self.model.hidden(tokens), tokens, self.prompt)
        ratio = (chosen - old).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        gap = reference - chosen
        return self.descend((KL * (gap.exp() - 1 - gap) - surrogate).mean())

    def vpg(self, greedy):
        tokens, old, reference, _ = self.collected
        rewards = torch.linspace(-1, 1, len(tokens)) - KL * (old - reference).sum(1)
        advantage = rewards - BASELINE_STEP * rewards.mean()  # a running mean that starts at 0
        chosen = log_probs(self.model, self.model.hidden(tokens), tokens, self.prompt)
        return self.descend(-(advantage * chosen.sum(1)).mean())

    def iteration(self, greedy):
        new = self.tokens.shape[1] - self.prompt
        tokens = self.model.generate(self.tokens[:, : self.prompt], new, greedy)
        tokens, old, reference, values = self.collect(tokens)
        with torch.no_grad():
            rewards = -KL * (old - reference)
            rewards[:, -1] += self.other.score(self.other.hidden(tokens)[:, -1])[:, 0]
            advantages = torch.zeros_like(values)
            running = torch.zeros(len(tokens))
            for t in reversed(range(new)):
                following = values[:, t + 1] if t + 1 < new else torch.zeros(len(tokens))
                running = rewards[:, t] + following - values[:, t] + GAE_LAMBDA * running
                advantages[:, t] = running
            returns = advantages + values
            advantages = (advantages - advantages.mean()) * torch.rsqrt(
                advantages.var(correction=0) + 1e-8
            )
        results = []
        for _ in range(EPOCHS):
            hidden = self.model.hidden(tokens)
            chosen = log_probs(self.model, hidden, tokens, self.prompt)
            ratio = (chosen - old).exp()
            surrogate = torch.minimum(
                ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
            )
            now = self.values(tokens, hidden)
            clipped = values + (now - values).clamp(-CLIP, CLIP)
            value_loss = 0.5 * torch.maximum((now - returns) ** 2, (clipped - returns) ** 2).mean()
            results.append(self.descend(0.1 * value_loss - surrogate.mean()))
        return np.mean(results, axis=0).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", help="shared.npz: weights, tokens, config")
    parser.add_argument("--bench", required=True)
    parser.add_argument("--kind", choices=("hand", "transformers"), default="hand")
    parser.add_argument("--value", choices=("shared", "separate"), default="shared")
    args = parser.parse_args()
    shared = dict(np.load(args.shared, allow_pickle=False))
    config = json.loads(str(shared.pop("config")))
    prompt = int(shared.pop("prompt"))
    tokens = torch.from_numpy(shared.pop("tokens")).long()
    torch.manual_seed(0)
    model, other, critic = (load(args.kind, config, shared) for _ in range(3))
    work = Work(
        args.bench, model, other, critic if args.value == "separate" else None, tokens, prompt
    )
    for line in sys.stdin:
        started = time.perf_counter()
        cpu = time.process_time()
        result = work.step(greedy=line.strip() == "check")
        seconds = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
        }
        print(json.dumps({"result": result} | seconds), flush=True)


if __name__ == "__main__":
    main()
