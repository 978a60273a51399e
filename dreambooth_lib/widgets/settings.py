"""A run's settings as sliders and menus, and as the Python that says the same."""

import html
from dataclasses import fields
from typing import Any

from ipywidgets import HTML, Button, Checkbox, Dropdown, FloatSlider, IntSlider

from dreambooth_lib import early_stopping, families
from dreambooth_lib.config import ConfigError, Subject, TrainConfig, base_defaults
from dreambooth_lib.pace import Pace, checkpoints, measure
from dreambooth_lib.widgets.parts import View, control, from_here, hinted
from dreambooth_lib.widgets.side_by_side import release
from dreambooth_lib.widgets.subject import SubjectPanel

_LOOKS = {5: "five"}.get(early_stopping.PATIENCE, early_stopping.PATIENCE)
_RATES = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 3e-3)
_QLORA = "qlora"  # of the menu alone: a LoRA with quantize
_SUITS = 0.0  # of the menu alone, which cannot show None: the method's own learning rate
HINTS = {
    "method": "LoRA takes less memory and gives a small file, on 4 bits for large bases on a GPU",
    "prior_weight": "raise λ when class pictures start to look like your subject; 0 turns the "
    "protection off; 1 suits most",
    "prior": "the base as teacher needs no class pictures, so it begins sooner",
    "steps": "raise it while the subject is not recognisable; lower it when prompts are ignored",
    "learning_rate": "lower it when pictures turn harsh or odd; raise it when nothing is learnt",
    "train_text_encoder": "the text encoder too: more likeness, memory and time; not on a T4",
    "resolution": "lower it when memory runs out; the base draws best at its own",
    "class_pictures": "more of them keep the class more varied; drawing them takes time",
    "early_stop": f"keep the best step's weights, and stop once {_LOOKS} looks in a row brought "
    "nothing better",
}


class SettingsPanel(View):
    """Sliders and menus over a config; ``config`` is the one they now say.

    Over a :class:`SubjectPanel` it has the subject that this one now says. Raises ``BaseError``
    where the base cannot be found, and as ``SubjectPanel.config`` does.
    """

    def __init__(self, given: TrainConfig | SubjectPanel):
        self._given, config = given, _config_of(given)
        self._own = families.outline(config.base, config.revision).resolution
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
        for one in self.controls.values():
            one.observe(self.callback(self._show), "value")
        if isinstance(given, SubjectPanel):
            for field in (given.source, given.class_noun, given.identifier):
                field.observe(self.callback(self._show), "value")
        self.predict.on_click(self.callback(self._measure))
        self._show()

    @property
    def config(self) -> TrainConfig:
        """The config that the controls say. Raises ``ConfigError`` where they contradict."""
        said = {name: one.value for name, one in self.controls.items()}
        if said["resolution"] == self._own:
            said["resolution"] = None
        said["learning_rate"] = said["learning_rate"] or None
        given, said["quantize"] = _config_of(self._given), None
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
        self.predict.disabled = True
        release()
        try:
            config = self.config
            self._measured = (_paced(config), measure(config), _memory(config))
        finally:
            self.predict.disabled = False
        self._show()


def _config_of(given: TrainConfig | SubjectPanel) -> TrainConfig:
    return given.config if isinstance(given, SubjectPanel) else given


def _paced(config: TrainConfig) -> TrainConfig:
    """A config without what its pace does not depend on."""
    return config.replace(steps=1, early_stop=False)


def python_of(config: TrainConfig, always: Any = ()) -> str:
    """Python that makes this config, after ``import dreambooth_lib as db``.

    Fields at their default are left out, save those in ``always``.
    """
    subject, plain = config.subject, TrainConfig(config.subject, config.base)
    words = _differing(subject, Subject(subject.pictures, subject.class_noun), ("class_noun",))
    pictures = repr(from_here(subject.pictures))
    lines = [f"    subject=db.Subject({', '.join([pictures, *words])}),",
             f"    base={config.base!r},"]  # fmt: skip
    lines += [f"    {text}," for text in _differing(config, plain, always)]
    return "\n".join(["config = db.TrainConfig(", *lines, ")"])


def _differing(given: Any, plain: Any, always: Any) -> list[str]:
    names = [field.name for field in fields(given)]
    return [
        f"{name}={getattr(given, name)!r}"
        for name in names
        if getattr(given, name) != getattr(plain, name)
        or (name in always and getattr(given, name) is not None)
    ]


def _controls(config: TrainConfig, own: int) -> dict[str, Any]:
    values = vars(config) | {"resolution": config.resolution or own}
    near = {own // 2, own * 3 // 4, own, own * 3 // 2, values["resolution"]}
    sizes = sorted(side for side in near if side % 8 == 0)
    sides = [(f"{side}, the base's own" if side == own else str(side), side) for side in sizes]
    own_rate = base_defaults(config.base, config.method)["learning_rate"]
    if values["learning_rate"] == own_rate:
        values["learning_rate"] = _SUITS
    rates = [("what suits the method", _SUITS)]
    rates += [(f"{rate:g}", rate) for rate in sorted({*_RATES, config.learning_rate})]
    pictures = max(400, config.class_pictures)
    texts = [("denoiser", False), ("denoiser and text encoder", True)]
    methods = [("the whole model", "full"), ("LoRA", "lora"), ("LoRA on 4 bits (QLoRA)", _QLORA)]
    if config.quantize is not None:
        values["method"] = _QLORA
    priors = [("class pictures", "generated"), ("the base as teacher", "distilled")]
    values["prior"] = "generated" if config.prior == "none" else config.prior
    made: dict[str, tuple[type, str, dict[str, Any]]] = {
        "method": (Dropdown, "method", {"options": methods}),
        "prior_weight": (FloatSlider, "λ, prior weight", {"max": max(3, config.prior_weight)}),
        "prior": (Dropdown, "class kept by", {"options": priors}),
        "steps": (IntSlider, "training steps", {"min": 1, "max": max(2000, config.steps)}),
        "learning_rate": (Dropdown, "learning rate", {"options": rates}),
        "train_text_encoder": (Dropdown, "what is trained", {"options": texts}),
        "resolution": (Dropdown, "resolution", {"options": sides}),
        "class_pictures": (IntSlider, "class pictures", {"max": pictures}),
        "early_stop": (Checkbox, "stop early", {}),
    }
    return {
        name: control(kind, label, value=values[name], **traits)
        for name, (kind, label, traits) in made.items()
    }


def _memory(config: TrainConfig) -> str:
    """Say what a new run takes of the GPU, by the base's configs; nothing without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return ""
    from dreambooth_lib import levels, memory
    from dreambooth_lib.estimate import GIB, estimate

    device = torch.device("cuda")
    config = levels.fresh(config, device)
    need = estimate(config, levels.native_precision(config.mixed_precision, device)).memory
    _, total = memory.gpu_bytes(device)
    return (
        f" It takes about <b>{need / GIB:.1f} GiB</b> of the GPU's {total / GIB:.1f}, at memory "
        f"level '{config.memory}'."
    )


def _time(config: TrainConfig, pace: Pace, memory: str) -> str:
    minutes = pace.seconds(config) / 60
    looks = f", looks of {pace.look:.1f} s every {config.watch_every}" if pace.look else ""
    saves = f"{checkpoints(config)} checkpoints of {pace.checkpoint:.1f} s"
    return (
        f"Training takes about <b>{max(1, round(minutes))} min</b> on this machine: {config.steps} "
        f"updates of {pace.update:.2f} s{looks} and {saves}, as measured. Class pictures come on "
        f"top.{memory}"
    )
