"""To the Hugging Face hub: a checkpoint's own files and a card, in one commit; never a pickle, never trainer state."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from m3d.export.bundle import licence
from m3d.export.card import model_card
from m3d.export.folders import mark, whole_folder, without_paths
from m3d.inference.checkpoints import resolve
from m3d.recipes.checkpoints import others_weights, read_manifest

CARD, LICENCE_FILE = "README.md", "LICENSE"
SHARED = re.compile(
    r"(config|generation_config|preprocess|presence|manifest|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|recipe\.yaml|merges\.txt|vocab\.txt|tokenizer\.model|chat_template\.jinja|README\.md|LICENSE"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|npy|npz|joblib)", re.IGNORECASE)
TRAINING = re.compile(
    r"checkpoint-.*|trainer_state\.json|learned.*\.safetensors|optim.*|rng.*|scheduler.*|losses\.jsonl|begun\.json"
)


@dataclass(frozen=True)
class Upload:
    """What a repository would hold: a file's path or its bytes, by name; ``left_out`` stays at home."""

    source: Path
    files: dict[str, Path | bytes]
    left_out: tuple[str, ...]

    @property
    def card(self) -> str:
        """README.md."""
        found = self.files[CARD]
        return found.decode() if isinstance(found, bytes) else found.read_text(encoding="utf-8")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in sorted(self.files.items())
        }


def gather(name_or_path: str | Path, *, repo: str | None = None, metrics: Path | None = None) -> Upload:
    """The files of a checkpoint that may be shared, with a card filled in where it has none of its own.

    Raises:
        FileNotFoundError: It is no whole checkpoint.
        ValueError: There are pickles or trainer state in its folder, or ``metrics`` are another model's.
    """
    source = resolve(name_or_path)
    names = sorted(path.name for path in source.iterdir() if not path.name.startswith("."))
    for what, pattern in (("a pickle, which may run code when it is read", PICKLES), ("of a training", TRAINING)):
        if found := [name for name in names if pattern.fullmatch(name) and not SHARED.fullmatch(name)]:
            raise ValueError(
                f"{source}: {found[0]} is {what}; it is not pushed: move it away, or push the merged model"
            )
    files: dict[str, Path | bytes] = {
        name: source / name for name in names if SHARED.fullmatch(name) and (source / name).is_file()
    }
    files["config.json"] = without_paths(source / "config.json")
    if CARD not in files or metrics is not None:
        files[CARD] = model_card(source, repo=repo, metrics=metrics).encode()
    if not others_weights(read_manifest(source), source.name):
        files.setdefault(LICENCE_FILE, licence().encode())
    return Upload(source, files, tuple(name for name in names if name not in files))


def write_folder(upload: Upload, folder: Path, *, force: bool = False) -> Path:
    """What would be pushed, as a folder that `m3d.load` reads."""
    with whole_folder(folder, force=force) as partial:
        for name, one in upload.files.items():
            (partial / name).write_bytes(one if isinstance(one, bytes) else one.read_bytes())
        mark(partial, upload.source, "hub")
    return folder


def push_to_hub(
    model: str | Path | Upload,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Push a checkpoint, or what `gather` made of it, to ``user/name`` in one commit; the commit's address.

    Files of an older push that this one does not have are deleted in the same commit: weights of two pushes would mix.
    The token is that of ``hf auth login`` or ``$HF_TOKEN``. ``revision`` is a branch, made where it is not there.

    Raises:
        ValueError: The name is none, there is nothing that may be shared, or the hub refuses.
    """
    check_repo(repo)
    upload = model if isinstance(model, Upload) else gather(model, repo=repo)
    hub = api or HfApi()
    added = [CommitOperationAdd(name, one) for name, one in sorted(upload.files.items())]

    def push() -> str:
        hub.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(repo, branch=revision, exist_ok=True)
        there = hub.list_repo_files(repo, revision=revision)
        stale = [name for name in there if SHARED.fullmatch(name) and name not in upload.files]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *added,
            *(CommitOperationDelete(name) for name in sorted(stale)),
        ]
        message = f"{upload.source.name}, by m3d export"
        return str(hub.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)

    return _asked(push, repo)


def check_repo(repo: str) -> None:
    """Refuse what is no ``user/name``.

    Raises:
        ValueError: It is none.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo {repo!r} is no user/name: {error}") from None
    if repo.count("/") != 1:
        raise ValueError(f"--repo {repo!r} is no user/name, such as jane/m3d-abdomen")


def _asked(push: Callable[[], str], repo: str) -> str:
    try:
        return push()
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = "; log in with `hf auth login`, with a token that may write" if status in (401, 403) else ""
        raise ValueError(f"{repo}: the hub refused ({status}){remedy}") from error
