"""One stage of a run while it is open: its folder, its devices, its random streams."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.tree_util import Partial

from rlhf_jax.config import Compute, LoRA
from rlhf_jax.config.yaml_files import dumped
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import blocks, sharding
from rlhf_jax.runs import devices, folder, keeping, processes, writing
from rlhf_jax.training.common import layout, memory
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.types import Params, PolicyFn, TrainState

Tree = TypeVar("Tree")
State = TypeVar("State", bound=TrainState)
Made = TypeVar("Made")
Stream = Literal["init", "data", "rollout", "update", "eval"]


class Keeping(NamedTuple):
    """What a run keeps and how it is watched; the fields are those of ``RunConfig``."""

    seed: int = 0
    checkpoint_interval: int = 50
    checkpoint_async: bool = False
    keep_last: int = 2
    keep_best: str | None = None
    early_stopping_patience: int | None = None
    track: tuple[str, ...] = ()
    alerts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """An open run folder with the devices and keys of its stage."""

    name: str
    run: folder.Run
    mesh: Mesh
    compute: Compute
    lora: LoRA
    keeping: Keeping
    sampling_mesh: Mesh | None = None
    """Of the devices that only sample; None if there are none."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """All settings of the run as plain values, for what records them."""
    held: dict[str, Any] = dataclasses.field(default_factory=dict)
    """{name: pytree of shapes} of the arrays on the devices, for the message when memory runs out;
    see ``hold``.
    """

    @property
    def num_parts(self) -> int:
        """The number of parts of a batch's rows: blocks, or devices."""
        return self.compute.blocks or sharding.num_parts(self.mesh)

    def key(self, name: Stream) -> Array:
        """The key of one of the stage's random streams."""
        return stream(self.keeping.seed, self.name, name)

    @property
    def shares(self) -> layout.Shares:
        """What a batch is divided over."""
        sampling = 0 if self.sampling_mesh is None else self.sampling_mesh.size
        return layout.Shares(self.mesh, self.compute.blocks, sampling)

    @property
    def row_mesh(self) -> Mesh | None:
        """The mesh over which programs shard rows; None with ``compute.blocks``, see ``jit``."""
        return None if self.compute.blocks else self.mesh

    @property
    def rows(self) -> jax.sharding.NamedSharding | None:
        """The sharding of rows inside programs, over ``row_mesh``."""
        return None if self.row_mesh is None else sharding.rows(self.row_mesh)

    @property
    def placement(self) -> layout.Place:
        """The sharding of parameters by their shapes; None if every device holds all of them."""
        return layout.placement(self.mesh)

    def shard(self, batch: Tree) -> Tree:
        """The batch with its rows sharded over the devices; with ``compute.blocks``, replicated."""
        if self.compute.blocks:
            return sharding.replicate(self.mesh, batch)
        return sharding.shard_rows(self.mesh, batch)

    def jit(self, program: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """``jax.jit(program)``; with ``compute.blocks`` each device runs it on whole arrays, and
        the passes of networks in it block by block (``blocks.replicated``).
        """
        count = self.compute.blocks
        if count:
            program = blocks.replicated(program, self.mesh, count)
        return jax.jit(program, **options)

    def copy(self, tree: Tree) -> Tree:
        """A copy, sharded over the mesh. It never shares buffers, since updates donate theirs."""
        return self.lay_out(jax.tree.map(functools.partial(jnp.array, copy=True), tree))

    def lay_out(self, tree: Tree) -> Tree:
        """Parameters, or a state with them, sharded over the mesh."""
        return jax.tree.map(sharding.place, tree, layout.shardings(self.mesh, tree))

    def made(self, make: Callable[..., Made], *trees: Any) -> Made:
        """``make(*trees)``: parameters of others. A stage that is only planned makes shapes."""
        return make(*trees)

    def take(self, create: Callable[[Params], State], params: Params) -> State:
        """``create(params)`` in new arrays, sharded over the mesh. The arrays of ``params`` are
        freed.

        It is one program, which compiles faster than a program for each operation.
        """
        placed = self.lay_out(params)
        state = jax.jit(
            create, out_shardings=layout.shardings(self.mesh, jax.eval_shape(create, placed))
        )(placed)
        memory.free((params, placed))
        self.hold_state(state)
        return state

    def hold_state(self, state: TrainState) -> None:
        """Records the arrays of a state, and of its gradients."""
        parts = state.params if "policy" in state.params else {"parameters": state.params}
        trained = {f"trained {part}": tree for part, tree in parts.items()}
        self.hold(trained | {"optimizer state": state.opt_state, "gradients": state.params})

    def shapes(self, params: Params) -> Params:
        """The shapes of parameters, laid out over the mesh."""
        arrays = jax.eval_shape(lambda tree: tree, params)
        where = layout.shardings(self.mesh, arrays)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays, where
        )

    def decided(self, compute: Compute) -> "Stage":
        """The stage with settings that were auto, which it writes to config.yaml."""
        stage = dataclasses.replace(self.noted(compute=compute), compute=compute)
        processes.in_first(lambda: write_settings(stage.run, stage.settings))
        return stage

    def noted(self, **sections: Any) -> "Stage":
        """The stage with these sections in what it records from now on."""
        values = {name: dataclasses.asdict(section) for name, section in sections.items()}
        return dataclasses.replace(self, settings={**self.settings, **values})

    def hold(self, trees: Mapping[str, Any]) -> None:
        """Records the shapes of arrays on the devices, by name."""
        self.held.update({name: memory.shapes(tree) for name, tree in trees.items()})

    def jit_update(self, update: Callable[..., Any], num_blocks: int) -> Callable[..., Any]:
        """Jits ``update(state, ...) -> (state, metrics)``: the state is donated, and the new one
        has its sharding.

        num_blocks: as in ``devices.compiler_options``.
        """

        def update_in_place(state: Any, *args: Any, **options: Any) -> Any:
            state, metrics = update(state, *args, **options)
            if self.compute.blocks:
                return state, metrics
            state = jax.lax.with_sharding_constraint(state, layout.shardings(self.mesh, state))
            return state, jax.lax.with_sharding_constraint(metrics, sharding.replicated(self.mesh))

        return self.jit(
            update_in_place, donate_argnums=0, compiler_options=devices.compiler_options(num_blocks)
        )

    def place(self, start: Trainable) -> Trainable:
        """``start`` with its frozen part on the devices, not copied: no update donates it."""
        return start if start.base is None else start._replace(base=self.lay_out(start.base))

    def reference(self, start: Trainable, policy_fn: PolicyFn, moves: bool = False) -> Partial:
        """The policy before training, with its parameters as they were loaded, in their file's
        dtype: no copy. If it ``moves``, a function of the trained part, which is in the state.
        """
        if moves:
            memory.free(start.loaded)
            return start.bind(policy_fn)
        if start.base is None:
            return self.frozen("reference", Partial(policy_fn, start.loaded))
        if "reference" in self.compute.offload:
            raise UserError(
                "compute.offload: under LoRA the reference is the frozen weights, which stay; "
                "leave it out"
            )
        return Partial(policy_fn, start.base)

    def frozen(self, name: str, fn: Any) -> Any:
        """The arrays of a model that is not trained, on the devices. If ``compute.offload`` names
        the model, they stay in the host's memory while it is not called.
        """
        placed = self.lay_out(fn)
        if name not in self.compute.offload:
            return placed
        on_host = memory.offloaded(placed)
        memory.free((fn, placed))
        return on_host


def settings_text(settings: Mapping[str, Any]) -> str:
    """The text of config.yaml: the settings of a run, without what says how it was started."""
    own = {"resume": False, "overwrite": False, "allow_changed": (), "processes": None}
    return dumped({**settings, **own})


def write_settings(run: folder.Run, settings: Mapping[str, Any]) -> None:
    """Writes config.yaml."""
    writing.write_atomically(run.config, settings_text(settings))
    keeping.keep_start(run)


def stream(seed: int, stage: str, name: Stream) -> Array:
    """The key of a named stream: the run's root key, folded with the names of stage and stream."""
    root = jax.jit(jax.random.key, static_argnums=0)(seed)
    of_stage = jax.random.fold_in(root, zlib.crc32(stage.encode()))
    return jax.random.fold_in(of_stage, zlib.crc32(name.encode()))
