"""Reads the original files of a benchmark, in a local folder or on the hub."""

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.delimited import read_delimited
from cachepress.limits import said
from cachepress.structured import parse_json


@dataclass(frozen=True)
class Hub:
    """File of a data set on the hub.

    Attributes:
        repository: ``owner/name``.
        file: its path there.
        member: the path inside, if the file is a zip archive; in whatever folder it is there.
    """

    repository: str
    file: str
    member: str | None = None


def read_rows(folder: str | None, names: Sequence[str], *hubs: Hub) -> list[dict]:
    """Read the rows of a file of a benchmark, in its own columns.

    Args:
        folder: folder with the original files; None for the hub.
        names: paths below the folder that the file may have, the first that exists is read.
        hubs: where the hub may have it, as data sets were moved; the first that it gives is read.

    Raises:
        CachepressError: if there is no such file, or it is damaged.
    """
    if folder is not None:
        path, member = _local(Path(folder), names), None
    else:
        path, member = _fetched(names, hubs)
    try:
        rows = _rows(path, member)
    except OSError as error:
        raise CachepressError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CachepressError(f"{path} is damaged: {said(error)}") from error
    if not rows:
        raise CachepressError(f"{path} has no rows")
    return rows


@contextmanager
def in_format(name: str, whose: str) -> Iterator[None]:
    """Turn errors inside the block into one that says in whose format the file is not.

    Raises:
        CachepressError: if anything goes wrong; one that is raised in the block is left as it is.
    """
    try:
        yield
    except CachepressError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        raise CachepressError(f"{name} is not in {whose} format: {error!r}") from error


def _local(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CachepressError(f"{folder} has no file {' or '.join(names)}")


def _fetched(names: Sequence[str], hubs: Sequence[Hub]) -> tuple[Path, str | None]:
    """Find or download a file; of an archive, return the member's path too."""
    if not hubs:
        raise CachepressError(
            f"no hub has {' or '.join(names)}: name the folder that has it with --data-path"
        )
    from huggingface_hub import hf_hub_download

    refused = []
    for hub in hubs:
        try:
            path = Path(hf_hub_download(hub.repository, hub.file, repo_type="dataset"))
            return path, None if hub.member is None else _member(path, hub.member)
        except Exception as error:
            refused.append(error)
    files = " or ".join(dict.fromkeys(hub.file for hub in hubs))
    raise CachepressError(
        f"the hub does not give {files} of {hubs[0].repository} ({type(refused[0]).__name__}): "
        f"get {' or '.join(names)} yourself and name its folder with --data-path"
    ) from refused[0]


def _member(path: Path, name: str) -> str:
    """Find a member of an archive, which may lie in another folder than expected."""
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    if name in members:
        return name
    for member in members:
        if Path(member).name == Path(name).name:
            return member
    raise FileNotFoundError(name)


def _rows(path: Path, member: str | None) -> list[dict]:
    name = member or path.name
    if name.endswith(".parquet"):
        return pd.read_parquet(path).to_dict("records")
    if member is not None:
        with zipfile.ZipFile(path) as archive:
            text = archive.read(member).decode("utf-8")
    else:
        text = path.read_bytes().decode("utf-8-sig")
    if name.endswith((".csv", ".tsv")):
        return read_delimited(text, "\t" if name.endswith(".tsv") else ",").records()
    if name.endswith(".json"):
        value = parse_json(text)
        values = list(value.values()) if isinstance(value, dict) else value
    else:
        values = [parse_json(line) for line in text.split("\n") if line.strip()]
    several = values if isinstance(values, list) else [values]
    rows = [row for row in several if isinstance(row, dict)]
    if len(rows) < len(several):
        raise ValueError("a row is not a mapping of columns")
    return rows
