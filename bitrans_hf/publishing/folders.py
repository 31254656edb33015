"""Self-contained folders and their upload to the Hub: written, checked in a clean process, uploaded in one commit.

A model's folder holds weights, configuration, code, image processor, pipeline and card. Before an upload, it is opened
in a process that cannot import this package, and must compute bit-identical outputs there.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile
from transformers import ImageSegmentationPipeline, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..data import write_parquet
from ..files import lies_in
from ..hub.errors import InputError
from ..hub.image_processing_bitrans import BiTransImageProcessor
from ..hub.modeling_bitrans import BiTransModel
from ..hub.modeling_deeplab import DeepLabForSemanticSegmentation
from ..hub.pipeline_bitrans import TASK, PseudoMaskPipeline
from ..hub_errors import hub_error_sentence
from ..metrics import METRIC_FOLDER
from . import clean_process

Kind = Literal["model", "dataset", "space"]


class PublishError(InputError):
    """A result that fails the checks, or a failed upload; the message says why and what to do."""


# ---- Folders.


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that replaces it at the end, so that readers see all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model_folder(
    folder: str | Path,
    model: PreTrainedModel,
    processor: BiTransImageProcessor,
    card: str,
    picture: Path | None = None,
) -> None:
    """Write a self-contained model: weights (safetensors), configuration, code, processor, pipeline, card.

    The folder appears once it is complete and has passed `check_in_clean_process`.

    Args:
        folder: Replaced if it is there.
        model: A `BiTransModel`, `AffinityNetModel` or `DeepLabForSemanticSegmentation`.
        processor: Its image processor.
        card: Text of README.md.
        picture: An image that the card shows by its file name; copied.

    Raises:
        PublishError: the model was loaded from this folder; or the folder, opened in a clean process, computes other
            outputs than the model.
    """
    source = model.name_or_path
    if source and lies_in(Path(source), Path(folder)):
        raise PublishError(f"{folder} holds the model itself, loaded from {source}; name another folder.")
    with replaced_folder(Path(folder)) as temporary:
        if isinstance(model, BiTransModel):
            # The pipeline saves its own code and says in the configuration that it is there.
            PseudoMaskPipeline(
                model=model, image_processor=processor, task=TASK, device=torch.device("cpu")
            ).save_pretrained(temporary)
        else:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if picture is not None:
            shutil.copyfile(picture, temporary / picture.name)
        check_in_clean_process(temporary, model, processor)


def write_pseudo_label_folder(folder: str | Path, splits: Mapping[str, Dataset], card: str) -> None:
    """Write pseudo labels as a data set that `datasets.load_dataset` opens, from disk and from the Hub.

    Args:
        folder: Replaced if it is there.
        splits: Name of the split -> data set of `pseudo_labels.pseudo_label_dataset`.
        card: Text of README.md.
    """
    with replaced_folder(Path(folder)) as temporary:
        for split, dataset in splits.items():
            write_parquet(dataset, temporary, split=split)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def write_metric_folder(folder: str | Path) -> None:
    """Copy the metric as a Space holds it, from `bitrans_hf/metrics/mean_iou`; `evaluate.load` opens the folder."""
    with replaced_folder(Path(folder)) as temporary:
        shutil.copytree(METRIC_FOLDER, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def files_of(folder: str | Path) -> dict[str, int]:
    """Return the files of a folder that would be uploaded, with their sizes in bytes, sorted by name."""
    folder = Path(folder)
    found = {path.relative_to(folder): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        path.as_posix(): size
        for path, size in found.items()
        if path.suffix != ".pyc" and not any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    }


# ---- The clean process.


def check_in_clean_process(folder: str | Path, model: PreTrainedModel, processor: BiTransImageProcessor) -> None:
    """Open a folder where this package cannot be imported, and compare every output with the model's, bit for bit.

    Args:
        folder: A saved model with its code.
        model: What was saved.
        processor: Its image processor.

    Raises:
        PublishError: the folder does not open, or an output differs; the message says which.
    """
    model = model.cpu().eval()
    auto_class, task = "AutoModel", ""
    labels: list[str] | None = None
    pipe: Any = None
    given: dict[str, Any] = {"model": model, "image_processor": processor, "device": torch.device("cpu")}
    if isinstance(model, BiTransModel):
        names = cast("Mapping[int, str]", model.config.id2label)
        task, labels = TASK, sorted({names[0], names[len(names) - 1]})
        pipe = PseudoMaskPipeline(task=task, **given)
    elif isinstance(model, DeepLabForSemanticSegmentation):
        auto_class, task = "AutoModelForSemanticSegmentation", "image-segmentation"
        with quiet_transformers():  # which calls every class that is not its own unsupported, and then runs it
            pipe = ImageSegmentationPipeline(task=task, **given)
    expected = clean_process.outputs_of(model, processor, pipe, labels)

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.npz"
        arguments = [str(Path(folder).resolve()), str(out), str(torch.get_num_threads()), auto_class, task]
        done = subprocess.run(
            # -P: the files beside the program are not to be imported by their bare names.
            [sys.executable, "-P", clean_process.__file__, *arguments, json.dumps(labels)],
            cwd=scratch,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise PublishError(
                f"{folder} does not open where bitrans_hf is not installed: {last_line(done.stderr)} "
                "Nothing was published; look at the imports of the files that travel with the model."
            )
        with np.load(out) as stored:
            actual = dict(stored)
    different = sorted(
        name
        for name in {*expected, *actual}
        if name not in actual
        or name not in expected
        or not np.array_equal(actual[name], expected[name], equal_nan=True)
    )
    if different:
        raise PublishError(
            f"{folder}, opened in a clean process, computes something else than the model that was saved: "
            f"{', '.join(different[:5])}. Nothing was published; compare its code with the installed package."
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log, including errors."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def last_line(text: str) -> str:
    """Return the last line of a traceback, which says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message."


# ---- The Hub.


@dataclass(frozen=True)
class Upload:
    """The result of an upload.

    Attributes:
        url: Page of the repository.
        commit: The commit that the version tags.
        version: The tag.
    """

    url: str
    commit: str
    version: str


def upload(
    folder: str | Path,
    repo_id: str,
    kind: Kind,
    *,
    version: str,
    private: bool = True,
    create: bool = True,
    branch: str = "main",
    message: str | None = None,
) -> Upload:
    """Upload a folder to the Hub in one commit and tag it; repeating the call changes nothing.

    The token comes from HF_TOKEN or from `hf auth login`, and is never shown. The same commit removes files that the
    folder lacks, so that the version equals the folder.

    Args:
        folder: What to upload.
        repo_id: owner/name.
        kind: Of repository.
        version: Tag of the commit.
        private: Whether a new repository is private.
        create: Create the repository if it does not exist.
        branch: Where to commit.
        message: Of the commit.

    Raises:
        PublishError: the upload failed. Everything goes up in one commit, so the branch is unchanged and the call can
            be repeated; files that arrived are not sent twice.
    """
    api = HfApi()
    try:
        if create:
            sdk: dict[str, Any] = {"space_sdk": "gradio"} if kind == "space" else {}
            api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, **sdk)
        head = api.repo_info(repo_id, repo_type=kind, revision=branch).sha
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=kind).tags}
        if version not in tags:
            # Not `upload_folder`: where Xet is installed, it may split a folder into several commits.
            done = api.create_commit(
                repo_id, operations=operations_for(api, folder, repo_id, kind, branch), repo_type=kind,
                revision=branch, parent_commit=head, commit_message=message or f"Version {version}",
            )  # fmt: skip
            tags[version] = done.oid
            api.create_tag(repo_id, repo_type=kind, tag=version, revision=done.oid)
        elif not is_published(api, folder, repo_id, kind, version):
            raise PublishError(
                f"{repo_id} has a version {version} already, with other content (commit {tags[version][:12]}); "
                "nothing was uploaded. A version does not change: choose another one and run again."
            )
    except PublishError:
        raise
    except Exception as error:
        sentence = hub_error_sentence(error, repo_id, branch)
        if sentence is None:
            raise
        raise PublishError(
            f"{sentence}. Nothing half-done is visible in {repo_id}; rerun the same command afterwards."
        ) from error
    prefix = "" if kind == "model" else f"{kind}s/"
    return Upload(f"{api.endpoint}/{prefix}{repo_id}", tags[version], version)


def operations_for(
    api: HfApi, folder: str | Path, repo_id: str, kind: Kind, revision: str
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return the operations that make a branch equal to a folder."""
    here = files_of(folder)
    return [
        *(CommitOperationAdd(name, Path(folder) / name) for name in here),
        *(CommitOperationDelete(name) for name in files_there(api, repo_id, kind, revision) if name not in here),
    ]


def is_published(api: HfApi, folder: str | Path, repo_id: str, kind: Kind, revision: str) -> bool:
    """Return whether a revision of a repository equals a folder, byte for byte."""
    there = files_there(api, repo_id, kind, revision)
    here = {name: (Path(folder) / name).read_bytes() for name in files_of(folder)}
    return set(there) == set(here) and all(
        there[name] in (hashlib.sha256(content).hexdigest(), git_blob_id(content)) for name, content in here.items()
    )


def files_there(api: HfApi, repo_id: str, kind: Kind, revision: str) -> dict[str, str]:
    """Return a repository's files with their SHA-256, or their git blob id if git stores them."""
    return {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.list_repo_tree(repo_id, repo_type=kind, revision=revision, recursive=True)
        if isinstance(entry, RepoFile) and entry.path != ".gitattributes"
    }


def git_blob_id(content: bytes) -> str:
    """Return the git blob id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
