"""How much GPU memory a training run takes, estimated before any of it is allocated."""

from dataclasses import dataclass

from gptfast.model import GPTConfig, parameter_counts

GIB = 2**30
# What may be planned with of a GPU: PyTorch's allocator and CUDA itself need room beside what is
# counted.
USABLE_SHARE = 0.92

# With --kernels reference, at the largest: a chunk's logits in bf16 or fp32, its fp32 logits, their
# tanh, log-probabilities and gradients. Counted, and measured with whole logits (H200, 64.3 GiB for
# 2^32 of them, bench/results/kernels-h200.json).
_REFERENCE_BYTES_A_LOGIT = 16


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU, by part."""

    weights: int
    """fp32 shards of parameters, gradients and optimizer states, and the gathered bf16 weights."""
    activations: int
    """What backward needs of one micro-step."""
    transient: int
    """The largest passing buffers: a chunk of logits, the head's gradients, the exchange."""
    generator: int = 0
    """What answers between steps, and stays reserved."""

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.transient + self.generator

    def __str__(self) -> str:
        unit, name = (GIB, "GiB") if self.total >= GIB else (GIB / 1024, "MiB")
        parts = {
            "weights and optimizer": self.weights,
            "activations": self.activations,
            "transient": self.transient,
        }
        if self.generator:
            parts["generator"] = self.generator
        told = ", ".join(f"{part} {size / unit:.1f}" for part, size in parts.items())
        return f"{self.total / unit:.1f} {name} ({told})"


def estimate_memory(
    config: GPTConfig,
    *,
    device_batch_size: int,
    shards: int,
    accumulates: bool,
    logits_chunks: int,
    bytes_per_value: int = 2,
    reshard_after_forward: bool = False,
    generator: int = 0,
    kernels: str = "triton",
) -> MemoryEstimate:
    """Counted from what each part keeps; `shards` is the number of GPUs that share a copy.
    generator: bytes of MemoryEstimate.generator. kernels: as in SystemSettings, compiled by blocks.

    A block saves for backward, in units of tokens x width: two normed inputs (2), q, k and
    attention's output (3), the packed qkv product of which v is a view (3), and the squared
    ReLU (4); besides 8 bytes a head and token (softmax statistics and norms). With the reference
    kernels torch.compile keeps also two sums (2), rotated q and k (2) and the MLP's first product
    (4); backward makes about two more (d20, 32 x 2048, in one forward + backward on an H200:
    89.5 GiB, where ours take 44.4; bench/results/kernels-h200.json).
    """
    tokens = device_batch_size * config.sequence_len
    counts = parameter_counts(config)
    parameters = sum(counts.values())
    adam = counts["embedding"] + counts["head"]
    # fp32: parameter, gradient, and one (Muon) or two (Adam) moments.
    sharded = 4 * (2 * parameters + counts["blocks"] + 2 * adam) // shards
    # With resharding only the largest unit is whole at the peak: 0.9 GiB less for d20, as measured
    # with 2 and 32 sequences, in one pass a step and in two (H100, torch 2.11, 2026-11-23).
    largest = max(counts["head"], counts["blocks"] // config.n_layer)
    gathered = bytes_per_value * (largest if reshard_after_forward else parameters)
    gathered += 4 * parameters if accumulates else 0
    kv = config.n_kv_head * config.head_dim / config.n_embd
    units = 2 + (2 + kv) + (1 + 2 * kv) + 4
    bytes_per_logit = bytes_per_value
    if kernels == "reference":
        units += 2 + (1 + kv) + 4 + 2
        bytes_per_logit = _REFERENCE_BYTES_A_LOGIT
    per_block = tokens * config.n_embd * bytes_per_value * units
    per_block += 8 * tokens * (config.n_head + config.n_kv_head)
    ends = 4 * tokens * config.n_embd * bytes_per_value
    logits = -(-tokens // logits_chunks) * config.vocab_size * bytes_per_logit
    head = counts["head"] * (4 + bytes_per_value) + 2 * tokens * config.n_embd * bytes_per_value
    return MemoryEstimate(
        weights=int(sharded + gathered),
        activations=int(config.n_layer * per_block + ends),
        transient=int(logits + head),
        generator=generator,
    )


def largest_device_batch(
    available: int, config: GPTConfig, *, sequences: int | None = None, **settings
) -> int:
    """The most sequences of one micro-step whose estimate stays within `available` bytes; 0 if
    not even one does. sequences: of a step on one GPU, if micro-steps are to share them evenly."""
    batch = 0
    while (
        estimate_memory(config, device_batch_size=batch + 1, **settings).total <= available
        and batch < 4096
    ):
        batch += 1
    while batch and sequences is not None and sequences % batch:
        batch -= 1
    return batch


def checkpoint_bytes(config: GPTConfig) -> int:
    """Of one checkpoint: fp32, a parameter and its momentum for Muon, and two moments for AdamW."""
    counts = parameter_counts(config)
    return 4 * (2 * counts["blocks"] + 3 * (counts["embedding"] + counts["head"]))
