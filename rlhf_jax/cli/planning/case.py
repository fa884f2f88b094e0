"""A stage that is planned: its settings, its mesh, and its models as shapes."""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax import models
from rlhf_jax.algorithms import distill, grpo, ppo, rloo, vpg
from rlhf_jax.cli.planning import targets
from rlhf_jax.config import RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models import hf
from rlhf_jax.parallel import sharding
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.layout import Layout, laid_out_shapes, mesh_of
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.rl.method import completed
from rlhf_jax.training.rl.sharing import Answers
from rlhf_jax.types import Params

RL = {"ppo": completed(ppo), "vpg": completed(vpg), "rloo": completed(rloo)}
RL |= {"grpo": completed(grpo), "distill": completed(distill)}
DTYPES = ("float32", "bfloat16", "float16", "float64")  # of files of weights
PAIRS = ("reward_model", "dpo")  # two answers in each row


class ShapesLayout(Layout):
    """A layout that makes shapes, with their shardings, in place of parameters. Its programs are
    not jitted, so that a plan can compile them for another machine.
    """

    def jit(self, program: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return program

    def jit_update(self, update: Callable[..., Any], num_blocks: int) -> Callable[..., Any]:
        # A function of its own, whose arguments are not mixed with those that ``update`` binds.
        return lambda *args, **options: update(*args, **options)

    def put(self, tree: Any) -> Any:
        return laid_out_shapes(self.mesh, tree)

    def copy(self, tree: Any) -> Any:
        return tree

    def make(self, make: Callable[..., Any], *trees: Any) -> Any:
        return self.put(jax.eval_shape(make, *trees))

    def create(self, create: Callable[..., Any], params: Params) -> Any:
        return self.make(create, params)


@dataclasses.dataclass(frozen=True)
class Case:
    """A stage that is planned, for a target or for this machine's CPU."""

    config: RunConfig
    name: str
    target: targets.Target | None

    @property
    def own(self) -> Any:
        """The section of the stage."""
        return getattr(self.config, self.name)

    @property
    def settings(self) -> Any:
        """The section with its data and its batch size."""
        return self.config.rl if self.name in RL else self.own

    @property
    def mesh(self) -> Mesh:
        """The mesh of the run, on the target's devices if there is one."""
        if self.target is None:
            return mesh_of(self.config.mesh)
        return sharding.make_mesh(**self.config.mesh.axes, devices=self.target.devices)

    @property
    def num_answers(self) -> int:
        """The answers of a comparison that compute their prompt once; 0: none do."""
        return 2 * (self.name in PAIRS and self.config.compute.share_prompts is True)

    @property
    def texts_of_row(self) -> int:
        """The texts that one row of a batch's arrays holds."""
        return self.num_answers or 1

    def shared_by(self, prompt: int) -> int:
        """How many rows of an RL run compute their prompt of so many tokens once."""
        settings = self.config.rl
        wanted = self.config.compute.share_prompts
        shares = self.layout
        return Answers(self.name, self.own, settings, wanted, prompt, True, shares).group_size()

    @property
    def layout(self) -> Layout:
        """That of a run."""
        return Layout(self.mesh)

    @functools.cached_property
    def planned(self) -> OpenRun:
        """The run that makes shapes in place of arrays, without a folder."""
        folder: Any = None
        # What lies in the host's memory is counted by ``phases``.
        compute = dataclasses.replace(self.config.compute, offload=())
        config = dataclasses.replace(self.config, compute=compute)
        return OpenRun(self.name, folder, config, ShapesLayout(self.mesh))

    def in_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Sets the mesh, by which networks know what platform they are for."""
        is_needed = self.target is not None or sharding.is_set(self.mesh)
        return jax.set_mesh(self.mesh) if is_needed else contextlib.nullcontext()

    def computed(self, tree: Any) -> Any:
        """The shapes as a program gets them: a CPU's with float32 in place of shorter floats."""
        return _widened(tree) if self.target is None else tree

    def spread(self, tree: Any) -> Any:
        """The shapes of a batch, its rows over the devices."""
        rows = sharding.rows(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)

    def laid_out(self, tree: Any) -> Any:
        """The shapes of parameters, or of a state with them, on the devices as the mesh says."""
        return laid_out_shapes(self.mesh, tree)

    def policy(self) -> LanguageModel:
        """The model that is trained, the shapes of its parameters as ``lora.base`` says."""
        begun = self.language_model(self.config.model)
        base = functools.partial(initial.base_of, self.config.lora)
        return begun._replace(params=jax.eval_shape(base, begun.params))

    def language_model(self, source: str | None) -> LanguageModel:
        """``model`` with a tokenizer that knows nothing but its special tokens."""
        model, params = self.model(source)
        tokenizer: Any = types.SimpleNamespace(eos_ids=0, pad_id=1)
        return LanguageModel(model, params, tokenizer)

    def model(self, source: str | None) -> tuple[models.Model, Params]:
        """A model, and the shapes of its parameters in the dtype that config.json names.

        It computes as a run on the target does, or in float32 as a CPU can.
        """
        dtype = "float32"
        if source is None:
            network = dataclasses.asdict(self.config.network)
            del network["dropout"]
            config: Any = models.GPT2Config(self.config.tokenizer.vocab_size, **network)
        else:
            folder = hf.find_folder(hf.model_folder(source))
            config = hf.read_config(folder)
            keys = hf.read_json(folder / hf.CONFIG)
            dtype = keys.get("dtype") or keys.get("torch_dtype") or dtype
            if dtype not in DTYPES:
                raise UserError(
                    f"{folder / hf.CONFIG}: dtype is {dtype!r}, expected {', '.join(DTYPES)}"
                )
        compute = initial.by_depth(self.config.compute, config.num_layers)
        how: dict[str, Any] = {"attention": compute.attention, "compute_dtype": compute.dtype}
        if self.target is None:
            runs_here = compute.attention in ("auto", "xla")
            how = {"attention": compute.attention if runs_here else "blockwise"}
        how |= {"remat": compute.remat is True, "scan_layers": compute.scan_layers}
        model = models.build(dataclasses.replace(config, **how))
        params = jax.eval_shape(model.init, jax.random.key(0))
        return model, jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params
        )


def _widened(tree: Any) -> Any:
    """The shapes with float32 in place of shorter floats."""

    def widened(x: Any) -> Any:
        if not (hasattr(x, "dtype") and x.dtype in (jnp.bfloat16, jnp.float16)):
            return x
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)

    return jax.tree.map(widened, tree)
