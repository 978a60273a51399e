"""Write how an image was generated into its PNG, in the form that A1111 and others read."""

from PIL.PngImagePlugin import PngInfo

#: A1111's names of samplers, by the class of diffusers' schedulers.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "FlowMatchEulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


def sampler_name(scheduler: object) -> str:
    """Return A1111's name for a diffusers scheduler, or its class name if A1111 has none."""
    name = type(scheduler).__name__
    return _SAMPLERS.get(name, name)


def generation_text(
    prompt: str,
    negative_prompt: str,
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
    size: tuple[int, int],
    sampler: str,
    model: str,
) -> str:
    """Return the prompts and, on the last line, the settings, as A1111 writes them.

    ``size`` is (width, height) in pixels. Line breaks in the prompts become spaces, and commas and
    colons in the model's name are left out: they separate settings.
    """
    lines = [" ".join(prompt.split())]
    if negative_prompt.strip():
        lines.append(f"Negative prompt: {' '.join(negative_prompt.split())}")
    settings = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": f"{guidance_scale:g}",
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": " ".join(model.replace(",", "").replace(":", "").split()),
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def png_info(text: str) -> PngInfo:
    """Return this text as a PNG chunk named "parameters", for ``pnginfo`` of Pillow's ``save``."""
    info = PngInfo()
    info.add_text("parameters", text)
    return info
