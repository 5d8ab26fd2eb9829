"""Who is named when ranks stand still, and who may report; whole runs are in reliability/dead_ranks.py."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

import pytest

from step37_lit.megatron.first_rank_watch import FirstRankWatch
from step37_lit.megatron.other_rank_watch import OtherRankWatch
from step37_lit.megatron.rank_link import Link
from step37_lit.megatron.rank_verdict import GRACE, Member, Position, Progress, Seen, judge

TIMEOUT = 60.0


def ranks(*positions: Position, heard: float = 100.0, moved: float = 100.0) -> dict[int, Seen]:
    members = [Member(rank, f"node{rank // 2}", 1000 + rank, f"DP {rank}") for rank in range(len(positions))]
    return {m.rank: Seen(m, heard, position, moved) for m, position in zip(members, positions, strict=True)}


def at(marks: int, where: str = "step 3 (packs)", timed: bool = True, line: str = "", waits: bool = True) -> Position:
    return Position(marks, where, timed, line, waits)


def test_nothing_is_wrong_while_ranks_answer_and_move() -> None:
    seen = ranks(at(7), at(7))
    assert judge(seen, 100.0 + TIMEOUT - 1, TIMEOUT) is None
    seen[0].hear(at(8), 150.0), seen[1].hear(at(7), 150.0)
    assert judge(seen, 100.0 + TIMEOUT, TIMEOUT) is None  # one of them has moved
    assert judge(ranks(at(7), at(7)), 1e9, None) is None


def test_a_dead_rank_is_named_with_its_place_and_the_others() -> None:
    seen = ranks(at(7, "step 3 (optimizer)"), at(6), at(7, "step 3 (optimizer)"))
    seen[1].state = "dead"
    found = judge(seen, 100.0, TIMEOUT)
    assert found is not None and found.kind == "dead" and found.culprit == seen[1].member
    assert found.line == (
        "rank 1 (DP 1; node0, pid 1001) is dead: its connection broke; last seen in step 3 (packs); "
        "ranks 0, 2 in step 3 (optimizer)"
    )


def test_a_death_comes_before_the_errors_that_it_gives() -> None:
    seen = ranks(at(7), at(7), at(7))
    seen[0].fail("RuntimeError: Connection closed by peer", of_another=True, now=100.0)
    assert judge(seen, 100.0 + GRACE / 2, TIMEOUT) is None
    seen[2].state = "dead"
    found = judge(seen, 100.0 + GRACE / 2, TIMEOUT)
    assert found is not None and found.culprit == seen[2].member


def test_an_error_of_a_ranks_own_comes_before_one_of_another() -> None:
    seen = ranks(at(7), at(7), at(7))
    seen[0].fail("RuntimeError: Connection closed by peer", of_another=True, now=100.0)
    seen[2].fail("ValueError: no", of_another=False, now=101.0)
    found = judge(seen, 100.0 + GRACE, TIMEOUT)
    assert found is not None and found.culprit == seen[2].member and "has failed with ValueError: no" in found.line
    seen[1].fail("ValueError: no", of_another=False, now=101.0)  # all have failed: each tells its own error
    assert judge(seen, 100.0 + GRACE, TIMEOUT) is None


def test_who_does_not_answer_is_silent() -> None:
    seen = ranks(at(7), at(7), at(7))
    seen[0].hear(at(7), 150.0), seen[2].hear(at(7), 150.0)
    found = judge(seen, 100.0 + TIMEOUT, TIMEOUT)
    assert found is not None and found.kind == "silent" and found.culprit == seen[1].member
    seen[1].state = "left"
    assert judge(seen, 100.0 + TIMEOUT - 1, TIMEOUT) is None


STUCK: dict[str, tuple[list[Position], int | None]] = {
    "behind the others": ([at(8), at(7), at(8)], 1),
    "at the same mark, and does not wait": ([at(7), at(7), at(7, waits=False)], 2),
    "one of those behind does not wait": ([at(7), at(8), at(7, waits=False)], 2),
    "all wait": ([at(7), at(7), at(7)], None),
    "nobody waits": ([at(7, waits=False), at(7, waits=False), at(7, waits=False)], None),
}


@pytest.mark.parametrize("case", STUCK)
def test_who_is_stuck(case: str) -> None:
    positions, culprit = STUCK[case]
    seen = ranks(*positions)
    for each in seen.values():
        each.heard = 100.0 + TIMEOUT  # they all answer
    found = judge(seen, 100.0 + TIMEOUT, TIMEOUT)
    assert found is not None and found.kind == "stuck"
    assert (None if found.culprit is None else found.culprit.rank) == culprit
    assert "no rank has come further for 60 s" in found.line and "step 3 (packs)" in found.line


def test_loading_and_saving_may_take_their_time() -> None:
    seen = ranks(at(8), at(7, "a save", timed=False))
    for each in seen.values():
        each.hear(each.position, 100.0 + TIMEOUT)
    assert judge(seen, 100.0 + TIMEOUT, TIMEOUT) is None


def test_progress_tells_where_the_code_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    progress.mark("step 3 (packs)")
    assert progress.position() == Position(1, "step 3 (packs)", True)
    monkeypatch.setattr("step37_lit.megatron.rank_verdict.STANDING", -1.0)
    assert progress.position().line.endswith(" position") and not progress.position().waits
    with progress.untimed("a save"):
        assert not progress.position().timed
    assert progress.position().timed and progress.position().marks == 3


def test_only_who_knows_the_token_is_heard() -> None:
    members = [Member(rank, "here", os.getpid(), "DP") for rank in range(2)]
    first = FirstRankWatch(members[0], Progress(), TIMEOUT, 2)
    first.start()
    hello = {"token": "guess", "member": {"rank": 1, "host": "here", "pid": 1, "role": "DP"}}
    for message in (json.dumps(hello).encode() + b"\n", b"GET / HTTP/1.0\n", b"[]\n"):
        with socket.create_connection(("127.0.0.1", first.port), timeout=60) as stranger:
            stranger.sendall(message)
            assert stranger.recv(16) == b""  # hung up
    assert list(first._seen) == [0]
    where: dict[str, Any] = {"address": "127.0.0.1", "port": first.port, "token": first.token}
    other = OtherRankWatch(members[1], Progress(), TIMEOUT, members[0], **where, speaks=True)
    other.start()
    other.close()  # says goodbye, so that its end is none to name
    deadline = time.monotonic() + 60
    while 1 not in first._seen or first._seen[1].state == "here":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.close()
    assert first._seen[1].state == "left"


def test_messages_come_whole_whatever_pieces_they_come_in() -> None:
    ours, theirs = socket.socketpair()
    link = Link(theirs)
    ours.sendall(b'{"a": 1}\n{"b"')
    assert link.receive() == [{"a": 1}]
    ours.sendall(b": 2}\n")
    assert link.receive() == [{"b": 2}]
    ours.close()
    assert link.receive() is None
