"""The plain GPT on pieces of sequences: a prompt at once or in chunks, then a token at a time.

Reads the weights of a `gptfast.model.GPT` and computes what its forward computes, but attends to a
KVCache. Two entries: `prefill` runs chunks of several sequences from one position on; `decode` runs
one token of every row, each row at a position of its own. Decoding takes the batch as a sequence:
operators see (1, B, C), and angles gathered for each row stand where those of T positions would.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.attention import attention
from gptfast.engine.few_rows import FewRowsStep, supports
from gptfast.engine.kv_cache import KVCache
from gptfast.model import GPT, BlockWeights, GPTConfig, block_forward
from kernels import Operators, operators

# With this option Inductor makes sums of the products with a single row, and tunes and fuses them
# like any other sum, instead of calling a library made for matrices.
INDUCTOR = partial(
    torch.compile, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": True}
)


class CachedGPT:
    """A GPT that continues what a KVCache holds.

    Args:
        model: plain (not sharded, not compiled); it is not changed. Its parameters may change in
            place between calls: `refresh` then renews the one copy that is kept, of q, k and v
            side by side.
        few_rows: decode with hand-written kernels (gptfast/engine/few_rows.py) where the model's
            operators are such and these take the model and the number of rows; see `decodes_by`.
        compile: such as INDUCTOR: makes decoding faster; None runs it as it is. Compiled blocks
            decode with the operators in plain PyTorch, which can be fused with their surroundings.
    """

    def __init__(
        self, model: GPT, *, compile: Callable | None = None, few_rows: bool = False
    ) -> None:
        self.model, self.config = model, model.config
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.context = len(model.cos)
        self.ops = model.blocks[0].ops
        backend = model.blocks[0].attention_backend
        # cuDNN plans every new shape, and prompts have all of them; flash2 runs wherever it does.
        self._attention = "flash2" if backend == "cudnn" else backend
        self.weights = [
            BlockWeights(*(weight.detach() for weight in block.weights())) for block in model.blocks
        ]
        self._few_rows = few_rows and self.ops.name == "triton"
        self._few_rows_steps: dict[int, FewRowsStep] = {}
        self._decode_head = model.lm_head
        self._decode_block = partial(_decode_block, self.config, self.ops, cached_attention)
        self._compiled = compile is not None
        if compile is not None:
            self._decode_head = compile(model.lm_head)
            self._decode_block = partial(
                compile(_decode_block), self.config, operators("reference"), fused_attention
            )

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights as they are now."""
        for weights, block in zip(self.weights, self.model.blocks, strict=True):
            weights.qkv.copy_(block.attn.packed_qkv())

    def new_cache(self, rows: int, length: int) -> KVCache:
        return KVCache(self.config, rows, length, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def prefill(
        self, cache: KVCache, rows: Tensor, ids: Tensor, *, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Run ids (B, T) at positions start to start + T of the cache's `rows` (B,).

        The rows must hold valid positions up to `start`. Returns the last block's (residual,
        branch), (B, T, C) each: `head` takes those tokens that logits are wanted of.
        """
        end = start + ids.shape[1]
        self._check(cache, end)
        cos, sin = self.model.cos[start:end], self.model.sin[start:end]
        residual = self.model.transformer["wte"](ids)
        branch = torch.zeros_like(residual)
        for i, weights in enumerate(self.weights):
            attend = partial(_extend_rows, cache.k[i], cache.v[i], rows, start, self._attention)
            residual, branch = block_forward(
                self.config, self.ops, attend, weights, residual, branch, cos, sin
            )
        return residual, branch

    @torch.no_grad()
    def head(self, residual: Tensor, branch: Tensor) -> Tensor:
        """fp32 logits (N, V) behind each of N tokens, residual and branch (N, C)."""
        return self.model.lm_head(residual[None], branch[None])[0]

    def decodes_by(self, rows: int) -> str:
        """Who decodes so many rows: "kernels", "compiled" or "operators"."""
        if self._few_rows and supports(self.config, rows):
            return "kernels"
        return "compiled" if self._compiled else "operators"

    def _few_rows_step(self, rows: int) -> FewRowsStep:
        if rows not in self._few_rows_steps:
            self._few_rows_steps[rows] = FewRowsStep(self.model, self.weights, rows)
        return self._few_rows_steps[rows]

    @torch.no_grad()
    def decode(self, cache: KVCache, ids: Tensor, positions: Tensor, length: int) -> Tensor:
        """Run one token of each of the cache's first B rows.

        ids and positions (B,) int64; row b must hold valid positions below positions[b]. `length`,
        beyond the largest position, is how much of the cache is read. Returns fp32 logits (B, V).
        """
        self._check(cache, length)
        if self.decodes_by(len(ids)) == "kernels":
            with torch.cuda.device_of(ids):
                return self._few_rows_step(len(ids))(cache, ids, positions, length)
        cos, sin = self.model.cos[positions], self.model.sin[positions]
        residual = self.model.transformer["wte"](ids[None])
        branch = torch.zeros_like(residual)
        for i, weights in enumerate(self.weights):
            keys, values = cache.layer(i, len(ids), length)
            if self._compiled:
                # Once for all lengths.
                torch._dynamo.maybe_mark_dynamic(keys, 1)
                torch._dynamo.maybe_mark_dynamic(values, 1)
            residual, branch = self._decode_block(
                weights, residual, branch, cos, sin, positions, keys, values
            )
        return self._decode_head(residual, branch)[0]

    @torch.no_grad()
    def step(
        self, cache: KVCache, fed: Tensor, sampled: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """`decode` of fed (2, B) int64, ids and positions: an id below 0 stands for the row's
        token in sampled (B,). Returns logits (B, V) and the likeliest token of each (B,)."""
        known, positions = fed
        logits = self.decode(cache, torch.where(known < 0, sampled, known), positions, length)
        return logits, logits.argmax(-1)

    def _check(self, cache: KVCache, end: int) -> None:
        if end > cache.length:
            raise ValueError(f"{end} positions, but the cache holds {cache.length}")


def _decode_block(
    config: GPTConfig,
    ops: Operators,
    attention_to_cache: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    weights: BlockWeights,
    residual: Tensor,
    branch: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of every row: residual and branch (1, B, C), cos and sin (B, D/2), positions (B,);
    keys and values (B, T, Hkv, D) take each row's new ones."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = torch.arange(len(positions), device=positions.device)
        keys[rows, positions] = k[0]
        values[rows, positions] = v[0]
        visible = torch.arange(keys.shape[1], device=positions.device) <= positions[:, None]
        y = attention_to_cache(q.transpose(0, 1), keys, values, visible[:, None])
        return y.transpose(0, 1)

    return block_forward(config, ops, attend, weights, residual, branch, cos, sin)


def _extend_rows(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    start: int,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """Write k and v (B, T, Hkv, D) to positions from `start` of `rows`; attention of q (B, T, H, D)
    to all up to its own."""
    T = q.shape[1]
    end = start + T
    keys[rows, start:end] = k
    values[rows, start:end] = v
    if start == 0:
        return attention(q, k, v, backend=backend)
    visible = torch.ones(T, end, dtype=torch.bool, device=q.device).tril(start)
    return cached_attention(q, keys[rows, :end], values[rows, :end], visible[None])


def cached_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the visible positions.

    q (B, T, H, D); k and v (B, S, Hkv, D); visible (B or 1, T, S) bool. Returns (B, T, H, D).
    """
    B, T, H, D = q.shape
    Hkv = k.shape[2]
    # Heads that share keys become further queries of one head, so that keys are not repeated.
    q = q.unflatten(2, (Hkv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = visible[:, None].repeat(1, 1, H // Hkv, 1)
    y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return y.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """`cached_attention` for one query a row, T = 1, as products and sums that a compiler fuses.

    Fused, keys and values are read once and where they are, and a long row is the work of many
    programs. Not compiled, it makes tensors of B S H D fp32 elements.
    """
    B, _, H, D = q.shape
    q = q.view(B, 1, k.shape[2], -1, D).float() * D**-0.5
    scores = (q * k[:, :, :, None].float()).sum(-1)
    scores = scores.masked_fill(~visible.view(B, -1, 1, 1), float("-inf"))
    weight = scores.softmax(dim=1)
    y = (weight[..., None] * v[:, :, :, None].float()).sum(1)
    return y.view(B, 1, H, D).to(v.dtype)
