"""Every backend against a dense float64 reference; what the GPU ones are handed, on any machine."""

import logging

import pytest
import torch
from torch.nn.attention import SDPBackend

from model.attention import BACKENDS, Backend, available_backends, choose_backend
from model.attention.dense import CudnnAttend, dense_views, open_sdpa, plan_sdpa
from model.attention.plan import UnavailableError, probe
from model.attention.ragged import (
    grouped_views,
    import_xformers,
    known_options,
    plan_varlen,
    plan_xformers,
)
from model.packing import Layout
from tests.model.references import relative_l2

CPU = torch.device("cpu")
LENGTHS = [1, 300, 17, 17, 256, 2, 64]
HEADS, KV_HEADS = 6, 2
no_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO CUDA DEVICE: this attention kernel is untested here"
)


def draw(head_dim, dtype=torch.float32, device=CPU, lengths=LENGTHS):
    """q, k and v as slices of one projection, as the network makes them; drawn on the CPU."""
    generator = torch.Generator().manual_seed(head_dim)
    fused = torch.randn(sum(lengths), HEADS + 2 * KV_HEADS, head_dim, generator=generator)
    q, k, v = fused.to(device, dtype).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    return q.contiguous(), k.contiguous(), v


def reference(q, k, v, lengths=LENGTHS):
    """Head by head, sequence by sequence, in float64."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    outputs = []
    for queries, keys, values in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads = []
        for head in range(q.shape[1]):
            own = head // (q.shape[1] // k.shape[1])
            scores = queries[:, head] @ keys[:, own].T / q.shape[-1] ** 0.5
            heads.append(scores.softmax(-1) @ values[:, own])
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs)


def eager_low_precision(q, k, v):
    """The written-out product in the dtype of q: what no kernel may be twice as wrong as."""
    outputs = []
    repeat = q.shape[1] // k.shape[1]
    for part in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True):
        queries, keys, values = (x.transpose(0, 1) for x in part)
        keys, values = (x.repeat_interleave(repeat, 0) for x in (keys, values))
        scores = queries @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


MACHINES = [
    pytest.param("sdpa", "cpu", torch.float32, id="sdpa-cpu-fp32"),
    pytest.param("sdpa", "cpu", torch.bfloat16, id="sdpa-cpu-bf16"),
    pytest.param("sdpa", "cuda", torch.float32, marks=[pytest.mark.gpu, no_gpu], id="sdpa-fp32"),
    *(
        pytest.param(name, "cuda", dtype, marks=[pytest.mark.gpu, no_gpu], id=f"{name}-{dtype}")
        for name in BACKENDS
        for dtype in (torch.bfloat16, torch.float16)
    ),
]


def opened(name, device, dtype, head_dim) -> Backend:
    try:
        return Backend(name, BACKENDS[name](torch.device(device), dtype, head_dim))
    except UnavailableError as error:
        pytest.skip(f"{name.upper()} IS NOT AVAILABLE HERE: {error}")


@pytest.mark.parametrize(("name", "device", "dtype"), MACHINES)
@pytest.mark.parametrize("head_dim", [48, 96])
def test_equals_the_dense_float64_reference(name, device, dtype, head_dim):
    backend = opened(name, device, dtype, head_dim)
    q, k, v = draw(head_dim, dtype, device)
    out = backend.plan(Layout.of(LENGTHS, device))(q, k, v)
    assert out.shape == q.shape
    assert out.dtype == dtype
    expected = reference(q, k, v)
    if dtype == torch.float32:
        assert relative_l2(out.cpu(), expected) < (2e-6 if device == "cpu" else 1e-5)
    else:
        eager = relative_l2(eager_low_precision(q, k, v).cpu(), expected)
        assert relative_l2(out.cpu(), expected) <= 2 * eager


@pytest.mark.parametrize(("name", "device", "dtype"), MACHINES)
def test_a_sequence_does_not_depend_on_its_company(name, device, dtype):
    backend = opened(name, device, dtype, 96)
    q, k, v = draw(96, dtype, device)
    crowd = backend.plan(Layout.of(LENGTHS, device))(q, k, v).split(LENGTHS)
    for i, alone in enumerate(zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)):
        out = backend.plan(Layout.of(LENGTHS[i : i + 1], device))(*alone)
        limit = 1e-6 if dtype == torch.float32 else 4e-3
        assert relative_l2(crowd[i].cpu(), out.cpu()) <= limit


@pytest.mark.parametrize(("name", "device", "dtype"), MACHINES)
def test_gradients_flow_through_every_backend(name, device, dtype):
    backend = opened(name, device, dtype, 48)
    q, k, v = (x.detach().requires_grad_() for x in draw(48, dtype, device))
    backend.plan(Layout.of(LENGTHS, device))(q, k, v).square().sum().backward()
    ours = [x.grad.double().cpu() for x in (q, k, v)]
    wide = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    reference(*wide).square().sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    for gradient, expected in zip(ours, wide, strict=True):
        assert relative_l2(gradient, expected.grad) <= limit


def test_one_sequence_and_many_tokens_of_one():
    for lengths in ([5], [1] * 9, [4, 4, 4]):
        q, k, v = draw(8, lengths=lengths)
        out = plan_sdpa(Layout.of(lengths))(q, k, v)
        assert relative_l2(out, reference(q, k, v, lengths)) < 1e-6


def test_the_arrangement_for_cudnn_is_right_where_another_kernel_does_the_sums():
    q, k, v = draw(48)
    out = CudnnAttend(Layout.of(LENGTHS).runs)(q, k, v)
    assert relative_l2(out, reference(q, k, v)) < 1e-6


def test_cudnn_alone_says_so_where_it_is_not():
    plan = lambda layout: CudnnAttend(layout.runs, (SDPBackend.CUDNN_ATTENTION,))  # noqa: E731
    with pytest.raises(UnavailableError, match=r"No (viable|available)"):
        probe(plan, CPU, torch.float32, 48)


def test_keys_and_values_of_a_run_are_views():
    q, k, v = draw(48)
    for run in Layout.of(LENGTHS).runs:
        query, key, value = dense_views(q, k, v, run)
        assert query.shape == (run.count, KV_HEADS, 3 * run.length, 48)
        assert key.shape == value.shape == (run.count, KV_HEADS, run.length, 48)
        assert key.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        assert value.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


def varlen_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, enable_gqa=False):
    """What `varlen_attn` promises, with its names; in float64 and with every promise checked."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    for ends, tokens, longest in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert type(longest) is int
        assert ends[0] == 0
        assert ends[-1] == len(tokens)
        assert ends.diff().max() == longest
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    return reference(query, key, value, cu_seq_q.diff().tolist()).to(query.dtype)


@pytest.mark.parametrize("head_dim", [48, 96])
def test_varlen_gets_sequences_as_it_wants_them(head_dim):
    q, k, v = draw(head_dim)
    options = known_options(varlen_by_hand)
    assert options == {"enable_gqa": True}
    out = plan_varlen(varlen_by_hand, options, Layout.of(LENGTHS))(q, k, v)
    assert relative_l2(out, reference(q, k, v)) < 1e-6


def test_varlen_of_this_torch_takes_the_arguments():
    """Its own operator on the meta device, where names and shapes count and nothing is read."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.to("meta") for x in draw(96, torch.bfloat16))
    plan = plan_varlen(varlen_attn, known_options(varlen_attn), Layout.of(LENGTHS, "meta"))
    out = plan(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)


def test_varlen_without_the_newer_options_is_called_without_them():
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
        return varlen_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa=True)

    assert known_options(older) == {}
    q, k, v = draw(48)
    out = plan_varlen(older, {}, Layout.of(LENGTHS))(q, k, v)
    assert relative_l2(out, reference(q, k, v)) < 1e-6


def test_grouped_views_copy_nothing():
    q, k, v = draw(96)
    query, key, value = grouped_views(q, k, v)
    assert query.shape == key.shape == value.shape == (1, sum(LENGTHS), KV_HEADS, 3, 96)
    for view, x in ((query, q), (key, k), (value, v)):
        assert view.data_ptr() == x.data_ptr()
    assert key.stride(3) == value.stride(3) == 0
    assert query.stride(3) == 96
    for head in range(HEADS):
        assert torch.equal(query[0, :, head // 3, head % 3], q[:, head])
        assert torch.equal(key[0, :, head // 3, head % 3], k[:, head // 3])


def efficient_by_hand(query, key, value, attn_bias):
    """What `memory_efficient_attention` promises for `[B, M, (G,) H, K]`, its mask materialised."""
    if query.ndim == 5:
        assert not any(x.requires_grad for x in (query, key, value)), "has no backward"
    query, key, value = (x.double().movedim(1, -2) for x in (query, key, value))
    mask = attn_bias.materialize((query.shape[-2], key.shape[-2]), dtype=torch.float64)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + mask
    return (scores.softmax(-1) @ value).movedim(-2, 1).float()


def xformers_or_skip():
    try:
        return import_xformers()
    except UnavailableError as error:
        pytest.skip(str(error))


def test_xformers_gets_sequences_as_it_wants_them():
    fmha = xformers_or_skip()
    mask = fmha.attn_bias.BlockDiagonalMask
    q, k, v = draw(48)
    attend = plan_xformers(efficient_by_hand, mask, Layout.of(LENGTHS))
    assert attend.mask.q_seqinfo.seqstart.dtype == torch.int32
    assert attend.mask.q_seqinfo.seqstart_py == Layout.of(LENGTHS).cu_seqlens.tolist()
    assert attend.mask.k_seqinfo.max_seqlen == 300
    assert relative_l2(attend(q, k, v), reference(q, k, v)) < 1e-6


def test_xformers_trains_without_grouped_queries_which_have_no_backward():
    mask = xformers_or_skip().attn_bias.BlockDiagonalMask
    q, k, v = (x.detach().requires_grad_() for x in draw(48))
    attend = plan_xformers(efficient_by_hand, mask, Layout.of(LENGTHS))
    attend(q, k, v).square().sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference(*wide).square().sum().backward()
    for x, expected in zip((q, k, v), wide, strict=True):
        assert relative_l2(x.grad, expected.grad) < 1e-6


def test_xformers_is_imported_quietly_and_its_logger_left_alone(capfd, recwarn):
    level = logging.getLogger("xformers").level
    xformers_or_skip()
    assert capfd.readouterr().err == ""
    assert not recwarn.list
    assert logging.getLogger("xformers").level == level


def test_a_cpu_has_sdpa_and_says_why_not_the_others(monkeypatch):
    monkeypatch.delenv("LUMINA_ATTENTION", raising=False)
    assert choose_backend(CPU, torch.float32, 48).name == "sdpa"
    found = available_backends(CPU, torch.float32, 48)
    assert list(found) == ["varlen", "xformers", "cudnn", "sdpa"]
    assert [each for each in found.values() if each != "it needs a CUDA device"] == [
        Backend("sdpa", plan_sdpa)
    ]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 96, "it has no float32 kernel"),
        (torch.bfloat16, 20, "head_dim 20 is not a multiple of 8 up to"),
        (torch.bfloat16, 264, "head_dim 264 is not a multiple of 8 up to"),
    ],
)
def test_what_no_fused_kernel_takes_goes_to_sdpa_on_any_gpu(monkeypatch, dtype, head_dim, reason):
    monkeypatch.delenv("LUMINA_ATTENTION", raising=False)
    cuda = torch.device("cuda")
    assert choose_backend(cuda, dtype, head_dim).name == "sdpa"
    found = available_backends(cuda, dtype, head_dim)
    assert all(reason in found[name] for name in ("varlen", "xformers", "cudnn"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_kernels_that_fail_the_probe_are_not_chosen(monkeypatch):
    """Without a driver every probe fails: what remains is sdpa, with a reason for each."""
    monkeypatch.delenv("LUMINA_ATTENTION", raising=False)
    cuda = torch.device("cuda")
    assert choose_backend(cuda, torch.bfloat16, 96).name == "sdpa"
    found = available_backends(cuda, torch.bfloat16, 96)
    assert all(isinstance(found[n], str) and found[n] for n in ("varlen", "xformers", "cudnn"))


def test_a_probe_notices_a_wrong_result():
    with pytest.raises(UnavailableError, match="wrong"):
        probe(lambda layout: lambda q, k, v: 2 * q, CPU, torch.float32, 8)
    probe(open_sdpa(CPU, torch.float32, 8), CPU, torch.float32, 8)


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("LUMINA_ATTENTION", "sdpa")
    assert choose_backend(CPU, torch.float32, 48).name == "sdpa"


@pytest.mark.parametrize("name", ["flash", "varlen", "xformers", "cudnn", "SDPA"])
def test_what_cannot_be_forced_is_refused_in_one_sentence(monkeypatch, name):
    monkeypatch.setenv("LUMINA_ATTENTION", name)
    with pytest.raises(ValueError, match=f"LUMINA_ATTENTION '{name}' is not allowed") as error:
        choose_backend(CPU, torch.float32, 48)
    assert str(error.value) == (
        f"LUMINA_ATTENTION '{name}' is not allowed here: give sdpa (not available: varlen: it "
        "needs a CUDA device; xformers: it needs a CUDA device; cudnn: it needs a CUDA device)"
    )


def test_the_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.delenv("LUMINA_ATTENTION", raising=False)
    caplog.set_level(logging.INFO, logger="model.attention")
    chosen = [choose_backend(CPU, torch.float32, 44) for _ in range(3)]
    assert chosen[0] is chosen[2]
    assert [r.getMessage() for r in caplog.records] == ["attention: sdpa for torch.float32 on cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpa", "cudnn", "varlen"])
def test_attending_is_one_graph(name):
    from torch.nn.attention.varlen import varlen_attn

    device = "meta" if name == "varlen" else "cpu"
    layout = Layout.of([3, 3, 5, 1], device)
    attend = {
        "sdpa": plan_sdpa(layout),
        "cudnn": CudnnAttend(layout.runs),
        "varlen": plan_varlen(varlen_attn, known_options(varlen_attn), layout),
    }[name]
    q, k, v = (x.to(device) for x in draw(16, lengths=[3, 3, 5, 1]))
    compiled = torch.compile(lambda *qkv: attend(*qkv), backend="eager", fullgraph=True)
    out = compiled(q, k, v)
    assert out.shape == q.shape
    if device == "cpu":
        assert torch.equal(out, attend(q, k, v))


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_planning_and_attending_never_wait_for_the_gpu(name):
    backend = opened(name, "cuda", torch.bfloat16, 96)
    q, k, v = draw(96, torch.bfloat16, "cuda")

    def run():
        backend.plan(Layout.of(LENGTHS, "cuda"))(q, k, v)

    run()  # the first call may load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
