"""Which examples of a step go into which packed forward: ragged, within a token budget.

Every process computes the same plan from lengths alone, so nobody has to ask another.
"""

import heapq
from collections.abc import Sequence


def plan_packs(tokens: Sequence[int], budget: int, processes: int) -> list[list[list[int]]]:
    """Deal examples out to processes and forwards.

    Each process gets equally many forwards (collectives must match), as few as hold everything
    within the budget, and about equally many tokens in each.

    Args:
        tokens: of every example of the step.
        budget: most tokens of one forward.
        processes: that share the step.

    Returns:
        For every process its forwards, each the places of its examples; none is empty.

    Raises:
        ValueError: when an example alone is beyond the budget, or the processes' shares differ.
    """
    if len(tokens) % processes:
        raise ValueError(
            f"batch_images {len(tokens)} must be a multiple of the number of processes, {processes}"
        )
    longest = max(tokens)
    if longest > budget:
        raise ValueError(
            f"micro_tokens {budget} cannot hold an example of {longest} tokens; allow at least that"
        )
    order = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    forwards = max(1, -(-sum(tokens) // (budget * processes)))
    while True:
        packs = _deal(order, tokens, forwards * processes)
        if all(sum(tokens[i] for i in pack) <= budget for pack in packs):
            return [packs[process::processes] for process in range(processes)]
        forwards += 1  # ends at one example each
        assert forwards * processes <= len(tokens)


def _deal(order: Sequence[int], tokens: Sequence[int], num: int) -> list[list[int]]:
    """Longest first, each to the pack with the fewest tokens so far."""
    heap = [(0, place) for place in range(num)]
    packs: list[list[int]] = [[] for _ in range(num)]
    for example in order:
        load, place = heapq.heappop(heap)
        packs[place].append(example)
        heapq.heappush(heap, (load + tokens[example], place))
    return packs
