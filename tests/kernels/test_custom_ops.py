"""The kernels as operators of torch: registered whole, and no graph breaks at them."""

from collections import Counter

import pytest
import torch

from kernels import dispatch
from kernels.gate_residual_norm import gate_residual_norm_op, gate_residual_op
from kernels.qk_norm_rope import qk_norm_rope_op
from kernels.rms_norm import rms_norm_op
from kernels.silu_mul import silu_mul_op
from model.config import NextDiTConfig
from model.layers import Block
from tests.kernels.operators import EPS, OPERATORS, listed
from tests.kernels.test_triton import DEVICES, drawn

OPS = {
    "rms_norm": (rms_norm_op, (EPS, None)),
    "rms_norm by sequence": (rms_norm_op, (EPS,)),
    "gate_residual_norm": (gate_residual_norm_op, (EPS,)),
    "gate_residual": (gate_residual_op, (EPS,)),
    "qk_norm_rope": (qk_norm_rope_op, (EPS,)),
    "silu_mul": (silu_mul_op, ()),
}
ALL = dict.fromkeys(dispatch.DEFAULTS, True)
everywhere = pytest.mark.parametrize("device", DEVICES)


def arguments(name, tokens, width, **drawing):
    """Positional, as the operator's schema has them."""
    inputs = drawn(name, tokens, width, **drawing)
    index = [inputs.pop("index")] if "index" in inputs else []
    return (*inputs.values(), *OPS[name][1], *index)


@pytest.mark.slow  # torch imports its compiler at the first call of such an operator
@pytest.mark.parametrize("name", OPS)
def test_without_triton_an_operator_is_its_reference(name):
    inputs = drawn(name, 5, 10)
    for result, expected in zip(
        listed(OPS[name][0](*arguments(name, 5, 10))),
        listed(OPERATORS[name].reference(**inputs)),
        strict=True,
    ):
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@everywhere
@pytest.mark.parametrize("name", OPS)
def test_the_registration_is_whole(name, device):
    torch.library.opcheck(OPS[name][0], arguments(name, 4, 10, device=device))


class Graphs:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, _):
        self.graphs.append(graph)
        return graph.forward

    @property
    def ours(self):
        """How often the first graph calls each of our operators."""
        targets = [str(node.target) for node in self.graphs[0].graph.nodes]
        return Counter(t.split(".")[1] for t in targets if t.startswith("lumina."))


CONFIG = NextDiTConfig(
    hidden_size=24, num_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
    axes_dim_rope=(4, 4, 4),
)  # fmt: skip


def block_and_inputs(device, modulated, lengths=(4, 3)):
    torch.manual_seed(0)
    block = Block(CONFIG, modulated=modulated).to(device).eval().requires_grad_(False)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = sum(lengths)
    angles = torch.randn(tokens, 6, device=device)
    index = torch.arange(len(lengths), device=device).repeat_interleave(
        torch.tensor(lengths, device=device)
    )
    rest = (torch.randn(len(lengths), 24, device=device), index) if modulated else ()
    return block, (
        torch.randn(tokens, 24, device=device),
        attend,
        angles.cos(),
        angles.sin(),
        *rest,
    )


def attend(q, k, v):
    """Stands in for attention: mixes q and v of the same token, whatever the lengths."""
    return q * torch.cat((k, k), dim=1).sum(-1, keepdim=True).tanh() + torch.cat((v, v), dim=1)


@everywhere
@pytest.mark.parametrize("modulated", [True, False])
def test_a_block_gives_the_same_with_kernels(device, modulated):
    block, inputs = block_and_inputs(device, modulated)
    with dispatch.forced(**dict.fromkeys(ALL, False)):
        expected = block(*inputs)
    with dispatch.forced(**ALL):
        result = block(*inputs)
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


@everywhere
@pytest.mark.slow
def test_a_block_is_one_graph_for_all_lengths(device):
    graphs = Graphs()
    torch.compiler.reset()
    with dispatch.forced(**ALL):
        for lengths in ((4, 3), (2, 9)):
            block, inputs = block_and_inputs(device, True, lengths)
            if not graphs.graphs:
                compiled = torch.compile(block, backend=graphs, fullgraph=True, dynamic=True)
            torch.testing.assert_close(compiled(*inputs), block(*inputs), rtol=1e-6, atol=1e-6)
    assert len(graphs.graphs) == 1
    assert graphs.ours == dict.fromkeys(
        ("rms_norm", "qk_norm_rope", "gate_residual_norm", "gate_residual", "silu_mul"), 1
    )


@everywhere
@pytest.mark.slow
def test_a_switch_changes_the_compiled_graph(device):
    """By default the compiler sees the references; each operator has a switch of its own."""
    block, inputs = block_and_inputs(device, True)
    for switches, expected in (({}, set()), ({"silu_mul": True}, {"silu_mul"})):
        graphs = Graphs()
        torch.compiler.reset()
        with dispatch.forced(**switches):
            torch.compile(block, backend=graphs, fullgraph=True)(*inputs)
        assert set(graphs.ours) == expected
