"""Count the operators that torch calls, and those whose result the CPU needs.

Not seen: `tolist`, `numpy` and `cpu` of a tensor that lies on the CPU already; on a GPU they wait.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_"}  # by a mask it is `nonzero`, too


class OperatorCounter(TorchDispatchMode):
    """Counts operators that compute, and those among them that wait, by name."""

    def __init__(self):
        super().__init__()
        self.operators, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in WAITS or by_mask:
            self.waits[name] += 1
        if not func.is_view:
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))
