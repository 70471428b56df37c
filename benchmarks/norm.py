"""The norm alone: a ghost norm's time beside nn.BatchNorm's and beside other ways to normalise ghosts.

    OMP_NUM_THREADS=1 python -m benchmarks.norm

Layers train, running statistics included, as their users call them: on one thread in CPU time, on a GPU by its own events from
CUDA graphs, so that no host is timed, with all contenders of a row in turns. The same allocator settings hold for all, see
gbnzoo.allocator.
"""

import contextlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import gbnzoo
from benchmarks.timing import Times, interleave, quartiles, ratio, setting
from gbnzoo.allocator import keep_freed_memory
from gbnzoo.kernels import cpu

SHAPES = [(512, 16, 32, 32), (512, 32, 16, 16), (512, 64, 8, 8), (64, 256, 56, 56), (512, 512)]
SHAPES_ON_GPU = [(4096, 16, 32, 32), (4096, 32, 16, 16), (4096, 64, 8, 8), (256, 256, 56, 56), (4096, 512)]
CALLS_A_GRAPH = 10
SECONDS_A_ROUND = 2e-3  # at least: shorter calls are repeated
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ChunkLoop(nn.Module):
    """One BatchNorm call for each ghost, as most libraries have it."""

    def __init__(self, norm: nn.Module, ghost: int):
        super().__init__()
        self.norm, self.ghost = norm, ghost

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(ghost) for ghost in x.split(self.ghost)])


class ViewTrick(nn.Module):
    """One BatchNorm call on G times the channels, without a copy: a ghost is every G-th sample, and the layout NCHW.

    Source: Page 2018, cifar10-fast (github.com/davidcpage/cifar10-fast), GhostBatchNorm.
    """

    def __init__(self, norm: nn.Module, ghost: int, samples: int):
        super().__init__()
        self.norm, self.splits = norm, samples // ghost
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).repeat(self.splits))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (parameter.repeat(self.splits) for parameter in (self.norm.weight, self.norm.bias))
        folded = x.view(-1, self.splits * x.shape[1], *x.shape[2:])
        y = nn.functional.batch_norm(folded, self.running_mean, self.running_var, weight, bias, True, 0.1, 1e-5)
        return y.view_as(x)


class CudnnNorm(nn.Module):
    """cuDNN's BatchNorm, which torch takes or not by rules of its own."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        norm.num_batches_tracked.add_(1)
        return torch.cudnn_batch_norm(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )[0]


class AddRelu(nn.Module):
    """What ends a residual block, behind a norm that cannot take it along."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.act = norm, nn.ReLU(inplace=True)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.norm(x)
        y += residual
        return self.act(y)


class FusedAddRelu(AddRelu):
    """The same as gbnzoo's fused blocks do it."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm.normalize(x, residual, relu=True)


def contenders(x: Tensor, ghost: int, inductor: bool) -> dict[str, nn.Module]:
    """Layers by name. `… +ReLU` and `… +add+ReLU` compare with BatchNorm's of the same ending."""
    channels = x.shape[1]
    batch_norm = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
    ghost_norm = gbnzoo.GhostBatchNorm2d if x.dim() == 4 else gbnzoo.GhostBatchNorm1d

    def norm() -> nn.Module:
        return batch_norm(channels)

    def ours() -> nn.Module:
        return ghost_norm(channels, ghost_batch_size=ghost)

    layers = {
        "BatchNorm": norm(),
        "BatchNorm +ReLU": nn.Sequential(norm(), nn.ReLU(inplace=True)),
        "BatchNorm +add+ReLU": AddRelu(norm()),
        "gbnzoo": ours(),
        "gbnzoo +ReLU": gbnzoo.fuse_ghost_batchnorm(nn.Sequential(ours(), nn.ReLU(inplace=True))),
        "gbnzoo +add+ReLU": FusedAddRelu(ours()),
        "chunk loop": ChunkLoop(norm(), ghost),
    }
    if x.is_contiguous():
        layers["view trick"] = ViewTrick(norm(), ghost, x.shape[0])
    if x.is_cuda and x.dim() == 4:
        with contextlib.suppress(RuntimeError):  # it does not take every layout in every dtype
            CudnnNorm(norm()).to(x.device)(x)
            layers["cuDNN"] = CudnnNorm(norm())
    if inductor:
        torch._dynamo.reset()  # it stops compiling after some layers, and compiles later ones for any shape
        for name in ("BatchNorm", "BatchNorm +ReLU", "BatchNorm +add+ReLU"):
            layers[name.replace("BatchNorm", "inductor")] = torch.compile(layers[name], dynamic=False)
    return {name: layer.to(x.device) for name, layer in layers.items()}


def calls(layers: dict[str, nn.Module], x: Tensor, backward: bool) -> dict[str, Callable[[], object]]:
    x = x.detach().requires_grad_()
    residual, dy = torch.randn_like(x).requires_grad_(), torch.randn_like(x)

    def call(name: str) -> Callable[[], object]:
        layer = layers[name]
        inputs = (x, residual) if "add" in name else (x,)
        wanted = (*inputs, *layer.parameters())
        if backward:
            return lambda: torch.autograd.grad(layer(*inputs), wanted, dy)
        return lambda: layer(*inputs)

    return {"copy": lambda: torch.empty_like(dy).copy_(dy)} | {name: call(name) for name in layers}


def measure(contenders: dict[str, Callable[[], object]], rounds: int, device: str) -> Times:
    """Seconds, so many calls at once that a clock can tell."""
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        once = interleave(contenders, 3, clock=clock)
        number = max(1, math.ceil(SECONDS_A_ROUND / min(min(times) for times in once.values())))
        times = interleave({name: _repeated(call, number) for name, call in contenders.items()}, rounds, clock=clock)
        return {name: [seconds / number for seconds in each] for name, each in times.items()}
    graphs = {name: _captured(_repeated(call, CALLS_A_GRAPH)) for name, call in contenders.items()}
    times = {name: [] for name in contenders}
    draw = random.Random(0)
    for i in range(rounds + 3):
        for name, graph in draw.sample(list(graphs.items()), len(graphs)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 3:
                times[name].append(begin.elapsed_time(end) / 1e3 / CALLS_A_GRAPH)
    return times


def _captured(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _repeated(call: Callable[[], object], number: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(number):
            call()

    return repeated


def cases(shapes: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], str, str]]:
    for shape, dtype, layout in itertools.product(shapes, DTYPES, LAYOUTS):
        if len(shape) == 4 or layout == "NCHW":
            yield shape, dtype, layout if len(shape) == 4 else "NC"


def main(
    ghosts: Annotated[
        str, typer.Option(help="samples in a ghost; several, separated by commas, give several tables")
    ] = "32",
    shapes: Annotated[str, typer.Option(help="such as 512x16x32x32,512x512; else those of the table")] = "",
    rounds: int = 21,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda" if torch.cuda.is_available() else "cpu",
    inductor: Annotated[
        bool, typer.Option("--inductor", help="BatchNorm under torch.compile too; takes minutes")
    ] = False,
    instruction_set: Annotated[
        str, typer.Option(help=f"{', '.join(cpu.INSTRUCTION_SETS)}; else the best of this processor")
    ] = "",
    threads: Annotated[int, typer.Option(help="with several, time is the clock's")] = 1,
) -> None:
    torch.set_num_threads(threads)
    if instruction_set:
        cpu.LIBRARY = cpu.load(instruction_set)
        if cpu.LIBRARY is None:
            raise SystemExit(f"no {instruction_set} kernel was compiled, or this processor cannot run it")
    keep_freed_memory()
    torch.manual_seed(0)
    chosen = SHAPES_ON_GPU if device == "cuda" else SHAPES
    if shapes:
        chosen = [tuple(map(int, shape.split("x"))) for shape in shapes.split(",")]
    print(torch.cuda.get_device_name() + "; " + setting() if device == "cuda" else setting())
    for ghost in map(int, ghosts.split(",")):
        print(
            f"\nGhosts of {ghost}. BatchNorm's time over each contender's, median (quartiles): forward / forward and backward\n"
        )
        names = None
        for shape, dtype, layout in cases(chosen):
            x = torch.randn(shape, device=device).to(DTYPES[dtype])
            if len(shape) == 4:
                x = x.to(memory_format=LAYOUTS[layout])
            layers = contenders(x, ghost, inductor)
            forward, both = (measure(calls(layers, x, backward), rounds, device) for backward in (False, True))
            if names is None:
                names = [name for name in layers if not name.startswith("BatchNorm")]
                print(f"| x | {' | '.join(names)} | copy, ms | forward over copy |\n|---{'|---' * len(names)}|---|---|")
            cells = [
                _ratios(forward, both, name, "BatchNorm" + name.removeprefix(name.split(" +")[0]))
                if name in both
                else ""
                for name in names
            ]
            copy = quartiles(forward["copy"])[1] * 1e3
            print(
                f"| {'×'.join(map(str, shape))} {dtype} {layout} | {' | '.join(cells)}"
                f" | {copy:.3g} | {ratio(forward, 'gbnzoo', 'copy')} |",
                flush=True,
            )


def _ratios(forward: Times, both: Times, name: str, batch_norm: str) -> str:
    return f"{ratio(forward, batch_norm, name)} / {ratio(both, batch_norm, name)}"


if __name__ == "__main__":
    typer.run(main)
