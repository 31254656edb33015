"""What a file of weights is by its content, what is wrong with one that cannot be read; folders of whole models."""

import json
import zipfile
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

from .errors import InputError

Model = TypeVar("Model")
Format = Literal["safetensors", "zip", "pickle", "mxnet"]

MXNET_START = (0x112).to_bytes(8, "little")
_LONGEST_HEADER = 100_000_000  # of safetensors, by its definition
_LFS_START = b"version https://git-lfs.github.com/spec/"
# The pickled number 0x1950a86a20f9469cfc6c that torch.save begins with where it writes no zip archive.
_OLD_TORCH_START = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_OTHER_STARTS = {
    b"\x1f\x8b": "an archive packed by gzip; unpack it and give the file inside",
    b"BZh": "an archive packed by bzip2; unpack it and give the file inside",
    b"\xfd7zXZ": "an archive packed by xz; unpack it and give the file inside",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give the file inside",
    b"Rar!": "a RAR archive; unpack it and give the file inside",
    b"\x89HDF": "an HDF5 file of another framework; give a PyTorch or safetensors file",
    b"\x93NUMPY": "a NumPy array; give a PyTorch or safetensors file",
    b"\x80": "a plain pickle, which may run code when it is opened; give a file of torch.save or safetensors",
}


class WeightFileError(InputError):
    """A file of weights cannot be read; the message names the file and says why and what to do."""


def format_of(path: str | PathLike[str]) -> Format:
    """Tell a file's format from its content; its name may say something else.

    Args:
        path: A file.

    Returns:
        "safetensors"; "zip" and "pickle" for what torch.save writes since and before PyTorch 1.6; "mxnet".

    Raises:
        WeightFileError: the file is empty, cut, a pointer of git-lfs, a web page or no weights at all.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(512)
        if not start:
            raise WeightFileError(f"{path} is empty; download or copy it again.")
        # First: the length that safetensors begins with may look like the beginning of any other format.
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
            _check_safetensors(path, file)
            return "safetensors"
        if start.startswith(_LFS_START):
            raise WeightFileError(
                f"{path} is a pointer of git-lfs, not the weights; run `git lfs pull` in its repository, or download "
                "the file itself."
            )
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            raise WeightFileError(
                f"{path} is a web page, not the weights; download the file itself, in a browser if need be."
            )
        if start.startswith(b"PK"):
            _check_zip(path)
            return "zip"
        if start.startswith(MXNET_START):
            return "mxnet"
        if _OLD_TORCH_START in start[:16]:
            return "pickle"
    kind = next((kind for begin, kind in _OTHER_STARTS.items() if start.startswith(begin)), None)
    raise WeightFileError(
        f"{path} is {kind}."
        if kind is not None
        else f"{path} is no file of weights: it starts with {start[:12]!r}; expected safetensors, torch.save's or "
        "MXNet's format."
    )


def _check_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):  # the list of contents stands at the end
        raise WeightFileError(f"{path} is cut short or damaged; download or copy it again.")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightFileError(
            f"{path} is a TorchScript program; save its weights alone: "
            "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')."
        )
    if not any(name.endswith("data.pkl") for name in names):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise WeightFileError(
            f"{path} is a zip archive of {shown or 'nothing'}, not weights that torch.save wrote; give a .pth or "
            ".safetensors file."
        )


def _check_safetensors(path: Path, file: BinaryIO) -> None:
    """Hold a file's size against its header: 8 bytes that give the header's length, the header, the tensors."""
    size = path.stat().st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise WeightFileError(f"{path} is cut short or damaged; download or copy it again.")
    try:
        header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightFileError(f"{path} is damaged: its header cannot be read; download or copy it again.") from error
    if size != 8 + length + end:
        raise WeightFileError(
            f"{path} is cut short or damaged: {8 + length + end:,} bytes were expected, {size:,} are there; download "
            "or copy it again."
        )


def load_trained(model_class: type[Model], source: str | PathLike[str], **options: Any) -> Model:
    """Load a whole model, as `from_pretrained` does, but none whose weights are not all there.

    `from_pretrained` draws what is missing at random, and says so in its log.

    Args:
        model_class: A `PreTrainedModel` of this package.
        source: A folder that training or `save_pretrained` wrote, or a repository on the Hub.
        **options: Of `from_pretrained`.

    Raises:
        WeightFileError: the folder lacks its weights, they are damaged, or are those of another network.
        OSError: there is no such folder or repository, or it cannot be reached.
    """
    check_model_folder(source)
    model, found = cast(Any, model_class).from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in found[kind])
        if keys:
            raise WeightFileError(
                f"the weights in {source} are not those of its config.json: {len(keys)} tensors are "
                f"{kind.partition('_')[0]}, first {keys[0]!r}; copy both files from one training."
            )
    return cast(Model, model)


def check_model_folder(source: str | PathLike[str]) -> None:
    """Check that a folder holds a configuration and weights that can be read; a repository on the Hub passes.

    Raises:
        WeightFileError: a file is missing or damaged; the message names it.
    """
    folder = Path(source)
    if folder.is_dir():
        files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        lacking = [
            name
            for name, is_there in (("config.json", (folder / "config.json").is_file()), ("model.safetensors", files))
            if not is_there
        ]
        if lacking:
            raise WeightFileError(
                f"{folder} has no {' and no '.join(lacking)}, so it is no folder of a trained model; give one that "
                "training wrote, such as runs/NAME/train/model, and copy all of its files."
            )
        for file in files:
            format_of(file)
