"""Memory of large tensors is kept for the next ones; in processes of their own, since it cannot be unset."""

import subprocess
import sys

import pytest

PAGES = 64 * 2**20 // 4096
PROGRAM = """
import resource
import statistics
import torch
from gbnzoo.allocator import keep_freed_memory

if {keep} and not keep_freed_memory():
    raise SystemExit(3)
x = torch.zeros(64 * 2**20, dtype=torch.uint8)
x.clone()
faults = []
for _ in range(11):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x.clone()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults))  # a machine short of memory takes some pages back now and then
"""


def faults_a_clone(keep: bool) -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the page faults of Linux with glibc")
def test_a_tensor_freed_and_made_again_finds_its_pages():
    kept, released = faults_a_clone(keep=True), faults_a_clone(keep=False)
    assert kept < 0.01 * PAGES
    assert released > 100 * max(1, kept)
