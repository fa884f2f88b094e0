"""The loss that balances experts, against transformers'."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from torch_models import left_padded, torch_model

from rlhf_jax import models
from rlhf_jax.parallel import auxiliary

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", ["Qwen3Moe dense between", "Mixtral windows", "GptOss yarn"])
def test_the_balance_is_transformers_aux_loss(name, tmp_path):
    import torch

    reference = torch_model(name)
    reference.save_pretrained(tmp_path)
    tokens, mask = left_padded()
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    given = {key: torch.tensor(array) for key, array in inputs.items()}
    with torch.no_grad():
        expected = reference(**given, output_router_logits=True).aux_loss
    model, params = models.load(tmp_path)

    @jax.jit
    def balance(params):
        with auxiliary.collected() as terms:
            model.hidden(params, tokens, mask)
        return terms[auxiliary.LOSS].value

    assert_allclose(balance(params), expected.numpy(), rtol=1e-5)
