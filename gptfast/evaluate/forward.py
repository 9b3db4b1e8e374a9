"""Forward passes of evaluations: many sequences together, only the logits that are asked for.

Plain PyTorch calls without a compiler, as every batch has a shape of its own; and nothing here
waits for the device, so that the host prepares the next batch while it computes.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptfast.model import GPT, Attend

# Enough for products near full rate; larger batches hold rows of more different lengths, and pad
# more: all of CORE at 500 examples a task, 8 % at twice as many tokens, 6 % at these.
BATCH_TOKENS = 16_384
# Not cuDNN: it plans every new shape, and here each batch has its own.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def groups(
    sizes: Sequence[tuple[int, ...]], *, batch_tokens: int, most: int | None = None
) -> Iterator[list[int]]:
    """Indices of rows, the largest first, in groups of at most `most` rows that padded have at
    most `batch_tokens` tokens; a row that is larger is a group.

    sizes: of each row, how many tokens each of its parts has; parts are padded one by one.
    """
    # Largest first: what does not fit in memory fails at once.
    order = sorted(range(len(sizes)), key=lambda i: -sum(sizes[i]))
    group: list[int] = []
    widest: tuple[int, ...] = ()
    for i in order:
        wider = tuple(map(max, widest, sizes[i])) if group else sizes[i]
        full = (len(group) + 1) * sum(wider) > batch_tokens or len(group) == most
        if group and full:
            yield group
            group, wider = [], sizes[i]
        group.append(i)
        widest = wider
    if group:
        yield group


def trunk(
    model: GPT, ids: Tensor, cos: Tensor, sin: Tensor, attend: Attend | None = None
) -> tuple[Tensor, Tensor]:
    """Residual and branch after the last block, (B, T, C) each, for ids (B, T).

    cos, sin: (T, D/2). attend: instead of the model's own causal attention.
    """
    residual = model.transformer["wte"](ids)
    branch = torch.zeros_like(residual)
    for block in model.blocks:
        residual, branch = block(residual, branch, cos, sin, attend=attend)
    return residual, branch


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, T, H, D), k and v (B, S, Hkv, D) -> (B, T, H, D); causal, T = S, if there is no mask
    (B, 1, T, S).

    In fp32, whatever they are: kernels for bf16 round softmax's weights in each their own way, and
    an item that shares its beginning would not be scored as it is alone.
    """
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    if q.shape[1] != k.shape[1]:
        # Not every backend takes fewer heads of k and v.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(_BACKENDS):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return y.transpose(1, 2).to(dtype)


def logits(model: GPT, residual: Tensor, branch: Tensor, rows: Tensor) -> Tensor:
    """fp32 (N, U) behind N tokens, residual and branch (N, C), for some rows (U, C) of the head's
    weight in fp32: answers are compared by differences smaller than bf16's spacing near a logit of
    8, which is 1/32."""
    config = model.config
    _, x = model.lm_head.ops.add_rms_norm(residual[None], branch[None], eps=config.norm_eps)
    return config.softcap * torch.tanh(F.linear(x[0].float(), rows) / config.softcap)
