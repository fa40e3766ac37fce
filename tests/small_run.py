"""A small run that tests train: its data, its configuration, and what it leaves behind."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tokenizers
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from hgpt.data.shards import DataMeta, ShardWriter, SplitMeta, write_meta
from hgpt.data.tokenizer import END_OF_TEXT, load_tokenizer
from hgpt.history import records
from hgpt.run.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    HeadConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

VOCAB = 300
SEQ_LEN = 16
HARMONIC = HeadConfig(type="harmonic", exponent="2*sqrt_dim", final_norm_gain=0.05)
SOFTMAX = HeadConfig(type="softmax")


def markov_tokens(count: int, seed: int) -> np.ndarray:
    """A stream with something to learn: each token follows from the one before by one of two rules."""
    rng = np.random.RandomState(seed)
    tokens = np.zeros(count, dtype=np.uint16)
    for i in range(1, count):
        tokens[i] = (3 * int(tokens[i - 1]) + 7 if rng.rand() < 0.7 else rng.randint(VOCAB)) % VOCAB
    return tokens


def write_data(
    folder: Path,
    train_tokens: np.ndarray,
    val_tokens: np.ndarray,
    backend: tokenizers.Tokenizer | None = None,
    size: int | None = None,
) -> Path:
    """A data folder as data_prep writes it, by default with a BPE of VOCAB tokens. `size`: bytes of a split's text."""
    folder.mkdir(parents=True)
    splits = {}
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        with ShardWriter(folder, split) as writer:
            writer.write(tokens)
            meta = SplitMeta(tokens=len(tokens), documents=1, bytes=size or len(tokens), shards=writer.close())
        splits[split] = meta
    text = [f"{word} {number}" for word in ("distance", "centre", "harmonic", "score") for number in range(300)]
    backend = backend or load_tokenizer(f"bpe:{VOCAB}", lambda: text)._backend
    backend.save(str(folder / "tokenizer.json"))
    vocab_size, end_of_text = backend.get_vocab_size(), backend.token_to_id(END_OF_TEXT)
    about = {"tokenizer": "a test's", "source": "a test"}
    write_meta(folder, DataMeta(vocab_size=vocab_size, end_of_text=end_of_text, splits=splits, **about))
    return folder


def make_config(data: Path, runs: Path, /, head: HeadConfig = HARMONIC, name: str = "run", **sections) -> RunConfig:
    """A run of 6 steps of 8 sequences with dropout; `sections` replace settings, `optim={"lr": ...}`."""
    config = RunConfig(
        name=name,
        runs_dir=str(runs),
        model=ModelConfig(n_layer=2, n_head=2, n_embd=32, head=head, dropout=0.1),
        data=DataConfig(path=str(data), seq_len=SEQ_LEN),
        train=TrainConfig(steps=6, global_batch=8, micro_batch=8),
        optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=2),
        eval=EvalConfig(every=3, micro_batch=16, diagnostic_windows=4),
        checkpoint=CheckpointConfig(every=3, keep_last=0),
        log=LogConfig(every=1, trackers=()),
    )
    return altered(config, **sections)


def altered(config: RunConfig, **sections) -> RunConfig:
    """The run with other settings, `name="x"` or those of a section, `optim={"lr": ...}`."""
    for section, values in sections.items():
        new = replace(getattr(config, section), **values) if isinstance(values, dict) else values
        config = replace(config, **{section: new})
    return config


def losses(run_folder: Path) -> list[float]:
    return [record["loss"] for record in records(run_folder, "train")]


def steps_in(run_folder: Path) -> list[int]:
    """The steps of its checkpoints."""
    from hgpt.run.checkpoint import checkpoint_step, checkpoints  # takes seconds, and every test imports this module

    return [checkpoint_step(path) for path in checkpoints(run_folder)]


def assert_same_checkpoint(a: Path, b: Path) -> None:
    for name in ("model/model.safetensors", "optimizer.safetensors", "rng_00000.safetensors"):
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys() and left
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key}"


def set_back(config: RunConfig, steps: int, **sections) -> RunConfig:
    """A copy of a finished run as it was when the checkpoint of `steps` steps had been renamed, but not yet linked.

    `sections`: other settings of the copy, as for `altered`.
    """
    copied = altered(config, resume="auto", **sections)
    shutil.copytree(config.run_folder, copied.run_folder, symlinks=True)
    for later in (copied.run_folder / "checkpoints").iterdir():
        if int(later.name[5:]) > steps:
            shutil.rmtree(later)
    (copied.run_folder / "latest").unlink()
    return copied


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def stub_accelerator(kind: str = "NO", rank: int = 0, processes: int = 1, **others) -> SimpleNamespace:
    """What an Engine asks of Accelerate's Accelerator."""
    return SimpleNamespace(
        distributed_type=DistributedType(kind),
        **{"process_index": rank, "num_processes": processes, "device": torch.device("cpu")},
        **{"is_main_process": rank == 0, "is_local_main_process": rank == 0},
        prepare=lambda *prepared: prepared,
        **others,
    )


@dataclass
class Stream:
    """What batches and evaluations need of `TokenShards`: a stream of tokens in memory."""

    tokens: np.ndarray
    split: str = "train"
    folder: Path = Path("data/x")

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= len(self.tokens)
        return self.tokens[start:stop]


def at_step(monkeypatch, step: int, action) -> None:
    """Call `action` when train.py asks for the learning rate of `step`; if it returns a number, that is the rate."""
    import train  # as above

    original = train.learning_rate

    def learning_rate(now, *rest):
        return (action() if now == step else None) or original(now, *rest)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
