import pytest
import torch

from server.scheduler.budget import StepCost
from server.scheduler.request import StepLoad
from server.worker.loading import LoadedModel, load_model
from server.worker.warmup import STEPS, compiled_graphs, fit_cost, warm_up
from tests.fakes import FAKE_INFO, FakePipeline
from tests.tiny_checkpoint import make_tiny_checkpoint


def loads(*tokens):
    return [StepLoad(n, n * n / 2) for n in tokens]


def test_the_cost_of_a_device_is_found_again():
    cost = StepCost(fixed_ms=3.0, root_ms=0.2, token_ms=0.01, pair_ms=2e-6)
    measured = [(load, cost.step_ms(load)) for load in loads(50, 200, 900, 4000, 16_000)]
    found = fit_cost(measured)
    for load in loads(100, 2000, 10_000):
        assert found.step_ms(load) == pytest.approx(cost.step_ms(load), rel=1e-6)


def test_two_sizes_give_a_line():
    cost = StepCost(fixed_ms=3.0, token_ms=0.01)
    found = fit_cost([(load, cost.step_ms(load)) for load in loads(100, 400)])
    assert (found.fixed_ms, found.token_ms) == (pytest.approx(3.0), pytest.approx(0.01))
    assert found.root_ms == found.pair_ms == 0.0


def test_noise_never_makes_a_term_negative():
    found = fit_cost(list(zip(loads(100, 400), (10.0, 60.0), strict=True)))  # dearer by the token
    assert min(found.fixed_ms, found.root_ms, found.token_ms, found.pair_ms) >= 0.0
    assert found.step_ms(StepLoad(400, 0)) > 0


def test_every_configured_size_is_drawn_before_the_worker_is_ready():
    pipeline, beats = FakePipeline(step_s=0.001), []
    warm = warm_up(LoadedModel(pipeline, FAKE_INFO), [(32, 32), (48, 16)], lambda: beats.append(1))
    assert len(pipeline.batches) == 4 * STEPS
    assert len(beats) == 4
    assert warm.info.step_cost_ms >= 1.0
    assert 0 <= warm.info.step_fixed_ms <= warm.info.step_cost_ms
    assert warm.cost.step_ms(StepLoad(4, 4)) > 0


def test_a_step_that_compiled_is_not_what_is_measured():
    torch.compiler.reset()
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)

    class Compiling(FakePipeline):
        def denoise_step(self, states):
            double(torch.ones(3))
            super().denoise_step(states)

    pipeline, beats = Compiling(step_s=0.001), []
    warm_up(LoadedModel(pipeline, FAKE_INFO), beat=lambda: beats.append(1))
    assert len(pipeline.batches) == 3 * STEPS
    assert len(beats) == 3
    torch.compiler.reset()


def test_loras_are_read_before_the_worker_is_ready_and_leave_room_for_the_rest():
    class Loras:
        read, growth_bytes = False, 2**62

        def load_ahead(self, beat):
            self.read = True
            beat()

    pipeline, beats = FakePipeline(), []
    pipeline.loras = Loras()
    warm = warm_up(LoadedModel(pipeline, FAKE_INFO), beat=lambda: beats.append(1))
    assert pipeline.loras.read
    assert len(beats) == 3
    assert 0 < warm.memory.limit_bytes <= 1  # more is promised than there is


def test_a_size_memory_does_not_suffice_for_is_skipped():
    pipeline = FakePipeline(memory=4)
    warm = warm_up(LoadedModel(pipeline, FAKE_INFO), [(64, 64), (32, 32)])
    assert len(pipeline.batches) == 3 * STEPS + 1
    assert warm.cost.step_ms(StepLoad(4, 4)) > 0


def test_a_size_the_checkpoint_cannot_draw_is_refused(tmp_path):
    model = load_model(make_tiny_checkpoint(tmp_path))
    with pytest.raises(ValueError, match="width 65"):
        warm_up(model, [(65, 64)])


def test_compiled_graphs_are_counted_and_recompiles_seen():
    torch.compiler.reset()

    @torch.compile(backend="eager", dynamic=False)
    def double(x):
        return 2 * x

    before = compiled_graphs()
    double(torch.ones(3))
    after_first = compiled_graphs()
    double(torch.ones(3))
    assert compiled_graphs() == after_first == before + 1
    double(torch.ones(5))
    assert compiled_graphs() == before + 2
    torch.compiler.reset()
