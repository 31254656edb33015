"""Image ids as file names: legal on Linux, macOS and Windows, never two ids in one file, readable where possible."""

import hashlib
from pathlib import Path
from urllib.parse import quote, unquote

from PIL import Image

MAX_NAME_BYTES = 255
"""Longest file name on common file systems, in bytes of UTF-8."""

SHORTENED = "%~"
"""Marks a truncated name, which ends in a hash. In all other names, two hexadecimal digits follow a percent sign."""

ID_KEY = "image_id"
"""Key of the image id in files with a shortened name: text of a PNG, array of an `.npz`."""

_FORBIDDEN = frozenset('<>:"\\|?*%')  # by Windows; "%" begins our own escapes
_RESERVED = frozenset(
    ("con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in (*range(10), *"¹²³")))
)


def ascii_name(image_id: str, suffix: str) -> str:
    """Return the name of an image's file in a flat folder, percent-encoded ASCII; `image_id_of` reverses it.

    Args:
        image_id: Any text; "/" is encoded as well.
        suffix: Of the file, with its dot.
    """
    return _shortened(_protected(quote(image_id, safe=" ", errors="surrogatepass")), image_id, suffix)


def label_path(folder: Path, image_id: str) -> Path:
    """Return the file of an image's label map: `<image_id>.png`, in subfolders where the id has a "/".

    Characters that a file system refuses are percent-encoded, and long parts are truncated and end in a hash. An
    existing file with the plain name, written by another program, is used as it is.
    """
    name, plain = label_name(image_id), f"{image_id}.png"
    if name != plain and ".." not in plain.split("/") and not plain.startswith("/"):
        try:
            if not (folder / name).is_file() and (folder / plain).is_file():
                return folder / plain
        except (OSError, ValueError):  # too long, or a character that no path can hold
            pass
    return folder / name


def label_name(image_id: str) -> str:
    """Return the path of an image's label map inside its folder."""
    *parents, last = image_id.split("/")
    return "/".join([*(_part(part, "") for part in parents), _part(last, ".png")])


def label_files(folder: Path) -> dict[str, Path]:
    """Return the label maps of a folder and its subfolders by their image ids, sorted by path."""
    found = {}
    for path in sorted(folder.rglob("*.png")):
        if path.name.startswith("."):  # still being written, or left by a kill
            continue
        plain = path.relative_to(folder).with_suffix("").as_posix()
        image_id = image_id_of(plain)
        if image_id is None:
            with Image.open(path) as image:
                image_id = str(image.info.get(ID_KEY, plain))
        elif label_name(image_id) != f"{plain}.png":  # another program's name: its percent signs are no escapes
            image_id = plain
        found[image_id] = path
    return found


def image_id_of(name: str) -> str | None:
    """Return the image id of a file's name without its suffix, parts joined by "/"; None if the name is shortened."""
    if SHORTENED in name:
        return None
    return "/".join("" if part == "%" else unquote(part, errors="surrogatepass") for part in name.split("/"))


def _part(part: str, suffix: str) -> str:
    """Return one part of a path; a folder has the suffix ""."""
    name = "".join(_escape(sign) if sign in _FORBIDDEN or ord(sign) < 32 else sign for sign in part)
    # Windows drops a last dot or blank, and no folder may have the name of a label map.
    if not suffix and name.lower().endswith((".", " ", ".png")):
        name = name[:-1] + _escape(name[-1])
    return _shortened(_protected(name) or "%", part, suffix)


def _protected(name: str) -> str:
    """Escape the first character of hidden files, which are unfinished ones, and of Windows device names."""
    if name.startswith(".") or name.partition(".")[0].rstrip(" ").lower() in _RESERVED:
        return _escape(name[0]) + name[1:]
    return name


def _escape(sign: str) -> str:
    return f"%{ord(sign):02X}"


def _shortened(name: str, original: str, suffix: str) -> str:
    room = MAX_NAME_BYTES - len(suffix)
    content = name.encode(errors="surrogatepass")
    if len(content) > room:
        end = SHORTENED + hashlib.sha256(original.encode(errors="surrogatepass")).hexdigest()[:32]
        name = content[: room - len(end)].decode(errors="ignore") + end
    return name + suffix
