"""A run's settings as sliders and menus, and as the Python that says the same."""

import html
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import torch
from ipywidgets import HTML, Button, Checkbox, Dropdown, FloatSlider, IntSlider

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import Subject, TrainConfig, base_defaults
from dreambooth_lib.core.config_checks import ConfigError
from dreambooth_lib.families import loading
from dreambooth_lib.notebook.timing import Pace, checkpoints, measure
from dreambooth_lib.notebook.widgets.parts import Panel, busy, control, from_here, hinted
from dreambooth_lib.notebook.widgets.playground import release
from dreambooth_lib.notebook.widgets.subject import SubjectPanel
from dreambooth_lib.training import early_stopping, memory_level
from dreambooth_lib.training.memory_estimate import GIB, estimate

_LOOKS = {5: "five"}.get(early_stopping.PATIENCE, early_stopping.PATIENCE)
_RATES = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 3e-3)
_QLORA = "qlora"  # of the menu alone: a LoRA with quantize
_SUITS = 0.0  # of the menu alone, which cannot show None: the method's own learning rate
HINTS = {
    "method": "LoRA takes less memory and gives a small file, on 4 bits for large bases on a GPU",
    "prior_weight": "raise λ when class images start to look like your subject; 0 turns the "
    "protection off; 1 suits most",
    "prior": "the base as teacher needs no class images, so it begins sooner",
    "steps": "raise it while the subject is not recognisable; lower it when prompts are ignored",
    "learning_rate": "lower it when pictures turn harsh or odd; raise it when nothing is learnt",
    "train_text_encoder": "the text encoder too: more likeness, memory and time; not on a T4",
    "resolution": "lower it when memory runs out; the base draws best at its own",
    "class_images": "more of them keep the class more varied; drawing them takes time",
    "early_stop": f"keep the best step's weights, and stop once {_LOOKS} looks in a row brought "
    "nothing better",
}


class SettingsPanel(Panel):
    """Sliders and menus over a config; ``config`` is the one they now say.

    Over a :class:`SubjectPanel` it has the subject that this one now says. Raises ``BaseError``
    where the base cannot be found, and as ``SubjectPanel.config`` does.
    """

    def __init__(self, given: TrainConfig | SubjectPanel):
        self._given = given
        config = self._config_given
        self._own = loading.inspect_base(config.base, config.revision).resolution
        self.controls = _controls(config, self._own)
        self.predict = Button(description="Predict the time")
        self.time, self.python = HTML(), HTML()
        super().__init__(
            hinted({self.controls[name]: hint for name, hint in HINTS.items()}),
            hinted({self.predict: "train for a moment on this machine to learn how long it takes"}),
            self.time,
            self.python,
        )
        self._measured: tuple[TrainConfig, Pace, str] | None = None
        self.on_change(self._show, *self.controls.values())
        if isinstance(given, SubjectPanel):
            self.on_change(self._show, given.source, given.class_noun, given.identifier)
        self.predict.on_click(self.callback(self._measure))
        self._show()

    @property
    def config(self) -> TrainConfig:
        """The config that the controls say. Raises ``ConfigError`` where they contradict."""
        given, said = self._config_given, {n: one.value for n, one in self.controls.items()}
        said["resolution"] = None if said["resolution"] == self._own else said["resolution"]
        said["learning_rate"] = said["learning_rate"] or None
        said["quantize"] = None
        if said["method"] == _QLORA:
            said |= {"method": "lora", "quantize": given.quantize or "nf4"}
        return given.replace(**said)

    def check(self, subject: SubjectPanel | None = None) -> None:
        """Raise the first error that stands; with the panel that is shown, if they have another's.

        That is a ``ConfigError``: what the sliders say is not for the pictures that are shown.
        """
        super().check()
        if subject is not None and subject is not self._given:
            raise ConfigError(
                "the settings of step 3 are not for the pictures that step 2 shows; run the cell "
                "of step 3 again."
            )

    @property
    def _config_given(self) -> TrainConfig:
        given = self._given
        return given.config if isinstance(given, SubjectPanel) else given

    def _show(self) -> None:
        config = self.config
        code = html.escape(python_of(config, HINTS))
        self.python.value = f'The same in Python:<pre style="line-height: 1.3">{code}</pre>'
        if isinstance(self._given, SubjectPanel):
            self._given.crop_to(config.resolution or self._own)
        self.mend(self._measure)  # it may go well with other settings
        if self._measured and self._measured[0] != _paced(config):
            self._measured = None
        self.time.value = _time(config, *self._measured[1:]) if self._measured else ""

    def _measure(self) -> None:
        with busy(self.predict):
            release()
            config = self.config
            self._measured = (_paced(config), measure(config), _memory(config))
        self._show()


def _paced(config: TrainConfig) -> TrainConfig:
    """Return a config without what its pace does not depend on."""
    return config.replace(steps=1, early_stop=False)


def python_of(config: TrainConfig, always: Collection[str] = ()) -> str:
    """Return Python that makes this config, after ``import dreambooth_lib as db``.

    Fields at their default are left out, save those in ``always``.
    """
    subject, plain = config.subject, TrainConfig(config.subject, config.base)
    words = _differing(subject, Subject(subject.pictures, subject.class_noun), ("class_noun",))
    lines = [
        f"subject=db.Subject({', '.join([repr(from_here(subject.pictures)), *words])})",
        f"base={config.base!r}",
        *_differing(config, plain, always),
    ]
    return "\n".join(["config = db.TrainConfig(", *(f"    {line}," for line in lines), ")"])


def _differing(given: Any, plain: Any, always: Collection[str]) -> list[str]:
    values = {field.name: getattr(given, field.name) for field in fields(given)}
    return [
        f"{name}={value!r}"
        for name, value in values.items()
        if value != getattr(plain, name) or (name in always and value is not None)
    ]


def _controls(config: TrainConfig, own: int) -> dict[str, Any]:
    own_rate = base_defaults(config.base, config.method)["learning_rate"]
    method = config.method if config.quantize is None else _QLORA
    prior = "generated" if config.prior == "none" else config.prior
    rate = _SUITS if config.learning_rate == own_rate else config.learning_rate
    side = config.resolution or own
    methods = {"the whole model": "full", "LoRA": "lora", "LoRA on 4 bits (QLoRA)": _QLORA}
    priors = {"class images": "generated", "the base as teacher": "distilled"}
    rates = {f"{one:g}": one for one in sorted({*_RATES, config.learning_rate})}
    rates = {"what suits the method": _SUITS} | rates
    sizes = sorted({own // 2, own * 3 // 4, own, own * 3 // 2, side})
    sides = {f"{one}, the base's own" if one == own else str(one): one for one in sizes
             if one % 8 == 0}  # fmt: skip
    trained = {"denoiser": False, "denoiser and text encoder": True}

    def menu(label: str, options: dict[str, Any], value: Any) -> Any:
        return control(Dropdown, label, options=list(options.items()), value=value)

    def slider(kind: type, label: str, value: Any, least: int, most: float) -> Any:
        return control(kind, label, value=value, min=least, max=max(most, value))

    return {
        "method": menu("method", methods, method),
        "prior_weight": slider(FloatSlider, "λ, prior weight", config.prior_weight, 0, 3),
        "prior": menu("class kept by", priors, prior),
        "steps": slider(IntSlider, "training steps", config.steps, 1, 2000),
        "learning_rate": menu("learning rate", rates, rate),
        "train_text_encoder": menu("what is trained", trained, config.train_text_encoder),
        "resolution": menu("resolution", sides, side),
        "class_images": slider(IntSlider, "class images", config.class_images, 0, 400),
        "early_stop": control(Checkbox, "stop early", value=config.early_stop),
    }


def _memory(config: TrainConfig) -> str:
    """Say what a new run takes of the GPU, by the base's configs; without one nothing."""
    if not torch.cuda.is_available():
        return ""
    device = torch.device("cuda")
    config = memory_level.resolve_memory(config, device)
    need = estimate(config, memory_level.native_precision(config.mixed_precision, device)).memory
    _, total = gpu_memory.gpu_bytes(device)
    return (
        f" It takes about <b>{need / GIB:.1f} GiB</b> of the GPU's {total / GIB:.1f}, at memory "
        f"level '{config.memory}'."
    )


def _time(config: TrainConfig, pace: Pace, taken: str) -> str:
    minutes = pace.seconds(config) / 60
    looks = (
        f", looks of {pace.validation:.1f} s every {config.validate_every}"
        if pace.validation
        else ""
    )
    saves = f"{checkpoints(config)} checkpoints of {pace.checkpoint:.1f} s"
    return (
        f"Training takes about <b>{max(1, round(minutes))} min</b> on this machine: {config.steps} "
        f"updates of {pace.step:.2f} s{looks} and {saves}, as measured. Class images come on "
        f"top.{taken}"
    )
