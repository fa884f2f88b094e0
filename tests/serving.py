"""A server of models in a thread, for tests."""

import contextlib
import threading
import time

import chat_templates
from builders import initial_params

from rlhf_jax import models
from rlhf_jax.data import tokenizers
from rlhf_jax.inference import web
from rlhf_jax.inference.serving import serve


@contextlib.contextmanager
def running(*folders, **settings):
    """The address of a server of these folders, and what it serves."""
    config = serve.Config(port=0, **settings)
    with serve.opened([str(folder) for folder in folders], config) as served:
        server, listening, address = web.listen(serve.application(served), config.host, 0)
        thread = threading.Thread(target=web.run, args=(server, listening))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield address, served
        finally:
            server.should_exit = True
            thread.join()


def chat_model(folder, max_length=512, template="qwen2.5"):
    """A chat model with random weights and Qwen's template, which knows tools."""
    chat_templates.write(folder, template)
    tokenizer = tokenizers.load_tokenizer(folder)
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    sizes = models.GPT2Config(
        tokenizer.vocab_size, max_length, 16, 1, 2, initializer_range=0.5, **ids
    )
    model = models.build(sizes)
    models.save(folder, model, initial_params(model))
    return folder
