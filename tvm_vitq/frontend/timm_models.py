"""timm names, factories and torch modules -> Relax, with checkpoints and data configuration."""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_passes.errors import VitqError

from .source import Imported
from .torch_export import export_module, import_program, one_line

if TYPE_CHECKING:
    import torch

__all__ = ["build_model", "import_module", "load_checkpoint"]


def build_model(source: str, arguments: Mapping[str, Any] | None = None) -> torch.nn.Module:
    """Build a float model from a timm name or from ``package.module:function``.

    Parameters
    ----------
    source : str
        Name of a timm model, or a factory that returns a ``torch.nn.Module``; the factory may be
        followed by JSON keyword arguments: ``models:vit?{"depth": 2}``.
    arguments : mapping, optional
        Keyword arguments of the model or factory.

    Raises
    ------
    VitqError
        If there is no such model or factory, or it fails.
    """
    source, _, query = source.partition("?")
    keywords = dict(arguments or {})
    if query:
        try:
            keywords = {**json.loads(query), **keywords}
        except (ValueError, TypeError) as error:
            raise VitqError(
                f"model arguments {query!r} are not a JSON object: {one_line(error)}"
            ) from error
    if ":" in source:
        return _from_factory(source, keywords)
    return _from_timm(source, keywords)


def _from_factory(source: str, keywords: dict[str, Any]) -> torch.nn.Module:
    import torch

    module_name, _, function_name = source.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise VitqError(f"no factory {source!r}: {one_line(error)}") from error
    finally:
        if added:
            sys.path.remove(here)
    try:
        model = function(**keywords)
    except VitqError:
        raise
    except Exception as error:  # the user's code
        raise VitqError(f"factory {source}({keywords or ''}) failed: {one_line(error)}") from error
    if not isinstance(model, torch.nn.Module):
        raise VitqError(
            f"factory {source} returned {type(model).__name__}; a torch.nn.Module is needed"
        )
    return model


def _from_timm(name: str, keywords: dict[str, Any]) -> torch.nn.Module:
    import timm

    name = name.removeprefix("timm/")
    base = name.split(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise VitqError(
            f"unknown model {name!r}: neither a timm model, a .pt2 or .onnx file, nor "
            f"package.module:function{hint}"
        )
    try:
        return timm.create_model(name, pretrained=False, **keywords)
    except Exception as error:
        raise VitqError(f"timm cannot build {name!r} with {keywords}: {one_line(error)}") from error


def load_checkpoint(model: torch.nn.Module, path: str | Path) -> None:
    """Load weights into a model; every key and shape must match.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    path : str or Path
        ``.safetensors``, or a torch file (``.pth``, ``.pt``, ``.bin``, ``.tar``) with a state dict,
        plain or under ``state_dict``, ``model`` or ``model_ema``.

    Raises
    ------
    VitqError
        If the file cannot be read, keys or shapes don't match, or a value is NaN or Inf.
    """
    import torch

    state = _read_state(Path(path))
    own = model.state_dict()
    state = _strip_prefix(state, own)
    # Buffers that the model recomputes (Swin's masks and indices) may be in older checkpoints.
    recomputed = {
        k for k in state if k not in own and k.endswith(("relative_position_index", "attn_mask"))
    }
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own and k not in recomputed]
    shaped = [k for k in own if k in state and tuple(own[k].shape) != tuple(state[k].shape)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if shaped:
        pairs = [f"{k} {list(state[k].shape)} for {list(own[k].shape)}" for k in shaped]
        problems.append(f"{len(shaped)} of another shape ({_some(pairs)})")
    if problems:
        raise VitqError(
            f"checkpoint {path} does not match the model: keys {', '.join(problems)}; "
            "give the architecture it was trained with"
        )
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise VitqError(
                f"checkpoint {path}: {key} holds {bad} NaN or Inf of {value.numel()} values"
            )
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=True)


def _some(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    import torch

    if not path.is_file():
        raise VitqError(f"no such checkpoint: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle, zip and torch errors
        raise VitqError(f"checkpoint {path} cannot be read: {one_line(error)}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if (
        not isinstance(state, dict)
        or not all(torch.is_tensor(v) for v in state.values())
        or not state
    ):
        raise VitqError(f"checkpoint {path} holds no state dict of tensors")
    return state


def _strip_prefix(
    state: dict[str, torch.Tensor], own: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    for prefix in ("module.", "model.", "backbone."):
        if all(k.startswith(prefix) for k in state) and not any(k.startswith(prefix) for k in own):
            return {k[len(prefix) :]: v for k, v in state.items()}
    return state


@contextmanager
def _for_tracing(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; attention as matmul and softmax: a smaller trace, the same result."""
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False) is True]
    training = model.training
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    model.eval()
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]
        model.train(training)


def import_module(
    model: torch.nn.Module,
    name: str,
    batch: int,
    input_size: list[int] | None = None,
) -> Imported:
    """Import a torch module (in evaluation mode, on its own device).

    Parameters
    ----------
    model : torch.nn.Module
        Float model, images ``[B, C, H, W]`` in, logits out.
    name : str
        Name for reports and errors.
    batch : int
        Batch size.
    input_size : list of int, optional
        ``[C, H, W]``, if the model does not say.
    """
    import torch

    preprocess, labels = data_config(model)
    size = input_size or preprocess.get("input_size") or image_size(model)
    if size is None:
        raise VitqError(
            f"{name} does not say its image size; give it with input_size (--input-size C,H,W)"
        )
    _check_finite(model, name)
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        model = copy.deepcopy(model).float()
    with _for_tracing(model):
        program = export_module(model, (batch, *(int(v) for v in size)), name)
        mod, names = import_program(program, name)
    return Imported(mod, name, names=names, preprocess=preprocess, labels=labels)


def _check_finite(model: torch.nn.Module, name: str) -> None:
    import torch

    for key, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise VitqError(
                f"{name}: weights {key} hold {bad} NaN or Inf of {value.numel()} values"
            )


def image_size(model: torch.nn.Module) -> list[int] | None:
    """Read ``[C, H, W]`` from a timm patch embedding."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    kernel = getattr(getattr(embed, "proj", None), "weight", None)
    if size is None or kernel is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return [int(kernel.shape[1]), int(height), int(width)]


def data_config(model: torch.nn.Module) -> tuple[dict[str, Any], list[str] | None]:
    """Preprocessing and class names from timm's configuration of a model (empty if it has none)."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not config:
        return {}, None
    from timm.data import resolve_data_config

    config = dict(config)
    data = resolve_data_config({}, pretrained_cfg=config, model=None, use_test_size=False)
    size = image_size(model) or list(data["input_size"])
    crop = {"crop_pct": float(data["crop_pct"]), "crop_mode": data.get("crop_mode") or "center"}
    spec = {
        "input_size": [int(v) for v in size],
        "interpolation": str(data["interpolation"]),
        "mean": [float(v) for v in data["mean"]],
        "std": [float(v) for v in data["std"]],
        **crop,
    }
    labels = config.get("label_names")
    return spec, [str(v) for v in labels] if labels else None
