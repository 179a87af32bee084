"""What a CPU's convolutions take for themselves meanwhile: a model of oneDNN's buffers, in bytes.

oneDNN computes in layouts with the channels in blocks of a vector's width. So a convolution copies its operands into
such blocks, computes a blocked result, and copies that into the tensor that it returns. A strided one finds the
gradient by its input with the channels last, unpadded. PyTorch computes small batches itself, from columns of patches.

Sources: PyTorch's rule of which library computes a convolution (aten/src/ATen/native/Convolution.cpp, use_mkldnn);
the buffers as the allocator's events show them for oneDNN 3. tests/harness/test_predict.py compares whole steps.

Legend: x input, w weights, y output, dx, dw, dy the gradients by them.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

# fp32 numbers in a vector register; bf16 is blocked alike.
LANES = {"AVX512": 16}
OTHER_LANES = 8
# Up to so many elements PyTorch's own kernel computes a batch of one.
SMALL_NUMEL = 20480


class CpuKernels(NamedTuple):
    """Called with an operation, its arguments and output: the bytes that it holds at its own peak, with the output.

    threads  of the process, on which the choice of a kernel depends
    lanes    channels of a block
    has_bf16  whether oneDNN computes in bf16 on this processor; else PyTorch does, as it does small batches
    """

    threads: int
    lanes: int
    has_bf16: bool = True

    @classmethod
    def of_this_machine(cls, threads: int) -> "CpuKernels":
        lanes = LANES.get(torch.backends.cpu.get_cpu_capability(), OTHER_LANES)
        return cls(threads, lanes, bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))

    def __call__(self, func: Any, args: tuple[Any, ...], out: Any) -> int:
        if func is torch.ops.aten.convolution.default:
            x, w, _, stride, _, dilation, transposed, _, groups = args
            if transposed or x.dim() != 4:
                return 0
            return _copies(x, w) + self._forward(x, w, out, stride, dilation, groups)
        if func is torch.ops.aten.convolution_backward.default:
            dy, x, w, _, stride, _, dilation, transposed, _, groups, wanted = args
            if transposed or x.dim() != 4:
                return 0
            return _copies(dy, x, w) + self._backward(dy, x, w, stride, dilation, groups, wanted)
        return 0

    def _forward(self, x: Tensor, w: Tensor, y: Tensor, stride: list[int], dilation: list[int], groups: int) -> int:
        if not self._by_onednn(x, w, stride, dilation, groups):
            return self._columns(x, w, y.shape, stride) + _nbytes(y)
        # An image's few channels are read as they are.
        few = x.shape[1] < self.lanes
        x_bytes = 0 if few else self._blocked(x)
        if max(stride) > 1 and w.shape[2:].numel() == 1:
            x_bytes += self.threads * self._up(x.shape[1]) * y.shape[2:].numel() * x.element_size()
        y_bytes = self._blocked(y)
        return max(x_bytes + self._blocked_weights(w, few) + y_bytes, y_bytes + _nbytes(y))

    def _backward(
        self,
        dy: Tensor,
        x: Tensor,
        w: Tensor,
        stride: list[int],
        dilation: list[int],
        groups: int,
        wanted: list[bool],
    ) -> int:
        if not self._by_onednn(x, w, stride, dilation, groups):
            return self._columns(x, w, dy.shape, stride) + wanted[0] * _nbytes(x) + wanted[1] * _nbytes(w)
        peak_bytes = dx_bytes = 0
        if wanted[0]:
            dx_bytes = _nbytes(x)
            if max(stride) > 1:
                # The result, the same as a tensor with the channels last, and contiguous.
                peak_bytes = max(_nbytes(dy) + self._blocked_weights(w, False) + dx_bytes, 3 * dx_bytes)
            else:
                blocked_bytes = self._blocked(x)
                operands_bytes = self._blocked(dy) + self._blocked_weights(w, False)
                peak_bytes = blocked_bytes + max(operands_bytes, dx_bytes)
        if wanted[1]:
            few = x.shape[1] < self.lanes
            dw_bytes = self._blocked_weights(w, few)
            operands_bytes = self._blocked(dy) + (0 if few else self._blocked(x))
            if x.dtype == torch.bfloat16:
                operands_bytes += self._sum_of_weights(dy, x, w, stride)
            peak_bytes = max(peak_bytes, dx_bytes + dw_bytes + max(operands_bytes, _nbytes(w)))
        return peak_bytes

    def _sum_of_weights(self, dy: Tensor, x: Tensor, w: Tensor, stride: list[int]) -> int:
        """In bf16 the gradient by the weights is summed in fp32, from one image's operands transposed; by each thread,
        unless the convolution is strided. 1x1 kernels need no transposing."""
        sum_bytes = self._blocked_weights(w, False) // w.element_size() * torch.float32.itemsize
        transposed_bytes = 0
        if w.shape[2:].numel() > 1:
            transposed_bytes = self._blocked(x[:1]) + self._blocked(dy[:1])
        return (self.threads if max(stride) == 1 else 1) * (sum_bytes + transposed_bytes)

    def _by_onednn(self, x: Tensor, w: Tensor, stride: list[int], dilation: list[int], groups: int) -> bool:
        if x.dtype != torch.float32:
            return x.dtype != torch.bfloat16 or self.has_bf16
        kernel = w.shape[2:]
        simple = max(stride) == 1 and max(dilation) == 1 and kernel.numel() == 1
        if simple and x.shape[0] < 16 and self.threads == 1:
            return False
        return groups > 1 or min(kernel) > 3 or x.shape[0] > 1 or x.numel() > SMALL_NUMEL

    @staticmethod
    def _columns(x: Tensor, w: Tensor, y_shape: torch.Size, stride: list[int]) -> int:
        """Patches of one image, in bf16 of all; a 1x1 kernel that meets every pixel needs none."""
        if w.shape[2:].numel() == 1 and max(stride) == 1:
            return 0
        images = x.shape[0] if x.dtype == torch.bfloat16 else 1
        return images * prod((x.shape[1], *w.shape[2:], *y_shape[2:])) * x.element_size()

    def _blocked(self, x: Tensor) -> int:
        return x.shape[0] * self._up(x.shape[1]) * x.shape[2:].numel() * x.element_size()

    def _blocked_weights(self, w: Tensor, few: bool) -> int:
        in_channels = w.shape[1] if few else self._up(w.shape[1])
        return self._up(w.shape[0]) * in_channels * w.shape[2:].numel() * w.element_size()

    def _up(self, channels: int) -> int:
        return -(-channels // self.lanes) * self.lanes


def _copies(*operands: Tensor) -> int:
    """Of those that do not lie in one piece, part of another tensor say."""
    return sum(_nbytes(tensor) for tensor in operands if not tensor.is_contiguous())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
