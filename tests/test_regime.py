"""The regimes' arithmetic against numbers worked by hand from the paper."""

import math

import pytest

from gbnzoo.regime import RUNGS, Layout, choose_layout, derive_regime

RESNET44 = {
    "num_samples": 50_000,
    "batch_size": 128,
    "epochs": 200,
    "lr": 0.1,
    "milestones": (81, 122, 164),
    "lr_decay": (0.1, 0.1, 0.1),
    "large_batch_size": 4096,
    "ghost_batch_size": 128,
    "clip_grad_norm": 5.0,
    "gradient_noise_sigma": 0.5,
}


@pytest.mark.parametrize(
    ("rung", "batch", "ghost", "updates", "first_milestone", "lr", "clip", "noise"),
    [
        # 200 · 50000 / 128 = 78125 exactly; 200 · 50000 / 4096 = 2441.4; 81 · 50000 / 128 = 31640.6; / 4096 = 988.8.
        # sqrt(4096 / 128) = sqrt(32) = 5.65685.
        ("sb", 128, 128, 78125, 31640, 0.1, None, 0.0),
        ("lb", 4096, 4096, 2441, 988, 0.1, None, 0.0),
        ("lr", 4096, 4096, 2441, 988, 0.565685, 5.0, 0.5),
        ("gbn", 4096, 128, 2441, 988, 0.565685, 5.0, 0.5),
        ("ra", 4096, 128, 78125, 31640, 0.565685, 5.0, 0.5),
    ],
)
def test_each_rung_of_resnet44_adds_one_cure(rung, batch, ghost, updates, first_milestone, lr, clip, noise):
    regime = derive_regime(rung, **RESNET44)
    assert (regime.batch_size, regime.ghost_batch_size, regime.total_updates) == (batch, ghost, updates)
    assert regime.milestones[0] == first_milestone
    assert regime.lr == pytest.approx(lr, rel=1e-5)
    assert (regime.clip_grad_norm, regime.gradient_noise_sigma) == (clip, noise)


def test_ra_sees_32_times_the_samples_of_sb():
    assert derive_regime("ra", **RESNET44).samples_seen == 32 * derive_regime("sb", **RESNET44).samples_seen
    assert derive_regime("ra", **RESNET44).epochs == 6400


def test_the_rate_drops_exactly_at_a_milestone():
    regime = derive_regime("sb", **RESNET44)
    rates = [regime.lr_at(update) for update in (0, 31639, 31640, 47655, 47656, 64062, 78124)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-4, 1e-4])
    assert regime.highest_lr == pytest.approx(0.1)


def test_a_rate_may_also_rise_as_in_the_papers_c1():
    regime = derive_regime("sb", **RESNET44 | {"lr": 1e-3, "milestones": (60, 120, 180), "lr_decay": (10, 0.1, 0.1)})
    # 60, 120 and 180 epochs of 390.625 updates: 23437, 46875, 70312.
    rates = [regime.lr_at(update) for update in (23436, 23437, 46875, 70312)]
    assert rates == pytest.approx([1e-3, 1e-2, 1e-3, 1e-4])
    assert regime.highest_lr == pytest.approx(1e-2)


def test_warmup_rises_linearly_and_cosine_and_linear_fall_to_zero_after_it():
    # 100 samples in batches of 10: 10 updates an epoch, 100 in all, the first 20 of them warm-up.
    common = {"num_samples": 100, "batch_size": 10, "epochs": 10, "lr": 1.0, "warmup_epochs": 2}
    large = {"large_batch_size": 10, "ghost_batch_size": 10}
    cosine = derive_regime("sb", schedule="cosine", **common, **large)
    assert [cosine.lr_at(u) for u in (0, 9, 19, 20)] == pytest.approx([0.05, 0.5, 1.0, 1.0])
    assert cosine.lr_at(60) == pytest.approx(0.5)  # half way from 20 to 100
    assert cosine.lr_at(40) == pytest.approx((1 + math.sqrt(0.5)) / 2)  # a quarter of the way: (1 + cos 45°) / 2
    linear = derive_regime("sb", schedule="linear", **common, **large)
    assert [linear.lr_at(u) for u in (19, 20, 60, 99)] == pytest.approx([1.0, 1.0, 0.5, 1 / 80])
    quadratic = derive_regime("sb", schedule="quadratic", **common, **large)
    assert [quadratic.lr_at(u) for u in (9, 20, 60, 80)] == pytest.approx([0.5, 1.0, 0.25, 0.0625])
    constant = derive_regime("sb", schedule="constant", **common, **large)
    assert {constant.lr_at(u) for u in range(20, 100)} == {1.0}


def test_a_fraction_of_an_epoch_is_taken_by_its_decimal_digits():
    # 0.7 · 1000 is 700 although 0.7 as a float is below 7/10.
    regime = derive_regime(
        "sb", **RESNET44 | {"num_samples": 1000, "batch_size": 1, "epochs": 0.7, "milestones": (0.29, 0.3, 0.31)}
    )
    assert regime.total_updates == 700
    assert regime.milestones == (290, 300, 310)


def test_lr_scaling_may_be_linear_or_none():
    for scaling, factor in (("none", 1), ("linear", 32)):
        assert derive_regime("gbn", lr_scaling=scaling, **RESNET44).lr == pytest.approx(0.1 * factor)


def test_the_rate_may_be_scaled_from_another_batch_than_the_small_one():
    lrs = [derive_regime(rung, lr_reference_batch_size=256, **RESNET44).lr for rung in ("sb", "lb", "lr", "gbn", "ra")]
    assert lrs == pytest.approx([0.1, 0.1, 0.4, 0.4, 0.4])


def test_a_run_without_an_update_is_refused():
    with pytest.raises(
        ValueError, match=r"rung lb would make no update: 1 epochs of 1297 samples in batches of 4096; at least 3.16"
    ):
        derive_regime("lb", **RESNET44 | {"num_samples": 1297, "epochs": 1})


def test_weight_decay_ends_where_asked():
    assert derive_regime("sb", **RESNET44).weight_decay_updates == 78125
    assert derive_regime("ra", weight_decay_epochs=100, **RESNET44).weight_decay_updates == 39062


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_every_layout_covers_the_batch_once_in_whole_ghosts(processes, micro_batch_size):
    layout = Layout(batch_size=64, ghost_batch_size=2, processes=processes, micro_batch_size=micro_batch_size)
    seen = []
    for rank in range(processes):
        micro_batches = layout.micro_batches(rank)
        assert len(micro_batches) == layout.accumulation
        for ghosts in micro_batches:
            assert sum(map(len, ghosts)) == micro_batch_size
            seen += ghosts
        # Ghosts rank, rank + W, rank + 2W, …: the order the running statistics' merge relies on.
        firsts = [ghost[0] // 2 for ghosts in micro_batches for ghost in ghosts]
        assert firsts == list(range(rank, 32, processes))
    assert sorted(position for ghost in seen for position in ghost) == list(range(64))


def test_a_ghost_over_processes_is_met_by_all_of_them_in_the_same_step():
    # 6 ghosts of 8, in parts of 4, over 4 processes: two groups of two, three steps.
    layout = Layout(batch_size=48, ghost_batch_size=8, processes=4, micro_batch_size=4)
    assert (layout.processes_per_ghost, layout.groups, layout.accumulation) == (2, 2, 3)
    assert [layout.micro_batches(rank) for rank in range(4)] == [
        [[range(0, 4)], [range(16, 20)], [range(32, 36)]],
        [[range(4, 8)], [range(20, 24)], [range(36, 40)]],
        [[range(8, 12)], [range(24, 28)], [range(40, 44)]],
        [[range(12, 16)], [range(28, 32)], [range(44, 48)]],
    ]


def test_the_largest_micro_batch_of_whole_ghosts_is_chosen():
    assert choose_layout(4096, 128).micro_batch_size == 512
    assert choose_layout(4096, 4096).micro_batch_size == 4096  # one process cannot share a ghost
    assert choose_layout(4096, 128, processes=32).accumulation == 1
    assert choose_layout(384, 96, max_micro_batch_size=300).micro_batch_size == 192


def test_a_ghost_is_shared_where_there_are_too_few_for_all_processes():
    assert str(choose_layout(4096, 4096, processes=8)) == (
        "8 process(es) × 1 accumulation × micro-batch 512, each ghost over 8"
    )
    assert choose_layout(4096, 128, processes=64).processes_per_ghost == 2
    # Of 2 × 1 and 1 × 2 (ghost parts × steps) on four processes the one within the maximum.
    assert choose_layout(8192, 4096, processes=4, max_micro_batch_size=2048).processes_per_ghost == 2
    assert choose_layout(8192, 4096, processes=4, max_micro_batch_size=1024).processes_per_ghost == 4


def test_layouts_that_do_not_fit_name_those_that_do():
    with pytest.raises(ValueError, match=r"over 6 processes .* it fits on 1, 2, 4, 8, 16 or 32 processes"):
        choose_layout(4096, 128, processes=6)
    with pytest.raises(ValueError, match=r"over 48 processes .* it fits on 1, 2, 4, 8, 16, 32 or 64 processes"):
        choose_layout(4096, 128, processes=48)
    with pytest.raises(ValueError, match=r"micro_batch_size 100 .* 32, 64, 128, 256, 512 or 1024 fit$"):
        choose_layout(4096, 128, processes=4, micro_batch_size=100)


def test_a_ghost_over_accumulation_steps_is_refused():
    with pytest.raises(
        ValueError,
        match=r"accumulation steps cannot share a ghost\); 128, 256, 512 or 1024 fit, and 64 fits on 2, 4, 8 or 16 processes",
    ):
        choose_layout(1024, 128, micro_batch_size=64)


def test_the_ladder_has_the_papers_order():
    assert list(RUNGS) == ["sb", "lb", "lr", "gbn", "ra"]
