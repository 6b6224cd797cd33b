"""flash-attn's functions over a kernel of ours, for libraries that call them where there is no CUDA."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from conf.kernels import installed
from strategies.base import Options
from strategies.ops.attention import attend


def provide_flash_attn(options: Options) -> None:
    """Let `import flash_attn` find them, over options.kernel, unless the package itself is installed."""
    if installed("flash_attn"):
        return

    def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **_: Any) -> tuple[Tensor, Tensor, None, None]:
        return *options.kernel.forward(q, k, v, causal), None, None

    def backward(*args: Any) -> None:
        grad, q, k, v, out, lse, grad_q, grad_k, grad_v, _dropout, _scale, causal, *_ = args
        grads = options.kernel.backward(grad, q, k, v, out, lse, causal)
        for theirs, computed in zip((grad_q, grad_k, grad_v), grads, strict=True):
            theirs.copy_(computed)

    def whole(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return attend(q, k, v, options)

    interface = ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward, interface._flash_attn_backward = forward, backward
    package = ModuleType("flash_attn")
    package.__spec__ = importlib.util.spec_from_loader("flash_attn", loader=None)
    package.__version__ = "2.7.0"  # whose signatures these are
    package.flash_attn_interface, package.flash_attn_func = interface, whole
    for module in (package, interface):
        module.__getattr__ = lambda name: None  # what else is imported from there is not called
    sys.modules |= {package.__name__: package, interface.__name__: interface}
