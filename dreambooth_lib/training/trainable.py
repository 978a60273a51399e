"""Load a config's base, wrap what is trained of it as one module, and load checkpoints into it."""

from dataclasses import replace
from typing import Any

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import LOW_MEMORY
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.families import loading, textual_inversion
from dreambooth_lib.families.base import Cond, Family
from dreambooth_lib.training import lora
from dreambooth_lib.training.ema import ema_by_name
from dreambooth_lib.training.runs import Run, RunError

#: Fields by which a base is loaded, besides its name, revision and variant.
BASE_FIELDS = ("prediction_type", "resolution", "quantize", "prompt_chunks", "clip_skip")


def load_base(config: TrainConfig, dtype: torch.dtype = torch.float32, **more: Any) -> Family:
    """Load a config's base at its resolution, with all its weights in ``dtype``."""
    return load(config, dtype=dtype, trained=(), **more)


def load(config: TrainConfig, **options: Any) -> Family:
    """Load a config's base by its fields and by options of ``families.loading.load_model``."""
    options = _of_base(config) | options
    return loading.load_model(config.base, config.revision, config.variant, **options)


def load_meta(config: TrainConfig, **options: Any) -> Family:
    """Load as :func:`load`, but on the meta device, as ``families.loading.load_meta``."""
    return loading.load_meta(config.base, config.revision, **(_of_base(config) | options))


def _of_base(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in BASE_FIELDS}


def training_load_options(config: TrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return what to :func:`load` a base for training by: in ``dtype`` but for the trained weights.

    Raises :class:`ConfigError` where the family cannot compute in ``dtype``, or not with the
    weights that the memory level trains.
    """
    in_float16 = dtype is torch.float16
    if in_float16 and not _family_of(config).supports_dtype(dtype):
        raise ConfigError(
            f"'{config.base}' produces NaN in float16, which this GPU computes in; use a GPU "
            "with bfloat16, such as an L4 or A100, set mixed_precision to 'no' if memory "
            "allows, or choose another base."
        )
    bf16_weights = config.memory == "lowest" and config.method == "full"
    if bf16_weights and in_float16 and not _family_of(config).bf16_weights_ok:
        raise ConfigError(
            f"memory is 'lowest', which trains bfloat16 weights, and '{config.base}' cannot "
            "compute with them in float16; set memory to 'low', method to 'lora', or "
            "mixed_precision to 'bf16' where the GPU supports it."
        )
    trained = ["denoiser", *(["text_encoders"] if config.train_text_encoder else [])]
    return {
        "dtype": dtype,
        "trained": trained if config.method == "full" else (),
        "trained_dtype": torch.bfloat16 if config.memory == "lowest" else torch.float32,
    }


def precision_of_weights(config: TrainConfig, precision: str) -> str:
    """Return the ``precision`` that a run computes in: of bfloat16 weights, never "no"."""
    bf16_weights = config.method == "full" and config.memory == "lowest"
    return "bf16" if bf16_weights and precision == "no" else precision


def load_base_to_save(
    config: TrainConfig, family: Family, model: "Trainable", weights: dict[str, torch.Tensor]
) -> Family:
    """Load a config's base in float32 with trained ``weights``, which ``model`` has, too.

    These stay in bfloat16 if they were so trained, without EMA: EMA weights are float32, and a
    bfloat16 model has them rounded. Parts of ``family`` that were trained whole, in the dtype to
    save, are taken from it: the base's are not read for them.
    """
    load_options = training_load_options(config, torch.float32)
    if config.ema_decay is not None:
        load_options["trained_dtype"] = torch.float32
    loras = loading.resolve(config.base, config.revision, config.variant).loras
    if model.denoiser.dtype is load_options["trained_dtype"] and not loras:
        encoders = family.encoder_names if config.train_text_encoder else ()
        parts = {name: getattr(family.pipeline, name) for name in (family.denoiser_name, *encoders)}
        return load(config, **load_options, **parts)
    # LoRAs are merged into what is loaded.
    family = load(config, **load_options)
    wrap_trained_parts(family, config).load_weights(weights)
    return family


def drawing_config(config: TrainConfig) -> TrainConfig:
    """Return the config with ``draw_base`` as its base, if it has one."""
    if config.draw_base is None:
        return config
    # Its own replace would take the other base's guidance scale.
    return replace(config, base=config.draw_base, revision=None, variant=None, draw_base=None)


def load_drawing_family(config: TrainConfig, family: Family, dtype: torch.dtype) -> Family:
    """Load the config's ``draw_base`` with the adapters that ``family`` trains; else return it.

    Only its denoiser and scheduler are loaded; the adapters' weights are the same tensors, so that
    it always draws what they have learnt. Raises :class:`ConfigError` where they do not fit it.
    """
    if config.draw_base is None:
        return family
    own, shared = drawing_config(config), dict(family.pipeline.components)
    del shared[family.denoiser_name], shared["scheduler"]
    wrong = (
        f"the LoRA of '{config.base}' does not fit draw_base '{config.draw_base}'; choose a base "
        "that was distilled from it, or leave draw_base out."
    )
    if _family_of(own) is not type(family):
        raise ConfigError(wrong)
    options = training_load_options(own, dtype) | {"resolution": family.resolution}
    drawing = load(own, **options, **shared)
    drawing.prompt_cache, drawing.size = family.prompt_cache, family.size
    drawing.denoiser.add_adapter(family.denoiser.peft_config["default"])
    drawing.denoiser.requires_grad_(False)
    adapters = {n: p for n, p in family.denoiser.named_parameters() if p.requires_grad}
    its_own = dict(drawing.denoiser.named_parameters())
    for name, parameter in adapters.items():
        if name not in its_own or its_own[name].shape != parameter.shape:
            raise ConfigError(wrong)
        module, _, weight = name.rpartition(".")
        setattr(drawing.denoiser.get_submodule(module), weight, parameter)
    if config.quantize is None:  # else it is on the GPU already
        drawing.denoiser.to(family.denoiser.device)
    return drawing


def _family_of(config: TrainConfig) -> type[Family]:
    return loading.resolve(config.base, config.revision).family


def offloads_text_encoders(config: TrainConfig) -> bool:
    """Return whether the text encoders are offloaded once all prompts of the run are encoded."""
    saves_memory = config.memory in LOW_MEMORY or config.quantize is not None
    return saves_memory and not config.trains_text


class Trainable(torch.nn.Module):
    """Hold what is trained, as one module: the denoiser, and the text encoders if they are trained.

    Frozen parameters, such as the base's with LoRA, are not among its trained weights.
    """

    def __init__(self, family: Family, with_text: bool):
        super().__init__()
        self.denoiser = family.denoiser
        self.text_encoders = torch.nn.ModuleList(family.text_encoders if with_text else [])
        self._family = [family]  # in a list, so that its modules are not registered twice
        #: Those of the trained weights. ``requires_grad`` does not tell while adapters are off.
        self.trained_names: list[str] = []
        self.text_is_frozen = False  #: whether trained text encoders get no gradients any more

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond | None, prompts: list[str]
    ) -> torch.Tensor:
        (family,) = self._family
        if cond is None or self.text_encoders:  # trained ones encode the prompts at each step
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.text_is_frozen):
                cond = (cond or {}) | family.conditioning(prompts)
        return family.predict(x_t, t, cond)

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters by name."""
        own = dict(self.named_parameters())
        return {name: own[name] for name in self.trained_names}

    def text_parameters(self) -> list[torch.nn.Parameter]:
        """Return the trained parameters of the text encoders, and of a token in them."""
        return lora.trained_parameters(self.text_encoders)

    @torch.no_grad()
    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load :meth:`trained_weights`. Raises :class:`RunError` where names or shapes differ."""
        own = self.trained_weights()
        if weights.keys() != own.keys():
            raise RunError(
                f"the checkpoint has {len(weights)} weights, and the config trains {len(own)}; "
                "undo the change of its config.toml."
            )
        for name, value in weights.items():
            if value.shape != own[name].shape:
                raise RunError(
                    f"'{name}' has the shape {[*value.shape]} in the checkpoint, but "
                    f"{[*own[name].shape]} by its config.toml; undo the change there."
                )
        if any(own[name].is_meta for name in weights):  # a base whose weights were not loaded
            self.load_state_dict(weights, strict=False, assign=True)
        else:
            for name, value in weights.items():
                own[name].copy_(value)


def make_trainable(family: Family, config: TrainConfig) -> Trainable:
    """Prepare what a config trains of a family, and freeze everything else.

    Raises :class:`ConfigError` where the family's text encoders are to be trained but cannot be.
    """
    if config.trains_text and not family.text_encoders:
        field = "train_text_encoder" if config.train_text_encoder else "train_token"
        raise ConfigError(
            f"{field} is set, but the text encoder of '{config.base}' is too large to train; "
            f"leave {field} out."
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
    """Wrap what a config trains, with LoRA added: its trained weights are a checkpoint's."""
    trainable = Trainable(family, config.trains_text)
    if config.method == "lora":
        lora.add_lora(family, config)
        if config.lora_min_rank is not None:
            hook = lora.rank_by_timestep(family.denoiser, config.lora_rank, config.lora_min_rank)
            trainable.register_forward_pre_hook(hook)
    else:
        trainable.requires_grad_(True)
    for parameter in family.unused_parameters():
        parameter.requires_grad_(False)
    trainable.trained_names = [n for n, p in trainable.named_parameters() if p.requires_grad]
    return trainable


def load_at_checkpoint(
    run: Run, step: int, dtype: torch.dtype = torch.float32, **more: Any
) -> Family:
    """Load a checkpoint's model in ``dtype``, with the EMA weights if it has them.

    LoRA weights are merged into their base, unless that is quantized. Raises :class:`RunError`
    where the run has no checkpoint of that step.
    """
    config, family = run.config, load_base(drawing_config(run.config), dtype, **more)
    load_checkpoint_weights(wrap_trained_parts(family, config), run, step)
    if config.train_token:
        textual_inversion.merge_token(family)
    merge = config.method == "lora" and config.quantize is None
    return loading.merge_loras(family) if merge else family


def load_to_export(run: Run, step: int) -> Family:
    """Load a checkpoint for export: a model in half precision, or LoRA weights alone.

    Of a LoRA's base only the configs are read: its weights may not fit into memory, and are not
    exported.
    """
    config = run.config
    if config.method == "full":
        supports_fp16 = _family_of(config).supports_dtype(torch.float16)
        bf16_weights = run.resolved_config.memory == "lowest"
        fp16 = supports_fp16 and not bf16_weights
        family = load_base(config, torch.float16 if fp16 else torch.bfloat16)
    else:
        family = load_meta(config, **training_load_options(config, torch.float32))
    load_checkpoint_weights(wrap_trained_parts(family, config), run, step)
    return family


def load_checkpoint_weights(trainable: Trainable, run: Run, step: int) -> None:
    """Load a checkpoint's weights into ``trainable``; raise as :func:`checkpoint_weights` does."""
    trainable.load_weights(checkpoint_weights(run, step))


def checkpoint_weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Read a checkpoint's weights by name: the EMA weights if it has them.

    Raises :class:`RunError` where the run has no checkpoint of that step.
    """
    from dreambooth_lib.training.checkpoints import load_state

    checkpoints = run.checkpoints()
    if step not in checkpoints:
        available = ", ".join(map(str, checkpoints)) or "none"
        raise RunError(
            f"{run.folder} has no checkpoint of step {step}; it has {available}: choose one of "
            "those, or raise checkpoints_kept."
        )
    state = load_state(checkpoints[step], ("model", "ema"))
    return ema_by_name(state) if "ema" in state else state["model"]
