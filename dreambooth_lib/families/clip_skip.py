"""Encode prompts with an earlier layer of a CLIP text encoder than its last one ("clip skip").

The layers after it are removed, so that every program that loads the saved pipeline encodes prompts
as training did. Stable Diffusion 2.x was published this way: its text encoder has 23 of 24 layers.
"""

from typing import TYPE_CHECKING, Any

from dreambooth_lib.families.base_files import BaseError

if TYPE_CHECKING:
    from dreambooth_lib.families.resolving import ResolvedBase

#: In the text encoder's config: how many layers have been taken out.
_TAKEN_OUT = "layers_taken_out"


def skips_layers(base: "ResolvedBase") -> bool:
    """Return whether ``clip_skip`` can be set for a base: for Stable Diffusion 1.x.

    2.x, whose text encoder is OpenCLIP's, lacks a layer as it is, and A1111 has no clip skip there.
    """
    if not base.family.skips_layers:
        return False
    return base.read("text_encoder/config.json").get("hidden_act", "quick_gelu") == "quick_gelu"


def skip_layers(encoder: Any, clip_skip: int, base: str) -> None:
    """Take the last ``clip_skip`` - 1 layers out of a text encoder, fewer if it lacks some already.

    Its final norm then follows the layer before them, as in A1111 and in diffusers' pipelines.
    Raises :class:`BaseError` where it has no such layer.
    """
    layers = getattr(encoder, "text_model", encoder).encoder.layers  # with a projection
    lacks = _count(getattr(encoder.config, _TAKEN_OUT, 0))
    surplus = clip_skip - 1 - lacks
    if not 0 <= surplus < len(layers):
        raise BaseError(
            f"clip_skip is {clip_skip}, but '{base}' allows {lacks + 1} to {lacks + len(layers)}, "
            "by the layers of its text encoder; change clip_skip, or leave it out."
        )
    if surplus:
        del layers[-surplus:]
    encoder.config.num_hidden_layers = len(layers)
    setattr(encoder.config, _TAKEN_OUT, clip_skip - 1)


def clip_skip_of(base: "ResolvedBase", own: int | None = None) -> int:
    """Return the clip skip that is set, or else that of a base's LoRAs or files; 1 means none."""
    of_loras = [lora.trained_on["clip_skip"] for lora in base.loras]
    set_values = (skip for skip in (own, *reversed(of_loras)) if skip is not None)
    return next(set_values, 1 + _taken_out(base))


def usage_lines(base: "ResolvedBase", own: int | None) -> tuple[str, ...]:
    """Return Python that takes the same layers out of a diffusers ``pipeline`` of the base.

    The pipeline's own argument ``clip_skip`` fails with transformers 5.
    """
    skip = clip_skip_of(base, own)
    surplus = skip - 1 - _taken_out(base)
    if surplus < 1:
        return ()
    return (
        f"text = pipeline.text_encoder  # with clip skip {skip}",
        f"del getattr(text, 'text_model', text).encoder.layers[-{surplus}:]",
    )


def _taken_out(base: "ResolvedBase") -> int:
    return _count(base.read("text_encoder/config.json").get(_TAKEN_OUT))


def _count(value: Any) -> int:
    """Return a config's number of layers; 0 if it is not a positive number."""
    return value if type(value) is int and value > 0 else 0
