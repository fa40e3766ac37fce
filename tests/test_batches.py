"""hgpt/data/batches.py: which windows make up a step, whatever the processes, the micro-batch and restarts."""

import re
import threading

import numpy as np
import pytest
import torch
from small_run import Stream
from small_texts import refused

from hgpt.data.batches import (
    TrainingBatches,
    accumulation_steps,
    epoch_permutation,
    num_windows,
    read_windows,
    window_of_sample,
)
from hgpt.errors import UserError

SEQ_LEN = 7


def stream(tokens: int) -> Stream:
    return Stream(np.random.RandomState(0).randint(0, 65536, tokens).astype(np.uint16))


def batches(tokens=200, **settings) -> TrainingBatches:
    defaults = {"seq_len": SEQ_LEN, "global_batch": 6, "micro_batch": 6, "seed": 1}
    return TrainingBatches(stream(tokens), **defaults | settings)


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (7, 0), (8, 1), (14, 1), (15, 2), (200, 28)])
def test_num_windows(tokens, windows):
    # Counted one by one: a window starts at every multiple of T and needs T + 1 tokens.
    assert num_windows(tokens, SEQ_LEN) == windows
    assert windows == sum(start + SEQ_LEN + 1 <= tokens for start in range(0, tokens, SEQ_LEN))


@pytest.mark.parametrize("windows", [1, 6, 28, 101])
def test_an_epoch_visits_every_window_once(windows):
    order = [window_of_sample(g, seed=3, windows=windows) for g in range(5 * windows)]
    epochs = [order[e * windows : (e + 1) * windows] for e in range(5)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(windows))
    if windows > 6:
        assert len({tuple(epoch) for epoch in epochs}) == 5  # another order in every epoch
        assert [window_of_sample(g, seed=4, windows=windows) for g in range(windows)] != epochs[0]


def test_permutation_values_are_pinned():
    # A run that goes on under another version of NumPy, or on another machine, has to see the same order.
    assert epoch_permutation(1337, 0, 12).tolist() == [6, 5, 10, 3, 2, 9, 11, 1, 0, 4, 7, 8]
    assert epoch_permutation(1337, 1, 12).tolist() == [5, 9, 6, 0, 10, 1, 11, 2, 7, 4, 8, 3]
    assert epoch_permutation(0, 0, 100_000)[:5].tolist() == [75149, 69032, 83712, 36561, 78092]


def test_the_same_sequences_a_step_however_they_are_cut():
    """They are slices of the stream, in the order of the run's samples."""
    start = 4 * 12  # of 28 windows: the step crosses an epoch
    tokens = stream(200).tokens.astype(int)
    windows = [window_of_sample(g, seed=1, windows=28) for g in range(start, start + 12)]
    expected = sorted(tuple(tokens[w * SEQ_LEN : (w + 1) * SEQ_LEN + 1]) for w in windows)
    for micro_batch, world_size in ((12, 1), (1, 1), (4, 1), (6, 2), (3, 2), (2, 3), (3, 4)):
        found = []  # of all processes: each sample is read by exactly one
        for rank in range(world_size):
            run = batches(global_batch=12, micro_batch=micro_batch, world_size=world_size, rank=rank)
            for m in range(run.accumulation):
                inputs, targets = run.read(4, m)
                assert inputs.shape == targets.shape == (micro_batch, SEQ_LEN)
                assert inputs.dtype == targets.dtype == torch.int64
                assert torch.equal(inputs[:, 1:], targets[:, :-1])
                found += [(*x, y[-1]) for x, y in zip(inputs.tolist(), targets.tolist(), strict=True)]
        assert sorted(found) == expected


def test_last_short_window_is_filled_with_ignored_targets():
    shards = stream(2 * SEQ_LEN + 4)  # the third window holds 3 targets
    inputs, targets = read_windows(shards, [2, 0], SEQ_LEN)
    assert targets[0].tolist() == [*shards.tokens[-3:].astype(int), *[-100] * (SEQ_LEN - 3)]
    assert inputs[0, :3].tolist() == shards.tokens[-4:-1].astype(int).tolist()
    assert targets[1].tolist() == shards.tokens[1 : SEQ_LEN + 1].astype(int).tolist()


# -------------------------------------------------------------------------------------------------- reading ahead


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_read_ahead_is_what_is_asked_for(device):
    plain, ahead = batches(micro_batch=2), batches(micro_batch=2, device=device)
    order = [(step, micro) for step in range(20) for micro in range(3)]
    for step, micro in [*order, (9, 1), (2, 2), (2, 2), (3, 0)]:  # in order, then anywhere, as after a restart
        for found, expected in zip(ahead(step, micro), plain.read(step, micro), strict=True):
            assert found.device.type == device and torch.equal(found.cpu(), expected)


def test_the_next_micro_batch_is_read_by_a_thread():
    run = batches(micro_batch=2)
    read, inner = [], run.shards.read
    run.shards.read = lambda start, stop: read.append(threading.current_thread().name) or inner(start, stop)
    for step in range(2):
        for micro in range(3):
            run(step, micro)
    run._thread.shutdown()
    main_thread = threading.main_thread().name
    assert [name == main_thread for name in read] == [True] * 2 + [False] * 12  # 7 micro-batches of 2 windows


def test_what_goes_wrong_ahead_is_raised_where_the_batch_is_asked_for():
    run = batches(global_batch=2, micro_batch=2)
    run(0, 0)
    run._ahead[1].result()  # the next one has been read

    def read(start, stop):
        raise UserError("token 7 is beyond the vocabulary")

    run.shards.read = read
    run(1, 0)
    refused("beyond the vocabulary", run, 2, 0)


def test_data_shorter_than_a_sequence():
    assert batches(SEQ_LEN + 1).windows == 1
    refused(("the train split has 7 tokens", "data.seq_len + 1 = 8", "lower data.seq_len"), batches, SEQ_LEN)


# ----------------------------------------------------------------------------------------------- batch arithmetic


def test_an_impossible_batch_is_named_with_ways_out():
    words = ("global_batch = 480", "micro_batch = 11", "8 processes", "440 or 528", "train.micro_batch to 10")
    refused(words, accumulation_steps, 480, 11, 8)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("micro_batch", [1, 3, 5, 12, 64])
@pytest.mark.parametrize("global_batch", [1, 7, 12, 100, 480])
def test_proposed_settings_work(global_batch, micro_batch, world_size):
    try:
        assert accumulation_steps(global_batch, micro_batch, world_size) * micro_batch * world_size == global_batch
        return
    except UserError as error:
        way_out = str(error).split(";")[1]
    proposed = [int(number) for number in re.search(r"global_batch to (\d+)(?: or (\d+))?", way_out).groups() if number]
    assert all(accumulation_steps(batch, micro_batch, world_size) >= 1 for batch in proposed)
    # The nearest ones on either side, found by trying.
    works = [batch for batch in range(1, 4000) if batch % (micro_batch * world_size) == 0]
    assert min(works, key=lambda batch: abs(batch - global_batch)) in proposed
    micro = re.search(r"micro_batch to (\d+)", way_out)
    assert bool(micro) == (global_batch % world_size == 0)
    assert not micro or accumulation_steps(global_batch, int(micro[1]), world_size) >= 1
