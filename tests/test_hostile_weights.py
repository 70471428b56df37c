"""Files of weights that somebody damaged or forged: each is a clear error, none a crash, none is loaded."""

import ast
import hashlib
import json
import math
import pickle
import random
import struct
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save
from small_run import finished_run, random_weights, small_recipe

from gbnzoo import pretrained, weights
from gbnzoo.publish import publish
from gbnzoo.weights import WEIGHTS_FILE, WeightsError, check_weights, find_weights

GOOD = save(random_weights(small_recipe()), {"format": "pt"})
HEADER_BYTES = int.from_bytes(GOOD[:8], "little")
HEADER = json.loads(GOOD[8 : 8 + HEADER_BYTES])
DATA = GOOD[8 + HEADER_BYTES :]
FLOATS = sorted(name for name, entry in HEADER.items() if entry.get("dtype") == "F32")
FIRST, MIDDLE, LAST = (
    sorted((n for n in HEADER if n != "__metadata__"), key=lambda n: HEADER[n]["data_offsets"])[i] for i in (0, 20, -1)
)
COUNTER = "bn1.num_batches_tracked"


def file_of(header, data=DATA):
    """A file with this header: an object, or text of any kind."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def changed(name, **entry):
    return file_of(HEADER | {name: HEADER[name] | entry})


def header_lengths():
    lengths = [0, 1, 2, HEADER_BYTES - 8, HEADER_BYTES - 1, HEADER_BYTES + 1, HEADER_BYTES + 8]
    lengths += [len(GOOD) - 8, len(GOOD) - 7, len(GOOD), 10**8, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
    yield from ((f"length {n}", n.to_bytes(8, "little") + GOOD[8:]) for n in lengths)


def headers():
    texts = {
        "empty": b"",
        "spaces": b" " * 64,
        "zeros": bytes(64),
        "no object": b"[]",
        "null": b"null",
        "number": b"1",
        "text": b'"dtype"',
        "no tensors": b"{}",
        "metadata alone": b'{"__metadata__": {"format": "pt"}}',
        "single quotes": repr(HEADER).encode(),
        "trailing comma": json.dumps(HEADER).encode()[:-1] + b",}",
        "two objects": json.dumps(HEADER).encode() * 2,
        "not a number": b'{"a": NaN}',
        "not UTF-8": b'{"\xff\xfe": 1}',
        "UTF-16": json.dumps(HEADER).encode("utf-16"),
        "byte order mark": b"\xef\xbb\xbf" + json.dumps(HEADER).encode(),
        "deep lists": b"[" * 100_000,
        "deep lists, closed": b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "deep objects": b'{"a":' * 50_000,
        "endless number": b'{"a": ' + b"9" * 100_000 + b"}",
        "long name": json.dumps({"n" * 10**6: 1}).encode(),
    }
    yield from ((f"header {name}", file_of(text)) for name, text in texts.items())
    text = json.dumps(HEADER).encode()
    yield from ((f"header cut at {n}", file_of(text[:n])) for n in range(1, len(text), len(text) // 20))
    for value in (1, "pt", [], None, {"format": 1}, {"format": None}, {"format": {}}, {"format": ["pt"]}):
        yield f"metadata {value!r}", file_of(HEADER | {"__metadata__": value})


def entries():
    for value in (None, 1, "F32", [], [1], {}, True):
        yield f"entry {value!r}", file_of(HEADER | {MIDDLE: value})
    for key in ("dtype", "shape", "data_offsets"):
        yield f"without {key}", file_of(HEADER | {MIDDLE: {k: v for k, v in HEADER[MIDDLE].items() if k != key}})
        yield f"{key} null", changed(MIDDLE, **{key: None})
        yield f"{key} an object", changed(MIDDLE, **{key: {}})
    yield "one key more", changed(MIDDLE, strides=[1])
    others = ("F64", "I32", "U32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "f32", "float32", "", "F32 ", "🙂", 32)
    for dtype in (*others, "F16", "BF16", "I64"):
        yield f"dtype {dtype!r}", changed(MIDDLE, dtype=dtype)
    yield "counter as F32", changed(COUNTER, dtype="F32")
    yield "counter as F64", changed(COUNTER, dtype="F64")


def shapes():
    shape = HEADER[MIDDLE]["shape"]
    bombs = [[2**40], [2**62], [2**63], [2**64], [2**31, 2**31], [2**32, 2**32], [10**30], [2**21] * 3, [2**62, 0]]
    odd = [
        [-n for n in shape],
        [-1],
        [1.0],
        [float("inf")],
        ["8"],
        [None],
        [True],
        [[8]],
        [*shape, 2],
        [1] * 9,
        [2] * 70,
    ]
    for value in (*bombs, *odd, [0], [], [math.prod(shape) + 1], [math.prod(shape) - 1], 8, "8"):
        yield f"shape {value!s:.30}", changed(MIDDLE, shape=value)


def offsets():
    for name in (FIRST, MIDDLE, LAST):
        start, end = HEADER[name]["data_offsets"]
        pairs = [[end, start], [start + 4, end + 4], [start - 4, end - 4], [start, end + 4], [start, end - 4], [0, 0]]
        pairs += [[start, 2**40], [2**40, 2**40 + end - start], [2**63, 2**63 + end - start], [2**64 - 4, 2**64]]
        pairs += [[start], [start, end, end], [], [float(start), float(end)], [str(start), str(end)], [None, None]]
        yield from ((f"offsets {name} {pair}", changed(name, data_offsets=pair)) for pair in pairs)
    other = HEADER[FIRST]["data_offsets"]
    yield "overlap", changed(next(n for n in FLOATS if n != FIRST), data_offsets=other)
    yield "bytes of no tensor", file_of({n: e for n, e in HEADER.items() if n != MIDDLE})


def duplicates():
    text = json.dumps(HEADER)
    for name in (FIRST, MIDDLE, "__metadata__"):
        again = f"{json.dumps(name)}: {json.dumps(HEADER[name])}"
        yield f"{name} twice", file_of(f"{text[:-1]}, {again}}}".encode())
    for key in ("dtype", "shape", "data_offsets"):
        entry = json.dumps(HEADER[MIDDLE])
        twice = f"{entry[:-1]}, {json.dumps(key)}: {json.dumps(HEADER[MIDDLE][key])}}}"
        yield f"{key} twice", file_of(text.replace(entry, twice, 1).encode())


def sizes():
    for length in (*range(9), 8 + HEADER_BYTES, *range(100, len(GOOD), len(GOOD) // 15), len(GOOD) - 1):
        yield f"cut at {length}", GOOD[:length]
    for more in (b"\0", bytes(8), bytes(4096), GOOD):
        yield f"{len(more)} bytes more", GOOD + more


def other_formats():
    archive = BytesIO()
    torch.save({"conv1.weight": torch.zeros(2)}, archive)
    yield "torch pickle", archive.getvalue()
    yield "pickle", pickle.dumps({"conv1.weight": [0.0] * 100})
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("weights", DATA)
    yield "zip", archive.getvalue()
    yield "error page", b"<!DOCTYPE html><html><body>504 Gateway Time-out</body></html>" * 20
    yield "LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 78541\n"
    yield "zeros", bytes(len(GOOD))


def not_numbers():
    values = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    for k, name in enumerate(FLOATS):
        start, end = HEADER[name]["data_offsets"]
        kind, value = list(values.items())[k % 3]
        at = 8 + HEADER_BYTES + (start, end - 4, (start + end) // 8 * 4)[k % 3]
        yield f"{kind} in {name}", GOOD[:at] + struct.pack("<f", value) + GOOD[at + 4 :]


def other_networks():
    """Sound files that do not fit the network."""
    state = random_weights(small_recipe())
    conv = state["conv1.weight"]
    yield "a weight less", save({n: v for n, v in state.items() if n != MIDDLE})
    yield "a weight more", save(state | {"more.weight": torch.zeros(3)})
    yield "a weight renamed", save({n.replace("stages.1", "layers.1"): v for n, v in state.items()})
    yield "transposed", save(state | {"conv1.weight": conv.transpose(0, 1).contiguous()})
    yield "flattened", save(state | {"conv1.weight": conv.flatten()})
    yield "wider", save(state | {"conv1.weight": torch.zeros(64, *conv.shape[1:])})
    yield "counter in F32", save(state | {COUNTER: torch.zeros(2)})


def other_bytes():
    """Sound files that fit, of other numbers: only the hash tells."""
    generator = random.Random(0)
    for _ in range(20):
        at = 8 + HEADER_BYTES + generator.randrange(len(DATA) // 4) * 4  # the lowest byte of a float: it stays finite
        yield f"bit of byte {at}", GOOD[:at] + bytes([GOOD[at] ^ 1 << generator.randrange(8)]) + GOOD[at + 1 :]
    yield "zero weights", GOOD[: 8 + HEADER_BYTES] + bytes(len(DATA))
    yield "spaced header", file_of(json.dumps(HEADER).encode() + b" ")


MALFORMED = [
    case
    for make in (header_lengths, headers, entries, shapes, offsets, duplicates, sizes, other_formats)
    for case in make()
]
FORGED = [*not_numbers(), *other_networks(), *other_bytes()]


def named(cases):
    return [pytest.param(content, id=name) for name, content in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hub folder whose config.json names no hash; tests write its weights."""
    path = tmp_path_factory.mktemp("hostile")
    folder = publish(finished_run(path), path / "hub")
    config = json.loads((folder / "config.json").read_text())
    del config["gbn"]["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_there_are_more_than_two_hundred():
    contents = {content for _, content in MALFORMED + FORGED}
    assert GOOD not in contents
    assert len(contents) == len(MALFORMED + FORGED) > 200


def test_the_file_they_were_made_from_is_loaded(folder):
    (folder / WEIGHTS_FILE).write_bytes(GOOD)
    assert {e.shape for e in check_weights(folder / WEIGHTS_FILE).values()} == {
        tuple(e["shape"]) for n, e in HEADER.items() if n != "__metadata__"
    }
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(v, random_weights(small_recipe())[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("content", named(MALFORMED))
def test_a_malformed_file_is_refused_before_a_tensor_is_made(content, folder, monkeypatch):
    def never(*_):
        raise AssertionError("was opened")

    monkeypatch.setattr(weights, "safe_open", never)
    path = folder / WEIGHTS_FILE
    path.write_bytes(content)
    with pytest.raises(WeightsError) as refused:
        check_weights(path)
    assert len(str(refused.value)) < 1000
    with pytest.raises(WeightsError):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("content", named(not_numbers()))
def test_weights_that_are_not_numbers_are_refused(content, folder):
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(WeightsError, match="NaN or infinity in '"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("content", named(other_networks()))
def test_weights_of_another_network_are_refused(content, folder):
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(RuntimeError, match=r"Error.* in loading state_dict|inconsistent"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("content", named(FORGED))
def test_where_the_hash_is_known_nothing_else_is_loaded(content, folder):
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(WeightsError, match=r"its sha256 is .*, wanted "):
        check_weights(folder / WEIGHTS_FILE, hashlib.sha256(GOOD).hexdigest())


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pth", "weights.pt", "model.ckpt", "model.pth.tar", "a.pkl"]
)
def test_a_folder_with_a_pickle_alone_is_refused(name, folder):
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    pickled = folder / name
    torch.save(random_weights(small_recipe()), pickled)
    with pytest.raises(WeightsError, match=rf"holds no model.safetensors but {name}: a pickle runs whatever code"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    with pytest.raises(WeightsError, match="a pickle runs whatever code"):
        check_weights(pickled)
    pickled.unlink()


def test_a_pickle_beside_the_weights_is_not_opened(folder):
    (folder / WEIGHTS_FILE).write_bytes(GOOD)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle either")
    timm.create_model(f"local-dir:{folder}", pretrained=True)
    (folder / "pytorch_model.bin").unlink()


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file"):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    "hostile", [{"hf_hub_filename": "../../secret.bin"}, {"url": "http://127.0.0.1:9/x.pth"}, {"custom_load": True}]
)
def test_config_cannot_point_to_other_weights(hostile, folder):
    """`file` and `state_dict` of a config.json timm overwrites or refuses itself."""
    (folder / WEIGHTS_FILE).write_bytes(GOOD)
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    config["pretrained_cfg"] |= hostile
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    finally:
        (folder / "config.json").write_text(text)
    assert torch.equal(model.conv1.weight, random_weights(small_recipe())["conv1.weight"])


def test_nothing_of_ours_opens_a_pickle_or_runs_code_of_a_repo():
    root = Path(__file__).parents[1]
    files = [*(root / "gbnzoo").rglob("*.py"), *(root / "hub").rglob("*.py"), root / "evaluate.py"]
    names = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            used = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.Attribute):
                used.append(ast.unparse(node))
            if isinstance(node, ast.keyword) and node.arg:
                used.append(node.arg)
            names |= dict.fromkeys(used, file.name)
    assert "load_file" in names  # the walk sees imports
    assert "pretrained" in names  # and keywords
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "torch.load", "trust_remote_code", "allow_pickle"}
    assert {name: names[name] for name in forbidden & names.keys()} == {}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"gbn": 1}', "null"])
def test_a_config_that_is_none(text, folder, tmp_path):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / WEIGHTS_FILE).write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"config.json is not what timm writes"):
        pretrained.open_source(f"local-dir:{tmp_path}")
