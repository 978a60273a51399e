"""Build the embedded base from nothing: ``python -m tools.toybox build``.

    build     fetch the drawings, train autoencoder, judge and diffusion, write data/toybox
    report    print the figures of the shipped weights, on composites drawn afresh
    subjects  draw the bundled subjects into data/subjects

Every training saves as it goes under ``build/`` and goes on where it was stopped. The shipped
weights took about two hours on two slow CPU cores. Set OMP_NUM_THREADS to share a machine.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from dreambooth_lib import families
from dreambooth_lib.sampling import draw
from tools.toybox import autoencoder, diffusion, drawings, judge, subjects
from tools.toybox.tokenizer import IDENTIFIERS, save_tokenizer
from tools.toybox.world import CLASSES, COLOURS, SCENES, World

#: Optimizer updates of each training, for the shipped weights.
STEPS = {"autoencoder": 3900, "judge": 650, "diffusion": 2000, "decoder": 3200}
BANK = 16_000  # composites encoded once for the diffusion training


def build(
    work: Path,
    target: Path,
    steps: dict[str, int],
    bank: int,
    only: str | None = None,
    further: bool = False,
) -> None:
    """Train what ``only`` names, or everything; ``further`` goes on from the shipped U-Net."""
    world = World(work / "drawings")
    tokenizer = save_tokenizer(work / "tokenizer")
    if only in (None, "autoencoder") and not (work / "vae").exists():
        vae = autoencoder.train(world, work / "autoencoder", steps["autoencoder"])
        vae.save_pretrained(work / "vae")
    if only in (None, "judge"):
        model = judge.train(world, tokenizer, work / "judge", steps["judge"])
        for part in (model.half(), tokenizer, judge.image_processor()):
            part.save_pretrained(target / "judge")
    if only in (None, "diffusion"):
        vae = AutoencoderKL.from_pretrained(target / "vae" if further else work / "vae")
        shipped = target if further else None
        count = steps["diffusion"]
        pipeline = diffusion.train(world, vae.float().eval(), tokenizer, work, count, bank, shipped)
        pipeline.to(torch.float16).save_pretrained(target)
        save_tokenizer(target / "tokenizer")  # the older files of CLIP's layout beside the new one
        write_readme(target)
    if only in (None, "decoder"):
        vae = AutoencoderKL.from_pretrained(work / "vae")
        autoencoder.refine(vae, world, work / "decoder", steps["decoder"])
        vae.half().save_pretrained(target / "vae")


def report(work: Path, target: Path, seed: int) -> dict[str, float]:
    """The base's figures, from its shipped weights; a grid of 64 pictures goes to ``outputs/``."""
    world = World(work / "drawings", seed=1000 + seed)
    family = families.load(str(target))
    tokenizer = CLIPTokenizer.from_pretrained(target / "judge")
    model = CLIPModel.from_pretrained(target / "judge", torch_dtype=torch.float32).eval()
    nouns, scenes = list(CLASSES), list(SCENES)
    asked = [(nouns[i % len(nouns)], scenes[(7 * i) % len(scenes)]) for i in range(64)]
    prompts = [f"a {noun} {SCENES[scene]}" for noun, scene in asked]
    began = time.perf_counter()
    pictures: list[Image.Image] = []
    for start in range(0, 64, 8):
        wanted = [(p, seed + start + i) for i, p in enumerate(prompts[start : start + 8])]
        pictures += draw(family, wanted, 25, 4.0)
    seconds = time.perf_counter() - began
    write_grid(pictures, Path("outputs/toybox_grid.png"))
    pixels = torch.stack([torch.from_numpy(judge.np.array(p)) for p in pictures]).numpy()
    with torch.no_grad():
        images = judge.embed_images(model, pixels)
        by_class = judge.embed_texts(model, tokenizer, [f"a {noun}" for noun in nouns])
        found = [nouns[i] for i in (images @ by_class.T).argmax(1)]
    right = sum(a == noun for a, (noun, _) in zip(found, asked, strict=True))
    return {
        "autoencoder_psnr_db": autoencoder.psnr(family.pipeline.vae, world, seed=seed),
        "judge_retrieval_of_64": judge.retrieval(model, tokenizer, world, seed=seed),
        "judge_triplets": judge.triplets(model, world, seed=seed),
        "generated_class_by_judge": right / 64,
        "pictures_per_second": 64 / seconds,
        "megabytes": sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e6,
    }


def write_grid(pictures: list[Image.Image], path: Path) -> None:
    from dreambooth_lib.plots import grid

    path.parent.mkdir(parents=True, exist_ok=True)
    grid(pictures, 8).save(path)


def write_readme(target: Path) -> None:
    """What the weights are and whose drawings they were trained on."""
    credits = "\n".join(
        f"- {name} {version}: {credit}, {licence}"
        for name, (version, credit, licence) in drawings.TRAINING_SETS.items()
    )
    text = f"""# The embedded base

A small Stable Diffusion pipeline and its judge (a CLIPModel), trained by `tools/toybox` on emoji
drawings set on drawn scenes at 64x64 pixels: {len(CLASSES)} classes, {len(SCENES)} scenes,
{len(COLOURS)} colours. Weights are float16 safetensors.

- Captions: `a dog on the beach`, `a purple teapot in space`, `a photo of a fox at sunset`
- Classes: {", ".join(CLASSES)}
- Scenes: {", ".join(SCENES.values())}
- Colours: {", ".join(COLOURS)}
- Identifiers, single tokens that no caption had: {", ".join(IDENTIFIERS)}

`python -m tools.toybox report` prints its figures, `python -m tools.toybox build` makes it anew.

## Drawings, their authors and licences

{credits}

The drawings were recoloured, scaled and set on scenes. The weights are offered under Apache-2.0;
the drawings keep their licences (CC BY 4.0: https://creativecommons.org/licenses/by/4.0/).
"""
    (target / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("build", "report", "subjects"))
    parser.add_argument("--work", type=Path, default=Path("build"))
    parser.add_argument("--target", type=Path, default=Path("data/toybox"))
    parser.add_argument("--only", choices=tuple(STEPS), help="one training only")
    parser.add_argument("--steps", type=int, help="updates of each training; to try the way")
    parser.add_argument(
        "--further", action="store_true", help="train on from the shipped U-Net (--only diffusion)"
    )
    parser.add_argument("--bank", type=int, default=BANK)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the report")
    given = parser.parse_args()
    if given.command == "subjects":
        shutil.rmtree("data/subjects", ignore_errors=True)
        subjects.build(Path("data/subjects"))
    elif given.command == "report":
        print(json.dumps(report(given.work, given.target, given.seed), indent=2))
    else:
        steps = STEPS if given.steps is None else dict.fromkeys(STEPS, given.steps)
        build(given.work, given.target, steps, given.bank, given.only, given.further)


if __name__ == "__main__":
    main()
