"""What a claim carries for the scheduler, and the cheap look at whether claims hold."""

from tests.server.queue.helpers import claim_one, submit


def test_a_claim_carries_its_priority_and_the_time_to_its_deadline(in_queue, clock):
    async def test(queue):
        await submit(queue, priority="high", deadline_s=10.0)
        clock.advance(4)
        urgent = await claim_one(queue)
        assert (urgent.priority, urgent.waited_ms, urgent.left_ms) == ("high", 4000, 6000)
        await submit(queue)
        patient = await claim_one(queue)
        assert (patient.priority, patient.left_ms) == ("normal", None)

    in_queue(test)


def test_a_look_tells_held_claims_from_others(in_queue, clock):
    async def test(queue):
        assert await queue.look([]) == []
        for _ in range(3):
            await submit(queue)
        held, canceled, released = [await claim_one(queue) for _ in range(3)]
        await queue.cancel(canceled.job_id)
        await queue.release(released)
        again = await claim_one(queue)
        assert again.job_id == released.job_id
        assert await queue.look([held, canceled, released, again]) == [True, False, False, True]

    in_queue(test)
