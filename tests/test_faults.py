"""Where a value that is not finite began, from what the ranks report."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from step37_lit.faults import MOST_KEYS_SHOWN, Fault, NotFinite, RankReport, fault_of_spike, find_fault
from step37_lit.spikes import Spike

GOOD = ((2.0, 1.0),)


def bad(piece: int, place: int, name: str = "w") -> NotFinite:
    return NotFinite(piece, place, name, 1, 8)


def ranks(**changes: RankReport) -> list[RankReport]:
    """Two data-parallel ranks of two stages each: global rank = 2 x stage + data rank."""
    found = []
    for rank in range(4):
        stage, data_rank = divmod(rank, 2)
        losses = (GOOD, GOOD) if stage == 1 else ()
        keys = ((f"{data_rank}a", f"{data_rank}b"), (f"{data_rank}c",))
        found.append(RankReport(rank, data_rank, stage, keys, losses, counts=stage == 1, gradient_square=float(rank)))
    for name, change in changes.items():
        found[int(name[1:])] = replace(found[int(name[1:])], **change)
    return found


def find(grad_norm: float = math.nan, **changes: dict) -> Fault | None:
    return find_fault(7, ranks(**changes), 2.0, grad_norm)


NAN_LOSS = (GOOD, ((math.nan, 1.0),))


@pytest.mark.parametrize(
    ("changes", "rank", "what", "keys"),
    [
        # a weight before all that comes of it, the first one of the model, on the lowest rank
        (
            {
                "r3": {"weight": bad(1, 0), "output": (1, (0, 1))},
                "r0": {"weight": bad(0, 9)},
                "r1": {"weight": bad(0, 9)},
            },
            0, "weight w not finite (1 of 8 numbers)", ("0a", "0b", "0c"),
        ),
        # an output of the first stage before the loss that it makes
        (
            {"r1": {"output": (0, (1,))}, "r3": {"output": (1, (1,)), "losses": NAN_LOSS, "own_gradient": True}},
            1, "output of pipeline stage 0 not finite", ("1c",),
        ),
        # a loss before its gradients, by its pack
        (
            {
                "r3": {"output": (1, (1,)), "losses": NAN_LOSS, "gradient": bad(1, 5), "own_gradient": True},
                "r2": {"gradient": bad(1, 5)},
            },
            3, "loss nan", ("1c",),
        ),
        # a gradient of the last piece before those behind it; not of a rank that only has the sum
        (
            {
                "r0": {"gradient": bad(0, 9), "own_gradient": True},
                "r2": {"gradient": bad(1, 4, "later"), "own_gradient": True},
                "r3": {"gradient": bad(1, 6)},
            },
            2, "gradient of later not finite (1 of 8 numbers)", ("0a", "0b", "0c"),
        ),
        # of one piece the last weight
        (
            {
                "r2": {"gradient": bad(1, 4), "own_gradient": True},
                "r3": {"gradient": bad(1, 6, "last"), "own_gradient": True},
            },
            3, "gradient of last not finite (1 of 8 numbers)", ("1a", "1b", "1c"),
        ),
        # only the sum over ranks
        ({"r2": {"gradient": bad(1, 4)}}, 2, "gradient of w not finite (1 of 8 numbers)", ("0a", "0b", "0c")),
        # only the sum of the squares
        ({}, 3, "gradient norm nan (no gradient is, but the sum of their squares)", ("1a", "1b", "1c")),
    ],
)  # fmt: skip
def test_the_cause_is_named(changes: dict, rank: int, what: str, keys: tuple[str, ...]) -> None:
    fault = find(**changes)
    assert fault is not None
    assert (fault.rank, fault.what, fault.keys) == (rank, what, keys)
    assert (fault.data_rank, fault.stage, fault.stages) == (rank % 2, rank // 2, 2)


def test_finite_is_no_fault() -> None:
    assert find(grad_norm=3.0) is None
    assert find(grad_norm=3.0, r0={"own_gradient": True}) is None  # only the squares of a rank's sums are too large


def test_mtp_losses_are_told_apart() -> None:
    fault = find(r2={"output": (1, (0,)), "losses": (((2.0, 1.0), (3.0, 1.0), (math.inf, 1.0)), GOOD)})
    assert fault is not None and fault.what == "loss of MTP layer 2 inf" and fault.keys == ("0a", "0b")


@pytest.mark.parametrize(
    ("name", "changes", "rank"),
    [
        ("loss", {"r2": {"losses": (((8.0, 4.0),),)}, "r3": {"losses": (((3.0, 1.0),),)}}, 3),
        ("grad_norm", {"r0": {"gradient_square": 9.0}, "r2": {"gradient_square": 1.0}}, 0),
        # by token: the same square of a tenth of the tokens is the larger gradient
        (
            "grad_norm",
            {
                "r0": {"gradient_square": 9.0}, "r2": {"gradient_square": 0.0, "losses": (((2.0, 10.0),),)},
                "r1": {"gradient_square": 0.0}, "r3": {"gradient_square": 8.0, "losses": (((2.0, 1.0),),)},
            },
            3,
        ),
    ],
)  # fmt: skip
def test_a_spike_is_of_the_rank_with_the_largest_own_value(name: str, changes: dict, rank: int) -> None:
    fault = fault_of_spike(7, ranks(**changes), Spike(name, 8.0, 2.0, 50, 3.0))
    assert (fault.rank, fault.limit, fault.watched) == (rank, 6.0, name)


def test_a_long_list_of_samples_says_how_many_more() -> None:
    keys = tuple(map(str, range(MOST_KEYS_SHOWN + 5)))
    fault = Fault(7, "loss", "loss nan", 1, 0, 1, 2, keys, (0,))
    assert str(fault) == "step 7: loss nan on rank 1 (data-parallel rank 0, pipeline stage 1 of 2)"
    assert fault.samples.startswith("samples '0', '1', ") and fault.samples.endswith(" and 5 more")
    assert fault.samples.count("'") == 2 * MOST_KEYS_SHOWN
