"""How few steps of a fast sampler draw the class as 50 of the base's own do: a table of KID.

``python -m tools.samplers --out outputs/samplers``. On the bundled base, which draws a picture in a
second. KID is that of the embedded CLIP's embeddings, the mean of several class prompts; the other
sets have the seeds of none of the reference. Pictures of one distribution have a KID of about 0;
``noise`` is what 95% of random halves of the base's own pictures stay below. ``alike`` is the mean
cosine of two pictures of one seed, by the sampler and by 50 steps of the base's own. The bundled
base draws little fine detail, so a second table, which is exact, shows what becomes of that.

An interrupted study resumes.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler

from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.tensor_cache import read_tensors, write_tensors
from dreambooth_lib.evaluation import tables
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.noise_schedule import DiscreteNoise
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.metrics.kid_and_lpips import kid
from dreambooth_lib.training.validation import TOYBOX_SCORER

PROMPTS = ("a dog", "a teapot", "a car", "a turtle")
BATCH = 16
STEPS, FAST_STEPS = 50, (10, 12, 15, 18, 20)
#: Guidance, and how the base's scheduler spaces timesteps: as toybox's does, or as Stable
#: Diffusion 1.x's and XL's do.
BLOCKS = ((3.25, "trailing"), (1.0, "trailing"), (7.5, "leading"))
#: How DPM-Solver++ spaces its steps: by timesteps, as the base does, or by the noise.
SIGMAS = {"": {}, "Karras": {"use_karras_sigmas": True}, "log-SNR": {"use_lu_lambdas": True}}
#: Of what the samplers draw in the exact table.
DEVIATIONS = (0.1, 0.2, 0.3, 0.5, 1.0)
SPLITS = 1000  # of the base's own pictures, for the noise


class Sampler(NamedTuple):
    """A way to draw a set: ``sigmas`` are DPM-Solver++'s, None for the base's own sampler."""

    name: str
    steps: int
    sigmas: str | None = None
    first_seed: int = 10_000


def samplers() -> Iterator[Sampler]:
    """Yield the reference, the base's own sampler on other seeds, and the fast one."""
    yield Sampler("reference", STEPS, first_seed=0)
    yield Sampler("own", STEPS)
    yield Sampler("own", STEPS // 2)
    for steps in FAST_STEPS:
        for name in SIGMAS:
            yield Sampler(f"DPM-Solver++ 2M {name}".strip(), steps, name)


class Study:
    """Draws sets and embeds them, each once."""

    def __init__(self, out: Path, count: int):
        self.out, self.count = out, count
        self.family, self.encoder = loading.load_model("toybox"), Encoder(TOYBOX_SCORER)
        self.scheduler = self.family.pipeline.scheduler

    def embeddings(self, sampler: Sampler, guidance: float, spacing: str) -> torch.Tensor:
        """Return a set's embeddings [prompts, count, D]; draw it if it is not there."""
        how = f"{sampler.name}-{sampler.steps}-{guidance:g}-{spacing}-{self.count}"
        file = self.out / f"{how.replace(' ', '_')}.safetensors"
        if (found := read_tensors(file, ("embeddings",))) is None:
            pipeline = self.family.pipeline
            pipeline.scheduler = scheduler_for(self.scheduler, sampler.sigmas, spacing)
            seeds = range(sampler.first_seed, sampler.first_seed + self.count)
            drawn = [self.encoder.embed_images(draw(self.family, prompt, seeds, sampler.steps,
                                                    guidance)) for prompt in PROMPTS]  # fmt: skip
            found = {"embeddings": torch.stack(drawn)}
            write_tensors(file, found)
            print(how, flush=True)
        return found["embeddings"]

    def column(self, guidance: float, spacing: str) -> list[str]:
        """Return the table's column of one block: the noise, and each sampler's KID (alike)."""
        sets = {s: self.embeddings(s, guidance, spacing) for s in samplers()}
        (reference, own), others = list(sets)[:2], list(sets)[1:]
        cells = [f"{noise(torch.cat([sets[reference], sets[own]], 1)):.4f}"]
        for sampler in others:
            distance = mean_kid(sets[sampler], sets[reference])
            alike = float((sets[sampler] * sets[own]).sum(-1).mean())
            cells.append(f"{distance:.4f} ({alike:.3f})")
        return cells


def scheduler_for(own: Any, sigmas: str | None, spacing: str) -> Any:
    if sigmas is None:
        return type(own).from_config(own.config, timestep_spacing=spacing)
    changes: dict[str, Any] = {"timestep_spacing": spacing} | SIGMAS[sigmas]
    return DPMSolverMultistepScheduler.from_config(own.config, **changes)


def draw(family: Family, prompt: str, seeds: range, steps: int, guidance: float) -> list[Any]:
    pairs = [(prompt, seed) for seed in seeds]
    batches = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    return [image for batch in batches for image in family.generate(batch, steps, guidance)]


def mean_kid(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the mean over the prompts of KID between two sets [prompts, count, D]."""
    return fmean(kid(a, b) for a, b in zip(first, second, strict=True))


def noise(pooled: torch.Tensor) -> float:
    """Return what 95% of random halves of a set [prompts, 2 count, D] stay below."""
    generator, half = torch.Generator().manual_seed(0), pooled.shape[1] // 2
    found = []
    for _ in range(SPLITS):
        order = torch.rand(pooled.shape[:2], generator=generator).argsort(1)
        mixed = torch.take_along_dim(pooled, order[..., None], 1)
        found.append(mean_kid(mixed[:, :half], mixed[:, half:]))
    return float(np.quantile(found, 0.95))


def amplitude(scheduler: Any, steps: int, std: float) -> float:
    """Return the share of its amplitude with which a sampler draws what varies by ``std``.

    Exact, for normal data: the best prediction of their noise is linear in x. Fine detail varies
    less than the whole of an image, whose latents vary by about 1. 1 is right.
    """
    scheduler.set_timesteps(steps)
    noise = DiscreteNoise.of_scheduler(scheduler)
    x = torch.full([1, 1, 1, 1], float(scheduler.init_noise_sigma), dtype=torch.float64)
    for t in scheduler.timesteps:
        abar = noise.alphas_cumprod.double()[int(t)]
        scaled = scheduler.scale_model_input(x, t)
        variance = abar * std**2 + 1 - abar
        epsilon, x_0 = (
            (1 - abar).sqrt() * scaled / variance,
            abar.sqrt() * std**2 * scaled / variance,
        )
        v = abar.sqrt() * epsilon - (1 - abar).sqrt() * x_0
        predicted = epsilon if noise.prediction_type == "epsilon" else v
        x = scheduler.step(predicted, t, x).prev_sample
    return float(x) / std


def amplitudes() -> Iterator[list[str]]:
    """Yield a table's rows: samplers on Stable Diffusion 1.5's noise."""
    own = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                        skip_prk_steps=True, steps_offset=1)  # fmt: skip
    ways = [(own, "PNDM, its own", steps) for steps in (STEPS, STEPS // 2)]
    for name in SIGMAS:
        fast = scheduler_for(own, name, "leading")
        ways += [(fast, f"DPM-Solver++ 2M {name}".strip(), steps) for steps in FAST_STEPS]
    for scheduler, name, steps in ways:
        yield [name, f"{steps}", *(f"{amplitude(scheduler, steps, s):.3f}" for s in DEVIATIONS)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/samplers"))
    parser.add_argument("--images", type=int, default=32, help="of each of the prompts, in a set")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    heads = ["sampler", "steps", *(f"{std:g}" for std in DEVIATIONS)]
    exact = tables.table(heads, amplitudes())
    replace_file(given.out / "amplitudes.md", exact.encode())
    print(exact, flush=True)
    study, names = Study(given.out, given.images), [[s.name, f"{s.steps}"] for s in samplers()]
    columns = [study.column(guidance, spacing) for guidance, spacing in BLOCKS]
    heads = ["sampler", "steps", *(f"guidance {g:g}, {spacing}" for g, spacing in BLOCKS)]
    rows = zip([["noise", ""], *names[1:]], zip(*columns, strict=True), strict=True)
    table = tables.table(heads, [[*name, *cells] for name, cells in rows])
    replace_file(given.out / "samplers.md", table.encode())
    print(table)


if __name__ == "__main__":
    main()
