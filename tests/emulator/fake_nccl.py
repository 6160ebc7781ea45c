"""As much of cupy.cuda.nccl as distributed.py uses, for ranks that are processes of one machine.

A communicator is a socket to rank 0, which gathers what all send and sends it to all. A call queues its work
on the stream that it is given, as NCCL does: work that is never waited for never happens.
"""

import socket
import struct

import ml_dtypes
import numpy as np

available = True
TYPES = {7: np.dtype(np.float32), 9: np.dtype(ml_dtypes.bfloat16)}  # of nccl.h
SUM = 0

_listening = []  # rank 0's server, between get_unique_id and NcclCommunicator


def get_unique_id():
    """NCCL's 128 bytes; the first two are the port of rank 0."""
    _listening.append(socket.create_server(("127.0.0.1", 0)))
    port = _listening[-1].getsockname()[1]
    return bytes([port // 256, port % 256, *[0] * 126])


class NcclCommunicator:
    """One rank of a group; the calls are CuPy's, with addresses as numbers."""

    def __init__(self, n_ranks, unique_id, rank):
        if not isinstance(unique_id, bytes) or len(unique_id) != 128:
            raise TypeError("the id is 128 bytes")
        self.n_ranks, self.rank, self.others = n_ranks, rank, {}
        if rank > 0:
            address = "127.0.0.1", unique_id[0] * 256 + unique_id[1]
            self.others[0] = socket.create_connection(address, timeout=60)
            self.others[0].sendall(bytes([rank]))
            return
        with _listening.pop() as server:
            for _ in range(n_ranks - 1):
                other = server.accept()[0]
                self.others[other.recv(1)[0]] = other

    def allReduce(self, send, receive, count, dtype, operation, stream):
        self._queue(stream, send, count, dtype, receive, self._sum(operation))

    def reduceScatter(self, send, receive, count, dtype, operation, stream):
        total, mine = self._sum(operation), slice(self.rank * count, (self.rank + 1) * count)
        self._queue(stream, send, count * self.n_ranks, dtype, receive, lambda parts: total(parts)[mine])

    def allGather(self, send, receive, count, dtype, stream):
        self._queue(stream, send, count, dtype, receive, np.concatenate)

    def broadcast(self, send, receive, count, dtype, root, stream):
        self._queue(stream, send, count, dtype, receive, lambda parts: parts[root])

    def abort(self):
        for other in self.others.values():
            other.close()

    def _sum(self, operation):
        if operation != SUM:
            raise ValueError(f"operation {operation} is not NCCL_SUM")
        return lambda parts: np.sum(np.stack(parts).astype(np.float32), axis=0).astype(parts[0].dtype)

    def _queue(self, stream, send, count, dtype, receive, combine):
        """In the stream's time: what all ranks have at `send`, combined, goes to `receive`."""
        from . import fake_cupy  # noqa: PLC0415  which imports this file

        source = fake_cupy._bytes_at(send, count * TYPES[dtype].itemsize)

        def work():
            parts = self._exchange(source.host.tobytes())
            result = combine([np.frombuffer(part, TYPES[dtype]) for part in parts])
            fake_cupy._bytes_at(receive, result.nbytes).host[:] = result.view(np.uint8)

        fake_cupy._stream_of(stream).submit(work)

    def _exchange(self, mine):
        """[bytes of rank 0, bytes of rank 1, ...] on all ranks."""
        if self.rank > 0:
            self._send(0, mine)
            return [self._receive(0) for _ in range(self.n_ranks)]
        parts = [mine] + [self._receive(rank) for rank in range(1, self.n_ranks)]
        for rank in range(1, self.n_ranks):
            for part in parts:
                self._send(rank, part)
        return parts

    def _send(self, rank, content):
        self.others[rank].sendall(struct.pack("<Q", len(content)) + content)

    def _receive(self, rank):
        (length,) = struct.unpack("<Q", self._read(rank, 8))
        return self._read(rank, length)

    def _read(self, rank, length):
        content = b""
        while len(content) < length:
            part = self.others[rank].recv(length - len(content))
            if not part:
                raise RuntimeError("ncclSystemError: a rank has gone")
            content += part
        return content
