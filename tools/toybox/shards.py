"""A folder as files that are small enough to be carried anywhere, and back."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

MOST = 15 * 10**6  # bytes in a shard
LIST = "shards.json"


def split(folder: Path, into: Path, most: int = MOST) -> list[Path]:
    """Write ``folder`` as a tar in shards of at most ``most`` bytes; return their paths."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            tar.add(file, file.relative_to(folder).as_posix())
    into.mkdir(parents=True, exist_ok=True)
    for old in into.iterdir():
        old.unlink()
    content, digests = packed.getvalue(), {}
    for number, start in enumerate(range(0, len(content), most)):
        shard = content[start : start + most]
        name = f"base.tar.{number:03d}"
        (into / name).write_bytes(shard)
        digests[name] = hashlib.sha256(shard).hexdigest()
    (into / LIST).write_text(json.dumps(digests, indent=2))
    return [into / name for name in digests]


def join(shards: Path, folder: Path) -> None:
    """Write what :func:`split` split to ``folder``.

    Raises ``ValueError`` for a shard that is missing or has changed.
    """
    content = b""
    for name, digest in json.loads((shards / LIST).read_text()).items():
        file = shards / Path(name).name
        shard = file.read_bytes() if file.exists() else b""
        if hashlib.sha256(shard).hexdigest() != digest:
            raise ValueError(f"{file} is missing or has changed; copy it again.")
        content += shard
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(folder, filter="data")
