"""Each launch line under recipes/machines is run by a shell up to `accelerate`, and what reaches that is what it accepts."""

import json
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from ruamel.yaml import YAML
from test_resume import children, end, has_rows, start, wait_until

from gbnzoo.recipe import load_recipe
from gbnzoo.run import Run
from gbnzoo.train import main

MACHINES = Path("recipes/machines")
CONFIGS = {"one_cpu.yaml": (1, 1), "one_gpu.yaml": (1, 1), "eight_gpus.yaml": (1, 8), "nodes.yaml": (2, 16)}


def accepted(arguments):
    """What Accelerate makes of the arguments of `accelerate`, and gbnzoo.train of its own."""
    command, *arguments = arguments
    assert command == "launch"
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert launch.module
    assert launch.training_script == "gbnzoo.train"
    app = typer.Typer(add_completion=False)
    app.command()(main)
    train = typer.main.get_command(app).make_context("train", list(launch.training_script_args)).params
    load_recipe(train["recipe"], train["overrides"] or (), rung=train["rung"])
    return launch, train


@pytest.fixture
def run_up_to_accelerate(tmp_path):
    """Runs a script where `accelerate`, `srun` and `scontrol` are stand-ins; gives the arguments that reach accelerate."""

    def stand_in(name, code):
        (tmp_path / name).write_text(f"#!{sys.executable}\n{code}")
        (tmp_path / name).chmod(stat.S_IRWXU)

    stand_in(
        "accelerate", f"import json, sys; open({str(tmp_path / 'arguments')!r}, 'w').write(json.dumps(sys.argv[1:]))"
    )
    stand_in("srun", "import os, sys; i = sys.argv.index('bash'); os.execvp('bash', sys.argv[i:])")
    stand_in("scontrol", "print('node-a\\nnode-b')")

    def run(script, *arguments, **environment):
        environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        subprocess.run(["bash", "-eu", "-c", script, "script", *arguments], env=environment, check=True, timeout=60)
        return json.loads((tmp_path / "arguments").read_text())

    return run


def test_every_file_is_here_once():
    assert {f.name for f in MACHINES.iterdir()} == {*CONFIGS, "slurm.sh", "kubernetes.yaml", "skypilot.yaml"}


@pytest.mark.parametrize(("file", "counts"), CONFIGS.items())
def test_accelerate_accepts_each_config_and_the_line_at_its_head(file, counts):
    config = load_config_from_file(str(MACHINES / file))
    assert (config.num_machines, config.num_processes) == counts
    [line] = [line for line in (MACHINES / file).read_text().splitlines() if line.startswith("# accelerate launch ")]
    assert f"--config_file recipes/machines/{file}" in line
    launch, train = accepted(shlex.split(line[2:])[1:])
    assert (launch.num_machines, launch.num_processes) == counts
    assert launch.multi_gpu == (counts[1] > 1)
    assert train["processes"] == launch.num_processes


def assert_second_of_two_nodes(arguments):
    launch, train = accepted(arguments)
    assert (launch.num_machines, launch.num_processes, launch.machine_rank) == (2, 16, 1)
    assert launch.main_process_ip == "node-a"
    assert launch.multi_gpu
    assert (train["processes"], train["resume"], train["rung"]) == (16, True, "ra")
    return launch


def test_slurm(run_up_to_accelerate):
    script = (MACHINES / "slurm.sh").read_text()
    slurm = {
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_NODEID": "1",
    }
    options = ["recipes/cifar10/resnet44_gbn.yaml", "--rung", "ra", "--out", "a folder", "base.milestones=[1, 2]"]
    launch = assert_second_of_two_nodes(run_up_to_accelerate(script, *options, **slurm))
    assert "a folder" in launch.training_script_args


def test_kubernetes(run_up_to_accelerate):
    job = YAML(typ="safe", pure=True).load(MACHINES / "kubernetes.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    pods = sum(replica["replicas"] for replica in replicas.values())
    for replica in replicas.values():
        [container] = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator looks for it
        shell, option, script = container["command"]
        assert (shell, option) == ("sh", "-c")
        operators = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node-a", "MASTER_PORT": "23456"}
        launch = assert_second_of_two_nodes(run_up_to_accelerate(script, **operators))
        assert launch.main_process_port == 23456
        assert launch.num_machines == pods
        assert launch.num_processes == pods * container["resources"]["limits"]["nvidia.com/gpu"]


def test_skypilot(run_up_to_accelerate):
    task = YAML(typ="safe", pure=True).load(MACHINES / "skypilot.yaml")
    gpus = task["resources"]["accelerators"].split(":")[1]
    skypilot = {
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": gpus,
        "SKYPILOT_NODE_RANK": "1",
    }
    addresses = {"SKYPILOT_NODE_IPS": "node-a\nnode-b"}
    assert_second_of_two_nodes(run_up_to_accelerate(task["run"], **task["envs"], **skypilot, **addresses))


SHORT = [
    "recipes/digits/resnet8_thin_gbn.yaml",
    "--rung",
    "gbn",
    "base.epochs=1",
    "base.milestones=[]",
    "large.batch_size=64",
]


def command(*launcher, out, more=()):
    launch = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "gbnzoo.train", *SHORT]
    return [*launch, *more, "--out", out]


def launched(*launcher, **options):
    return subprocess.run(command(*launcher, **options), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_accelerate_really_starts_one_process_on_a_cpu_and_two(tmp_path):
    one = launched("--config_file", MACHINES / "one_cpu.yaml", out=tmp_path / "one", more=["--processes", "1"])
    assert one.returncode == 0, one.stderr
    two = launched("--multi_gpu", "--num_processes", "2", out=tmp_path / "two")
    assert two.returncode == 0, two.stderr
    for name, processes in (("one", 1), ("two", 2)):
        run = Run(next((tmp_path / name).iterdir()))
        assert [start["processes"] for start in run.environments()] == [processes]
        run.finished()


@pytest.mark.slow
def test_accelerate_on_cpu_cannot_start_one_process_for_two_unnoticed(tmp_path):
    multi_cpu = tmp_path / "multi_cpu.yaml"
    one_cpu = (MACHINES / "one_cpu.yaml").read_text()
    multi_cpu.write_text(one_cpu.replace("'NO'", "MULTI_CPU").replace("num_processes: 1", "num_processes: 2"))
    for launcher in (["--cpu", "--num_processes", "2"], ["--config_file", multi_cpu]):
        wrong = launched(*launcher, out=tmp_path / "out")
        assert wrong.returncode == 1  # accelerate's; gbnzoo's was 2
        assert (
            "error: several processes were asked for, 1 started: accelerate launch --cpu starts a single one"
            in wrong.stderr
        )
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [(["--config_file", MACHINES / "one_cpu.yaml"], 1), (["--multi_gpu", "--num_processes", "2"], 2)],
)
def test_sigterm_to_accelerate_saves_and_ends_its_processes(tmp_path, launcher, processes):
    more = ["--processes", str(processes), "--checkpoint-seconds", "600", "base.epochs=200"]
    process = start(command(*launcher, out=tmp_path, more=more))
    try:
        wait_until(has_rows(tmp_path, 3))
        started = children(process.pid)
        assert len(started) == processes
        process.terminate()
        process.wait(timeout=120)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    finally:
        end(process)
    checkpoint = Run(next(tmp_path.iterdir())).latest_checkpoint()
    assert 0 < checkpoint.update < checkpoint.total_updates
