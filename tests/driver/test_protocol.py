"""The wire, byte for byte, against a server written out by hand after i-PI's interfaces/sockets.py."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory

import numpy as np
import pytest

from voltpi.driver.protocol import Closed, ProtocolError, Structures, Wire, encode_extras, real_structures
from voltpi.potential.errors import VoltPIError

from toy import Result

pytestmark = pytest.mark.timeout(20)

CELL = np.array([[10.0, 1.0, 2.0], [0.0, 11.0, 3.0], [0.0, 0.0, 12.0]])  # i-PI's h: upper triangular


def head(name: str) -> bytes:
    return name.upper().ljust(12).encode()


def init(text: str = "") -> bytes:
    return head("init") + struct.pack("<ii", 0, len(text)) + text.encode()


def posdata(positions: np.ndarray) -> bytes:
    return (
        head("posdata")
        + CELL.tobytes()
        + np.linalg.inv(CELL).tobytes()
        + struct.pack("<i", len(positions))
        + positions.tobytes()
    )


def batch(positions: np.ndarray) -> bytes:
    cells = b"".join((CELL * (1 + i)).tobytes() + np.linalg.inv(CELL).tobytes() for i in range(len(positions)))
    return head("posdata") + struct.pack("<i", positions.shape[1]) + cells + positions.tobytes()


def result(n: int, k: float = 1.0, extras: dict | None = None) -> Result:
    forces = k * np.arange(3.0 * n).reshape(n, 3)
    return Result(-1.5 * k, forces, k * np.arange(9.0).reshape(3, 3), extras or {})


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Wire]]:
    server, client = socket.socketpair()
    server.settimeout(10)
    wire = Wire(client)
    yield server, wire
    server.close()
    wire.close()


def read(server: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = server.recv(count - len(data))
        assert chunk, "the driver closed"
        data += chunk
    return data


def nothing_to_read(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        sock.recv(1)
    except BlockingIOError:
        return True
    finally:
        sock.settimeout(10)
    return False


def test_one_structure_in_consolidated_messages(pair):
    server, wire = pair
    r = np.random.default_rng(0).normal(size=(3, 3))
    server.sendall(2 * head("status") + init() + head("status") + posdata(r) + head("getforce") + head("exit"))
    structures = wire.receive()
    assert [read(server, 12) for _ in range(3)] == [head("needinit"), head("needinit"), head("ready")]
    assert np.array_equal(structures.cells, CELL[None])
    assert np.array_equal(structures.positions, r[None])
    assert wire.reply([result(3, extras={"dipole": [1.0, 2.0, 3.0], "note": "Å"})])
    assert read(server, 12) == head("forceready")
    assert struct.unpack("<d", read(server, 8)) == (-1.5,)
    assert struct.unpack("<i", read(server, 4)) == (3,)
    assert np.array_equal(np.frombuffer(read(server, 72)), np.arange(9.0))
    assert np.array_equal(np.frombuffer(read(server, 72)), np.arange(9.0))
    (length,) = struct.unpack("<i", read(server, 4))
    assert json.loads(read(server, length)) == {"dipole": [1.0, 2.0, 3.0], "note": "Å"}
    assert wire.receive() is None
    assert nothing_to_read(server)


def test_separate_messages_are_answered_with_havedata(pair):
    server, wire = pair
    server.sendall(init() + posdata(np.ones((2, 3))) + head("status"))
    wire.receive()
    server.sendall(head("getforce"))
    assert wire.reply([result(2)])
    assert read(server, 24) == head("havedata") + head("forceready")


def test_a_batch_has_one_count_and_all_numbers_in_order(pair):
    server, wire = pair
    r = np.random.default_rng(1).normal(size=(3, 2, 3))
    server.sendall(init("key : 3 ,  batch_size:3") + batch(r) + head("getforce"))
    structures = wire.receive()
    assert wire.batch_size == 3
    assert np.array_equal(structures.positions, r)
    assert np.array_equal(structures.cells, CELL * np.array([1, 2, 3])[:, None, None])
    assert wire.reply([result(2, k, {"k": k}) for k in (1.0, 2.0, 3.0)])
    assert read(server, 12) == head("forceready")
    assert np.array_equal(np.frombuffer(read(server, 24)), [-1.5, -3.0, -4.5])
    assert struct.unpack("<i", read(server, 4)) == (2,)
    assert np.array_equal(np.frombuffer(read(server, 144)).reshape(3, 6), np.outer([1, 2, 3], np.arange(6.0)))
    assert np.array_equal(np.frombuffer(read(server, 216)).reshape(3, 9), np.outer([1, 2, 3], np.arange(9.0)))
    for k in (1.0, 2.0, 3.0):
        (length,) = struct.unpack("<i", read(server, 4))
        assert json.loads(read(server, length)) == {"k": k}


def test_bytes_may_come_one_by_one(pair):
    server, wire = pair
    r = np.arange(6.0).reshape(2, 3)

    def drip() -> None:
        for byte in init() + posdata(r) + head("getforce"):
            server.sendall(bytes([byte]))
            time.sleep(0.0005)
        time.sleep(0.1)
        server.sendall(head("exit"))

    thread = threading.Thread(target=drip)
    thread.start()
    assert np.array_equal(wire.receive().positions[0], r)
    assert wire.reply([result(2)])
    assert wire.receive() is None
    thread.join()


def test_the_next_header_is_read_before_evaluating(pair):
    """A driver that is killed now leaves an empty queue, so i-PI sees end of file and not a reset."""
    server, wire = pair
    server.sendall(init() + posdata(np.ones((2, 3))) + head("getforce"))
    wire.receive()
    assert nothing_to_read(wire._socket)


def test_exit_instead_of_getforce_ends_it(pair):
    server, wire = pair
    server.sendall(init() + posdata(np.ones((2, 3))) + head("exit"))
    wire.receive()
    assert wire.reply([result(2)]) is False


@pytest.mark.parametrize("sent", [b"", b"STAT", head("posdata"), init() + posdata(np.ones((2, 3)))[:100]])
def test_a_server_that_goes_away_is_noticed(pair, sent):
    server, wire = pair
    server.sendall(sent)
    server.close()
    with pytest.raises(Closed, match="closed the connection"):
        wire.receive()


def test_exit_is_found_after_a_failed_send(pair):
    server, wire = pair
    server.sendall(init() + posdata(np.ones((2, 3))) + head("getforce") + head("exit"))
    wire.receive()
    server.close()
    with pytest.raises(Closed):
        wire.reply([result(2)])
    assert wire.said_exit()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("energy", np.nan, "the energy came out as nan"),
        ("forces", np.array([[0, 0, 0], [0, np.inf, 0]]), r"the forces of atom 1 \(from 0\) came out as inf"),
        ("forces", np.zeros((3, 3)), r"the forces came out with shape \[3, 3\] instead of \[2, 3\]"),
        ("virial", np.full((3, 3), np.nan), "the virial came out as nan"),
        ("extras", {"charges": [np.nan]}, "extras cannot be written as JSON"),
        ("extras", {"raw": 1}, "extras may not have the key 'raw'"),
    ],
)
def test_nothing_wrong_is_ever_sent(pair, field, value, words):
    server, wire = pair
    server.sendall(init() + posdata(np.ones((2, 3))) + head("getforce"))
    wire.receive()
    with pytest.raises(VoltPIError, match=words):
        wire.reply([result(2)._replace(**{field: value})])
    assert nothing_to_read(server)


@pytest.mark.parametrize("count", [0, -5, 2**30])
def test_nonsense_is_not_taken_for_i_pi(pair, count):
    server, wire = pair
    server.sendall(init() + head("posdata") + bytes(144) + struct.pack("<i", count))
    with pytest.raises(ProtocolError, match="mode='shm'"):
        wire.receive()


def test_another_server_is_not_taken_for_i_pi(pair):
    server, wire = pair
    server.sendall(b"HTTP/1.1 400 Bad Request\r\n")
    with pytest.raises(ProtocolError, match="not i-PI"):
        wire.receive()


def test_padding_is_counted_from_the_end_only():
    r = np.random.default_rng(2).normal(size=(3, 2, 3))
    padded = np.stack([r[0], r[1], r[1], r[2], r[2], r[2]])
    cells = np.repeat(CELL[None], 6, 0)
    assert real_structures(Structures(cells, padded)) == 4
    assert real_structures(Structures(cells[:1], padded[:1])) == 1
    cells = cells.copy()
    cells[5] *= 2
    assert real_structures(Structures(cells, padded)) == 6


def test_extras_are_ascii():
    text = encode_extras({"unit": "e·Å", "x": 0.1})
    assert text.isascii()
    assert json.loads(text) == {"unit": "e·Å", "x": 0.1}


def test_shared_memory_carries_the_numbers():
    batch_size, n = 2, 3
    r = np.random.default_rng(3).normal(size=(batch_size, n, 3))
    shapes = {k: (batch_size, 3, 3) for k in ("h", "ih", "vir")} | {"pot": (batch_size,)}
    segments = {}
    views = {}
    for kind in ("pos", "h", "ih", "pot", "force", "vir"):
        shape = shapes.get(kind, (batch_size, n, 3))
        segments[kind] = shared_memory.SharedMemory(create=True, size=8 * int(np.prod(shape)))
        views[kind] = np.ndarray(shape, buffer=segments[kind].buf)
    server, client = socket.socketpair()
    server.settimeout(10)
    wire = Wire(client, use_shared_memory=True)
    try:
        views["pos"][:], views["h"][:] = r, CELL
        names = b"".join(struct.pack("<i", len(s.name)) + s.name.encode() for s in segments.values())
        server.sendall(init("batch_size:2") + head("posdata") + struct.pack("<i", n) + names + head("getforce"))
        for scale in (1.0, 2.0):  # the names come only once
            structures = wire.receive()
            assert np.array_equal(structures.positions, scale * r)
            assert np.array_equal(structures.cells, np.stack([CELL, CELL]))
            wire.reply([result(n, scale), result(n, -scale)])
            assert read(server, 12) == head("forceready")
            assert read(server, 2 * (4 + 2)) == 2 * (struct.pack("<i", 2) + b"{}")
            assert np.array_equal(views["pot"], [-1.5 * scale, 1.5 * scale])
            assert np.array_equal(views["force"][1], -scale * np.arange(9.0).reshape(3, 3))
            assert np.array_equal(views["vir"][0], scale * np.arange(9.0).reshape(3, 3))
            views["pos"][:] = 2 * r
            server.sendall(head("posdata") + struct.pack("<i", n) + head("getforce"))
    finally:
        server.close()
        wire.close()
        views.clear()
        for segment in segments.values():
            # the driver's side took this name off the list of this process, which both sides share here
            resource_tracker.register(segment._name, "shared_memory")
            segment.close()
            segment.unlink()
    assert not any(os.path.exists(f"/dev/shm/{s.name}") for s in segments.values())
