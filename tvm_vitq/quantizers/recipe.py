"""What a user may choose about quantization, and the presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from relay_passes.errors import VitqError

__all__ = ["PRESETS", "Recipe", "preset"]

OBSERVERS = ("minmax", "percentile", "mse", "search")
METHODS = ("table", "poly", "shift")
_STRENGTH: tuple[type, ...] = (float, int, type(None))
_TYPES: dict[str, tuple[type, ...]] = {
    "observer": (str,),
    "nonlinear": (str, dict),
    "norm": _STRENGTH,
    "attention": _STRENGTH,
    "gelu": _STRENGTH,
    "balance_keys": (bool,),
    "rounding": (str,),
    "bias_correction": (bool,),
    "int16_groups": (int,),
    "a16_budget": (float, int),
    "probabilities": (str,),
    "wide_gelu": (bool,),
    "images": (int,),
    "seed": (int,),
}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Recipe:
    """Choices of one quantization. A strength of None is searched, per place, by unit-output error.

    Attributes
    ----------
    observer : str
        minmax, percentile, mse, or search (the best of the three at each place).
    nonlinear : str or dict
        table, poly or shift for every softmax and GELU; ``{"softmax": …, "gelu": …}``; or auto, the
        fastest of the accurate ones: poly, and table for a GELU of 8-bit codes
        (benchmarks/NOTES.md).
    norm, attention, gelu : float or None
        Strength s_c^alpha of the channel scales of post-LayerNorm (RepQ-ViT), attention output and
        post-GELU, folded into the next weight: 0 none, 1 full, None searched.
    balance_keys : bool
        Balance Q against K and centre K, per channel.
    rounding : str
        ``error`` (weight codes by output error, second-order) or ``nearest``.
    bias_correction : bool
        Correct the mean error of every linear in its bias.
    int16_groups : int
        Weights are kept so small that processors without a dot instruction for bytes (AVX2,
        AVX-512BW) may add the products of this many groups of four input channels in 16 bits: 1, 2
        or 4, the more the faster; 0 for weights of full width.
    a16_budget : float
        Largest share of all multiply-accumulates that may have int16 activations chosen for an
        operand (probabilities, which are int16 anyway, don't count).
    probabilities : str
        int16 or uint8 codes behind softmax.
    wide_gelu : bool
        int16 instead of int8 codes before GELU.
    images : int
        Calibration images used, at most.
    seed : int
    """

    observer: str = "search"
    nonlinear: str | dict[str, str] = "auto"
    norm: float | None = None
    attention: float | None = None
    gelu: float | None = None
    balance_keys: bool = True
    rounding: str = "error"
    bias_correction: bool = True
    int16_groups: int = 2
    a16_budget: float = 0.07
    probabilities: str = "int16"
    wide_gelu: bool = True
    images: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise VitqError(f"unknown observer {self.observer!r}; use {', '.join(OBSERVERS)}")
        for kind in ("softmax", "gelu"):
            if self.method(kind) not in METHODS:
                raise VitqError(
                    f"unknown nonlinear method {self.method(kind)!r}; use {', '.join(METHODS)}"
                )
        for name in ("norm", "attention", "gelu"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise VitqError(f"recipe: strength {name}={value} must be between 0 and 1, or null")
        if self.rounding not in ("error", "nearest"):
            raise VitqError(f"recipe: unknown rounding {self.rounding!r}; use error or nearest")
        if self.probabilities not in ("int16", "uint8"):
            raise VitqError(f"recipe: probabilities={self.probabilities!r}; use int16 or uint8")
        if self.int16_groups not in (0, 1, 2, 4):
            raise VitqError(f"recipe: int16_groups={self.int16_groups}; use 0, 1, 2 or 4")
        if not 0.0 <= self.a16_budget <= 1.0:
            raise VitqError(f"recipe: a16_budget={self.a16_budget} must be between 0 and 1")
        if self.images < 1:
            raise VitqError(f"recipe: images={self.images} must be at least 1")

    def method(self, kind: str) -> str:
        """Integer method of a softmax or a gelu."""
        named = self.nonlinear
        chosen = named if isinstance(named, str) else named.get(kind, "auto")
        if chosen == "auto":
            return "table" if kind == "gelu" and not self.wide_gelu else "poly"
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Make a recipe from JSON types.

        Raises
        ------
        VitqError
            For a name that is not a field.
        """
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise VitqError(
                    f"recipe: unknown field {name!r}; known: {', '.join(sorted(known))}"
                )
            wanted = _TYPES[name]
            value = values[name]
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
                names = " or ".join("null" if t is type(None) else t.__name__ for t in wanted)
                raise VitqError(f"recipe: {name} is {value!r}; it must be {names}")
        return cls(**values)


PRESETS: dict[str, Recipe] = {
    "default": Recipe(),
    "minmax": Recipe(
        observer="minmax",
        norm=0.0,
        attention=0.0,
        gelu=0.0,
        balance_keys=False,
        rounding="nearest",
        bias_correction=False,
        a16_budget=0.0,
    ),
    "repq": Recipe(
        observer="percentile",
        norm=1.0,
        attention=0.0,
        gelu=0.0,
        balance_keys=False,
        rounding="nearest",
        bias_correction=False,
        a16_budget=0.0,
    ),
    "int8": Recipe(a16_budget=0.0),
}


def preset(name: str, **changes: Any) -> Recipe:
    """Return a preset by name, with some fields changed."""
    if name not in PRESETS:
        raise VitqError(f"unknown recipe {name!r}; use {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)
