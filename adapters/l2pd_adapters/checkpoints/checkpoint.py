"""The properties of a checkpoint, read from its small files and the headers of its weights.

No weight is loaded, no code of the checkpoint is run, and neither torch nor an engine is imported.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from l2pd_adapters.chat_templates import template_problem
from l2pd_adapters.checkpoints.config_checks import wrong_settings
from l2pd_adapters.checkpoints.resolve import SMALL_FILES, resolve_model, snapshot_of
from l2pd_adapters.checkpoints.small_files import (
    TEMPLATE,
    TOKENIZER_FILES,
    Vocabulary,
    check_files,
    vocabulary_of,
)
from l2pd_adapters.checkpoints.weights import (
    INDEX,
    WEIGHTS,
    StoredTensor,
    stored_tensors,
    tensors_on_hub,
    type_problem,
    weight_files,
)
from l2pd_adapters.families import (
    DIFFUSION_GEMMA,
    FAMILIES,
    ModelFamily,
    block_length_of,
    end_of_text_ids,
    end_of_text_of,
    family_of,
    mask_token_of,
)
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import is_there, one_line, path_inside, read_object, reason_of

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that a checkpoint's config may name for its weights."""
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes per weight, by dtype."""


class Checkpoint:
    """A checkpoint's folder, read as far as possible.

    `problems` has one line for each fault that prevents loading; `notes` has further facts. hub_id:
    the hub repository from which headers of weights are read if the folder lacks them.
    """

    def __init__(self, folder: Path, hub_id: str | None = None) -> None:
        self.folder, self.hub_id = folder, hub_id
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.config = self._settings("config.json")
        self.generation_config = self._settings("generation_config.json")
        self.tokenizer_config = self._json("tokenizer_config.json")
        self.family = self._family()
        self.native = self._native()
        self.tensors = self._tensors()
        self.vocabulary = self._vocabulary()
        self.mask_token_id = self._mask_token_id()
        self.end_of_text = self._end_of_text()
        for check in (
            self._check_other_files,
            self._check_dtype,
            self._check_types,
            self._check_layers,
            self._check_embedding,
            self._check_vocabulary,
            self._check_end_of_text,
            self._note_own_code,
            self._note_quantisation,
        ):
            check()

    _read_already = ("config.json", "generation_config.json", "tokenizer_config.json")

    @property
    def model_type(self) -> str | None:
        """The config's `model_type`."""
        return self.config.get("model_type")

    @property
    def runs_on(self) -> str | None:
        """The transformers model type on which the model runs."""
        return None if self.family is None else self.family.decoder or self.model_type

    @property
    def dtype(self) -> str:
        """Default dtype of the weights."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        return str(named or "float32").removeprefix("torch.")

    @property
    def block_length(self) -> int | None:
        """Positions per block; None for an unknown family."""
        if self.family is None:
            return None
        return block_length_of(SimpleNamespace(**self.native), self.family)

    @property
    def chat_template(self) -> bool:
        """Whether the tokenizer or the family has a chat template."""
        if self.family is not None and self.family.chat_template is not None:
            return True
        files = (TEMPLATE, "chat_template.json")
        return "chat_template" in self.tokenizer_config or any(map(self._has, files))

    @property
    def quantisation(self) -> str | None:
        """The method by which the weights are quantised, if they are."""
        config = self.config.get("quantization_config")
        return str(config.get("quant_method", "unknown")) if isinstance(config, dict) else None

    @cached_property
    def parameters(self) -> int:
        """Number of weights, as stored."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def stored(self) -> dict[str, int]:
        """Number of weights of each dtype, by its safetensors name."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += tensor.size
        return dict(counts)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights in their files."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights in memory, by dtype; empty if they are already quantised."""
        if self.quantisation is not None:
            return {}
        return {name: int(self.parameters * size) for name, size in BYTES.items()}

    def cache_bytes(self, tokens: int, dtype: str) -> int | None:
        """Bytes of the keys and values of this many tokens; None if the config lacks the sizes."""
        heads, layers, hidden = (
            self.native.get(name)
            for name in ("num_attention_heads", "num_hidden_layers", "hidden_size")
        )
        if not (heads and layers and hidden):
            return None
        of_keys = self.native.get("num_key_value_heads") or heads
        width = self.native.get("head_dim") or hidden // heads
        return int(2 * layers * of_keys * width * tokens * BYTES[dtype])

    def _has(self, name: str) -> bool:
        return is_there(self.folder / name)

    def _problem(self, text: object) -> None:
        self.problems.append(one_line(text))

    def _json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; empty if the file does not exist; empty with a problem noted
        if it cannot be read.
        """
        if not self._has(name):
            return {}
        try:
            return read_object(path_inside(self.folder, name), name)
        except L2PDError as error:
            self._problem(error)
            return {}

    def _settings(self, name: str) -> dict[str, Any]:
        """The valid settings in a file; invalid ones are noted as problems."""
        values = self._json(name)
        wrong = wrong_settings(values)
        for problem in wrong.values():
            self._problem(f"{name}: {problem}")
        return {key: value for key, value in values.items() if key not in wrong}

    def _setting(self, name: str) -> Any:
        """A setting of `generate`: from the generation config, else from the config."""
        return self.generation_config.get(name, self.config.get(name))

    def _family(self) -> ModelFamily | None:
        if not self.config:
            return None
        if self.model_type in DIFFUSION_GEMMA.model_types:
            return DIFFUSION_GEMMA
        for family in FAMILIES:
            if family.decoder is not None and self.model_type in family.model_types:
                return family
        try:
            return family_of(SimpleNamespace(**self.config))
        except L2PDError as error:
            self._problem(error)
            return None

    def _native(self) -> dict[str, Any]:
        """The config's settings as the native decoder names them."""
        if self.family is DIFFUSION_GEMMA:
            canvas = {"block_length": self.config.get("canvas_length")}
            return {**(self.config.get("text_config") or {}), **canvas}
        if self.family is None or self.family.decoder is None:
            return self.config
        try:
            return self.family.native_config(self.config)
        except L2PDError as error:
            self._problem(error)
            return self.config

    def _tensors(self) -> dict[str, StoredTensor]:
        """The weights, by their names in the native decoder."""
        here = any(self.folder.glob("*.safetensors"))
        stored = self._of_hub() if self.hub_id and not here else self._of_files()
        if self.family is None:
            return stored
        return {self.family.native_weight(name): tensor for name, tensor in stored.items()}

    def _of_hub(self) -> dict[str, StoredTensor]:
        assert self.hub_id is not None
        try:
            return tensors_on_hub(self.hub_id)
        except L2PDError as error:
            self._problem(error)
            return {}
        except OSError as error:  # the hub's errors are subclasses
            self.notes.append(one_line(f"the weights were not checked: {reason_of(error)}"))
            return {}

    def _of_files(self) -> dict[str, StoredTensor]:
        tensors = {}
        for path in self._weight_files():
            name = path.name
            if not is_there(path):
                self._problem(f"{name} is missing: {INDEX} names it")
                continue
            try:
                tensors.update(stored_tensors(path))
            except L2PDError as error:
                self._problem(error)
        return tensors

    def _weight_files(self) -> list[Path]:
        try:
            files = weight_files(self.folder)
        except L2PDError as error:
            self._problem(error)
            return []
        if files:
            return files
        others = [path.name for kind in ("*.bin", "*.pth") for path in self.folder.glob(kind)]
        found = f"; {', '.join(sorted(others))} would have to be converted" if others else ""
        self._problem(f"{WEIGHTS} and {INDEX} are missing{found}")
        return []

    def _vocabulary(self) -> Vocabulary | None:
        try:
            vocabulary = vocabulary_of(self.folder, self.tokenizer_config)
        except L2PDError as error:
            self._problem(error)
            return None
        if vocabulary is None and any(map(self._has, TOKENIZER_FILES)):
            self.notes.append(
                "the tokenizer's vocabulary was not checked: there is no tokenizer.json"
            )
        elif vocabulary is None:
            self._problem("there is no tokenizer: tokenizer.json is missing")
        return vocabulary

    def _mask_token_id(self) -> int | None:
        if self.family is None or self.family is DIFFUSION_GEMMA:
            return None
        try:
            return mask_token_of(SimpleNamespace(**{"vocab_size": 0, **self.native}))
        except L2PDError as error:
            self._problem(error)
            return None

    def _end_of_text(self) -> tuple[int, ...]:
        """The tokens that end a text: those that the checkpoint names, then its family's."""
        named = end_of_text_ids(self._setting("eos_token_id"))
        if self.family is None or self.mask_token_id is None:
            return named
        try:
            known = end_of_text_of(SimpleNamespace(**self.native), self.family)
        except L2PDError as error:
            self._problem(error)
            return named
        return tuple(dict.fromkeys((*named, *known)))

    def _check_other_files(self) -> None:
        """Check the files that only transformers reads."""
        try:
            check_files(self.folder, skip=self._read_already)
        except L2PDError as error:
            self._problem(error)
        problem = template_problem(self.tokenizer_config.get("chat_template"))
        if problem:
            self._problem(f"tokenizer_config.json: chat_template: {problem}")

    def _check_types(self) -> None:
        """Check the dtypes of the weights: these models have only floating-point weights."""
        if self.quantisation is None:
            problem = type_problem(self.tensors)
            if problem:
                self._problem(problem)

    def _check_dtype(self) -> None:
        if self.dtype not in DTYPES:
            self._problem(
                f"the config's dtype {self.dtype!r} is unknown; expected one of {', '.join(DTYPES)}"
            )

    def _check_layers(self) -> None:
        """Check that all layers are stored: a missing weight would be initialised at random."""
        if self.family is None or self.family is DIFFUSION_GEMMA or not self.tensors:
            return
        found = (re.match(r"model\.layers\.([0-9]{1,9})\.", name) for name in self.tensors)
        layers = {int(each[1]) for each in found if each}
        wanted = self.native.get("num_hidden_layers")
        if isinstance(wanted, int) and layers != set(range(wanted)):
            without = sorted(set(range(wanted)) - layers)
            which = f"{without} are not stored" if without else f"{len(layers)} are stored"
            self._problem(f"the config has {wanted} layers: {which}")
        tied = self.native.get("tie_word_embeddings", False)
        if not tied and "lm_head.weight" not in self.tensors:
            self._problem("lm_head.weight is not stored, and not tied to the embedding")

    def _check_embedding(self) -> None:
        embedding = self.tensors.get("model.embed_tokens.weight")
        size = self.config.get("vocab_size")
        rows = None if embedding is None else (*embedding.shape, 0)[0]
        if rows is not None and rows != size:
            self._problem(f"the embedding has {rows} rows, the config has vocab_size={size}")

    def _check_vocabulary(self) -> None:
        size = self.native.get("vocab_size")
        if self.vocabulary is None or not isinstance(size, int):
            return
        if self.vocabulary.largest >= size:
            self._problem(
                f"the tokenizer has ids up to {self.vocabulary.largest}, the embedding only "
                f"{size} rows"
            )
        if self.mask_token_id is not None and self.vocabulary.text_of(self.mask_token_id) is None:
            self._problem(f"the tokenizer lacks the mask token {self.mask_token_id}")

    def _check_end_of_text(self) -> None:
        if not self.end_of_text:
            self.notes.append("no eos_token_id: a text ends only with its canvas")
        for name in ("eos_token_id", "pad_token_id"):
            for number in end_of_text_ids(self._setting(name)):
                if number == self.mask_token_id:
                    self._problem(f"{name}={number} is the mask token")

    def _note_own_code(self) -> None:
        code = sorted(path.name for path in self.folder.glob("*.py"))
        if code or "auto_map" in self.config or "auto_map" in self.tokenizer_config:
            named = ", ".join(code) or "auto_map"
            self.notes.append(f"it contains code ({named}), which is never run")

    def _note_quantisation(self) -> None:
        if self.quantisation is not None:
            self.notes.append(f"the weights are quantised ({self.quantisation})")


def find_checkpoint(name: str) -> Checkpoint:
    """The checkpoint that `load` would use: a shipped model, a folder, or a hub id, whose small
    files are downloaded into the hub's cache.

    Raises L2PDError if there is none.
    """
    source = resolve_model(name)
    if Path(source).is_dir():
        if not is_there(Path(source) / "config.json"):
            raise L2PDError(
                f"model {name!r}: the folder has no config.json, so it is no checkpoint"
            )
        return Checkpoint(Path(source))
    folder = snapshot_of(name, SMALL_FILES)
    return Checkpoint(folder, hub_id=name)
