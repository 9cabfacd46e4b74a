"""Distributed training on one or more machines: torch.distributed, as started by torchrun.

    torchrun --nproc-per-node 4 -m ftkit train photos --out RUN --resume

    with joined("auto") as (device, ranks):      # a single process is rank 0 of 1, without messages
        mine = ranks.part(32)                    # this rank's slice of a global batch
        ranks.sum(tally)                         # over all ranks, in place
        out = ranks.first(lambda: make())        # made on rank 0, returned (or failing) on all

Ranks exchange only tensors and JSON, never pickle.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.overrides import TorchFunctionMode

from ftkit.utils import console
from ftkit.utils.compat import default_store, sync_batch_norm
from ftkit.utils.errors import ToldElsewhereError
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.session import cores

Value = TypeVar("Value")
TensorsByName = dict[str, torch.Tensor]

# How long ranks wait for each other: one machine may decode while another has its canvases. A rank
# that dies is noticed at once: its connections close, and torchrun ends the others.
PATIENCE = timedelta(hours=12)
# Until all have begun: one that fails before, on another machine, is not noticed by torchrun here
JOINING = timedelta(minutes=10)
# Without it, restarted ranks find the addresses of their predecessors (torch 2.14, rendezvous c10d)
FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"


@dataclass(frozen=True)
class Ranks:
    """This process's place among all processes.

    rank of world in total, local of local_world on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @property
    def main(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    @property
    def node(self) -> int:
        """The first rank of this machine."""
        return self.rank - self.local

    def part(self, count: int) -> slice:
        """This rank's slice of a global batch of `count`; slices differ by one image at most."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks, in place. On CUDA it is queued, without waiting."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self.world == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (JSON data), ordered by rank."""
        if self.world == 1:
            return [value]

        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        room = max(int(size) for size in sizes)
        texts = [torch.empty(room, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, F.pad(own, (0, room - len(own))))

        return [
            json.loads(bytes(text[: int(size)].numpy()))
            for text, size in zip(texts, sizes, strict=True)
        ]

    def together(self, make: Callable[[], Value]) -> Value:
        """Call `make` on every rank. If one fails, all do, and the first to fail reports it."""
        if self.world == 1:
            return make()

        made = None
        failure: FtkitError | OSError | None = None
        try:
            made = make()
        except (FtkitError, OSError) as error:
            failure = error

        failed = [rank for rank, wrong in enumerate(self.gather(failure is not None)) if wrong]
        if failed:
            raise failure if failure and failed[0] == self.rank else ToldElsewhereError()
        return made  # type: ignore[return-value]  # set unless an error was raised

    def first(self, make: Callable[[], Value]) -> Value:
        """Call `make` on rank 0 and return its result (JSON data) on every rank.

        If it fails, all ranks do.
        """
        made = self.together(lambda: make() if self.main else None)
        value: Value = self.gather(made)[0]
        return value

    def tensors(self, values: Mapping[str, torch.Tensor]) -> TensorsByName:
        """Broadcast rank 0's tensors, on the CPU, to all ranks."""
        if self.world == 1:
            return dict(values)

        facts = {
            name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
            for name, value in values.items()
        }
        placed = {}
        for name, (dtype, shape) in self.gather(facts)[0].items():
            placed[name] = (
                values[name].contiguous()
                if self.main
                else torch.empty(shape, dtype=getattr(torch, dtype))
            )
            dist.broadcast(placed[name], 0)

        return placed


SOLO = Ranks()
_inside = False  # a block of `joined`


@contextmanager
def joined(name: str) -> Iterator[tuple[torch.device, Ranks]]:
    """This process's device ("auto", "cpu" or "cuda") and its rank under torchrun, if any.

    Inside another such block: the same, without joining anew. Raises FtkitError if CUDA is requested
    but absent, if there are fewer GPUs than processes on this machine, and if another rank is lost
    inside the block.
    """
    global _inside
    ranks = _placed()
    device = pick_device(name, ranks.local)

    if ranks.world == 1:
        bound_threads()
        yield device, SOLO
        return
    if _inside:
        yield device, ranks
        return

    console.mute(not ranks.main)
    torch.set_num_threads(share_of_cores(ranks))

    if device.type == "cuda":
        torch.cuda.set_device(device)

    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=JOINING)))
        store.set(f"ftkit {rank}", "begun")
        store.wait([f"ftkit {each}" for each in range(world)], JOINING)
        store.set_timeout(PATIENCE)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("default_pg", store),
            rank=rank,
            world_size=world,
            timeout=PATIENCE,
        )
    except (ValueError, RuntimeError) as error:
        console.mute(False)
        cure = f"Set {FRESH_STORE} for torchrun" if restarted() else "Start them with torchrun"
        raise FtkitError(
            f"rank {ranks.rank}: expected to meet {ranks.world - 1} others, found: "
            f"{str(error).splitlines()[0]}. {cure}"
        ) from None

    _inside = True
    try:
        _require_one_kind(device, ranks)
        yield device, ranks
        dist.destroy_process_group()
    except FtkitError as error:
        _tell(str(error))
        raise type(error)("") from None
    except RuntimeError as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        if not isinstance(error, dist.DistError) and not any(
            word in said for word in ("gloo", "Gloo", "NCCL", "nccl")
        ):
            raise

        # Gloo's messages start with a source file and line
        said = re.sub(r"^\[[^\]]*\] *", "", said).split(". ")[0][:70]
        _tell(
            f"rank {ranks.rank}: expected every rank to answer, found one gone ({said}). What was saved is kept: try "
            "the same command, a training with --resume, on as many GPUs as there are"
        )
        raise ToldElsewhereError from None
    finally:  # after a failure the group is not destroyed: NCCL would wait for lost ranks
        _inside = False
        console.mute(False)


def _require_one_kind(device: torch.device, ranks: Ranks) -> None:
    """Raise FtkitError, on every rank, unless all compute on the same kind of device: others would wait for
    each other in different ways."""
    kinds = ranks.gather(device.type)
    if len(set(kinds)) > 1:
        odd = next(rank for rank, kind in enumerate(kinds) if kind != kinds[0])
        raise FtkitError(
            f"--device: expected one kind of device on all ranks, found {kinds[0]} on rank 0 and {kinds[odd]} on rank "
            f"{odd}. Try --device {kinds[0]}, or `ftkit doctor` there"
        )


def _tell(text: str) -> None:
    """Print an error, unless another rank was first.

    Printed at once, since torchrun may end this process next.
    """
    if not text:
        return

    key = f"ftkit told {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        first = default_store().add(key, 1) == 1
    except Exception:  # the store may be gone too
        first = True

    if first:
        print(f"error: {text}", file=sys.stderr, flush=True)


def _placed() -> Ranks:
    """Read the ranks from torchrun's environment variables."""
    number = {
        name: os.environ.get(name, "")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    if not number["RANK"] or not number["WORLD_SIZE"]:
        return SOLO

    try:
        return Ranks(
            *(
                int(number[name] or fallback)
                for name, fallback in (
                    ("RANK", 0),
                    ("WORLD_SIZE", 1),
                    ("LOCAL_RANK", 0),
                    ("LOCAL_WORLD_SIZE", 1),
                )
            )
        )
    except ValueError:
        raise FtkitError(
            f"environment: expected torchrun's numbers, found {number}. Start it with torchrun"
        ) from None


def pick_device(name: str, local: int = 0) -> torch.device:
    """ "auto", "cpu" or "cuda" -> device; with several GPUs, the one for this rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise FtkitError(
            "--device cuda: expected a GPU torch can use, found none. Try --device cpu, or `ftkit doctor`"
        )

    if local >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise FtkitError(
            f"--device cuda: expected a GPU for each process on this machine, found {local + 1} or more "
            f"processes and {gpus} GPUs. Try {gpus} processes"
        )

    return torch.device("cuda", local)


def bound_threads() -> None:
    """Limit torch's threads to the available cores; torch ignores a container's CPU quota."""
    torch.set_num_threads(min(torch.get_num_threads(), cores()))


def share_of_cores(ranks: Ranks) -> int:
    """Cores that one rank of this machine may use."""
    return max(1, cores() // ranks.local_world)


def restarted() -> bool:
    """Whether torchrun restarted this process after a failure, so that it should resume."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


class _Normalised(torch.autograd.Function):
    """Batch normalisation (Ioffe & Szegedy 2015) over all ranks' inputs (n, C, ...), on a CPU.

    Uses torch's own kernels on the input, and one all-reduce of a few numbers per channel in each
    direction.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        eps: float,
        momentum: float,
    ) -> torch.Tensor:
        mean, variance = (
            part.double() for part in torch.batch_norm_update_stats(input, None, None, 0.0)
        )
        own = mean.new_tensor([input.numel() // input.shape[1]])
        total = torch.cat([own * mean, own * (variance + mean**2), own])
        dist.all_reduce(total)
        count, (mean, square) = float(total[-1]), (total[:-1] / total[-1]).chunk(2)
        variance = square - mean**2

        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var), momentum)

        mean = mean.to(weight)
        variance = variance.to(weight)
        ctx.save_for_backward(input, weight, mean, variance)
        ctx.eps = eps
        ctx.count = count
        output: torch.Tensor = torch.native_batch_norm(
            input, weight, bias, mean, variance, False, 0.0, eps
        )[0]

        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The gradient with mean and variance held fixed, plus the part through them.

        The latter needs the sums of the gradient, and of the gradient times the normalised input.
        """
        input, weight, mean, variance = ctx.saved_tensors
        by_input, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, input, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([by_bias, by_weight])
        dist.all_reduce(sums)
        invstd = (variance + ctx.eps).rsqrt()
        wide = (1, -1, *(1,) * (input.ndim - 2))
        slope = -weight * invstd**2 * sums[1] / ctx.count
        shift = -weight * invstd * sums[0] / ctx.count - slope * mean
        by_input.addcmul_(input, slope.view(wide)).add_(shift.view(wide))

        return by_input, by_weight, by_bias, None, None, None, None


class GlobalBatchNorm(TorchFunctionMode):
    """Context in which BatchNorm in training mode uses statistics of the global batch.

    It applies to whatever module calls F.batch_norm. On CUDA it uses torch's own SyncBatchNorm,
    which does not support CPUs. With statistics of each rank's part, the weights would depend on
    the number of ranks.
    """

    def __init__(self, world: int):
        super().__init__()
        self.world = world

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)

        names = (
            "input",
            "running_mean",
            "running_var",
            "weight",
            "bias",
            "training",
            "momentum",
            "eps",
        )

        given = {
            "weight": None,
            "bias": None,
            "training": False,
            "momentum": 0.1,
            "eps": 1e-5,
            **dict(zip(names, args, strict=False)),
            **kwargs,
        }
        if not given.pop("training"):
            return func(*args, **kwargs)

        order = ("input", "weight", "bias", "running_mean", "running_var", "eps", "momentum")
        if given["weight"] is None:  # affine=False
            given["weight"] = given["input"].new_ones(given["input"].shape[1])
            given["bias"] = given["input"].new_zeros(given["input"].shape[1])

        values = [given[key] for key in order]
        if not given["input"].is_cuda:
            return _Normalised.apply(*values)

        return sync_batch_norm()(*values, dist.group.WORLD, self.world)


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `ftkit ARGUMENTS` in `count` processes on this machine with torchrun's launcher.

    Returns the exit code. Raises FtkitError if a process was killed; errors that a process reports
    itself are on standard error already.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # the processes report their errors themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "ftkit", *arguments)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        by = signal.Signals(-failure.exitcode).name
        raise FtkitError(
            f"rank {rank}: expected it to finish, found it killed by {by}. What was saved is kept: try "
            "the same command, a training with --resume"
        ) from None

    return 0
