"""The work of ``bench.py`` in PyTorch, one process that takes its turns over standard input.

Two kinds of model: ``hand`` is a GPT-2 or Llama written out with fused attention and a KV cache, as
a good PyTorch programmer would write this job; ``transformers`` is the library's own model with its
``generate``. Weights and tokens come from ``shared.npz``, which the command writes, so that both
sides can be compared before they are timed. Without weights in it the model draws its own.

In bfloat16 training keeps float32 weights under autocast, and sampling has bfloat16 weights. A
check is computed in float32. Nothing is compiled by torch.compile.

For each line ``check`` or ``step`` on standard input one line of JSON goes to standard output.
"""

import argparse
import contextlib
import json
import resource
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
INITIAL = 0.02  # standard deviation of weights that are drawn


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


class Decoder(torch.nn.Module):
    """No padding: every row of the benchmark is full. A network says ``hidden`` and ``kv_heads``,
    and has ``wte``, ``h`` and maybe ``lm_head``.
    """

    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        self.config = config
        self.wte = torch.nn.Embedding(config["vocab_size"], width)
        self.value = torch.nn.Linear(width, 1)
        self.score = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.value.weight), torch.nn.init.zeros_(self.value.bias)

    def logits(self, hidden):
        return F.linear(hidden, getattr(self, "lm_head", self.wte).weight)

    @torch.no_grad()
    def generate(self, prompt, new, greedy):
        config = self.config
        batch, length = prompt.shape
        head_size = config["hidden_size"] // config["num_heads"]
        shape = (batch, self.kv_heads, length + new, head_size)
        device = prompt.device.type
        dtype = self.wte.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        cache = [[torch.empty(shape, dtype=dtype) for _ in range(2)] for _ in self.h]
        tokens = torch.empty((batch, length + new), dtype=prompt.dtype)
        tokens[:, :length] = prompt
        start = 0
        for end in range(length, length + new):
            hidden = self.hidden(tokens[:, start:end], cache, start)
            logits = self.logits(hidden[:, -1]).float()
            if not greedy:
                # Gumbel noise: the logarithm of an exponential, without softmax and multinomial.
                logits -= torch.empty_like(logits).exponential_().log_()
            tokens[:, end] = logits.argmax(-1)
            start = end
        return tokens


class GPT2(Decoder):
    """Radford et al. 2019."""

    def __init__(self, config):
        super().__init__(config)
        width = config["hidden_size"]
        self.kv_heads = config["num_heads"]
        self.wpe = torch.nn.Embedding(config["max_length"], width)
        self.h = torch.nn.ModuleList(
            Block(width, config["num_heads"]) for _ in range(config["num_layers"])
        )
        self.ln_f = torch.nn.LayerNorm(width)

    def hidden(self, tokens, cache=None, index=0):
        places = torch.arange(index, index + tokens.shape[1])
        x = self.wte(tokens) + self.wpe(places)
        for layer, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[layer], index)
        return self.ln_f(x)


class Attention(torch.nn.Module):
    """Grouped queries with rotary positions."""

    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        self.heads = config["num_heads"]
        self.kv_heads = config["num_kv_heads"] or self.heads
        of_kv = width // self.heads * self.kv_heads
        bias = config["family"] == "Qwen2Config"
        self.q_proj = torch.nn.Linear(width, width, bias=bias)
        self.k_proj = torch.nn.Linear(width, of_kv, bias=bias)
        self.v_proj = torch.nn.Linear(width, of_kv, bias=bias)
        self.o_proj = torch.nn.Linear(width, width, bias=False)

    def forward(self, x, turn, cache, index):
        batch, length, width = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        q = turned(q, *turn)
        k = turned(k, *turn)
        if cache is not None:
            cache[0][:, :, index : index + length] = k
            cache[1][:, :, index : index + length] = v
            k = cache[0][:, :, : index + length]
            v = cache[1][:, :, : index + length]
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=length > 1, enable_gqa=self.heads != self.kv_heads
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))


def turned(x, cos, sin):
    """Columns turned by their positions: the first half of a head with the second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Gated(torch.nn.Module):
    """Shazeer 2020, with SiLU."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = torch.nn.Linear(width, inner, bias=False)
        self.up_proj = torch.nn.Linear(width, inner, bias=False)
        self.down_proj = torch.nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(torch.nn.Module):
    """A block of Llama."""

    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        self.ln_1 = torch.nn.RMSNorm(width, config["rms_norm_epsilon"])
        self.ln_2 = torch.nn.RMSNorm(width, config["rms_norm_epsilon"])
        self.attn = Attention(config)
        self.mlp = Gated(width, config["intermediate_size"])

    def forward(self, x, turn, cache, index):
        x = x + self.attn(self.ln_1(x), turn, cache, index)
        return x + self.mlp(self.ln_2(x))


class Llama(Decoder):
    """Touvron et al. 2023; with biases on queries, keys and values also Qwen2."""

    def __init__(self, config):
        super().__init__(config)
        width = config["hidden_size"]
        self.kv_heads = config["num_kv_heads"] or config["num_heads"]
        self.h = torch.nn.ModuleList(Layer(config) for _ in range(config["num_layers"]))
        self.ln_f = torch.nn.RMSNorm(width, config["rms_norm_epsilon"])
        if not config["tie_embeddings"]:
            self.lm_head = torch.nn.Linear(width, config["vocab_size"], bias=False)
        head_size = width // config["num_heads"]
        steps = torch.arange(0, head_size, 2) / head_size
        angles = torch.outer(torch.arange(config["max_length"]), config["rope_theta"] ** -steps)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden(self, tokens, cache=None, index=0):
        places = slice(index, index + tokens.shape[1])
        x = self.wte(tokens)
        turn = (self.cos[places].to(x.dtype), self.sin[places].to(x.dtype))
        for layer, block in enumerate(self.h):
            x = block(x, turn, None if cache is None else cache[layer], index)
        return self.ln_f(x)


def of_library(config):
    """transformers' own model."""
    import transformers

    special = {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa"}
    if config["family"] == "GPT2Config":
        settings = transformers.GPT2Config(
            vocab_size=config["vocab_size"],
            n_positions=config["max_length"],
            n_embd=config["hidden_size"],
            n_layer=config["num_layers"],
            n_head=config["num_heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        )
        return transformers.GPT2LMHeadModel(settings)
    name = config["family"].removesuffix("Config")
    settings = getattr(transformers, f"{name}Config")(
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_length"],
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"],
        num_key_value_heads=config["num_kv_heads"],
        intermediate_size=config["intermediate_size"],
        rms_norm_eps=config["rms_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=config["tie_embeddings"],
        **special,
    )
    return getattr(transformers, f"{name}ForCausalLM")(settings)


class Library(torch.nn.Module):
    """transformers' model with the same three methods."""

    def __init__(self, config):
        super().__init__()
        self.lm = of_library(config)
        self.value = torch.nn.Linear(config["hidden_size"], 1)
        self.score = torch.nn.Linear(config["hidden_size"], 1)
        torch.nn.init.zeros_(self.value.weight), torch.nn.init.zeros_(self.value.bias)

    def hidden(self, tokens):
        return self.lm.base_model(tokens, use_cache=False).last_hidden_state

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
    """A model with the shared weights, or without any with its own; kernels of rlhf_jax are [in,
    out].
    """
    written = {"GPT2Config": GPT2}.get(config["family"], Llama)
    model = (written if kind == "hand" else Library)(config)
    if not arrays:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=INITIAL)
        return model
    is_gpt2 = config["family"] == "GPT2Config"
    state = {}
    for path, array in arrays.items():
        tensor = torch.from_numpy(
            array.reshape(*array.shape[:-2], -1) if "c_attn" in path else array
        )
        where, _, leaf = path.rpartition("/")
        # transformers' GPT-2 alone keeps kernels as [in, out].
        is_turned = kind == "hand" or not is_gpt2
        if leaf == "kernel" and is_turned and tensor.ndim == 2:
            tensor = tensor.T
        leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
        if where == "score":
            state[f"score.{leaf}"] = (
                tensor.reshape(1, -1) if leaf == "weight" else tensor.reshape(1)
            )
        else:
            state[f"{place(kind, is_gpt2, where)}.{leaf}"] = tensor
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing
    return model


BY_HAND = {
    "attn/c_attn": "c_attn",
    "attn/c_proj": "attn_proj",
    "mlp/c_fc": "c_fc",
    "mlp/c_proj": "c_proj",
}
OF_LLAMA = {
    "wte": "lm.model.embed_tokens",
    "ln_f": "lm.model.norm",
    "lm_head": "lm.lm_head",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
}


def place(kind, is_gpt2, where):
    """The name that a layer of rlhf_jax has in a model."""
    layer, _, rest = where.partition("/")
    number = layer[2:] if layer.startswith("h_") else None
    if kind == "hand" and is_gpt2:
        rest = BY_HAND.get(rest, rest)
    rest = rest.replace("/", ".")
    if kind == "hand":
        return where if number is None else f"h.{number}.{rest}"
    if is_gpt2:
        return "lm.transformer." + (where if number is None else f"h.{number}.{rest}")
    if number is None:
        return OF_LLAMA[where]
    return f"lm.model.layers.{number}." + OF_LLAMA.get(rest, rest.replace("attn", "self_attn"))


def log_probs(model, hidden, tokens, start):
    """Of the columns from ``start`` on, [B, T - start]."""
    logits = model.logits(hidden[:, start - 1 : -1]).float()
    return logits.gather(-1, tokens[:, start:, None])[..., 0] - logits.logsumexp(-1)


class Work:
    """One kind of work: ``step()`` returns (loss, gradient norm), or tokens for a rollout."""

    def __init__(self, bench, model, other, critic, tokens, prompt, config):
        self.bench = bench
        self.config = config
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
        if bench == "rollout" and config["compute_dtype"] == "bfloat16":
            model.to(torch.bfloat16)
        self.collected = self.collect(tokens) if bench in ("grpo", "vpg") else None

    def descend(self, loss):
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return self.move(loss)

    def descend_in_parts(self, loss_of, *arrays):
        """On the mean of the losses of equal parts, whose activations are there one after the
        other.
        """
        number = self.config["microbatches"]
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in zip(*(array.chunk(number) for array in arrays), strict=True):
            loss = loss_of(*part) / number
            loss.backward()
            total = total + loss.detach()
        return self.move(total)

    def move(self, loss):
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
        device = self.tokens.device.type
        is_short = self.config["compute_dtype"] == "bfloat16" and self.bench != "rollout"
        if device == "cuda":
            # Of float32: a check is exact, a step is as fast as JAX's.
            torch.set_float32_matmul_precision("highest" if greedy else "high")
        how = torch.autocast(device, torch.bfloat16) if is_short else contextlib.nullcontext()
        with how:
            return getattr(self, self.bench)(greedy)

    def rollout(self, greedy):
        new = self.tokens.shape[1] - self.prompt
        return (
            self.model.generate(self.tokens[:, : self.prompt], new, greedy).tolist()
            if greedy
            else (self.model.generate(self.tokens[:, : self.prompt], new, False).sum().item())
        )

    def sft(self, greedy):
        def loss_of(tokens):
            chosen = log_probs(self.model, self.model.hidden(tokens), tokens, 1)
            return -chosen[:, self.prompt - 1 :].mean()

        return self.descend_in_parts(loss_of, self.tokens)

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

        def loss_of(tokens, old, reference, advantage):
            chosen = log_probs(self.model, self.model.hidden(tokens), tokens, self.prompt)
            ratio = (chosen - old).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            surrogate = torch.minimum(ratio * advantage, clipped * advantage)
            gap = reference - chosen
            return (KL * (gap.exp() - 1 - gap) - surrogate).mean()

        return self.descend_in_parts(loss_of, tokens, old, reference, advantage)

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


def most_memory(device):
    """MiB that the process held at most, on its device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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
    torch.set_default_device(config["device"])
    tokens = torch.from_numpy(shared.pop("tokens")).long().to(config["device"])
    torch.manual_seed(0)
    # The one that learns, the frozen one, and a value model: those that the work has.
    needs = (True, args.bench not in ("rollout", "sft", "reward"), args.value == "separate")
    models = [load(args.kind, config, shared) if needed else None for needed in needs]
    work = Work(args.bench, *models, tokens, prompt, config)
    for line in sys.stdin:
        started = time.perf_counter()
        cpu = time.process_time()
        result = work.step(greedy=line.strip() == "check")
        seconds = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "memory_mb": most_memory(config["device"]),
        }
        print(json.dumps({"result": result} | seconds), flush=True)


if __name__ == "__main__":
    main()
