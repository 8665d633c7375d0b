"""`hf-prune push FOLDER ID`: publish an output folder, whole, in one commit, once.

Every step is retried after an answer that may pass (429, 5xx, a connection that broke), with growing pauses. A commit
whose answer was lost may have happened: before it is tried again the repository is compared with the folder, file by
file, so that nothing is published twice. Weights of an earlier push that are not in the folder any more go in the same
commit: config.json and weights in a repository always belong together.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import source as sources

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers of the Hub that another attempt may change
ATTEMPTS = 6
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.h5")
PAUSE = float(os.environ.get("HF_PRUNE_RETRY_PAUSE", "1"))  # seconds before the second attempt; doubles each time
LONGEST = 60.0  # seconds


def id_problem(repo: str) -> list[str]:
    """What is wrong with the id of a repository to write, as a list of at most one sentence. Asks nobody."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", repo, re.ASCII) and len(repo) <= 96:
        owner, _, name = repo.partition("/")
        if not re.search(r"--|\.\.|[-.]$", name) and not re.search(r"--|\.\.|[-.]$", owner) and name[-4:] != ".git":
            return []
    return [f"--push-to-hub {_shown(repo)}: a repository is called OWNER/NAME, of letters, digits, '-', '_' and '.'."]


def check(repo: str, token: str | None = None) -> None:
    """Raise ValueError where a push is bound to fail: no such form of id, no login, a token the Hub does not accept."""
    if wrong := id_problem(repo):
        raise ValueError(wrong[0])
    from huggingface_hub import HfApi, constants, get_token

    if not (token or get_token()):
        raise ValueError(f"--push-to-hub {repo}: nobody is logged in to the Hub; run `hf auth login` first.")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push-to-hub {repo}: HF_HUB_OFFLINE is set; unset it to publish.")
    api = HfApi(token=token)
    _patiently(lambda: api.whoami(), f"asking {api.endpoint} who is logged in", repo, token, lambda text: None)


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
    bars: bool = False,
) -> str:
    """Publish a folder that hf-prune wrote as the model repository `repo`; returns its address, or the pull request's.

    private: of a repository that is created; one that exists and is public is refused. revision: a branch, created
    where it does not exist. tell: receives one line per step and per retry. bars: show the client's progress bars.
    Raises ValueError, in one sentence and without any token, for what cannot be published, and when the Hub refuses
    or cannot be reached; nothing is visible then, or everything.
    """
    from . import checkpoint

    check(repo, token)
    if create_pr and revision is not None:
        raise ValueError("--create-pr and --push-revision contradict each other: a pull request has its own branch.")
    if revision is not None and (".." in revision or not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII)):
        raise ValueError(
            f"--push-revision {_shown(revision)}: a branch name has letters, digits, '-', '_', '.' and '/'."
        )
    folder = Path(folder).expanduser()
    report = checkpoint.read(folder)
    files = listing(folder)
    size = checkpoint.size(sum(path.stat().st_size for path in files.values()))
    title = message or f"{report['pattern']} by hf-prune"
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    if not bars:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()

    def again(work: Callable[[], T], what: str) -> T:
        return _patiently(work, what, repo, token, tell)

    made = again(lambda: api.create_repo(repo, private=private or None, exist_ok=True), f"creating {repo}")
    repo = made.repo_id
    if private and not again(lambda: api.model_info(repo), f"asking about {repo}").private:
        raise ValueError(f"--private: {repo} exists and is public; nothing was uploaded. Make it private or choose "
                         f"another name.")  # fmt: skip
    if revision is not None:
        again(lambda: api.create_branch(repo, branch=revision, exist_ok=True), f"creating the branch {revision}")
    at = revision or "main"
    tell(f"uploading {len(files)} files, {size}, to {repo}" + (f" ({revision})" if revision else ""))

    tries = 0

    def upload() -> str:
        """One commit, from a state of the repository that was looked at; "" when it holds exactly this already."""
        nonlocal tries
        tries += 1
        head = str(api.model_info(repo, revision=at).sha)
        if create_pr and (found := _same_pull_request(api, repo, title, files)):
            return found
        there = _tree(api, repo, head)
        if _same(there, files):
            return ""
        stale = [name for name in there if name not in files and _is_weight(name)]
        # upload_folder would split a large folder into several commits; this is one, or none
        info = api.create_commit(
            repo_id=repo,
            operations=[
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=title,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
        return str(info.pr_url if create_pr else info.commit_url)

    made_by = again(upload, f"uploading to {repo}")
    if not create_pr and not again(lambda: _same(_tree(api, repo, at), files), f"checking {repo}"):
        raise ValueError(f"{repo} does not hold what was uploaded: somebody else changed it meanwhile; look at its "
                         f"history, then push again.")  # fmt: skip
    if not made_by:
        lost = "the commit had arrived, only the answer was lost"
        tell(lost if tries > 1 else "the repository holds exactly this already; nothing was changed")
    return made_by if create_pr and made_by else f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def listing(folder: Path) -> dict[str, Path]:
    """The files of an output folder, name -> path. Raises ValueError for what hf-prune does not publish.

    Only plain files that lie in the folder itself are published: a link could carry a key or a home away.
    """
    found = {}
    results = folder / ".eval_results"  # what hf-prune eval --eval-results wrote; the Hub looks for it there
    there = sorted(results.iterdir()) if results.is_dir() and not results.is_symlink() else []
    for path in sorted(folder.iterdir()) + there:
        if path.name.startswith("."):
            continue
        if path.is_symlink() or not path.is_file():
            kind = "link" if path.is_symlink() else "folder"
            raise ValueError(f"{folder}/{path.name} is a {kind}; hf-prune publishes plain files only: move it away.")
        if not re.fullmatch(r"\w[\w.-]*\.(safetensors|json|yaml|md|py|txt|html|png)", path.name, re.ASCII):
            raise ValueError(f"{folder}/{_shown(path.name)} is no file that hf-prune writes; move it away.")
        found[path.relative_to(folder).as_posix()] = path
    if not any(sources.COMPRESSED.fullmatch(name) for name in found):
        sources.weight_files(str(folder), folder)
    return found


# ------------------------------------------------------------------------------------------------- is it there already
def _tree(api: HfApi, repo: str, revision: str) -> dict[str, Any]:
    """The files of a repository, name -> what the Hub knows of it."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        tree = api.list_repo_tree(repo, revision=revision, recursive=True)
        return {each.path: each for each in tree if hasattr(each, "blob_id")}
    except EntryNotFoundError:  # an empty repository has no tree
        return {}


def _is_weight(name: str) -> bool:
    return any(fnmatchcase(name, each) for each in WEIGHTS)


def _same(there: dict[str, Any], files: dict[str, Path]) -> bool:
    """Whether a repository's tree holds exactly these files, and no other weights."""
    if any(name not in files and _is_weight(name) for name in there):
        return False
    return all(name in there and _equal(path, there[name]) for name, path in files.items())


def _equal(path: Path, entry: Any) -> bool:
    if path.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        with path.open("rb") as handle:
            return _hash(hashlib.sha256(), handle) == entry.lfs.sha256
    git = hashlib.sha1(b"blob %d\0" % entry.size, usedforsecurity=False)
    with path.open("rb") as handle:
        return _hash(git, handle) == entry.blob_id


def _hash(hashed: Any, handle: Any) -> str:
    while block := handle.read(1 << 20):
        hashed.update(block)
    return str(hashed.hexdigest())


def _same_pull_request(api: HfApi, repo: str, title: str, files: dict[str, Path]) -> str | None:
    """The address of an open pull request of this title that holds exactly these files."""
    for each in api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open"):
        if each.title == title and _same(_tree(api, repo, f"refs/pr/{each.num}"), files):
            return str(each.url)
    return None


# ------------------------------------------------------------------------------------------------------------ patience
def _patiently(work: Callable[[], T], what: str, repo: str, token: str | None, tell: Callable[[str], None]) -> T:
    """Do `work` until it succeeds, the Hub says no for good, or the attempts are used up; then ValueError."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    pause = PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:
            status = _status(error)
            if (status is not None and status not in PASSING) or not _of_the_network(error):
                raise ValueError(_refusal(error, status, what, repo, token)) from None
            said = redact(f"HTTP {status}" if status else _line(error), token)
            if attempt == ATTEMPTS:
                raise ValueError(
                    f"{what} failed {ATTEMPTS} times, last with: {said}. Nothing half-finished is visible there; the "
                    f"same command continues."
                ) from None
            wait = max(pause, _asked(error)) if PAUSE else 0.0
            tell(f"{what}: {said}; attempt {attempt + 1} of {ATTEMPTS} in {wait:.0f} s")
            time.sleep(wait)
            pause = min(2 * pause, LONGEST)
    raise AssertionError("unreachable")


def _of_the_network(error: BaseException) -> bool:
    """Whether this came from the Hub or the way there, and not from the folder or a bug."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (HfHubHTTPError, HTTPError, ConnectionError, TimeoutError)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error or in what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if response is not None:
            return int(response.status_code)
        seen = seen.__cause__ or seen.__context__
    return None


def _asked(error: BaseException) -> float:
    """The seconds that the Hub asks for in Retry-After, at most LONGEST."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    found = re.fullmatch(r"\d{1,6}", headers.get("Retry-After", "") or "")
    return min(float(found[0]), LONGEST) if found else 0.0


def _refusal(error: BaseException, status: int | None, what: str, repo: str, token: str | None) -> str:
    said = redact(_line(error), token)
    if status == 401:
        return f"{what}: the Hub does not accept the token; log in again with `hf auth login`."
    if status == 403:
        return f"{what}: the token has no right to write to {repo} ({said}); use one that has, or another owner."
    if status == 404:
        return f"{what}: the Hub finds no such repository or branch, or it is not yours to see ({said})."
    if status == 409:
        return f"{what}: the Hub sees a conflict ({said}); somebody else may be writing to {repo}. Try again."
    if status == 412:
        return f"{what}: {repo} was changed by somebody else meanwhile; look at its history, then push again."
    if status == 413:
        return f"{what}: the Hub finds a file or the commit too large ({said})."
    if status is not None:
        return f"{what}: the Hub refused with HTTP {status} ({said})."
    return f"{what}: {said}."


def redact(text: str, token: str | None = None) -> str:
    """`text` without the token in use and without anything that looks like one."""
    from huggingface_hub import get_token

    for secret in (token, get_token()):
        if secret:
            text = text.replace(secret, "(token)")
    return re.sub(r"\bhf_[A-Za-z0-9_]{6,}|(?<=Bearer )\S+", "(token)", text)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = re.sub(r" for url '.*", "", lines[0]) if lines else type(error).__name__
    return said.rstrip(".")[:300]


def _shown(text: str) -> str:
    return ascii(text)[1:-1][:100]


# ------------------------------------------------------------------------------------------------------------- command
def run(words: Sequence[str]) -> int:
    """`hf-prune push FOLDER ID`."""
    parser = argparse.ArgumentParser(
        prog="hf-prune push",
        description="Publish a folder that hf-prune wrote as a model repository of the Hub, in one commit.",
        epilog="Log in first: hf auth login. A push that was interrupted is continued by the same command.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="what hf-prune wrote")
    parser.add_argument("id", metavar="ID", help="OWNER/NAME; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create it so that only its owner sees it")
    parser.add_argument("--push-revision", "--revision", metavar="REV", dest="revision", help="branch, default main")
    parser.add_argument("--create-pr", action="store_true", help="as a pull request")
    parser.add_argument("--commit-message", metavar="TEXT", help="default: the pattern")
    parser.add_argument("--token", metavar="TOKEN", help="better: hf auth login")
    parser.add_argument("--quiet", action="store_true", help="errors and the address only")
    parser.add_argument("--verbose", action="store_true", help="tracebacks")
    args = parser.parse_args(words)

    def tell(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    print(
        push(
            args.folder,
            args.id,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            message=args.commit_message,
            token=args.token,
            tell=tell,
            bars=sys.stderr.isatty() and not args.quiet,
        )
    )
    return 0
