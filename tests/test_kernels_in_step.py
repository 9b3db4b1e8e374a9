"""Our kernels are what runs in a training step, by name and count; what they replace does not.

On any machine: the operators of a whole model, and the graphs that its compiled blocks become. On a
GPU: the kernels that the profiler saw in one step, and in one of the model without our kernels,
which shows that the names looked for are those that PyTorch gives.
"""

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from gptfast import parallel
from gptfast.attention import choose_attention
from gptfast.model import GPT, GPTConfig
from kernels.cross_entropy import CHUNKS
from kernels.product import LEAST_FILL, fill

LAYERS = 3
# A layer's two, the embedding's, and the head's.
NORMS = 2 * LAYERS + 2

# The GPU's step: rows, heads of 128, width.
ROWS, HEADS = 4096, 8
WIDTH = 128 * HEADS


def _products() -> dict[str, int]:
    """On Hopper two of a layer's end in the activation and its derivative; qkv's and the attention
    projection are ours, too, if they fill the GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return {"_squared_relu_fwd_kernel": LAYERS, "_squared_relu_bwd_kernel": LAYERS}
    programs = torch.cuda.get_device_properties("cuda").multi_processor_count
    ours = sum(fill(ROWS, n, programs) >= LEAST_FILL for n in (3 * WIDTH, WIDTH))
    return {"product_kernel": (2 + ours) * LAYERS}


KERNELS = {
    "_embedding_bwd_rows_kernel": 1,
    "_embedding_bwd_pieces_kernel": 1,
    "_embedding_bwd_long_rows_kernel": 1,
    "_rms_norm_fwd_kernel": NORMS,
    "_rms_norm_bwd_kernel": NORMS,
    "_rotary_qk_norm_fwd_kernel": LAYERS,
    "_rotary_qk_norm_bwd_kernel": LAYERS,
    **_products(),
    "_cross_entropy_tiles_kernel": CHUNKS,
    # The head's two gradients.
    "_scale_kernel": 2,
}
OPERATORS = {
    "embedding": 1,
    "embedding_bwd": 1,
    "rms_norm": 1,
    "add_rms_norm": NORMS - 1,
    "rms_norm_bwd": NORMS,
    "rotary_qk_norm": LAYERS,
    "rotary_qk_norm_bwd": LAYERS,
    "squared_relu_mlp": LAYERS,
    "squared_relu_mlp_bwd": LAYERS,
    "weight_gradient": LAYERS,
    "linear": 2 * LAYERS,
    "linear_cross_entropy_fwd": 1,
    "linear_cross_entropy_bwd": 1,
}
# What a compiled block computes besides attention; views and getitem move nothing.
FORWARD_GRAPH = {
    "gptfast.add_rms_norm": 2,
    "gptfast.rotary_qk_norm": 1,
    "gptfast.squared_relu_mlp": 1,
    "gptfast.linear": 2,
    # Of the weights of q, k and v; activations and their gradients are never copied together.
    "aten.cat": 1,
}
BACKWARD_GRAPH = {
    "gptfast.rms_norm_bwd": 2,
    "gptfast.rotary_qk_norm_bwd": 1,
    "gptfast.squared_relu_mlp_bwd": 1,
    "gptfast.weight_gradient": 1,
    "aten.mm": 5,
}
MOVES_NOTHING = re.compile(r"getitem|aten\.(t|view|_unsafe_view|transpose|slice|detach|alias)\b")
# Kernels of the model without ours: PyTorch's own, and those that Inductor makes of its parts.
REPLACED = {
    "embedding's gradient": "compute_grad_weight|sum_and_scatter|embedding_backward",
    "norm": "rsqrt",
    "softcap": "tanh",
    "softmax": "SoftMax|log_softmax",
    "cross-entropy": "nll_loss",
    "squared ReLU": "triton_.*relu",
}

# Of what is its own affair; so do FSDP and the profiler.
compiler_may_warn = pytest.mark.filterwarnings("default")


def model_of(
    kernels: str, sequence_len: int = 8, head_dim: int = 16, n_head: int = 2
) -> Callable[..., GPT]:
    config = GPTConfig(
        sequence_len=sequence_len,
        vocab_size=16 * sequence_len,
        n_layer=LAYERS,
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_head * head_dim,
    )
    return partial(GPT, config, kernels=kernels)


def step(model: GPT, rows: int = 2) -> None:
    config, device = model.config, model.cos.device
    shape = (rows, config.sequence_len)
    ids, targets = torch.randint(config.vocab_size, (2, *shape), device=device)
    model(ids.int(), targets).backward()


def initialised(model: GPT) -> GPT:
    model.init_weights()
    return model


class Dispatched(TorchDispatchMode):
    """Counts operators by their names, "aten.mm"."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def test_model_is_made_of_our_operators():
    model = initialised(model_of("triton")(attention_backend="flash2"))
    with Dispatched() as seen:
        step(model)
    ours = {n.removeprefix("gptfast."): c for n, c in seen.counts.items() if "gptfast" in n}
    assert ours == OPERATORS
    replaced = re.compile(
        r"rsqrt|tanh|softmax|nll_loss|cross_entropy|relu|threshold|stack|mean|embedding_"
    )
    aten = [n for n in seen.counts if "aten" in n and "scaled_dot_product" not in n]
    assert [n for n in aten if replaced.search(n)] == []
    assert seen.counts["aten.cat"] == LAYERS


@compiler_may_warn
def test_compiled_blocks_are_products_attention_and_our_operators():
    """Nothing is left that Inductor would make a kernel of, but the weights' packing."""
    torch._dynamo.reset()
    graphs = {"forward": [], "backward": []}

    def keep(name, graph, _):
        nodes = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        names = (name.removesuffix(".default") for name in nodes)
        work = Counter(name for name in names if not MOVES_NOTHING.search(name))
        graphs[name].append({n: c for n, c in work.items() if "scaled_dot_product" not in n})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=partial(keep, "forward"), bw_compiler=partial(keep, "backward")
    )
    model = initialised(model_of("triton")(attention_backend="flash2"))
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    step(model)
    # One of each: every block runs the same code.
    assert graphs == {"forward": [FORWARD_GRAPH], "backward": [BACKWARD_GRAPH]}


def kernels_of_the_package() -> set[str]:
    modules = (
        importlib.import_module(f"kernels.{info.name}")
        for info in pkgutil.iter_modules(kernels.__path__)
    )
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def test_kernels_have_these_names():
    assert set(KERNELS) <= kernels_of_the_package()


def kernels_of_a_step(make_gpt) -> Counter:
    """Name -> how often it ran on the GPU, in one step as training makes it."""
    with parallel.start() as world:
        attention = choose_attention("auto", world.device, torch.bfloat16, head_dim=128)
        model = parallel.build_sharded(
            partial(make_gpt, attention_backend=attention.backend),
            world,
            compute_dtype=torch.bfloat16,
            reshard_after_forward=False,
            compile_blocks=True,
            seed=1,
        )
        for _ in range(2):
            step(model, rows=8)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
            step(model, rows=8)
            torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return Counter(event.name for event in profiled.events() if event.device_type == on_gpu)


@compiler_may_warn
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_kernels_of_a_step(name):
    torch._dynamo.reset()
    # So wide that the products are ours.
    ran = kernels_of_a_step(model_of(name, sequence_len=ROWS // 8, head_dim=128, n_head=HEADS))
    ours = {kernel: ran[kernel] for kernel in kernels_of_the_package() if ran[kernel]}
    replaced = {
        what: [kernel for kernel in ran if re.search(pattern, kernel)]
        for what, pattern in REPLACED.items()
    }
    if name == "reference":
        assert ours == {}
        assert all(replaced.values()), f"no longer PyTorch's names: {replaced} of {sorted(ran)}"
        return
    assert ours == KERNELS
    assert not any(replaced.values()), replaced
    inductors = {kernel: count for kernel, count in ran.items() if kernel.startswith("triton_")}
    # Of the weights of q, k and v, in one launch or three.
    assert all("cat" in kernel for kernel in inductors), inductors
    assert sum(inductors.values()) <= 3 * LAYERS, inductors
