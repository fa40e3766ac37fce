"""Records what PyTorch computes: the operations, and the tensors that they return."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """The packet (`torch.ops.aten.mm`) and the outputs of every operation while this mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: list[Any] = []
        self.outputs: list[Tensor] = []  # kept alive: no two of them get one address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.packets.append(func.overloadpacket)
        self.outputs += [o for o in (out if isinstance(out, tuple | list) else [out]) if isinstance(o, Tensor)]
        return out

    def sizes(self) -> set[int]:
        """The numbers of elements of the outputs."""
        return {output.numel() for output in self.outputs}
