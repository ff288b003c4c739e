"""Low-rank adapters (LoRA), including those trained on the authors' own code.

An adapter trained on the authors' code has that code's layer names (LLaDA's
`model.transformer.blocks.0.ff_proj`), while the model here has transformers' names
(`model.layers.0.mlp.gate_proj`). PEFT matches names, so it would load the adapter and change
nothing. The names are translated with the family's table, like those of the checkpoint's weights;
PEFT then creates the layers and merges them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from l2pd_adapters.checkpoints import HUB_ID, local_folder
from l2pd_adapters.families import ModelFamily
from l2pd_adapters.huggingface.checking import Number, check, short
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import read_object
from l2pd_plugins.tensor_files import what_is_not_finite

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ADAPTER = "l2pd_adapter"
"""The attribute of a model with the name of its merged adapter."""
_PREFIX = "base_model.model."
"""PEFT's prefix of every weight name."""
_FOLLOWED = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "alpha_pattern")
"""Settings of the adapter that change the meaning of its weights."""
_WITHOUT_MEANING = (
    "peft_type",
    "task_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",  # PEFT sets it by the layer
    # The layers follow from the weights.
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    # These only affect the start of a training.
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "ensure_weight_tying",
    "runtime_config",
    # These belong to kinds that are refused because of another setting.
    "megatron_core",
    "qalora_group_size",
)
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that do not change the model's own weights."""
_NAMED_AT_MOST = 5


def add_adapter(
    model: Any, adapter: str | Path, family: ModelFamily, hub: Mapping[str, Any]
) -> Any:
    """The model with the adapter's update added to its weights.

    Args:
        model: on transformers' own code, or this package's.
        adapter: a folder written by PEFT, or a hub id.
        family: the family whose table translates the names of layers.
        hub: keywords of the hub, except revision, which is the model's.

    Raises L2PDError, before the model is changed, if `require_adapter` would, or if one of the
    adapter's weights matches no layer of the model.
    """
    require_adapter(adapter)
    import peft

    what = f"adapter {str(adapter)!r}"
    config_file, weights_file = _files(adapter, hub)
    settings = _settings(config_file, what)
    try:
        stored = load_file(weights_file)
    except Exception as error:  # safetensors' own error, OSError, or an invalid header
        raise L2PDError(f"{what}: {WEIGHTS} cannot be read: {error}") from error
    layers = _layers(stored, model, family, what)
    ranks = {native: parts["lora_A.weight"].shape[0] for native, (_, parts) in layers.items()}
    scales = {native: _alpha(theirs, settings, what) for native, (theirs, _) in layers.items()}
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=1,
        target_modules=list(layers),
        rank_pattern={f"^{re.escape(native)}": rank for native, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(native)}": alpha for native, alpha in scales.items()},
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
        lora_bias=bool(settings.get("lora_bias")),
        inference_mode=True,
    )
    try:
        wrapped = peft.get_peft_model(model, config)
        named = {
            f"{_PREFIX}{native}.{part}": weight
            for native, (_, parts) in layers.items()
            for part, weight in parts.items()
        }
        found: Any = peft.set_peft_model_state_dict(wrapped, named)
        missing = [name for name in found.missing_keys if ".lora_" in name]
        if missing or found.unexpected_keys:
            for names, problem in ((missing, "is missing"), (found.unexpected_keys, "is not used")):
                if names:
                    raise L2PDError(
                        f"{what}: its settings (use_dora={config.use_dora}, "
                        f"lora_bias={config.lora_bias}) do not fit its weights: "
                        f"{names[0].removeprefix(_PREFIX)} {problem}"
                    )
        merged = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise L2PDError(f"{what}: PEFT cannot add it to the model: {error}") from error
    setattr(merged, ADAPTER, Path(adapter).name)
    return merged


def require_adapter(adapter: str | Path, called: str | None = None) -> None:
    """Raise L2PDError, which begins with `called`, if PEFT is missing, an adapter in a folder
    cannot be read, or it is of an unsupported kind; call it before the model is loaded. For an
    adapter on the hub only the name is checked."""
    called = f"adapter {str(adapter)!r}" if called is None else called
    if find_spec("peft") is None:
        raise L2PDError(f"{called} needs PEFT: pip install 'l2pd-plugins[peft]'")
    folder = _folder(adapter, called)
    if folder is not None:
        _settings(_config_and_weights(folder, called)[0], called)


def _settings(config_file: Path, what: str) -> dict[str, Any]:
    try:
        settings = read_object(config_file)
    except L2PDError as error:
        raise L2PDError(f"{what}: {error}") from error
    _refuse_unsupported(settings, what)
    return settings


def _folder(adapter: str | Path, what: str) -> Path | None:
    """The adapter's folder; None for an adapter on the hub."""
    text = str(adapter)
    folder = local_folder(text, what)
    if folder is None and (isinstance(adapter, Path) or not HUB_ID.fullmatch(text)):
        raise L2PDError(f"{what}: neither a folder nor a hub id (owner/name)")
    return folder


def _config_and_weights(folder: Path, what: str) -> tuple[Path, Path]:
    if not (folder / WEIGHTS).is_file():
        pickle = f"; {PICKLE} is a pickle, which can run code" * (folder / PICKLE).exists()
        raise L2PDError(f"{what}: there is no {WEIGHTS}{pickle}")
    return folder / CONFIG, folder / WEIGHTS


def _files(adapter: str | Path, hub: Mapping[str, Any]) -> tuple[Path, Path]:
    """The adapter's two files."""
    text = str(adapter)
    folder = _folder(adapter, f"adapter {text!r}")
    if folder is not None:
        return _config_and_weights(folder, f"adapter {text!r}")
    known = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
    try:
        config, weights = (Path(hf_hub_download(text, name, **known)) for name in (CONFIG, WEIGHTS))
    except (OSError, ValueError) as error:
        raise L2PDError(f"adapter {text!r}: {str(error).splitlines()[0]}") from error
    return config, weights


def _refuse_unsupported(settings: Mapping[str, Any], what: str) -> None:
    """Raise L2PDError for adapters whose weights would be interpreted wrongly."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise L2PDError(f"{what}: peft_type={short(kind)} is not supported; expected LORA")
    start = settings.get("init_lora_weights", True)
    if not any(start is known or start == known != 1 for known in _HARMLESS_STARTS):
        raise L2PDError(
            f"{what}: init_lora_weights={short(start)} has changed the model's own weights in "
            "training; save it as a plain LoRA (path_initial_model_for_weight_conversion)"
        )
    for name, value in settings.items():
        if name in (*_FOLLOWED, *_WITHOUT_MEANING, "init_lora_weights"):
            continue
        if value and not (name == "bias" and value == "none"):
            raise L2PDError(f"{what}: {name}={short(value)} is not supported")
    for name in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(settings.get(name), bool | None):
            raise L2PDError(f"{what}: {name}={short(settings[name])}: expected true or false")
    pattern = settings.get("alpha_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise L2PDError(f"{what}: alpha_pattern={short(pattern)}: expected an object")
    for name in pattern:
        if not re.fullmatch(r"[\w.]+", name):  # an untrusted regular expression is not run
            raise L2PDError(f"{what}: alpha_pattern has {short(name)}; expected a layer's name")


def _alpha(layer: str, settings: Mapping[str, Any], what: str) -> float:
    """The scale (alpha) of a layer, given by its name in training."""
    pattern: Mapping[str, Any] = settings.get("alpha_pattern") or {}
    own = [alpha for name, alpha in pattern.items() if f".{layer}".endswith(f".{name}")]
    alpha = own[0] if own else settings.get("lora_alpha", 8)
    number: float | None = check({"lora_alpha": Number()}, "lora_alpha", alpha, f" of {what}")
    if number is None:
        raise L2PDError(f"{what}: lora_alpha=None: expected a number")
    return number


def _layers(
    stored: Mapping[str, Tensor], model: Any, family: ModelFamily, what: str
) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """For the model's name of each layer: its name in training, and its weights by their PEFT names
    ("lora_A.weight").
    """
    modules = dict(model.named_modules())
    layers: dict[str, tuple[str, dict[str, Tensor]]] = {}
    left = []
    for name, weight in sorted(stored.items()):
        layer, found, part = name.removeprefix(_PREFIX).partition(".lora_")
        native = _native(layer, family, modules)
        if not found or native is None:
            left.append(name)
            continue
        if not bool(weight.isfinite().all()):
            raise L2PDError(
                f"{what}: the weight {name} has values that are not finite: "
                f"{what_is_not_finite(weight)}"
            )
        layers.setdefault(native, (layer, {}))[1]["lora_" + part] = weight
    if not layers:
        raise L2PDError(
            f"{what}: none of its {len(stored)} weights matches a layer of {family.name}; they are "
            f"called {_some(sorted(stored))}"
        )
    if left:
        raise L2PDError(
            f"{what}: {len(left)} of its {len(stored)} weights match no layer of {family.name}: "
            f"{_some(left)}"
        )
    for native, (theirs, parts) in layers.items():
        _check_shapes(theirs, parts, modules[native], what)
        if modules[native].weight is _tied(model):
            raise L2PDError(
                f"{what}: {theirs} shares its weight with the embedding (tie_word_embeddings), "
                "which an update would change, too"
            )
    return layers


def _native(layer: str, family: ModelFamily, modules: Mapping[str, nn.Module]) -> str | None:
    """The model's layer for a name in the authors' code or in transformers; None if there is none.
    If the base model was trained inside the class with the head, names begin with "model.".
    """
    for name in (layer, f"model.{layer}"):
        native = family.native_weight(name)
        if isinstance(modules.get(native), nn.Linear):
            return native
    return None


def _check_shapes(layer: str, parts: Mapping[str, Tensor], module: Any, what: str) -> None:
    names = ("lora_A.weight", "lora_B.weight")
    if not all(name in parts for name in names):
        raise L2PDError(f"{what}: {layer} has {_some(sorted(parts))}; expected {_some(names)}")
    first, second = (tuple(parts[name].shape) for name in names)
    inner, outer = module.in_features, module.out_features
    lengths = parts.get("lora_magnitude_vector", parts.get("lora_magnitude_vector.weight"))
    if lengths is not None and lengths.shape != (outer,):
        raise L2PDError(
            f"{what}: {layer} has lora_magnitude_vector of {tuple(lengths.shape)}; expected "
            f"({outer},)"
        )
    fits = len(first) == len(second) == 2 and first[0] == second[1] > 0
    if not (fits and first[1] == inner and second[0] == outer):
        raise L2PDError(
            f"{what}: {layer} has weights of {first} and {second}; expected (r, {inner}) and "
            f"({outer}, r)"
        )


def _tied(model: Any) -> Any:
    """The weight that embedding and head share; None if they share none."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = getattr(head, "weight", None)
    return shared if shared is getattr(embedding, "weight", torch.empty(0)) else None


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED_AT_MOST]) + ", ..." * (len(names) > _NAMED_AT_MOST)
