"""Local servers for tests of what asks one: of any protocol, and of vLLM's."""

import functools
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file
from scipy.special import log_softmax

from rlhf_jax import models, sampling
from rlhf_jax.generation.generator import LanguageModel


class Server:
    """A local server: ``answer(number of the request, body) -> reply``, a JSON value, bytes, or a
    pair (status, bytes). It records what it was asked.
    """

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self.keys = []
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body):
                with server._lock:
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                    number = len(server.asked)
                    server.asked.append(body)
                    server.keys.append(self.headers["Authorization"])
                reply = server.reply(self.path, number, body)
                status, content = reply if isinstance(reply, tuple) else (200, reply)
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                with server._lock:
                    server.at_once -= 1
                self.send_response(status)
                length = len(content) + (100 if content.endswith(b"CUT") else 0)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        serve = functools.partial(self.http.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()

    def reply(self, path, number, body):
        """The reply to a POST of a body, or to a GET (None)."""
        return self.answer(number, body)

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


SLOTS = 8  # tokens that the server below samples, whatever is asked for: one program
WIDTH = 24  # of its prompts
LONGEST = 64  # tokens of a text that it scores


@functools.cache
def programs(network, config):
    """The logits of a network and its samples, compiled once for all servers."""
    model = models.build(network)

    def sampled(params, tokens, mask, key):
        return sampling.generate(model, params, tokens, mask, key, config=config)

    return jax.jit(model.apply), jax.jit(sampled)


class VLLM(Server):
    """The part of vLLM's protocol that a run uses, with weights that are really loaded.

    ``spoil(path, body, reply) -> reply`` may change each reply, also before there is one (None).
    """

    def __init__(self, folder):
        super().__init__(None)
        self.url = self.url.removesuffix("/v1")
        self.name = str(folder)
        self.policy = LanguageModel.load(folder)
        self.version = "default"
        self.adapters = {}
        self.commands = []
        self.has_masks = False  # vllm serve --return-sampling-mask
        self.spoil = lambda path, body, reply: reply
        tokenizer = self.policy.tokenizer
        how = {"eos_id": tokenizer.eos_ids, "pad_id": tokenizer.pad_id}
        self._config = sampling.SamplingConfig(SLOTS, **how)
        self._logits, _ = programs(self.policy.model.config, self._config)

    def reply(self, path, number, body):
        made = self.spoil(path, body, None)
        if made is None:
            made = self.spoil(path, body, getattr(self, path.strip("/").replace("/", "_"))(body))
        return made

    def v1_models(self, body):
        return {"data": [{"id": name} for name in (self.name, *self.adapters)]}

    def v1_load_lora_adapter(self, body):
        self.commands.append(("load", body["lora_name"]))
        self.adapters[body["lora_name"]] = models.lora.load(body["lora_path"], self.policy.params)
        return b"Success: LoRA adapter added successfully."

    def v1_unload_lora_adapter(self, body):
        self.commands.append(("unload", body["lora_name"]))
        del self.adapters[body["lora_name"]]
        return b"Success: LoRA adapter removed successfully."

    def collective_rpc(self, body):
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        _, params = models.load(folder)
        # On a CPU, vLLM keeps its packed copy of a tied output table unless it reads one. Here all
        # weights stay old then.
        if "lm_head.weight" in load_file(folder / "model.safetensors"):
            self.policy = self.policy._replace(params=params)
        self.commands.append(("reload", body["kwargs"]["weights_path"]))
        return {"results": [None]}

    def reset_prefix_cache(self, body):
        self.commands.append(("reset", ""))
        return b""

    def update_weight_version(self, body):
        self.version = body["new_version"]
        return {"success": True}

    def v1_completions(self, body):
        if body.get("echo"):
            return {"model": body["model"], "choices": [self.scored(body["prompt"])]}
        params = self.policy.params
        if body["model"] != self.name:
            params = models.lora.merge(params, self.adapters[body["model"]])
        choices = [
            {
                "index": i,
                "token_ids": ids,
                "prompt_token_ids": body["prompt"],
                "finish_reason": reason,
                "logprobs": {"token_logprobs": log_probs, "tokens": [f"token_id:{x}" for x in ids]},
            }
            for i, (ids, log_probs, reason, _) in enumerate(
                self.sampled(params, body["prompt"], body)
            )
        ]
        return {"model": body["model"], "choices": choices}

    def scored(self, prompt):
        """A prompt with its log-probabilities, and one more token."""
        tokens = np.zeros((1, LONGEST), np.int32)
        tokens[0, : len(prompt)] = prompt
        logits = np.asarray(self._logits(self.policy.params, tokens, tokens >= 0))[0]
        log_probs = [None]
        for i in range(1, len(prompt)):
            log_probs.append(float(log_softmax(logits[i - 1])[prompt[i]]))
        texts = [self.policy.tokenizer.backend.decode([x], False) for x in prompt]
        told = {"tokens": [*texts, "!"], "token_logprobs": [*log_probs, -1.0]}
        return {"index": 0, "text": "", "logprobs": told, "finish_reason": "length"}

    def inference_v1_generate(self, body):
        choices = []
        settings = body["sampling_params"]
        drawn = self.sampled(self.policy.params, body["token_ids"], settings)
        for i, (ids, log_probs, reason, support) in enumerate(drawn):
            content = [{"token_id": x, "logprob": y} for x, y in zip(ids, log_probs, strict=True)]
            choices.append(
                {
                    "index": i,
                    "token_ids": ids,
                    "finish_reason": reason,
                    "logprobs": {"content": content},
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
                    "sampling_mask": support if self.has_masks else None,
                }
            )
        return {"choices": choices}

    def sampled(self, params, prompt, settings):
        """Token ids, log-probs, the reason of the end and the sampling masks of each response."""
        config = self._config
        if settings["top_k"] > 0:
            names = "top_k", "top_p", "min_p"
            config = replace(config, **{x: settings[x] for x in names}, record_support=True)
        number = settings["n"]
        tokens = np.zeros((number, WIDTH), np.int32)
        mask = np.zeros((number, WIDTH), np.int32)
        tokens[:, WIDTH - len(prompt) :] = prompt
        mask[:, WIDTH - len(prompt) :] = 1
        program = programs(self.policy.model.config, config)[1]
        made = program(params, tokens, mask, jax.random.key(settings["seed"]))
        rows = []
        for i in range(number):
            said = np.flatnonzero(made.response_mask[i])[: settings["max_tokens"]]
            ids = np.asarray(made.tokens)[i, said].tolist()
            ended = ids[-1] in settings["stop_token_ids"]
            log_probs = np.asarray(made.log_probs)[i, said].tolist()
            masks = None
            if made.support is not None:  # in vLLM's order
                masks = [sorted(x[x >= 0].tolist()) for x in np.asarray(made.support)[i, said]]
            rows.append((ids, log_probs, "stop" if ended else "length", masks))
        return rows
