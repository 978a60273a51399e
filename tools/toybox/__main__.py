"""Build the bundled base from nothing: ``python -m tools.toybox build``.

    build     fetch the drawings, train autoencoder, classifier, diffusion and judge, write
              data/toybox
    report    print the figures of the shipped weights, on composites and seeds drawn afresh
    rescale   scale the shipped autoencoder to what float16 holds, as a build does
    subjects  draw the bundled subjects into data/subjects

Every training saves as it goes under ``build/`` and goes on where it was stopped; the whole takes
about four hours on two slow CPU cores. Set OMP_NUM_THREADS to share a machine.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from dreambooth_lib.families import loading
from dreambooth_lib.families.precision import save_pipeline
from tools.toybox import autoencoder, classifier, diffusion, drawings, judge, report, subjects
from tools.toybox.tokenizer import save_tokenizer
from tools.toybox.world import Picture, World

#: Optimizer updates of each training, for the shipped weights.
STEPS = {
    "autoencoder": 3600,
    "classifier": 600,
    "diffusion": 5200,
    "judge": 1500,
    "captions": 1400,
}
BANK = 24_000  # composites encoded once for the diffusion training
ROUNDS, DRAWN_SEED = 15, 2_000_000  # of every class, the base's pictures that the judge learns from


def build(
    work: Path,
    target: Path,
    steps: dict[str, int],
    bank: int,
    only: str | None = None,
    rounds: int = ROUNDS,
) -> None:
    """Train what ``only`` names, or everything, and write it to ``target``."""
    world = World(work / "drawings")
    tokenizer = save_tokenizer(work / "tokenizer")
    if only in (None, "autoencoder") and not (work / "vae").exists():
        vae = autoencoder.train(world, work / "autoencoder", steps["autoencoder"])
        vae.save_pretrained(work / "vae")
    if only in (None, "classifier"):
        examiner = classifier.train(world, work / "classifier", steps["classifier"])
        examiner.half().save_pretrained(target / "classifier")
    if only in (None, "diffusion"):
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
        pipeline = diffusion.train(world, vae, tokenizer, work, steps["diffusion"], bank)
        save_pipeline(pipeline.to(torch.float16), target)
        save_tokenizer(target / "tokenizer")  # the older files of CLIP's layout beside the new one
        report.write_readme(target)
    if only in (None, "judge"):
        # It is to measure the held-out subjects, so it knows the hand that drew them.
        every = World(work / "drawings", sets=drawings.TRAINING_SETS | drawings.HELD_OUT_SETS)
        model = judge.train(every, tokenizer, work / "judge", steps["judge"])
        drawn = drawn_by_base(target, work / "drawn.npy", rounds)
        model = judge.even_out(model, every, tokenizer, work / "captions", steps["captions"], drawn)
        for part in (model.half(), tokenizer, judge.image_processor()):
            part.save_pretrained(target / "judge")


def drawn_by_base(target: Path, file: Path, rounds: int) -> tuple[np.ndarray, list[Picture]]:
    """Pictures by the diffusion model of every class, and what they were to show; drawn once."""
    shown = report.wanted(rounds)
    if not file.exists():
        pictures = report.pictures_of(loading.load_model(str(target)), shown, DRAWN_SEED)
        np.save(file, report.as_array(pictures))
    return np.load(file), shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("build", "report", "rescale", "subjects"))
    parser.add_argument("--work", type=Path, default=Path("build"))
    parser.add_argument("--target", type=Path, default=Path("data/toybox"))
    parser.add_argument("--only", choices=("autoencoder", "classifier", "diffusion", "judge"))
    parser.add_argument("--steps", type=int, help="updates of each training; to try the way")
    parser.add_argument("--bank", type=int, default=BANK)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the report")
    parser.add_argument("--write", action="store_true", help="the report into the base's README")
    given = parser.parse_args()
    if given.command == "subjects":
        shutil.rmtree("data/subjects", ignore_errors=True)
        subjects.build(Path("data/subjects"))
    elif given.command == "rescale":
        vae = AutoencoderKL.from_pretrained(given.target / "vae").eval()
        vae = autoencoder.within_half(vae, World(given.work / "drawings"))
        vae.half().save_pretrained(given.target / "vae")
    elif given.command == "report":
        figures = report.report(given.work, given.target, given.seed)
        print(json.dumps(figures, indent=2))
        if given.write:
            report.write_readme(given.target, figures, given.seed)
    else:
        steps = STEPS if given.steps is None else dict.fromkeys(STEPS, given.steps)
        build(given.work, given.target, steps, given.bank, given.only)


if __name__ == "__main__":
    main()
