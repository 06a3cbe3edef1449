"""Every kernel compiled for GPUs that are not here: it compiles, and no register spills."""

from dataclasses import replace

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("capability", [80, 90])
def test_nothing_spills(capability):
    from benchmarks.kernel_resources import CAPABILITIES, launches, resources
    from kernels.dispatch import DEFAULTS
    from model.config import NAMED_CONFIGS

    assert capability in CAPABILITIES
    found = {name: resources(each, capability) for name, each in launches(NAMED_CONFIGS["2.6B"])}
    assert {name.split(",")[0] for name in found} >= DEFAULTS.keys()
    for name, used in found.items():
        print(f"sm_{capability} {name}: {used}")
    assert not {name: used for name, used in found.items() if used["spilled_bytes"]}
    assert max(used["registers"] for used in found.values()) <= 96, "fewer programs at a time"
    assert max(used["shared_bytes"] for used in found.values()) <= 16384


def test_a_program_that_holds_too_much_is_noticed():
    from benchmarks.kernel_resources import launches, resources
    from model.config import NAMED_CONFIGS

    _, launch = next(iter(launches(NAMED_CONFIGS["2.6B"])))
    greedy = replace(launch, num_warps=1, constants={"WIDTH": 8000, "BLOCK": 8192})
    assert resources(greedy, 90)["spilled_bytes"] > 0
