"""The ring and the messages: what a trainer can do to them, and what it cannot."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.errors import CatalogError
from loaderd import Feed, messages, ring
from loaderd.messages import MessageError
from loaderd.ring import Layout, Ring

LAYOUTS = st.builds(
    Layout,
    batch_size=st.integers(1, 9),
    structures=st.integers(0, 3),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    slots=st.integers(1, 4),
)


@given(LAYOUTS)
def test_views_fill_a_slot_and_never_overlap(layout: Layout) -> None:
    """Every array of a slot has its shape, none shares a byte with another, and no slot reaches into the next."""
    fd = ring.create(layout)
    views = Ring(fd, layout, writable=True)
    os.close(fd)
    number = 0
    for slot in map(views.slot, range(layout.slots)):
        for array in (slot.header, slot.sample_ids, slot.sample_keys, slot.valid, slot.present, slot.images, slot.masks):
            number += 1
            array.view(np.uint8)[...] = number % 251
    number = 0
    for slot in map(views.slot, range(layout.slots)):
        assert slot.images.shape == (layout.batch_size, layout.rows, layout.columns) and slot.images.dtype == layout.dtype
        assert slot.masks.shape == (layout.batch_size, layout.structures, layout.rows, layout.columns)
        for array in (slot.header, slot.sample_ids, slot.sample_keys, slot.valid, slot.present, slot.images, slot.masks):
            number += 1
            assert (array.view(np.uint8) == number % 251).all()
            assert array.base is slot.base  # so that the end of the last view is the end of the lease


def test_a_ring_cannot_be_resized_nor_written_through_a_trainers_descriptor() -> None:
    """The memfd is sealed against resizing, has mode 0600, and the descriptor that trainers get is read-only."""
    layout = Layout(2, 1, 8, 8, "float32", 2)
    fd = ring.create(layout)
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    for size in (0, layout.size * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with ring.read_only(fd) as given_away:
        with pytest.raises(PermissionError):
            mmap.mmap(given_away, layout.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError):
            os.write(given_away, b"x")
        mapped = Ring(given_away, layout)
    assert not mapped.slot(0).images.flags.writeable
    with pytest.raises(CatalogError, match="not of the size"):
        Ring(fd, Layout(2, 1, 64, 64, "float32", 2))
    os.close(fd)


def test_a_ring_that_cannot_fit_says_what_it_needs() -> None:
    """A ring larger than the memory is refused before a page is taken, with its size and what to change."""
    with pytest.raises(CatalogError, match=r"needs \d+ MiB \(16 slots of .* MiB\).*batch_size or fewer slots"):
        ring.create(Layout(65_536, 1, 4_096, 4_096, "float64", 16))


@given(st.sampled_from(sorted(messages.PACKED)), st.data())
def test_packed_messages_come_back(op: str, data: st.DataObject) -> None:
    """A message of whole numbers is the same on the other side, and none that goes once a batch is over 4 KiB."""
    whole = st.integers(0, 2**63 - 1)
    if op == "next":
        message = {
            "op": op,
            "ack": data.draw(st.none() | st.lists(whole, min_size=2, max_size=2)),
            "free": data.draw(st.lists(st.lists(whole, min_size=2, max_size=2), max_size=128)),
        }
    else:
        message = {"op": op, **{name: data.draw(whole) for name in messages.PACKED[op][1]}}
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        messages.send(left, message)
        assert messages.receive(right) == message
        left.send(messages._pack(message))
        assert len(right.recv(messages.LIMIT)) <= 4_096


@given(st.binary(max_size=200))
def test_bytes_are_a_message_or_refused(data: bytes) -> None:
    """Whatever comes out of a socket is a JSON object or a MessageError, never anything else."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        left.send(data or b" ")
        with contextlib.suppress(MessageError):
            assert isinstance(messages.receive(right), dict)


def test_long_and_deep_messages_are_refused() -> None:
    """A message over the limit and one of 30,000 brackets are refused on the side that would take them."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        with pytest.raises(MessageError, match="over the limit"):
            messages.send(left, {"op": "attach", "where": "x" * messages.LIMIT})
        for data in (b"[" * 30_000, b"{" + b" " * messages.LIMIT + b"}"):
            left.send(data)
            with pytest.raises(MessageError):
                messages.receive(right)


def test_long_socket_paths(tmp_path: Path) -> None:
    """A socket whose path is over 107 bytes can be bound and reached."""
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening, messages.Address(folder / "s.sock") as name:
        listening.bind(name)
        listening.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as calling, messages.Address(folder / "s.sock") as again:
            calling.connect(again)


def test_a_strange_client_harms_nobody(ingested: str, loaderd: Callable[..., object]) -> None:
    """Random bytes, half messages, wrong order, another protocol and many connections: each is refused, and a trainer beside feeds on."""
    from catalog import database

    with Feed(structures=["inner"], batch_size=2) as feed:
        with database.open_database(ingested) as db:
            address = messages.Address(messages.socket_path(db.identity()))
        strange = [
            b"\x80\x04N.", b"[]", b"{}", b"\x01", b"\x04" + bytes(16),
            b"\x02" + bytes(40), b"{", b'{"op":"next"}', b'{"op":"epoch","epoch":0}', b'{"op":"attach"}', b'{"op":"bye"}',
            b'{"op":"attach","protocol":1,"definition":{"structures":"inner"}}', b'{"op":"attach","protocol":1,"definition":[]}',
            b'{"op":"attach","protocol":1,"definition":{},"slots":1e9}', b'{"op":"attach","protocol":1,"definition":{"batch_size":true}}',
            struct.pack("16384s", b"x"), b'{"op":"attach","protocol":1,"definition":{"seed":"x"}}',
        ]  # fmt: skip
        for data in strange:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(address.name)
                sock.settimeout(5)
                sock.send(data)
                answer = sock.recv(messages.LIMIT)
                assert json.loads(answer)["op"] == "error", (data, answer)
                assert sock.recv(10) == b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(address.name)
            sock.send(json.dumps({"op": "attach", "protocol": 999, "version": "9"}).encode())
            assert "protocol 999" in json.loads(sock.recv(messages.LIMIT))["message"]
        attaching = {"definition": {}, "rank": 0, "num_ranks": 1, "versions": {}}
        for data in (
            b"{}",
            b'{"op":"epoch"}',
            b'{"op":"epoch","epoch":-1,"ahead":0}',
            b'{"op":"x","free":7}',
            b'{"op":"x","ack":[1]}',
            b"\x02",
        ):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(address.name)
                sock.settimeout(10)
                sock.send(json.dumps({"op": "attach", "protocol": messages.PROTOCOL, **attaching}).encode())
                reply, fds = messages.receive_fds(sock)
                assert reply is not None and reply["op"] == "attached"
                os.close(fds[0])
                sock.send(data)
                if data == b"{}":  # says nothing, and does nothing
                    continue
                assert json.loads(sock.recv(messages.LIMIT))["op"] == "error", data
        many = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(300)]
        for sock in many:
            sock.connect(address.name)
        assert sum(len(batch) for batch in feed.epoch()) == feed.num_samples
        for sock in many:
            sock.close()
        assert sum(len(batch) for batch in feed.epoch()) == feed.num_samples
        assert loaderd("status").returncode == 0  # type: ignore[attr-defined]
