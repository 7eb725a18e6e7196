"""One process or many: what each engine needs of the environment, and proof of which one really runs.

``single`` is one process; ``ddp`` copies the model to every process; ``zero2`` and ``zero3`` are DeepSpeed's, which
share out gradients and optimizer state, and weights too; ``fsdp`` is torch's ``fully_shard`` through accelerate.

Trainer falls back to DDP without a word where DeepSpeed or FSDP cannot run as asked (``use_cpu`` is such a case), wraps
a single process into DataParallel where it sees several GPUs, and takes a DeepSpeed process group on the CPU for one
process. So everything is set here, and `check` looks at what was made of it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed, nn

from m3d.config import config_root
from m3d.train.optim import OptimConfig

EngineName = Literal["single", "ddp", "zero2", "zero3", "fsdp"]
_RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def sibling(file: str, engine: str) -> str | None:
    """An engine's settings for the same machine: zero2-8xa100.json -> zero3-8xa100.json; None where there are none."""
    path = Path(file)
    other = path.with_name(f"{engine}-{path.name.partition('-')[2]}")
    return str(other) if (config_root() / other).is_file() or other.is_file() else None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the work is shared out.

    Attributes:
        name: single, ddp, zero2, zero3 or fsdp.
        device: cpu, cuda, or auto: a GPU where there is one.
        deepspeed: A DeepSpeed JSON file for zero2 and zero3, such as ``engines/zero3-8xa100.json`` among the shipped
            configs; batch sizes, clipping and precision in it are replaced by those of the recipe. None for ours. Other
            engines pass over it.
        timeout_minutes: How long a process waits for the others before it gives up.
    """

    name: EngineName = "single"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deepspeed: str | None = None
    timeout_minutes: int = 30

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the CPU, here."""
        return self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available())

    @property
    def in_pieces(self) -> bool:
        """Whether processes hold pieces of the weights, so that all must call a part for one to see what it gives."""
        return self.name in ("zero3", "fsdp")

    @property
    def zero_stage(self) -> int:
        """2 or 3, or 0 where DeepSpeed has no part in it."""
        return {"zero2": 2, "zero3": 3}.get(self.name, 0)


def world() -> int:
    """Processes that train together."""
    return distributed.get_world_size() if _together() else 1


def rank() -> int:
    """This process's number among them; before they have met, what the launcher says."""
    return distributed.get_rank() if _together() else int(os.environ.get("RANK", "0"))


def barrier() -> None:
    """Wait for all processes."""
    if _together():
        distributed.barrier()


def leave() -> None:
    """Leave the other processes; call it last, for one of several ends here, with status 0.

    Python's own way out would join nothing: a thread of the process group or of DeepSpeed that wants the interpreter
    while it is taken down aborts the process ("terminate called without an active exception"), and torchrun then calls
    a run failed that has left everything on disk.
    """
    if not _together():
        return
    several = world() > 1
    distributed.barrier()
    distributed.destroy_process_group()
    if several:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def gather(row: Any) -> list[Any]:  # noqa: ANN401
    """Everyone's row, by rank."""
    if not _together():
        return [row]
    rows: list[Any] = [None] * world()
    distributed.all_gather_object(rows, row)
    return rows


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def prepare(engine: Engine) -> None:
    """Set up this process; call it first, before a model is built. Doing it again changes nothing.

    Raises:
        ValueError: The engine cannot run here, or not in this number of processes.
        ModuleNotFoundError: It needs DeepSpeed, which is not installed.
    """
    if engine.on_cpu:
        # Gradients of voxels far outside a structure are denormal numbers, which cost a CPU four times the step. It
        # must be said before the first parallel work: the threads made then keep it.
        torch.set_flush_denormal(True)
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU here; use device=cpu or auto")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if engine.name == "single":
        if processes > 1:
            raise ValueError(f"engine=single is one process, but {processes} were started; use engine=ddp or a zero")
        for name in _RENDEZVOUS:  # of a torchrun with one process: it would be wrapped as DDP
            os.environ.pop(name, None)
    elif engine.name == "fsdp":
        _refuse_fsdp_on_cpu(engine)
    elif engine.zero_stage:
        _prepare_deepspeed(engine)
    if engine.name in ("ddp", "fsdp") and "LOCAL_RANK" not in os.environ:
        raise ValueError(f"engine={engine.name} needs processes: start it with --nproc N, torchrun or srun")


def _refuse_fsdp_on_cpu(engine: Engine) -> None:
    if engine.on_cpu:
        raise ValueError("engine=fsdp needs GPUs: accelerate does not shard on the CPU; use zero3 or ddp there")


def _prepare_deepspeed(engine: Engine) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError(f"engine={engine.name} needs DeepSpeed: pip install 'm3d-lamed[train]'")
    if engine.on_cpu:
        if torch.cuda.is_available():
            raise ValueError(
                f"engine={engine.name} on the CPU of a machine with GPUs: hide them, CUDA_VISIBLE_DEVICES=''"
            )
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "RANK" not in os.environ:  # DeepSpeed would look for MPI
        own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(own, MASTER_PORT=str(_free_port()))
    if engine.on_cpu:
        deepspeed = importlib.import_module("deepspeed")
        # Compiled at first use, for minutes; if killed meanwhile, its lock makes every later run wait for ever. gloo
        # does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def arguments(engine: Engine, config: OptimConfig, output: Path, objective: nn.Module, **more: Any) -> Any:  # noqa: ANN401
    """`transformers.TrainingArguments` for an engine; it joins the process group.

    The model is built before this, whole in every process: DeepSpeed's way of building it in pieces fails on
    embeddings with a padding index (transformers 5.23).
    """
    from transformers import TrainingArguments

    prepare(engine)
    if engine.zero_stage and engine.on_cpu and config.bf16:
        raise ValueError(f"optim.bf16 with engine={engine.name} needs a GPU; use bf16=false, or ddp on the CPU")
    accumulate = config.accumulate(int(os.environ.get("WORLD_SIZE", "1")))
    given: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": config.lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "max_grad_norm": config.clip,
        "bf16": config.bf16,
        "seed": config.seed,
        "use_cpu": engine.on_cpu and not engine.zero_stage,
        "ddp_find_unused_parameters": True if engine.name == "ddp" else None,
        "ddp_timeout": 60 * engine.timeout_minutes,
        "deepspeed": deepspeed_config(engine, config, accumulate) if engine.zero_stage else None,
        "fsdp": engine.name == "fsdp",
        "fsdp_config": _fsdp_config(objective) if engine.name == "fsdp" else None,
    }
    made: Any = TrainingArguments(**given, **more)
    if engine.name == "single":
        made._n_gpu = min(1, made.n_gpu)
    if engine.zero_stage and engine.on_cpu:  # accelerate knows no backend there and takes it for one process
        state = made.distributed_state
        state.num_processes, state.process_index = world(), rank()
        state.local_process_index = int(os.environ["LOCAL_RANK"])
    return made


def deepspeed_config(engine: Engine, config: OptimConfig, accumulate: int) -> dict[str, Any]:
    """DeepSpeed's settings: those of the file or ours, with the recipe's batch sizes, clipping and precision.

    Raises:
        ValueError: The file is no JSON, of another stage, or sets an optimizer or schedule of its own.
    """
    values = _read_deepspeed(engine) if engine.deepspeed else {"zero_optimization": _own_zero(engine)}
    zero = values["zero_optimization"]
    values["zero_optimization"] = {name: value for name, value in zero.items() if value != "auto"}
    for name in ("train_batch_size", "fp16", "amp"):
        values.pop(name, None)
    return values | {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": config.clip,
        "bf16": {"enabled": config.bf16},
        "steps_per_print": 1 << 30,
    }


def _own_zero(engine: Engine) -> dict[str, Any]:
    small = {"reduce_bucket_size": 1 << 20, "overlap_comm": False} if engine.on_cpu else {"overlap_comm": True}
    zero: dict[str, Any] = {"stage": engine.zero_stage, "contiguous_gradients": True, **small}
    if engine.on_cpu and engine.zero_stage == 3:
        # Or small models would not be shared out at all. Not 0: see `keep_small_whole`.
        zero["stage3_param_persistence_threshold"] = 1000
    return zero


def _read_deepspeed(engine: Engine) -> dict[str, Any]:
    assert engine.deepspeed is not None
    path = Path(engine.deepspeed)
    path = path if path.is_file() or path.is_absolute() else config_root() / path
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    stage = values.get("zero_optimization", {}).get("stage")
    if stage != engine.zero_stage:
        raise ValueError(f"{path} is of ZeRO stage {stage}, but engine={engine.name}; change one of them")
    for name in ("optimizer", "scheduler"):
        if name in values:
            raise ValueError(f"{path} sets {name!r}, which is the recipe's (optim.*); remove it from the file")
    return values


def _fsdp_config(objective: nn.Module) -> dict[str, Any]:
    """Shard layer by layer, the layers being those that their models say must not be split."""
    asked = {name for module in objective.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    layers = sorted(asked & {type(module).__name__ for module in objective.modules()})
    policy = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": layers}
    return {
        "version": 2,
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
        **(policy if layers else {"auto_wrap_policy": "NO_WRAP"}),
    }


def running(wrapped: Any) -> str:  # noqa: ANN401
    """Which engine a wrapped model runs on, by what wraps it."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return "ddp"
    if isinstance(wrapped, nn.DataParallel):
        return "DataParallel"
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in wrapped.modules()):
        return "fsdp"
    if hasattr(wrapped, "zero_optimization_stage"):
        return f"zero{wrapped.zero_optimization_stage()}"
    return "single"


def check(engine: Engine, wrapped: nn.Module) -> None:
    """Raise where Trainer made something else of it than was asked for."""
    found = running(wrapped)
    if found != engine.name:
        raise RuntimeError(
            f"engine={engine.name} was asked for, but Trainer made {found} of it ({type(wrapped).__name__}, "
            f"{world()} processes); nothing was trained"
        )


def keep_small_whole(wrapped: Any) -> None:  # noqa: ANN401
    """Let zero3 gather small parameters with the whole model, however they are read.

    DeepSpeed gathers a parameter for the module that owns it. One that another module reads, as the mask decoder reads
    its tables of tokens, is gathered for that reader; but where the reader returns no plain tensors, it is not there
    for the backward pass of the very first step, in spite of ``stage3_param_persistence_threshold``.
    """
    register = importlib.import_module("deepspeed").zero.register_external_parameter
    for parameter in wrapped.module.parameters():
        if parameter.ds_persist:
            register(wrapped.module, parameter)


@contextlib.contextmanager
def at_hand(wrapped: nn.Module) -> Iterator[None]:
    """Inside, parts of a model can be called by themselves, as evaluation and samples do; all processes must enter it.

    Under fsdp the layers gather their own weights when they are called; those that belong to no layer are the root's,
    and are there only inside its forward pass.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(wrapped, FSDPModule):
        wrapped.unshard()
    try:
        yield
    finally:
        if isinstance(wrapped, FSDPModule):
            wrapped.reshard()


@contextlib.contextmanager
def whole_weights(objective: nn.Module, engine: Engine) -> Iterator[None]:
    """Inside, the first process sees full weights where processes hold pieces; all must enter it.

    Under zero3 every process holds them meanwhile. For reading only: what is changed is lost.
    """
    if engine.name == "zero3":
        deepspeed = importlib.import_module("deepspeed")
        # Those that are whole already stay so afterwards: they are read outside their own modules.
        here = deepspeed.zero.ZeroParamStatus.AVAILABLE
        away = [parameter for parameter in objective.parameters() if getattr(parameter, "ds_status", here) != here]
        with deepspeed.zero.GatheredParameters(away, modifier_rank=None):
            yield
    elif engine.name == "fsdp":
        with _whole_tensors(objective):
            yield
    else:
        yield


@contextlib.contextmanager
def _whole_tensors(objective: nn.Module) -> Iterator[None]:
    """Put full copies, in the first process's memory, in the place of sharded parameters."""
    from torch.distributed.tensor import DTensor

    sharded: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in objective.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor):
                full = parameter.full_tensor().detach()
                kept = full.cpu() if rank() == 0 else torch.empty(0)
                sharded.append((module, name, parameter))
                module._parameters[name] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter


def launch(module: str, given: Sequence[str], *, processes: int) -> int:
    """Run ``python -m MODULE ...`` in that many processes on this machine; its exit status.

    Ctrl-C and SIGTERM are passed on. Over several machines use torchrun, deepspeed or srun (docs/training.md).
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads} | dict(os.environ)
    child = subprocess.Popen([*command, "-m", module, *given], env=environment)
    before = {number: signal.signal(number, lambda got, _: child.send_signal(got)) for number in _PASSED_ON}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
