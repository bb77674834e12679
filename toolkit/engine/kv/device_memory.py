"""DeviceMemory: a cache in GPU memory, which peers of the same host open by CUDA IPC; one kernel copies a whole read.

A KV cache is many small blocks. Copy engines, which UCX drives one block at a time, pay microseconds for each; a kernel
that reads a peer's memory over NVLink or PCIe pays for the bytes only. It runs on a stream of its own beside the steps,
and a few SMs are its while it does. Calls into the driver go through ctypes: its interface is stable, and torch's own
sharing opens memory on the owner's GPU, where a kernel of this one may not read. Read next: ``kernels/spans.py``.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from toolkit.engine.kv.local import Endpoint

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
OFFSET_BYTES = 8
PART = 1 << 18  # bytes: longer spans are cut, so that all keep about as many programs busy


class Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class DeviceCopy:
    """See ``local.Copy``."""

    def __init__(self, stream: torch.cuda.Stream, keep: list[Tensor]) -> None:
        self.ended, self.stopped = 0.0, False
        self._keep = keep
        self._asked = time.monotonic()
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._begin.record(stream)

    def launched(self, stream: torch.cuda.Stream) -> None:
        self._end.record(stream)

    def done(self) -> bool:
        if self.ended:
            return True
        if not self._end.query():
            return False
        # polls come between steps; the events know better when the copy was over
        took = self._begin.elapsed_time(self._end) / 1e3
        self.ended = min(self._asked + took, time.monotonic())
        return True

    def stop(self) -> None:
        """A kernel cannot be taken back, and is over before long."""
        self._end.synchronize()


class DeviceMemory:
    """See ``local.Memory``. ``device``: ``cuda:N``."""

    def __init__(self, device: str) -> None:
        from toolkit.engine.kernels.spans import copy_spans

        self._copy_spans = copy_spans
        self._device = torch.device(device)
        torch.cuda.set_device(self._device)
        self._stream = torch.cuda.Stream(self._device)
        self._driver = ctypes.CDLL("libcuda.so.1")
        here = torch.zeros(2, dtype=torch.int64, device=self._device)  # compiled now, not with the first request
        self.copy(np.array([[here.data_ptr(), here.data_ptr() + 8, 8]])).stop()

    def allocate(self, num_bytes: int) -> Tensor:
        memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()  # peers know no streams of this process
        return memory

    def handle(self, address: int) -> bytes:
        """The handle is of the driver's allocation, in which torch may have put the memory further back."""
        handle, base = Handle(), self._base(address)
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
        return bytes(handle) + (address - base).to_bytes(OFFSET_BYTES, "little")

    def open(self, peer: Endpoint) -> list[int]:
        return [self._open(handle) for handle, _ in peer.handles]

    def close(self, addresses: list[int]) -> None:
        torch.cuda.set_device(self._device)  # of the thread that saw the peer end
        self._stream.synchronize()
        for at in addresses:
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(self._base(at)))

    def copy(self, spans: NDArray[np.int64]) -> DeviceCopy:
        parts = cut(spans, PART)
        aligned = not int(np.bitwise_or.reduce(parts, axis=None)) % 8
        with torch.cuda.stream(self._stream):
            host = torch.from_numpy(parts).pin_memory()
            listed = host.to(self._device, non_blocking=True)
            copy = DeviceCopy(self._stream, [host, listed])
            self._copy_spans(listed, int(parts[:, 2].max(initial=0)), aligned)
            copy.launched(self._stream)
        return copy

    def shut_down(self) -> None:
        self._stream.synchronize()

    def _open(self, handle: bytes) -> int:
        if len(handle) != HANDLE_BYTES + OFFSET_BYTES:
            raise ValueError(f"{len(handle)} bytes are no CUDA IPC handle")
        at = ctypes.c_uint64()
        opened = Handle.from_buffer_copy(handle[:HANDLE_BYTES])
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(at), opened, ctypes.c_uint(LAZY_PEER_ACCESS))
        return at.value + int.from_bytes(handle[HANDLE_BYTES:], "little")

    def _base(self, address: int) -> int:
        """Where the driver's allocation around it begins."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        return base.value

    def _call(self, name: str, *arguments: Any) -> None:
        """Raises ``ValueError``: the driver refused."""
        if code := getattr(self._driver, name)(*arguments):
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise ValueError(
                f"{name}: {(text.value or b'?').decode()} (CUDA error {code}): these GPUs or processes do not share "
                "memory (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True rules it out as well): use "
                "deploy.disaggregation_transfer_backend=nixl"
            )


def cut(spans: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The same copies (to, from, bytes), none of more than ``most`` bytes."""
    counts = -(-spans[:, 2] // most)
    whole = np.repeat(spans, counts, axis=0)
    begins = (np.arange(len(whole)) - np.repeat(np.cumsum(counts) - counts, counts)) * most
    sizes = np.minimum(whole[:, 2] - begins, most)
    return np.stack([whole[:, 0] + begins, whole[:, 1] + begins, sizes], axis=1)
