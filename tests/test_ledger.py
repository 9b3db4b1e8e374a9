"""The ledger's rows add up to the step, and every kernel of a real d20 step finds its row."""

from dataclasses import replace

import pytest

from gptfast.ledger import Job, build, draw, table, to_json
from gptfast.ledger.book import HOST_LATE, WAITING, checks, unnamed_kernels, waterfall
from gptfast.ledger.costs import known_costs, newton_schulz_flops
from gptfast.ledger.kinds import (
    ADAMW,
    ATTENTION,
    COMMUNICATION,
    ELSE,
    GAPS,
    GRADIENT_NORM,
    MEMORY,
    MUON_ELEMENTWISE,
    NEWTON_SCHULZ,
    OPTIMIZER_GROUP,
    PRODUCTS,
    SHARDING,
    layer,
)
from gptfast.ledger.trace import stretch
from gptfast.model import GPTConfig, flops_per_token
from tests.fake_trace import (
    BF16,
    CEILINGS,
    D20,
    DGRAD,
    FWD,
    JOB,
    WGRAD,
    C,
    FakeTrace,
    M,
    V,
    d20_ledger,
)


def rows_of(ledger) -> dict[tuple[str, str], float]:
    return {(row.group, row.name): row.ms for row in ledger.rows}


@pytest.fixture(scope="module")
def ledger():
    return d20_ledger()


def test_rows_add_up_to_the_step(ledger):
    assert ledger.steps == 2
    assert sum(row.ms for row in ledger.rows) == pytest.approx(ledger.step_ms, rel=1e-9)
    assert abs(checks(ledger)["rows_missing"]) < 0.02
    assert unnamed_kernels(ledger) == []
    assert checks(ledger)["everything_else"] == 0.0


def test_every_kernel_of_a_real_step_finds_its_row(ledger):
    rows = rows_of(ledger)
    products = {
        "qkv, forward": 2 * 0.9,
        "qkv, input gradient": 2 * 0.94,
        "qkv, weight gradient": 2 * 1.1,
        "attention projection, forward": 2 * 0.31,
        "attention projection, input gradient": 2 * 0.312,
        "attention projection, weight gradient": 2 * 0.312,
        "mlp fc, forward": 2 * 1.2,
        "mlp fc, input gradient": 2 * 1.25,
        "mlp fc, weight gradient": 2 * 1.43,
        "mlp projection, forward": 2 * 1.219,
        "mlp projection, input gradient": 2 * 1.25,
        "mlp projection, weight gradient": 2 * 0.91,
        "head, forward": 8 * 1.9,
        "head, input gradient": 8 * 1.95,
        "head, weight gradient": 8 * 1.9,
    }
    assert {n: ms for (g, n), ms in rows.items() if g == PRODUCTS} == pytest.approx(products)
    assert rows[ATTENTION, "forward"] == pytest.approx(2 * 0.695)
    assert rows[ATTENTION, "backward"] == pytest.approx(2 * (0.17 + 1.977 + 0.133))
    memory = {
        "add_rms_norm": 2 * 0.158,
        "rotary_qk_norm": 2 * 0.164,
        "squared_relu": 2 * 0.314,
        "squared_relu_bwd": 2 * 0.457,
        "linear_cross_entropy_fwd": 8 * 0.986,
        "triton_poi_fused_cat_0": 2 * 0.008,
        "embedding, forward": 0.08,
        "embedding, backward": 0.598 + 0.534,
    }
    assert {n: ms for (g, n), ms in rows.items() if g == MEMORY} == pytest.approx(memory)
    optimizer = {
        NEWTON_SCHULZ: 7.889 + 5.0,
        ADAMW: 1.753,
        GRADIENT_NORM: 0.636,
        MUON_ELEMENTWISE: 2.151 + 0.005,
        "exchange (all-to-all)": 0.0,
    }
    assert {n: ms for (g, n), ms in rows.items() if g == OPTIMIZER_GROUP} == pytest.approx(
        optimizer
    )
    assert rows[SHARDING, "backward"] == pytest.approx(0.08)


def test_communication_is_split_into_exposed_and_hidden(ledger):
    by_name = {row.name: row for row in ledger.rows if row.group == COMMUNICATION}
    # Nothing else runs before the first all-gather is done; the reduction has the embedding beside.
    assert by_name["all-gather"].ms == pytest.approx(0.3)
    assert by_name["all-gather"].bytes == 4000 * 2 * 3 / 4
    assert by_name["reduce-scatter"].ms == 0.0
    assert by_name["reduce-scatter"].hidden_ms == pytest.approx(0.9)


def test_gaps_tell_a_late_host_from_latency(ledger):
    rows = rows_of(ledger)
    assert rows[GAPS, HOST_LATE] == pytest.approx(2.0, abs=0.01)
    assert 0 < rows[GAPS, WAITING] < 0.02


def test_flops_and_floors_of_rows(ledger):
    by_name = {(row.group, row.name): row for row in ledger.rows}
    fc = by_name[PRODUCTS, "mlp fc, forward"]
    assert fc.flops == 2 * 2 * M * C * 4 * C
    assert fc.floor_ms == pytest.approx(1e3 * fc.flops / CEILINGS.product)
    head = by_name[PRODUCTS, "head, weight gradient"]
    assert head.flops == 2 * M * C * V
    norm = by_name[MEMORY, "add_rms_norm"]
    # Two read, two written, and a reciprocal norm a row.
    assert norm.bytes == 2 * (4 * M * C * 2 + 4 * M)
    assert norm.floor_ms == pytest.approx(1e3 * norm.bytes / CEILINGS.copy)
    assert by_name[MEMORY, "squared_relu_bwd"].bytes == 2 * 3 * M * 4 * C * 2
    assert by_name[MEMORY, "linear_cross_entropy_fwd"].bytes == 2 * 2 * M * V
    assert all(row.floor_ms <= row.ms for row in ledger.rows)
    assert all(row.floor_ms == 0 for row in ledger.rows if row.group in (COMMUNICATION, GAPS))


def test_points_are_what_mfu_would_gain(ledger):
    fc = next(row for row in ledger.rows if row.name == "mlp fc, forward")
    # Without the profile's unprofiled time the ledger's MFU is the profiled step's.
    own = replace(ledger, unprofiled_step_ms=None)
    faster = replace(own, step_ms=own.step_ms - (fc.ms - fc.floor_ms))
    assert own.points(fc) == pytest.approx(100 * (faster.mfu() - own.mfu()))


def test_waterfall_ends_at_the_achieved_mfu(ledger):
    stages = waterfall(ledger)
    assert [name for name, _ in stages] == [
        "peak",
        "products",
        "attention",
        "memory-bound",
        "optimizer",
        "communication",
        "gaps",
    ]
    own = replace(ledger, unprofiled_step_ms=None)
    assert stages[0][1] == 100
    assert stages[-1][1] == pytest.approx(100 * own.mfu())
    values = [value for _, value in stages]
    # Half the square is not computed, so attention may cost less than the formula's FLOPs would.
    assert values[:2] == sorted(values[:2], reverse=True)
    assert values[2:] == sorted(values[2:], reverse=True)


def test_an_unknown_gpu_gets_no_invented_mfu(ledger, tmp_path):
    unknown = replace(ledger, device="NVIDIA RTX 9999")
    assert unknown.mfu() is None
    assert unknown.points(unknown.rows[0]) is None
    lines = table(unknown)
    assert any("tokens/s a GPU" in line and "FLOP/s" in line for line in lines)
    assert any(line.startswith("MFU: not shown") for line in lines)
    assert not any("%" in line and "MFU " in line for line in lines[:4])
    assert to_json(unknown)["mfu_report"] is None
    assert not draw(unknown, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_of_packed_documents_only_their_tokens_and_contexts_count(ledger):
    """As training's own rows do: a step's tokens, each with the FLOPs of its own context."""
    config, count = JOB.config, 3 * JOB.tokens
    flops = flops_per_token(config, context=500.0)
    packed = replace(
        ledger,
        unprofiled_step_ms=None,
        job=JOB._replace(tokens_per_step=count, flops_per_token=flops),
    )
    rate = count / 4 / (packed.step_ms / 1e3)
    assert packed.tokens_per_second == pytest.approx(rate)
    assert packed.mfu() == pytest.approx(rate * flops / 989e12)
    causal = flops_per_token(config, context=500.0, causal=True)
    assert packed.flops_per_second(causal=True) == pytest.approx(rate * causal)
    assert waterfall(packed)[-1][1] == pytest.approx(100 * packed.mfu())
    # 3 of 4 tokens, each of which sees 500 of 2,048.
    whole, _ = known_costs(ATTENTION, "forward", JOB)
    part, _ = known_costs(ATTENTION, "forward", packed.job)
    assert part == pytest.approx(whole * 3 / 4 * 500 / 2048)
    told = f"of which 49,152 tokens count, the mean of the run, at {flops:,} FLOPs"
    assert told in table(packed)[0]
    assert "count" not in table(ledger)[0]


def test_both_denominators_and_the_causal_count_stand_in_the_table(ledger):
    (line,) = (line for line in table(ledger) if line.startswith("MFU"))
    assert "989 TFLOP/s" in line
    assert "causal-aware" in line
    a100 = replace(ledger, device="NVIDIA A100-SXM4-80GB")
    (line,) = (line for line in table(a100) if line.startswith("MFU"))
    assert "of this GPU's 312" in line


def test_kernels_without_operators_still_find_rows():
    """As after a CUDA graph: names are all there is."""
    trace = FakeTrace()
    with trace.step(0):
        for name in (
            "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NNT",
            "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16",
            "_rms_norm_bwd_kernel",
            "_nesterov_kernel",
            "_add_update_kernel",
            "_embedding_bwd_rows_kernel",
            "ncclDevKernel_AllReduce_Sum_f32_RING_LL",
            "something_entirely_new",
        ):
            trace.kernel(name, 600)
    for event in trace.events:
        event["args"].pop("correlation", None)
    found = build(stretch(trace.json()), JOB, "NVIDIA H200", CEILINGS)
    assert rows_of(found) == {
        (PRODUCTS, "layer not known"): pytest.approx(0.6),
        (ATTENTION, "backward"): pytest.approx(0.6),
        (MEMORY, "rms_norm_bwd"): pytest.approx(0.6),
        (OPTIMIZER_GROUP, MUON_ELEMENTWISE): pytest.approx(1.2),
        (MEMORY, "embedding, backward"): pytest.approx(0.6),
        (COMMUNICATION, "all-reduce"): pytest.approx(0.6),
        (ELSE, "something_entirely_new, forward"): pytest.approx(0.6),
        (GAPS, HOST_LATE): 0.0,
        (GAPS, WAITING): 0.0,
    }
    assert [name for name, _ in unnamed_kernels(found)] == [
        "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NNT",
        "something_entirely_new",
    ]
    assert any("no rule knows" in line for line in table(found))


LAYOUTS = {FWD: (False, True), DGRAD: (False, False), WGRAD: (True, False)}


@pytest.mark.parametrize("batch", [1, 3, 4, 16, 32])
@pytest.mark.parametrize("depth", [12, 20, 26, 32])
def test_every_product_of_every_size_is_told_apart(depth, batch):
    """Also where the number of tokens equals a width, or the vocabulary's size."""
    config = GPTConfig.from_depth(depth, vocab_size=65536)
    job = Job(config, batch, 1, 1, 1)
    width, rows = config.n_embd, job.tokens
    layers = {
        "qkv": (width, 3 * width, rows),
        "attention projection": (width, width, rows),
        "mlp fc": (width, 4 * width, rows),
        "mlp projection": (4 * width, width, rows),
        "head": (width, 65536, -(-rows // 8)),
    }
    for name, (inputs, outputs, m) in layers.items():
        for direction, shape in {
            FWD: (m, inputs, outputs),
            DGRAD: (m, outputs, inputs),
            WGRAD: (outputs, m, inputs),
        }.items():
            phase = "forward" if direction == FWD or name == "head" else "backward"
            assert layer(*shape, LAYOUTS[direction], phase, job) == f"{name}, {direction}"


def test_a_forward_made_again_in_backward_is_a_forward():
    found = layer(M, C, 4 * C, LAYOUTS[FWD], "backward", JOB)
    assert found == "mlp fc, forward"
    assert layer(M, C, 999, LAYOUTS[FWD], "forward", JOB) is None


def test_a_fused_product_is_the_layers_row():
    """linear + squared ReLU in one kernel, and the next layer's input gradient with its slope."""
    trace = FakeTrace()
    wide, narrow = [M, 4 * C], [M, C]
    with trace.step(0):
        with trace.op("gptfast::linear_squared_relu", [narrow, [4 * C, C]], [], [BF16] * 2):
            trace.kernel("product_kernel", 1300)
        with (
            trace.backward("CompiledFunctionBackward"),
            trace.op("gptfast::squared_relu_dgrad", [narrow, [C, 4 * C], wide], [], [BF16] * 3),
        ):
            trace.kernel("product_kernel", 1400)
    found = build(stretch(trace.json()), JOB, "NVIDIA H200", CEILINGS)
    products = [row for row in found.rows if row.group == PRODUCTS]
    assert {row.name: row.ms for row in products} == {
        "mlp fc, forward": pytest.approx(1.3),
        "mlp projection, input gradient": pytest.approx(1.4),
    }
    assert all(row.flops == 2 * M * C * 4 * C for row in products)


@pytest.mark.parametrize(("name", "n"), [("qkv", 3 * C), ("attention projection", C)])
def test_a_linear_layer_is_its_row(name, n):
    """By our kernel, or by the product within."""
    for kernel in ("product_kernel", "nvjet_sm90"):
        trace = FakeTrace()
        with trace.step(0), trace.op("gptfast::linear", [[M, C], [n, C]], [], [BF16] * 2):
            if kernel == "product_kernel":
                trace.kernel(kernel, 900)
            else:
                with trace.op("aten::mm", [[M, C], [C, n]], [[C, 1], [1, C]], [BF16] * 2):
                    trace.kernel(kernel, 900)
        found = build(stretch(trace.json()), JOB, "NVIDIA H200", CEILINGS)
        [row] = (row for row in found.rows if row.group == PRODUCTS)
        assert (row.name, row.ms) == (f"{name}, forward", pytest.approx(0.9))
        assert row.flops == 2 * M * C * n


def test_a_weights_gradient_in_parts_is_one_row():
    trace = FakeTrace()
    wide, narrow, part = [M, 4 * C], [M, C], [3 * C, M]
    with trace.step(0), trace.backward("CompiledFunctionBackward"):
        with trace.op("gptfast::weight_gradient", [wide, narrow], [], [BF16] * 2):
            for _ in range(2):
                with trace.op("aten::mm", [part, narrow], LAYOUTS[WGRAD], [BF16] * 2):
                    trace.kernel("nvjet_sm90", 600)
        with trace.op("gptfast::weight_gradient", [narrow, wide], [], [BF16] * 2):
            trace.kernel("nvjet_sm90", 1300)
    found = build(stretch(trace.json()), JOB, "NVIDIA H200", CEILINGS)
    products = {row.name: row for row in found.rows if row.group == PRODUCTS}
    assert {name: row.ms for name, row in products.items()} == {
        "mlp fc, weight gradient": pytest.approx(1.2),
        "mlp projection, weight gradient": pytest.approx(1.3),
    }
    assert all(row.flops == 2 * M * C * 4 * C for row in products.values())


def test_the_embedding_is_a_row_each_way():
    """Its lookup within our operator, and all that its backward launches: the sort, too."""
    trace = FakeTrace()
    ids, grad = [32, 2048], [32, 2048, C]
    with trace.step(0):
        with (
            trace.op("gptfast::embedding", [ids, [V, C]], [], ["int", BF16]),
            trace.op("aten::embedding", [[V, C], ids], [], [BF16, "int"]),
        ):
            trace.kernel("void at::native::vectorized_gather_kernel<16, int>", 80)
        with (
            trace.backward("GeneratedBackwardFor_gptfast_embedding_defaultBackward"),
            trace.op("gptfast::embedding_bwd", [grad, ids, []], [], [BF16, "int", "Scalar"]),
        ):
            with trace.op("aten::sort"):
                trace.kernel("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<>", 40)
            with trace.op("aten::searchsorted"):
                trace.kernel("void at::native::searchsorted_cuda_kernel<int, int>", 5)
            for kernel, us in (("pieces", 20), ("long_rows", 10), ("rows", 70)):
                trace.kernel(f"_embedding_bwd_{kernel}_kernel", us)
    found = build(stretch(trace.json()), JOB, "NVIDIA H200", CEILINGS)
    memory = {row.name: (row.ms, row.bytes) for row in found.rows if row.group == MEMORY}
    assert memory == {
        "embedding, forward": (pytest.approx(0.08), 2 * 2 * M * C),
        "embedding, backward": (pytest.approx(0.145), 2 * (M + V) * C),
    }


def test_known_costs_of_the_model():
    job = Job(D20, 32, 1, 1, 1)
    forward, _ = known_costs(ATTENTION, "forward", job)
    backward, _ = known_costs(ATTENTION, "backward", job)
    assert backward == 2.5 * forward
    # The causal formula's share: forward 2 and backward 4 products, of which 5 are computed.
    attention = flops_per_token(D20) - flops_per_token(D20, causal=True)
    assert forward == pytest.approx(attention * job.tokens / 3)
    # Whole products would be 1.26e13; symmetric ones at half price.
    assert newton_schulz_flops(job) == pytest.approx(8.78e12, rel=0.01)
    four = job._replace(processes=4, shards=4)
    assert newton_schulz_flops(four) == newton_schulz_flops(job) / 4
    assert known_costs(MEMORY, "add_rms_norm", job) is None
