"""Chrome traces as a GPU's profiler writes them, made of kernels with times that a test knows; and
two layers of d20's step, with the kernels that an H200's profile listed."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from gptfast.ledger import Ceilings, Job, Ledger, build
from gptfast.ledger.trace import STEP, stretch
from gptfast.model import GPTConfig

D20 = GPTConfig()
JOB = Job(replace(D20, n_layer=2), batch=32, accumulation=1, processes=4, shards=4)
CEILINGS = Ceilings(copy=4.3e12, product=800e12)

MAIN_STREAM, COMM_STREAM = 7, 20
_MAIN_THREAD, _BACKWARD_THREAD = 100, 101


class FakeTrace:
    """A host that runs far ahead of its GPU, unless `wait` holds it back.

    `with op(...)` opens an operator or a scope; `kernel(...)` launches one within it, on the main
    stream right behind the kernel before, or `beside` it. Times are microseconds.
    """

    def __init__(self) -> None:
        self.events: list[dict] = []
        self.host = 1000.0
        self.device = 5000.0
        self.comm = 0.0
        self._correlation = itertools.count(1)
        self._thread = _MAIN_THREAD

    @contextmanager
    def op(
        self,
        name: str,
        dims: Sequence = (),
        strides: Sequence = (),
        types: Sequence[str] = (),
        scalars: Sequence[str] = (),
        category: str = "cpu_op",
    ) -> Iterator[None]:
        begin, thread = self.host, self._thread
        self.host += 1
        yield
        self.host += 1
        args = {
            "External id": len(self.events),
            "Input Dims": dims,
            "Input Strides": strides,
            "Input type": types,
            "Concrete Inputs": scalars,
        }
        self._add(category, name, begin, self.host - begin, thread, args)

    def scope(self, name: str):
        return self.op(name, category="user_annotation")

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        with self.scope(f"{STEP} {number}"):
            yield

    @contextmanager
    def backward(self, node: str = "MmBackward0") -> Iterator[None]:
        """On autograd's own thread."""
        self._thread = _BACKWARD_THREAD
        with self.op(f"autograd::engine::evaluate_function: {node}"):
            yield
        self._thread = _MAIN_THREAD

    def kernel(
        self, name: str, us: float, *, beside: bool = False, gap: float = 0.0, **args
    ) -> None:
        """Launch now; on the GPU behind what is there already, after a gap if one is asked for."""
        begin = max(self.comm, self.device) if beside else self.device + gap
        number = next(self._correlation)
        self._add("cuda_runtime", "cudaLaunchKernel", self.host, 1, self._thread, {}, number)
        self.host += 1
        stream = COMM_STREAM if beside else MAIN_STREAM
        category = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
        args = {"device": 0, "stream": stream, **args}
        self._add(category, name, begin, us, stream, args, number)
        if beside:
            self.comm = begin + us
        else:
            self.device = begin + us

    def host_waits_for_gpu(self, then: float = 0.0) -> None:
        """The host catches up with the GPU, and launches nothing for so long after."""
        self.host = max(self.host, self.device, self.comm) + then
        self.device = max(self.device, self.comm)

    def _add(self, category, name, begin, duration, thread, args, correlation=None) -> None:
        if correlation is not None:
            args = {**args, "correlation": correlation}
        self.events.append(
            {
                "ph": "X",
                "cat": category,
                "name": name,
                "pid": 1,
                "tid": thread,
                "ts": begin,
                "dur": duration,
                "args": args,
            }
        )

    def json(self) -> dict:
        return {"schemaVersion": 1, "traceEvents": self.events}


# d20: tokens of a micro-step, width, vocabulary.
M, C, V = 65536, 1280, 65536
BF16 = "c10::BFloat16"

FWD, DGRAD, WGRAD = "forward", "input gradient", "weight gradient"


def product(trace: FakeTrace, m: int, k: int, n: int, direction: str, kernel: str, us: float):
    """A product as Inductor calls it, operands laid out as they are in that direction."""
    a = [1, m] if direction == WGRAD else [k, 1]
    b = [1, k] if direction == FWD else [n, 1]
    with trace.op("aten::mm", [[m, k], [k, n], [m, n]], [a, b, [n, 1]], [BF16] * 3):
        trace.kernel(kernel, us)


def d20_step(trace: FakeTrace) -> None:
    """Two of d20's layers, its head in eight chunks, its optimizer; kernels by the names that an
    H200's profiler gave them (torch 2.11, cuDNN 9.19), microseconds about as measured."""
    rows = [[M, C]]
    with (
        trace.scope("FSDP::pre_forward (transformer.wte)"),
        trace.op("c10d::_allgather_base_"),
    ):
        trace.kernel(
            "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            300,
            beside=True,
            **{
                "Collective name": "_allgather_base",
                "In msg nelems": 1000,
                "Out msg nelems": 4000,
                "Group size": 4,
                "dtype": "BFloat16",
            },
        )
    trace.host_waits_for_gpu()
    with trace.op("aten::embedding", [[V, C], [32, 2048]], [], [BF16, "int"]):
        trace.kernel("void at::native::vectorized_gather_kernel<16, int>", 80)
    for _ in range(2):
        with trace.op("CompiledFunction"), trace.scope("## Call CompiledFxGraph f1 ##"):
            with trace.op(
                "gptfast::add_rms_norm",
                [*rows * 2, [], []],
                [],
                [BF16, BF16, "", "Scalar"],
                ["", "", "", "1e-06"],
            ):
                trace.kernel("_rms_norm_fwd_kernel", 158)
            with trace.op("triton_poi_fused_cat_0", [[C, C]] * 3, [], [BF16] * 3):
                trace.kernel("triton_poi_fused_cat_0", 8)
            product(trace, M, C, 3 * C, FWD, "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", 900)
            qkv = ([[32, 2048, 3 * C], [2048, 64], [2048, 64], [], [], [], []], [])
            types = [BF16, "float", "float", *["Scalar"] * 4]
            with trace.op(
                "gptfast::rotary_qk_norm", *qkv, types, ["", "", "", "10", "10", "1e-06", "0"]
            ):
                trace.kernel("_rotary_qk_norm_fwd_kernel", 164)
            with trace.op("aten::_scaled_dot_product_cudnn_attention"):
                trace.kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", 695)
            product(trace, M, C, C, FWD, "nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_TNN", 310)
            product(trace, M, C, 4 * C, FWD, "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", 1200)
            with trace.op("gptfast::squared_relu", [[32, 2048, 4 * C]], [], [BF16], [""]):
                trace.kernel("_squared_relu_fwd_kernel", 314)
            product(trace, M, 4 * C, C, FWD, "nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_TNN", 1219)
    with trace.op("gptfast::linear_cross_entropy_fwd"):
        for _ in range(8):
            chunk = M // 8
            product(trace, chunk, C, V, FWD, "nvjet_sm90_tst_320x128_64x3_1x2_h_TNT", 1900)
            trace.kernel("_cross_entropy_kernel", 986)
            product(
                trace, chunk, V, C, DGRAD, "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NNT", 1950
            )
            with trace.op(
                "aten::addmm",
                [[V, C], [V, chunk], [chunk, C]],
                [[C, 1], [1, V], [C, 1]],
                ["float", BF16, BF16],
            ):
                trace.kernel("nvjet_sm90_tss_320x128_64x3_1x2_h_badd_coopB_NTT", 1900)
    with trace.backward("CompiledFunctionBackward"):
        for _ in range(2):
            product(trace, C, M, 4 * C, WGRAD, "nvjet_sm90_tst_320x128_64x3_4x2_h_bz_NTT", 910)
            product(trace, M, C, 4 * C, DGRAD, "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_NNT", 1250)
            with trace.op("gptfast::squared_relu_bwd", [[M, 4 * C]] * 2, [], [BF16] * 2, [""] * 2):
                trace.kernel("_squared_relu_bwd_kernel", 457)
            product(trace, 4 * C, M, C, WGRAD, "nvjet_sm90_tst_128x256_64x4_4x2_h_bz_NTN", 1430)
            product(trace, M, 4 * C, C, DGRAD, "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_NNT", 1250)
            product(trace, C, M, C, WGRAD, "nvjet_sm90_tst_128x256_64x4_4x2_h_splitK_NTT", 312)
            product(trace, M, C, C, DGRAD, "nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_NNN", 312)
            with trace.op("aten::_scaled_dot_product_cudnn_attention_backward"):
                trace.kernel("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>", 170)
                trace.kernel("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", 1977)
                trace.kernel("void cudnn::fusion::convert_dq_to_16bits<true>", 133)
            product(trace, 3 * C, M, C, WGRAD, "nvjet_sm90_tst_128x256_64x4_4x2_h_bz_NTN", 1100)
            product(trace, M, 3 * C, C, DGRAD, "nvjet_sm90_tst_192x192_64x3_1x2_h_bz_NNN", 940)
    with (
        trace.backward("RegisterPostBackwardFunctionBackward"),
        trace.scope("FSDP::post_backward_reduce (transformer.h.1)"),
    ):
        trace.kernel("void at::native::detail::chunk_cat_cuda_kernel<float, c10::BFloat16>", 80)
        trace.kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 900, beside=True)
    with trace.backward("EmbeddingBackward0"), trace.op("aten::embedding_dense_backward"):
        trace.kernel("void at::native::compute_grad_weight<c10::BFloat16, int>", 598)
        trace.kernel("void at::native::sum_and_scatter<c10::BFloat16, int>", 534)
    with trace.op("aten::_foreach_norm"):
        trace.kernel("void at::native::multi_tensor_apply_kernel<TensorListMetadata<1>>", 636)
    with trace.op("aten::lerp"):
        trace.kernel("void at::native::vectorized_elementwise_kernel<4, lerp_scalar_kernel>", 2151)
    with trace.op("c10d::alltoall_base_"):
        trace.kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 700, beside=True)
    with trace.op("aten::_fused_adamw_"):
        trace.kernel("void at::native::multi_tensor_apply_kernel<FusedOptimizer>", 1753)
    trace.kernel("_symmetric_product_kernel", 7889)
    with trace.op("aten::bmm", [[20, C, C], [20, C, C]], [], [BF16] * 2):
        trace.kernel("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", 5000)


def d20_steps(number: int) -> FakeTrace:
    """Before the last kernel of each step the host is late by 2 ms."""
    trace = FakeTrace()
    for step in range(number):
        with trace.step(step):
            d20_step(trace)
            trace.host_waits_for_gpu(then=2000.0)
            trace.device = trace.host + 10
            with trace.op("aten::stack"):
                trace.kernel("void at::native::CatArrayBatchedCopy", 5)
    return trace


def d20_ledger() -> Ledger:
    """Of two steps of d20_steps; the one before fills the queue."""
    events = stretch(d20_steps(3).json())
    return build(events, JOB, "NVIDIA H200", CEILINGS, unprofiled_step_ms=70.0)
