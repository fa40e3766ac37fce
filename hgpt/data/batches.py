"""The windows of each step: a pure function of the step, so a run resumes from the step's number.

Window i of a stream of N tokens, with T = seq_len, is tokens[i·T : i·T + T + 1]: T inputs and their T targets.
Sample g of a run (g counts sequences over the whole run and all processes) is window
permutation(seed, epoch)[g mod W], epoch = g div W, W = ⌊(N − 1) / T⌋. With B = global_batch, step s reads the samples
s·B … s·B + B − 1, for any number of processes, any micro-batch and after any restart.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hgpt.data.shards import TokenShards
from hgpt.errors import UserError


def num_windows(num_tokens: int, seq_len: int) -> int:
    """W = ⌊(N − 1) / T⌋: the number of whole windows, each of T + 1 tokens."""
    return max(0, (num_tokens - 1) // seq_len)


def check_length(shards: TokenShards, seq_len: int) -> None:
    """Raise UserError unless the split holds a whole window."""
    if num_windows(len(shards), seq_len) == 0:
        lower = f", or lower data.seq_len to {len(shards) - 1}" if len(shards) > 1 else ""
        raise UserError(
            f"{shards.folder}: the {shards.split} split has {len(shards):,} tokens, fewer than one sequence of "
            f"data.seq_len + 1 = {seq_len + 1}. Prepare more text, or another --val-fraction of it{lower}."
        )


@lru_cache(maxsize=2)  # a batch crosses at most one epoch boundary
def epoch_permutation(seed: int, epoch: int, windows: int) -> np.ndarray:
    """The order of the windows in an epoch, a permutation of 0 … windows − 1 that depends only on the arguments.

    NumPy guarantees the stream of `RandomState` for all future versions (NEP 19), but not that of its newer
    generators; a test pins the values.
    """
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bits).permutation(windows)


def window_of_sample(sample: int, *, seed: int, windows: int) -> int:
    """The window of sample g: permutation(seed, g div W)[g mod W]."""
    epoch, position = divmod(sample, windows)
    return int(epoch_permutation(seed, epoch, windows)[position])


@dataclass
class TrainingBatches:
    """The batches of a run: `batches(step, micro_step)` returns this process's micro-batch on its device.

    Step s has `accumulation` micro-steps, each with one micro-batch per process. Each of its samples s·B … s·B + B − 1
    is read by exactly one process.

    A thread prefetches the next micro-batch, so that neither a slow disk nor the permutation of the next epoch (0.6 s
    for OpenWebText) delays training. For a GPU the thread copies it into pinned memory, and the copy to the device
    overlaps with the computation. A read error is raised by the call that asks for that micro-batch. Any other
    micro-batch is read in the call.

    Raises UserError if the data is shorter than one sequence, or if `micro_batch` times `world_size` does not divide
    `global_batch`.
    """

    shards: TokenShards
    _: KW_ONLY
    seq_len: int
    global_batch: int
    micro_batch: int
    seed: int
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_length(self.shards, self.seq_len)
        self.windows = num_windows(len(self.shards), self.seq_len)
        self.accumulation = accumulation_steps(self.global_batch, self.micro_batch, self.world_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[tuple[int, int], Future[tuple[Tensor, Tensor]]] | None = None

    def samples(self, step: int, micro_step: int) -> range:
        """The run's sample numbers in one micro-batch of this process."""
        first = step * self.global_batch + (micro_step * self.world_size + self.rank) * self.micro_batch
        return range(first, first + self.micro_batch)

    def windows_of(self, samples: Iterable[int]) -> list[int]:
        return [window_of_sample(g, seed=self.seed, windows=self.windows) for g in samples]

    def windows_of_step(self, step: int) -> list[int]:
        """The windows of a whole step, of all processes, in the order of its samples."""
        return self.windows_of(range(step * self.global_batch, (step + 1) * self.global_batch))

    def read(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one micro-batch, each (micro_batch, seq_len), int64, on the CPU; pinned for a GPU."""
        inputs, targets = read_windows(self.shards, self.windows_of(self.samples(step, micro_step)), self.seq_len)
        if torch.device(self.device).type == "cuda":
            # contiguous: a strided tensor would be copied to the device through pageable memory.
            return inputs.contiguous().pin_memory(), targets.pin_memory()
        return inputs, targets

    def __call__(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one micro-batch on the device, each (micro_batch, seq_len), int64."""
        if self._ahead is not None and self._ahead[0] == (step, micro_step):
            inputs, targets = self._ahead[1].result()
        else:
            inputs, targets = self.read(step, micro_step)
        following = (step, micro_step + 1) if micro_step + 1 < self.accumulation else (step + 1, 0)
        self._ahead = following, self._thread.submit(self.read, *following)
        # PyTorch does not reuse a pinned tensor before the copies from it are done.
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


def read_windows(shards: TokenShards, windows: list[int], seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (len(windows), seq_len), int64; a shorter window is padded with targets −100."""
    tokens = np.zeros((len(windows), seq_len + 1), dtype=np.int64)
    targets = np.full((len(windows), seq_len), -100, dtype=np.int64)
    for row, window in enumerate(windows):
        start = window * seq_len
        part = shards.read(start, min(start + seq_len + 1, len(shards)))
        tokens[row, : len(part)] = part
        targets[row, : len(part) - 1] = part[1:]
    return torch.from_numpy(tokens[:, :-1]), torch.from_numpy(targets)


def accumulation_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """global_batch / (micro_batch · world_size). UserError with the nearest valid settings if not an integer."""
    per_step = micro_batch * world_size
    if global_batch % per_step == 0:
        return global_batch // per_step
    below = global_batch // per_step * per_step
    batches = f"{below} or {below + per_step}" if below else f"{per_step}"
    way_out = f"set train.global_batch to {batches}"
    if global_batch % world_size == 0:
        share = global_batch // world_size
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        nearest = min(fitting, key=lambda size: abs(size - micro_batch))
        way_out += f", or train.micro_batch to {nearest}"
    raise UserError(
        f"train.global_batch = {global_batch} cannot be reached with train.micro_batch = {micro_batch} on "
        f"{world_size} process{'es' if world_size > 1 else ''}: it must be a multiple of {per_step}; {way_out}."
    )
