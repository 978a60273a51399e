"""Build the bundled base from nothing: ``python -m tools.toybox build``.

    build     fetch the drawings, train autoencoder, classifier, diffusion and judge, write
              data/toybox
    report    print the figures of the shipped weights, on composites and seeds drawn afresh
    rescale   scale the shipped autoencoder to what float16 holds, as a build does
    subjects  draw the bundled subjects into data/subjects, the studies' into docs/studies/subjects
    pack      write the rendered drawings, which gpu needs, to one file
    gpu       make a better base within minutes of a GPU, from that file (tools.toybox.gpu)
    join      put the shards that gpu wrote together again

Every training saves as it goes under ``build/`` and goes on where it was stopped; the whole takes
about four hours on two slow CPU cores. Set OMP_NUM_THREADS to share a machine.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from dreambooth_lib.families.precision import save_pipeline
from tools.toybox import (
    autoencoder,
    classifier,
    diffusion,
    drawings,
    gpu,
    judge,
    report,
    shards,
    subjects,
)
from tools.toybox.recipes import BUNDLED, RECIPES
from tools.toybox.tokenizer import save_tokenizer
from tools.toybox.training import Way
from tools.toybox.world import DRAWING_SIZE, World, render_all

COMMANDS = ("build", "report", "rescale", "subjects", "pack", "gpu", "join")

#: Optimizer updates of each training, for the shipped weights.
STEPS = {
    "autoencoder": 3600,
    "classifier": 600,
    "diffusion": 5200,
    "judge": 1500,
    "steady": 700,
    "captions": 1400,
}


def build(
    work: Path,
    target: Path,
    steps: dict[str, int],
    bank: int,
    only: str | None = None,
    rounds: int = report.ROUNDS,
) -> None:
    """Train what ``only`` names, or everything, and write it to ``target``."""
    world = World(work / "drawings")
    tokenizer = save_tokenizer(work / "tokenizer")
    ways = {name: Way(count) for name, count in steps.items()}
    if only in (None, "autoencoder") and not (work / "vae").exists():
        vae = autoencoder.train(world, work / "autoencoder", ways["autoencoder"])
        vae.save_pretrained(work / "vae")
    if only in (None, "classifier"):
        examiner = classifier.train(world, work / "classifier", ways["classifier"])
        examiner.half().save_pretrained(target / "classifier")
    if only in (None, "diffusion"):
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
        latents = diffusion.saved_bank(vae, world, bank, work / "bank")
        pipeline = diffusion.train(latents, vae, tokenizer, work / "diffusion", ways["diffusion"])
        save_pipeline(pipeline.to(torch.float16), target)
        save_tokenizer(target / "tokenizer")  # the older files of CLIP's layout beside the new one
        report.write_readme(target)
    if only in (None, "judge"):
        # It is to measure the held-out subjects, so it knows the hand that drew them.
        every = World(work / "drawings", sets=drawings.EVERY_SET)
        draw = judge.drawn_anew(every, BUNDLED.batches["judge"])
        model = judge.train(draw, tokenizer, work / "judge", ways["judge"])
        vae = AutoencoderKL.from_pretrained(target / "vae").float().eval()
        moved = judge.seen_through(vae, draw)
        model = judge.train(moved, tokenizer, work / "steady", ways["steady"], model=model)
        drawn = report.drawn_by(target, work / "drawn.npy", rounds)
        model = judge.even_out(model, draw, tokenizer, work / "captions", ways["captions"], drawn)
        for part in (model.half(), tokenizer, judge.image_processor()):
            part.save_pretrained(target / "judge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--work", type=Path, default=Path("build"))
    parser.add_argument("--target", type=Path, default=Path("data/toybox"))
    parser.add_argument("--only", choices=("autoencoder", "classifier", "diffusion", "judge"))
    parser.add_argument("--steps", type=int, help="updates of each training; to try the way")
    parser.add_argument("--bank", type=int, default=BUNDLED.bank)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the report")
    parser.add_argument("--minutes", type=float, default=8.0, help="of gpu, all calls together")
    parser.add_argument("--out", type=Path, help="the file of pack, the folder of gpu and join")
    parser.add_argument("--pack", type=Path, default=Path("build/drawings.zip"), help="for gpu")
    parser.add_argument("--device", default="cuda", help="of gpu")
    parser.add_argument("--recipe", choices=RECIPES, default="large", help="of gpu and pack")
    parser.add_argument("--workers", type=int, help="processes that compose, of gpu")
    parser.add_argument("--write", action="store_true", help="the report into the base's README")
    given = parser.parse_args()
    if given.command in ("pack", "gpu", "join") and given.out is None:
        parser.error(f"{given.command} needs --out")
    if given.command == "pack":
        size = round(DRAWING_SIZE * RECIPES[given.recipe].size)
        every = {s: render_all(given.work / "drawings", s, size) for s in drawings.EVERY_SET}
        drawings.write_pack(given.out, every)
        print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB")
    elif given.command == "gpu":
        recipe = RECIPES[given.recipe]
        gpu.make(given.pack, given.out, given.minutes, recipe, given.device, given.workers)
    elif given.command == "join":
        shards.join(given.out / "shards", given.out / "joined")
    elif given.command == "subjects":
        shutil.rmtree("data/subjects", ignore_errors=True)
        subjects.build(Path("data/subjects"))
        for name in subjects.STUDY_SUBJECTS:
            subjects.draw_study_subject(name, subjects.STUDY_PHOTOS)
    elif given.command == "rescale":
        vae = AutoencoderKL.from_pretrained(given.target / "vae").eval()
        vae = autoencoder.within_half(vae, World(given.work / "drawings"))
        vae.half().save_pretrained(given.target / "vae")
    elif given.command == "report":
        world = World(given.work / "drawings", seed=1000 + given.seed)
        figures = report.report(world, given.target, given.seed)
        print(json.dumps(figures, indent=2))
        if given.write:
            report.write_readme(given.target, figures, given.seed)
    else:
        steps = STEPS if given.steps is None else dict.fromkeys(STEPS, given.steps)
        build(given.work, given.target, steps, given.bank, given.only)


if __name__ == "__main__":
    main()
