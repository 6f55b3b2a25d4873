"""Tables from the Hugging Face hub: data only, at a commit that is resolved once."""

import re

from deltatune.data.source import Source, last_cause, quiet_datasets, split_roles
from deltatune.errors import UserError

HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[\w.+-]+))?(@(?P<revision>[\w./-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


def looks_like_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name, owner/name:configuration or either with @revision."""
    return HUB_ID.fullmatch(name) is not None


def read_hub(name: str) -> Source:
    """The tables of a data set on the hub; the revision is the commit that its branch, tag or default stands at now.

    Code that comes with a data set is never run. Raises UserError where the hub cannot be reached or has no such thing.
    """
    from datasets import load_dataset

    parts = HUB_ID.fullmatch(name)
    assert parts is not None
    commit = _commit(parts["id"], parts["revision"])
    try:
        with quiet_datasets():
            tables = load_dataset(parts["id"], parts["config"], revision=commit)
    except Exception as error:  # network, formats and configurations: `datasets` has no common error for them
        choose = f"{parts['id']}:CONFIGURATION" if "onfig name is missing" in str(error) else ""
        hint = f"name the configuration as {choose}" if choose else "see its page on the hub, or give a local file"
        raise UserError(f"could not read '{name}' from the hub: {' '.join(str(error).split())}", hint) from error
    roles = split_roles(tables)
    if "train" not in roles:
        raise UserError(f"'{name}' has no training split; it has {', '.join(tables)}", "give local files instead")
    return Source({split: tables[role] for split, role in roles.items()}, commit)


def _commit(repository: str, revision: str | None) -> str:
    """The commit that a branch or tag (None: the default branch) stands at; a commit stands for itself, offline too."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if revision and COMMIT.fullmatch(revision):
        return revision
    try:
        return str(HfApi().dataset_info(repository, revision=revision).sha)
    except RevisionNotFoundError as error:
        raise UserError(f"'{repository}' has no revision '{revision}' on the hub") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is neither a file or folder '{repository}' here nor a data set of this name on the hub",
            "check the name; a private data set needs `hf auth login`",
        ) from error
    except Exception as error:  # connection, proxy, time-out, offline mode: each HTTP library has its own errors
        raise UserError(
            f"there is no file or folder '{repository}' here, and the hub could not be reached: {last_cause(error)}",
            "connect to the network, or give an embedded name or a local file",
        ) from error
