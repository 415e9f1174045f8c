"""The launchers' choices (csrc/launch.h), pure functions, against the limits of real GPUs."""

from __future__ import annotations

import itertools

import pytest

from fastadv import native

launches = native._C.launches

# multiprocessors, shared memory a block may ask for, blocks of the largest portable cluster
DEVICES = {"A100 (sm_80)": (108, 163 * 1024, 1), "RTX 3090 (sm_86)": (82, 99 * 1024, 1), "H200 (sm_90)": (132, 227 * 1024, 8)}
SIZES = (1, 2, 31, 32, 33, 255, 256, 257, 3071, 3072, 150_528, 2**31 + 7, 2**40)
SAMPLES = (1, 2, 64, 65_535, 65_536, 2**31, 2**33)


def check(plan: tuple[int, int, int, int, int], shared: int = 48 * 1024, cluster: int = 1) -> None:
    """What every CUDA device accepts."""
    blocks, rows, threads, asked, blocks_of_cluster = plan
    assert 1 <= blocks < 2**31
    assert 1 <= rows <= 65_535
    assert 32 <= threads <= 512
    assert threads % 32 == 0
    assert 0 <= asked <= shared
    assert 1 <= blocks_of_cluster <= cluster
    assert blocks % blocks_of_cluster == 0


@pytest.mark.parametrize("items", SIZES)
@pytest.mark.parametrize("rows", SAMPLES)
def test_streams_cover_every_item_with_one_thread_or_a_full_grid(rows, items):
    plan = launches.stream(rows, items)
    check(plan)
    blocks, grid_rows, threads, *_ = plan
    assert blocks * threads >= items or blocks == 2**31 - 1
    assert (blocks - 1) * threads < items  # no block without work
    assert grid_rows == min(rows, 65_535)


@pytest.mark.parametrize("device", DEVICES)
def test_l2_on_chip_fits_the_device(device):
    sms, shared, cluster = DEVICES[device]
    for samples, items, width in itertools.product(SAMPLES, SIZES, (6, 12, 24, 48, 64)):
        plan = launches.l2(sms, shared, cluster, samples, items, width)
        if plan[2] == 0:  # not on chip: then it could not have been
            assert -(-items // cluster) * width > shared - 1024
            check(launches.sums(samples, items))
            check(launches.apply(samples, items))
            continue
        check(plan, shared - 1024, cluster)
        assert plan[3] * plan[4] >= items * width  # the blocks of a cluster hold all of the sample
        assert plan[0] == min(samples, (2**31 - 1) // plan[4]) * plan[4]


@pytest.mark.parametrize("items", [1, 7, 8, 9, 768, 37_632, 37_633])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_the_blocks_of_a_cluster_share_a_sample_without_gap_or_overlap(cluster, items):
    shares = [launches.share(rank, cluster, items) for rank in range(cluster)]
    assert [i for begin, end in shares for i in range(begin, end)] == list(range(items))
    assert max(end - begin for begin, end in shares) == -(-items // cluster)  # what l2 reserves memory for


def test_l2_on_chip_is_chosen_where_it_was_meant():
    h200, a100 = DEVICES["H200 (sm_90)"], DEVICES["A100 (sm_80)"]
    cifar, imagenet = (3 * 32 * 32 // 4, 48), (3 * 224 * 224 // 4, 48)  # packs of four fp32 elements, and their bytes
    assert launches.l2(*h200, 512, *cifar)[3:] == (18432, 2)  # small shares, several blocks on a multiprocessor
    assert launches.l2(*h200, 32, *cifar)[4] == 4  # no smaller than 256 packs: one a thread
    assert launches.l2(*h200, 128, *imagenet)[4] == 8
    assert launches.l2(*a100, 128, *cifar)[3:] == (36864, 1)
    assert launches.l2(*a100, 128, *imagenet)[2] == 0


@pytest.mark.parametrize("size", [0, *SIZES])
def test_every_tensor_of_weights_has_blocks_and_none_without_work(size):
    items = -(-size // 4)
    for most_blocks in (1, 2, 256, 2**31):
        blocks = launches.weight_blocks(items, most_blocks)
        assert 1 <= blocks <= most_blocks
        assert blocks == 1 or (blocks - 1) * 2048 < items  # a block's threads have eight items each
        assert blocks * launches.table_tensors < 2**31  # of a launch


@pytest.mark.parametrize("classes", [2, 10, 32, 33, 256, 257, 1000, 4096, 4097, 21_841, 10**6])
@pytest.mark.parametrize("rows", [1, 7, 128, 8192, 2**33])
@pytest.mark.parametrize("wide", [False, True])
def test_rows_are_held_or_streamed(rows, classes, wide):
    plan, lanes, items = launches.row(rows, classes, wide)
    check(plan)
    threads_of_a_row = lanes or plan[2]
    if items:
        assert threads_of_a_row * items >= classes  # the row fits in registers
        assert not wide
    else:
        assert wide or classes > 4096
    assert plan[0] * (plan[2] // threads_of_a_row) >= rows or plan[0] == 2**31 - 1


def test_threads_per_row_follow_the_row():
    classes = (10, 32, 33, 64, 100, 256, 257, 4096, 4097)
    assert [launches.row(128, c, False)[1] for c in classes] == [4, 4, 8, 8, 16, 32, 0, 0, 0]
    assert [launches.row(128, c, False)[2] for c in classes] == [8, 8, 8, 8, 8, 8, 8, 8, 0]
    assert launches.row(8192, 1000, False)[0][2] == 128  # eight logits a thread


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("samples", SAMPLES)
def test_l1_has_a_block_for_each_sample(samples, size):
    plan = launches.l1(samples, size)
    check(plan)
    assert plan[0] == min(samples, 2**31 - 1)
