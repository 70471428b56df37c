"""The GPU kernels: in Triton's interpreter, compiled without a GPU, and on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kernels import FUSIONS, LAYOUTS, laid_out, oracle

from gbnzoo import kernels
from gbnzoo.kernels import cpu

triton = pytest.importorskip("triton", reason="without Triton, GPUs take the path through torch's operators")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gbnzoo.kernels import gpu  # noqa: E402

A100, H200 = 108, 132  # multiprocessors
DEVICES = {80: A100, 90: H200}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TYPE_NAMES = {torch.int64: "*i64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a CUDA device of compute capability 8.0 or more",
    ),
]


@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 does not run with numpy 2.4",
)
def test_interpreted_kernels_agree_with_float64():
    file = Path(__file__).with_name("interpreted_gpu_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("pixels", [1, 49, 1024])
def test_plans_fit_registers_and_keep_the_device_at_work(direction, pixels, element_bytes):
    for ghosts, rows, channels in [(1, 32, 3), (128, 32, 16), (32, 128, 64), (2, 2048, 256), (1, 200_000, 24)]:
        values = rows * pixels
        plan = gpu.plan(direction, ghosts, values, channels, pixels, element_bytes, H200)
        assert plan.slabs == ghosts * -(-channels // plan.channels)
        assert plan.channels == 1 or pixels == 1
        if plan.way == "resident":
            assert values <= plan.rows
            assert plan.rows * plan.channels <= {"forward": 32768, "backward": 16384}[direction]
        else:
            parts = plan.slabs * plan.splits
            assert parts >= 8 * H200 or plan.splits == 256 or plan.splits * plan.rows >= values
            assert plan.splits <= 256
        assert 32 * plan.warps <= 512


def test_headline_shapes_take_their_ways():
    """ResNet on CIFAR at batch 4096 in bfloat16, ghosts of 32: (samples, 16, 32, 32) and (samples, 64, 8, 8)."""
    assert gpu.plan("forward", 128, 32 * 1024, 16, 1024, 2, H200).way == "resident"
    assert gpu.plan("backward", 128, 32 * 1024, 16, 1024, 2, H200).way == "split"
    assert gpu.plan("forward", 128, 32 * 1024, 16, 1, 2, H200).way == "split"
    assert gpu.plan("forward", 128, 32 * 64, 64, 1, 2, H200).way == "resident"


@pytest.mark.parametrize(("rows", "ghost_rows", "sizes"), [(8, 4, [4, 4]), (11, 4, [4, 7]), (7, 4, [7]), (3, 4, [3])])
def test_equal_ghosts(rows, ghost_rows, sizes):
    seen, next_row, next_ghost = [], 0, 0
    for rows_of, ghosts, each in gpu._equal_ghosts(rows, ghost_rows):
        assert (rows_of.start, ghosts.start) == (next_row, next_ghost)
        next_row, next_ghost = rows_of.stop, ghosts.stop
        seen += [each] * (ghosts.stop - ghosts.start)
        assert next_row - rows_of.start == each * (next_ghost - ghosts.start)
    assert (next_row, seen) == (rows, sizes)


# ------------------------------------------------------------------------------------------- compiled without a device


def launches(monkeypatch, shape, ghost, layout, dtype, fusion, processors):
    """What a forward and a backward would launch: kernel, arguments, warps and constants."""
    adds, relu = FUSIONS[fusion]
    seen = {}

    def note(kernel, x, grid, *arguments, warps, **constants):
        seen[kernel.__name__] = kernel, arguments, warps, constants

    monkeypatch.setattr(gpu, "_processors", lambda _: processors)
    monkeypatch.setattr(gpu, "_launch", note)
    x = laid_out(torch.empty(shape, dtype=dtype, device="meta"), layout)
    weight = torch.empty(shape[1], device="meta")
    y, statistics = gpu.forward(x, x if adds else None, weight, weight, ghost, 1e-5, relu)
    gpu.fold(*statistics[:2], weight, weight, torch.empty((), dtype=torch.int64, device="meta"), 128, 0.1, 0.9, 0.1)
    gpu.backward(x, x, y if adds and relu else None, weight, weight, statistics, ghost, relu)
    return seen.values()


def compiled(kernel, arguments, warps, constants, capability):
    """As Triton's launcher would compile it for a device of that capability."""
    signature, values, attributes = {}, {}, {}
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    for position, name in enumerate(kernel.arg_names):
        value = given[name]
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], values[position,] = "constexpr", value
            continue
        signature[name] = TYPE_NAMES[value.dtype] if isinstance(value, torch.Tensor) else "fp32"
        if isinstance(value, int):
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_compiled(tmp_path, launched, capability, most_spilled):
    for kernel, arguments, warps, constants in launched:
        code = compiled(kernel, arguments, warps, constants, capability)
        label = f"{kernel.__name__} {constants} {warps} warps on sm_{capability}"
        vectors = re.findall(r"(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", code.asm["ptx"])
        if kernel.__name__ == "_fold":  # statistics of a few channels
            continue
        widths = {way: {int(n or 1) * int(bits) for w, n, bits in vectors if w == way} for way in ("ld", "st")}
        assert 128 in widths["ld"], label
        if "statistics" not in label and "_sums" not in label:
            assert 128 in widths["st"], label
        (tmp_path / "kernel.cubin").write_bytes(code.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(tmp_path / "kernel.cubin")]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        assert registers * 32 * warps <= 65536, label
        assert stack <= most_spilled, f"{label}: {stack} bytes"


@pytest.fixture
def _own_triton_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "triton"))


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.usefixtures("_own_triton_cache")
def test_kernels_compile_with_16_byte_accesses_and_without_spills(capability, monkeypatch, tmp_path):
    shape = (4096, 16, 32, 32)  # forward resident, backward split
    launched = launches(monkeypatch, shape, 32, "contiguous", torch.bfloat16, "relu", DEVICES[capability])
    check_compiled(tmp_path, launched, capability, most_spilled=0)


@pytest.mark.slow
@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("fusion", ["relu", "add_relu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "ghost"),
    [((4096, 16, 32, 32), 32), ((4096, 16, 32, 32), 128), ((4096, 64, 8, 8), 32), ((64, 256, 56, 56), 32)],
    ids=str,
)
@pytest.mark.usefixtures("_own_triton_cache")
def test_whole_tiles_compile_with_16_byte_accesses_and_hardly_a_spill(
    shape, ghost, layout, dtype, fusion, capability, monkeypatch, tmp_path
):
    launched = launches(monkeypatch, shape, ghost, layout, DTYPES[dtype], fusion, DEVICES[capability])
    # Triton 3.9 needs 64 bytes a thread at most, 3.6 needs 152 for the largest slabs of adjacent channels.
    check_compiled(tmp_path, launched, capability, most_spilled=152)


# ----------------------------------------------------------------------------------------------------------- on a device


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("fusion", FUSIONS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("shape", "ghost"),
        [
            ((70, 16, 8, 8), 16),
            ((70, 24, 32, 32), 32),
            ((300, 64, 32, 32), 64),
            ((9, 300, 56, 56), 4),
            ((1000, 130), 32),
        ],
        ids=str,
    )
    def test_outputs_statistics_and_gradients_are_those_of_batchnorm_on_each_ghost(
        self, shape, ghost, dtype, layout, fusion
    ):
        torch.manual_seed(0)
        dtype, (adds, relu) = DTYPES[dtype], FUSIONS[fusion]
        x, residual, dy = (laid_out(torch.randn(shape, device="cuda") + 2, layout).to(dtype) for _ in range(3))
        weight, bias = torch.rand(shape[1], device="cuda") + 0.5, torch.randn(shape[1], device="cuda")
        inputs = [tensor.requires_grad_() for tensor in (x, weight, bias, *[residual] * adds)]
        kernel = kernels.pick(x, ghost)
        y, mean, variance = kernel(*inputs[:3], ghost, 1e-5, *inputs[3:], relu=relu)
        true_y, true_mean, true_variance = oracle_on_gpu(*inputs[:3], ghost, *inputs[3:], relu=relu)

        assert y.stride() == x.stride()
        torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(variance.double(), true_variance, rtol=1e-5, atol=1e-6)
        error = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        torch.testing.assert_close(y.double(), true_y, rtol=error, atol=error)
        dy = dy * ((true_y > 1e-3) | (true_y == 0))
        ours, true = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(true_y, inputs, dy.double())
        for mine, other, exact in zip(ours, true, inputs, strict=True):
            # A parameter's gradient is a sum over the batch.
            atol = 10 * error if exact.dim() > 1 else 1e-4 * other.abs().max().item()
            torch.testing.assert_close(mine, other, rtol=10 * error, atol=atol)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
    def test_compiled_by_inductor(self):
        x = torch.randn(64, 16, 8, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)

        def layer(x):
            y, mean, _ = kernels.pick(x, 16)(x.sin(), None, None, 16, 1e-5, x, True)
            return y.cos(), mean

        compiled_layer = torch.compile(layer, fullgraph=True)
        results = [[*f(x), *torch.autograd.grad(f(x)[0].float().sum(), x)] for f in (layer, compiled_layer)]
        torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize(("ghosts", "channels"), [(1, 3), (32, 64), (500, 130)])
    def test_folding_is_one_ghost_after_the_other(self, ghosts, channels):
        mean, variance = torch.randn(ghosts, channels, device="cuda"), torch.rand(ghosts, channels, device="cuda")
        running = torch.randn(channels, device="cuda"), torch.rand(channels, device="cuda")
        true = [tensor.double() for tensor in running]
        for i in range(ghosts):
            for tensor, statistics in zip(true, (mean, variance), strict=True):
                tensor.lerp_(statistics[i].double(), 0.1)
        count = torch.tensor(7, device="cuda")
        folding = cpu.Folding(*running, count, cpu.Decay(ghosts, 0.9**ghosts, 0.9, 0.1))
        assert kernels.pick_fold(mean, folding[:3]) is cpu.fold
        cpu.fold(mean, variance, folding)
        torch.testing.assert_close([tensor.double() for tensor in running], true, rtol=1e-5, atol=1e-6)
        assert count == 7 + ghosts

    def test_captured_in_a_graph(self):
        x = torch.randn(64, 16, 32, 32, device="cuda")
        kernel = kernels.pick(x, 16)
        kernel(x, None, None, 16, 1e-5)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, *_ = kernel(x, None, None, 16, 1e-5)
        x.normal_(mean=3)
        graph.replay()
        torch.testing.assert_close(y, kernel(x, None, None, 16, 1e-5)[0], rtol=0, atol=0)

    def test_pick(self):
        x = torch.randn(8, 3, 2, 2, device="cuda")
        for dtype in DTYPES.values():
            assert kernels.pick(x.to(dtype), 4) is cpu.ghost_batch_norm
        assert kernels.pick(x.double(), 4) is None
        assert kernels.pick(x[..., :1, :1], 1) is None


def oracle_on_gpu(*arguments, **keywords):
    """`oracle` builds its running statistics where torch's default device is."""
    with torch.device("cuda"):
        return oracle(*arguments, **keywords)
