"""Files of weights, looked at before they are believed: safetensors only, of one piece, finite, and the bytes that were named.

Nothing is allocated for a tensor before the file's size, its header and every offset in it agree with one another.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

ORGANIZATION = "gbnzoo"
"""Whose repos on the Hub the published names are."""

WEIGHTS_FILE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".tar")
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
"""What networks with BatchNorm are made of: weights, and the number of batches seen."""

_PICKLE = "a pickle runs whatever code it holds when it is opened, and is refused"

# timm's longest header, of its deepest network, is under 0.5 MiB; the format itself would allow 100 MB.
_MAX_HEADER_BYTES = 8 * 2**20
_MAX_DIMENSIONS = 8


class WeightsError(ValueError):
    """A file of weights that is not loaded; the message says which and why."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a safetensors header describes it; start and end are bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_weights(path: str | Path, sha256: str | None = None) -> dict[str, TensorEntry]:
    """Look at a file of weights from the outside inwards: name, header, hash, and last the numbers.

    Args:
        path: safetensors file.
        sha256: hash that its bytes must have; None for any.

    Returns:
        Its tensors by name.

    Raises:
        FileNotFoundError: if there is no file.
        WeightsError: if it is no safetensors file, contradicts itself, has another hash, or holds NaN or infinity.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        reason = _PICKLE if path.name.endswith(PICKLES) else "unknown format"
        raise WeightsError(f"{path}: {reason}; wanted a .safetensors file")
    entries = read_header(path)
    if sha256 and (found := sha256_of(path)) != sha256:
        raise WeightsError(
            f"{path}: its sha256 is {found}, wanted {sha256}; these are not the weights that were published"
        )
    try:
        with safe_open(path, "pt") as file:
            for name, entry in entries.items():
                if entry.dtype != "I64" and not file.get_tensor(name).isfinite().all():
                    raise WeightsError(f"{path}: NaN or infinity in {name!r:.80}")
    except SafetensorError as error:
        raise WeightsError(f"{path}: {error}") from None
    return entries


def find_weights(folder: str | Path) -> Path:
    """The safetensors file of a hub folder.

    Raises:
        WeightsError: if there are pickles alone.
        FileNotFoundError: if there are no weights at all.
    """
    path = Path(folder) / WEIGHTS_FILE
    if path.is_file():
        return path
    if path.parent.is_dir():
        refuse_pickles(str(folder), [file.name for file in path.parent.iterdir()])
    raise FileNotFoundError(f"{path}: no such file")


def refuse_pickles(where: str, files: Iterable[str]) -> None:
    """Explain why a place without safetensors is not loaded from.

    Raises:
        WeightsError: if there is a pickle among its files.
    """
    if pickles := sorted(name for name in files if name.endswith(PICKLES)):
        raise WeightsError(
            f"{where} holds no {WEIGHTS_FILE} but {', '.join(pickles)}: {_PICKLE}. Its author can convert it with"
            " timm.models.save_for_hf(model, folder, safe_serialization=True)"
        )


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file says it holds, after everything it says has been found consistent.

    Raises:
        WeightsError: at the first thing that is not.
    """

    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise WeightsError(f"{path}: {problem}")

    file_bytes = Path(path).stat().st_size
    require(file_bytes >= 8, f"{file_bytes} bytes are no safetensors file")
    with open(path, "rb") as file:
        first = file.read(8)
        require(first != b"version ", "is a pointer of Git LFS; `git lfs pull` fetches the weights it stands for")
        header_bytes = int.from_bytes(first, "little")
        require(
            header_bytes <= min(file_bytes - 8, _MAX_HEADER_BYTES),
            f"a header of {header_bytes} bytes is announced, the file has {file_bytes};"
            f" wanted at most that and {_MAX_HEADER_BYTES}",
        )
        header = file.read(header_bytes)
    data_bytes = file_bytes - 8 - header_bytes
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its header is not JSON: {error}") from None
    require(isinstance(content, dict), "its header is no JSON object")
    metadata = content.pop("__metadata__", {})
    require(
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()),
        "its metadata is not of text alone",
    )

    entries = {name: _entry(path, name, value) for name, value in content.items()}
    require(bool(entries), "it holds no tensor")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        require(entry.start >= end, f"{name!r:.80} begins at byte {entry.start}, inside the tensor before it")
        require(entry.start == end, f"{entry.start - end} bytes before {name!r:.80} belong to no tensor")
        end = entry.end
    require(end == data_bytes, f"its tensors end at byte {end}, its data at {data_bytes}")
    return entries


def _entry(path: str | Path, name: str, value: Any) -> TensorEntry:
    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise WeightsError(f"{path}: {name!r:.80} {problem}")

    require(
        isinstance(value, Mapping) and value.keys() == {"dtype", "shape", "data_offsets"},
        "is not described as a tensor",
    )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    require(
        isinstance(dtype, str) and dtype in DTYPE_BYTES, f"is of dtype {dtype!r:.20}; wanted {', '.join(DTYPE_BYTES)}"
    )
    require(_are_sizes(shape) and len(shape) <= _MAX_DIMENSIONS, f"has no possible shape: {shape!s:.80}")
    require(_are_sizes(offsets) and len(offsets) == 2, f"has no possible offsets: {offsets!s:.80}")
    start, end = offsets
    wanted = math.prod(shape) * DTYPE_BYTES[dtype]
    require(end - start == wanted, f"takes {end - start} bytes, shape {shape} of {dtype} would {wanted}")
    return TensorEntry(dtype, tuple(shape), start, end)


def _are_sizes(values: Any) -> bool:
    # bool is an int to Python, and 2**63 no size to anyone.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r:.80} stands twice")
    return content
