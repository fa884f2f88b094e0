"""A server of models in a thread, for tests."""

import contextlib
import threading
import time

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
