"""Checkpoints: finding a model's files and reading them before any weight is loaded.

`resolve` finds the folder or hub id of a model's name, `small_files` reads settings and the
tokenizer, `config_checks` bounds their values, `weights` reads the headers of stored weights, and
`checkpoint` brings them together. No code of a checkpoint is run, and neither torch nor an engine
is imported.
"""

from l2pd_adapters.checkpoints.checkpoint import BYTES, DTYPES, Checkpoint, find_checkpoint
from l2pd_adapters.checkpoints.config_checks import wrong_settings
from l2pd_adapters.checkpoints.resolve import (
    HUB_ID,
    SMALL_FILES,
    commit_of,
    local_folder,
    resolve_model,
    snapshot_of,
)
from l2pd_adapters.checkpoints.small_files import (
    SETTINGS_FILES,
    TEMPLATE,
    TEMPLATES,
    TOKENIZER_FILES,
    Vocabulary,
    check_files,
)
from l2pd_adapters.checkpoints.weights import (
    INDEX,
    WEIGHTS,
    StoredTensor,
    stored_tensors,
    type_problem,
    weight_files,
)

__all__ = [
    "BYTES",
    "DTYPES",
    "HUB_ID",
    "INDEX",
    "SETTINGS_FILES",
    "SMALL_FILES",
    "TEMPLATE",
    "TEMPLATES",
    "TOKENIZER_FILES",
    "WEIGHTS",
    "Checkpoint",
    "StoredTensor",
    "Vocabulary",
    "check_files",
    "commit_of",
    "find_checkpoint",
    "local_folder",
    "resolve_model",
    "snapshot_of",
    "stored_tensors",
    "type_problem",
    "weight_files",
    "wrong_settings",
]
