"""How fast a recipe trains by processes and threads: what is tried, what is advised, and once for real."""

import os

import pytest
import torch
from test_cli import DIGITS, gbnzoo

from gbnzoo import rates
from gbnzoo.rates import Rate


@pytest.mark.parametrize(
    ("threads", "expected"), [(1, [(1, 1)]), (2, [(1, 2), (2, 1)]), (6, [(1, 6), (2, 3), (3, 2), (6, 1)])]
)
def test_all_threads_are_used_however_they_are_split(threads, expected):
    assert rates.splits(threads) == expected


def test_the_fastest_is_of_few_processes_where_the_difference_is_noise():
    assert rates.fastest([Rate(1, 4, 64, 100), Rate(2, 2, 64, 150), Rate(4, 1, 64, 152)]).processes == 2
    assert rates.fastest([Rate(1, 4, 64, 100), Rate(2, 2, 64, 150), Rate(4, 1, 64, 170)]).processes == 4


def test_plan_advises_what_it_measured(monkeypatch):
    made = {1: 1000, 2: 1800, 3: 5000, 6: 900}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(
        rates,
        "measure_rate",
        lambda *_, processes, threads, **__: Rate(processes, threads, 32, made[processes]),
    )
    said = gbnzoo("plan", DIGITS, "seed=1", "--measure").splitlines()
    # A batch of 512 in ghosts of 16 lies on 1 or 2 processes, on 3 or 6 it does not.
    assert said[-5:-2] == ["|---|---|---|---|", "| 1 | 6 | 32 | 1,000 |", "| 2 | 3 | 32 | 1,800 |"]
    assert said[-1] == f"fastest: gbnzoo train {DIGITS} seed=1 --rung ra --processes 2"
    assert "fastest:" not in gbnzoo("plan", DIGITS)


@pytest.mark.slow
def test_updates_are_timed_on_several_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    options = {"rung": "gbn", "threads": 1, "data_dir": None, "seconds": 0.5}
    alone, two = (rates.measure_rate(DIGITS, [], processes=n, **options) for n in (1, 2))
    assert (alone.micro_batch_size, two.micro_batch_size) == (512, 256)
    assert 100 < alone.images_per_second < 1e6
    assert os.environ["OMP_NUM_THREADS"] == "7"
