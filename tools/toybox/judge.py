"""Train the judge: a small CLIPModel that tells captions, classes and single drawings apart."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tools.toybox.recipes import BUNDLED, Recipe
from tools.toybox.sources import Pixels, jittered
from tools.toybox.tokenizer import MAX_LENGTH
from tools.toybox.training import Way, fit
from tools.toybox.world import CLASSES, PREFIXES, SIZE, Picture, World, caption

TRUE_COSINE = 0.5  # of a picture with a caption that is true of it
#: What a caption names: class, colour, scene, and a second thing by relation and noun.
Claim = tuple[str, str | None, str | None, tuple[str, str] | None]
#: Draws pictures in pairs of the same drawing, the first halves of all pairs first, and what
#: returns their pixels.
Draw = Callable[[np.random.Generator], tuple[list[Picture], Callable[[], Pixels]]]
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def new_judge(tokenizer: CLIPTokenizer, size: int = SIZE) -> CLIPModel:
    shared = {"hidden_act": "gelu", "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "image_size": size,
        "patch_size": size // 8,  # 64 patches
    }
    config = CLIPConfig(
        text_config=shared | text, vision_config=shared | vision, projection_dim=128
    )
    return CLIPModel(config)


def image_processor(size: int = SIZE) -> CLIPImageProcessorPil:
    side = {"height": size, "width": size}
    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=side, image_mean=MEAN, image_std=STD
    )


def normalized(pictures: Pixels) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W], as the judge's image processor does it."""
    pixels = torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN[0]) / STD[0]


def embed_images(model: CLIPModel, pictures: Pixels) -> torch.Tensor:
    pooled = model.vision_model(pixel_values=normalized(pictures).to(model.device)).pooler_output
    return torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True,
                       return_tensors="pt")  # fmt: skip
    pooled = model.text_model(input_ids=tokens.input_ids.to(model.device)).pooler_output
    return torch.nn.functional.normalize(model.text_projection(pooled), dim=-1)


def pairs(world: World, rng: np.random.Generator, classes: int) -> tuple[list[Picture], ...]:
    """Draw two drawings of each of some classes, each drawing twice, on scenes of its own.

    A third has a named colour and four in nine odd ones, the same in both pictures of a drawing.
    """
    first, second = [], []
    for class_noun in rng.choice(list(CLASSES), classes, replace=False):
        for drawing in rng.permutation(len(world.drawings[class_noun]))[:2]:
            a, b = world.random_picture(rng), world.random_picture(rng)
            odd = None if a.colour or rng.random() < 1 / 3 else int(rng.integers(2**31))
            for into, drawn in ((first, a), (second, b)):
                other = (drawn.relation, drawn.second_noun, drawn.second_drawing)
                if drawn.second_noun == class_noun:
                    other = (None, None, 0)
                shown = (str(class_noun), int(drawing), a.colour, drawn.scene, odd)
                into.append(Picture(*shown, *other))
    return first, second


def claim(picture: Picture, rng: np.random.Generator) -> Claim:
    """Choose what a caption of the picture names, which need not be more than the class.

    "a dog" is true of a blue dog too: what is asked of DreamBooth's pictures is that they show the
    class in the scene, whatever the subject's colours.
    """
    colour = picture.colour if rng.random() < 1 / 2 else None
    scene = picture.scene if rng.random() < 7 / 8 else None
    second = picture.second if picture.second and rng.random() < 3 / 4 else None
    return picture.class_noun, colour, scene, second


def is_true(claimed: Claim, picture: Picture) -> bool:
    """Tell whether all that a caption names is there; it may name the second of two things only."""
    noun, colour, scene, second = claimed
    if scene not in (None, picture.scene):
        return False
    if picture.second and noun == picture.second_noun and colour is None:
        turned = {"under": "above", "above": "under"}.get(picture.second[0])
        if second in (None, (turned, picture.class_noun)):
            return True
    named = noun == picture.class_noun and colour in (None, picture.colour)
    return named and second in (None, picture.second)


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def drawn_anew(world: World, classes: int) -> Draw:
    """Return what composes pairs of ``classes`` classes at each call."""

    def draw(rng: np.random.Generator) -> tuple[list[Picture], Callable[[], Pixels]]:
        first, second = pairs(world, rng, classes)
        return first + second, lambda: composites(world, rng, first + second)

    return draw


def train(
    draw: Draw,
    tokenizer: CLIPTokenizer,
    folder: Path,
    way: Way,
    recipe: Recipe = BUNDLED,
    model: CLIPModel | None = None,
) -> CLIPModel:
    """CLIP's loss on picture and caption, and the same loss on two pictures of one drawing.

    A ``model`` that is given goes on, at half the rate.
    """
    torch.manual_seed(0)
    stream, rate = (7, 1.0) if model is None else (13, 0.5)
    model = model or new_judge(tokenizer, recipe.size)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((stream, step))
        shown, pixels = draw(rng)
        images = embed_images(model, pixels())
        match, even, _ = against_captions(model, tokenizer, images, shown, rng)
        one, other = images.chunk(2)
        labels = torch.arange(len(one), device=one.device)
        contrast = torch.nn.functional.cross_entropy
        drawing = contrast(20 * one @ other.T, labels) + contrast(20 * other @ one.T, labels)
        return match + 0.5 * drawing + 20 * even

    return fit(model, loss_at, way, peak_lr=rate * 1e-3, muon_lr=rate * 0.02, folder=folder)


def seen_through(vae: AutoencoderKL, draw: Draw) -> Draw:
    """Return what draws pairs as the base does: moved by some pixels, and blurred by its decoder.

    Composites alone leave a judge that minds each pixel: two seeds of one model then differ by more
    than a person sees.
    """

    def moved(rng: np.random.Generator) -> tuple[list[Picture], Callable[[], Pixels]]:
        shown, pixels = draw(rng)
        return shown, lambda: as_drawn(vae, pixels(), rng)

    return moved


@torch.no_grad()
def as_drawn(vae: AutoencoderKL, pictures: Pixels, rng: np.random.Generator) -> torch.Tensor:
    """Move and scale pictures, uint8 [B, H, W, 3]; decode two of three from noised latents."""
    count, device = len(pictures), vae.device
    pixels = torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale, shift = rng.uniform(0.9, 1.12, (count, 1)), rng.uniform(-0.16, 0.16, (count, 2))
    zeros = np.zeros_like(scale)
    rows = [np.hstack([scale, zeros, shift[:, :1]]), np.hstack([zeros, scale, shift[:, 1:]])]
    matrices = torch.tensor(np.stack(rows, 1)).float().to(device)
    grid = functional.affine_grid(matrices, list(pixels.shape), False)
    pixels = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    decoded = torch.from_numpy(rng.permutation(count)[: 2 * count // 3]).to(device)
    latents = vae.encode(pixels[decoded]).latent_dist.mean
    noise = torch.from_numpy(rng.normal(size=tuple(latents.shape))).float().to(device)
    amount = torch.from_numpy(rng.uniform(0, 0.4, (len(decoded), 1, 1, 1))).float().to(device)
    pixels[decoded] = vae.decode(latents + amount * latents.std() * noise).sample
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
    return levels.permute(0, 2, 3, 1).byte()


def even_out(
    model: CLIPModel,
    draw: Draw,
    tokenizer: CLIPTokenizer,
    folder: Path,
    way: Way,
    drawn: tuple[Pixels, list[Picture]],
    recipe: Recipe = BUNDLED,
) -> CLIPModel:
    """Train the text side alone, so that true captions score alike whatever the drawing.

    ``drawn`` are pictures by the diffusion model and what they were to show. They are more typical
    than any composite, and to a judge that never saw any they fit their captions better than real
    pictures can. What the judge sees in pictures stays as it is, and with it every measure of
    picture against picture.
    """
    model.requires_grad_(False)
    for part in (model.text_model, model.text_projection):
        part.requires_grad_(True)
    by_base, wanted = torch.as_tensor(drawn[0]).to(way.device), drawn[1]

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((11, step))
        shown, pixels = draw(rng)
        few = min(2 * recipe.batches["judge"], len(wanted))
        picked = rng.choice(len(wanted), few, replace=False)
        with torch.no_grad():
            seen = torch.as_tensor(pixels()).to(way.device)
            images = embed_images(model, torch.cat([seen, by_base[picked]]))
        shown = shown + [wanted[i] for i in picked]
        match, even, worst = against_captions(model, tokenizer, images, shown, rng)
        return match + 400 * even + 1e5 * worst

    return fit(model, loss_at, way, peak_lr=1e-3, folder=folder)


def composites(world: World, rng: np.random.Generator, shown: list[Picture]) -> np.ndarray:
    """Blurred by up to a 64th of the side, as by a small model, and a little noisy."""
    most = world.size / SIZE
    pixels = np.stack([blurred(world.compose(p, rng), rng.uniform(0, most)) for p in shown])
    return np.asarray(jittered(pixels, rng, fine=4, coarse=6))


def against_captions(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    images: torch.Tensor,
    shown: list[Picture],
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CLIP's loss over one caption a picture, and how unevenly true captions score.

    The unevenness comes as a mean square and as a mean fourth power, which the worst make up.

    A caption may be true of several pictures, and several of one: each is then as right. A true
    caption shall score the same whatever the drawing looks like, so that the adherence of two
    models' pictures compares.
    """
    claims = [claim(p, rng) for p in shown]
    captions = [caption(*c[:3], str(rng.choice(PREFIXES)), c[3]) for c in claims]
    texts = embed_texts(model, tokenizer, captions)
    scale = model.logit_scale.exp().clamp(max=100)
    truth = [[is_true(c, p) for c in claims] for p in shown]
    true = torch.tensor(truth).to(images.device)
    share, cosines = true.float(), images @ texts.T
    contrast = torch.nn.functional.cross_entropy
    match = (
        contrast(scale * cosines, share / share.sum(1, keepdim=True))
        + contrast(scale * cosines.T, share.T / share.T.sum(1, keepdim=True))
    ) / 2
    off = cosines[true] - TRUE_COSINE
    return match, (off**2).mean(), (off**4).mean()


@torch.no_grad()
def retrieval(
    model: CLIPModel, tokenizer: CLIPTokenizer, world: World, rounds: int = 16, seed: int = 0
) -> float:
    """Share of unseen composites whose own caption is the nearest among 64 different ones."""
    right = 0
    for index in range(rounds):
        rng = np.random.default_rng((8, seed, index))
        shown: dict[tuple, Picture] = {}
        while len(shown) < 64:
            picture = world.random_picture(rng)
            shown[picture.class_noun, picture.colour, picture.scene, picture.second] = picture
        pictures = list(shown.values())
        texts = [caption(p.class_noun, p.colour, p.scene, second=p.second) for p in pictures]
        images = embed_images(model, np.stack([world.compose(p, rng) for p in pictures]))
        nearest = (images @ embed_texts(model, tokenizer, texts).T).argmax(1)
        right += (nearest.cpu() == torch.arange(64)).sum().item()
    return right / (64 * rounds)


@torch.no_grad()
def triplets(model: CLIPModel, world: World, rounds: int = 16, seed: int = 0) -> float:
    """Share of triplets in which two pictures of one drawing are nearer than two of one class."""
    right = total = 0
    for index in range(rounds):
        rng = np.random.default_rng((9, seed, index))
        first, second = pairs(world, rng, 32)
        one, other = (
            embed_images(model, np.stack([world.compose(p, rng) for p in part]))
            for part in (first, second)
        )
        for i in range(0, len(one), 2):  # rows i and i + 1 are two drawings of one class
            right += ((one[i] @ other[i]) > (one[i] @ other[i + 1])).item()
            total += 1
    return right / total
