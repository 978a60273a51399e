"""LoRA, or another adapter of peft, for a family's denoiser and text encoders.

W x becomes W x + (alpha / rank) B A x with the base's W frozen (arXiv 2106.09685); B starts at 0,
so that training starts from the base. A finished run saves A and B only, in diffusers' format; of
another adapter its weights, in peft's format (``families.peft_adapters``).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.families import peft_adapters, quantizers, textual_inversion
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.loading import LORA_BASE_FILE
from dreambooth_lib.families.precision import without_paths
from dreambooth_lib.training.interrupts import defer_interrupts

#: Layers of transformers' CLIP encoders: attention, and feed-forward.
_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2")


def add_lora(family: Family, config: TrainConfig) -> None:
    """Add the config's adapters, the same for the same seed, and freeze everything else.

    Raises :class:`ConfigError` for an adapter that this peft lacks, or that does not fit the base.
    """
    quantizers.ignore_unusable()
    with_feed_forward = config.lora_layers == "all"
    layers = {family.denoiser: family.lora_layers(with_feed_forward)}
    family.denoiser.requires_grad_(False)
    for encoder in family.text_encoders if config.trains_text else ():
        encoder.requires_grad_(False)
    if config.train_text_encoder:
        attention, feed_forward = _TEXT_LAYERS
        of_text = [*attention, *(feed_forward if with_feed_forward else ())]
        layers |= dict.fromkeys(family.text_encoders, of_text)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for module, names in layers.items():
            peft_adapters.add(module, _adapter(config, names))
            for parameter in trained_parameters(module):
                parameter.data = parameter.data.float()
        if config.train_token:
            textual_inversion.add_token(
                family, config.subject.identifier, config.subject.class_noun
            )


def _adapter(config: TrainConfig, layers: list[str]) -> Any:
    """Return peft's config of the adapter for the layers whose names end so."""
    from peft import LoraConfig

    rank, alpha = config.lora_rank, config.lora_alpha
    if config.adapter is not None:
        settings = config.adapter_settings
        return peft_adapters.make_config(config.adapter, layers, rank, alpha, settings)
    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=config.lora_dropout,
        target_modules=layers,
        use_dora=config.dora,
    )


def trained_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that are trained: with LoRA, those of the adapters."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def rank_by_timestep(denoiser: torch.nn.Module, rank: int, least: int) -> Callable[..., None]:
    """Make a forward pre-hook of a ``Trainable`` that masks ranks by each sample's timestep.

    It trains floor((1 - t / 1000) (rank - least)) + least of the denoiser's ranks at timestep t
    (T-LoRA, arXiv 2507.05964, with alpha 1). Images are drawn with all of them.
    """
    mask = torch.ones(())

    def set_mask(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal mask
        share = 1 - arguments[1].float() / 1000
        ranks = torch.floor(share * (rank - least)) + least
        mask = torch.arange(rank, device=ranks.device) < ranks[:, None]  # [B, rank]

    def mask_ranks(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:  # drawing, or the frozen base
            return output
        is_conv = isinstance(module, torch.nn.Conv2d)
        shape = (-1, rank, 1, 1) if is_conv else (-1, *(1,) * (output.ndim - 2), rank)
        return output * mask.view(shape)

    for name, module in denoiser.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(mask_ranks)
    return set_mask


@contextmanager
def disabled_lora(family: Family) -> Iterator[None]:
    """Use the denoiser without its adapters, in eval mode.

    peft switches one layer after the other: an interrupt waits until all of them are.
    """
    training = family.denoiser.training
    try:
        with defer_interrupts():
            family.denoiser.disable_adapters()
            family.denoiser.eval()
        yield
    finally:
        with defer_interrupts():
            family.denoiser.enable_adapters()
            family.denoiser.train(training)


def exact_base(family: Family, config: TrainConfig) -> AbstractContextManager[None]:
    """Use the denoiser as the base has it, to measure the base before training.

    LoRA starts from it exactly; in half precision HRA and DEFT start up to 1% away.
    """
    return nullcontext() if config.adapter is None else disabled_lora(family)


def save_lora(family: Family, config: TrainConfig, folder: Path) -> None:
    """Save the adapters, with a file that names their base.

    A LoRA is saved for diffusers' ``load_lora_weights``, another adapter for peft's ``PeftModel``,
    and a new token's embeddings for ``load_textual_inversion``.
    """
    names = {id(part): name for name, part in family.pipeline.components.items()}
    modules = [family.denoiser, *(family.text_encoders if config.train_text_encoder else ())]
    adapted = {names[id(module)]: module for module in modules}
    if config.adapter is None:
        _save_for_diffusers(family, adapted, folder)
    for name, module in adapted.items() if config.adapter is not None else ():
        peft_adapters.save(module, folder / name)
    if config.train_token:
        textual_inversion.save_token(family, folder)
    loaded_by = ("base", "revision", "variant", "quantize", "prediction_type", "clip_skip")
    base = {name: getattr(config, name) for name in loaded_by}
    base["word"] = config.subject.identifier if config.train_token else None
    (folder / LORA_BASE_FILE).write_text(json.dumps(base, indent=2))


def _save_for_diffusers(family: Family, adapted: dict[str, torch.nn.Module], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    saved: dict[str, Any] = {}
    for name, module in adapted.items():
        weights = get_peft_model_state_dict(module, save_embedding_layers=False)
        # On a base without its weights, layers that no conditioning uses have no adapter to save.
        rename = clip_name if name.startswith("text_encoder") else str
        saved[f"{name}_lora_layers"] = {
            rename(key): weight for key, weight in weights.items() if not weight.is_meta
        }
        adapter = without_paths(module.peft_config["default"].to_dict())  # type: ignore[index, union-attr]
        saved[f"{name}_lora_adapter_metadata"] = adapter
    family.pipeline.save_lora_weights(folder, **saved)


def clip_name(name: str) -> str:
    """Return a CLIP text encoder's module or tensor by its usual name, with ``text_model.``.

    transformers leaves this prefix out from version 5.6 on where the model has no projection.
    Earlier versions and other programs ignore a LoRA's tensors without it.
    """
    bare = name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm."))
    return f"text_model.{name}" if bare else name
