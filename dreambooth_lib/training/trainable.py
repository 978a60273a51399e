"""A config's base, what a run trains of it as one module, and a checkpoint's weights put back."""

from collections.abc import Iterable
from typing import Any

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import LOW_MEMORY, ConfigError
from dreambooth_lib.families import loading, textual_inversion
from dreambooth_lib.families.base import Cond, Family
from dreambooth_lib.training import lora
from dreambooth_lib.training.runs import Run, RunError


def load_base(
    config: TrainConfig, half: torch.dtype = torch.float32, **load_options: Any
) -> Family:
    """Load a config's base at its resolution, all in ``half`` if ``load_options`` says no more."""
    own = {"resolution": config.resolution, "half": half, "whole": (), "quantize": config.quantize}
    return loading.load_model(config.base, config.revision, config.variant, **(own | load_options))


def training_load_options(config: TrainConfig, half: torch.dtype) -> dict[str, Any]:
    """Say how a base is loaded to be trained: in ``half`` but for the weights that move.

    As ``families.load_model`` takes it. Raises :class:`ConfigError` where the family cannot compute
    in ``half``, or not with the weights that the level of memory keeps.
    """
    in_float16 = half is torch.float16
    if in_float16 and not _family_of(config).supports_dtype(half):
        raise ConfigError(
            f"'{config.base}' produces NaN in float16, which this GPU computes in; train it on one "
            "with bfloat16, such as an L4 or A100, set mixed_precision to 'no' where memory "
            "allows, or choose another base."
        )
    rounded = config.memory == "lowest" and config.method == "full"
    if rounded and in_float16 and not _family_of(config).bf16_weights_ok:
        raise ConfigError(
            f"memory is 'lowest', whose weights are bfloat16, and '{config.base}' cannot compute "
            "with them in float16; set memory to 'low', method to 'lora', or mixed_precision to "
            "'bf16' where the GPU has it."
        )
    moved = ["denoiser", *(["text_encoders"] if config.train_text_encoder else [])]
    return {
        "resolution": config.resolution,
        "half": half,
        "whole": moved if config.method == "full" else (),
        "master": torch.bfloat16 if config.memory == "lowest" else torch.float32,
        "quantize": config.quantize,
    }


def load_base_to_save(config: TrainConfig) -> Family:
    """Load a config's base to put tuned weights into: in float32, or in bfloat16 if so trained.

    An average of such weights is finer than these.
    """
    load_options = training_load_options(config, torch.float32)
    if config.ema_decay is not None:
        load_options["master"] = torch.float32
    return load_base(config, **load_options)


def _family_of(config: TrainConfig) -> type[Family]:
    return loading.resolve(config.base, config.revision).family


def offloads_text_encoders(config: TrainConfig) -> bool:
    """Return whether the text encoders make room for training once its prompts are encoded."""
    tight = config.memory in LOW_MEMORY or config.quantize is not None
    return tight and not config.trains_text


class Trainable(torch.nn.Module):
    """What is trained, as one module: the denoiser, and the text encoders where they train.

    Parameters that need no gradient, such as a base's under LoRA, are no part of its state.
    """

    def __init__(self, family: Family, with_text: bool):
        super().__init__()
        self.denoiser = family.denoiser
        self.text_encoders = torch.nn.ModuleList(family.text_encoders if with_text else [])
        self._family = [family]  # in a list, so that its modules are not registered twice

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond | None, prompts: list[str]
    ) -> torch.Tensor:
        (family,) = self._family
        if cond is None or self.text_encoders:  # those that train encode the prompts anew
            cond = family.conditioning(prompts)
        return family.predict(x_t, t, cond)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def put(self, state: dict[str, torch.Tensor]) -> None:
        """Load what :meth:`state` gave. Raises KeyError where the names differ.

        Parameters without effect may be there besides, as in runs from when they were trained.
        """
        own, trained = dict(self.named_parameters()), self.state().keys()
        if not trained <= state.keys() <= own.keys():
            raise KeyError(f"a state of {len(state)} tensors for {len(trained)} trained parameters")
        if any(own[name].is_meta for name in state):  # of a base without values
            self.load_state_dict(state, strict=False, assign=True)
        else:
            copy_weights(state.values(), (own[name] for name in state))


def make_trainable(family: Family, config: TrainConfig) -> Trainable:
    """Make what a config trains of a family ready for it; all else is frozen.

    Raises :class:`ConfigError` where text encoders are to train and the family's never do.
    """
    if config.trains_text and not family.text_encoders:
        asked = "train_text_encoder" if config.train_text_encoder else "train_token"
        raise ConfigError(
            f"{asked} is set but the text encoder of '{config.base}' is too large to be trained; "
            "leave it out."
        )
    for module in (family.denoiser, *family.text_encoders, *family.frozen):
        module.requires_grad_(False)
    for module in family.denoiser.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = config.dropout
    trainable = wrap_trained_parts(family, config).train()
    if config.gradient_checkpointing or config.memory in LOW_MEMORY:
        family.denoiser.enable_gradient_checkpointing()
        for encoder in family.text_encoders if config.trains_text else ():
            encoder.gradient_checkpointing_enable()
    return trainable


def wrap_trained_parts(family: Family, config: TrainConfig) -> Trainable:
    """Make the module whose :meth:`Trainable.state` a config's checkpoints hold, LoRA added."""
    trainable = Trainable(family, config.trains_text)
    if config.method == "lora":
        lora.add_lora(family, config)
    else:
        trainable.requires_grad_(True)
    for parameter in family.unused_parameters():
        parameter.requires_grad_(False)
    return trainable


def load_at_checkpoint(run: Run, step: int, half: torch.dtype = torch.float32) -> Family:
    """Load the family of a checkpoint, in ``half``, with the averaged weights if it has them.

    LoRA weights are merged into their base, so that it is plain models, unless that is quantized.

    Raises :class:`RunError` where the run has no checkpoint of that step.
    """
    config, family = run.config, load_base(run.config, half)
    load_checkpoint_weights(wrap_trained_parts(family, config), run, step)
    if config.train_token:
        textual_inversion.merge_token(family)
    merge = config.method == "lora" and config.quantize is None
    return loading.merge_loras(family) if merge else family


def load_to_export(run: Run, step: int) -> Family:
    """Load a checkpoint to be saved: a model in half precision, or LoRA weights alone.

    Of a LoRA's base only the configs are read, not the weights: they may be too many for the
    memory, and what is saved has none of them.
    """
    config = run.config
    if config.method == "full":
        fits = _family_of(config).supports_dtype(torch.float16)
        rounded = run.resolved_config.memory == "lowest"  # its weights are bfloat16 already
        family = load_base(config, torch.float16 if fits and not rounded else torch.bfloat16)
    else:
        load_options = training_load_options(config, torch.float32)
        family = loading.load_meta(config.base, config.revision, **load_options)
    load_checkpoint_weights(wrap_trained_parts(family, config), run, step)
    return family


def load_checkpoint_weights(trainable: Trainable, run: Run, step: int) -> None:
    """Load a checkpoint's weights into ``trainable``, as :func:`restored` does."""
    from dreambooth_lib.training.checkpoints import load_state

    found = run.checkpoints()
    if step not in found:
        have = ", ".join(map(str, found)) or "none"
        raise RunError(
            f"{run.folder} has no checkpoint of step {step}; it has {have}: choose one of those, "
            "or raise checkpoints_kept."
        )
    state = load_state(found[step], ("model", "ema"))
    if "ema" in state:
        state["model"] = dict(zip(state["model"], state["ema"]["shadow_params"], strict=True))
    trainable.load_weights(state["model"])


@torch.no_grad()
def copy_weights(source: Iterable[torch.Tensor], target: Iterable[Any]) -> None:
    for one, other in zip(source, target, strict=True):
        other.copy_(one)
