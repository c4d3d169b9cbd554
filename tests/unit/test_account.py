# SPDX-License-Identifier: MIT
"""The account closes exactly, whatever was lost where."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlproto.pipeline.account import PLACES, Account
from nlproto.records import wire

CONTEXT = wire.lib.SNIFFER_HOW_CONTEXT
NO_SOCKET = wire.lib.SNIFFER_HOW_NO_SOCKET


class Cpu:
    """One CPU's stream as the kernel makes it."""

    def __init__(
        self,
        cpu: int = 0,
        instance: int = 1,
        record_seq: int = 0,
        packets: int = 0,
        skipped: int = 0,
        lost: int = 0,
    ) -> None:
        self.cpu, self.instance = cpu, instance
        self.record_seq, self.packets, self.skipped, self.lost = record_seq, packets, skipped, lost

    def send(self, records: Any, copies: int = 0, skipped: int = 0) -> Any:
        head = np.zeros(1, wire.BATCH)[0]
        self.packets += records - copies + skipped
        self.skipped += skipped
        head["cpu"], head["instance"], head["count"] = self.cpu, self.instance, records
        head["record_seq"], head["packets"] = self.record_seq, self.packets
        head["skipped"], head["lost"] = self.skipped, self.lost
        self.record_seq += records
        return head

    def lose(self, records: Any) -> None:
        self.lost += records
        self.record_seq += records
        self.packets += records

    def tail(self) -> Any:
        tail = np.zeros(1, wire.TAIL)
        tail["cpu"], tail["record_seq"] = self.cpu, self.record_seq
        tail["packets"], tail["skipped"], tail["lost"] = self.packets, self.skipped, self.lost
        return tail


def hows(*values: Any) -> Any:
    return np.array(values, np.uint8)


def test_what_is_received_and_named_closes() -> None:
    account, cpu = Account(), Cpu(record_seq=500, packets=900, skipped=400)
    account.add(cpu.send(3))
    account.add(cpu.send(2, skipped=5))
    account.deliver(hows(CONTEXT, CONTEXT, CONTEXT, NO_SOCKET, NO_SOCKET))
    assert (account.packets, account.recorded, account.skipped) == (10, 5, 5)
    assert (account.records, account.delivered, account.named) == (5, 5, 3)
    assert account.unnamed == {"no_socket": 2}
    assert account.by_how == {"context": 3, "no_socket": 2}
    assert account.closes()


def test_a_gap_is_loss_in_the_socket_buffer_and_growth_of_lost_is_not() -> None:
    account, cpu = Account(), Cpu()
    account.add(cpu.send(3))
    cpu.send(10)
    cpu.lose(4)
    account.add(cpu.send(1))
    account.deliver(hows(*[CONTEXT] * 4))
    assert account.lost == {
        "alloc": 4,
        "missed": 0,
        "socket": 10,
        "queue": 0,
        "client": 0,
        "failed": 0,
    }
    assert (account.records, account.delivered) == (18, 4)
    assert account.closes()


def test_the_tail_proves_what_was_lost_after_the_last_batch() -> None:
    account, cpu = Account(), Cpu()
    account.add(cpu.send(3))
    account.deliver(hows(*[CONTEXT] * 3))
    cpu.send(7, skipped=2)
    account.close(cpu.tail())
    assert account.lost["socket"] == 7
    assert (account.packets, account.skipped) == (12, 2)
    assert account.closes()


def test_an_opened_account_counts_from_there_also_on_a_cpu_that_stays_silent() -> None:
    account, cpu, silent = Account(), Cpu(cpu=0, packets=9), Cpu(cpu=1, record_seq=70, packets=70)
    account.open(np.concatenate([cpu.tail(), silent.tail()]), instance=1)
    cpu.send(5)
    account.add(cpu.send(2, copies=1))
    account.deliver(hows(CONTEXT, CONTEXT))
    silent.send(6)
    account.close(np.concatenate([cpu.tail(), silent.tail()]))
    assert account.lost["socket"] == 11
    assert (account.records, account.recorded, account.copies) == (13, 12, 1)
    assert account.closes()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_batches_out_of_order_are_not_lost(order: Any) -> None:
    account, cpu = Account(), Cpu(record_seq=50, packets=50)
    heads = cpu.send(3), cpu.send(4), cpu.send(5)
    for number in order:
        account.add(heads[number])
    account.deliver(hows(*[CONTEXT] * 12))
    assert (account.packets, account.records, sum(account.lost.values())) == (12, 12, 0)
    assert account.closes()


def test_a_batch_that_came_twice_does_not_close() -> None:
    account, cpu = Account(), Cpu()
    head = cpu.send(3)
    account.add(head)
    account.add(head)
    account.deliver(hows(*[CONTEXT] * 6))
    assert not account.closes()


def test_delivered_is_what_was_handed_on_and_nothing_that_waits_or_was_lost() -> None:
    account, cpu = Account(), Cpu()
    account.add(cpu.send(9))
    account.lose("queue", 3)
    account.lose("client", 2)
    account.lose("failed", 1)
    assert (account.delivered, account.waiting) == (0, 3)
    assert not account.closes()
    assert account.as_dict()["delivered"] == account.as_dict(settled=True)["delivered"] == 0
    account.deliver(hows(*[NO_SOCKET] * 3))
    assert account.lost == {
        "alloc": 0,
        "missed": 0,
        "socket": 0,
        "queue": 3,
        "client": 2,
        "failed": 1,
    }
    assert (account.delivered, account.waiting) == (3, 0)
    assert account.closes()
    assert "6 lost (queue 3, client 2, failed 1)" in "\n".join(account.lines())


def test_copies_of_the_first_batch_are_known_from_its_records() -> None:
    account, cpu = Account(), Cpu()
    records = np.zeros(3, wire.RECORD)
    records["flags"][1:] = wire.lib.SNIFFER_F_COPY
    account.add(cpu.send(3, copies=2), records)
    assert (account.packets, account.recorded, account.copies) == (1, 1, 2)


def test_a_reloaded_module_starts_afresh_and_adds_up() -> None:
    account, old, new = Account(), Cpu(instance=1, record_seq=1000), Cpu(instance=2)
    account.add(old.send(3))
    account.add(new.send(2))
    new.send(4)
    account.close(new.tail())
    account.deliver(hows(*[CONTEXT] * 5))
    assert (account.records, account.instances) == (9, 2)
    assert account.lost["socket"] == 4
    assert account.closes()
    assert "restarted 1 times" in "\n".join(account.lines())


def test_lines_tell_the_sums() -> None:
    account, cpu = Account(), Cpu()
    account.add(cpu.send(4, skipped=1))
    account.deliver(hows(CONTEXT, CONTEXT, CONTEXT, NO_SOCKET))
    assert account.lines() == [
        "4 packets seen = 4 recorded + 0 skipped",
        "4 records = 4 delivered + 0 lost",
        "4 delivered = 3 named (75.0 %) + 1 unnamed (no socket 1)",
    ]


def test_an_empty_account_closes() -> None:
    assert Account().closes()
    assert Account().as_dict()["closes"] is True


step = st.tuples(
    st.integers(0, 3),
    st.sampled_from(["arrive", "drop", "alloc", "queue", "failed"]),
    st.integers(1, 200),
    st.integers(0, 9),
)


@pytest.mark.parametrize("opened", [True, False])
@given(steps=st.lists(step, max_size=60))
def test_any_stream_closes_with_exactly_what_was_lost(opened: bool, steps: Any) -> None:
    cpus = [Cpu(cpu, record_seq=cpu * 100, packets=cpu * 100) for cpu in range(4)]
    account = Account()
    if opened:
        account.open(np.concatenate([cpu.tail() for cpu in cpus]), 1)
    begun, truth, delivered = [opened] * 4, dict.fromkeys(PLACES, 0), 0
    for number, what, records, skipped in steps:
        cpu = cpus[number]
        if what == "alloc":
            cpu.lose(records)
            truth["alloc"] += records * begun[number]
        elif what == "drop":
            cpu.send(records, skipped=skipped)
            truth["socket"] += records * begun[number]
        else:
            account.add(cpu.send(records, skipped=skipped))
            begun[number] = True
            if what != "arrive":
                account.lose(what, records)
                truth[what] += records
            else:
                delivered += records
                account.deliver(np.full(records, CONTEXT, np.uint8))
    account.close(np.concatenate([cpu.tail() for cpu in cpus]))
    assert account.lost == truth
    assert account.delivered == account.named == delivered
    assert account.closes()


def test_an_instance_opened_again_keeps_what_was_counted_and_loses_what_came_between() -> None:
    cpu, account = Cpu(), Account()
    account.open(cpu.tail(), cpu.instance)
    account.add(cpu.send(5))
    account.deliver(hows(*[CONTEXT] * 5))
    cpu.send(3)
    account.gap(0.2)
    account.open(cpu.tail(), cpu.instance)
    account.add(cpu.send(2))
    account.deliver(hows(*[CONTEXT] * 2))
    assert account.lost["socket"] == 3
    assert account.closes()
    assert "nothing was recorded for 0.2 s" in "\n".join(account.lines())


def test_a_settled_account_leaves_out_what_still_waits_and_closes() -> None:
    cpu, account = Cpu(packets=50, skipped=50), Account()
    account.open(cpu.tail(), cpu.instance)
    account.add(cpu.send(5))
    account.add(cpu.send(2))
    account.deliver(hows(*[CONTEXT] * 5))
    found = account.as_dict(settled=True)
    assert (found["packets"], found["records"], found["delivered"]) == (5, 5, 5)
    assert found["position"] == {"instance": cpu.instance, "packets": 55}
    assert found["closes"] and not account.closes()


def test_who_goes_over_to_flows_and_back_has_each_groups_own_loss() -> None:
    account, packets, flows = Account(), Cpu(lost=7), Cpu(lost=100)
    account.open(packets.tail(), instance=1, group="packets")
    account.add(packets.send(3))
    packets.lose(2)
    flows.record_seq, flows.packets = packets.record_seq, packets.packets
    account.close(packets.tail(), "packets")
    account.go_over(flows.tail(), 1, "flows")
    account.add(flows.send(5), None, 5, "flows")
    flows.lose(1)
    packets.lost += 50  # of somebody else's
    packets.record_seq, packets.packets = flows.record_seq, flows.packets
    account.go_over(packets.tail(), 1, "packets")
    account.add(packets.send(4))
    packets.lose(1)
    packets.send(6)
    account.close(packets.tail(), "packets")
    account.deliver(hows(CONTEXT, CONTEXT), np.array([7, 5], np.uint32))
    assert (account.records, account.delivered) == (22, 12)
    assert (account.lost["alloc"], account.lost["socket"]) == (3, 7)
    assert account.closes()


def test_a_batch_of_flows_counts_the_records_it_stands_for() -> None:
    account, cpu = Account(), Cpu()
    account.open(cpu.tail(), instance=1, group="flows")
    head = cpu.send(10)
    head["count"] = 2  # flow records
    account.add(head, None, 10, "flows")
    account.deliver(hows(CONTEXT, NO_SOCKET), np.array([9, 1], np.uint32))
    assert (account.records, account.named, account.unnamed) == (10, 9, {"no_socket": 1})
    assert account.closes()
