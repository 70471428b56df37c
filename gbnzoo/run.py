"""A run's folder: `recipe.yaml log.csv layers.csv env.json checkpoints/`. What is in it survives a kill at any moment.

A checkpoint is one safetensors file, written aside, synced and renamed into place; its name carries its update and the
hash of its bytes, so that a damaged one is known for what it is and the one before it is used.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from gbnzoo.recipe import Recipe, load_recipe

LOG_COLUMNS = (
    "update",
    "samples",
    "lr",
    "train_loss",  # mean over the updates since the row before
    "grad_norm",  # of this update, before clipping
    "weight_distance",  # ‖w_t − w_0‖ over all parameters
    "weight_distance_first",  # the same over parameter 0 alone, which is what the paper's code logs
    "images_per_second",  # training only, since the row before
    "peak_memory_mib",  # since the process began: on a CPU resident, on CUDA allocated; the largest over processes
    "train_seconds",  # since the start, evaluation included
    "split",
    "top1_percent",
    "top5_percent",
    "eval_loss",
)
TIMED_COLUMNS = ("images_per_second", "peak_memory_mib", "train_seconds")
"""What may differ between two runs of one recipe and seed."""
LAYER_COLUMNS = (
    "update",  # each that log.csv has a row for
    "layer",  # a module that owns parameters, by its name in the network; "" for the network itself
    "weight_distance",  # ‖w_t − w_0‖ over the module's own parameters
)
_WORD_COLUMNS = ("split", "layer")

_CHECKPOINT_NAME = re.compile(r"update(\d{9})\.([0-9a-f]{16})\.safetensors")
_KEEP = 2
_ASIDE = ".writing"


class RunError(RuntimeError):
    """A run that cannot start, go on or be used; the message says what would help."""

    exit_code = 2  # of a command line that it ends


@dataclass(frozen=True)
class Checkpoint:
    """A run's whole state after `update` of its `total_updates`.

    Args:
        model: state dict.
        optimizer: state of each parameter by its index, as in `torch.optim.Optimizer.state_dict()["state"]`.
        progress: numbers the log needs to go on (loss and time since its last row).
    """

    update: int
    total_updates: int
    model: dict[str, torch.Tensor]
    optimizer: dict[int, dict[str, Any]] = field(default_factory=dict)
    progress: dict[str, float] = field(default_factory=dict)


class Run:
    """One run's folder, new or to be gone on with."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "recipe.yaml").is_file():
            raise RunError(f"{self.folder} is not a run: it holds no recipe.yaml; `gbnzoo train` makes one")

    @classmethod
    def start(cls, recipe: Recipe, out: str | Path, *, resume: bool) -> "Run":
        """Make the folder `out/<run name>`, or open it again to go on.

        Raises:
            RunError: if it holds a run and `resume` is false, or holds a run of another recipe.
        """
        folder = Path(out) / recipe.run_name
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        with _others_waiting(folder):  # of two that start at once the second finds the first one's run
            is_new = not (folder / "recipe.yaml").exists()
            if is_new:
                try:
                    _write(folder / "recipe.yaml", recipe.to_yaml().encode())
                except OSError as error:
                    raise RunError(
                        f"cannot begin a run in {folder}: {error.strerror}; another --out, or room there"
                    ) from error
        if is_new:
            return cls(folder)
        if not resume:
            raise RunError(
                f"{folder} already holds a run; --resume goes on with it, another --out or seed starts a new one"
            )
        run = cls(folder)
        if run.recipe != recipe:
            theirs, ours = _flat(run.recipe.model_dump()), _flat(recipe.model_dump())
            differing = ", ".join(
                f"{key} {theirs.get(key)} there, {ours.get(key)} now"
                for key in theirs | ours
                if theirs.get(key) != ours.get(key)
            )
            raise RunError(
                f"{folder} was started from another recipe ({differing}); go on with that one, or use another --out"
            )
        return run

    @contextlib.contextmanager
    def sole_writer(self) -> Iterator[None]:
        """Hold the folder against other processes that would train in it; a process that dies lets go.

        What a kill left half-written is removed. Where the file system knows no locks, nothing is held.

        Raises:
            RunError: if another process holds it.
        """
        with open(self.folder / "recipe.yaml", "rb+") as file:  # NFS locks only what may be written
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.folder} is being trained by another process; stop it first") from None
            except OSError:
                pass
            for torn in self.folder.rglob("*" + _ASIDE):
                torn.unlink()
            yield

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.folder / "recipe.yaml")

    # ---- log

    def rows(self) -> list[dict[str, str]]:
        """The log's rows in order, as text; a cell that was not measured is empty.

        Logs of earlier versions have fewer columns; those that they lack are empty too.
        """
        return self._rows("log.csv", LOG_COLUMNS)

    def layer_rows(self) -> list[dict[str, str]]:
        """The rows of layers.csv in order, as text; none in runs of versions that did not write it."""
        return self._rows("layers.csv", LAYER_COLUMNS)

    def log(self, row: Mapping[str, Any], layers: Mapping[str, float] | None = None) -> None:
        """Append one row, and one to layers.csv for each layer.

        Killing the process loses none of them; a machine that fails loses none before the last checkpoint, and what comes after
        that is done and written again.

        Args:
            row: cells by column.
            layers: weight distance by layer.

        Raises:
            RunError: if it cannot be written, as of everything here that writes.
        """
        if layers:
            cells = [{"update": row["update"], "layer": name, "weight_distance": d} for name, d in layers.items()]
            self._append("layers.csv", LAYER_COLUMNS, cells)
        self._append("log.csv", LOG_COLUMNS, [row])

    def rewind_log(self, update: int) -> None:
        """Drop the rows after `update`: the run goes on from there and will write them again."""
        for name, columns, rows in (
            ("log.csv", LOG_COLUMNS, self.rows()),
            ("layers.csv", LAYER_COLUMNS, self.layer_rows()),
        ):
            kept = [row for row in rows if int(row["update"]) <= update]
            self._write(self.folder / name, _as_csv(kept, columns))

    def _rows(self, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
        try:
            text = (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        # A row cut short, by a kill or a full disk, has no end.
        whole = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        rows = []
        for row in whole:
            for column, cell in row.items():
                if column not in _WORD_COLUMNS and not _is_cell(column, cell):
                    raise RunError(
                        f"{self.folder / name}, line {whole.line_num} is damaged: {column or 'too many cells'} {cell!r};"
                        " without that line the rest can be read"
                    )
            rows.append(dict.fromkeys(columns, "") | row)
        return rows

    def _append(self, name: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
        path = self.folder / name
        if not path.exists():
            self._write(path, _as_csv([], columns))
        with self._naming_failure(path), open(path, "ab") as file:
            file.write(_as_csv(rows, columns).split(b"\n", 1)[1])

    def _sync_log(self) -> None:
        """Put what was logged on the disk."""
        for name in ("log.csv", "layers.csv"):
            path = self.folder / name
            if path.exists():
                with self._naming_failure(path), open(path, "ab") as file:
                    os.fsync(file.fileno())

    def finished(self) -> tuple[Checkpoint, dict[str, str]]:
        """The last checkpoint and the log's row for it.

        Raises:
            RunError: if the run has not been finished.
        """
        checkpoint, rows = self.latest_checkpoint(), self.rows()
        if not checkpoint or checkpoint.update < checkpoint.total_updates or not rows:
            at = f"update {checkpoint.update} of {checkpoint.total_updates}" if checkpoint else "no checkpoint yet"
            raise RunError(f"{self.folder} is not finished ({at}); `gbnzoo train … --resume` goes on with it")
        return checkpoint, rows[-1]

    # ---- surroundings

    def record_environment(self, environment: Mapping[str, Any]) -> None:
        """Add one entry to env.json, a list with one entry for each start of the run."""
        self._write(self.folder / "env.json", json.dumps([*self.environments(), environment], indent=1).encode())

    def environments(self) -> list[dict[str, Any]]:
        path = self.folder / "env.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    # ---- weights

    def save_initial(self, model: Mapping[str, torch.Tensor]) -> None:
        """Keep the weights before the first update, from which distances are measured, with a hash of their bytes."""
        initial = Checkpoint(0, 0, dict(model))
        self._write(self._initial, _pack(initial, {"sha256": _hash_of_tensors(_pack(initial))}))

    def initial_weights(self) -> dict[str, torch.Tensor]:
        """The weights before the first update.

        Raises:
            RunError: if their file is damaged.
        """
        try:
            content = self._initial.read_bytes()
            # Files written by 0.1.0 hold no hash.
            if json.loads(_metadata(content).get("sha256", "null")) not in (None, _hash_of_tensors(content)):
                raise ValueError("its bytes do not match the hash that it holds")
            return _unpack(content).model
        except (SafetensorError, ValueError, KeyError) as error:
            raise RunError(
                f"{self._initial} is damaged ({error}); without it, --resume makes it again from the seed"
            ) from error

    @property
    def has_initial(self) -> bool:
        return self._initial.exists()

    @property
    def _initial(self) -> Path:
        return self.folder / "checkpoints" / "initial.safetensors"

    def save_checkpoint(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint whole or not at all, and drop all but the last two.

        Raises:
            RunError: if it cannot be written; those before it are untouched.
        """
        content = _pack(checkpoint)
        digest = hashlib.sha256(content).hexdigest()[:16]
        path = self.folder / "checkpoints" / f"update{checkpoint.update:09d}.{digest}.safetensors"
        self._sync_log()
        self._write(path, content)
        files = self._checkpoint_files()
        at = files.index(path)
        # What is newer was damaged and passed over.
        for stale in files[:at] + files[at + _KEEP :]:
            stale.unlink()
        return path

    def read_checkpoint(self, path: str | Path) -> Checkpoint:
        """One file of checkpoints/, that of the initial weights included.

        Raises:
            RunError: if it is not there, none of a run's, or damaged.
        """
        path = Path(path)
        if path.name == self._initial.name and path.is_file():
            return Checkpoint(0, 0, self.initial_weights())
        name = _CHECKPOINT_NAME.fullmatch(path.name)
        if not (name and path.is_file()):
            found = ", ".join(file.name for file in [*self._checkpoint_files(), self._initial] if file.is_file())
            raise RunError(f"{path}: no checkpoint of this run; wanted one of {found or 'none that it has yet'}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] != name[2]:
            raise RunError(
                f"{path} is damaged: its bytes do not match the hash in its name; wanted another of the run's"
            )
        return _unpack(content)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint whose bytes are what was written; a damaged one is passed over with a warning."""
        for path, before in itertools.pairwise([*self._checkpoint_files(), None]):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == _CHECKPOINT_NAME.fullmatch(path.name)[2]:
                return _unpack(content)
            instead = f"using {before.name}" if before else "there is no other: the run begins again"
            warnings.warn(f"{path} is damaged (its bytes do not match the hash in its name); {instead}", stacklevel=2)
        return None

    @property
    def saved_update(self) -> int:
        """Of the newest checkpoint by its name, which is not read; 0 where there is none."""
        return max((int(_CHECKPOINT_NAME.fullmatch(file.name)[1]) for file in self._checkpoint_files()), default=0)

    @property
    def written_at(self) -> float | None:
        """When the log or a checkpoint was last written, in seconds since 1970."""
        times = []
        for path in (self.folder / "log.csv", *self._checkpoint_files()):
            with contextlib.suppress(FileNotFoundError):  # older checkpoints go while one looks
                times.append(path.stat().st_mtime)
        return max(times, default=None)

    def _write(self, path: Path, content: bytes) -> None:
        with self._naming_failure(path):
            _write(path, content)

    @contextlib.contextmanager
    def _naming_failure(self, path: Path) -> Iterator[None]:
        """A full disk, say: torch and Python name neither the file nor what is left."""
        try:
            yield
        except OSError as error:
            last = next((p.name for p in self._checkpoint_files()), "none")
            raise RunError(
                f"cannot write {path}: {error.strerror}; last good checkpoint: {last}. Make room and go on with --resume"
            ) from error

    def _checkpoint_files(self) -> list[Path]:
        """Newest first."""
        return sorted(
            (f for f in (self.folder / "checkpoints").glob("update*") if _CHECKPOINT_NAME.fullmatch(f.name)),
            reverse=True,
        )


@contextlib.contextmanager
def _others_waiting(folder: Path) -> Iterator[None]:
    """Other processes that come here wait meanwhile; not where the file system knows no locks of folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"base": {"lr": 1}} to {"base.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _pack(checkpoint: Checkpoint, more_metadata: Mapping[str, Any] | None = None) -> bytes:
    tensors = {f"model.{key}": value for key, value in checkpoint.model.items()}
    scalars: dict[str, Any] = {}
    for index, state in checkpoint.optimizer.items():
        for key, value in state.items():
            (tensors if isinstance(value, torch.Tensor) else scalars)[f"optimizer.{index}.{key}"] = value
    metadata = dict(more_metadata or {}) | {
        "update": checkpoint.update,
        "total_updates": checkpoint.total_updates,
        "scalars": scalars,
        "progress": checkpoint.progress,
    }
    # safetensors keeps shapes, not strides: channels_last weights are laid out plainly first.
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    return save(plain, {key: json.dumps(value) for key, value in metadata.items()})


def _tensors_begin(content: bytes) -> int:
    """Where a safetensors file's header ends: it opens with the header's length."""
    return 8 + int.from_bytes(content[:8], "little")


def _metadata(content: bytes) -> dict[str, str]:
    return json.loads(content[8 : _tensors_begin(content)])["__metadata__"]


def _hash_of_tensors(content: bytes) -> str:
    return hashlib.sha256(content[_tensors_begin(content) :]).hexdigest()


def _unpack(content: bytes) -> Checkpoint:
    metadata = _metadata(content)
    model: dict[str, torch.Tensor] = {}
    optimizer: dict[int, dict[str, Any]] = {}
    for name, value in (load(content) | json.loads(metadata["scalars"])).items():
        part, key = name.split(".", 1)
        if part == "model":
            model[key] = value
        else:
            index, key = key.split(".", 1)
            optimizer.setdefault(int(index), {})[key] = value
    update, total_updates, progress = (json.loads(metadata[key]) for key in ("update", "total_updates", "progress"))
    return Checkpoint(update, total_updates, model, optimizer, progress)


def _as_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _write(path: Path, content: bytes) -> None:
    """Write aside, sync, rename: `path` holds either what it held or all of `content`."""
    aside = path.with_name(path.name + _ASIDE)
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    os.replace(aside, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _is_cell(column: str | None, cell: str | list[str] | None) -> bool:
    """Whether a log has such a number there, or none where it may have none."""
    if not cell or column is None:
        return column not in (None, "update")
    try:
        (int if column == "update" else float)(cell)
    except ValueError:
        return False
    return True
