"""Make a base of 128 pixels and two things within minutes of a GPU; torch, diffusers, transformers.

Processes compose pictures from a pack of drawings while the GPU trains on those that there are
(:mod:`tools.toybox.pool`). Every training ends by the clock and saves every minute, in a call of
less than six minutes more often; a call that was killed goes on with what is left of its time.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel

from dreambooth_lib.families.precision import save_pipeline
from tools.toybox import autoencoder, classifier, diffusion, judge, report, shards
from tools.toybox.pool import Makers, Pool
from tools.toybox.recipes import Recipe
from tools.toybox.tokenizer import save_tokenizer
from tools.toybox.training import Way
from tools.toybox.world import World

#: Training -> its share of the time. The rest goes to the start, the bank and the figures.
SHARES = {
    "autoencoder": 0.22,
    "classifier": 0.06,
    "diffusion": 0.42,
    "judge": 0.09,
    "steady": 0.04,
    "captions": 0.04,
}
FIGURES_SEED = 2027
#: The figures that a new base is compared with.
CURRENT = Path(__file__).parents[2] / "data" / "toybox" / "README.md"


def ways(minutes: float, device: str) -> dict[str, Way]:
    """Return each training's way: its share of the minutes, in half precision on a GPU.

    bfloat16 where the GPU computes in it, else float16. The judge is small, and its cosines shall
    be finer than half precision: it trains in float32.
    """
    dtype = torch.float32
    if device != "cpu":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = torch.bfloat16 if native else torch.float16
    return {
        name: Way(
            sys.maxsize,
            60 * minutes * share,
            device,
            torch.float32 if name in ("judge", "steady", "captions") else dtype,
            save_every_s=min(60.0, 10 * minutes),
        )
        for name, share in SHARES.items()
    }


def make(
    pack: Path, out: Path, minutes: float, recipe: Recipe, device: str, workers: int | None = None
) -> dict[str, float]:
    """Train a base into ``out``, print its figures, and write it in shards; return the figures."""
    began = time.monotonic()
    if not pack.is_file():
        raise FileNotFoundError(
            f"there is no pack of drawings at {pack}; make it where npm is, by "
            "`python -m tools.toybox pack --out FILE`, and bring it here."
        )
    makers = Makers(pack, recipe, workers or max(1, (os.cpu_count() or 2) - 1))
    try:
        done = (out / "base" / "model_index.json").exists()  # then few are left to be used
        plain = makers.plain(1 if done else recipe.bank, device)
        pairs = makers.pairs(recipe.bank // 3, device)
        plain.gather(1)  # every worker was forked before the GPU is used
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        train(plain, pairs, out, ways(minutes, device), recipe)
    finally:
        makers.close()
    world = World(
        pack, scenes_each=50, seed=1000 + FIGURES_SEED, size=recipe.size, pairs=recipe.pairs
    )
    figures = report.report(world, out / "base", FIGURES_SEED, rounds_of(recipe, 5), device)
    machine = torch.cuda.get_device_name(device) if device != "cpu" else "a CPU"
    report.write_readme(out / "base", figures, FIGURES_SEED, recipe, machine)
    print(report.compared(figures, report.read_table(CURRENT.read_text())))
    parts = shards.split(out / "base", out / "shards")
    print(f"{len(parts)} shards in {out / 'shards'}; {time.monotonic() - began:.0f} s in this call")
    return figures


def rounds_of(recipe: Recipe, rounds: int) -> int:
    """Return how often every class is drawn; where a recipe is only tried, once."""
    return rounds if recipe.bank >= 10_000 else 1


def train(plain: Pool, pairs: Pool, out: Path, way: dict[str, Way], recipe: Recipe) -> None:
    """Train what is not there yet: each part is put in its place when it is whole."""
    work, base, device = out / "work", out / "base", way["autoencoder"].device
    tokenizer = save_tokenizer(work / "tokenizer", pairs=recipe.pairs > 0)
    if not (work / "vae").exists():
        vae = autoencoder.train(plain, work / "autoencoder", way["autoencoder"], recipe)
        _place(work / "vae", vae.cpu())
    if not (base / "classifier").exists():
        examiner = classifier.train(plain, work / "classifier", way["classifier"], recipe)
        _place(base / "classifier", examiner.cpu().half())
    if not (base / "model_index.json").exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").eval().to(device)
        bank = diffusion.encode(vae, plain.chunks())
        pipeline = diffusion.train(
            bank, vae, tokenizer, work / "diffusion", way["diffusion"], recipe
        )
        saved = work / "pipeline"
        save_pipeline(pipeline.to(torch.float16), saved)
        save_tokenizer(saved / "tokenizer", pairs=recipe.pairs > 0)
        for part in sorted(saved.iterdir(), key=Path.is_file):  # model_index.json comes last
            if part.is_dir():
                shutil.copytree(part, base / part.name, dirs_exist_ok=True)
            else:
                shutil.copy(part, base / part.name)
    if not (base / "judge").exists():
        if not (work / "seeing").exists():
            model = judge.train(pairs.chunk, tokenizer, work / "judge", way["judge"], recipe)
            _place(work / "seeing", model)
        if not (work / "steadied").exists():
            vae = AutoencoderKL.from_pretrained(work / "vae").eval().to(device)
            moved = judge.seen_through(vae, pairs.chunk)
            model = CLIPModel.from_pretrained(work / "seeing")
            model = judge.train(moved, tokenizer, work / "steady", way["steady"], recipe, model)
            _place(work / "steadied", model)
        model = CLIPModel.from_pretrained(work / "steadied")
        drawn = report.drawn_by(base, work / "drawn.npy", rounds_of(recipe, report.ROUNDS), device)
        model = judge.even_out(
            model, pairs.chunk, tokenizer, work / "captions", way["captions"], drawn, recipe
        )
        _place(base / "judge", model.cpu().half(), tokenizer, judge.image_processor(recipe.size))


def _place(folder: Path, *parts) -> None:
    """Save models into a folder that appears when all of it is written."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in parts:
        part.save_pretrained(partial)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
