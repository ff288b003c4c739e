"""Loading a diffusion language model: a shipped one by name, a local folder, or a hub id."""

from __future__ import annotations

import copy
import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DiffusionGemmaForBlockDiffusion,
    PreTrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from l2pd_adapters.chat_templates import template_problem
from l2pd_adapters.checkpoints import (
    INDEX,
    SMALL_FILES,
    WEIGHTS,
    StoredTensor,
    check_files,
    commit_of,
    resolve_model,
    snapshot_of,
    stored_tensors,
    type_problem,
    weight_files,
    wrong_settings,
)
from l2pd_adapters.families import (
    DIFFUSION_GEMMA,
    ModelFamily,
    end_of_text_of,
    family_of,
    mask_token_of,
)
from l2pd_adapters.huggingface import diffusion_gemma
from l2pd_adapters.huggingface.call_types import DiffusionModel, Tokenizer
from l2pd_adapters.huggingface.checking import GENERATE, LOAD, check, close_to, short
from l2pd_adapters.huggingface.enabling import enable
from l2pd_adapters.huggingface.models.lora import add_adapter, require_adapter
from l2pd_adapters.huggingface.models.native import MODELS
from l2pd_adapters.huggingface.models.weight_checks import check_finite, check_weights
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import is_there, one_line, path_inside, read_object, reading

_OF_THE_HUB = ("revision", "token", "cache_dir", "local_files_only")
_FAILED = "cannot be loaded"
_FEW_WEIGHTS = 2**22
"""Number of weights that the config may always describe without them being stored."""


def load(
    name: str | Path,
    *,
    family: ModelFamily | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    device_map: Any = None,
    adapter: str | Path | None = None,
    **kwargs: Any,
) -> tuple[DiffusionModel, Tokenizer]:
    """Load a model and its tokenizer and enable `generate(..., unmask_policy=...)` on the model.

    Args:
        name: a shipped model ("tiny-llada"), a local folder, or a hub id. A shipped name takes
            precedence over a hub id; write a folder as a path (``./tiny-llada``).
        family: how to decode the model; by default the known family that the config names. With a
            family, any decoder or masked LM of transformers can be loaded.
        dtype: dtype of the weights; "auto" uses the checkpoint's own. `torch_dtype` is the same.
        device: where the model goes; None leaves it on the CPU.
        device_map: as in transformers (needs accelerate), instead of `device`.
        adapter: a LoRA adapter of PEFT, a folder or a hub id, whose update is added to the weights;
            layer names of the authors' own code are translated.
        kwargs: passed to ``from_pretrained``; `revision`, `token`, `cache_dir` and
            `local_files_only` also apply to config and tokenizer.

    Returns:
        (model in eval mode, tokenizer with left padding).

    Raises L2PDError if there is no such model or device, the model is not a diffusion language
    model, or its files do not match each other. No remote code is run: the models run on
    transformers' own code.
    """
    if not isinstance(name, str | Path):
        raise L2PDError(f"name={short(name)}: expected a model's name, folder or hub id")
    if not isinstance(family, ModelFamily | None):
        raise L2PDError(f"family={short(family)}: expected a ModelFamily")
    dtype = _dtype(dtype, kwargs)
    kwargs = _keywords(kwargs)
    for keyword, value in (("device", device), ("device_map", device_map), ("adapter", adapter)):
        check(LOAD, keyword, value)
    if device is not None and device_map is not None:
        raise L2PDError(
            f"device={short(device)} and device_map={short(device_map)} exclude each other; give "
            "one"
        )
    source = resolve_model(name)
    device_here(device)  # before anything is read
    if adapter is not None:
        require_adapter(adapter)
    hub = {key: kwargs[key] for key in _OF_THE_HUB if key in kwargs} | {"trust_remote_code": False}
    try:
        if not Path(source).is_dir():
            source = _downloaded(source, hub, kwargs)
        values = _values(source, hub)
        tensors = _check_folder(Path(source), values)
        weights: dict[str, Any] = {
            "dtype": dtype,
            "device_map": device_map,
            "use_safetensors": True,
            "output_loading_info": True,
            **kwargs,
            **hub,
        }
        if values.get("model_type") in DIFFUSION_GEMMA.model_types:
            diffusion_gemma.refuse_family(family)
            with reading(_FAILED):
                tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **hub)
                made: Any = DiffusionGemmaForBlockDiffusion
                _check_size(made, made.config_class.from_dict(values), tensors)
                model, found = made.from_pretrained(source, **weights)
            check_weights(found, DIFFUSION_GEMMA.name)
        else:
            family = family or family_of(SimpleNamespace(**values))
            config = _config(source, values, family, hub)
            mask_token_of(config, family)
            tokenizer = _tokenizer(source, config, family, hub)
            with reading(_FAILED):
                model_class = _model_class(config, family)
                _check_size(model_class, config, tensors)
                model, found = model_class.from_pretrained(
                    source, config=config, key_mapping=family.weight_patterns or None, **weights
                )
            check_weights(found, family.name, family.ignored_weights)
        if adapter is not None:
            model = add_adapter(model, adapter, family or DIFFUSION_GEMMA, hub)
        check_finite(model)
        _check_use(tokenizer)
        with reading(_FAILED):
            model = model.eval() if device is None else model.eval().to(device)
        enable(model, name=str(name), family=family)
    except L2PDError as error:
        raise L2PDError(f"model {str(name)!r}: {one_line(error)}") from error
    return model, tokenizer


def _downloaded(hub_id: str, hub: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str:
    """Download a hub id to the hub's cache; its folder is then loaded as any other folder. The
    small files are downloaded and checked before the weights.

    Raises L2PDError if it is not available, or if a small file is invalid.
    """
    names = (*(name for name in _OF_THE_HUB if name in hub), "force_download")
    known = {name: value for name, value in {**kwargs, **hub}.items() if name in names}
    folder = snapshot_of(hub_id, SMALL_FILES, **known)
    _values(str(folder), hub)
    check_files(folder)
    files = [path.relative_to(folder).as_posix() for path in weight_files(folder)]
    wanted = [glob.escape(name) for name in files or [WEIGHTS]]
    if "variant" in kwargs:
        wanted = ["*.safetensors"]
    commit = commit_of(folder)
    return str(snapshot_of(hub_id, wanted, **known | ({"revision": commit} if commit else {})))


def _values(source: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the checkpoint's config.json. Raises L2PDError if it is not a config, or if a
    setting is invalid that this package reads or that determines how much memory a library
    allocates.
    """
    read_object(path_inside(Path(source), "config.json"), "config.json")
    values: dict[str, Any]
    with reading(_FAILED):
        values, _ = PreTrainedConfig.get_config_dict(source, **hub)
    if not values:
        raise L2PDError(f"config.json has no settings ({source})")
    for problem in wrong_settings(values).values():
        raise L2PDError(f"config.json: {problem}")
    return values


def _check_folder(folder: Path, values: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors in a folder's files of weights.

    Raises L2PDError if a file that is read is missing, cannot be read, or is not in the folder, or
    if the weights are not floating-point numbers.
    """
    check_files(folder)
    if is_there(folder / "generation_config.json"):
        settings = read_object(path_inside(folder, "generation_config.json"))
        for problem in wrong_settings(settings).values():
            raise L2PDError(f"generation_config.json: {problem}")
    files = weight_files(folder)
    missing = [path.name for path in files if not is_there(path)]
    if missing:
        raise L2PDError(
            f"{len(missing)} of the {len(files)} weight files that {INDEX} names are missing: "
            f"{', '.join(missing)}"
        )
    tensors = {name: each for path in files for name, each in stored_tensors(path).items()}
    problem = "" if values.get("quantization_config") else type_problem(tensors)
    if problem:
        raise L2PDError(problem)
    return tensors


def _check_size(
    model_class: Any, config: PreTrainedConfig, tensors: Mapping[str, StoredTensor]
) -> None:
    """Raise L2PDError if the config describes a model that is far larger than the stored weights:
    transformers would allocate all of it and initialise it at random before it reports missing
    weights.
    """
    if not tensors:
        return
    make = getattr(model_class, "from_config", model_class)  # from_config: of Auto classes
    with torch.device("meta"), no_init_weights():
        described = sum(weight.numel() for weight in make(copy.deepcopy(config)).parameters())
    # Tied weights may be stored once, and quantised ones packed.
    stored = sum(tensor.bytes for tensor in tensors.values())
    if described > 4 * stored + _FEW_WEIGHTS:
        raise L2PDError(
            f"the config describes a model of {described:,} weights, the files hold {stored:,} "
            "bytes: they do not match"
        )


def _config(
    source: str, values: Mapping[str, Any], family: ModelFamily, hub: Mapping[str, Any]
) -> PreTrainedConfig:
    """The config of the native model that the checkpoint runs on."""
    native = family.native_config(values)
    with reading(_FAILED):
        if family.architecture in MODELS:
            config = MODELS[family.architecture].config_class.from_dict(native)
        elif family.decoder is not None:
            config = CONFIG_MAPPING[family.decoder].from_dict(native)
        else:
            config = AutoConfig.from_pretrained(source, **hub)
    if family.attention == "bidirectional":
        config.is_causal = False
    return config


def _model_class(config: PreTrainedConfig, family: ModelFamily) -> Any:
    if family.architecture in MODELS:
        return MODELS[family.architecture]
    if any(name.endswith("ForMaskedLM") for name in config.architectures or ()):
        return AutoModelForMaskedLM
    return AutoModelForCausalLM


def _tokenizer(
    source: str, config: PreTrainedConfig, family: ModelFamily, hub: Mapping[str, Any]
) -> Any:
    """Load the tokenizer, and check that it has the mask and end-of-text tokens."""
    native = {}
    with reading(f"the tokenizer {_FAILED}"):
        settings = get_tokenizer_config(
            source, **{key: value for key, value in hub.items() if key in _OF_THE_HUB}
        )
        if "auto_map" in settings and family.decoder is not None:
            # Dream's tokenizer class is remote code; Qwen2's reads the same files.
            native["tokenizer_type"] = family.decoder
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=config, padding_side="left", **native, **hub
        )
        known = set(tokenizer.get_vocab().values())
    if len(tokenizer) > config.vocab_size:
        raise L2PDError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding "
            f"{config.vocab_size} (vocab_size): they do not match"
        )
    mask, ends = mask_token_of(config, family), end_of_text_of(config, family)
    for role, token_id in (("mask", mask), *(("end-of-text", token_id) for token_id in ends)):
        if token_id not in known:
            raise L2PDError(
                f"the tokenizer ({len(tokenizer)} tokens) lacks the {role} token "
                f"{token_id}: it belongs to another model"
            )
    tokenizer.chat_template = tokenizer.chat_template or family.chat_template
    return tokenizer


def _check_use(tokenizer: Any) -> None:
    """Raise L2PDError if a first use of the tokenizer, or reading its template, fails."""
    with reading("the tokenizer cannot be used"):
        tokenizer.decode(tokenizer("a").input_ids)
    problem = template_problem(tokenizer.chat_template)
    if problem:
        raise L2PDError(f"the tokenizer's chat template: {problem}")


_FIXED = {"trust_remote_code": False, "use_safetensors": True, "weights_only": True}
"""Keywords of `from_pretrained` with a fixed value here: no code of a checkpoint is ever run."""


def _dtype(dtype: Any, kwargs: dict[str, Any]) -> str:
    """The dtype by its name; `torch_dtype`, its name in older code, is removed from kwargs."""
    older = check(LOAD, "torch_dtype", kwargs.pop("torch_dtype", None))
    if older is not None and dtype != "auto":
        raise L2PDError(
            f"dtype={short(dtype)} and torch_dtype={older} are the same setting; give one"
        )
    name: str | None = older or check(LOAD, "dtype", dtype)
    return name or "auto"


def _keywords(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The further keywords of `load`, checked; None stands for one that is not given."""
    made = {}
    for name, value in kwargs.items():
        if name not in LOAD:
            hint = ": it is one of generate." if name in GENERATE else close_to(name, LOAD) or "."
            raise L2PDError(
                f"unknown keyword {name!r} (= {short(value)}){hint} Known are {', '.join(LOAD)}"
            )
        if value is None:
            continue
        made[name] = check(LOAD, name, value)
        if name in _FIXED and made[name] is not _FIXED[name]:
            raise L2PDError(
                f"{name}={value}: no code of a checkpoint is ever run, and no pickle read; leave "
                "it out"
            )
    return made


def device_here(device: torch.device | str | None) -> torch.device:
    """The device as its tensors name it ("cuda" is not equal to "cuda:0"). None is the default
    device.

    Raises L2PDError, with the choices, if a tensor cannot be created on it.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError if torch is built without CUDA
        here = ["cpu"]
        if torch.accelerator.is_available():
            here.append(str(torch.accelerator.current_accelerator()))
        why = str(error).splitlines()[0]
        raise L2PDError(f"device={str(device)!r}: {why}; here are: {', '.join(here)}") from error


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Context manager: transformers shows no progress bar while it loads weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
