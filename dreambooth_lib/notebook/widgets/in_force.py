"""Tell which settings a run trains with, and since which step."""

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training.config_changes import flat_fields
from dreambooth_lib.training.runs import Run

#: What a config's ``prior`` is called in the panels.
PRIORS = {
    "generated": "class images",
    "distilled": "distillation from the base",
    "distilled_images": "distillation on class images",
}
_WORDS = {"full": "full fine-tuning", "lora": "LoRA", "none": "no prior preservation"} | PRIORS
#: What is shown of each field of a config; ``{}`` is its value.
_SHOWN = {
    "method": "{}",
    "lora_rank": "rank {}",
    "quantize": "base in {}",
    "prior": "{}",
    "prior_weight": "λ {}",
    "keep_class": "target class loss ratio {}",
    "learning_rate": "learning rate {}",
    "batch_size": "batch size {}",
    "steps": "{} steps",
}


def settings_in_force(run: Run) -> str:
    """Return the settings on one line, with the previous value of each that has changed."""
    changes: dict[str, list[tuple[int, object]]] = {}  # since which step, and what before
    for row in run.rows("changes"):
        fields = row.get("fields")
        for name, values in fields.items() if isinstance(fields, dict) else ():
            if isinstance(values, list) and len(values) == 2:
                known = changes.setdefault(name, [])
                if not (known and known[-1][0] == row["step"]):  # else no step had that value
                    known.append((row["step"], values[0]))
    parts, values = [], flat_fields(run.config)
    for name, words in _SHOWN.items():
        if not _matters(name, run.config):
            continue
        text = words.format(_value(name, values[name]))
        effective = [(step, old) for step, old in changes.get(name, []) if step]
        if effective and effective[-1][1] == values[name]:
            effective.pop()  # changed, and changed back before any step
        if effective:
            step, old = effective[-1]
            since = "" if name == "steps" else f" since step {step}"
            text += f"{since} (before: {_value(name, old)})"
        parts.append(text)
    return ", ".join(parts)


def _matters(name: str, config: TrainConfig) -> bool:
    """Return whether a field matters in this run."""
    if name == "lora_rank":
        return config.method == "lora"
    if name == "prior_weight":
        return config.keep_class is None
    return getattr(config, name) is not None


def _value(name: str, value: object) -> str:
    if name in ("method", "prior"):
        return _WORDS.get(str(value), str(value))
    if name == "keep_class" and isinstance(value, float):
        return f"{value:.0%}"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
