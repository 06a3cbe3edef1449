"""CUDA graphs of small steps: buckets, padding, buffers, with a graph that replays by calling."""

import itertools

import pytest
import torch

from model.acceleration import accelerate
from model.adapters import Adapter, Lora, LowRank
from model.attention import Backend
from model.attention.ragged import plan_varlen
from model.graphs import (
    MAX_SEQUENCES,
    PER_OCTAVE,
    SMALLEST,
    GraphedStack,
    bucket_of,
)
from model.modulation import ModulationTable
from model.next_dit import NextDiT
from model.stack import EagerStack
from tests.model.references import relative_l2

LIMIT = 512


def ragged(q, k, v, starts, _, max_length, __):
    """Like `varlen_attn`: reads where sequences lie from the tensor, whenever it is called."""
    ends = starts.tolist()
    assert ends[0] == 0
    assert ends[-1] == len(q)
    out = torch.empty_like(q)
    for start, end in itertools.pairwise(ends):
        assert 0 <= end - start <= max_length
        if start == end:
            continue
        query, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))
        key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        out[start:end] = attended.transpose(0, 1)
    return out


VARLEN = Backend("varlen", lambda layout: plan_varlen(ragged, {}, layout))


class CallingGraph:
    """Replays by calling what was captured, which reads and writes the memory of the capture."""

    made: list["CallingGraph"]

    def __init__(self):
        type(self).made.append(self)
        self.replays = 0

    def capture(self, work):
        self.work = work
        self.out = torch.full_like(work(), torch.nan)
        return self.out

    def replay(self):
        self.replays += 1
        self.out.copy_(self.work())


@pytest.fixture
def graph():
    """A class of graphs that knows what was made of it."""
    return type("Graph", (CallingGraph,), {"made": []})


@pytest.fixture
def dit(tiny_folder):
    return NextDiT.from_pretrained(tiny_folder / "transformer")


@torch.inference_mode()
def forward(*args, **options):
    return velocities(*args, **options)


def velocities(dit, sizes, times=None, seed=0, adapters=None):
    """Of samples of these latent sizes; sample k has a caption of 3 + 2k tokens."""
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(16, *size, generator=generator) for size in sizes]
    widths = [(3 + 2 * k, dit.config.cap_feat_dim) for k in range(len(sizes))]
    contexts = dit.encode_context([torch.randn(w, generator=generator) for w in widths], adapters)
    times = times or [(k + 1) / (len(sizes) + 1) for k in range(len(sizes))]
    own = adapters or [()] * len(sizes)
    table = ModulationTable(dit).of(times, own)
    return dit.head(dit.blocks(dit.embed(latents, torch.tensor(times), contexts, own, table)))


def assert_like_eager(dit, *args, **options):
    graphed = dit.run_stack
    found = forward(dit, *args, **options)
    dit.run_stack = EagerStack()
    for velocity, right in zip(found, forward(dit, *args, **options), strict=True):
        assert relative_l2(velocity, right) < 2e-6
    dit.run_stack = graphed


def test_buckets_hold_their_tokens_and_waste_at_most_an_eighth():
    buckets = [bucket_of(n) for n in range(1, 5000)]
    assert buckets == sorted(buckets)
    for tokens, bucket in enumerate(buckets, start=1):
        assert bucket >= tokens
        assert bucket_of(bucket) == bucket
        assert bucket - tokens < max(SMALLEST, tokens / PER_OCTAVE)
    assert len({b for b in buckets if b <= 4096}) == 32


def test_replayed_batches_of_any_kind_equal_eager_ones(dit, graph):
    dit.run_stack = GraphedStack(EagerStack(), VARLEN, LIMIT, graph)
    small, wide = [(4, 4), (8, 6)], [(4, 40), (8, 8), (6, 2)]
    for seed in range(2):  # the second time from graphs
        for sizes in (small, wide, [(8, 8)], small[::-1], [(4, 4)] * 5):
            assert_like_eager(dit, sizes, seed=seed)
            assert_like_eager(dit, sizes, [0.5] * len(sizes), seed=seed)  # one row of modulation
    # Up to 64 tokens the noise refiner and the joint blocks; 65 to 128 the joint blocks.
    assert dit.run_stack.num_captures == len(graph.made) == 3
    assert sum(each.replays for each in graph.made) > 30


@pytest.mark.slow  # brings the compiler
def test_compiled_blocks_know_the_buffers_of_graphs(dit, graph):
    """What was compiled for the first batch is what is captured: no graph of the compiler more."""
    import torch._dynamo as dynamo

    from model.compiled import CompiledStack
    from tests.model.test_compiled import Counting

    dynamo.reset()
    compiler = Counting()
    dit.run_stack = GraphedStack(CompiledStack(backend=compiler), VARLEN, LIMIT, graph)
    for seed in range(2):
        for sizes in ([(4, 4), (8, 6)], [(8, 8)], [(4, 40), (8, 8), (6, 2)]):
            assert_like_eager(dit, sizes, seed=seed)
    assert dit.run_stack.num_captures == 3
    assert compiler.graphs == 1
    dynamo.reset()


def test_inference_mode_may_come_and_go(dit, graph):
    dit.run_stack = GraphedStack(EagerStack(), VARLEN, LIMIT, graph)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found = velocities(dit, [(4, 4), (8, 6)])
        for velocity, right in zip(found, forward(dit, [(4, 4), (8, 6)]), strict=True):
            assert relative_l2(velocity, right) < 2e-6
    assert not dit.run_stack.broken


def test_a_full_bucket_has_no_dummy(dit, graph):
    dit.run_stack = GraphedStack(EagerStack(), VARLEN, LIMIT, graph)
    sizes = [(2, 122)]  # 61 image tokens and 3 of the caption
    for seed in range(2):
        assert_like_eager(dit, sizes, seed=seed)
    assert all(each.replays == 2 for each in graph.made)


def test_a_result_outlives_the_next_replay(dit, graph):
    dit.run_stack = GraphedStack(EagerStack(), VARLEN, LIMIT, graph)
    forward(dit, [(4, 4)])
    first = forward(dit, [(4, 4)])[0]
    kept = first.clone()
    forward(dit, [(4, 4)], seed=1)
    assert torch.equal(first, kept)


def test_what_is_large_crowded_or_adapted_goes_to_the_other_runner(dit, graph):
    dit.run_stack = GraphedStack(EagerStack(), VARLEN, 64, graph)
    assert_like_eager(dit, [(16, 18)])  # 72 image tokens
    assert_like_eager(dit, [(2, 2)] * (MAX_SEQUENCES + 1))
    name = "layers.0.attention.qkv"
    rows, columns = dit.get_submodule(name).weight.shape
    change = LowRank(torch.randn(2, columns), torch.randn(rows, 2))
    assert_like_eager(dit, [(4, 4)], adapters=[(Adapter(Lora("ink", {name: change}), 1.0),)])
    with torch.no_grad():
        dit([torch.randn(16, 4, 4)], torch.tensor([0.5]), [torch.randn(3, 32)])
    assert not graph.made


def test_the_least_recently_used_graph_makes_room(dit, graph):
    runner = GraphedStack(EagerStack(), VARLEN, LIMIT, graph, max_graphs=3)
    dit.run_stack = runner
    sizes = [(8, 32 * k - 4) for k in range(1, 5)]  # of one bucket each
    for size in sizes:
        forward(dit, [size])
        forward(dit, [sizes[0]])  # stays in use
    for stack in runner._stacks.values():
        assert len(stack.graphs) == 3
        assert SMALLEST in stack.graphs
        assert 2 * SMALLEST not in stack.graphs


def test_a_replay_that_is_off_is_never_used(dit, graph, caplog):
    class Stale(graph):
        def replay(self):
            self.out.fill_(1.0)

    dit.run_stack = GraphedStack(EagerStack(), VARLEN, LIMIT, Stale)
    for seed in range(2):
        assert_like_eager(dit, [(4, 4)], seed=seed)
    assert dit.run_stack.broken
    assert len(Stale.made) == 1
    assert [r.getMessage().split(" is off by")[0] for r in caplog.records] == [
        "CUDA graphs are off: a replay of 64 tokens"
    ]


def test_a_capture_that_fails_costs_speed_and_one_line(dit, graph, caplog):
    class Refusing(graph):
        def capture(self, _):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    dit.run_stack = GraphedStack(EagerStack(), VARLEN, LIMIT, Refusing)
    for seed in range(2):
        assert_like_eager(dit, [(4, 4)], seed=seed)
    assert [r.getMessage() for r in caplog.records] == [
        "CUDA graphs are off: operation not permitted when stream is capturing"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: graphs are untested")
@pytest.mark.filterwarnings("default")  # compilers speak of what would be faster
@pytest.mark.parametrize("compile", ["off", "blocks"])
def test_cuda_graphs_replay_what_the_blocks_compute(tiny_folder, compile):
    # varlen wants head sizes that are multiples of 8: the tiny checkpoint's 12 is not.
    from model.config import NextDiTConfig

    torch.manual_seed(0)
    config = NextDiTConfig(
        hidden_size=256, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, axes_dim_rope=(16, 24, 24), cap_feat_dim=32, in_channels=16,
    )  # fmt: skip
    dit = NextDiT(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    for weight in dit.parameters():
        weight.add_(0.02 * torch.randn_like(weight))
    if not dit.attention.lengths_on_device:
        pytest.skip(f"attention is {dit.attention.name}, which cannot be captured")
    accelerate(dit, compile=compile, graph_tokens=2048)
    runner = dit.run_stack
    for seed in range(3):
        for sizes in ([(16, 16)] * 2, [(32, 32), (16, 24)], [(64, 64)]):
            found = forward(dit, sizes, seed=seed)
            dit.run_stack = EagerStack()
            for velocity, right in zip(found, forward(dit, sizes, seed=seed), strict=True):
                assert relative_l2(velocity.float(), right.float()) < 2e-2
            dit.run_stack = runner
    assert isinstance(runner, GraphedStack)
    assert not runner.broken
    assert not getattr(runner._inner, "broken", False)
    assert runner.num_captures >= 4
