"""The compiled blocks: the eager numbers, one graph for all, and eager where no graph fits."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo

from model import GenerationRequest, load_pipeline
from model.acceleration import COMPILE_MODES, accelerate, default_compile
from model.adapters import Adapter, Lora, LowRank
from model.compiled import CompiledStack
from model.modulation import ModulationTable
from model.next_dit import NextDiT
from model.stack import EagerStack
from tests.model.conftest import max_difference
from tests.model.references import relative_l2

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="NO C++ COMPILER (g++): torch.compile is untested here"
)
WARM_UP = [GenerationRequest("warm-up", seed=k, num_inference_steps=2) for k in range(2)]
CROWD = [
    GenerationRequest(prompt, seed=seed, num_inference_steps=2 + seed % 3, **settings)
    for seed, (prompt, settings) in enumerate(
        [
            ("red", {"width": 64, "height": 64}),
            ("a longer prompt about a hat", {"width": 96, "height": 48}),
            ("the hat", {"width": 64, "height": 96, "guidance_scale": 1.0}),
            ("in the air", {"width": 32, "height": 160, "cfg_trunc_ratio": 0.5}),
            ("small", {"width": 32, "height": 16, "num_images": 2, "sampler": "midpoint"}),
        ]
    )
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


class Counting:
    """A compiler that counts its graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def dit(tiny_folder):
    return NextDiT.from_pretrained(tiny_folder / "transformer")


def forward(dit, sizes=((4, 4), (8, 6)), lengths=(3, 9), times=(0.5, 0.5), adapters=None):
    """Velocities through looked-up modulation, as a pipeline computes them."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(16, *size, generator=generator) for size in sizes]
    prompts = [torch.randn(n, dit.config.cap_feat_dim, generator=generator) for n in lengths]
    own = adapters or [()] * len(sizes)
    contexts = dit.encode_context(prompts, own)
    table = ModulationTable(dit).of(list(times), own)
    return dit.head(dit.blocks(dit.embed(latents, torch.tensor(times), contexts, own, table)))


@torch.inference_mode()
@pytest.mark.parametrize(("whole", "graphs"), [(False, 1), (True, 2)])
def test_one_graph_whatever_the_lengths_sizes_and_timesteps(dit, whole, graphs):
    expected = forward(dit)
    compiler = Counting()
    dit.run_stack = CompiledStack(whole=whole, backend=compiler)
    for found, right in zip(forward(dit), expected, strict=True):
        assert relative_l2(found, right) < 2e-6
    assert compiler.graphs == graphs  # as a whole, the noise refiner is a second stack
    counts = range(1, 6)
    sizes = [(2, 4), (8, 6), (4, 12), (2, 48), (16, 16)]
    for count, shift in itertools.product(counts, range(3)):
        own = [sizes[(k + shift) % len(sizes)] for k in range(count)]
        lengths = [1 + (7 * k + 11 * shift) % 60 for k in range(count)]
        forward(dit, own, lengths, [0.25] * count)
        forward(dit, own, lengths, [(k + 1) / 7 for k in range(count)])
    assert compiler.graphs == graphs
    assert not dynamo.utils.counters["graph_break"]
    assert not dit.run_stack.broken


@torch.inference_mode()
def test_batches_with_loras_are_computed_eagerly_and_compile_nothing(dit):
    name = "layers.0.attention.qkv"
    rows, columns = dit.get_submodule(name).weight.shape
    change = LowRank(torch.randn(2, columns), torch.randn(rows, 2))
    adapted = [(), (Adapter(Lora("ink", {name: change}), 0.5),)]
    expected = forward(dit, adapters=adapted)
    compiler = Counting()
    dit.run_stack = CompiledStack(backend=compiler)
    for found, right in zip(forward(dit, adapters=adapted), expected, strict=True):
        torch.testing.assert_close(found, right)
    assert compiler.graphs == 0
    forward(dit)
    assert compiler.graphs == 1


def test_gradients_and_a_forward_without_modulation_stay_eager(dit):
    compiler = Counting()
    dit.run_stack = CompiledStack(backend=compiler)
    prompts = [torch.randn(3, dit.config.cap_feat_dim)]
    latents = [torch.randn(16, 4, 4)]
    with torch.no_grad():
        dit(latents, torch.tensor([0.5]), prompts)
    dit.requires_grad_(True)
    dit(latents, torch.tensor([0.5]), prompts)[0].sum().backward()
    assert dit.layers[0].attention.qkv.weight.grad is not None
    assert compiler.graphs == 0


@torch.inference_mode()
def test_a_single_token_is_not_compiled(dit):
    compiler = Counting()
    dit.run_stack = CompiledStack(backend=compiler)
    forward(dit, [(2, 2)], [3], [0.5])  # one image token in the noise refiner, four tokens jointly
    assert compiler.graphs == 1
    forward(dit)
    assert compiler.graphs == 1


@torch.inference_mode()
def test_a_compiler_that_fails_costs_speed_and_one_line(dit, caplog):
    def failing(*_):
        raise RuntimeError("no such compiler\nand much more")

    expected = forward(dit)
    dit.run_stack = CompiledStack(backend=failing)
    for _ in range(2):
        for found, right in zip(forward(dit), expected, strict=True):
            torch.testing.assert_close(found, right)
    assert dit.run_stack.broken
    said = [record.getMessage() for record in caplog.records if record.name == "model.compiled"]
    assert len(said) == 1
    assert said[0].startswith("torch.compile failed, computing eagerly: ")
    assert "no such compiler" in said[0]
    assert "\n" not in said[0]


LIMITED = """
import logging, sys, torch
from model.compiled import CompiledStack
from model.next_dit import NextDiT
from tests.model.test_compiled import Counting, forward
logging.basicConfig(format="%(name)s %(message)s")
torch._dynamo.config.recompile_limit = 1
dit, compiler = NextDiT.from_pretrained(sys.argv[1]), Counting()
dit.run_stack = CompiledStack(backend=compiler)
with torch.inference_mode():
    forward(dit)
    dit.to(torch.float64)  # stands for other weights, precisions and switches
    expected = forward(dit)
    for found, right in zip(forward(dit), expected, strict=True):
        torch.testing.assert_close(found, right)
print(compiler.graphs, dit.run_stack.broken)
"""


@pytest.mark.slow  # in a process of its own: torch remembers what has reached the limit
def test_more_graphs_than_torch_allows_cost_speed_too(tiny_folder):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tiny_folder / "transformer")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 True\n"
    said = [line for line in done.stderr.splitlines() if line.startswith("model.compiled ")]
    assert len(said) == 1
    assert said[0].startswith("model.compiled torch.compile failed, computing eagerly: ")


def test_modes_are_checked_and_chosen_by_device(dit):
    assert (default_compile("cpu"), default_compile("cuda")) == ("off", "blocks")
    assert COMPILE_MODES == ("off", "blocks", "full")
    accelerate(dit, compile="full", graph_tokens=4096)  # no graphs without a GPU
    assert isinstance(dit.run_stack, CompiledStack)
    assert dit.run_stack.whole
    accelerate(dit)
    assert isinstance(dit.run_stack, EagerStack)
    with pytest.raises(ValueError, match=r"compile 'fast' is not allowed: give off or blocks"):
        accelerate(dit, compile="fast")


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)  # seconds on an idle machine, minutes on one that compiles elsewhere too
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # Inductor's own imports
def test_inductor_draws_the_eager_pictures_without_breaks_or_recompiles(
    tiny_folder, pipeline, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes
    compiled = load_pipeline(tiny_folder, compile="blocks")
    compiled.generate(WARM_UP)
    counters = dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    crowd = compiled.generate(CROWD)
    alone = [compiled.generate([request])[0] for request in CROWD]
    assert (graphs, counters["stats"]["unique_graphs"]) == (1, 1)
    assert not counters["graph_break"]
    assert not compiled.dit.run_stack.broken
    for together, single, eager in zip(crowd, alone, pipeline.generate(CROWD), strict=True):
        for one, other, third in zip(together, single, eager, strict=True):
            assert max_difference(one, other) <= 1  # batch invariance
            assert max_difference(one, third) <= 1
    # The next process finds what this one has compiled.
    assert any(tmp_path.rglob("*.so"))
    dynamo.reset()
    counters.clear()
    load_pipeline(tiny_folder, compile="blocks").generate(WARM_UP)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
