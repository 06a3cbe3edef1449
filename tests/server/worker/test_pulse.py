import time

from server.worker.pulse import Pulse


def test_silence_beyond_the_limit_is_a_hang():
    pulse = Pulse(min_hang_s=0.05)
    assert not pulse.hung()
    time.sleep(0.08)
    assert pulse.hung()


def test_long_stages_seen_before_stretch_the_limit():
    pulse = Pulse(min_hang_s=0.01)
    time.sleep(0.05)
    pulse.beat()
    time.sleep(0.05)
    assert not pulse.hung()
