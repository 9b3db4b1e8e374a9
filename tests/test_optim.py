"""Muon and AdamW in one process: the kernels' passes, how matrices travel, what is refused."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gptfast import optim
from gptfast.config import LearningSettings
from gptfast.errors import UserError
from gptfast.model import GPT, GPTConfig
from gptfast.optim import (
    AdamWGroup,
    Grid,
    Optimizer,
    adamw_learning_rate,
    assemble,
    build_optimizer,
    disassemble,
    muon_operators,
    packet,
    unpack,
)
from kernels.muon import add_update, add_update_ref, nesterov, nesterov_ref
from kernels.newton_schulz import newton_schulz_ref
from tests.operators import host_never_waits, poisoned_memory
from tests.optim_cases import (
    STEPS,
    Toy,
    assert_follows,
    assert_near,
    gradients_of,
    operators_of,
    optimizer_of,
    oracle,
    train,
    whole,
)

__all__ = ["oracle"]


def test_kernels_follow_the_plain_implementation(oracle, monkeypatch):
    """The passes that a GPU makes, interpreted; also where a step is skipped."""
    monkeypatch.setattr(optim, "nesterov_ref", nesterov)
    monkeypatch.setattr(optim, "add_update_ref", add_update)
    assert_follows(train(None), oracle, "kernels")


def test_the_reference_has_no_kernel_of_ours(monkeypatch):
    reference = (newton_schulz_ref, nesterov_ref, add_update_ref)
    assert muon_operators("reference", torch.device("cuda")) == reference
    ours = muon_operators("triton", torch.device("cuda"))
    assert ours == (optim.newton_schulz, nesterov, add_update)

    monkeypatch.setattr(optim, "muon_operators", lambda *asked: asked)
    config = GPTConfig(sequence_len=8, vocab_size=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
    for kernels in ("triton", "reference"):
        optimizer = build_optimizer(GPT(config), LearningSettings(), kernels=kernels)
        assert optimizer.operators == (kernels, torch.device("cpu"))


def packed(shards: Tensor, n_rows: int, grid: Grid) -> Tensor:
    with poisoned_memory():
        room = packet(shards, n_rows, grid)
    unpack(room, shards.shape).copy_(shards)
    return room


@pytest.mark.parametrize("grid", [(1, 1), (1, 8), (2, 4), (3, 2), (5, 1)], ids=str)
@pytest.mark.parametrize(("n", "R"), [(7, 16), (24, 12), (1, 3), (3, 1)], ids=str)
def test_exchange_assembles_whole_matrices_and_returns_every_row(grid, n, R):
    n_replicas, n_shards = grid
    matrices = torch.randn(n, R, 5).bfloat16()
    # As FSDP2 cuts rows: chunks of ceil(R / n_shards), then a shorter one, then empty ones.
    shards = list(matrices.chunk(n_shards, dim=1))
    shards += [matrices[:, :0]] * (n_shards - len(shards))
    sent = [packed(shard, R, Grid(n_replicas, n_shards)) for shard in shards]
    gathered = [[] for _ in range(n_shards)]
    held = []
    for replica in range(n_replicas):
        whole = [
            assemble(torch.stack([packets[replica, owner] for packets in sent]), R)
            for owner in range(n_shards)
        ]
        held += whole
        returned = [disassemble(matrix, n_shards) for matrix in whole]
        for rank in range(n_shards):
            gathered[rank].append(torch.stack([rows[rank] for rows in returned]))
    held = torch.cat(held)
    assert torch.equal(held[:n], matrices)
    assert not held[n:].any()
    for rank, shard in enumerate(shards):
        assert torch.equal(unpack(torch.stack(gathered[rank]), shard.shape), shard)


def test_one_process_moves_nothing():
    shards = torch.randn(3, 4, 5)
    send = packed(shards, 4, Grid())
    whole = assemble(send[0], 4)
    returned = unpack(disassemble(whole, 1).unsqueeze(0), shards.shape)
    assert send.data_ptr() == whole.data_ptr() == returned.data_ptr()


def test_learning_rate_falls_with_the_root_of_the_width():
    assert adamw_learning_rate(0.2, 768) == 0.2
    assert adamw_learning_rate(0.2, 3072) == 0.1
    assert adamw_learning_rate(0.004, 1280) == pytest.approx(0.0030983867)


def take_step(optimizer: Optimizer, tokens: int = 1) -> None:
    optimizer.step(
        lr_multiplier=1.0, momentum=0.9, token_count=torch.tensor(tokens), loss=torch.tensor(1.0)
    )


def test_no_clipping_with_an_infinite_limit():
    head = nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer(
        {}, [AdamWGroup({"head": head}, 0.1)], operators=operators_of("cpu"), max_norm=math.inf
    )
    head.grad = torch.full((2, 2), 800.0)
    take_step(optimizer, tokens=4)
    assert torch.equal(optimizer.state_dict()["head.exp_avg"], torch.full((2, 2), 40.0))


def test_wrong_parameters_are_refused_by_name():
    weight = nn.Parameter(torch.ones(2, 2))
    make = partial(Optimizer, operators=operators_of("cpu"))
    with pytest.raises(ValueError, match="2 parameters given under 1 different names"):
        make({"a": weight}, [AdamWGroup({"a": weight}, 0.1)])
    with pytest.raises(ValueError, match=r"a is torch\.bfloat16; master weights are float32"):
        make({"a": nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))}, [])
    with pytest.raises(ValueError, match=r"a has shape \(2,\); Muon trains matrices"):
        make({"a": nn.Parameter(torch.ones(2))}, [])
    with pytest.raises(RuntimeError, match="a has no gradient"):
        take_step(make({"a": weight}, []))


def test_state_of_another_model_is_refused():
    optimizer = optimizer_of(Toy())
    state = optimizer.state_dict()
    del state["small.momentum"]
    with pytest.raises(UserError, match=r"1 missing \(first \['small.momentum'\]\), 0 unexpected"):
        optimizer.load_state_dict(state)
    state["small.momentum"] = torch.zeros(1, 5)
    with pytest.raises(UserError, match=r"small.momentum: local shape \(1, 5\) given, \(3, 5\)"):
        optimizer.load_state_dict(state)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_on_a_gpu_no_step_waits_for_the_host(kernels, oracle):
    model = Toy("cuda")
    optimizer = optimizer_of(model, kernels=kernels)
    for index in range(2):
        model({name: g.cuda() for name, g in gradients_of(index).items()}).backward()
        inputs = {"token_count": torch.tensor(STEPS[index]["tokens"], device="cuda")}
        inputs |= {"loss": torch.zeros((), device="cuda")}
        options = {key: STEPS[index][key] for key in ("lr_multiplier", "momentum")}
        with host_never_waits():
            optimizer.step(**options, **inputs)
    assert_near(whole(dict(model.named_parameters())), oracle[1]["parameters"], "cuda")
