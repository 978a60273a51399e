"""Train the judge: a small CLIPModel that tells captions, classes and single drawings apart."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tools.toybox.tokenizer import MAX_LENGTH
from tools.toybox.training import fit
from tools.toybox.world import CLASSES, PREFIXES, Picture, World, caption

TRUE_COSINE = 0.5  # of a picture with a caption that is true of it
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def new_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
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
        "image_size": 64,
        "patch_size": 8,
    }
    config = CLIPConfig(
        text_config=shared | text, vision_config=shared | vision, projection_dim=128
    )
    return CLIPModel(config)


def image_processor() -> CLIPImageProcessorPil:
    side = {"height": 64, "width": 64}
    return CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size=side, image_mean=MEAN, image_std=STD
    )


def normalized(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W], as the judge's image processor does it."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN[0]) / STD[0]


def embed_images(model: CLIPModel, pictures: np.ndarray) -> torch.Tensor:
    pooled = model.vision_model(pixel_values=normalized(pictures)).pooler_output
    return torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True,
                       return_tensors="pt")  # fmt: skip
    pooled = model.text_model(input_ids=tokens.input_ids).pooler_output
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
            for into, scene in ((first, a.scene), (second, b.scene)):
                into.append(Picture(str(class_noun), int(drawing), a.colour, scene, odd))
    return first, second


def claim(picture: Picture, rng: np.random.Generator) -> tuple[str, str | None, str | None]:
    """Class, colour and scene that a caption of the picture names; it need not name the last two.

    "a dog" is true of a blue dog too: what is asked of DreamBooth's pictures is that they show the
    class in the scene, whatever the subject's colours.
    """
    colour = picture.colour if rng.random() < 1 / 2 else None
    return picture.class_noun, colour, picture.scene if rng.random() < 7 / 8 else None


def is_true(claimed: tuple[str, str | None, str | None], picture: Picture) -> bool:
    shown = (picture.class_noun, picture.colour, picture.scene)
    return all(said is None or said == seen for said, seen in zip(claimed, shown, strict=True))


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def train(
    world: World, tokenizer: CLIPTokenizer, folder: Path, steps: int, classes: int = 16
) -> CLIPModel:
    """CLIP's loss on picture and caption, and the same loss on two pictures of one drawing."""
    torch.manual_seed(0)
    model = new_judge(tokenizer)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((7, step))
        first, second = pairs(world, rng, classes)
        pictures = composites(world, rng, first + second)
        return matching_loss(model, tokenizer, pictures, first + second, rng)

    return fit(model, loss_at, steps=steps, peak_lr=1e-3, folder=folder)


def matching_loss(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    pictures: np.ndarray,
    shown: list[Picture],
    rng: np.random.Generator,
) -> torch.Tensor:
    """CLIP's loss with the captions, and the same loss between the two halves of the pictures."""
    images = embed_images(model, pictures)
    match, even, _ = against_captions(model, tokenizer, images, shown, rng)
    one, other = images.chunk(2)
    labels = torch.arange(len(one))
    contrast = torch.nn.functional.cross_entropy
    drawing = contrast(20 * one @ other.T, labels) + contrast(20 * other @ one.T, labels)
    return match + 0.5 * drawing + 20 * even


def steady(
    model: CLIPModel,
    vae: AutoencoderKL,
    world: World,
    tokenizer: CLIPTokenizer,
    folder: Path,
    steps: int,
    classes: int = 16,
) -> CLIPModel:
    """Go on with pictures as the base draws them: moved by some pixels, and blurred by its decoder.

    Composites alone leave a judge that minds each pixel: two seeds of one model then differ by more
    than a person sees.
    """

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((13, step))
        first, second = pairs(world, rng, classes)
        pictures = as_drawn(vae, composites(world, rng, first + second), rng)
        return matching_loss(model, tokenizer, pictures, first + second, rng)

    return fit(model, loss_at, steps=steps, peak_lr=5e-4, folder=folder, muon_lr=0.01)


@torch.no_grad()
def as_drawn(vae: AutoencoderKL, pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move and scale pictures, uint8 [B, 64, 64, 3]; decode two of three from noised latents."""
    count = len(pictures)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale, shift = rng.uniform(0.9, 1.12, (count, 1)), rng.uniform(-0.16, 0.16, (count, 2))
    zeros = np.zeros_like(scale)
    rows = [np.hstack([scale, zeros, shift[:, :1]]), np.hstack([zeros, scale, shift[:, 1:]])]
    matrices = torch.tensor(np.stack(rows, 1)).float()
    grid = functional.affine_grid(matrices, list(pixels.shape), False)
    pixels = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    decoded = rng.permutation(count)[: 2 * count // 3]
    latents = vae.encode(pixels[decoded]).latent_dist.mean
    noise = torch.from_numpy(rng.normal(size=tuple(latents.shape))).float()
    amount = torch.from_numpy(rng.uniform(0, 0.4, (len(decoded), 1, 1, 1))).float()
    pixels[decoded] = vae.decode(latents + amount * latents.std() * noise).sample
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
    return levels.permute(0, 2, 3, 1).byte().numpy()


def even_out(
    model: CLIPModel,
    world: World,
    tokenizer: CLIPTokenizer,
    folder: Path,
    steps: int,
    drawn: tuple[np.ndarray, list[Picture]],
    classes: int = 16,
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

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((11, step))
        first, second = pairs(world, rng, classes)
        picked = rng.choice(len(drawn[1]), 2 * classes, replace=False)
        pixels = np.concatenate([composites(world, rng, first + second), drawn[0][picked]])
        with torch.no_grad():
            images = embed_images(model, pixels)
        shown = first + second + [drawn[1][i] for i in picked]
        match, even, worst = against_captions(model, tokenizer, images, shown, rng)
        return match + 400 * even + 1e5 * worst

    return fit(model, loss_at, steps=steps, peak_lr=1e-3, folder=folder)


def composites(world: World, rng: np.random.Generator, shown: list[Picture]) -> np.ndarray:
    """Blurred by up to a pixel, as pictures that a small model draws are, and a little noisy."""
    pixels = np.stack([blurred(world.compose(p, rng), rng.uniform(0, 1)) for p in shown])
    jitter = rng.normal(0, 4, pixels.shape) + rng.normal(0, 6, (len(pixels), 1, 1, 3))
    return (pixels + jitter).clip(0, 255).astype(np.uint8)


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
    texts = embed_texts(model, tokenizer, [caption(*c, str(rng.choice(PREFIXES))) for c in claims])
    scale = model.logit_scale.exp().clamp(max=100)
    true = torch.tensor([[is_true(c, p) for c in claims] for p in shown])
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
            shown[picture.class_noun, picture.colour, picture.scene] = picture
        pictures = list(shown.values())
        texts = [caption(p.class_noun, p.colour, p.scene) for p in pictures]
        images = embed_images(model, np.stack([world.compose(p, rng) for p in pictures]))
        nearest = (images @ embed_texts(model, tokenizer, texts).T).argmax(1)
        right += (nearest == torch.arange(64)).sum().item()
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
