"""Sharding units: what gathers and reduces together changes nothing of what is computed."""

import pytest
import torch

from gptfast import parallel
from gptfast.errors import UserError
from gptfast.model import GPT, GPTConfig

CONFIG = GPTConfig(sequence_len=8, vocab_size=37, n_layer=3, n_head=2, n_kv_head=2, n_embd=16)


def build(world: parallel.World, compute_dtype: torch.dtype) -> GPT:
    return parallel.build_sharded(
        lambda: GPT(CONFIG),
        world,
        compute_dtype=compute_dtype,
        reshard_after_forward=False,
        compile_blocks=False,
        seed=1,
    )


@pytest.mark.parametrize(
    ("nodes", "reshard", "blocks"), [(1, False, 10), (2, False, 1), (1, True, 1)]
)
def test_units_are_large_where_that_costs_little(nodes, reshard, blocks):
    assert parallel.blocks_per_unit(nodes, reshard_after_forward=reshard) == blocks


@pytest.mark.parametrize(
    ("name", "hip", "capability", "words"),
    [
        ("AMD Instinct MI300X", "6.4", (9, 4), "kernels are for NVIDIA's GPUs: give --device cpu"),
        ("Tesla T4", None, (7, 5), r"a Tesla T4 of compute capability 7\.5, and bf16 takes 8\.0"),
    ],
)
def test_a_gpu_that_cannot_train_is_refused_at_once(monkeypatch, name, hip, capability, words):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    with pytest.raises(UserError, match=words), parallel.start():
        pass
    with parallel.start(cpu=True) as world:
        assert world.device.type == "cpu"


@pytest.mark.parametrize(("blocks", "units"), [(1, 5), (2, 4), (10, 3)])
def test_a_step_in_units_of_several_blocks(monkeypatch, blocks, units):
    monkeypatch.setattr(parallel, "BLOCKS_PER_UNIT", blocks)
    ids = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
    with parallel.start(cpu=True) as world:
        sharded = build(world, torch.float32)
        states = {id(m._get_fsdp_state()) for m in sharded.modules() if hasattr(m, "unshard")}
        # Embedding, blocks, head; and the root, with no parameters of its own.
        assert len(states) == units + 1
        plain = parallel.gather_replica(sharded, GPT(CONFIG))
        # Two passes, of which the second reduces what both add up to.
        for last in (False, True):
            parallel.synchronise_gradients(sharded, last)
            losses = [model(ids[:, :-1], ids[:, 1:]) for model in (sharded, plain)]
            assert losses[0] == losses[1]
            for loss in losses:
                loss.backward()
        expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
        for name, parameter in sharded.named_parameters():
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name])
            assert parameter.grad.full_tensor().any() == expected[name].any()


def test_alone_gradients_stay_where_they_are(monkeypatch):
    """Nothing is copied, divided or asked for that is not used, over steps of one or two passes."""
    given = []
    allocate = parallel.InPlace.allocate

    def seen(self, *size, **more):
        given.append(allocate(self, *size, **more))
        return given[-1]

    monkeypatch.setattr(parallel.InPlace, "allocate", seen)
    ids = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
    with parallel.start(cpu=True) as world:
        sharded = build(world, torch.bfloat16)
        for passes in (1, 2, 1):
            given.clear()
            sharded.zero_grad()
            for at in range(passes):
                parallel.synchronise_gradients(sharded, at == passes - 1)
                loss = sharded(ids[:, :-1], ids[:, 1:])
                with torch.profiler.profile(acc_events=True) as profiled:
                    loss.backward()
            # Head, blocks, embedding: each for what is reduced, and for the result.
            memory = [tensor.data_ptr() for tensor in given]
            assert memory[::2] == memory[1::2]
            assert len(memory) == 6
            gradients = [p.grad.to_local() for p in sharded.parameters()]
            assert {g.untyped_storage().data_ptr() for g in gradients} == {*memory}
            reduces = [e for e in profiled.events() if "post_backward_reduce" in e.name]
            assert len(reduces) == 3
            calls = {child.name for event in reduces for child in event.cpu_children}
            assert "fsdp::chunk_cat" in calls
            assert not {"aten::div", "aten::div_"} & calls


def test_no_gradient_is_kept_that_nobody_wants():
    """Of the zeros that the first block adds to the embedding."""
    model = GPT(CONFIG)
    model.init_weights()
    ids = torch.randint(37, (2, 9))
    loss = model(ids[:, :-1], ids[:, 1:])
    with torch.profiler.profile(acc_events=True) as profiled:
        loss.backward()
    kept = [e for e in profiled.events() if e.name == "torch::autograd::AccumulateGrad"]
    assert len(kept) == len([*model.parameters()])
