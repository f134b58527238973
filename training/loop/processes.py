"""What one or many processes need to train together: the Accelerator, shared errors, shared interruption."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from safetensors import SafetensorError

from icexport.errors import IcexportError, UnsupportedOptionError, UsageError

if TYPE_CHECKING:
    from training.loop.config import TrainerConfig

_PATIENCE = timedelta(hours=3)
"""How long processes wait for one another: the first one validates and writes alone."""


def make_accelerator(config: TrainerConfig, output: Path) -> Accelerator:
    """Return the Accelerator for ``config``: alone, or for what ``accelerate launch`` or ``torchrun`` started.

    Args:
        config: precision, accumulation and trackers are taken from it, not from ``accelerate config``.
        output: the run's folder; trackers that write files write into ``output/tracking``.

    Raises:
        UsageError: the tracker is unknown, the device lacks the precision, or the precision differs from that of an
            earlier Accelerator in this process.
    """
    cpu = not torch.accelerator.is_available()
    if cpu and config.precision == "fp16":
        raise UsageError("The precision fp16 needs a GPU, and there is none. Use bf16 or no.")
    timeout = InitProcessGroupKwargs(backend=None, timeout=_PATIENCE)
    try:
        accelerator = Accelerator(
            cpu=cpu,  # without it, Accelerate takes no notice of torchrun on a machine without a GPU
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulation,
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(str(output), logging_dir=str(output / "tracking")),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True), timeout],
        )
    except ValueError as error:
        raise UsageError(f"Accelerate cannot train with these settings: {error}") from error
    if accelerator.is_fsdp2 and config.precision != "no":
        _mix_precision(accelerator, {"bf16": torch.bfloat16, "fp16": torch.float16}[config.precision])
    return accelerator


def _mix_precision(accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Make FSDP compute as DDP does: Accelerate's own policy would round the batch and sum gradients in ``dtype``."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def check_accelerator(accelerator: Accelerator, config: TrainerConfig) -> None:
    """Refuse what the trainer cannot do.

    Raises:
        UnsupportedOptionError: the run uses DeepSpeed, Megatron, XLA, FSDP 1, or 8-bit moments with FSDP.
        UsageError: a precision or a tracker that differs from the configuration's.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise UnsupportedOptionError(f"Training runs alone, with DDP or with FSDP 2, not with {kind.value}.")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UnsupportedOptionError(
            "Training needs version 2 of FSDP, and the configuration says 1. Use `accelerate launch --fsdp_version 2` "
            "or answer 2 in `accelerate config`."
        )
    if kind == DistributedType.FSDP and config.optimizer == "adamw-8bit":
        raise UnsupportedOptionError(
            "bitsandbytes cannot train sharded parameters. Use the optimiser adamw with FSDP."
        )
    if accelerator.mixed_precision != config.precision:
        raise UsageError(
            f"The Accelerator computes in {accelerator.mixed_precision}, the configuration says {config.precision}. "
            "Make it with training.loop.processes.make_accelerator."
        )
    missing = set(config.trackers) - {str(getattr(t, "value", t)) for t in accelerator.log_with}
    if missing:
        raise UsageError(
            f"These trackers are not installed: {', '.join(sorted(missing))}. Install them, for example with "
            f"`pip install {' '.join(sorted(missing))}`, or leave them out."
        )


def on_main(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Do ``work`` in the first process while the others wait, and let all of them fail if it fails.

    Raises:
        IcexportError: ``work`` raised it; also for an error of the disk.
    """
    failure: IcexportError | None = None
    if accelerator.is_main_process:
        try:
            work()
        except IcexportError as error:
            failure = error
        except (OSError, SafetensorError) as error:  # the second is how safetensors says that the disk is full
            failure = IcexportError(f"Training cannot write its results: {error}.")
            failure.__cause__ = error
    shared = [failure]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    if shared[0] is not None:
        raise failure or shared[0]


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM, with which schedulers take a machine back, end the block as Ctrl-C does.

    Raises:
        KeyboardInterrupt: either signal arrived.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
