"""Batches: the promises of every step over random lengths, world sizes and budgets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from qwen_ds.data.batches import (
    TOKENS_SHARE,
    Batch,
    Part,
    StepSampler,
    WindowStatistics,
    epoch_order,
    evaluation_batches,
    make_batch,
    target_places,
)
from qwen_ds.data.windows import cut_windows, deal
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import IGNORE
from qwen_ds.recipe.options import BatchOptions

PAD = 7


@dataclass
class FakeRows:
    """Row i is [1000 + i] * lens[i]; its first token is not learnt."""

    lens: np.ndarray
    weights: tuple[tuple[int, float], ...] = ()
    pad_id: int = PAD

    @property
    def learnt(self) -> np.ndarray:
        return self.lens - 1

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(Part(*pair) for pair in self.weights) or (Part(len(self.lens), 1.0),)

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full(self.lens[row], 1000 + row, np.int32)
        labels = ids.copy()
        labels[0] = IGNORE
        return ids, labels


def rows_in(windows: list[list[Batch]]) -> list[int]:
    return [row for window in windows for batch in window for row in batch.row_ids]


def log_normal_rows(n: int, seed: int = 0) -> FakeRows:
    """Lengths like ADGEN's: prompts of about 37 tokens, answers of about 100, both cut at 254."""
    rng = np.random.default_rng(seed)
    prompts = np.minimum(254, np.exp(rng.normal(np.log(37), 0.35, n)))
    answers = np.minimum(254, np.exp(rng.normal(np.log(100), 0.35, n)))
    return FakeRows((prompts + answers + 20).astype(np.int32))


CASES = [
    (n, world, budget, seed)
    for seed, n in enumerate((1, 2, 7, 8, 9, 31, 60))
    for world in (1, 2, 3, 8)
    for budget in (1, 64, 700, 10**6)
]


@pytest.mark.parametrize(("n", "world", "budget", "seed"), CASES)
def test_every_row_lies_in_one_micro_batch_within_the_budget(
    n: int, world: int, budget: int, seed: int
) -> None:
    lens = np.random.default_rng(seed).integers(2, 300, n).astype(np.int32)
    parts = cut_windows(lens, world, budget)
    assert len(parts) % world == 0
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for part in parts:
        assert len(part) <= 1 or len(part) * lens[part].max() <= budget
    flat = lens[np.concatenate(parts)]
    assert (np.diff(flat) <= 0).all(), "micro-batches are runs of the rows sorted by length"
    # A dummy only where rows are lacking, and no more micro-batches than the budget asks.
    assert all(len(part) for part in parts[: min(n, len(parts))])
    assert len(parts) == world or fills(lens, len(parts) - world) > budget


def fills(lens: np.ndarray, n_parts: int) -> int:
    """Oracle: the least possible largest micro-batch of sorted rows in at most n_parts runs.

    Dynamic programming over the end of the last run; a run of one row counts 1, since such a run
    may exceed any budget.
    """
    lens = np.sort(lens)[::-1].astype(int)
    n = len(lens)
    best = [0] + [10**9] * n
    for _ in range(n_parts):
        runs = [
            [max(best[i], (end - i) * lens[i] if end - i > 1 else 1) for i in range(end)]
            for end in range(1, n + 1)
        ]
        best = [0] + [min(best[end], *to_end) for end, to_end in enumerate(runs, 1)]
    return best[n]


def test_the_largest_micro_batch_is_as_small_as_can_be() -> None:
    for seed in range(20):
        lens = np.random.default_rng(seed).integers(2, 60, 25).astype(np.int32)
        parts = cut_windows(lens, 4, 10**6)
        assert len(parts) == 4
        largest = max(len(part) * int(lens[part].max()) for part in parts)
        assert largest == max(fills(lens, 4), int(lens.max()))


def test_equal_rows_that_save_two_runs_at_once_still_fill_every_rank() -> None:
    # Caps of 4 to 7 tokens make 5 runs of these 5 rows, a cap of 8 makes 3: four need a split.
    parts = cut_windows(np.full(5, 4, np.int32), 4, 10**6)
    assert sorted(len(part) for part in parts) == [1, 1, 1, 2]


def test_neighbours_in_length_run_together_and_totals_are_level() -> None:
    lens = log_normal_rows(128).lens
    parts = cut_windows(lens, 4, 1024)
    ranks = deal(lens, parts, 4)
    padded = np.array([[len(p) * lens[p].max() for p in rank] for rank in ranks])
    longest = np.array([[lens[p].max() for p in rank] for rank in ranks])
    # Micro-step i is no shorter than i + 1.
    assert (longest[:, :-1].min(axis=0) >= longest[:, 1:].max(axis=0)).all()
    assert padded.sum(axis=1).max() / padded.sum(axis=1).mean() < 1.03


def test_each_epoch_trains_every_row_once_over_all_ranks_in_equal_counts() -> None:
    rows = log_normal_rows(203)
    for world in (1, 2, 5):
        samplers = [StepSampler(rows, 64, 3, world, rank, 512) for rank in range(world)]
        assert {s.steps_per_epoch for s in samplers} == {4}, "the last 11 rows are a step, too"
        seen: Counter[int] = Counter()
        for step in range(4):
            windows = [s.window(1, step) for s in samplers]
            assert len({len(window) for window in windows}) == 1
            seen.update(rows_in(windows))
        assert seen == Counter(range(203))


def test_the_rows_of_a_step_do_not_depend_on_world_or_budget() -> None:
    rows = log_normal_rows(300)

    def step_rows(world: int, budget: int) -> list[int]:
        samplers = [StepSampler(rows, 128, 5, world, rank, budget) for rank in range(world)]
        return sorted(rows_in([sampler.window(2, 1) for sampler in samplers]))

    assert step_rows(1, 4096) == step_rows(8, 512) == step_rows(3, 300)
    assert len(step_rows(1, 4096)) == 128


def test_a_position_can_be_asked_for_in_any_order() -> None:
    rows = log_normal_rows(300)
    straight, jumping = (StepSampler(rows, 64, 5, 2, 1, 1024) for _ in range(2))
    wanted = [straight.window(epoch, step) for epoch in range(2) for step in range(5)]
    jumping.window(1, 4)
    for position in (7, 2, 9, 0):
        for a, b in zip(jumping.window(*divmod(position, 5)), wanted[position], strict=True):
            assert torch.equal(a.ids_BT, b.ids_BT) and a.row_ids == b.row_ids


def test_order_changes_with_epoch_and_seed() -> None:
    parts = [Part(50, 1.0)]
    orders = {tuple(epoch_order(parts, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_steps_are_uniform_samples_not_grouped_by_length() -> None:
    rows = log_normal_rows(6400)
    sampler = StepSampler(rows, 64, 0, 1, 0, 2048)
    means = np.array([rows.lens[sampler.step_rows(0, step)].mean() for step in range(100)])
    expected = rows.lens.std() / 8
    assert 0.8 < means.std() / expected < 1.2, "the standard error of a mean of 64 draws"


def test_rows_are_right_padded_and_only_real_tokens_have_labels() -> None:
    rows = FakeRows(np.array([2, 4, 3], np.int32))
    (batch,) = StepSampler(rows, 8, 0, 1, 0, 4096).window(0, 0)
    assert batch.row_ids == (1, 2, 0)
    assert batch.ids_BT.tolist() == [[1001] * 4, [1002] * 3 + [PAD], [1000] * 2 + [PAD] * 2]
    assert batch.labels_BT.tolist() == [
        [IGNORE] + [1001] * 3,
        [IGNORE] + [1002] * 2 + [IGNORE],
        [IGNORE, 1000] + [IGNORE] * 2,
    ]
    assert {batch.ids_BT.dtype, batch.labels_BT.dtype} == {torch.int64}
    assert (batch.ids_BT.numel(), batch.num_targets) == (12, 6)


def test_targets_are_counted_after_the_shift() -> None:
    batch = make_batch(FakeRows(np.array([3], np.int32)), np.array([0]))
    assert target_places(batch.ids_BT).tolist() == [0, 1], "nothing predicts the first token"
    assert batch.num_targets == 2


def test_places_predict_the_targets() -> None:
    rows = FakeRows(np.array([2, 4, 3], np.int32))
    (batch,) = StepSampler(rows, 8, 0, 1, 0, 4096).window(0, 0)
    # Rows of 4 tokens; the last place of a row is never one, or its target were the next row's.
    assert batch.places_P.tolist() == [0, 1, 2, 4, 5, 8]
    targets = batch.labels_BT.flatten()[batch.places_P + 1]
    assert targets.tolist() == [1001] * 3 + [1002] * 2 + [1000]
    assert batch.places_P.dtype == torch.int64


@pytest.mark.parametrize("n", [1, 3, 11])
def test_ranks_without_rows_run_a_dummy_that_teaches_nothing(n: int) -> None:
    rows = log_normal_rows(n)
    windows = [StepSampler(rows, 8, 0, 8, rank, 10**6).window(0, (n - 1) // 8) for rank in range(8)]
    assert {len(window) for window in windows} == {1}
    batches = [window[0] for window in windows]
    assert sum(len(batch.row_ids) for batch in batches) == n % 8
    dummies = [batch for batch in batches if not batch.row_ids]
    assert len(dummies) == 8 - n % 8
    for dummy in dummies:
        assert dummy.ids_BT.tolist() == [[PAD, PAD]]
        assert dummy.labels_BT.tolist() == [[IGNORE, IGNORE]] and dummy.num_targets == 0


def test_rows_over_the_budget_run_alone() -> None:
    rows = FakeRows(np.array([900, 30, 30, 700, 30], np.int32))
    window = StepSampler(rows, 8, 0, 1, 0, 100).window(0, 0)
    assert [sorted(batch.row_ids) for batch in window] == [[0], [3], [1, 2, 4]]


def test_weights_repeat_or_thin_out_a_data_set() -> None:
    rows = FakeRows(np.full(35, 9, np.int32), weights=((10, 2.0), (20, 0.5), (5, 1.0)))
    sampler = StepSampler(rows, 16, 1, 1, 0, 4096)
    assert (sampler.rows_per_epoch, sampler.steps_per_epoch) == (35, 3)
    epochs = [Counter(epoch_order(rows.parts, 1, epoch).tolist()) for epoch in range(2)]
    for counts in epochs:
        assert [counts[row] for row in range(10)] == [2] * 10
        assert sorted(counts[row] for row in range(10, 30)) == [0] * 10 + [1] * 10
        assert [counts[row] for row in range(30, 35)] == [1] * 5
    # Epoch 1 takes the other half.
    assert [epochs[0][row] + epochs[1][row] for row in range(10, 30)] == [1] * 20


def test_each_pass_over_a_thinned_out_data_set_has_its_own_order() -> None:
    part = Part(100, 0.5)
    orders = [epoch_order([part], seed, epoch) for seed in (0, 1) for epoch in (0, 2, 4)]
    assert len({frozenset(order.tolist()) for order in orders}) == 6


def test_a_fractional_weight_sees_every_row_equally_often_in_the_long_run() -> None:
    orders = [epoch_order([Part(7, 1.4)], 0, epoch) for epoch in range(7)]
    assert Counter(np.concatenate(orders).tolist()) == dict.fromkeys(range(7), 10)


def test_weighted_data_sets_are_mixed_in_every_step() -> None:
    order = epoch_order([Part(500, 1.0), Part(500, 1.0)], 0, 0)
    assert 0.4 < (order[:500] < 500).mean() < 0.6


def test_statistics_cover_all_ranks() -> None:
    rows = log_normal_rows(128)
    samplers = [StepSampler(rows, 128, 0, 4, rank, 1024) for rank in range(4)]
    windows = [s.window(0, 0) for s in samplers]
    padded = [sum(batch.ids_BT.numel() for batch in window) for window in windows]
    for sampler in samplers:
        got = sampler.statistics(0, 0)
        assert (got.rows, got.tokens, got.padded_tokens) == (128, rows.lens.sum(), sum(padded))
        assert got.squared_tokens == sum(int(n) ** 2 for n in rows.lens)
        assert got.micro_batches == len(windows[0])
        assert got.imbalance == pytest.approx(max(padded) / (sum(padded) / 4))


# AdvertiseGen's training rows have a median of 135 tokens and a log-spread of 0.2; 114,599 of them.
ADVERTISE_GEN = np.exp(np.random.default_rng(0).normal(np.log(135), 0.2, 114_599)).astype(np.int32)


def test_little_padding_and_level_ranks_at_the_default_budget() -> None:
    """8 ranks, 128 rows a step."""
    options = BatchOptions()
    assert options.rows_per_step == 128
    for rows in (FakeRows(ADVERTISE_GEN[:12_800]), log_normal_rows(12_800)):
        sampler = StepSampler(rows, 128, 0, 8, 0, options.tokens_per_micro_batch)
        steps = [sampler.statistics(0, step) for step in range(sampler.steps_per_epoch)]
        assert padding_share(steps) < 0.05
        assert max(padding_share([step]) for step in steps) < 0.07
        assert max(s.imbalance for s in steps) < 1.1


def padding_share(steps: list[WindowStatistics]) -> float:
    return 1 - sum(s.tokens for s in steps) / sum(s.padded_tokens for s in steps)


def shapes_of(sampler: StepSampler, epochs: int) -> list[set[tuple[int, int]]]:
    """(rows, width) of all micro-batches of all ranks by epoch, from the plan: none is made."""
    steps = range(sampler.steps_per_epoch)
    plans = [[sampler.plan(epoch, step) for step in steps] for epoch in range(epochs)]
    return [
        {(len(part), sampler.width(part)) for ranks in plan for parts in ranks for part in parts}
        for plan in plans
    ]


@pytest.mark.parametrize(("seed", "budget"), [(0, 2048), (1, 2048), (0, 8192)])
def test_an_epoch_has_few_shapes(seed: int, budget: int) -> None:
    """8 ranks, AdvertiseGen's lengths, the default budget and that of the recipes for 80 GB. There
    are some 340 if rows keep the lengths they have."""
    sampler = StepSampler(FakeRows(ADVERTISE_GEN), 128, seed, 8, 0, budget, levels=True)
    first, second = shapes_of(sampler, 2)
    assert len(first) <= 64 and len(second - first) <= 3
    steps = [sampler.statistics(0, step) for step in range(sampler.steps_per_epoch)]
    assert padding_share(steps) < 0.05


@pytest.mark.parametrize("world", [1, 2, 4])
def test_few_ranks_pad_hardly_more_with_a_large_budget(world: int) -> None:
    """Unless it is filled: then rows of unlike lengths come together."""
    rows, shares = FakeRows(ADVERTISE_GEN[:12_800]), []
    for levels in (True, False):
        sampler = StepSampler(rows, 128, 0, world, 0, 8192, levels=levels)
        steps = [sampler.statistics(0, step) for step in range(sampler.steps_per_epoch)]
        shares.append(padding_share(steps))
        assert sampler.budget == (2048 if levels else 8192)
        assert max(sampler.size(part) for part in sampler._first_parts) <= sampler.budget
    assert shares[0] < 0.07 and shares[1] > 0.13


def test_the_second_epoch_of_a_small_data_set_brings_hardly_a_new_shape() -> None:
    """1,000 rows: eight steps an epoch, the last of 104 rows."""
    first, *later = shapes_of(StepSampler(FakeRows(ADVERTISE_GEN[:1000]), 128, 0, 2, 0, 2048), 5)
    assert len(set().union(*later) - first) <= len(first) / 4


def test_batches_are_padded_as_the_plan_says_and_stay_within_the_budget() -> None:
    rows = log_normal_rows(300)
    sampler = StepSampler(rows, 128, 0, 2, 1, 700)
    batches = [batch for step in range(3) for batch in sampler.window(0, step)]
    batches += evaluation_batches(rows, 2, 1, 700)
    lengths = set(sampler.padded_lens.tolist())
    assert len(lengths) < len(set(rows.lens.tolist())) / 4
    for batch in batches:
        count, length = batch.ids_BT.shape
        assert length in lengths | {2} and (count == 1 or count * length <= 700)
        assert length >= max(rows.lens[list(batch.row_ids)])
        assert (batch.labels_BT[:, rows.lens[list(batch.row_ids)].max() :] == IGNORE).all()


@pytest.mark.parametrize(("budget", "width"), [(200, 90), (70, 60), (50, 60)])
def test_a_rare_row_grows_to_a_usual_width_within_the_budget(budget: int, width: int) -> None:
    sampler = StepSampler(FakeRows(np.array([60, 90, 200], np.int32)), 8, 0, 1, 0, budget)
    vars(sampler)["_usual"] = {1: [90, 200]}  # as if the row of 60 came late
    assert sampler.width(np.array([0])) == width
    assert sampler.width(np.array([1])) == 90


def test_evaluation_sees_every_row_once_in_equal_counts() -> None:
    rows = log_normal_rows(37)
    ranks = [list(evaluation_batches(rows, 3, rank, 700)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(rows_in(ranks)) == list(range(37))


def test_no_rows_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="no rows"):
        StepSampler(FakeRows(np.empty(0, np.int32)), 4, 0, 1, 0, 10)


def test_micro_batches_could_have_few_numbers_of_tokens() -> None:
    lens = np.random.default_rng(0).lognormal(5, 0.5, 4000).astype(np.int32) + 1
    sampler = StepSampler(FakeRows(lens), 32, 0, 2, 0, 640)
    plans = (sampler.plan(0, step) for step in range(64))
    sizes = [sampler.size(part) for ranks in plans for parts in ranks for part in parts]
    counts = np.array(sampler.token_counts)
    assert len(counts) <= 12 and len(set(sizes)) > 50
    assert counts[np.searchsorted(counts, sizes)].sum() <= (1 + TOKENS_SHARE) * sum(sizes)
