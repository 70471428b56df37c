"""Two machines, for real: network namespaces joined by a cable that can be cut."""

import os
import subprocess
import sys
import time

import pytest
from processes import run_together
from test_distributed import DIGITS, assert_same_log, relative_distance
from test_resume import RECIPE, has_rows, train_digits, wait_until

from gbnzoo.run import Run

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 10
LONG = ["base.epochs=6", "base.milestones=[3]"]  # 120 updates


class Machines:
    def __init__(self):
        self.names = [f"gbnzoo{os.getpid()}{end}" for end in "ab"]

    def connect(self):
        first, second = self.names
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "cable", "netns", second)
        for number, name in enumerate(self.names, 1):
            self.ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            self.ip("-n", name, "link", "set", "lo", "up")
            self.set_cable(name, "up")

    def ip(self, *arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)

    def set_cable(self, name, state):
        self.ip("-n", name, "link", "set", "cable", state)

    def launch(self, out, *options):
        """`accelerate launch` on both, one process each, each with a folder of its own to write to."""
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/machines/nodes.yaml"]
        training = ["-m", "gbnzoo.train", DIGITS, *RECIPE, "--rung", "gbn", "--processes", "2", *options]
        places = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "10.77.0.1"]
        return [
            subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    name,
                    *launcher,
                    *places,
                    "--machine_rank",
                    str(rank),
                    *training,
                    "--out",
                    f"{out}/{rank}",
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "cable", "PYTHONWARNINGS": "default"},
            )
            for rank, name in enumerate(self.names)
        ]


@pytest.fixture
def machines():
    machines = Machines()
    try:
        machines.connect()
        yield machines
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(
            f"needs the right to make network namespaces, and iproute2: {getattr(error, 'stderr', None) or error}"
        )
    finally:
        for name in machines.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)


def finish(both, timeout=300):
    """Exit codes, errors and times of both machines."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in both]
    finally:
        for process in both:
            process.terminate()
    return [process.returncode for process in both], errors


def test_two_machines_train_as_one_process_and_survive_a_cut_cable(machines, tmp_path):
    codes, errors = finish(machines.launch(tmp_path, *LONG))
    assert codes == [0, 0], errors
    assert [path.name for path in tmp_path.iterdir()] == ["0"]  # the second machine writes nothing
    [whole] = run_together(1, train_digits, tmp_path / "whole", 60, 60, LONG)
    run = Run(next((tmp_path / "0").iterdir()))
    assert relative_distance(run, Run(whole)) < 1e-9
    assert_same_log(run, Run(whole), rel=1e-9)

    again = tmp_path / "again"
    options = ["--timeout-seconds", str(TIMEOUT_SECONDS), "--checkpoint-seconds", "0", *LONG]
    both = machines.launch(again, *options)
    wait_until(has_rows(again / "0", 8))
    machines.set_cable(machines.names[0], "down")
    cut = time.monotonic()
    codes, errors = finish(both, timeout=TIMEOUT_SECONDS + 30)
    seconds = time.monotonic() - cut
    assert codes == [1, 1]  # accelerate's; gbnzoo's was 2
    for rank, error in enumerate(errors):
        assert f"error: process {rank} of 2 has lost another, which died, hangs or is out of reach" in error
    machines.set_cable(machines.names[0], "up")
    stopped = Run(next((again / "0").iterdir()))
    at = stopped.latest_checkpoint().update
    assert 0 < at < 120
    codes, errors = finish(machines.launch(again, "--resume", *LONG))
    assert codes == [0, 0], errors
    assert relative_distance(stopped, Run(whole)) < 1e-9
    assert_same_log(stopped, Run(whole), rel=1e-9)
    print(f"cut after update {at}: both ended {seconds:.1f} s later with a timeout of {TIMEOUT_SECONDS} s")
