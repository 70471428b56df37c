"""Processes for tests: forked from a server that has imported gbnzoo once, so that each starts in no time."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

os.environ["JOBLIB_MULTIPROCESSING"] = (
    "0"  # scikit-learn's joblib leaves semaphores behind in processes that are killed
)
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a server that has asked CUDA itself has no children that can use it
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["gbnzoo.train", "sklearn.datasets"])


class Together:
    """`function(*arguments)` in so many processes that torch.distributed can join; killed, if need be, at the end.

    They are on CPU cores, unless `on_gpus`, and then one process is joined to itself.
    """

    def __init__(self, processes: int, function: Callable, *arguments: Any, on_gpus: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes, self._answers = [], []
        for rank in range(processes):
            answer, end = _SERVER.Pipe(duplex=False)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            place = place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 or on_gpus else {}
            place |= {} if on_gpus else {"ACCELERATE_USE_CPU": "true"}
            here = dict(os.environ) | {key: str(value) for key, value in place.items()} | {"OMP_NUM_THREADS": "1"}
            process = _SERVER.Process(target=_work, args=(end, here, function, arguments))
            process.start()
            end.close()
            self.processes.append(process)
            self._answers.append(answer)

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def results(self, ranks: Sequence[int] | None = None, timeout: float = 120) -> list[Any]:
        """What the function returned on each process; what it raised is raised, as text, with its type's name first."""
        results = []
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if not wait([self._answers[rank]], timeout):
                raise TimeoutError(f"process {rank} gave no answer in {timeout} s")
            result, error = pickle.loads(self._answers[rank].recv_bytes())
            if error:
                raise AssertionError(error)
            results.append(result)
        return results


def run_together(processes: int, function: Callable, *arguments: Any, on_gpus: bool = False) -> list[Any]:
    with Together(processes, function, *arguments, on_gpus=on_gpus) as together:
        return together.results()


def _work(answer: Connection, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ.clear()  # the server's is that of the test which started it
    os.environ |= environment
    torch.set_num_threads(1)
    try:
        answered = function(*arguments), None
    except BaseException as error:
        answered = None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    answer.send_bytes(pickle.dumps(answered))  # by value: a process that ends takes its shared tensors along
