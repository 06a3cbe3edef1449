"""The engine does no more than it must: forwards, waits, refiner calls, padding, operators.

Counts hold on every machine, seconds do not: so these are gates, and times are not.
"""

import pytest

from model import load_pipeline
from model.cache_config import CacheConfig, SkipSchedule
from tests.tiny_checkpoint import make_tiny_checkpoint

EVERYTHING = (
    {},
    {"guidance_scale": 1.0},
    {"cfg_trunc_ratio": 0.5},
    {"sampler": "midpoint", "cache": "balanced"},
    {"cache": 0.1},
    {"cache": 0.3, "num_images": 2},
    {"cache": "balanced", "guidance_scale": 1.0},
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    loaded = load_pipeline(make_tiny_checkpoint(tmp_path_factory.mktemp("counters") / "tiny"))
    half = SkipSchedule("euler", tuple(i / 8 for i in range(8)), (True, False) * 3 + (True,) * 2, 1)
    loaded.cache_config = CacheConfig((0.0, 0.0, 0.0, 1.0, 0.0), {"balanced": (half,)})
    return loaded


def test_an_engine_step_is_one_forward_without_padding_or_repeated_work(pipeline):
    from benchmarks.counters import engine_counts

    counts = engine_counts(pipeline, EVERYTHING)
    assert counts["forwards_per_step"] == 1
    assert counts["block_runs_per_step"] <= 1
    assert counts["host_waits_per_step_most"] == 1  # the thresholds' decisions, all in one copy
    assert counts["context_refiner_calls_per_branch"] == 1
    assert counts["time_embeddings_per_timestep"] <= 1
    assert counts["padded_tokens"] == 0


def test_without_a_threshold_the_host_never_waits(pipeline):
    from benchmarks.counters import engine_counts

    lossless = [{key: v for key, v in each.items() if key != "cache"} for each in EVERYTHING]
    assert engine_counts(pipeline, lossless)["host_waits_per_step_most"] == 0
    static = [each | {"cache": "balanced"} for each in lossless]
    assert engine_counts(pipeline, static)["host_waits_per_step_most"] == 0


def test_fewer_operators_than_diffusers(pipeline, tmp_path_factory):
    from benchmarks.common import diffusers_pipeline
    from benchmarks.counters import operator_counts

    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("counters-reference") / "tiny")
    counts = operator_counts(pipeline, diffusers_pipeline(folder).transformer)
    assert counts["ours, 1 sample"] <= 0.6 * counts["diffusers, 1 sample"], counts
    assert counts["ours, 8 samples"] <= 0.15 * counts["diffusers, 8 samples"], counts


@pytest.mark.slow
def test_the_joint_blocks_compile_once_for_all_lengths_and_sizes():
    from benchmarks.counters import compile_counts

    assert compile_counts() == {"graphs": 1, "graph_breaks": 0, "recompiles": 0}


def test_a_text_is_encoded_once(pipeline):
    from model import GenerationRequest

    encoder, texts = pipeline.text_encoder, []
    hook = encoder.model.register_forward_hook(
        lambda _, __, kwargs, ___: texts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for number in (0, 1, 2, 3, 3):
            pipeline.prepare(GenerationRequest(f"number {number}", negative_prompt="the negative"))
    finally:
        hook.remove()
    assert len(texts) == 4 + 1  # four prompts, and the negative of them all


def test_modulation_of_a_timestep_does_not_depend_on_its_company(pipeline):
    import torch

    from model.modulation import ModulationTable

    alone, together = ModulationTable(pipeline.dit), ModulationTable(pipeline.dit)
    with torch.inference_mode():
        batch = together.of([0.5, 0.25, 0.5, 0.75], [()] * 4)
        assert batch.rows == (0, 1, 0, 2)
        for row, timestep in enumerate((0.5, 0.25, 0.75)):
            single = alone.of([timestep], [()])
            assert torch.equal(batch.final[row], single.final[0])
            for many, one in zip(batch.layers, single.layers, strict=True):
                for part in range(2):
                    assert torch.equal(many[part][row], one[part][0])
    assert len(together.cache) == 3


def test_looked_up_modulation_gives_the_velocities_of_the_forward(pipeline):
    import torch

    dit = pipeline.dit
    with torch.inference_mode():
        latents = [torch.randn(16, 4, 4), torch.randn(16, 6, 2), torch.randn(16, 4, 4)]
        prompts = [torch.randn(length, dit.config.cap_feat_dim) for length in (3, 9, 5)]
        times = torch.tensor([0.75, 0.25, 0.75])
        looked_up = pipeline.modulation.of(times.tolist(), [()] * len(times))
        packed = dit.embed(latents, times, dit.encode_context(prompts), modulation=looked_up)
        for found, computed in zip(
            dit.head(dit.blocks(packed)), dit(latents, times, prompts), strict=True
        ):
            torch.testing.assert_close(found, computed, rtol=1e-5, atol=1e-5)
