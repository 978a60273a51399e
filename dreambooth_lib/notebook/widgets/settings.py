"""Change a run's settings with sliders and menus, and show them as Python code."""

import html
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import torch
from ipywidgets import (
    HTML,
    Button,
    Checkbox,
    Dropdown,
    FloatSlider,
    HBox,
    IntSlider,
    IntText,
    SelectionSlider,
)

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig, base_defaults
from dreambooth_lib.core.config_checks import ADAPTERS, PRIOR_WEIGHTS
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.user_text import short_path
from dreambooth_lib.families import loading
from dreambooth_lib.notebook.timing import Pace, checkpoints, in_words, measure
from dreambooth_lib.notebook.widgets.in_force import PRIORS
from dreambooth_lib.notebook.widgets.loaded_models import release_models
from dreambooth_lib.notebook.widgets.parts import Panel, busy, control, with_hints
from dreambooth_lib.notebook.widgets.subject import SubjectPanel
from dreambooth_lib.training import early_stopping, memory_level, native_precision
from dreambooth_lib.training.memory_estimate import GIB, estimate
from dreambooth_lib.training.validation_pace import count_validations

_PATIENCE = {5: "five"}.get(early_stopping.PATIENCE, early_stopping.PATIENCE)
_RATES = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 3e-3)
_QLORA = "qlora"  # in the menu only: a LoRA with quantize
_MAIN = ("method", "prior_weight", "steps")  #: shown at first; the others by a switch
_AS_WEIGHTED = 0.0  # on the slider only, which cannot show None: λ does not set itself
# In the menus only, which cannot show None: the method's own learning rate, and its own prior.
_DEFAULT_RATE, _DEFAULT_PRIOR = 0.0, ""
HINTS = {
    "method": "a LoRA needs less memory and saves a small file; QLoRA fits large bases on a GPU",
    "adapter": "LoRA suits most subjects, and other programs load it; only peft loads the others",
    "prior_weight": "raise it if images of the class start to look like your subject; 1 suits "
    "most subjects; 0 turns prior preservation off",
    "keep_class": "adjusts λ so that the base model's loss on held-out class images is about this "
    "percentage of the trained model's; lower it for more likeness",
    "prior": "what preserves the class; a LoRA's default also preserves other prompts",
    "steps": "raise it if the subject is not recognisable; lower it if images ignore the prompt",
    "learning_rate": "lower it if images look harsh or odd; raise it if the model learns nothing",
    "train_text_encoder": "training the text encoder too improves likeness, but takes more memory "
    "and time; text_encoder_steps (in Python) stops it early",
    "resolution": "lower it if memory runs out; images are best at the base's native resolution",
    "class_images": "with more of them the class stays more varied, but generating them takes time",
    "early_stop": f"keep the best step's weights, and stop after {_PATIENCE} validations without "
    "improvement",
}


class SettingsPanel(Panel):
    """Sliders and menus for a config; ``config`` has their current values.

    For a :class:`SubjectPanel`, the config has the subject that the panel shows. Raises
    ``BaseError`` if the base cannot be found, and as ``SubjectPanel.config`` does.
    """

    def __init__(self, source: TrainConfig | SubjectPanel):
        self._source = source
        config = self._source_config
        self._native = loading.inspect_base(config.base, config.revision).resolution
        self.controls = _controls(config, self._native)
        self.predict = Button(description="Estimate the training time")
        self.reset = Button(description="Reset to the initial settings")
        self.reset.layout.width = "auto"
        self.all = Checkbox(description="Show all settings", indent=False, value=False)
        self.all.layout.width = "auto"
        self.time, self.python = HTML(), HTML()
        self._more = with_hints({c: HINTS[n] for n, c in self.controls.items() if n not in _MAIN})
        super().__init__(
            with_hints({self.controls[name]: HINTS[name] for name in _MAIN}),
            HBox([self.all, self.reset]),
            self._more,
            with_hints({self.predict: "train for a few steps to measure how long a run takes"}),
            self.time,
            self.python,
        )
        self._first = {name: c.value for name, c in self.controls.items()}
        self._show_more()
        self._measured: tuple[TrainConfig, Pace, str] | None = None
        self.on_change(self._show, *self.controls.values())
        if isinstance(source, SubjectPanel):
            words, framing = (source.source, source.class_noun, source.identifier), source.framing
            framed = (source.hold_out, framing.crop, framing.weight, framing.base)
            self.on_change(self._show, *words, *framed, source.title, source.note)
        self.predict.on_click(self.callback(self._measure))
        self.reset.on_click(self.callback(self._reset))
        self.on_change(self._show_more, self.all)
        self._show()

    @property
    def config(self) -> TrainConfig:
        """Return the config of the controls.

        Raises ``ConfigError`` if they contradict, or if this GPU cannot train the adapter.
        """
        config, values = self._source_config, {n: c.value for n, c in self.controls.items()}
        # Menus show neither prior "none" nor whether the resolution was set.
        moved = {name for name, value in values.items() if value != self._first[name]}
        own = {self._native: None, self._first["resolution"]: config.resolution}
        values["resolution"] = own.get(values["resolution"], values["resolution"])
        values |= {name: values[name] or None for name in ("learning_rate", "keep_class")}
        if not moved & {"method", "prior", "prior_weight", "keep_class"}:
            del values["prior"]
        elif values["prior"] == _DEFAULT_PRIOR:
            values |= {"prior": None, "prior_prompts": None}
        if values["keep_class"]:  # λ then adapts, from the config's or else from 1
            (low, high), start = PRIOR_WEIGHTS, config.prior_weight
            values["prior_weight"] = start if low <= start <= high else 1.0
        values["quantize"] = None
        if values["method"] == _QLORA:
            values |= {"method": "lora", "quantize": config.quantize or "nf4"}
        if values["method"] == "full" or values["quantize"]:
            values["adapter"] = None
        if values["adapter"] != config.adapter:
            values["adapter_settings"] = None
        config = config.replace(**values)
        if torch.cuda.is_available():
            memory_level.check_adapter(config.adapter, _precision(config))
        return config

    def is_for(self, subject: SubjectPanel) -> bool:
        """Return whether these are the settings of the subject that a panel shows."""
        return self._source is subject

    def check(self, subject: SubjectPanel | None = None) -> None:
        """Raise the first error shown, if any.

        Raises ``ConfigError`` if these are the settings of another panel than ``subject``.
        """
        super().check()
        if subject is not None and not self.is_for(subject):
            raise ConfigError(
                "the settings of section 3 are not for the photos of section 2; run the cell of "
                "section 3 again."
            )

    @property
    def _source_config(self) -> TrainConfig:
        return self._source.config if isinstance(self._source, SubjectPanel) else self._source

    def _show_more(self) -> None:
        self._more.layout.display = "" if self.all.value else "none"

    def _reset(self) -> None:
        for name, value in self._first.items():
            self.controls[name].value = value

    def _show(self) -> None:
        self.controls["adapter"].disabled = self.controls["method"].value != "lora"
        self.controls["prior_weight"].disabled = self.controls["keep_class"].value != _AS_WEIGHTED
        self.python.value = self.time.value = ""  # nothing stale beside an error
        config = self.config
        shown = HINTS.keys() - ({"prior_weight"} if config.keep_class else set())
        code = html.escape(python_of(config, shown))
        self.python.value = f'The same in Python:<pre style="line-height: 1.3">{code}</pre>'
        if isinstance(self._source, SubjectPanel):
            self._source.crop_to(config.resolution or self._native)
        self.clear_errors(self._measure)  # other settings may work
        if self._measured and self._measured[0] != _without_length(config):
            self._measured = None
        if self._measured:
            self.time.value = _time(config, *self._measured[1:])

    def _measure(self) -> None:
        with busy(self.predict):
            release_models()
            config = self.config
            self.time.value = "Training for a few steps to measure their time…"
            try:
                self._measured = (_without_length(config), measure(config), _memory(config))
            finally:
                self.time.value = ""
        self._show()


def _without_length(config: TrainConfig) -> TrainConfig:
    """Return a config without what the pace of training does not depend on."""
    return config.replace(steps=1, early_stop=False)


def python_of(config: TrainConfig, always: Collection[str] = ()) -> str:
    """Return Python code that makes this config, after ``import dreambooth_lib as db``.

    Leaves out fields at their default, except those in ``always``.
    """
    subject, default = (
        config.subject,
        TrainConfig(config.subject, config.base, method=config.method),
    )
    if config.validation_share is None:  # as an interval that is set has none
        default = default.replace(validate_every=default.validate_every)
        always = {*always, "validate_every"}
    named = _keywords(subject, Subject(subject.photos, subject.class_noun), ("class_noun",))
    lines = [
        f"subject=db.Subject({', '.join([repr(short_path(subject.photos)), *named])})",
        f"base={config.base!r}",
        *_keywords(config, default, always),
    ]
    return "\n".join(["config = db.TrainConfig(", *(f"    {line}," for line in lines), ")"])


def _keywords(config: Any, default: Any, always: Collection[str]) -> list[str]:
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return [
        f"{name}={value!r}"
        for name, value in values.items()
        if value != getattr(default, name) or (name in always and value is not None)
    ]


def _controls(config: TrainConfig, native: int) -> dict[str, Any]:
    own_rate = base_defaults(config.base, config.method)["learning_rate"]
    method = config.method if config.quantize is None else _QLORA
    own = TrainConfig(config.subject, config.base, method=config.method)
    is_own = (config.prior, config.prior_prompts) == (own.prior, own.prior_prompts)
    prior = _DEFAULT_PRIOR if is_own or config.prior == "none" else config.prior
    rate = _DEFAULT_RATE if config.learning_rate == own_rate else config.learning_rate
    side = config.resolution or native
    methods = {"full fine-tuning": "full", "LoRA": "lora", "QLoRA (4-bit base)": _QLORA}
    priors = {"the method's default": _DEFAULT_PRIOR}
    priors |= {words: value for value, words in PRIORS.items()}
    rates = {f"{rate:g}": rate for rate in sorted({*_RATES, config.learning_rate})}
    rates = {"the method's default": _DEFAULT_RATE} | rates
    sides = sorted({native // 2, native * 3 // 4, native, native * 3 // 2, side})
    sizes = {f"{side}, the base's own" if side == native else str(side): side
             for side in sides if side % 8 == 0}  # fmt: skip
    shares = sorted({0.8, 0.85, 0.9, 0.95, 0.98, config.keep_class or 0.95})
    kept = {"off, λ is fixed": _AS_WEIGHTED} | {f"{100 * share:g}%": share for share in shares}
    trained = {"denoiser": False, "denoiser and text encoder": True}

    def menu(label: str, options: dict[str, Any], value: Any) -> Any:
        return control(Dropdown, label, options=list(options.items()), value=value)

    def slider(kind: type, label: str, value: Any, low: int, high: float) -> Any:
        return control(kind, label, value=value, min=low, max=max(high, value))

    return {
        "method": menu("method", methods, method),
        "adapter": menu(
            "adapter", {"LoRA": None} | {name: name for name in ADAPTERS}, config.adapter
        ),
        "prior_weight": slider(FloatSlider, "λ, prior weight", config.prior_weight, 0, 3),
        "keep_class": control(
            SelectionSlider,
            "adaptive λ",
            options=list(kept.items()),
            value=config.keep_class or _AS_WEIGHTED,
        ),
        "prior": menu("prior preservation", priors, prior),
        "steps": control(IntText, "training steps", value=config.steps, step=50),
        "learning_rate": menu("learning rate", rates, rate),
        "train_text_encoder": menu("trained parts", trained, config.train_text_encoder),
        "resolution": menu("resolution", sizes, side),
        "class_images": slider(IntSlider, "class images", config.class_images, 0, 400),
        "early_stop": control(Checkbox, "stop early", value=config.early_stop),
    }


def _precision(config: TrainConfig) -> str:
    """Return what the GPU computes in, or would for this config."""
    return native_precision.native_precision(config.mixed_precision, torch.device("cuda"))


def _memory(config: TrainConfig) -> str:
    """Return a sentence on the GPU memory of a new run; empty without a GPU."""
    if not torch.cuda.is_available():
        return ""
    device = torch.device("cuda")
    config = memory_level.resolve_memory(config, device)
    need = estimate(config, _precision(config)).memory
    _, total = gpu_memory.gpu_bytes(device)
    return (
        f" It needs about <b>{need / GIB:.1f} GiB</b> of the GPU's {total / GIB:.1f}, at memory "
        f"level '{config.memory}'."
    )


def _time(config: TrainConfig, pace: Pace, memory: str) -> str:
    extra = ""
    if pace.validation:
        count = count_validations(config, pace.step, pace.validation)
        extra = f", {count} validations of {pace.validation:.1f} s"
    return (
        f"Training takes <b>{in_words(pace.seconds(config))}</b> on this machine, as measured: "
        f"{config.steps} steps of {pace.step:.2f} s{extra} and {checkpoints(config)} checkpoints "
        f"of {pace.checkpoint:.1f} s.{pace.describe_class_images(config)}{memory}"
    )
