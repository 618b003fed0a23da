"""Open the downloaded packages that the assets are built from, refusing any but the pinned bytes."""

import hashlib
import io
import lzma
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from workloads.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package file: its name in the download folder, how to get it, and the SHA-256 of its bytes."""

    file: str
    fetch: str
    sha256: str


PACKAGES = {
    "fashion_mnist": Package(
        file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        fetch="apt-get download dataset-fashion-mnist",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ),
    "words": Package(
        file="wamerican-small_2020.12.07-2_all.deb",
        fetch="apt-get download wamerican-small",
        sha256="bfebd3ce5f04a62f5fbeb6707ea1160e37d645754145138343009209f0deadb6",
    ),
    "emoji": Package(
        file="emoji-datasource-twitter-16.0.0.tgz",
        fetch="npm pack emoji-datasource-twitter@16.0.0",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "brain": Package(
        file="nilearn-0.14.1-py3-none-any.whl",
        fetch="pip download --no-deps nilearn==0.14.1",
        sha256="725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
    ),
    "tables": Package(
        file="vega_datasets-0.9.0-py3-none-any.whl",
        fetch="pip download --no-deps vega_datasets==0.9.0",
        sha256="3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d",
    ),
    "fonts": Package(
        file="matplotlib-3.11.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        fetch="pip download --no-deps --python-version 3.11 --platform manylinux2014_x86_64 "
        "--only-binary=:all: matplotlib==3.11.2",
        sha256="07d9b9fa60cd4c393692f50d0bb03123242ddf61c99bb0e95e75feb354e7c1a8",
    ),
}


def verify(downloads: Path) -> dict[str, Path]:
    """The path of every package in `downloads`, by short name.

    Raises UserError when one is missing or its SHA-256 differs from the pinned one.
    """
    paths = {}
    for name, package in PACKAGES.items():
        path = downloads / package.file
        if not path.is_file():
            raise UserError(f"--downloads: {downloads} lacks {package.file}; get it with `{package.fetch}`")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise UserError(f"--downloads: {package.file} has sha256 {digest}, expected {package.sha256}")
        paths[name] = path
    return paths


def from_deb(path: Path, member: str) -> bytes:
    """One file of a Debian package: the `ar` archive's data.tar.xz holds it under `./<member>`."""
    raw = path.read_bytes()
    assert raw.startswith(b"!<arch>\n")
    offset = 8
    while offset < len(raw):
        name = raw[offset : offset + 16].decode().strip().rstrip("/")
        size = int(raw[offset + 48 : offset + 58])
        body = raw[offset + 60 : offset + 60 + size]
        if name == "data.tar.xz":
            return _from_tar(tarfile.open(fileobj=io.BytesIO(lzma.decompress(body))), f"./{member}")
        offset += 60 + size + size % 2  # members start at even offsets
    raise AssertionError(f"{path.name} has no data.tar.xz")


def _from_tar(archive: tarfile.TarFile, member: str) -> bytes:
    handle = archive.extractfile(member)
    assert handle is not None, member
    return handle.read()


def from_tgz(path: Path, members: list[str]) -> dict[str, bytes]:
    """The named files of a .tgz, in one pass over it."""
    wanted, found = set(members), {}
    with tarfile.open(path, "r:gz") as archive:
        for info in archive:
            if info.name in wanted:
                handle = archive.extractfile(info)
                assert handle is not None, info.name
                found[info.name] = handle.read()
    assert wanted == found.keys(), sorted(wanted - found.keys())
    return found


def from_wheel(path: Path, member: str) -> bytes:
    """One file of a wheel."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)
